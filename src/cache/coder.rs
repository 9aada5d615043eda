//! What the codec `compact` knows before it reads a record: the model of [`model`](super::model) and the frequencies
//! of symbols in each context. Made once per cache by [`calibrate`](super::calibrate), stored beside the shards.

use super::bits::{BitReader, BitWriter, width_of};
use super::model::{BUCKETS, CLASSES, Hint, LARGEST_VOCABULARY, LARGEST_WEIGHT, Lists, Model, STRENGTHS, WEIGHTS};
use super::rans::{Table, Tables, get_short, put_short};

/// Contexts of symbols, by the first of each kind.
pub(crate) mod context {
    use super::BUCKETS;
    pub const TOKEN: usize = 0;
    pub const TOKEN_OTHER: usize = TOKEN + 8;
    pub const COUNT: usize = TOKEN_OTHER + 2;
    pub const TOP: usize = COUNT + 22;
    pub const TOP_OTHER: usize = TOP + 3;
    pub const TOP_LEVEL: usize = TOP_OTHER + 1;
    pub const TAIL: usize = TOP_LEVEL + 48;
    pub const TAIL_MORE: usize = TAIL + 17 * 16;
    pub const LABEL: usize = TAIL_MORE + 16;
    pub const GAP: usize = LABEL + 2;
    pub const OUT: usize = GAP + BUCKETS * 16;
    pub const LEVEL: usize = OUT + 16 * 16;
    pub const LEVEL_LAST: usize = LEVEL + (BUCKETS / 2 + 1) * 40;
    pub const COUNT_OF_CONTEXTS: usize = LEVEL_LAST + 80;
    /// Where each kind starts. Rare contexts share one table per kind.
    pub const KINDS: [usize; 13] =
        [TOKEN, TOKEN_OTHER, COUNT, TOP, TOP_OTHER, TOP_LEVEL, TAIL, TAIL_MORE, LABEL, GAP, OUT, LEVEL, LEVEL_LAST];
}

/// Names of the tensors of `coder.safetensors`, all of type U8, in the order of their bytes.
pub(crate) const TENSORS: [&str; 2] = ["model", "tables"];

/// Entries of a list are at most this many, so that a row's candidates are bounded.
pub(crate) const LIST_LENGTH: usize = 256;

/// The frozen knowledge of the codec `compact`.
#[derive(Debug, Clone, PartialEq)]
pub struct Coder {
    pub(crate) model: Model,
    pub(crate) tables: Tables,
}

impl Coder {
    /// Name and bytes of each tensor that stores the coder. Equal coders give equal bytes.
    pub fn to_tensors(&self) -> Vec<(&'static str, Vec<u8>)> {
        let (mut model, mut tables) = (vec![], vec![]);
        let mut bits = BitWriter::new(&mut model);
        write_model(&self.model, &mut bits);
        bits.finish();
        let mut bits = BitWriter::new(&mut tables);
        let count_bits = width_of(self.tables.tables.len() as u64);
        bits.put(self.tables.tables.len() as u64, 16);
        self.tables.by_context.iter().for_each(|table| bits.put(u64::from(*table), count_bits));
        self.tables.tables.iter().for_each(|table| table.write(&mut bits));
        bits.finish();
        vec![(TENSORS[0], model), (TENSORS[1], tables)]
    }

    /// Reads what [`Coder::to_tensors`] gave.
    ///
    /// # Errors
    /// What is wrong with the tensors. Any bytes are read in time and memory bounded by their number and
    /// `vocab_size`.
    pub fn from_tensors(tensor: impl Fn(&str) -> Option<Vec<u8>>, vocab_size: usize) -> Result<Coder, String> {
        let bytes = |name: &str| tensor(name).ok_or_else(|| format!("it has no tensor `{name}`"));
        let model = bytes(TENSORS[0])?;
        let mut bits = BitReader::new(&model);
        let model = read_model(&mut bits, vocab_size)?;
        bits.finish()?;
        let tables = bytes(TENSORS[1])?;
        let mut bits = BitReader::new(&tables);
        let count = bits.get(16) as usize;
        if count == 0 || count > context::COUNT_OF_CONTEXTS + context::KINDS.len() {
            return Err(format!("{count} tables for {} contexts", context::COUNT_OF_CONTEXTS));
        }
        let count_bits = width_of(count as u64);
        let by_context: Vec<u16> = (0..context::COUNT_OF_CONTEXTS).map(|_| bits.get(count_bits) as u16).collect();
        if let Some(table) = by_context.iter().find(|table| **table as usize >= count) {
            return Err(format!("a context uses table {table} of {count}"));
        }
        let tables = (0..count).map(|_| Table::read(&mut bits)).collect::<Result<Vec<_>, _>>()?;
        bits.finish()?;
        Ok(Coder { model, tables: Tables::new(tables, by_context) })
    }
}

