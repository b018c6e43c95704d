//! Dozens of connections acquire, wait, release, renew and die at random, with an independent
//! judge: it knows only what the clients saw and when, and finds
//!
//! - more than `LIMIT` leases held at once, by those who certainly held one;
//! - a lease that was acknowledged and lost before its end;
//! - a waiter that slept for more than 50 ms while a slot was certainly free, and for longer than
//!   the machine itself made an idle client wait for a PONG in that run.
//!
//! Time is that of one monotone clock in this process. "Certainly" is the word that makes the
//! judgement hold: a lease is certainly held from the reply that granted it to the moment its
//! release was sent, or its ttl had passed since the request was sent; it is possibly held from
//! shortly before the reply that granted it to the reply to its release.

mod harness;

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use harness::{wait_until, Client, Server};
use redis::{RedisResult, Value};

const LIMIT: usize = 5;
const WORKERS: usize = 36;
const LASTS: Duration = Duration::from_secs(12);

/// What the server's whole milliseconds may take off the end of a lease.
const MILLISECOND: Duration = Duration::from_millis(1);

/// What a reply may take from the grant to the client's next look at the clock.
const IN_FLIGHT: Duration = Duration::from_millis(25);

/// What the server may take to notice that a connection was closed, before a judge minds.
const NOTICE: Duration = Duration::from_millis(50);

/// What one client saw of one lease.
#[derive(Clone, Debug)]
struct Lease {
    certainly: (Instant, Instant),
    possibly: (Instant, Instant),
}

/// What one client saw of one wait, granted or not.
#[derive(Clone, Debug)]
struct Wait {
    key: String,
    from: Instant,
    to: Instant,
}

#[derive(Default)]
struct Records {
    leases: Mutex<Vec<Lease>>,
    waits: Mutex<Vec<Wait>>,
    lost: Mutex<Vec<String>>,
    ids: Mutex<Vec<i64>>,
    longest_ping: Mutex<Duration>,
    over: AtomicBool,
}

/// One client's life: it begins anew with a new connection whenever that is closed.
struct Worker<'s> {
    server: &'s Server,
    records: &'s Records,
    client: Client,
    rng: Rng,
    name: usize,
    serial: usize,
}

impl<'s> Worker<'s> {
    fn new(server: &'s Server, records: &'s Records, name: usize, seed: u64) -> Self {
        let rng = Rng::with_seed(seed ^ (name as u64) << 32);
        Self { server, records, client: server.client(), rng, name, serial: 0 }
    }

    fn run(mut self) {
        self.announce();
        while !self.records.over.load(Ordering::Relaxed) {
            if self.one_lease().is_err() {
                self.reconnect();
            }
        }
    }

    fn reconnect(&mut self) {
        self.client = self.server.client();
        self.announce();
    }

    /// Tells the killer whom it may kill.
    fn announce(&mut self) {
        if let Ok(Value::Int(id)) = self.client.try_run(&["CLIENT", "ID"]) {
            self.records.ids.lock().unwrap().push(id);
        }
    }

