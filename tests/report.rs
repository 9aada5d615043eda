//! Promises of the metrics file and of the report.

use std::path::Path;

use limbeck::eval::calibration::{ByConfidence, ByEntropy};
use limbeck::eval::report::{Arm, CacheFacts, Curves, Evaluation, Fact, Histogram, Report, Role, Winner};
use limbeck::train::best::Best;
use limbeck::train::metrics::{EvalMetrics, Metric, MetricsWriter, StepMetrics, read_metrics};

fn step(arm: &str, step: u64) -> StepMetrics {
    let time = step as f64 / 400.0;
    let noise = ((step * 7_919 + arm.len() as u64) % 101) as f64 / 101.0 - 0.5;
    let student = arm == "student";
    let hard_loss = 3.85 + if student { 0.0 } else { 0.35 } + 3.6 * (-9.0 * time).exp() + 0.25 * noise;
    let soft_loss = 0.45 + 3.0 * (-8.0 * time).exp() + 0.12 * noise;
    let soft_weight = if student { 0.7 + 0.2 * (std::f64::consts::PI * time).cos() } else { 0.0 };
    StepMetrics {
        arm: arm.to_string(),
        step,
        total_steps: 400,
        tokens_seen: (step + 1) * 2_048,
        epoch: step / 200,
        loss: soft_weight * soft_loss + (1.0 - soft_weight) * hard_loss,
        soft_loss: student.then_some(soft_loss),
        hard_loss,
        soft_weight,
        hard_weight: 1.0 - soft_weight,
        soft_gradient_norm: student.then_some(0.4),
        hard_gradient_norm: 0.9,
        aux_loss: Some(1.02),
        router_kl: None,
        learning_rate: 3e-3 * (step as f64 / 40.0).min(1.0) * (0.55 + 0.45 * (std::f64::consts::PI * time).cos()),
        grad_norm: 0.8 + 6.0 * (-20.0 * time).exp() + 0.4 * noise.abs(),
        tokens_per_second: 6_100.0 + 400.0 * noise,
        data_wait: 0.001,
        expert_load: vec![vec![0.3, 0.2, 0.25, 0.25]],
    }
}

fn evaluation(arm: &str, step: u64) -> EvalMetrics {
    let student = arm == "student";
    let cross_entropy = if student { 3.871 } else { 4.283 } + 3.5 * (-9.0 * step as f64 / 400.0).exp();
    EvalMetrics {
        arm: arm.to_string(),
        step,
        cross_entropy,
        perplexity: cross_entropy.exp(),
        bits_per_byte: cross_entropy / 2.9,
        kl_to_teacher: Some(0.5),
        top1_agreement: Some(0.6),
        averaged_cross_entropy: None,
        averaged_kl_to_teacher: None,
    }
}

fn lines(arm: &str, steps: std::ops::Range<u64>) -> Vec<Metric> {
    let mut metrics = Vec::new();
    for number in steps {
        metrics.push(step(arm, number).into());
        if number % 25 == 24 {
            metrics.push(evaluation(arm, number).into());
        }
    }
    metrics
}

fn log(path: &Path, arm: &str, resume_step: Option<u64>, steps: std::ops::Range<u64>) {
    let mut writer = MetricsWriter::open(path, arm, resume_step).unwrap();
    for metric in lines(arm, steps) {
        writer.write(metric).unwrap();
    }
    writer.sync().unwrap();
}

