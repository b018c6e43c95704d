//! Time that runs forward from one command of a transaction or a script to the next, also if the
//! system's clock is set back in the middle of it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long ago the command before may have been. No server tells a module where a transaction
/// begins; after this time, after which it takes a script for one that hangs, it is another.
const SAME_TRANSACTION: Duration = Duration::from_secs(5);

/// The last time that a transaction or a script was told.
static LAST: Mutex<Option<Reading>> = Mutex::new(None);

/// What the clock showed when.
#[derive(Clone, Copy)]
struct Reading {
    ms: i64,
    at: Instant,
}

/// What the clock shows inside a transaction or a script, when it shows `now_ms` outside.
pub(super) fn in_transaction(now_ms: i64) -> i64 {
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let now = forward(*last, Reading { ms: now_ms, at: Instant::now() });
    *last = Some(now);
    now.ms
}

/// The reading `now`, or if the clock was set back since `last`, what it would have shown without.
fn forward(last: Option<Reading>, now: Reading) -> Reading {
    let Some(last) = last else { return now };
    let passed = now.at.saturating_duration_since(last.at);
    if now.ms >= last.ms || passed > SAME_TRANSACTION {
        return now;
    }
    let passed_ms = i64::try_from(passed.as_millis()).unwrap_or(0);
    Reading { ms: last.ms.saturating_add(passed_ms), at: now.at }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_back_goes_on_until_the_transaction_is_over() {
        let start = Instant::now();
        let read = |last, ms, after_ms| {
            let at = start + Duration::from_millis(after_ms);
            let now = forward(last, Reading { ms, at });
            (Some(now), now.ms)
        };
        let (last, ms) = read(None, 1_000_000, 0);
        assert_eq!(ms, 1_000_000);
        let (last, ms) = read(last, 1_000_500, 500);
        assert_eq!(ms, 1_000_500);
        let (last, ms) = read(last, 400_000, 600);
        assert_eq!(ms, 1_000_600, "set back: what it would have shown");
        let (last, ms) = read(last, 400_100, 700);
        assert_eq!(ms, 1_000_700);
        let (last, ms) = read(last, 2_000_000, 800);
        assert_eq!(ms, 2_000_000, "set forward: what it shows");
        let (_, ms) = read(last, 400_000, 5_801);
        assert_eq!(ms, 400_000, "another transaction");
    }
}
