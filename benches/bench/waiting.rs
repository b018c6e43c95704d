//! Waiting: how soon the next has the slot, what a release costs, and what that does to the
//! server, with one waiter and with thousands.
//!
//! - A hand-off is timed in one thread, from before the release is sent to the moment the next
//!   holder knows it has the slot: nothing but the way through the server is in it. Before the
//!   clock starts, everyone waits.
//! - Who was served waits again, so the line keeps its length.
//! - The other ways run on a server without the module, as they would: once somebody waits, the
//!   module listens to every change of a key. What that costs others is seen by a BLPOP beside it.

use std::collections::VecDeque;
use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use hdrhistogram::Histogram;
use redis::{Pipeline, Value};
use serde_json::json;

use crate::contenders::{number, Acquire, Contender};
use crate::harness::{wait_until, Client, Server};
use crate::lab;
use crate::results::{Quantity, Results};
use crate::Extent;

/// How many wait.
pub const CROWDS: [usize; 6] = [1, 50, 100, 1_000, 3_000, 5_000];

/// How often the poller tries.
const POLL_EVERY: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Module,
    /// The floor.
    Blpop,
    /// The same on the module's server, while clients wait for its limiter.
    BlpopBeside,
    /// Subscribers who all try the script when a release is published.
    PubSub,
    /// The script, every 10 ms.
    Polling,
}

impl Way {
    pub const ALL: [Self; 5] =
        [Self::Module, Self::Blpop, Self::BlpopBeside, Self::PubSub, Self::Polling];

    /// Polling is not among them: its release is a ZREM, whoever waits.
    pub const WITH_CROWDS: [Self; 3] = [Self::Module, Self::Blpop, Self::PubSub];

    /// Its own key: several ways are up at once on one server.
    fn key(self) -> &'static str {
        match self {
            Self::Module => "limiter",
            Self::Blpop | Self::BlpopBeside => "list",
            Self::PubSub => "subscribers",
            Self::Polling => "polled",
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Module => "this module",
            Self::Blpop => "BLPOP and RPUSH",
            Self::BlpopBeside => "BLPOP and RPUSH beside this module",
            Self::PubSub => "pub/sub and retry",
            Self::Polling => "polling every 10 ms",
        })
    }
}

pub fn crowd_subject(waiters: usize) -> String {
    format!("hand-off, {} waiting", number(waiters as u64))
}

/// The two servers, and all latencies with one waiter, of all rounds, in nanoseconds.
pub struct Waiting {
    with_module: Server,
    bare: Server,
    acquire: Acquire,
    extent: Extent,
    pub latencies: Vec<(Way, Histogram<u64>)>,
}

impl Waiting {
    pub fn set_up(extent: Extent) -> Self {
        let with_module = lab::server_with_module(&[]);
        let bare = lab::bare_server(&[]);
        let acquire = Acquire::load(&mut bare.client());
        let latencies = Way::ALL.map(|way| (way, histogram())).into();
        Self { with_module, bare, acquire, extent, latencies }
    }

    fn server(&self, way: Way) -> &Server {
        match way {
            Way::Module | Way::BlpopBeside => &self.with_module,
            Way::Blpop | Way::PubSub | Way::Polling => &self.bare,
        }
    }

