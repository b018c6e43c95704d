//! A real cluster of three masters and three replicas: commands go to the node of their prefix,
//! slots move and masters fail under leases and lines. "Slot" is a hash slot of the cluster here.
//!
//! What always holds:
//!
//! - a lease that was acknowledged is not lost by a move or a failover that was asked for, and not
//!   by a crash if it was replicated;
//! - never more than `limit` leases of a limiter are live at once;
//! - a waiter whose slot goes elsewhere is let go within [`LET_GO`], with an error that tells its
//!   client to try again, and is not granted where its limiter is no more;
//! - no node keeps or writes a key in a slot that it does not serve;
//! - at rest a replica holds what its master holds.
//!
//! The judge of the storms is that of `stress.rs`: a lease is certainly held from the reply that
//! granted it until its release was sent, or its ttl had passed since the request was sent.

mod harness;

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::ops::Range;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use harness::{error_text, ints, wait_until, Client, Server, Signal};
use redis::Value;

const ONE: Value = Value::Int(1);

/// How soon a waiter is let go after its slot went elsewhere.
const LET_GO: Duration = Duration::from_secs(1);

/// What the server's whole milliseconds may take off the end of a lease.
const MILLISECOND: Duration = Duration::from_millis(1);

/// Options for a cluster whose replicas take over only when they are told to, so that a slow machine
/// is not taken for a dead one.
const CALM: [&str; 4] = ["--cluster-node-timeout", "2000", "--cluster-replica-no-failover", "yes"];

const WORKERS: usize = 30;
const ROUNDS: usize = 3;

/// At most two clusters run at a time: each test takes one of these.
static LANES: [Mutex<()>; 2] = [const { Mutex::new(()) }; 2];

/// Three masters and three replicas.
struct Cluster {
    nodes: Vec<Server>,
    _lane: MutexGuard<'static, ()>,
}

/// A node as another sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Member {
    id: String,
    /// Nothing in a master.
    master_id: Option<String>,
    flags: String,
    epoch: String,
    slots: Vec<Range<u16>>,
}

impl Cluster {
    fn start(lane: usize, options: &[&str]) -> Self {
        let lane = LANES[lane].lock().unwrap_or_else(PoisonError::into_inner);
        // How old a replica's data may be depends on the time-out, which is very short here.
        let common = ["--cluster-enabled", "yes", "--cluster-replica-validity-factor", "0"];
        let options = [&common, options].concat();
        let nodes: Vec<_> = (0..6).map(|_| Server::start_with(&options)).collect();
        let addresses: Vec<_> = nodes.iter().map(address).collect();
        let mut create = vec!["create"];
        create.extend(addresses.iter().map(String::as_str));
        create.extend(["--cluster-replicas", "1", "--cluster-yes"]);
        redis_cli_cluster(&create);
        let cluster = Self { nodes, _lane: lane };
        cluster.settle();
        cluster
    }

    /// The members by port, as a node sees them.
    fn seen_by(&self, node: usize) -> BTreeMap<u16, Member> {
        let nodes = self.nodes[node].client().text("CLUSTER NODES");
        let member = |line: &str| {
            let fields: Vec<_> = line.split(' ').collect();
            let port = fields[1].split([':', '@']).nth(1).expect("a port");
            let slots = fields[8..].iter().filter(|field| !field.starts_with('['));
            let range = |field: &&str| {
                let (first, last) = field.split_once('-').unwrap_or((field, field));
                let number = |text: &str| text.parse::<u16>().expect("a slot");
                number(first)..number(last) + 1
            };
            let member = Member {
                id: fields[0].into(),
                master_id: (fields[3] != "-").then(|| fields[3].into()),
                flags: fields[2].replace("myself,", "").replace(",nofailover", ""),
                epoch: fields[6].into(),
                slots: slots.map(range).collect(),
            };
            (port.parse().expect("a number"), member)
        };
        nodes.lines().map(member).collect()
    }

    fn member(&self, node: usize) -> Member {
        self.seen_by(node).remove(&self.nodes[node].port).expect("the node itself")
    }

    fn is_master(&self, node: usize) -> bool {
        self.nodes[node].client().info("replication", "role") == "master"
    }

    fn masters(&self) -> Vec<usize> {
        (0..self.nodes.len()).filter(|node| self.is_master(*node)).collect()
    }

    fn replica_of(&self, master: usize) -> usize {
        let id = Some(self.member(master).id);
        let follows = |node: &usize| self.member(*node).master_id == id;
        (0..self.nodes.len()).find(follows).expect("a replica")
    }

    /// The one node that says it serves the slot.
    fn owner(&self, slot: u16) -> usize {
        let serves = |node: &usize| self.member(*node).slots.iter().any(|r| r.contains(&slot));
        let owners: Vec<_> = self.masters().into_iter().filter(serves).collect();
        assert_eq!(owners.len(), 1, "slot {slot} is served by {owners:?}");
        owners[0]
    }

    /// Waits until the nodes agree on everything. Without that, slots moved back and forth in quick
    /// succession can end up without an owner: who takes a slot without knowing the others' latest
    /// epochs loses it again.
    fn agree(&self) {
        wait_until("the nodes agree", || {
            let view = self.seen_by(0);
            view.values().all(|member| ["master", "slave"].contains(&member.flags.as_str()))
                && view.len() == self.nodes.len()
                && (0..self.nodes.len()).all(|node| self.seen_by(node) == view)
                && self.nodes.iter().all(|node| is_up(&mut node.client()))
        });
    }

    /// Waits until the nodes agree, and the replicas follow.
    fn settle(&self) {
        self.agree();
        wait_until("every replica follows", || {
            let replicas = self.nodes.iter().map(Server::client).filter_map(|mut client| {
                let role = client.info("replication", "role");
                (role == "slave").then(|| client.info("replication", "master_link_status"))
            });
            replicas.collect::<Vec<_>>() == ["up"; 3]
        });
    }

