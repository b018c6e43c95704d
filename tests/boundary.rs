//! A panic anywhere in the module is an error reply at most, and a line in the server's log: the
//! server goes on, nobody who waits is forgotten, and the AOF agrees with the data.
//!
//! The library under test is the module with one feature more, `panic-hook`: it panics at a named
//! point when there is a file of that name in the server's folder (`src/trip.rs`).

mod harness;

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use harness::{build, module, wait_until, Client, Server, AOF};
use redis::Value;

const ONE: Value = Value::Int(1);
const ERROR: &str = "ERR internal error in the module limiter, see the server's log";

fn module_that_panics() -> &'static str {
    static MODULE: OnceLock<String> = OnceLock::new();
    MODULE.get_or_init(|| {
        let what = ["--example", "limiter_that_panics", "--features", "panic-hook"];
        let library = build(&what, "examples/liblimiter_that_panics");
        library.to_str().expect("a path in UTF-8").into()
    })
}

/// A server with that module, and a connection.
fn start() -> (Server, Client) {
    let server = Server::start_bare(&[&["--loadmodule", module_that_panics()], &AOF[..]].concat());
    let client = server.client();
    (server, client)
}

/// Has the module panic the next time it comes to this point.
fn arm(server: &Server, point: &str) {
    fs::write(server.path(&format!("panic-at-{point}")), "").expect("to write a file");
}

/// It has panicked there, and the log tells.
fn check_panicked(server: &Server, point: &str) {
    let file = format!("panic-at-{point}");
    wait_until("the log tells of the panic", || {
        server.log().contains(&format!("limiter: a panic was contained: {file}"))
    });
    assert!(!server.path(&file).exists());
}

/// Nobody waits, everything works, and the AOF has what the server has.
fn check_recovered(server: &Server) {
    assert_eq!(server.blocked(), 0);
    let mut client = server.client();
    assert_eq!(client.info("limiter", "limiter_waiting"), "0");
    assert_eq!(client.int("LIMITER.ACQUIRE another a 1 450"), 1);
    let mut waiter = server.waiter("LIMITER.BACQUIRE another b 1 450 0");
    assert_eq!(client.int("LIMITER.RELEASE another a"), 1);
    assert_eq!(waiter.receive(), ONE);
    assert_eq!(server.replay(&AOF).contents(), server.contents());
}

fn holders(client: &mut Client) -> Vec<String> {
    client.strings("ZRANGE p 0 -1")
}

#[test]
fn a_command_that_panics_is_answered_with_an_error_and_has_done_nothing() {
    let (server, mut client) = start();
    arm(&server, "command");
    assert_eq!(client.error("LIMITER.ACQUIRE p k 1 450"), ERROR);
    check_panicked(&server, "command");
    assert_eq!(client.int("EXISTS p"), 0);

    client.call("MULTI");
    client.call("LIMITER.ACQUIRE p k 1 450");
    client.call("LIMITER.COUNT p");
    arm(&server, "command");
    let Value::Array(replies) = client.call("EXEC") else { panic!("no replies") };
    assert_eq!(harness::error_text(&replies[0]), ERROR);
    assert_eq!(replies[1], Value::Int(0));

    arm(&server, "command");
    let script = "return redis.pcall('LIMITER.ACQUIRE', 'p', 'k', 1, 450)['err']";
    assert_eq!(harness::string(&client.run(&["EVAL", script, "0"])), ERROR);

    arm(&server, "keys");
    // The server asks the module where the documentation does not tell it.
    assert!(client.error("COMMAND GETKEYS LIMITER.MACQUIRE x p k 450 1").starts_with("ERR"));
    check_panicked(&server, "keys");
    assert_eq!(client.strings("COMMAND GETKEYS LIMITER.MACQUIRE 1 p k 450 1"), ["p"]);
    check_recovered(&server);
}

#[test]
fn a_panic_after_a_write_leaves_what_was_written_and_replicated_and_nothing_is_taken_for_granted() {
    let (server, mut client) = start();
    for (round, holders_before) in [("new", 0), ("known", 1)] {
        assert_eq!(holders(&mut client).len(), holders_before);
        arm(&server, "write");
        assert_eq!(client.error("LIMITER.ACQUIRE p a 2 0.05"), ERROR);
        check_panicked(&server, "write");
        let (_, score) = client.members("p")[0];
        client.wait_for_clock((score * 1000.0).round() as i64);
        // What was known of the set before the write would say that nothing has lapsed.
        let key = format!("LIMITER.ACQUIRE p {round} {} 450", holders_before + 1);
        assert_eq!(client.int(&key), 1, "{round}");
        assert!(client.int("PEXPIRETIME p") > client.now_ms() + 450_000);
    }
    assert_eq!(holders(&mut client), ["new", "known"]);
    check_recovered(&server);
}

#[test]
fn a_waiter_whose_reply_panics_gets_an_error_and_the_next_one_its_lease() {
    let (server, mut client) = start();
    client.int("LIMITER.ACQUIRE p a 1 450");
    let mut first = server.waiter("LIMITER.BACQUIRE p first 1 450 0");
    let mut second = server.waiter("LIMITER.BACQUIRE p second 1 450 0");
    arm(&server, "reply");
    assert_eq!(client.int("LIMITER.RELEASE p a"), 1);
    assert_eq!(harness::error_text(&first.receive()), ERROR);
    check_panicked(&server, "reply");
    assert_eq!(second.receive(), ONE);
    assert_eq!(holders(&mut client), ["second"]);
    assert_eq!(first.call("PING"), harness::text("PONG"));
    check_recovered(&server);
}

