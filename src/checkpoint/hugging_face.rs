//! The tensors of a Hugging Face checkpoint under the names that models ask for.
//!
//! Most are stored so. FP8 weights are multiplied by the scales beside them, and experts that are stored one by one are
//! presented as the stack that unquantised Llama 4 checkpoints have.

use std::collections::BTreeMap;

use super::assembly::{Arrangement, Assembly, Joined, Piece, Presented, Scale, Slab, StoredTensors, check_readable};
use super::convert;
use super::dtype::{Dtype, TensorInfo};
use super::quantization::Quantization;
use crate::error::Result;

/// What the routed experts' tensors have in their names; nothing else of a model's structure is known here.
const EXPERTS: &str = ".feed_forward.experts.";
/// Ends of the names of tensors that only say how others, or activations, are scaled.
const SCALES: [&str; 7] =
    ["weight_scale", "weight_scale_inv", "input_scale", "input_scale_ub", "k_scale", "v_scale", "proj_scale"];

const AGAIN: &str = "download it again";

/// One expert as it is stored: the names of its three matrices.
#[derive(Default)]
struct Expert {
    gate: Option<String>,
    up: Option<String>,
    down: Option<String>,
}

pub(super) fn present(stored: &StoredTensors, quantization: Quantization) -> Result<BTreeMap<String, Presented>> {
    let mut presented = BTreeMap::new();
    let mut stacks: BTreeMap<String, BTreeMap<u64, Expert>> = BTreeMap::new();
    for name in stored.file_of.keys() {
        if let Some((stack, number, part)) = expert(name) {
            let expert = stacks.entry(stack).or_default().entry(number).or_default();
            match part {
                "gate_proj" => expert.gate = Some(name.clone()),
                "up_proj" => expert.up = Some(name.clone()),
                _ => expert.down = Some(name.clone()),
            }
            continue;
        }
        let is_scale = SCALES.iter().any(|end| name.ends_with(end));
        if quantization != Quantization::None && is_scale {
            continue;
        }
        let info = stored.info(name)?;
        let entry = if quantization != Quantization::None && convert::needs_scale(info.dtype) {
            Presented::Assembled(scaled(stored, name, quantization)?)
        } else {
            Presented::Stored(name.clone())
        };
        presented.insert(name.clone(), entry);
    }
    for (stack, experts) in stacks {
        let [gate_up, down] = assemble_experts(stored, quantization, &stack, &experts)?;
        presented.insert(format!("{stack}gate_up_proj"), Presented::Assembled(gate_up));
        presented.insert(format!("{stack}down_proj"), Presented::Assembled(down));
    }
    Ok(presented)
}

/// `(...experts., number, part)` of one expert's weight.
fn expert(name: &str) -> Option<(String, u64, &'static str)> {
    let start = name.find(EXPERTS)? + EXPERTS.len();
    let (number, rest) = name[start..].split_once('.')?;
    let number = u64::from(number.parse::<u32>().ok()?);
    let part = ["gate_proj", "up_proj", "down_proj"].into_iter().find(|part| rest == format!("{part}.weight"))?;
    Some((name[..start].to_string(), number, part))
}

/// A weight that is stored whole, with its scale.
fn scaled(stored: &StoredTensors, name: &str, quantization: Quantization) -> Result<Assembly> {
    let TensorInfo { dtype, shape } = stored.info(name)?.clone();
    let piece = piece(stored, name, quantization)?;
    if shape.len() < 3 {
        return Ok(Assembly::matrix(dtype, shape, vec![piece]));
    }
    let rows = shape[1] as u64;
    let slab =
        |index: u64| Slab { pieces: vec![piece.clone().rows(index * rows..(index + 1) * rows)], joined: Joined::Rows };
    Ok(Assembly { slabs: (0..shape[0] as u64).map(slab).collect(), info: TensorInfo { dtype, shape } })
}

