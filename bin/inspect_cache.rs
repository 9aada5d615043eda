//! `inspect` of a cache directory: what it is made with, how much it holds, and whether every byte is as it was written.

use std::fmt::Write;
use std::path::Path;

use limbeck::Result;
use limbeck::cache::CacheReader;
use limbeck::targets::TargetKind;

use crate::cli::InspectArgs;
use crate::output::print;

pub fn run(args: &InspectArgs) -> Result<()> {
    // The cache of a run is a directory with one cache for each split.
    let splits: Vec<_> = ["train", "held_out"].iter().map(|split| args.path.join(split)).collect();
    let splits: Vec<_> = splits.into_iter().filter(|split| split.join("manifest.json").is_file()).collect();
    if splits.is_empty() {
        return inspect(&args.path, args.verify);
    }
    for split in splits {
        inspect(&split, args.verify)?;
    }
    Ok(())
}

fn inspect(directory: &Path, verify: bool) -> Result<()> {
    let cache = CacheReader::open(directory)?;
    let settings = &cache.manifest().settings;
    let summary = cache.summary()?;
    let mut text = String::new();
    let mut line = |name: &str, value: String| writeln!(text, "{name:<12}{value}").expect("writing to a string");
    line("cache", format!("{} ({})", directory.display(), settings.split));
    line("data", settings.data_fingerprint.clone());
    let tokenizer = &settings.tokenizer;
    line("tokenizer", format!("{}, {} tokens", tokenizer.fingerprint, tokenizer.vocab_size));
    match &settings.soft_targets {
        None => line("targets", "none, tokens only".into()),
        Some(targets) => {
            let teacher = &targets.teacher;
            line("teacher", format!("{}, {}, in {}", teacher.name, teacher.fingerprint, teacher.dtype));
            line("targets", format!("{}, at temperature {:?}", targets.selection.summary(), targets.temperatures));
        }
    }
    let counts = &summary.counts;
    line(
        "size",
        format!(
            "{} sequences of {}, {} predictions, {} bytes in {} shards ({})",
            counts.sequences,
            settings.seq_len,
            counts.valid_rows,
            summary.bytes,
            summary.shards,
            settings.codec.name(),
        ),
    );
    if settings.soft_targets.is_some() {
        line("kept", format!("{} to {} ids, {:.1} on average", summary.kept_min, summary.kept_max, summary.kept_mean));
    }
    let drawn = settings.soft_targets.as_ref().is_some_and(|targets| targets.selection.kind() == TargetKind::Sampled);
    for capture in &summary.captures {
        let name = format!("at {:?}", capture.temperature);
        if drawn {
            // Weights of draws have no tail, and an entropy that is not the teacher's.
            let (off, loss) = (capture.mass_error, capture.label_loss);
            line(&name, format!("weights add up to 1 within {off:.4}, loss on the text {loss:.3} nats"));
            continue;
        }
        line(
            &name,
            format!(
                "tail {:.4} (median {:.4}), entropy {:.3} nats, loss on the text {:.3} nats",
                capture.tail_mean, capture.tail_deciles[5], capture.entropy, capture.label_loss
            ),
        );
    }
    for part in &summary.parts {
        line("", format!("{:<24}{:>14} bytes{:>10.2} per prediction", part.name, part.bytes, part.bytes_per_token));
    }
    print(&text)?;
    if verify {
        let verification = cache.verify();
        for damage in &verification.damage {
            tracing::error!("{damage}");
        }
        let verification = verification.into_result()?;
        print(&format!(
            "{:<12}all {} bytes as written ({:.0} MB/s)\n",
            "verified",
            verification.bytes,
            verification.megabytes_per_second()
        ))?;
    }
    Ok(())
}
