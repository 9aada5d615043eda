//! The report of a run: who is better, by how much, and the evidence; as `report.json`, `report.html` and a table.
//!
//! Takes numbers that others measured. Says what they show, also when that is not what was hoped for.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable;
use crate::error::{Error, Result};
use crate::eval::calibration::{ConfidenceBin, EntropyBin};
pub use crate::eval::curves::Curves;
use crate::eval::page;
use crate::eval::text_table;
use crate::quantity::{NONE, decimal, percent, short_count, thousands};
use crate::train::best::Best;
use crate::train::metrics::{number_or_nan, rows_or_nan};

/// Version of `report.json`.
pub const SCHEMA_VERSION: u32 = 1;

/// Everything a report shows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub run_name: String,
    pub program_version: String,
    /// The plan in short: devices, tokens, steps, sizes.
    pub plan: Vec<Fact>,
    pub arms: Vec<Arm>,
    pub curves: Vec<Curves>,
    /// `None` when the run used no soft targets.
    pub cache: Option<CacheFacts>,
    pub histograms: Vec<Histogram>,
    /// Shell commands that repeat the run, in order.
    pub commands: Vec<String>,
    /// The recipe as it was frozen.
    pub recipe: String,
}

/// A named value, as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    pub name: String,
    pub value: String,
}

impl Fact {
    pub fn new(name: impl Into<String>, value: impl Into<String>) -> Fact {
        Fact { name: name.into(), value: value.into() }
    }
}

/// What a model is in the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Trained on the teacher's soft targets.
    Student,
    /// The running mean of the student's weights.
    Averaged,
    /// The same model, data, order and steps, trained on the labels alone.
    Control,
    Teacher,
}

impl Role {
    /// The name of the role in `metrics.jsonl` and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Role::Student => "student",
            Role::Averaged => "averaged",
            Role::Control => "control",
            Role::Teacher => "teacher",
        }
    }
}

/// One model of the comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    pub role: Role,
    pub name: String,
    pub parameters_total: u64,
    /// Parameters that one token passes through.
    pub parameters_active: u64,
    pub evaluation: Evaluation,
    /// Wall time of training; `None` for a model this run did not train.
    pub train_seconds: Option<f64>,
    pub tokens_seen: Option<u64>,
    pub tokens_per_second: Option<f64>,
    /// The checkpoint that measured best during training.
    #[serde(default)]
    pub best: Option<Best>,
}

/// Measures on the held-out text.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Nats per predicted token.
    #[serde(deserialize_with = "number_or_nan")]
    pub cross_entropy: f64,
    #[serde(deserialize_with = "number_or_nan")]
    pub perplexity: f64,
    /// Comparable across tokenizers.
    #[serde(deserialize_with = "number_or_nan")]
    pub bits_per_byte: f64,
    /// Nats per token; `None` without a teacher.
    pub kl_to_teacher: Option<f64>,
    /// Share (0..1) of the tokens on which this model and the teacher rank the same token first.
    pub top1_agreement: Option<f64>,
    /// Predicted tokens.
    pub token_count: u64,
    /// `[mixture-of-experts layers][experts]`: share of the tokens sent to each expert.
    #[serde(default, deserialize_with = "rows_or_nan")]
    pub expert_load: Vec<Vec<f64>>,
    /// By how sure the teacher was; empty without a teacher.
    #[serde(default)]
    pub by_entropy: Vec<EntropyBin>,
    /// By how sure this model was.
    #[serde(default)]
    pub by_confidence: Vec<ConfidenceBin>,
}

impl Evaluation {
    /// The measures of the labels from a sum of negative log-likelihoods in nats over `token_count` predicted tokens,
    /// which stand for `byte_count` bytes of text.
    pub fn from_sums(negative_log_likelihood: f64, token_count: u64, byte_count: u64) -> Evaluation {
        let cross_entropy = negative_log_likelihood / token_count as f64;
        Evaluation {
            cross_entropy,
            perplexity: cross_entropy.exp(),
            bits_per_byte: negative_log_likelihood / std::f64::consts::LN_2 / byte_count as f64,
            token_count,
            ..Evaluation::default()
        }
    }
}

