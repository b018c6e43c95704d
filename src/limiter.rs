//! The rules of leases: who gets a slot, what lapses when, how long the set itself must live.
//!
//! Pure: no Redis, no clock. The time and the sorted set come in as arguments (the set as the
//! trait [`Leases`]), the decision goes out as a value. What always holds:
//!
//! - A lease is *live* while its score is greater than now. Only live leases are counted, so a
//!   slot is never held by nobody. Lapsed leases are pruned before anything is decided: all of
//!   them, or if there are many a bounded number at a time, and the rest is not counted.
//! - [`Limiter::acquire`] adds a newcomer only while fewer than `limit` leases are live. It never
//!   evicts.
//! - A live holder that acquires again keeps its one slot.
//! - Whatever changes the set or grants a lease leaves the set's own expiry at or after the end
//!   of its last lease, and at most [`EXPIRY_SLACK_MAX_MS`] after it.
//!
//! What was found out about a set is kept from one command to the next as [`Facts`], and spares
//! most look-ups: they hold as long as nobody else writes to the set.
//!
//! The idea, and the format (score = Unix time in seconds at which the lease lapses), are those
//! of Python's `retools.limiter`.

use std::slice;

use crate::counters::Counters;

/// The last moment a lease may end: 2^53 ms after 1970, the last that a double counts exactly.
pub const LAST_LAPSE_MS: i64 = 1 << 53;

/// How long after the last lease's end a newly written expiry of the set lies. The slack makes
/// rewriting rare, and keeps leases that other programs add without touching the expiry.
pub const EXPIRY_SLACK_MS: i64 = 3_600_000;

/// How long after the last lease's end the set's expiry may lie before it is written anew.
pub const EXPIRY_SLACK_MAX_MS: i64 = 2 * EXPIRY_SLACK_MS;

/// How many leases are pruned at once. Removing one takes the server about half a microsecond, so
/// nobody waits for this longer than for any other command.
pub const PRUNE_STEP: u64 = 1_000;

/// A lease that ends after this (some 285 million years after 1970) counts as one that never
/// lapses: there is no room for an expiry after it.
const NEVER_MS: i64 = 9_000_000_000_000_000_000;

/// One limiter's leases: the sorted set, with just the operations the rules need.
///
/// Times are milliseconds after 1970; [`score`] and [`lapse_ms`] tell what they are in the set,
/// where other programs may have written any score: infinite, or finer than a millisecond.
pub trait Leases {
    /// What names a holder: bytes.
    type Key<'k>;

    /// Removes leases that have lapsed at `now_ms`, `at_most` so many if that leaves some.
    fn prune(&mut self, now_ms: i64, at_most: u64) -> Pruned;
    /// Whether `key` has a lease, lapsed or not.
    fn holds(&self, key: &Self::Key<'_>) -> bool;
    /// Whether `key` has a lease that has lapsed at `now_ms`.
    fn has_lapsed(&self, key: &Self::Key<'_>, now_ms: i64) -> bool;
    /// The number of leases in the set.
    fn count(&self) -> u64;
    /// Looks `key` up, and adds it or moves its end to `lapse_ms`, as `put` allows.
    fn put(&mut self, key: &Self::Key<'_>, lapse_ms: i64, put: Put) -> Found;
    /// Removes the leases of `keys`; the number that were there.
    fn remove(&mut self, keys: &[Self::Key<'_>]) -> u64;
    /// Whether a lease ends after `time_ms`.
    fn any_after(&self, time_ms: i64) -> bool;
    /// The end of the lease that lapses first; `None` if none ever does.
    fn next_lapse_ms(&self) -> Option<i64>;
    /// The end of the last lease; `None` if that never lapses (or there is none).
    fn last_lapse_ms(&self) -> Option<i64>;
    /// The set's own expiry, if it has one.
    fn expiry_ms(&self) -> Option<i64>;
    /// Sets the set's own expiry, or takes it away.
    fn set_expiry_ms(&mut self, expiry_ms: Option<i64>);
}

/// What [`Leases::prune`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pruned {
    /// How many it removed.
    pub removed: u64,
    /// How many lapsed leases are still in the set.
    pub left: u64,
}

/// What [`Leases::put`] may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// Add the key, or move its end.
    AddOrMove,
    /// Only add: a key that is there stays as it is.
    AddOnly,
    /// Only move: a key that is not there is not added.
    MoveOnly,
}

/// What [`Leases::put`] found.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Found {
    /// The key was not there and was added.
    Added,
    /// The key was there and has the new end.
    Moved,
    /// The key was there with that very end: nothing changed.
    Same,
    /// `put` did not allow it: nothing changed.
    Refused,
}

/// What a holder that is already in gets when it acquires again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reacquire {
    /// Its lease lasts to the new end. A retry after a lost reply is safe.
    Refresh,
    /// It is denied and its lease left alone (the option NX).
    Deny,
}

/// What [`Limiter::acquire`] decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No slot; nothing was added.
    Denied,
    /// A newcomer took a slot.
    Acquired,
    /// The key held a live lease, which lasts to the new end.
    Refreshed,
}

