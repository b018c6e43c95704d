//! The lines against a naive model: a list of waiters per limiter, searched from end to end.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
pub enum Step {
    Join { db: i32, prefix: u8, deadline_ms: Option<i64> },
    Leave { nth: usize },
    Grant { nth_line: usize },
    Touch { db: i32, prefix: u8 },
    TouchDatabase { db: Option<i32> },
    SetAlarm { nth_line: usize, alarm_ms: Option<i64> },
    TimePasses { ms: i64 },
    TakeDue,
}

fn step() -> impl Strategy<Value = Step> {
    let (db, prefix) = (0..2_i32, 0..3_u8);
    prop_oneof![
        6 => (db.clone(), prefix.clone(), prop::option::of(0..100_i64))
            .prop_map(|(db, prefix, deadline_ms)| Step::Join { db, prefix, deadline_ms }),
        3 => any::<usize>().prop_map(|nth| Step::Leave { nth }),
        3 => any::<usize>().prop_map(|nth_line| Step::Grant { nth_line }),
        2 => (db.clone(), prefix).prop_map(|(db, prefix)| Step::Touch { db, prefix }),
        1 => prop::option::of(db).prop_map(|db| Step::TouchDatabase { db }),
        2 => (any::<usize>(), prop::option::of(0..100_i64))
            .prop_map(|(nth_line, alarm_ms)| Step::SetAlarm { nth_line, alarm_ms }),
        2 => (0..20_i64).prop_map(|ms| Step::TimePasses { ms }),
        2 => Just(Step::TakeDue),
    ]
}

/// A waiter as the model has it.
#[derive(Clone, Debug, PartialEq)]
struct Waiter {
    id: WaiterId,
    limiter: (i32, u8),
    deadline_ms: Option<i64>,
}

#[derive(Default)]
struct Model {
    in_order: Vec<Waiter>,
    due: Vec<(i32, u8)>,
    alarms: Vec<((i32, u8), i64)>,
}

impl Model {
    fn line(&self, limiter: (i32, u8)) -> Vec<&Waiter> {
        self.in_order.iter().filter(|waiter| waiter.limiter == limiter).collect()
    }

