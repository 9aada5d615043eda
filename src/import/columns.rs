//! Columns of lists of whole numbers in Parquet files, some records at a time.

use std::fs::File;
use std::path::Path;

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{DataType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};

use crate::error::{Error, Result};

/// The lists of one record; a plain list of numbers is one of them.
pub(super) type Lists = Vec<Vec<i64>>;

pub(super) fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(Error::io(path))?;
    SerializedFileReader::new(file).map_err(unreadable(path))
}

pub(super) fn unreadable(path: &Path) -> impl Fn(ParquetError) -> Error {
    move |source| {
        let message = source.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        Error::file(path, format!("not readable as parquet: {message}"), "write the file again from its source")
    }
}

/// The top-level columns of a file.
pub(super) fn names(file: &SerializedFileReader<File>) -> Vec<String> {
    let schema = file.metadata().file_metadata().schema_descr();
    schema.root_schema().get_fields().iter().map(|field| field.name().to_string()).collect()
}

/// One column of one row group.
pub(super) struct ListColumn {
    reader: Numbers,
    name: String,
    most_definition: i16,
    most_repetition: i16,
}

enum Numbers {
    Int32(ColumnReaderImpl<Int32Type>),
    Int64(ColumnReaderImpl<Int64Type>),
}

impl ListColumn {
    /// The column `name`, lists nested `depth` deep. `None` when the file has no such column.
    pub fn open(
        file: &SerializedFileReader<File>,
        path: &Path,
        group: usize,
        name: &str,
        depth: i16,
    ) -> Result<Option<ListColumn>> {
        let schema = file.metadata().file_metadata().schema_descr();
        let leaf =
            schema.columns().iter().position(|leaf| leaf.path().parts().first().is_some_and(|part| part == name));
        let Some(leaf) = leaf else { return Ok(None) };
        let column = schema.column(leaf);
        let wrong = |is: String| {
            let expected = if depth == 1 { "lists of whole numbers" } else { "lists of lists of whole numbers" };
            Error::file(
                path,
                format!("the column `{name}` is {is}, not {expected}"),
                "give files that DistillKit wrote",
            )
        };
        if column.max_rep_level() != depth {
            return Err(wrong(format!("nested {} deep", column.max_rep_level())));
        }
        let reader = file.get_row_group(group).and_then(|group| group.get_column_reader(leaf));
        let reader = match reader.map_err(unreadable(path))? {
            ColumnReader::Int32ColumnReader(reader) => Numbers::Int32(reader),
            ColumnReader::Int64ColumnReader(reader) => Numbers::Int64(reader),
            _ => return Err(wrong(format!("of type {}", column.physical_type()))),
        };
        let (most_definition, most_repetition) = (column.max_def_level(), column.max_rep_level());
        Ok(Some(ListColumn { reader, name: name.to_string(), most_definition, most_repetition }))
    }

    /// The next records, at most `count`. The inner error is what is wrong with the record of that number (from 0).
    pub fn read(&mut self, path: &Path, count: usize) -> Result<Result<Vec<Lists>, (usize, String)>> {
        let (mut definitions, mut repetitions) = (vec![], vec![]);
        let values = match &mut self.reader {
            Numbers::Int32(reader) => numbers(reader, count, &mut definitions, &mut repetitions).map(|values| {
                // Narrow unsigned numbers are stored in 32 bits with a sign.
                values.into_iter().map(|value| i64::from(value as u32)).collect::<Vec<i64>>()
            }),
            Numbers::Int64(reader) => numbers(reader, count, &mut definitions, &mut repetitions),
        };
        let mut values = values.map_err(unreadable(path))?.into_iter();
        let mut records: Vec<Lists> = vec![];
        for (&definition, &repetition) in definitions.iter().zip(&repetitions) {
            if repetition == 0 {
                records.push(vec![]);
            }
            let number = records.len().saturating_sub(1);
            let Some(record) = records.last_mut() else { break };
            if definition < self.most_definition {
                // Nothing at all is said of this record, or something is missing inside of it.
                if repetition == 0 && self.most_repetition > 0 {
                    continue;
                }
                return Ok(Err((number, format!("the column `{}` has an empty list or a null inside", self.name))));
            }
            if repetition < self.most_repetition {
                record.push(vec![]);
            }
            let Some(list) = record.last_mut() else {
                return Ok(Err((number, format!("the column `{}` begins in the middle of a list", self.name))));
            };
            list.extend(values.next());
        }
        Ok(Ok(records))
    }
}

fn numbers<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    count: usize,
    definitions: &mut Vec<i16>,
    repetitions: &mut Vec<i16>,
) -> Result<Vec<T::T>, ParquetError> {
    let mut values = vec![];
    let mut read = 0;
    while read < count {
        let (records, ..) = reader.read_records(count - read, Some(definitions), Some(repetitions), &mut values)?;
        if records == 0 {
            break;
        }
        read += records;
    }
    Ok(values)
}
