//! Reading batches before they are needed: threads decode sequences of the next ones while the current one is worked on.
//!
//! What comes out, and in which order, does not depend on the threads. Knows numbers of sequences, and neither caches nor
//! models.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::thread;

use crate::error::Result;
use crate::targets::{DistillBatch, TargetSource};

/// How far, and with how many threads, batches are read ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefetch {
    /// Threads that read and decode.
    pub threads: usize,
    /// Most batches in memory beside the one that is worked on; at least one.
    pub batches: usize,
}

impl Default for Prefetch {
    /// A thread per core, from 2, so that one may wait for a disk or a network, to 8.
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(2, usize::from);
        Prefetch { threads: cores.clamp(2, 8), batches: 4 }
    }
}

/// Batches of a source, in a given order, read ahead of their use.
pub struct Prefetcher<'s, 'a> {
    shared: &'s Shared<'a>,
}

struct Shared<'a> {
    source: &'a dyn TargetSource,
    settings: Prefetch,
    state: Mutex<State<'a>>,
    /// There is work, or an end.
    work: Condvar,
    /// The oldest batch is complete.
    ready: Condvar,
}

struct State<'a> {
    /// Numbers of the sequences of each batch to come.
    order: Box<dyn Iterator<Item = Vec<u64>> + Send + 'a>,
    ended: bool,
    /// Batches that were begun, oldest first; the first has the number `first`.
    begun: VecDeque<Begun>,
    first: u64,
    /// Pieces that no thread has taken yet.
    pieces: VecDeque<Piece>,
    stopped: bool,
}

struct Begun {
    pieces: Vec<Option<Outcome>>,
    missing: usize,
}

/// What reading a piece came to; a panic goes on where the batch is asked for.
type Outcome = Result<Result<DistillBatch>, Box<dyn Any + Send>>;

struct Piece {
    batch: u64,
    place: usize,
    numbers: Vec<u64>,
}

impl<'a> Prefetcher<'_, 'a> {
    /// Calls `with` while threads read the batches of `order` from `source`; they end when `with` does.
    pub fn run<R>(
        source: &'a dyn TargetSource,
        order: impl Iterator<Item = Vec<u64>> + Send + 'a,
        settings: Prefetch,
        with: impl FnOnce(&mut Prefetcher<'_, 'a>) -> R,
    ) -> R {
        let state = State {
            order: Box::new(order),
            ended: false,
            begun: VecDeque::new(),
            first: 0,
            pieces: VecDeque::new(),
            stopped: false,
        };
        let (work, ready) = (Condvar::new(), Condvar::new());
        let shared = Shared { source, settings, state: Mutex::new(state), work, ready };
        thread::scope(|scope| {
            // Dropped before the scope waits for its threads, by a panic too.
            let _stop = Stop(&shared);
            for _ in 0..settings.threads.max(1) {
                scope.spawn(|| shared.read_pieces());
            }
            with(&mut Prefetcher { shared: &shared })
        })
    }

    /// The next batch of the order; `None` after the last.
    ///
    /// # Errors
    /// What reading this batch came to. No batch comes after an error.
    pub fn next_batch(&mut self) -> Result<Option<DistillBatch>> {
        let mut state = self.shared.lock();
        let begun = loop {
            match state.begun.front() {
                Some(begun) if begun.missing == 0 => break state.begun.pop_front().expect("there is a front"),
                None if state.ended || state.stopped => return Ok(None),
                _ => state = wait(&self.shared.ready, state),
            }
        };
        state.first += 1;
        drop(state);
        self.shared.work.notify_all();
        let mut whole: Option<DistillBatch> = None;
        for outcome in begun.pieces {
            match outcome.expect("no piece is missing") {
                Ok(Ok(piece)) => match &mut whole {
                    Some(whole) => whole.append(piece),
                    None => whole = Some(piece),
                },
                Ok(Err(error)) => {
                    self.shared.stop();
                    return Err(error);
                }
                Err(panic) => resume_unwind(panic),
            }
        }
        Ok(whole)
    }
}

impl<'a> Shared<'a> {
    fn lock(&self) -> MutexGuard<'_, State<'a>> {
        // Panics of a source are caught, and nothing else panics while it holds the lock but the order.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        state.pieces.clear();
        state.begun.clear();
        drop(state);
        self.work.notify_all();
    }

