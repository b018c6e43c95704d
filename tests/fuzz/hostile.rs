//! What the fuzzer sends: commands of ours with hostile arguments, and commands of the server's own
//! that get in their way. With each comes what it must be answered.
//!
//! Prefixes are drawn from one small pool, the same for every seed: so all that the module
//! remembers of limiters is there after a warm-up, and any more memory is a leak.

use fastrand::Rng;
use redis::Value;

use crate::harness::error_text;

/// The words of a command.
pub type Words = Vec<Vec<u8>>;

/// A command, and what it must be answered.
pub struct Command {
    pub words: Words,
    pub expect: Expect,
}

/// What is a right answer.
#[derive(Clone, Debug)]
pub enum Expect {
    /// One answer, whatever it is: it is not our command.
    Anything,
    /// This, or an error that is not about the arguments.
    Runs(Shape),
    /// An error.
    Refused,
    /// Any answer of ours, or an error: the words were changed at random.
    Garbled,
    /// Queued in a transaction, or refused there.
    Queued,
    /// The transaction's answers, one for each of its commands.
    Transaction(Vec<Expect>),
    /// This very text. All of the pipeline was answered.
    Marker(String),
}

/// What a command of ours answers.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// 0 or 1.
    Bit,
    /// An integer from 0 to this.
    UpTo(i64),
    /// What WITHSTATE makes of ACQUIRE.
    State,
    /// Pairs of key and milliseconds, or of field and number.
    Pairs,
    /// Lines of help.
    Lines,
}

impl Expect {
    /// Whether the reply is right.
    pub fn allows(&self, reply: &Value) -> bool {
        let error = matches!(reply, Value::ServerError(_)).then(|| error_text(reply));
        let is = |starts: &[&str]| {
            error.as_ref().is_some_and(|error| starts.iter().any(|start| error.starts_with(start)))
        };
        match self {
            Expect::Anything => true,
            Expect::Runs(shape) => shape.allows(reply) || is(&OF_THE_MOMENT),
            Expect::Refused => is(&OF_ARGUMENTS) || is(&OF_THE_MOMENT),
            Expect::Garbled => {
                let shapes = [Shape::UpTo(i64::MAX), Shape::State, Shape::Pairs, Shape::Lines];
                let allowed = shapes.iter().any(|shape| shape.allows(reply));
                allowed || is(&OF_ARGUMENTS) || is(&OF_THE_MOMENT)
            }
            Expect::Queued => *reply == Value::SimpleString("QUEUED".into()) || error.is_some(),
            Expect::Transaction(parts) => match reply {
                Value::Array(replies) => {
                    let pairs = parts.iter().zip(replies);
                    replies.len() == parts.len() && pairs.into_iter().all(|(p, r)| p.allows(r))
                }
                Value::Nil => true, // What it watched has changed.
                _ => is(&["EXECABORT"]) || is(&OF_THE_MOMENT),
            },
            Expect::Marker(text) => *reply == Value::BulkString(text.clone().into_bytes()),
        }
    }
}

/// The errors that depend on what is in the key, and on what the server is doing.
const OF_THE_MOMENT: [&str; 8] = [
    "LOADING ",
    "WRONGTYPE ",
    "OOM ",
    "READONLY ",
    "NOREPLICAS ",
    "MISCONF ",
    "UNBLOCKED ",
    "TRYAGAIN the server is paused or a replica",
];

/// The errors that depend on the arguments alone.
const OF_ARGUMENTS: [&str; 8] = [
    "ERR wrong number of arguments for 'limiter.",
    "ERR limit is not an integer or out of range",
    "ERR invalid expire time in 'limiter.",
    "ERR timeout is not a float or out of range",
    "ERR timeout is negative",
    "ERR syntax error",
    "ERR numlimiters should be greater than 0",
    "ERR value is not an integer or out of range",
];