    fn one_lease(&mut self) -> RedisResult<()> {
        self.serial += 1;
        let key = format!("{}-{}", self.name, self.serial);
        let ttl = Duration::from_millis(self.rng.u64(20..400));
        let ttl_text = format!("{:.3}", ttl.as_secs_f64());
        let limit = LIMIT.to_string();
        let (waits, ephemeral) = (self.rng.u8(0..4) > 0, self.rng.bool());
        let timeout = format!("{:.3}", self.rng.u32(1..800) as f64 / 1000.0);
        let mut command = vec!["LIMITER.ACQUIRE", "p", &key, &limit, &ttl_text];
        if waits {
            command[0] = "LIMITER.BACQUIRE";
            command.push(&timeout);
        }
        if ephemeral {
            command.push("EPHEMERAL");
        }

        let sent = Instant::now();
        self.client.try_send(&command)?;
        if waits && self.rng.u8(0..12) == 0 {
            // Gives up in mid-wait, by closing the connection. If it was granted already, an
            // ordinary lease may stay: then it cannot know.
            thread::sleep(Duration::from_millis(self.rng.u64(0..30)));
            self.reconnect();
            let end = Instant::now() + if ephemeral { NOTICE } else { ttl };
            self.note((sent, sent), (sent, end));
            return Ok(());
        }
        let reply = self.client.try_receive();
        let replied = Instant::now();
        if waits {
            let wait = Wait { key: key.clone(), from: sent, to: replied };
            self.records.waits.lock().unwrap().push(wait);
        }
        match reply {
            Ok(Value::Int(1)) => {}
            Ok(Value::Int(0)) => return Ok(()),
            Ok(other) => panic!("{command:?}: {other:?}"),
            Err(error) => {
                // Killed. A wait that was not answered leaves nothing; a plain ACQUIRE may.
                let end = replied + if ephemeral || waits { NOTICE } else { ttl };
                self.note((sent, sent), (sent, end));
                return Err(error);
            }
        }

        // It may have waited for long; while it did, it did not hold.
        let granted = sent.max(replied - IN_FLIGHT);
        let mut held_until = sent + ttl - MILLISECOND; // At least.
        let mut held_at_most = replied + ttl;
        thread::sleep(Duration::from_millis(self.rng.u64(0..25)));
        if self.rng.u8(0..4) == 0 {
            let renewed = Instant::now();
            let reply = self.client.try_run(&["LIMITER.RENEW", "p", &key, &ttl_text]);
            let now = Instant::now();
            match reply {
                Ok(Value::Int(1)) => {
                    (held_until, held_at_most) = (renewed + ttl - MILLISECOND, now + ttl)
                }
                Ok(_) => self.judge_loss(&key, "RENEW", now, held_until),
                Err(error) => {
                    let end = if ephemeral { now + NOTICE } else { now + ttl };
                    let until = if ephemeral { replied } else { renewed.min(held_until) };
                    self.note((replied, until), (granted, end));
                    return Err(error);
                }
            }
        }
        let released = Instant::now();
        // A connection that was killed took an ephemeral lease with it, at a time unknown here.
        let until = |reply: &RedisResult<Value>| match (reply, ephemeral) {
            (Err(_), true) => replied,
            _ => released.min(held_until),
        };
        match self.rng.u8(0..8) {
            0 if !ephemeral => {
                // Forgets to release.
                self.note((replied, held_until), (granted, held_at_most));
            }
            1 if ephemeral => {
                let alive = self.client.try_run(&["PING"]);
                self.reconnect(); // The close is the release.
                let end = (Instant::now() + NOTICE).min(held_at_most);
                self.note((replied, until(&alive)), (granted, end));
            }
            _ => {
                let reply = self.client.try_run(&["LIMITER.RELEASE", "p", &key]);
                let now = Instant::now();
                let end = match (&reply, ephemeral) {
                    (Ok(_), _) => now,
                    (Err(_), true) => now + NOTICE,
                    (Err(_), false) => held_at_most, // It may not have arrived.
                };
                self.note((replied, until(&reply)), (granted, end));
                if reply? == Value::Int(0) {
                    self.judge_loss(&key, "RELEASE", now, held_until);
                }
            }
        }
        Ok(())
    }

    fn note(&self, certainly: (Instant, Instant), possibly: (Instant, Instant)) {
        let lease = Lease { certainly, possibly };
        self.records.leases.lock().unwrap().push(lease);
    }

    /// The server said that the lease is gone; was it its time?
    fn judge_loss(&self, key: &str, command: &str, now: Instant, held_until: Instant) {
        if now < held_until {
            let early = held_until - now;
            let line = format!("{key}: {command} found it gone {early:?} before its end");
            self.records.lost.lock().unwrap().push(line);
        }
    }
}

/// Kills connections at random, and processes that wait or hold.
fn killer(server: &Server, records: &Records, seed: u64) {
    let mut rng = Rng::with_seed(seed);
    let mut client = server.client();
    let port = server.port.to_string();
    while !records.over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(rng.u64(5..40)));
        let victim = {
            let mut ids = records.ids.lock().unwrap();
            (!ids.is_empty()).then(|| {
                let at = rng.usize(0..ids.len());
                ids.swap_remove(at)
            })
        };
        if let Some(id) = victim {
            client.call(&format!("CLIENT KILL ID {id}"));
        }
        if rng.u8(0..10) == 0 {
            let sent = Instant::now();
            let key = format!("process-{}", rng.u32(..));
            let mut process = Command::new("redis-cli")
                .args(["-p", &port, "LIMITER.BACQUIRE", "p", &key, "5", "0.4", "0.3", "EPHEMERAL"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("redis-cli");
            thread::sleep(Duration::from_millis(rng.u64(0..60)));
            process.kill().expect("to kill it");
            process.wait().expect("to reap it");
            let possibly = (sent, Instant::now() + NOTICE);
            let lease = Lease { certainly: (sent, sent), possibly };
            records.leases.lock().unwrap().push(lease);
        }
    }
}

/// The times at which how many of these intervals are open changes, with the number from there on.
fn open_over_time(intervals: impl Iterator<Item = (Instant, Instant)>) -> Vec<(Instant, i32)> {
    let mut changes: Vec<(Instant, i32)> = intervals
        .filter(|(from, to)| from < to)
        .flat_map(|(from, to)| [(from, 1), (to, -1)])
        .collect();
    // At the same instant one ends before the next begins.
    changes.sort();
    let mut open = 0;
    changes
        .iter()
        .map(|(at, change)| {
            (*at, {
                open += change;
                open
            })
        })
        .collect()
}

