//! Many leases lapse at once: they are pruned a bounded number at a time, so that no command takes
//! long, and yet the count is exact at once, no slot is held by nobody, and replicas and the AOF
//! follow every step.

mod harness;

use harness::{ints, wait_until, Server, AOF};
use redis::Value;

/// How many a command prunes at most: `PRUNE_STEP` in src/limiter.rs.
const STEP: i64 = 1_000;

/// A server with an AOF and a replica, on which so many leases of `p` have lapsed, and three are
/// live: `a`, `b`, `c`.
fn server_with_lapsed(lapsed: i64) -> (Server, Server) {
    let server = Server::start_with(&AOF);
    let replica = Server::start_bare(&["--replicaof", "127.0.0.1", &server.port.to_string()]);
    let mut client = server.client();
    let mut zadd = vec!["ZADD".to_string(), "p".into()];
    for number in 0..lapsed {
        zadd.extend([format!("1.{:03}", number / 100), format!("lapsed-{number:05}")]);
    }
    client.run(&zadd);
    let later = client.now_ms() / 1000 + 1_000;
    client.int(&format!("ZADD p {later} a {later} b {later} c"));
    (server, replica)
}

/// The replica and the AOF have what the server has.
fn check_same(server: &Server, replica: &Server) {
    wait_until("the replica agrees", || replica.contents() == server.contents());
    let replayed = server.replay(&["--appendonly", "yes"]);
    assert_eq!(replayed.contents(), server.contents(), "the AOF agrees");
}

#[test]
fn the_count_is_exact_while_lapsed_leases_are_still_there() {
    let (server, replica) = server_with_lapsed(5 * STEP);
    let mut client = server.client();
    let Value::Array(state) = client.call("LIMITER.ACQUIRE p d 3 10 WITHSTATE") else {
        panic!("no state")
    };
    assert_eq!(state[..2], [Value::Int(0), Value::Int(3)], "three are live");
    let Value::Int(wait_ms) = state[2] else { panic!("{state:?}") };
    assert!((900_000..=1_000_000).contains(&wait_ms), "until a live one lapses: {wait_ms}");
    assert_eq!(client.int("ZCARD p"), 4 * STEP + 3, "one step of them is gone");
    check_same(&server, &replica);

    assert_eq!(client.call("LIMITER.ACQUIRE p d 4 10 WITHSTATE"), ints(&[1, 4, 0, 0]));
    assert_eq!(client.int("ZCARD p"), 3 * STEP + 4);
    assert_eq!(client.int("LIMITER.COUNT p"), 4);
    assert_eq!(client.strings("LIMITER.HOLDERS p").len(), 8);
    check_same(&server, &replica);
}

#[test]
fn a_lease_that_has_lapsed_is_lost_also_before_it_is_pruned() {
    let (server, replica) = server_with_lapsed(9 * STEP);
    let mut client = server.client();
    let last = |number: i64| format!("lapsed-{:05}", 9 * STEP - 1 - number); // The last to go.
    assert_eq!(client.int(&format!("LIMITER.RENEW p {} 10", last(0))), 0);
    assert_eq!(client.int(&format!("LIMITER.RELEASE p {} a {}", last(1), last(2))), 1);
    let acquire = format!("LIMITER.ACQUIRE p {} 3 10 WITHSTATE", last(3));
    assert_eq!(client.call(&acquire), ints(&[1, 3, 0, 0]), "acquired anew, not refreshed");
    let nx = format!("LIMITER.ACQUIRE p {} 4 10 NX", last(4));
    assert_eq!(client.int(&nx), 1);
    let denied = format!("LIMITER.ACQUIRE p {} 4 10", last(5));
    assert_eq!(client.int(&denied), 0);
    for number in 0..6 {
        let score = client.call(&format!("ZSCORE p {}", last(number)));
        let live = number == 3 || number == 4;
        assert_eq!(score != Value::Nil, live, "{}: {score:?}", last(number));
    }
    // Five commands pruned a step each, and those they named.
    assert_eq!(client.int("ZCARD p"), 4 * STEP - 6 + 4);
    check_same(&server, &replica);
}

#[test]
fn the_line_moves_at_once_and_the_rest_is_pruned_while_somebody_waits() {
    let (server, replica) = server_with_lapsed(4 * STEP);
    let mut client = server.client();
    let mut first = server.client();
    first.send(&["LIMITER.BACQUIRE", "p", "d", "4", "1000", "0"]);
    assert_eq!(first.receive(), Value::Int(1), "one step is enough to know that a slot is free");
    let _waiter = server.waiter("LIMITER.BACQUIRE p e 4 1000 0");
    wait_until("all lapsed leases are gone", || client.int("ZCARD p") == 4);
    assert_eq!(client.strings("ZRANGE p 0 -1"), ["a", "b", "c", "d"]);
    check_same(&server, &replica);
}

#[test]
fn when_all_have_lapsed_their_slots_are_free_at_once() {
    let (server, replica) = server_with_lapsed(3 * STEP);
    let mut client = server.client();
    client.int("ZREM p a b c");
    assert_eq!(client.call("LIMITER.ACQUIRE p d 1 10 WITHSTATE"), ints(&[1, 1, 0, 0]));
    assert_eq!(client.int("LIMITER.RELEASE p d"), 1);
    assert_eq!(client.int("LIMITER.COUNT p"), 0);
    check_same(&server, &replica);
    assert_eq!(client.int("LIMITER.RELEASE p d"), 0);
    assert_eq!(client.int("EXISTS p"), 0);
    check_same(&server, &replica);
}

#[test]
fn a_set_that_is_about_to_expire_is_pruned_whole() {
    let (server, replica) = server_with_lapsed(3 * STEP);
    let mut client = server.client();
    client.int("PEXPIRE p 20000");
    let Value::Array(state) = client.call("LIMITER.ACQUIRE p d 3 10 WITHSTATE") else {
        panic!("no state")
    };
    assert_eq!(state[..2], [Value::Int(0), Value::Int(3)]);
    assert_eq!(client.strings("ZRANGE p 0 -1"), ["a", "b", "c"]);
    check_same(&server, &replica);
}