/// When a slot is free for a newcomer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextFree {
    /// One is free now.
    Now,
    /// Once the lease of this rank (0 = the soonest to lapse) has lapsed.
    WhenLapsed {
        /// The rank among the leases by score, from 0.
        rank: u64,
    },
    /// None ever will be: the limit is 0.
    Never,
}

/// The score of a lease that lapses at `lapse_ms`, milliseconds after 1970.
#[must_use]
pub fn score(lapse_ms: i64) -> f64 {
    // Exact up to LAST_LAPSE_MS: both numbers are doubles without loss, and division rounds
    // correctly, so this is the double that the decimal text "seconds.millis" parses to.
    lapse_ms as f64 / 1000.0
}

/// The first millisecond at which a lease with this score has lapsed; `None` if it never does.
#[must_use]
pub fn lapse_ms(score: f64) -> Option<i64> {
    if score > self::score(NEVER_MS) {
        return None;
    }
    // The product is off by a rounding error at most, so the answer is it or a neighbour.
    let near_ms = (score * 1000.0).floor() as i64;
    let first_lapsed = |ms: &i64| self::score(*ms) >= score;
    let candidates = near_ms.saturating_sub(1)..=near_ms.saturating_add(2);
    Some(candidates.into_iter().find(first_lapsed).unwrap_or(near_ms))
}

/// The end of a lease of `ttl_ms` taken at `now_ms`; `None` if it is not after now, or beyond
/// [`LAST_LAPSE_MS`].
#[must_use]
pub fn lapse_after(now_ms: i64, ttl_ms: i64) -> Option<i64> {
    now_ms
        .checked_add(ttl_ms)
        .filter(|end_ms| (now_ms.saturating_add(1)..=LAST_LAPSE_MS).contains(end_ms))
}

/// When a newcomer with `limit` finds a slot, given the number of `live` leases.
#[must_use]
pub fn next_free(live: u64, limit: u64) -> NextFree {
    match (limit, live.checked_sub(limit)) {
        (0, _) => NextFree::Never,
        (_, None) => NextFree::Now,
        // live - limit + 1 leases must lapse, the last of which has this rank.
        (_, Some(rank)) => NextFree::WhenLapsed { rank },
    }
}

/// What is known of a set without a look at it, as long as nobody else has written to it.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Facts {
    /// No lease in the set lapses before this time.
    pub none_lapses_before_ms: i64,
    /// The set's own expiry.
    pub expiry: Expiry,
}

/// What is known of a set's own expiry.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Expiry {
    /// Nothing.
    Unknown,
    /// It has none, since it was empty before the command at hand.
    Absent,
    /// It is this, which is at or after the end of every lease.
    Covers(i64),
}

impl Facts {
    /// Nothing is known.
    pub const UNKNOWN: Self = Self { none_lapses_before_ms: i64::MIN, expiry: Expiry::Unknown };
    /// The set is empty.
    pub const EMPTY: Self = Self { none_lapses_before_ms: i64::MAX, expiry: Expiry::Absent };
}

/// A limiter during one command: its leases, and what is known of them.
pub struct Limiter<L> {
    leases: L,
    facts: Facts,
    is_pruned: bool,
    /// Lapsed leases that are still in the set.
    lapsed: u64,
    counted: Counters,
}

