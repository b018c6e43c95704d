//! Clients use limiters all at once, in good and bad times, and write down what they saw; then a
//! checker looks for an order of their operations, each at one moment between its request and its
//! reply, in which one limiter after the other would have replied just that. If there is none, the
//! history is printed up to the first reply that cannot be explained.
//!
//! - `limiter.rs` is the specification, with time and the line; `times.rs` what it knows of times;
//!   `history.rs` what is checked and how it is written; `examples.rs` histories made by hand, right
//!   and wrong ones, which the checker must tell apart; `storm.rs` the clients.
//! - The search is that of the crate `todc-utils` (Wing and Gong's, with Lowe's memory of what was
//!   tried). It is one author's work and rests since 2023; but it is 60 lines that do just this, it
//!   has no dependencies, and `examples.rs` tests it here. It knows neither time, nor waits, nor
//!   what nobody saw: all that is in the state of our specification. `stateright` brings 40 crates,
//!   and its checker does not remember what it tried; Porcupine needs Go, Knossos and Elle a JVM.
//! - A search that takes too long is given up and counted as undecided. It happens where a server
//!   stood still and everything under way overlaps.
//! - Of the server it is assumed that its clock is this machine's, in whole milliseconds; no other
//!   tolerance is given. Beside replies, two things are taken as seen: a client that CLIENT LIST
//!   shows as blocked is in line, unless the server was paused; and a connection that a client
//!   closed is closed for the server, and out of the line, once CLIENT LIST does not show it.
//! - What is not checked here: that a waiter is served soon though nobody else comes
//!   (`tests/stress.rs` does that), or loses a lease again whose reply it did not wait for; EPHEMERAL;
//!   several limiters at once; that a clock is set.
//!
//! What asynchronous replication loses is not hidden: without WAIT, histories through a failover may
//! be impossible for one limiter, and each must become possible when the old master's last replies
//! are forgotten, from some moment on. With WAIT none may. WAIT asks for what the connection has
//! written itself, and a denial or a look writes nothing: to be sure of those, the clients write
//! something of their own before it. (A replica whose link is cut is missed without that, too; one
//! that is connected and slow might not be.)
//!
//! `HISTORIES` sets how many there are of each kind, `SEED` repeats the choices of a run, though
//! not what the machine makes of them. `make histories` is the long run.

mod examples;
#[path = "../harness/mod.rs"]
mod harness;
mod history;
mod limiter;
mod storm;
mod times;

use std::sync::atomic::Ordering;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use fastrand::Rng;
use harness::{wait_until, Server, Signal, AOF};
use history::{check, lost, shortest_wrong, text, Call, Operation, Reply, Verdict};
use storm::{now_us, Habits, Storm, LIMITERS};

const USUAL: Habits = Habits {
    clients: 1..11,
    ttl_ms: 3..60,
    timeout_ms: 3..80,
    reads: true,
    give_up: false,
    wait_for_replica: false,
};

/// Leases that last through a restart, or a failover. Where a reply takes long, because the disk or
/// a replica is asked, more clients would be under way at once than a checker can put in order.
const PATIENT: Habits = Habits { clients: 4..8, ttl_ms: 20..400, timeout_ms: 10..200, ..USUAL };

fn seeded() -> Rng {
    let seed =
        std::env::var("SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    println!("SEED={seed}");
    Rng::with_seed(seed)
}

/// How many histories of a kind there are to be.
fn histories() -> usize {
    std::env::var("HISTORIES").map_or(20, |number| number.parse().unwrap())
}

/// Checks the histories, tells the figures, and returns those that no limiter can have had. All
/// is over by now: a machine that checks meanwhile would see replies late, and learn less of them.
fn wrong(kind: &str, histories: Vec<Vec<Operation>>, faults: usize) -> Vec<Vec<Operation>> {
    let count = |is: &dyn Fn(&Operation) -> bool| {
        histories.iter().flatten().filter(|operation| is(operation)).count()
    };
    let waits_that_got = |reply| {
        let is_wait = |call: &Call| matches!(call, Call::Bacquire { .. });
        count(&|operation| is_wait(&operation.call) && operation.reply == reply)
    };
    let (granted, timed_out) = (waits_that_got(Reply::Number(1)), waits_that_got(Reply::Number(0)));
    let (number, operations) = (histories.len(), count(&|_| true));
    let unanswered = count(&|operation| operation.reply == Reply::Unknown);
    assert!(granted > number && timed_out > 0, "too little happened");

    let from = Instant::now();
    let (open, checked) = (Mutex::new(histories), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, Into::into) {
            scope.spawn(|| loop {
                let Some(history) = open.lock().unwrap().pop() else { break };
                let from = Instant::now();
                let verdict = check(&history);
                checked.lock().unwrap().push((from.elapsed(), verdict, history));
            });
        }
    });
    let checked = checked.into_inner().unwrap();
    let longest = checked.iter().map(|(took, ..)| *took).max().unwrap_or_default();
    let (wrong, rest): (Vec<_>, Vec<_>) =
        checked.into_iter().partition(|(_, verdict, _)| *verdict == Verdict::Wrong);
    let undecided = rest.iter().filter(|(_, verdict, _)| *verdict == Verdict::Undecided).count();
    println!(
        "{kind}: {number} histories, {operations} operations ({granted} waits granted, {timed_out} \
         timed out, {unanswered} not answered), {faults} faults, {} wrong, {undecided} undecided; \
         checked in {:.1} s, the longest in {:.2} s",
        wrong.len(),
        from.elapsed().as_secs_f64(),
        longest.as_secs_f64(),
    );
    assert!(undecided <= number / 2, "too little was found out");
    wrong.into_iter().map(|(.., history)| history).collect()
}