/// Writes rising numbers below `limit`: how many, how wide the low bits of gaps are, and the gaps.
fn put_rising(bits: &mut BitWriter<'_>, values: &[u32], limit: usize) {
    bits.put_number(values.len() as u64);
    if values.is_empty() {
        return;
    }
    let gaps = || values.iter().scan(0, |next, value| Some(value - std::mem::replace(next, value + 1)));
    let cost = |low: u32| gaps().map(|gap| u64::from(gap >> low) + 1 + u64::from(low)).sum::<u64>();
    let low = (0..width_of(limit as u64)).min_by_key(|low| (cost(*low), *low)).unwrap_or(0);
    bits.put(u64::from(low), 5);
    for gap in gaps() {
        // High part as so many ones and a zero, then the low bits.
        let mut high = gap >> low;
        while high >= 32 {
            bits.put((1 << 32) - 1, 32);
            high -= 32;
        }
        bits.put((1 << high) - 1, high + 1);
        bits.put(u64::from(gap & ((1 << low) - 1)), low);
    }
}

fn get_rising(bits: &mut BitReader<'_>, limit: usize) -> Result<Vec<u32>, String> {
    let count = bits.number()? as usize;
    if count > limit || count > bits.left()? {
        return Err(format!("{count} numbers below {limit}"));
    }
    let low = if count > 0 { bits.get(5) as u32 } else { 0 };
    let mut values = Vec::with_capacity(count);
    let mut next = 0u64;
    for _ in 0..count {
        let mut high = 0;
        while bits.get(1) == 1 {
            high += 1;
            if high > limit {
                return Err(format!("a number that is not below {limit}"));
            }
        }
        let value = next + ((high as u64) << low | bits.get(low));
        if value >= limit as u64 {
            return Err(format!("a number that is not below {limit}"));
        }
        values.push(value as u32);
        next = value + 1;
    }
    bits.left()?;
    Ok(values)
}

fn write_model(model: &Model, bits: &mut BitWriter<'_>) {
    bits.put_number(model.vocab_size as u64);
    model.weights.iter().for_each(|weight| bits.put(u64::from(*weight as u16), 16));
    // Ids of each class but the last, which has the rest.
    for class in 1..CLASSES as u8 {
        let ids: Vec<u32> = (0..model.vocab_size as u32).filter(|id| model.classes[*id as usize] == class).collect();
        put_rising(bits, &ids, model.vocab_size);
    }
    for lists in [&model.follows, &model.together] {
        let with_list: Vec<u32> = (0..model.vocab_size as u32).filter(|token| !lists.of(*token).is_empty()).collect();
        put_rising(bits, &with_list, model.vocab_size);
        for token in with_list {
            // By place in the order of frequency: small numbers, close to each other.
            let mut hints = lists.of(token).to_vec();
            hints.sort_unstable_by_key(|hint| hint.place());
            let places: Vec<u32> = hints.iter().map(|hint| hint.place()).collect();
            put_rising(bits, &places, model.vocab_size);
            hints.iter().for_each(|hint| put_short(bits, u32::from(hint.strength())));
        }
    }
}

fn read_model(bits: &mut BitReader<'_>, vocab_size: usize) -> Result<Model, String> {
    let stored = bits.number()?;
    if stored != vocab_size as u64 {
        return Err(format!("it is for a vocabulary of {stored}, not {vocab_size}"));
    }
    if vocab_size > LARGEST_VOCABULARY {
        return Err(format!("a vocabulary of {vocab_size}, not at most {LARGEST_VOCABULARY}"));
    }
    let weights: Vec<i16> = (0..WEIGHTS).map(|_| bits.get(16) as u16 as i16).collect();
    // What speaks for a candidate adds up to nine of them, doubled, in 16 bits.
    if let Some(weight) = weights.iter().find(|weight| weight.unsigned_abs() > LARGEST_WEIGHT.unsigned_abs()) {
        return Err(format!("a weight of {weight}"));
    }
    let mut classes = vec![0u8; vocab_size];
    for class in 1..CLASSES as u8 {
        for id in get_rising(bits, vocab_size)? {
            classes[id as usize] = class;
        }
    }
    let mut lists = [Lists::default(), Lists::default()];
    for lists in &mut lists {
        let with_list = get_rising(bits, vocab_size)?;
        lists.starts.push(0);
        for token in with_list {
            lists.starts.resize(token as usize + 1, lists.hints.len() as u32);
            let places = get_rising(bits, vocab_size)?;
            if places.is_empty() || places.len() > LIST_LENGTH {
                return Err(format!("a list of {} ids", places.len()));
            }
            for place in places {
                let strength = get_short(bits);
                if strength as usize >= STRENGTHS {
                    return Err(format!("a strength of {strength}"));
                }
                lists.hints.push(Hint::new(place, strength as u8));
            }
        }
        lists.starts.resize(vocab_size + 1, lists.hints.len() as u32);
    }
    let [follows, together] = lists;
    Ok(Model::new(classes, follows, together, weights))
}
