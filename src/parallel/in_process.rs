//! Ranks that are threads of one process: messages are handed over in memory.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::collective::{Collective, Operation};
use crate::error::{Error, Result};

/// One rank's end. Dropping it is leaving: who waits for more of it gets an error.
pub struct InProcess {
    rank: usize,
    inboxes: Arc<Vec<Inbox>>,
}

/// What a rank has been sent.
#[derive(Default)]
struct Inbox {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Of each rank, in their order.
    messages: Vec<VecDeque<(Operation, Vec<u8>)>>,
    left: Vec<bool>,
    /// The first rank that failed, and why.
    failure: Option<(usize, String)>,
}

impl Inbox {
    fn state(&self) -> MutexGuard<'_, State> {
        // A rank that panics while it holds the lock has changed nothing halfway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The ends of a world of `size` ranks.
pub fn world(size: usize) -> Vec<InProcess> {
    let inbox = |_| Inbox {
        state: Mutex::new(State {
            messages: (0..size).map(|_| VecDeque::new()).collect(),
            left: vec![false; size],
            failure: None,
        }),
        changed: Condvar::new(),
    };
    let inboxes = Arc::new((0..size).map(inbox).collect::<Vec<_>>());
    (0..size).map(|rank| InProcess { rank, inboxes: inboxes.clone() }).collect()
}

impl InProcess {
    fn error(&self, rank: usize, operation: Operation, failure: &str) -> Error {
        Error::Rank { rank, seen_by: self.rank, operation: operation.to_string(), failure: failure.into() }
    }
}

impl Collective for InProcess {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.inboxes.len()
    }

    fn post(&self, to: usize, operation: Operation, bytes: Vec<u8>) -> Result<()> {
        let inbox = &self.inboxes[to];
        inbox.state().messages[self.rank].push_back((operation, bytes));
        inbox.changed.notify_all();
        Ok(())
    }

