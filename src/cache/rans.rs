//! An entropy coder of symbols with frozen frequencies (range asymmetric numeral systems, two states in turn).
//!
//! A record's symbols go through two 32-bit states, one symbol each in turn, so that a processor works on both at
//! once. Encoding runs backwards; what leaves a state is 16 bits at a time. The bytes are the two states after the
//! last step, then these words in the order in which decoding wants them. A decoder that has read everything holds
//! the states that encoding began with, which no damaged record does by intention.

use super::bits::{BitReader, BitWriter};

/// Frequencies of a table add up to 2^11.
pub(crate) const FREQUENCY_BITS: u32 = 11;
const TOTAL: u32 = 1 << FREQUENCY_BITS;
/// States are never below this, between symbols.
const LEAST_STATE: u32 = 1 << 16;
/// Stands for any symbol that a table has no frequency for; the symbol follows as 8 bits.
pub(crate) const ESCAPE: u8 = 255;

/// How probable each symbol is in one context.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Table {
    /// By symbol, in 2048ths; 0 where the symbol is escaped.
    frequencies: [u16; 256],
    starts: [u16; 256],
}

/// Cells of equal size into which a table's total is divided for look-ups.
const CELLS: usize = 256;
const CELL_BITS: u32 = FREQUENCY_BITS - 8;

impl Table {
    /// A table that suits these counts; at least one 2048th is left for what was not counted.
    pub(crate) fn from_counts(counts: &[u32; 256]) -> Table {
        let total: u64 = counts[..255].iter().map(|count| u64::from(*count)).sum();
        let mut frequencies = [0u16; 256];
        frequencies[ESCAPE as usize] = 1;
        let mut left = TOTAL - 1;
        if total > 0 {
            // Symbols of less than half a 2048th are escaped, unless the total is so small that this says nothing.
            let share = |count: u32| (u64::from(count) * u64::from(TOTAL - 1) / total) as u32;
            let mut order: Vec<usize> = (0..255).filter(|symbol| counts[*symbol] > 0).collect();
            order.sort_by_key(|symbol| (std::cmp::Reverse(counts[*symbol]), *symbol));
            order.truncate(200);
            for &symbol in &order {
                let frequency = share(counts[symbol]).max(1).min(left);
                frequencies[symbol] = frequency as u16;
                left -= frequency;
            }
            // Rounding leaves some: to the most frequent, in proportion.
            for &symbol in order.iter().cycle().take(order.len() * 4) {
                let more = left.min(u32::from(frequencies[symbol]) / 64 + 1);
                frequencies[symbol] += more as u16;
                left -= more;
            }
        }
        frequencies[ESCAPE as usize] += left as u16;
        Table::from_frequencies(frequencies).expect("frequencies add up")
    }

    fn from_frequencies(frequencies: [u16; 256]) -> Option<Table> {
        let total: u32 = frequencies.iter().map(|frequency| u32::from(*frequency)).sum();
        if total != TOTAL || frequencies[ESCAPE as usize] == 0 {
            return None;
        }
        let mut starts = [0; 256];
        let mut start = 0;
        for symbol in 0..256 {
            starts[symbol] = start;
            start += frequencies[symbol];
        }
        Some(Table { frequencies, starts })
    }

    /// Appends what a decoder looks symbols up in: for each cell the first entry that reaches into it, a byte each;
    /// then the entries (symbol, frequency << 8, start << 20) and one that ends them. All hot tables of a coder
    /// together should fit a processor's near cache, so they are small rather than direct.
    fn append_lookup(&self, lookup: &mut Vec<u32>) {
        let present = || (0..256).filter(|symbol| self.frequencies[*symbol] > 0);
        let mut cells = [0u8; CELLS];
        for (entry, symbol) in present().enumerate() {
            let end = self.starts[symbol] + self.frequencies[symbol];
            // Cells whose first place lies in this symbol.
            let first = (u32::from(self.starts[symbol])).div_ceil(1 << CELL_BITS);
            for cell in first..u32::from(end).div_ceil(1 << CELL_BITS) {
                cells[cell as usize] = entry as u8;
            }
        }
        lookup.extend(cells.chunks_exact(4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]])));
        lookup.extend(present().map(|symbol| {
            symbol as u32 | u32::from(self.frequencies[symbol]) << 8 | u32::from(self.starts[symbol]) << 20
        }));
        lookup.push(TOTAL << 20);
    }

    /// Writes the frequencies: number of symbols, then gap of each to the one before and its frequency.
    pub(crate) fn write(&self, bits: &mut BitWriter<'_>) {
        let symbols: Vec<usize> = (0..255).filter(|symbol| self.frequencies[*symbol] > 0).collect();
        bits.put(symbols.len() as u64, 8);
        let mut next = 0;
        for symbol in symbols {
            put_short(bits, (symbol - next) as u32);
            put_short(bits, u32::from(self.frequencies[symbol]) - 1);
            next = symbol + 1;
        }
    }

    pub(crate) fn read(bits: &mut BitReader<'_>) -> Result<Table, String> {
        let mut frequencies = [0u16; 256];
        let mut left = TOTAL;
        let mut next = 0;
        for _ in 0..bits.get(8) {
            let symbol = next + get_short(bits) as usize;
            let frequency = get_short(bits) + 1;
            if symbol >= ESCAPE as usize || frequency >= left {
                return Err("a table of frequencies that do not add up".into());
            }
            frequencies[symbol] = frequency as u16;
            left -= frequency;
            next = symbol + 1;
        }
        frequencies[ESCAPE as usize] = left as u16;
        Table::from_frequencies(frequencies).ok_or_else(|| "a table of frequencies that do not add up".into())
    }
}

