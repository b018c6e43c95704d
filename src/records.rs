//! What is remembered of limiters from one command to the next: facts about their sets, and counts.
//!
//! Pure: no Redis. What always holds:
//!
//! - Whoever writes to a set otherwise than through us makes its facts forgotten
//!   ([`Records::forget_facts`] and the like) before the next command of ours looks.
//! - There are never more than [`CAPACITY`] records, however many limiters there are. When there
//!   would be, those of limiters that are empty go; if that is too little, all.
//! - What was counted of all limiters together is never forgotten.
//!
//! A command looks its limiter up once: what it has found ([`Place`]) leads back to the record.

use std::collections::{BTreeMap, HashMap};

use crate::counters::Counters;
use crate::limiter::Facts;

/// How many limiters are remembered. Each takes some 250 bytes and the length of the prefix.
const CAPACITY: usize = 10_000;

/// Longer prefixes are not worth their memory.
const LONGEST_PREFIX: usize = 256;

/// What is remembered of many limiters.
#[derive(Default)]
#[cfg_attr(test, derive(Clone))]
pub struct Records {
    records: Vec<Record>,
    by_limiter: BTreeMap<i32, HashMap<Box<[u8]>, usize>>,
    totals: Counters,
    /// Facts of an earlier age are forgotten.
    age: u64,
    /// How often records have moved to other places.
    moves: u64,
}

/// Where a limiter's record is. It may have moved when it is used: then it is looked up anew.
#[derive(Clone, Copy)]
pub struct Place {
    index: usize,
    moves: u64,
}

#[derive(Clone, Copy)]
struct Record {
    facts: Facts,
    age: u64,
    counters: Counters,
}

impl Records {
    /// Where a limiter's record is, and what is known of its set.
    #[must_use]
    pub fn look_up(&self, db: i32, prefix: &[u8]) -> (Option<Place>, Facts) {
        let Some(index) = self.index(db, prefix) else { return (None, Facts::UNKNOWN) };
        let record = self.records.get(index).filter(|record| record.age == self.age);
        let facts = record.map_or(Facts::UNKNOWN, |record| record.facts);
        (Some(Place { index, moves: self.moves }), facts)
    }

    /// What was counted of a limiter since its record was made.
    #[must_use]
    pub fn counters(&self, db: i32, prefix: &[u8]) -> Counters {
        let record = self.index(db, prefix).and_then(|index| self.records.get(index));
        record.map(|record| record.counters).unwrap_or_default()
    }

    /// What was counted of all limiters.
    #[must_use]
    pub fn totals(&self) -> Counters {
        self.totals
    }

    /// A command is done: what it has counted, and what is known now. `place` is where the record
    /// was when the command began.
    pub fn note(
        &mut self,
        place: Option<Place>,
        db: i32,
        prefix: &[u8],
        counted: &Counters,
        facts: Facts,
    ) {
        let age = self.age;
        if let Some(record) = self.count(place, db, prefix, counted) {
            (record.facts, record.age) = (facts, age);
        }
    }

    /// A wait has begun or ended.
    pub fn note_wait(&mut self, db: i32, prefix: &[u8], counted: &Counters) {
        self.count(None, db, prefix, counted);
    }

    /// Somebody else has written to the set.
    pub fn forget_facts(&mut self, db: i32, prefix: &[u8]) {
        let index = self.index(db, prefix);
        if let Some(record) = index.and_then(|index| self.records.get_mut(index)) {
            record.facts = Facts::UNKNOWN;
        }
    }

    /// All sets may have changed.
    pub fn forget_all_facts(&mut self) {
        self.age = self.age.wrapping_add(1);
    }

    fn index(&self, db: i32, prefix: &[u8]) -> Option<usize> {
        self.by_limiter.get(&db)?.get(prefix).copied()
    }