#[test]
fn a_panic_in_the_pump_strands_nobody() {
    for point in ["ring", "grant"] {
        let (server, mut client) = start();
        let mut waiters = Vec::new();
        for prefix in ["p", "q", "r"] {
            client.int(&format!("LIMITER.ACQUIRE {prefix} a 1 450"));
            waiters.push(server.waiter(&format!("LIMITER.BACQUIRE {prefix} b 1 450 0")));
        }
        arm(&server, point);
        assert_eq!(client.int("DEL p q r"), 3);
        for waiter in &mut waiters {
            assert_eq!(waiter.receive(), ONE, "{point}");
        }
        check_panicked(&server, point);
        check_recovered(&server);
    }
}

#[test]
fn a_release_whose_hand_off_panics_hands_over_soon_after() {
    let (server, mut client) = start();
    client.int("LIMITER.ACQUIRE p a 1 450");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
    arm(&server, "grant");
    assert_eq!(client.error("LIMITER.RELEASE p a"), ERROR);
    check_panicked(&server, "grant");
    assert_eq!(waiter.receive(), ONE);
    assert_eq!(holders(&mut client), ["b"]);
    check_recovered(&server);
}

#[test]
fn a_waiter_that_goes_during_a_panic_leaves_the_line() {
    let (server, mut client) = start();
    client.int("LIMITER.ACQUIRE p a 1 450");
    let mut killed = server.waiter("LIMITER.BACQUIRE p killed 1 450 0");
    let mut next = server.waiter("LIMITER.BACQUIRE p next 1 450 0");
    arm(&server, "gone");
    let id = client.text("CLIENT LIST");
    let id = id.lines().find(|line| line.contains("flags=b")).expect("a blocked client");
    let id = id.split(' ').next().and_then(|field| field.strip_prefix("id=")).expect("an id");
    assert_eq!(client.int(&format!("CLIENT KILL ID {id}")), 1);
    check_panicked(&server, "gone");
    assert!(killed.try_receive().is_err());
    assert_eq!(client.int("LIMITER.RELEASE p a"), 1);
    assert_eq!(next.receive(), ONE);
    check_recovered(&server);
}

#[test]
fn the_lease_of_a_closed_connection_ends_in_spite_of_a_panic() {
    for point in ["disconnect", "take-back"] {
        let (server, mut client) = start();
        let mut owner = server.client();
        owner.int("LIMITER.ACQUIRE p a 1 450 EPHEMERAL");
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
        // The test's own passing connections are to be gone before.
        wait_until("three are left", || client.info("clients", "connected_clients") == "3");
        arm(&server, point);
        owner.close();
        assert_eq!(waiter.receive(), ONE, "{point}");
        check_panicked(&server, point);
        assert_eq!(holders(&mut client), ["b"]);
        check_recovered(&server);
    }
}

#[test]
fn what_others_do_during_a_panic_is_noticed() {
    let (server, mut client) = start();
    client.int("LIMITER.ACQUIRE p a 2 450");
    arm(&server, "key");
    let soon_ms = client.now_ms() + 50;
    client.int(&format!("ZADD p {} foreign", soon_ms as f64 / 1000.0));
    check_panicked(&server, "key");
    client.wait_for_clock(soon_ms);
    assert_eq!(client.int("LIMITER.ACQUIRE p b 2 450"), 1, "what was added has lapsed");

    let mut waiter = server.waiter("LIMITER.BACQUIRE p c 2 450 0");
    arm(&server, "key");
    client.int("ZREM p a");
    assert_eq!(waiter.receive(), ONE);

    let mut waiter = server.waiter("LIMITER.BACQUIRE p d 2 450 0");
    arm(&server, "flush");
    client.call("FLUSHALL");
    assert_eq!(waiter.receive(), ONE);
    check_panicked(&server, "flush");
    check_recovered(&server);
}

#[test]
fn info_that_panics_lacks_the_section() {
    let (server, mut client) = start();
    arm(&server, "info");
    assert_eq!(client.text("INFO limiter"), "");
    check_panicked(&server, "info");
    assert_eq!(client.info("limiter", "limiter_lines"), "0");
    check_recovered(&server);
}

#[test]
fn a_load_that_panics_is_refused() {
    let server = Server::start_bare(&AOF);
    let mut client = server.client();
    arm(&server, "load");
    let load = format!("MODULE LOAD {}", module_that_panics());
    assert!(client.error(&load).starts_with("ERR Error loading the extension"));
    check_panicked(&server, "load");
    assert_eq!(client.call(&load), Value::Okay);
    check_recovered(&server);
}

#[test]
fn the_module_itself_has_no_such_points() {
    let has_them = |library: &Path| {
        let bytes = fs::read(library).expect("the library");
        bytes.windows(9).any(|window| window == b"panic-at-")
    };
    assert!(has_them(Path::new(module_that_panics())));
    assert!(!has_them(module()));
}
