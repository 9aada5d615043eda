//! The walk over a sequence that is both halves of the codec `compact`: each step names a symbol and the context it is
//! expected in, and either puts the symbol into the stream or takes it from there. So reading and writing cannot
//! disagree. It is written down in docs/cache-records.md.

use super::coder::context;
use super::model::{BUCKETS, Candidate, History, Known, Model, NUMBER_CLASSES, Ranker, class_of, of_class};
use super::quantizer::{RowKind, TAIL_CODES};
use super::rans::{Decoder, Sink};
use super::record::{QuantisedRow, RecordShape};

/// Symbols beside the classes of numbers.
const NOT_LISTED: u8 = 200;
const AS_BEFORE: u8 = 201;
const NOT_RANKED: u8 = 200;
const TOP_IS_LABEL: u8 = 210;
const TOP_AS_BEFORE: u8 = 211;
const LABEL_FAR: u8 = 254;

/// Fixed point of squared levels: 16ths.
const SQUARE: f64 = 16.0;

/// Room that is kept from sequence to sequence.
pub(crate) struct Workspace {
    pub(super) history: History,
    ranker: Ranker,
    /// By id, when writing: one more than the place of the id in its row.
    kept: Vec<u32>,
    pub(super) row: QuantisedRow,
    keys: Vec<u64>,
}

impl Workspace {
    pub(crate) fn new(vocab_size: usize) -> Self {
        Workspace {
            history: History::new(vocab_size),
            ranker: Ranker::new(vocab_size),
            kept: vec![0; vocab_size],
            row: QuantisedRow::default(),
            keys: vec![],
        }
    }
}

/// What the walk needs of a row's numbers, by level and by tail.
pub(super) struct Scale {
    /// Square of a level, in 16ths; 0 for halvings and drawn ids.
    squares: Vec<u32>,
    /// What a tail leaves, as a squared level in 16ths.
    masses: Vec<i64>,
    /// Place of a level in the order of decoding.
    order: Vec<u16>,
    by_order: Vec<u16>,
    strong: Vec<bool>,
    /// Whether levels are numbers of draws, written by their class.
    counts: bool,
    /// The least level.
    least: u32,
}

impl Scale {
    pub(super) fn new(shape: &RecordShape) -> Scale {
        let quantiser = &shape.quantiser;
        let levels = 0..quantiser.level_count() as u16;
        let steps = u32::from(quantiser.steps);
        let direct = |level: u16| {
            let sampled = matches!(quantiser.kind, RowKind::Sampled { .. });
            if sampled || u32::from(level) > steps { 0 } else { u32::from(level) }
        };
        let mut by_order: Vec<u16> = levels.clone().collect();
        by_order.sort_by(|left, right| quantiser.above(*left, *right).then(left.cmp(right)));
        let mut order = vec![0; by_order.len()];
        by_order.iter().enumerate().for_each(|(place, level)| order[*level as usize] = place as u16);
        let whole = SQUARE * f64::from(steps) * f64::from(steps);
        let masses = (0..TAIL_CODES).map(|code| (quantiser.mass(code as u8) * whole) as i64).collect();
        Scale {
            squares: levels.clone().map(|level| 16 * direct(level) * direct(level)).collect(),
            masses,
            order,
            by_order,
            strong: levels
                .map(|level| match quantiser.kind {
                    RowKind::Sampled { .. } => level > 1,
                    _ => 10 * direct(level) > steps,
                })
                .collect(),
            counts: matches!(quantiser.kind, RowKind::Sampled { .. }),
            least: u32::from(!matches!(quantiser.kind, RowKind::ThresholdSampled { .. })),
        }
    }

    #[inline(always)]
    fn has(&self, level: u32) -> bool {
        level >= self.least && (level as usize) < self.squares.len()
    }
}

/// One direction of the walk.
pub(super) trait Direction {
    const WRITES: bool;
    /// When writing, `symbol` is written and given back; when reading it is ignored.
    fn symbol(&mut self, context: usize, symbol: u8) -> u8;
    fn raw(&mut self, value: u32, bits: u32) -> u32;
    fn overran(&self) -> bool;
    /// Does something with a copy of this direction that is kept in registers, if that is possible, and goes on from where
    /// the copy came to.
    fn as_local<R>(&mut self, something: impl FnOnce(&mut Self) -> R) -> R;

