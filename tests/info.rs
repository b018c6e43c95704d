//! What operators see: `LIMITER.INFO prefix` and `INFO limiter`. Every lease that was taken is told
//! of again as held, released or lapsed; what is remembered is bounded.

mod harness;

use std::collections::BTreeMap;

use fastrand::Rng;
use harness::{short, slowness, wait_until, Client, Server};
use redis::Value;

const ONE: Value = Value::Int(1);

/// The fields of `LIMITER.INFO`.
fn info(client: &mut Client, prefix: &str) -> BTreeMap<String, i64> {
    let flat = client.strings(&format!("LIMITER.INFO {prefix}"));
    flat.chunks(2).map(|pair| (pair[0].clone(), pair[1].parse().expect("a number"))).collect()
}

/// A field of `INFO limiter`.
fn total(client: &mut Client, field: &str) -> i64 {
    client.info("limiter", &format!("limiter_{field}")).parse().expect("a number")
}

/// Checks these fields of a limiter, and that those not named are 0.
fn check(client: &mut Client, prefix: &str, expected: &[(&str, i64)]) {
    let info = info(client, prefix);
    let order = client.strings(&format!("LIMITER.INFO {prefix}"));
    let names: Vec<&str> = order.iter().step_by(2).map(String::as_str).collect();
    assert_eq!(
        names.join(" "),
        "held waiting next_lapse_ms acquired refreshed denied released \
         lapsed waits wait_timeouts wait_ms_total wait_ms_max"
    );
    for (name, value) in &info {
        if ["next_lapse_ms", "wait_ms_total", "wait_ms_max"].contains(&name.as_str()) {
            continue;
        }
        let expected = expected.iter().find(|(field, _)| field == name).map_or(0, |field| field.1);
        assert_eq!(*value, expected, "{name} of {info:?}");
    }
}

#[test]
fn each_outcome_is_counted_for_its_limiter() {
    let server = Server::start();
    let mut client = server.client();
    check(&mut client, "p", &[]);
    assert_eq!(info(&mut client, "p")["next_lapse_ms"], -1);
    client.int("LIMITER.ACQUIRE p a 2 45");
    let ttl = short(0.02);
    client.int(&format!("LIMITER.ACQUIRE p b 2 {ttl}"));
    client.int("LIMITER.ACQUIRE p c 2 45");
    client.int("LIMITER.ACQUIRE p a 2 45 NX");
    client.int("LIMITER.ACQUIRE p a 2 45");
    client.int("LIMITER.RENEW p a 45");
    client.int("LIMITER.RENEW p nobody 45");
    let next_ms = info(&mut client, "p")["next_lapse_ms"];
    assert!((0..=20 * i64::from(slowness())).contains(&next_ms), "{next_ms}");
    wait_until("b has lapsed", || client.int("LIMITER.COUNT p") == 1);
    let next_ms = info(&mut client, "p")["next_lapse_ms"];
    assert!((40_000..=45_000).contains(&next_ms), "{next_ms}");
    client.int("LIMITER.RELEASE p b nobody");
    let so_far = [("held", 1), ("acquired", 2), ("refreshed", 2), ("denied", 2), ("lapsed", 1)];
    check(&mut client, "p", &so_far);
    client.int("LIMITER.RELEASE p a");
    check(&mut client, "q", &[]);
    client.int("ZADD p 1 foreign");
    client.int("LIMITER.ACQUIRE p a 1 45");
    let now = [
        ("held", 1),
        ("acquired", 3),
        ("refreshed", 2),
        ("denied", 2),
        ("released", 1),
        ("lapsed", 2),
    ];
    check(&mut client, "p", &now);

    client.int("LIMITER.ACQUIRE q a 1 45");
    for (field, expected) in [("acquired", 4), ("refreshed", 2), ("denied", 2), ("lapsed", 2)] {
        assert_eq!(total(&mut client, field), expected, "{field}");
    }
    assert_eq!(client.info("limiter", "limiter_version"), env!("CARGO_PKG_VERSION"));
    client.call("SET text x");
    assert!(client.error("LIMITER.INFO text").starts_with("WRONGTYPE"));
    client.call("HELLO 3");
    assert!(matches!(client.call("LIMITER.INFO p"), Value::Map(fields) if fields.len() == 12));
}

#[test]
fn waits_are_counted_with_how_long_they_took() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    let mut granted = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    let mut impatient = server.client();
    impatient.send(&["LIMITER.BACQUIRE", "p", "c", "1", "45", "0.05"]);
    assert_eq!(impatient.receive(), Value::Int(0));
    let leaves = server.waiter("LIMITER.BACQUIRE p d 1 45 0");
    assert_eq!(info(&mut client, "p")["waiting"], 2);
    assert_eq!((total(&mut client, "waiting"), total(&mut client, "lines")), (2, 1));
    leaves.close();
    wait_until("it has left", || info(&mut client, "p")["waiting"] == 1);
    client.int("LIMITER.RELEASE p a");
    assert_eq!(granted.receive(), ONE);
    let waited =
        [("held", 1), ("acquired", 2), ("released", 1), ("waits", 3), ("wait_timeouts", 1)];
    check(&mut client, "p", &waited);
    let info = info(&mut client, "p");
    assert!(info["wait_ms_max"] >= 50, "{info:?}");
    assert!(info["wait_ms_total"] >= info["wait_ms_max"] + 50, "two waited as long: {info:?}");
    assert_eq!(total(&mut client, "wait_ms"), info["wait_ms_total"]);
    assert_eq!((total(&mut client, "waiting"), total(&mut client, "lines")), (0, 0));
    assert_eq!(total(&mut client, "waits"), 3);
}

