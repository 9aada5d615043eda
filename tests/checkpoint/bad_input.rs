//! Every bad file is refused with a message that names it, says what is wrong, and gives the way out.

use std::fs;

use proptest::prelude::*;

use super::*;

#[test]
fn a_missing_file_or_directory_is_named() {
    let dir = temporary();
    let path = dir.path().join("none");
    assert_eq!(message(read_safetensors(&path), &path), "does not exist; check the path, or download it");
    assert_eq!(
        message(CheckpointReader::open(&path), &path),
        "does not exist; give the path of a checkpoint directory in Hugging Face layout, or of a .gguf file"
    );
    assert_eq!(
        message(read_safetensors(dir.path()), dir.path()),
        "is not a file; give the path of a .safetensors file"
    );
    fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert_eq!(
        message(CheckpointReader::open(dir.path()), dir.path()),
        "holds neither model.safetensors nor model.safetensors.index.json; \
         give the path of a checkpoint directory in Hugging Face layout, or of a .gguf file"
    );
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(message(CheckpointReader::open(dir.path()), dir.path()).contains("only pickled weights; save it again"));
}

#[test]
fn a_bad_config_is_named() {
    let dir = temporary();
    let path = dir.path().join("student");
    small(&path);
    let config = path.join("config.json");
    fs::write(&config, "{\"a\": ").unwrap();
    let malformed = message(CheckpointReader::open(&path), &config);
    assert!(malformed.starts_with("is not valid JSON: EOF while parsing"), "{malformed}");
    assert!(malformed.ends_with("; download it again"), "{malformed}");
    fs::write(&config, "[1, 2]").unwrap();
    assert_eq!(message(CheckpointReader::open(&path), &config), "is not a JSON object; download it again");
    fs::remove_file(&config).unwrap();
    assert_eq!(message(CheckpointReader::open(&path), &config), "is missing; copy it from where the weights came from");
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let dir = temporary();
    let whole = fs::read(fixture("scout_tiny_bf16_sharded/model-00005-of-00005.safetensors")).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let path = dir.path().join("cut.safetensors");
    let cut = |length: usize| {
        fs::write(&path, &whole[..length]).unwrap();
        message(read_safetensors(&path), &path)
    };
    assert_eq!(cut(0), "has 0 bytes, too few for a safetensors file; download it again");
    assert_eq!(cut(5), "has 5 bytes, too few for a safetensors file; download it again");
    for length in [8, 9, 100, 8 + header - 1] {
        assert_eq!(
            cut(length),
            format!(
                "its header should have {header} bytes, but only {} follow; \
                 it is truncated or not a safetensors file: download it again",
                length - 8
            )
        );
    }
    for length in [8 + header, 8 + header + 1, whole.len() / 2, whole.len() - 1] {
        let text = cut(length);
        let held = format!("but the file holds {} bytes of data", length - 8 - header);
        assert!(text.starts_with("tensor `") && text.contains(&held), "{text}");
        assert!(text.ends_with("; the file is truncated: download it again"), "{text}");
    }
    let mut longer = whole.clone();
    longer.extend_from_slice(&[0; 3]);
    fs::write(&path, longer).unwrap();
    assert_eq!(message(read_safetensors(&path), &path), "has 3 bytes after the last tensor; download it again");
}