    /// A number by its class.
    #[inline(always)]
    fn number(&mut self, context: usize, value: u32) -> u32 {
        let class = self.symbol(context, class_of(value).0);
        self.rest(class, value)
    }

    /// The rest of a number whose class is known.
    #[inline(always)]
    fn rest(&mut self, class: u8, value: u32) -> u32 {
        let (least, bits) = of_class(class.min(NUMBER_CLASSES - 1));
        if bits == 0 { least } else { least + self.raw(value.wrapping_sub(least), bits) }
    }
}

pub(super) struct Writing<S>(pub S);

impl<S: Sink> Direction for Writing<S> {
    const WRITES: bool = true;
    fn symbol(&mut self, context: usize, symbol: u8) -> u8 {
        self.0.symbol(context, symbol);
        symbol
    }
    fn raw(&mut self, value: u32, bits: u32) -> u32 {
        self.0.raw(value, bits);
        value
    }
    fn overran(&self) -> bool {
        false
    }
    fn as_local<R>(&mut self, something: impl FnOnce(&mut Self) -> R) -> R {
        something(self)
    }
}

pub(super) struct Reading<'a>(pub Decoder<'a>);

impl Direction for Reading<'_> {
    const WRITES: bool = false;
    #[inline(always)]
    fn symbol(&mut self, context: usize, _: u8) -> u8 {
        self.0.symbol(context)
    }
    #[inline(always)]
    fn raw(&mut self, _: u32, bits: u32) -> u32 {
        self.0.raw(bits)
    }
    fn overran(&self) -> bool {
        self.0.overran()
    }
    #[inline(always)]
    fn as_local<R>(&mut self, something: impl FnOnce(&mut Self) -> R) -> R {
        let mut local = Reading(self.0.clone());
        let made = something(&mut local);
        self.0 = local.0;
        made
    }
}

/// The walk over one sequence.
pub(super) struct Walk<'a, D> {
    pub direction: D,
    pub model: &'a Model,
    pub shape: &'a RecordShape,
    pub scale: &'a Scale,
    pub space: &'a mut Workspace,
    /// What is wrong with the record. Looked at after each row: the steps themselves go on with something harmless.
    pub fault: Option<String>,
}

