//! Profiles of runs: what `limbeck_kernels::profile` recorded, as a file in the trace event format that Perfetto
//! (ui.perfetto.dev) and chrome://tracing open. Knows spans and files, and not what a run is.

use std::io::{ErrorKind, Write};
use std::path::Path;

pub use limbeck_kernels::profile::stage;
use limbeck_kernels::profile::{self, Event, Kind, LeftOut, Recorded};
use serde_json::json;

use crate::{
    durable,
    error::{Error, Result},
};

/// What the file of a run is called in its directory, unless another one is asked for.
pub const PROFILE_FILE: &str = "profile.json";

/// Runs something under a span of this name, and writes what was recorded meanwhile to `file`, whole or not at all: also
/// when it fails or is interrupted. Without a file it is just run.
///
/// # Errors
/// [`Error::Usage`] before anything is run when the file cannot be written, or another run of this process is being
/// recorded; what it comes to itself; [`Error::Io`] when it went well and the file could not be written in the end.
pub fn record<R>(file: Option<&Path>, name: &'static str, run: impl FnOnce() -> Result<R>) -> Result<R> {
    let Some(file) = file else { return run() };
    check(file)?;
    if !profile::start() {
        return Err(Error::usage("another run of this process is being recorded", "record one run at a time"));
    }
    let _running = Running;
    let whole = profile::stage(name);
    let result = run();
    drop(whole);
    let recorded = profile::stop().expect("it was started above");
    match (result, write(file, name, &recorded)) {
        (Ok(value), Ok(())) => {
            tracing::info!("profile: {}", file.display());
            Ok(value)
        }
        (Ok(_), Err(error)) => Err(error),
        // The first error is the one to tell.
        (Err(error), written) => {
            if let Err(problem) = written {
                tracing::warn!("the profile was not written: {problem}");
            }
            Err(error)
        }
    }
}

/// Ends the recording of a run that panicked, so that there can be another.
struct Running;

impl Drop for Running {
    fn drop(&mut self) {
        profile::stop();
    }
}

/// Whether the file can be written, by making one beside it.
fn check(file: &Path) -> Result<()> {
    let refused = |why: ErrorKind| {
        Error::usage(
            format!("the profile {} cannot be written: {why}", file.display()),
            "give --profile=FILE a file in a directory that can be written",
        )
    };
    if file.is_dir() {
        return Err(refused(ErrorKind::IsADirectory));
    }
    let (directory, temporary) = (durable::parent(file), durable::temporary_path(file));
    if directory.exists() && !directory.is_dir() {
        return Err(refused(ErrorKind::NotADirectory));
    }
    let made = std::fs::create_dir_all(directory).and_then(|()| std::fs::File::create(&temporary));
    made.and_then(|_| std::fs::remove_file(&temporary)).map_err(|error| refused(error.kind()))
}

fn write(file: &Path, name: &str, recorded: &Recorded) -> Result<()> {
    durable::write_file(file, |out| write_events(out, name, recorded).map_err(Error::io(file)))
}