    /// Every replica holds what its master holds.
    fn check_replicas(&self) {
        for master in self.masters() {
            let (master, replica) = (&self.nodes[master], &self.nodes[self.replica_of(master)]);
            wait_until("the replica agrees", || replica.contents() == master.contents());
            assert_eq!(replica.blocked(), 0, "nobody waits on a replica");
        }
    }

    /// No node but its owner, and that one's replica, holds a key in the slot.
    fn check_nowhere_else(&self, slot: u16) {
        let owner = self.owner(slot);
        for node in self.masters().into_iter().filter(|node| *node != owner) {
            assert_eq!(keys_in(&self.nodes[node], slot), 0, "slot {slot}, served elsewhere");
        }
    }

    /// Moves a slot as redis-cli does, but with time in between to do something.
    fn move_slot(&self, slot: u16, from: usize, to: usize, in_window: impl FnOnce()) {
        self.open_window(slot, from, to);
        in_window();
        self.migrate_keys(slot, from, to);
        self.close_window(slot, from, to);
        self.agree();
    }

    fn open_window(&self, slot: u16, from: usize, to: usize) {
        let (from_id, to_id) = (self.member(from).id, self.member(to).id);
        ok(&mut self.nodes[to].client(), &format!("CLUSTER SETSLOT {slot} IMPORTING {from_id}"));
        ok(&mut self.nodes[from].client(), &format!("CLUSTER SETSLOT {slot} MIGRATING {to_id}"));
    }

    fn migrate_keys(&self, slot: u16, from: usize, to: usize) {
        let (mut client, port) = (self.nodes[from].client(), self.nodes[to].port);
        loop {
            let keys = client.strings(&format!("CLUSTER GETKEYSINSLOT {slot} 100"));
            if keys.is_empty() {
                return;
            }
            let migrate = format!("MIGRATE 127.0.0.1 {port} || 0 5000 KEYS {}", keys.join(" "));
            let args: Vec<_> = migrate.split(' ').map(|arg| arg.trim_matches('|')).collect();
            let reply = harness::string(&client.run(&args));
            assert!(["OK", "NOKEY"].contains(&reply.as_str()), "{migrate}: {reply}");
        }
    }

    fn close_window(&self, slot: u16, from: usize, to: usize) {
        let id = self.member(to).id;
        let mut nodes = vec![to, from]; // The new owner first, so that there is always one.
        nodes.extend(self.masters().into_iter().filter(|node| ![to, from].contains(node)));
        for node in nodes {
            ok(&mut self.nodes[node].client(), &format!("CLUSTER SETSLOT {slot} NODE {id}"));
        }
    }

    /// Moves the lowest slots of a node with `redis-cli --cluster reshard`.
    fn reshard(&self, count: usize, from: usize, to: usize) {
        redis_cli_cluster(&[
            "reshard",
            &address(&self.nodes[to]),
            "--cluster-from",
            &self.member(from).id,
            "--cluster-to",
            &self.member(to).id,
            "--cluster-slots",
            &count.to_string(),
            "--cluster-yes",
        ]);
    }

    /// Makes a replica the master, its master's consent given.
    fn fail_over(&self, master: usize) {
        let replica = self.replica_of(master);
        ok(&mut self.nodes[replica].client(), "CLUSTER FAILOVER");
        wait_until("the replica is the master", || self.is_master(replica));
        wait_until("the master is a replica", || !self.is_master(master));
    }
}

fn address(node: &Server) -> String {
    format!("127.0.0.1:{}", node.port)
}

fn is_up(client: &mut Client) -> bool {
    client.text("CLUSTER INFO").contains("cluster_state:ok")
}

fn ok(client: &mut Client, command: &str) {
    assert_eq!(client.call(command), Value::Okay, "{command}");
}

fn keys_in(node: &Server, slot: u16) -> i64 {
    node.client().int(&format!("CLUSTER COUNTKEYSINSLOT {slot}"))
}

/// Runs `redis-cli --cluster` to its end.
fn redis_cli_cluster(args: &[&str]) {
    let mut process = Command::new("redis-cli")
        .arg("--cluster")
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("redis-cli");
    let mut status = None;
    wait_until("redis-cli is done", || {
        status = process.try_wait().expect("its status");
        status.is_some()
    });
    let mut output = String::new();
    process.stdout.expect("its output").read_to_string(&mut output).expect("text");
    assert!(status.is_some_and(|status| status.success()), "{args:?}:\n{output}");
}

/// The slot of a key, as the cluster's specification has it.
fn slot_of(key: &str) -> u16 {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}'));
    let hashed = tag.map_or(key, |(tag, _)| if tag.is_empty() { key } else { tag });
    let crc = hashed.bytes().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ u16::from(byte) << 8, |crc, _| {
            if crc & 0x8000 == 0 {
                crc << 1
            } else {
                crc << 1 ^ 0x1021
            }
        })
    });
    crc % 16384
}

/// A hash tag whose slot is one of these.
fn tag_in(slots: Range<u16>) -> String {
    let mut tags = (0_u32..).map(|serial| format!("{{{serial}}}"));
    tags.find(|tag| slots.contains(&slot_of(tag))).expect("a tag")
}

/// A tag of a slot that this node serves.
fn tag_on(cluster: &Cluster, node: usize) -> String {
    tag_in(cluster.member(node).slots[0].clone())
}

/// Whether the error tells a waiter's client to try again, as the server says it or as we do.
fn is_let_go(error: &str) -> bool {
    ["UNBLOCKED", "MOVED", "CLUSTERDOWN"].iter().any(|code| error.starts_with(code))
}

