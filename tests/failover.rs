//! What becomes of leases and lines when the master goes: killed, frozen, or cut off from its
//! replicas, with sentinels that promote another, or by hand.
//!
//! What always holds:
//!
//! - No wait hangs and no server dies. A waiter whose master is gone gets -UNBLOCKED or a broken
//!   connection, and lines up again at the new one.
//! - A lease that WAIT confirmed is on the promoted replica, with its score, however it was
//!   granted. One that it did not confirm may be lost, and then somebody else is let in.
//! - Whoever comes back as a replica drops its lines, and ends up with the new master's contents.
//! - A master whose server refuses writes (min-replicas-to-write, a failed BGSAVE) hands no slot
//!   over, whatever freed it; time-outs end on time, and the line moves on when it writes again.

mod harness;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use harness::{error_text, slowness, string, strings, wait_until, Client, Server, Signal};
use redis::Value;

const ONE: Value = Value::Int(1);

/// How many replicas of this server are online.
fn replicas_online(server: &Server) -> usize {
    let info = server.client().text("INFO replication");
    info.lines().filter(|line| line.starts_with("slave") && line.contains("state=online")).count()
}

/// A master and a replica, both with the module.
fn pair() -> (Server, Server) {
    let master = Server::start();
    let replica = Server::start_with(&["--replicaof", "127.0.0.1", &master.port.to_string()]);
    wait_until("the replica is online", || replicas_online(&master) == 1);
    (master, replica)
}

/// From now on nothing reaches the replica.
fn cut_off(replica: &Server, master: &Server) {
    replica.signal(Signal::Freeze); // So that it does not come back by itself.
    assert_eq!(master.client().int("CLIENT KILL TYPE replica"), 1);
    wait_until("the link is cut", || replicas_online(master) == 0);
}

/// The master dies, and the replica takes its place.
fn promote(replica: &Server, master: &mut Server) {
    master.kill();
    replica.signal(Signal::Thaw);
    assert_eq!(replica.client().call("REPLICAOF NO ONE"), Value::Okay);
}

#[test]
fn leases_not_replicated_are_forgotten_and_as_many_newcomers_let_in_beside_their_holders() {
    const LIMIT: usize = 4;
    for replicated in [0, 1, LIMIT] {
        let (mut master, replica) = pair();
        let mut client = master.client();
        for holder in 0..LIMIT {
            if holder == replicated {
                cut_off(&replica, &master);
            }
            assert_eq!(client.int(&format!("LIMITER.ACQUIRE p old-{holder} {LIMIT} 450")), 1);
            // It is 0 that tells a holder that its lease may be forgotten.
            let followed = i64::from(holder < replicated);
            let patience_ms = if holder < replicated { 0 } else { 50 };
            assert_eq!(client.int(&format!("WAIT 1 {patience_ms}")), followed);
        }
        assert_eq!(client.int(&format!("LIMITER.ACQUIRE p late {LIMIT} 450")), 0);
        promote(&replica, &mut master);

        let mut client = replica.client();
        assert_eq!(client.int("LIMITER.COUNT p"), replicated as i64);
        let let_in = (0..2 * LIMIT)
            .filter(|new| client.int(&format!("LIMITER.ACQUIRE p new-{new} {LIMIT} 450")) == 1)
            .count();
        assert_eq!(let_in, LIMIT - replicated, "beside as many that were told 1");
        // Who was forgotten learns it from its next heartbeat.
        for holder in 0..LIMIT {
            let renewed = client.int(&format!("LIMITER.RENEW p old-{holder} 450"));
            assert_eq!(renewed, i64::from(holder < replicated));
        }
    }
}

/// How a slot comes to its next holder.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Acquire,
    Bacquire,
    Release,
    Lapse,
    Close,
    Del,
}

