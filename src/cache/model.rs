//! What the codec `compact` expects a row to keep, before it has read it: every id that something speaks for, best
//! first.
//!
//! Evidence for an id is additive: how often rows keep it at all; lists of what rows keep after a token, and of what
//! they keep together with a token; and what earlier rows of the same sequence kept. Each piece of evidence has a
//! weight in 16ths of a bit of log-odds; their sum says in which bucket of probability an id stands. Whole numbers
//! only: writer and reader must agree in every bit.

/// Kinds of evidence for single ids; each has a strength from 0 to 15.
pub(crate) mod evidence {
    pub const LABEL: usize = 0;
    pub const FOLLOWS: usize = 1;
    pub const WITH_LABEL: usize = 2;
    pub const WITH_TOP: usize = 3;
    pub const AFTER_SAME: usize = 4;
    pub const AFTER_OTHER: usize = 5;
    pub const BEFORE_SAME: usize = 6;
    pub const PREVIOUS: usize = 7;
    pub const COMMON: usize = 8;
    pub const KINDS: usize = 9;
}
pub(crate) const STRENGTHS: usize = 16;
/// Classes of how often rows keep an id.
pub(crate) const CLASSES: usize = 100;
/// Facts of a row that move all its ids: see [`Ranker::rank`].
pub(crate) const FACTS: usize = 8;
pub(crate) const WEIGHTS: usize = evidence::KINDS * STRENGTHS + CLASSES + FACTS;
pub(crate) const CLASS_WEIGHTS: usize = evidence::KINDS * STRENGTHS;
pub(crate) const FACT_WEIGHTS: usize = CLASS_WEIGHTS + CLASSES;
/// Nine weights for one id, doubled, fit 16 bits.
pub(crate) const LARGEST_WEIGHT: i16 = 1800;
/// Units of a weight per bit.
pub(crate) const UNITS: i32 = 16;
/// The most frequent ids are candidates in every row.
pub(crate) const COMMON_IDS: usize = 32;
/// Buckets of half a bit; ids below the first are not candidates.
pub(crate) const BUCKETS: usize = 32;
/// Vocabularies are at most this large: a [`Hint`] and a [`Candidate`] are 32 bits.
pub(crate) const LARGEST_VOCABULARY: usize = 1 << 27;
/// Buckets, and those that are dropped.
const KEYS: usize = BUCKETS + 1;
/// A row's candidates are sorted in so many parts at once.
const PARTS: usize = 4;
/// Odds of 2^-8.5, where the first bucket begins.
const LEAST_SCORE: i32 = -17 * UNITS / 2;

/// A whole number as a class (below 124) and the bits that tell it from the others of its class.
#[inline(always)]
pub(crate) fn class_of(value: u32) -> (u8, u32) {
    if value < 8 {
        return (value as u8, 0);
    }
    let exponent = 31 - value.leading_zeros();
    (8 + 4 * (exponent as u8 - 3) + (value >> (exponent - 2) & 3) as u8, exponent - 2)
}

/// The smallest number of a class, and the bits that follow it.
#[inline(always)]
pub(crate) fn of_class(class: u8) -> (u32, u32) {
    if class < 8 {
        return (u32::from(class), 0);
    }
    let (exponent, quarter) = (u32::from(class - 8) / 4 + 3, u32::from(class - 8) & 3);
    ((4 + quarter) << (exponent - 2), exponent - 2)
}
pub(crate) const NUMBER_CLASSES: u8 = 124;

/// An id that something speaks for, by its place in the model's order, and how strongly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hint(u32);

impl Hint {
    #[inline(always)]
    pub(crate) const fn new(place: u32, strength: u8) -> Hint {
        Hint(place << 4 | strength as u32)
    }

    #[inline(always)]
    pub(crate) fn place(self) -> u32 {
        self.0 >> 4
    }

    #[inline(always)]
    pub(crate) fn strength(self) -> u8 {
        (self.0 & 0xf) as u8
    }
}

const COMMON: [Hint; COMMON_IDS] = {
    let mut hints = [Hint(0); COMMON_IDS];
    let mut place = 0;
    while place < COMMON_IDS {
        hints[place] = Hint::new(place as u32, 0);
        place += 1;
    }
    hints
};

/// For each token a list of hints.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Lists {
    /// List of token `i`: entries `starts[i]..starts[i + 1]`.
    pub starts: Vec<u32>,
    pub hints: Vec<Hint>,
}

impl Lists {
    #[inline(always)]
    pub(crate) fn of(&self, token: u32) -> &[Hint] {
        &self.hints[self.starts[token as usize] as usize..self.starts[token as usize + 1] as usize]
    }
}

