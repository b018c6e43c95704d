//! Time that runs forward from one command of a transaction or a script to the next, also if the
//! system's clock is set back in the middle of it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a transaction or a script goes on by the old time. No server tells a module where one
/// begins; after this time, after which it takes a script for one that hangs, it is another.
const SAME_TRANSACTION: Duration = Duration::from_secs(5);

static CLOCK: Mutex<Clock> = Mutex::new(Clock { last_ms: i64::MIN, set_back: None });

/// What the clock shows to the command at hand, when the system's shows `now_ms`.
pub(super) fn read(now_ms: i64, is_in_transaction: impl FnOnce() -> bool) -> i64 {
    let mut clock = CLOCK.lock().unwrap_or_else(PoisonError::into_inner);
    clock.read(now_ms, is_in_transaction, Instant::now)
}

struct Clock {
    /// What was shown last.
    last_ms: i64,
    /// What was shown when the clock was found to be set back, and when that was.
    set_back: Option<(i64, Instant)>,
}

impl Clock {
    fn read(
        &mut self,
        now_ms: i64,
        is_in_transaction: impl FnOnce() -> bool,
        at: impl FnOnce() -> Instant,
    ) -> i64 {
        // Nearly always so, and then there is nothing to ask.
        let mut shown_ms = now_ms;
        if now_ms >= self.last_ms || !is_in_transaction() {
            self.set_back = None;
        } else {
            let at = at();
            let (then_ms, then) = *self.set_back.get_or_insert((self.last_ms, at));
            let passed = at.saturating_duration_since(then);
            if passed <= SAME_TRANSACTION {
                let passed_ms = i64::try_from(passed.as_millis()).unwrap_or(0);
                shown_ms = then_ms.saturating_add(passed_ms);
            } else {
                self.set_back = None;
            }
        }
        self.last_ms = shown_ms;
        shown_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Test {
        clock: Clock,
        start: Instant,
    }

    impl Test {
        fn read(&mut self, now_ms: i64, after_ms: u64, is_in_transaction: bool) -> i64 {
            let at = self.start + Duration::from_millis(after_ms);
            self.clock.read(now_ms, || is_in_transaction, || at)
        }
    }

    fn test() -> Test {
        Test { clock: Clock { last_ms: i64::MIN, set_back: None }, start: Instant::now() }
    }

    #[test]
    fn in_a_transaction_a_clock_that_is_set_back_goes_on() {
        let mut test = test();
        assert_eq!(test.read(1_000_000, 0, true), 1_000_000);
        assert_eq!(test.read(1_000_500, 500, true), 1_000_500);
        assert_eq!(test.read(400_000, 600, true), 1_000_500, "set back: it goes on from there");
        assert_eq!(test.read(400_100, 700, true), 1_000_600);
        assert_eq!(test.read(100, 800, true), 1_000_700, "set back again");
        assert_eq!(test.read(2_000_000, 900, true), 2_000_000, "set forward: what it shows");
        assert_eq!(test.read(400_000, 1_000, true), 2_000_000);
        assert_eq!(test.read(400_000, 6_001, true), 400_000, "it must be another by now");
    }

    #[test]
    fn outside_of_transactions_it_is_the_systems_clock() {
        let mut test = test();
        assert_eq!(test.read(1_000_000, 0, true), 1_000_000);
        assert_eq!(test.read(400_000, 1, false), 400_000);
        assert_eq!(test.read(400_001, 2, true), 400_001, "what came before is over");
    }
}
