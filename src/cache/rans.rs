//! An entropy coder of symbols with frozen frequencies (range asymmetric numeral systems, two states in turn).
//!
//! A record's symbols go through two 32-bit states, one symbol each in turn, so that a processor works on both at
//! once. Encoding runs backwards; what leaves a state is 16 bits at a time. The bytes are the two states after the
//! last step, then these words in the order in which decoding wants them. A decoder that has read everything holds
//! the states that encoding began with, which no damaged record does by intention.

use super::bits::{BitReader, BitWriter};

/// Frequencies of a table add up to 2^10: as few as cost next to nothing, so that look-ups stay in a near cache.
pub(crate) const FREQUENCY_BITS: u32 = 10;
const TOTAL: u32 = 1 << FREQUENCY_BITS;
/// States are never below this, between symbols.
const LEAST_STATE: u32 = 1 << 16;
/// Stands for any symbol that a table has no frequency for; the symbol follows as 8 bits.
pub(crate) const ESCAPE: u8 = 255;
/// Raw bits are taken so many at once.
const RAW_BITS: u32 = 16;

/// How probable each symbol is in one context.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Table {
    /// By symbol, in 1024ths; 0 where the symbol is escaped.
    frequencies: [u16; 256],
}

/// A table has at least this many buckets, so that a [`Bucket`] fits 64 bits.
const LEAST_BUCKETS: usize = 16;

/// Some slots in a row, which belong to two symbols at most: the first of them to one, the rest to the other.
///
/// From its lowest bit up, twice: the symbol (8 bits), its frequency (11), and what is added to a slot, modulo the
/// total, for its number among the slots of the symbol (10); then how many slots are the first symbol's (6).
#[derive(Debug, Clone, Copy, PartialEq)]
struct Bucket(u64);

const PART_BITS: u32 = 29;

impl Bucket {
    /// The part of a bucket of `1 << width_bits` slots that `slot` lies in: symbol, frequency, number of the slot.
    #[inline(always)]
    fn find(self, slot: u32, width_bits: u32) -> (u8, u32, u32) {
        let inside = u64::from(slot & ((1 << width_bits) - 1));
        // No branch: which symbol it is is a matter of chance.
        let part = if inside < self.0 >> (2 * PART_BITS) { self.0 } else { self.0 >> PART_BITS } as u32;
        (part as u8, part >> 8 & 0x7ff, (slot + (part >> 19)) & (TOTAL - 1))
    }
}

