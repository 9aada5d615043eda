//! Teachers behind a server: what they give is what the same teacher gives here, whatever the network does, and what is no
//! answer is refused by its place.

mod prompt_server;
mod small_run;

use std::fs;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use limbeck::cache::CacheReader;
use limbeck::recipe::Recipe;
use limbeck::targets::TargetSource;
use limbeck::{Error, distill, precompute};
use prompt_server::*;
use serde_json::{Value, json};
use small_run::*;

/// The small recipe with its teacher behind servers; `more` are lines of `[teacher]`.
fn remote(small: &SmallRun, servers: &[&PromptServer], more: &str, overrides: &[&str]) -> Recipe {
    let urls: Vec<String> = servers.iter().map(|server| format!("{:?}", server.url())).collect();
    let teacher = format!("mode = \"remote\"\nurl = [{}]\nmodel = \"small\"\n{more}", urls.join(", "));
    let text = RECIPE.replace("checkpoint = \"teacher\"", &teacher).replace("temperatures = [1.0, 2.0]\n", "");
    fs::write(small.path("remote.toml"), text).unwrap();
    let overrides: Vec<String> = overrides.iter().map(|word| word.to_string()).collect();
    Recipe::load(small.path("remote.toml"), &overrides).unwrap()
}

/// The error of filling the caches of such a recipe.
fn error(small: &SmallRun, server: &PromptServer, more: &str, overrides: &[&str]) -> String {
    let recipe = remote(small, &[server], more, overrides);
    let _ = fs::remove_dir_all(small.path("refused"));
    let error = precompute::run(&recipe, &small.options("refused")).unwrap_err();
    small.shortened(&error.to_string()).replace(&server.url(), "URL")
}

/// The largest differences of log-probabilities and of tails, after the kept ids were found to be the same.
fn differences(left: &CacheReader, right: &CacheReader) -> (f64, f64, usize) {
    assert_eq!(left.sequence_count(), right.sequence_count());
    let (mut of_log_probs, mut of_tails, mut rows) = (0.0f64, 0.0f64, 0);
    for number in 0..left.sequence_count() {
        let (left, right) = (left.read(&[number]).unwrap(), right.read(&[number]).unwrap());
        assert_eq!(left.sequences, right.sequences);
        let (ours, theirs) = (left.targets.unwrap(), right.targets.unwrap());
        let (mine, other) = (&ours.captures[0], &theirs.captures[0]);
        for row in (0..left.sequences[0].seq_len()).filter(|row| left.sequences[0].is_valid(*row)) {
            rows += 1;
            let range = ours.offsets[row] as usize..ours.offsets[row + 1] as usize;
            assert_eq!(range, theirs.offsets[row] as usize..theirs.offsets[row + 1] as usize, "row {row} of {number}");
            for place in range {
                let distance = f64::from(mine.log_probs[place] - other.log_probs[place]).abs();
                of_log_probs = of_log_probs.max(distance);
                if ours.ids[place] != theirs.ids[place] {
                    assert!(distance < 1e-5, "row {row} of {number}: other ids, and no tie");
                }
            }
            of_log_probs = of_log_probs.max(f64::from(mine.label_log_prob[row] - other.label_log_prob[row]).abs());
            let tail = |log_tail: f32| f64::from(log_tail).exp();
            of_tails = of_tails.max((tail(mine.log_tail[row]) - tail(other.log_tail[row])).abs());
        }
    }
    (of_log_probs, of_tails, rows)
}

