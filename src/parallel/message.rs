//! Numbers and lists as bytes between ranks of one program: in the machine's own order, without a version. Not a file
//! format.

use bytemuck::Pod;

use crate::error::{Error, Result};

/// A message in the making.
#[derive(Debug, Default)]
pub struct Outgoing(Vec<u8>);

impl Outgoing {
    pub fn new() -> Self {
        Outgoing::default()
    }

    pub fn number(mut self, number: u64) -> Self {
        self.0.extend_from_slice(&number.to_ne_bytes());
        self
    }

    /// A list with its length.
    pub fn list<T: Pod>(mut self, values: &[T]) -> Self {
        self = self.number(values.len() as u64);
        self.0.extend_from_slice(bytemuck::cast_slice(values));
        self
    }

    pub fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// A message that is being read.
#[derive(Debug)]
pub struct Incoming<'a>(&'a [u8]);

impl<'a> Incoming<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Incoming(bytes)
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or_else(too_short)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// # Errors
    /// When the message ends before.
    pub fn number(&mut self) -> Result<u64> {
        let bytes = self.bytes(8)?;
        Ok(u64::from_ne_bytes(bytes.try_into().expect("eight bytes")))
    }

    /// A list as [`Outgoing::list`] wrote it.
    ///
    /// # Errors
    /// When the message ends before.
    pub fn list<T: Pod>(&mut self) -> Result<Vec<T>> {
        let count = self.number()?;
        let bytes = usize::try_from(count).ok().and_then(|count| count.checked_mul(size_of::<T>()));
        Ok(values(self.bytes(bytes.ok_or_else(too_short)?)?))
    }
}

/// The numbers that some bytes are.
///
/// # Panics
/// When the bytes are not a whole number of them.
pub fn values<T: Pod>(bytes: &[u8]) -> Vec<T> {
    bytemuck::pod_collect_to_vec(bytes)
}

fn too_short() -> Error {
    Error::usage(
        "a message between ranks ends before what it should hold",
        "run the same version of this program on every rank",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_read_as_it_was_written_and_a_short_one_is_refused() {
        let bytes = Outgoing::new().number(7).list(&[1.5f32, -2.0]).list::<u8>(&[]).list(&[3u64]).into_bytes();
        let mut incoming = Incoming::new(&bytes);
        assert_eq!(incoming.number().unwrap(), 7);
        assert_eq!(incoming.list::<f32>().unwrap(), [1.5, -2.0]);
        assert!(incoming.list::<u8>().unwrap().is_empty());
        assert_eq!(incoming.list::<u64>().unwrap(), [3]);
        let message = incoming.number().unwrap_err().to_string();
        assert_eq!(
            message,
            "a message between ranks ends before what it should hold; run the same version of this program on every rank"
        );
        let huge = Outgoing::new().number(u64::MAX).into_bytes();
        assert!(Incoming::new(&huge).list::<u32>().is_err());
    }
}
