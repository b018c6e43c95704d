//! What a command leaves behind besides its reply: what is replicated, what listeners hear, what
//! a WATCH notices. Effects travel, never LIMITER commands; what changed nothing, leaves nothing.

mod harness;

use harness::{wait_until, Client, Server, AOF};
use redis::Value;

/// The effects of the last commands: all but the first `skip`, with the MULTI and EXEC around
/// those of one command.
fn effects_after(server: &Server, skip: usize) -> Vec<String> {
    server.effects()[skip..].iter().map(|effect| effect.join(" ")).collect()
}

/// The text of a member's score.
fn score(client: &mut Client, member: &str) -> String {
    let score = client.members("p").into_iter().find(|(name, _)| name == member).expect("it").1;
    format!("{score:.3}")
}

#[test]
fn acquire_travels_as_zadd_and_pexpireat_with_absolute_times() {
    let server = Server::start_with(&AOF);
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 2 45");
    let (score_a, expiry) = (score(&mut client, "a"), client.int("PEXPIRETIME p"));
    assert_eq!(
        effects_after(&server, 0),
        ["MULTI", &format!("ZADD p {score_a} a"), &format!("PEXPIREAT p {expiry}"), "EXEC"]
    );
    client.int("LIMITER.ACQUIRE p b 2 45");
    let score_b = score(&mut client, "b");
    assert_eq!(effects_after(&server, 4), [format!("ZADD p {score_b} b")]);
}

#[test]
fn a_prune_travels_as_zremrangebyscore() {
    let server = Server::start_with(&AOF);
    let mut client = server.client();
    client.call("ZADD p 1 lapsed 2 lapsed-too +inf forever");
    client.int("LIMITER.ACQUIRE p a 1 45");
    let effects = effects_after(&server, 1);
    assert_eq!(effects.len(), 1, "the expiry is right as it is (none): {effects:?}");
    assert!(effects[0].starts_with("ZREMRANGEBYSCORE p -inf 1"), "{effects:?}");
}

#[test]
fn release_travels_as_one_zrem_of_what_was_there() {
    let server = Server::start_with(&AOF);
    let mut client = server.client();
    for holder in ["a", "b", "c"] {
        client.int(&format!("LIMITER.ACQUIRE p {holder} 9 45"));
    }
    let before = server.effects().len();
    client.int("LIMITER.RELEASE p a nobody c a");
    assert_eq!(effects_after(&server, before), ["ZREM p a c"]);
    client.int("LIMITER.RELEASE p b");
    assert_eq!(effects_after(&server, before + 1), ["ZREM p b"]);
}

#[test]
fn a_lease_that_never_lapses_travels_as_persist() {
    let server = Server::start_with(&AOF);
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 9 45");
    client.int("ZADD p +inf forever");
    let before = server.effects().len();
    client.int("LIMITER.RENEW p a 60");
    let score = score(&mut client, "a");
    assert_eq!(
        effects_after(&server, before),
        ["MULTI", &format!("ZADD p {score} a"), "PERSIST p", "EXEC"]
    );
}

/// Commands that change nothing, in a state where `full` has one live lease and `other` is text.
const IDLE: [&str; 14] = [
    "LIMITER.ACQUIRE full b 1 45",
    "LIMITER.ACQUIRE full b 1 45 WITHSTATE",
    "LIMITER.ACQUIRE full a 9 45 NX",
    "LIMITER.ACQUIRE none b 0 45",
    "LIMITER.RENEW full b 45",
    "LIMITER.RENEW none b 45",
    "LIMITER.RELEASE full b",
    "LIMITER.RELEASE none b",
    "LIMITER.COUNT full",
    "LIMITER.HOLDERS full",
    "LIMITER.ACQUIRE other b 9 45",
    "LIMITER.RELEASE other b",
    "LIMITER.ACQUIRE full b x 45",
    "LIMITER.HELP",
];

#[test]
fn what_changes_nothing_propagates_nothing_dirties_nothing_and_aborts_no_watch() {
    let server = Server::start_with(&AOF);
    let (mut client, mut watcher) = (server.client(), server.client());
    client.int("LIMITER.ACQUIRE full a 1 45");
    client.call("SET other text");
    let before = server.effects().len();
    let dirty = client.info("persistence", "rdb_changes_since_last_save");
    for command in IDLE {
        watcher.call("WATCH full none other");
        client.call(command);
        watcher.call("MULTI");
        watcher.call("ECHO untouched");
        assert_ne!(watcher.call("EXEC"), Value::Nil, "{command} aborted a WATCH");
    }
    assert_eq!(client.info("persistence", "rdb_changes_since_last_save"), dirty);
    assert_eq!(effects_after(&server, before), Vec::<String>::new());
}

#[test]
fn what_changes_the_set_aborts_a_watch() {
    let server = Server::start();
    let (mut client, mut watcher) = (server.client(), server.client());
    for command in [
        "LIMITER.ACQUIRE p a 9 45",
        "LIMITER.ACQUIRE p a 9 60",
        "LIMITER.RENEW p a 90",
        "LIMITER.RELEASE p a",
    ] {
        watcher.call("WATCH p");
        assert_eq!(client.int(command), 1);
        watcher.call("MULTI");
        watcher.call("ECHO touched");
        assert_eq!(watcher.call("EXEC"), Value::Nil, "{command} went unnoticed");
    }
    client.call("ZADD p 1 lapsed");
    watcher.call("WATCH p");
    assert_eq!(client.int("LIMITER.ACQUIRE p a 0 45"), 0);
    watcher.call("MULTI");
    watcher.call("ECHO touched");
    assert_eq!(watcher.call("EXEC"), Value::Nil, "a denied acquire that pruned went unnoticed");
}