    /// Counts, in a new record if the limiter has none and is worth one.
    fn count(
        &mut self,
        place: Option<Place>,
        db: i32,
        prefix: &[u8],
        counted: &Counters,
    ) -> Option<&mut Record> {
        self.totals.add(counted);
        let known = place.filter(|place| place.moves == self.moves).map(|place| place.index);
        let index = match known.or_else(|| self.index(db, prefix)) {
            Some(index) => index,
            None if prefix.len() > LONGEST_PREFIX => return None,
            None => self.make_record(db, prefix),
        };
        let record = self.records.get_mut(index)?;
        record.counters.add(counted);
        Some(record)
    }

    fn make_record(&mut self, db: i32, prefix: &[u8]) -> usize {
        if self.records.len() >= CAPACITY {
            self.make_room();
        }
        let index = self.records.len();
        let (facts, counters) = (Facts::UNKNOWN, Counters::default());
        self.records.push(Record { facts, age: self.age, counters });
        self.by_limiter.entry(db).or_default().insert(prefix.into(), index);
        index
    }

    /// Makes room for many records, so that this is rare.
    fn make_room(&mut self) {
        let mut kept = Vec::new();
        for indices in self.by_limiter.values_mut() {
            indices.retain(|_, index| {
                let record = self.records.get(*index).filter(|record| record.facts != Facts::EMPTY);
                *index = kept.len();
                kept.extend(record);
                record.is_some()
            });
        }
        if kept.len() > CAPACITY / 2 {
            self.by_limiter.clear();
            kept.clear();
        }
        self.by_limiter.retain(|_, indices| !indices.is_empty());
        self.records = kept;
        self.moves = self.moves.wrapping_add(1);
    }
}