/// What calibration learned, apart from the frequencies of symbols.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Model {
    pub vocab_size: usize,
    /// By id: its class; higher is more frequent.
    pub classes: Vec<u8>,
    /// Ids by falling class, rising within a class; and the place of each id there.
    ///
    /// What is looked up for many ids is kept by place: then what is looked up often lies together.
    pub order: Vec<u32>,
    pub places: Vec<u32>,
    pub follows: Lists,
    pub together: Lists,
    pub weights: Vec<i16>,
    /// By place: what a [`Ranker`] begins with.
    said: Vec<Said>,
    /// Weights of evidence, as they are added to [`Said`].
    evidence_weights: [u32; CLASS_WEIGHTS],
}

/// Ids by falling class, and rising within a class; and the place of each id there.
pub(crate) fn order_of(classes: &[u8]) -> (Vec<u32>, Vec<u32>) {
    let mut order: Vec<u32> = (0..classes.len() as u32).collect();
    order.sort_by_key(|id| (std::cmp::Reverse(classes[*id as usize]), *id));
    let mut places = vec![0; classes.len()];
    order.iter().enumerate().for_each(|(place, id)| places[*id as usize] = place as u32);
    (order, places)
}

impl Model {
    /// Takes lists whose hints are in any order.
    pub(crate) fn new(classes: Vec<u8>, mut follows: Lists, mut together: Lists, weights: Vec<i16>) -> Model {
        let (order, places) = order_of(&classes);
        let class_weight = |id: u32| weights[CLASS_WEIGHTS + classes[id as usize] as usize];
        for (kind, lists) in [(evidence::FOLLOWS, &mut follows), (evidence::WITH_LABEL, &mut together)] {
            let score = |hint: Hint| {
                class_weight(order[hint.place() as usize]) + weights[kind * STRENGTHS + hint.strength() as usize]
            };
            for ends in lists.starts.windows(2) {
                lists.hints[ends[0] as usize..ends[1] as usize]
                    .sort_by_key(|hint| (std::cmp::Reverse(score(*hint)), hint.place()));
            }
        }
        let said = order.iter().map(|id| Said::nothing(class_weight(*id))).collect();
        let evidence_weights = std::array::from_fn(|number| Said::weight(weights[number]));
        Model { vocab_size: classes.len(), classes, order, places, follows, together, weights, said, evidence_weights }
    }
}

/// The rows of a sequence that were read or written so far.
pub(crate) struct History {
    /// By token: one more than the last row that followed it, or predicted it; 0 for none.
    after: Vec<u32>,
    before: Vec<u32>,
    /// By token: one more than the token that followed it last.
    followers: Vec<u32>,
    rows: Vec<PastRow>,
    hints: Vec<Hint>,
    seen: Vec<u32>,
}

pub(crate) struct PastRow {
    pub label: u32,
    pub place: usize,
    start: usize,
    end: usize,
}

impl History {
    pub(crate) fn new(vocab_size: usize) -> Self {
        let none = || vec![0; vocab_size];
        let (rows, hints, seen) = Default::default();
        History { after: none(), before: none(), followers: none(), rows, hints, seen }
    }

    pub(crate) fn clear(&mut self) {
        for token in self.seen.drain(..) {
            self.after[token as usize] = 0;
            self.before[token as usize] = 0;
            self.followers[token as usize] = 0;
        }
        self.rows.clear();
        self.hints.clear();
    }

    pub(crate) fn token(&mut self, previous: u32, token: u32) {
        self.followers[previous as usize] = token + 1;
        self.seen.push(previous);
    }

    pub(crate) fn follower(&self, token: u32) -> Option<u32> {
        self.followers[token as usize].checked_sub(1)
    }

    /// Row `place` of the sequence keeps these ids, the best first.
    pub(crate) fn row(&mut self, place: usize, previous: u32, label: u32, hints: &[Hint]) {
        let start = self.hints.len();
        self.hints.extend_from_slice(hints);
        self.rows.push(PastRow { label, place, start, end: self.hints.len() });
        self.after[previous as usize] = self.rows.len() as u32;
        self.before[label as usize] = self.rows.len() as u32;
        self.seen.push(previous);
        self.seen.push(label);
    }

    pub(crate) fn row_after(&self, token: u32) -> Option<&PastRow> {
        self.rows.get((self.after[token as usize] as usize).wrapping_sub(1))
    }

    fn row_before(&self, token: u32) -> Option<&PastRow> {
        self.rows.get((self.before[token as usize] as usize).wrapping_sub(1))
    }