#[test]
fn clients_that_cache_the_key_are_told() {
    let server = Server::start();
    let (mut client, mut tracker) = (server.client(), server.client());
    tracker.call("HELLO 3");
    tracker.call("CLIENT TRACKING ON");
    tracker.call("LIMITER.COUNT p");
    client.int("LIMITER.ACQUIRE p a 9 45");
    let Value::Push { data, .. } = tracker.receive() else { panic!("no invalidation") };
    assert_eq!(harness::strings(&data[0]), ["p"]);
}

#[test]
fn listeners_hear_what_the_plain_commands_would_send() {
    let server = Server::start_with(&["--notify-keyspace-events", "KA"]);
    let (mut client, mut listener) = (server.client(), server.client());
    listener.call("SUBSCRIBE __keyspace@0__:p __keyspace@0__:end");
    listener.receive();
    let mut heard = |client: &mut Client, command: &str| {
        client.call(command);
        client.call("SET end 1");
        let mut events = Vec::new();
        loop {
            let message = harness::strings(&listener.receive());
            if message[1].ends_with(":end") {
                return events.join(" ");
            }
            events.push(message[2].clone());
        }
    };
    assert_eq!(heard(&mut client, "LIMITER.ACQUIRE p a 9 45"), "zadd expire");
    assert_eq!(heard(&mut client, "LIMITER.ACQUIRE p b 9 45"), "zadd");
    assert_eq!(heard(&mut client, "LIMITER.ACQUIRE p c 2 45"), "");
    assert_eq!(heard(&mut client, "LIMITER.RENEW p b 46"), "zadd");
    assert_eq!(heard(&mut client, "LIMITER.RELEASE p b nobody"), "zrem");
    assert_eq!(heard(&mut client, "ZADD p +inf forever"), "zadd");
    assert_eq!(heard(&mut client, "LIMITER.RENEW p a 47"), "zadd persist");
    assert_eq!(heard(&mut client, "LIMITER.RELEASE p a forever"), "zrem del");
    assert_eq!(heard(&mut client, "ZADD p 1 lapsed"), "zadd");
    assert_eq!(heard(&mut client, "LIMITER.ACQUIRE p a 0 45"), "zremrangebyscore del");
    assert_eq!(heard(&mut client, "ZADD p 1 lapsed"), "zadd");
    assert_eq!(heard(&mut client, "LIMITER.ACQUIRE p a 1 45"), "zremrangebyscore del zadd expire");
    assert_eq!(heard(&mut client, "LIMITER.COUNT p"), "");
}

#[test]
fn a_replica_without_the_module_has_the_same_set_and_reads_work_on_one_with_it() {
    let server = Server::start();
    let port = server.port.to_string();
    let plain = Server::start_bare(&["--replicaof", "127.0.0.1", &port]);
    let with_module = Server::start_with(&["--replicaof", "127.0.0.1", &port]);
    let mut client = server.client();
    for holder in 0..50 {
        client.int(&format!("LIMITER.ACQUIRE p {holder} 100 {}", 10 + holder));
    }
    client.int("ZADD p 1 lapsed");
    client.int("LIMITER.RELEASE p 3 7");
    client.int("LIMITER.RENEW p 5 77.007");
    client.int("ZADD p 1 lapsed-again");
    let (members, expiry_ms) = (client.members("p"), client.int("PEXPIRETIME p"));

    for replica in [&plain, &with_module] {
        let mut reader = replica.client();
        wait_until("the replica has caught up", || reader.members("p") == members);
        assert_eq!(reader.int("PEXPIRETIME p"), expiry_ms);
    }
    let mut reader = with_module.client();
    assert_eq!(reader.int("LIMITER.COUNT p"), 48);
    assert_eq!(reader.strings("LIMITER.HOLDERS p COUNT 1")[0], "0");
    assert_eq!(reader.members("p"), members, "reads change nothing, not even lapsed members");
    for command in ["LIMITER.ACQUIRE p a 9 45", "LIMITER.RELEASE p 5", "LIMITER.RENEW p 5 45"] {
        assert!(reader.error(command).starts_with("READONLY"), "{command}");
    }
}

#[test]
fn the_aof_brings_the_set_back_with_and_without_the_module() {
    let mut server = Server::start_with(&AOF);
    let mut client = server.client();
    for holder in 0..200 {
        client.int(&format!("LIMITER.ACQUIRE p {holder} 1000 {}.{holder:03}", 500 + holder));
    }
    client.int("LIMITER.RELEASE p 3 7 9");
    client.int("LIMITER.RENEW p 5 1234.567");
    let (members, expiry_ms) = (client.members("p"), client.int("PEXPIRETIME p"));
    for restart in [Server::kill_and_restart, Server::kill_and_restart_bare] {
        restart(&mut server);
        let mut client = server.client();
        assert_eq!(client.members("p"), members);
        assert_eq!(client.int("PEXPIRETIME p"), expiry_ms);
    }
}
