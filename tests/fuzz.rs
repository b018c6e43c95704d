//! A fuzzer of every command, against a real server: hostile arguments, in pipelines, transactions,
//! scripts and functions, on RESP2 and RESP3, by clients that hang up, are killed, or want no
//! replies, among the server's own commands that do their worst. It finds
//!
//! - a command that is not answered exactly once, or not as the interface says;
//! - a waiter that is not let go though every limiter was emptied;
//! - a server that is down, and a panic in its log;
//! - what is left behind when everybody has gone: waiters, lines, ties, memory, what pins the module.
//!
//! Rounds of [`COMMANDS`] commands begin on an empty server, each with a seed of its own. The same
//! seed sends the same bytes over the same connections in the same order; only the times differ.
//! `SEED` in the environment is the seed of the first round, the next has the next number.
//! `FUZZ_SECONDS` makes it long (`make fuzz`).

mod harness;
#[path = "fuzz/hostile.rs"]
mod hostile;

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use harness::{error_text, packed, wait_until, Client, Server};
use hostile::{Command, Expect, Source, Words};
use redis::{Parser, Value};

/// How many commands a round sends.
const COMMANDS: usize = 1_000;

/// How many rounds a quick run has.
const QUICK: u64 = 12;

/// The rounds after which the server's own pools and our records are taken to be filled.
const WARM_UP: u64 = 4;

/// How much more memory the data may take at the end of a round than after the warm-up. What the
/// servers keep for themselves goes up and down by some 50,000 bytes, and Valkey 9.1 keeps a byte
/// more for every command. A waiter left behind takes 700: one in 100 commands is found.
const LEFT_BEHIND: i64 = 100_000;

/// The same where the allocator is libc's. There what the server counts goes up and down by hundreds
/// of thousands, also with long strings in a server without any module.
const LEFT_BEHIND_LIBC: i64 = 600_000;
const LEFT_BEHIND_A_COMMAND: i64 = 2;

const CONNECTIONS: usize = 14;

/// A connection, and what it must be answered yet.
struct Connection {
    stream: TcpStream,
    replies: Receiver<Value>,
    reader: JoinHandle<()>,
    id: i64,
    expected: VecDeque<(Expect, String)>,
    /// The last commands that were sent, for the report of a failure.
    sent: VecDeque<String>,
    /// Somebody kills it: it may end unanswered.
    is_doomed: bool,
    is_closed: bool,
}

impl Connection {
    fn open(server: &Server, name: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", server.port)).expect("a connection");
        stream.set_nodelay(true).expect("TCP_NODELAY");
        let mut incoming = stream.try_clone().expect("a second handle");
        let (sender, replies) = mpsc::channel();
        let reader = thread::Builder::new().name(name.into()).spawn(move || {
            let mut parser = Parser::new();
            while let Ok(reply) = parser.parse_value(&mut incoming) {
                let is_reply = !matches!(reply, Value::Push { .. });
                if is_reply && sender.send(reply).is_err() {
                    break;
                }
            }
        });
        let reader = reader.expect("a thread");
        let (expected, sent) = (VecDeque::new(), VecDeque::new());
        let mut connection = Self {
            stream,
            replies,
            reader,
            id: 0,
            expected,
            sent,
            is_doomed: false,
            is_closed: false,
        };
        connection.write(&packed(&["CLIENT", "ID"]));
        let Ok(Value::Int(id)) = connection.replies.recv_timeout(harness::deadline()) else {
            panic!("the server does not tell the connection's id");
        };
        connection.id = id;
        connection
    }

