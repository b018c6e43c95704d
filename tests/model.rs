//! The real server beside a model: the same random commands to both, foreign writes between them,
//! and every reply and the whole set compared after each.
//!
//! Time is the one thing the model cannot know to the millisecond. It is told by the server: the
//! clock is read before and after each command, and where a lease lapses in between the step is
//! not judged but taken over from the server (rare, and counted: too many fail the test).

mod harness;

use std::collections::BTreeMap;

use harness::{wait_until, Client, Server};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use redis::Value;

const HOUR_MS: i64 = 3_600_000;

#[derive(Clone, Debug)]
enum Step {
    Acquire {
        key: u8,
        limit: u8,
        ttl_ms: i64,
        nx: bool,
    },
    Renew {
        key: u8,
        ttl_ms: i64,
    },
    Release {
        first: u8,
        second: u8,
    },
    Count,
    Holders,
    LetLapse,
    Zadd {
        key: u8,
        offset_ms: i64,
    },
    ZaddForever {
        key: u8,
    },
    Zrem {
        key: u8,
    },
    Pexpire {
        ms: i64,
    },
    Persist,
    Del,
    SetOther,
    RenameAwayAndBack,
    DumpAndRestore,
    DebugReload,
    /// Anything else that may put another set under the name, or another end on a lease.
    Foreign(&'static [&'static str]),
}

/// Each one in a way that a plain ZADD or DEL is not: as a whole set, with the same number of
/// leases and the same expiry, from another database, unseen in a script or a transaction.
const FOREIGN: [&[&str]; 14] = [
    &["COPY p saved REPLACE"],
    &["COPY saved p REPLACE"],
    &["COPY p saved DB 1 REPLACE"],
    &["SWAPDB 0 1"],
    &["RENAME saved p"],
    &["ZUNIONSTORE p 2 p saved AGGREGATE MIN"],
    &["ZUNIONSTORE p 2 p saved AGGREGATE MAX"],
    &["ZRANGESTORE p saved 0 -1"],
    &["ZINCRBY p -50 k1"],
    &["ZADD p 1 k2"],
    &["ZPOPMIN p", "ZPOPMAX p"],
    &["FLUSHDB"],
    &["MULTI", "PEXPIRE p 5000", "ZADD p +inf k3", "ZREM p k3", "ZADD p 2 k4", "EXEC"],
    &["DEBUG LOADAOF"],
];

fn ttl_ms() -> impl Strategy<Value = i64> {
    prop_oneof![2 => 1..40_i64, 3 => 10_000..100_000_i64, 1 => HOUR_MS..10 * HOUR_MS]
}

fn step() -> impl Strategy<Value = Step> {
    let key = 0..6_u8;
    prop_oneof![
        12 => (key.clone(), 0..6_u8, ttl_ms(), any::<bool>())
            .prop_map(|(key, limit, ttl_ms, nx)| Step::Acquire { key, limit, ttl_ms, nx }),
        4 => (key.clone(), ttl_ms()).prop_map(|(key, ttl_ms)| Step::Renew { key, ttl_ms }),
        4 => (key.clone(), key.clone())
            .prop_map(|(first, second)| Step::Release { first, second }),
        3 => Just(Step::Count),
        3 => Just(Step::Holders),
        4 => Just(Step::LetLapse),
        2 => (key.clone(), -50_000..100_000_i64)
            .prop_map(|(key, offset_ms)| Step::Zadd { key, offset_ms }),
        1 => key.clone().prop_map(|key| Step::ZaddForever { key }),
        1 => key.prop_map(|key| Step::Zrem { key }),
        1 => (10_000..3 * HOUR_MS).prop_map(|ms| Step::Pexpire { ms }),
        1 => Just(Step::Persist),
        1 => Just(Step::Del),
        1 => Just(Step::SetOther),
        1 => Just(Step::RenameAwayAndBack),
        1 => Just(Step::DumpAndRestore),
        1 => Just(Step::DebugReload),
        6 => prop::sample::select(&FOREIGN[..]).prop_map(Step::Foreign),
    ]
}

/// Who is in the set until when (`i64::MAX` = never lapses), lapsed members too.
type Members = BTreeMap<String, i64>;

fn members(client: &mut Client) -> Members {
    let to_ms =
        |score: f64| if score.is_infinite() { i64::MAX } else { (score * 1e3).round() as i64 };
    client.members("p").into_iter().map(|(key, score)| (key, to_ms(score))).collect()
}

fn live(members: &Members, now_ms: i64) -> Members {
    members.iter().filter(|(_, end_ms)| **end_ms > now_ms).map(|(k, v)| (k.clone(), *v)).collect()
}

struct Run<'c> {
    client: &'c mut Client,
    judged: u32,
    passed_over: u32,
}

