//! EPHEMERAL: leases that end when their connection closes, and the ways a tie is cut or kept.

mod harness;

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::{slowness, wait_until, Client, Server, AOF};
use redis::Value;

const ONE: Value = Value::Int(1);

/// Closes the connection and waits until the server has noticed.
fn close(server: &Server, client: Client) {
    let connections = || server.client().info("clients", "connected_clients");
    let before: i32 = connections().parse().unwrap();
    client.close();
    wait_until("the server has closed it", || connections().parse::<i32>().unwrap() < before);
}

/// The holders of `p`. The pump may still be at work when the connection is gone.
fn holders(server: &Server) -> Vec<String> {
    let mut client = server.client();
    client.call("PING");
    client.strings("ZRANGE p 0 -1")
}

#[test]
fn the_lease_ends_with_its_connection_and_the_next_in_line_gets_the_slot() {
    let server = Server::start_with(&AOF);
    let mut owner = server.client();
    assert_eq!(owner.int("LIMITER.ACQUIRE p a 1 450 EPHEMERAL"), 1);
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0 EPHEMERAL");
    let mut next = server.waiter("LIMITER.BACQUIRE p c 1 450 0");
    owner.close();
    assert_eq!(waiter.receive(), ONE);
    assert!(!next.has_reply());
    waiter.close();
    assert_eq!(next.receive(), ONE);
    close(&server, next);
    assert_eq!(holders(&server), ["c"], "an ordinary lease stays");
    let effects = server.effects();
    let removed: Vec<&String> =
        effects.iter().filter(|effect| effect[0] == "ZREM").map(|effect| &effect[2]).collect();
    assert_eq!(removed, ["a", "b"]);
}

#[test]
fn whatever_closes_the_connection_ends_the_lease() {
    let server = Server::start_with(&AOF);
    let mut admin = server.client();
    for how in ["kill", "quit", "reset", "idle"] {
        let mut owner = server.client();
        assert_eq!(owner.int("LIMITER.ACQUIRE p a 1 450 EPHEMERAL"), 1, "{how}");
        match how {
            "kill" => {
                let id = owner.id();
                admin.int(&format!("CLIENT KILL ID {id}"));
            }
            "quit" => owner.send(&["QUIT"]),
            "reset" => owner.send_raw(b"*1\r\n$-7\r\n"), // A protocol error.
            _ => {
                admin.call("CONFIG SET timeout 1");
            }
        }
        wait_until(&format!("the lease ended by {how}"), || {
            // Speaking keeps this connection from being idle itself.
            admin.int("LIMITER.COUNT p") == 0
        });
        admin.call("CONFIG SET timeout 0");
    }
}

#[test]
fn a_process_that_is_killed_frees_its_slots() {
    let server = Server::start_with(&AOF);
    let port = server.port.to_string();
    let mut client = server.client();
    let mut process = Command::new("redis-cli")
        .args(["-p", &port])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-cli");
    let mut stdin = process.stdin.take().expect("its input");
    std::io::Write::write_all(&mut stdin, b"LIMITER.ACQUIRE p a 1 450 EPHEMERAL\n").expect("typed");
    wait_until("it holds the slot", || client.int("LIMITER.COUNT p") == 1);
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
    process.kill().expect("to kill it, as kill -9 does");
    process.wait().expect("to reap it");
    assert_eq!(waiter.receive(), ONE);
}

#[test]
fn a_refresh_cuts_the_tie_or_moves_it() {
    let server = Server::start();
    let (mut first, mut second) = (server.client(), server.client());
    // Without the option the lease becomes an ordinary one.
    first.int("LIMITER.ACQUIRE p a 9 450 EPHEMERAL");
    assert_eq!(second.int("LIMITER.ACQUIRE p a 9 450"), 1);
    // With it, it is tied to the connection that refreshed it.
    first.int("LIMITER.ACQUIRE p b 9 450 EPHEMERAL");
    assert_eq!(second.int("LIMITER.ACQUIRE p b 9 450 EPHEMERAL"), 1);
    // By the connection itself, without the option.
    first.int("LIMITER.ACQUIRE p c 9 450 EPHEMERAL");
    first.int("LIMITER.ACQUIRE p c 9 450");
    // An ordinary lease, tied later.
    second.int("LIMITER.ACQUIRE p d 9 450");
    first.int("LIMITER.ACQUIRE p d 9 450 EPHEMERAL");
    // NX that is denied leaves the tie alone.
    first.int("LIMITER.ACQUIRE p e 9 450 EPHEMERAL");
    assert_eq!(second.int("LIMITER.ACQUIRE p e 9 450 NX"), 0);
    // BACQUIRE refreshes as ACQUIRE does.
    first.int("LIMITER.ACQUIRE p f 9 450 EPHEMERAL");
    assert_eq!(second.int("LIMITER.BACQUIRE p f 9 450 0"), 1);
    close(&server, first);
    wait_until("d and e have ended", || holders(&server) == ["a", "b", "c", "f"]);
    close(&server, second);
    wait_until("b has ended", || holders(&server) == ["a", "c", "f"]);
}

