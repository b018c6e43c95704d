//! The rules against a naive model, under random commands, foreign writes and steps of the clock.
//!
//! Two things stand in here: [`Set`], a sorted set as simple as can be, which the rules work on;
//! and [`Model`], which says what the rules must decide without sharing a line with them.

use std::cell::Cell;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// A sorted set: members with scores, an expiry, and whether the last command wrote.
#[derive(Clone, Debug, Default)]
struct Set {
    members: Vec<(u8, f64)>,
    expiry_ms: Option<i64>,
    wrote: bool,
    expiries_written: u32,
    /// How often anything was looked up, but for what `count` and `put` tell.
    looks: Cell<u32>,
    /// How many are pruned at once, if not as many as asked for.
    step: Option<u64>,
}

impl Set {
    /// What the server does when the last member goes.
    fn drop_expiry_if_empty(&mut self) {
        if self.members.is_empty() {
            self.expiry_ms = None;
        }
    }

    /// What the server does when the set's expiry is reached.
    fn expire(&mut self, now_ms: i64) {
        if self.expiry_ms.is_some_and(|expiry_ms| expiry_ms <= now_ms) {
            self.members.clear();
            self.expiry_ms = None;
        }
    }

    fn look(&self) {
        self.looks.set(self.looks.get() + 1);
    }

    fn retain(&mut self, keep: impl Fn(&(u8, f64)) -> bool) -> u64 {
        let before = self.members.len();
        self.members.retain(keep);
        let removed = (before - self.members.len()) as u64;
        self.wrote |= removed > 0;
        self.drop_expiry_if_empty();
        removed
    }

    fn sorted(&self) -> Vec<(u8, f64)> {
        let mut members = self.members.clone();
        members.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
        members
    }
}

impl Leases for Set {
    type Key<'k> = u8;

    fn prune(&mut self, now_ms: i64, at_most: u64) -> Pruned {
        self.look();
        let mut lapsed = self.sorted();
        lapsed.retain(|(_, member_score)| *member_score <= score(now_ms));
        let at_most = self.step.unwrap_or(at_most) as usize;
        let left = lapsed.split_off(at_most.min(lapsed.len()));
        let removed = self.retain(|member| !lapsed.contains(member));
        Pruned { removed, left: left.len() as u64 }
    }

    fn holds(&self, key: &u8) -> bool {
        self.look();
        self.members.iter().any(|(member, _)| member == key)
    }

    fn has_lapsed(&self, key: &u8, now_ms: i64) -> bool {
        self.look();
        self.members.iter().any(|(member, its)| member == key && *its <= score(now_ms))
    }

    fn count(&self) -> u64 {
        self.members.len() as u64
    }

    fn put(&mut self, key: &u8, lapse_ms: i64, put: Put) -> Found {
        let new = score(lapse_ms);
        let found = match (self.members.iter_mut().find(|(member, _)| member == key), put) {
            (Some(_), Put::AddOnly) | (None, Put::MoveOnly) => Found::Refused,
            (Some((_, old)), _) if *old == new => Found::Same,
            (Some((_, old)), _) => {
                *old = new;
                Found::Moved
            }
            (None, _) => {
                self.members.push((*key, new));
                Found::Added
            }
        };
        self.wrote |= matches!(found, Found::Added | Found::Moved);
        found
    }

    fn remove(&mut self, keys: &[u8]) -> u64 {
        self.retain(|(member, _)| !keys.contains(member))
    }

    fn any_after(&self, time_ms: i64) -> bool {
        self.look();
        self.members.iter().any(|(_, member_score)| *member_score > score(time_ms))
    }

    fn next_lapse_ms(&self) -> Option<i64> {
        self.look();
        self.sorted().first().and_then(|(_, first)| lapse_ms(*first))
    }

    fn last_lapse_ms(&self) -> Option<i64> {
        self.look();
        self.sorted().last().and_then(|(_, last)| lapse_ms(*last))
    }

