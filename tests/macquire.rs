//! `LIMITER.MACQUIRE`: a slot under several limits at once, or none.

mod harness;

use harness::{wait_until, Server, AOF};
use redis::Value;

const ONE: Value = Value::Int(1);

#[test]
fn all_or_none() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.int("LIMITER.MACQUIRE 2 user all a 45 1 3"), 1);
    assert_eq!(client.int("LIMITER.MACQUIRE 2 user all b 45 1 3"), 0, "the user's is full");
    assert_eq!(client.int("LIMITER.MACQUIRE 2 other all b 45 1 3"), 1);
    assert_eq!(client.int("LIMITER.MACQUIRE 2 third all c 45 1 3"), 1);
    assert_eq!(client.int("LIMITER.MACQUIRE 2 fourth all d 45 1 3"), 0, "everybody's is full");
    assert_eq!(client.int("EXISTS fourth"), 0);
    assert_eq!(client.int("LIMITER.COUNT all"), 3);
    assert_eq!(client.strings("ZRANGE user 0 -1"), ["a"]);
    // Each has its own lease, of the same end.
    assert_eq!(client.members("user")[0].1, client.members("all")[0].1);
    assert_eq!(client.int("LIMITER.RELEASE user a"), 1);
    assert_eq!(client.int("LIMITER.COUNT all"), 3);
    assert_eq!(client.int("LIMITER.MACQUIRE 1 user b 45 1"), 1);
}

#[test]
fn a_holder_has_its_leases_refreshed_at_any_limit_and_nx_denies_it() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 10");
    assert_eq!(client.int("LIMITER.MACQUIRE 2 p q a 1000 0 1"), 1, "in p it is in already");
    assert!(client.members("p")[0].1 == client.members("q")[0].1);
    assert_eq!(client.int("LIMITER.MACQUIRE 2 r p a 45 1 1 NX"), 0);
    assert_eq!(client.int("EXISTS r"), 0);
    assert_eq!(client.int("LIMITER.MACQUIRE 2 r p b 45 1 2 nx"), 1);
    // A lapsed lease is none.
    client.int("ZADD s 1 a");
    assert_eq!(client.int("LIMITER.MACQUIRE 2 s t a 45 1 1 NX"), 1);
}

#[test]
fn nobody_is_let_in_past_one_of_the_lines() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    assert_eq!(client.int("LIMITER.MACQUIRE 2 q p c 45 9 9"), 0);
    assert_eq!(client.int("EXISTS q"), 0);
    assert_eq!(client.int("LIMITER.MACQUIRE 2 q p a 45 9 9"), 1, "who is in, is");
    assert!(!waiter.has_reply());
    client.int("LIMITER.RELEASE p a");
    assert_eq!(waiter.receive(), ONE);
    assert_eq!(client.int("LIMITER.MACQUIRE 2 q p c 45 9 9"), 1);
}

#[test]
fn a_denied_one_serves_the_line_that_it_finds_due() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    client.int("LIMITER.ACQUIRE full x 1 45");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    client.call("MULTI");
    client.call("DEL p");
    client.call("LIMITER.MACQUIRE 2 full p c 45 1 1");
    let Value::Array(replies) = client.call("EXEC") else { panic!("no replies") };
    assert_eq!(replies[1], Value::Int(0));
    assert_eq!(waiter.receive(), ONE);
    assert_eq!(client.strings("ZRANGE p 0 -1"), ["b"]);
}

#[test]
fn ephemeral_leases_all_end_with_the_connection() {
    let server = Server::start();
    let (mut client, mut owner) = (server.client(), server.client());
    assert_eq!(owner.int("LIMITER.MACQUIRE 3 p q r a 45 1 1 1 EPHEMERAL"), 1);
    assert_eq!(client.int("EXISTS p q r"), 3);
    owner.close();
    wait_until("all have ended", || client.int("EXISTS p q r") == 0);
}