#[test]
fn renew_leaves_the_tie_and_release_frees_the_slot_whoever_asks() {
    let server = Server::start();
    let (mut owner, mut other) = (server.client(), server.client());
    owner.int("LIMITER.ACQUIRE p a 9 450 EPHEMERAL");
    assert_eq!(other.int("LIMITER.RENEW p a 900"), 1);
    owner.int("LIMITER.ACQUIRE p b 9 450 EPHEMERAL");
    assert_eq!(other.int("LIMITER.RELEASE p b"), 1);
    assert_eq!(other.int("LIMITER.ACQUIRE p b 9 450"), 1, "a later lease of the same key");
    close(&server, owner);
    wait_until("a has ended", || holders(&server) == ["b"]);
}

#[test]
fn a_later_lease_of_the_same_key_is_another_even_with_the_same_score() {
    let server = Server::start();
    let mut client = server.client();
    for round in 0..100 {
        client.call("DEL p");
        let mut owner = server.client();
        let id = owner.id();
        owner.int("LIMITER.ACQUIRE p a 9 450 EPHEMERAL");
        // Released, taken anew and the first owner killed, in one go, in about a millisecond.
        let kill = format!("CLIENT KILL ID {id}\r\n");
        let take = match round % 2 {
            0 => "LIMITER.RELEASE p a\r\nLIMITER.ACQUIRE p a 9 450\r\nPING\r\n",
            _ => "PING\r\nPING\r\nLIMITER.ACQUIRE p a 9 450\r\n",
        };
        let (before, after) = if round % 2 == 0 { (take, &*kill) } else { (&*kill, take) };
        client.send_raw(format!("{before}{after}").as_bytes());
        (0..4).for_each(|_| {
            client.receive();
        });
        client.call("PING");
        assert_eq!(client.int("LIMITER.COUNT p"), 1, "round {round}");
    }
}

#[test]
fn the_ttl_still_holds() {
    let server = Server::start();
    let mut owner = server.client();
    owner.int("LIMITER.ACQUIRE p a 1 0.05 EPHEMERAL");
    let mut client = server.client();
    wait_until("it has lapsed", || client.int("LIMITER.ACQUIRE p a 1 450") == 1);
    close(&server, owner);
    assert_eq!(holders(&server), ["a"], "the lease after it is another's");
}

#[test]
fn leases_stay_tied_across_a_swap_and_not_across_a_flush() {
    let server = Server::start();
    let (mut owner, mut client) = (server.client(), server.client());
    owner.int("LIMITER.ACQUIRE p a 9 450 EPHEMERAL");
    client.call("SWAPDB 0 1");
    owner.int("LIMITER.ACQUIRE p b 9 450 EPHEMERAL");
    client.int("ZADD p +inf c");
    close(&server, owner);
    wait_until("b has ended", || holders(&server) == ["c"]);
    client.call("SELECT 1");
    assert_eq!(client.int("EXISTS p"), 0, "a has ended in the other database");

    let mut owner = server.client();
    owner.int("LIMITER.ACQUIRE p a 9 450 EPHEMERAL");
    client.call("FLUSHALL");
    client.call("SELECT 0");
    close(&server, owner);
    assert_eq!(holders(&server), Vec::<String>::new());
}

#[test]
fn in_a_transaction_it_ties_to_the_client_and_in_a_script_it_is_refused() {
    let server = Server::start();
    let mut owner = server.client();
    owner.call("MULTI");
    owner.call("LIMITER.ACQUIRE p a 9 450 EPHEMERAL");
    owner.call("LIMITER.BACQUIRE p b 9 450 0 EPHEMERAL");
    assert_eq!(owner.call("EXEC"), harness::ints(&[1, 1]));
    let script = "return redis.pcall('LIMITER.ACQUIRE', KEYS[1], 'c', 9, 450, 'EPHEMERAL')";
    let refused = owner.run(&["EVAL", script, "1", "p"]);
    assert!(harness::error_text(&refused).contains("a script has none"), "{refused:?}");
    assert_eq!(owner.error("LIMITER.ACQUIRE p c 9 450 EPHEMERAL EPHEMERAL"), "ERR syntax error");
    close(&server, owner);
    wait_until("both have ended", || holders(&server).is_empty());
}

#[test]
fn thousands_of_leases_on_one_connection_cost_the_others_nothing() {
    let server = Server::start();
    let (mut owner, mut other) = (server.client(), server.client());
    let mut pipeline = Vec::new();
    for n in 0..20_000 {
        pipeline.extend(format!("LIMITER.ACQUIRE p{} {n} 99999 450 EPHEMERAL\r\n", n % 10).bytes());
    }
    let mut writer = owner.second_handle();
    let sender = std::thread::spawn(move || writer(&pipeline));
    (0..20_000).for_each(|_| assert_eq!(owner.receive(), ONE));
    sender.join().unwrap();
    owner.close();
    let mut worst = Duration::ZERO;
    wait_until("all have ended", || {
        let started = Instant::now();
        let left: i64 = (0..10).map(|n| other.int(&format!("LIMITER.COUNT p{n}"))).sum();
        worst = worst.max(started.elapsed() / 10);
        left == 0
    });
    assert!(
        worst < Duration::from_millis(100) * slowness(),
        "the server stood still for {worst:?}"
    );
}

#[test]
fn after_a_restart_only_the_ttl_is_left() {
    let mut server = Server::start_with(&AOF);
    let mut owner = server.client();
    owner.int("LIMITER.ACQUIRE p a 9 450 EPHEMERAL");
    server.kill_and_restart();
    assert_eq!(holders(&server), ["a"]);
}
