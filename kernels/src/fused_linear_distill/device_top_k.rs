//! A teacher's rows in short, from its hidden states and head on a device, without the logits of a batch in memory.

use burn::tensor::DType;
use burn_cubecl::{cubecl::prelude::*, tensor::CubeTensor};

use super::{
    LossSettings, NO_LABEL, RowTargets,
    cube::{self, FEW_UNITS, NOTHING, STATISTICS, UNITS},
    cube_top_k,
    device::DeviceShard,
    rows::{Mass, RowStatistics},
};
use crate::{
    device::tensors::{Room, buffer, download, multiply, per_row, rows, transposed, upload},
    divergence::Divergence,
    selection::{RowSummary, SelectedRow},
};

/// Entries that a row can keep: what fits a device's shared memory twice.
pub const MOST_KEPT: usize = 1024;

/// The `k` most probable ids of each row, their log-probabilities, the mass of all others and the label's
/// log-probability, at one temperature: [`top_k`](crate::top_k::top_k) of logits that are never all there.
///
/// # Shapes
/// - `hidden` `[T, D]`, `lm_head` `[V, D]`, T labels; both f32, f16 or bf16; `k <= V`
///
/// A row with a logit that is no number gives NaN log-probabilities, which the caller must refuse.
///
/// # Panics
/// When shapes or types do not fit, a label lies beyond the vocabulary, or `k` is above [`MOST_KEPT`].
pub fn top_k(hidden: CubeTensor, lm_head: CubeTensor, labels: &[u32], k: usize, temperature: f32) -> Vec<SelectedRow> {
    let targets = RowTargets::labels(labels.to_vec());
    let settings = LossSettings { temperature, ..LossSettings::new(Divergence::ForwardKl) };
    let shard = DeviceShard::new(hidden, lm_head, 0, &targets, &settings, None);
    let vocab = shard.vocab();
    assert!(labels.iter().all(|&label| label != NO_LABEL && (label as usize) < vocab), "a label for every row");
    assert!(k >= 1 && k <= vocab.min(MOST_KEPT), "k is between 1 and the vocabulary, and at most {MOST_KEPT}");
    shard.top_k(k)
}

impl DeviceShard<'_> {
    fn top_k(&self, k: usize) -> Vec<SelectedRow> {
        let count = self.live.len();
        if count == 0 {
            return vec![];
        }
        let client = self.client();
        let statistics = self.upload_statistics();
        let argmax = upload(client, &vec![u32::MAX; count]);
        let values = upload(client, &vec![NOTHING; count * k]);
        let ids = upload(client, &vec![u32::MAX; count * k]);
        let (no_logits, label_logits) = (upload(client, &[0.0f32]), upload(client, &vec![NOTHING; count]));
        let room = Room::new(&self.hidden, self.tiles.room(), DType::F32);
        self.for_each_block(|first_row, block, hidden| {
            let mut first = 0;
            while first < self.vocab() {
                let piece = self.tiles.piece.min(self.vocab() - first);
                multiply(hidden.clone(), transposed(rows(&self.lm_head, first, piece)), &room);
                cube::gather_kept::launch(
                    client,
                    per_row(block),
                    CubeDim::new_1d(FEW_UNITS as u32),
                    room.buffer(block * piece),
                    buffer(&self.uploaded.offsets, count + 1, 4),
                    self.ids(),
                    buffer(&self.uploaded.labels, count, 4),
                    buffer(&no_logits, 1, 4),
                    buffer(&label_logits, count, 4),
                    first_row,
                    first,
                    piece,
                    FEW_UNITS,
                );
                cube_top_k::keep_largest::launch(
                    client,
                    per_row(block),
                    CubeDim::new_1d(UNITS as u32),
                    room.buffer(block * piece),
                    buffer(&values, count * k, 4),
                    buffer(&ids, count * k, 4),
                    first_row,
                    first,
                    piece,
                    k,
                    UNITS,
                );
                self.launch_statistics(&room, &statistics, &argmax, first_row, block, first, piece);
                first += piece;
            }
        });
        let statistics: Vec<f32> = download(client, statistics, count * STATISTICS);
        let (values, ids): (Vec<f32>, Vec<u32>) =
            (download(client, values, count * k), download(client, ids, count * k));
        let label_logits: Vec<f32> = download(client, label_logits, count);
        (0..count)
            .map(|row| {
                let rest = self.row_statistics(&statistics[row * STATISTICS..][..STATISTICS], u32::MAX);
                let (kept, label) = (&values[row * k..][..k], label_logits[row]);
                SelectedRow {
                    ids: ids[row * k..][..k].to_vec(),
                    summaries: vec![self.summarise(kept, &rest, label)],
                    log_normalizer: log_all(kept, &rest.rest_unscaled, 1.0) as f32,
                }
            })
            .collect()
    }

    fn summarise(&self, kept: &[f32], rest: &RowStatistics, label: f32) -> RowSummary {
        let temperature = self.settings.temperature as f64;
        let all = log_all(kept, &rest.rest, temperature);
        RowSummary {
            log_probs: kept.iter().map(|&logit| (scaled(logit, temperature) - all) as f32).collect(),
            log_tail: (rest.rest.log(temperature) - all) as f32,
            label_log_prob: (scaled(label, temperature) - all) as f32,
        }
    }
}

/// Log of what the kept logits and all others come to. `kept` holds fewer logits than asked for where a row has no more
/// that are finite: then nothing of it is known.
fn log_all(kept: &[f32], rest: &Mass, temperature: f64) -> f64 {
    let log_rest = rest.log(temperature);
    let largest = scaled(kept[0], temperature).max(log_rest);
    let sum = kept.iter().map(|&logit| (scaled(logit, temperature) - largest).exp()).sum::<f64>();
    largest + (sum + (log_rest - largest).exp()).ln()
}

fn scaled(logit: f32, temperature: f64) -> f64 {
    if logit == NOTHING { f64::NAN } else { logit as f64 / temperature }
}