#[test]
fn ephemeral_leases_are_counted_while_they_live_and_when_their_connection_closed() {
    let server = Server::start();
    let (mut client, mut owner) = (server.client(), server.client());
    owner.int("LIMITER.ACQUIRE p a 3 45 EPHEMERAL");
    owner.int("LIMITER.ACQUIRE p b 3 45 EPHEMERAL");
    owner.int("LIMITER.ACQUIRE p c 3 45");
    owner.int("LIMITER.RELEASE p a");
    assert_eq!(total(&mut client, "ephemeral"), 1);
    owner.close();
    wait_until("its lease has ended", || total(&mut client, "ephemeral_released") == 1);
    assert_eq!(total(&mut client, "ephemeral"), 0);
    check(&mut client, "p", &[("held", 1), ("acquired", 3), ("released", 2)]);
}

#[test]
fn on_a_replica_it_tells_what_is_held_there() {
    let server = Server::start();
    let port = server.port.to_string();
    let replica = Server::start_with(&["--replicaof", "127.0.0.1", &port]);
    let (mut client, mut on_replica) = (server.client(), replica.client());
    client.int("LIMITER.ACQUIRE p a 1 45");
    wait_until("it is replicated", || info(&mut on_replica, "p")["held"] == 1);
    check(&mut on_replica, "p", &[("held", 1)]);
}

#[test]
fn info_shows_it_when_asked_for_it_and_a_crash_report_never() {
    // The report's own test of the memory often ends in the middle.
    let mut server = Server::start_with(&["--crash-memcheck-enabled", "no"]);
    let mut client = server.client();
    assert!(client.text("INFO everything").contains("limiter_waiting"));
    assert!(!client.text("INFO nothing").contains("limiter_waiting"));
    // The report may be written in the middle of anything, with our lock held.
    client.send(&["DEBUG", "PANIC"]);
    wait_until("it has died", || !server.is_running());
    let log = server.log();
    assert!(log.contains("BUG REPORT END") && !log.contains("limiter_waiting"), "{log}");
}

#[test]
fn whatever_happens_the_books_balance() {
    let seed =
        std::env::var("SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let server = Server::start();
    let mut clients: Vec<Client> = (0..6).map(|_| server.client()).collect();
    for _ in 0..3_000 {
        let at = rng.usize(0..clients.len());
        let (prefix, key) = (rng.u8(0..3), rng.u8(0..8));
        let ttl = if rng.bool() { "0.004" } else { "100" };
        let ephemeral = if rng.bool() { "EPHEMERAL" } else { "" };
        let command = match rng.u8(0..10) {
            0..3 => format!("LIMITER.ACQUIRE p{prefix} {key} 4 {ttl} {ephemeral}"),
            3..6 => format!("LIMITER.BACQUIRE p{prefix} {key} 4 {ttl} 0.003 {ephemeral}"),
            6 => format!("LIMITER.MACQUIRE 2 p0 p{} {key} {ttl} 4 3 {ephemeral}", 1 + prefix % 2),
            7 => format!("LIMITER.RENEW p{prefix} {key} {ttl}"),
            _ => format!("LIMITER.RELEASE p{prefix} {key}"),
        };
        if rng.u8(0..20) == 0 {
            clients[at].try_send(&command.split_whitespace().collect::<Vec<_>>()).unwrap();
            clients[at] = server.client();
        } else {
            clients[at].call(&command);
        }
    }
    let mut client = server.client();
    drop(clients);
    wait_until("all are gone", || client.info("clients", "connected_clients") == "1");
    wait_until("no lease ends with a connection", || total(&mut client, "ephemeral") == 0);
    let mut sums: BTreeMap<String, i64> = BTreeMap::new();
    for prefix in ["p0", "p1", "p2"] {
        wait_until("no lease is about to lapse", || {
            !(0..1_000).contains(&info(&mut client, prefix)["next_lapse_ms"])
        });
        client.int(&format!("LIMITER.RELEASE {prefix} nobody")); // Prunes, and so counts.
        let info = info(&mut client, prefix);
        let out = info["released"] + info["lapsed"];
        assert_eq!(info["acquired"] - out, info["held"], "{prefix}: {info:?}");
        assert_eq!(info["waiting"], 0);
        for (name, value) in info {
            *sums.entry(name).or_default() += value;
        }
    }
    for name in ["acquired", "refreshed", "denied", "released", "lapsed", "waits", "wait_timeouts"]
    {
        assert_eq!(total(&mut client, name), sums[name], "{name}");
        assert!(sums[name] > 10, "too little happened: {name} of {sums:?}");
    }
    assert_eq!(total(&mut client, "wait_ms"), sums["wait_ms_total"]);
}

#[test]
fn what_is_remembered_is_bounded_whatever_the_number_of_limiters() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE stays a 1 450");
    let used =
        |client: &mut Client| -> i64 { client.info("memory", "used_memory").parse().unwrap() };
    let visit = |client: &mut Client, from: usize, to: usize| {
        for number in from..to {
            let prefix = format!("a-limiter-with-quite-a-long-name-{number}");
            assert_eq!(client.int(&format!("LIMITER.ACQUIRE {prefix} a 1 45")), 1);
            assert_eq!(client.int(&format!("LIMITER.RELEASE {prefix} a")), 1);
        }
    };
    visit(&mut client, 0, 12_000);
    let before = used(&mut client);
    visit(&mut client, 12_000, 36_000);
    let grown = used(&mut client) - before;
    assert!(grown < 5_000_000, "24,000 more limiters took {grown} bytes");
    assert_eq!(total(&mut client, "acquired"), 36_001);
    check(&mut client, "stays", &[("held", 1), ("acquired", 1)]);
    assert_eq!(client.int("DBSIZE"), 1);
}
