//! kill -9 with `appendfsync always`, again and again, under load from several connections: every
//! lease that was acknowledged is there after the restart, with its end; every one that was given
//! back is gone; and nobody is in that nobody asked for.
//!
//! What was under way when the server died may have happened or not; everything else is known.

mod harness;

use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

use fastrand::Rng;
use harness::{slowness, wait_until, Client, Server, Signal, AOF};
use redis::Value;

const ROUNDS: u64 = 12;
const WORKERS: u64 = 16;
const LIMIT: usize = 4;
const PREFIXES: u64 = 4;

/// What one worker knows of the lease of a key.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    /// It was acknowledged, and lapses at this time or later.
    Held { until_ms: i64 },
    /// It was given back, or refused.
    Gone,
    /// The server died before it said so.
    Unknown,
}

/// By prefix and key.
type Table = BTreeMap<(String, String), Known>;

struct Worker {
    client: Client,
    rng: Rng,
    name: String,
    table: Table,
}

impl Worker {
    /// Works until the connection breaks; what it knows then.
    fn run(mut self) -> Table {
        for serial in 0_u64.. {
            let done = if self.rng.bool() { self.touch_one() } else { self.take(serial) };
            if done.is_none() {
                break;
            }
        }
        self.table
    }

    /// Takes a lease, or waits for one; sometimes two in one transaction. `None`: the server died.
    fn take(&mut self, serial: u64) -> Option<()> {
        let prefix = format!("p{}", self.rng.u64(0..PREFIXES));
        let key = format!("{}-{serial}", self.name);
        let lease = (prefix.clone(), key.clone());
        let ttl_ms = self.rng.i64(100_000..400_000);
        let ttl = format!("{}.{:03}", ttl_ms / 1000, ttl_ms % 1000);
        let ephemeral = if self.rng.bool() { " EPHEMERAL" } else { "" };
        let acquire = format!("LIMITER.ACQUIRE {prefix} {key} {LIMIT} {ttl}{ephemeral}");
        let bacquire = format!("LIMITER.BACQUIRE {prefix} {key} {LIMIT} {ttl} 0.5{ephemeral}");
        let until_ms = now_ms() + ttl_ms;
        self.table.insert(lease.clone(), Known::Unknown);
        let reply = match self.rng.u8(0..6) {
            0..2 => self.ask(&acquire)?,
            2..5 => self.ask(&bacquire)?,
            _ => {
                for part in ["MULTI", &acquire, &format!("LIMITER.COUNT {prefix}")] {
                    self.ask(part)?;
                }
                let Value::Array(replies) = self.ask("EXEC")? else { panic!("no transaction") };
                replies.into_iter().next()?
            }
        };
        let known = match reply {
            Value::Int(1) => Known::Held { until_ms },
            Value::Int(0) => Known::Gone,
            other => panic!("{acquire}: {other:?}"),
        };
        self.table.insert(lease, known);
        Some(())
    }

    /// Renews or gives back a lease, if it has one.
    fn touch_one(&mut self) -> Option<()> {
        let held: Vec<_> = self
            .table
            .iter()
            .filter(|(_, known)| matches!(known, Known::Held { .. }))
            .map(|(lease, known)| (lease.clone(), *known))
            .collect();
        let Some((lease, known)) = self.rng.choice(held) else { return Some(()) };
        let Known::Held { until_ms } = known else { return Some(()) };
        let (prefix, key) = &lease;
        if self.rng.u8(0..3) == 0 {
            let new_ms = now_ms() + 200_000;
            self.table.insert(lease.clone(), Known::Held { until_ms: until_ms.min(new_ms) });
            let reply = self.ask(&format!("LIMITER.RENEW {prefix} {key} 200"))?;
            assert_eq!(reply, Value::Int(1), "{lease:?} was lost before the crash");
            self.table.insert(lease, Known::Held { until_ms: new_ms });
        } else {
            self.table.insert(lease.clone(), Known::Unknown);
            let reply = self.ask(&format!("LIMITER.RELEASE {prefix} {key}"))?;
            assert_eq!(reply, Value::Int(1), "{lease:?} was lost before the crash");
            self.table.insert(lease, Known::Gone);
        }
        Some(())
    }

    fn ask(&mut self, command: &str) -> Option<Value> {
        self.client.try_run(&command.split(' ').collect::<Vec<_>>()).ok()
    }
}

/// The clock of this machine, which is the server's.
fn now_ms() -> i64 {
    std::time::UNIX_EPOCH.elapsed().expect("a time after 1970").as_millis() as i64
}

/// The ends of the leases that are there.
fn leases(client: &mut Client) -> BTreeMap<(String, String), i64> {
    let mut leases = BTreeMap::new();
    for number in 0..PREFIXES {
        let prefix = format!("p{number}");
        let members = client.members(&prefix);
        assert!(members.len() <= LIMIT, "{members:?}");
        for (key, score) in members {
            leases.insert((prefix.clone(), key), (score * 1000.0).round() as i64);
        }
    }
    leases
}

#[test]
fn every_acknowledged_lease_survives_kill_9_with_appendfsync_always() {
    let seed =
        std::env::var("SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    let mut rng = Rng::with_seed(seed);
    let mut server = Server::start_with(&AOF);
    let (mut held, mut gone, mut unknown) = (0, 0, 0);
    for round in 0..ROUNDS {
        let mut table = Table::new();
        thread::scope(|scope| {
            let workers: Vec<_> = (0..WORKERS)
                .map(|number| {
                    let rng = Rng::with_seed(rng.u64(..));
                    let name = format!("{round}-{number}");
                    let worker = Worker { client: server.client(), rng, name, table: Table::new() };
                    scope.spawn(|| worker.run())
                })
                .collect();
            wait_until("some wait in line", || server.blocked() >= 3);
            thread::sleep(Duration::from_millis(rng.u64(0..400))); // When it strikes.
            server.signal(Signal::Kill);
            for worker in workers {
                table.append(&mut worker.join().expect("a worker"));
            }
        });
        server.restart();

        let mut client = server.client();
        let mut there = leases(&mut client);
        for (lease, known) in &table {
            let end_ms = there.remove(lease);
            match *known {
                Known::Held { until_ms } => {
                    held += 1;
                    let end_ms = end_ms.unwrap_or_else(|| panic!("round {round}: {lease:?} lost"));
                    assert!(end_ms >= until_ms, "{lease:?} ends at {end_ms}, not {until_ms}");
                }
                Known::Gone => {
                    gone += 1;
                    assert_eq!(end_ms, None, "round {round}: {lease:?} is back");
                }
                Known::Unknown => unknown += 1,
            }
        }
        assert!(there.is_empty(), "nobody asked for these: {there:?}");

        // And the slots go on to others.
        for (prefix, key) in leases(&mut client).into_keys() {
            assert_eq!(client.int(&format!("LIMITER.RELEASE {prefix} {key}")), 1);
        }
    }
    println!("{ROUNDS} rounds: {held} leases held and there, {gone} gone, {unknown} unknown");
    assert!(held > 100 / slowness() && gone > 500 / slowness(), "too little happened");
}
