//! Lines of waiters: first come, first served, one line per limiter (database and prefix).
//!
//! Pure: no Redis, no clock. A waiter is whatever the caller makes of it (`W`); what is kept here
//! is who stands where, until when, and which line is to be looked at next. What always holds:
//!
//! - A waiter stands in one line, in the order of arrival, and nobody ever passes it. Only the
//!   head of a line may be granted; the rest wait for it, whatever their own limits.
//! - A line exists exactly as long as somebody stands in it.
//! - Whenever the head of a line changes by anything but a grant, the line is *due*: the next head
//!   may have another limit or key, and be grantable at once.
//!
//! Arrival, departure from anywhere in a line, and finding what is due are O(log N).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// A waiter's name: the number of its arrival, never used twice.
pub type WaiterId = u64;

/// A line's name, never used twice.
pub type LineId = u64;

/// All lines.
#[cfg_attr(test, derive(Clone))]
pub struct Lines<W> {
    waiters: BTreeMap<WaiterId, Standing<W>>,
    lines: BTreeMap<LineId, Line>,
    by_limiter: BTreeMap<i32, HashMap<Arc<[u8]>, LineId>>,
    due: BTreeSet<LineId>,
    alarms: BTreeSet<(i64, Alarm)>,
    next_id: u64,
}

#[cfg_attr(test, derive(Clone, Hash))]
struct Standing<W> {
    waiter: W,
    line: LineId,
    deadline_ms: Option<i64>,
}

#[cfg_attr(test, derive(Clone, Hash))]
struct Line {
    db: i32,
    prefix: Arc<[u8]>,
    // Arrival numbers only grow, so this order is that of arrival.
    waiting: BTreeSet<WaiterId>,
    alarm_ms: Option<i64>,
}

/// What a time is kept for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    /// The waiter's patience ends.
    Deadline(WaiterId),
    /// The line is to be looked at: a lease lapses.
    Line(LineId),
}

impl<W> Default for Lines<W> {
    fn default() -> Self {
        Self {
            waiters: BTreeMap::new(),
            lines: BTreeMap::new(),
            by_limiter: BTreeMap::new(),
            due: BTreeSet::new(),
            alarms: BTreeSet::new(),
            next_id: 1,
        }
    }
}

impl<W> Lines<W> {
    /// The line of a limiter, if somebody stands in it.
    #[must_use]
    pub fn line(&self, db: i32, prefix: &[u8]) -> Option<LineId> {
        self.by_limiter.get(&db)?.get(prefix).copied()
    }

    /// The limiter whose line it is.
    #[must_use]
    pub fn limiter(&self, line: LineId) -> Option<(i32, &Arc<[u8]>)> {
        self.lines.get(&line).map(|line| (line.db, &line.prefix))
    }

    /// How many stand in all lines, and how many lines there are.
    #[must_use]
    pub fn totals(&self) -> (usize, usize) {
        (self.waiters.len(), self.lines.len())
    }

    /// How many stand in the line.
    #[must_use]
    pub fn len(&self, line: LineId) -> usize {
        self.lines.get(&line).map_or(0, |line| line.waiting.len())
    }

    /// Who is next.
    #[must_use]
    pub fn head(&self, line: LineId) -> Option<(WaiterId, &W)> {
        let head = *self.lines.get(&line)?.waiting.first()?;
        Some((head, &self.waiters.get(&head)?.waiter))
    }

    /// Puts a waiter at the end of the limiter's line; where it stands now.
    pub fn join(
        &mut self,
        db: i32,
        prefix: &Arc<[u8]>,
        deadline_ms: Option<i64>,
        waiter: W,
    ) -> (WaiterId, LineId) {
        let id = self.new_id();
        let line_id = match self.line(db, prefix) {
            Some(line_id) => line_id,
            None => {
                let line_id = self.new_id();
                self.by_limiter.entry(db).or_default().insert(prefix.clone(), line_id);
                let prefix = prefix.clone();
                let line = Line { db, prefix, waiting: BTreeSet::new(), alarm_ms: None };
                self.lines.insert(line_id, line);
                line_id
            }
        };
        if let Some(line) = self.lines.get_mut(&line_id) {
            line.waiting.insert(id);
        }
        if let Some(deadline_ms) = deadline_ms {
            self.alarms.insert((deadline_ms, Alarm::Deadline(id)));
        }
        self.waiters.insert(id, Standing { waiter, line: line_id, deadline_ms });
        (id, line_id)
    }

    /// Takes the head out of its line, because it was answered: what comes next is the caller's
    /// to look at.
    pub fn answered(&mut self, id: WaiterId) -> Option<W> {
        self.remove(id).map(|(standing, _)| standing.waiter)
    }