fn judge(records: &Records) {
    let leases = records.leases.lock().unwrap();
    let waits = records.waits.lock().unwrap();
    let lost = records.lost.lock().unwrap();
    let certain = open_over_time(leases.iter().map(|lease| lease.certainly));
    let most = certain.iter().map(|(_, open)| *open).max().unwrap_or(0);
    let longest_ping = *records.longest_ping.lock().unwrap();
    println!("{} leases, {} waits, at most {most} held at once", leases.len(), waits.len());
    println!("the longest ping took {longest_ping:?}");
    assert!(leases.len() > 500 && waits.len() > 500, "too little happened");
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    assert!(most <= LIMIT as i32, "{most} held at once");
    assert_eq!(most, LIMIT as i32, "the limit was never reached, so nothing was tried");

    let possible = open_over_time(leases.iter().map(|lease| lease.possibly));
    for wait in waits.iter() {
        let start = possible.partition_point(|(at, _)| *at <= wait.from);
        let open_at_start = start.checked_sub(1).map_or(0, |before| possible[before].1);
        // The waiter itself possibly holds from its request on.
        let is_free = |open: i32| (open as usize) < LIMIT;
        let mut free_since = is_free(open_at_start).then_some(wait.from);
        let end = [(wait.to, LIMIT as i32)];
        for (at, open) in possible[start..].iter().chain(&end) {
            let at = (*at).min(wait.to);
            if let Some(since) = free_since {
                let slept = at - since;
                let notice = NOTICE + longest_ping;
                assert!(slept < notice, "{} slept {slept:?} beside a free slot", wait.key);
            }
            free_since = match free_since {
                since if is_free(*open) => since.or(Some(at)),
                _ => None,
            };
            if at == wait.to {
                break;
            }
        }
    }
}

/// Measures what the machine makes everybody wait.
fn ping(server: &Server, records: &Records) {
    let mut client = server.client();
    while !records.over.load(Ordering::Relaxed) {
        let sent = Instant::now();
        client.call("PING");
        let mut longest = records.longest_ping.lock().unwrap();
        *longest = sent.elapsed().max(*longest);
    }
}

/// Lets everybody loose for a while, and judges what they saw.
fn storm(server: &Server, seed: u64, lasts: Duration) -> Records {
    let records = Records::default();
    thread::scope(|scope| {
        for name in 0..WORKERS {
            let worker = Worker::new(server, &records, name, seed);
            scope.spawn(|| worker.run());
        }
        scope.spawn(|| killer(server, &records, seed));
        scope.spawn(|| ping(server, &records));
        thread::sleep(lasts); // How long it lasts, not what it waits for.
        records.over.store(true, Ordering::Relaxed);
    });
    records
}

#[test]
fn under_load_and_death_no_slot_is_lost_shared_or_slept_on() {
    let seed =
        std::env::var("SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    let everysec = ["--appendonly", "yes", "--appendfsync", "everysec"];
    let mut server = Server::start_with(&everysec);
    let replica = Server::start_bare(&["--replicaof", "127.0.0.1", &server.port.to_string()]);
    let mut client = server.client();
    wait_until("the replica is there", || client.info("replication", "connected_slaves") == "1");
    let dataset = |client: &mut Client| -> i64 {
        client.info("memory", "used_memory_dataset").parse().unwrap()
    };
    let settle = |client: &mut Client| {
        wait_until("nobody waits", || server.blocked() == 0);
        wait_until("every lease has ended", || client.int("LIMITER.COUNT p") == 0);
        assert_eq!(client.int("LIMITER.RELEASE p nobody"), 0, "it prunes what has lapsed");
        assert_eq!(client.int("EXISTS p"), 0);
    };

    // The first storm fills the server's own pools, the second must add nothing.
    storm(&server, seed, LASTS / 4);
    settle(&mut client);
    let before = dataset(&mut client);
    judge(&storm(&server, seed.wrapping_add(1), LASTS));
    settle(&mut client);
    let allowed = before + 300_000;
    wait_until("the memory has come back", || dataset(&mut client) < allowed);

    client.int("LIMITER.ACQUIRE p last 1 450");
    let (members, expiry_ms) = (client.members("p"), client.int("PEXPIRETIME p"));
    let mut on_replica = replica.client();
    wait_until("the replica agrees", || on_replica.members("p") == members);
    assert_eq!(on_replica.int("PEXPIRETIME p"), expiry_ms);
    assert_eq!(client.call("DEBUG LOADAOF"), Value::Okay);
    assert_eq!(client.members("p"), members, "the AOF agrees");
    assert_eq!(client.int("PEXPIRETIME p"), expiry_ms);
    assert_eq!(client.call("MODULE UNLOAD limiter"), Value::Okay, "nothing is pending");
    assert!(server.is_running());
}