#[test]
fn absurd_sizes_are_refused_without_allocating_them() {
    let dir = temporary();
    let path = dir.path().join("x.safetensors");
    LARGEST.with(|largest| largest.set(0));
    for length in [1u64 << 60, u64::MAX, 1 << 40] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{}      ");
        fs::write(&path, bytes).unwrap();
        assert_eq!(
            message(read_safetensors(&path), &path),
            format!(
                "its header should have {length} bytes, but only 8 follow; \
                 it is truncated or not a safetensors file: download it again"
            )
        );
    }
    let far = header_message(
        r#"{"w":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}"#,
        16,
    );
    assert_eq!(
        far,
        "tensor `w`: its data ends at byte 4611686018427387904, but the file holds 16 bytes of data; \
         the file is truncated: download it again"
    );
    let product = header_message(r#"{"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]}}"#, 16);
    assert_eq!(product, "tensor `w`: shape [4294967296, 4294967296] of F32 overflows 64 bits; download it again");
    let wraps = header_message(r#"{"w":{"dtype":"F32","shape":[4611686018427387908],"data_offsets":[0,16]}}"#, 16);
    assert!(wraps.contains("overflows 64 bits"), "{wraps}");
    let largest = LARGEST.with(Cell::get);
    assert!(largest < 1 << 20, "allocated {largest} bytes at once");
}

#[test]
fn a_header_that_is_longer_than_allowed_is_refused() {
    let dir = temporary();
    let path = dir.path().join("x.safetensors");
    fs::write(&path, 200_000_000u64.to_le_bytes()).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(300_000_000).unwrap();
    assert_eq!(
        message(read_safetensors(&path), &path),
        "its header has 200000000 bytes, more than the 100000000 that are allowed; \
         it is not a safetensors file: download it again"
    );
}

#[test]
fn a_header_that_contradicts_itself_is_refused() {
    let two = |first: &str, second: &str| {
        format!(
            r#"{{"v":{{"dtype":"U8","shape":[4],"data_offsets":{first}}},"w":{{"dtype":"U8","shape":[4],"data_offsets":{second}}}}}"#
        )
    };
    assert_eq!(
        header_message(&two("[0,4]", "[2,6]"), 6),
        "tensor `w`: its data starts at byte 2, inside that of `v`; download it again"
    );
    assert_eq!(
        header_message(&two("[0,4]", "[6,10]"), 10),
        "tensor `w`: its data starts at byte 6, and bytes 4..6 belong to no tensor; download it again"
    );
    assert_eq!(
        header_message(&two("[0,4]", "[8,4]"), 8),
        "tensor `w`: its data ends at 4, before it starts at 8; download it again"
    );
    assert_eq!(
        header_message(&two("[0,4]", "[4,9]"), 9),
        "tensor `w`: shape [4] of U8 needs 4 bytes, found 5; download it again"
    );
    assert_eq!(
        header_message(
            r#"{"v":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"v":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            2
        ),
        "tensor `v`: is listed twice in the header; download it again"
    );
    assert_eq!(
        header_message(r#"{"w":{"dtype":"F128","shape":[1],"data_offsets":[0,16]}}"#, 16),
        "tensor `w`: has the unknown dtype `F128`; convert the checkpoint to BF16, F16 or F32"
    );
    assert_eq!(
        header_message(r#"{"w":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}"#, 2),
        "tensor `w`: shape [3] of F4 does not fill whole bytes; download it again"
    );
    let negative = header_message(r#"{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4);
    assert!(negative.starts_with("its header does not parse: `w`: invalid value: integer `-1`"), "{negative}");
    let garbage = header_message("<html>not found</html>", 4);
    assert!(garbage.starts_with("its header does not parse: expected value at line 1 column 1"), "{garbage}");
}

#[test]
fn a_git_lfs_pointer_is_recognised() {
    let dir = temporary();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n").unwrap();
    assert_eq!(
        message(read_safetensors(&path), &path),
        "is a git-lfs pointer, not the weights themselves; run `git lfs pull`"
    );
}

#[test]
fn wrong_requests_name_the_tensor_and_both_shapes() {
    let dir = temporary();
    let path = dir.path().join("student");
    small(&path);
    let reader = CheckpointReader::open(&path).unwrap();
    let file = path.join("model.safetensors");
    assert_eq!(
        message(reader.load_f32("a", &[3, 2]), &file),
        "tensor `a`: expected shape [3, 2], found [2, 3]; check that config.json belongs to these weights"
    );
    assert_eq!(
        message(reader.load_f32_rows("a", &[2, 3], 1..3), &file),
        "tensor `a`: rows 1..3 are not among its 2 rows; check the number of experts in config.json"
    );
    assert_eq!(message(reader.load_i64("a"), &file), "tensor `a`: has dtype F32, expected integers; store it as I64");
    assert_eq!(
        message(reader.load_f32("model.a", &[2, 3]), &path),
        "tensor `model.a`: is missing, the nearest name is `a`; \
         check that config.json belongs to these weights, or download them again"
    );
}

#[test]
fn weights_that_are_not_finite_are_refused() {
    let dir = temporary();
    let path = dir.path().join("x.safetensors");
    // The bad value lies in the last of several parallel chunks.
    let count = 200_000;
    let bad =
        [(Dtype::F32, f32::NAN), (Dtype::F32, f32::INFINITY), (Dtype::Bf16, f32::NAN), (Dtype::F16, f32::NEG_INFINITY)];
    for (dtype, value) in bad {
        let mut values = vec![1.0f32; count];
        values[count - 3] = value;
        let entries = [SafetensorsEntry::new("w", dtype, [2, count / 2])];
        write_safetensors(&path, &entries, &BTreeMap::new(), &mut |_| Ok(TensorData::from(values.as_slice()))).unwrap();
        let file = read_safetensors(&path).unwrap();
        let expected = "tensor `w`: contains NaN or infinite values, the first at element 199997; \
                        download it again, or go back to an earlier checkpoint";
        assert_eq!(message(file.load_f32("w", &[2, count / 2]), &path), expected);
        assert_eq!(message(file.load_f32_rows("w", &[2, count / 2], 1..2), &path), expected);
        assert!(file.load_f32_rows("w", &[2, count / 2], 0..1).is_ok());
    }
    let entries = [SafetensorsEntry::new("w", Dtype::F64, [1])];
    let beyond = 1e300f64.to_le_bytes();
    write_safetensors(&path, &entries, &BTreeMap::new(), &mut |_| Ok(TensorData::Bytes(beyond.as_slice().into())))
        .unwrap();
    let error = read_safetensors(&path).unwrap().load_f32("w", &[1]).unwrap_err().to_string();
    assert!(error.contains("contains NaN or infinite values"), "{error}");
}

#[test]
fn an_index_that_names_what_is_not_there_is_refused() {
    let dir = temporary();
    for entry in fs::read_dir(fixture("scout_tiny_bf16_sharded")).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join("model.safetensors.index.json");
    let text = fs::read_to_string(&path).unwrap();
    let open_with = |text: &str| {
        fs::write(&path, text).unwrap();
        CheckpointReader::open(dir.path())
    };
    assert!(open_with(&text).is_ok());

    let mut index: Value = serde_json::from_str(&text).unwrap();
    index["weight_map"]["model.norm.weight"] = json!("model-00001-of-00005.safetensors");
    let shard = dir.path().join("model-00001-of-00005.safetensors");
    assert_eq!(
        message(open_with(&index.to_string()), &shard),
        "tensor `model.norm.weight`: is placed in this shard by model.safetensors.index.json, but is not in it; \
         download the shard and the index again"
    );
    index["weight_map"]["model.norm.weight"] = json!("../elsewhere.safetensors");
    assert_eq!(
        message(open_with(&index.to_string()), &path),
        "places the tensor `model.norm.weight` in \"../elsewhere.safetensors\", which is not a file name; \
         download it again"
    );
    assert_eq!(message(open_with("{}"), &path), "has no `weight_map` object; download it again");
    assert_eq!(message(open_with(r#"{"weight_map": {}}"#), &path), "its `weight_map` is empty; download it again");
    fs::remove_file(dir.path().join("model-00003-of-00005.safetensors")).unwrap();
    let missing = message(open_with(&text), &path);
    assert!(missing.starts_with("names the shard `model-00003-of-00005.safetensors` (for `model.layers."), "{missing}");
    assert!(missing.ends_with("), which is missing; download the missing shard"), "{missing}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_header_never_panics_nor_allocates_absurdly(
        edits in prop::collection::vec((any::<prop::sample::Index>(), damage()), 1..6),
    ) {
        let dir = temporary();
        let path = dir.path().join("x.safetensors");
        let header = json!({
            "__metadata__": { "format": "pt" },
            "v": { "dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12] },
            "w": { "dtype": "I64", "shape": [1], "data_offsets": [12, 20] },
        });
        file_with_header(&path, &header.to_string(), 20);
        let mut bytes = fs::read(&path).unwrap();
        let header_end = bytes.len() - 20;
        for (place, byte) in edits {
            bytes[place.index(header_end)] = byte;
        }
        fs::write(&path, &bytes).unwrap();
        LARGEST.with(|largest| largest.set(0));
        // Whatever still opens must be readable, or say why not.
        if let Ok(file) = read_safetensors(&path) {
            for name in file.names() {
                let shape = file.info(name).unwrap().shape.clone();
                prop_assert!(file.raw_bytes(name).unwrap().len() <= 20);
                let _ = file.load_f32(name, &shape);
                let _ = file.load_i64(name);
                let rows = shape.first().copied().unwrap_or(0);
                let _ = file.load_f32_rows(name, &shape, rows / 2..rows);
            }
        }
        let largest = LARGEST.with(Cell::get);
        prop_assert!(largest < 1 << 20, "allocated {} bytes at once", largest);
    }
}

/// Bytes that mean something in a header more often than not.
fn damage() -> impl Strategy<Value = u8> {
    prop_oneof![any::<u8>(), prop::sample::select(b"0123456789[]{}\",:-eE. \0\xff".to_vec())]
}