impl Run<'_> {
    /// Runs one of our commands and judges it by the live leases before it.
    ///
    /// `expect` gets them and says the reply, and who must be in afterwards: an end of `None`
    /// is now + ttl, to be found between the two looks at the clock.
    fn judge(
        &mut self,
        command: &str,
        writes: bool,
        ttl_ms: i64,
        expect: impl Fn(&Members) -> (i64, BTreeMap<String, Option<i64>>),
    ) {
        let before = members(self.client);
        let from_ms = self.client.now_ms();
        let reply = self.client.int(command);
        let to_ms = self.client.now_ms();
        let after = members(self.client);
        if live(&before, from_ms - 1) != live(&before, to_ms) {
            self.passed_over += 1;
            return;
        }
        self.judged += 1;
        let (expected_reply, expected) = expect(&live(&before, to_ms));
        assert_eq!(reply, expected_reply, "{command} on {before:?}");
        if !writes {
            assert_eq!(after, before, "{command} reads only");
            return;
        }
        assert!(after.keys().eq(expected.keys()), "{command}: {before:?} became {after:?}");
        for (key, end_ms) in &expected {
            match end_ms {
                Some(end_ms) => assert_eq!(after[key], *end_ms, "{command} moved {key}"),
                None => assert!((from_ms + ttl_ms..=to_ms + ttl_ms).contains(&after[key])),
            }
        }
        if after != before {
            self.check_expiry(&after);
        }
    }

    fn check_expiry(&mut self, after: &Members) {
        let expiry_ms = self.client.int("PEXPIRETIME p");
        match after.values().max() {
            None => assert_eq!(expiry_ms, -2, "the empty set is gone"),
            Some(&i64::MAX) => assert_eq!(expiry_ms, -1),
            Some(&last_ms) => assert!((last_ms..=last_ms + 2 * HOUR_MS).contains(&expiry_ms)),
        }
    }

    fn step(&mut self, step: &Step) {
        let seconds = |ms: i64| format!("{}.{:03}", ms / 1000, ms % 1000);
        match step {
            Step::Acquire { key, limit, ttl_ms, nx } => {
                let option = if *nx { "NX" } else { "" };
                let command =
                    format!("LIMITER.ACQUIRE p k{key} {limit} {} {option}", seconds(*ttl_ms));
                self.judge(&command, true, *ttl_ms, |live| {
                    let mut after: BTreeMap<_, _> =
                        live.iter().map(|(key, end_ms)| (key.clone(), Some(*end_ms))).collect();
                    let name = format!("k{key}");
                    let granted = match live.contains_key(&name) {
                        true => !nx,
                        false => live.len() < usize::from(*limit),
                    };
                    if granted {
                        after.insert(name, None);
                    }
                    (i64::from(granted), after)
                });
            }
            Step::Renew { key, ttl_ms } => {
                let command = format!("LIMITER.RENEW p k{key} {}", seconds(*ttl_ms));
                self.judge(&command, true, *ttl_ms, |live| {
                    let mut after: BTreeMap<_, _> =
                        live.iter().map(|(key, end_ms)| (key.clone(), Some(*end_ms))).collect();
                    let held = after.get_mut(&format!("k{key}")).map(|end_ms| *end_ms = None);
                    (i64::from(held.is_some()), after)
                });
            }
            Step::Release { first, second } => {
                let names = [format!("k{first}"), format!("k{second}")];
                let command = format!("LIMITER.RELEASE p {} {}", names[0], names[1]);
                self.judge(&command, true, 0, |live| {
                    let stay = |key: &String| !names.contains(key);
                    let after: BTreeMap<_, _> = live
                        .iter()
                        .filter(|(key, _)| stay(key))
                        .map(|(key, end_ms)| (key.clone(), Some(*end_ms)))
                        .collect();
                    ((live.len() - after.len()) as i64, after)
                });
            }
            Step::Count => {
                self.judge("LIMITER.COUNT p", false, 0, |live| (live.len() as i64, BTreeMap::new()))
            }
            Step::Holders => self.holders(),
            Step::LetLapse => {
                // Wait for the soonest lapse that is near.
                let now_ms = self.client.now_ms();
                let ends = members(self.client).into_values();
                if let Some(next_ms) = ends.filter(|ms| (now_ms..now_ms + 100).contains(ms)).min() {
                    self.client.wait_for_clock(next_ms + 1);
                }
            }
            Step::Zadd { key, offset_ms } => {
                let end = seconds(self.client.now_ms() + offset_ms);
                let script = format!("return redis.call('ZADD', KEYS[1], {end}, 'k{key}')");
                self.client.run(&["EVAL", &script, "1", "p"]);
            }
            Step::ZaddForever { key } => {
                self.client.int(&format!("ZADD p +inf k{key}"));
            }
            Step::Zrem { key } => {
                self.client.int(&format!("ZREM p k{key}"));
            }
            Step::Pexpire { ms } => {
                self.client.int(&format!("PEXPIRE p {ms}"));
            }
            Step::Persist => {
                self.client.int("PERSIST p");
            }
            Step::Del => {
                self.client.int("DEL p");
            }
            Step::SetOther => {
                self.client.call("SET p text");
                assert!(self.client.error("LIMITER.ACQUIRE p k 1 1").starts_with("WRONGTYPE"));
                self.client.int("DEL p");
            }
            Step::RenameAwayAndBack => {
                if self.client.int("EXISTS p") == 1 {
                    self.client.call("RENAME p q");
                    assert_eq!(self.client.int("LIMITER.COUNT p"), 0);
                    self.client.call("RENAME q p");
                }
            }
            Step::DumpAndRestore => {
                if let Value::BulkString(dump) = self.client.call("DUMP p") {
                    let args: [&[u8]; 5] = [b"RESTORE", b"p", b"0", &dump, b"REPLACE"];
                    assert_eq!(self.client.run(&args), Value::Okay);
                }
            }
            Step::DebugReload => {
                assert_eq!(self.client.call("DEBUG RELOAD"), Value::Okay);
            }
            Step::Foreign(commands) => {
                for command in *commands {
                    self.client.call(command);
                }
            }
        }
    }

    fn holders(&mut self) {
        let from_ms = self.client.now_ms();
        let flat = self.client.strings("LIMITER.HOLDERS p");
        let to_ms = self.client.now_ms();
        let set = self.client.members("p");
        let order: Vec<String> = set.iter().map(|(key, _)| key.clone()).collect();
        let set = members(self.client);
        if live(&set, from_ms - 1) != live(&set, to_ms) {
            self.passed_over += 1;
            return;
        }
        self.judged += 1;
        let live = live(&set, to_ms);
        let names: Vec<&String> = flat.iter().step_by(2).collect();
        let expected: Vec<&String> = order.iter().filter(|key| live.contains_key(*key)).collect();
        assert_eq!(names, expected);
        for pair in flat.chunks(2) {
            let left_ms: i64 = pair[1].parse().unwrap();
            match live[&pair[0]] {
                i64::MAX => assert_eq!(left_ms, -1),
                end_ms => assert!((end_ms - to_ms..=end_ms - from_ms).contains(&left_ms)),
            }
        }
    }
}