impl Table {
    /// A table that suits these counts; at least one 1024th is left for what was not counted.
    pub(crate) fn from_counts(counts: &[u32; 256]) -> Table {
        let total: u64 = counts[..255].iter().map(|count| u64::from(*count)).sum();
        let mut frequencies = [0u16; 256];
        let mut left = TOTAL - 1;
        if total > 0 {
            // What is too rare to have a share of its own gets the least one, the most frequent first.
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
        frequencies[ESCAPE as usize] = (1 + left) as u16;
        Table { frequencies }
    }

    /// Gives the slots to the symbols (docs/cache-records.md says how): appends the buckets, and what an encoder looks
    /// up, the slots of each symbol in rising order. Returns the slots of a bucket, as a power of two.
    ///
    /// Each symbol fills its own bucket as far as it goes, and those that have more than a bucket's slots fill up
    /// what is left ("alias method": Walker 1977; in one sweep: Hübschle-Schneider and Sanders 2022).
    fn divide(&self, buckets: &mut Vec<Bucket>, slots: &mut Vec<u16>) -> u32 {
        let symbols: Vec<usize> = (0..256).filter(|symbol| self.frequencies[*symbol] > 0).collect();
        let count = symbols.len().next_power_of_two().max(LEAST_BUCKETS);
        let width_bits = FREQUENCY_BITS - count.ilog2();
        let width = 1u32 << width_bits;
        let frequency = |place: usize| symbols.get(place).map_or(0, |symbol| u32::from(self.frequencies[*symbol]));
        // By bucket: the slots of its own symbol, and whose the others are.
        let mut owned: Vec<(u32, usize)> = (0..count).map(|place| (frequency(place).min(width), place)).collect();
        let mut light = (0..count).filter(|place| frequency(*place) <= width);
        let mut heavy = (0..count).filter(|place| frequency(*place) > width);
        let mut current = heavy.next();
        let mut left = current.map_or(0, frequency);
        while let Some(place) = current {
            if left > width {
                // Frequencies add up to all slots: where one has too many, another has too few.
                let Some(light) = light.next() else { break };
                owned[light].1 = place;
                left -= width - owned[light].0;
            } else {
                current = heavy.next();
                owned[place] = (left, current.unwrap_or(place));
                left = (left + current.map_or(0, frequency)).saturating_sub(width);
            }
        }
        let mut of_symbol: Vec<Vec<u16>> = vec![vec![]; symbols.len()];
        for (place, &(own, other)) in owned.iter().enumerate() {
            let first = place as u32 * width;
            let mut part = |owner: usize, start: u32, end: u32| {
                let Some(symbol) = symbols.get(owner).filter(|_| start < end) else { return 0 };
                let before = of_symbol[owner].len() as u32;
                of_symbol[owner].extend((start..end).map(|slot| slot as u16));
                let shift = before.wrapping_sub(start) & (TOTAL - 1);
                *symbol as u64 | u64::from(frequency(owner)) << 8 | u64::from(shift) << 19
            };
            let own_part = part(place, first, first + own);
            let other_part = part(other, first + own, first + width);
            // A bucket that is one symbol's alone is all rest.
            let (own, other_part) = if own == width { (0, own_part) } else { (own, other_part) };
            buckets.push(Bucket(own_part | other_part << PART_BITS | u64::from(own) << (2 * PART_BITS)));
        }
        slots.extend(of_symbol.into_iter().flatten());
        width_bits
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
        // At least one: each frequency was below what was left.
        frequencies[ESCAPE as usize] = left as u16;
        Ok(Table { frequencies })
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
    steps: Vec<Step>,
}

enum Step {
    /// The symbol whose slots begin there.
    Symbol {
        slots: u32,
        frequency: u16,
    },
    Raw {
        value: u16,
        bits: u8,
    },
}

/// Tables, and which of them each context uses.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tables {
    pub tables: Vec<Table>,
    pub by_context: Vec<u16>,
    buckets: Vec<Bucket>,
    /// By context: the first bucket of its table, and below it in 4 bits the slots of a bucket, as a power of two.
    finders: Vec<u32>,
    /// By table, symbol and number: a slot of the symbol.
    slots: Vec<u16>,
    /// By table and symbol: where the slots of the symbol begin in `slots`.
    slot_starts: Vec<[u32; 256]>,
}

impl Tables {
    pub(crate) fn new(tables: Vec<Table>, by_context: Vec<u16>) -> Tables {
        let (mut buckets, mut slots, mut by_table, mut slot_starts) = (vec![], vec![], vec![], vec![]);
        for table in &tables {
            let (first, mut start) = (buckets.len() as u32, slots.len() as u32);
            slot_starts.push(table.frequencies.map(|frequency| {
                start += u32::from(frequency);
                start - u32::from(frequency)
            }));
            by_table.push(first << 4 | table.divide(&mut buckets, &mut slots));
        }
        let finders = by_context.iter().map(|table| by_table[*table as usize]).collect();
        Tables { tables, by_context, buckets, finders, slots, slot_starts }
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
        let table = self.tables.by_context[context] as usize;
        let frequencies = &self.tables.tables[table].frequencies;
        let escaped = symbol == ESCAPE || frequencies[symbol as usize] == 0;
        let place = if escaped { ESCAPE } else { symbol } as usize;
        let slots = self.tables.slot_starts[table][place];
        self.steps.push(Step::Symbol { slots, frequency: frequencies[place] });
        if escaped {
            self.raw(u32::from(symbol), 8);
        }
    }

