//! What is in a cache as one HTML page, in the style of the report: no scripts, nothing loaded from anywhere.

use std::fmt::Write as _;

use crate::cache::{self, Manifest, Summary};
use crate::eval::chart::escape;
use crate::eval::page;
use crate::eval::report::{Fact, Histogram};
use crate::quantity::{NONE, decimal, percent, short_bytes, short_percent, thousands};

/// The page of some caches, one after the other: the splits of a run, for example.
pub fn html(title: &str, caches: &[(&Manifest, &Summary)]) -> String {
    let mut page = page::beginning(title, "limbeck cache");
    let version = escape(env!("CARGO_PKG_VERSION"));
    let _ = writeln!(page, "<header>\n<p class=\"kicker\">limbeck {version} · soft-target cache</p>");
    let _ = writeln!(page, "<h1>{}</h1>\n</header>", escape(title));
    for (manifest, summary) in caches {
        split(&mut page, manifest, summary);
    }
    page.push_str(page::END);
    page
}

/// The histograms of a cache: ids kept, then tail and entropy at each temperature.
pub fn histograms(summary: &Summary) -> Vec<Histogram> {
    let histogram = |title: String, x_label: &str, counts: &cache::Histogram| Histogram {
        title,
        x_label: x_label.to_string(),
        edges: counts.edges.clone(),
        counts: counts.counts.clone(),
    };
    if summary.captures.is_empty() {
        return vec![];
    }
    let mut all = vec![histogram("Kept ids".into(), "ids kept in a row", &summary.kept_histogram)];
    let several = summary.captures.len() > 1;
    for capture in &summary.captures {
        let at = if several { format!(" at temperature {:?}", capture.temperature) } else { String::new() };
        let (tails, entropies) = (&capture.tail_histogram, &capture.entropy_histogram);
        all.push(histogram(format!("Tail mass{at}"), "probability outside the kept ids", tails));
        all.push(histogram(format!("Teacher's entropy{at}"), "nats, the tail as one outcome", entropies));
    }
    all
}

fn split(page: &mut String, manifest: &Manifest, summary: &Summary) {
    let _ = writeln!(page, "<section>\n<h2>{}</h2>\n<div class=\"tiles\">", escape(&manifest.settings.split));
    let mut tile = |class: &str, name: &str, number: String, unit: &str| {
        let _ = writeln!(
            page,
            "<div class=\"tile {class}\"><span>{name}</span><b>{}</b><small>{}</small></div>",
            escape(&number),
            escape(unit)
        );
    };
    let counts = &summary.counts;
    let sequences = format!("in {} sequences of {}", thousands(counts.sequences), manifest.settings.seq_len);
    tile("", "predictions", thousands(counts.valid_rows), &sequences);
    let codec = format!("codec {}, {} in all", manifest.settings.codec.name(), short_bytes(summary.bytes));
    tile("blue", "bytes per prediction", decimal(summary.bytes_per_token, 2), &codec);
    if let Some(capture) = summary.captures.first() {
        let range = format!("{} to {}", thousands(summary.kept_min), thousands(summary.kept_max));
        tile("blue", "bits per kept id", decimal(summary.bits_per_kept, 2), "all bytes, counted on what is kept");
        tile("", "ids kept", decimal(summary.kept_mean, 1), &range);
        let at = format!("nats, at temperature {:?}", capture.temperature);
        tile("green", "teacher's entropy", decimal(capture.entropy, 3), &at);
        let median = format!("median {}", share(capture.tail_deciles[5]));
        tile("green", "tail mass", share(capture.tail_mean), &median);
    }
    page.push_str("</div>\n");
    if counts.sequences > summary.sequences_read {
        let read = thousands(summary.sequences_read);
        let _ = writeln!(page, "<p class=\"aside\">Entropies, tails and histograms are of {read} sequences.</p>");
    }
    page.push_str("<div class=\"grid\">\n");
    parts(page, summary);
    page::facts(page, &origin(manifest, summary));
    page::histogram_cards(page, &histograms(summary));
    page.push_str("</div>\n</section>\n");
}

/// What the bytes are spent on, most first.
fn parts(page: &mut String, summary: &Summary) {
    page.push_str("<div class=\"card scroll\"><table>\n<thead><tr><th>Bytes</th><th></th>");
    page.push_str("<th>per prediction</th><th>share</th></tr></thead>\n<tbody>\n");
    let mut parts: Vec<_> = summary.parts.iter().collect();
    parts.sort_by_key(|part| std::cmp::Reverse(part.bytes));
    let all = summary.bytes.max(1) as f64;
    let most = parts.first().map_or(1, |part| part.bytes).max(1) as f64;
    for part in parts {
        let width = 80.0 * part.bytes as f64 / most;
        let _ = writeln!(
            page,
            "<tr><th>{}</th><td><svg width=\"80\" height=\"10\"><rect class=\"bar\" width=\"{width:.1}\" height=\"10\"/></svg></td>\
             <td>{}</td><td>{}</td></tr>",
            escape(&part.name),
            decimal(part.bytes_per_token, 2),
            percent(part.bytes as f64 / all),
        );
    }
    let (bytes, whole) = (decimal(summary.bytes_per_token, 2), percent(1.0));
    let _ = writeln!(page, "<tr><th>all</th><td></td><td>{bytes}</td><td>{whole}</td></tr>");
    page.push_str("</tbody></table></div>\n");
}

fn origin(manifest: &Manifest, summary: &Summary) -> Vec<Fact> {
    let settings = &manifest.settings;
    let mut facts = vec![
        Fact::new("directory", manifest.directory.display().to_string()),
        Fact::new("format version", manifest.format_version.to_string()),
        Fact::new("shards", thousands(summary.shards as u64)),
        Fact::new("tokenizer", short(&settings.tokenizer.fingerprint)),
        Fact::new("vocabulary", thousands(settings.tokenizer.vocab_size as u64)),
        Fact::new("data", short(&settings.data_fingerprint)),
    ];
    match &settings.soft_targets {
        None => facts.push(Fact::new("targets", "none, tokens only")),
        Some(targets) => facts.extend([
            Fact::new("teacher", &targets.teacher.name),
            Fact::new("teacher's weights", short(&targets.teacher.fingerprint)),
            Fact::new("it ran in", &targets.teacher.dtype),
            Fact::new("kept", targets.selection.to_string()),
            Fact::new("temperatures", format!("{:?}", targets.temperatures)),
        ]),
    }
    let teacher = settings.soft_targets.as_ref().map(|targets| &targets.teacher);
    if let Some(steps) = teacher.and_then(|teacher| teacher.in_training.as_ref()) {
        let range = format!("steps {} to {} of its training", steps.from_step, steps.last_step);
        let every = if steps.every == 1 { String::new() } else { format!(", every {}", steps.every) };
        facts.push(Fact::new("it spoke at", range + &every));
    }
    for capture in &summary.captures {
        let loss = format!("{} nats at temperature {:?}", decimal(capture.label_loss, 3), capture.temperature);
        facts.push(Fact::new("teacher's loss on the text", loss));
    }
    facts.push(Fact::new("root", short(&manifest.root)));
    facts
}

/// Tail masses are often far below a percent.
fn share(share: f64) -> String {
    if share.is_finite() { short_percent(share) } else { NONE.to_string() }
}

/// Enough of a hash to tell it from others.
fn short(hash: &str) -> String {
    match hash.char_indices().nth(24) {
        Some((end, _)) => format!("{}…", &hash[..end]),
        None => hash.to_string(),
    }
}
