//! Servers and the load on them.
//!
//! - The measured server has core 0 to itself, this process and redis-benchmark have core 1, a
//!   replica too. Without `taskset` nothing is pinned, and a line says so.
//! - What a call costs is the server's own account of it (`INFO commandstats`): the time inside
//!   the command, without network and parsing. For a script that includes what it calls.
//! - No figure is taken of calls that failed.

use std::process::{Command, Stdio};

use fastrand::Rng;
use redis::{Pipeline, Value};

use crate::harness::{wait_until, Client, Server};

const SERVER_CORE: &str = "0";
const CLIENT_CORE: &str = "1";

/// How many commands are on their way at once where it is not said otherwise.
pub const PIPELINE: u32 = 64;

/// Puts this process, and what it starts, on its core.
pub fn pin_client() {
    if !pin(std::process::id(), CLIENT_CORE) {
        eprintln!("Not pinned to cores: taskset (Linux, util-linux) or a second core is missing.");
    }
}

fn pin(pid: u32, core: &str) -> bool {
    let mut taskset = Command::new("taskset");
    taskset.args(["--all-tasks", "--cpu-list", "--pid", core, &pid.to_string()]);
    taskset.stdout(Stdio::null()).stderr(Stdio::null());
    taskset.status().is_ok_and(|status| status.success())
}

/// A server on its core, with the module.
pub fn server_with_module(options: &[&str]) -> Server {
    on_its_core(Server::start_with(options))
}

/// A server on its core, without this module.
pub fn bare_server(options: &[&str]) -> Server {
    on_its_core(Server::start_bare(options))
}

fn on_its_core(server: Server) -> Server {
    let pid = server.client().info("server", "process_id").parse().expect("a number");
    pin(pid, SERVER_CORE);
    server
}

/// A replica, on the clients' core: on the server's it would take the master's time.
pub fn replica_of(master: &Server) -> Server {
    let port = master.port.to_string();
    let replica = Server::start_bare(&["--replicaof", "127.0.0.1", &port]);
    let mut client = replica.client();
    wait_until("the replica is in sync", || {
        client.info("replication", "master_link_status") == "up"
    });
    replica
}

/// How redis-benchmark asks.
#[derive(Clone, Copy)]
pub struct Load {
    pub connections: u32,
    pub pipeline: u32,
    pub requests: u32,
    /// `__rand_int__` is below this.
    pub random_below: u64,
}

/// What one call took.
#[derive(Clone, Copy, Default)]
pub struct Taken {
    /// Server time inside the command, in microseconds.
    pub cost_us: f64,
    /// One over the calls per second, in microseconds.
    pub interval_us: f64,
}

/// Runs redis-benchmark with one command.
pub fn load(server: &Server, load: &Load, command: &[String]) -> Taken {
    let mut admin = server.client();
    reset_stats(&mut admin);
    let output = Command::new("redis-benchmark")
        .args(["-p", &server.port.to_string(), "--csv"])
        .args(["-c", &load.connections.to_string(), "-P", &load.pipeline.to_string()])
        .args(["-n", &load.requests.to_string(), "-r", &load.random_below.to_string()])
        .args(command)
        .output()
        .expect("redis-benchmark");
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "redis-benchmark {command:?}: {text}{complaint}");
    // The fields after the name, which may hold commas: calls a second, and six latencies.
    let per_second = text.lines().last().and_then(|line| line.rsplit(',').nth(6));
    let per_second: f64 =
        per_second.and_then(|field| field.trim_matches('"').parse().ok()).expect("calls a second");
    let stats = stats(&mut admin, &command[0]);
    assert!(stats.calls >= u64::from(load.requests), "{command:?}: {} calls", stats.calls);
    Taken { cost_us: stats.cost_us(), interval_us: 1e6 / per_second }
}

/// The server's account of one command since [`reset_stats`].
#[derive(Clone, Copy, Default)]
pub struct Stats {
    pub calls: u64,
    pub us: u64,
}

impl Stats {
    pub fn cost_us(self) -> f64 {
        self.us as f64 / self.calls as f64
    }
}

pub fn reset_stats(admin: &mut Client) {
    admin.call("CONFIG RESETSTAT");
}

pub fn stats(admin: &mut Client, command: &str) -> Stats {
    let line = admin.info("commandstats", &format!("cmdstat_{}", command.to_lowercase()));
    let field = |name: &str| -> u64 {
        let field = line.split(',').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
        field.unwrap_or_else(|| panic!("no {name} in {line}")).parse().expect("a number")
    };
    assert_eq!(field("failed_calls") + field("rejected_calls"), 0, "{command} failed");
    Stats { calls: field("calls"), us: field("usec") }
}

/// The processor time the server has used, in microseconds: its network and event loop too.
pub fn processor_us(admin: &mut Client) -> f64 {
    let mut seconds = |field: &str| admin.info("cpu", field).parse::<f64>().expect("a number");
    (seconds("used_cpu_user") + seconds("used_cpu_sys")) * 1e6
}

pub fn used_memory(admin: &mut Client) -> f64 {
    admin.info("memory", "used_memory").parse().expect("a number")
}

/// Sends commands, [`PIPELINE`] at a time, and sees that each gets this integer.
pub fn pipeline(client: &mut Client, commands: &[Vec<String>], reply: i64) {
    for chunk in commands.chunks(PIPELINE as usize) {
        let mut pipeline = Pipeline::new();
        for command in chunk {
            pipeline.cmd(&command[0]).arg(&command[1..]);
        }
        client.send_raw(&pipeline.get_packed_pipeline());
        for command in chunk {
            assert_eq!(client.receive(), Value::Int(reply), "{command:?}");
        }
    }
}

/// The name of a holder, as redis-benchmark makes them.
pub fn holder(number: u64) -> String {
    format!("holder:{number:012}")
}

/// The numbers of so many holders, in an order that has nothing to do with their names.
pub fn shuffled(holders: u64) -> Vec<u64> {
    let mut numbers: Vec<_> = (0..holders).collect();
    Rng::with_seed(1).shuffle(&mut numbers);
    numbers
}

/// Fills a set with holders whose leases lapse in the second from `from_s` on. The order is
/// random, so that neighbours in the set are none in memory, as in a limiter that is used.
pub fn fill(client: &mut Client, key: &str, holders: u64, from_s: i64) {
    let mut random = Rng::with_seed(2);
    for chunk in shuffled(holders).chunks(1000) {
        let mut zadd = vec!["ZADD".to_string(), key.to_string()];
        for number in chunk {
            zadd.extend([format!("{from_s}.{:03}", random.u32(0..1000)), holder(*number)]);
        }
        assert_eq!(client.run(&zadd), Value::Int(chunk.len() as i64));
    }
}