    fn read_pieces(&self) {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return;
            }
            if let Some(piece) = state.pieces.pop_front() {
                drop(state);
                let outcome = catch_unwind(AssertUnwindSafe(|| self.source.read(&piece.numbers)));
                state = self.lock();
                if state.stopped {
                    return;
                }
                let begun = (piece.batch - state.first) as usize;
                let begun = &mut state.begun[begun];
                begun.pieces[piece.place] = Some(outcome);
                begun.missing -= 1;
                if begun.missing == 0 {
                    self.ready.notify_all();
                }
            } else if state.begun.len() < self.settings.batches.max(1) && !state.ended {
                self.begin(&mut state);
            } else if state.ended {
                return;
            } else {
                state = wait(&self.work, state);
            }
        }
    }

    /// Cuts the next batch into a piece for each thread.
    fn begin(&self, state: &mut State<'a>) {
        let Some(numbers) = state.order.next() else {
            state.ended = true;
            self.ready.notify_all();
            self.work.notify_all();
            return;
        };
        let batch = state.first + state.begun.len() as u64;
        let size = numbers.len().div_ceil(self.settings.threads.max(1)).max(1);
        // A batch of nothing is one piece of nothing.
        let numbers: Vec<Vec<u64>> =
            if numbers.is_empty() { vec![vec![]] } else { numbers.chunks(size).map(<[u64]>::to_vec).collect() };
        state.begun.push_back(Begun { pieces: numbers.iter().map(|_| None).collect(), missing: numbers.len() });
        let pieces = numbers.into_iter().enumerate().map(|(place, numbers)| Piece { batch, place, numbers });
        state.pieces.extend(pieces);
        self.work.notify_all();
    }
}

struct Stop<'s, 'a>(&'s Shared<'a>);

impl Drop for Stop<'_, '_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

fn wait<'a, T>(condition: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condition.wait(guard).unwrap_or_else(|poisoned| poisoned.into_inner())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;
    use crate::error::Error;
    use crate::targets::PackedSequence;

    /// Sequences that say their number, at different speeds; one fails, one panics.
    struct Numbered {
        fails: Option<u64>,
        panics: Option<u64>,
        /// Sequences that were read.
        read: AtomicUsize,
    }

    fn numbered() -> Numbered {
        Numbered { fails: None, panics: None, read: AtomicUsize::new(0) }
    }

    impl TargetSource for Numbered {
        fn sequence_count(&self) -> u64 {
            1000
        }

        fn seq_len(&self) -> usize {
            1
        }

        fn read(&self, numbers: &[u64]) -> Result<DistillBatch> {
            for &number in numbers {
                thread::sleep(Duration::from_micros(number * 37 % 200));
                if self.fails == Some(number) {
                    return Err(Error::usage(format!("sequence {number} is torn"), "mend it"));
                }
                assert!(self.panics != Some(number), "sequence {number} is broken");
                self.read.fetch_add(1, Ordering::Relaxed);
            }
            let sequence = |&number: &u64| PackedSequence { tokens: vec![number as u32; 2], segments: vec![0; 2] };
            Ok(DistillBatch { sequences: numbers.iter().map(sequence).collect(), targets: None, row_weights: None })
        }
    }

    fn order(batches: u64, size: u64) -> impl Iterator<Item = Vec<u64>> + Send {
        (0..batches).map(move |batch| (0..size).map(|place| (batch * size + place) * 7 % 1000).collect())
    }

    fn numbers(batch: &DistillBatch) -> Vec<u64> {
        batch.sequences.iter().map(|sequence| sequence.tokens[0] as u64).collect()
    }

    #[test]
    fn batches_come_whole_and_in_order_whatever_the_threads_do() {
        for (threads, batches) in [(1, 1), (2, 4), (5, 2), (8, 7)] {
            let source = numbered();
            let got = Prefetcher::run(&source, order(30, 6), Prefetch { threads, batches }, |prefetcher| {
                std::iter::from_fn(|| prefetcher.next_batch().unwrap()).map(|batch| numbers(&batch)).collect::<Vec<_>>()
            });
            assert_eq!(got, order(30, 6).collect::<Vec<_>>(), "{threads} threads");
        }
    }

    #[test]
    fn an_error_comes_with_its_batch_and_not_before() {
        // The third sequence of the fifth batch.
        let source = Numbered { fails: Some((4 * 6 + 2) * 7), ..numbered() };
        Prefetcher::run(&source, order(30, 6), Prefetch { threads: 4, batches: 8 }, |prefetcher| {
            thread::sleep(Duration::from_millis(20));
            for expected in order(4, 6) {
                assert_eq!(numbers(&prefetcher.next_batch().unwrap().unwrap()), expected);
            }
            let error = prefetcher.next_batch().unwrap_err().to_string();
            assert_eq!(error, "sequence 182 is torn; mend it");
            assert!(prefetcher.next_batch().unwrap().is_none());
        });
    }

    #[test]
    #[should_panic(expected = "sequence 182 is broken")]
    fn a_panic_of_the_source_comes_with_its_batch() {
        let source = Numbered { panics: Some(182), ..numbered() };
        Prefetcher::run(&source, order(30, 6), Prefetch { threads: 2, batches: 2 }, |prefetcher| {
            while prefetcher.next_batch().unwrap().is_some() {}
        });
    }

    #[test]
    fn no_more_than_the_batches_asked_for_are_read_ahead() {
        let source = numbered();
        Prefetcher::run(&source, order(50, 6), Prefetch { threads: 4, batches: 3 }, |prefetcher| {
            for taken in 1..=3 {
                prefetcher.next_batch().unwrap();
                thread::sleep(Duration::from_millis(50));
                assert!(source.read.load(Ordering::Relaxed) <= (taken + 3) * 6);
            }
        });
    }
}
