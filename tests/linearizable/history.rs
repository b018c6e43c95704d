//! What clients saw of one limiter: a history of operations, and whether a limiter can have done
//! that.
//!
//! A history reads and prints as text, a line for each operation: milliseconds of request and
//! reply, who, what, reply. Times in commands are milliseconds too.
//!
//! ```text
//!  0.0   0.4  anna ACQUIRE key 1 20 = 1          key, limit, ttl, perhaps NX
//!  0.1  15.2  bert BACQUIRE new 1 20 50 = 0      and time-out
//!  0.1  15.2  bert BACQUIRE new 1 20 50 = ?      not answered: it may have happened
//!  0.1  15.2  bert BACQUIRE new 1 20 50 WAITS 0.3 = 1    then it was seen to wait
//!  0.1  15.2  bert BACQUIRE new 1 20 50 WHOLE 9.3 = ?    then the connection was whole still
//!  0.2   0.6  carl RELEASE key = ERROR           it did not happen
//!  0.7   0.9  dora ACQUIRE new 1 20 = 0 1 19 1   with WITHSTATE
//!  1.0   1.1  dora HOLDERS = key 18              and milliseconds left
//!  1.2   1.3  dora INFO = 1 1 17                 held, waiting, next_lapse_ms
//! ```

use std::fmt;
use std::sync::Arc;

use todc_utils::{Action, History, WGLChecker};

use crate::limiter::{Limiter, Part, Step, STEPS_LEFT};

#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    Acquire { key: Arc<str>, limit: usize, ttl_ms: i64, is_new: bool },
    Bacquire { key: Arc<str>, limit: usize, ttl_ms: i64, timeout_ms: i64 },
    Release { key: Arc<str> },
    Renew { key: Arc<str>, ttl_ms: i64 },
    Count,
    Holders,
    Info,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Number(i64),
    /// Of WITHSTATE.
    State([i64; 4]),
    Holders(Vec<(Arc<str>, i64)>),
    /// `held`, `waiting`, `next_lapse_ms`.
    Info([i64; 3]),
    /// It was refused, or its wait ended without a grant.
    Error,
    /// The connection broke before.
    Unknown,
}

/// What a client asked and saw, by the clock of this machine, which is the server's.
#[derive(Clone, Debug)]
pub struct Operation {
    pub client: String,
    pub call: Call,
    pub reply: Reply,
    pub invoked_us: i64,
    /// When there was the reply, or nothing could happen any more.
    pub returned_us: i64,
    /// When it was seen to wait.
    pub waits_us: Option<i64>,
    /// If it was not answered: until then the connection was whole.
    pub whole_us: Option<i64>,
    /// Which master it was sent to, in the order of their reigns.
    pub reign: usize,
}

impl Call {
    pub fn reads_only(&self) -> bool {
        matches!(self, Self::Count | Self::Holders | Self::Info)
    }

    /// Whether it changes nothing, whatever there is.
    fn only_looks(&self) -> bool {
        self.reads_only() || matches!(self, Self::Acquire { limit: 0, is_new: true, .. })
    }
}

impl Operation {
    /// When it was in line at the latest.
    pub fn arrived_us(&self) -> i64 {
        self.waits_us.unwrap_or(self.returned_us)
    }
}

/// How many steps a search may try, some seconds of it. Few need more than some hundred; but where
/// everything overlaps the orders are too many.
const STEPS: usize = if cfg!(debug_assertions) { 50_000 } else { 1_000_000 };

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    Right,
    Wrong,
    /// The search took too long.
    Undecided,
}

