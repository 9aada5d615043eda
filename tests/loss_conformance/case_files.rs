//! The cases written as data (`cases/README.md`), whose answers share nothing with the library.

use std::{collections::HashMap, fs, path::PathBuf, sync::OnceLock};

use limbeck::targets::{PackedSequence, SparseTargets};
use limbeck_kernels::{
    divergence::Divergence,
    fused_linear_distill::{LossSettings, RowWeights},
};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::{
    material::{BOTH, SOFT, prediction},
    subject::{Implementation, Job, Outcome, Source, Student, push_nothing, push_row},
    truth::{Finding, largest, must, near},
};

/// One case with its tensors, as f64 whatever they are stored as.
struct Case {
    entry: Value,
    tensors: HashMap<String, Vec<f64>>,
}

pub fn the_cases_written_as_data_are_met(subject: &dyn Implementation) -> Finding {
    static CASES: OnceLock<Vec<Case>> = OnceLock::new();
    for case in CASES.get_or_init(read) {
        case.check(subject).map_err(|how| format!("{}: {how}", case.entry["name"]))?;
    }
    Ok(())
}

fn read() -> Vec<Case> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/loss_conformance/cases");
    let text = fs::read_to_string(folder.join("cases.json")).expect("the cases lie beside the suite");
    let entries: Vec<Value> = serde_json::from_str(&text).expect("cases.json is JSON");
    let load = |entry: Value| {
        let bytes = fs::read(folder.join(entry["file"].as_str().expect("a case has a file"))).expect("its file exists");
        let file = SafeTensors::deserialize(&bytes).expect("its file is safetensors");
        let names = entry["tensors"].as_object().expect("a case has tensors");
        let mut tensors: HashMap<String, Vec<f64>> = names
            .iter()
            .map(|(name, stored)| (name.clone(), numbers(&file, stored.as_str().expect("names are text"))))
            .collect();
        for (name, formula) in entry.get("generated").and_then(Value::as_object).into_iter().flatten() {
            tensors.insert(name.clone(), generated(formula));
        }
        Case { entry, tensors }
    };
    let mut cases: Vec<Case> = entries.into_iter().map(load).collect();
    assert!(cases.len() >= 90, "cases.json lists {} cases", cases.len());
    // The wide ones last: most mistakes show before.
    cases.sort_by_key(|case| case.entry.get("generated").is_some());
    cases
}

fn numbers(file: &SafeTensors<'_>, name: &str) -> Vec<f64> {
    let tensor = file.tensor(name).expect("the file has the tensor");
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => data.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
        Dtype::F64 => data.chunks(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::I64 => data.chunks(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as f64).collect(),
        Dtype::U8 => data.iter().map(|&b| b as f64).collect(),
        other => panic!("{name} has type {other:?}"),
    }
}

fn generated(formula: &Value) -> Vec<f64> {
    let whole = |name: &str| formula[name].as_u64().expect("a whole number");
    let (a, b, c, m, vocab) = (whole("a"), whole("b"), whole("c"), whole("m"), whole("V"));
    let scale = formula["scale"].as_f64().expect("a number");
    let value = |t: u64, v: u64| (scale * (((a * v + b * t + c) % m) as f64 / m as f64 - 0.5)) as f32 as f64;
    let mut values: Vec<f64> = (0..whole("T")).flat_map(|t| (0..vocab).map(move |v| value(t, v))).collect();
    for entry in formula["overrides"].as_array().expect("a list") {
        let at = entry[0].as_u64().unwrap() * vocab + entry[1].as_u64().unwrap();
        values[at as usize] = entry[2].as_f64().unwrap();
    }
    values
}

impl Case {
    fn tensor(&self, name: &str) -> &[f64] {
        &self.tensors[name]
    }

    fn flag(&self, name: &str) -> bool {
        self.entry[name].as_bool().expect("true or false")
    }

    fn vocab(&self) -> usize {
        self.entry["vocab"].as_u64().expect("a number") as usize
    }

    fn row_count(&self) -> usize {
        self.tensor("mask").len()
    }

    fn tolerance(&self, name: &str) -> Option<f64> {
        self.entry["tolerance"].get(name).and_then(Value::as_f64)
    }

    fn divergence(&self) -> Divergence {
        let divergence = &self.entry["divergence"];
        let number = |name: &str| divergence[name].as_f64().expect("the divergence's parameter");
        match divergence["kind"].as_str().expect("a name") {
            "forward_kl" => Divergence::ForwardKl,
            "reverse_kl" => Divergence::ReverseKl,
            "jsd" => Divergence::Jsd { beta: number("beta") },
            "skew_forward_kl" => Divergence::SkewKl { alpha: number("alpha") },
            "skew_reverse_kl" => Divergence::SkewReverseKl { alpha: number("alpha") },
            "total_variation" => Divergence::TotalVariation,
            "renyi" => Divergence::Renyi { alpha: number("alpha") },
            "amari" => Divergence::Alpha { alpha: number("alpha") },
            "soft_cross_entropy" => Divergence::SoftCrossEntropy,
            "conditional_forward_kl" => Divergence::ConditionalKl,
            other => panic!("there is no divergence {other}"),
        }
    }

    /// One sequence per row, or all rows in one where the case is about a sequence.
    fn sequences(&self) -> Vec<PackedSequence> {
        let mask = self.tensor("mask");
        if let Some(tokens) = self.tensors.get("tokens") {
            // A row that does not count ends a document.
            let mut segments = vec![0];
            for &mask in mask {
                segments.push(segments[segments.len() - 1] + (mask == 0.0) as u32);
            }
            return vec![PackedSequence { tokens: tokens.iter().map(|&token| token as u32).collect(), segments }];
        }
        let row = |(&mask, &label): (&f64, &f64)| {
            if mask > 0.0 {
                prediction(label as u32)
            } else {
                PackedSequence { tokens: vec![0, 0], segments: vec![0, 1] }
            }
        };
        mask.iter().zip(self.tensor("label")).map(row).collect()
    }

