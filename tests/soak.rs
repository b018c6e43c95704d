//! After any load everything is back where it was: no client is blocked, no line, tie or timer is
//! left, and memory does not grow from round to round.
//!
//! A round is a storm of mixed commands, deaths and administration, after which everybody goes and
//! everything is deleted. The first rounds fill what is there to be filled (the server's own pools
//! and tables, the module's records); the later ones must add nothing.
//!
//! `make test` takes a few short rounds. `make soak MINUTES=5` goes on for so long, and looks at
//! the process's resident memory as well, which means something only then.

mod harness;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use harness::mix::{administrate, Worker};
use harness::{slowness, wait_until, Server};
use redis::Value;

const WORKERS: u64 = 14;

/// With the tables for latencies the server takes 25,000 bytes for each command, at its first call.
const OPTIONS: [&str; 6] =
    ["--appendonly", "yes", "--appendfsync", "everysec", "--latency-tracking", "no"];

/// Rounds that are not judged.
const WARM_UP: u64 = 2;

/// How much more may be allocated at the end than after the first rounds. Seen: 3,000 bytes, up
/// and down. A leak of one small string a wait is three times that in the short rounds.
const ALLOCATED: i64 = 8 * 1024;

/// The same of resident memory, of which allocators keep some as they like.
const RESIDENT: i64 = 2 * 1024 * 1024;

/// What the server uses at rest, in bytes.
#[derive(Clone, Copy, Debug)]
struct Memory {
    allocated: i64,
    resident: i64,
}

/// Everybody works for a while, and goes; how many steps they took, and leases they were given.
fn storm(server: &Server, seed: u64, lasts: Duration) -> (usize, usize) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS)
            .map(|number| {
                let worker = Worker::new(server, seed.wrapping_add(number));
                scope.spawn(|| worker.run(&over))
            })
            .collect();
        let administrator = scope.spawn(|| administrate(server, &over, seed));
        thread::sleep(lasts); // How long it lasts, not what it waits for.
        over.store(true, Ordering::Relaxed);
        administrator.join().expect("the administrator");
        server.client().call("CLIENT UNPAUSE");
        let done = workers.into_iter().map(|worker| worker.join().expect("a worker"));
        done.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
    })
}

/// Waits until nothing is left of a storm; what memory is used then.
fn rest(server: &Server) -> Memory {
    let mut client = server.client();
    let mut is = |section: &str, field: &str, value: &str| {
        wait_until(&format!("{field} is {value}"), || client.info(section, field) == value);
    };
    is("clients", "connected_clients", "1");
    is("clients", "blocked_clients", "0");
    is("limiter", "limiter_waiting", "0");
    is("limiter", "limiter_lines", "0");
    is("limiter", "limiter_ephemeral", "0");
    for delete in ["FLUSHALL", "SCRIPT FLUSH", "SLOWLOG RESET", "MEMORY PURGE"] {
        assert_eq!(client.call(delete), Value::Okay);
    }
    wait_until("nothing is left to be freed or written", || {
        client.info("memory", "lazyfree_pending_objects") == "0"
            && client.info("persistence", "aof_rewrite_in_progress") == "0"
            && client.info("persistence", "aof_rewrite_scheduled") == "0"
            && client.info("persistence", "rdb_bgsave_in_progress") == "0"
    });
    // The server looks at its resident memory ten times a second.
    let looks_again_ms = client.now_ms() + 300;
    client.wait_for_clock(looks_again_ms);
    let mut bytes = |field| client.info("memory", field).parse().expect("a number");
    Memory { allocated: bytes("used_memory"), resident: bytes("used_memory_rss") }
}

/// The median of one of the figures.
fn median(rounds: &[Memory], figure: impl Fn(&Memory) -> i64) -> i64 {
    let mut figures: Vec<i64> = rounds.iter().map(figure).collect();
    figures.sort_unstable();
    figures[figures.len() / 2]
}

#[test]
fn after_any_load_everything_is_back_where_it_was() {
    let seed =
        std::env::var("SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    let minutes: Option<u64> = std::env::var("MINUTES").ok().map(|text| text.parse().unwrap());
    println!("SEED={seed}");
    let (rounds, round_lasts) = match minutes {
        Some(minutes) => (12 * minutes, Duration::from_millis(4500)),
        None => (3, Duration::from_secs(1) * slowness()),
    };
    let mut server = Server::start_with(&OPTIONS);
    let mut memory = Vec::new();
    let (mut steps, mut granted) = (0, 0);
    for round in 0..WARM_UP + rounds {
        let done = storm(&server, seed.wrapping_add(round * 1_000), round_lasts);
        (steps, granted) = (steps + done.0, granted + done.1);
        memory.push(rest(&server));
        println!("round {round}: {:?}", memory[memory.len() - 1]);
    }
    let mut client = server.client();
    let waits = client.info("limiter", "limiter_waits");
    println!("{steps} steps, {granted} leases, {waits} waits");
    assert!(granted > 100 / slowness() as usize, "too little happened");

    let memory = &memory[WARM_UP as usize..];
    let third = memory.len() / 3;
    let (first, last) = (&memory[..third], &memory[memory.len() - third..]);
    let grew = |figure: fn(&Memory) -> i64| median(last, figure) - median(first, figure);
    let allocated = grew(|memory| memory.allocated);
    assert!(allocated < ALLOCATED, "{allocated} more bytes are allocated");
    let resident = grew(|memory| memory.resident);
    assert!(minutes.is_none() || resident < RESIDENT, "{resident} more bytes are resident");

    // Refused while a client is blocked or a timer runs, such as that for this one's deadline.
    client.int("LIMITER.ACQUIRE p a 1 450");
    server.waiter("LIMITER.BACQUIRE p b 1 450 400").close();
    wait_until("it has left", || server.blocked() == 0);
    wait_until("nothing is pending", || client.call("MODULE UNLOAD limiter") == Value::Okay);
    assert!(server.is_running());
}