fn arm(role: Role, name: &str, cross_entropy: f64) -> Arm {
    let trained = role != Role::Teacher;
    let load = |layer: u64| (0..16).map(move |expert| 1.0 + ((expert * 5 + layer * 11) % 7) as f64 * 0.3);
    let (mut by_entropy, mut by_confidence) = (ByEntropy::default(), ByConfidence::default());
    for token in 0..400 {
        by_entropy.add(token as f64 / 50.0, 0.1 + token as f64 / 800.0, token % 5 < 3);
        by_confidence.add(token as f64 / 400.0, token % 400 > 220);
    }
    Arm {
        role,
        name: name.to_string(),
        parameters_total: if trained { 4_561_920 } else { 21_340_000 },
        parameters_active: if trained { 1_234_944 } else { 5_120_000 },
        evaluation: Evaluation {
            kl_to_teacher: trained.then_some(0.5123),
            top1_agreement: trained.then_some(0.6123),
            by_entropy: if trained { by_entropy.bins() } else { vec![] },
            by_confidence: by_confidence.bins(),
            expert_load: (0..4).map(|layer| load(layer).map(|x| x / load(layer).sum::<f64>()).collect()).collect(),
            ..Evaluation::from_sums(cross_entropy * 20_480.0, 20_480, 61_000)
        },
        train_seconds: trained.then_some(132.0),
        tokens_seen: trained.then_some(819_200),
        tokens_per_second: trained.then_some(6_206.0),
        best: trained.then_some(Best { step: 375, cross_entropy: cross_entropy + 0.004 }),
    }
}

fn report() -> Report {
    let metrics: Vec<Metric> = lines("student", 0..400).into_iter().chain(lines("control", 0..400)).collect();
    let mut report = Report::new("scout_from_behemoth_tiny");
    report.program_version = "0.1.0".to_string();
    report.plan = vec![
        Fact::new("training tokens", "819,200 in 400 steps of 2,048"),
        Fact::new("sequence length", "256"),
        Fact::new("seed", "17"),
        Fact::new("device", "cpu, 2 threads"),
    ];
    report.arms = vec![
        arm(Role::Student, "scout_tiny", 3.871),
        arm(Role::Control, "scout_tiny", 4.283),
        arm(Role::Teacher, "behemoth_tiny", 3.402),
    ];
    report.curves = vec![Curves::from_metrics(Role::Student, &metrics), Curves::from_metrics(Role::Control, &metrics)];
    report.cache = Some(CacheFacts {
        row_count: 409_600,
        byte_count: 110_300_000,
        bytes_per_token: 269.3,
        kept_per_row: 32.0,
        tail_mass: 0.083,
        vocabulary_size: Some(4_096),
        more: vec![Fact::new("codec", "raw")],
    });
    report.histograms = vec![Histogram {
        title: "Tail mass".to_string(),
        x_label: "teacher's probability outside the kept ids".to_string(),
        edges: (0..=20).map(|edge| edge as f64 / 20.0).collect(),
        counts: (0..20).map(|bin| (90_000.0 * (-0.35 * bin as f64).exp()) as u64).collect(),
    }];
    report.recipe = "name = \"scout_from_behemoth_tiny\"\nseed = 17\n[loss]\ndivergence = \"forward_kl\"\n".to_string();
    report.commands = vec!["limbeck distill recipes/quickstart/scout.toml".to_string()];
    report
}

/// Checks that every tag that opens closes again, in order; returns the number of elements.
fn check_well_formed(html: &str) -> usize {
    let mut open = Vec::new();
    let mut count = 0;
    let mut rest = html.strip_prefix("<!DOCTYPE html>").unwrap();
    while let Some(start) = rest.find('<') {
        assert!(!rest[..start].contains('>'), "stray > in {:?}", &rest[..start]);
        let end = start + rest[start..].find('>').expect("a tag that does not end");
        let tag = &rest[start + 1..end];
        rest = &rest[end + 1..];
        let name: String = tag.trim_start_matches('/').chars().take_while(|c| c.is_alphanumeric()).collect();
        assert!(!name.is_empty(), "no tag: <{tag}>");
        assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "closed by <{tag}>");
        } else {
            count += 1;
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
    }
    assert!(open.is_empty(), "left open: {open:?}");
    count
}

