//! Replicas, the AOF and the RDB file hold what the server holds, member for member, score for
//! score, expiry for expiry: in the middle of any mix of commands, waits, hand-offs, lapses,
//! transactions, scripts and outside changes, and of what an administrator does to a live server.
//! Neither a replica nor a server that loads the files needs the module.

mod harness;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use harness::{module, text, wait_until, Client, Contents, Server, Signal};
use redis::{RedisResult, Value};

const WORKERS: u64 = 14;
const ROUNDS: u64 = 6;
const ROUND_LASTS: Duration = Duration::from_millis(900);

const ALWAYS: [&str; 4] = ["--appendonly", "yes", "--appendfsync", "always"];

/// Somebody who sends one command after the other, some of them foreign to limiters.
struct Worker<'s> {
    server: &'s Server,
    client: Client,
    rng: Rng,
    granted: usize,
}

impl Worker<'_> {
    /// Works until it is over; how many steps it took, and how many leases it was given.
    fn run(mut self, over: &AtomicBool) -> (usize, usize) {
        let mut steps = 0;
        while !over.load(Ordering::Relaxed) {
            steps += 1;
            if self.step().is_err() && !over.load(Ordering::Relaxed) {
                self.client = self.server.client(); // It was killed.
            }
        }
        (steps, self.granted)
    }

    fn step(&mut self) -> RedisResult<()> {
        let rng = &mut self.rng;
        match rng.u8(0..40) {
            0..22 => {
                let limiters_own = limiter_command(rng);
                self.send(&limiters_own)?;
                if limiters_own.starts_with("LIMITER.BACQUIRE") && self.rng.u8(0..10) == 0 {
                    self.client = self.server.client(); // Closed in mid-wait, or after the grant.
                    return Ok(());
                }
                let granted = self.client.try_receive()? == Value::Int(1);
                self.granted += usize::from(granted && !limiters_own.contains("RELEASE"));
            }
            22..30 => {
                let change = outside_change(rng);
                self.send(&change)?;
                self.client.try_receive()?;
            }
            30..34 => {
                let commands: Vec<String> =
                    (0..rng.usize(1..5)).map(|_| any_command(rng)).collect();
                self.send("MULTI")?;
                commands.iter().try_for_each(|command| self.send(command))?;
                self.send("EXEC")?;
                for _ in 0..commands.len() + 2 {
                    self.client.try_receive()?;
                }
            }
            34..38 => {
                let calls: Vec<String> = (0..rng.usize(1..4))
                    .map(|_| {
                        let command = any_command(rng);
                        let words: Vec<_> = command.split(' ').map(|w| format!("'{w}'")).collect();
                        format!("redis.pcall({})", words.join(","))
                    })
                    .collect();
                let script = calls.join(" ");
                self.client.try_run(&["EVAL", &script, "0"])?;
            }
            _ => {
                let db = rng.u8(0..2).to_string();
                self.client.try_run(&["SELECT", &db])?;
            }
        }
        Ok(())
    }

    fn send(&mut self, command: &str) -> RedisResult<()> {
        Ok(self.client.try_send(&command.split(' ').collect::<Vec<_>>())?)
    }
}

fn any_command(rng: &mut Rng) -> String {
    if rng.bool() {
        limiter_command(rng)
    } else {
        outside_change(rng)
    }
}

fn prefix(rng: &mut Rng) -> String {
    format!("p{}", rng.u8(0..4))
}

fn key(rng: &mut Rng) -> String {
    format!("k{}", rng.u8(0..10))
}

fn limiter_command(rng: &mut Rng) -> String {
    let (prefix, key, limit) = (prefix(rng), key(rng), rng.u8(1..5));
    let ttl = if rng.u8(0..4) == 0 { "100".into() } else { format!("0.{:03}", rng.u16(5..200)) };
    let option = [" NX", " EPHEMERAL", "", "", ""][rng.usize(0..5)];
    match rng.u8(0..10) {
        0..3 => format!("LIMITER.ACQUIRE {prefix} {key} {limit} {ttl}{option}"),
        3..7 => {
            let ephemeral = if rng.bool() { " EPHEMERAL" } else { "" };
            let timeout = rng.u8(1..80);
            format!("LIMITER.BACQUIRE {prefix} {key} {limit} {ttl} 0.0{timeout:02}{ephemeral}")
        }
        7 => format!("LIMITER.MACQUIRE 2 {prefix} {prefix}2 {key} {ttl} {limit} 3{option}"),
        8 => format!("LIMITER.RELEASE {prefix} {key} {}", self::key(rng)),
        _ => format!("LIMITER.RENEW {prefix} {key} {ttl}"),
    }
}

fn outside_change(rng: &mut Rng) -> String {
    let (prefix, other, key) = (prefix(rng), prefix(rng), key(rng));
    let now = std::time::UNIX_EPOCH.elapsed().expect("a time after 1970").as_secs_f64();
    let lapse = now + f64::from(rng.i16(-100..300)) / 1000.0;
    match rng.u8(0..22) {
        0..3 => format!("ZREM {prefix} {key}"),
        3..6 => format!("ZADD {prefix} {lapse:.4} {key}"),
        6 => format!("ZADD {prefix} +inf {key}"),
        7..9 => format!("DEL {prefix}"),
        9 => format!("UNLINK {prefix}"),
        10 => format!("PEXPIRE {prefix} {}", rng.u8(1..100)),
        11 => format!("PERSIST {prefix}"),
        12 => format!("RENAME {prefix} {other}"),
        13 => format!("COPY {prefix} {other} REPLACE"),
        14 => format!("MOVE {prefix} 1"),
        15 => format!("SET {prefix} text PX 20"),
        16 => format!("ZUNIONSTORE {prefix} 2 {prefix} {other}"),
        17 => format!("ZPOPMIN {prefix} 2"),
        18 => "SWAPDB 0 1".into(),
        19 => "FLUSHDB".into(),
        20 => "FLUSHALL ASYNC".into(),
        _ => format!("ZREMRANGEBYRANK {prefix} 0 0"),
    }
}

/// What an administrator may do to a live server.
fn administrate(server: &Server, over: &AtomicBool, seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let mut client = server.client();
    while !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(rng.u64(10..80)));
        let command = match rng.u8(0..9) {
            0 => "BGREWRITEAOF",
            1 => "BGSAVE",
            2 => "CLIENT PAUSE 40 WRITE",
            3 => "CLIENT PAUSE 40 ALL",
            4 => "CLIENT KILL TYPE normal",
            5 => "CLIENT KILL TYPE replica",
            6 => "DEBUG RELOAD",
            7 => "CONFIG SET maxmemory 1",
            _ => "CONFIG SET maxmemory 0",
        };
        client.call(command);
    }
    client.call("CONFIG SET maxmemory 0");
}

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
                    let rng = Rng::with_seed(seed.wrapping_add(number));
                    let worker = Worker { server, client: server.client(), rng, granted: 0 };
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
    assert!(granted > 500, "too little happened");
    assert_eq!(Value::Okay, admin.call("FLUSHALL"));
    check_same("a replica without the module agrees", &server, &bare);
    assert_eq!(server.blocked(), 0);
}