/// Fails if there is a history that no limiter can have had.
fn judge(kind: &str, histories: Vec<Vec<Operation>>, faults: usize) {
    if let Some(wrong) = wrong(kind, histories, faults).first() {
        panic!("no limiter replies like this:\n{}", text(&shortest_wrong(wrong)));
    }
}

#[test]
fn in_good_times() {
    let mut rng = seeded();
    let server = Server::start();
    let seen = Storm::new(server.port, USUAL).rage(histories(), &mut rng);
    judge("in good times", seen, 0);
}

/// Pauses and freezes the server, and kills connections, until the storm is over.
fn disturb(server: &Server, storm: &Storm, rng: &mut Rng) -> usize {
    let mut admin = server.client();
    let mut faults = 0;
    while !storm.over.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(rng.u64(2..30)));
        let lasts_ms = rng.u64(1..40);
        match rng.u8(0..6) {
            0 => {
                server.signal(Signal::Freeze);
                thread::sleep(Duration::from_millis(lasts_ms));
                server.signal(Signal::Thaw);
            }
            kind @ 1..3 => {
                let kind = ["ALL", "WRITE"][usize::from(kind) - 1];
                storm.pause(|| {
                    admin.call(&format!("CLIENT PAUSE {lasts_ms} {kind}"));
                    admin.call("SET over x"); // It is put off until then.
                });
            }
            _ => {
                let list = admin.text("CLIENT LIST TYPE normal");
                let id = |line: &str| line.strip_prefix("id=")?.split(' ').next()?.parse().ok();
                let ids: Vec<i64> = list.lines().filter_map(id).collect();
                let victim = rng.choice(ids).filter(|id| *id != admin.id());
                if let Some(id) = victim {
                    storm.strike(|| drop(admin.call(&format!("CLIENT KILL ID {id}"))));
                }
            }
        }
        faults += 1;
    }
    faults
}

#[test]
fn with_pauses_freezes_and_dying_clients() {
    let mut rng = seeded();
    let server = Server::start_with(&["--appendonly", "yes"]); // A pause is dangerous with it only.
    let storm = Storm::new(server.port, Habits { give_up: true, ..USUAL });
    let mut fault_rng = rng.fork();
    let (seen, faults) = thread::scope(|scope| {
        let faults = scope.spawn(|| disturb(&server, &storm, &mut fault_rng));
        (storm.rage(histories(), &mut rng), faults.join().unwrap())
    });
    judge("with pauses, freezes and dying clients", seen, faults);
}

#[test]
fn through_kill_9_with_appendfsync_always() {
    let mut rng = seeded();
    let mut server = Server::start_with(&AOF);
    let storm = Storm::new(server.port, PATIENT);
    let mut fault_rng = rng.fork();
    let (seen, faults) = thread::scope(|scope| {
        let faults = scope.spawn(|| {
            let mut faults = 0;
            while !storm.over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(fault_rng.u64(50..400)));
                storm.strike(|| server.kill());
                server.restart();
                faults += 1;
            }
            faults
        });
        (storm.rage(histories(), &mut rng), faults.join().unwrap())
    });
    judge("through kill -9", seen, faults);
}

/// Two servers, one of which follows the other.
struct Pair {
    master: Server,
    replica: Server,
}

impl Pair {
    fn start() -> Self {
        let pair = Self { master: Server::start(), replica: Server::start() };
        pair.join();
        pair
    }

    fn join(&self) {
        let mut replica = self.replica.client();
        replica.call(&format!("REPLICAOF 127.0.0.1 {}", self.master.port));
        let mut master = self.master.client();
        wait_until("the replica is online", || {
            let info = master.text("INFO replication");
            info.contains("state=online")
                && replica.info("replication", "master_link_status") == "up"
        });
    }