/// Lets `key` have a slot of `p` in this way, after `fault`.
fn granted(way: Way, server: &Server, fault: impl FnOnce()) -> Client {
    let mut other = server.client();
    let mut line = || {
        let option = if way == Way::Close { "EPHEMERAL" } else { "" };
        assert_eq!(other.int(&format!("LIMITER.ACQUIRE p other 1 450 {option}")), 1);
        server.waiter("LIMITER.BACQUIRE p key 1 450 0")
    };
    let mut client = match way {
        Way::Acquire | Way::Bacquire => server.client(),
        _ => line(),
    };
    assert_eq!(other.int("WAIT 1 0"), 1);
    fault();
    match way {
        Way::Acquire => client.send_raw(b"LIMITER.ACQUIRE p key 1 450\r\n"),
        Way::Bacquire => client.send_raw(b"LIMITER.BACQUIRE p key 1 450 0\r\n"),
        Way::Release => assert_eq!(other.int("LIMITER.RELEASE p other"), 1),
        Way::Lapse => assert_eq!(other.int("LIMITER.RENEW p other 0.05"), 1),
        Way::Close => other.close(),
        Way::Del => assert_eq!(other.int("DEL p"), 1),
    }
    assert_eq!(client.receive(), ONE, "{way:?}");
    client
}

#[test]
fn a_lease_that_wait_confirms_survives_promotion_however_it_was_granted() {
    for way in [Way::Acquire, Way::Bacquire, Way::Release, Way::Lapse, Way::Close, Way::Del] {
        for follows in [true, false] {
            let (mut master, replica) = pair();
            let cut = || {
                if !follows {
                    cut_off(&replica, &master)
                }
            };
            let mut client = granted(way, &master, cut);
            // It counts who has what the grant wrote, not what BACQUIRE did.
            let patience_ms = if follows { 0 } else { 50 };
            let confirmed = client.int(&format!("WAIT 1 {patience_ms}"));
            assert_eq!(confirmed, i64::from(follows), "{way:?}");
            let lease = client.members("p");
            promote(&replica, &mut master);
            assert_eq!(replica.client().members("p") == lease, follows, "{way:?}");
        }
    }
}

/// Why a server takes no writes.
#[derive(Clone, Copy, PartialEq)]
enum Refusal {
    ReplicaKilled,
    ReplicaFrozen,
    BgsaveFailed,
}

impl Refusal {
    /// Begins in the same moment in which `change` is made.
    fn begin(self, change: &str, server: &Server, replica: &mut Server) {
        let mut client = server.client();
        let refuse = if self == Self::BgsaveFailed {
            fs::create_dir(server.path("dump.rdb")).expect("a folder in the file's place");
            client.call("CONFIG SET stop-writes-on-bgsave-error no");
            client.run(&["CONFIG", "SET", "save", "3600 1"]);
            wait_until("it has failed", || {
                client.call("BGSAVE"); // Refused while another runs, for the replica.
                client.info("persistence", "rdb_last_bgsave_status") == "err"
            });
            "CONFIG SET stop-writes-on-bgsave-error yes"
        } else {
            "CONFIG SET min-replicas-to-write 2"
        };
        client.call("MULTI");
        client.call(change);
        client.call(refuse);
        assert_eq!(client.call("EXEC"), Value::Array(vec![ONE, Value::Okay]));
        match self {
            Self::ReplicaKilled => replica.kill(),
            Self::ReplicaFrozen => {
                replica.signal(Signal::Freeze);
                client.call("CONFIG SET min-replicas-max-lag 1");
            }
            Self::BgsaveFailed => return,
        }
        wait_until("the replica is missed", || {
            client.info("replication", "min_slaves_good_slaves") == "0"
        });
        client.call("CONFIG SET min-replicas-to-write 1");
    }

    fn end(self, server: &Server, replica: &mut Server) {
        match self {
            Self::ReplicaKilled => replica.restart(),
            Self::ReplicaFrozen => replica.signal(Signal::Thaw),
            Self::BgsaveFailed => {
                fs::remove_dir(server.path("dump.rdb")).expect("to remove it");
                let mut client = server.client();
                wait_until("it saves", || matches!(client.call("BGSAVE"), Value::SimpleString(_)));
            }
        }
    }
}

