//! Clients that use limiters all at once, and write down what they saw.
//!
//! Each limiter has its own clients, and its history ends after so many operations. A client knows
//! nothing of the others. What is written down is what it saw: the moment before the request, the
//! moment after the reply. If the connection broke, the moment at which it knew that nothing could
//! happen any more: the server closed the connection; or the client did, and the server lists it no
//! longer.

use std::io::{self, ErrorKind};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use fastrand::Rng;
use redis::{RedisError, Value};

use crate::harness::{deadline, error_text, string, wait_until, Client};
use crate::history::{Call, Operation, Reply};

const OPERATIONS: Range<usize> = 20..61;
/// How many limiters are in use at the same time.
pub const LIMITERS: usize = 4;

/// What the clients do, beside what they always do.
#[derive(Clone)]
pub struct Habits {
    /// How many there are.
    pub clients: Range<usize>,
    pub ttl_ms: Range<i64>,
    pub timeout_ms: Range<i64>,
    /// They look with commands that only read. A replica would answer those as well.
    pub reads: bool,
    /// They close connections in the middle of a wait.
    pub give_up: bool,
    /// A reply counts once a replica has what it was based on.
    pub wait_for_replica: bool,
}

/// The clients of one master, or of one after the other, and what befalls them.
pub struct Storm {
    habits: Habits,
    master: Mutex<Master>,
    pub over: AtomicBool,
    /// Odd while the server is paused, or may be.
    pauses: AtomicUsize,
    /// When connections were broken: from, to.
    strikes: Mutex<Vec<(i64, i64)>>,
}

/// Where the master is, and how many lost something to become it.
#[derive(Clone, Copy)]
struct Master {
    port: u16,
    reign: usize,
}

impl Storm {
    pub fn new(port: u16, habits: Habits) -> Self {
        let master = Mutex::new(Master { port, reign: 0 });
        Self {
            habits,
            master,
            over: AtomicBool::new(false),
            pauses: AtomicUsize::new(0),
            strikes: Mutex::default(),
        }
    }

    /// From now on it is this one. The last one may have taken something with it that was
    /// acknowledged; or not, if it is the same reign.
    pub fn follow(&self, port: u16, reign: usize) {
        *self.master.lock().unwrap() = Master { port, reign };
    }

    /// Does what breaks connections.
    pub fn strike(&self, strike: impl FnOnce()) {
        let from_us = now_us();
        self.strikes.lock().unwrap().push((from_us, i64::MAX));
        strike();
        self.strikes.lock().unwrap().last_mut().unwrap().1 = now_us();
    }

    /// When connections may have been broken first, after this.
    fn struck_us(&self, after_us: i64) -> Option<i64> {
        let strikes = self.strikes.lock().unwrap();
        let strike = strikes.iter().find(|(_, to_us)| *to_us >= after_us);
        strike.map(|(from_us, _)| *from_us.max(&after_us))
    }

    /// Does what makes the server put commands off, until it is over.
    pub fn pause(&self, pause: impl FnOnce()) {
        self.pauses.fetch_add(1, Ordering::SeqCst);
        pause();
        self.pauses.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets clients loose on limiters until there are so many histories.
    pub fn rage(&self, histories: usize, rng: &mut Rng) -> Vec<Vec<Operation>> {
        let seen = Mutex::new(Vec::new());
        let begun = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..LIMITERS {
                let mut rng = rng.fork();
                let (seen, begun) = (&seen, &begun);
                scope.spawn(move || {
                    while begun.fetch_add(1, Ordering::Relaxed) < histories {
                        let history = self.one_history(&mut rng);
                        seen.lock().unwrap().push(history);
                    }
                });
            }
        });
        self.over.store(true, Ordering::Relaxed);
        seen.into_inner().unwrap()
    }

    fn one_history(&self, rng: &mut Rng) -> Vec<Operation> {
        let clock = Clock::look();
        let prefix = format!("p{:x}", rng.u64(..));
        let limit = rng.usize(1..4);
        // In a quiet limiter leases lapse and nobody comes by who would prune them.
        let pause_us = rng.choice([2_000, 4_000, 20_000]).unwrap_or_default();
        let left = AtomicUsize::new(rng.usize(OPERATIONS));
        let history = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for number in 0..rng.usize(self.habits.clients.clone()) {
                let rng = rng.fork();
                let (prefix, left, history) = (&prefix, &left, &history);
                scope.spawn(move || {
                    let mut worker = Worker::new(self, format!("c{number}"), prefix, limit, rng);
                    worker.work(left, pause_us);
                    history.lock().unwrap().append(&mut worker.seen);
                });
            }
        });
        clock.check();
        history.into_inner().unwrap()
    }
}

/// The system's clock, which is the server's, and one that nobody can set.
struct Clock(SystemTime, Instant);

impl Clock {
    fn look() -> Self {
        Self(SystemTime::now(), Instant::now())
    }

