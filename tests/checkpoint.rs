//! What the checkpoint module promises: real files are read, written files are read back, bad files are told apart.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use limbeck::checkpoint::{
    CheckpointReader, CheckpointWriter, Dtype, Overwrite, SafetensorsEntry, StoredDtype, TensorData, TensorSpec,
    TrainState, checkpoint_dir, keep_latest, latest_checkpoint, read_safetensors, write_safetensors,
};
use limbeck::error::{Error, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "checkpoint/bad_input.rs"]
mod bad_input;
#[path = "checkpoint/train_state.rs"]
mod train_state;

/// Remembers the largest allocation of each thread, so that tests can say "nothing absurd was allocated".
struct Watched;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn remember(size: usize) {
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: every call goes to the system's allocator unchanged; remembering a size neither allocates nor unwinds.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        remember(layout.size());
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        remember(layout.size());
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        remember(size);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::realloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/llama4").join(name)
}

fn temporary() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn specs(reader: &CheckpointReader) -> Vec<TensorSpec> {
    reader.names().map(|name| TensorSpec::new(name, reader.info(name).unwrap().shape.clone())).collect()
}

fn load(reader: &CheckpointReader, name: &str) -> Result<Vec<f32>> {
    reader.load_f32(name, &reader.info(name)?.shape)
}

/// Writes a copy of an open checkpoint.
fn copy(reader: &CheckpointReader, dir: &Path, dtype: StoredDtype, max_shard_bytes: u64) {
    CheckpointWriter::new(dir, reader.config(), dtype)
        .with_max_shard_bytes(max_shard_bytes)
        .write(&specs(reader), &mut |name| load(reader, name))
        .unwrap();
}

/// A checkpoint directory of two small tensors.
fn small(dir: &Path) {
    write_small(dir, Overwrite::Refuse, 1.0).unwrap();
}

fn write_small(dir: &Path, overwrite: Overwrite, first: f32) -> Result<()> {
    let config = json!({ "model_type": "test" });
    let tensors = [TensorSpec::new("a", [2, 3]), TensorSpec::new("b", [2])];
    CheckpointWriter::new(dir, &config, StoredDtype::F32).with_overwrite(overwrite).write(&tensors, &mut |name| {
        Ok(if name == "a" { vec![first, 2.0, 3.0, 4.0, 5.0, 6.0] } else { vec![7.0, 8.0] })
    })
}

/// A safetensors file of this header and this many zero bytes.
fn file_with_header(path: &Path, header: &str, data_bytes: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    fs::write(path, bytes).unwrap();
}

/// The message of opening a file with this header, without its path.
fn header_message(header: &str, data_bytes: usize) -> String {
    let dir = temporary();
    let path = dir.path().join("x.safetensors");
    file_with_header(&path, header, data_bytes);
    message(read_safetensors(&path), &path)
}

/// The message of an error, which must start with the path.
fn message<T: std::fmt::Debug>(result: Result<T>, path: &Path) -> String {
    let text = result.unwrap_err().to_string();
    assert!(!text.contains('\n'), "more than one line: {text}");
    let prefix = format!("{}: ", path.display());
    text.strip_prefix(&prefix).unwrap_or_else(|| panic!("`{text}` does not start with `{prefix}`")).to_string()
}

#[test]
fn a_single_file_checkpoint_is_read() {
    let reader = CheckpointReader::open(fixture("scout_tiny")).unwrap();
    assert_eq!(reader.config()["model_type"], "llama4_text");
    assert_eq!(reader.names().len(), 51);
    assert!(reader.names().is_sorted());
    assert_eq!(reader.parameter_count(), 229_952);
    assert_eq!(reader.byte_count(), 229_952 * 4);
    assert!(reader.contains("lm_head.weight"));
    assert!(!reader.contains("lm_head.bias"));
    let info = reader.info("model.layers.0.feed_forward.experts.down_proj").unwrap();
    assert_eq!((info.dtype, info.shape.as_slice()), (Dtype::F32, [4, 36, 64].as_slice()));
    let norm = reader.load_f32("model.norm.weight", &[64]).unwrap();
    assert!(norm.iter().all(|value| (0.0..3.0).contains(value)), "not the weights of a norm: {norm:?}");
}