fn seed() -> u64 {
    let seed =
        std::env::var("SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    seed
}

/// A client that knows its way about a cluster: it follows MOVED and ASK, and tries again where it
/// is told to.
struct Follower {
    ports: Vec<u16>,
    connections: HashMap<u16, Client>,
    /// Where each prefix was found last.
    found: HashMap<String, u16>,
    attempts: Vec<Attempt>,
}

/// What a node was asked, and what it said.
struct Attempt {
    port: u16,
    slot: u16,
    waits: bool,
    sent: Instant,
    replied: Instant,
    error: Option<String>,
}

impl Follower {
    fn new(cluster: &Cluster) -> Self {
        let ports = cluster.nodes.iter().map(|node| node.port).collect();
        Self { ports, connections: HashMap::new(), found: HashMap::new(), attempts: Vec::new() }
    }

    /// The reply to a command, and when it was sent to the node that gave it.
    fn run(&mut self, args: &[&str]) -> (Value, Instant) {
        let (prefix, waits) = (args[1], args[0] == "LIMITER.BACQUIRE");
        let started = Instant::now();
        let mut asks = None;
        loop {
            let port = asks.or_else(|| self.found.get(prefix).copied());
            let port = port.unwrap_or_else(|| self.ports[fastrand::usize(..self.ports.len())]);
            let connect = || Client::connect(port, harness::deadline()).expect("a connection");
            let client = self.connections.entry(port).or_insert_with(connect);
            if asks.take().is_some() {
                ok(client, "ASKING");
            }
            let sent = Instant::now();
            let reply = client.run(args);
            let error = matches!(reply, Value::ServerError(_)).then(|| error_text(&reply));
            let replied = Instant::now();
            let slot = slot_of(prefix);
            self.attempts.push(Attempt { port, slot, waits, sent, replied, error: error.clone() });
            let Some(error) = error else { return (reply, sent) };
            let words: Vec<_> = error.split(' ').collect();
            let target = || words[2].rsplit(':').next().unwrap().parse().expect("a port");
            match words[0] {
                "MOVED" => {
                    self.found.insert(prefix.into(), target());
                }
                "ASK" => asks = Some(target()),
                "TRYAGAIN" | "CLUSTERDOWN" => thread::sleep(MILLISECOND),
                "UNBLOCKED" => {
                    // A server that turns into a replica closes the connection after this.
                    self.connections.remove(&port);
                }
                _ => panic!("{args:?}: {error}"),
            }
            assert!(waits || started.elapsed() < harness::deadline(), "{args:?}: {error}");
        }
    }

    fn int(&mut self, command: &str) -> i64 {
        match self.run(&command.split(' ').collect::<Vec<_>>()).0 {
            Value::Int(integer) => integer,
            other => panic!("{command}: {other:?}"),
        }
    }
}

#[test]
fn commands_go_to_the_node_of_the_prefix() {
    let mut cluster = Cluster::start(0, &["--cluster-node-timeout", "2000"]);
    for key in ["p", "{user}.a", "{user}.b", "a{user}b{x}", "{}x", "x{}", "{x", "123456789"] {
        let slot = cluster.nodes[0].client().int(&format!("CLUSTER KEYSLOT {key}"));
        assert_eq!(slot, i64::from(slot_of(key)), "{key}");
    }

    // A limiter is where the slot of its prefix is, and each other node says so.
    for prefix in ["p", "{user}.a", "{user}.b", "q", "123456789"] {
        let (slot, owner) = (slot_of(prefix), cluster.owner(slot_of(prefix)));
        let moved = format!("MOVED {slot} {}", address(&cluster.nodes[owner]));
        for node in (0..6).filter(|node| *node != owner) {
            let mut client = cluster.nodes[node].client();
            for command in [
                format!("LIMITER.ACQUIRE {prefix} a 1 450"),
                format!("LIMITER.BACQUIRE {prefix} a 1 450 0"),
                format!("LIMITER.RELEASE {prefix} a"),
                format!("LIMITER.RENEW {prefix} a 450"),
                format!("LIMITER.COUNT {prefix}"),
                format!("LIMITER.HOLDERS {prefix}"),
            ] {
                assert_eq!(client.error(&command), moved, "{command}");
            }
        }
        let mut client = cluster.nodes[owner].client();
        assert_eq!(client.int(&format!("LIMITER.ACQUIRE {prefix} a 1 450")), 1);
        let mut replica = cluster.nodes[cluster.replica_of(owner)].client();
        ok(&mut replica, "READONLY");
        wait_until("the replica has it", || replica.int(&format!("LIMITER.COUNT {prefix}")) == 1);
        assert_eq!(replica.error(&format!("LIMITER.RELEASE {prefix} a")), moved);
    }
    assert_eq!(cluster.owner(slot_of("{user}.a")), cluster.owner(slot_of("user")));

    // redis-cli follows.
    for node in 0..6 {
        let port = cluster.nodes[node].port.to_string();
        let args = ["-c", "-p", &port, "LIMITER.ACQUIRE", "p", "a", "1", "450"];
        let output = Command::new("redis-cli").args(args).output().expect("redis-cli");
        assert_eq!(output.stdout, b"1\n");
    }

    // So does a client library for clusters that knows nothing of these commands, also after slots
    // have moved under it.
    let url = format!("redis://{}", address(&cluster.nodes[0]));
    let client = redis::cluster::ClusterClient::new(vec![url]).expect("a client");
    let mut library = client.get_connection().expect("a connection");
    let mut int = |name: &str, args: &[&str]| -> i64 {
        redis::cmd(name).arg(args).query(&mut library).expect("an integer")
    };
    let prefixes: Vec<_> = (0..60).map(|serial| format!("many-{serial}")).collect();
    let mut on_node = [0; 6];
    for prefix in &prefixes {
        assert_eq!(int("LIMITER.ACQUIRE", &[prefix, "a", "1", "450"]), 1);
        assert_eq!(int("LIMITER.BACQUIRE", &[prefix, "b", "1", "450", "0.001"]), 0);
        on_node[cluster.owner(slot_of(prefix))] += 1;
    }
    let masters = cluster.masters();
    assert!(masters.iter().all(|node| on_node[*node] > 0), "{on_node:?}");
    let moves = &prefixes[..10];
    for prefix in moves {
        let from = cluster.owner(slot_of(prefix));
        let to = masters.iter().copied().find(|node| *node != from).unwrap();
        cluster.move_slot(slot_of(prefix), from, to, || {
            // Both in the window, before and after its key has gone.
            assert_eq!(int("LIMITER.COUNT", &[prefix]), 1);
            cluster.migrate_keys(slot_of(prefix), from, to);
            assert_eq!(int("LIMITER.COUNT", &[prefix]), 1);
            assert_eq!(int("LIMITER.RENEW", &[prefix, "a", "450"]), 1);
        });
    }
    for prefix in &prefixes {
        assert_eq!(int("LIMITER.RENEW", &[prefix, "a", "450"]), 1);
        assert_eq!(int("LIMITER.RELEASE", &[prefix, "a", "b"]), 1);
        assert_eq!(int("LIMITER.BACQUIRE", &[prefix, "b", "1", "450", "0"]), 1);
        cluster.check_nowhere_else(slot_of(prefix));
    }
    cluster.settle();
    cluster.check_replicas();
    assert!(cluster.nodes.iter_mut().all(Server::is_running));
}

/// A limiter on the first node whose one slot `a` holds, with `b` in line.
struct Line {
    prefix: String,
    slot: u16,
    waiter: Client,
}

impl Line {
    fn on(node: &Server, tag: &str) -> Self {
        let prefix = format!("{tag}.line");
        assert_eq!(node.client().int(&format!("LIMITER.ACQUIRE {prefix} a 1 450")), 1);
        let waiter = node.waiter(&format!("LIMITER.BACQUIRE {prefix} b 1 450 0"));
        Self { slot: slot_of(&prefix), prefix, waiter }
    }

    /// The waiter is let go soon with an error.
    fn check_let_go(&mut self, what: &str) {
        let started = Instant::now();
        let error = error_text(&self.waiter.receive());
        let took = started.elapsed();
        println!("{what}: {error} after {took:?}");
        assert!(is_let_go(&error), "{what}: {error}");
        assert!(took < LET_GO, "{what}: let go after {took:?}");
    }
}

#[test]
fn a_waiter_whose_slot_is_leaving_is_let_go_and_granted_nothing() {
    let mut cluster = Cluster::start(0, &["--cluster-node-timeout", "2000"]);
    let masters = cluster.masters();
    let (from, to) = (masters[0], masters[1]);
    let (old, new) = (&cluster.nodes[from], &cluster.nodes[to]);
    let mut on_old = old.client();
    let slots = cluster.member(from).slots[0].clone();
    let mut tags = slots.step_by(60).map(|slot| tag_in(slot..slot + 60));

    // The limiter is gone from here, one way or another, while the slot is still being moved: who
    // asks for it now is sent to the new owner, and so is the waiter.
    // What expires does so just when the server is asked, or it does not: that takes some tries.
    let ways = ["migrated", "released", "deleted", "deleted in a transaction"];
    for what in ways.into_iter().chain(["expired"; 20]) {
        let mut line = Line::on(old, &tags.next().unwrap());
        cluster.move_slot(line.slot, from, to, || {
            assert!(!line.waiter.has_reply(), "{what}: nothing has happened yet");
            let prefix = &line.prefix;
            let done = match what {
                "migrated" => {
                    cluster.migrate_keys(line.slot, from, to);
                    ONE
                }
                "released" => on_old.call(&format!("LIMITER.RELEASE {prefix} a")),
                "deleted" => on_old.call(&format!("DEL {prefix}")),
                "expired" => on_old.call(&format!("PEXPIRE {prefix} 50")),
                _ => {
                    ok(&mut on_old, "MULTI");
                    on_old.call(&format!("DEL {prefix}"));
                    on_old.call(&format!("LIMITER.RELEASE {prefix} a"));
                    let replies = on_old.call("EXEC");
                    assert_eq!(replies, ints(&[1, 0]));
                    ONE
                }
            };
            assert_eq!(done, ONE, "{what}");
            line.check_let_go(what);
            // Redis deletes what has expired when it gets to it.
            wait_until("nothing is left", || keys_in(old, line.slot) == 0);
            let ask = format!("LIMITER.BACQUIRE {} b 2 450 0", line.prefix);
            assert!(on_old.error(&ask).starts_with("ASK"), "{what}");
            // Where it is sent to it is served.
            let mut on_new = new.client();
            ok(&mut on_new, "ASKING");
            assert_eq!(on_new.int(&ask), 1, "{what}");
            assert_eq!(keys_in(old, line.slot), 0, "{what}");
        });
        let held = new.client().int(&format!("LIMITER.COUNT {}", line.prefix));
        assert_eq!(held, if what == "migrated" { 2 } else { 1 }, "{what}");
        cluster.check_nowhere_else(line.slot);
    }

    // While the limiter is still here its line is served here, and what was granted moves on.
    let mut line = Line::on(old, &tags.next().unwrap());
    let second = old.waiter(&format!("LIMITER.BACQUIRE {} c 1 450 0", line.prefix));
    cluster.move_slot(line.slot, from, to, || {
        assert_eq!(on_old.int(&format!("LIMITER.RENEW {} a 0.05", line.prefix)), 1);
        assert_eq!(line.waiter.receive(), ONE, "after a lapse");
        cluster.migrate_keys(line.slot, from, to);
        line.waiter = second;
        line.check_let_go("second in line");
    });
    assert_eq!(new.client().int(&format!("LIMITER.RELEASE {} b", line.prefix)), 1);

    // A waiter at the new owner, before the slot is its own.
    let mut line = Line::on(old, &tags.next().unwrap());
    cluster.move_slot(line.slot, from, to, || {
        cluster.migrate_keys(line.slot, from, to);
        line.check_let_go("migrated");
        line.waiter = new.client();
        ok(&mut line.waiter, "ASKING");
        line.waiter.send(&["LIMITER.BACQUIRE", &line.prefix, "b", "1", "450", "0"]);
        line.check_let_go("asked for where it is not served yet");
    });

    // A slot that goes without a word, since nothing in it goes.
    let prefix = format!("{}.none", tags.next().unwrap());
    let waiter = old.waiter(&format!("LIMITER.BACQUIRE {prefix} b 0 450 0"));
    let mut line = Line { slot: slot_of(&prefix), prefix, waiter };
    cluster.close_window(line.slot, from, to);
    line.check_let_go("without a key");
    cluster.settle();
    cluster.check_replicas();

    // A slot that another node takes with everything in it. Redis 7.0 tells neither the module nor
    // the replica that the keys are gone.
    let mut line = Line::on(old, &tags.next().unwrap());
    let (old_id, new_id) = (cluster.member(from).id, cluster.member(to).id);
    ok(&mut new.client(), &format!("CLUSTER SETSLOT {} IMPORTING {old_id}", line.slot));
    ok(&mut new.client(), &format!("CLUSTER SETSLOT {} NODE {new_id}", line.slot));
    wait_until("the old owner knows", || {
        !cluster.member(from).slots.iter().any(|range| range.contains(&line.slot))
    });
    line.check_let_go("taken");
    cluster.check_nowhere_else(line.slot);

    assert_eq!(old.blocked(), 0);
    assert!(cluster.nodes.iter_mut().all(Server::is_running));
}

/// A limiter in the storm.
struct Limiter {
    prefix: String,
    limit: usize,
}

/// What the clients of a storm saw.
#[derive(Default)]
struct Records {
    /// By prefix, from when to when a lease was certainly held.
    leases: Mutex<HashMap<String, Vec<(Instant, Instant)>>>,
    lost: Mutex<Vec<String>>,
    checked: Mutex<usize>,
    attempts: Mutex<Vec<Attempt>>,
    /// Which slot left which node, and when at the latest.
    departures: Mutex<Vec<(u16, u16, Instant)>>,
    over: AtomicBool,
}

impl Records {
    fn departed(&self, slots: impl IntoIterator<Item = u16>, from: &Server) {
        let at = Instant::now();
        let departures = slots.into_iter().map(|slot| (slot, from.port, at));
        self.departures.lock().unwrap().extend(departures);
    }

    /// Waits until the clients have held and given back some more leases.
    fn wait_for_life(&self) {
        let before = *self.checked.lock().unwrap();
        wait_until("life goes on", || *self.checked.lock().unwrap() > before + 100);
    }
}

/// Ends the storm, however the disturbance ends.
struct End<'r>(&'r AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A client in the storm.
struct Worker<'s> {
    follower: Follower,
    limiters: &'s [Limiter],
    records: &'s Records,
    rng: Rng,
    name: usize,
}

