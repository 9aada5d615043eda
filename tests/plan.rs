//! `limbeck plan`: numbers that can be checked by hand, for teachers and hardware that are not there.

mod small_run;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use limbeck::models::llama4::shapes;
use serde_json::Value;
use small_run::limbeck;

const RECIPE: &str = r#"name = "mini_from_behemoth"
[data]
sources = [{ path = "text.txt" }]
tokens = "1T"
seq_len = 8192
[teacher]
checkpoint = "not here"
batch_tokens = 32768
[student]
shape = { like = "scout" }
[train]
epochs = 1
batch_tokens = 8192
lr = { schedule = "constant", from = 3e-4 }
"#;

struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    fn new() -> Folder {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("recipe.toml"), RECIPE).unwrap();
        Folder { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn plan(&self, more: &[&str]) -> small_run::Outcome {
        let recipe = self.path("recipe.toml");
        let mut arguments: Vec<&OsStr> = vec!["plan".as_ref(), recipe.as_ref()];
        arguments.extend(more.iter().map(OsStr::new));
        limbeck(&arguments)
    }

    fn json(&self, more: &[&str]) -> Value {
        let outcome = self.plan(&[more, &["--json"]].concat());
        assert_eq!(outcome.code, 0, "{}", outcome.stderr);
        serde_json::from_str(&outcome.stdout).unwrap()
    }
}

fn way<'a>(plan: &'a Value, hardware: usize, mode: &str) -> &'a Value {
    let ways = plan["hardware"][hardware]["ways"].as_array().unwrap();
    ways.iter().find(|way| way["mode"] == mode).unwrap_or_else(|| panic!("{mode} of {ways:?}"))
}

fn near(left: &Value, right: f64) {
    let left = left.as_f64().unwrap();
    assert!((left / right - 1.0).abs() < 1e-3, "{left} {right}");
}

#[test]
fn a_behemoth_is_planned_by_arithmetic_that_can_be_done_by_hand() {
    let folder = Folder::new();
    let plan = folder.json(&["--teacher", "behemoth", "--hardware", "1xh100", "--hardware", "8xh100"]);
    // 2 (168.9B + 112.7B + 2.9B) operations for products; a quarter of the layers sees (8192 + 1) / 2 keys, and so do
    // chunks of 8192; 4 * 112 * 128 * 4096.5 * 128 for attention.
    let flops = 2.0 * (168.9e9 + 112.7e9 + 2.897e9) + 4.0 * 112.0 * 128.0 * 4096.5 * 128.0;
    assert!((plan["teacher"]["flops_per_token"].as_f64().unwrap() / flops - 1.0).abs() < 2e-3);
    let streamed = way(&plan, 0, "streamed");
    let flops = plan["teacher"]["flops_per_token"].as_f64().unwrap();
    near(&streamed["tokens_per_second"], 0.4 * 989e12 / flops);
    near(&streamed["device_hours"], 1e12 * flops / (0.4 * 989e12) / 3600.0);
    assert_eq!(streamed["bound_by"], "products");
    let parameters = plan["teacher"]["parameters"].as_f64().unwrap();
    near(&streamed["seconds_by_part"]["disk"], 2.0 * parameters / 6e9);
    near(&way(&plan, 1, "streamed")["seconds_by_part"]["disk"], 2.0 * parameters / 25e9);
    let resident = way(&plan, 0, "resident");
    assert!(resident["obstacle"].as_str().unwrap().starts_with("needs 39"), "{resident}");
    assert_eq!(resident["device_hours"], Value::Null);
}

