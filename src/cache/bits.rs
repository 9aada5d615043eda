//! Streams of bit fields, least significant bit first. Knows nothing of what the fields mean.
//!
//! Field after field fills a byte from its lowest bit up; a field that crosses a byte continues in the next one's
//! lowest bit. So the stream is one little-endian number, and its first field is that number's low bits.

/// Fields have at most this many bits.
pub(crate) const MAX_FIELD_BITS: u32 = 56;

/// Number of bits that hold any of `count` values.
pub(crate) fn width_of(count: u64) -> u32 {
    64 - count.saturating_sub(1).leading_zeros()
}

/// Appends bit fields to bytes.
pub(crate) struct BitWriter<'a> {
    out: &'a mut Vec<u8>,
    pending: u64,
    pending_bits: u32,
}

impl<'a> BitWriter<'a> {
    pub(crate) fn new(out: &'a mut Vec<u8>) -> Self {
        BitWriter { out, pending: 0, pending_bits: 0 }
    }

    pub(crate) fn put(&mut self, value: u64, bits: u32) {
        debug_assert!(bits <= MAX_FIELD_BITS && value >> bits == 0);
        self.pending |= value << self.pending_bits;
        self.pending_bits += bits;
        while self.pending_bits >= 8 {
            self.out.push(self.pending as u8);
            self.pending >>= 8;
            self.pending_bits -= 8;
        }
    }

    /// A number of any size: its length in bits less one as 6 bits, then the number without its highest bit.
    pub(crate) fn put_number(&mut self, value: u64) {
        let (value, length) = (value + 1, 63 - (value + 1).leading_zeros());
        self.put(u64::from(length), 6);
        self.put(value & ((1 << length) - 1), length);
    }

    /// Fills the last byte with zeros.
    pub(crate) fn finish(mut self) {
        if self.pending_bits > 0 {
            self.put(0, 8 - self.pending_bits);
        }
    }
}

/// Reads bit fields; past the end it reads zeros and remembers that it did.
pub(crate) struct BitReader<'a> {
    bytes: &'a [u8],
    bit: usize,
}

impl<'a> BitReader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        BitReader { bytes, bit: 0 }
    }

    #[inline(always)]
    pub(crate) fn get(&mut self, bits: u32) -> u64 {
        let value = field_at(self.bytes, self.bit, bits);
        self.bit += bits as usize;
        value
    }

    /// The next fields of equal width, read without waiting for one another and without going past them.
    #[inline(always)]
    pub(crate) fn peek(&self, bits: u32, count: usize) -> impl Iterator<Item = u64> {
        let (bytes, first) = (self.bytes, self.bit);
        (0..count).map(move |place| field_at(bytes, first + place * bits as usize, bits))
    }

    /// Goes past fields that [`peek`](Self::peek) gave.
    pub(crate) fn skip(&mut self, bits: u32, count: usize) {
        self.bit += bits as usize * count;
    }

    /// What [`BitWriter::put_number`] wrote. At most 2^40: nothing counted in a record is larger.
    pub(crate) fn number(&mut self) -> Result<u64, String> {
        let length = self.get(6) as u32;
        if length > 40 {
            return Err(format!("a number of {length} bits"));
        }
        Ok(((1 << length) | self.get(length)) - 1)
    }

    /// Bits that were not read yet; an error when more were read than there are.
    pub(crate) fn left(&self) -> Result<usize, String> {
        (self.bytes.len() * 8).checked_sub(self.bit).ok_or_else(|| "it ends in the middle of a field".into())
    }

    /// Refuses bytes after the last field, and bits other than zero that fill it.
    pub(crate) fn finish(mut self) -> Result<(), String> {
        let left = self.left()?;
        if left >= 8 {
            return Err(format!("{} bytes are left over", left / 8));
        }
        if self.get(left as u32) == 0 { Ok(()) } else { Err("its last bits are not zero".into()) }
    }
}

/// The field that begins at a bit; zeros past the end.
#[inline(always)]
fn field_at(bytes: &[u8], bit: usize, bits: u32) -> u64 {
    debug_assert!(bits <= MAX_FIELD_BITS);
    let byte = bit >> 3;
    let word = match bytes.get(byte..byte.wrapping_add(8)).and_then(<[u8]>::first_chunk) {
        Some(chunk) => u64::from_le_bytes(*chunk),
        None => last_word(bytes, byte),
    };
    (word >> (bit & 7)) & ((1 << bits) - 1)
}

#[cold]
#[inline(never)]
fn last_word(bytes: &[u8], byte: usize) -> u64 {
    let rest = bytes.get(byte..).unwrap_or(&[]);
    let mut word = [0; 8];
    let length = rest.len().min(8);
    word[..length].copy_from_slice(&rest[..length]);
    u64::from_le_bytes(word)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_width_holds_exactly_its_count() {
        assert_eq!([1, 2, 3, 64, 65, 49_152, 202_048].map(width_of), [0, 1, 2, 6, 7, 16, 18]);
    }

    #[test]
    fn what_is_missing_or_left_over_is_refused() {
        let mut reader = BitReader::new(&[0xff]);
        assert_eq!((reader.get(5), reader.get(5)), (31, 7));
        assert_eq!(reader.left().unwrap_err(), "it ends in the middle of a field");
        let mut reader = BitReader::new(&[0x0f, 0, 0]);
        reader.get(4);
        assert_eq!(reader.finish().unwrap_err(), "2 bytes are left over");
        let mut reader = BitReader::new(&[0xff]);
        reader.get(4);
        assert_eq!(reader.finish().unwrap_err(), "its last bits are not zero");
    }

    proptest! {
        #[test]
        fn fields_come_back(fields in prop::collection::vec((any::<u64>(), 0u32..=MAX_FIELD_BITS), 0..100)) {
            let mut bytes = vec![];
            let mut writer = BitWriter::new(&mut bytes);
            let fields: Vec<_> = fields.into_iter().map(|(value, bits)| (value & ((1 << bits) - 1), bits)).collect();
            for &(value, bits) in &fields {
                writer.put(value, bits);
                writer.put_number(value & 0xff_ffff);
            }
            writer.finish();
            let mut reader = BitReader::new(&bytes);
            for &(value, bits) in &fields {
                prop_assert_eq!(reader.get(bits), value);
                prop_assert_eq!(reader.number(), Ok(value & 0xff_ffff));
            }
            prop_assert_eq!(reader.finish(), Ok(()));
        }
    }
}