#[test]
fn a_bf16_sharded_checkpoint_holds_the_rounded_values_of_the_single_file() {
    let single = CheckpointReader::open(fixture("scout_tiny")).unwrap();
    let sharded = CheckpointReader::open(fixture("scout_tiny_bf16_sharded")).unwrap();
    assert_eq!(sharded.byte_count(), 459_904);
    assert!(single.names().eq(sharded.names()));
    for name in single.names() {
        assert_eq!(sharded.info(name).unwrap().dtype, Dtype::Bf16);
        let rounded: Vec<f32> =
            load(&single, name).unwrap().into_iter().map(|value| bf16::from_f32(value).to_f32()).collect();
        assert_eq!(load(&sharded, name).unwrap(), rounded, "{name}");
    }
}

#[test]
fn one_expert_is_a_slice_of_the_whole_tensor() {
    let name = "model.layers.1.feed_forward.experts.gate_up_proj";
    let shape = [4, 64, 72];
    for checkpoint in ["scout_tiny", "scout_tiny_bf16_sharded"] {
        let reader = CheckpointReader::open(fixture(checkpoint)).unwrap();
        let whole = reader.load_f32(name, &shape).unwrap();
        for expert in 0..4 {
            let one = reader.load_f32_rows(name, &shape, expert..expert + 1).unwrap();
            assert_eq!(one, whole[expert * 64 * 72..(expert + 1) * 64 * 72]);
        }
        assert_eq!(reader.load_f32_rows(name, &shape, 1..4).unwrap(), whole[64 * 72..]);
        assert!(reader.load_f32_rows(name, &shape, 4..4).unwrap().is_empty());
    }
}

#[test]
fn a_lone_file_of_integers_and_doubles_is_read() {
    let golden = read_safetensors(fixture("scout_tiny/golden.safetensors")).unwrap();
    let shape = golden.info("input_ids").unwrap().shape.clone();
    let ids = golden.load_i64("input_ids").unwrap();
    assert_eq!(ids.len(), shape.iter().product::<usize>());
    assert!(ids.iter().all(|id| (0..320).contains(id)));
    let name = "logits_f64";
    let info = golden.info(name).unwrap();
    assert_eq!(info.dtype, Dtype::F64);
    let single = golden.load_f32("logits", &info.shape).unwrap();
    let double = golden.load_f32(name, &info.shape).unwrap();
    let farthest = single.iter().zip(&double).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max);
    assert!(farthest < 1e-4, "logits differ by {farthest}");
}

