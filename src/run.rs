//! What the command line says about a run beside its recipe. Nothing in here changes what a run computes, except the
//! device it computes on and how much of the cache is this process's to fill.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cache::WriterPart;
use crate::error::{Error, Result};
use crate::recipe::Recipe;

/// Where a run writes, what it computes on, and whether it has been asked to stop.
#[derive(Debug, Clone)]
pub struct RunOptions {
    /// The run directory; overrides the recipe's `run.dir`.
    pub run_dir: Option<PathBuf>,
    /// `cpu`, `cuda`, `cuda:1`, `wgpu` or `tch`.
    pub device: String,
    /// Which shards of the caches to fill, when several processes share the work.
    pub part: WriterPart,
    /// The file to write a profile of the run to, in the format of [`profile`](crate::profile); none is recorded without.
    pub profile: Option<PathBuf>,
    /// Set from another thread to ask the run to save its state and return [`Error::Interrupted`].
    pub stop: Arc<AtomicBool>,
}

impl Default for RunOptions {
    fn default() -> Self {
        RunOptions {
            run_dir: None,
            device: "cpu".to_string(),
            part: WriterPart::WHOLE,
            profile: None,
            stop: Arc::default(),
        }
    }
}

impl RunOptions {
    /// The run directory: `--run-dir`, else the recipe's `run.dir`, else `runs/<name>` in the current directory.
    pub fn run_dir(&self, recipe: &Recipe) -> PathBuf {
        let chosen = self.run_dir.clone().or_else(|| recipe.run.dir.clone());
        let chosen = chosen.unwrap_or_else(|| PathBuf::from("runs").join(&recipe.name));
        std::path::absolute(&chosen).unwrap_or(chosen)
    }

    /// Whether the run has been asked to stop.
    pub fn stop_requested(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// The device to compute on.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown device, and for one that this build has no support for.
    pub fn device(&self) -> Result<burn::tensor::Device> {
        let (kind, number) = self.device.split_once(':').unwrap_or((&self.device, "0"));
        let unknown = || {
            Error::usage(
                format!("`--device {}` names no device", self.device),
                "use `cpu`, `cuda`, `cuda:N`, `wgpu` or `tch`",
            )
        };
        let number: usize = number.parse().map_err(|_| unknown())?;
        match kind {
            "cpu" if !self.device.contains(':') => Ok(burn::tensor::Device::flex()),
            #[cfg(feature = "cuda")]
            "cuda" => Ok(burn::tensor::Device::cuda(number)),
            #[cfg(feature = "wgpu")]
            "wgpu" if number == 0 => Ok(burn::tensor::Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
            #[cfg(feature = "tch")]
            #[allow(deprecated)] // burn keeps LibTorch for now; it is offered as long as burn has it
            "tch" if number == 0 => Ok(burn::tensor::Device::libtorch()),
            #[allow(unreachable_patterns)] // in a build with the feature
            "cuda" | "wgpu" | "tch" if number == 0 || kind == "cuda" => Err(Error::usage(
                format!("`--device {}` needs a build with the `{kind}` feature", self.device),
                format!("build with `cargo build --release --features {kind}`, or use `--device cpu`"),
            )),
            _ => Err(unknown()),
        }
    }
}

impl RunOptions {
    /// The device of number `number` among several that work together: the processor for each of them, or each a
    /// device of its own of the kind that `device` names.
    ///
    /// # Errors
    /// As [`RunOptions::device`], and when `device` names a single device.
    pub fn device_numbered(&self, number: usize) -> Result<burn::tensor::Device> {
        match self.device.as_str() {
            "cpu" => self.device(),
            "cuda" => RunOptions { device: format!("cuda:{number}"), ..self.clone() }.device(),
            one => Err(Error::usage(
                format!("`--device {one}` is one device, and the teacher's mesh has several"),
                "use `cpu` or `cuda`, of which each place of the mesh takes one, or remove `teacher.mesh`",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(device: &str) -> String {
        RunOptions { device: device.to_string(), ..RunOptions::default() }.device().unwrap_err().to_string()
    }

    #[test]
    fn several_devices_are_of_a_kind() {
        let of = |device: &str| RunOptions { device: device.to_string(), ..RunOptions::default() }.device_numbered(3);
        of("cpu").unwrap();
        assert_eq!(
            of("cuda:1").unwrap_err().to_string(),
            "`--device cuda:1` is one device, and the teacher's mesh has several; use `cpu` or `cuda`, of which each place \
             of the mesh takes one, or remove `teacher.mesh`"
        );
    }

    #[test]
    fn the_processor_is_always_there_and_other_devices_say_what_they_need() {
        RunOptions::default().device().unwrap();
        for device in ["gpu", "cpu:0", "cuda:x", "cuda:", "wgpu:3"] {
            assert_eq!(
                message(device),
                format!("`--device {device}` names no device; use `cpu`, `cuda`, `cuda:N`, `wgpu` or `tch`")
            );
        }
        #[cfg(not(feature = "cuda"))]
        assert_eq!(
            message("cuda:1"),
            "`--device cuda:1` needs a build with the `cuda` feature; build with `cargo build --release --features \
             cuda`, or use `--device cpu`"
        );
    }
}