    fn limiters(&self) -> Vec<(i32, u8)> {
        let mut all: Vec<_> = self.in_order.iter().map(|waiter| waiter.limiter).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn make_due(&mut self, limiter: (i32, u8)) {
        if !self.line(limiter).is_empty() && !self.due.contains(&limiter) {
            self.due.push(limiter);
        }
    }

    fn remove(&mut self, id: WaiterId, granted: bool) {
        let at = self.in_order.iter().position(|waiter| waiter.id == id).expect("a waiter");
        let limiter = self.in_order[at].limiter;
        let was_head = self.line(limiter)[0].id == id;
        self.in_order.remove(at);
        if was_head && !granted {
            self.make_due(limiter);
        }
        if self.line(limiter).is_empty() {
            self.due.retain(|due| *due != limiter);
            self.alarms.retain(|(of, _)| *of != limiter);
        }
    }
}

fn check(lines: &Lines<(i32, u8)>, model: &Model) {
    assert_eq!(lines.totals(), (model.in_order.len(), model.limiters().len()));
    for db in 0..2 {
        for prefix in 0..3 {
            let expected = model.line((db, prefix));
            let line = lines.line(db, &[prefix]);
            assert_eq!(line.is_some(), !expected.is_empty(), "a line lives while somebody waits");
            if let Some(line) = line {
                assert_eq!(lines.len(line), expected.len());
                assert_eq!(lines.head(line).map(|(id, _)| id), Some(expected[0].id));
                assert_eq!(lines.limiter(line), Some((db, &Arc::from([prefix]))));
            }
        }
    }
    let deadlines = model.in_order.iter().filter_map(|waiter| waiter.deadline_ms);
    let soonest = deadlines.chain(model.alarms.iter().map(|(_, ms)| *ms)).min();
    let next_ms = if model.due.is_empty() { soonest } else { Some(i64::MIN) };
    assert_eq!(lines.next_ms(), next_ms);
}

pub fn run(steps: Vec<Step>) {
    let mut lines = Lines::default();
    let mut model = Model::default();
    let mut now_ms = 0;
    for step in steps {
        match step {
            Step::Join { db, prefix, deadline_ms } => {
                let deadline_ms = deadline_ms.map(|ms| now_ms + ms);
                let (id, _) = lines.join(db, &Arc::from([prefix]), deadline_ms, (db, prefix));
                model.in_order.push(Waiter { id, limiter: (db, prefix), deadline_ms });
            }
            Step::Leave { nth } if !model.in_order.is_empty() => {
                let id = model.in_order[nth % model.in_order.len()].id;
                assert!(lines.leave(id).is_some());
                assert!(lines.leave(id).is_none(), "it leaves once");
                model.remove(id, false);
            }
            Step::Grant { nth_line } if !model.in_order.is_empty() => {
                let limiters = model.limiters();
                let limiter = limiters[nth_line % limiters.len()];
                let line = lines.line(limiter.0, &[limiter.1]).expect("a line");
                let (head, _) = lines.head(line).expect("a head");
                assert_eq!(lines.answered(head), Some(limiter));
                model.remove(head, true);
            }
            Step::Touch { db, prefix } => {
                lines.touch(db, &[prefix]);
                model.make_due((db, prefix));
            }
            Step::TouchDatabase { db } => {
                lines.touch_database(db);
                for limiter in model.limiters() {
                    if db.is_none_or(|db| db == limiter.0) {
                        model.make_due(limiter);
                    }
                }
            }
            Step::SetAlarm { nth_line, alarm_ms } if !model.in_order.is_empty() => {
                let limiters = model.limiters();
                let limiter = limiters[nth_line % limiters.len()];
                let line = lines.line(limiter.0, &[limiter.1]).expect("a line");
                let alarm_ms = alarm_ms.map(|ms| now_ms + ms);
                lines.set_alarm(line, alarm_ms);
                model.alarms.retain(|(of, _)| *of != limiter);
                model.alarms.extend(alarm_ms.map(|ms| (limiter, ms)));
            }
            Step::TimePasses { ms } => {
                now_ms += ms;
                let mut gone = Vec::new();
                while let Some((id, _)) = lines.next_timed_out(now_ms) {
                    gone.push(id);
                }
                let is_over = |waiter: &Waiter| waiter.deadline_ms.is_some_and(|ms| ms <= now_ms);
                let mut expected: Vec<Waiter> =
                    model.in_order.iter().filter(|waiter| is_over(waiter)).cloned().collect();
                expected.sort_by_key(|waiter| (waiter.deadline_ms, waiter.id));
                assert_eq!(gone, expected.iter().map(|waiter| waiter.id).collect::<Vec<_>>());
                for (limiter, _) in model.alarms.clone().into_iter().filter(|(_, ms)| *ms <= now_ms)
                {
                    model.make_due(limiter);
                }
                model.alarms.retain(|(_, ms)| *ms > now_ms);
                gone.into_iter().for_each(|id| model.remove(id, false));
            }
            Step::TakeDue => {
                let mut taken = Vec::new();
                while let Some(line) = lines.next_due() {
                    let (db, prefix) = lines.limiter(line).expect("a line that is due exists");
                    taken.push((db, prefix[0]));
                }
                taken.sort_unstable();
                model.due.sort_unstable();
                assert_eq!(taken, std::mem::take(&mut model.due));
            }
            Step::Leave { .. } | Step::Grant { .. } | Step::SetAlarm { .. } => {}
        }
        check(&lines, &model);
    }
    // All gone, nothing left: what a table keeps of the past is a leak.
    while let Some(waiter) = model.in_order.pop() {
        lines.leave(waiter.id);
    }
    assert!(lines.lines.is_empty() && lines.by_limiter.is_empty());
    assert!(lines.due.is_empty() && lines.alarms.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn lines_are_first_come_first_served(steps in prop::collection::vec(step(), 1..80)) {
        run(steps);
    }
}