#[test]
fn what_fits_comes_first_and_the_fastest_of_it_first_of_all() {
    let folder = Folder::new();
    for teacher in ["scout", "maverick", "behemoth"] {
        let plan = folder.json(&["--teacher", teacher]);
        let hardware = plan["hardware"].as_array().unwrap();
        assert_eq!(hardware.len(), 4);
        for machine in hardware {
            let ways = machine["ways"].as_array().unwrap();
            let rank = |way: &Value| (way["obstacle"].is_string(), -way["tokens_per_second"].as_f64().unwrap());
            assert!(ways.is_sorted_by(|left, right| rank(left) <= rank(right)), "{ways:#?}");
            for way in ways {
                let memory: f64 =
                    way["memory_bytes"].as_object().unwrap().values().map(|it| it.as_f64().unwrap()).sum();
                let device = machine["hardware"]["device_memory"].as_f64().unwrap();
                assert!(way["obstacle"].is_string() || memory <= 0.92 * device * 1.000001, "{way:#}");
            }
        }
    }
    // 216 GB of Scout in bf16 and 108 GB in FP8: the number of devices that hold them is halved.
    let fits = |weights: &str| {
        let plan = folder.json(&["--teacher", "scout", "--hardware", "8xh100", "--weights", weights]);
        ["resident on 2", "resident on 4"].map(|mode| way(&plan, 0, mode)["obstacle"].is_null())
    };
    assert_eq!((fits("bf16"), fits("fp8")), ([false, true], [true, true]));
}

#[test]
fn devices_that_cannot_hold_a_teacher_together_may_stream_it_in_groups() {
    let folder = Folder::new();
    // 8 x 80 GB hold no Behemoth in bf16, and 8 x 80 GB hold a Scout.
    let plan = folder.json(&["--teacher", "behemoth", "--hardware", "8xh100"]);
    let (alone, eight) = (way(&plan, 0, "streamed"), way(&plan, 0, "streamed on 8"));
    let part = |way: &Value, name: &str| way["memory_bytes"][name].as_f64().unwrap();
    near(&eight["memory_bytes"]["two layers"], part(alone, "two layers") / 8.0);
    // Two sums of the states a layer over a ring of eight, in bf16: 4 * 7/8 * 2 bytes, 128 layers, 16,384 numbers.
    let tokens = eight["tokens_at_once"].as_f64().unwrap();
    let hardware = &plan["hardware"][0]["hardware"];
    let link = hardware["link_bandwidth"].as_f64().unwrap();
    let (layers, hidden) = (shapes::behemoth().num_hidden_layers as f64, shapes::behemoth().hidden_size as f64);
    near(&eight["seconds_by_part"]["links"], tokens * 4.0 * 7.0 / 8.0 * 2.0 * layers * hidden / link);
    let rates = [alone, eight].map(|way| way["tokens_per_second"].as_f64().unwrap());
    assert!(rates[1] < rates[0], "what is sent takes time, and nothing is gained where a layer fits: {rates:?}");
    let scout = folder.json(&["--teacher", "scout", "--hardware", "8xh100"]);
    let ways = scout["hardware"][0]["ways"].as_array().unwrap();
    assert!(ways.iter().all(|way| !way["mode"].as_str().unwrap().starts_with("streamed on")), "it fits without");

    // Devices of 12 GB, each too small for two layers of Behemoth, and two of them together large enough.
    let file = folder.path("small.toml");
    let text = "name = \"small\"\ndevices = 4\ndevice_memory = 12_000_000_000\nmatmul_flops = 1e14\nefficiency = 0.4\n\
                memory_bandwidth = 1e12\nlink_bandwidth = 5e10\nhost_memory = 256_000_000_000\n\
                host_bandwidth = 2e10\ndisk_bandwidth = 6e9\n";
    fs::write(&file, text).unwrap();
    let hardware = ["--teacher", "behemoth", "--hardware", file.to_str().unwrap()];
    let plan = folder.json(&[&hardware[..], &["--set", "teacher.batch_tokens=8192"]].concat());
    assert!(way(&plan, 0, "streamed")["obstacle"].is_string(), "{plan:#}");
    assert!(way(&plan, 0, "streamed on 4")["obstacle"].is_null(), "{plan:#}");
    assert_eq!(plan["hardware"][0]["ways"][0]["mode"], "streamed on 2", "more devices would only send more");
}

