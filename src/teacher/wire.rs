//! What the first rank tells the others to do, and the targets that come back, as bytes.

use super::streamed::StreamCounts;
use crate::{
    error::{Error, Result},
    parallel::message::{Incoming, Outgoing},
    selection::Selection,
    targets::{Capture, PackedSequence, SparseTargets},
};

/// What a rank is told.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Command {
    /// Load your part of the model.
    Load,
    /// Compute the targets of sequences, each beside its number in the whole data set.
    Compute { selection: Selection, sequences: Vec<(u64, PackedSequence)> },
    /// Nothing more is to be done.
    Stop,
}

impl Command {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        match self {
            Command::Stop => Outgoing::new().number(0).into_bytes(),
            Command::Load => Outgoing::new().number(1).into_bytes(),
            Command::Compute { selection, sequences } => {
                let selection = serde_json::to_vec(selection).expect("a selection is plain data");
                let message = Outgoing::new().number(2).list(&selection).number(sequences.len() as u64);
                let add = |message: Outgoing, (number, sequence): &(u64, PackedSequence)| {
                    message.number(*number).list(&sequence.tokens).list(&sequence.segments)
                };
                sequences.iter().fold(message, add).into_bytes()
            }
        }
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Command> {
        let mut message = Incoming::new(bytes);
        match message.number()? {
            0 => Ok(Command::Stop),
            1 => Ok(Command::Load),
            2 => {
                let selection: Vec<u8> = message.list()?;
                let selection = serde_json::from_slice(&selection).map_err(|error| unknown(error.to_string()))?;
                let sequences = (0..message.number()?).map(|_| {
                    let number = message.number()?;
                    Ok((number, PackedSequence { tokens: message.list()?, segments: message.list()? }))
                });
                Ok(Command::Compute { selection, sequences: sequences.collect::<Result<_>>()? })
            }
            other => Err(unknown(format!("number {other}"))),
        }
    }
}

fn unknown(what: String) -> Error {
    Error::usage(
        format!("a command between ranks is not understood: {what}"),
        "run the same version of this program on every rank",
    )
}

pub(super) fn targets_to_bytes(targets: &SparseTargets) -> Vec<u8> {
    let message = Outgoing::new().list(&targets.offsets).list(&targets.ids);
    let message = message.list(targets.log_normalizer.as_deref().unwrap_or_default());
    let add = |message: Outgoing, capture: &Capture| {
        message.list(&capture.log_probs).list(&capture.log_tail).list(&capture.label_log_prob)
    };
    targets.captures.iter().fold(message, add).into_bytes()
}

/// Targets of these temperatures and of this selection.
pub(super) fn targets_from(bytes: &[u8], temperatures: &[f32], selection: &Selection) -> Result<SparseTargets> {
    let mut message = Incoming::new(bytes);
    let (offsets, ids, normalizers): (Vec<u64>, Vec<u32>, Vec<f32>) =
        (message.list()?, message.list()?, message.list()?);
    let captures = temperatures.iter().map(|&temperature| {
        Ok(Capture {
            temperature,
            log_probs: message.list()?,
            log_tail: message.list()?,
            label_log_prob: message.list()?,
        })
    });
    let captures = captures.collect::<Result<_>>()?;
    Ok(SparseTargets {
        offsets,
        ids,
        captures,
        kind: selection.kind(),
        log_normalizer: Some(normalizers),
        router: None,
    })
}

pub(super) fn counts_to_bytes(counts: &StreamCounts) -> Vec<u8> {
    let StreamCounts { sweeps, tokens, bytes_read, experts_read, experts_left_out, spilled_sweeps } = *counts;
    let all = [sweeps, tokens, bytes_read, experts_read, experts_left_out, spilled_sweeps];
    Outgoing::new().list(&all).into_bytes()
}

pub(super) fn counts_from(bytes: &[u8]) -> Result<StreamCounts> {
    let all: Vec<u64> = Incoming::new(bytes).list()?;
    let [sweeps, tokens, bytes_read, experts_read, experts_left_out, spilled_sweeps] = all[..] else {
        return Err(unknown(format!("{} counts", all.len())));
    };
    Ok(StreamCounts { sweeps, tokens, bytes_read, experts_read, experts_left_out, spilled_sweeps })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::targets::PADDING;

    #[test]
    fn commands_and_targets_arrive_as_they_were() {
        let sequence = PackedSequence { tokens: vec![1, 2, 3], segments: vec![0, 0, PADDING] };
        let compute = Command::Compute {
            selection: Selection::Sampled { draws: 5, seed: 3 },
            sequences: vec![(u64::MAX, sequence.clone()), (7, sequence)],
        };
        for command in [Command::Stop, Command::Load, compute] {
            assert_eq!(Command::from_bytes(&command.to_bytes()).unwrap(), command);
        }
        let message = Command::from_bytes(&Outgoing::new().number(9).into_bytes()).unwrap_err().to_string();
        assert_eq!(
            message,
            "a command between ranks is not understood: number 9; run the same version of this program on every rank"
        );
        let capture = |temperature| Capture {
            temperature,
            log_probs: vec![-0.5, -1.0, -3.0],
            log_tail: vec![f32::NEG_INFINITY, -2.0],
            label_log_prob: vec![-1.0, -7.0],
        };
        let selection = Selection::TopK { k: 2 };
        let targets = SparseTargets {
            offsets: vec![0, 2, 3],
            ids: vec![5, 1, 9],
            captures: vec![capture(1.0), capture(2.0)],
            kind: selection.kind(),
            log_normalizer: Some(vec![3.5, 4.5]),
            router: None,
        };
        assert_eq!(targets_from(&targets_to_bytes(&targets), &[1.0, 2.0], &selection).unwrap(), targets);
        let counts = StreamCounts {
            sweeps: 1,
            tokens: 2,
            bytes_read: u64::MAX,
            experts_read: 4,
            experts_left_out: 5,
            spilled_sweeps: 6,
        };
        assert_eq!(counts_from(&counts_to_bytes(&counts)).unwrap(), counts);
    }
}