/// Three slots come free while the server refuses writes with `error`, each in its own way.
fn no_slot_is_handed_over_during(refusal: Refusal, error: &str, timeout: Duration) {
    let timeout = timeout * slowness();
    let (server, mut replica) = pair();
    let mut client = server.client();
    let mut owner = server.client();
    client.int("LIMITER.ACQUIRE deleted other 1 450");
    owner.int("LIMITER.ACQUIRE closed other 1 450 EPHEMERAL");
    client.int("LIMITER.ACQUIRE lapsed other 1 1");
    let mut waiters = ["deleted", "closed", "lapsed"]
        .map(|prefix| (prefix, server.waiter(&format!("LIMITER.BACQUIRE {prefix} next 1 450 0"))));
    let queued = Instant::now();
    let seconds = timeout.as_secs_f64();
    let mut impatient = server.waiter(&format!("LIMITER.BACQUIRE lapsed late 1 450 {seconds}"));

    refusal.begin("DEL deleted", &server, &mut replica);
    let connected = client.info("clients", "connected_clients");
    owner.close();
    wait_until("it is closed", || client.info("clients", "connected_clients") != connected);
    for command in ["ACQUIRE new x 1 450", "BACQUIRE new x 1 450 0", "RENEW closed other 450"] {
        let refused = client.error(&format!("LIMITER.{command}"));
        assert!(refused.starts_with(error), "{command}: {refused}");
    }

    // The pump goes on: who waits no longer is told so, behind a slot that has been free for long.
    assert!(!impatient.has_reply(), "the refusal came too late to tell");
    assert_eq!(impatient.receive(), Value::Int(0));
    let late = queued.elapsed().as_secs_f64() - seconds;
    let allowed = -0.001..0.5 * f64::from(slowness()); // The server counts whole milliseconds.
    assert!(allowed.contains(&late), "{late} s late");
    assert_eq!(client.int("LIMITER.COUNT lapsed"), 0);
    for (prefix, waiter) in &mut waiters {
        assert!(!waiter.has_reply(), "{prefix}: a slot was handed over");
        let held: &[&str] = if *prefix == "deleted" { &[] } else { &["other"] };
        assert_eq!(client.strings(&format!("ZRANGE {prefix} 0 -1")), held, "{prefix}");
    }

    refusal.end(&server, &mut replica);
    for (prefix, waiter) in &mut waiters {
        assert_eq!(waiter.receive(), ONE, "{prefix}");
        assert_eq!(client.strings(&format!("ZRANGE {prefix} 0 -1")), ["next"], "{prefix}");
    }
    wait_until("the replica agrees", || replica.contents() == server.contents());
}

#[test]
fn no_slot_is_handed_over_while_the_replica_is_dead() {
    let timeout = Duration::from_millis(1300);
    no_slot_is_handed_over_during(Refusal::ReplicaKilled, "NOREPLICAS", timeout);
}

#[test]
fn no_slot_is_handed_over_while_the_replica_stands_still() {
    // A lag is counted in seconds.
    let timeout = Duration::from_millis(5000);
    no_slot_is_handed_over_during(Refusal::ReplicaFrozen, "NOREPLICAS", timeout);
}

#[test]
fn no_slot_is_handed_over_while_the_server_cannot_save() {
    let timeout = Duration::from_millis(1300);
    no_slot_is_handed_over_during(Refusal::BgsaveFailed, "MISCONF", timeout);
}

/// A master, two replicas, all with the module, and three sentinels that watch them.
struct House {
    servers: Vec<Server>,
    sentinels: Vec<Server>,
}

