//! How far a long run is: a bar on a terminal, plain log lines elsewhere.
//!
//! Standard error only; results never pass through here. Knows counts and time, not models or files.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::quantity::{clock, thousands};

/// What is being counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    Tokens,
    Steps,
    Shards,
    Bytes,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Unit::Tokens => "tokens",
            Unit::Steps => "steps",
            Unit::Shards => "shards",
            Unit::Bytes => "bytes",
        }
    }

    fn rate(self, per_second: f64) -> String {
        let number = if per_second >= 10.0 { thousands(per_second.round() as u64) } else { format!("{per_second:.1}") };
        match self {
            Unit::Tokens => format!("{number} tok/s"),
            Unit::Steps => format!("{number} steps/s"),
            Unit::Shards => format!("{number} shards/s"),
            Unit::Bytes => format!("{:.1} MB/s", per_second / 1e6),
        }
    }
}

/// Progress of one stage of a run: "teacher: 1,234/5,678 tokens, 812 tok/s, ETA 00:12".
///
/// On a terminal it is a bar that redraws itself. Elsewhere it is an `info` log line each time another tenth is done,
/// and in between every ten seconds at first, less and less often in long runs, so that a log stays readable.
pub struct Progress {
    label: String,
    unit: Unit,
    /// Nothing while it is not known how much there is.
    total: Option<u64>,
    bar: ProgressBar,
    state: Mutex<State>,
    logs: bool,
}

struct State {
    /// Where this process began: what an earlier one did says nothing of the rate.
    first: u64,
    done: u64,
    message: String,
    began: Instant,
    line: LineTimes,
}

impl Progress {
    /// Progress of `label` ("teacher", "student", "verify") from nothing to `total`, or to an end that is not known.
    pub fn new(label: &str, total: impl Into<Option<u64>>, unit: Unit) -> Progress {
        Progress::drawn_on(label, total.into(), unit, std::io::stderr().is_terminal(), true)
    }

    /// Progress that nobody sees: for callers that asked for quiet.
    pub fn silent() -> Progress {
        Progress::drawn_on("", None, Unit::Steps, false, false)
    }

    fn drawn_on(label: &str, total: Option<u64>, unit: Unit, terminal: bool, heard: bool) -> Progress {
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(total, target).with_prefix(label.to_string());
        bar.set_style(bar_style(unit, total.is_some()));
        if terminal {
            // A streamed teacher can take minutes between two calls; the clock should not look stuck meanwhile.
            bar.enable_steady_tick(Duration::from_millis(250));
        }
        let state = State {
            first: 0,
            done: 0,
            message: String::new(),
            began: Instant::now(),
            line: LineTimes { tenths: 0, at: Duration::ZERO },
        };
        Progress { label: label.to_string(), unit, total, bar, state: Mutex::new(state), logs: heard && !terminal }
    }

    /// The same, for a run that goes on from `done`; the rate and the time left count only what this process does.
    pub fn starting_at(self, done: u64) -> Progress {
        self.bar.set_position(done);
        self.bar.reset_eta();
        {
            let mut state = self.lock();
            state.first = done;
            state.done = done;
            state.line.tenths = tenths(done, self.total);
        }
        self
    }

    /// `count` more are done.
    pub fn advance(&self, count: u64) {
        let line = {
            let mut state = self.lock();
            state.done += count;
            self.bar.set_position(state.done);
            let elapsed = state.began.elapsed();
            let tenths = tenths(state.done, self.total);
            let due = self.logs && state.line.is_due(tenths, elapsed);
            due.then(|| self.line(&state, elapsed))
        };
        if let Some(line) = line {
            tracing::info!("{line}");
        }
    }

    /// `done` of it are done, after a run went back.
    pub fn set(&self, done: u64) {
        self.bar.set_position(done);
        let mut state = self.lock();
        state.first = state.first.min(done);
        state.done = done;
    }