/// What the soft targets were and what they cost.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CacheFacts {
    pub row_count: u64,
    pub byte_count: u64,
    #[serde(deserialize_with = "number_or_nan")]
    pub bytes_per_token: f64,
    /// Mean number of kept ids of a row.
    #[serde(deserialize_with = "number_or_nan")]
    pub kept_per_row: f64,
    /// Mean probability outside the kept ids.
    #[serde(deserialize_with = "number_or_nan")]
    pub tail_mass: f64,
    /// To compare with storing whole rows; `None` when not known.
    pub vocabulary_size: Option<u64>,
    /// Anything else worth a line: codec, temperatures, fingerprints.
    #[serde(default)]
    pub more: Vec<Fact>,
}

/// Counts between edges; drawn as it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    pub title: String,
    /// What the edges measure, with the unit.
    pub x_label: String,
    /// Finite, ascending, one more than `counts`.
    pub edges: Vec<f64>,
    pub counts: Vec<u64>,
}

/// Whose held-out cross-entropy is lower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Winner {
    Student,
    Control,
    /// Equal to the printed precision.
    Neither,
    /// Nothing to compare, or not comparable.
    Unknown,
}

/// The result in a sentence, with what one must know to read it rightly.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Headline {
    pub winner: Winner,
    /// Student minus control in nats per token; negative is better for the student.
    pub difference: Option<f64>,
    /// Share of the distance from control to teacher that the student covers; `None` unless the teacher is better.
    pub gap_closed: Option<f64>,
    pub sentence: String,
    pub notes: Vec<String>,
}

impl Report {
    /// An empty report of this program.
    pub fn new(run_name: impl Into<String>) -> Report {
        Report {
            run_name: run_name.into(),
            program_version: env!("CARGO_PKG_VERSION").to_string(),
            ..Report::default()
        }
    }

    /// The first arm of a role.
    pub fn arm(&self, role: Role) -> Option<&Arm> {
        self.arms.iter().find(|arm| arm.role == role)
    }

    /// Student against control, in words that fit whichever won.
    pub fn headline(&self) -> Headline {
        let (student, control, teacher) = (self.arm(Role::Student), self.arm(Role::Control), self.arm(Role::Teacher));
        let mut headline = Headline {
            winner: Winner::Unknown,
            difference: None,
            gap_closed: None,
            sentence: String::new(),
            notes: Vec::new(),
        };
        let Some(student) = student else {
            headline.sentence = "No student was evaluated.".to_string();
            return headline;
        };
        let reached = student.evaluation.cross_entropy;
        if !reached.is_finite() {
            headline.sentence =
                "The student diverged: its held-out cross-entropy is not finite, so there is no result.".to_string();
            return headline;
        }
        let Some(control) = control else {
            headline.sentence = format!("The student reaches {reached:.3} nats per token on held-out text.");
            headline.notes.push(
                "There is no control, so this run cannot say what the teacher's soft targets contributed.".to_string(),
            );
            return headline;
        };
        let labels_only = control.evaluation.cross_entropy;
        if !labels_only.is_finite() {
            headline.sentence = format!(
                "The control diverged, so it cannot be compared; the student reaches {reached:.3} nats per token on held-out text."
            );
            return headline;
        }
        if student.evaluation.token_count != control.evaluation.token_count {
            headline.sentence = format!(
                "Student and control were evaluated on different text ({} against {} tokens), so they cannot be compared.",
                thousands(student.evaluation.token_count),
                thousands(control.evaluation.token_count)
            );
            return headline;
        }
        let difference = reached - labels_only;
        headline.difference = Some(difference);
        let by = format!("by {:.3} nats per token on held-out text", difference.abs());
        let numbers = |first: f64, second: f64| format!("({first:.3} against {second:.3})");
        (headline.winner, headline.sentence) = if difference.abs() < 0.0005 {
            let sentence = format!(
                "Student and control are equal on held-out text ({reached:.3} nats per token): in this run distillation made no difference."
            );
            (Winner::Neither, sentence)
        } else if difference < 0.0 {
            let sentence = format!(
                "The distilled student beats the control {by} {}: in this run distillation helped.",
                numbers(reached, labels_only)
            );
            (Winner::Student, sentence)
        } else {
            let sentence = format!(
                "The control beats the distilled student {by} {}: in this run distillation hurt.",
                numbers(labels_only, reached)
            );
            (Winner::Control, sentence)
        };
        let taught = teacher.map(|teacher| teacher.evaluation.cross_entropy);
        if let Some(gap) = taught.map(|taught| labels_only - taught).filter(|gap| *gap > 0.0005) {
            let share = -difference / gap;
            headline.gap_closed = Some(share);
            if share > 0.0 {
                let gap = format!("the {gap:.3} nats between control and teacher");
                headline.notes.push(format!("The student covers {} of {gap}.", percent(share)));
            }
        } else if taught.is_some_and(|taught| taught >= labels_only) {
            headline
                .notes
                .push("The teacher is no better than the control on this text: it had little to teach.".to_string());
        }
        if student.tokens_seen != control.tokens_seen {
            let count = |arm: &Arm| arm.tokens_seen.map_or("an unknown number of".to_string(), thousands);
            headline.notes.push(format!(
                "The two were not trained alike: the student saw {} tokens, the control {}.",
                count(student),
                count(control)
            ));
        }
        headline
            .notes
            .push("One run with one seed: repeat it with other seeds before trusting a small difference.".to_string());
        headline
    }