    fn expiry_ms(&self) -> Option<i64> {
        self.look();
        self.expiry_ms
    }

    fn set_expiry_ms(&mut self, expiry_ms: Option<i64>) {
        assert!(!self.members.is_empty());
        self.expiry_ms = expiry_ms;
        self.wrote = true;
        self.expiries_written += 1;
    }
}

/// Who holds a lease until when; `None` = it never lapses.
#[derive(Clone, Debug, Default)]
struct Model(BTreeMap<u8, Option<i64>>);

impl Model {
    fn lapse(&mut self, now_ms: i64) {
        self.0.retain(|_, end_ms| end_ms.is_none_or(|end_ms| end_ms > now_ms));
    }

    fn acquire(&mut self, key: u8, limit: u64, end_ms: i64, nx: bool) -> Outcome {
        match (self.0.contains_key(&key), (self.0.len() as u64) < limit) {
            (true, _) if nx => Outcome::Denied,
            (true, _) => {
                self.0.insert(key, Some(end_ms));
                Outcome::Refreshed
            }
            (false, true) => {
                self.0.insert(key, Some(end_ms));
                Outcome::Acquired
            }
            (false, false) => Outcome::Denied,
        }
    }

    /// Milliseconds until fewer than `limit` are live, tried one lapse after the other.
    fn wait_ms(&self, limit: u64, now_ms: i64) -> Option<i64> {
        let mut times: Vec<i64> = self.0.values().flatten().copied().collect();
        times.push(now_ms);
        times.sort_unstable();
        let live_at = |time_ms: i64| {
            self.0.values().filter(|end_ms| end_ms.is_none_or(|end_ms| end_ms > time_ms)).count()
        };
        times.into_iter().find(|time_ms| (live_at(*time_ms) as u64) < limit).map(|ms| ms - now_ms)
    }
}

#[derive(Clone, Debug)]
pub enum Step {
    Acquire { key: u8, limit: u64, ttl_ms: i64, nx: bool },
    Renew { key: u8, ttl_ms: i64 },
    Release { keys: Vec<u8> },
    Wait { ms: i64 },
    ForeignAdd { key: u8, score: f64 },
    ForeignRemove { key: u8 },
    ForeignExpiry { expiry_ms: Option<i64> },
}

pub const START_MS: i64 = 1_800_000_000_000;

fn ttl_ms() -> impl Strategy<Value = i64> {
    prop_oneof![3 => 1..50_i64, 2 => 50..30_000_i64, 1 => 1..3 * EXPIRY_SLACK_MAX_MS]
}