#[test]
fn the_table_is_aligned_and_says_who_won() {
    insta::assert_snapshot!(report().table(), @r"
             cross-entropy  perplexity  bits/byte  KL to teacher  top-1  active/total  model
    student         3.8710       47.99     1.8750         0.5123  61.2%   1.23M/4.56M  scout_tiny
    control         4.2830       72.46     2.0745         0.5123  61.2%   1.23M/4.56M  scout_tiny
    teacher         3.4020       30.02     1.6478              –      –   5.12M/21.3M  behemoth_tiny

    The distilled student beats the control by 0.412 nats per token on held-out text (3.871 against 4.283): in this run distillation helped.
    The student covers 46.8% of the 0.881 nats between control and teacher.
    One run with one seed: repeat it with other seeds before trusting a small difference.
    ");
}

#[test]
fn the_table_says_so_when_the_control_wins() {
    let mut report = report();
    report.arms[0] = arm(Role::Student, "scout_tiny", 4.301);
    insta::assert_snapshot!(report.table(), @r"
             cross-entropy  perplexity  bits/byte  KL to teacher  top-1  active/total  model
    student         4.3010       73.77     2.0833         0.5123  61.2%   1.23M/4.56M  scout_tiny
    control         4.2830       72.46     2.0745         0.5123  61.2%   1.23M/4.56M  scout_tiny
    teacher         3.4020       30.02     1.6478              –      –   5.12M/21.3M  behemoth_tiny

    The control beats the distilled student by 0.018 nats per token on held-out text (4.283 against 4.301): in this run distillation hurt.
    One run with one seed: repeat it with other seeds before trusting a small difference.
    ");
    assert_eq!(report.headline().winner, Winner::Control);
    assert!(report.html().contains("The control beats the distilled student by 0.018 nats"));
}

#[test]
fn the_headline_claims_nothing_without_a_fair_comparison() {
    let sentence = |change: &dyn Fn(&mut Report)| {
        let mut report = report();
        change(&mut report);
        let headline = report.headline();
        (headline.winner, [vec![headline.sentence], headline.notes].concat().join(" "))
    };
    let (winner, text) = sentence(&|report| report.arms.retain(|arm| arm.role != Role::Control));
    assert_eq!(winner, Winner::Unknown);
    assert!(text.contains("no control, so this run cannot say"), "{text}");

    let (winner, text) = sentence(&|report| report.arms[1].evaluation.token_count = 7);
    assert_eq!(winner, Winner::Unknown);
    assert!(text.contains("different text (20,480 against 7 tokens)"), "{text}");

    let (winner, text) = sentence(&|report| report.arms[0].evaluation.cross_entropy = f64::NAN);
    assert_eq!(winner, Winner::Unknown);
    assert!(text.contains("The student diverged"), "{text}");

    let (winner, text) = sentence(&|report| report.arms[0] = arm(Role::Student, "s", 4.2833));
    assert_eq!(winner, Winner::Neither);
    assert!(text.contains("made no difference"), "{text}");

    let (winner, text) = sentence(&|report| report.arms[1].tokens_seen = Some(5));
    assert_eq!(winner, Winner::Student);
    assert!(text.contains("not trained alike: the student saw 819,200 tokens, the control 5"), "{text}");

    let (_, text) = sentence(&|report| report.arms[2] = arm(Role::Teacher, "t", 4.5));
    assert!(text.contains("it had little to teach"), "{text}");

    let (winner, text) = sentence(&|report| report.arms.clear());
    assert_eq!((winner, text.as_str()), (Winner::Unknown, "No student was evaluated."));
}

#[test]
fn the_page_is_whole_in_itself_and_well_formed() {
    let html = report().html();
    for outside in ["http", "src=", "href=", "url(", "@import", "<script", "<link"] {
        assert!(!html.contains(outside), "{outside}");
    }
    for part in [
        "student",
        "control",
        "teacher",
        "scout_<wbr/>tiny",
        "behemoth_<wbr/>tiny",
        "Held-out cross-entropy",
        "Tail mass",
    ] {
        assert!(html.contains(part), "{part}");
    }
    for part in
        ["By the teacher&#39;s entropy", "Reliability", "Expected calibration error: student ", "best checkpoint"]
    {
        assert!(html.contains(&part.replace("&#39;", "'")) || html.contains(part), "{part}");
    }
    for part in ["Expert load", "Learning rate", "Gradient norm", "Throughput", "divergence = &quot;forward_kl&quot;"] {
        assert!(html.contains(part), "{part}");
    }
    assert!(check_well_formed(&html) > 200);
}

#[test]
fn names_cannot_inject_markup() {
    let mut report = report();
    let evil = "<script>alert(\"1\")</script>&'\u{7}".to_string();
    report.run_name = evil.clone();
    report.program_version = evil.clone();
    report.recipe = evil.clone();
    report.commands = vec![evil.clone()];
    report.plan = vec![Fact::new(evil.clone(), evil.clone())];
    report.arms.iter_mut().for_each(|arm| arm.name = evil.clone());
    report.cache.as_mut().unwrap().more = vec![Fact::new(evil.clone(), evil.clone())];
    report.histograms[0].title = evil.clone();
    report.histograms[0].x_label = evil.clone();
    let html = report.html();
    check_well_formed(&html);
    assert!(!html.contains("<script") && !html.contains('\u{7}'));
    assert!(html.contains("&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;&amp;&#39;"));
    assert!(!report.table().contains('\u{7}'));
}

#[test]
fn a_report_of_nothing_is_still_a_page() {
    check_well_formed(&Report::new("empty").html());
    assert!(Report::new("empty").table().contains("No student was evaluated."));

    let mut report = report();
    let empty = |role| Curves::from_metrics(role, &[]);
    report.curves = vec![empty(Role::Student), empty(Role::Control)];
    report.arms.iter_mut().for_each(|arm| arm.evaluation.expert_load = vec![vec![], vec![]]);
    report.histograms[0].counts.clear();
    let html = report.html();
    check_well_formed(&html);
    assert!(html.contains("no points to draw"));
}

#[test]
fn a_diverged_run_is_shown_as_it_is() {
    let mut report = report();
    for curves in &mut report.curves {
        curves.loss[200].1 = f64::INFINITY;
        curves.grad_norm.iter_mut().skip(200).for_each(|point| point.1 = f64::NAN);
    }
    report.arms[0].evaluation = Evaluation::from_sums(f64::INFINITY, 20_480, 61_000);
    let html = report.html();
    check_well_formed(&html);
    assert!(!html.contains("NaN") && html.contains("The student diverged") && html.contains("infinite"));
    assert!(report.table().contains("infinite"));
}

#[test]
fn a_written_report_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let written = report();
    let path = written.write(dir.path()).unwrap();
    assert_eq!(path, dir.path().join("report.html"));
    assert_eq!(std::fs::read_to_string(path).unwrap(), written.html());
    // The page shows everything; a number may come back from JSON with another last bit.
    let read = Report::read(dir.path().join("report.json")).unwrap();
    assert_eq!(read.html(), written.html());
    assert_eq!((read.arms.len(), read.recipe, read.commands), (3, written.recipe, written.commands));
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("report.json")).unwrap()).unwrap();
    assert_eq!(json["schema_version"], 1);
    assert_eq!(json["headline"]["winner"], "student");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
}

