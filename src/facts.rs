//! What is known of limiters' sets from one command to the next.
//!
//! Pure: no Redis. What always holds: whoever writes to a set otherwise than through us makes its
//! facts forgotten ([`KnownFacts::forget`] and the like) before the next command of ours looks;
//! and there are never more than [`CAPACITY`] facts, however many limiters there are.

use std::collections::{BTreeMap, HashMap};

use crate::limiter::Facts;

/// How many limiters' facts are kept. Each takes some 100 bytes and the length of the prefix.
const CAPACITY: usize = 10_000;

/// Longer prefixes are not worth their memory.
const LONGEST_PREFIX: usize = 256;

/// The facts of many limiters, by database and prefix.
#[derive(Default)]
pub struct KnownFacts {
    by_limiter: BTreeMap<i32, HashMap<Box<[u8]>, Facts>>,
    len: usize,
}

impl KnownFacts {
    /// What is known of a limiter's set.
    #[must_use]
    pub fn of(&self, db: i32, prefix: &[u8]) -> Facts {
        let facts = self.by_limiter.get(&db).and_then(|facts| facts.get(prefix));
        facts.copied().unwrap_or(Facts::UNKNOWN)
    }

    /// Remembers what is known now.
    pub fn keep(&mut self, db: i32, prefix: &[u8], facts: Facts) {
        if facts == Facts::EMPTY || facts == Facts::UNKNOWN {
            self.forget(db, prefix); // Found out again without a look.
        } else if let Some(known) = self.by_limiter.get_mut(&db).and_then(|all| all.get_mut(prefix))
        {
            *known = facts;
        } else if prefix.len() <= LONGEST_PREFIX {
            if self.len >= CAPACITY {
                self.forget_all();
            }
            self.by_limiter.entry(db).or_default().insert(prefix.into(), facts);
            self.len = self.len.saturating_add(1);
        }
    }

    /// Somebody else has written to the set.
    pub fn forget(&mut self, db: i32, prefix: &[u8]) {
        if let Some(facts) = self.by_limiter.get_mut(&db) {
            if facts.remove(prefix).is_some() {
                self.len = self.len.saturating_sub(1);
            }
        }
    }

    /// Everything may have changed.
    pub fn forget_all(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limiter::Expiry;

    const SOME: Facts = Facts { none_lapses_before_ms: 5, expiry: Expiry::Covers(7) };

    #[test]
    fn facts_are_of_one_limiter_in_one_database() {
        let mut known = KnownFacts::default();
        known.keep(0, b"a", SOME);
        assert_eq!(known.of(0, b"a"), SOME);
        assert_eq!(known.of(1, b"a"), Facts::UNKNOWN);
        assert_eq!(known.of(0, b"b"), Facts::UNKNOWN);
        known.forget(1, b"a");
        assert_eq!(known.of(0, b"a"), SOME);
        known.forget(0, b"a");
        assert_eq!(known.of(0, b"a"), Facts::UNKNOWN);
    }

    #[test]
    fn what_is_kept_is_bounded_and_sets_that_are_gone_take_no_place() {
        let mut known = KnownFacts::default();
        for number in 0..CAPACITY * 3 {
            known.keep(0, number.to_string().as_bytes(), SOME);
            known.keep(0, &[b'x'; LONGEST_PREFIX + 1], SOME);
        }
        assert_eq!(known.len, known.by_limiter[&0].len());
        assert!((1..=CAPACITY).contains(&known.len));
        let last = (CAPACITY * 3 - 1).to_string();
        assert_eq!(known.of(0, last.as_bytes()), SOME);
        known.keep(0, last.as_bytes(), Facts::EMPTY);
        assert_eq!(known.by_limiter[&0].len(), CAPACITY - 1);
    }
}
