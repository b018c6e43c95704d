//! `make bench`: the module beside the other ways to the same end, all in one interleaved run.
//!
//! | file | what it does |
//! | --- | --- |
//! | `contenders` | who is compared, and what each sends in which situation |
//! | `lab` | pinned servers, redis-benchmark, the server's own figures |
//! | `calls` | cost and throughput of calls; releases; mass lapse |
//! | `waiting` | hand-offs, one waiter and thousands |
//! | `memory` | bytes of a lease and of a waiter |
//! | `results` | every value; medians, spread, table, JSON |
//! | `bars` | what was asked, beside what was measured |
//! | `charts` | the SVGs |
//!
//! In each of `ROUNDS` rounds (7) every contender is measured once in every situation, so that
//! what else the machine does strikes all alike. What comes out, `results.json` and the charts,
//! goes to `bench/`. With `QUICK` set it is one short round that shows that everything works; its
//! figures mean little and go to `target/bench/`.

#[path = "../../tests/harness/mod.rs"]
mod harness;

mod bars;
mod calls;
mod charts;
mod contenders;
mod lab;
mod memory;
mod results;
mod waiting;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use calls::Trials;
use harness::Server;
use lab::{replica_of, server_with_module};
use results::Results;
use serde_json::{json, Value};
use waiting::Waiting;

/// What the table's names mean.
const NOTES: &str = "
Median, smallest and largest of the rounds, and the ratio of the median to the module's.
- plain command: ZADD with random scores for ACQUIRE, ZCARD for a denied one, ZREM for RELEASE,
  ZCOUNT for COUNT, ZREMRANGEBYSCORE for lapsed leases.
- in each of so many: calls go to that many limiters at random, so that hardly a holder comes again
  within the millisecond, where the module has nothing to write.
- retools: ZCARD and ZADD, one after the other; for a denied ACQUIRE ZCARD, ZREMRANGEBYSCORE, ZCARD.
- hand-off, server time per call: of RELEASE; of RPUSH, without serving BLPOP, which the server does
  not account for; of ZREM, PUBLISH and everybody's tries.
";

/// How much is measured in a round.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    Full,
    Quick,
}

impl Extent {
    /// So many, or a fifth of it.
    pub fn of(self, full: u32) -> u32 {
        match self {
            Self::Full => full,
            Self::Quick => full / 5,
        }
    }
}

fn main() {
    let start = Instant::now();
    let given = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let (extent, usual_rounds) = match given("QUICK") {
        Some(_) => (Extent::Quick, 1),
        None => (Extent::Full, 7),
    };
    let rounds = given("ROUNDS")
        .map_or(usual_rounds, |rounds| rounds.parse().expect("ROUNDS is a whole number"));
    assert!(rounds > 0, "ROUNDS is at least 1");

    lab::pin_client();
    eprintln!("Setting up.");
    let server = server_with_module(&[]);
    let with_aof = server_with_module(
        &[
            ["--appendonly", "yes"],
            ["--appendfsync", "everysec"],
            // A rewrite would fork in the middle of a round.
            ["--auto-aof-rewrite-percentage", "0"],
        ]
        .concat(),
    );
    let replicated = server_with_module(&[]);
    let _replica = replica_of(&replicated);
    let trials = [
        Trials::all(&server, extent),
        Trials::beside(&with_aof, "AOF everysec", extent),
        Trials::beside(&replicated, "with a replica", extent),
    ];
    let mut waiting = Waiting::set_up(extent);

    let mut results = Results::default();
    for round in 1..=rounds {
        eprintln!("Round {round} of {rounds}, {} s so far.", start.elapsed().as_secs());
        for trials in &trials {
            trials.round(&mut results);
        }
        trials[0].releases(&mut results);
        trials[0].mass_lapse(&mut results);
        waiting.round(&mut results);
    }
    for trials in &trials {
        trials.check();
    }
    memory::measure(&mut results);

    let bars = bars::bars(&results);
    let setting = setting(&server, rounds);
    println!("{NOTES}{}", results.table());
    for (name, value) in setting.as_object().expect("an object") {
        println!("{name}: {}", value.as_str().map_or(value.to_string(), str::to_string));
    }
    println!("\n{}", bars::table(&bars));

    let folder = folder(extent);
    fs::create_dir_all(&folder).expect("a folder for the results");
    let bars: Vec<_> = bars.iter().map(bars::Bar::json).collect();
    let document = document(&setting, &bars, &results.json(), &waiting.distributions());
    fs::write(folder.join("results.json"), document).expect("to write the results");
    charts::draw(&folder, &results, &waiting.latencies).expect("to draw the charts");
    println!("{}: results.json and charts. {} s", folder.display(), start.elapsed().as_secs());
}

/// What the figures hold for.
fn setting(server: &Server, rounds: u32) -> Value {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpus.lines().find(|line| line.starts_with("model name"));
    let cpu = cpu.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown");
    let cores = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let mut client = server.client();
    json!({
        "processor": cpu,
        "cores": cores,
        "system": output_of("uname", &["-srm"]),
        "server": format!("redis_version {}", client.info("server", "redis_version")),
        "commit": output_of("git", &["describe", "--always", "--dirty"]),
        "rounds": rounds,
    })
}

fn output_of(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    output.map_or("unknown".into(), |output| String::from_utf8_lossy(&output.stdout).trim().into())
}

fn folder(extent: Extent) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(match extent {
        Extent::Full => "bench",
        Extent::Quick => "target/bench",
    })
}

/// JSON with a line for each measure, so that two runs can be compared line by line.
fn document(setting: &Value, bars: &[Value], measures: &[Value], waits: &[Value]) -> String {
    let lines =
        |values: &[Value]| values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",\n");
    format!(
        "{{\n\"setting\": {setting},\n\"bars\": [\n{}\n],\n\"measures\": [\n{}\n],\n\
         \"hand-off latencies by percentile, µs\": [\n{}\n]\n}}\n",
        lines(bars),
        lines(measures),
        lines(waits)
    )
}
