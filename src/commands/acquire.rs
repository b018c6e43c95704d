//! `LIMITER.ACQUIRE prefix key limit ttl [NX] [EPHEMERAL] [WITHSTATE]`: a slot now, or not at all.

use super::errors::{self, ErrorText};
use super::parse;
use crate::ffi::{
    score_of_rank, Access, Arg, Command, CommandResult, Context, Keys, Reply, Spec, Str,
};
use crate::limiter::{self, NextFree, Outcome, Reacquire};
use crate::waiters::{self, Ask, Taken, Until};

/// Prunes lapsed leases, counts, adds: one atomic step.
///
/// - `prefix`: the limiter, a key. `key`: the holder, any bytes.
/// - `limit`: how many leases may be live, 0 to 2^63-1. `ttl`: seconds, a decimal number > 0.
/// - `NX`: a holder that is in already is denied, its lease left alone.
/// - `EPHEMERAL`: the lease also ends when this connection closes.
/// - `WITHSTATE`: the reply is an array of outcome, live leases, milliseconds until a slot is
///   free (-1: never), clients waiting.
///
/// Replies 1 = the key holds a lease to now + ttl, 0 = denied. Errors: limit, ttl, syntax,
/// WRONGTYPE; the server's own OOM and READONLY.
pub struct Acquire;

impl Command for Acquire {
    const SPEC: Spec = Spec {
        name: c"limiter.acquire",
        flags: c"write deny-oom fast",
        arity: -5,
        keys: Keys::First(Access::Update),
        summary: c"Takes a slot of a limiter if one is free, or refreshes the lease the key holds.",
        complexity:
            c"O(log(N)+M) with N the number of leases and M the number of lapsed ones pruned.",
        since: super::SINCE_CORE,
        args: &[
            Arg::key(c"prefix"),
            Arg::string(c"key"),
            Arg::integer(c"limit"),
            Arg::decimal(c"ttl"),
            Arg::option(c"nx", c"NX"),
            Arg::option(c"ephemeral", c"EPHEMERAL"),
            Arg::option(c"withstate", c"WITHSTATE"),
        ],
    };

    fn run(ctx: &Context, args: &[Str<'_>]) -> CommandResult {
        let [_, prefix, key, limit, ttl, options @ ..] = args else {
            return Err(errors::arity(Self::SPEC.name));
        };
        let now_ms = ctx.now_ms();
        let limit = parse::integer(limit.bytes()).ok_or(errors::LIMIT)?;
        let ttl_ms = parse::ttl_ms(ttl.bytes(), now_ms)
            .ok_or_else(|| errors::expire_time(Self::SPEC.name))?;
        let Options { reacquire, until, answer } = Options::parse(ctx, options)?;

        let ask = Ask { prefix: *prefix, key: *key, limit, ttl_ms, until };
        let Taken { outcome, live, lapsed, waiting } =
            waiters::acquire(ctx, &ask, reacquire, now_ms)?;

        Ok(match answer {
            Answer::Integer => Reply::Integer(i64::from(outcome != Outcome::Denied)),
            Answer::State => {
                let wait_ms = match outcome {
                    Outcome::Denied => wait_ms(ctx, *prefix, live, lapsed, limit, now_ms),
                    Outcome::Acquired | Outcome::Refreshed => 0,
                };
                let waiting = i64::try_from(waiting).unwrap_or(i64::MAX);
                let live = i64::try_from(live).unwrap_or(i64::MAX);
                Reply::Integers(vec![code(outcome), live, wait_ms, waiting])
            }
        })
    }
}

/// What the options ask for.
pub(super) struct Options {
    pub reacquire: Reacquire,
    pub until: Until,
    pub answer: Answer,
}

/// What is replied.
#[derive(PartialEq)]
pub(super) enum Answer {
    Integer,
    State,
}

impl Options {
    pub fn parse(ctx: &Context, words: &[Str<'_>]) -> Result<Self, ErrorText> {
        let (reacquire, until, answer) = (Reacquire::Refresh, Until::Lapse, Answer::Integer);
        let mut options = Self { reacquire, until, answer };
        for word in words {
            let word = word.bytes();
            if word.eq_ignore_ascii_case(b"NX") && options.reacquire == Reacquire::Refresh {
                options.reacquire = Reacquire::Deny;
            } else if word.eq_ignore_ascii_case(b"EPHEMERAL") && options.until == Until::Lapse {
                options.until = Until::Closed(ctx.connection().ok_or(errors::NO_CONNECTION)?);
            } else if word.eq_ignore_ascii_case(b"WITHSTATE") && options.answer == Answer::Integer {
                options.answer = Answer::State;
            } else {
                return Err(errors::SYNTAX);
            }
        }
        Ok(options)
    }
}

/// The outcome's number in the reply to WITHSTATE.
fn code(outcome: Outcome) -> i64 {
    match outcome {
        Outcome::Denied => 0,
        Outcome::Acquired => 1,
        Outcome::Refreshed => 2,
    }
}

/// Milliseconds until a newcomer finds a slot; -1 if none ever will.
fn wait_ms(ctx: &Context, prefix: Str<'_>, live: u64, lapsed: u64, limit: u64, now_ms: i64) -> i64 {
    const NEVER: i64 = -1;
    let rank = match limiter::next_free(live, limit) {
        NextFree::Now => return 0,
        NextFree::Never => return NEVER,
        NextFree::WhenLapsed { rank } => lapsed.saturating_add(rank),
    };
    match score_of_rank(ctx, prefix, rank) {
        None => 0, // Gone between the two looks, and its slot is free.
        Some(score) => {
            limiter::lapse_ms(score).map_or(NEVER, |ms| ms.saturating_sub(now_ms).max(0))
        }
    }
}