    #[inline(always)]
    pub(crate) fn kept(&self, row: &PastRow) -> &[Hint] {
        &self.hints[row.start..row.end]
    }
}

/// What is known of a row when its ids are ranked.
#[derive(Clone, Copy)]
pub(crate) struct Known {
    pub place: usize,
    pub previous: u32,
    pub label: u32,
    pub top: u32,
}

/// Tells `visit` all evidence, of one kind at a time, and returns the row's facts.
#[inline(always)]
pub(crate) fn evidence_of(
    model: &Model,
    history: &History,
    known: Known,
    mut visit: impl FnMut(usize, &[Hint]),
) -> [bool; FACTS] {
    let mut facts = [false; FACTS];
    visit(evidence::LABEL, &[Hint::new(model.places[known.label as usize], 0)]);
    let hints = model.follows.of(known.previous);
    facts[0] = !hints.is_empty();
    visit(evidence::FOLLOWS, hints);
    let hints = model.together.of(known.label);
    facts[1] = !hints.is_empty();
    visit(evidence::WITH_LABEL, hints);
    facts[2] = known.label == known.top;
    if !facts[2] {
        let hints = model.together.of(known.top);
        facts[3] = !hints.is_empty();
        visit(evidence::WITH_TOP, hints);
    }
    if let Some(row) = history.row_after(known.previous) {
        let same = row.label == known.label;
        facts[if same { 4 } else { 5 }] = true;
        visit(if same { evidence::AFTER_SAME } else { evidence::AFTER_OTHER }, history.kept(row));
    }
    if let Some(row) = history.row_before(known.label) {
        facts[6] = true;
        visit(evidence::BEFORE_SAME, history.kept(row));
    }
    if let Some(row) = history.rows.last().filter(|row| row.place + 1 == known.place) {
        facts[7] = true;
        visit(evidence::PREVIOUS, history.kept(row));
    }
    visit(evidence::COMMON, &COMMON[..COMMON_IDS.min(model.order.len())]);
    facts
}

/// What was said of an id so far: in its upper half twice the sum of all weights, and 1 if nothing was said yet; in
/// its lower half what the upper half is when nothing was said.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Said(u32);

impl Said {
    const NOTHING: u32 = 1 << 16;

    fn nothing(class_weight: i16) -> Said {
        Said(u32::from((class_weight * 2 + 1) as u16) * 0x1_0001)
    }

    /// A weight as [`Said::and`] takes it.
    fn weight(weight: i16) -> u32 {
        u32::from((weight * 2) as u16) << 16
    }

    #[inline(always)]
    fn is_nothing(self) -> bool {
        self.0 & Self::NOTHING != 0
    }

    /// Wraps only in damaged records, which may keep an id twice.
    #[inline(always)]
    fn and(self, weight: u32) -> Said {
        Said((self.0 & !Self::NOTHING).wrapping_add(weight))
    }

    #[inline(always)]
    fn forgotten(self) -> Said {
        Said((self.0 & 0xffff) * 0x1_0001)
    }

    /// So little is said that no fact makes it a candidate.
    #[inline(always)]
    fn worst(self) -> Said {
        Said(1 << 31 | self.0 & 0xffff)
    }

    #[inline(always)]
    fn score(self) -> i16 {
        (self.0 as i32 >> 17) as i16
    }
}

/// Ranks ids; keeps its room from row to row.
pub(crate) struct Ranker {
    /// By place; between rows as the model has it.
    said: Vec<Said>,
    touched: Vec<u32>,
    scores: Vec<i16>,
    keys: Vec<u8>,
    ranked: Vec<Candidate>,
    /// Of these are candidates.
    count: usize,
}

/// An id by its place in the model's order, and above it its bucket.
#[derive(Clone, Copy, Default)]
pub(crate) struct Candidate(u32);

impl Candidate {
    const PLACE_BITS: u32 = LARGEST_VOCABULARY.ilog2();

    #[inline(always)]
    fn new(place: u32, bucket: u32) -> Candidate {
        Candidate(bucket << Self::PLACE_BITS | place)
    }

    #[inline(always)]
    pub(crate) fn place(self) -> u32 {
        self.0 & (LARGEST_VOCABULARY as u32 - 1)
    }

    #[inline(always)]
    pub(crate) fn bucket(self) -> usize {
        (self.0 >> Self::PLACE_BITS) as usize
    }
}

impl Ranker {
    pub(crate) fn new(model: &Model) -> Self {
        let (touched, scores, keys, ranked, count) = Default::default();
        let said = model.said.clone();
        Ranker { said, touched, scores, keys, ranked, count }
    }