#[test]
fn offsets_beyond_four_gigabytes_are_read() {
    // A sparse file: 17 GB long, some kilobytes on disk.
    let dir = temporary();
    let path = dir.path().join("huge.safetensors");
    let rows = (1usize << 32) + 8;
    let data_bytes = rows * 4;
    let header = json!({ "e": { "dtype": "BF16", "shape": [rows, 2], "data_offsets": [0, data_bytes] } }).to_string();
    file_with_header(&path, &header, 0);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    let data_start = 8 + header.len() as u64;
    file.set_len(data_start + data_bytes as u64).unwrap();
    let last: Vec<u8> = [1.0, 2.0, 3.0, 4.0].iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
    file.write_all_at(&last, data_start + data_bytes as u64 - 8).unwrap();
    let opened = read_safetensors(&path).unwrap();
    assert_eq!(opened.info("e").unwrap().element_count(), (1 << 33) + 16);
    let read = opened.load_f32_rows("e", &[rows, 2], rows - 3..rows).unwrap();
    assert_eq!(read, [0.0, 0.0, 1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn every_integer_type_is_read() {
    let dir = temporary();
    let path = dir.path().join("x.safetensors");
    let stored: [(&str, Dtype, Vec<u8>); 9] = [
        ("bool", Dtype::Bool, vec![0, 1]),
        ("u8", Dtype::U8, vec![0, 255]),
        ("i8", Dtype::I8, vec![1, 0xff]),
        ("u16", Dtype::U16, vec![1, 0, 0xff, 0xff]),
        ("i16", Dtype::I16, vec![1, 0, 0xff, 0xff]),
        ("u32", Dtype::U32, vec![1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
        ("i32", Dtype::I32, vec![1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
        ("i64", Dtype::I64, [1i64.to_le_bytes(), (-1i64).to_le_bytes()].concat()),
        ("u64", Dtype::U64, [1u64.to_le_bytes(), u64::MAX.to_le_bytes()].concat()),
    ];
    let entries: Vec<_> = stored.iter().map(|(name, dtype, _)| SafetensorsEntry::new(*name, *dtype, [2])).collect();
    write_safetensors(&path, &entries, &BTreeMap::new(), &mut |name| {
        let (_, _, bytes) = stored.iter().find(|(known, _, _)| *known == name).unwrap();
        Ok(TensorData::Bytes(bytes.into()))
    })
    .unwrap();
    let file = read_safetensors(&path).unwrap();
    let expected = [
        ("bool", [0, 1]),
        ("u8", [0, 255]),
        ("i8", [1, -1]),
        ("u16", [1, 65_535]),
        ("i16", [1, -1]),
        ("u32", [1, 4_294_967_295]),
        ("i32", [1, -1]),
        ("i64", [1, -1]),
    ];
    for (name, values) in expected {
        assert_eq!(file.load_i64(name).unwrap(), values, "{name}");
    }
    assert_eq!(message(file.load_i64("u64"), &path), "tensor `u64`: holds a number beyond 2^63 - 1; store it as I64");
    assert_eq!(
        message(file.load_f32("i64", &[2]), &path),
        "tensor `i64`: has dtype I64, expected F32, BF16, F16 or F64; use a checkpoint that is not quantised"
    );
}

#[test]
fn what_is_written_is_read_back() {
    let original = CheckpointReader::open(fixture("maverick_tiny")).unwrap();
    let dir = temporary();
    for (dtype, max_shard_bytes) in
        [(StoredDtype::F32, u64::MAX), (StoredDtype::Bf16, 100_000), (StoredDtype::F16, 100_000), (StoredDtype::F32, 0)]
    {
        let path = dir.path().join(format!("{dtype:?}-{max_shard_bytes}"));
        copy(&original, &path, dtype, max_shard_bytes);
        let read = CheckpointReader::open(&path).unwrap();
        assert_eq!(read.config(), original.config());
        assert!(read.names().eq(original.names()));
        assert_eq!(read.parameter_count(), original.parameter_count());
        for name in original.names() {
            let expected: Vec<f32> = load(&original, name)
                .unwrap()
                .into_iter()
                .map(|value| match dtype {
                    StoredDtype::F32 => value,
                    StoredDtype::Bf16 => bf16::from_f32(value).to_f32(),
                    StoredDtype::F16 => f16::from_f32(value).to_f32(),
                })
                .collect();
            assert_eq!(load(&read, name).unwrap(), expected, "{name} as {dtype:?}");
        }
    }
}

#[test]
fn bf16_is_rounded_to_nearest_even_and_f16_keeps_subnormals() {
    let dir = temporary();
    let path = dir.path().join("x.safetensors");
    let entries = [SafetensorsEntry::new("bf16", Dtype::Bf16, [4]), SafetensorsEntry::new("f16", Dtype::F16, [3])];
    // Half-way between two bf16 numbers, below and above an even one, then just past half-way; then a negative one.
    let ties = [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0xbf80_8000].map(f32::from_bits);
    let halves = [5.960_464_5e-8f32, -65_504.0, 1.000_488_3];
    write_safetensors(&path, &entries, &BTreeMap::new(), &mut |name| {
        Ok(TensorData::from(if name == "bf16" { ties.as_slice() } else { halves.as_slice() }))
    })
    .unwrap();
    let file = read_safetensors(&path).unwrap();
    let stored: Vec<u32> = file.load_f32("bf16", &[4]).unwrap().into_iter().map(f32::to_bits).collect();
    assert_eq!(stored, [0x3f80_0000, 0x3f82_0000, 0x3f81_0000, 0xbf80_0000]);
    assert_eq!(file.load_f32("f16", &[3]).unwrap(), [5.960_464_5e-8, -65_504.0, 1.0]);
}

#[test]
fn large_tensors_are_converted_like_small_ones() {
    // More than one block and many parallel chunks, with a last one that is not full.
    let count = (1 << 22) + 12_345;
    let values: Vec<f32> = (0..count).map(|number| (number % 2003) as f32 / 16.0 - 50.0).collect();
    let dir = temporary();
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        let path = dir.path().join(dtype.name());
        let entries = [SafetensorsEntry::new("x", dtype, [count])];
        write_safetensors(&path, &entries, &BTreeMap::new(), &mut |_| Ok(TensorData::from(values.as_slice()))).unwrap();
        let read = read_safetensors(&path).unwrap().load_f32("x", &[count]).unwrap();
        let kept = |value: f32| match dtype {
            Dtype::F32 => value,
            Dtype::Bf16 => bf16::from_f32(value).to_f32(),
            _ => f16::from_f32(value).to_f32(),
        };
        assert!(read.iter().zip(&values).all(|(&read, &value)| read == kept(value)), "{dtype}");
    }
}

#[test]
fn written_files_follow_the_hugging_face_layout() {
    let original = CheckpointReader::open(fixture("scout_tiny")).unwrap();
    let dir = temporary();
    let path = dir.path().join("deep/down/student");
    CheckpointWriter::new(&path, original.config(), StoredDtype::Bf16)
        .with_max_shard_bytes(200_000)
        .with_file("tokenizer.json", b"{}".as_slice())
        .with_extra(|partial| fs::write(partial.join("added"), "here").map_err(Error::io(partial)))
        .write(&specs(&original), &mut |name| load(&original, name))
        .unwrap();
    let mut files: Vec<String> =
        fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    let shards: Vec<String> = (1..=3).map(|number| format!("model-0000{number}-of-00003.safetensors")).collect();
    let mut expected = vec!["added".to_string(), "config.json".into()];
    expected.extend(shards.iter().cloned());
    expected.extend(["model.safetensors.index.json".into(), "tokenizer.json".into()]);
    assert_eq!(files, expected);
    let siblings: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
    assert_eq!(siblings.len(), 1, "the partial directory stayed behind");

    let index: Value = serde_json::from_slice(&fs::read(path.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"], json!({ "total_parameters": 229_952, "total_size": 459_904 }));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), 51);
    for shard in &shards {
        let bytes = fs::read(path.join(shard)).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        assert_eq!(header % 8, 0);
        assert!(bytes.len() as u64 - 8 - header <= 200_000);
        let opened = read_safetensors(path.join(shard)).unwrap();
        assert_eq!(opened.metadata().get("format").map(String::as_str), Some("pt"));
        assert!(opened.names().all(|name| index["weight_map"][name] == shard.as_str()));
    }
}

#[test]
fn the_format_s_own_implementation_reads_what_is_written() {
    let dir = temporary();
    let path = dir.path().join("mixed.safetensors");
    let entries = [
        SafetensorsEntry::new("odd", Dtype::F16, [3]),
        SafetensorsEntry::new("ids", Dtype::I64, [2, 1]),
        SafetensorsEntry::new("scalar", Dtype::F32, []),
        SafetensorsEntry::new("none", Dtype::F32, [0, 4]),
    ];
    let metadata = BTreeMap::from([("a".to_string(), "b \"quoted\"".to_string())]);
    write_safetensors(&path, &entries, &metadata, &mut |name| {
        Ok(match name {
            "odd" => TensorData::from(vec![1.0, -2.0, 0.5]),
            "ids" => TensorData::from(vec![7i64, -8]),
            "scalar" => TensorData::from(vec![3.5]),
            _ => TensorData::from(Vec::<f32>::new()),
        })
    })
    .unwrap();
    let bytes = fs::read(&path).unwrap();
    let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..header_end]).unwrap();
    for (name, width) in [("odd", 2), ("ids", 8), ("scalar", 4)] {
        assert_eq!(header[name]["data_offsets"][0].as_u64().unwrap() % width, 0, "{name} is not aligned");
    }
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.tensor("ids").unwrap().shape(), [2, 1]);
    assert_eq!(theirs.tensor("ids").unwrap().data()[..8], 7i64.to_le_bytes());
    assert_eq!(theirs.tensor("scalar").unwrap().data(), 3.5f32.to_le_bytes());
    assert_eq!(theirs.tensor("odd").unwrap().data()[4..], f16::from_f32(0.5).to_le_bytes());

    let ours = read_safetensors(&path).unwrap();
    assert_eq!(ours.metadata(), &metadata);
    assert_eq!(ours.load_i64("ids").unwrap(), [7, -8]);
    assert_eq!(ours.load_f32("scalar", &[]).unwrap(), [3.5]);
    assert!(ours.load_f32("none", &[0, 4]).unwrap().is_empty());
    assert!(ours.load_f32_rows("none", &[0, 4], 0..0).unwrap().is_empty());
    assert_eq!(ours.load_f32("odd", &[3]).unwrap(), [1.0, -2.0, 0.5]);
}

#[test]
fn the_fingerprint_does_not_depend_on_the_sharding() {
    let original = CheckpointReader::open(fixture("scout_tiny")).unwrap();
    let dir = temporary();
    let fingerprints: Vec<String> = [u64::MAX, 300_000, 0]
        .into_iter()
        .map(|max_shard_bytes| {
            let path = dir.path().join(max_shard_bytes.to_string());
            copy(&original, &path, StoredDtype::F32, max_shard_bytes);
            CheckpointReader::open(path).unwrap().fingerprint().unwrap()
        })
        .collect();
    let expected = original.fingerprint().unwrap();
    assert_eq!(expected.len(), 64);
    assert!(fingerprints.iter().all(|fingerprint| *fingerprint == expected), "{fingerprints:?}");
}

#[test]
fn the_fingerprint_changes_with_every_part() {
    let dir = temporary();
    let write = |name: &str, tensor: &str, shape: &[usize], dtype: StoredDtype, config: Value, value: f32| {
        let path = dir.path().join(name);
        CheckpointWriter::new(&path, &config, dtype)
            .write(&[TensorSpec::new(tensor, shape)], &mut |_| Ok(vec![value; 4]))
            .unwrap();
        CheckpointReader::open(path).unwrap().fingerprint().unwrap()
    };
    let config = json!({ "layers": 1, "eps": 1e-5 });
    let reordered = json!({ "eps": 1e-5, "layers": 1.0 });
    let fingerprints = [
        write("base", "w", &[2, 2], StoredDtype::F32, config.clone(), 1.0),
        write("name", "v", &[2, 2], StoredDtype::F32, config.clone(), 1.0),
        write("shape", "w", &[4, 1], StoredDtype::F32, config.clone(), 1.0),
        write("dtype", "w", &[2, 2], StoredDtype::Bf16, config.clone(), 1.0),
        write("config", "w", &[2, 2], StoredDtype::F32, json!({ "layers": 2, "eps": 1e-5 }), 1.0),
        write("value", "w", &[2, 2], StoredDtype::F32, config, -1.0),
    ];
    for (place, left) in fingerprints.iter().enumerate() {
        assert!(fingerprints[place + 1..].iter().all(|right| left != right), "{fingerprints:?}");
    }
    // The same bytes as numbers of another type.
    let typed = |dtype: &str| {
        let path = dir.path().join(dtype);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("config.json"), "{}").unwrap();
        let header = json!({ "w": { "dtype": dtype, "shape": [4], "data_offsets": [0, 8] } }).to_string();
        file_with_header(&path.join("model.safetensors"), &header, 8);
        CheckpointReader::open(path).unwrap().fingerprint().unwrap()
    };
    assert_ne!(typed("F16"), typed("BF16"));
    assert_eq!(write("order", "w", &[2, 2], StoredDtype::F32, reordered, 1.0), fingerprints[0]);
}

#[test]
fn a_checkpoint_is_replaced_only_when_asked() {
    let dir = temporary();
    let path = dir.path().join("student");
    small(&path);
    assert_eq!(
        message(write_small(&path, Overwrite::Refuse, 9.0), &path),
        "already holds a checkpoint; remove it or ask to overwrite it"
    );
    let first = |path: &Path| CheckpointReader::open(path).unwrap().load_f32("a", &[2, 3]).unwrap()[0];
    assert_eq!(first(&path), 1.0);
    write_small(&path, Overwrite::Replace, 9.0).unwrap();
    assert_eq!(first(&path), 9.0);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "the replaced checkpoint stayed behind");

    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    write_small(&home, Overwrite::Refuse, 1.0).unwrap();
    fs::remove_file(home.join("config.json")).unwrap();
    assert_eq!(
        message(write_small(&home, Overwrite::Replace, 1.0), &home),
        "holds other files than a checkpoint; give an empty or a new directory"
    );
    assert!(home.join("model.safetensors").exists());
}

#[test]
fn a_failed_write_leaves_nothing_behind() {
    let dir = temporary();
    let path = dir.path().join("student");
    let config = json!({});
    let write = |tensors: &[TensorSpec], dtype: StoredDtype, values: Vec<f32>| {
        let result = CheckpointWriter::new(&path, &config, dtype).write(tensors, &mut |_| Ok(values.clone()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        result
    };
    let one = [TensorSpec::new("w", [2])];
    assert_eq!(
        message(write(&one, StoredDtype::F32, vec![1.0, f32::NAN]), &path),
        "tensor `w`: contains NaN or infinite values, the first at element 1; \
         go back to an earlier checkpoint, with a lower learning rate"
    );
    assert_eq!(
        message(write(&one, StoredDtype::F16, vec![1.0, 70_000.0]), &path),
        "tensor `w`: holds 70000 at element 1, beyond the range of F16; store it as F32"
    );
    let short = write(&one, StoredDtype::F32, vec![1.0]).unwrap_err().to_string();
    assert!(short.contains("tensor `w`: shape [2] needs 2 f32 values, found 1;"), "{short}");
    let twice = [TensorSpec::new("w", [2]), TensorSpec::new("w", [2])];
    assert_eq!(
        message(write(&twice, StoredDtype::F32, vec![1.0, 2.0]), &path),
        "tensor `w`: is to be written twice; give each its own name"
    );
    assert!(write(&[], StoredDtype::F32, vec![]).unwrap_err().to_string().ends_with("; name at least one"));
    let absurd = [TensorSpec::new("w", [usize::MAX, 2])];
    assert!(write(&absurd, StoredDtype::F32, vec![]).unwrap_err().to_string().contains("overflows 64 bits"));
}

#[test]
fn added_files_cannot_leave_the_directory_or_replace_weights() {
    let dir = temporary();
    let path = dir.path().join("student");
    let config = json!({});
    for name in ["../outside", "config.json", "model.safetensors", "a/b", ""] {
        let error = CheckpointWriter::new(&path, &config, StoredDtype::F32)
            .with_file(name, b"x".as_slice())
            .write(&[TensorSpec::new("w", [1])], &mut |_| Ok(vec![1.0]))
            .unwrap_err();
        assert!(error.to_string().starts_with(&format!("cannot add the file `{name}` to ")), "{error}");
    }
}