/// Which server the sentinel on this port holds for the master, by its port.
fn master_by(sentinel: u16) -> Option<u16> {
    let mut client = Client::connect(sentinel, PATIENCE).ok()?;
    let address = client.try_run(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", "m"]).ok()?;
    strings(&address)[1].parse().ok()
}

impl House {
    fn open() -> Self {
        let start =
            |options: &[&str]| Server::start_with(&[&["--appendonly", "yes"], options].concat());
        let master = start(&[]);
        let port = master.port.to_string();
        let mut servers = vec![master];
        servers.extend([(); 2].map(|()| start(&["--replicaof", "127.0.0.1", &port])));
        let rules = format!(
            "sentinel monitor m 127.0.0.1 {port} 2\n\
             sentinel down-after-milliseconds m 2000\n\
             sentinel failover-timeout m 2000\n\
             sentinel parallel-syncs m 2\n"
        );
        let sentinels = Vec::from([(); 3].map(|()| Server::start_sentinel(&rules)));
        for sentinel in &sentinels {
            // They look more often than by default, and trust their clocks again sooner. A replica
            // is not promoted if the last INFO, one a second, is older than five pings.
            for period in
                ["PING-PERIOD 300", "INFO-PERIOD 300", "PUBLISH-PERIOD 200", "TILT-PERIOD 1000"]
            {
                sentinel.client().call(&format!("SENTINEL DEBUG {period}"));
            }
        }
        Self { servers, sentinels }
    }

    /// The server that all sentinels hold for the master, if they agree.
    fn master(&self) -> Option<usize> {
        let port = master_by(self.sentinels[0].port)?;
        let agreed = self.sentinels.iter().all(|sentinel| master_by(sentinel.port) == Some(port));
        self.servers.iter().position(|server| agreed && server.port == port)
    }

    fn sentinel_ports(&self) -> Vec<u16> {
        self.sentinels.iter().map(|sentinel| sentinel.port).collect()
    }

    /// Waits until there is one master that both others follow, and the sentinels have seen it.
    fn wait_until_whole(&self) {
        wait_until("the others follow", || {
            let Some(master) = self.master() else { return false };
            let port = self.servers[master].port.to_string();
            let follow = |server: &Server| {
                // Whoever is turned into a replica by a sentinel loses all connections.
                let mut client = server.client();
                let Ok(info) = client.try_run(&["INFO", "replication"]) else { return false };
                let info = string(&info);
                let has = |line: &str| info.lines().any(|other| other == line);
                server.port.to_string() == port
                    || has(&format!("master_port:{port}")) && has("master_link_status:up")
            };
            self.servers.iter().all(follow) && replicas_online(&self.servers[master]) == 2
        });
        wait_until("the sentinels have seen it", || {
            self.sentinels.iter().all(|sentinel| {
                let mut client = sentinel.client();
                let master = client.strings("SENTINEL MASTER m");
                let port = field(&master, "port");
                let Value::Array(replicas) = client.call("SENTINEL REPLICAS m") else {
                    panic!("no replicas")
                };
                field(&master, "flags") == "master"
                    && field(&master, "num-other-sentinels") == "2"
                    && replicas.len() == 2
                    && replicas.iter().map(strings).all(|replica| {
                        field(&replica, "flags") == "slave"
                            && field(&replica, "master-link-status") == "ok"
                            && field(&replica, "master-port") == port
                    })
            })
        });
    }

    fn check_nothing_died(&mut self) {
        for server in self.servers.iter_mut().chain(&mut self.sentinels) {
            assert!(server.is_running());
            let log = server.log();
            assert!(!log.contains("BUG REPORT") && !log.contains("panic"), "{log}");
        }
    }
}

/// A field of a sentinel's reply.
fn field<'f>(flat: &'f [String], name: &str) -> &'f str {
    flat.chunks(2).find(|pair| pair[0] == name).map_or("", |pair| &pair[1])
}

/// How long a client of the load waits for a reply before it asks for the master again.
const PATIENCE: Duration = Duration::from_millis(800);

/// How long it rests between two steps, so that the sentinels get the processor, too.
const PACE: Duration = Duration::from_millis(1);

const WORKERS: usize = 4;

/// What the load was told.
#[derive(Default)]
struct Told {
    /// Leases of `stock` that a replica was said to have, with their scores.
    confirmed: HashMap<String, String>,
    /// Keys whose release a replica was said to have.
    released: HashSet<String>,
    /// Leases that were acknowledged and not confirmed, or a command on them not answered.
    unsure: HashSet<String>,
    /// Confirmed leases that a server did not know.
    lost: Vec<String>,
    /// How often a slot of `busy` was had, mostly by waiting for it.
    passed: usize,
    /// How often an error or a broken connection ended a command.
    let_go: usize,
}

