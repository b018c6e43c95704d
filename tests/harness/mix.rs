//! Clients that send any mix of commands: limiters' own, waits, transactions, scripts, and what
//! others may do to the same keys; and an administrator who does to the server what may be done to
//! a live one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use redis::{RedisResult, Value};

use super::{Client, Server};

/// Somebody who sends one command after the other, some of them foreign to limiters.
pub struct Worker<'s> {
    server: &'s Server,
    client: Client,
    rng: Rng,
    granted: usize,
}

impl<'s> Worker<'s> {
    pub fn new(server: &'s Server, seed: u64) -> Self {
        Self { server, client: server.client(), rng: Rng::with_seed(seed), granted: 0 }
    }

    /// Works until it is over; how many steps it took, and how many leases it was given.
    pub fn run(mut self, over: &AtomicBool) -> (usize, usize) {
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

/// A few names that many share, and now and then one that nobody has used before, so that what
/// should go with a limiter and stays is seen to grow. The module's records do not take names of
/// that length, which stay by intent.
fn prefix(rng: &mut Rng) -> String {
    match rng.u8(0..9) {
        0 => format!("{:0>300}", rng.u64(..)),
        number => format!("p{}", number % 4),
    }
}

/// One that is often reached; 0 makes a line where nobody else is.
fn limit(rng: &mut Rng, prefix: &str) -> u8 {
    let shared = prefix.len() == 2;
    if shared {
        rng.u8(1..5)
    } else {
        rng.u8(0..2)
    }
}

fn key(rng: &mut Rng) -> String {
    format!("k{}", rng.u8(0..10))
}

fn limiter_command(rng: &mut Rng) -> String {
    let (prefix, key) = (prefix(rng), key(rng));
    let limit = limit(rng, &prefix);
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
pub fn administrate(server: &Server, over: &AtomicBool, seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let mut client = server.client();
    while !over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(rng.u64(10..80)));
        client.call("CONFIG SET maxmemory 0");
        let command = match rng.u8(0..9) {
            0 => "BGREWRITEAOF",
            1 => "BGSAVE",
            2 => "CLIENT PAUSE 40 WRITE",
            3 => "CLIENT PAUSE 40 ALL",
            4 => "CLIENT KILL TYPE normal",
            5 => "CLIENT KILL TYPE replica",
            6 => "DEBUG RELOAD",
            7 => {
                // Granted, and gone before the reply.
                client.call("MULTI");
                for number in 0..4 {
                    client
                        .call(&format!("LIMITER.RELEASE p{number} k0 k1 k2 k3 k4 k5 k6 k7 k8 k9"));
                }
                client.call("CLIENT KILL TYPE normal");
                "EXEC"
            }
            _ => "CONFIG SET maxmemory 1", // Until the next.
        };
        client.call(command);
    }
    client.call("CONFIG SET maxmemory 0");
}