/// Scores as other programs write them: in the past, finer than a millisecond, infinite, huge.
fn foreign_score() -> impl Strategy<Value = f64> {
    prop_oneof![
        4 => (-1e3..20e3).prop_map(|seconds| START_MS as f64 / 1e3 + seconds),
        1 => Just(f64::INFINITY),
        1 => Just(f64::NEG_INFINITY),
        1 => Just(1e300),
        1 => Just(0.0),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0..8_u8;
    let limit = prop_oneof![4 => 0..6_u64, 1 => Just(i64::MAX as u64)];
    prop_oneof![
        8 => (key.clone(), limit, ttl_ms(), any::<bool>())
            .prop_map(|(key, limit, ttl_ms, nx)| Step::Acquire { key, limit, ttl_ms, nx }),
        3 => (key.clone(), ttl_ms()).prop_map(|(key, ttl_ms)| Step::Renew { key, ttl_ms }),
        3 => prop::collection::vec(key.clone(), 1..4).prop_map(|keys| Step::Release { keys }),
        5 => ttl_ms().prop_map(|ms| Step::Wait { ms }),
        1 => (key.clone(), foreign_score())
            .prop_map(|(key, score)| Step::ForeignAdd { key, score }),
        1 => key.prop_map(|key| Step::ForeignRemove { key }),
        1 => prop::option::of(1..2 * EXPIRY_SLACK_MAX_MS).prop_map(|ms| Step::ForeignExpiry {
            expiry_ms: ms.map(|ms| START_MS + ms)
        }),
    ]
}

/// The set's expiry is where the rules promise it.
fn check_expiry(set: &Set) {
    let ends: Vec<Option<i64>> = set.members.iter().map(|(_, score)| lapse_ms(*score)).collect();
    if ends.is_empty() || ends.contains(&None) {
        assert_eq!(set.expiry_ms, None, "{set:?}");
    } else {
        let last_ms = ends.into_iter().flatten().max().unwrap();
        let expiry_ms = set.expiry_ms.expect("an expiry");
        assert!(expiry_ms >= last_ms, "before the last lease's end: {set:?}");
        assert!(expiry_ms <= last_ms + EXPIRY_SLACK_MAX_MS, "too late: {set:?}");
    }
}

/// Takes one command's steps on a set, knowing what the command before it found out.
fn on<R>(
    set: &mut Set,
    facts: &mut Facts,
    now_ms: i64,
    work: impl FnOnce(&mut Limiter<Set>) -> R,
) -> R {
    let before = set.count();
    let mut limiter = Limiter::new(std::mem::take(set), *facts);
    let result = work(&mut limiter);
    *facts = limiter.facts();
    let next_change_ms = limiter.next_change_ms();
    let Counters { acquired, released, lapsed, .. } = *limiter.counted();
    *set = limiter.leases;
    assert_eq!(before + acquired, set.count() + released + lapsed, "the books balance");
    if let Some(change_ms) = [set.next_lapse_ms(), set.expiry_ms].into_iter().flatten().min() {
        assert!(next_change_ms.is_some_and(|ms| ms <= change_ms), "{next_change_ms:?} {set:?}");
    }
    // Once all is pruned it is later than now: who goes by it must not look again and again.
    let is_known = facts.none_lapses_before_ms > i64::MIN;
    let is_later = next_change_ms.is_none_or(|ms| ms > now_ms && ms < i64::MAX);
    assert!(is_later || !is_known, "{next_change_ms:?} {set:?}");
    result
}

/// The same, knowing nothing.
fn on_unknown<R>(set: &mut Set, now_ms: i64, work: impl FnOnce(&mut Limiter<Set>) -> R) -> R {
    on(set, &mut Facts::UNKNOWN.clone(), now_ms, work)
}

pub fn check(steps: Vec<Step>, prune_step: Option<u64>) {
    let mut now_ms = START_MS;
    let mut set = Set { step: prune_step, ..Set::default() };
    let mut facts = Facts::UNKNOWN;
    let mut model = Model::default();
    for step in steps {
        set.expire(now_ms);
        if set.members.is_empty() {
            model.0.clear(); // A foreign expiry may have cut live leases off.
        }
        model.lapse(now_ms);
        set.wrote = false;
        let before = set.sorted();
        match step {
            Step::Acquire { key, limit, ttl_ms, nx } => {
                let end_ms = lapse_after(now_ms, ttl_ms).unwrap();
                let reacquire = if nx { Reacquire::Deny } else { Reacquire::Refresh };
                let would = on(&mut set, &mut facts, now_ms, |limiter| {
                    limiter.would_acquire(&key, limit, now_ms, reacquire)
                });
                let (outcome, live, lapsed) = on(&mut set, &mut facts, now_ms, |limiter| {
                    let outcome = limiter.acquire(&key, limit, end_ms, now_ms, reacquire);
                    (outcome, limiter.live(), limiter.lapsed())
                });
                assert_eq!(outcome, model.acquire(key, limit, end_ms, nx));
                assert_eq!(would, outcome != Outcome::Denied);
                assert_eq!(live, model.0.len() as u64, "the count is exact");
                let wait_ms = match next_free(live, limit) {
                    NextFree::Now => Some(0),
                    NextFree::Never => None,
                    NextFree::WhenLapsed { rank } => {
                        lapse_ms(set.sorted()[(lapsed + rank) as usize].1).map(|ms| ms - now_ms)
                    }
                };
                assert_eq!(wait_ms, model.wait_ms(limit, now_ms), "the hint is exact");
                if outcome != Outcome::Denied {
                    check_expiry(&set);
                } else if before == set.sorted() {
                    assert!(!set.wrote, "a denied acquire that pruned nothing writes nothing");
                }
            }
            Step::Renew { key, ttl_ms } => {
                let end_ms = lapse_after(now_ms, ttl_ms).unwrap();
                let live = model.0.get_mut(&key).map(|end| *end = Some(end_ms)).is_some();
                let renewed =
                    on(&mut set, &mut facts, now_ms, |limiter| limiter.renew(&key, end_ms, now_ms));
                assert_eq!(renewed, live);
                assert!(renewed || before != set.sorted() || !set.wrote, "nothing was changed");
            }
            Step::Release { keys } => {
                let held = model.0.len();
                model.0.retain(|key, _| !keys.contains(key));
                let released =
                    on(&mut set, &mut facts, now_ms, |limiter| limiter.release(&keys, now_ms));
                assert_eq!(released, (held - model.0.len()) as u64);
                assert!(before != set.sorted() || !set.wrote, "nothing was changed");
            }
            Step::Wait { ms } => now_ms += ms,
            Step::ForeignAdd { key, score } => {
                facts = Facts::UNKNOWN;
                set.members.retain(|(member, _)| *member != key);
                set.members.push((key, score));
                model.0.insert(key, lapse_ms(score));
                model.lapse(now_ms);
            }
            Step::ForeignRemove { key } => {
                facts = Facts::UNKNOWN;
                set.members.retain(|(member, _)| *member != key);
                set.drop_expiry_if_empty();
                model.0.remove(&key);
            }
            Step::ForeignExpiry { expiry_ms } if !set.members.is_empty() => {
                facts = Facts::UNKNOWN;
                set.expiry_ms = expiry_ms;
            }
            Step::ForeignExpiry { .. } => {}
        }
        if set.wrote {
            check_expiry(&set);
            let live: Vec<u8> = model.0.keys().copied().collect();
            let mut held = set.members.clone();
            if prune_step.is_some() {
                held.retain(|(_, its)| *its > score(now_ms)); // The rest comes later.
            }
            let mut held: Vec<u8> = held.iter().map(|(key, _)| *key).collect();
            held.sort_unstable();
            assert_eq!(held, live, "after a write the set is the live leases, and nothing else");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_rules_decide_as_the_model(steps in prop::collection::vec(step(), 1..60)) {
        check(steps, None);
    }

    #[test]
    fn and_so_they_do_when_they_prune_a_few_at_a_time(
        steps in prop::collection::vec(step(), 1..60),
        prune_step in 1..3_u64,
    ) {
        check(steps, Some(prune_step));
    }

    #[test]
    fn a_lease_lapses_at_its_millisecond_and_not_before(end_ms in 1..=LAST_LAPSE_MS) {
        prop_assert_eq!(lapse_ms(score(end_ms)), lapse_ms_slowly(score(end_ms)));
        // Near 2^53 ms a double of seconds no longer tells neighbouring milliseconds apart.
        if end_ms < 8_796_093_022_208_000 {
            prop_assert_eq!(lapse_ms(score(end_ms)), Some(end_ms));
            prop_assert!(score(end_ms - 1) < score(end_ms));
        }
    }

    #[test]
    fn a_score_finer_than_a_millisecond_lapses_at_the_next_one(seconds in 0.0..1e10_f64) {
        prop_assert_eq!(lapse_ms(seconds), lapse_ms_slowly(seconds));
    }
}

/// The first millisecond whose score is not before `of`, by bisection.
fn lapse_ms_slowly(of: f64) -> Option<i64> {
    let (mut before, mut after) = (-1, LAST_LAPSE_MS + 1);
    while after - before > 1 {
        let middle = before + (after - before) / 2;
        if score(middle) >= of {
            after = middle;
        } else {
            before = middle;
        }
    }
    Some(after)
}

#[test]
fn scores_at_the_edges() {
    assert_eq!(lapse_ms(f64::INFINITY), None);
    assert_eq!(lapse_ms(1e300), None);
    assert_eq!(lapse_ms(f64::NEG_INFINITY), Some(i64::MIN));
    assert_eq!(lapse_ms(0.0), Some(0));
    assert_eq!(lapse_ms(1.0005), Some(1001));
    assert!(lapse_ms(f64::NAN).is_some());
    assert!(lapse_ms(score(NEVER_MS)).is_some());
    assert_eq!(lapse_ms(score(NEVER_MS) * (1.0 + f64::EPSILON)), None);
}

#[test]
fn the_largest_ttl_ends_at_the_last_exact_millisecond() {
    assert_eq!(lapse_after(START_MS, LAST_LAPSE_MS - START_MS), Some(LAST_LAPSE_MS));
    assert_eq!(lapse_after(START_MS, LAST_LAPSE_MS - START_MS + 1), None);
    assert_eq!(lapse_after(START_MS, i64::MAX), None);
    assert_eq!(lapse_after(START_MS, 0), None);
    assert_eq!(lapse_after(START_MS, 1), Some(START_MS + 1));
}

#[test]
fn a_short_ttl_never_shortens_the_sets_expiry() {
    let mut set = Set::default();
    for (key, ttl_ms) in [(1, 3 * EXPIRY_SLACK_MAX_MS), (2, 1)] {
        on_unknown(&mut set, START_MS, |limiter| {
            limiter.acquire(&key, 2, START_MS + ttl_ms, START_MS, Reacquire::Refresh)
        });
    }
    check_expiry(&set);
}

#[test]
fn the_expiry_is_written_about_once_an_hour() {
    let mut set = Set::default();
    let (seconds, ttl_ms) = (10 * 3_600, 45_000);
    for second in 0..seconds {
        let now_ms = START_MS + second * 1000;
        let key = (second % 7) as u8;
        on_unknown(&mut set, now_ms, |limiter| {
            limiter.acquire(&key, 100, now_ms + ttl_ms, now_ms, Reacquire::Refresh)
        });
        check_expiry(&set);
    }
    assert!((1..=11).contains(&set.expiries_written), "{}", set.expiries_written);
}

#[test]
fn a_limit_below_the_holders_evicts_nobody_and_waits_for_enough_to_lapse() {
    let mut set = Set::default();
    for key in 0..5 {
        on_unknown(&mut set, START_MS, |limiter| {
            let lapse_ms = START_MS + 100 * i64::from(key + 1);
            limiter.acquire(&key, 5, lapse_ms, START_MS, Reacquire::Deny)
        });
    }
    let outcome = on_unknown(&mut set, START_MS, |limiter| {
        limiter.acquire(&9, 2, START_MS + 1000, START_MS, Reacquire::Refresh)
    });
    assert_eq!(outcome, Outcome::Denied);
    assert_eq!(set.count(), 5);
    // Four of the five must go before one of two slots is free.
    assert_eq!(next_free(5, 2), NextFree::WhenLapsed { rank: 3 });
}

/// What is looked up while `work` works, knowing what the command before it found out.
fn looks(set: &mut Set, facts: &mut Facts, work: impl FnOnce(&mut Limiter<Set>)) -> u32 {
    let mut limiter = Limiter::new(std::mem::take(set), *facts);
    let before = limiter.leases.looks.get();
    work(&mut limiter);
    *facts = limiter.facts();
    *set = limiter.leases;
    set.looks.get() - before
}

#[test]
fn what_is_known_is_not_looked_up() {
    let refresh = Reacquire::Refresh;
    for ttl_ms in [1_000, 5 * EXPIRY_SLACK_MS] {
        let (mut set, mut facts) = (Set::default(), Facts::UNKNOWN);
        for key in 0..3 {
            let looks = looks(&mut set, &mut facts, |limiter| {
                limiter.acquire(&key, 3, START_MS + ttl_ms, START_MS, refresh);
            });
            assert_eq!(looks, 0, "lease {key} of {ttl_ms} ms");
        }
        let denied = looks(&mut set, &mut facts, |limiter| {
            limiter.acquire(&9, 3, START_MS + ttl_ms, START_MS, refresh);
        });
        assert_eq!(denied, 0);
    }
    let (mut set, mut facts) = (Set::default(), Facts::UNKNOWN);
    looks(&mut set, &mut facts, |limiter| {
        limiter.acquire(&1, 2, START_MS + 1_000, START_MS, refresh);
        limiter.acquire(&2, 2, START_MS + 1_000, START_MS, refresh);
    });
    let released = looks(&mut set, &mut facts, |limiter| {
        limiter.release(&[1], START_MS);
    });
    assert_eq!(released, 0, "the other lease is near enough the expiry, wherever it ends");
}

#[test]
fn a_command_prunes_once_and_tells_what_lapses_next() {
    let mut set = Set { step: Some(1), ..Set::default() };
    set.members.extend((0..5).map(|key| (key, 1.0)));
    set.members.push((9, score(START_MS + 70)));
    let mut facts = Facts::UNKNOWN;
    looks(&mut set, &mut facts, |limiter| {
        for _ in 0..2 {
            limiter.acquire(&8, 0, START_MS + 50, START_MS, Reacquire::Refresh);
        }
        assert_eq!((limiter.lapsed(), limiter.live()), (4, 1));
    });
    set.step = None;
    looks(&mut set, &mut facts, |limiter| {
        limiter.acquire(&8, 0, START_MS + 50, START_MS, Reacquire::Refresh);
    });
    assert_eq!(facts.none_lapses_before_ms, START_MS + 70);
}

#[test]
fn an_expiry_that_is_near_enough_is_not_rewritten() {
    let (mut set, mut facts) = (Set::default(), Facts::UNKNOWN);
    let mut acquire = |set: &mut Set, key: u8, ttl_ms: i64| {
        on(set, &mut facts, START_MS, |limiter| {
            limiter.acquire(&key, 9, START_MS + ttl_ms, START_MS, Reacquire::Refresh)
        });
        set.expiries_written
    };
    assert_eq!(acquire(&mut set, 1, 5 * EXPIRY_SLACK_MS), 1);
    assert_eq!(acquire(&mut set, 2, 1_000), 1, "the other lease is near it");

    let (mut set, mut facts) = (Set::default(), Facts::UNKNOWN);
    on(&mut set, &mut facts, START_MS, |limiter| {
        limiter.acquire(&1, 9, START_MS + EXPIRY_SLACK_MS / 2, START_MS, Reacquire::Refresh);
        limiter.acquire(&2, 9, START_MS + 1_000, START_MS, Reacquire::Refresh);
        limiter.release(&[1], START_MS);
    });
    assert_eq!(set.expiries_written, 1, "it is an hour and a half after the last lease's end");
}

#[test]
fn lapsed_leases_that_are_left_do_not_keep_a_late_expiry() {
    let mut set = Set { step: Some(1), ..Set::default() };
    set.members.extend((0..3).map(|key| (key, 1.0)));
    set.expiry_ms = Some(START_MS + EXPIRY_SLACK_MS);
    on_unknown(&mut set, START_MS, |limiter| limiter.release(&[9], START_MS));
    assert_eq!(set.count(), 2);
    check_expiry(&set);
}