impl<D: Direction> Walk<'_, D> {
    #[cold]
    fn wrong(&mut self, fault: String) {
        self.fault.get_or_insert(fault);
    }

    pub(super) fn checked(&mut self) -> Result<(), String> {
        match self.fault.take() {
            Some(fault) => Err(fault),
            None if self.direction.overran() => Err("it ends before its rows".into()),
            None => Ok(()),
        }
    }

    /// A token that opens a sequence.
    pub(super) fn first_token(&mut self, token: u32) -> u32 {
        let place = if D::WRITES { self.model.places[token as usize] } else { 0 };
        let place = self.direction.number(context::TOKEN_OTHER + 1, place);
        self.at(place)
    }

    #[inline(always)]
    fn at(&mut self, place: u32) -> u32 {
        self.entry(&self.model.order, place)
    }

    #[inline(always)]
    fn entry(&mut self, ids: &[u32], place: u32) -> u32 {
        match ids.get(place as usize) {
            Some(id) => *id,
            None => {
                self.wrong(format!("it holds the id at place {place} of {}", ids.len()));
                0
            }
        }
    }

    pub(super) fn token(&mut self, previous: u32, token: u32) -> u32 {
        let (ids, _) = self.model.follows.of(previous);
        let follower = self.space.history.follower(previous);
        let mut symbol = NOT_LISTED;
        let mut value = 0;
        if D::WRITES {
            if follower == Some(token) {
                symbol = AS_BEFORE;
            } else if let Some(place) = ids.iter().position(|id| *id == token) {
                value = place as u32;
                symbol = class_of(value).0;
            }
        }
        let length = if ids.is_empty() { 0 } else { 1 + (ids.len().ilog2() as usize / 2).min(2) };
        let symbol = self.direction.symbol(context::TOKEN + 4 * usize::from(follower.is_some()) + length, symbol);
        let token = match (symbol, follower) {
            (AS_BEFORE, Some(follower)) => follower,
            (AS_BEFORE, None) => {
                self.wrong("a token as before, without one before".into());
                0
            }
            (NOT_LISTED, _) => {
                let place = if D::WRITES { self.model.places[token as usize] } else { 0 };
                let place = self.direction.number(context::TOKEN_OTHER, place);
                self.at(place)
            }
            _ => {
                let place = self.direction.rest(symbol, value);
                self.entry(ids, place)
            }
        };
        self.space.history.token(previous, token);
        token
    }

    #[inline(always)]
    fn level(&mut self, context: usize, level: u16) -> u16 {
        let level = coded_level(&mut self.direction, self.scale, context, level);
        if self.scale.has(level) {
            return level as u16;
        }
        self.wrong(format!("a level of {level}"));
        1
    }

    /// A valid row: the workspace's row, which is filled when reading.
    pub(super) fn row(&mut self, place: usize, previous: u32, label: u32) -> Result<(), String> {
        let mut row = std::mem::take(&mut self.space.row);
        let done = self.row_parts(place, previous, label, &mut row);
        self.space.row = row;
        done.and_then(|()| self.checked())
    }

    fn row_parts(&mut self, place: usize, previous: u32, label: u32, row: &mut QuantisedRow) -> Result<(), String> {
        let before = self.space.history.row_after(previous);
        let kept_before = before.map(|row| self.space.history.kept(row));
        let count_context =
            context::COUNT + kept_before.map_or(0, |kept| 1 + class_of(kept.len() as u32).0.min(20) as usize);
        let top_before = kept_before.and_then(|kept| kept.first()).copied().filter(|top| *top != label);
        let before_agrees = match kept_before.and_then(|kept| kept.first()) {
            None => 0,
            Some(top) => 1 + usize::from(*top == label),
        };
        let count = self.direction.number(count_context, row.ids.len() as u32) as usize;
        if count > self.model.vocab_size {
            return Err(format!("row {place} keeps {count} of {} ids", self.model.vocab_size));
        }
        self.checked()?;
        let count_class = (class_of(count as u32).0 as usize).min(15);
        let mut top_square = 0;
        let mut top = 0;
        let mut top_level = 0;
        if count > 0 {
            let written = if D::WRITES { (row.ids[0], row.levels[0]) } else { (0, 0) };
            let source;
            (top, source) = self.top(previous, label, top_before, before_agrees, written.0);
            top_level = self.level(context::TOP_LEVEL + source * 16 + count_class, written.1);
            top_square = self.scale.squares[top_level as usize];
        }
        let steps = u32::from(self.shape.quantiser.steps);
        let top_part = (top_square.isqrt() * 4 / steps.max(1)).min(16) as usize;
        for number in 0..self.shape.tail_count() {
            let tail = row.tails.get(number).copied().unwrap_or(0);
            let context = match number {
                0 => context::TAIL + top_part * 16 + count_class,
                _ => context::TAIL_MORE + row.tails[0] as usize / 16,
            };
            let tail = self.direction.symbol(context, tail);
            if tail as usize >= TAIL_CODES {
                return Err(format!("row {place} has the tail {tail}"));
            }
            if !D::WRITES {
                row.tails.push(tail);
            }
        }
        if count > 0 {
            if !D::WRITES {
                row.ids.push(top);
                row.levels.push(top_level);
            }
            let mass = self.scale.masses[row.tails.first().copied().unwrap_or(0) as usize] - i64::from(top_square);
            self.space.ranker.rank(self.model, &self.space.history, Known { place, previous, label, top });
            self.others(count - 1, mass, row);
            if self.fault.is_some() {
                return Ok(());
            }
        }
        if !D::WRITES {
            let keys = &mut self.space.keys;
            keys.clear();
            let order = &self.scale.order;
            keys.extend(
                row.ids
                    .iter()
                    .zip(&row.levels)
                    .map(|(id, level)| u64::from(order[*level as usize]) << 32 | u64::from(*id)),
            );
            keys.sort_unstable();
            for ((key, id), level) in keys.iter().zip(&mut row.ids).zip(&mut row.levels) {
                *id = *key as u32;
                *level = self.scale.by_order[(*key >> 32) as usize];
            }
        }
        if !row.ids.contains(&label) {
            for number in 0..self.shape.label_count(count) {
                let code = row.labels.get(number).copied().unwrap_or(0);
                let code = self.label(context::LABEL + usize::from(count == 0), code);
                if !D::WRITES {
                    row.labels.push(code);
                }
            }
        }
        let strong = &self.scale.strong;
        let ids = row.ids.iter().zip(&row.levels).map(|(id, level)| (*id, strong[*level as usize]));
        self.space.history.row(place, previous, label, ids);
        Ok(())
    }

    /// The best id, and where it was found: 0 as the label, 1 as before, 2 elsewhere.
    fn top(
        &mut self,
        previous: u32,
        label: u32,
        top_before: Option<u32>,
        before_agrees: usize,
        top: u32,
    ) -> (u32, usize) {
        let (ids, _) = self.model.follows.of(previous);
        let (mut symbol, mut value) = (NOT_LISTED, 0);
        if D::WRITES {
            if top == label {
                symbol = TOP_IS_LABEL;
            } else if top_before == Some(top) {
                symbol = TOP_AS_BEFORE;
            } else if let Some(place) = ids.iter().position(|id| *id == top) {
                value = place as u32;
                symbol = class_of(value).0;
            }
        }
        match (self.direction.symbol(context::TOP + before_agrees, symbol), top_before) {
            (TOP_IS_LABEL, _) => (label, 0),
            (TOP_AS_BEFORE, Some(top)) => (top, 1),
            (TOP_AS_BEFORE, None) => {
                self.wrong("a best id as before, without one before".into());
                (0, 1)
            }
            (NOT_LISTED, _) => {
                let place = if D::WRITES { self.model.places[top as usize] } else { 0 };
                let place = self.direction.number(context::TOP_OTHER, place);
                (self.at(place), 2)
            }
            (symbol, _) => {
                let place = self.direction.rest(symbol, value);
                (self.entry(ids, place), 2)
            }
        }
    }

    /// The ids beside the best: those that were expected in the order of expectation, then the rest in the order of
    /// frequency.
    fn others(&mut self, count: usize, mass: i64, row: &mut QuantisedRow) {
        let (mut left, mut mass) = (count, mass);
        if D::WRITES {
            let kept = row.ids.iter().enumerate().skip(1);
            kept.for_each(|(place, id)| self.space.kept[*id as usize] = place as u32 + 1);
        }
        let (scale, space) = (self.scale, &mut *self.space);
        let (ranked, marks) = (&space.ranker.ranked[..], &mut space.kept[..]);
        let fault =
            self.direction.as_local(|direction| expected(direction, scale, ranked, marks, &mut left, &mut mass, row));
        if let Some(fault) = fault {
            self.wrong(fault);
        } else if left > 0 {
            self.unexpected(left, mass, row);
        }
    }

    /// Ids that nothing spoke for.
    fn unexpected(&mut self, left: usize, mass: i64, row: &mut QuantisedRow) {
        let mut mass = mass;
        let mut places: Vec<u32> = vec![];
        if D::WRITES {
            let rest = row.ids[1..].iter().filter(|id| self.space.kept[**id as usize] > 0);
            places.extend(rest.map(|id| self.model.places[*id as usize]));
            places.sort_unstable();
        }
        let (model, scale, marks) = (self.model, self.scale, &mut self.space.kept[..]);
        let fault = self.direction.as_local(|direction| {
            let mut from = 0;
            for (number, left) in (1..=left).rev().enumerate() {
                let gap = places.get(number).map_or(0, |place| place - from);
                let context = context::OUT
                    + (class_of(from).0 as usize / 4).min(15) * 16
                    + (class_of(left as u32).0 as usize).min(15);
                let place = from.saturating_add(direction.number(context, gap));
                let Some(&id) = model.order.get(place as usize) else {
                    return Some(format!("it holds the id at place {place} of {}", model.order.len()));
                };
                if direction.overran() {
                    return None;
                }
                let written =
                    if D::WRITES { row.levels[std::mem::take(&mut marks[id as usize]) as usize - 1] } else { 0 };
                let level = coded_level(direction, scale, level_context(BUCKETS / 2, left, mass), written);
                if !scale.has(level) {
                    return Some(format!("a level of {level}"));
                }
                if !D::WRITES {
                    row.ids.push(id);
                    row.levels.push(level as u16);
                }
                mass -= i64::from(scale.squares[level as usize]);
                from = place + 1;
            }
            None
        });
        if let Some(fault) = fault {
            self.wrong(fault);
        }
    }

    fn label(&mut self, context: usize, code: u16) -> u16 {
        let symbol = self.direction.symbol(context, (code >> 6).min(u16::from(LABEL_FAR)) as u8);
        if symbol >= LABEL_FAR {
            return self.direction.raw(u32::from(code), 16) as u16;
        }
        u16::from(symbol) << 6 | self.direction.raw(u32::from(code & 63), 6) as u16
    }

    /// A number of any size, by its length in bits: segments.
    pub(super) fn plain(&mut self, value: u64) -> u64 {
        let written = value + 1;
        let length = self.direction.raw(63 - written.leading_zeros(), 6).min(40);
        let mut number = 1u64;
        for bit in (0..length).rev() {
            number = number << 1 | u64::from(self.direction.raw((written >> bit & 1) as u32, 1));
        }
        number - 1
    }
}