/// One event a line, those of a thread together, outer ones before what is in them.
fn write_events(out: &mut impl Write, name: &str, recorded: &Recorded) -> std::io::Result<()> {
    let process = std::process::id();
    let left_out = |list: usize| recorded.left_out[list].map_or(0, |left_out| left_out.count);
    let about = json!({
        "program": concat!("limbeck ", env!("CARGO_PKG_VERSION")),
        "command": name,
        "stages_left_out": left_out(0),
        "operations_left_out": left_out(1),
    });
    writeln!(out, "{{\"displayTimeUnit\":\"ms\",\"otherData\":{about},\"traceEvents\":[")?;
    write!(
        out,
        "{}",
        json!({ "ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": { "name": format!("limbeck {name}") } })
    )?;
    for (list, what) in ["stages", "operations"].into_iter().enumerate() {
        if let Some(LeftOut { count, since }) = recorded.left_out[list] {
            let note =
                format!("from here on {what} are left out of the profile, {count} in all: its memory is bounded");
            let at = since.as_nanos() as u64;
            let note = json!({ "ph": "i", "s": "g", "name": note, "pid": process, "tid": 1, "ts": at as f64 / 1e3 });
            write!(out, ",\n{note}")?;
        }
    }
    for (number, thread) in recorded.threads.iter().enumerate() {
        let number = number + 1;
        let named = json!({
            "ph": "M", "name": "thread_name", "pid": process, "tid": number, "args": { "name": thread.name }
        });
        write!(out, ",\n{named}")?;
        let mut events = thread.events.clone();
        // Of spans that begin together the longer one is outside; of equal ones that which ended last.
        events.reverse();
        events.sort_by_key(|event| (event.start, u64::MAX - event.duration));
        for event in &events {
            writeln!(out, ",")?;
            write_event(out, process, number, event)?;
        }
    }
    writeln!(out, "\n]}}")
}

/// A complete event. Written by hand, for there are hundreds of thousands; names are of this program and need no escapes.
fn write_event(out: &mut impl Write, process: u32, thread: usize, event: &Event) -> std::io::Result<()> {
    let Event { name, kind, start, duration, processor, amount } = event;
    let category = match kind {
        Kind::Stage => "stage",
        Kind::Op => "op",
        Kind::Piece => "piece",
    };
    let (ts, dur) = (Microseconds(*start), Microseconds(*duration));
    write!(
        out,
        r#"{{"ph":"X","name":"{name}","cat":"{category}","pid":{process},"tid":{thread},"ts":{ts},"dur":{dur},"args":{{"#
    )?;
    let mut comma = "";
    if let Some((what, amount)) = amount {
        write!(out, r#""{what}":{amount}"#)?;
        comma = ",";
    }
    if let Some(processor) = processor {
        write!(out, r#"{comma}"processor_us":{}"#, Microseconds(*processor))?;
    }
    write!(out, "}}}}")
}

/// Nanoseconds, written in the format's unit to the last of them.
struct Microseconds(u64);

impl std::fmt::Display for Microseconds {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}.{:03}", self.0 / 1000, self.0 % 1000)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use limbeck_kernels::profile::ThreadEvents;

    use super::*;

    #[test]
    fn a_file_has_every_span_and_says_what_was_left_out() {
        let event = |name, start, duration| Event {
            name,
            kind: Kind::Op,
            start,
            duration,
            processor: Some(1500),
            amount: Some(("rows", 3)),
        };
        let recorded = Recorded {
            duration: Duration::from_micros(9),
            // In the order in which they ended; all begin at once.
            threads: vec![ThreadEvents {
                name: "a \"thread\"".into(),
                events: vec![event("inner", 10, 5), event("middle", 10, 5), event("outer", 10, 2000)],
            }],
            left_out: [None, Some(LeftOut { count: 7, since: Duration::from_nanos(2500) })],
        };
        let mut bytes = vec![];
        write_events(&mut bytes, "distill", &recorded).unwrap();
        let trace: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(
            (&trace["otherData"]["operations_left_out"], &trace["otherData"]["stages_left_out"]),
            (&json!(7), &json!(0))
        );
        let events = trace["traceEvents"].as_array().unwrap();
        let spans: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        let names: Vec<_> = spans.iter().map(|event| event["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["outer", "middle", "inner"]);
        assert_eq!((&spans[0]["ts"], &spans[0]["dur"]), (&json!(0.010), &json!(2.0)));
        assert_eq!(spans[0]["args"], json!({ "rows": 3, "processor_us": 1.5 }));
        let note = events.iter().find(|event| event["ph"] == "i").unwrap();
        assert_eq!(
            note["name"],
            "from here on operations are left out of the profile, 7 in all: its memory is bounded"
        );
        assert_eq!(note["ts"], json!(2.5));
        assert!(events.iter().any(|event| event["args"]["name"] == "a \"thread\""));
    }
}
