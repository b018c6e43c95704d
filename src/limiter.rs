//! The rules of leases: who gets a slot, what lapses when, how long the set itself must live.
//!
//! Pure: no Redis, no clock. The time and the sorted set come in as arguments (the set as the
//! trait [`Leases`]), the decision goes out as a value. What always holds:
//!
//! - A lease is *live* while its score is greater than now. Lapsed leases are pruned before
//!   anything is counted, so a slot is never held by nobody.
//! - [`acquire`] adds a newcomer only while fewer than `limit` leases are live. It never evicts.
//! - A live holder that acquires again keeps its one slot.
//! - Whatever changes the set or grants a lease leaves the set's own expiry at or after the end
//!   of its last lease, and at most [`EXPIRY_SLACK_MAX_MS`] after it.
//!
//! The idea, and the format (score = Unix time in seconds at which the lease lapses), are those
//! of Python's `retools.limiter`.

/// The last moment a lease may end: 2^53 ms after 1970, the last that a double counts exactly.
pub const LAST_LAPSE_MS: i64 = 1 << 53;

/// How long after the last lease's end a newly written expiry of the set lies. The slack makes
/// rewriting rare, and keeps leases that other programs add without touching the expiry.
pub const EXPIRY_SLACK_MS: i64 = 3_600_000;

/// How long after the last lease's end the set's expiry may lie before it is written anew.
pub const EXPIRY_SLACK_MAX_MS: i64 = 2 * EXPIRY_SLACK_MS;

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

    /// Removes every lease that has lapsed at `now_ms`; the number removed.
    fn prune(&mut self, now_ms: i64) -> u64;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// What [`acquire`] decided.
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

/// Prunes, counts, and gives `key` a lease to `lapse_ms` if it holds one already or if fewer
/// than `limit` leases are live.
pub fn acquire<L: Leases>(
    leases: &mut L,
    key: &L::Key<'_>,
    limit: u64,
    lapse_ms: i64,
    now_ms: i64,
    reacquire: Reacquire,
) -> Outcome {
    let pruned = leases.prune(now_ms);
    let free = leases.count() < limit;
    let found = match (free, reacquire) {
        (true, Reacquire::Refresh) => leases.put(key, lapse_ms, Put::AddOrMove),
        (true, Reacquire::Deny) => leases.put(key, lapse_ms, Put::AddOnly),
        (false, Reacquire::Refresh) => leases.put(key, lapse_ms, Put::MoveOnly),
        (false, Reacquire::Deny) => Found::Refused,
    };
    let granted = found != Found::Refused;
    if pruned > 0 || granted {
        settle_expiry(leases, granted.then_some(lapse_ms));
    }
    match found {
        Found::Added => Outcome::Acquired,
        Found::Moved | Found::Same => Outcome::Refreshed,
        Found::Refused => Outcome::Denied,
    }
}

/// Moves the live lease of `key` to `lapse_ms`; whether there was one. None is ever made.
pub fn renew<L: Leases>(leases: &mut L, key: &L::Key<'_>, lapse_ms: i64, now_ms: i64) -> bool {
    // A renewal is what a holder gets when no slot is free for anybody else.
    acquire(leases, key, 0, lapse_ms, now_ms, Reacquire::Refresh) == Outcome::Refreshed
}

/// Ends the live leases of `keys`; how many there were. A lapsed one does not count: its holder
/// had lost it.
pub fn release<L: Leases>(leases: &mut L, keys: &[L::Key<'_>], now_ms: i64) -> u64 {
    let pruned = leases.prune(now_ms);
    let released = leases.remove(keys);
    if pruned > 0 || released > 0 {
        settle_expiry(leases, None);
    }
    released
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

/// Writes the set's expiry anew unless it is right already. `known_lapse_ms` is the end of some
/// lease that is in the set, if the caller knows one: it often spares a look-up.
fn settle_expiry<L: Leases>(leases: &mut L, known_lapse_ms: Option<i64>) {
    if leases.count() == 0 {
        return; // The set is gone, and its expiry with it.
    }
    let right = match leases.expiry_ms() {
        None => leases.any_after(NEVER_MS),
        Some(expiry_ms) => {
            let soonest_end_ms = expiry_ms.saturating_sub(EXPIRY_SLACK_MAX_MS);
            let near = known_lapse_ms.is_some_and(|end_ms| end_ms >= soonest_end_ms)
                || leases.any_after(soonest_end_ms);
            near && !leases.any_after(expiry_ms)
        }
    };
    if right {
        return;
    }
    let last_ms = leases.last_lapse_ms();
    leases.set_expiry_ms(last_ms.map(|end_ms| end_ms.saturating_add(EXPIRY_SLACK_MS)));
}

#[cfg(test)]
mod tests;