/// Levels as they are coded; a damaged record may hold any number.
#[inline(always)]
fn coded_level<D: Direction>(direction: &mut D, scale: &Scale, context: usize, level: u16) -> u32 {
    if scale.counts {
        direction.number(context, u32::from(level).wrapping_sub(1)).wrapping_add(1)
    } else {
        u32::from(direction.symbol(context, level as u8))
    }
}

/// The context of a level, by the bucket of its id, the ids left, it included, and the mass left for them.
#[inline(always)]
fn level_context(bucket: usize, left: usize, mass: i64) -> usize {
    let mass = mass.max(0) as u32;
    if left == 1 {
        return context::LEVEL_LAST + (class_of(mass).0 as usize).min(79);
    }
    let mean = match INVERSES.get(left) {
        // The quotient, exactly: no mass is above 16 * 190^2, so mass * left is below 2^32.
        Some(inverse) => ((u64::from(mass) * inverse) >> 32) as u32,
        None => mass / left as u32,
    };
    context::LEVEL + bucket * 40 + (class_of(mean).0 as usize / 2).min(39)
}

/// `floor(2^32 / n) + 1` by `n`.
const INVERSES: [u64; 64] = {
    let mut inverses = [0; 64];
    let mut n = 1;
    while n < inverses.len() {
        inverses[n] = (1 << 32) / n as u64 + 1;
        n += 1;
    }
    inverses
};

