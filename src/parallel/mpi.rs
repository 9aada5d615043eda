//! Ranks that are processes, on one machine or many, which talk by MPI: the transport, and nothing else. Built with the
//! feature `mpi`.
//!
//! A rank that fails tells all others. One that is killed is noticed by `mpirun`, which ends all others; and who waits
//! for a rank longer than [`PATIENCE`] gives up. MPI is used from one thread.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use mpi::{
    Threading,
    environment::Universe,
    point_to_point::{Message, Status},
    request::{Request, StaticScope},
    topology::SimpleCommunicator,
    traits::*,
};

use super::collective::{Collective, Operation};
use super::in_process::{GONE, out_of_step};
use crate::error::{Error, Result};

/// How long a rank waits for another one that is at work on the same thing. What is to be done next may be waited for
/// as long as it takes.
const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// Bytes of one message: MPI counts with 32 bits. One of exactly this length is followed by another.
const PIECE: usize = 1 << 30;
/// The message of a rank that has failed: the number of the rank as decimal digits, a line feed, and why.
const FAILED: i32 = 100;
/// How long a rank that fails tries to say so.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// This process's end of the world that `mpirun` or `srun` made.
pub struct Mpi {
    /// Ends MPI when it is dropped; `None` only while that happens.
    universe: Option<Universe>,
    world: SimpleCommunicator,
    /// What is on its way.
    pending: RefCell<Vec<Pending>>,
    /// Whether a rank failed: then there is no orderly end.
    failed: Cell<bool>,
}

/// Bytes that MPI reads until the request is done.
struct Pending {
    request: Request<'static, [u8], StaticScope>,
    bytes: *mut [u8],
}

impl Mpi {
    /// Joins the world; once in a process.
    ///
    /// # Errors
    /// When MPI has been used in this process before.
    pub fn join() -> Result<Self> {
        let (universe, _) = mpi::initialize_with_threading(Threading::Funneled).ok_or_else(|| {
            Error::usage("this process has joined its MPI world before", "run one command in a process")
        })?;
        let world = universe.world();
        Ok(Mpi { universe: Some(universe), world, pending: RefCell::default(), failed: Cell::new(false) })
    }

    fn error(&self, rank: usize, operation: Operation, failure: impl Into<String>) -> Error {
        Error::Rank { rank, seen_by: self.rank(), operation: operation.to_string(), failure: failure.into() }
    }

    fn start(&self, to: usize, tag: i32, bytes: Vec<u8>) {
        let bytes = Box::into_raw(bytes.into_boxed_slice());
        // SAFETY: the pointer is that of a box that nobody else has. It is freed by `finish` after MPI is done with it, or
        // never; until then nobody writes to it.
        let data: &'static [u8] = unsafe { &*bytes };
        let request = self.world.process_at_rank(to as i32).immediate_send_with_tag(StaticScope, data, tag);
        self.pending.borrow_mut().push(Pending { request, bytes });
    }

    /// Frees what has been sent, which also lets MPI work on what has not.
    fn progress(&self) {
        let mut pending = self.pending.borrow_mut();
        let waiting = std::mem::take(&mut *pending);
        for Pending { request, bytes } in waiting {
            match request.test() {
                Ok(_) => finish(bytes),
                Err(request) => pending.push(Pending { request, bytes }),
            }
        }
    }

    /// The error of a rank's last words.
    fn last_words(&self, from: usize, operation: Operation, message: (Message, Status)) -> Error {
        self.failed.set(true);
        let (bytes, _) = message.matched_receive_vec::<u8>();
        let text = String::from_utf8_lossy(&bytes);
        let (rank, failure) = text.split_once('\n').unwrap_or(("", &text));
        self.error(rank.parse().unwrap_or(from), operation, failure)
    }

    /// One message of a rank, with its tag.
    fn message(&self, from: usize, operation: Operation) -> Result<(i32, Vec<u8>)> {
        let began = Instant::now();
        let mut pauses = 0u32;
        loop {
            self.progress();
            if let Some((message, status)) = self.world.process_at_rank(from as i32).immediate_matched_probe() {
                if status.tag() == FAILED {
                    return Err(self.last_words(from, operation, (message, status)));
                }
                let (bytes, status) = (message, status).matched_receive_vec::<u8>();
                return Ok((status.tag(), bytes));
            }
            if let Some((message, status)) = self.world.any_process().immediate_matched_probe_with_tag(FAILED) {
                let from = status.source_rank() as usize;
                return Err(self.last_words(from, operation, (message, status)));
            }
            if operation != Operation::Broadcast && began.elapsed() > PATIENCE {
                self.failed.set(true);
                return Err(self.error(from, operation, format!("nothing was heard of it for 30 minutes; {GONE}")));
            }
            // Short waits are for ranks in step, long ones should leave the processor to those that compute.
            pauses += 1;
            match pauses {
                0..2000 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(if pauses < 20_000 { 50 } else { 1000 })),
            }
        }
    }
}

/// Frees bytes that have been sent.
fn finish(bytes: *mut [u8]) {
    // SAFETY: the pointer came from a box in `start`, its request is done, and the reference that MPI had is gone.
    drop(unsafe { Box::from_raw(bytes) });
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.world.rank() as usize
    }

    fn size(&self) -> usize {
        self.world.size() as usize
    }

    fn post(&self, to: usize, operation: Operation, mut bytes: Vec<u8>) -> Result<()> {
        self.progress();
        while bytes.len() >= PIECE {
            let rest = bytes.split_off(PIECE);
            self.start(to, operation as i32, bytes);
            bytes = rest;
        }
        self.start(to, operation as i32, bytes);
        Ok(())
    }

    fn take(&self, from: usize, operation: Operation) -> Result<Vec<u8>> {
        let mut taken = vec![];
        loop {
            let (tag, piece) = self.message(from, operation)?;
            if tag != operation as i32 {
                let other = Operation::numbered(tag).map_or("another program".to_string(), out_of_step);
                return Err(self.error(from, operation, other));
            }
            let is_last = piece.len() < PIECE;
            if taken.is_empty() {
                taken = piece;
            } else {
                taken.extend(piece);
            }
            if is_last {
                return Ok(taken);
            }
        }
    }

    fn fail(&self, rank: usize, failure: &str) {
        if self.failed.replace(true) {
            // The rank that failed has told everybody.
            return;
        }
        for to in (0..self.size()).filter(|&to| to != self.rank()) {
            self.start(to, FAILED, format!("{rank}\n{failure}").into_bytes());
        }
        let began = Instant::now();
        while !self.pending.borrow().is_empty() && began.elapsed() < LAST_WORDS {
            self.progress();
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        if self.failed.get() || std::thread::panicking() {
            // MPI ends in order only when all ranks are there. Without that, whoever started them ends those that are
            // left. What is on its way stays where it is until the process ends.
            self.pending.borrow_mut().drain(..).for_each(std::mem::forget);
            std::mem::forget(self.universe.take());
            return;
        }
        for Pending { request, bytes } in self.pending.borrow_mut().drain(..) {
            request.wait_without_status();
            finish(bytes);
        }
        drop(self.universe.take());
    }
}