    fn take(&self, from: usize, operation: Operation) -> Result<Vec<u8>> {
        let inbox = &self.inboxes[self.rank];
        let mut state = inbox.state();
        loop {
            if let Some((found, bytes)) = state.messages[from].pop_front() {
                if found == operation {
                    return Ok(bytes);
                }
                return Err(self.error(from, operation, &out_of_step(found)));
            }
            if let Some((rank, failure)) = &state.failure {
                return Err(self.error(*rank, operation, failure));
            }
            if state.left[from] {
                return Err(self.error(from, operation, GONE));
            }
            state = inbox.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn fail(&self, rank: usize, failure: &str) {
        for inbox in self.inboxes.iter() {
            inbox.state().failure.get_or_insert_with(|| (rank, failure.into()));
            inbox.changed.notify_all();
        }
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        for inbox in self.inboxes.iter() {
            inbox.state().left[self.rank] = true;
            inbox.changed.notify_all();
        }
    }
}

/// Of a rank that is no more there.
pub(super) const GONE: &str = "it ended; what is sealed is kept, run the same command again to go on";

/// Of a rank that does something else than this one.
pub(super) fn out_of_step(found: Operation) -> String {
    format!(
        "it is at another place, in {found}; run the same version of this program with the same recipe on every rank"
    )
}

#[cfg(test)]
mod tests {
    use super::super::{Axis, Group, Mesh};
    use super::*;

    /// What each rank's function gives.
    fn on_ranks<R: Send>(size: usize, body: impl Fn(InProcess) -> R + Sync) -> Vec<R> {
        let body = &body;
        std::thread::scope(|scope| {
            let threads: Vec<_> = world(size).into_iter().map(|end| scope.spawn(move || body(end))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn sums_are_in_the_order_of_the_ranks_and_the_same_on_all() {
        for size in 1..=5 {
            let value =
                |rank: usize, place: usize| [1e8f32, 1.0, -1e8, 3e-5, 0.1][(rank + place) % 5] * (place + 1) as f32;
            for length in [0, 1, 3, 64] {
                let expected: Vec<u32> = (0..length)
                    .map(|place| (1..size).fold(value(0, place), |sum, rank| sum + value(rank, place)).to_bits())
                    .collect();
                let sums = on_ranks(size, |end| {
                    let mut numbers: Vec<f32> = (0..length).map(|place| value(end.rank(), place)).collect();
                    end.all_reduce(&mut numbers).unwrap();
                    numbers.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                });
                assert!(sums.iter().all(|sums| *sums == expected), "{size} ranks, {length} numbers");
            }
        }
    }

    #[test]
    fn parts_of_any_length_go_where_they_are_meant_to() {
        let found = on_ranks(4, |end| {
            let own = end.rank() as u8;
            let parts = (0..4).map(|to| vec![own; to * end.rank()]).collect();
            let taken = end.all_to_all(parts).unwrap();
            assert!(taken.iter().enumerate().all(|(from, part)| *part == vec![from as u8; from * end.rank()]));
            assert_eq!(end.all_gather(&[own, own]).unwrap(), [[0, 0], [1, 1], [2, 2], [3, 3]]);
            assert_eq!(end.broadcast(2, vec![own]).unwrap(), [2]);
            end.barrier().unwrap();
            end.send((end.rank() + 1) % 4, vec![own]).unwrap();
            end.receive((end.rank() + 3) % 4).unwrap()
        });
        assert_eq!(found, [[3], [0], [1], [2]]);
    }

    #[test]
    fn groups_of_a_mesh_work_beside_each_other_in_one_world() {
        let mesh = Mesh { data: 2, expert: 2, tensor: 3, ..Mesh::default() };
        let sums = on_ranks(mesh.size(), |end| {
            let place = mesh.place(end.rank());
            let sum = |axis| {
                let mut numbers = [end.rank() as f32];
                Group::new(&end, mesh.group(place, axis)).all_reduce(&mut numbers).unwrap();
                numbers[0]
            };
            (sum(Axis::Tensor), sum(Axis::Expert), sum(Axis::Pipeline), sum(Axis::Data))
        });
        for (rank, sums) in sums.into_iter().enumerate() {
            let place = mesh.place(rank);
            let sum = |axis| mesh.group(place, axis).iter().sum::<usize>() as f32;
            assert_eq!(sums, (sum(Axis::Tensor), sum(Axis::Expert), rank as f32, sum(Axis::Data)));
        }
    }

    #[test]
    fn a_rank_that_fails_or_leaves_is_an_error_for_all_others() {
        let errors = on_ranks(3, |end| {
            if end.rank() == 1 {
                end.fail(1, "the weights are gone; bring them back");
                return String::new();
            }
            end.all_reduce(&mut [1.0; 8]).unwrap_err().to_string()
        });
        let text = |seen_by| {
            format!("rank 1 failed, seen by rank {seen_by} in all_reduce: the weights are gone; bring them back")
        };
        assert_eq!((errors[0].clone(), errors[2].clone()), (text(0), text(2)));

        let errors =
            on_ranks(2, |end| if end.rank() == 1 { None } else { Some(end.barrier().unwrap_err().to_string()) });
        assert_eq!(
            errors[0].as_deref(),
            Some(
                "rank 1 failed, seen by rank 0 in barrier: it ended; what is sealed is kept, run the same command again \
                 to go on"
            )
        );
    }

    #[test]
    fn ranks_that_are_out_of_step_say_so() {
        let errors = on_ranks(2, |end| match end.rank() {
            0 => end.barrier().unwrap_err().to_string(),
            _ => end.all_gather(&[1]).unwrap_err().to_string(),
        });
        assert_eq!(
            errors[0],
            "rank 1 failed, seen by rank 0 in barrier: it is at another place, in all_gather; run the same version of \
             this program with the same recipe on every rank"
        );
    }
}