    /// A few words after the numbers, as "loss 3.214".
    pub fn message(&self, text: &str) {
        self.bar.set_message(text.to_string());
        self.lock().message = text.to_string();
    }

    /// Runs `write` with the bar out of the way, for anything else that goes to the terminal meanwhile.
    pub fn suspend<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bar.suspend(write)
    }

    /// Ends the stage: the bar goes, one line with the count, the time and the mean rate stays in the log.
    pub fn finish(self) {
        self.bar.finish_and_clear();
        if self.label.is_empty() {
            return;
        }
        let state = self.lock();
        let (count, elapsed) = (state.done - state.first, state.began.elapsed());
        tracing::info!(
            "{}: {} {} in {}, {}",
            self.label,
            thousands(count),
            self.unit.name(),
            clock(elapsed.as_secs_f64()),
            self.unit.rate(count as f64 / elapsed.as_secs_f64().max(1e-9)),
        );
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // Only counts live behind the lock, so what a panicking thread left is still usable.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn line(&self, state: &State, elapsed: Duration) -> String {
        let rate = (state.done - state.first) as f64 / elapsed.as_secs_f64().max(1e-9);
        let mut line =
            format!("{}: {}, {}", self.label, counted(state.done, self.total, self.unit), self.unit.rate(rate));
        if let Some(total) = self.total {
            let left = total.saturating_sub(state.done) as f64 / rate;
            line.push_str(", ETA ");
            line.push_str(&clock(left));
        }
        if !state.message.is_empty() {
            line.push_str(", ");
            line.push_str(&state.message);
        }
        line
    }
}

/// When the last log line was written.
struct LineTimes {
    tenths: u64,
    at: Duration,
}

impl LineTimes {
    fn is_due(&mut self, tenths: u64, elapsed: Duration) -> bool {
        // A fixed ten seconds would write thousands of lines in a day; a share of the time so far writes a few dozen.
        let interval = Duration::from_secs(10).max(elapsed / 20);
        let due = tenths > self.tenths || elapsed.saturating_sub(self.at) >= interval;
        if due {
            *self = LineTimes { tenths: tenths.max(self.tenths), at: elapsed };
        }
        due
    }
}

/// "1,234/5,678 tokens", or "1,234 tokens" of nobody knows how many.
fn counted(done: u64, total: Option<u64>, unit: Unit) -> String {
    match total {
        Some(total) => format!("{}/{} {}", thousands(done), thousands(total), unit.name()),
        None => format!("{} {}", thousands(done), unit.name()),
    }
}

fn tenths(done: u64, total: Option<u64>) -> u64 {
    total.filter(|&total| total > 0).map_or(0, |total| (done as u128 * 10 / total as u128) as u64)
}

