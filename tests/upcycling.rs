//! A student that begins with layers of a model computes what those layers compute.

mod small_run;

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use limbeck::checkpoint::CheckpointReader;
use limbeck::data::pack;
use limbeck::distill;
use limbeck::models::parameter::CheckpointWeights;
use limbeck::models::upcycling::{Upcycling, mixture_of};
use limbeck::models::{Decoder, DecoderConfig, RandomWeights, TokenLayout, read_config};
use limbeck::targets::DistillBatch;
use limbeck::train::trainer::write_model;
use serde_json::json;
use small_run::*;

const VOCAB: usize = 96;

fn dense(layers: usize, vocab_size: usize) -> DecoderConfig {
    let json = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": true,
        "vocab_size": vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 1,
    });
    read_config(Path::new("dense"), &json).unwrap()
}

/// Writes a model of a configuration, and gives it back.
fn write(config: DecoderConfig, dir: &Path) -> Decoder {
    let mut model = random_model(config, 5, &Device::flex());
    write_model(&mut model, dir, &EXPORT, &[], None).unwrap();
    model
}

fn batch() -> DistillBatch {
    let documents: Vec<Vec<u32>> =
        (0..8u32).map(|document| (0..30).map(|place| (document * 37 + place * 11) % VOCAB as u32).collect()).collect();
    DistillBatch { sequences: pack(&documents, 40, 0), targets: None, row_weights: None }
}

/// Logits of a model whose layers are run in a given order.
fn logits(model: &Decoder, layers: &[usize]) -> Vec<f32> {
    let layout = TokenLayout::of_batch(&model.config, &batch());
    let mut hidden = model.embed(&layout);
    for &layer in layers {
        hidden = model.layer(layer, hidden, &layout).hidden;
    }
    model.logits(model.final_norm(hidden)).into_data().try_into_vec::<f32>().unwrap()
}

fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}

fn upcycled(dir: &Path, donor: DecoderConfig, layers: &[usize], student: DecoderConfig) -> (Decoder, bool) {
    let reader = CheckpointReader::open(dir).unwrap();
    let upcycling =
        Upcycling::new(donor, layers.to_vec(), student.clone(), RandomWeights { seed: 3, std: 0.05 }).unwrap();
    let source = CheckpointWeights::new(&reader);
    let model = Decoder::load(student, &upcycling.weights(&source), &Device::flex()).unwrap();
    (model, upcycling.keeps_the_function())
}

#[test]
fn layers_of_a_dense_model_compute_the_same_as_a_mixture_of_experts() {
    let folder = tempfile::tempdir().unwrap();
    let donor = write(dense(5, VOCAB), folder.path());
    let layers = [0, 3, 1, 4];
    let truth = logits(&donor, &layers);
    let scout = mixture_of(&donor.config, &layers, 6, Path::new("student")).unwrap().unwrap();
    let maverick = limbeck::models::llama4::Llama4Config { moe_layers: vec![1, 3], ..scout.clone() };
    // Wider experts have units that add nothing yet.
    let wide = limbeck::models::llama4::Llama4Config { intermediate_size: 64, ..scout.clone() };
    for (name, config) in [("scout", &scout), ("maverick", &maverick), ("wide", &wide)] {
        let config = config.decoder(Path::new(name)).unwrap();
        let (student, keeps) = upcycled(folder.path(), donor.config.clone(), &layers, config.clone());
        assert!(keeps, "{name}");
        let difference = largest_difference(&logits(&student, &[0, 1, 2, 3]), &truth);
        assert!(difference < 2e-5, "{name}: {difference}");
        // Through a checkpoint, as it is exported.
        let again = folder.path().join(name);
        write_model(&mut student.clone(), &again, &EXPORT, &[], None).unwrap();
        let read = Decoder::open(&again, &Device::flex()).unwrap();
        assert!(largest_difference(&logits(&read, &[0, 1, 2, 3]), &truth) < 2e-5, "{name}");
    }
    let narrow = limbeck::models::llama4::Llama4Config { intermediate_size: 16, ..scout };
    let narrow = narrow.decoder(Path::new("narrow")).unwrap();
    let (student, keeps) = upcycled(folder.path(), donor.config.clone(), &layers, narrow);
    assert!(!keeps && largest_difference(&logits(&student, &[0, 1, 2, 3]), &truth) > 1e-3);
}