/// A number below 4096: its length in bits as 4 bits, then the number without its highest bit.
pub(crate) fn put_short(bits: &mut BitWriter<'_>, value: u32) {
    let length = 31 - (value + 1).leading_zeros();
    bits.put(u64::from(length), 4);
    bits.put(u64::from(value + 1 - (1 << length)), length);
}

pub(crate) fn get_short(bits: &mut BitReader<'_>) -> u32 {
    let length = bits.get(4) as u32;
    (1 << length) + bits.get(length) as u32 - 1
}

/// Where an encoder puts its symbols: into a stream, or into the counts that tables are made of.
pub(crate) trait Sink {
    /// One symbol (not [`ESCAPE`]) in a context.
    fn symbol(&mut self, context: usize, symbol: u8);
    /// Bits that are as good as random.
    fn raw(&mut self, value: u32, bits: u32);
}

/// Collects a record's symbols, then encodes them.
pub(crate) struct Encoder<'a> {
    tables: &'a Tables,
    /// Start and frequency of each step.
    steps: Vec<(u16, u16)>,
}

/// Tables, and which of them each context uses.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tables {
    pub tables: Vec<Table>,
    pub by_context: Vec<u16>,
    lookup: Vec<u32>,
    /// By context, where its table starts in `lookup`.
    lookup_starts: Vec<u32>,
}

impl Tables {
    pub(crate) fn new(tables: Vec<Table>, by_context: Vec<u16>) -> Tables {
        let mut lookup = vec![];
        let mut starts = vec![];
        for table in &tables {
            starts.push(lookup.len() as u32);
            table.append_lookup(&mut lookup);
        }
        let lookup_starts = by_context.iter().map(|table| starts[*table as usize]).collect();
        Tables { tables, by_context, lookup, lookup_starts }
    }

    /// What a symbol costs, in bits; for reports only.
    pub(crate) fn cost(&self, context: usize, symbol: u8) -> f64 {
        let frequencies = &self.tables[self.by_context[context] as usize].frequencies;
        let bits = |frequency: u16| f64::from(FREQUENCY_BITS) - f64::from(frequency).log2();
        match frequencies[symbol as usize] {
            0 => bits(frequencies[ESCAPE as usize]) + 8.0,
            frequency => bits(frequency),
        }
    }
}

impl Sink for Encoder<'_> {
    fn symbol(&mut self, context: usize, symbol: u8) {
        let table = &self.tables.tables[self.tables.by_context[context] as usize];
        let place = symbol as usize;
        if symbol == ESCAPE || table.frequencies[place] == 0 {
            let place = ESCAPE as usize;
            self.steps.push((table.starts[place], table.frequencies[place]));
            self.raw(u32::from(symbol), 8);
        } else {
            self.steps.push((table.starts[place], table.frequencies[place]));
        }
    }

    fn raw(&mut self, value: u32, bits: u32) {
        debug_assert!(bits == 32 || value >> bits == 0);
        let (mut value, mut bits) = (value, bits);
        while bits > 0 {
            let part = bits.min(FREQUENCY_BITS);
            let free = FREQUENCY_BITS - part;
            self.steps.push((((value & ((1 << part) - 1)) << free) as u16, 1 << free));
            value >>= part;
            bits -= part;
        }
    }
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(tables: &'a Tables) -> Self {
        Encoder { tables, steps: vec![] }
    }

    /// Appends the stream.
    pub(crate) fn finish(self, out: &mut Vec<u8>) {
        let mut states = [LEAST_STATE; 2];
        let mut words = vec![];
        for (number, &(start, frequency)) in self.steps.iter().enumerate().rev() {
            let state = &mut states[number & 1];
            let frequency = u32::from(frequency);
            // A frequency is below the total, so this border fits 32 bits.
            if u64::from(*state) >= u64::from(frequency) << (32 - FREQUENCY_BITS) {
                words.push(*state as u16);
                *state >>= 16;
            }
            *state = ((*state / frequency) << FREQUENCY_BITS) + *state % frequency + u32::from(start);
        }
        for state in states {
            out.extend_from_slice(&state.to_le_bytes());
        }
        for word in words.iter().rev() {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }
}