#[test]
fn a_remote_teacher_gives_what_the_resident_one_does() {
    let small = SmallRun::new();
    for selection in [
        "cache.top_k=8",
        "cache.selection={ kind = \"min_prob\", theta = 0.02, cap = 12 }",
        "cache.selection={ kind = \"top_p\", p = 0.5, cap = 20 }",
    ] {
        let top_k = RECIPE.replace("top_k = 8\n", "").replace("temperatures = [1.0, 2.0]\n", "");
        fs::write(small.path("recipe.toml"), &top_k).unwrap();
        let name = selection.replace(|c: char| !c.is_alphanumeric(), "");
        let resident = format!("resident-{name}");
        precompute::run(&small.recipe(&[selection]), &small.options(&resident)).unwrap();
        for manner in [VLLM, SGLANG] {
            let server = PromptServer::start(&small.path("teacher"), manner.clone());
            let run = format!("{}-{name}", manner.owner);
            let text = fs::read_to_string(small.path("recipe.toml")).unwrap();
            let teacher = format!("mode = \"remote\"\nurl = {:?}\nmodel = \"small\"", server.url());
            fs::write(small.path("remote.toml"), text.replace("checkpoint = \"teacher\"", &teacher)).unwrap();
            let recipe = Recipe::load(small.path("remote.toml"), &[selection.to_string()]).unwrap();
            precompute::run(&recipe, &small.options(&run)).unwrap();
            for split in ["train", "held_out"] {
                let open = |run: &str| CacheReader::open(small.path(run).join("cache").join(split)).unwrap();
                let (resident, remote) = (open(&resident), open(&run));
                let (of_log_probs, of_tails, rows) = differences(&resident, &remote);
                assert!(rows > 500, "{rows}");
                println!("{run} {split}: {of_log_probs:.1e} {of_tails:.1e}");
                assert!(of_log_probs < 1e-5 && of_tails < 1e-6, "{run}: {of_log_probs:.1e} {of_tails:.1e}");
                assert_eq!(resident.manifest().settings.data_fingerprint, remote.manifest().settings.data_fingerprint);
            }
        }
    }
    let cache = CacheReader::open(small.path("vllm-cachetopk8").join("cache/train")).unwrap();
    let teacher = &cache.manifest().settings.soft_targets.as_ref().unwrap().teacher;
    assert_eq!(teacher.name, "small");
    assert!(teacher.fingerprint.starts_with("served:"), "{}", teacher.fingerprint);
    assert_eq!(
        teacher.dtype,
        "not known (served as `small` by vLLM's protocol, root /models/small; log-probabilities as decimal text, tails 1 - \
         sum to about 1e-6, at least 1e-8)"
    );
}

#[test]
fn the_cache_depends_on_no_number_of_connections_servers_or_failures() {
    let small = SmallRun::new();
    let server = PromptServer::start(&small.path("teacher"), VLLM);
    let quiet = remote(&small, &[&server], "concurrency = 1", &[]);
    precompute::run(&quiet, &small.options("quiet")).unwrap();
    assert_eq!(server.most_under_way(), 1);
    let requests = server.asked();
    assert!(requests.iter().any(|asked| asked.body["prompt"].as_array().unwrap().len() > 1), "prompts go together");

    let others = [PromptServer::start(&small.path("teacher"), VLLM), PromptServer::start(&small.path("teacher"), VLLM)];
    others[0].fail([
        Fault::Status(429, Some("Retry-After: 1")),
        Fault::Cut,
        Fault::Changed(|answer| answer["choices"].as_array_mut().unwrap().reverse()),
        Fault::Closed,
    ]);
    others[1].fail([Fault::Status(500, None), Fault::CutWithoutLength, Fault::Status(503, None), Fault::Closed]);
    others.iter().for_each(|server| server.take_at_least(100));
    // Slowly enough that whoever rests comes back before all is done.
    let more = "concurrency = 6\nrequests_per_second = 60";
    let noisy = remote(&small, &[&others[0], &others[1]], more, &["teacher.batch_tokens=40"]);
    precompute::run(&noisy, &small.options("noisy")).unwrap();
    // On a busy machine the one may have done the work that the other was to fail at last.
    let left = others.each_ref().map(|server| server.faults_left());
    assert!(left.iter().all(|count| *count <= 1), "{left:?} failures did not come about");
    let worked = others.each_ref().map(|server| server.asked().len());
    assert!(worked.iter().all(|count| *count > 4), "{worked:?}: both do more than to fail");
    assert!(others.iter().any(|server| server.most_under_way() > 1), "requests go one after the other");
    // Nobody is asked again before the time it gave.
    let asked = others[0].asked();
    let first_after = asked.iter().map(|asked| asked.at).find(|at| *at > asked[0].at + Duration::from_millis(900));
    let meanwhile = asked.iter().filter(|one| one.at <= asked[0].at + Duration::from_millis(900)).count();
    assert!(first_after.is_some() && meanwhile <= 6, "{meanwhile} requests in the time of rest");
    assert_eq!(files(&small.path("quiet/cache")), files(&small.path("noisy/cache")));
}