/// `gate_up_proj` `[experts, hidden, 2 * width]` and `down_proj` `[experts, width, hidden]` of experts that are stored
/// one by one, output-major.
fn assemble_experts(
    stored: &StoredTensors,
    quantization: Quantization,
    stack: &str,
    experts: &BTreeMap<u64, Expert>,
) -> Result<[Assembly; 2]> {
    let count = experts.keys().last().map_or(0, |last| last + 1);
    let none = Expert::default();
    let (mut gate_ups, mut downs): (Vec<Slab>, Vec<Slab>) = (vec![], vec![]);
    let mut first: Option<(Dtype, [usize; 2])> = None;
    // As many turns as names at most: a number that is far off is missed at the first gap.
    for number in 0..count {
        let expert = experts.get(&number).unwrap_or(&none);
        let mut matrix = |part: &str, name: &Option<String>, transposed: bool| -> Result<Piece> {
            let wanted = format!("{stack}{number}.{part}.weight");
            let Some(name) = name else {
                let problem = format!("is missing, though there are experts up to number {}", count - 1);
                return Err(stored.error(&wanted, problem, AGAIN));
            };
            let info = stored.info(name)?;
            let &[rows, columns] = info.shape.as_slice() else {
                return Err(stored.error(name, format!("has shape {:?}, not that of a matrix", info.shape), AGAIN));
            };
            let size = if transposed { [columns, rows] } else { [rows, columns] };
            let (_, expected) = *first.get_or_insert((info.dtype, size));
            if size != expected {
                let expected = if transposed { [expected[1], expected[0]] } else { expected };
                let problem = format!("has shape {:?}, expected {expected:?} as its neighbours have", info.shape);
                return Err(stored.error(name, problem, AGAIN));
            }
            Ok(piece(stored, name, quantization)?.arranged(Arrangement::Transposed))
        };
        let gate_up = vec![matrix("gate_proj", &expert.gate, false)?, matrix("up_proj", &expert.up, false)?];
        gate_ups.push(Slab { pieces: gate_up, joined: Joined::Columns });
        downs.push(Slab { pieces: vec![matrix("down_proj", &expert.down, true)?], joined: Joined::Rows });
    }
    let (dtype, [width, hidden]) = first.expect("a stack has an expert");
    let info = |shape: [usize; 3]| TensorInfo { dtype, shape: shape.to_vec() };
    Ok([
        Assembly { info: info([gate_ups.len(), hidden, 2 * width]), slabs: gate_ups },
        Assembly { info: info([downs.len(), width, hidden]), slabs: downs },
    ])
}

/// All rows of a stored weight with the scale that belongs to it, whose shape is checked.
fn piece(stored: &StoredTensors, name: &str, quantization: Quantization) -> Result<Piece> {
    let info = stored.info(name)?;
    let piece = Piece::whole(stored, name)?;
    if !convert::needs_scale(info.dtype) || quantization == Quantization::None {
        check_readable(stored, name)?;
        return Ok(piece);
    }
    let suffix = match quantization {
        Quantization::Blocks { suffix, .. } => suffix,
        _ => "weight_scale",
    };
    // Stacks of experts have names without `.weight`, and their scales without `weight_`.
    let tensor = match name.strip_suffix("weight") {
        Some(prefix) => format!("{prefix}{suffix}"),
        None => format!("{name}{}", suffix.trim_start_matches("weight")),
    };
    if !stored.contains(&tensor) {
        let problem = format!("is stored as {}, and its scale `{tensor}` is missing", info.dtype);
        return Err(stored.error(name, problem, AGAIN));
    }
    check_readable(stored, &tensor)?;
    let found = &stored.info(&tensor)?.shape;
    let (rows, columns) = (piece.rows.end, piece.columns);
    let found_sizes: Vec<u64> = found.iter().map(|&size| size as u64).collect();
    let (block, expected) = match (quantization, info.shape.as_slice()) {
        (Quantization::Blocks { size: [block_rows, block_columns], .. }, _) => {
            // A block must not reach from one expert into the next.
            let whole = info.shape.len() == 2;
            let expected = [rows.div_ceil(block_rows), columns.div_ceil(block_columns)];
            let fits = whole && found_sizes == expected;
            (fits.then_some([block_rows, block_columns]), format!("{expected:?}"))
        }
        (_, &[experts, inner, outer]) => {
            let (experts, outer) = (experts as u64, outer as u64);
            let fits = found_sizes == [experts, 1, outer] || found_sizes == [experts, outer, 1];
            (fits.then_some([inner as u64, 1]), format!("[{experts}, 1, {outer}]"))
        }
        _ => {
            let one = found_sizes.iter().all(|&size| size == 1);
            let per_row = found_sizes == [rows, 1] || found_sizes == [rows];
            let block = match (per_row, one) {
                (true, _) => Some([1, columns]),
                (false, true) => Some([rows, columns]),
                (false, false) => None,
            };
            (block, format!("[{rows}, 1]"))
        }
    };
    let Some(block) = block else {
        let problem = format!("has shape {found:?}, expected {expected} for `{name}` of shape {:?}", info.shape);
        return Err(stored.error(&tensor, problem, "check that quantization_config belongs to these weights"));
    };
    Ok(Piece { scale: Some(Scale { tensor, block: block.map(|size| size.max(1)) }), ..piece })
}