#[test]
fn a_swap_of_databases_brings_another_set_under_the_same_name() {
    let server = Server::start();
    let (mut zero, mut one) = (server.client(), server.client());
    one.call("SELECT 1");
    one.int("ZADD p 1 lapsed");
    assert_eq!(zero.int("LIMITER.ACQUIRE p a 1 45"), 1);
    zero.call("SWAPDB 0 1");
    assert_eq!(zero.int("LIMITER.ACQUIRE p b 1 45"), 1, "what lapsed there is pruned");
    assert_eq!(one.int("LIMITER.ACQUIRE p c 1 45"), 0);
}

#[test]
fn the_server_answers_as_the_model_under_foreign_writes() {
    let server = Server::start_with(&["--appendonly", "yes"]);
    let mut client = server.client();
    let (mut judged, mut passed_over) = (0, 0);
    let steps = prop::collection::vec(step(), 1..80);
    let counts = std::cell::RefCell::new((&mut judged, &mut passed_over));
    let client = std::cell::RefCell::new(&mut client);
    TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(200) })
        .run(&steps, |steps| {
            let mut client = client.borrow_mut();
            client.call("FLUSHALL");
            let mut run = Run { client: &mut client, judged: 0, passed_over: 0 };
            for step in &steps {
                run.step(step);
            }
            let mut counts = counts.borrow_mut();
            *counts.0 += run.judged;
            *counts.1 += run.passed_over;
            Ok(())
        })
        .unwrap();
    println!("{judged} replies judged, {passed_over} passed over");
    assert!(judged > 20 * passed_over, "{judged} judged, {passed_over} passed over");
}

#[test]
fn a_server_that_was_a_replica_for_a_while_knows_nothing_of_before() {
    let (server, other) = (Server::start(), Server::start());
    let (mut client, mut on_other) = (server.client(), other.client());
    for ttl in ["100", "10000", "1000"] {
        assert_eq!(client.int(&format!("LIMITER.ACQUIRE p k1 2 {ttl}")), 1);
        assert_eq!(client.int(&format!("LIMITER.ACQUIRE p k2 2 {ttl}")), 1);
        on_other.call("FLUSHALL");
        on_other.int("ZADD p 1 lapsed 99999999999 far");
        on_other.int("PEXPIRE p 100000");
        client.call(&format!("REPLICAOF 127.0.0.1 {}", other.port));
        wait_until("it has the other's data", || {
            client.strings("ZRANGE p 0 -1") == ["lapsed", "far"]
        });
        client.call("REPLICAOF NO ONE");
        assert_eq!(client.int("LIMITER.ACQUIRE p k3 2 10"), 1, "the lapsed one is pruned");
        assert_eq!(client.strings("ZRANGE p 0 -1"), ["k3", "far"]);
        assert!(client.int("PEXPIRETIME p") >= 99_999_999_999_000, "after the last lease's end");
        client.call("FLUSHALL");
    }
}