#[test]
fn it_travels_as_one_transaction_of_plain_commands() {
    let server = Server::start_with(&AOF);
    let replica = Server::start_bare(&["--replicaof", "127.0.0.1", &server.port.to_string()]);
    let mut client = server.client();
    client.int("ZADD q 1 lapsed");
    let before = server.effects().len();
    client.int("LIMITER.MACQUIRE 2 p q a 45 1 1");
    let names: Vec<String> = server.effects()[before..]
        .iter()
        .map(|effect| effect[..2.min(effect.len())].join(" "))
        .collect();
    assert_eq!(names.first().map(String::as_str), Some("MULTI"));
    assert_eq!(names.last().map(String::as_str), Some("EXEC"));
    for part in ["ZADD p", "ZADD q", "PEXPIREAT p", "PEXPIREAT q", "ZREMRANGEBYSCORE q"] {
        assert!(names.iter().any(|name| name == part), "{part} in {names:?}");
    }
    let before = server.effects().len();
    client.int("LIMITER.MACQUIRE 2 p q b 45 1 1");
    assert_eq!(server.effects().len(), before, "denied, it changed nothing");
    wait_until("the replica agrees", || replica.contents() == server.contents());
}

#[test]
fn errors_write_nothing() {
    let server = Server::start();
    let mut client = server.client();
    client.call("SET text x");
    for (command, error) in [
        ("LIMITER.MACQUIRE 0 p a 45 1 1", "ERR numlimiters should be greater than 0"),
        ("LIMITER.MACQUIRE -1 p a 45 1 1", "ERR numlimiters should be greater than 0"),
        ("LIMITER.MACQUIRE x p a 45 1 1", "ERR numlimiters should be greater than 0"),
        ("LIMITER.MACQUIRE 9223372036854775807 p a 45 1", "ERR syntax error"),
        ("LIMITER.MACQUIRE 2 p q a 45 1", "ERR syntax error"),
        ("LIMITER.MACQUIRE 2 p q a 45", "ERR syntax error"),
        ("LIMITER.MACQUIRE 3 p q a 45 1", "ERR syntax error"),
        ("LIMITER.MACQUIRE 4 p q a 45", "ERR syntax error"),
        ("LIMITER.MACQUIRE 1 p a 45 1 1", "ERR syntax error"),
        ("LIMITER.MACQUIRE 2 p p a 45 1 1", "ERR syntax error"),
        ("LIMITER.MACQUIRE 1 p a 45 1 NX NX", "ERR syntax error"),
        ("LIMITER.MACQUIRE 1 p a 45 1 WITHSTATE", "ERR syntax error"),
        ("LIMITER.MACQUIRE 2 p q a 45 1 x", "ERR limit is not an integer or out of range"),
        ("LIMITER.MACQUIRE 2 p q a 0 1 1", "ERR invalid expire time in 'limiter.macquire' command"),
        (
            "LIMITER.MACQUIRE 1 p a 45",
            "ERR wrong number of arguments for 'limiter.macquire' command",
        ),
        (
            "LIMITER.MACQUIRE 2 p text a 45 1 1",
            "WRONGTYPE Operation against a key holding the wrong kind of value",
        ),
    ] {
        assert_eq!(client.error(command), error, "{command}");
        assert_eq!(client.strings("KEYS *"), ["text"], "{command}");
    }
    assert_eq!(client.int("LIMITER.MACQUIRE 1 2 a 45 1"), 1, "a prefix may look like a number");
}

#[test]
fn its_keys_are_the_prefixes_for_clients_access_rules_and_clusters() {
    let server = Server::start_with(&["--cluster-enabled", "yes"]);
    let mut client = server.client();
    client.call("CLUSTER ADDSLOTSRANGE 0 16383");
    wait_until("the cluster is up", || client.text("CLUSTER INFO").contains("cluster_state:ok"));
    let keys = client.strings("COMMAND GETKEYS LIMITER.MACQUIRE 2 {a}p {a}q key 45 1 1 NX");
    assert_eq!(keys, ["{a}p", "{a}q"]);
    assert_eq!(client.int("LIMITER.MACQUIRE 2 {a}p {a}q key 45 1 1"), 1);
    assert!(client.error("LIMITER.MACQUIRE 2 p q key 45 1 1").starts_with("CROSSSLOT"));
    client.call("ACL SETUSER worker on >secret ~{a}* +limiter.macquire");
    client.call("AUTH worker secret");
    assert_eq!(client.int("LIMITER.MACQUIRE 2 {a}p {a}r key 45 1 1"), 1);
    assert!(client.error("LIMITER.MACQUIRE 1 b key 45 1").starts_with("NOPERM"));
}