impl<L: Leases> Limiter<L> {
    /// `facts` must hold for `leases`.
    pub fn new(leases: L, facts: Facts) -> Self {
        let facts = if leases.count() == 0 { Facts::EMPTY } else { facts };
        Self { leases, facts, is_pruned: false, lapsed: 0, counted: Counters::default() }
    }

    /// What is known now.
    pub fn facts(&self) -> Facts {
        self.facts
    }

    /// What came of the commands below: leases acquired, refreshed, released, lapsed.
    pub fn counted(&self) -> &Counters {
        &self.counted
    }

    /// The set.
    pub fn leases(&self) -> &L {
        &self.leases
    }

    /// The number of live leases, after any of the commands below.
    pub fn live(&self) -> u64 {
        self.leases.count().saturating_sub(self.lapsed)
    }

    /// The number of lapsed leases that are still in the set, after any of the commands below.
    pub fn lapsed(&self) -> u64 {
        self.lapsed
    }

    /// When a slot may come free though nobody does anything, after any of the commands below:
    /// not later than that, but perhaps not yet then.
    pub fn next_change_ms(&self) -> Option<i64> {
        let lapse_ms = Some(self.facts.none_lapses_before_ms).filter(|ms| *ms < i64::MAX);
        let expiry_ms = match self.facts.expiry {
            Expiry::Unknown => self.leases.expiry_ms(),
            Expiry::Absent | Expiry::Covers(_) => None,
        };
        [lapse_ms, expiry_ms].into_iter().flatten().min()
    }

    /// Prunes, counts, and gives `key` a lease to `lapse_ms` if it holds one already or if fewer
    /// than `limit` leases are live.
    pub fn acquire(
        &mut self,
        key: &L::Key<'_>,
        limit: u64,
        lapse_ms: i64,
        now_ms: i64,
        reacquire: Reacquire,
    ) -> Outcome {
        let pruned = self.prune(slice::from_ref(key), now_ms);
        let free = self.live() < limit;
        let found = match (free, reacquire) {
            (true, Reacquire::Refresh) => self.leases.put(key, lapse_ms, Put::AddOrMove),
            (true, Reacquire::Deny) => self.leases.put(key, lapse_ms, Put::AddOnly),
            (false, Reacquire::Refresh) => self.leases.put(key, lapse_ms, Put::MoveOnly),
            (false, Reacquire::Deny) => Found::Refused,
        };
        let granted = found != Found::Refused;
        if granted {
            let facts = &mut self.facts;
            facts.none_lapses_before_ms = facts.none_lapses_before_ms.min(lapse_ms);
        }
        if pruned || granted {
            self.settle_expiry(granted.then_some(lapse_ms), now_ms);
        }
        let (outcome, count) = match found {
            Found::Added => (Outcome::Acquired, &mut self.counted.acquired),
            Found::Moved | Found::Same => (Outcome::Refreshed, &mut self.counted.refreshed),
            Found::Refused => return Outcome::Denied,
        };
        *count = count.saturating_add(1);
        outcome
    }

    /// Whether [`acquire`](Self::acquire) would give `key` a lease. It prunes and writes no more.
    pub fn would_acquire(
        &mut self,
        key: &L::Key<'_>,
        limit: u64,
        now_ms: i64,
        reacquire: Reacquire,
    ) -> bool {
        if self.prune(slice::from_ref(key), now_ms) {
            self.settle_expiry(None, now_ms);
        }
        match (self.leases.holds(key), reacquire) {
            (true, Reacquire::Refresh) => true,
            (true, Reacquire::Deny) => false,
            (false, _) => self.live() < limit,
        }
    }

    /// Moves the live lease of `key` to `lapse_ms`; whether there was one. None is ever made.
    pub fn renew(&mut self, key: &L::Key<'_>, lapse_ms: i64, now_ms: i64) -> bool {
        // A renewal is what a holder gets when no slot is free for anybody else.
        self.acquire(key, 0, lapse_ms, now_ms, Reacquire::Refresh) == Outcome::Refreshed
    }