    /// Ranks everything that something speaks for, except the top. The model is the one it was made for.
    pub(crate) fn rank(&mut self, model: &Model, history: &History, known: Known) {
        let Ranker { said, touched, scores, keys, ranked, .. } = self;
        let mut count = 0;
        // Room for all that may come, so that the innermost step is a plain store.
        let most = 1
            + COMMON_IDS
            + model.follows.of(known.previous).len()
            + model.together.of(known.label).len()
            + model.together.of(known.top).len()
            + history.row_after(known.previous).map_or(0, |row| row.end - row.start)
            + history.row_before(known.label).map_or(0, |row| row.end - row.start)
            + history.rows.last().map_or(0, |row| row.end - row.start);
        let most = most.next_multiple_of(PARTS);
        if touched.len() < most {
            touched.resize(most, 0);
            scores.resize(most, 0);
            keys.resize(most, 0);
        }
        let facts = evidence_of(model, history, known, |kind, hints| {
            let weights: &[u32; STRENGTHS] =
                model.evidence_weights[kind * STRENGTHS..].first_chunk().expect("weights of each kind");
            count = add(said, touched, count, hints, weights);
        });
        let mut shift = -LEAST_SCORE;
        for (fact, weight) in facts.iter().zip(&model.weights[FACT_WEIGHTS..]) {
            shift += if *fact { i32::from(*weight) } else { 0 };
        }
        // The top is no candidate: whatever was said of it, it is dropped.
        let of_top = &mut said[model.places[known.top as usize] as usize];
        if !of_top.is_nothing() {
            *of_top = of_top.worst();
        }
        // In three loops, one of which a compiler makes vectors of: what is left for the last is small.
        for (place, score) in touched[..count].iter().zip(scores.iter_mut()) {
            let said = &mut said[*place as usize];
            *score = said.score();
            *said = said.forgotten();
        }
        // The best bucket comes first; those in the last of all are dropped.
        let shift = shift.clamp(-i32::from(i16::MAX), i32::from(i16::MAX)) as i16;
        for (score, key) in scores[..count].iter().zip(&mut keys[..count]) {
            let bucket = (score.saturating_add(shift) >> 3).clamp(-1, BUCKETS as i16 - 1);
            *key = (BUCKETS as i16 - 1 - bucket) as u8;
        }
        // Four quarters at once, each with its own counts: equal buckets often follow each other, and one would wait for
        // the count of the other.
        let quarter = count.div_ceil(PARTS);
        keys[count..PARTS * quarter].fill(BUCKETS as u8);
        let touched: [&[u32]; PARTS] = std::array::from_fn(|part| &touched[part * quarter..(part + 1) * quarter]);
        let keys: [&[u8]; PARTS] = std::array::from_fn(|part| &keys[part * quarter..(part + 1) * quarter]);
        let mut ends = [[0u32; PARTS]; KEYS];
        for number in 0..quarter {
            for part in 0..PARTS {
                ends[keys[part][number] as usize][part] += 1;
            }
        }
        let mut sum = 0;
        for [first, second, third, fourth] in &mut ends {
            let two = *first + *second;
            let three = two + *third;
            let all = three + *fourth;
            (*first, *second, *third, *fourth) = (sum, sum + *first, sum + two, sum + three);
            sum += all;
        }
        let candidates = ends[BUCKETS][0] as usize;
        if ranked.len() < PARTS * quarter {
            ranked.resize(PARTS * quarter, Candidate::default());
        }
        for number in 0..quarter {
            for part in 0..PARTS {
                let key = keys[part][number];
                let place = &mut ends[key as usize][part];
                // Of those that are dropped it says nothing sensible.
                let bucket = (BUCKETS as u32 - 1).wrapping_sub(u32::from(key));
                ranked[*place as usize] = Candidate::new(touched[part][number], bucket);
                *place += 1;
            }
        }
        self.count = candidates;
    }

    /// Candidates, best first.
    pub(crate) fn ranked(&self) -> &[Candidate] {
        &self.ranked[..self.count]
    }
}

/// Adds the evidence of one kind. Returns the number of ids touched, which was `count`.
#[inline(never)]
fn add(said: &mut [Said], touched: &mut [u32], count: usize, hints: &[Hint], weights: &[u32; STRENGTHS]) -> usize {
    let mut count = count;
    for hint in hints {
        let said = &mut said[hint.place() as usize];
        // No branch: whether an id is new to the row is a matter of chance.
        touched[count] = hint.place();
        count += usize::from(said.is_nothing());
        *said = said.and(weights[hint.strength() as usize]);
    }
    count
}