    /// Takes a waiter out of its line for any other reason. If it was the head, the line is due.
    pub fn leave(&mut self, id: WaiterId) -> Option<W> {
        let (standing, was_head) = self.remove(id)?;
        if was_head && self.lines.contains_key(&standing.line) {
            self.due.insert(standing.line);
        }
        Some(standing.waiter)
    }

    /// The limiter may have changed: its line, if any, is due. Whether it has one.
    pub fn touch(&mut self, db: i32, prefix: &[u8]) -> bool {
        let line = self.line(db, prefix);
        self.due.extend(line);
        line.is_some()
    }

    /// Every limiter of a database (`None`: of all) may have changed.
    pub fn touch_database(&mut self, db: Option<i32>) {
        let of_db = |line: &&LineId| {
            db.is_none_or(|db| self.lines.get(line).is_some_and(|line| line.db == db))
        };
        let due: Vec<LineId> = self.lines.keys().filter(of_db).copied().collect();
        self.due.extend(due);
    }

    /// The line is due (again).
    pub fn touch_line(&mut self, line: LineId) {
        if self.lines.contains_key(&line) {
            self.due.insert(line);
        }
    }

    /// When to look at the line again without anybody's touching it; replaces what was set.
    pub fn set_alarm(&mut self, line_id: LineId, alarm_ms: Option<i64>) {
        let Some(line) = self.lines.get_mut(&line_id) else { return };
        if line.alarm_ms == alarm_ms {
            return;
        }
        if let Some(old_ms) = line.alarm_ms {
            self.alarms.remove(&(old_ms, Alarm::Line(line_id)));
        }
        if let Some(new_ms) = alarm_ms {
            self.alarms.insert((new_ms, Alarm::Line(line_id)));
        }
        line.alarm_ms = alarm_ms;
    }

    /// When something is to be done next: `i64::MIN` = now.
    #[must_use]
    pub fn next_ms(&self) -> Option<i64> {
        if !self.due.is_empty() {
            return Some(i64::MIN);
        }
        self.alarms.first().map(|(time_ms, _)| *time_ms)
    }

    /// Takes one waiter out of its line whose deadline is at or before `now_ms`. Lines whose
    /// alarm is reached on the way become due.
    pub fn next_timed_out(&mut self, now_ms: i64) -> Option<(WaiterId, W)> {
        while let Some((time_ms, alarm)) = self.alarms.first().copied() {
            if time_ms > now_ms {
                return None;
            }
            match alarm {
                Alarm::Deadline(id) => return self.leave(id).map(|waiter| (id, waiter)),
                Alarm::Line(line) => {
                    self.set_alarm(line, None);
                    self.touch_line(line);
                }
            }
        }
        None
    }

    /// Takes one line that is due.
    pub fn next_due(&mut self) -> Option<LineId> {
        self.due.pop_first()
    }

    fn new_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        id
    }

    /// Takes a waiter out, and its line with it if it was the last; whether it was the head.
    fn remove(&mut self, id: WaiterId) -> Option<(Standing<W>, bool)> {
        let standing = self.waiters.remove(&id)?;
        if let Some(deadline_ms) = standing.deadline_ms {
            self.alarms.remove(&(deadline_ms, Alarm::Deadline(id)));
        }
        let line_id = standing.line;
        let mut was_head = false;
        if let Some(line) = self.lines.get_mut(&line_id) {
            was_head = line.waiting.first() == Some(&id);
            line.waiting.remove(&id);
            if line.waiting.is_empty() {
                self.remove_line(line_id);
            }
        }
        Some((standing, was_head))
    }

    fn remove_line(&mut self, line_id: LineId) {
        self.set_alarm(line_id, None);
        self.due.remove(&line_id);
        let Some(line) = self.lines.remove(&line_id) else { return };
        if let Some(limiters) = self.by_limiter.get_mut(&line.db) {
            limiters.remove(&line.prefix);
            if limiters.is_empty() {
                self.by_limiter.remove(&line.db);
            }
        }
    }
}

/// The model check tells states apart by their hash. `next_id` is nothing but a name to come.
#[cfg(test)]
impl<W: std::hash::Hash> std::hash::Hash for Lines<W> {
    fn hash<H: std::hash::Hasher>(&self, hasher: &mut H) {
        let Self { waiters, lines, by_limiter, due, alarms, next_id: _ } = self;
        (waiters, lines, due, alarms).hash(hasher);
        for (db, lines) in by_limiter {
            (db, lines.iter().collect::<BTreeMap<_, _>>()).hash(hasher);
        }
    }
}

#[cfg(any(test, fuzzing))]
#[path = "queue/tests.rs"] // Said in full for fuzz/, which takes this file in by its path.
pub mod tests;
