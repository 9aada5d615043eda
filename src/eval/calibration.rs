//! Where a model is close to its teacher, and whether its probabilities mean what they say. Counts over tokens; how they are
//! drawn is `page`'s business.

use serde::{Deserialize, Serialize};

use crate::train::metrics::number_or_nan;

/// Upper ends of the bins of the teacher's entropy, in nats; the last has none.
const ENTROPY_EDGES: [f64; 8] = [0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
/// Bins of the confidence, of equal width.
const CONFIDENCE_BINS: usize = 10;

/// Means over the held-out tokens of which the teacher was about equally sure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EntropyBin {
    /// The teacher's entropy in nats, from here (inclusive) ...
    pub from: f64,
    /// ... to here (exclusive); `None` for the last.
    pub to: Option<f64>,
    pub token_count: u64,
    /// Nats per token.
    #[serde(deserialize_with = "number_or_nan")]
    pub kl_to_teacher: f64,
    /// Share (0..1) of the tokens on which both rank the same token first.
    #[serde(deserialize_with = "number_or_nan")]
    pub agreement: f64,
}

/// Tokens of which a model was about equally sure, by the probability of what it held likeliest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConfidenceBin {
    pub token_count: u64,
    /// Mean probability of the likeliest token.
    #[serde(deserialize_with = "number_or_nan")]
    pub confidence: f64,
    /// Share (0..1) of the tokens that were the likeliest.
    #[serde(deserialize_with = "number_or_nan")]
    pub accuracy: f64,
}

/// Sums by the teacher's entropy.
#[derive(Debug, Clone, Default)]
pub struct ByEntropy {
    bins: [(u64, f64, u64); ENTROPY_EDGES.len() + 1],
}

impl ByEntropy {
    pub fn add(&mut self, entropy: f64, kl: f64, agrees: bool) {
        let place = ENTROPY_EDGES.iter().position(|edge| entropy < *edge).unwrap_or(ENTROPY_EDGES.len());
        let (count, sum, agreed) = &mut self.bins[place];
        (*count, *sum, *agreed) = (*count + 1, *sum + kl, *agreed + agrees as u64);
    }

    /// The bins that have tokens.
    pub fn bins(&self) -> Vec<EntropyBin> {
        let bin = |(place, &(token_count, kl, agreed)): (usize, &(u64, f64, u64))| EntropyBin {
            from: if place == 0 { 0.0 } else { ENTROPY_EDGES[place - 1] },
            to: ENTROPY_EDGES.get(place).copied(),
            token_count,
            kl_to_teacher: kl / token_count as f64,
            agreement: agreed as f64 / token_count as f64,
        };
        self.bins.iter().enumerate().filter(|(_, bin)| bin.0 > 0).map(bin).collect()
    }
}

/// Sums by confidence.
#[derive(Debug, Clone, Default)]
pub struct ByConfidence {
    bins: [(u64, f64, u64); CONFIDENCE_BINS],
}

impl ByConfidence {
    pub fn add(&mut self, confidence: f64, is_right: bool) {
        let place = ((confidence * CONFIDENCE_BINS as f64) as usize).min(CONFIDENCE_BINS - 1);
        let (count, sum, right) = &mut self.bins[place];
        (*count, *sum, *right) = (*count + 1, *sum + confidence, *right + is_right as u64);
    }

    /// The bins that have tokens.
    pub fn bins(&self) -> Vec<ConfidenceBin> {
        let bin = |&(token_count, confidence, right): &(u64, f64, u64)| ConfidenceBin {
            token_count,
            confidence: confidence / token_count as f64,
            accuracy: right as f64 / token_count as f64,
        };
        self.bins.iter().filter(|bin| bin.0 > 0).map(bin).collect()
    }
}

/// The expected calibration error: the mean distance of confidence and accuracy over tokens, bin by bin (Guo et al. 2017,
/// arXiv 1706.04599, eq. 5). `None` without tokens.
pub fn calibration_error(bins: &[ConfidenceBin]) -> Option<f64> {
    let total: u64 = bins.iter().map(|bin| bin.token_count).sum();
    let distance = |bin: &ConfidenceBin| bin.token_count as f64 * (bin.confidence - bin.accuracy).abs();
    (total > 0).then(|| bins.iter().map(distance).sum::<f64>() / total as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_that_is_right_as_often_as_it_says_has_no_calibration_error() {
        let (mut honest, mut boasting) = (ByConfidence::default(), ByConfidence::default());
        for token in 0..100 {
            honest.add(0.25, token % 4 == 0);
            honest.add(0.5, token % 2 == 0);
            boasting.add(0.95, token % 2 == 0);
        }
        honest.add(1.0, true);
        assert!(calibration_error(&honest.bins()).unwrap() < 1e-12);
        assert_eq!(honest.bins().iter().map(|bin| bin.token_count).collect::<Vec<_>>(), [100, 100, 1]);
        assert!((calibration_error(&boasting.bins()).unwrap() - 0.45).abs() < 1e-9);
        assert_eq!(calibration_error(&[]), None);
    }

    #[test]
    fn tokens_go_to_the_bin_of_their_entropy() {
        let mut sums = ByEntropy::default();
        for (entropy, kl, agrees) in [(0.0, 0.1, true), (0.24, 0.3, false), (0.25, 1.0, true), (9.0, 2.0, false)] {
            sums.add(entropy, kl, agrees);
        }
        let bins = sums.bins();
        assert_eq!(
            bins.iter().map(|bin| (bin.from, bin.to)).collect::<Vec<_>>(),
            [(0.0, Some(0.25)), (0.25, Some(0.5)), (6.0, None)]
        );
        assert_eq!((bins[0].token_count, bins[0].agreement), (2, 0.5));
        assert!((bins[0].kl_to_teacher - 0.2).abs() < 1e-12);
    }
}
