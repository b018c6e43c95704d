//! What calls cost the server, and how many it answers a second.
//!
//! Everything is set up, and run once unrecorded, before the first round.

use std::time::{Duration, Instant};

use fastrand::Rng;
use redis::Value;

use crate::contenders::{number, Acquire, Contender, Situation};
use crate::harness::{Client, Server};
use crate::lab::{self, Load, Taken, PIPELINE};
use crate::results::{Quantity, Results};
use crate::Extent;

/// The holders of the chart.
pub const SCALES: [u64; 7] = [1, 10, 50, 100, 1_000, 100_000, 1_000_000];

/// The usual load, and with it the only one whose subject is the bare name of the situation.
const CONNECTIONS: u32 = 8;

/// A situation under a load.
struct Trial {
    subject: String,
    situation: Situation,
    connections: u32,
    pipeline: u32,
}

impl Trial {
    fn usual(situation: Situation) -> Self {
        let (connections, pipeline) = (CONNECTIONS, PIPELINE);
        Self { subject: situation.to_string(), situation, connections, pipeline }
    }

    fn with_connections(connections: u32, pipeline: u32) -> Self {
        let situation = Situation::HeldInEach { holders: 50 };
        let plural = if connections == 1 { "" } else { "s" };
        let pipelined = if pipeline == 1 { "not pipelined" } else { "pipelined 64 deep" };
        let subject = format!("{situation}, {connections} connection{plural}, {pipelined}");
        Self { subject, situation, connections, pipeline }
    }

    fn key(&self, contender: Contender) -> String {
        format!("{}, {contender}", self.subject)
    }
}

/// Trials on one server.
pub struct Trials<'a> {
    server: &'a Server,
    acquire: Acquire,
    trials: Vec<Trial>,
    requests: u32,
}

impl<'a> Trials<'a> {
    /// Every situation, and every way to connect.
    pub fn all(server: &'a Server, extent: Extent) -> Self {
        let held = SCALES.map(Situation::at_scale);
        let others = [
            Situation::Held { holders: 50 },
            Situation::HeldInEachSkiplist { holders: 50 },
            Situation::Denied { holders: 100 },
            Situation::Lapsing,
            Situation::Count { holders: 100 },
            Situation::Count { holders: 100_000 },
        ];
        let mut trials: Vec<_> = held.into_iter().chain(others).map(Trial::usual).collect();
        for connections in [1, 50] {
            for pipeline in [1, PIPELINE] {
                trials.push(Trial::with_connections(connections, pipeline));
            }
        }
        Self::set_up(server, trials, extent)
    }

    /// One situation, on a server that also does something else with every write.
    pub fn beside(server: &'a Server, what: &str, extent: Extent) -> Self {
        let mut trial = Trial::usual(Situation::HeldInEach { holders: 50 });
        trial.subject = format!("{}, {what}", trial.subject);
        Self::set_up(server, vec![trial], extent)
    }

    fn set_up(server: &'a Server, trials: Vec<Trial>, extent: Extent) -> Self {
        let mut client = server.client();
        let acquire = Acquire::load(&mut client);
        let requests = extent.of(50_000);
        let trials = Self { server, acquire, trials, requests };
        for (trial, contender) in trials.pairs() {
            trials.fill(&mut client, trial, contender);
            trials.try_once(&mut client, trial, contender);
            trials.run(trial, contender, requests / 5);
        }
        trials
    }

    fn fill(&self, client: &mut Client, trial: &Trial, contender: Contender) {
        const LISTPACK: &str = "zset-max-listpack-entries";
        let from_s = client.now_ms() / 1000 + 3600;
        let usual = client.strings(&format!("CONFIG GET {LISTPACK}"))[1].clone();
        if matches!(trial.situation, Situation::HeldInEachSkiplist { .. }) {
            assert_eq!(client.text(&format!("CONFIG SET {LISTPACK} 0")), "OK");
        }
        for set in trial.situation.sets(&trial.key(contender)) {
            lab::fill(client, &set, trial.situation.holders(), from_s);
        }
        assert_eq!(client.text(&format!("CONFIG SET {LISTPACK} {usual}")), "OK");
    }

