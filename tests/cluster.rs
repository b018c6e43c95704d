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
use harness::{error_text, wait_until, Client, Server, Signal};
use redis::Value;

const ONE: Value = Value::Int(1);

/// How soon a waiter is let go after its slot went elsewhere.
const LET_GO: Duration = Duration::from_secs(1);

/// What the server's whole milliseconds may take off the end of a lease.
const MILLISECOND: Duration = Duration::from_millis(1);

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
                flags: fields[2].replace("myself,", ""),
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
            let connect = || Client::connect(port, harness::DEADLINE).expect("a connection");
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
                "TRYAGAIN" | "CLUSTERDOWN" | "UNBLOCKED" => thread::sleep(MILLISECOND),
                _ => panic!("{args:?}: {error}"),
            }
            assert!(waits || started.elapsed() < harness::DEADLINE, "{args:?}: {error}");
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
    let mut tags = slots.step_by(100).map(|slot| tag_in(slot..slot + 100));

    // The limiter is gone from here, one way or another, while the slot is still being moved: who
    // asks for it now is sent to the new owner, and so is the waiter.
    let ends: [(&str, fn(&Cluster, &Line, usize, usize)); 5] = [
        ("migrated", |cluster, line, from, to| cluster.migrate_keys(line.slot, from, to)),
        ("released", |cluster, line, from, _| {
            let release = format!("LIMITER.RELEASE {} a", line.prefix);
            assert_eq!(cluster.nodes[from].client().int(&release), 1);
        }),
        ("deleted", |cluster, line, from, _| {
            assert_eq!(cluster.nodes[from].client().int(&format!("DEL {}", line.prefix)), 1);
        }),
        ("expired", |cluster, line, from, _| {
            let expire = format!("PEXPIRE {} 50", line.prefix);
            assert_eq!(cluster.nodes[from].client().int(&expire), 1);
        }),
        ("deleted and released in a transaction", |cluster, line, from, _| {
            let mut client = cluster.nodes[from].client();
            for command in ["MULTI", "DEL p", "LIMITER.RELEASE p a", "EXEC"] {
                client.call(&command.replace('p', &line.prefix));
            }
        }),
    ];
    for (what, end) in ends {
        let mut line = Line::on(old, &tags.next().unwrap());
        cluster.move_slot(line.slot, from, to, || {
            assert!(!line.waiter.has_reply(), "{what}: nothing has happened yet");
            end(&cluster, &line, from, to);
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
    let mut second = old.waiter(&format!("LIMITER.BACQUIRE {} c 1 450 0", line.prefix));
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