impl Worker<'_> {
    fn run(mut self) {
        for serial in 0.. {
            if self.records.over.load(Ordering::Relaxed) {
                break;
            }
            self.one_lease(serial);
        }
        self.records.attempts.lock().unwrap().append(&mut self.follower.attempts);
    }

    fn one_lease(&mut self, serial: usize) {
        let Limiter { prefix, limit } = &self.limiters[self.rng.usize(..self.limiters.len())];
        let key = format!("{}-{serial}", self.name);
        let is_forgotten = self.rng.u8(0..8) == 0;
        let ttl_ms = if is_forgotten { self.rng.u64(50..400) } else { 9_000 };
        let ttl = format!("{:.3}", ttl_ms as f64 / 1000.0);
        let mut acquire = format!("LIMITER.ACQUIRE {prefix} {key} {limit} {ttl}");
        if self.rng.u8(0..4) > 0 {
            let timeout = [0.0, 0.2, 1.0][self.rng.usize(0..3)];
            acquire = format!("LIMITER.BACQUIRE {prefix} {key} {limit} {ttl} {timeout}");
        }
        if !is_forgotten && self.rng.u8(0..4) == 0 {
            acquire += " EPHEMERAL"; // Its connection stays open: nobody waits on it meanwhile.
        }
        let (reply, sent) = self.follower.run(&acquire.split(' ').collect::<Vec<_>>());
        let replied = Instant::now();
        match reply {
            Value::Int(1) => {}
            Value::Int(0) => return,
            other => panic!("{acquire}: {other:?}"),
        }

        let mut held_until = sent + Duration::from_millis(ttl_ms) - MILLISECOND;
        if is_forgotten {
            return self.note(prefix, (replied, held_until));
        }
        for _ in 0..self.rng.u8(0..3) {
            thread::sleep(Duration::from_millis(self.rng.u64(0..80)));
            let sent = Instant::now();
            let renewed = self.follower.int(&format!("LIMITER.RENEW {prefix} {key} {ttl}"));
            self.judge("RENEW", prefix, &key, renewed, held_until);
            held_until = sent + Duration::from_millis(ttl_ms) - MILLISECOND;
        }
        thread::sleep(Duration::from_millis(self.rng.u64(0..80)));
        self.note(prefix, (replied, Instant::now().min(held_until)));
        let released = self.follower.int(&format!("LIMITER.RELEASE {prefix} {key}"));
        self.judge("RELEASE", prefix, &key, released, held_until);
    }

    fn note(&self, prefix: &str, certainly: (Instant, Instant)) {
        self.records.leases.lock().unwrap().entry(prefix.into()).or_default().push(certainly);
    }

    /// Was the lease there, if it was certainly held?
    fn judge(&self, command: &str, prefix: &str, key: &str, found: i64, held_until: Instant) {
        let now = Instant::now();
        if now < held_until {
            *self.records.checked.lock().unwrap() += 1;
            if found != 1 {
                let line = format!("{command} {prefix} {key}: {:?} early", held_until - now);
                self.records.lost.lock().unwrap().push(line);
            }
        }
    }
}