/// The model check tells states apart by their hash. What is counted changes nothing, and facts
/// that are too old are as good as none.
#[cfg(test)]
impl std::hash::Hash for Records {
    fn hash<H: std::hash::Hasher>(&self, hasher: &mut H) {
        let Self { by_limiter, records: _, totals: _, age: _, moves: _ } = self;
        for (db, indices) in by_limiter {
            let facts = indices.keys().map(|prefix| (prefix, self.look_up(*db, prefix).1));
            (db, facts.collect::<BTreeMap<_, _>>()).hash(hasher);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limiter::Expiry;

    const SOME: Facts = Facts { none_lapses_before_ms: 5, expiry: Expiry::Covers(7) };
    const ONE: Counters = Counters {
        acquired: 1,
        refreshed: 0,
        denied: 0,
        released: 0,
        lapsed: 0,
        waits: 0,
        wait_timeouts: 0,
        wait_ms_total: 0,
        wait_ms_max: 0,
    };

    fn facts(records: &Records, db: i32, prefix: &[u8]) -> Facts {
        records.look_up(db, prefix).1
    }

    #[test]
    fn a_record_is_of_one_limiter_in_one_database() {
        let mut records = Records::default();
        records.note(None, 0, b"a", &ONE, SOME);
        records.note(None, 0, b"a", &ONE, SOME);
        assert_eq!((facts(&records, 0, b"a"), records.counters(0, b"a").acquired), (SOME, 2));
        for (db, prefix) in [(1, b"a"), (0, b"b")] {
            assert_eq!(facts(&records, db, prefix), Facts::UNKNOWN);
            assert_eq!(records.counters(db, prefix), Counters::default());
            records.forget_facts(db, prefix);
        }
        assert_eq!(facts(&records, 0, b"a"), SOME);
    }

    #[test]
    fn facts_are_forgotten_and_counts_are_not() {
        let mut records = Records::default();
        records.note(None, 0, b"a", &ONE, SOME);
        records.note(None, 1, b"b", &ONE, SOME);
        records.forget_facts(0, b"a");
        assert_eq!(facts(&records, 0, b"a"), Facts::UNKNOWN);
        assert_eq!(facts(&records, 1, b"b"), SOME);
        records.forget_all_facts();
        assert_eq!(facts(&records, 1, b"b"), Facts::UNKNOWN);
        records.note_wait(1, b"b", &ONE);
        assert_eq!(facts(&records, 1, b"b"), Facts::UNKNOWN);
        records.note(None, 1, b"b", &ONE, SOME);
        assert_eq!(facts(&records, 1, b"b"), SOME);
        assert_eq!(records.counters(1, b"b").acquired, 3);
        assert_eq!(records.totals().acquired, 4);
    }

    #[test]
    fn the_number_of_records_is_bounded_and_empty_limiters_go_first() {
        let mut records = Records::default();
        records.note(None, 0, b"held", &ONE, SOME);
        for number in 0..CAPACITY * 3 {
            records.note(None, 0, number.to_string().as_bytes(), &ONE, Facts::EMPTY);
            records.note(None, 0, &[b'x'; LONGEST_PREFIX + 1], &ONE, SOME);
        }
        assert_eq!(records.counters(0, b"held"), ONE);
        assert_eq!(records.records.len(), records.by_limiter[&0].len());
        assert!(records.records.len() <= CAPACITY);
        for number in 0..CAPACITY * 3 {
            records.note(None, 1, number.to_string().as_bytes(), &ONE, SOME);
            assert!(records.records.len() <= CAPACITY);
        }
        assert_eq!(records.totals().acquired as usize, CAPACITY * 9 + 1);
    }

    #[test]
    fn a_place_leads_to_its_limiter_also_after_records_have_moved() {
        let mut records = Records::default();
        for number in 0..CAPACITY / 2 {
            records.note(None, 0, number.to_string().as_bytes(), &ONE, Facts::EMPTY);
        }
        records.note(None, 0, b"a", &ONE, SOME);
        let (place, _) = records.look_up(0, b"a");
        records.note(place, 0, b"a", &ONE, SOME);
        assert_eq!(records.counters(0, b"a").acquired, 2);

        for number in 0..CAPACITY / 2 {
            records.note(None, 1, number.to_string().as_bytes(), &ONE, Facts::EMPTY);
        }
        assert!(records.records.len() < CAPACITY / 2, "the empty ones have gone");
        records.note(place, 0, b"a", &ONE, SOME);
        assert_eq!(records.counters(0, b"a").acquired, 3);
        assert_eq!(facts(&records, 0, b"a"), SOME);
        assert_eq!(records.totals().acquired as usize, CAPACITY + 3);
    }

    #[test]
    fn prefixes_that_are_too_long_are_counted_and_not_remembered() {
        let mut records = Records::default();
        for (len, is_remembered) in [(0, true), (1, false), (2, false)] {
            let prefix = vec![b'x'; LONGEST_PREFIX + len];
            records.note(None, 0, &prefix, &ONE, SOME);
            assert_eq!(records.counters(0, &prefix) == ONE, is_remembered, "{len}");
        }
        assert_eq!(records.totals().acquired, 3);
    }

    #[test]
    fn records_go_only_when_there_is_no_room_and_all_if_few_are_empty() {
        for (held, stay) in [(CAPACITY / 2, true), (CAPACITY / 2 + 1, false)] {
            let mut records = Records::default();
            for number in 0..CAPACITY {
                let facts = if number < held { SOME } else { Facts::EMPTY };
                records.note(None, 0, number.to_string().as_bytes(), &ONE, facts);
            }
            let counted = |records: &Records, number: usize| {
                records.counters(0, number.to_string().as_bytes()) == ONE
            };
            assert!((0..CAPACITY).all(|number| counted(&records, number)), "there is room");
            records.note(None, 1, b"one more", &ONE, SOME);
            assert!((0..held).all(|number| counted(&records, number) == stay));
            assert!((held..CAPACITY).all(|number| !counted(&records, number)));
            assert_eq!(records.counters(1, b"one more"), ONE);
        }
    }
}