    /// The table for the end of a run: one line an arm, then the result in words.
    pub fn table(&self) -> String {
        self.table_within(None)
    }

    /// As [`Report::table`], in lines of at most `width` characters: an arm below the other where columns do not fit.
    pub fn table_within(&self, width: Option<usize>) -> String {
        let titles =
            ["", "cross-entropy", "perplexity", "bits/byte", "KL to teacher", "top-1", "active/total", "model"];
        let mut rows: Vec<Vec<String>> = vec![titles.map(str::to_string).to_vec()];
        for arm in &self.arms {
            let evaluation = &arm.evaluation;
            rows.push(vec![
                arm.role.name().to_string(),
                decimal(evaluation.cross_entropy, 4),
                decimal(evaluation.perplexity, 2),
                decimal(evaluation.bits_per_byte, 4),
                evaluation.kl_to_teacher.map_or(NONE.to_string(), |value| decimal(value, 4)),
                evaluation.top1_agreement.map_or(NONE.to_string(), percent),
                format!("{}/{}", short_count(arm.parameters_active), short_count(arm.parameters_total)),
                arm.name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect(),
            ]);
        }
        let mut text = text_table::table(&rows, 1, &[0, titles.len() - 1], width);
        let headline = self.headline();
        text.push('\n');
        text.push_str(&text_table::wrapped(&headline.sentence, width));
        headline.notes.iter().for_each(|note| text.push_str(&text_table::wrapped(note, width)));
        text
    }

    /// The whole page: no scripts, nothing loaded from anywhere.
    pub fn html(&self) -> String {
        page::html(self)
    }

    /// Writes `report.json` and `report.html` into the run's directory; returns the path of the page.
    pub fn write(&self, run_dir: impl AsRef<Path>) -> Result<PathBuf> {
        let run_dir = run_dir.as_ref();
        let json = run_dir.join("report.json");
        let written = Written { schema_version: SCHEMA_VERSION, headline: self.headline(), report: self };
        let mut text = serde_json::to_vec(&written).map_err(|error| Error::io(&json)(error.into()))?;
        text.push(b'\n');
        durable::write_bytes(&json, &text)?;
        let path = run_dir.join("report.html");
        durable::write_bytes(&path, self.html().as_bytes())?;
        Ok(path)
    }

    /// Reads a `report.json` again.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::File`] for something else than a report or a later version of it.
    pub fn read(path: impl AsRef<Path>) -> Result<Report> {
        let path = path.as_ref();
        let text = std::fs::read(path).map_err(Error::io(path))?;
        let malformed = |error: serde_json::Error| {
            Error::file(path, format!("not a report ({error})"), "write it again with `limbeck evaluate`")
        };
        let Version { schema_version } = serde_json::from_slice(&text).map_err(malformed)?;
        if schema_version != SCHEMA_VERSION {
            return Err(Error::file(
                path,
                format!("report of version {schema_version}, this program reads version {SCHEMA_VERSION}"),
                "write it again with this program's `limbeck evaluate`",
            ));
        }
        serde_json::from_slice(&text).map_err(malformed)
    }
}

/// `report.json`: the report with what a reader would otherwise have to work out.
#[derive(Serialize)]
struct Written<'a> {
    schema_version: u32,
    headline: Headline,
    #[serde(flatten)]
    report: &'a Report,
}

#[derive(Deserialize)]
struct Version {
    schema_version: u32,
}