#[test]
fn failures_are_tried_again_so_many_times_and_then_said() {
    let small = SmallRun::new();
    let server = PromptServer::start(&small.path("teacher"), VLLM);
    let way_out = "see that the server runs, and give the same command again: what is sealed is kept";
    server.fail([Fault::Status(503, None), Fault::Status(503, None)]);
    assert_eq!(
        error(&small, &server, "concurrency = 1\nretries = 1", &[]),
        format!("URL: a request failed 2 times, at last so: it answers 503: the engine has other work; {way_out}")
    );
    assert_eq!(server.asked().len(), 2);
    server.fail([Fault::Slow(Duration::from_secs(4))]);
    assert_eq!(
        error(&small, &server, "concurrency = 1\nretries = 0\ntimeout = 1.5", &[]),
        format!("URL: a request failed once, at last so: it did not answer in time; {way_out}")
    );
    server.fail([Fault::CutWithoutLength]);
    assert_eq!(
        error(&small, &server, "concurrency = 1\nretries = 0", &[]),
        format!("URL: a request failed once, at last so: the answer ends in the middle; {way_out}")
    );
    for fault in [Fault::Closed, Fault::Cut] {
        server.fail([fault]);
        let message = error(&small, &server, "concurrency = 1\nretries = 0", &[]);
        assert!(message.starts_with("URL: a request failed once, at last so: "), "{message}");
    }
    server.fail([Fault::Status(401, None)]);
    assert_eq!(
        error(&small, &server, "concurrency = 1", &[]),
        "URL: it answers 401: the engine has other work; name the environment variable with its key in teacher.api_key_env"
    );
    server.fail([Fault::Status(422, None)]);
    assert_eq!(
        error(&small, &server, "concurrency = 1", &[]),
        "URL: it answers 422: the engine has other work; it may take text alone and no token ids; see docs/remote.md for \
         servers that do"
    );
    let url = server.url();
    drop(server);
    let gone = PromptServer::start(&small.path("teacher"), VLLM);
    let recipe = remote(&small, &[&gone], "retries = 0", &[&format!("teacher.url={url}")]);
    let message = precompute::run(&recipe, &small.options("gone")).unwrap_err().to_string();
    assert!(message.starts_with(&format!("{url}: a request failed once, at last so: ")), "{message}");
}

