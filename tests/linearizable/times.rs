//! Times that nobody saw, known by what lies between them: now, and when each lease lapses.
//!
//! The server decides by its clock in whole milliseconds, and a client sees only between which two
//! of them that was. What is known is kept as differences (a difference-bound matrix, as model
//! checkers for timed automata use it): the most that one time is after another. It is exact: as
//! long as no bound contradicts another, there are whole milliseconds that fit all of them.

/// Farther than any time in a history.
pub const FAR_MS: i64 = 1 << 60;

/// The two that are always there; the leases follow.
const ORIGIN: usize = 0;
const NOW: usize = 1;
const FIRST: usize = 2;

/// All ways the times may lie. The leases are those of a limiter, by their place in its order.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Times {
    /// How many times there are.
    size: usize,
    /// Row by row: how much later the row's time is than the column's, at most.
    most_ms: Vec<i64>,
}

impl Times {
    /// No lease, and it is 0 or later.
    pub fn start() -> Self {
        Self { size: FIRST, most_ms: vec![0, 0, FAR_MS, 0] }
    }

    fn most_ms(&self, later: usize, earlier: usize) -> i64 {
        self.most_ms[later * self.size + earlier]
    }

    /// It is as late as it was, or later, between these two.
    pub fn pass(self, (from_ms, to_ms): (i64, i64)) -> Option<Self> {
        self.and_later().bound(ORIGIN, NOW, -from_ms)?.bound(NOW, ORIGIN, to_ms)
    }

    /// It is as late as it was, or later.
    pub fn and_later(mut self) -> Self {
        for other in (0..self.size).filter(|other| *other != NOW) {
            self.most_ms[NOW * self.size + other] = FAR_MS;
        }
        self
    }

    /// A lease at this place lapses `ttl_ms` from now.
    pub fn insert(&self, place: usize, ttl_ms: i64) -> Self {
        let at = FIRST + place;
        // It is as now is, but for the ttl.
        let old = |time| match time {
            _ if time == at => (NOW, ttl_ms),
            _ => (time - usize::from(time > at), 0),
        };
        self.rebuilt(self.size + 1, |later, earlier| match (old(later), old(earlier)) {
            _ if later == earlier => 0,
            ((later, after_ms), (earlier, before_ms)) => {
                self.most_ms(later, earlier) + after_ms - before_ms
            }
        })
    }

    pub fn remove(&self, place: usize) -> Self {
        let old = |time| time + usize::from(time >= FIRST + place);
        self.rebuilt(self.size - 1, |later, earlier| self.most_ms(old(later), old(earlier)))
    }

    fn rebuilt(&self, size: usize, most_ms: impl Fn(usize, usize) -> i64) -> Self {
        let mut rebuilt = Vec::with_capacity(size * size);
        for later in 0..size {
            rebuilt.extend((0..size).map(|earlier| most_ms(later, earlier)));
        }
        Self { size, most_ms: rebuilt }
    }

    /// The lease has lapsed.
    pub fn lapsed(self, place: usize) -> Option<Self> {
        self.bound(FIRST + place, NOW, 0)
    }

    /// The lease has not lapsed yet.
    pub fn live(self, place: usize) -> Option<Self> {
        self.bound(NOW, FIRST + place, -1)
    }

    /// The lease lapses this long from now.
    pub fn lapses_in(self, place: usize, left_ms: i64) -> Option<Self> {
        self.bound(FIRST + place, NOW, left_ms)?.bound(NOW, FIRST + place, -left_ms)
    }

    /// One lapses before the other, or at least not after it.
    pub fn before(self, first: usize, second: usize, by_ms: i64) -> Option<Self> {
        self.bound(FIRST + first, FIRST + second, -by_ms)
    }

    /// `later` is after `earlier` by this at most; `None` if that cannot be.
    fn bound(mut self, later: usize, earlier: usize, most_ms: i64) -> Option<Self> {
        if self.most_ms(later, earlier) <= most_ms {
            return Some(self);
        }
        if self.most_ms(earlier, later) + most_ms < 0 {
            return None;
        }
        for first in 0..self.size {
            let through_ms = self.most_ms(first, later) + most_ms;
            for last in 0..self.size {
                let bound_ms = through_ms + self.most_ms(earlier, last);
                let old_ms = &mut self.most_ms[first * self.size + last];
                *old_ms = bound_ms.min(*old_ms);
            }
        }
        Some(self)
    }
}
