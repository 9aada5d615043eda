//! The ids of a row beside the best, in the walk of `compact`: first those that something spoke for, in the order of
//! expectation, then the rest in the order of frequency; each with its level. The innermost loops of the codec.

use super::coder::context;
use super::direction::Direction;
use super::model::{BUCKETS, Candidate, Hint, Model, class_of};
use super::scale::Scale;

/// In the place of a number's class: no further id is among the candidates.
const NOT_RANKED: u8 = 200;

/// Levels as they are coded; a damaged record may hold any number.
#[inline(always)]
pub(super) fn coded_level<D: Direction>(direction: &mut D, scale: &Scale, context: usize, level: u16) -> u32 {
    if scale.counts {
        direction.number(context, u32::from(level).wrapping_sub(1)).wrapping_add(1)
    } else {
        u32::from(direction.symbol(context, level as u8))
    }
}

/// The context of a level, by the bucket of its id, the ids left, it included, and the mass left for them.
#[inline(always)]
fn level_context(bucket: usize, left: Left) -> usize {
    let (mass, left) = (left.mass.max(0) as u32, left.count);
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

/// What is left of a row's ids: how many, and their mass as a squared level.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub count: usize,
    pub mass: i64,
}

/// What the ids beside the best need of the walk.
pub(super) struct Others<'a> {
    pub model: &'a Model,
    pub scale: &'a Scale,
    /// When writing: see [`Workspace`], and the row's levels.
    pub kept: &'a mut [u32],
    pub levels: &'a [u16],
    pub hints: &'a mut Vec<Hint>,
    pub keys: &'a mut Vec<u64>,
}

impl Others<'_> {
    /// Ids among the candidates, in their order: the innermost loop. Returns what is wrong with the record.
    #[inline(always)]
    pub(super) fn expected<D: Direction>(
        &mut self,
        direction: &mut D,
        ranked: &[Candidate],
        left_of_row: &mut Left,
    ) -> Option<String> {
        let mut left = *left_of_row;
        let most = left.count.min(ranked.len());
        self.hints.reserve(most);
        self.keys.reserve(most);
        let mut at = 0;
        while left.count > 0 && at < ranked.len() {
            let context = context::GAP + ranked[at].bucket() * 16 + (class_of(left.count as u32).0 as usize).min(15);
            let kept = |candidate: &Candidate| self.kept[candidate.place() as usize] > 0;
            let gap = if D::WRITES { ranked[at..].iter().position(kept) } else { None };
            let written = gap.map_or(NOT_RANKED, |gap| class_of(gap as u32).0);
            let symbol = direction.symbol(context, written);
            if symbol == NOT_RANKED {
                break;
            }
            at += direction.rest(symbol, gap.unwrap_or(0) as u32) as usize;
            let Some(candidate) = ranked.get(at) else { return Some("a kept id after the last candidate".into()) };
            let context = level_context(candidate.bucket() / 2, left);
            if let Some(fault) = self.id(direction, context, candidate.place(), &mut left) {
                return Some(fault);
            }
            at += 1;
        }
        *left_of_row = left;
        None
    }

    /// Ids that nothing spoke for; `places` are theirs, when writing.
    #[inline(always)]
    pub(super) fn unexpected<D: Direction>(&mut self, direction: &mut D, places: &[u32], left: Left) -> Option<String> {
        let (mut left, mut from, mut places) = (left, 0, places.iter());
        while left.count > 0 {
            let context = context::OUT
                + (class_of(from).0 as usize / 4).min(15) * 16
                + (class_of(left.count as u32).0 as usize).min(15);
            let gap = places.next().map_or(0, |place| place - from);
            let place = from.saturating_add(direction.number(context, gap));
            if place as usize >= self.model.order.len() {
                return Some(no_id(place, self.model.order.len()));
            }
            if direction.overran() {
                return None;
            }
            if let Some(fault) = self.id(direction, level_context(BUCKETS / 2, left), place, &mut left) {
                return Some(fault);
            }
            from = place + 1;
        }
        None
    }

    /// The level of an id, and what follows from it.
    #[inline(always)]
    fn id<D: Direction>(&mut self, direction: &mut D, context: usize, place: u32, left: &mut Left) -> Option<String> {
        let written =
            if D::WRITES { self.levels[std::mem::take(&mut self.kept[place as usize]) as usize - 1] } else { 0 };
        let level = coded_level(direction, self.scale, context, written);
        if !self.scale.has(level) {
            return Some(format!("a level of {level}"));
        }
        left.mass -= i64::from(self.scale.levels[level as usize].square);
        left.count -= 1;
        push(self.model, self.scale, self.hints, self.keys, place, level);
        None
    }
}

/// Adds an id to a row.
#[inline(always)]
pub(super) fn push(model: &Model, scale: &Scale, hints: &mut Vec<Hint>, keys: &mut Vec<u64>, place: u32, level: u32) {
    let level = &scale.levels[level as usize];
    hints.push(Hint::new(place, level.strength));
    keys.push(u64::from(level.order) << 32 | u64::from(model.order[place as usize]));
}

#[cold]
pub(super) fn no_id(place: u32, of: usize) -> String {
    format!("it holds the id at place {place} of {of}")
}