/// Ids among the candidates, in their order: the innermost loop. Returns what is wrong with the record.
#[inline(always)]
fn expected<D: Direction>(
    direction: &mut D,
    scale: &Scale,
    ranked: &[Candidate],
    marks: &mut [u32],
    left: &mut usize,
    mass: &mut i64,
    row: &mut QuantisedRow,
) -> Option<String> {
    let mut found = row.ids.len();
    if !D::WRITES {
        let room = found + (*left).min(ranked.len());
        row.ids.resize(room, 0);
        row.levels.resize(room, 0);
    }
    let (mut at, mut fault) = (0, None);
    while *left > 0 && at < ranked.len() {
        let context = context::GAP + ranked[at].bucket() * 16 + (class_of(*left as u32).0 as usize).min(15);
        let next =
            if D::WRITES { (at..ranked.len()).find(|place| marks[ranked[*place].id() as usize] > 0) } else { None };
        let gap = next.map_or(0, |next| (next - at) as u32);
        let written = if D::WRITES && next.is_none() { NOT_RANKED } else { class_of(gap).0 };
        let symbol = direction.symbol(context, written);
        if symbol == NOT_RANKED {
            break;
        }
        at += direction.rest(symbol, gap) as usize;
        let Some(candidate) = ranked.get(at) else {
            fault = Some(String::from("a kept id after the last candidate"));
            break;
        };
        let id = candidate.id();
        let written = if D::WRITES { row.levels[std::mem::take(&mut marks[id as usize]) as usize - 1] } else { 0 };
        let context = level_context(candidate.bucket() / 2, *left, *mass);
        let level = coded_level(direction, scale, context, written);
        if !scale.has(level) {
            fault = Some(format!("a level of {level}"));
            break;
        }
        if !D::WRITES {
            row.ids[found] = id;
            row.levels[found] = level as u16;
            found += 1;
        }
        *mass -= i64::from(scale.squares[level as usize]);
        *left -= 1;
        at += 1;
    }
    if !D::WRITES {
        row.ids.truncate(found);
        row.levels.truncate(found);
    }
    fault
}
