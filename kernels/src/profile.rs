//! Where time goes: named spans of stages, operations and pieces of operations, kept in memory while a recording runs.
//!
//! A span that nobody records costs one relaxed load of an atomic. A recorded one costs readings of the clock and a push
//! into a list of its thread's own. Lists are bounded: of spans that begin after [`MOST`], only the number is kept. What
//! becomes of a recording, a file for instance, is the caller's business; so is whether there is one at all.

use std::{
    cell::RefCell,
    marker::PhantomData,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// What a span is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A part of a run that its user knows by name.
    Stage,
    /// One operation over tensors, on the thread that asked for it; others may help.
    Op,
    /// What one thread does of an operation.
    Piece,
}

/// Most spans of a recording: stages, then operations and pieces together. About 40 MB when both are full.
pub const MOST: [usize; 2] = [100_000, 400_000];

impl Kind {
    fn list(self) -> usize {
        match self {
            Kind::Stage => 0,
            Kind::Op | Kind::Piece => 1,
        }
    }
}

/// A span that has ended. Times in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Event {
    pub name: &'static str,
    pub kind: Kind,
    /// Since the recording began.
    pub start: u64,
    pub duration: u64,
    /// What all threads of the process together computed meanwhile; unknown for pieces, and where the system does not
    /// say.
    pub processor: Option<u64>,
    /// How much of what it was about.
    pub amount: Option<(&'static str, u64)>,
}

/// The spans of one thread, in the order in which they ended. Of any two, one contains the other or they do not overlap.
#[derive(Debug)]
pub struct ThreadEvents {
    pub name: String,
    pub events: Vec<Event>,
}

/// Spans that began after a list was full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeftOut {
    pub count: usize,
    /// When the first of them began, since the recording did.
    pub since: Duration,
}

/// What was recorded.
#[derive(Debug)]
pub struct Recorded {
    pub duration: Duration,
    pub threads: Vec<ThreadEvents>,
    /// Of stages, and of operations and pieces.
    pub left_out: [Option<LeftOut>; 2],
}

/// The number of the recording that runs; 0 for none.
static RUNNING: AtomicU32 = AtomicU32::new(0);
/// Spans begun, by list.
static BEGUN: [AtomicUsize; 2] = [AtomicUsize::new(0), AtomicUsize::new(0)];
static RECORDING: Mutex<Recording> =
    Mutex::new(Recording { number: 0, running: false, began: None, full: [None; 2], lanes: Vec::new() });

struct Recording {
    number: u32,
    running: bool,
    began: Option<Instant>,
    full: [Option<Duration>; 2],
    lanes: Vec<Arc<Lane>>,
}

/// The list of one thread.
struct Lane {
    recording: u32,
    began: Instant,
    name: String,
    events: Mutex<Vec<Event>>,
}