    fn raw(&mut self, value: u32, bits: u32) {
        debug_assert!(bits == 32 || value >> bits == 0);
        let (mut value, mut left) = (value, bits);
        while left > 0 {
            let bits = left.min(RAW_BITS);
            self.steps.push(Step::Raw { value: (value & ((1 << bits) - 1)) as u16, bits: bits as u8 });
            value >>= bits;
            left -= bits;
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
        for (number, step) in self.steps.iter().enumerate().rev() {
            let state = &mut states[number & 1];
            // States from here on have no room for the step.
            let border = match step {
                Step::Symbol { frequency, .. } => u64::from(*frequency) << (32 - FREQUENCY_BITS),
                Step::Raw { bits, .. } => 1 << (32 - bits),
            };
            if u64::from(*state) >= border {
                words.push(*state as u16);
                *state >>= 16;
            }
            *state = match *step {
                Step::Symbol { slots, frequency } => {
                    let frequency = u32::from(frequency);
                    let slot = self.tables.slots[(slots + *state % frequency) as usize];
                    ((*state / frequency) << FREQUENCY_BITS) + u32::from(slot)
                }
                Step::Raw { value, bits } => *state << bits | u32::from(value),
            };
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
    buckets: &'a [Bucket],
    finders: &'a [u32],
    words: &'a [[u8; 2]],
    /// Bytes after the last word.
    odd: usize,
    place: usize,
    /// The state of the next symbol, and the other.
    state: u32,
    other: u32,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(tables: &'a Tables, bytes: &'a [u8]) -> Result<Self, String> {
        let state = |place: usize| bytes.get(place..place + 4).and_then(<[u8]>::first_chunk).copied();
        match (state(0), state(4)) {
            (Some(state), Some(other)) => {
                let (words, odd) = bytes[8..].as_chunks();
                Ok(Decoder {
                    buckets: &tables.buckets,
                    finders: &tables.finders,
                    words,
                    odd: odd.len(),
                    place: 0,
                    state: u32::from_le_bytes(state),
                    other: u32::from_le_bytes(other),
                })
            }
            _ => Err(format!("{} bytes are no record", bytes.len())),
        }
    }

    /// The other state is next; this one takes a word if it is short of bits.
    #[inline(always)]
    fn turn(&mut self, state: u32) {
        let word = self.words.get(self.place).map_or(0, |word| u32::from(u16::from_le_bytes(*word)));
        // No branch: which symbol needs the next word is a matter of chance.
        let short = state < LEAST_STATE;
        self.place += usize::from(short);
        self.state = std::mem::replace(&mut self.other, if short { state << 16 | word } else { state });
    }

    #[inline(always)]
    pub(crate) fn symbol(&mut self, context: usize) -> u8 {
        let finder = self.finders[context];
        let (slot, width_bits) = (self.state & (TOTAL - 1), finder & 0xf);
        let bucket = self.buckets[(finder >> 4) as usize + (slot >> width_bits) as usize];
        let (symbol, frequency, number) = bucket.find(slot, width_bits);
        // Wraps only in damaged records.
        self.turn(frequency.wrapping_mul(self.state >> FREQUENCY_BITS).wrapping_add(number));
        if symbol == ESCAPE { self.raw(8) as u8 } else { symbol }
    }

    #[inline(always)]
    pub(crate) fn raw(&mut self, bits: u32) -> u32 {
        if bits <= RAW_BITS {
            return self.raw_part(bits);
        }
        let low = self.raw_part(RAW_BITS);
        low | self.raw_part(bits - RAW_BITS) << RAW_BITS
    }

    #[inline(always)]
    fn raw_part(&mut self, bits: u32) -> u32 {
        if bits == 0 {
            return 0;
        }
        let value = self.state & ((1 << bits) - 1);
        self.turn(self.state >> bits);
        value
    }

    /// Whether more was read than there is. Loops whose length a record names ask this now and then.
    pub(crate) fn overran(&self) -> bool {
        self.place > self.words.len()
    }

    /// Refuses a stream that was not read exactly to its end.
    pub(crate) fn finish(&self) -> Result<(), String> {
        if self.place != self.words.len() || self.odd > 0 {
            let length = 8 + 2 * self.words.len() + self.odd;
            return Err(format!("{} of its {length} bytes were read", 8 + 2 * self.place));
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

    #[test]
    fn each_slot_is_the_symbols_that_the_documentation_gives_it_to() {
        // 16 buckets of 64 slots. Frequencies: symbol 3 has 700, 5 has 20, 9 has 64, and the escape 240.
        let mut frequencies = [0; 256];
        (frequencies[3], frequencies[5], frequencies[9], frequencies[255]) = (700, 20, 64, 240);
        let (mut buckets, mut slots) = (vec![], vec![]);
        let width_bits = Table { frequencies }.divide(&mut buckets, &mut slots);
        assert_eq!((width_bits, buckets.len(), slots.len()), (6, 16, 1024));
        let found: Vec<_> = (0..1024).map(|slot| buckets[slot as usize >> 6].find(slot, 6)).collect();
        // 3 fills up the buckets of 5 and, in turn, of nobody; 9 needs no help.
        assert_eq!(found[0], (3, 700, 0));
        assert_eq!((found[64].0, found[83].0, found[84].0), (5, 5, 3));
        assert!(found[128..192].iter().all(|found| found.0 == 9));
        let mut numbers = [0; 256];
        for (slot, (symbol, frequency, number)) in found.into_iter().enumerate() {
            let place = symbol as usize;
            assert_eq!((frequency, number), (u32::from(frequencies[place]), numbers[place]), "slot {slot}");
            let start: u16 = frequencies[..place].iter().sum();
            assert_eq!(slots[usize::from(start) + number as usize], slot as u16);
            numbers[place] += 1;
        }
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