    /// A line of so many waiters, all waiting.
    fn line(&self, way: Way, waiters: usize) -> Box<dyn Line + '_> {
        let server = self.server(way);
        let mut admin = server.client();
        admin.run(&["DEL", way.key()]);
        let before: usize = admin.info("clients", "blocked_clients").parse().expect("a number");
        match way {
            Way::Module => {
                let line = LimiterLine::new(server, waiters);
                wait_for_blocked(&mut admin, before + waiters);
                Box::new(line)
            }
            Way::Blpop | Way::BlpopBeside => {
                let line = ListLine::new(server, waiters);
                wait_for_blocked(&mut admin, before + waiters);
                Box::new(line)
            }
            Way::PubSub => Box::new(Subscribers::new(server, &self.acquire, waiters)),
            Way::Polling => Box::new(Poller::new(server, &self.acquire)),
        }
    }

    /// Hand-offs to one waiter, the ways in turn; then crowds.
    pub fn round(&mut self, results: &mut Results) {
        self.one_waiter(results);
        for waiters in CROWDS {
            for way in Way::WITH_CROWDS {
                self.crowd(way, waiters, results);
            }
        }
    }

    fn one_waiter(&mut self, results: &mut Results) {
        let mut histograms = Way::ALL.map(|_| histogram());
        let mut lines = Way::ALL.map(|way| self.line(way, 1));
        for turn in 0..self.extent.of(2_000) {
            for ((line, way), histogram) in lines.iter_mut().zip(Way::ALL).zip(&mut histograms) {
                // Its latencies are long, and spread evenly: fewer tell as much.
                if way == Way::Polling && turn % 20 != 0 {
                    continue;
                }
                record(histogram, line.hand_off());
            }
        }
        drop(lines);
        Way::ALL.into_iter().for_each(|way| self.wait_until_gone(way));
        let subject = crowd_subject(1);
        for (histogram, (way, all)) in histograms.iter().zip(&mut self.latencies) {
            let us = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
            results.add(&subject, Quantity::Median, &way.to_string(), us(0.5));
            results.add(&subject, Quantity::P99, &way.to_string(), us(0.99));
            all.add(histogram).expect("the same bounds");
        }
    }

    fn crowd(&self, way: Way, waiters: usize, results: &mut Results) {
        let server = self.server(way);
        let mut admin = server.client();
        let hand_offs = self.extent.of(if way == Way::PubSub { 10 } else { 100 });
        let mut line = self.line(way, waiters);
        line.hand_off(); // The first after all others came finds nothing in any cache.
        lab::reset_stats(&mut admin);
        let before_us = lab::processor_us(&mut admin);
        let mut latencies = histogram();
        for _ in 0..hand_offs {
            record(&mut latencies, line.hand_off());
        }
        let processor_us = lab::processor_us(&mut admin) - before_us;
        let (subject, contender) = (crowd_subject(waiters), way.to_string());
        if waiters > 1 {
            let median = latencies.value_at_quantile(0.5) as f64 / 1e3;
            results.add(&subject, Quantity::Median, &contender, median);
        }
        let per_hand_off = processor_us / f64::from(hand_offs);
        results.add(&subject, Quantity::Processor, &contender, per_hand_off);
        let cost: f64 =
            line.release().iter().map(|command| lab::stats(&mut admin, command).us as f64).sum();
        results.add(&subject, Quantity::Cost, &contender, cost / f64::from(hand_offs));
        drop(line);
        self.wait_until_gone(way);
    }

    /// The latencies with one waiter, of all rounds, by percentile.
    pub fn distributions(&self) -> Vec<serde_json::Value> {
        const PERCENTILES: [f64; 10] = [0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 100.0];
        let of = |(way, histogram): &(Way, Histogram<u64>)| {
            let us = |at: f64| histogram.value_at_percentile(at) as f64 / 1e3;
            let points: Vec<_> = PERCENTILES.iter().map(|at| json!([at, us(*at)])).collect();
            json!({ "contender": way.to_string(), "count": histogram.len(), "percentiles": points })
        };
        self.latencies.iter().map(of).collect()
    }

    /// Waits until the server has noticed that its clients are gone, and is quiet.
    fn wait_until_gone(&self, way: Way) {
        let mut admin = self.server(way).client();
        wait_until("all are gone", || {
            admin.info("clients", "connected_clients").parse::<usize>().expect("a number") <= 2
        });
    }
}

fn record(latencies: &mut Histogram<u64>, latency: Duration) {
    let ns = u64::try_from(latency.as_nanos()).expect("not ages");
    latencies.record(ns).expect("not ages");
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_max(60_000_000_000, 3).expect("bounds that fit")
}

fn wait_for_blocked(admin: &mut Client, waiters: usize) {
    wait_until("all wait", || admin.info("clients", "blocked_clients") == waiters.to_string());
}

trait Line {
    /// One release, and how long it took until the next had the slot.
    fn hand_off(&mut self) -> Duration;
    /// The commands that the server's account of a release is made of. RPUSH's does not include
    /// serving BLPOP: that is done after the command.
    fn release(&self) -> &[&str];
}

/// Waits for the reply to a PING: what others sent before it has been read by then, since the
/// server writes replies after it has read from everyone who sent.
fn all_wait(releaser: &mut Client) {
    releaser.call("PING");
}

/// BACQUIRE and RELEASE on a limiter of one slot.
struct LimiterLine {
    waiters: VecDeque<(Client, String)>,
    releaser: Client,
    holder: String,
    next: u64,
}

impl LimiterLine {
    fn new(server: &Server, waiters: usize) -> Self {
        let (releaser, holder) = (server.client(), lab::holder(0));
        let mut line = Self { waiters: VecDeque::new(), releaser, holder, next: 1 };
        line.releaser.run(&["LIMITER.ACQUIRE", Way::Module.key(), &line.holder, "1", "3600"]);
        for _ in 0..waiters {
            line.wait(server.client());
        }
        line
    }

    fn wait(&mut self, mut client: Client) {
        let holder = lab::holder(self.next);
        self.next += 1;
        client.send(&["LIMITER.BACQUIRE", Way::Module.key(), &holder, "1", "3600", "0"]);
        self.waiters.push_back((client, holder));
    }
}

impl Line for LimiterLine {
    fn hand_off(&mut self) -> Duration {
        all_wait(&mut self.releaser);
        let (mut client, holder) = self.waiters.pop_front().expect("a waiter");
        let start = Instant::now();
        self.releaser.send(&["LIMITER.RELEASE", Way::Module.key(), &self.holder]);
        let reply = client.receive();
        let latency = start.elapsed();
        assert_eq!((reply, self.releaser.receive()), (Value::Int(1), Value::Int(1)));
        self.holder = holder;
        self.wait(client);
        latency
    }

    fn release(&self) -> &[&str] {
        &["limiter.release"]
    }
}