#[test]
fn hardware_is_read_from_files_and_mistakes_in_them_are_named() {
    let folder = Folder::new();
    let file = folder.path("box.toml");
    let text = "name = \"box\"\ndevices = 1\ndevice_memory = 24_000_000_000\nmatmul_flops = 1.75e11\nefficiency = 0.8\n\
                memory_bandwidth = 2e10\nlink_bandwidth = 0.0\ndisk_bandwidth = 1e9\n";
    fs::write(&file, text).unwrap();
    let file_name = file.to_str().unwrap();
    let plan = folder.json(&["--teacher", "scout", "--hardware", file_name]);
    let flops = plan["teacher"]["flops_per_token"].as_f64().unwrap();
    near(&way(&plan, 0, "streamed")["tokens_per_second"], 0.8 * 1.75e11 / flops);
    let message = |more: &[&str]| {
        let outcome = folder.plan(more);
        assert_eq!(outcome.stdout, "");
        (outcome.code, outcome.stderr.replace(folder.folder.path().to_str().unwrap(), "DIR").trim_end().to_string())
    };
    for (change, problem) in [
        ("disk_bandwidth = 0.0", "error: DIR/box.toml: `disk_bandwidth` is 0; give a number above 0"),
        ("efficiency = 1.5", "error: DIR/box.toml: `efficiency` is 1.5; give a share of the peak, at most 1"),
    ] {
        let key = change.split(' ').next().unwrap();
        let lines: Vec<&str> = text.lines().map(|line| if line.starts_with(key) { change } else { line }).collect();
        fs::write(&file, lines.join("\n")).unwrap();
        assert_eq!(message(&["--teacher", "scout", "--hardware", file_name]), (1, problem.to_string()));
    }
    assert_eq!(
        message(&["--teacher", "scout", "--hardware", "2xh100"]),
        (
            2,
            "error: no hardware is called \"2xh100\", and there is no such file; use 1x24gb, 1xh100, 8xh100, 64xh100, \
             or a TOML file as docs/planning.md has it"
                .to_string()
        )
    );
    assert_eq!(
        message(&[]),
        (2, "error: DIR/recipe.toml: line 7: `teacher.checkpoint` is DIR/not here, which does not exist; give --teacher \
             scout, maverick, behemoth, or the directory of a model"
            .to_string())
    );
}