#[test]
fn a_report_of_another_version_or_none_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("report.json");
    std::fs::write(&path, "{\"schema_version\": 9}").unwrap();
    let message = Report::read(&path).unwrap_err().to_string();
    assert!(message.ends_with(
        "report.json: report of version 9, this program reads version 1; write it again with this program's `limbeck evaluate`"
    ));
    std::fs::write(&path, "[]").unwrap();
    let message = Report::read(&path).unwrap_err().to_string();
    assert!(message.contains("report.json: not a report ("), "{message}");
    assert!(message.ends_with("; write it again with `limbeck evaluate`"), "{message}");
}

#[test]
fn numbers_that_are_not_finite_survive_as_not_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut bad = step("student", 0);
    bad.loss = f64::NAN;
    bad.grad_norm = f64::INFINITY;
    bad.expert_load[0][1] = f32::NAN;
    MetricsWriter::open(&path, "student", None).unwrap().write(bad).unwrap();
    let Metric::Step(read) = read_metrics(&path).unwrap().remove(0) else { panic!("not a step") };
    assert!(read.loss.is_nan() && read.grad_norm.is_nan() && read.expert_load[0][1].is_nan());
    assert_eq!(read.expert_load[0][0], 0.3);
}

#[test]
fn a_metrics_line_is_one_tagged_object() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut writer = MetricsWriter::open(&path, "student", None).unwrap();
    writer
        .write(StepMetrics {
            soft_weight: 0.0,
            hard_weight: 1.0,
            soft_gradient_norm: None,
            hard_gradient_norm: 0.9,
            grad_norm: 0.75,
            tokens_per_second: 6e3,
            data_wait: 0.0,
            loss: 4.0,
            hard_loss: 4.0,
            soft_loss: None,
            ..step("student", 0)
        })
        .unwrap();
    writer
        .write(EvalMetrics { perplexity: 50.0, bits_per_byte: 1.5, cross_entropy: 4.0, ..evaluation("student", 0) })
        .unwrap();
    // Each line is in the file as soon as it is written.
    insta::assert_snapshot!(std::fs::read_to_string(&path).unwrap(), @r#"
    {"kind":"step","arm":"student","step":0,"total_steps":400,"tokens_seen":2048,"epoch":0,"loss":4.0,"soft_loss":null,"hard_loss":4.0,"soft_weight":0.0,"hard_weight":1.0,"soft_gradient_norm":null,"hard_gradient_norm":0.9,"aux_loss":1.02,"learning_rate":0.0,"grad_norm":0.75,"tokens_per_second":6000.0,"data_wait":0.0,"expert_load":[[0.3,0.2,0.25,0.25]]}
    {"kind":"evaluation","arm":"student","step":0,"cross_entropy":4.0,"perplexity":50.0,"bits_per_byte":1.5,"kl_to_teacher":0.5,"top1_agreement":0.6}
    "#);
}