    /// Sees that a contender answers as the situation wants. Those who do it with plain commands
    /// have no answer of their own.
    fn try_once(&self, client: &mut Client, trial: &Trial, contender: Contender) {
        if matches!(contender, Contender::Plain | Contender::Retools) {
            return;
        }
        let key = trial.key(contender);
        for command in trial.situation.commands(contender, &self.acquire, &key) {
            let command: Vec<_> =
                command.iter().map(|arg| arg.replace("__rand_int__", "000000000000")).collect();
            assert_eq!(client.run(&command), Value::Int(trial.situation.answer()), "{key}");
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (&Trial, Contender)> {
        let takes_part = |trial: &Trial, contender| {
            !trial.situation.commands(contender, &self.acquire, "").is_empty()
        };
        self.trials.iter().flat_map(move |trial| {
            let part = Contender::ALL.into_iter().filter(move |one| takes_part(trial, *one));
            part.map(move |contender| (trial, contender))
        })
    }

    /// One call, as the sum of its commands. They are measured one kind at a time: a caller sends
    /// each after the reply to the one before, so their times add up.
    fn run(&self, trial: &Trial, contender: Contender, requests: u32) -> Taken {
        let load = Load {
            connections: trial.connections,
            pipeline: trial.pipeline,
            requests,
            random_below: trial.situation.random_below(),
        };
        let mut sum = Taken::default();
        for command in trial.situation.commands(contender, &self.acquire, &trial.key(contender)) {
            let taken = lab::load(self.server, &load, &command);
            sum.cost_us += taken.cost_us;
            sum.interval_us += taken.interval_us;
        }
        sum
    }

    /// Each contender in each trial once.
    pub fn round(&self, results: &mut Results) {
        for (trial, contender) in self.pairs() {
            // One at a time on each connection takes that much longer.
            let requests = if trial.pipeline == 1 { self.requests / 5 } else { self.requests };
            let taken = self.run(trial, contender, requests);
            let contender = contender.to_string();
            results.add(&trial.subject, Quantity::Cost, &contender, taken.cost_us);
            results.add(&trial.subject, Quantity::Throughput, &contender, 1e6 / taken.interval_us);
        }
    }

    /// That every set still holds whom it held: nobody was let in, and nobody lapsed.
    pub fn check(&self) {
        let mut client = self.server.client();
        for (trial, contender) in self.pairs().filter(|(trial, _)| trial.situation.holders() > 0) {
            for set in trial.situation.sets(&trial.key(contender)) {
                let held = client.run(&["ZCARD", set.as_str()]);
                assert_eq!(held, Value::Int(trial.situation.holders() as i64), "{set}");
            }
        }
    }

    /// What it costs to release, beside ZREM.
    ///
    /// redis-benchmark can only draw at random, and would release most holders a second time; so
    /// each is released once here, in random order, through one pipelined connection. Only the
    /// server's account of it is taken, which the client's speed does not touch.
    pub fn releases(&self, results: &mut Results) {
        let mut client = self.server.client();
        // As most leases last. Those of an hour and more cost a release one look-up more.
        let from_s = client.now_ms() / 1000 + 1800;
        for (limiters, holders) in RELEASES {
            for contender in [Contender::Module, Contender::Plain] {
                let (mut acquires, mut releases) = (Vec::new(), Vec::new());
                for number in lab::shuffled(limiters * holders) {
                    let limiter = format!("release:{contender}:{}", number % limiters);
                    let holder = lab::holder(number / limiters);
                    let (acquire, release) = if contender == Contender::Module {
                        let limit = holders.to_string();
                        let ttl = "1800".to_string();
                        let acquire =
                            vec!["LIMITER.ACQUIRE".into(), limiter.clone(), holder.clone()];
                        ([acquire, vec![limit, ttl]].concat(), "LIMITER.RELEASE")
                    } else {
                        let score = format!("{from_s}.{:03}", number % 1000);
                        (vec!["ZADD".into(), limiter.clone(), score, holder.clone()], "ZREM")
                    };
                    acquires.push(acquire);
                    releases.push(vec![release.to_string(), limiter, holder]);
                }
                Rng::with_seed(3).shuffle(&mut releases);
                lab::pipeline(&mut client, &acquires, 1);
                lab::reset_stats(&mut client);
                lab::pipeline(&mut client, &releases, 1);
                let cost = lab::stats(&mut client, &releases[0][0]).cost_us();
                let subject = release_subject(limiters, holders);
                results.add(&subject, Quantity::Cost, &contender.to_string(), cost);
            }
        }
    }

    /// How long another client is kept waiting when a call finds 100,000 leases lapsed: the longest
    /// of 20 PINGs, one after another, the first sent right after the call.
    pub fn mass_lapse(&self, results: &mut Results) {
        const LEASES: u64 = 100_000;
        const KEY: &str = "mass lapse";
        let subject = format!("{} leases lapsed at once", number(LEASES));
        let (mut caller, mut other) = (self.server.client(), self.server.client());
        for contender in
            [Contender::Module, Contender::Script, Contender::Function, Contender::Plain]
        {
            let now_s = caller.now_ms() / 1000;
            lab::fill(&mut caller, KEY, LEASES, now_s - 10);
            let commands = self.acquire.by(contender, KEY, "newcomer", LEASES, "10");
            let prune = ["ZREMRANGEBYSCORE", KEY, "-inf", &now_s.to_string()].map(String::from);
            let command = commands.into_iter().next().unwrap_or(prune.to_vec());
            lab::reset_stats(&mut other);
            caller.send(&command);
            let mut longest = Duration::ZERO;
            for _ in 0..20 {
                let start = Instant::now();
                other.call("PING");
                longest = longest.max(start.elapsed());
            }
            caller.receive();
            let cost = lab::stats(&mut other, &command[0]).cost_us();
            caller.run(&["DEL", KEY]);
            results.add(
                &subject,
                Quantity::Standstill,
                &contender.to_string(),
                longest.as_secs_f64() * 1e3,
            );
            results.add(&subject, Quantity::Cost, &contender.to_string(), cost);
        }
    }
}

/// The subject of [`Trials::releases`].
pub fn release_subject(limiters: u64, holders: u64) -> String {
    if limiters == 1 {
        format!("RELEASE, {} held", number(holders))
    } else {
        format!("RELEASE, {limiters} limiters with {holders} held in each")
    }
}

/// Sizes for [`Trials::releases`]: limiters, and holders in each.
pub const RELEASES: [(u64, u64); 2] = [(100, 100), (1, 10_000)];
