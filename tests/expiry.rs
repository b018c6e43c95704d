//! The set's own expiry: never before the last lease's end, whoever wrote what before.

mod harness;

use harness::{wait_until, Client, Server};

const HOUR_MS: i64 = 3_600_000;

/// The expiry is right after the command at hand, which wrote.
fn check(client: &mut Client, prefix: &str) {
    let (_, last) = client.members(prefix).last().expect("a lease").clone();
    let expiry_ms = client.int(&format!("PEXPIRETIME {prefix}"));
    if last.is_infinite() {
        assert_eq!(expiry_ms, -1, "a lease that never lapses");
        return;
    }
    let last_ms = (last * 1000.0).ceil() as i64;
    assert!(expiry_ms >= last_ms, "{expiry_ms} is before the last lease's end {last_ms}");
    assert!(expiry_ms <= last_ms + 2 * HOUR_MS, "{expiry_ms} is too long after {last_ms}");
}

#[test]
fn every_writing_command_leaves_it_right() {
    let server = Server::start();
    let mut client = server.client();
    for (command, writes) in [
        ("LIMITER.ACQUIRE p long 9 100000", true),
        ("LIMITER.ACQUIRE p short 9 1", true),
        ("LIMITER.ACQUIRE p short 9 200000", true),
        ("LIMITER.RENEW p long 300000", true),
        ("LIMITER.RENEW p long 10", true),
        ("LIMITER.ACQUIRE p other 9 10", true),
        ("LIMITER.RELEASE p short", true),
        ("LIMITER.RELEASE p other", true),
    ] {
        assert_eq!(client.int(command) == 1, writes, "{command}");
        check(&mut client, "p");
    }
}

#[test]
fn a_longer_lease_of_another_program_is_covered_by_the_next_writing_command() {
    let server = Server::start();
    let mut client = server.client();
    for command in [
        "LIMITER.ACQUIRE p b 9 10",
        "LIMITER.ACQUIRE p a 9 20",
        "LIMITER.RENEW p a 10",
        "LIMITER.RELEASE p a",
    ] {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 9 10");
        let foreign = client.now_ms() as f64 / 1000.0 + 500_000.25;
        client.int(&format!("ZADD p {foreign} theirs"));
        assert_eq!(client.int(command), 1);
        check(&mut client, "p");
        client.int("ZADD p +inf theirs");
        client.int("LIMITER.ACQUIRE p c 9 10");
        check(&mut client, "p");
    }
}

#[test]
fn an_expiry_that_others_shortened_lengthened_or_took_away_is_mended() {
    let server = Server::start();
    let mut client = server.client();
    for meddle in ["PEXPIRE p 5000", "PERSIST p", "EXPIRE p 10000000"] {
        for command in [
            "LIMITER.ACQUIRE p b 9 10",
            "LIMITER.ACQUIRE p a 9 70",
            "LIMITER.RENEW p a 50",
            "LIMITER.RELEASE p gone",
        ] {
            client.call("DEL p");
            client.int("LIMITER.ACQUIRE p a 9 60");
            client.int("LIMITER.ACQUIRE p gone 9 60");
            assert_eq!(client.int(meddle), 1, "{meddle}");
            assert_eq!(client.int(command), 1);
            check(&mut client, "p");
        }
    }
}

#[test]
fn releasing_the_longest_lease_brings_it_back() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p short 9 10");
    client.int("LIMITER.ACQUIRE p long 9 1000000");
    client.int("LIMITER.RELEASE p long");
    check(&mut client, "p");
    client.int("ZADD p +inf forever");
    client.int("LIMITER.RENEW p short 10");
    check(&mut client, "p");
    client.int("LIMITER.RELEASE p forever");
    check(&mut client, "p");
}

#[test]
fn it_is_rarely_rewritten() {
    let server = Server::start_with(&harness::AOF);
    let mut client = server.client();
    for call in 0..500 {
        client.int(&format!("LIMITER.ACQUIRE p {} 100 45", call % 50));
    }
    let effects = server.effects();
    assert_eq!(effects.iter().filter(|effect| effect[0] == "PEXPIREAT").count(), 1);
    assert!(effects.iter().filter(|effect| effect[0] == "ZADD").count() >= 50);
}

#[test]
fn a_limiter_nobody_uses_goes_away() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 9 0.02");
    // The slack is an hour; what counts here is that the server itself ends it.
    let (expiry_ms, now_ms) = (client.int("PEXPIRETIME p"), client.now_ms());
    assert!(expiry_ms > now_ms);
    client.int(&format!("PEXPIREAT p {}", now_ms + 20));
    wait_until("the set is gone", || client.int("EXISTS p") == 0);
    assert_eq!(client.int("LIMITER.ACQUIRE p b 1 45"), 1);
    check(&mut client, "p");
}
