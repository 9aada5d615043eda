//! Checkpoints: lazy reading, and writing as Hugging Face safetensors directories.
//!
//! What is read is a Hugging Face directory, with weights in BF16, F16, F32 or scaled FP8; a directory with Meta's names;
//! or a GGUF file. All are presented alike: a configuration in Hugging Face's words, tensors under its names, values as
//! f32. Hands out and takes host data. Knows how formats name and store weights, nothing of what is computed with them
//! (which names are asked for, and with what shapes, is the caller's), and nothing of devices.
//! Nothing here reads a whole checkpoint: a tensor, or some rows of its first axis, at a time. Counts and offsets are
//! 64-bit, and every size read from a file is compared with the file's length before memory is allocated by it.
//!
//! ```no_run
//! use limbeck::checkpoint::{CheckpointReader, CheckpointWriter, StoredDtype, TensorSpec};
//! # fn main() -> limbeck::Result<()> {
//! let reader = CheckpointReader::open("models/scout")?;
//! let name = "language_model.model.layers.0.feed_forward.experts.down_proj";
//! let expert = reader.load_f32_rows(name, &[16, 8192, 5120], 3..4)?;
//!
//! let tensors: Vec<TensorSpec> =
//!     reader.names().map(|name| Ok(TensorSpec::new(name, reader.info(name)?.shape.clone()))).collect::<limbeck::Result<_>>()?;
//! CheckpointWriter::new("models/scout-f32", reader.config(), StoredDtype::F32)
//!     .write(&tensors, &mut |name| reader.load_f32(name, &reader.info(name)?.shape))?;
//! # Ok(())
//! # }
//! ```

mod assembly;
mod blocks;
mod convert;
mod dtype;
mod fingerprint;
mod gguf;
mod gguf_models;
mod header;
mod hugging_face;
mod index;
mod meta;
mod open;
mod quantization;
mod reader;
mod runs;
mod safetensors_file;
mod safetensors_writer;
mod steps;
mod tensor_file;
mod train_state;
mod writer;

pub use dtype::{Dtype, StoredDtype, TensorInfo};
pub use gguf::{GgufFile, Metadata, read_gguf};
pub use open::{is_gguf, read_configuration};
pub use reader::CheckpointReader;
pub use runs::Runs;
pub use safetensors_file::{SafetensorsFile, read_safetensors};
pub use safetensors_writer::{SafetensorsEntry, TensorData, write_safetensors};
pub use steps::{Pointer, checkpoint_dir, keep_latest, keep_latest_and, latest_checkpoint, point_at};
pub use train_state::TrainState;
pub use writer::{CheckpointWriter, Overwrite, TensorSpec};

/// Weights of a checkpoint that has one shard.
const SINGLE_FILE: &str = "model.safetensors";
/// Which shard holds which tensor, in a checkpoint that has several.
const INDEX_FILE: &str = "model.safetensors.index.json";
const CONFIG_FILE: &str = "config.json";