#[test]
fn answers_that_are_none_are_refused_by_sequence_and_token() {
    let small = SmallRun::new();
    let server = PromptServer::start(&small.path("teacher"), VLLM);
    fn place(answer: &mut Value, number: usize) -> &mut Value {
        &mut answer["choices"][0]["prompt_logprobs"][number]
    }
    /// The entry of the likeliest id.
    fn likeliest(answer: &mut Value) -> &mut Value {
        let entries = place(answer, 3).as_object_mut().unwrap();
        entries.values_mut().find(|entry| entry["rank"] == 1).unwrap()
    }
    let document = "the document at token 0 of sequence 0";
    let row = "the row about token 3 of sequence 0";
    let cases: [(Fault, String); 16] = [
        (Fault::Body("<html>busy</html>"), "it is not JSON: expected value".into()),
        (
            Fault::Body("{\"choices\": [NaN]}"),
            "it is not JSON: expected value; it holds NaN, which is no probability".into(),
        ),
        (Fault::Body("{\"object\": \"list\"}"), "it has no list of `choices`".into()),
        (Fault::Changed(|answer| answer["choices"] = json!([])), "it has 0 answers to N prompts".into()),
        (
            Fault::Changed(|answer| answer["choices"][0]["index"] = json!(77)),
            "its choice 0 is number 77 of N prompts".into(),
        ),
        (
            Fault::Changed(|answer| drop(answer["choices"][0].as_object_mut().unwrap().remove("prompt_logprobs"))),
            format!("{document}: it has no `prompt_logprobs`"),
        ),
        (
            Fault::Changed(|answer| answer["choices"][0]["prompt_token_ids"][1] = json!(319)),
            format!("{document}: it has the id 319 at token 1, and ID was sent"),
        ),
        (
            Fault::Changed(|answer| drop(answer["choices"][0]["prompt_logprobs"].as_array_mut().unwrap().pop())),
            format!("{document}: it has N rows for N tokens"),
        ),
        (
            Fault::Changed(|answer| *place(answer, 0) = json!({ "5": { "logprob": -1.0, "rank": 1 } })),
            format!("{document}: its first row is not empty, but nothing is predicted of a first token"),
        ),
        (Fault::Changed(|answer| *place(answer, 3) = Value::Null), format!("{document}: it says nothing of token 3")),
        // Rows that are shifted by one, as those of a server that was sent other ids.
        (
            Fault::Changed(|answer| {
                let entries = place(answer, 3).as_object_mut().unwrap();
                let own = entries.keys().next().unwrap().clone();
                entries.remove(&own);
            }),
            format!("{row}: it lacks the token itself, ID, so it is about another"),
        ),
        (
            Fault::Changed(|answer| likeliest(answer)["logprob"] = json!(0.25)),
            format!("{row}: the id ID has the log-probability 0.25"),
        ),
        (
            Fault::Changed(|answer| likeliest(answer)["logprob"] = json!(-9.0)),
            format!("{row}: the id ID is likelier than ID, which stands before it"),
        ),
        (
            Fault::Changed(|answer| {
                let entries = place(answer, 3).as_object_mut().unwrap();
                entries.values_mut().nth(1).unwrap()["rank"] = json!(9);
            }),
            format!("{row}: the id ID has rank 9, and N were asked for"),
        ),
        (
            Fault::Changed(|answer| likeliest(answer)["logprob"] = json!("low")),
            format!("{document}: place 3 of `prompt_logprobs` has the log-probability \"low\" for the id ID"),
        ),
        (
            Fault::Changed(|answer| drop(likeliest(answer).as_object_mut().unwrap().remove("rank"))),
            format!("{document}: it has no rank for the id ID"),
        ),
    ];
    for (fault, expected) in cases {
        server.fail([fault]);
        let message = error(&small, &server, "concurrency = 1", &["cache.top_k=4"]);
        let (start, end) = message.split_once(": the answer about sequence").expect(&message);
        assert_eq!(start, "URL");
        let (which, problem) = end.split_once(": ").unwrap();
        assert!(which == " 0" || which.starts_with("s 0 to "), "{message}");
        let way_out = "; see docs/remote.md for the servers and their settings; what is sealed is kept";
        let problem = problem.strip_suffix(way_out).expect(&message);
        assert!(matches(problem, &expected), "{problem}\n{expected}");
    }
    assert_eq!(server.faults_left(), 0);
}

/// Whether a text is a pattern, in which `N` and `ID` stand for numbers.
fn matches(text: &str, pattern: &str) -> bool {
    let (mut text, words) = (text.split(' '), pattern.split(' '));
    let fits = |word: &str, pattern: &str| {
        let number = word.trim_end_matches(',').bytes().all(|byte| byte.is_ascii_digit());
        (["N", "ID", "ID,"].contains(&pattern) && number) || word == pattern
    };
    words.into_iter().all(|pattern| text.next().is_some_and(|word| fits(word, pattern))) && text.next().is_none()
}

#[test]
fn a_server_that_gives_fewer_ids_than_are_kept_is_refused_with_its_limit() {
    let small = SmallRun::new();
    let server = PromptServer::start(&small.path("teacher"), VLLM);
    let way_out = "start it so that it does (vLLM: --max-logprobs 21), or keep at most 20, by cache.top_k or the cap of \
                   cache.selection";
    assert_eq!(
        error(&small, &server, "concurrency = 1", &["cache.top_k=21"]),
        format!(
            "URL: it does not give 21 ids for a token: it answers 400: Requested prompt logprobs of 21, which is greater \
             than max allowed: 20 (parameter=prompt_logprobs, value=21); {way_out}"
        )
    );
    assert_eq!(server.asked().len(), 1, "what is refused is not asked again");
    // One that says nothing, and cuts.
    server.fail([Fault::Changed(|answer| {
        for place in answer["choices"][0]["prompt_logprobs"].as_array_mut().unwrap().iter_mut().skip(1) {
            let entries = place.as_object_mut().unwrap();
            let own = entries.keys().next().unwrap().clone();
            entries.retain(|id, entry| *id == own || entry["rank"].as_u64().unwrap() <= 5);
        }
    })]);
    let message = error(&small, &server, "concurrency = 1", &[]);
    let problem = "the row about token 1 of sequence 0: it has 5 ids, and 8 were asked for; start it so that it does (vLLM: \
                   --max-logprobs 8), or keep at most 5, by cache.top_k or the cap of cache.selection";
    assert!(message.ends_with(problem), "{message}");
}