    /// Sends bytes. If the server has closed the connection, its end tells.
    fn write(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    /// Notes a command, that will be answered so (`None`: not at all); its bytes.
    fn note(&mut self, words: &Words, expect: Option<Expect>) -> Vec<u8> {
        let line = shown(words);
        if let Some(expect) = expect {
            self.expected.push_back((expect, line.clone()));
        }
        self.sent.push_back(line);
        if self.sent.len() > 25 {
            self.sent.pop_front();
        }
        packed(words)
    }

    /// Hangs up; half of the time so that the server's next write fails.
    fn hang_up(self, rudely: bool) {
        let _ = self.stream.shutdown(if rudely { Shutdown::Read } else { Shutdown::Both });
        // The reader's handle must be gone for a reset to be sent.
        let _ = self.reader.join();
        if rudely {
            let _ = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}

/// The command for people: not all of what is long.
fn shown(words: &Words) -> String {
    let word = |word: &Vec<u8>| {
        let start = word[..word.len().min(60)].escape_ascii();
        let rest = word.len().saturating_sub(60);
        format!("\"{start}\"{}", if rest > 0 { format!("+{rest}") } else { String::new() })
    };
    let first: Vec<String> = words.iter().take(12).map(word).collect();
    let rest = words.len().saturating_sub(12);
    format!(
        "{}{}",
        first.join(" "),
        if rest > 0 { format!(" +{rest} words") } else { String::new() }
    )
}

/// What has happened so far.
#[derive(Default)]
struct Tally {
    commands: usize,
    replies: usize,
    killed: usize,
    hung_up: usize,
    /// By the start of their texts.
    errors: BTreeMap<String, usize>,
}

struct Fuzzer<'s> {
    server: &'s Server,
    admin: Client,
    seed: u64,
    source: Source,
    connections: Vec<Connection>,
    /// Those that were killed, and are read to their end.
    doomed: Vec<Connection>,
    tally: Tally,
    markers: usize,
    /// Redis 7.0 stops when CLIENT UNBLOCK meets a client that CLIENT PAUSE holds back.
    may_unblock: bool,
}

impl<'s> Fuzzer<'s> {
    fn new(server: &'s Server) -> Self {
        let mut admin = server.client();
        let may_unblock = !admin.info("server", "redis_version").starts_with("7.0.");
        Self {
            server,
            admin,
            seed: 0,
            source: Source::new(0),
            connections: Vec::new(),
            doomed: Vec::new(),
            tally: Tally::default(),
            markers: 0,
            may_unblock,
        }
    }

    /// One round, from an empty server to an empty server.
    fn round(&mut self, seed: u64) {
        self.seed = seed;
        self.source = Source::new(seed);
        assert!(self.reset_server());
        for slot in 0..CONNECTIONS {
            let connection = self.greet(slot);
            self.connections.push(connection);
        }
        let end = self.tally.commands + COMMANDS;
        while self.tally.commands < end {
            self.act();
            self.read();
        }
        self.settle();
    }

    /// Opens a connection in one of the protocols and databases.
    fn greet(&mut self, slot: usize) -> Connection {
        let mut connection = Connection::open(self.server, &format!("reader {slot}"));
        let (protocol, db) = (2 + slot % 2, self.source.rng.usize(0..hostile::DATABASES) / 3);
        for command in [format!("HELLO {protocol}"), format!("SELECT {db}")] {
            let words = command.split(' ').map(Into::into).collect();
            let bytes = connection.note(&words, Some(Expect::Anything));
            connection.write(&bytes);
        }
        connection
    }

    /// What one connection does next.
    fn act(&mut self) {
        let slot = self.source.rng.usize(0..CONNECTIONS);
        match self.source.rng.u32(0..100) {
            0..4 => self.kill(slot),
            4..12 => self.hang_up_halfway(slot),
            12..15 if self.may_unblock => self.unblock(slot),
            15..25 => self.back_to_normal(),
            _ => self.pipeline(slot),
        }
    }

    /// Ends what makes the server refuse commands, so that not too many are.
    fn back_to_normal(&mut self) {
        self.admin.call("REPLICAOF NO ONE");
        self.admin.call("CONFIG SET maxmemory 0 min-replicas-to-write 0");
    }

    fn send(&mut self, slot: usize, commands: Vec<(Words, Option<Expect>)>) {
        self.tally.commands += commands.len();
        let connection = &mut self.connections[slot];
        let bytes: Vec<u8> = commands
            .into_iter()
            .flat_map(|(words, expect)| connection.note(&words, expect))
            .collect();
        connection.write(&bytes);
    }

    fn pipeline(&mut self, slot: usize) {
        let mut commands = Vec::new();
        for _ in 0..self.source.rng.usize(1..6) {
            match self.source.rng.u32(0..100) {
                0..10 => self.transaction(&mut commands),
                10..15 => self.without_replies(&mut commands),
                _ => {
                    let Command { words, expect } = self.command();
                    commands.push((words, Some(expect)));
                }
            }
        }
        self.markers += 1;
        let marker = format!("marker {}", self.markers);
        let words = vec![b"ECHO".into(), marker.clone().into()];
        commands.push((words, Some(Expect::Marker(marker))));
        self.send(slot, commands);
    }

    fn command(&mut self) -> Command {
        match self.source.rng.u32(0..100) {
            0..60 => self.source.ours(),
            60..72 => self.source.wrapped(),
            _ => self.source.foreign(),
        }
    }

    fn transaction(&mut self, commands: &mut Vec<(Words, Option<Expect>)>) {
        if self.source.rng.bool() {
            commands.push((vec![b"WATCH".into(), self.source.prefix()], Some(Expect::Anything)));
        }
        commands.push((vec![b"MULTI".into()], Some(Expect::Anything)));
        let mut parts = Vec::new();
        for _ in 0..self.source.rng.usize(0..5) {
            let Command { words, expect } = self.command();
            commands.push((words, Some(Expect::Queued)));
            parts.push(expect);
        }
        let (end, expect) = match self.source.once_in(5) {
            true => ("DISCARD", Expect::Anything),
            false => ("EXEC", Expect::Transaction(parts)),
        };
        commands.push((vec![end.into()], Some(expect)));
    }

    /// Commands by a client that asked for no replies.
    fn without_replies(&mut self, commands: &mut Vec<(Words, Option<Expect>)>) {
        let reply = |word: &str| vec![b"CLIENT".into(), b"REPLY".into(), word.into()];
        let is_skip = self.source.rng.bool();
        commands.push((reply(if is_skip { "SKIP" } else { "OFF" }), None));
        for _ in 0..if is_skip { 1 } else { self.source.rng.usize(1..5) } {
            let words = self.source.ours().words;
            // A server that becomes a replica closes who is blocked after the reply, and there is
            // none here.
            if !self.source.role_changes || words[0] != b"LIMITER.BACQUIRE" {
                commands.push((words, None));
            } else if is_skip {
                commands.push((vec![b"PING".into()], None));
            }
        }
        if !is_skip {
            commands.push((reply("ON"), Some(Expect::Anything)));
        }
    }

    /// Has one connection kill another, or itself.
    fn kill(&mut self, slot: usize) {
        let victim = self.source.rng.usize(0..CONNECTIONS);
        let id = self.connections[victim].id.to_string();
        let words = vec![b"CLIENT".into(), b"KILL".into(), b"ID".into(), id.into()];
        self.connections[victim].is_doomed = true;
        self.send(slot, vec![(words, Some(Expect::Anything))]);
        self.tally.killed += 1;
        self.replace(victim);
    }

    fn unblock(&mut self, slot: usize) {
        let id = self.connections[self.source.rng.usize(0..CONNECTIONS)].id.to_string();
        let how = self.source.pick(&["TIMEOUT", "ERROR"]);
        let words = vec![b"CLIENT".into(), b"UNBLOCK".into(), id.into(), how.into()];
        self.send(slot, vec![(words, Some(Expect::Anything))]);
    }

    /// Sends a part of a pipeline, and closes the connection.
    fn hang_up_halfway(&mut self, slot: usize) {
        let commands: Vec<Words> = (0..3).map(|_| self.command().words).collect();
        let next = self.greet(slot);
        let mut connection = std::mem::replace(&mut self.connections[slot], next);
        let bytes: Vec<u8> =
            commands.iter().flat_map(|words| connection.note(words, None)).collect();
        connection.write(&bytes[..self.source.rng.usize(0..=bytes.len())]);
        connection.hang_up(self.source.rng.bool());
        self.tally.hung_up += 1;
    }

    /// A new connection takes the place of one that was killed.
    fn replace(&mut self, slot: usize) {
        let next = self.greet(slot);
        self.doomed.push(std::mem::replace(&mut self.connections[slot], next));
    }

    /// Reads what was answered so far, and judges it. How many answers are still to come.
    fn read(&mut self) -> usize {
        let mut outstanding = 0;
        for connection in self.connections.iter_mut().chain(&mut self.doomed) {
            loop {
                let reply = match connection.replies.try_recv() {
                    Ok(reply) => reply,
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        connection.is_closed = true;
                        break;
                    }
                };
                self.tally.replies += 1;
                note_errors(&reply, &mut self.tally.errors);
                let Some((expect, command)) = connection.expected.pop_front() else {
                    panic!("client {} was answered too often: {reply:?}", connection.id);
                };
                // A server that becomes a replica closes who was blocked.
                connection.is_doomed |= is_error(&reply, "UNBLOCKED force");
                if !expect.allows(&reply) || has_panicked(&reply) {
                    let id = connection.id;
                    panic!("client {id}: {command} was answered {reply:?}, not {expect:?}");
                }
            }
            let may_end = connection.is_doomed;
            assert!(!connection.is_closed || may_end, "client {} was closed", connection.id);
            if !connection.is_doomed {
                outstanding += connection.expected.len();
            }
        }
        self.doomed.retain(|connection| !connection.is_closed);
        outstanding
    }

    /// Ends that and whatever makes the server wait, and empties it; whether it let us.
    fn reset_server(&mut self) -> bool {
        self.back_to_normal();
        let commands = [
            "CLIENT UNPAUSE",
            "CONFIG SET maxmemory-policy noeviction notify-keyspace-events \"\"",
            "CONFIG SET zset-max-listpack-entries 128",
            "DEBUG SET-ACTIVE-EXPIRE 1",
            "FLUSHALL",
        ];
        commands.into_iter().all(|command| {
            let words = command.split(' ').map(|word| word.trim_matches('"'));
            self.admin.run(&words.collect::<Vec<_>>()) == Value::Okay
        })
    }

    /// Empties every limiter until everybody is answered, sends everybody away, and looks at what
    /// is left.
    fn settle(&mut self) {
        wait_until("every command is answered", || {
            let is_reset = self.reset_server();
            self.read() == 0 && is_reset
        });
        // Some of those who were to kill were killed themselves before they got to it.
        for id in self.doomed.iter().map(|connection| connection.id) {
            self.admin.call(&format!("CLIENT KILL ID {id}"));
        }
        wait_until("who was killed is gone", || {
            self.read();
            self.doomed.is_empty()
        });
        assert_eq!(self.server.blocked(), 0, "everybody is answered, and somebody blocked");
        for field in ["waiting", "lines"] {
            assert_eq!(self.admin.info("limiter", &format!("limiter_{field}")), "0", "{field}");
        }
        for connection in self.connections.drain(..) {
            connection.hang_up(false);
        }
        wait_until("all have gone", || self.admin.info("clients", "connected_clients") == "1");
        assert!(self.reset_server());
        wait_until("no lease is tied", || self.admin.info("limiter", "limiter_ephemeral") == "0");
        assert_eq!(self.admin.int("DBSIZE"), 0);
    }

    /// How much memory the data takes: all but what clients, the AOF and the like do.
    fn dataset(&mut self) -> i64 {
        // Megabytes that scripts have passed on are garbage of theirs.
        assert_eq!(self.admin.run(&["EVAL", hostile::TIDY_UP, "0"]), Value::Nil);
        assert_eq!(self.admin.call("FCALL tidy_up 0"), Value::Nil);
        let bytes = self.admin.info("memory", "used_memory_dataset");
        // What clients take is estimated: less than nothing may be left, and wraps around.
        bytes.parse::<u64>().expect("a number") as i64
    }

    /// The same when the server has had the time to free what it frees a little later.
    fn settled_dataset(&mut self) -> i64 {
        let until = Instant::now() + Duration::from_millis(500);
        let mut least = self.dataset();
        while Instant::now() < until {
            least = least.min(self.dataset());
        }
        least
    }
}

impl Drop for Fuzzer<'_> {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        eprintln!("--- the last commands, by connection ---");
        for connection in self.doomed.iter().chain(&self.connections) {
            let Connection { id, expected, is_doomed, .. } = connection;
            let state = if *is_doomed { ", to be killed" } else { "" };
            eprintln!("client {id}: {} answers to come{state}", expected.len());
            if let Some((_, next)) = expected.front() {
                eprintln!("    the next is that to {next}");
            }
            connection.sent.iter().for_each(|command| eprintln!("    {command}"));
        }
        if let Ok(Value::BulkString(info)) = self.admin.try_run(&["INFO", "memory"]) {
            eprintln!("--- the server's memory ---\n{}", String::from_utf8_lossy(&info));
        }
        eprintln!("--- this round again: SEED={} cargo test --test fuzz ---", self.seed);
    }
}