impl Shape {
    fn allows(self, reply: &Value) -> bool {
        let is_number = |value: &Value| matches!(value, Value::Int(number) if *number >= -1);
        match (self, reply) {
            (Shape::Bit, Value::Int(bit)) => (0..=1).contains(bit),
            (Shape::UpTo(most), Value::Int(number)) => (0..=most).contains(number),
            (Shape::State, Value::Array(parts)) => {
                parts.len() == 4
                    && parts.iter().all(is_number)
                    && matches!(parts[0], Value::Int(0..=2))
            }
            (Shape::Pairs, Value::Array(flat)) => {
                flat.len() % 2 == 0
                    && flat.chunks(2).all(|pair| is_name(&pair[0]) && is_number(&pair[1]))
            }
            (Shape::Pairs, Value::Map(pairs)) => {
                pairs.iter().all(|(name, number)| is_name(name) && is_number(number))
            }
            (Shape::Lines, Value::Array(lines)) => lines.len() > 10 && lines.iter().all(is_name),
            _ => false,
        }
    }
}

fn is_name(value: &Value) -> bool {
    matches!(value, Value::BulkString(_) | Value::SimpleString(_))
}

/// A number as text, and whether it is one as a limit, a ttl and a timeout.
type Number = (&'static str, bool, bool, bool);

const NUMBERS: [Number; 37] = [
    ("0", true, false, true),
    ("-0", false, false, false),
    ("1", true, true, true),
    ("+1", false, false, false),
    ("-1", false, false, false),
    (" 1", false, false, false),
    ("1 ", false, false, false),
    ("1\n", false, false, false),
    ("1\0", false, false, false),
    ("1_000", false, false, false),
    ("1,5", false, false, false),
    ("1e3", false, false, false),
    ("0x10", false, false, false),
    ("\u{661}", false, false, false),
    ("", false, false, false),
    (".", false, false, false),
    (".5", false, true, true),
    ("5.", false, false, false),
    ("1.5", false, true, true),
    ("1.2.3", false, false, false),
    ("0.000", false, false, true),
    ("0.0000000000000000000000000000000000000000000000000000000000001", false, true, true),
    ("00000000000000000000000000000000000000000000000000000000000001", true, true, true),
    ("9007199254740.992", false, false, true),
    ("9007199254740992", true, false, true),
    ("9007199254740993", true, false, true),
    ("9223372036854774", true, false, false),
    ("9223372036854775.807", false, false, false),
    ("9223372036854775807", true, false, false),
    ("9223372036854775808", false, false, false),
    ("18446744073709551615", false, false, false),
    ("18446744073709551616", false, false, false),
    ("1e308", false, false, false),
    ("inf", false, false, false),
    ("-inf", false, false, false),
    ("nan", false, false, false),
    ("99999999999999999999999999999999999999999999999999", false, false, false),
];

/// Scores that others may give their members.
const SCORES: [&str; 10] =
    ["inf", "-inf", "-0", "0", "1e308", "-1e308", "5e-324", "9007199254740.992", "4e9", "1.5"];

/// Words that belong nowhere, or elsewhere.
pub const JUNK: [&str; 8] = ["", "\0", "1", "-1", "2", "COUNT", "NX", "p0"];

/// What is called by scripts: a command of ours, twice with a deletion, in front of an error.
pub const SCRIPTS: [&str; 5] = [
    "return redis.call(unpack(ARGV))",
    "return redis.pcall(unpack(ARGV))",
    "redis.pcall(unpack(ARGV)) redis.call('DEL', KEYS[1]) return redis.pcall(unpack(ARGV))",
    "redis.pcall(unpack(ARGV)) error('on purpose')",
    "redis.setresp(3) redis.pcall('SELECT', 1) return redis.pcall(unpack(ARGV))",
];

/// A library with a function that does as the second script, and one that tidies up after it.
pub const LIBRARY: &str = "#!lua name=fuzz
    redis.register_function('pass_on', function(keys, args) return redis.pcall(unpack(args)) end)
    redis.register_function('tidy_up', function() collectgarbage() end)";

/// Tidies up after scripts.
pub const TIDY_UP: &str = "collectgarbage()";

/// Adds a member that lapses soon.
const SOON: &str = "local t = redis.call('TIME') \
    return redis.call('ZADD', KEYS[1], t[1] + t[2] / 1000000 + ARGV[1], ARGV[2])";

/// The databases that are used.
pub const DATABASES: usize = 4;

/// All prefixes, but for [`JUNK`].
pub fn prefixes() -> Vec<Vec<u8>> {
    let mut prefixes: Vec<Vec<u8>> = (0..8).map(|number| format!("p{number}").into()).collect();
    prefixes.extend(
        [&b""[..], b"\0", b"\r\n$-1\r\n", b"\xff\xfe\x80", b"*1", b"{tag}p"].map(Vec::from),
    );
    // Around the longest that is remembered, and far beyond.
    prefixes.extend([255, 256, 257, 70_000].map(|len| vec![b'x'; len]));
    prefixes
}

/// The time-out of who waits with a limit that is never met: nobody behind it would be answered
/// before.
const SHORT: &[u8] = b"0.002";

fn is_never_met(limit: &[u8]) -> bool {
    limit.iter().all(|digit| *digit == b'0')
}

/// Where the commands come from.
pub struct Source {
    pub rng: Rng,
    /// Whether the server becomes a replica now and then.
    pub role_changes: bool,
    prefixes: Vec<Vec<u8>>,
}

impl Source {
    pub fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        Self { role_changes: rng.bool(), rng, prefixes: prefixes() }
    }

    /// True once in so many times.
    pub fn once_in(&mut self, times: u32) -> bool {
        self.rng.u32(0..times) == 0
    }

    pub fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.rng.usize(0..from.len())]
    }

    pub fn prefix(&mut self) -> Vec<u8> {
        // Mostly a few, so that much happens to each.
        let upto = if self.once_in(5) { self.prefixes.len() } else { 2 };
        self.prefixes[self.rng.usize(0..upto)].clone()
    }

    fn key(&mut self) -> Vec<u8> {
        match self.rng.u32(0..2_000) {
            0 => self.bytes(4 << 20),
            1..10 => self.bytes(100_000),
            10..100 => self.bytes(40),
            100..120 => Vec::new(),
            _ => format!("k{}", self.rng.u8(0..8)).into(),
        }
    }

    fn bytes(&mut self, at_most: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.rng.usize(0..=at_most)];
        self.rng.fill(&mut bytes);
        bytes
    }

    /// A number, and whether `is_one` holds for it; else one of the `usual` ones, which are.
    fn number(&mut self, usual: &[&str], is_one: fn(&Number) -> bool) -> (Vec<u8>, bool) {
        match self.rng.u32(0..60) {
            0 => (vec![b'1' + self.rng.u8(0..9); self.rng.usize(20..5_000)], false),
            1 => {
                let mut bytes = self.bytes(20);
                bytes.push(b'?');
                (bytes, false)
            }
            2..6 => {
                let number = &NUMBERS[self.rng.usize(0..NUMBERS.len())];
                (number.0.into(), is_one(number))
            }
            _ => (self.pick(usual).into(), true),
        }
    }

    fn limit(&mut self) -> (Vec<u8>, bool) {
        self.number(&["1", "1", "1", "2", "3", "0"], |number| number.1)
    }

    fn ttl(&mut self) -> (Vec<u8>, bool) {
        self.number(&["0.001", "0.02", "0.1", "1", "100", "100", "86400"], |number| number.2)
    }

    fn timeout(&mut self) -> (Vec<u8>, bool) {
        self.number(&["0", "0.001", "0.003", "0.01", "0.03", "0.1"], |number| number.3)
    }

    /// Some of these words, each once, in any case; or what is not allowed, and false.
    fn options(&mut self, words: &mut Words, allowed: &[&str]) -> bool {
        let mut right = true;
        for option in allowed {
            if self.once_in(3) {
                let any_case = |letter: u8| {
                    if self.rng.bool() {
                        letter.to_ascii_lowercase()
                    } else {
                        letter
                    }
                };
                words.push(option.bytes().map(any_case).collect());
            }
        }
        if self.once_in(25) {
            right = false;
            words.push(match self.rng.u8(0..4) {
                0 => Vec::new(),
                1 => b"XX".into(),
                2 => vec![b'N'; 30_000],
                _ => b"NX\0".into(),
            });
        } else if self.once_in(25) {
            if let Some(twice) = allowed.first() {
                right = false;
                words.extend([twice.as_bytes().into(), twice.as_bytes().into()]);
            }
        }
        right
    }

    /// A command of ours.
    pub fn ours(&mut self) -> Command {
        let (mut words, shape, right) = match self.rng.u32(0..100) {
            0..25 => self.acquire(),
            25..60 => self.bacquire(),
            60..72 => {
                let mut words = vec![b"LIMITER.RELEASE".to_vec(), self.prefix()];
                let keys = if self.once_in(30) { 1_000 } else { self.rng.usize(1..4) };
                words.extend((0..keys).map(|_| self.key()));
                (words, Shape::UpTo(keys as i64), true)
            }
            72..78 => {
                let (ttl, right) = self.ttl();
                (vec![b"LIMITER.RENEW".into(), self.prefix(), self.key(), ttl], Shape::Bit, right)
            }
            78..82 => (vec![b"LIMITER.COUNT".into(), self.prefix()], Shape::UpTo(i64::MAX), true),
            82..86 => self.holders(),
            86..89 => (vec![b"LIMITER.INFO".into(), self.prefix()], Shape::Pairs, true),
            89..99 => self.macquire(),
            _ => (vec![b"LIMITER.HELP".into()], Shape::Lines, true),
        };
        if self.once_in(25) {
            self.garble(&mut words);
            if let [name, _, _, limit, _, timeout, ..] = &mut words[..] {
                if name == b"LIMITER.BACQUIRE" && is_never_met(limit) {
                    *timeout = SHORT.into();
                }
            }
            return Command { words, expect: Expect::Garbled };
        }
        Command { words, expect: if right { Expect::Runs(shape) } else { Expect::Refused } }
    }

    fn acquire(&mut self) -> (Words, Shape, bool) {
        let ((limit, limit_right), (ttl, ttl_right)) = (self.limit(), self.ttl());
        let mut words = vec![b"LIMITER.ACQUIRE".into(), self.prefix(), self.key(), limit, ttl];
        let options_right = self.options(&mut words, &["NX", "EPHEMERAL", "WITHSTATE"]);
        let state = words[5..].iter().any(|word| word.eq_ignore_ascii_case(b"WITHSTATE"));
        let shape = if state { Shape::State } else { Shape::Bit };
        (words, shape, limit_right && ttl_right && options_right)
    }

    fn bacquire(&mut self) -> (Words, Shape, bool) {
        let ((limit, limit_right), (ttl, ttl_right)) = (self.limit(), self.ttl());
        let (mut timeout, mut timeout_right) = self.timeout();
        if is_never_met(&limit) {
            (timeout, timeout_right) = (SHORT.into(), true);
        }
        let mut words =
            vec![b"LIMITER.BACQUIRE".into(), self.prefix(), self.key(), limit, ttl, timeout];
        let options_right = self.options(&mut words, &["EPHEMERAL"]);
        (words, Shape::Bit, limit_right && ttl_right && timeout_right && options_right)
    }

    fn holders(&mut self) -> (Words, Shape, bool) {
        let mut words = vec![b"LIMITER.HOLDERS".into(), self.prefix()];
        let mut right = true;
        if self.rng.bool() {
            let (count, is_one) = self.number(&["0", "1", "10"], |number| number.1);
            words.extend([b"count".into(), count]);
            right = is_one;
        }
        (words, Shape::Pairs, right)
    }

    fn macquire(&mut self) -> (Words, Shape, bool) {
        let how_many = if self.once_in(50) { 200 } else { self.rng.usize(1..4) };
        let mut names: Words = (0..how_many).map(|_| self.prefix()).collect();
        if !self.once_in(10) {
            names.sort();
            names.dedup();
        }
        let number = names.len();
        let mut distinct = names.clone();
        distinct.sort();
        distinct.dedup();
        let mut right = distinct.len() == number;
        let mut text = number.to_string();
        if self.once_in(15) {
            right = false;
            text = match self.pick(&["less", "0", "-1", "1000000", "9223372036854775807", ""]) {
                "less" => (number - 1).to_string(),
                other => other.into(),
            };
        }
        let (ttl, ttl_right) = self.ttl();
        let mut words: Words = vec![b"LIMITER.MACQUIRE".into(), text.into()];
        words.extend(names);
        words.extend([self.key(), ttl]);
        right &= ttl_right;
        for _ in 0..number {
            let (limit, limit_right) = self.limit();
            right &= limit_right;
            words.push(limit);
        }
        right &= self.options(&mut words, &["NX", "EPHEMERAL"]);
        (words, Shape::Bit, right)
    }

    /// Takes a word away, doubles one, swaps two, or puts in what does not belong there. No random
    /// bytes become a prefix.
    fn garble(&mut self, words: &mut Words) {
        let (at, other) = (self.rng.usize(1..=words.len()), self.rng.usize(1..=words.len()));
        let (is_word, is_other) = (1 < at && at < words.len(), 1 < other && other < words.len());
        match self.rng.u8(0..5) {
            0 if is_word => drop(words.remove(at)),
            1 => words.truncate(at),
            2 if is_word && is_other => words.insert(at, words[other].clone()),
            3 if is_word && is_other => words.swap(at, other),
            _ => words.insert(at, self.pick(&JUNK).into()),
        }
    }

    /// One of ours inside of something else.
    pub fn wrapped(&mut self) -> Command {
        let inner = self.ours().words;
        let mut words: Words;
        let expect = Expect::Anything;
        match self.rng.u8(0..10) {
            0..5 => {
                let script = self.pick(&SCRIPTS);
                words = vec![b"EVAL".into(), script.into(), b"1".into(), self.prefix()];
            }
            5..7 => words = vec![b"FCALL".into(), b"pass_on".into(), b"0".into()],
            7 => words = vec![b"COMMAND".into(), b"GETKEYSANDFLAGS".into()],
            _ => words = vec![b"COMMAND".into(), b"GETKEYS".into()],
        }
        words.extend(inner);
        Command { words, expect }
    }

    /// A command of the server's own, which gets in the way.
    pub fn foreign(&mut self) -> Command {
        let (prefix, other) = (self.prefix(), self.prefix());
        let score = self.pick(&SCORES);
        let (db, another) = (self.rng.usize(0..DATABASES), self.rng.usize(0..DATABASES));
        let texts = |words: &[&str]| words.iter().map(|word| word.as_bytes().into()).collect();
        let on = |words: &[&str]| -> Words {
            // The first word, then the prefix.
            let mut words: Words = texts(words);
            words.insert(1, prefix.clone());
            words
        };
        let words: Words = match self.rng.u32(0..911) {
            0..70 => on(&["ZADD", score, self.pick(&["k0", "k1", "foreign"])]),
            70..130 => {
                let after = self.pick(&["-1", "0.001", "0.01", "0.1", "5"]);
                let mut words: Words = texts(&["EVAL", SOON, "1", after, "k1"]);
                words.insert(3, prefix.clone());
                words
            }
            130..135 => {
                let mut words = on(&["ZADD"]);
                for member in 0..400 {
                    words.extend([score.into(), format!("many{member}").into()]);
                }
                words
            }
            135..195 => on(&["ZREM", "k0", "k1", "k2"]),
            195..210 => on(&[self.pick(&["ZPOPMIN", "ZPOPMAX"])]),
            210..225 => on(&["ZREMRANGEBYRANK", "0", "-2"]),
            225..295 => on(&[self.pick(&["DEL", "UNLINK"])]),
            295..335 => vec![b"RENAME".into(), prefix, other],
            335..360 => vec![b"COPY".into(), prefix, other, b"REPLACE".into()],
            360..375 => vec![
                b"COPY".into(),
                prefix,
                other,
                b"DB".into(),
                db.to_string().into(),
                b"REPLACE".into(),
            ],
            375..395 => on(&["MOVE", &db.to_string()]),
            395..410 => vec![b"ZRANGESTORE".into(), prefix, other, b"0".into(), b"-1".into()],
            410..460 => {
                let ms = self.pick(&["-1", "0", "1", "5", "100", "9223372036854775000"]);
                on(&[self.pick(&["PEXPIRE", "PEXPIREAT"]), ms])
            }
            460..475 => on(&["PERSIST"]),
            475..495 => on(&["SET", "a string"]),
            495..503 => on(&["RPUSH", "a", "list"]),
            503..511 => on(&["HSET", "a", "hash"]),
            511..519 => on(&["XADD", "*", "a", "stream"]),
            519..527 => on(&["SADD", "a", "set"]),
            527..547 => texts(&["SWAPDB", &db.to_string(), &another.to_string()]),
            547..559 => {
                // SYNC blocks the client in Redis 8, and a change of role closes it after "OK".
                let how = if self.role_changes { "ASYNC" } else { self.pick(&["SYNC", "ASYNC"]) };
                texts(&[self.pick(&["FLUSHDB", "FLUSHALL"]), how])
            }
            559..562 => texts(&["DEBUG", "RELOAD"]),
            562..577 => texts(&["DEBUG", "SLEEP", "0.001"]),
            577..585 => texts(&["DEBUG", "SET-ACTIVE-EXPIRE", self.pick(&["0", "1"])]),
            585..615 => texts(&[
                "CLIENT",
                "PAUSE",
                self.pick(&["1", "5", "20"]),
                self.pick(&["WRITE", "ALL"]),
            ]),
            615..640 => texts(&["CLIENT", "UNPAUSE"]),
            640..652 => texts(&[
                "CONFIG",
                "SET",
                "maxmemory",
                self.pick(&["0", "1", "2mb", "8mb"]),
                "maxmemory-policy",
                self.pick(&["noeviction", "allkeys-random", "volatile-ttl"]),
            ]),
            652..722 => texts(&["CONFIG", "SET", "maxmemory", "0"]),
            722..725 => texts(&["CONFIG", "SET", "min-replicas-to-write", "1"]),
            725..765 => texts(&["CONFIG", "SET", "min-replicas-to-write", "0"]),
            765..777 => {
                texts(&["CONFIG", "SET", "notify-keyspace-events", self.pick(&["", "KEA", "Kz"])])
            }
            777..789 => {
                let entries = self.pick(&["0", "2", "128"]);
                texts(&["CONFIG", "SET", "zset-max-listpack-entries", entries])
            }
            789..795 if self.role_changes => texts(&["REPLICAOF", "127.0.0.1", "1"]),
            795..865 => texts(&["REPLICAOF", "NO", "ONE"]),
            865..867 => texts(&["BGREWRITEAOF"]),
            867..877 => texts(&["HELLO", self.pick(&["2", "3"])]),
            877..885 => texts(&["CLIENT", self.pick(&["NO-TOUCH", "NO-EVICT"]), "ON"]),
            885..889 => texts(&["CLIENT", "TRACKING", "ON", "BCAST"]),
            889..897 => texts(&["INFO", self.pick(&["limiter", "everything", "commandstats"])]),
            897..901 => texts(&["COMMAND", self.pick(&["DOCS", "INFO"]), "limiter.macquire"]),
            _ => texts(&["SELECT", &db.to_string()]),
        };
        Command { words, expect: Expect::Anything }
    }
}