/// Waits until a client stands in the limiter's line.
fn wait_for_line(node: &Server, prefix: &str) {
    let mut client = node.client();
    let state = format!("LIMITER.ACQUIRE {prefix} nobody 0 1 WITHSTATE");
    wait_until(
        "somebody stands in line",
        || matches!(client.call(&state), Value::Array(state) if state[3] == ONE),
    );
}

/// Leases nobody touches in the storm, and a full limiter with somebody in line.
struct Still {
    tag: String,
    leases: Vec<(String, f64)>,
    expiry_ms: i64,
}

impl Still {
    fn begin(cluster: &Cluster, tag: &str, rng: &mut Rng) -> Self {
        let mut client = cluster.nodes[cluster.owner(slot_of(tag))].client();
        client.int(&format!("DEL {tag}.still"));
        if rng.bool() {
            assert_eq!(client.int(&format!("ZADD {tag}.still inf never")), 1);
        }
        for serial in 0..rng.u32(1..6) {
            let ttl = rng.u32(100_000..900_000);
            let ttl = format!("{}.{:03}", ttl / 1000, ttl % 1000);
            assert_eq!(client.int(&format!("LIMITER.ACQUIRE {tag}.still {serial} 9 {ttl}")), 1);
        }
        assert_eq!(client.int(&format!("LIMITER.ACQUIRE {tag}.full keeper 1 450")), 1);
        let (leases, expiry_ms) = Self::read(&mut client, tag);
        Self { tag: tag.into(), leases, expiry_ms }
    }

