//! In which order a student sees the sequences of its cache: shuffled anew each epoch, the same for the same seed.

use rand::{SeedableRng, seq::SliceRandom};

/// A fixed order of sequence numbers over any number of epochs. The position is the number of sequences seen, so a
/// run goes on exactly where it was, whatever its micro-batches were.
#[derive(Debug, Clone)]
pub struct SequenceOrder {
    seed: u64,
    count: u64,
    epoch: u64,
    shuffled: Vec<u64>,
}

impl SequenceOrder {
    /// # Panics
    /// When there are no sequences.
    pub fn new(seed: u64, count: u64) -> Self {
        assert!(count > 0, "an order of no sequences");
        let mut order = SequenceOrder { seed, count, epoch: 0, shuffled: vec![] };
        order.shuffle(0);
        order
    }

    fn shuffle(&mut self, epoch: u64) {
        let mut key = blake3::Hasher::new();
        key.update(b"sequence order").update(&self.seed.to_le_bytes()).update(&epoch.to_le_bytes());
        let mut generator = rand_chacha::ChaCha8Rng::from_seed(*key.finalize().as_bytes());
        self.shuffled = (0..self.count).collect();
        self.shuffled.shuffle(&mut generator);
        self.epoch = epoch;
    }

    /// The numbers of the sequences from `seen` on, `count` of them.
    pub fn take(&mut self, seen: u64, count: u64) -> Vec<u64> {
        (seen..seen + count)
            .map(|place| {
                if place / self.count != self.epoch {
                    self.shuffle(place / self.count);
                }
                self.shuffled[(place % self.count) as usize]
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_epoch_has_every_sequence_once_and_another_order() {
        let mut order = SequenceOrder::new(17, 10);
        let all = order.take(0, 30);
        for epoch in all.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<u64>>());
        }
        assert_ne!(all[..10], all[10..20]);
        assert_eq!(SequenceOrder::new(17, 10).take(7, 9), all[7..16]);
        assert_ne!(SequenceOrder::new(18, 10).take(0, 10), all[..10]);
    }
}
