//! The hidden states of a sweep: rows of one width, in memory or in a file that has no name.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::{
    error::{Error, Result},
    positioned::{read_exact_at, write_all_at},
};

/// Rows of `width` numbers.
#[derive(Debug)]
pub(super) struct States {
    width: usize,
    store: Store,
}

#[derive(Debug)]
enum Store {
    Memory(Vec<f32>),
    /// The system removes the file when it is closed, and with the process at the latest: nothing of it can be taken
    /// for anything after a crash.
    File {
        file: File,
        directory: PathBuf,
    },
}

impl States {
    /// Zeros in memory, or rows in a new file in the directory `spill`.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub(super) fn new(rows: usize, width: usize, spill: Option<&Path>) -> Result<States> {
        let store = match spill {
            None => Store::Memory(vec![0.0; rows * width]),
            Some(directory) => {
                std::fs::create_dir_all(directory).map_err(Error::io(directory))?;
                let file = tempfile::tempfile_in(directory).map_err(|error| failed(directory, "made", error))?;
                Store::File { file, directory: directory.to_path_buf() }
            }
        };
        Ok(States { width, store })
    }

    pub(super) fn read(&self, rows: Range<usize>) -> Result<Vec<f32>> {
        let places = rows.start * self.width..rows.end * self.width;
        match &self.store {
            Store::Memory(values) => Ok(values[places].to_vec()),
            Store::File { .. } => {
                let mut values = vec![0.0; places.len()];
                self.fill(&mut values, rows.start)?;
                Ok(values)
            }
        }
    }

    /// Puts whole rows in, from row `first` on.
    pub(super) fn write(&mut self, first: usize, values: &[f32]) -> Result<()> {
        let start = first * self.width;
        match &mut self.store {
            Store::Memory(all) => all[start..start + values.len()].copy_from_slice(values),
            Store::File { file, directory } => {
                write_all_at(file, bytemuck::cast_slice(values), 4 * start as u64)
                    .map_err(|error| failed(directory, "written", error))?;
            }
        }
        Ok(())
    }

    /// The rows with the given numbers, which ascend.
    pub(super) fn gather(&self, rows: &[u32]) -> Result<Vec<f32>> {
        let mut values = vec![0.0; rows.len() * self.width];
        let mut place = 0;
        for run in runs(rows) {
            let part = &mut values[place * self.width..(place + run.len()) * self.width];
            place += run.len();
            match &self.store {
                Store::Memory(all) => part.copy_from_slice(&all[run.start * self.width..run.end * self.width]),
                Store::File { .. } => self.fill(part, run.start)?,
            }
        }
        Ok(values)
    }

    /// Puts rows at the given numbers, which ascend.
    pub(super) fn scatter(&mut self, rows: &[u32], values: &[f32]) -> Result<()> {
        let mut place = 0;
        for run in runs(rows) {
            self.write(run.start, &values[place * self.width..(place + run.len()) * self.width])?;
            place += run.len();
        }
        Ok(())
    }

    fn fill(&self, values: &mut [f32], first: usize) -> Result<()> {
        let Store::File { file, directory } = &self.store else { unreachable!("memory is copied") };
        read_exact_at(file, bytemuck::cast_slice_mut(values), 4 * (first * self.width) as u64)
            .map_err(|error| failed(directory, "read", error))
    }
}

fn failed(directory: &Path, what: &str, error: io::Error) -> Error {
    Error::file(
        directory,
        format!("the hidden states that do not fit into memory cannot be {what} here: {error}"),
        "make room there, raise `teacher.memory`, or lower `teacher.sweep_tokens`; what is sealed is kept",
    )
}

/// Numbers in a row that follow each other, as ranges.
fn runs(rows: &[u32]) -> impl Iterator<Item = Range<usize>> + '_ {
    rows.chunk_by(|a, b| a + 1 == *b).map(|run| run[0] as usize..run[run.len() - 1] as usize + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_the_same_in_memory_and_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        for spill in [None, Some(folder.path())] {
            let mut states = States::new(7, 3, spill).unwrap();
            let all: Vec<f32> = (0..21).map(|n| n as f32).collect();
            states.write(0, &all[..12]).unwrap();
            states.write(4, &all[12..]).unwrap();
            assert_eq!(states.read(2..5).unwrap(), all[6..15]);
            assert_eq!(states.gather(&[0, 1, 4, 6]).unwrap(), [&all[..6], &all[12..15], &all[18..]].concat());
            states.scatter(&[1, 5, 6], &[-1.0; 9]).unwrap();
            assert_eq!(states.read(0..7).unwrap(), [&all[..3], &[-1.0; 3], &all[6..15], &[-1.0; 6]].concat());
            assert!(states.gather(&[]).unwrap().is_empty());
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a file without a name");
    }

    #[test]
    fn a_folder_that_takes_no_file_is_named_with_the_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = States::new(1, 1, Some(&file)).unwrap_err().to_string();
        assert!(error.starts_with(&file.display().to_string()), "{error}");
    }
}
