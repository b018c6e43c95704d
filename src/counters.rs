//! What is counted, of one limiter and of all.
//!
//! Pure: no Redis. `acquired - released - lapsed` is the number of leases held, as long as nobody
//! else writes to the set and it is not deleted.

/// Counts since the module was loaded, or since the limiter's record was made. Times are in
/// milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Leases that newcomers took, or were granted after a wait.
    pub acquired: u64,
    /// Live leases that were moved to a new end by whoever holds them.
    pub refreshed: u64,
    /// Calls that were answered with 0 without a wait.
    pub denied: u64,
    /// Leases that were given back, or ended because their connection closed.
    pub released: u64,
    /// Leases that ended unreleased, counted when they are pruned.
    pub lapsed: u64,
    /// Waits that ended or go on.
    pub waits: u64,
    /// Waits that ended by their time-out.
    pub wait_timeouts: u64,
    /// How long all waits that ended took.
    pub wait_ms_total: u64,
    /// How long the longest of them took.
    pub wait_ms_max: u64,
}

impl Counters {
    /// Adds what one command, or one wait, has counted.
    pub fn add(&mut self, more: &Self) {
        let sum = |count: &mut u64, more: u64| *count = count.wrapping_add(more);
        sum(&mut self.acquired, more.acquired);
        sum(&mut self.refreshed, more.refreshed);
        sum(&mut self.denied, more.denied);
        sum(&mut self.released, more.released);
        sum(&mut self.lapsed, more.lapsed);
        sum(&mut self.waits, more.waits);
        sum(&mut self.wait_timeouts, more.wait_timeouts);
        sum(&mut self.wait_ms_total, more.wait_ms_total);
        self.wait_ms_max = self.wait_ms_max.max(more.wait_ms_max);
    }
}
