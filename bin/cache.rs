//! `cache`: convert caches, import what other programs captured, compare with a live teacher.

use std::fmt::Write;

use limbeck::cache::{self, CacheReader, Conversion, Manifest, Selection};
use limbeck::checkpoint::CheckpointReader;
use limbeck::fidelity;
use limbeck::import::{self, ImportOptions, ImportReport, RowPlace};
use limbeck::run::RunOptions;
use limbeck::tokenizer::Tokenizer;
use limbeck::{Error, Result};

use crate::cli::{
    CacheArgs, CacheCommand, CacheConvertArgs, CacheImportCommand, CacheMergeArgs, CacheStatsArgs, ImportFlags,
    RowsFlag,
};
use crate::output::print;

pub fn run(args: &CacheArgs) -> Result<()> {
    match &args.command {
        CacheCommand::Convert(args) => convert(args),
        CacheCommand::Import(args) => match &args.command {
            CacheImportCommand::DistillKit(args) => {
                let (flags, config) = (&args.import, args.config.as_deref());
                let imported = import::distillkit(&args.input, config, &flags.output, &options(flags)?)?;
                said(flags, &imported)
            }
            CacheImportCommand::Jsonl(args) => {
                let (flags, place) = (&args.import, args.rows.map(place));
                let imported = import::jsonl(&args.input, place, &flags.output, &options(flags)?)?;
                said(flags, &imported)
            }
        },
        CacheCommand::Merge(args) => merge(args),
        CacheCommand::Stats(args) => stats(args),
    }
}

fn convert(args: &CacheConvertArgs) -> Result<()> {
    let input = CacheReader::open(&args.input)?;
    let before = &input.manifest().settings.codec;
    let kept = input.manifest().settings.soft_targets.as_ref().map(|targets| &targets.selection);
    let selection = kept.filter(|_| args.theta.is_some() || args.cap.is_some()).map(|kept| {
        let cap = args.cap.unwrap_or(kept.most_ids());
        match (args.theta, kept) {
            (Some(theta), _) => Selection::MinProb { theta, cap },
            (None, Selection::MinProb { theta, .. }) => Selection::MinProb { theta: *theta, cap },
            (None, _) => Selection::TopK { k: cap },
        }
    });
    let conversion =
        Conversion { codec: args.codec, levels: args.levels, log_normalizer: args.log_normalizer, selection };
    let manifest = cache::convert(&input, &args.output, &conversion)?;
    let bytes = |manifest: &Manifest| {
        let bytes: u64 = manifest.shards.iter().map(|shard| shard.bytes).sum();
        (bytes, bytes as f64 / manifest.counts.valid_rows.max(1) as f64)
    };
    let ((old, old_each), (new, new_each)) = (bytes(input.manifest()), bytes(&manifest));
    let (from, to) = (before.name(), args.codec.name());
    print(&format!(
        "cache: {}\n{from}: {old} bytes, {old_each:.2} per prediction\n{to}: {new} bytes, {new_each:.2} per prediction\n",
        args.output.display()
    ))
}

fn merge(args: &CacheMergeArgs) -> Result<()> {
    let manifest = cache::merge(&args.output, &args.parts)?;
    let (counts, shards) = (&manifest.counts, manifest.shards.len());
    print(&format!(
        "cache: {}\n{} sequences, {} predictions in {shards} shards of {} parts\n",
        args.output.display(),
        counts.sequences,
        counts.valid_rows,
        args.parts.len()
    ))
}

fn place(flag: RowsFlag) -> RowPlace {
    match flag {
        RowsFlag::Token => RowPlace::Token,
        RowsFlag::Next => RowPlace::Next,
    }
}