thread_local! {
    static LANE: RefCell<Option<Arc<Lane>>> = const { RefCell::new(None) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing in here panics between two changes that belong together.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begins a recording. `false` when one is running already; there is one at a time in a process.
pub fn start() -> bool {
    let mut recording = lock(&RECORDING);
    if recording.running {
        return false;
    }
    let number = recording.number.wrapping_add(1).max(1);
    *recording = Recording { number, running: true, began: Some(Instant::now()), full: [None; 2], lanes: vec![] };
    BEGUN.iter().for_each(|count| count.store(0, Relaxed));
    RUNNING.store(number, Relaxed);
    true
}

/// Ends the recording, and gives what it has. Spans that have not ended are not part of it. `None` when none runs.
pub fn stop() -> Option<Recorded> {
    let mut recording = lock(&RECORDING);
    if !std::mem::take(&mut recording.running) {
        return None;
    }
    RUNNING.store(0, Relaxed);
    let duration = recording.began.map(|began| began.elapsed()).unwrap_or_default();
    let lanes = std::mem::take(&mut recording.lanes);
    let threads = lanes
        .iter()
        .map(|lane| ThreadEvents { name: lane.name.clone(), events: std::mem::take(&mut *lock(&lane.events)) });
    let left_out = [0, 1].map(|list| {
        let count = BEGUN[list].load(Relaxed).saturating_sub(MOST[list]);
        (count > 0).then(|| LeftOut { count, since: recording.full[list].unwrap_or(duration) })
    });
    Some(Recorded { duration, threads: threads.collect(), left_out })
}

/// A span that is running; it ends when this is dropped, on the thread that it began on.
#[derive(Debug)]
#[must_use = "a span ends when it is dropped"]
pub struct Span {
    open: Option<Open>,
    _one_thread: PhantomData<*const ()>,
}

#[derive(Debug)]
struct Open {
    recording: u32,
    name: &'static str,
    kind: Kind,
    start: Instant,
    processor: Option<u64>,
    amount: Option<(&'static str, u64)>,
}

/// Begins a span of a [stage](Kind::Stage).
#[inline]
pub fn stage(name: &'static str) -> Span {
    span(name, Kind::Stage)
}

/// Begins a span of an [operation](Kind::Op).
#[inline]
pub fn op(name: &'static str) -> Span {
    span(name, Kind::Op)
}

/// Begins a span of a [piece](Kind::Piece) of an operation.
#[inline]
pub fn piece(name: &'static str) -> Span {
    span(name, Kind::Piece)
}

#[inline]
fn span(name: &'static str, kind: Kind) -> Span {
    let recording = RUNNING.load(Relaxed);
    Span { open: if recording == 0 { None } else { begin(recording, name, kind) }, _one_thread: PhantomData }
}

#[cold]
fn begin(recording: u32, name: &'static str, kind: Kind) -> Option<Open> {
    let list = kind.list();
    let begun = BEGUN[list].fetch_add(1, Relaxed);
    if begun >= MOST[list] {
        if begun == MOST[list] {
            let mut recording = lock(&RECORDING);
            recording.full[list] = recording.began.map(|began| began.elapsed());
        }
        return None;
    }
    let processor = if kind == Kind::Piece { None } else { processor_time() };
    Some(Open { recording, name, kind, start: Instant::now(), processor, amount: None })
}

impl Span {
    /// Says how much of something the span is about: `("tokens", 2048)`.
    #[inline]
    pub fn with(mut self, what: &'static str, amount: u64) -> Self {
        if let Some(open) = &mut self.open {
            open.amount = Some((what, amount));
        }
        self
    }
}

impl Drop for Span {
    #[inline]
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            end(open);
        }
    }
}

#[cold]
fn end(open: Open) {
    let end = Instant::now();
    let processor = open.processor.and_then(|before| Some(processor_time()?.saturating_sub(before)));
    // A thread that is ending has no list any more.
    let _ = LANE.try_with(|lane| {
        let mut lane = lane.borrow_mut();
        if lane.as_ref().is_none_or(|lane| lane.recording != open.recording) {
            *lane = lane_of(open.recording);
        }
        let Some(lane) = &*lane else { return };
        lock(&lane.events).push(Event {
            name: open.name,
            kind: open.kind,
            start: open.start.saturating_duration_since(lane.began).as_nanos() as u64,
            duration: end.duration_since(open.start).as_nanos() as u64,
            processor,
            amount: open.amount,
        });
    });
}

/// A list for this thread, if that recording is still running.
fn lane_of(number: u32) -> Option<Arc<Lane>> {
    let mut recording = lock(&RECORDING);
    let began = recording.began.filter(|_| recording.running && recording.number == number)?;
    let name = match (std::thread::current().name(), rayon::current_thread_index()) {
        (Some(name), _) => name.to_string(),
        (None, Some(worker)) => format!("worker {worker}"),
        (None, None) => format!("thread {}", recording.lanes.len()),
    };
    let lane = Arc::new(Lane { recording: number, began, name, events: Mutex::default() });
    recording.lanes.push(lane.clone());
    Some(lane)
}

/// Nanoseconds that all threads of this process have computed.
fn processor_time() -> Option<u64> {
    Some(cpu_time::ProcessTime::try_now().ok()?.as_duration().as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recordings are of the whole process, so that one test has all of them; other tests' spans may be in it.
    #[test]
    fn a_recording_has_the_spans_that_ended_in_it_and_nothing_else() {
        drop(stage("before"));
        assert!(stop().is_none());
        assert!(start());
        assert!(!start(), "one at a time");
        {
            let _outer = stage("outer").with("tokens", 7);
            let _inner = op("inner");
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::Builder::new().name("other".into()).spawn(|| drop(piece("elsewhere"))).unwrap().join().unwrap();
        let late = stage("late");
        let recorded = stop().unwrap();
        drop(late);
        let of = |name: &str| {
            let mut found = recorded.threads.iter().flat_map(|thread| {
                thread.events.iter().filter(|event| event.name == name).map(|event| (thread.name.as_str(), *event))
            });
            let first = found.next();
            assert!(found.next().is_none(), "{name} twice");
            first
        };
        let ((thread, outer), (_, inner)) = (of("outer").unwrap(), of("inner").unwrap());
        assert!(thread.ends_with("a_recording_has_the_spans_that_ended_in_it_and_nothing_else"), "{thread}");
        assert_eq!((outer.kind, outer.amount, inner.amount), (Kind::Stage, Some(("tokens", 7)), None));
        assert!(inner.duration >= 2_000_000 && outer.start <= inner.start);
        assert!(outer.start + outer.duration >= inner.start + inner.duration);
        assert_eq!(of("elsewhere").unwrap().0, "other");
        assert!(of("before").is_none() && of("late").is_none());
        assert!(recorded.duration >= Duration::from_millis(2) && recorded.left_out == [None; 2]);

        // The next recording has none of this, and counts what it has no room for.
        assert!(start());
        for _ in 0..MOST[0] + 3 {
            drop(stage("many"));
        }
        let recorded = stop().unwrap();
        let kept = recorded.threads.iter().flat_map(|thread| &thread.events).filter(|event| event.name == "many");
        let left_out = recorded.left_out[0].unwrap();
        assert!(kept.count() <= MOST[0] && left_out.count >= 3 && left_out.since <= recorded.duration);
        assert!(stop().is_none());
    }
}
