//! What must hold in every sequence before it is written (docs/cache-format.md, "What holds in every shard").

use super::manifest::Counts;
use super::settings::{CacheSettings, RouterSettings, Selection};
use crate::targets::{PADDING, PackedSequence, RouterCodes, SparseTargets, TargetKind};

/// How far above 0 rounding may lift the logarithm of a probability.
const ROUNDING: f32 = 1e-3;

/// What is wrong with a sequence.
#[derive(Debug, PartialEq)]
pub(crate) enum Problem {
    /// A number is NaN or infinite where it may not be; the text names it.
    NotFinite(String),
    Wrong(String),
}

fn wrong<T>(problem: String) -> Result<T, Problem> {
    Err(Problem::Wrong(problem))
}

/// Checks one sequence and its rows, and counts them; `text_bytes` is left 0.
pub(crate) fn check(
    settings: &CacheSettings,
    sequence: &PackedSequence,
    targets: Option<&SparseTargets>,
) -> Result<Counts, Problem> {
    let (seq_len, vocab_size) = (settings.seq_len, settings.tokenizer.vocab_size);
    for (name, length) in [("tokens", sequence.tokens.len()), ("segments", sequence.segments.len())] {
        if length != seq_len + 1 {
            return wrong(format!("it has {length} {name}, not {} (seq_len + 1)", seq_len + 1));
        }
    }
    if let Some(place) = sequence.tokens.iter().position(|token| *token as usize >= vocab_size) {
        let token = sequence.tokens[place];
        return wrong(format!("token {place} is {token}, outside the vocabulary of {vocab_size}"));
    }
    if !sequence.segments.is_sorted() {
        return wrong("its segments decrease".into());
    }
    let counts = Counts {
        sequences: 1,
        tokens: sequence.segments[..seq_len].iter().filter(|segment| **segment != PADDING).count() as u64,
        valid_rows: (0..seq_len).filter(|row| sequence.is_valid(*row)).count() as u64,
        kept_ids: targets.map_or(0, |targets| targets.ids.len() as u64),
        text_bytes: 0,
    };
    match (targets, &settings.soft_targets) {
        (None, None) => {}
        (Some(_), None) => return wrong("it has soft targets, but the cache is of tokens only".into()),
        (None, Some(_)) => return wrong("it has no soft targets, but the cache is of soft targets".into()),
        (Some(targets), Some(soft_targets)) => {
            check_lengths(targets, seq_len, &soft_targets.temperatures)?;
            check_kind(targets, &soft_targets.selection)?;
            if settings.log_normalizer == Some(true) && targets.log_normalizer.is_none() {
                return wrong("it has no log_normalizer, but the cache is one that keeps it".into());
            }
            check_rows(targets, sequence, &soft_targets.selection, vocab_size)?;
            if let Some(router) = &soft_targets.router {
                check_router(targets.router.as_ref(), router, sequence)?;
            }
        }
    }
    Ok(counts)
}

fn check_lengths(targets: &SparseTargets, seq_len: usize, temperatures: &[f32]) -> Result<(), Problem> {
    let (offsets, kept) = (&targets.offsets, targets.ids.len());
    if offsets.len() != seq_len + 1 {
        return wrong(format!("it has {} offsets, not {} (seq_len + 1)", offsets.len(), seq_len + 1));
    }
    if offsets[0] != 0 || offsets[seq_len] != kept as u64 || !offsets.is_sorted() {
        return wrong(format!("its offsets do not go from 0 to its {kept} kept ids"));
    }
    let captured: Vec<f32> = targets.captures.iter().map(|capture| capture.temperature).collect();
    if captured != temperatures {
        return wrong(format!("it is captured at temperatures {captured:?}, the cache at {temperatures:?}"));
    }
    for (i, capture) in targets.captures.iter().enumerate() {
        for (name, length, expected) in [
            ("log_probs", capture.log_probs.len(), kept),
            ("log_tail", capture.log_tail.len(), seq_len),
            ("label_log_prob", capture.label_log_prob.len(), seq_len),
        ] {
            if length != expected {
                return wrong(format!("its {name}.{i} has {length} numbers, not {expected}"));
            }
        }
    }
    if let Some(normalizers) = &targets.log_normalizer
        && normalizers.len() != seq_len
    {
        return wrong(format!("its log_normalizer has {} numbers, not {seq_len}", normalizers.len()));
    }
    Ok(())
}