#[test]
fn a_server_that_goes_away_leaves_what_is_sealed_and_the_run_goes_on() {
    let small = SmallRun::new();
    let server = PromptServer::start(&small.path("teacher"), VLLM);
    let overrides = ["cache.sequences_per_shard=20"];
    let recipe = remote(&small, &[&server], "concurrency = 2\nretries = 0", &overrides);
    precompute::run(&recipe, &small.options("whole")).unwrap();
    let all = server.asked().len();
    server.gone_after(Some(all / 2));
    let error = precompute::run(&recipe, &small.options("halved")).unwrap_err();
    assert!(error.to_string().contains("give the same command again: what is sealed is kept"), "{error}");
    assert_eq!(error.exit_code(), 1);
    let shards = fs::read_dir(small.path("halved/cache/train/shards")).unwrap().count();
    assert!(shards > 0);
    server.gone_after(None);
    let before = server.asked().len();
    precompute::run(&recipe, &small.options("halved")).unwrap();
    assert!(server.asked().len() - before < all, "what is sealed is not asked for again");
    assert_eq!(files(&small.path("whole/cache")), files(&small.path("halved/cache")));
}

#[test]
fn a_cache_that_another_model_began_is_not_gone_on_with() {
    let small = SmallRun::new();
    let server = PromptServer::start(&small.path("teacher"), VLLM);
    let (more, shards) = ("concurrency = 1\nretries = 0", ["cache.sequences_per_shard=10"]);
    server.gone_after(Some(12));
    precompute::run(&remote(&small, &[&server], more, &shards), &small.options("run")).unwrap_err();
    assert!(fs::read_dir(small.path("run/cache/train/shards")).unwrap().count() > 0);
    let other = PromptServer::start(&small.path("teacher"), Manner { root: "/models/other", ..VLLM });
    let error = precompute::run(&remote(&small, &[&other], more, &shards), &small.options("run")).unwrap_err();
    let message = error.to_string();
    assert!(message.starts_with("the teacher differs: "), "{message}");
    assert!(message.contains("`small`, fingerprint served:"), "{message}");
    assert!(message.contains("use the teacher it was begun with"), "{message}");
    // Nor do the two serve one run.
    let error = precompute::run(&remote(&small, &[&server, &other], more, &[]), &small.options("both")).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!(
            "the teacher differs: {} has served as `small` by vLLM's protocol, root /models/small, {} has served as \
             `small` by vLLM's protocol, root /models/other; start all servers of teacher.url with the same model, from \
             the same path",
            server.url(),
            other.url()
        )
    );
}

#[test]
fn servers_that_cannot_do_it_are_refused_before_anything_is_asked() {
    let small = SmallRun::new();
    let start = |manner: Manner| PromptServer::start(&small.path("teacher"), manner);
    let server = start(Manner { model: "large", ..VLLM });
    assert_eq!(
        error(&small, &server, "", &[]),
        "URL: it does not serve `small`, but `large`; set teacher.model to one of these"
    );
    assert_eq!(
        error(&small, &start(Manner { owner: "llamacpp", ..VLLM }), "", &[]),
        "URL: it is llama.cpp's server, which gives no log-probabilities of a prompt's token ids; run the model with vLLM \
         or SGLang, or give its weights as teacher.checkpoint"
    );
    assert_eq!(
        error(&small, &start(Manner { max_model_len: 33, ..VLLM }), "", &[]),
        "URL: it reads and writes at most 33 tokens, and a sequence may have 33 and one that it writes; use a data.seq_len \
         of at most 31, or start it with more (vLLM: --max-model-len)"
    );
    let server = start(VLLM);
    let root = server.url().replace("/v1", "");
    let recipe = remote(&small, &[&server], "retries = 0", &[&format!("teacher.url={root}")]);
    assert_eq!(
        precompute::run(&recipe, &small.options("root")).unwrap_err().to_string(),
        format!(
            "{root}: it answers 404: Not Found; give the address that OpenAI's interface is below, as in \
             http://host:8000/v1, of vLLM or SGLang"
        )
    );
    let name = "LIMBECK_TEST_KEY_THAT_IS_NOT_THERE";
    let message = error(&small, &server, &format!("api_key_env = \"{name}\""), &[]);
    let expected = format!(
        "`teacher.api_key_env` names `{name}`, which holds no key in this environment; export {name}, or correct the name"
    );
    assert!(message.ends_with(&expected), "{message}");
    assert!(server.asked().is_empty());
}