/// BLPOP and RPUSH: an element is the slot.
struct ListLine {
    waiters: VecDeque<Client>,
    releaser: Client,
}

impl ListLine {
    fn new(server: &Server, waiters: usize) -> Self {
        let mut line = Self { waiters: VecDeque::new(), releaser: server.client() };
        for _ in 0..waiters {
            line.wait(server.client());
        }
        line
    }

    fn wait(&mut self, mut client: Client) {
        client.send(&["BLPOP", Way::Blpop.key(), "0"]);
        self.waiters.push_back(client);
    }
}

impl Line for ListLine {
    fn hand_off(&mut self) -> Duration {
        all_wait(&mut self.releaser);
        let mut client = self.waiters.pop_front().expect("a waiter");
        let start = Instant::now();
        self.releaser.send(&["RPUSH", Way::Blpop.key(), "slot"]);
        let reply = client.receive();
        let latency = start.elapsed();
        assert!(matches!(reply, Value::Array(_)), "{reply:?}");
        self.releaser.receive();
        self.wait(client);
        latency
    }

    fn release(&self) -> &[&str] {
        &["rpush"]
    }
}

/// Subscribers: a release is a ZREM and a PUBLISH, and everyone who hears of it tries the script.
/// The first succeeds. The others' tries go through one connection, pipelined, which spares the
/// server some of the work.
struct Subscribers<'a> {
    subscribers: Vec<Client>,
    releaser: Client,
    caller: Client,
    acquire: &'a Acquire,
    holder: u64,
}

const CHANNEL: &str = "released";

impl<'a> Subscribers<'a> {
    fn new(server: &Server, acquire: &'a Acquire, waiters: usize) -> Self {
        let subscriber = |_| {
            let mut client = server.client();
            client.run(&["SUBSCRIBE", CHANNEL]);
            client
        };
        let subscribers = (0..waiters).map(subscriber).collect();
        let (releaser, caller) = (server.client(), server.client());
        let mut line = Self { subscribers, releaser, caller, acquire, holder: 0 };
        let first = line.try_to_acquire(0);
        assert_eq!(line.caller.run(&first), Value::Int(1));
        line
    }

    fn try_to_acquire(&self, holder: u64) -> Vec<String> {
        self.acquire
            .by(Contender::Script, Way::PubSub.key(), &lab::holder(holder), 1, "3600")
            .remove(0)
    }
}

impl Line for Subscribers<'_> {
    fn hand_off(&mut self) -> Duration {
        let next = self.try_to_acquire(self.holder + 1);
        let late = self.try_to_acquire(self.holder + 2);
        let mut release = Pipeline::new();
        release.cmd("ZREM").arg(&[Way::PubSub.key(), &lab::holder(self.holder)]);
        release.cmd("PUBLISH").arg(&[CHANNEL, ""]);
        let release = release.get_packed_pipeline();
        let (first, others) = self.subscribers.split_first_mut().expect("a waiter");
        all_wait(&mut self.releaser);
        let start = Instant::now();
        self.releaser.send_raw(&release);
        first.receive();
        let reply = self.caller.run(&next);
        let latency = start.elapsed();
        assert_eq!(reply, Value::Int(1));
        for other in &mut *others {
            other.receive();
        }
        lab::pipeline(&mut self.caller, &vec![late; others.len()], 0);
        assert_eq!(self.releaser.receive(), Value::Int(1));
        self.releaser.receive();
        self.holder += 1;
        latency
    }

    fn release(&self) -> &[&str] {
        &["zrem", "publish", "evalsha"]
    }
}

/// One who tries the script every 10 ms. The release comes at a random moment between two tries.
struct Poller<'a> {
    releaser: Client,
    caller: Client,
    acquire: &'a Acquire,
    holder: u64,
    random: Rng,
}

impl<'a> Poller<'a> {
    fn new(server: &Server, acquire: &'a Acquire) -> Self {
        let (releaser, caller) = (server.client(), server.client());
        let mut poller = Self { releaser, caller, acquire, holder: 0, random: Rng::with_seed(4) };
        assert_eq!(poller.try_to_acquire(0), Value::Int(1));
        poller
    }

    fn try_to_acquire(&mut self, holder: u64) -> Value {
        let by = Contender::Script;
        self.caller
            .run(&self.acquire.by(by, Way::Polling.key(), &lab::holder(holder), 1, "3600")[0])
    }
}

impl Line for Poller<'_> {
    fn hand_off(&mut self) -> Duration {
        let mut due = Instant::now() + POLL_EVERY;
        assert_eq!(self.try_to_acquire(self.holder + 1), Value::Int(0));
        thread::sleep(POLL_EVERY.mul_f64(self.random.f64()));
        let start = Instant::now();
        self.releaser.run(&["ZREM", Way::Polling.key(), &lab::holder(self.holder)]);
        loop {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if self.try_to_acquire(self.holder + 1) == Value::Int(1) {
                self.holder += 1;
                return start.elapsed();
            }
            due += POLL_EVERY;
        }
    }

    fn release(&self) -> &[&str] {
        &["zrem"]
    }
}
