//! Replicas, the AOF and the RDB file hold what the server holds, member for member, score for
//! score, expiry for expiry: in the middle of any mix of commands, waits, hand-offs, lapses,
//! transactions, scripts and outside changes, and of what an administrator does to a live server.
//! Neither a replica nor a server that loads the files needs the module.

mod harness;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use harness::mix::{administrate, Worker};
use harness::{module, slowness, text, wait_until, Contents, Server, Signal};
use redis::Value;

const WORKERS: u64 = 14;
const ROUNDS: u64 = 6;
const ROUND_LASTS: Duration = Duration::from_millis(900);

const ALWAYS: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

/// Waits until both hold the same; if they never do, the test fails and shows the difference.
fn check_same(what: &str, server: &Server, other: &Server) {
    let (mut ours, mut theirs) = (Contents::new(), Contents::new());
    let same = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        // What expires during the comparison goes from both.
        wait_until(what, || {
            (ours, theirs) = (server.contents(), other.contents());
            ours == theirs
        });
    }));
    assert!(same.is_ok(), "not true that {what}:\nthe server has {ours:#?}\nbut there {theirs:#?}");
}

#[test]
fn replicas_aof_and_rdb_agree_with_the_server_in_the_middle_of_everything() {
    let seed =
        std::env::var("SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    let mut server = Server::start_with(&ALWAYS);
    let port = server.port.to_string();
    let module = module().to_str().unwrap();
    let bare = Server::start_bare(&["--replicaof", "127.0.0.1", &port]);
    let with_module =
        Server::start_bare(&["--loadmodule", module, "--replicaof", "127.0.0.1", &port]);
    let mut admin = server.client();
    let (mut compared, mut steps, mut granted) = (0, 0, 0);
    let mut before = Contents::new();
    for round in 0..ROUNDS {
        let (over, administered) = (AtomicBool::new(false), AtomicBool::new(false));
        let seed = seed.wrapping_add(round * 1_000);
        thread::scope(|scope| {
            let server = &server;
            let workers: Vec<_> = (0..WORKERS)
                .map(|number| {
                    let worker = Worker::new(server, seed.wrapping_add(number));
                    scope.spawn(|| worker.run(&over))
                })
                .collect();
            let administrator = scope.spawn(|| administrate(server, &administered, seed));
            thread::sleep(ROUND_LASTS); // How long it lasts, not what it waits for.
            administered.store(true, Ordering::Relaxed);
            administrator.join().expect("the administrator");

            // All stand still where they are: in mid-wait, granted, about to lapse.
            admin = server.client();
            admin.call("CLIENT UNPAUSE"); // A pause of all would be prolonged as such.
            admin.call("CLIENT PAUSE 1000000 WRITE");
            over.store(true, Ordering::Relaxed);
            wait_until("nothing is being written to disk", || {
                admin.info("persistence", "aof_rewrite_in_progress") == "0"
                    && admin.info("persistence", "aof_rewrite_scheduled") == "0"
                    && admin.info("persistence", "rdb_bgsave_in_progress") == "0"
            });
            check_same("a replica without the module agrees", server, &bare);
            check_same("a replica with the module agrees", server, &with_module);
            let replayed = server.replay(&["--appendonly", "yes"]);
            check_same("the AOF agrees", server, &replayed);
            wait_until("it saves", || {
                admin.call("BGSAVE") == text("Background saving started") // Else a replica syncs.
            });
            wait_until("it is saved", || {
                admin.info("persistence", "rdb_bgsave_in_progress") == "0"
            });
            let replayed = server.replay(&[]);
            check_same("the RDB file agrees", server, &replayed);
            compared += 4;
            before = server.contents();
            if round % 2 == 0 {
                admin.call("CLIENT UNPAUSE");
            } else {
                server.signal(Signal::Kill); // With waiters in line.
            }
            for worker in workers {
                let (its_steps, its_granted) = worker.join().expect("a worker");
                (steps, granted) = (steps + its_steps, granted + its_granted);
            }
        });
        if round % 2 == 1 {
            server.restart();
            let after = server.contents();
            let now_ms = server.client().now_ms();
            before.retain(|_, (_, _, expiry_ms)| *expiry_ms < 0 || *expiry_ms > now_ms);
            assert_eq!(after, before, "after a restart");
        }
    }
    admin = server.client();
    println!("{compared} comparisons, {steps} steps, {granted} leases");
    assert!(granted > 500 / slowness() as usize, "too little happened");
    assert_eq!(Value::Okay, admin.call("FLUSHALL"));
    check_same("a replica without the module agrees", &server, &bare);
    assert_eq!(server.blocked(), 0);
}