#[test]
fn a_request_to_stop_is_heeded_within_a_second() {
    let small = SmallRun::new();
    let server = PromptServer::start(&small.path("teacher"), VLLM);
    server.fail([Fault::Slow(Duration::from_secs(5)); 4]);
    let (recipe, options) = (remote(&small, &[&server], "concurrency = 4", &[]), small.options("stopped"));
    let stop = options.stop.clone();
    let asking = thread::spawn(move || (precompute::run(&recipe, &options), Instant::now()));
    while server.asked().len() < 4 {
        thread::sleep(Duration::from_millis(10));
    }
    let told = Instant::now();
    stop.store(true, Ordering::Relaxed);
    let (result, ended) = asking.join().unwrap();
    assert!(matches!(result, Err(Error::Interrupted { .. })), "{result:?}");
    assert!(ended - told < Duration::from_secs(1), "{:?}", ended - told);

    // Nor does it wait for a server that is not there.
    let url = server.url();
    drop(server);
    let other = PromptServer::start(&small.path("teacher"), VLLM);
    let recipe = remote(&small, &[&other], "retries = 100", &[&format!("teacher.url={url}")]);
    let options = small.options("absent");
    let stop = options.stop.clone();
    let asking = thread::spawn(move || (precompute::run(&recipe, &options), Instant::now()));
    thread::sleep(Duration::from_secs(1));
    let told = Instant::now();
    stop.store(true, Ordering::Relaxed);
    let (result, ended) = asking.join().unwrap();
    assert!(matches!(result, Err(Error::Interrupted { .. })), "{result:?}");
    assert!(ended - told < Duration::from_secs(1), "{:?}", ended - told);
}

#[test]
fn requests_carry_the_key_keep_the_rate_and_a_finished_run_makes_none() {
    let small = SmallRun::new();
    let server = PromptServer::start(&small.path("teacher"), VLLM);
    // The key of a program's own environment, so that no test changes its own.
    let more = "api_key_env = \"REMOTE_TEACHER_KEY\"\nrequests_per_second = 40";
    let recipe = remote(&small, &[&server], more, &["train.steps=2", "data.tokens=1k", "train.lr.warmup=0"]);
    fs::write(small.path("keyed.toml"), recipe.to_toml()).unwrap();
    let distil = |key: &str| {
        let program = std::process::Command::new(env!("CARGO_BIN_EXE_limbeck"))
            .args(["distill".as_ref(), small.path("keyed.toml").as_os_str()])
            .args(["--run-dir".as_ref(), small.path("run").as_os_str()])
            .env("REMOTE_TEACHER_KEY", key)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&[program.stdout, program.stderr].concat()).into_owned();
        assert_eq!(program.status.code(), Some(0), "{said}");
        said
    };
    let said = distil("s3cret-key");
    let asked = server.asked();
    assert!(asked.iter().all(|asked| asked.authorization.as_deref() == Some("Bearer s3cret-key")));
    let took = asked[asked.len() - 1].at - asked[0].at;
    assert!(took >= Duration::from_millis(20) * (asked.len() as u32 - 1), "{} requests in {took:?}", asked.len());
    assert!(!said.contains("s3cret-key"));
    for (path, bytes) in files(&small.path("run")) {
        let found = bytes.windows(10).any(|window| window == b"s3cret-key");
        assert!(!found, "{} holds the key", path.display());
    }
    // What it would take here is not known, unless someone says what it is.
    let plan = |more: &[&str]| {
        let recipe = small.path("keyed.toml");
        let mut arguments = vec!["plan".as_ref(), recipe.as_os_str()];
        arguments.extend(more.iter().map(std::ffi::OsStr::new));
        limbeck(&arguments)
    };
    let unknown = plan(&[]);
    let expected = "`teacher.mode` is `remote`, and no server says how large its model is; give --teacher scout, maverick, \
                    behemoth, or the directory of a model";
    assert!(unknown.code == 2 && unknown.stderr.contains(expected), "{unknown:?}");
    assert_eq!(plan(&["--teacher", "scout"]).code, 0);
    // The student is trained and measured on what came, and a second run needs no server.
    drop(server);
    let recipe = Recipe::load(small.path("keyed.toml"), &[]).unwrap();
    let report = distill::run(&recipe, &small.options("run")).unwrap();
    assert!(report.arms.iter().all(|arm| arm.evaluation.kl_to_teacher.is_some()), "{report:?}");
}

