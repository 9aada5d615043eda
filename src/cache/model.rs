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
/// Eight weights for one id, doubled, fit 16 bits.
pub(crate) const LARGEST_WEIGHT: i16 = 2000;
/// Units of a weight per bit.
pub(crate) const UNITS: i32 = 16;
/// The most frequent ids are candidates in every row.
pub(crate) const COMMON_IDS: usize = 32;
/// Buckets of half a bit; ids below the first are not candidates.
pub(crate) const BUCKETS: usize = 32;
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

/// For each token a list of ids, with the strength of the evidence.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Lists {
    /// List of token `i`: entries `starts[i]..starts[i + 1]`.
    pub starts: Vec<u32>,
    pub ids: Vec<u32>,
    pub strengths: Vec<u8>,
}

impl Lists {
    #[inline(always)]
    pub(crate) fn of(&self, token: u32) -> (&[u32], &[u8]) {
        let range = self.starts[token as usize] as usize..self.starts[token as usize + 1] as usize;
        (&self.ids[range.clone()], &self.strengths[range])
    }
}

/// What calibration learned, apart from the frequencies of symbols.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Model {
    pub vocab_size: usize,
    /// By id: its class; higher is more frequent.
    pub classes: Vec<u8>,
    /// Ids by falling class, rising within a class; and the place of each id there.
    pub order: Vec<u32>,
    pub places: Vec<u32>,
    pub follows: Lists,
    pub together: Lists,
    pub weights: Vec<i16>,
    /// By id: the weight of its class.
    base: Vec<i16>,
    /// Twice the weights of evidence.
    doubled_weights: [i16; CLASS_WEIGHTS],
}

impl Model {
    /// Takes lists whose entries are in any order.
    pub(crate) fn new(classes: Vec<u8>, mut follows: Lists, mut together: Lists, weights: Vec<i16>) -> Model {
        let mut order: Vec<u32> = (0..classes.len() as u32).collect();
        order.sort_by_key(|id| (std::cmp::Reverse(classes[*id as usize]), *id));
        let mut places = vec![0; classes.len()];
        order.iter().enumerate().for_each(|(place, id)| places[*id as usize] = place as u32);
        let base: Vec<i16> = classes.iter().map(|class| weights[CLASS_WEIGHTS + *class as usize]).collect();
        for (kind, lists) in [(evidence::FOLLOWS, &mut follows), (evidence::WITH_LABEL, &mut together)] {
            let score =
                |id: u32, strength: u8| base[id as usize].wrapping_add(weights[kind * STRENGTHS + strength as usize]);
            for token in 0..classes.len() {
                let range = lists.starts[token] as usize..lists.starts[token + 1] as usize;
                let mut entries: Vec<(u32, u8)> =
                    range.clone().map(|place| (lists.ids[place], lists.strengths[place])).collect();
                entries.sort_by_key(|entry| (std::cmp::Reverse(score(entry.0, entry.1)), entry.0));
                for (place, (id, strength)) in range.zip(entries) {
                    lists.ids[place] = id;
                    lists.strengths[place] = strength;
                }
            }
        }
        let doubled_weights = std::array::from_fn(|number| weights[number].wrapping_mul(2));
        Model { vocab_size: classes.len(), classes, order, places, follows, together, weights, base, doubled_weights }
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
    ids: Vec<u32>,
    strong: Vec<u8>,
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
        let (rows, ids, strong, seen) = Default::default();
        History { after: none(), before: none(), followers: none(), rows, ids, strong, seen }
    }

    pub(crate) fn clear(&mut self) {
        for token in self.seen.drain(..) {
            self.after[token as usize] = 0;
            self.before[token as usize] = 0;
            self.followers[token as usize] = 0;
        }
        self.rows.clear();
        self.ids.clear();
        self.strong.clear();
    }

    pub(crate) fn token(&mut self, previous: u32, token: u32) {
        self.followers[previous as usize] = token + 1;
        self.seen.push(previous);
    }

    pub(crate) fn follower(&self, token: u32) -> Option<u32> {
        self.followers[token as usize].checked_sub(1)
    }

