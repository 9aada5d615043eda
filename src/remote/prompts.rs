//! Packed sequences as prompts, and their rows put together again. Each document of a sequence is a prompt of its own,
//! as far as it lies in the sequence: that is all that a model which reads the sequence sees of it.

use crate::import::CompleteRow;
use crate::targets::{Capture, PADDING, PackedSequence, SparseTargets, TargetKind};

/// Most prompts in one request.
const MOST_PROMPTS: usize = 256;

/// A document, or the part of one that lies in a sequence; at least two tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Prompt {
    pub tokens: Vec<u32>,
    /// Number of the sequence in the whole data set, for messages.
    pub sequence: u64,
    /// Where in the sequence it starts.
    pub start: usize,
}

/// Cuts sequences into requests of at least one prompt and at most about `tokens` tokens, in the order of the text.
/// Documents of one token predict nothing, and are not sent.
pub(super) fn requests(sequences: &[(u64, &PackedSequence)], tokens: u64) -> Vec<Vec<Prompt>> {
    let mut requests: Vec<Vec<Prompt>> = vec![];
    let mut room = 0;
    for (number, sequence) in sequences {
        let mut start = 0;
        for document in sequence.segments.chunk_by(|left, right| left == right) {
            let (from, end) = (start, start + document.len());
            start = end;
            if document[0] == PADDING || document.len() < 2 {
                continue;
            }
            let length = document.len() as u64;
            if length > room || requests.last().is_none_or(|request| request.len() >= MOST_PROMPTS) {
                requests.push(vec![]);
                room = tokens;
            }
            room = room.saturating_sub(length);
            let prompt = Prompt { tokens: sequence.tokens[from..end].to_vec(), sequence: *number, start: from };
            requests.last_mut().expect("just made").push(prompt);
        }
    }
    requests
}

/// The rows of all prompts, one after the other, as the targets of the sequences that they were cut from.
pub(super) fn targets(sequences: &[(u64, &PackedSequence)], rows: Vec<CompleteRow>) -> Vec<SparseTargets> {
    let mut rows = rows.into_iter();
    let targets = sequences.iter().map(|(_, sequence)| {
        let mut capture = Capture { temperature: 1.0, log_probs: vec![], log_tail: vec![], label_log_prob: vec![] };
        let (mut offsets, mut ids) = (vec![0], vec![]);
        for place in 0..sequence.seq_len() {
            let row = if sequence.is_valid(place) {
                rows.next().expect("a row for each prediction")
            } else {
                CompleteRow::default()
            };
            ids.extend(row.ids);
            capture.log_probs.extend(row.log_probs);
            capture.log_tail.push(row.log_tail);
            capture.label_log_prob.push(row.label_log_prob);
            offsets.push(ids.len() as u64);
        }
        SparseTargets {
            offsets,
            ids,
            captures: vec![capture],
            kind: TargetKind::Exact,
            log_normalizer: None,
            router: None,
        }
    });
    targets.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_document_is_a_prompt_and_its_rows_come_back_to_it() {
        let sequence = PackedSequence {
            tokens: vec![5, 6, 7, 8, 9, 10, 11, 0],
            segments: vec![0, 0, 0, 1, 2, 2, PADDING, PADDING],
        };
        let other = PackedSequence { segments: vec![0; 8], ..sequence.clone() };
        let sequences = [(40, &sequence), (41, &other)];
        let cut = requests(&sequences, 5);
        let parts: Vec<Vec<(u64, usize, usize)>> = cut
            .iter()
            .map(|request| request.iter().map(|prompt| (prompt.sequence, prompt.start, prompt.tokens.len())).collect())
            .collect();
        assert_eq!(parts, [vec![(40, 0, 3), (40, 4, 2)], vec![(41, 0, 8)]]);
        assert_eq!(cut[0][1].tokens, [9, 10]);

        let row = |id: u32| CompleteRow { ids: vec![id], log_probs: vec![-0.5], log_tail: -1.0, label_log_prob: -0.5 };
        let joined = targets(&sequences, (0..10).map(row).collect());
        assert_eq!(joined[0].offsets, [0, 1, 2, 2, 2, 3, 3, 3]);
        assert_eq!(joined[0].ids, [0, 1, 2]);
        assert_eq!(joined[0].captures[0].log_tail, [-1.0, -1.0, 0.0, 0.0, -1.0, 0.0, 0.0]);
        assert_eq!(joined[1].ids, (3..10).collect::<Vec<u32>>());
    }
}
