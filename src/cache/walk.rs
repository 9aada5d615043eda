//! The walk over a sequence that is both halves of the codec `compact`: each step names a symbol and the context it is
//! expected in, and either puts the symbol into the stream or takes it from there. So reading and writing cannot
//! disagree. It is written down in docs/cache-records.md.

use super::coder::context;
use super::direction::Direction;
use super::model::{Hint, History, Known, Model, Ranker, class_of};
use super::quantizer::TAIL_CODES;
use super::record::{QuantisedRow, RecordShape};
use super::row_ids::{Left, Others, coded_level, no_id, push};
use super::scale::Scale;

/// Symbols beside the classes of numbers.
const NOT_LISTED: u8 = 200;
const AS_BEFORE: u8 = 201;
const TOP_IS_LABEL: u8 = 210;
const TOP_AS_BEFORE: u8 = 211;
const LABEL_FAR: u8 = 254;

/// Room that is kept from sequence to sequence, of one shape and model.
pub(crate) struct Workspace {
    pub(super) history: History,
    ranker: Ranker,
    scale: Scale,
    /// By place in the model's order, when writing: one more than the number of the id in its row.
    kept: Vec<u32>,
    pub(super) row: QuantisedRow,
    /// The row's ids in the order of the walk.
    hints: Vec<Hint>,
    /// When reading, of each of them the order of its level, and below it the id.
    keys: Vec<u64>,
}

impl std::fmt::Debug for Workspace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workspace").finish_non_exhaustive()
    }
}

impl Workspace {
    pub(crate) fn new(shape: &RecordShape, model: &Model) -> Self {
        Workspace {
            history: History::new(shape.vocab_size),
            ranker: Ranker::new(model),
            scale: Scale::new(shape),
            kept: vec![0; shape.vocab_size],
            row: QuantisedRow::default(),
            hints: vec![],
            keys: vec![],
        }
    }
}

/// The walk over one sequence.
pub(super) struct Walk<'a, D> {
    pub direction: D,
    pub model: &'a Model,
    pub shape: &'a RecordShape,
    pub space: &'a mut Workspace,
    /// What is wrong with the record. Looked at after each row: the steps themselves go on with something harmless.
    pub fault: Option<String>,
}

impl<'a, D: Direction> Walk<'a, D> {
    /// A walk from the beginning of a sequence.
    pub(super) fn new(direction: D, model: &'a Model, shape: &'a RecordShape, space: &'a mut Workspace) -> Self {
        space.history.clear();
        Walk { direction, model, shape, space, fault: None }
    }

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
        match self.model.order.get(place as usize) {
            Some(id) => *id,
            None => {
                self.wrong(no_id(place, self.model.order.len()));
                0
            }
        }
    }

    /// The id at a place of a list.
    #[inline(always)]
    fn listed(&mut self, hints: &[Hint], place: u32) -> u32 {
        match hints.get(place as usize) {
            Some(hint) => self.model.order[hint.place() as usize],
            None => {
                self.wrong(no_id(place, hints.len()));
                0
            }
        }
    }

    /// The inverse of [`Walk::listed`].
    fn place_listed(&self, hints: &[Hint], id: u32) -> Option<u32> {
        let place = self.model.places[id as usize];
        hints.iter().position(|hint| hint.place() == place).map(|place| place as u32)
    }

    pub(super) fn token(&mut self, previous: u32, token: u32) -> u32 {
        let hints = self.model.follows.of(previous);
        let follower = self.space.history.follower(previous);
        let mut symbol = NOT_LISTED;
        let mut value = 0;
        if D::WRITES {
            if follower == Some(token) {
                symbol = AS_BEFORE;
            } else if let Some(place) = self.place_listed(hints, token) {
                value = place;
                symbol = class_of(value).0;
            }
        }
        let length = if hints.is_empty() { 0 } else { 1 + (hints.len().ilog2() as usize / 2).min(2) };
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
                self.listed(hints, place)
            }
        };
        self.space.history.token(previous, token);
        token
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
        let top_before = kept_before.and_then(|kept| kept.first()).map(|hint| self.model.order[hint.place() as usize]);
        let before_agrees = top_before.map_or(0, |top| 1 + usize::from(top == label));
        let top_before = top_before.filter(|top| *top != label);
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
            let context = context::TOP_LEVEL + source * 16 + count_class;
            top_level = coded_level(&mut self.direction, &self.space.scale, context, written.1);
            if !self.space.scale.has(top_level) {
                return Err(format!("a level of {top_level}"));
            }
            top_square = self.space.scale.levels[top_level as usize].square;
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
            let Workspace { scale, hints, keys, .. } = &mut *self.space;
            hints.clear();
            keys.clear();
            push(self.model, scale, hints, keys, self.model.places[top as usize], top_level);
            let mass = scale.masses[row.tails.first().copied().unwrap_or(0) as usize] - i64::from(top_square);
            self.space.ranker.rank(self.model, &self.space.history, Known { place, previous, label, top });
            self.others(count - 1, mass, row);
            if self.fault.is_some() {
                return Ok(());
            }
        } else {
            self.space.hints.clear();
            self.space.keys.clear();
        }
        if !D::WRITES {
            let Workspace { scale, keys, .. } = &mut *self.space;
            keys.sort_unstable();
            row.ids.extend(keys.iter().map(|key| *key as u32));
            row.levels.extend(keys.iter().map(|key| scale.by_order[(*key >> 32) as usize]));
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
        self.space.history.row(place, previous, label, &self.space.hints);
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
        let hints = self.model.follows.of(previous);
        let (mut symbol, mut value) = (NOT_LISTED, 0);
        if D::WRITES {
            if top == label {
                symbol = TOP_IS_LABEL;
            } else if top_before == Some(top) {
                symbol = TOP_AS_BEFORE;
            } else if let Some(place) = self.place_listed(hints, top) {
                value = place;
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
                (self.listed(hints, place), 2)
            }
        }
    }

    /// The ids beside the best: those that were expected in the order of expectation, then the rest in the order of
    /// frequency.
    fn others(&mut self, count: usize, mass: i64, row: &mut QuantisedRow) {
        let Workspace { ranker, scale, kept, hints, keys, .. } = &mut *self.space;
        let mut left = Left { count, mass };
        if D::WRITES {
            let others = row.ids.iter().enumerate().skip(1);
            others.for_each(|(number, id)| kept[self.model.places[*id as usize] as usize] = number as u32 + 1);
        }
        let mut parts = Others { model: self.model, scale, kept, levels: &row.levels, hints, keys };
        let mut fault = self.direction.as_local(|direction| parts.expected(direction, ranker.ranked(), &mut left));
        if fault.is_none() && left.count > 0 {
            let mut places = vec![];
            if D::WRITES {
                places.extend(row.ids[1..].iter().map(|id| self.model.places[*id as usize]));
                places.retain(|place| parts.kept[*place as usize] > 0);
                places.sort_unstable();
            }
            fault = self.direction.as_local(|direction| parts.unexpected(direction, &places, left));
        }
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