#[test]
fn layers_of_a_mixture_compute_the_same_as_a_smaller_one() {
    let folder = tempfile::tempdir().unwrap();
    for (name, config) in [("scout", scout(4, VOCAB)), ("maverick", maverick(4, VOCAB))] {
        let dir = folder.path().join(name);
        let donor = write(config.decoder(Path::new(name)).unwrap(), &dir);
        let layers = [1, 3];
        let student = mixture_of(&donor.config, &layers, 16, Path::new("student")).unwrap().unwrap();
        let student = student.decoder(Path::new("student")).unwrap();
        let (student, keeps) = upcycled(&dir, donor.config.clone(), &layers, student);
        assert!(keeps, "{name}");
        let difference = largest_difference(&logits(&student, &[0, 1]), &logits(&donor, &layers));
        assert!(difference < 1e-6, "{name}: {difference}");
    }
}

#[test]
fn a_recipe_begins_with_layers_of_its_teacher_and_trains_them() {
    let small = SmallRun::new();
    let mut donor = random_model(dense(4, small.vocab_size), 5, &Device::flex());
    write_model(&mut donor, &small.path("donor"), &EXPORT, &[], None).unwrap();
    fs::copy(small.path("tokenizer/tokenizer.json"), small.path("donor/tokenizer.json")).unwrap();
    let init = "student.init={from=\"donor\", layers=[0, 3], experts=3}";
    let shape = "student.shape={like=\"scout\"}";
    let recipe = small.recipe(&["teacher.checkpoint=donor", shape, init, "train.steps=6", "control.enabled=false"]);
    let report = distill::run(&recipe, &small.options("run")).unwrap();
    let made = Decoder::open(&small.path("run/checkpoints/step-000006"), &Device::flex()).unwrap();
    assert_eq!(made.config.expert_layers(), [(0, 3), (1, 3)]);
    assert_eq!((made.config.hidden_size, made.config.tied), (32, true));
    assert!(report.arms[0].evaluation.cross_entropy.is_finite());
    // Experts that began alike have learnt different things.
    let reader = CheckpointReader::open(small.path("run/checkpoints/step-000006")).unwrap();
    let name = "model.layers.0.feed_forward.experts.down_proj";
    let down = reader.load_f32(name, &[3, 48, 32]).unwrap();
    assert!(down[..48 * 32] != down[48 * 32..2 * 48 * 32] && down.iter().any(|value| *value != 0.0));
}

#[test]
fn what_does_not_fit_is_refused_with_a_way_out() {
    let small = SmallRun::new();
    let mut donor = random_model(dense(4, small.vocab_size), 5, &Device::flex());
    write_model(&mut donor, &small.path("donor"), &EXPORT, &[], None).unwrap();
    fs::copy(small.path("tokenizer/tokenizer.json"), small.path("donor/tokenizer.json")).unwrap();
    let refusal = |shape: &str, init: &str| {
        let shape = format!("student.shape={shape}");
        let init = format!("student.init={init}");
        let recipe = small.recipe(&[&shape, &init]);
        let error = distill::run(&recipe, &small.options("refused")).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        let message = small.shortened(&error.to_string());
        message.split_once("`student.init").map(|(_, rest)| format!("`student.init{rest}")).unwrap_or(message)
    };
    assert_eq!(
        refusal("{like=\"scout\"}", "{from=\"donor\", layers=[0, 4]}"),
        "`student.init.layers` names layer 4, and DIR/donor has 4; use numbers below 4"
    );
    assert_eq!(
        refusal("{like=\"scout\", hidden=64}", "{from=\"donor\"}"),
        "`student.init.from` has `hidden` = 32, and the student 64; remove student.shape.hidden"
    );
    assert_eq!(
        refusal("{like=\"scout\", qk_norm=true}", "{from=\"donor\", layers=[0, 2]}"),
        "`student.init.from` has another kind of attention in layer 0 than the student in layer 0; remove \
         student.shape.qk_norm and student.shape.nope_interval"
    );
    assert_eq!(
        refusal("{like=\"scout\", experts=8}", "{from=\"teacher\"}"),
        "`student.init.from` has other experts in layer 0 than the student can begin with in layer 0; use experts of the same \
         width, at most as many, in the same layers"
    );
}