    fn read(client: &mut Client, tag: &str) -> (Vec<(String, f64)>, i64) {
        let prefix = format!("{tag}.still");
        (client.members(&prefix), client.int(&format!("PEXPIRETIME {prefix}")))
    }

    fn check(&self, cluster: &Cluster) {
        let slot = slot_of(&self.tag);
        let mut client = cluster.nodes[cluster.owner(slot)].client();
        let (leases, expiry_ms) = Self::read(&mut client, &self.tag);
        assert_eq!(leases, self.leases, "slot {slot}");
        // MIGRATE sends the time that is left, and so adds what it takes itself.
        let later_ms = expiry_ms - self.expiry_ms;
        assert!((0..1000).contains(&later_ms), "slot {slot}: it expires {later_ms} ms later");
        cluster.check_nowhere_else(slot);
    }

    /// Stands in line until the keeper leaves, wherever the limiter is.
    fn wait(&self, mut follower: Follower, records: &Records) {
        assert_eq!(follower.int(&format!("LIMITER.BACQUIRE {}.full sitter 1 450 0", self.tag)), 1);
        assert_eq!(follower.int(&format!("LIMITER.RELEASE {}.full sitter", self.tag)), 1);
        records.attempts.lock().unwrap().append(&mut follower.attempts);
    }

    fn wait_for_line(&self, node: &Server) {
        wait_for_line(node, &format!("{}.full", self.tag));
    }

    /// Somebody in line on a limiter that has no key.
    fn wait_for_nothing(&self, node: &Server) -> Line {
        let prefix = format!("{}.none", self.tag);
        let mut waiter = node.client();
        waiter.send(&["LIMITER.BACQUIRE", &prefix, "b", "0", "450", "0"]);
        wait_for_line(node, &prefix);
        Line { slot: slot_of(&prefix), prefix, waiter }
    }

    fn end(&self, follower: &mut Follower) {
        assert_eq!(follower.int(&format!("LIMITER.RENEW {}.full keeper 450", self.tag)), 1);
        assert_eq!(follower.int(&format!("LIMITER.RELEASE {}.full keeper", self.tag)), 1);
    }
}

/// Lets clients loose on limiters with these tags while something happens to the cluster, and
/// judges what they saw.
fn storm(
    cluster: &Cluster,
    tags: &[String],
    rng: &mut Rng,
    disturb: impl FnOnce(&[Still], &Records, &mut Rng),
) {
    let records = Records::default();
    let limiter =
        |(at, tag): (usize, &String)| Limiter { prefix: format!("{tag}.busy"), limit: 1 + at % 2 };
    let limiters: Vec<_> = tags.iter().enumerate().map(limiter).collect();
    let stills: Vec<_> = tags.iter().map(|tag| Still::begin(cluster, tag, rng)).collect();
    thread::scope(|scope| {
        for name in 0..WORKERS {
            let (follower, rng) = (Follower::new(cluster), rng.fork());
            let (limiters, records) = (limiters.as_slice(), &records);
            scope.spawn(move || Worker { follower, limiters, records, rng, name }.run());
        }
        for still in &stills {
            let (follower, records) = (Follower::new(cluster), &records);
            scope.spawn(move || still.wait(follower, records));
        }
        let _end = End(&records.over);
        records.wait_for_life();
        disturb(&stills, &records, rng);
        records.wait_for_life();
        let mut follower = Follower::new(cluster);
        for still in &stills {
            still.check(cluster);
            still.end(&mut follower);
        }
    });
    judge(&limiters, &records);
    for node in &cluster.nodes {
        assert_eq!(node.blocked(), 0, "nobody is left in a line");
    }
}

/// How many of these intervals are open at most at once.
fn most_at_once(intervals: &[(Instant, Instant)]) -> usize {
    let mut changes: Vec<(Instant, i32)> = intervals
        .iter()
        .filter(|(from, to)| from < to)
        .flat_map(|(from, to)| [(*from, 1), (*to, -1)])
        .collect();
    // At the same instant one ends before the next begins.
    changes.sort();
    let open = changes.iter().scan(0, |open, (_, change)| {
        *open += change;
        Some(*open as usize)
    });
    open.max().unwrap_or(0)
}

