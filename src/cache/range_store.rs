//! Blocks of remote files that are in memory or on their way: least recently used out first, and nothing fetched twice.
//!
//! Knows numbers of files and blocks, and nothing of networks.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Bytes of one block.
pub(super) type Piece = Arc<[u8]>;
type Key = (u32, u64);

enum Place {
    /// Somebody fetches it.
    Coming,
    /// With the time of its last use.
    Here(Piece, u64),
}

#[derive(Default)]
struct Places {
    places: HashMap<Key, Place>,
    /// What is here, by the time of its last use.
    by_use: BTreeMap<u64, Key>,
    bytes: usize,
    clock: u64,
}

/// Blocks of any number of files, in a bounded amount of memory.
pub(super) struct RangeStore {
    most_bytes: usize,
    places: Mutex<Places>,
    changed: Condvar,
}

/// What a caller got of the blocks it asked for.
pub(super) enum Claim {
    /// These it has to fetch: until it calls [`RangeStore::put`] or [`RangeStore::give_up`], others wait for it.
    Fetch(Vec<Range<u64>>),
    /// All of them are there, in its list.
    Complete,
}

impl RangeStore {
    pub(super) fn new(most_bytes: usize) -> RangeStore {
        RangeStore { most_bytes, places: Mutex::default(), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Places> {
        // Nobody panics between two changes that belong together.
        self.places.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Fills the gaps of `have`, the blocks of `file` from `first` on, and claims what nobody fetches. Waits for what
    /// others fetch when there is nothing else to do.
    pub(super) fn claim(&self, file: u32, first: u64, have: &mut [Option<Piece>]) -> Claim {
        let mut places = self.lock();
        loop {
            let (mut missing, mut waiting) = (Vec::new(), false);
            for (block, gap) in (first..).zip(have.iter_mut()).filter(|(_, gap)| gap.is_none()) {
                match places.use_it((file, block)) {
                    Some(Place::Here(piece, _)) => *gap = Some(piece.clone()),
                    Some(Place::Coming) => waiting = true,
                    None => missing.push(block),
                }
            }
            if !missing.is_empty() {
                return Claim::Fetch(places.mark(file, missing));
            }
            if !waiting {
                return Claim::Complete;
            }
            places = self.changed.wait(places).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Claims those of some blocks that are neither here nor on their way, as runs.
    pub(super) fn claim_ahead(&self, file: u32, blocks: Range<u64>) -> Vec<Range<u64>> {
        let mut places = self.lock();
        let missing: Vec<u64> = blocks.filter(|&block| !places.places.contains_key(&(file, block))).collect();
        places.mark(file, missing)
    }

    /// Blocks that were claimed have come.
    pub(super) fn put(&self, file: u32, first: u64, pieces: &[Piece]) {
        let mut places = self.lock();
        for (block, piece) in (first..).zip(pieces) {
            places.drop_it((file, block));
            places.clock += 1;
            let now = places.clock;
            places.by_use.insert(now, (file, block));
            places.bytes += piece.len();
            places.places.insert((file, block), Place::Here(piece.clone(), now));
        }
        while places.bytes > self.most_bytes {
            let Some((_, &oldest)) = places.by_use.first_key_value() else { break };
            places.drop_it(oldest);
        }
        self.changed.notify_all();
    }

    /// Blocks that were claimed will not come: whoever waits for them tries by itself.
    pub(super) fn give_up(&self, file: u32, blocks: Range<u64>) {
        let mut places = self.lock();
        blocks.for_each(|block| places.drop_it((file, block)));
        self.changed.notify_all();
    }

    /// Drops what is here of some blocks; what is on its way stays so.
    pub(super) fn forget(&self, file: u32, blocks: Range<u64>) {
        let mut places = self.lock();
        for block in blocks {
            if let Some(Place::Here(..)) = places.places.get(&(file, block)) {
                places.drop_it((file, block));
            }
        }
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.lock().bytes
    }
}

impl Places {
    /// A block's place, as its latest user.
    fn use_it(&mut self, key: Key) -> Option<&Place> {
        let place = self.places.get_mut(&key)?;
        if let Place::Here(_, used) = place {
            self.by_use.remove(used);
            self.clock += 1;
            *used = self.clock;
            self.by_use.insert(self.clock, key);
        }
        Some(place)
    }

    fn drop_it(&mut self, key: Key) {
        if let Some(Place::Here(piece, used)) = self.places.remove(&key) {
            self.bytes -= piece.len();
            self.by_use.remove(&used);
        }
    }

    /// Marks blocks, in ascending order, as coming; gives them as runs.
    fn mark(&mut self, file: u32, blocks: Vec<u64>) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in blocks {
            self.places.insert((file, block), Place::Coming);
            match runs.last_mut() {
                Some(run) if run.end == block => run.end += 1,
                _ => runs.push(block..block + 1),
            }
        }
        runs
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // Lists of ranges, some of them of one.
mod tests {
    use super::*;

    fn piece(block: u64) -> Piece {
        vec![block as u8; 10].into()
    }

    #[test]
    fn the_least_recently_used_goes_first_and_memory_stays_bounded() {
        let store = RangeStore::new(35);
        let mut have = vec![None; 3];
        let Claim::Fetch(runs) = store.claim(0, 0, &mut have) else { panic!("nothing is here") };
        assert_eq!(runs, [0..3]);
        store.put(0, 0, &[piece(0), piece(1), piece(2)]);
        // Block 0 is used, so that 1 is the oldest.
        assert!(matches!(store.claim(0, 0, &mut [None]), Claim::Complete));
        assert_eq!(store.claim_ahead(0, 2..4), [3..4]);
        store.put(0, 3, &[piece(3)]);
        assert_eq!(store.bytes(), 30);
        let mut have = vec![None; 4];
        let Claim::Fetch(runs) = store.claim(0, 0, &mut have) else { panic!("one was dropped") };
        assert_eq!(runs, [1..2]);
        assert_eq!(have.iter().flatten().map(|piece| piece[0]).collect::<Vec<_>>(), [0, 2, 3]);
        store.give_up(0, 1..2);
        store.forget(0, 0..4);
        assert_eq!(store.bytes(), 0);
    }

    #[test]
    fn a_block_that_is_on_its_way_is_waited_for_and_not_fetched_again() {
        let store = RangeStore::new(1000);
        assert_eq!(store.claim_ahead(7, 4..6), [4..6]);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let mut have = vec![None; 2];
                let claim = store.claim(7, 4, &mut have);
                (matches!(claim, Claim::Complete), have)
            });
            store.put(7, 4, &[piece(4), piece(5)]);
            let (complete, have) = waiting.join().unwrap();
            assert!(complete);
            assert_eq!(have[1].as_deref(), Some(&piece(5)[..]));
        });
        // What was given up is the next one's to fetch.
        assert_eq!(store.claim_ahead(7, 6..7), [6..7]);
        store.give_up(7, 6..7);
        assert!(matches!(store.claim(7, 6, &mut [None]), Claim::Fetch(_)));
    }
}