    /// A history means nothing if somebody set the clock meanwhile.
    fn check(&self) {
        let passed = self.0.elapsed().expect("the system's clock was set back");
        let off_ms = passed.abs_diff(self.1.elapsed()).as_millis();
        assert!(off_ms < 5, "the system's clock was set by {off_ms} ms");
    }
}

/// What the system's clock shows.
pub fn now_us() -> i64 {
    std::time::UNIX_EPOCH.elapsed().expect("a time after 1970").as_micros() as i64
}

/// A connection to whoever is the master.
struct Connection {
    client: Client,
    /// Its id at the server.
    id: String,
    port: u16,
    reign: usize,
}

impl Connection {
    fn open(storm: &Storm) -> Self {
        let give_up = Instant::now() + deadline();
        loop {
            let Master { port, reign } = *storm.master.lock().unwrap();
            if let Ok(mut client) = Client::connect(port, deadline()) {
                if let Ok(Value::Int(id)) = client.try_run(&["CLIENT", "ID"]) {
                    return Self { client, id: id.to_string(), port, reign };
                }
            }
            assert!(Instant::now() < give_up, "nobody listens");
            thread::sleep(Duration::from_millis(1)); // Between two tries.
        }
    }

    /// Whether a replica has all that a reply on this connection can have been based on. WAIT asks
    /// for what the connection itself has written; so it writes.
    fn is_replicated(&mut self) -> bool {
        let written = self.client.try_run(&["SET", "fence", "x"]);
        let followed = written.and_then(|_| self.client.try_run(&["WAIT", "1", "50"]));
        matches!(followed, Ok(Value::Int(1..)))
    }
}

struct Worker<'s> {
    storm: &'s Storm,
    name: String,
    prefix: &'s str,
    limit: usize,
    rng: Rng,
    connection: Connection,
    /// To look while the other one waits.
    side: Connection,
    /// The key that got a lease last.
    granted: Option<Arc<str>>,
    seen: Vec<Operation>,
}

impl<'s> Worker<'s> {
    fn new(storm: &'s Storm, name: String, prefix: &'s str, limit: usize, rng: Rng) -> Self {
        let (connection, side) = (Connection::open(storm), Connection::open(storm));
        let (granted, seen) = (None, Vec::new());
        Self { storm, name, prefix, limit, rng, connection, side, granted, seen }
    }