    /// Ends the live leases of `keys`; how many there were. A lapsed one does not count: its
    /// holder had lost it.
    pub fn release(&mut self, keys: &[L::Key<'_>], now_ms: i64) -> u64 {
        let pruned = self.prune(keys, now_ms);
        let released = self.leases.remove(keys);
        if pruned || released > 0 {
            self.settle_expiry(None, now_ms);
        }
        self.counted.released = self.counted.released.saturating_add(released);
        released
    }

    /// Removes lapsed leases, those of `keys` in any case; whether there were any.
    fn prune(&mut self, keys: &[L::Key<'_>], now_ms: i64) -> bool {
        let mut any = false;
        if !self.is_pruned && now_ms >= self.facts.none_lapses_before_ms {
            let Pruned { removed, left } = self.leases.prune(now_ms, PRUNE_STEP);
            any = removed > 0;
            self.counted.lapsed = self.counted.lapsed.saturating_add(removed);
            self.lapsed = left;
            self.facts.none_lapses_before_ms = match left {
                0 => self.leases.next_lapse_ms().unwrap_or(i64::MAX),
                _ => i64::MIN,
            };
        }
        self.is_pruned = true;
        if self.lapsed > 0 {
            for key in keys {
                if self.leases.has_lapsed(key, now_ms) {
                    self.lapsed = self.lapsed.saturating_sub(1);
                    self.counted.lapsed = self.counted.lapsed.saturating_add(1);
                    self.leases.remove(slice::from_ref(key));
                    any = true;
                }
            }
        }
        if self.leases.count() == 0 {
            self.facts = Facts::EMPTY; // Its expiry has gone with the last lease.
        }
        any
    }

    /// Writes the set's expiry anew unless it is right already. `known_lapse_ms` is the end of
    /// some lease that is in the set, if the caller knows one.
    fn settle_expiry(&mut self, known_lapse_ms: Option<i64>, now_ms: i64) {
        if self.leases.count() == 0 {
            self.facts = Facts::EMPTY; // The set is gone, and its expiry with it.
            return;
        }
        match (self.facts.expiry, known_lapse_ms) {
            (Expiry::Absent, Some(_)) => return self.write_expiry(known_lapse_ms),
            (Expiry::Covers(expiry_ms), _)
                if known_lapse_ms.is_none_or(|end_ms| end_ms <= expiry_ms)
                    && self.is_near(expiry_ms, known_lapse_ms, now_ms) =>
            {
                return;
            }
            _ => {}
        }
        let expiry_ms = self.leases.expiry_ms();
        let right = match expiry_ms {
            None => self.leases.any_after(NEVER_MS),
            Some(expiry_ms) => {
                self.is_near(expiry_ms, known_lapse_ms, now_ms) && !self.leases.any_after(expiry_ms)
            }
        };
        if right {
            self.facts.expiry = expiry_ms.map_or(Expiry::Unknown, Expiry::Covers);
        } else {
            self.write_expiry(self.leases.last_lapse_ms());
        }
    }

    fn write_expiry(&mut self, last_ms: Option<i64>) {
        let expiry_ms = last_ms.map(|end_ms| end_ms.saturating_add(EXPIRY_SLACK_MS));
        self.leases.set_expiry_ms(expiry_ms);
        self.facts.expiry = expiry_ms.map_or(Expiry::Unknown, Expiry::Covers);
    }

    /// Whether some lease ends late enough for this expiry. Mostly that is known without a look:
    /// by a lease at hand, or because any live one does.
    fn is_near(&self, expiry_ms: i64, known_lapse_ms: Option<i64>, now_ms: i64) -> bool {
        let soonest_end_ms = expiry_ms.saturating_sub(EXPIRY_SLACK_MAX_MS);
        known_lapse_ms.is_some_and(|end_ms| end_ms >= soonest_end_ms)
            || (soonest_end_ms <= now_ms && self.live() > 0)
            || self.leases.any_after(soonest_end_ms)
    }
}

#[cfg(any(test, fuzzing))]
#[path = "limiter/tests.rs"] // Said in full for fuzz/, which takes this file in by its path.
pub mod tests;
