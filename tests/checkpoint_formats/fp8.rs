//! FP8 weights with scales per channel, per tensor and per block, and experts stored one by one.

use std::collections::BTreeMap;

use limbeck::checkpoint::{Dtype, SafetensorsEntry, TensorData, write_safetensors};
use serde_json::{Value, json};

use super::*;

const LAYOUTS: [&str; 3] = ["quantised/fp8_channels", "quantised/fp8_fused", "quantised/fp8_blocks"];

#[test]
fn scaled_weights_are_bit_for_bit_what_torch_multiplies() {
    for layout in LAYOUTS {
        let reader = CheckpointReader::open(fixture(layout)).unwrap();
        let golden = read_safetensors(fixture(layout).join("golden.safetensors")).unwrap();
        let mut compared = 0;
        for name in golden.names().filter(|name| name.starts_with("weights.")) {
            let plain = name.strip_prefix("weights.").unwrap();
            assert_eq!(reader.info(plain).unwrap().shape, golden.info(name).unwrap().shape, "{layout} {plain}");
            assert_eq!(load(&reader, plain), all(&golden, name), "{layout} {plain}");
            compared += 1;
        }
        assert!(compared >= 2, "{layout} has {compared} scaled weights");
        assert_rows(&reader);
    }
}

#[test]
fn models_in_fp8_compute_what_transformers_does_with_their_scaled_weights() {
    for layout in LAYOUTS {
        assert_logits(&fixture(layout), &fixture(layout).join("golden.safetensors"), "logits");
    }
}

#[test]
fn both_formats_have_the_256_numbers_that_torch_has() {
    let golden = read_safetensors(fixture("quantised/codes.safetensors")).unwrap();
    let codes: Vec<u8> = (0..=255).collect();
    for (name, dtype) in [("e4m3", Dtype::F8E4m3), ("e5m2", Dtype::F8E5m2)] {
        let expected: Vec<f32> =
            golden.raw_bytes(name).unwrap().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect();
        let finite: Vec<usize> = (0..256).filter(|&code| expected[code].is_finite()).collect();
        let dir = copy_of("quantised/fp8_fused");
        let stored: Vec<u8> = finite.iter().map(|&code| codes[code]).collect();
        write(dir.path(), &[("w.weight", dtype, vec![1, stored.len()], stored), scale("w.weight_scale", vec![1])]);
        let reader = CheckpointReader::open(dir.path()).unwrap();
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let expected: Vec<f32> = finite.iter().map(|&code| expected[code]).collect();
        assert_eq!(bits(load(&reader, "w.weight")), bits(expected), "{name}");
        // What is left are NaN and infinities, and no weights.
        for code in (0..256).filter(|code| !finite.contains(code)) {
            write(dir.path(), &[("w.weight", dtype, vec![1, 1], vec![code as u8]), scale("w.weight_scale", vec![1])]);
            let reader = CheckpointReader::open(dir.path()).unwrap();
            assert!(reader.load_f32("w.weight", &[1, 1]).unwrap_err().to_string().contains("NaN or infinite"));
        }
    }
}

#[test]
fn experts_that_are_stored_one_by_one_are_one_stack() {
    let reader = CheckpointReader::open(fixture("quantised/fp8_channels")).unwrap();
    let experts = "model.layers.1.feed_forward.experts.";
    let names: Vec<&str> = reader.names().filter(|name| name.starts_with(experts)).collect();
    assert_eq!(names, [format!("{experts}down_proj"), format!("{experts}gate_up_proj")]);
    let info = reader.info(&format!("{experts}gate_up_proj")).unwrap();
    assert_eq!((info.dtype, info.shape.as_slice()), (Dtype::F8E4m3, [3, 32, 48].as_slice()));
    assert!(!reader.names().any(|name| name.ends_with("scale")));
    assert_eq!(reader.config().get("quantization_config"), None);
}

#[test]
fn the_fingerprint_covers_scales_and_quantisation() {
    let dir = copy_of("quantised/fp8_blocks");
    let before = CheckpointReader::open(dir.path()).unwrap().fingerprint().unwrap();
    assert_eq!(before, CheckpointReader::open(fixture("quantised/fp8_blocks")).unwrap().fingerprint().unwrap());
    let file = dir.path().join("model.safetensors");
    let place = {
        let open = read_safetensors(&file).unwrap();
        let scale = open.raw_bytes("model.layers.0.mlp.up_proj.weight_scale_inv").unwrap()[..8].to_vec();
        let bytes = fs::read(&file).unwrap();
        bytes.windows(8).position(|window| window == scale).unwrap()
    };
    let mut bytes = fs::read(&file).unwrap();
    bytes[place + 1] ^= 1;
    fs::write(&file, bytes).unwrap();
    let changed = CheckpointReader::open(dir.path()).unwrap().fingerprint().unwrap();
    assert_ne!(before, changed);
    edit_config(dir.path(), |config| config["quantization_config"]["activation_scheme"] = json!("static"));
    assert_ne!(changed, CheckpointReader::open(dir.path()).unwrap().fingerprint().unwrap());
}