    /// Asks, and does other work for a while, as long as there is something left to ask.
    fn work(&mut self, left: &AtomicUsize, pause_us: u64) {
        let take_one = |left: usize| left.checked_sub(1);
        while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take_one).is_ok() {
            self.ask();
            thread::sleep(Duration::from_micros(self.rng.u64(0..pause_us)));
        }
    }

    fn choose(&mut self) -> Call {
        let Habits { ttl_ms, timeout_ms, reads, .. } = self.storm.habits.clone();
        let key: Arc<str> = format!("{}{}", self.name, self.rng.u8(0..2)).into();
        let granted = self.granted.clone().unwrap_or(key.clone());
        let ttl_ms = self.rng.i64(ttl_ms);
        // Not everybody names the same limit.
        let limit = match self.rng.u8(0..8) {
            0 => self.limit + 1,
            1 => self.limit - 1,
            _ => self.limit,
        };
        match self.rng.u8(0..20) {
            0..5 => Call::Bacquire { key, limit, ttl_ms, timeout_ms: self.rng.i64(timeout_ms) },
            5..11 => Call::Acquire { key, limit, ttl_ms, is_new: self.rng.u8(0..6) == 0 },
            11..14 => Call::Release { key: granted },
            14 => Call::Release { key },
            15..17 => Call::Renew { key: granted, ttl_ms },
            17 if reads => Call::Count,
            18 if reads => Call::Holders,
            _ => self.look(),
        }
    }

    /// A command that changes nothing, and tells how many hold and wait.
    fn look(&self) -> Call {
        if self.storm.habits.reads {
            return Call::Info;
        }
        // A replica refuses what could write. This is denied whatever there is.
        Call::Acquire { key: "nobody".into(), limit: 0, ttl_ms: 1, is_new: true }
    }

    /// Asks for something, and writes down what it saw.
    fn ask(&mut self) {
        let call = self.choose();
        let waits = matches!(call, Call::Bacquire { .. });
        let command = self.command(&call);
        let reign = self.connection.reign;
        let invoked_us = now_us();
        let mut sent = self.connection.client.try_send(&command).map_err(RedisError::from);
        let (mut waits_us, mut whole_us) = (None, None);
        if waits && sent.is_ok() {
            waits_us = self.waits();
            if self.storm.habits.give_up && self.rng.u8(0..12) == 0 {
                thread::sleep(Duration::from_micros(self.rng.u64(0..20_000)));
                whole_us = Some(now_us());
                self.close();
                sent = Err(io::Error::from(ErrorKind::NotConnected).into());
            }
        }
        let received = sent.and_then(|()| self.connection.client.try_receive());
        let returned_us = now_us();
        let mut reply = match received {
            Ok(value) => read(&call, &value),
            Err(error) if error.is_timeout() => panic!("{call}: no reply"),
            Err(_) => Reply::Unknown,
        };
        if reply == Reply::Unknown && waits {
            // Somebody else may have broken the connection before the client did.
            whole_us = [whole_us, self.storm.struck_us(invoked_us)].into_iter().flatten().min();
        }
        let is_answered = !matches!(reply, Reply::Error | Reply::Unknown);
        let confirms = self.storm.habits.wait_for_replica && reign == 0;
        if is_answered && confirms && !self.connection.is_replicated() {
            reply = Reply::Unknown;
        }
        if !is_answered {
            self.connection = Connection::open(self.storm);
        }
        let client = self.name.clone();
        self.seen.push(Operation {
            client,
            call: call.clone(),
            reply: reply.clone(),
            invoked_us,
            returned_us,
            waits_us,
            whole_us,
            reign,
        });
        let (Reply::Number(outcome) | Reply::State([outcome, ..])) = reply else { return };
        if let (Call::Acquire { key, .. } | Call::Bacquire { key, .. }, 1..) = (&call, outcome) {
            self.granted = Some(key.clone());
        }
    }

    /// Closes the connection, and waits until the server has noticed.
    fn close(&mut self) {
        let next = Connection::open(self.storm);
        let closed = std::mem::replace(&mut self.connection, next).id;
        wait_until("the connection is closed", || {
            let list = self.connection.client.try_run(&["CLIENT", "LIST", "ID", &closed]);
            // Empty; or this one is broken as well, which will be found out.
            list.map_or(true, |list| string(&list).is_empty())
        });
    }

    /// The moment at which it was seen, from the side, to wait, if it does.
    fn waits(&mut self) -> Option<i64> {
        if self.side.port != self.connection.port {
            self.side = Connection::open(self.storm);
            return None;
        }
        let list = ["CLIENT", "LIST", "ID", &self.connection.id];
        for _ in 0..3 {
            let pauses = self.storm.pauses.load(Ordering::SeqCst);
            let Ok(Value::BulkString(list)) = self.side.client.try_run(&list) else {
                self.side = Connection::open(self.storm);
                return None;
            };
            let list = String::from_utf8_lossy(&list);
            let flags = list.split(" flags=").nth(1)?.split(' ').next()?;
            // A server that is paused shows all that it puts off as blocked.
            let is_paused = pauses % 2 == 1 || pauses != self.storm.pauses.load(Ordering::SeqCst);
            if flags.contains('b') && !is_paused {
                return Some(now_us());
            }
        }
        None
    }

    fn command(&mut self, call: &Call) -> Vec<String> {
        let seconds = |ms: &i64| format!("{:.3}", *ms as f64 / 1000.0);
        let (name, mut rest) = match call {
            Call::Acquire { key, limit, ttl_ms, is_new } => {
                let mut rest = vec![key.to_string(), limit.to_string(), seconds(ttl_ms)];
                rest.extend(is_new.then(|| "NX".into()));
                let with_state = *limit == 0 || self.rng.bool();
                rest.extend(with_state.then(|| "WITHSTATE".into()));
                ("ACQUIRE", rest)
            }
            Call::Bacquire { key, limit, ttl_ms, timeout_ms } => {
                let times = [seconds(ttl_ms), seconds(timeout_ms)];
                ("BACQUIRE", [&[key.to_string(), limit.to_string()], &times[..]].concat())
            }
            Call::Release { key } => ("RELEASE", vec![key.to_string()]),
            Call::Renew { key, ttl_ms } => ("RENEW", vec![key.to_string(), seconds(ttl_ms)]),
            Call::Count => ("COUNT", Vec::new()),
            Call::Holders => ("HOLDERS", Vec::new()),
            Call::Info => ("INFO", Vec::new()),
        };
        rest.insert(0, self.prefix.to_string());
        rest.insert(0, format!("LIMITER.{name}"));
        rest
    }
}

fn read(call: &Call, value: &Value) -> Reply {
    let elements = match value {
        Value::Int(number) => return Reply::Number(*number),
        Value::Array(elements) => elements,
        error => {
            // It is a replica now, or was just started: it did nothing.
            let (error, refusals) = (error_text(error), ["UNBLOCKED", "READONLY", "LOADING"]);
            assert!(refusals.iter().any(|code| error.starts_with(code)), "{call}: {error}");
            return Reply::Error;
        }
    };
    let number = |at: usize| match &elements[at] {
        Value::Int(number) => *number,
        other => panic!("{call}: {other:?}"),
    };
    match call {
        Call::Holders => {
            let pair = |at| (string(&elements[at]).into(), number(at + 1));
            Reply::Holders((0..elements.len()).step_by(2).map(pair).collect())
        }
        Call::Info => Reply::Info([number(1), number(3), number(5)]),
        _ => Reply::State([number(0), number(1), number(2), number(3)]),
    }
}