fn check_router(
    codes: Option<&RouterCodes>,
    router: &RouterSettings,
    sequence: &PackedSequence,
) -> Result<(), Problem> {
    let Some(codes) = codes else {
        return wrong("it has nothing of the teacher's routers, but the cache is one that keeps them".into());
    };
    let (layers, experts) = (router.layers.len(), router.experts);
    if (codes.layers, codes.experts, codes.codes.len()) != (layers, experts, sequence.seq_len() * router.width()) {
        return wrong(format!("its routers are not those of {layers} layers with {experts} experts"));
    }
    for row in (0..sequence.seq_len()).filter(|row| sequence.is_valid(*row)) {
        let row_codes = &codes.codes[row * router.width()..(row + 1) * router.width()];
        for (codes, layer) in row_codes.chunks(experts).zip(&router.layers) {
            if codes.iter().max() != Some(&u8::MAX) {
                return wrong(format!("the router of layer {layer} has no likeliest expert in row {row}"));
            }
        }
    }
    Ok(())
}

fn check_kind(targets: &SparseTargets, selection: &Selection) -> Result<(), Problem> {
    let name = selection.name();
    match (targets.kind, selection.kind()) {
        (TargetKind::Exact, TargetKind::Sampled) => wrong(format!("its targets are exact, those of {name} are drawn")),
        (TargetKind::Sampled, TargetKind::Exact) => wrong(format!("its targets are drawn, those of {name} are exact")),
        _ => Ok(()),
    }
}

fn check_rows(
    targets: &SparseTargets,
    sequence: &PackedSequence,
    selection: &Selection,
    vocab_size: usize,
) -> Result<(), Problem> {
    let (most, drawn) = (selection.most_ids(), selection.kind() == TargetKind::Sampled);
    let mut sorted = vec![];
    for row in 0..sequence.seq_len() {
        let kept = targets.offsets[row] as usize..targets.offsets[row + 1] as usize;
        let ids = &targets.ids[kept.clone()];
        if !sequence.is_valid(row) {
            if !ids.is_empty() {
                return wrong(format!("row {row} predicts across documents or padding, but keeps ids"));
            }
            continue;
        }
        if ids.len() > most {
            return wrong(format!("row {row} keeps {} ids, more than {most} under {selection}", ids.len()));
        }
        if let Some(normalizer) = targets.log_normalizer.as_ref().map(|normalizers| normalizers[row])
            && !normalizer.is_finite()
        {
            return Err(Problem::NotFinite(format!("log_normalizer of row {row} ({normalizer})")));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocab_size) {
            return wrong(format!("row {row} keeps the id {id}, outside the vocabulary of {vocab_size}"));
        }
        sorted.clear();
        sorted.extend_from_slice(ids);
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return wrong(format!("row {row} keeps the id {} twice", pair[0]));
        }
        for (i, capture) in targets.captures.iter().enumerate() {
            let log_probs = &capture.log_probs[kept.clone()];
            if let Some(place) = log_probs.iter().position(|log_prob| !log_prob.is_finite()) {
                let (log_prob, id) = (log_probs[place], ids[place]);
                return Err(Problem::NotFinite(format!("log_probs.{i} of row {row}, id {id} ({log_prob})")));
            }
            // Weights of drawn ids follow the first temperature, at which they were drawn; at others they are in no order
            // and have no bound.
            let free = drawn && i > 0;
            if !free && !log_probs.is_sorted_by(|left, right| left >= right) {
                return wrong(format!("log_probs.{i} of row {row} do not descend"));
            }
            if drawn && capture.log_tail[row] != f32::NEG_INFINITY {
                return wrong(format!(
                    "log_tail.{i} of row {row} is {}, but drawn ids leave no tail",
                    capture.log_tail[row]
                ));
            }
            for (name, log_prob) in [
                ("log_probs", log_probs.first().copied().filter(|_| !free).unwrap_or(0.0)),
                ("log_tail", capture.log_tail[row]),
                ("label_log_prob", capture.label_log_prob[row]),
            ] {
                if log_prob.is_nan() {
                    return Err(Problem::NotFinite(format!("{name}.{i} of row {row} ({log_prob})")));
                }
                if log_prob > ROUNDING {
                    return wrong(format!("{name}.{i} of row {row} is {log_prob}, a probability above 1"));
                }
            }
        }
    }
    Ok(())
}