type Tensor<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

fn scale(name: &str, shape: Vec<usize>) -> Tensor<'_> {
    let bytes = 1f32.to_le_bytes().repeat(shape.iter().product());
    (name, Dtype::F32, shape, bytes)
}

fn write(dir: &Path, tensors: &[Tensor<'_>]) {
    let entries: Vec<SafetensorsEntry> =
        tensors.iter().map(|(name, dtype, shape, _)| SafetensorsEntry::new(*name, *dtype, shape.clone())).collect();
    write_safetensors(dir.join("model.safetensors"), &entries, &BTreeMap::new(), &mut |name| {
        let (.., bytes) = tensors.iter().find(|(known, ..)| *known == name).unwrap();
        Ok(TensorData::Bytes(bytes.as_slice().into()))
    })
    .unwrap();
}

fn edit_config(dir: &Path, edit: impl Fn(&mut Value)) {
    let path = dir.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
}

#[test]
fn quantisations_that_are_not_read_are_refused_by_name() {
    let refusal = |settings: Value| {
        let dir = copy_of("quantised/fp8_blocks");
        edit_config(dir.path(), |config| config["quantization_config"] = settings.clone());
        message(CheckpointReader::open(dir.path()), &dir.path().join("config.json"))
    };
    let tip = "use weights in BF16, or in FP8 by compressed-tensors (float-quantized), fbgemm_fp8 or fp8";
    let group = |weights: Value| json!({ "quant_method": "compressed-tensors", "config_groups": { "a": { "weights": weights } } });
    for (settings, problem) in [
        (
            json!({ "quant_method": "gptq", "bits": 4 }),
            "`quantization_config.quant_method`: `gptq` is not a method this program reads",
        ),
        (json!({ "bits": 4 }), "`quantization_config.quant_method`: is missing"),
        (
            json!({ "quant_method": "compressed-tensors", "format": "pack-quantized" }),
            "`quantization_config.format`: `pack-quantized` is not one this program reads",
        ),
        (
            json!({ "quant_method": "compressed-tensors", "transform_config": { "R1": {} } }),
            "`quantization_config.transform_config`: is not one this program reads",
        ),
        (
            json!({ "quant_method": "compressed-tensors", "sparsity_config": { "format": "sparse-24-bitmask" } }),
            "`quantization_config.format`: `sparse-24-bitmask` is not one this program reads",
        ),
        (
            json!({ "quant_method": "compressed-tensors", "quantization_status": "frozen" }),
            "`quantization_config.quantization_status`: `frozen` is not one this program reads",
        ),
        (group(json!({ "num_bits": 4, "type": "float" })), "`quantization_config.num_bits`: 4 is not 8"),
        (
            group(json!({ "num_bits": 8, "type": "int" })),
            "`quantization_config.type`: `int` is not one this program reads",
        ),
        (
            group(json!({ "num_bits": 8, "type": "float", "strategy": "group" })),
            "`quantization_config.strategy`: `group` is not one this program reads",
        ),
        (
            json!({ "quant_method": "compressed-tensors" }),
            "`quantization_config.config_groups`: say nothing about weights",
        ),
        (
            json!({ "quant_method": "fp8", "weight_block_size": [128] }),
            "`quantization_config.weight_block_size`: is [128], not two sizes",
        ),
    ] {
        assert_eq!(refusal(settings), format!("{problem}; {tip}"));
    }
    let dir = copy_of("quantised/fp8_blocks");
    edit_config(dir.path(), |config| {
        *config = json!({ "text_config": { "quantization_config": { "quant_method": "awq" } } })
    });
    let nested = message(CheckpointReader::open(dir.path()), &dir.path().join("config.json"));
    assert!(nested.contains("`awq` is not a method"), "{nested}");
}

#[test]
fn scales_that_are_missing_or_do_not_fit_are_named() {
    let dir = copy_of("quantised/fp8_channels");
    let file = dir.path().join("model.safetensors");
    let refusal = |tensors: &[Tensor<'_>]| {
        write(dir.path(), tensors);
        message(CheckpointReader::open(dir.path()), &file)
    };
    let weight = ("w.weight", Dtype::F8E4m3, vec![4, 2], vec![0u8; 8]);
    assert_eq!(
        refusal(std::slice::from_ref(&weight)),
        "tensor `w.weight`: is stored as F8_E4M3, and its scale `w.weight_scale` is missing; download it again"
    );
    assert_eq!(
        refusal(&[weight.clone(), scale("w.weight_scale", vec![2, 1])]),
        "tensor `w.weight_scale`: has shape [2, 1], expected [4, 1] for `w.weight` of shape [4, 2]; \
         check that quantization_config belongs to these weights"
    );
    assert_eq!(
        refusal(&[weight.clone(), ("w.weight_scale", Dtype::F8E8m0, vec![4, 1], vec![127; 4])]),
        "tensor `w.weight_scale`: has dtype F8_E8M0, expected F32, BF16 or F16; \
         use a checkpoint whose weights are of a type this program reads"
    );
    let nan = ("w.weight_scale", Dtype::F32, vec![1], f32::NAN.to_le_bytes().to_vec());
    write(dir.path(), &[weight.clone(), nan]);
    let reader = CheckpointReader::open(dir.path()).unwrap();
    let read = message(reader.load_f32("w.weight", &[4, 2]), &file);
    assert!(read.starts_with("tensor `w.weight_scale`: contains NaN or infinite values"), "{read}");
    let huge = ("w.weight_scale", Dtype::F32, vec![1], f32::MAX.to_le_bytes().to_vec());
    write(dir.path(), &[("w.weight", Dtype::F8E4m3, vec![1, 2], vec![0x38, 0x7e]), huge]);
    let reader = CheckpointReader::open(dir.path()).unwrap();
    assert_eq!(
        message(reader.load_f32("w.weight", &[1, 2]), &file),
        "tensor `w.weight`: element 1 is not finite once it is scaled by `w.weight_scale`; download both again"
    );
    let shape = message(reader.load_f32("w.weight", &[2, 1]), &file);
    assert_eq!(
        shape,
        "tensor `w.weight`: expected shape [2, 1], found [1, 2]; check that config.json belongs to these weights"
    );

    let dir = copy_of("quantised/fp8_blocks");
    write(
        dir.path(),
        &[("w.weight", Dtype::F8E5m2, vec![33, 40], vec![0; 33 * 40]), scale("w.weight_scale_inv", vec![2, 2])],
    );
    assert_eq!(
        message(CheckpointReader::open(dir.path()), &dir.path().join("model.safetensors")),
        "tensor `w.weight_scale_inv`: has shape [2, 2], expected [3, 2] for `w.weight` of shape [33, 40]; \
         check that quantization_config belongs to these weights"
    );
    edit_config(dir.path(), |config| drop(config.as_object_mut().unwrap().remove("quantization_config")));
    let reader = CheckpointReader::open(dir.path()).unwrap();
    assert_eq!(
        message(reader.load_f32("w.weight", &[33, 40]), &dir.path().join("model.safetensors")),
        "tensor `w.weight`: has dtype F8_E5M2 and nothing says how it is scaled; \
         add the quantization_config that belongs to it to config.json, or use BF16 weights"
    );
}

#[test]
fn experts_with_gaps_or_of_other_shapes_are_named() {
    let dir = copy_of("quantised/fp8_channels");
    let file = dir.path().join("model.safetensors");
    let names: Vec<String> = [0, 2]
        .iter()
        .flat_map(|number| {
            ["gate", "up", "down"].map(|part| format!("a.feed_forward.experts.{number}.{part}_proj.weight"))
        })
        .collect();
    let experts = |down: usize| {
        names.iter().map(move |name| {
            let shape = if name.contains("down") { vec![2, down] } else { vec![4, 2] };
            let bytes = vec![0; shape.iter().product::<usize>() * 2];
            (name.as_str(), Dtype::Bf16, shape, bytes)
        })
    };
    write(dir.path(), &experts(4).collect::<Vec<_>>());
    assert_eq!(
        message(CheckpointReader::open(dir.path()), dir.path()),
        "tensor `a.feed_forward.experts.1.gate_proj.weight`: is missing, though there are experts up to number 2; \
         download it again"
    );
    write(dir.path(), &experts(3).take(3).collect::<Vec<_>>());
    assert_eq!(
        message(CheckpointReader::open(dir.path()), &file),
        "tensor `a.feed_forward.experts.0.down_proj.weight`: has shape [2, 3], expected [2, 4] as its neighbours have; \
         download it again"
    );
    // Unfused experts need no quantisation.
    write(dir.path(), &experts(4).take(3).collect::<Vec<_>>());
    let reader = CheckpointReader::open(dir.path()).unwrap();
    assert_eq!(reader.info("a.feed_forward.experts.down_proj").unwrap().shape, [1, 4, 2]);
}