/// Whether there is an order, and a moment for each operation between its request and its reply,
/// in which a limiter would have given these replies.
pub fn check(operations: &[Operation]) -> Verdict {
    let mut actions = Vec::new();
    for (number, operation) in operations.iter().enumerate() {
        let parts: &[Part] = match (&operation.call, &operation.reply) {
            (Call::Bacquire { .. }, _) => &[Part::Arrives, Part::Ends],
            (_, Reply::Error) => &[],
            (call, Reply::Unknown) if call.only_looks() => &[],
            _ => &[Part::Whole],
        };
        let shared = Arc::new(operation.clone());
        for (place, part) in parts.iter().enumerate() {
            let step = Step { part: *part, operation: shared.clone(), number };
            let process = 2 * number + place;
            let end_us = match part {
                Part::Arrives => operation.arrived_us(),
                Part::Whole | Part::Ends => operation.returned_us,
            };
            // At the same microsecond nobody is first.
            actions.push((operation.invoked_us, 0, number, process, Action::Call(step.clone())));
            actions.push((end_us, 1, number, process, Action::Response(step)));
        }
    }
    actions.sort_by_key(|(at_us, is_response, number, ..)| (*at_us, *is_response, *number));
    let actions = actions.into_iter().map(|(.., process, action)| (process, action));
    let actions: Vec<_> = actions.collect();
    if actions.is_empty() {
        return Verdict::Right;
    }
    STEPS_LEFT.set(STEPS);
    match WGLChecker::<Limiter>::is_linearizable(History::from_actions(actions)) {
        true => Verdict::Right,
        false if STEPS_LEFT.get() == 0 => Verdict::Undecided,
        false => Verdict::Wrong,
    }
}

/// The history as it was known then: what was not answered may have happened or not.
pub fn until(operations: &[Operation], at_us: i64) -> Vec<Operation> {
    let known = operations.iter().filter(|operation| operation.invoked_us <= at_us);
    let cut = |operation: &Operation| {
        let mut operation = operation.clone();
        if operation.returned_us > at_us {
            operation.returned_us = at_us;
            operation.reply = Reply::Unknown;
            if let Call::Bacquire { .. } = operation.call {
                let whole_us = operation.whole_us.unwrap_or(at_us);
                operation.whole_us = Some(whole_us.min(at_us)); // In line still.
            }
        }
        operation.waits_us = operation.waits_us.filter(|waits_us| *waits_us <= at_us);
        operation
    };
    known.map(cut).collect()
}

/// The history up to the first reply that no limiter could have given.
pub fn shortest_wrong(operations: &[Operation]) -> Vec<Operation> {
    let mut ends_us: Vec<_> = operations.iter().map(|operation| operation.returned_us).collect();
    ends_us.sort_unstable();
    let is_wrong = |at_us: &i64| check(&until(operations, *at_us)) == Verdict::Wrong;
    let right = ends_us.partition_point(|end_us| !is_wrong(end_us));
    until(operations, ends_us[right.min(ends_us.len() - 1)])
}

/// How many of the first master's acknowledged operations must have been lost with it, from some
/// moment on, so that what the next one replied is right; or what was found instead.
pub fn lost(operations: &[Operation]) -> Result<usize, Verdict> {
    let (first, next): (Vec<_>, Vec<_>) =
        operations.iter().cloned().partition(|operation| operation.reign == 0);
    let alone = check(&first);
    if alone != Verdict::Right {
        return Err(alone); // A master is right as long as it reigns.
    }
    let mut moments_us: Vec<_> = first.iter().map(|operation| operation.invoked_us - 1).collect();
    moments_us.sort_unstable();
    moments_us.push(i64::MAX);
    let mut verdict = Verdict::Wrong;
    for at_us in moments_us.into_iter().rev() {
        match check(&[until(&first, at_us), next.clone()].concat()) {
            Verdict::Right => {
                let is_lost = |operation: &&Operation| {
                    operation.invoked_us > at_us && operation.reply != Reply::Unknown
                };
                return Ok(first.iter().filter(is_lost).count());
            }
            Verdict::Undecided => verdict = Verdict::Undecided,
            Verdict::Wrong => {}
        }
    }
    Err(verdict)
}

/// The history as text.
pub fn text(operations: &[Operation]) -> String {
    let mut sorted: Vec<_> = operations.iter().collect();
    sorted.sort_by_key(|operation| operation.invoked_us);
    let start_us = sorted.first().map_or(0, |first| first.invoked_us.div_euclid(1000) * 1000);
    let line = |operation: &&Operation| {
        let Operation { client, call, reply, invoked_us, returned_us, waits_us, whole_us, .. } =
            operation;
        let ms = |us: i64| (us - start_us) as f64 / 1000.0;
        let (from, to) = (ms(*invoked_us), ms(*returned_us));
        let note = |word, us: &Option<i64>| {
            us.map_or(String::new(), |us| format!(" {word} {:.3}", ms(us)))
        };
        let (waits, whole) = (note("WAITS", waits_us), note("WHOLE", whole_us));
        format!("{from:9.3} {to:9.3}  {client:6} {call}{waits}{whole} = {reply}\n")
    };
    sorted.iter().map(line).collect()
}