#[test]
fn remote_keys_that_make_no_sense_are_refused() {
    let small = SmallRun::new();
    let base = RECIPE
        .replace("checkpoint = \"teacher\"", "mode = \"remote\"\nurl = \"http://node:8000/v1\"\nmodel = \"small\"")
        .replace("temperatures = [1.0, 2.0]\n", "");
    let refused = |text: &str, overrides: &[&str]| {
        fs::write(small.path("refused.toml"), text).unwrap();
        let overrides: Vec<String> = overrides.iter().map(|word| word.to_string()).collect();
        let error = Recipe::load(small.path("refused.toml"), &overrides).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        let message = error.to_string();
        message.rsplit_once(": `").map(|(_, rest)| format!("`{rest}")).unwrap_or(message)
    };
    let address = "give the address that OpenAI's interface is below, as in \"http://host:8000/v1\"";
    let cases = [
        ("teacher.url=node:8000", format!("`teacher.url` is `node:8000`, which is no address; {address}")),
        ("teacher.url=[]", "`teacher.url` is empty; give an address, as in \"http://host:8000/v1\"".into()),
        (
            "teacher.url=http://me:secret@node/v1",
            "`teacher.url` holds a name and password, or parameters; give a key by teacher.api_key_env, which names an \
             environment variable"
                .into(),
        ),
        ("teacher.model=''", "`teacher.model` is empty; give a name".into()),
        ("teacher.concurrency=0", "`teacher.concurrency` is 0; use a number from 1 to 1024".into()),
        ("teacher.retries=101", "`teacher.retries` is 101; use a number from 0 to 100".into()),
        ("teacher.timeout=0", "`teacher.timeout` is 0; use a number of seconds above 0, up to a day".into()),
        ("teacher.requests_per_second=0", "`teacher.requests_per_second` is 0; use a number of at least 0.001".into()),
        (
            "cache.temperatures=[1.0, 2.0]",
            "`cache.temperatures` asks for other temperatures than 1.0, and a server gives log-probabilities at that \
             alone; use [1.0]"
                .into(),
        ),
        (
            "teacher.checkpoint=teacher",
            "`teacher.checkpoint` is for a teacher that runs here, and this one is remote; remove it".into(),
        ),
    ];
    for (key, expected) in cases {
        assert_eq!(refused(&base, &[key]), expected);
    }
    let sampled = base.replace("top_k = 8", "selection = \"sampled\"");
    assert_eq!(
        refused(&sampled, &[]),
        "`cache.selection` is `sampled`, which draws from whole rows, and a server gives the likeliest ids alone; use top_k, \
         min_prob or top_p"
    );
    assert_eq!(refused(&base.replace("model = \"small\"\n", ""), &[]), "`teacher.model` is missing; add `model`");
    assert_eq!(
        refused(RECIPE, &["teacher.concurrency=4"]),
        "`teacher.concurrency` is for a teacher behind a server, and this one runs here; remove it, or use teacher.mode = \
         \"remote\""
    );
    fs::write(small.path("good.toml"), &base).unwrap();
    let recipe = Recipe::load(small.path("good.toml"), &[]).unwrap();
    fs::write(small.path("again.toml"), recipe.to_toml()).unwrap();
    assert_eq!(Recipe::load(small.path("again.toml"), &[]).unwrap().to_toml(), recipe.to_toml());
}