fn bar_style(unit: Unit, ends: bool) -> ProgressStyle {
    // The bar takes what the numbers leave of the line, so that it is one line on a screen of 60 columns too.
    let template = if ends {
        "{prefix:>8} {wide_bar:.cyan/dim} {percent:>3}% {rate} {left} {msg:.dim}"
    } else {
        "{prefix:>8} {spinner:.cyan} {count}, {rate} {msg:.dim}"
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    style
        .progress_chars("━╸─")
        .with_key("count", move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&counted(state.pos(), state.len(), unit));
        })
        .with_key("rate", move |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&unit.rate(state.per_sec()));
        })
        .with_key("left", |state: &ProgressState, out: &mut dyn std::fmt::Write| {
            let _ = out.write_str(&clock(state.eta().as_secs_f64()));
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_says_count_rate_and_time_left() {
        let progress = Progress::drawn_on("teacher", Some(5_678), Unit::Tokens, false, true).starting_at(234);
        progress.advance(1_000);
        let line = progress.line(&progress.lock(), Duration::from_secs(2));
        assert_eq!(line, "teacher: 1,234/5,678 tokens, 500 tok/s, ETA 00:09");
        progress.message("loss 3.214");
        let line = progress.line(&progress.lock(), Duration::from_secs(2));
        assert_eq!(line, "teacher: 1,234/5,678 tokens, 500 tok/s, ETA 00:09, loss 3.214");
    }

    /// A screen of some columns that keeps the lines written to it.
    #[derive(Debug, Clone)]
    struct Screen {
        columns: u16,
        lines: std::sync::Arc<Mutex<Vec<String>>>,
    }

    impl indicatif::TermLike for Screen {
        fn width(&self) -> u16 {
            self.columns
        }
        fn move_cursor_up(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> std::io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> std::io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> std::io::Result<()> {
            if text.contains("student") {
                self.lines.lock().unwrap().push(text.trim_end().to_string());
            }
            Ok(())
        }
        fn clear_line(&self) -> std::io::Result<()> {
            Ok(())
        }
        fn flush(&self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_bar_is_one_line_on_a_narrow_screen_and_says_what_matters() {
        for columns in [60, 100, 200] {
            let screen = Screen { columns, lines: Default::default() };
            let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
            let bar = ProgressBar::with_draw_target(Some(120_000_000), target).with_prefix("student");
            bar.set_style(bar_style(Unit::Tokens, true));
            bar.set_message("loss 3.214");
            bar.set_position(54_321_000);
            // Drawn at most some times in a second.
            std::thread::sleep(Duration::from_millis(120));
            bar.tick();
            let lines = screen.lines.lock().unwrap();
            let line = lines.last().unwrap();
            assert!(lines.iter().all(|line| line.chars().count() <= columns as usize), "{columns} columns: {lines:?}");
            for part in ["student", "━", " 45% ", " tok/s ", "loss 3.214"] {
                assert!(line.contains(part), "no {part:?} in {line:?} on {columns} columns");
            }
        }
    }

    #[test]
    fn nothing_is_drawn_where_there_is_no_terminal() {
        let progress = Progress::drawn_on("student", Some(100), Unit::Steps, false, true);
        progress.advance(50);
        assert!(progress.bar.is_hidden(), "a pipe gets log lines, and no bars");
    }

    #[test]
    fn what_ends_nobody_knows_where_says_only_how_far_it_is() {
        let progress = Progress::drawn_on("teacher, held out", None, Unit::Tokens, false, true);
        progress.advance(1_000);
        let line = progress.line(&progress.lock(), Duration::from_secs(2));
        assert_eq!(line, "teacher, held out: 1,000 tokens, 500 tok/s");
    }

    #[test]
    fn a_run_that_has_done_nothing_promises_no_end() {
        let progress = Progress::drawn_on("student", Some(100), Unit::Steps, false, true);
        let line = progress.line(&progress.lock(), Duration::from_secs(2));
        assert_eq!(line, "student: 0/100 steps, 0.0 steps/s, ETA --:--");
        let empty = Progress::drawn_on("verify", Some(0), Unit::Shards, false, true);
        empty.advance(0);
        empty.finish();
        Progress::silent().finish();
    }

    #[test]
    fn log_lines_come_each_tenth_and_thin_out_in_long_runs() {
        let mut times = LineTimes { tenths: 0, at: Duration::ZERO };
        assert!(!times.is_due(0, Duration::from_secs(9)));
        assert!(times.is_due(0, Duration::from_secs(10)));
        assert!(times.is_due(1, Duration::from_secs(11)));
        assert!(!times.is_due(1, Duration::from_secs(20)));
        let day = (0..86_400).filter(|&second| times.is_due(1, Duration::from_secs(second))).count();
        assert!((50..250).contains(&day), "{day} lines in a day");
    }

    #[test]
    fn rates_are_readable() {
        assert_eq!(Unit::Bytes.rate(2.5e6), "2.5 MB/s");
        assert_eq!(Unit::Tokens.rate(3.25), "3.2 tok/s");
    }
}
