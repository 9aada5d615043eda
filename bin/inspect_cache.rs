//! `inspect` of a cache directory: what it is made with, how much it holds, and whether every byte is as it was written.
//! As text, as JSON, and as a page with pictures.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use limbeck::cache::{CacheReader, CacheSettings, Histogram, Summary, inside, is_url};
use limbeck::eval::cache_page;
use limbeck::targets::TargetKind;
use limbeck::{Error, Result};
use serde::Serialize;

use crate::cli::InspectArgs;
use crate::output::print;

pub fn run(args: &InspectArgs) -> Result<()> {
    let mut caches = vec![];
    for cache in open(&args.path)? {
        let summary = cache.summary()?;
        if args.json {
            json(&cache, &summary)?
        } else {
            text(&cache, &summary)?
        }
        if args.verify {
            verify(&cache, args.json)?;
        }
        caches.push((cache, summary));
    }
    if let Some(path) = &args.html {
        let shown: Vec<_> = caches.iter().map(|(cache, summary)| (cache.manifest(), summary)).collect();
        let name = if is_url(&args.path) { Ok(args.path.clone()) } else { args.path.canonicalize() };
        let name = name.map_err(Error::io(&args.path))?;
        let page = cache_page::html(&name.file_name().unwrap_or_default().to_string_lossy(), &shown);
        std::fs::write(path, page).map_err(Error::io(path))?;
        if !args.json {
            print(&format!("{:<12}{}\n", "page", path.display()))?;
        }
    }
    Ok(())
}

/// The cache in a directory or at an address, or one for each split below it: that is what a run has.
fn open(path: &Path) -> Result<Vec<CacheReader>> {
    let splits = ["train", "held_out"].map(|split| inside(path, split));
    if is_url(path) {
        let whole = CacheReader::open(path);
        // What is at an address is known by trying.
        return match &whole {
            Err(Error::File { .. }) => match splits.iter().map(CacheReader::open).collect::<Vec<_>>() {
                opened if opened.iter().all(|split| matches!(split, Err(Error::File { .. }))) => Ok(vec![whole?]),
                opened => opened.into_iter().filter(|split| !matches!(split, Err(Error::File { .. }))).collect(),
            },
            _ => Ok(vec![whole?]),
        };
    }
    let mut directories: Vec<&Path> =
        splits.iter().map(PathBuf::as_path).filter(|split| split.join("manifest.json").is_file()).collect();
    if directories.is_empty() {
        directories.push(path);
    }
    directories.into_iter().map(CacheReader::open).collect()
}

/// What `--json` prints of one cache.
#[derive(Serialize)]
struct Inspected<'a> {
    directory: String,
    format_version: u32,
    program: &'a str,
    root: &'a str,
    settings: &'a CacheSettings,
    summary: &'a Summary,
}

fn json(cache: &CacheReader, summary: &Summary) -> Result<()> {
    let manifest = cache.manifest();
    let inspected = Inspected {
        directory: manifest.directory.display().to_string(),
        format_version: manifest.format_version,
        program: &manifest.program,
        root: &manifest.root,
        settings: &manifest.settings,
        summary,
    };
    print(&(serde_json::to_string(&inspected).expect("a summary has only strings as keys") + "\n"))
}