/// The history that a text tells.
pub fn parse(text: &str) -> Vec<Operation> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.map(|line| parse_line(line).unwrap_or_else(|| panic!("{line}"))).collect()
}

fn parse_line(line: &str) -> Option<Operation> {
    let (asked, seen) = line.split_once(" =")?;
    let mut words = asked.split_whitespace();
    let us = |word: &str| Some((word.parse::<f64>().ok()? * 1000.0).round() as i64);
    let (invoked_us, returned_us) = (us(words.next()?)?, us(words.next()?)?);
    let client = words.next()?.to_string();
    let words: Vec<_> = words.collect();
    let number = |word: &str| word.parse::<i64>().ok();
    let call = match words[..] {
        ["ACQUIRE", key, limit, ttl, ref options @ ..] => Call::Acquire {
            key: key.into(),
            limit: limit.parse().ok()?,
            ttl_ms: number(ttl)?,
            is_new: options.contains(&"NX"),
        },
        ["BACQUIRE", key, limit, ttl, timeout, ..] => Call::Bacquire {
            key: key.into(),
            limit: limit.parse().ok()?,
            ttl_ms: number(ttl)?,
            timeout_ms: number(timeout)?,
        },
        ["RELEASE", key] => Call::Release { key: key.into() },
        ["RENEW", key, ttl] => Call::Renew { key: key.into(), ttl_ms: number(ttl)? },
        ["COUNT"] => Call::Count,
        ["HOLDERS"] => Call::Holders,
        ["INFO"] => Call::Info,
        _ => return None,
    };
    let seen: Vec<_> = seen.split_whitespace().collect();
    let reply = match (&call, &seen[..]) {
        (_, ["?"]) => Reply::Unknown,
        (_, ["ERROR"]) => Reply::Error,
        (Call::Holders, pairs) => {
            let pair = |pair: &[&str]| Some((pair[0].into(), number(pair[1])?));
            Reply::Holders(pairs.chunks(2).map(pair).collect::<Option<_>>()?)
        }
        (_, [one]) => Reply::Number(number(one)?),
        (_, many) => {
            let numbers: Vec<_> = many.iter().map(|word| number(word)).collect::<Option<_>>()?;
            match call {
                Call::Info => Reply::Info(numbers.try_into().ok()?),
                _ => Reply::State(numbers.try_into().ok()?),
            }
        }
    };
    let note = |name| us(words[words.iter().position(|word| *word == name)? + 1]);
    let (waits_us, whole_us, reign) = (note("WAITS"), note("WHOLE"), 0);
    Some(Operation { client, call, reply, invoked_us, returned_us, waits_us, whole_us, reign })
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Acquire { key, limit, ttl_ms, is_new } => {
                let option = if *is_new { " NX" } else { "" };
                write!(f, "ACQUIRE {key} {limit} {ttl_ms}{option}")
            }
            Self::Bacquire { key, limit, ttl_ms, timeout_ms } => {
                write!(f, "BACQUIRE {key} {limit} {ttl_ms} {timeout_ms}")
            }
            Self::Release { key } => write!(f, "RELEASE {key}"),
            Self::Renew { key, ttl_ms } => write!(f, "RENEW {key} {ttl_ms}"),
            Self::Count => write!(f, "COUNT"),
            Self::Holders => write!(f, "HOLDERS"),
            Self::Info => write!(f, "INFO"),
        }
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let numbers =
            |numbers: &[i64]| numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        match self {
            Self::Number(number) => write!(f, "{number}"),
            Self::State(state) => write!(f, "{}", numbers(state)),
            Self::Info(info) => write!(f, "{}", numbers(info)),
            Self::Holders(holders) => {
                let pairs: Vec<_> = holders.iter().map(|(key, ms)| format!("{key} {ms}")).collect();
                write!(f, "{}", pairs.join(" "))
            }
            Self::Error => write!(f, "ERROR"),
            Self::Unknown => write!(f, "?"),
        }
    }
}