    /// The replica takes over from a dead master; the dead one comes back as its replica.
    fn swap(&mut self) {
        std::mem::swap(&mut self.master, &mut self.replica);
        self.replica.restart();
        self.join();
    }
}

/// What happened in storms in the middle of which the master died, and its replica took over.
struct Failovers {
    seen: Vec<Vec<Operation>>,
    failovers: usize,
    /// How many times the replica was behind.
    behind: usize,
    /// How many replies the master gave meanwhile.
    at_risk: usize,
}

fn failovers(habits: &Habits, rng: &mut Rng) -> Failovers {
    let mut pair = Pair::start();
    let (mut seen, mut failovers, mut behind, mut at_risk) = (Vec::new(), 0, 0, 0);
    while seen.len() < histories() {
        let mut cut_us = i64::MAX;
        let storm = Storm::new(pair.master.port, habits.clone());
        let mut fault_rng = rng.fork();
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(fault_rng.u64(0..80)));
                if failovers == 0 || fault_rng.u8(0..4) > 0 {
                    // From here on nothing reaches it.
                    pair.replica.signal(Signal::Freeze);
                    pair.master.client().call("CLIENT KILL TYPE replica");
                    cut_us = now_us();
                    thread::sleep(Duration::from_millis(fault_rng.u64(20..160)));
                    behind += 1;
                }
                storm.strike(|| pair.master.kill());
                pair.replica.signal(Signal::Thaw);
                pair.replica.client().call("REPLICAOF NO ONE");
                storm.follow(pair.replica.port, 1);
            });
            seen.append(&mut storm.rage(LIMITERS, rng));
        });
        let is_at_risk = |operation: &&Operation| {
            let is_acknowledged = !matches!(operation.reply, Reply::Unknown | Reply::Error);
            operation.reign == 0 && operation.invoked_us > cut_us && is_acknowledged
        };
        at_risk += seen[failovers * LIMITERS..].iter().flatten().filter(is_at_risk).count();
        failovers += 1;
        pair.swap();
    }
    Failovers { seen, failovers, behind, at_risk }
}

/// A replica answers what only reads, with what it knows.
const MASTER_ONLY: Habits = Habits { reads: false, ..PATIENT };

#[test]
fn failover_loses_the_last_moments_and_nothing_else() {
    let mut rng = seeded();
    let Failovers { seen, failovers, behind, at_risk } = failovers(&MASTER_ONLY, &mut rng);
    let wrong = wrong("through failovers, without WAIT", seen, failovers);
    let (mut forgotten, mut undecided) = (Vec::new(), 0);
    for history in &wrong {
        match lost(history) {
            Ok(replies) => forgotten.push(replies),
            Err(Verdict::Undecided) => undecided += 1,
            Err(_) => panic!("not for what was lost:\n{}", text(&shortest_wrong(history))),
        }
    }
    println!(
        "{behind} of {failovers} times the replica was behind, by {at_risk} replies. {} histories are \
         right only if the last replies of the old master are forgotten: {} replies in all, {} of \
         one at most ({undecided} undecided)",
        wrong.len(),
        forgotten.iter().sum::<usize>(),
        forgotten.iter().max().unwrap_or(&0),
    );
    assert!(undecided <= wrong.len() / 2, "too little was found out");
    assert!(at_risk > 0, "nothing could be lost, so nothing was tried");
}

#[test]
fn failover_loses_nothing_that_wait_confirmed() {
    let mut rng = seeded();
    let habits = Habits { wait_for_replica: true, ..MASTER_ONLY };
    let Failovers { seen, failovers, .. } = failovers(&habits, &mut rng);
    judge("through failovers, with WAIT", seen, failovers);
}

#[test]
fn the_command_failover_loses_nothing() {
    let mut rng = seeded();
    let mut pair = Pair::start();
    let storm = Storm::new(pair.master.port, MASTER_ONLY);
    let mut fault_rng = rng.fork();
    let (seen, faults) = thread::scope(|scope| {
        let faults = scope.spawn(|| {
            let mut faults = 0;
            while !storm.over.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(fault_rng.u64(20..200)));
                let mut replica = pair.replica.client();
                storm.pause(|| {
                    pair.master.client().call("FAILOVER");
                    wait_until("it is the master", || {
                        replica.info("replication", "role") == "master"
                    });
                    storm.follow(pair.replica.port, 0);
                });
                std::mem::swap(&mut pair.master, &mut pair.replica);
                wait_until("the other follows", || {
                    let info = replica.text("INFO replication");
                    info.contains("state=online")
                });
                faults += 1;
            }
            faults
        });
        (storm.rage(histories(), &mut rng), faults.join().unwrap())
    });
    judge("through FAILOVER", seen, faults);
}