fn text(cache: &CacheReader, summary: &Summary) -> Result<()> {
    let manifest = cache.manifest();
    let settings = &manifest.settings;
    let mut text = String::new();
    let mut line = |name: &str, value: String| writeln!(text, "{name:<12}{value}").expect("writing to a string");
    line("cache", format!("{} ({})", manifest.directory.display(), settings.split));
    line("data", settings.data_fingerprint.clone());
    let tokenizer = &settings.tokenizer;
    line("tokenizer", format!("{}, {} tokens", tokenizer.fingerprint, tokenizer.vocab_size));
    match &settings.soft_targets {
        None => line("targets", "none, tokens only".into()),
        Some(targets) => {
            let teacher = &targets.teacher;
            line("teacher", format!("{}, {}, in {}", teacher.name, teacher.fingerprint, teacher.dtype));
            line("targets", format!("{}, at temperature {:?}", targets.selection.summary(), targets.temperatures));
            if let Some(router) = &targets.router {
                let layers: Vec<String> = router.layers.iter().map(usize::to_string).collect();
                line("routers", format!("of layers {}, with {} experts each", layers.join(", "), router.experts));
            }
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
    let each = format!("{:.2} bytes per prediction", summary.bytes_per_token);
    match summary.captures.first() {
        None => line("", each),
        // The entropy decides how much there is to store.
        Some(capture) => line(
            "",
            format!("{each}, {:.2} bits per kept id, entropy {:.3} nats", summary.bits_per_kept, capture.entropy),
        ),
    }
    for part in &summary.parts {
        line("", format!("{:<24}{:>14} bytes{:>10.2} per prediction", part.name, part.bytes, part.bytes_per_token));
    }
    if let Some(error) = manifest.error {
        let rows = error.rows.max(1) as f64;
        let off = 100.0 * (error.squared_error / error.squared_norm.max(1e-300)).sqrt();
        line(
            "rounding",
            format!(
                "KL {:.2e} nats per prediction, {:.2e} at most; kept probabilities off by {off:.2}%, tails by {:.1e} and \
                 labels by {:.2} nats at most",
                error.kl_sum / rows,
                error.kl_max,
                error.tail_max,
                error.label_max
            ),
        );
    }
    if settings.soft_targets.is_some() {
        line("kept", format!("{} to {} ids, {:.1} on average", summary.kept_min, summary.kept_max, summary.kept_mean));
        bars(&mut line, &summary.kept_histogram, |from, to| {
            let (first, last) = (from + 0.5, to - 0.5);
            if first == last { format!("{first}") } else { format!("{first} to {last}") }
        });
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
        line("", "tail mass".into());
        bars(&mut line, &capture.tail_histogram, |from, to| format!("{from:.1e} to {to:.1e}"));
        line("", "entropy, nats".into());
        bars(&mut line, &capture.entropy_histogram, |from, to| format!("{from:.2} to {to:.2}"));
    }
    print(&text)
}

/// Most lines of a histogram; more bars are drawn together.
const LINES: usize = 16;
const BAR: usize = 40;

fn bars(line: &mut impl FnMut(&str, String), histogram: &Histogram, label: impl Fn(f64, f64) -> String) {
    let (Some(first), Some(last)) =
        (histogram.counts.iter().position(|count| *count > 0), histogram.counts.iter().rposition(|count| *count > 0))
    else {
        return;
    };
    let together = (last - first + 1).div_ceil(LINES);
    let groups: Vec<(usize, u64)> = (first..=last)
        .step_by(together)
        .map(|start| (start, histogram.counts[start..=last.min(start + together - 1)].iter().sum()))
        .collect();
    let (most, all) = (groups.iter().map(|(_, count)| *count).max().unwrap_or(1), histogram.counts.iter().sum::<u64>());
    for (start, count) in groups {
        let end = (start + together).min(last + 1);
        let bar = "#".repeat((count as f64 / most as f64 * BAR as f64).round() as usize);
        let share = 100.0 * count as f64 / all as f64;
        let label = label(histogram.edges[start], histogram.edges[end]);
        line("", format!("  {label:<20}{share:>6.1}%  {bar}").trim_end().to_string());
    }
}

fn verify(cache: &CacheReader, quiet: bool) -> Result<()> {
    let verification = cache.verify();
    for damage in &verification.damage {
        tracing::error!("{damage}");
    }
    let verification = verification.into_result()?;
    if quiet {
        return Ok(());
    }
    print(&format!(
        "{:<12}all {} bytes as written ({:.0} MB/s)\n",
        "verified",
        verification.bytes,
        verification.megabytes_per_second()
    ))
}