fn options(flags: &ImportFlags) -> Result<ImportOptions> {
    let teacher_fingerprint = match &flags.teacher {
        Some(teacher) => Some(CheckpointReader::open(teacher)?.fingerprint()?),
        None => None,
    };
    Ok(ImportOptions {
        tokenizer: Tokenizer::open(&flags.tokenizer)?,
        vocab_size: flags.vocab_size,
        teacher_name: flags.teacher_name.clone(),
        teacher_fingerprint,
        temperature: flags.temperature,
        split: flags.split.clone(),
        seq_len: flags.seq_len,
        sequences_per_shard: flags.sequences_per_shard,
        codec: flags.codec,
    })
}

fn said(flags: &ImportFlags, (manifest, report): &(Manifest, ImportReport)) -> Result<()> {
    let mut text = String::new();
    let mut line = |name: &str, value: String| writeln!(text, "{name:<12}{value}").expect("writing to a string");
    line("cache", flags.output.display().to_string());
    let counts = &manifest.counts;
    line("size", format!("{} sequences, {} predictions", counts.sequences, counts.valid_rows));
    if report.documents == 0 {
        line("", "it was finished before".into());
        return print(&text);
    }
    line("documents", format!("{}, {} too short to predict anything", report.documents, report.documents_left_out));
    line("predictions", format!("{}, nothing known of {}", report.rows, report.rows_unknown));
    line(
        "tails",
        format!(
            "1 - sum of the kept; {} of them raised to {:e}, sums exceed 1 by {:.2e} at most",
            report.tails_raised,
            import::LEAST_TAIL,
            report.largest_excess.max(0.0)
        ),
    );
    line("labels", format!("{} neither kept nor given: an even share of the tail", report.labels_shared));
    if report.log_probs_above_zero > 0 {
        line("rounding", format!("{} log-probabilities above 0 brought down to it", report.log_probs_above_zero));
    }
    print(&text)
}

fn stats(args: &CacheStatsArgs) -> Result<()> {
    if args.tolerance.is_nan() {
        return Err(Error::usage("--tolerance is not a number", "give a number of nats such as 1e-3"));
    }
    let device = RunOptions { device: args.device.device.clone(), ..RunOptions::default() }.device()?;
    let cache = CacheReader::open(&args.cache)?;
    let found = fidelity::compare(&cache, &args.against, &device, args.sequences)?;
    let mut text = String::new();
    let mut line = |name: &str, value: String| writeln!(text, "{name:<12}{value}").expect("writing to a string");
    line("cache", args.cache.display().to_string());
    let same = if found.same_teacher { "the cache's teacher" } else { "not the teacher that the cache names" };
    line("live", format!("{}, {same}", args.against.display()));
    line("compared", format!("{} predictions of {} sequences", found.rows, found.sequences.len()));
    line("control", format!("live against live: KL {:.3e} nats", found.control));
    for capture in &found.captures {
        let (row, (sequence, mean)) = (&capture.worst_row, capture.worst_sequence);
        line(
            &format!("at {:?}", capture.temperature),
            format!("KL(live || cache) {:.3e} nats per prediction, over kept ids and tail", capture.kl),
        );
        line(
            "",
            format!("worst sequence {sequence}: {mean:.3e}; worst row {} of {}: {:.3e}", row.row, row.sequence, row.kl),
        );
        line(
            "",
            format!(
                "log-probabilities off by {:.3e} at most, tails by {:.3e}",
                capture.log_prob_error, capture.tail_error
            ),
        );
        line("", format!("labels off by {:.3e} at most, {:+.3e} on average", capture.label_error, capture.label_bias));
        line("", format!("top-1 agreement {:.2}%", 100.0 * capture.top1_agreement));
    }
    print(&text)?;
    match found.captures.iter().find(|capture| capture.kl.is_nan() || capture.kl > args.tolerance) {
        None => Ok(()),
        Some(capture) => Err(Error::file(
            &args.cache,
            format!(
                "at temperature {:?} it is {:.3e} nats per prediction from the live teacher, beyond the tolerance of {:e}; \
                 sequence {} is the worst",
                capture.temperature, capture.kl, args.tolerance, capture.worst_sequence.0
            ),
            "compare with the teacher it was made with, precompute it again, or give a larger --tolerance",
        )),
    }
}