    /// Row `place` of the sequence keeps these ids, best first.
    pub(crate) fn row(&mut self, place: usize, previous: u32, label: u32, ids: impl Iterator<Item = (u32, bool)>) {
        let start = self.ids.len();
        for (id, strong) in ids {
            self.ids.push(id);
            self.strong.push(1 + u8::from(strong));
        }
        self.rows.push(PastRow { label, place, start, end: self.ids.len() });
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

    pub(crate) fn kept(&self, row: &PastRow) -> &[u32] {
        &self.ids[row.start..row.end]
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

/// Tells `visit` all evidence, ids of one kind at a time with the strength of each, and returns the row's facts.
#[inline(always)]
pub(crate) fn evidence_of(
    model: &Model,
    history: &History,
    known: Known,
    mut visit: impl FnMut(usize, &[u32], &[u8]),
) -> [bool; FACTS] {
    let mut facts = [false; FACTS];
    visit(evidence::LABEL, &[known.label], &[0]);
    let (ids, strengths) = model.follows.of(known.previous);
    facts[0] = !ids.is_empty();
    visit(evidence::FOLLOWS, ids, strengths);
    let (ids, strengths) = model.together.of(known.label);
    facts[1] = !ids.is_empty();
    visit(evidence::WITH_LABEL, ids, strengths);
    facts[2] = known.label == known.top;
    if !facts[2] {
        let (ids, strengths) = model.together.of(known.top);
        facts[3] = !ids.is_empty();
        visit(evidence::WITH_TOP, ids, strengths);
    }
    let past = |row: &PastRow| (&history.ids[row.start..row.end], &history.strong[row.start..row.end]);
    if let Some(row) = history.row_after(known.previous) {
        let same = row.label == known.label;
        facts[if same { 4 } else { 5 }] = true;
        let (ids, strengths) = past(row);
        visit(if same { evidence::AFTER_SAME } else { evidence::AFTER_OTHER }, ids, strengths);
    }
    if let Some(row) = history.row_before(known.label) {
        facts[6] = true;
        let (ids, strengths) = past(row);
        visit(evidence::BEFORE_SAME, ids, strengths);
    }
    if let Some(row) = history.rows.last().filter(|row| row.place + 1 == known.place) {
        facts[7] = true;
        let (ids, strengths) = past(row);
        visit(evidence::PREVIOUS, ids, strengths);
    }
    let common = &model.order[..COMMON_IDS.min(model.order.len())];
    visit(evidence::COMMON, common, &[0; COMMON_IDS][..common.len()]);
    facts
}

/// Ranks ids; keeps its room from row to row.
pub(crate) struct Ranker {
    /// By id: twice the sum of the weights of the evidence for it, and 1 if nothing was said of it yet.
    sums: Vec<i16>,
    touched: Vec<u32>,
    scores: Vec<i16>,
    keys: Vec<u8>,
    /// Candidates, best first.
    pub ranked: Vec<Candidate>,
}

/// An id, and above it its bucket.
#[derive(Clone, Copy, Default)]
pub(crate) struct Candidate(u64);

impl Candidate {
    #[inline(always)]
    pub(crate) fn id(self) -> u32 {
        self.0 as u32
    }

    #[inline(always)]
    pub(crate) fn bucket(self) -> usize {
        (self.0 >> 32) as usize
    }
}

const NOTHING_SAID: i16 = 1;

impl Ranker {
    pub(crate) fn new(vocab_size: usize) -> Self {
        let (touched, scores, keys, ranked) = Default::default();
        Ranker { sums: vec![NOTHING_SAID; vocab_size], touched, scores, keys, ranked }
    }

    /// Fills `ranked` with everything that something speaks for, except the top.
    pub(crate) fn rank(&mut self, model: &Model, history: &History, known: Known) {
        let Ranker { sums, touched, scores, keys, ranked } = self;
        let weights = &model.doubled_weights;
        let mut count = 0;
        // Room for all that may come, so that the innermost step is a plain store.
        let lists = |lists: &Lists, token: u32| lists.of(token).0.len();
        let most = 1
            + COMMON_IDS
            + lists(&model.follows, known.previous)
            + lists(&model.together, known.label)
            + lists(&model.together, known.top)
            + history.row_after(known.previous).map_or(0, |row| row.end - row.start)
            + history.row_before(known.label).map_or(0, |row| row.end - row.start)
            + history.rows.last().map_or(0, |row| row.end - row.start);
        let most = most.next_multiple_of(PARTS);
        if touched.len() < most {
            touched.resize(most, 0);
            scores.resize(most, 0);
            keys.resize(most, 0);
        }
        let facts = evidence_of(model, history, known, |kind, ids, strengths| {
            let weights: &[i16; STRENGTHS] = weights[kind * STRENGTHS..].first_chunk().expect("weights of each kind");
            count = add(sums, touched, count, ids, strengths, weights);
        });
        let mut shift = -LEAST_SCORE;
        for (fact, weight) in facts.iter().zip(&model.weights[FACT_WEIGHTS..]) {
            shift += if *fact { i32::from(*weight) } else { 0 };
        }
        // The top is no candidate: whatever was said of it, it is dropped.
        let top_said = std::mem::replace(&mut sums[known.top as usize], i16::MIN);
        // In three loops, two of which a compiler makes vectors of: what is left for the last is small.
        for (id, score) in touched[..count].iter().zip(scores.iter_mut()) {
            let sum = std::mem::replace(&mut sums[*id as usize], NOTHING_SAID);
            *score = (sum >> 1).saturating_add(model.base[*id as usize]);
        }
        if top_said == NOTHING_SAID {
            sums[known.top as usize] = NOTHING_SAID;
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
        for end in ends.as_flattened_mut() {
            sum += std::mem::replace(end, sum);
        }
        let candidates = ends[BUCKETS][0] as usize;
        ranked.resize(PARTS * quarter, Candidate::default());
        for number in 0..quarter {
            for part in 0..PARTS {
                let key = keys[part][number];
                let place = &mut ends[key as usize][part];
                let bucket = (BUCKETS as u64 - 1).wrapping_sub(u64::from(key));
                ranked[*place as usize] = Candidate(bucket << 32 | u64::from(touched[part][number]));
                *place += 1;
            }
        }
        ranked.truncate(candidates);
    }
}

/// Adds the evidence of one kind to the sums. Returns the number of ids touched, which was `count`.
#[inline(never)]
fn add(
    sums: &mut [i16],
    touched: &mut [u32],
    count: usize,
    ids: &[u32],
    strengths: &[u8],
    weights: &[i16; STRENGTHS],
) -> usize {
    let mut count = count;
    for (id, strength) in ids.iter().zip(strengths) {
        let sum = &mut sums[*id as usize];
        // No branch: whether an id is new to the row is a matter of chance. Sums wrap only in damaged records.
        touched[count] = *id;
        count += (*sum & NOTHING_SAID) as usize;
        *sum = (*sum & !NOTHING_SAID).wrapping_add(weights[*strength as usize % STRENGTHS]);
    }
    count
}