/// Whether the reply, or a part of it, tells of a panic.
fn has_panicked(reply: &Value) -> bool {
    match reply {
        Value::Array(parts) => parts.iter().any(has_panicked),
        _ => is_error(reply, "ERR internal error"),
    }
}

fn is_error(reply: &Value, starts: &str) -> bool {
    matches!(reply, Value::ServerError(_)) && error_text(reply).starts_with(starts)
}

fn note_errors(reply: &Value, errors: &mut BTreeMap<String, usize>) {
    match reply {
        Value::Array(parts) => parts.iter().for_each(|part| note_errors(part, errors)),
        Value::ServerError(_) => {
            let text = error_text(reply);
            let start: String = text.chars().take(45).collect();
            *errors.entry(start).or_default() += 1;
        }
        _ => {}
    }
}

#[test]
fn no_input_stops_the_server_or_leaves_anything_behind() {
    let first_seed =
        std::env::var("SEED").map_or_else(|_| fastrand::u64(..), |seed| seed.parse().unwrap());
    let seconds = std::env::var("FUZZ_SECONDS").ok().map(|seconds| seconds.parse().unwrap());
    println!("SEED={first_seed}");
    let start = Instant::now();
    let is_over = |round: u64| match seconds {
        Some(seconds) => start.elapsed() > Duration::from_secs(seconds) && round > WARM_UP,
        None => round == QUICK,
    };

    // A pause in which something is written stops the server only where there is an AOF.
    // What the server remembers of commands is no leak of ours.
    let quiet = ["--slowlog-log-slower-than", "-1", "--latency-tracking", "no"];
    let server = Server::start_with(&[&["--appendonly", "yes"][..], &quiet].concat());
    let mut fuzzer = Fuzzer::new(&server);
    fuzzer.admin.run(&["FUNCTION", "LOAD", hostile::LIBRARY]);
    for db in 0..hostile::DATABASES {
        fuzzer.admin.call(&format!("SELECT {db}"));
        let junk = hostile::JUNK.map(Vec::from);
        for prefix in hostile::prefixes().into_iter().chain(junk) {
            fuzzer.admin.run(&[&b"LIMITER.ACQUIRE"[..], &prefix, b"k", b"1", b"45"]);
        }
    }
    // The servers keep up to eight of what they make for each blocked client.
    let waiter = |_| server.waiter("LIMITER.BACQUIRE p0 k0 0 45 0");
    drop((0..8).map(waiter).collect::<Vec<_>>());
    let left_behind = match fuzzer.admin.info("memory", "mem_allocator").as_str() {
        "libc" => LEFT_BEHIND_LIBC,
        _ => LEFT_BEHIND,
    };
    let mut before = 0;
    for round in 0.. {
        if is_over(round) {
            break;
        }
        fuzzer.round(first_seed.wrapping_add(round));
        if round < WARM_UP {
            before = fuzzer.settled_dataset();
            println!("{before} bytes of data after round {round}");
        } else {
            let a_command = LEFT_BEHIND_A_COMMAND * fuzzer.tally.commands as i64;
            let allowed = before + left_behind + a_command;
            wait_until("the memory has come back", || fuzzer.dataset() < allowed);
        }
        let log = server.log().to_lowercase();
        for sign in ["panic", "bug report", "assertion", "crashed"] {
            assert!(!log.contains(sign), "{sign:?} in the log");
        }
    }
    let mut total = |field: &str| -> usize {
        fuzzer.admin.info("limiter", &format!("limiter_{field}")).parse().expect("a number")
    };
    let (acquired, waits, ended_by_close) =
        (total("acquired"), total("waits"), total("ephemeral_released"));
    let left = fuzzer.settled_dataset() - before;
    assert_eq!(fuzzer.admin.call("MODULE UNLOAD limiter"), Value::Okay, "nothing is pending");

    let Tally { commands, replies, killed, hung_up, errors } = &fuzzer.tally;
    println!("{commands} commands, {replies} replies, {killed} killed, {hung_up} hung up");
    println!("{acquired} leases, {waits} waits, {ended_by_close} leases ended by a close");
    println!("{left} bytes more than after the warm-up");
    errors.iter().for_each(|(error, times)| println!("{times:8} {error}"));
    assert!(*replies > commands / 2, "too little was answered");
    assert!(waits > commands / 200 && ended_by_close > 0, "too little happened");
}
