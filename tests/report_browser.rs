//! The report in a browser: its charts are there, with a size and with lines. Runs where Chromium is; says on stderr when it is
//! skipped.

mod small_run;

use std::fs;
use std::path::Path;
use std::process::Command;

use limbeck::distill;
use limbeck::eval::compare::{ComparedRun, csv, html, table};
use small_run::*;

/// The browser to test with: `$CHROMIUM`, or what it is usually called.
fn browser() -> Option<String> {
    let names = std::env::var("CHROMIUM").into_iter();
    let names = names.chain(["chromium", "chromium-browser", "google-chrome"].map(String::from));
    let works =
        |name: &String| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
    let found = names.into_iter().find(works);
    if found.is_none() {
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), "SKIPPED: opening reports needs Chromium; set CHROMIUM to its path");
    }
    found
}

/// What the browser makes of a page: for each chart its title, whether it has a size on the screen, and the pieces drawn in it.
fn charts(browser: &str, folder: &Path, page: &str, width: u32) -> Vec<(String, bool, usize)> {
    // The page has no scripts; a copy gets one that measures what the browser has laid out.
    let script = "<script>document.body.setAttribute('data-charts', JSON.stringify(\
                  [...document.querySelectorAll('figure.chart')].map(figure => {\
                  const plot = figure.querySelector('svg.plot').getBoundingClientRect();\
                  const fits = plot.width > 100 &amp;&amp; plot.height > 40 &amp;&amp; plot.right &lt;= innerWidth + 1;\
                  const lines = [...figure.querySelectorAll('svg.plot path.line')].filter(line => line.getTotalLength() > 1);\
                  const cells = figure.querySelectorAll('svg.plot rect');\
                  return [figure.querySelector('figcaption').textContent, fits, lines.length + cells.length];\
                  })));</script></body>";
    let script = script.replace("&amp;", "&").replace("&lt;", "<");
    let path = folder.join("page.html");
    fs::write(&path, page.replace("</body>", &script)).unwrap();
    let output = Command::new(browser)
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"])
        .arg(format!("--window-size={width},2000"))
        .arg(format!("--user-data-dir={}", folder.join("profile").display()))
        .arg(format!("file://{}", path.display()))
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&output.stdout).into_owned();
    let measured = dom.split("data-charts=\"").nth(1).and_then(|rest| rest.split('"').next());
    let measured = measured.unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&output.stderr)));
    serde_json::from_str(&measured.replace("&quot;", "\"").replace("&amp;", "&")).unwrap()
}

fn check(found: &[(String, bool, usize)], expected: &[&str], what: &str) {
    for title in expected {
        let chart = found.iter().find(|chart| chart.0 == *title);
        let (_, fits, drawn) = chart.unwrap_or_else(|| panic!("{what}: no chart `{title}` in {found:?}"));
        assert!(fits, "{what}: `{title}` has no size, or leaves the screen");
        assert!(*drawn > 0, "{what}: nothing is drawn in `{title}`");
    }
}

#[test]
fn a_browser_shows_the_charts_of_report_and_comparison() {
    let small = SmallRun::new();
    for (name, seed) in [("run", "train.ema=0.9"), ("other", "loss.weighting.soft=0.9")] {
        distill::run(&small.recipe(&[seed]), &small.options(name)).unwrap();
    }
    let runs = ["run", "other"].map(|name| ComparedRun::read(&small.path(name)).unwrap());
    let text = table(&runs, None);
    let starts: Vec<String> =
        text.lines().map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ")).collect();
    let arms = ["run arm", "run student", "run averaged", "run control", "other student", "other control"];
    let differences = ["", "recipe run", "loss.weighting.soft 0.5", "train.ema 0.9"];
    assert_eq!(starts, [&arms[..], &differences].concat());
    assert!(text.ends_with("train.ema            0.9  –\n"), "{text}");
    // On a narrow terminal an arm is below the other, and a key too.
    let narrow = table(&runs, Some(30));
    assert!(narrow.lines().all(|line| line.chars().count() <= 30), "{narrow}");
    assert!(narrow.starts_with("run, student\n  cross-entropy  "), "{narrow}");
    assert!(narrow.contains("\ntrain.ema\n  run    0.9\n  other  –\n"), "{narrow}");
    let values = csv(&runs);
    let lines: Vec<&str> = values.lines().collect();
    assert_eq!(lines.len(), 1 + 4 + 3, "a line for each arm, the teacher too");
    let report = runs[0].report.as_ref().unwrap();
    assert!(lines[1].starts_with(&format!("run,student,{},", report.arms[0].evaluation.cross_entropy)));

    let Some(browser) = browser() else { return };
    let page = fs::read_to_string(small.path("run/report.html")).unwrap();
    let of_report = [
        "Held-out cross-entropy",
        "Training loss",
        "Divergence from the teacher in training",
        "Loss weights of the student",
        "Pull of the student's targets",
        "KL to the teacher",
        "Agreement with the teacher",
        "Reliability",
        "Load of the busiest expert",
        "Throughput",
        "student",
        "control",
    ];
    for width in [1300, 400] {
        let found = charts(&browser, &small.path(""), &page, width);
        check(&found, &of_report, &format!("report, {width} pixels wide"));
    }
    let page = html(&runs);
    assert!(page.contains("<tr><th>train.ema</th><td>0.9</td><td>–</td></tr>"), "what differs is said");
    for width in [1300, 400] {
        let found = charts(&browser, &small.path(""), &page, width);
        let of_comparison = ["Held-out cross-entropy", "Divergence from the teacher in training", "Throughput"];
        check(&found, &of_comparison, &format!("comparison, {width} pixels wide"));
    }
}