/// A client that asks a sentinel for the master and works there until that fails.
struct Worker<'w> {
    name: String,
    sentinels: Vec<u16>,
    rng: Rng,
    told: Told,
    /// How many leases were confirmed.
    progress: &'w AtomicUsize,
}

impl Worker<'_> {
    fn run(mut self, over: &AtomicBool) -> Told {
        let mut serial = 0;
        while !over.load(Ordering::Relaxed) {
            let sentinel = self.sentinels[self.rng.usize(0..self.sentinels.len())];
            let master = master_by(sentinel);
            let Some(mut client) = master.and_then(|port| Client::connect(port, PATIENCE).ok())
            else {
                thread::yield_now();
                continue;
            };
            while !over.load(Ordering::Relaxed) {
                serial += 1;
                thread::sleep(PACE);
                let key = format!("{}-{serial}", self.name);
                if self.one_step(&mut client, &key).is_none() {
                    self.told.let_go += 1;
                    break;
                }
            }
        }
        self.told
    }

    /// `None` if the master is gone.
    fn one_step(&mut self, client: &mut Client, new: &str) -> Option<()> {
        let known = self.told.confirmed.keys().nth(self.rng.usize(0..20)).cloned();
        match (self.rng.u8(0..10), known) {
            (0, Some(key)) => {
                self.doubt(&key);
                match ask(client, &format!("LIMITER.RELEASE stock {key}"))? {
                    ONE => {}
                    _ => self.told.lost.push(key.clone()),
                }
                if self.is_confirmed(client)? {
                    self.told.unsure.remove(&key);
                    self.told.released.insert(key);
                }
            }
            (1, Some(key)) => {
                self.doubt(&key);
                match ask(client, &format!("LIMITER.RENEW stock {key} 600"))? {
                    ONE => self.confirm(client, key)?,
                    _ => self.told.lost.push(key),
                }
            }
            (2 | 3, _) => {
                // Its short ttl gives a slot back that a failover has stranded.
                if ask(client, &format!("LIMITER.BACQUIRE busy {new} 1 1 0.3"))? == ONE {
                    self.told.passed += 1;
                    ask(client, &format!("LIMITER.RELEASE busy {new}"))?;
                }
            }
            _ => {
                self.told.unsure.insert(new.into());
                if ask(client, &format!("LIMITER.ACQUIRE stock {new} 1000000 450"))? == ONE {
                    self.confirm(client, new.into())?;
                }
            }
        }
        Some(())
    }

    fn doubt(&mut self, key: &str) {
        self.told.confirmed.remove(key);
        self.told.unsure.insert(key.into());
    }

    fn confirm(&mut self, client: &mut Client, key: String) -> Option<()> {
        let score = string(&ask(client, &format!("ZSCORE stock {key}"))?);
        if self.is_confirmed(client)? {
            self.told.unsure.remove(&key);
            self.told.confirmed.insert(key, score);
            self.progress.fetch_add(1, Ordering::Relaxed);
        }
        Some(())
    }

    /// Whether one or two replicas have what this client wrote.
    fn is_confirmed(&mut self, client: &mut Client) -> Option<bool> {
        let wanted = self.rng.i64(1..=2);
        match ask(client, &format!("WAIT {wanted} 100"))? {
            Value::Int(replicas) => Some(replicas >= wanted),
            other => panic!("WAIT: {other:?}"),
        }
    }
}

/// A reply, or `None` if there is no master (any more).
fn ask(client: &mut Client, command: &str) -> Option<Value> {
    let reply = client.try_run(&command.split_whitespace().collect::<Vec<_>>()).ok()?;
    if !matches!(reply, Value::ServerError(_)) {
        return Some(reply);
    }
    let error = error_text(&reply);
    let let_go = ["UNBLOCKED", "READONLY", "LOADING", "ERR WAIT cannot be used with replica"];
    assert!(let_go.iter().any(|start| error.starts_with(start)), "{command}: {error}");
    None
}