/// Reads what an [`Encoder`] wrote. On any bytes it gives some symbols; [`Decoder::finish`] says whether all was well.
#[derive(Clone)]
pub(crate) struct Decoder<'a> {
    lookup: &'a [u32],
    lookup_starts: &'a [u32],
    words: &'a [u8],
    place: usize,
    /// The state of the next symbol, and the other.
    state: u32,
    other: u32,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(tables: &'a Tables, bytes: &'a [u8]) -> Result<Self, String> {
        let state = |place: usize| bytes.get(place..place + 4).and_then(<[u8]>::first_chunk).copied();
        match (state(0), state(4)) {
            (Some(state), Some(other)) => Ok(Decoder {
                lookup: &tables.lookup,
                lookup_starts: &tables.lookup_starts,
                words: &bytes[8..],
                place: 0,
                state: u32::from_le_bytes(state),
                other: u32::from_le_bytes(other),
            }),
            _ => Err(format!("{} bytes are no record", bytes.len())),
        }
    }

    #[inline(always)]
    fn advance(&mut self, frequency: u32, place: u32) {
        // Wraps only in damaged records.
        let state = frequency.wrapping_mul(self.state >> FREQUENCY_BITS).wrapping_add(place);
        let word = match self.words.get(self.place..self.place + 2) {
            Some(word) => u32::from(u16::from_le_bytes([word[0], word[1]])),
            None => 0,
        };
        // No branch: which symbol needs the next word is a matter of chance.
        let short = state < LEAST_STATE;
        self.place += 2 * usize::from(short);
        let state = if short { state << 16 | word } else { state };
        self.state = self.other;
        self.other = state;
    }

    #[inline(always)]
    pub(crate) fn symbol(&mut self, context: usize) -> u8 {
        let table = &self.lookup[self.lookup_starts[context] as usize..];
        let slot = self.state & (TOTAL - 1);
        let cell = (slot >> CELL_BITS) as usize;
        let mut place = CELLS / 4 + (table[cell / 4] >> (8 * (cell & 3)) & 0xff) as usize;
        while table[place + 1] >> 20 <= slot {
            place += 1;
        }
        let entry = table[place];
        self.advance(entry >> 8 & 0xfff, slot - (entry >> 20));
        if entry as u8 == ESCAPE { self.raw(8) as u8 } else { entry as u8 }
    }

    #[inline(always)]
    pub(crate) fn raw(&mut self, bits: u32) -> u32 {
        let (mut value, mut got) = (0, 0);
        while got < bits {
            let part = (bits - got).min(FREQUENCY_BITS);
            let slot = self.state & (TOTAL - 1);
            let free = FREQUENCY_BITS - part;
            value |= slot >> free << got;
            self.advance(1 << free, slot & ((1 << free) - 1));
            got += part;
        }
        value
    }

    /// Whether more was read than there is. Loops whose length a record names ask this now and then.
    pub(crate) fn overran(&self) -> bool {
        self.place > self.words.len()
    }

    /// Refuses a stream that was not read exactly to its end.
    pub(crate) fn finish(&self) -> Result<(), String> {
        if self.place != self.words.len() {
            return Err(format!("{} of its {} bytes were read", self.place + 8, self.words.len() + 8));
        }
        let ended = self.state == LEAST_STATE && self.other == LEAST_STATE;
        if ended { Ok(()) } else { Err("its end does not agree with its content".into()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(counts: &[u32]) -> Table {
        let mut all = [0; 256];
        all[..counts.len()].copy_from_slice(counts);
        Table::from_counts(&all)
    }

    proptest! {
        #[test]
        fn symbols_and_raw_bits_come_back(
            counts in prop::collection::vec(prop::collection::vec(0u32..5000, 0..255), 1..4),
            symbols in prop::collection::vec((any::<u8>(), any::<u32>(), 0u32..=32), 0..300),
        ) {
            let tables =
                Tables::new(counts.iter().map(|counts| table(counts)).collect(), (0..counts.len() as u16).collect());
            let mut encoder = Encoder::new(&tables);
            for (place, &(symbol, value, bits)) in symbols.iter().enumerate() {
                encoder.symbol(place % counts.len(), symbol);
                encoder.raw((u64::from(value) & ((1u64 << bits) - 1)) as u32, bits);
            }
            let mut bytes = vec![];
            encoder.finish(&mut bytes);
            let mut decoder = Decoder::new(&tables, &bytes).unwrap();
            for (place, &(symbol, value, bits)) in symbols.iter().enumerate() {
                prop_assert_eq!(decoder.symbol(place % counts.len()), symbol);
                prop_assert_eq!(u64::from(decoder.raw(bits)), u64::from(value) & ((1u64 << bits) - 1));
            }
            prop_assert_eq!(decoder.finish(), Ok(()));
        }

        #[test]
        fn tables_come_back(counts in prop::collection::vec(0u32..100_000, 0..255)) {
            let table = table(&counts);
            let mut bytes = vec![];
            let mut bits = BitWriter::new(&mut bytes);
            table.write(&mut bits);
            bits.finish();
            prop_assert_eq!(Table::read(&mut BitReader::new(&bytes)), Ok(table));
        }

        #[test]
        fn any_bytes_are_a_table_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Table::read(&mut BitReader::new(&bytes));
        }
    }
}