#[test]
fn a_machine_measures_itself_and_is_planned_for() {
    let folder = Folder::new();
    let file = folder.path("here.toml");
    let file_name = file.to_str().unwrap();
    let outcome = limbeck(&["plan", "--calibrate", file_name].map(OsStr::new));
    assert_eq!(outcome.code, 0, "{}", outcome.stderr);
    assert!(outcome.stdout.contains("experts") && outcome.stdout.trim_end().ends_with(file_name), "{}", outcome.stdout);
    let written: toml::Value = toml::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    for key in ["products", "attention", "states", "logits", "loading"] {
        assert!(written["measured"][key].as_float().unwrap() > 1e6, "{written}");
    }
    let left: Vec<_> = fs::read_dir(folder.folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");

    // A machine that multiplies half as fast takes longer, by as much as products are of its time.
    let rate = |text: String| {
        fs::write(&file, text).unwrap();
        let plan = folder.json(&["--teacher", "scout", "--hardware", file_name]);
        way(&plan, 0, "streamed")["seconds_by_part"]["products"].as_f64().unwrap()
    };
    let text = fs::read_to_string(&file).unwrap();
    let products = written["measured"]["products"].as_float().unwrap();
    let slower = text.lines().map(|line| match line.starts_with("products") {
        true => format!("products = {:.1}\n", products / 2.0),
        false => format!("{line}\n"),
    });
    let slower: String = slower.collect();
    let (measured, slow) = (rate(text.clone()), rate(slower));
    assert!(slow > 1.2 * measured && slow < 2.001 * measured, "{slow} {measured}");

    let broken = text.lines().map(|line| if line.starts_with("logits") { "logits = 0.0" } else { line });
    fs::write(&file, broken.collect::<Vec<_>>().join("\n")).unwrap();
    let outcome = folder.plan(&["--teacher", "scout", "--hardware", file_name]);
    assert!(
        outcome.stderr.contains("`measured.logits` is 0; give a number above 0, or measure with --calibrate"),
        "{}",
        outcome.stderr
    );
    let outcome = limbeck(&["plan"].map(OsStr::new));
    assert_eq!(outcome.code, 2, "{}", outcome.stderr);
    let missing = folder.path("nowhere").join("here.toml");
    let outcome = limbeck(&["plan".as_ref(), "--calibrate".as_ref(), missing.as_os_str()]);
    assert!(outcome.code == 1 && outcome.stderr.contains("nowhere"), "{}", outcome.stderr);
}

/// The recipes for clusters, beside a teacher of which there is only the configuration, and a little text.
#[test]
fn recipes_for_clusters_parse_plan_and_dry_run() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let bundled = root.join("recipes/quickstart");
    let put = |from: &Path, to: &str| {
        let to = folder.path().join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    };
    put(&bundled.join("text/teacher.parquet"), "data/web/00.parquet");
    put(&bundled.join("text/student.jsonl"), "data/code/00.jsonl");
    put(&bundled.join("text/teacher.parquet"), "data/books/00.parquet");
    put(&bundled.join("tokenizer/tokenizer.json"), "models/behemoth/tokenizer.json");
    let config = serde_json::to_vec(&shapes::behemoth().to_json()).unwrap();
    fs::write(folder.path().join("models/behemoth/config.json"), config).unwrap();
    // A file of weights without any: a dry run looks at no tensor.
    fs::write(folder.path().join("models/behemoth/model.safetensors"), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    let run = |recipe: &str, command: &str, more: &[&str]| {
        let recipe = folder.path().join("recipes/behemoth").join(recipe);
        let mut arguments: Vec<&OsStr> = vec![command.as_ref(), recipe.as_ref()];
        arguments.extend(more.iter().map(OsStr::new));
        let outcome = limbeck(&arguments);
        assert_eq!(outcome.code, 0, "{command} {more:?}: {}", outcome.stderr);
        outcome.stdout
    };
    for (recipe, parameters) in [("scout.toml", "108B"), ("maverick.toml", "401B")] {
        put(&root.join("recipes/behemoth").join(recipe), &format!("recipes/behemoth/{recipe}"));
        for command in ["precompute-teacher-logits", "distill"] {
            // The bundled tokenizer is smaller than Llama 4's.
            let run_dir = folder.path().join("run");
            let more = ["--dry-run", "--set", "student.shape.vocab=202048", "--run-dir", run_dir.to_str().unwrap()];
            let plan = run(recipe, command, &more);
            assert!(plan.contains(parameters), "{plan}");
            assert!(!folder.path().join("run").exists(), "a dry run writes nothing");
        }
        let plan: Value = serde_json::from_str(&run(
            recipe,
            "plan",
            &["--json", "--hardware", "64xh100", "--hardware", "8xh100", "--weights", "fp8"],
        ))
        .unwrap();
        // The same 1.98e12 parameters that the recipe's own teacher has, whatever its student.
        near(&plan["teacher"]["parameters"], 1.98e12);
        let hours = |hardware: usize| way(&plan, hardware, "streamed")["device_hours"].as_f64().unwrap();
        // Work for work: streaming is bound by products on both, so device-hours are the same.
        assert!((hours(0) / hours(1) - 1.0).abs() < 1e-3);
        assert!(way(&plan, 1, "resident on 8")["obstacle"].is_string(), "2 TB do not fit into 8 x 80 GB");
        assert!(way(&plan, 0, "resident on 64")["obstacle"].is_null(), "they fit into 64 x 80 GB");
    }
}