/// Ends the load, also when the test fails in its middle.
struct EndOfLoad<'l>(&'l AtomicBool);

impl Drop for EndOfLoad<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How a wait ended when the master went.
#[derive(Debug, PartialEq)]
enum Ended {
    Granted,
    Unblocked,
    Broken,
}

fn ended(waiter: &mut Client) -> Ended {
    match waiter.try_receive() {
        Ok(ONE) => Ended::Granted,
        Ok(reply) => {
            let error = error_text(&reply);
            assert!(error.starts_with("UNBLOCKED"), "{error}");
            Ended::Unblocked
        }
        Err(error) => {
            assert!(!error.is_timeout(), "the waiter hangs");
            Ended::Broken
        }
    }
}

/// What happens to the master.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Kill,
    Freeze,
}

/// One fault under load, from a house that is whole to one that is whole again.
fn failover(house: &mut House, fault: Fault, round: usize, seed: u64, known: &mut Told) {
    let mut rng = Rng::with_seed(seed);
    let old = house.master().expect("a master");
    let over = AtomicBool::new(false);
    let progress: [AtomicUsize; WORKERS] = Default::default();
    let wait_for_progress = |steps: usize| {
        let goals = progress.each_ref().map(|done| done.load(Ordering::Relaxed) + steps);
        wait_until("everybody gets on", || {
            progress.iter().zip(goals).all(|(done, goal)| done.load(Ordering::Relaxed) >= goal)
        });
    };

    // A line, and one whose slot lapses at a time that may fall into anything.
    let line: Vec<String> = (0..rng.usize(2..6))
        .map(|at| {
            let option = if rng.bool() { "EPHEMERAL" } else { "" };
            format!("LIMITER.BACQUIRE line-{round} waiter-{at} 1 450 0 {option}")
        })
        .collect();
    let mut owner = house.servers[old].client();
    let ephemeral = format!("ephemeral-{round}");
    let lapse = rng.f64() * 4.0 + 0.5;
    owner.int(&format!("LIMITER.ACQUIRE line-{round} holder 1 450"));
    owner.int(&format!("LIMITER.ACQUIRE stock {ephemeral} 1000000 450 EPHEMERAL"));
    owner.int(&format!("LIMITER.ACQUIRE lapses-{round} holder 1 450"));
    assert_eq!(owner.int("WAIT 2 0"), 2);
    known.confirmed.insert(ephemeral.clone(), owner.text(&format!("ZSCORE stock {ephemeral}")));
    let stand = |server: &Server| line.iter().map(|wait| server.waiter(wait)).collect::<Vec<_>>();
    let mut waiters = stand(&house.servers[old]);
    let mut eager =
        house.servers[old].waiter(&format!("LIMITER.BACQUIRE lapses-{round} eager 1 450 0"));
    // What is short begins last, so that a slow machine sees it begin.
    assert_eq!(owner.int(&format!("LIMITER.RENEW lapses-{round} holder {lapse:.3}")), 1);
    assert_eq!(owner.int("WAIT 2 0"), 2);

    thread::scope(|scope| {
        let _end = EndOfLoad(&over);
        let workers: [_; WORKERS] = std::array::from_fn(|at| {
            let worker = Worker {
                name: format!("{round}-{at}"),
                sentinels: house.sentinel_ports(),
                rng: rng.fork(),
                told: Told::default(),
                progress: &progress[at],
            };
            let over = &over;
            scope.spawn(move || worker.run(over))
        });
        wait_for_progress(rng.usize(5..40));
        let since = Instant::now();
        match fault {
            Fault::Kill => house.servers[old].kill(),
            Fault::Freeze => house.servers[old].signal(Signal::Freeze),
        }
        wait_until("the sentinels have another master", || {
            house.master().is_some_and(|master| master != old)
        });
        let promoted_after = since.elapsed();
        let new = house.master().expect("a master");
        let mut client = house.servers[new].client();
        assert_eq!(client.info("replication", "role"), "master");

        // The new master goes on with what was confirmed, and with lines of its own.
        assert_eq!(client.text(&format!("ZSCORE stock {ephemeral}")), known.confirmed[&ephemeral]);
        assert_eq!(client.int(&format!("LIMITER.ACQUIRE line-{round} newcomer 1 450")), 0);
        let mut again = stand(&house.servers[new]);
        let mut holder = "holder".to_string();
        for (at, waiter) in again.iter_mut().enumerate() {
            assert_eq!(client.int(&format!("LIMITER.RELEASE line-{round} {holder}")), 1);
            assert_eq!(waiter.receive(), ONE);
            holder = format!("waiter-{at}");
        }
        assert_eq!(client.int(&format!("LIMITER.RELEASE line-{round} {holder}")), 1);
        wait_for_progress(5);

        // The old one comes back, and believes to be the master until the sentinels tell it: it
        // may even hand over a slot.
        let granted_before = eager.has_reply();
        match fault {
            Fault::Kill => house.servers[old].restart(),
            Fault::Freeze => house.servers[old].signal(Signal::Thaw),
        }
        let ends: Vec<Ended> = waiters.iter_mut().map(ended).collect();
        assert!(!ends.contains(&Ended::Granted), "the lease of the holder goes on");
        let eager_end = ended(&mut eager);
        let granted_late = eager_end == Ended::Granted && !granted_before;
        house.wait_until_whole();
        wait_for_progress(5);
        over.store(true, Ordering::Relaxed);
        let before = known.confirmed.len();
        for worker in workers {
            let told = worker.join().expect("a worker");
            known.confirmed.extend(told.confirmed);
            known.released.extend(told.released);
            known.unsure.extend(told.unsure);
            known.lost.extend(told.lost);
            known.let_go += told.let_go;
            known.passed += told.passed;
        }
        println!(
            "{fault:?} SEED={seed}: promoted after {promoted_after:?}, {} more leases confirmed, \
             waiters {ends:?}, behind a lapse {eager_end:?}{}",
            known.confirmed.len() - before,
            if granted_late { " by the old master" } else { "" },
        );
    });

    let new = house.master().expect("a master");
    let contents = house.servers[new].contents();
    for server in &house.servers {
        wait_until("all that waited has left", || server.blocked() == 0);
        wait_until("the contents are the same", || server.contents() == contents);
    }
    let stock: HashMap<_, _> = {
        let flat = house.servers[new].client().strings("ZRANGE stock 0 -1 WITHSCORES");
        flat.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect()
    };
    for (key, score) in &known.confirmed {
        assert_eq!(stock.get(key), Some(score), "{key}");
    }
    assert!(known.lost.is_empty(), "{:?}", known.lost);
    assert!(known.released.iter().all(|key| !stock.contains_key(key)), "a lease came back");
    house.check_nothing_died();
}

/// Three of them in a row, in one house.
fn failovers(fault: Fault) {
    let seed = std::env::var("SEED")
        .map_or_else(|_| fastrand::u64(..), |seed| seed.parse().expect("SEED is a number"));
    let mut house = House::open();
    house.wait_until_whole();
    let mut known = Told::default();
    for round in 0..3 {
        failover(&mut house, fault, round, seed.wrapping_add(round as u64), &mut known);
    }
    println!(
        "{} leases confirmed and there, {} released, {} unsure, {} times through the line, {} commands let go",
        known.confirmed.len(),
        known.released.len(),
        known.unsure.len(),
        known.passed,
        known.let_go
    );
    for server in &house.servers {
        wait_until("nothing is pending", || {
            server.client().call("MODULE UNLOAD limiter") == Value::Okay
        });
    }
}

#[test]
fn sentinels_replace_a_killed_master_and_it_comes_back_as_a_replica() {
    failovers(Fault::Kill);
}

#[test]
fn sentinels_replace_a_frozen_master_and_thawed_it_lets_its_line_go() {
    failovers(Fault::Freeze);
}
