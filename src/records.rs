//! What is remembered of limiters from one command to the next: facts about their sets, and counts.
//!
//! Pure: no Redis. What always holds:
//!
//! - Whoever writes to a set otherwise than through us makes its facts forgotten
//!   ([`Records::forget_facts`] and the like) before the next command of ours looks.
//! - There are never more than [`CAPACITY`] records, however many limiters there are. When there
//!   would be, those of limiters that are empty go; if that is too little, all.
//! - What was counted of all limiters together is never forgotten.

use std::collections::{BTreeMap, HashMap};

use crate::counters::Counters;
use crate::limiter::Facts;

/// How many limiters are remembered. Each takes some 250 bytes and the length of the prefix.
const CAPACITY: usize = 10_000;

/// Longer prefixes are not worth their memory.
const LONGEST_PREFIX: usize = 256;

/// What is remembered of many limiters, by database and prefix.
#[derive(Default)]
#[cfg_attr(test, derive(Clone))]
pub struct Records {
    by_limiter: BTreeMap<i32, HashMap<Box<[u8]>, Record>>,
    len: usize,
    totals: Counters,
    /// Facts of an earlier age are forgotten.
    age: u64,
}

#[derive(Clone, Copy)]
struct Record {
    facts: Facts,
    age: u64,
    counters: Counters,
}

impl Records {
    /// What is known of a limiter's set.
    #[must_use]
    pub fn facts(&self, db: i32, prefix: &[u8]) -> Facts {
        let record = self.record(db, prefix).filter(|record| record.age == self.age);
        record.map_or(Facts::UNKNOWN, |record| record.facts)
    }

    /// What was counted of a limiter since its record was made.
    #[must_use]
    pub fn counters(&self, db: i32, prefix: &[u8]) -> Counters {
        self.record(db, prefix).map(|record| record.counters).unwrap_or_default()
    }

    /// What was counted of all limiters.
    #[must_use]
    pub fn totals(&self) -> Counters {
        self.totals
    }

    /// A command is done: what it has counted, and what is known now.
    pub fn note(&mut self, db: i32, prefix: &[u8], counted: &Counters, facts: Facts) {
        let age = self.age;
        self.update(db, prefix, counted, |record| {
            (record.facts, record.age) = (facts, age);
        });
    }

    /// A wait has begun or ended.
    pub fn note_wait(&mut self, db: i32, prefix: &[u8], counted: &Counters) {
        self.update(db, prefix, counted, |_| ());
    }

    /// Somebody else has written to the set.
    pub fn forget_facts(&mut self, db: i32, prefix: &[u8]) {
        let record = self.by_limiter.get_mut(&db).and_then(|records| records.get_mut(prefix));
        if let Some(record) = record {
            record.facts = Facts::UNKNOWN;
        }
    }

    /// All sets may have changed.
    pub fn forget_all_facts(&mut self) {
        self.age = self.age.wrapping_add(1);
    }

    fn record(&self, db: i32, prefix: &[u8]) -> Option<&Record> {
        self.by_limiter.get(&db)?.get(prefix)
    }

    /// Counts, in a new record if the limiter has none.
    fn update(
        &mut self,
        db: i32,
        prefix: &[u8],
        counted: &Counters,
        work: impl FnOnce(&mut Record),
    ) {
        self.totals.add(counted);
        let known = self.by_limiter.get_mut(&db).and_then(|records| records.get_mut(prefix));
        if let Some(record) = known {
            record.counters.add(counted);
            work(record);
        } else if prefix.len() <= LONGEST_PREFIX {
            self.make_room();
            let mut record = Record { facts: Facts::UNKNOWN, age: self.age, counters: *counted };
            work(&mut record);
            self.by_limiter.entry(db).or_default().insert(prefix.into(), record);
            self.len = self.len.saturating_add(1);
        }
    }

    /// Makes room for one more record.
    fn make_room(&mut self) {
        if self.len < CAPACITY {
            return;
        }
        for records in self.by_limiter.values_mut() {
            records.retain(|_, record| record.facts != Facts::EMPTY);
        }
        self.len = self.by_limiter.values().map(HashMap::len).sum();
        // Room for many, so that this is rare.
        if self.len > CAPACITY / 2 {
            self.by_limiter.clear();
            self.len = 0;
        }
    }
}

/// The model check tells states apart by their hash. What is counted changes nothing, and facts
/// that are too old are as good as none.
#[cfg(test)]
impl std::hash::Hash for Records {
    fn hash<H: std::hash::Hasher>(&self, hasher: &mut H) {
        let Self { by_limiter, len: _, totals: _, age: _ } = self;
        for (db, records) in by_limiter {
            let facts = records.keys().map(|prefix| (prefix, self.facts(*db, prefix)));
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

    #[test]
    fn a_record_is_of_one_limiter_in_one_database() {
        let mut records = Records::default();
        records.note(0, b"a", &ONE, SOME);
        records.note(0, b"a", &ONE, SOME);
        assert_eq!((records.facts(0, b"a"), records.counters(0, b"a").acquired), (SOME, 2));
        for (db, prefix) in [(1, b"a"), (0, b"b")] {
            assert_eq!(records.facts(db, prefix), Facts::UNKNOWN);
            assert_eq!(records.counters(db, prefix), Counters::default());
            records.forget_facts(db, prefix);
        }
        assert_eq!(records.facts(0, b"a"), SOME);
    }

    #[test]
    fn facts_are_forgotten_and_counts_are_not() {
        let mut records = Records::default();
        records.note(0, b"a", &ONE, SOME);
        records.note(1, b"b", &ONE, SOME);
        records.forget_facts(0, b"a");
        assert_eq!(records.facts(0, b"a"), Facts::UNKNOWN);
        assert_eq!(records.facts(1, b"b"), SOME);
        records.forget_all_facts();
        assert_eq!(records.facts(1, b"b"), Facts::UNKNOWN);
        records.note_wait(1, b"b", &ONE);
        assert_eq!(records.facts(1, b"b"), Facts::UNKNOWN);
        records.note(1, b"b", &ONE, SOME);
        assert_eq!(records.facts(1, b"b"), SOME);
        assert_eq!(records.counters(1, b"b").acquired, 3);
        assert_eq!(records.totals().acquired, 4);
    }

    #[test]
    fn the_number_of_records_is_bounded_and_empty_limiters_go_first() {
        let mut records = Records::default();
        records.note(0, b"held", &ONE, SOME);
        for number in 0..CAPACITY * 3 {
            records.note(0, number.to_string().as_bytes(), &ONE, Facts::EMPTY);
            records.note(0, &[b'x'; LONGEST_PREFIX + 1], &ONE, SOME);
        }
        assert_eq!(records.counters(0, b"held"), ONE);
        assert_eq!(records.len, records.by_limiter[&0].len());
        assert!(records.len <= CAPACITY);
        for number in 0..CAPACITY * 3 {
            records.note(1, number.to_string().as_bytes(), &ONE, SOME);
        }
        assert!(records.len <= CAPACITY);
        assert_eq!(records.totals().acquired as usize, CAPACITY * 9 + 1);
    }
}