    fn targets(&self) -> SparseTargets {
        let (log_probs, log_tail, captured) = match self.entry.get("capture").and_then(Value::as_str) {
            Some(name) => (self.tensor(name), self.tensor(&name.replace("log_probs", "log_tail")), 1.0),
            None => (self.tensor("log_probs"), self.tensor("log_tail"), self.temperature()),
        };
        let mut targets = SparseTargets::empty(&[captured]);
        let width = log_probs.len() / self.row_count();
        for (row, &count) in self.tensor("counts").iter().enumerate() {
            let count = count as usize;
            if count == 0 {
                push_nothing(&mut targets);
                continue;
            }
            let places = row * width..row * width + count;
            let ids: Vec<u32> = self.tensor("ids")[places.clone()].iter().map(|&id| id as u32).collect();
            let narrow = log_probs[places].iter().map(|&log_prob| log_prob as f32).collect();
            push_row(&mut targets, &ids, &[(narrow, log_tail[row] as f32, self.tensor("label_log_prob")[row] as f32)]);
        }
        targets
    }

    fn temperature(&self) -> f32 {
        self.entry["temperature"].as_f64().expect("a number") as f32
    }

    fn job(&self, weights: RowWeights) -> Job {
        let sequences = self.sequences();
        let (vocab, logits) = (self.vocab(), self.tensor("student_logits"));
        // Padding columns are no part of a student here: its head has as many rows as its vocabulary.
        let width = logits.len() / self.row_count();
        let student = logits.chunks(width).flat_map(|row| row[..vocab].iter().map(|&z| z as f32)).collect();
        let parts = self.entry.get("micro_batches").and_then(Value::as_array);
        let parts: Option<Vec<usize>> =
            parts.map(|parts| parts.iter().map(|part| part.as_u64().unwrap() as usize).collect());
        Job {
            vocab,
            source: Source::Stored { targets: self.targets(), sampled: self.entry.get("targets").is_some() },
            student: Student::Logits(student),
            settings: LossSettings {
                divergence: self.divergence(),
                temperature: self.temperature(),
                t_scale: self.flag("t_scale"),
            },
            weights,
            ranks: vec![parts.unwrap_or(vec![sequences.len()])],
            sequences,
            row_losses: true,
        }
    }

    fn check(&self, subject: &dyn Implementation) -> Finding {
        if self.flag("refused") {
            return must(subject.step(&self.job(BOTH)).is_err(), || "it is not refused".into());
        }
        self.compare(&subject.step(&self.job(BOTH))?, BOTH)?;
        self.compare(&subject.step(&self.job(SOFT))?, SOFT)
    }

    fn compare(&self, found: &Outcome, weights: RowWeights) -> Finding {
        let expected = |name: &str| self.entry["expected"][name].as_f64().expect("a number");
        let tolerance = |name: &str| self.tolerance(name).expect("a number");
        let bound = |truth: f64| tolerance("value_absolute") + tolerance("value_relative") * truth.abs();
        near("the count", found.token_count as f64, expected("count"), 0.0)?;
        let (soft, hard, mask) = (self.tensor("soft"), self.tensor("hard"), self.tensor("mask"));
        for row in 0..self.row_count() {
            must(found.rows[row].is_some() == (mask[row] > 0.0), || format!("row {row}: {:?}", found.rows[row]))?;
            if let Some(losses) = found.rows[row] {
                near(&format!("row {row}'s soft loss"), losses.soft, soft[row], bound(soft[row]))?;
                near(&format!("row {row}'s hard loss"), losses.hard, hard[row], bound(hard[row]))?;
            }
        }
        let (soft_weight, hard_weight) = (weights.soft as f64, weights.hard as f64);
        let factor = expected("soft_factor");
        let mean = soft_weight * factor * expected("mean_soft") + hard_weight * expected("mean_hard");
        near("the mean", found.loss, mean, factor.max(1.0) * bound(mean))?;

        let (soft, hard) = (self.tensor("gradient_soft"), self.tensor("gradient_hard"));
        let width = soft.len() / self.row_count();
        let wanted: Vec<usize> = match self.tensors.get("gradient_ids") {
            Some(ids) => ids.iter().map(|&id| id as usize).collect(),
            None => (0..self.vocab()).collect(),
        };
        let bound = tolerance("gradient_absolute")
            + tolerance("gradient") * (soft_weight * largest(soft)).max(hard_weight * largest(hard));
        for row in 0..self.row_count() {
            let gradient = &found.gradients[0][row * self.vocab()..][..self.vocab()];
            let kept = &self.targets();
            let kept = &kept.ids[kept.offsets[row] as usize..kept.offsets[row + 1] as usize];
            let (mut outside, mut outside_off) = (0.0f64, 0.0f64);
            for (place, &v) in wanted.iter().enumerate() {
                let at = row * width + place;
                let truth = soft_weight * soft[at] + hard_weight * hard[at];
                // The step's gradient is a mean, the case's a sum.
                let found = gradient[v] * expected("count");
                near(&format!("gradient {v} of row {row}"), found, truth, bound)?;
                if !kept.contains(&(v as u32)) {
                    outside = outside.max(truth.abs());
                    outside_off = outside_off.max((found - truth).abs());
                }
            }
            if let Some(share) = self.tolerance("tail_gradient").filter(|_| hard_weight == 0.0) {
                near(&format!("the gradient outside the kept ids of row {row}"), outside_off, 0.0, share * outside)?;
            }
        }
        Ok(())
    }
}