#[test]
fn a_resumed_run_has_the_metrics_of_an_undisturbed_one() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, resumed) = (dir.path().join("whole.jsonl"), dir.path().join("resumed.jsonl"));
    log(&whole, "student", None, 0..100);
    log(&whole, "control", None, 0..100);

    log(&resumed, "student", None, 0..63);
    log(&resumed, "student", Some(50), 50..100);
    log(&resumed, "control", None, 0..80);
    log(&resumed, "control", Some(75), 75..100);
    assert_eq!(std::fs::read_to_string(&resumed).unwrap(), std::fs::read_to_string(&whole).unwrap());
    assert_eq!(read_metrics(&whole).unwrap().len(), 208);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
}

#[test]
fn a_torn_last_line_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, torn) = (dir.path().join("whole.jsonl"), dir.path().join("torn.jsonl"));
    log(&whole, "student", None, 0..20);
    let text = std::fs::read(&whole).unwrap();
    let lines_of = |bytes: &[u8]| bytes.iter().filter(|&&byte| byte == b'\n').count();
    for cut in (0..text.len()).step_by(37).chain([text.len() - 1, text.len()]) {
        std::fs::write(&torn, &text[..cut]).unwrap();
        let complete = lines_of(&text[..cut]) + usize::from(text[cut..].first() == Some(&b'\n'));
        assert_eq!(read_metrics(&torn).unwrap().len(), complete, "cut at {cut}");
        log(&torn, "student", Some(complete as u64), complete as u64..20);
        assert_eq!(std::fs::read(&torn).unwrap(), text, "cut at {cut}");
    }
}

#[test]
fn a_broken_line_in_the_middle_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    log(&path, "student", None, 0..3);
    let text = std::fs::read_to_string(&path).unwrap().replacen("{\"kind\":\"step\"", "{\"kind\":\"stop\"", 1);
    std::fs::write(&path, text).unwrap();
    for message in [
        read_metrics(&path).unwrap_err().to_string(),
        MetricsWriter::open(&path, "student", Some(2)).unwrap_err().to_string(),
    ] {
        assert!(message.contains("metrics.jsonl: line 1: not a metric (unknown variant `stop`"), "{message}");
        assert!(message.ends_with("; delete that line, or move the file away to start a new one"), "{message}");
    }
}

#[test]
fn a_long_run_makes_a_small_page() {
    let mut report = report();
    for curves in &mut report.curves {
        curves.loss = (0..200_000).map(|step| (step, 3.0 + (step as f64 * 0.7).sin())).collect();
        curves.hard_loss = curves.loss.clone();
        curves.grad_norm = curves.loss.clone();
    }
    report.arms[0].evaluation.expert_load = vec![vec![1.0 / 128.0; 128]; 48];
    let html = report.html();
    check_well_formed(&html);
    assert!(html.len() < 2_000_000, "{} bytes", html.len());
}