fn judge(limiters: &[Limiter], records: &Records) {
    let lost = records.lost.lock().unwrap();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");

    let leases = records.leases.lock().unwrap();
    for Limiter { prefix, limit } in limiters {
        let most = most_at_once(&leases[prefix]);
        assert!(most <= *limit, "{prefix}: {most} held at once, of {limit}");
        assert_eq!(most, *limit, "{prefix}: the limit was never reached, so nothing was tried");
    }

    let attempts = records.attempts.lock().unwrap();
    let mut longest = Duration::ZERO;
    for (slot, port, at) in records.departures.lock().unwrap().iter() {
        let waits = || attempts.iter().filter(|a| a.waits && (a.slot, a.port) == (*slot, *port));
        for stayed in waits().filter(|a| a.sent < *at && a.replied > *at) {
            longest = longest.max(stayed.replied - *at);
        }
        let let_go = waits().filter(|a| a.sent < *at && a.error.as_deref().is_some_and(is_let_go));
        assert!(let_go.count() > 0, "slot {slot}: nobody was let go");
    }
    assert!(longest < LET_GO, "a waiter stayed for {longest:?} where its slot was no more");

    let mut errors = BTreeMap::new();
    for attempt in attempts.iter() {
        let what = if attempt.waits { "waiting" } else { "at once" };
        if let Some(error) = &attempt.error {
            let code = error.split(' ').next().unwrap_or_default();
            *errors.entry((what, code)).or_insert(0) += 1;
        }
    }
    println!(
        "{} departures, {} leases, {} checked, none lost, {errors:?}, longest stay {longest:?}",
        records.departures.lock().unwrap().len(),
        leases.values().map(Vec::len).sum::<usize>(),
        records.checked.lock().unwrap(),
    );
}

/// The slots that redis-cli moves in one go.
const LOWEST: u16 = 5;

#[test]
fn slots_move_under_load_with_leases_and_lines() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut cluster = Cluster::start(1, &CALM);
    let tag_of = |slot: u16| tag_in(slot..slot + 1);
    let lowest: Vec<_> = (0..LOWEST).map(tag_of).collect();
    let by_hand: Vec<_> = (0..5).map(|part| tag_of(rng.u16(100..3000) + part * 3000)).collect();
    let tags = [lowest, by_hand].concat();
    for _ in 0..ROUNDS {
        storm(&cluster, &tags, &mut rng, |stills, records, rng| {
            let other = |from: usize, rng: &mut Rng| {
                let others: Vec<_> = cluster.masters().into_iter().filter(|n| *n != from).collect();
                others[rng.usize(..others.len())]
            };
            let (lowest, by_hand) = stills.split_at(usize::from(LOWEST));

            let from = cluster.owner(0);
            lowest.iter().for_each(|still| still.wait_for_line(&cluster.nodes[from]));
            let silent: Vec<_> =
                lowest.iter().map(|still| still.wait_for_nothing(&cluster.nodes[from])).collect();
            cluster.reshard(lowest.len(), from, other(from, rng));
            records.departed(0..LOWEST, &cluster.nodes[from]);
            silent.into_iter().for_each(|mut line| line.check_let_go("resharded"));
            cluster.agree();
            lowest.iter().for_each(|still| still.check(&cluster));

            for still in by_hand {
                let slot = slot_of(&still.tag);
                let from = cluster.owner(slot);
                let to = other(from, rng);
                still.wait_for_line(&cluster.nodes[from]);
                cluster.open_window(slot, from, to);
                // How long the window is open, before and after its keys go.
                thread::sleep(Duration::from_millis(rng.u64(0..80)));
                cluster.migrate_keys(slot, from, to);
                thread::sleep(Duration::from_millis(rng.u64(0..80)));
                assert_eq!(keys_in(&cluster.nodes[from], slot), 0, "written where it left");
                cluster.close_window(slot, from, to);
                records.departed([slot], &cluster.nodes[from]);
                cluster.agree();
                still.check(&cluster);
            }
        });
    }
    cluster.settle();
    cluster.check_replicas();
    assert!(cluster.nodes.iter_mut().all(Server::is_running));
}

#[test]
fn a_failover_that_was_asked_for_loses_nothing_and_lets_waiters_go() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut cluster = Cluster::start(1, &CALM);
    let tags: Vec<_> = (0..6).map(|part| part * 2730).map(|at| tag_in(at..at + 2730)).collect();
    // Each once: a node that takes over twice within seconds counts the votes of the first time.
    let mut masters = cluster.masters();
    rng.shuffle(&mut masters);
    for master in masters {
        storm(&cluster, &tags, &mut rng, |stills, records, _| {
            let is_there = |still: &&Still| cluster.owner(slot_of(&still.tag)) == master;
            let there: Vec<_> = stills.iter().filter(is_there).collect();
            there.iter().for_each(|still| still.wait_for_line(&cluster.nodes[master]));
            cluster.fail_over(master);
            let slots = there.iter().map(|still| slot_of(&still.tag));
            records.departed(slots, &cluster.nodes[master]);
            cluster.settle();
            wait_until("the old master has let everybody go", || {
                cluster.nodes[master].blocked() == 0
            });
        });
    }
    cluster.check_replicas();
    assert!(cluster.nodes.iter_mut().all(Server::is_running));
}

/// How a master is lost.
#[derive(Clone, Copy, Debug)]
enum Loss {
    Crash,
    /// It stands still, and finds another in its place when it goes on.
    Standstill,
}

#[test]
fn when_a_master_is_lost_its_replica_goes_on_with_what_was_replicated() {
    let seed = seed();
    let mut rng = Rng::with_seed(seed);
    let mut cluster = Cluster::start(0, &["--cluster-node-timeout", "1000"]);
    let mut losses = [Loss::Crash, Loss::Standstill];
    rng.shuffle(&mut losses);
    for (round, loss) in losses.into_iter().enumerate() {
        let masters = cluster.masters();
        let dead = masters[rng.usize(..masters.len())];
        let heir = cluster.replica_of(dead);
        let slots = cluster.member(dead).slots[0].clone();
        let half = slots.start + rng.u16(0..slots.len() as u16 / 2);
        let tag = tag_in(half..slots.end);

        let mut client = cluster.nodes[dead].client();
        let leases = rng.u32(1..200);
        for serial in 0..leases {
            let prefix = format!("{tag}.{}", rng.u8(0..5));
            let ttl = rng.u32(100..900);
            let acquire = format!("LIMITER.ACQUIRE {prefix} {round}-{serial} 1000 {ttl}");
            assert_eq!(client.int(&acquire), 1);
        }
        let line = format!("{tag}.line");
        assert_eq!(client.int(&format!("LIMITER.ACQUIRE {line} a 2 450")), 1);
        assert_eq!(client.int(&format!("LIMITER.ACQUIRE {line} b 2 450")), 1);
        let wait = |node: &Server, key: &str| {
            node.waiter(&format!("LIMITER.BACQUIRE {line} {key} 2 450 0"))
        };
        let waiters: Vec<_> =
            (0..5).map(|serial| wait(&cluster.nodes[dead], &serial.to_string())).collect();
        assert_eq!(client.int("WAIT 1 5000"), 1, "it is replicated");
        let contents = cluster.nodes[dead].contents();

        match loss {
            Loss::Crash => cluster.nodes[dead].kill(),
            Loss::Standstill => cluster.nodes[dead].signal(Signal::Freeze),
        }
        wait_until("the replica has taken over", || cluster.is_master(heir));
        assert_eq!(cluster.nodes[heir].contents(), contents, "all that was replicated is there");

        // It goes on: holders hold on, and a line forms anew, which a lapse and a release move.
        let mut client = cluster.nodes[heir].client();
        wait_until("it serves", || is_up(&mut client));
        assert_eq!(client.int(&format!("LIMITER.RENEW {line} a 450")), 1);
        let mut by_lapse = wait(&cluster.nodes[heir], "0");
        let mut by_release = wait(&cluster.nodes[heir], "1");
        assert_eq!(client.int(&format!("LIMITER.RENEW {line} b 0.05")), 1);
        assert_eq!(by_lapse.receive(), ONE);
        assert_eq!(client.int(&format!("LIMITER.RELEASE {line} a")), 1);
        assert_eq!(by_release.receive(), ONE);
        let held: i64 = (0..5).map(|n| client.int(&format!("LIMITER.COUNT {tag}.{n}"))).sum();
        assert_eq!(held, i64::from(leases));

        match loss {
            Loss::Crash => {
                for mut waiter in waiters {
                    assert!(waiter.try_receive().is_err(), "its connection breaks");
                }
                cluster.nodes[dead].restart();
            }
            Loss::Standstill => {
                cluster.nodes[dead].signal(Signal::Thaw);
                wait_until("it knows", || !cluster.is_master(dead));
                for waiter in waiters {
                    let (prefix, slot) = (line.clone(), slot_of(&line));
                    Line { prefix, slot, waiter }.check_let_go("after a standstill");
                }
            }
        }
        cluster.settle();
        assert_eq!(cluster.replica_of(heir), dead, "it comes back as a replica");
        cluster.check_replicas();
        client.call("FLUSHALL");
        println!("{leases} leases were there after the loss of node {dead}: {loss:?}");
    }
    assert!(cluster.nodes.iter_mut().all(Server::is_running));
}

#[test]
fn while_the_cluster_is_down_nobody_waits_and_nothing_is_granted() {
    let mut cluster = Cluster::start(1, &["--cluster-node-timeout", "1000"]);
    let masters = cluster.masters();
    let (dead, here) = (masters[0], masters[1]);
    let heir = cluster.replica_of(dead);
    let (on_dead, on_here) = (tag_on(&cluster, dead), tag_on(&cluster, here));
    let lease = format!("LIMITER.ACQUIRE {on_dead}.line a 1 450");
    let mut client = cluster.nodes[dead].client();
    assert_eq!(client.int(&lease), 1);
    assert_eq!(client.int("WAIT 1 5000"), 1);
    let mut line = Line::on(&cluster.nodes[here], &on_here);
    let second = format!("LIMITER.BACQUIRE {} c 1 450 0", line.prefix);
    let mut second = cluster.nodes[here].waiter(&second);

    cluster.nodes[heir].signal(Signal::Freeze);
    cluster.nodes[dead].kill();
    let mut client = cluster.nodes[here].client();
    let killed = Instant::now();
    wait_until("the cluster is down", || !is_up(&mut client));
    line.check_let_go("while the cluster is down");
    assert!(is_let_go(&error_text(&second.receive())));
    println!("let go {:?} after the crash", killed.elapsed());
    for command in
        ["ACQUIRE p a 1 450", "BACQUIRE p a 1 450 0", "RELEASE p a", "RENEW p a 450", "COUNT p"]
    {
        let command = format!("LIMITER.{}", command.replace(" p", &format!(" {}", line.prefix)));
        assert!(client.error(&command).starts_with("CLUSTERDOWN"), "{command}");
    }

    cluster.nodes[heir].signal(Signal::Thaw);
    wait_until("the replica has taken over", || cluster.is_master(heir));
    wait_until("the cluster is up", || is_up(&mut client));
    assert_eq!(client.strings(&format!("ZRANGE {} 0 -1", line.prefix)), ["a"]);
    line.waiter =
        cluster.nodes[here].waiter(&format!("LIMITER.BACQUIRE {} b 1 450 0", line.prefix));
    assert_eq!(client.int(&format!("LIMITER.RELEASE {} a", line.prefix)), 1);
    assert_eq!(line.waiter.receive(), ONE);
    let mut on_heir = cluster.nodes[heir].client();
    wait_until("it serves", || is_up(&mut on_heir));
    assert_eq!(on_heir.int(&format!("LIMITER.RELEASE {on_dead}.line a")), 1);
    cluster.nodes[dead].restart();
    cluster.settle();
    cluster.check_replicas();
    assert!(cluster.nodes.iter_mut().all(Server::is_running));
}
