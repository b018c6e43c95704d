//! `LIMITER.BACQUIRE prefix key limit ttl timeout [EPHEMERAL]`: a slot, waiting in line for it.

use super::errors;
use super::parse::{self, Timeout};
use crate::ffi::{
    Access, Arg, BlockedClient, Blocking, Command, CommandResult, Context, Keys, Reply, Spec, Str,
};
use crate::limiter::{Outcome, Reacquire};
use crate::waiters::{self, Answer, Ask, Turn, Until};

/// Takes a slot as ACQUIRE does, or waits in line for one: first come, first served.
///
/// - `timeout`: seconds, a decimal number >= 0; 0 = no limit.
/// - The lease's ttl starts when it is granted. A waiter whose own limit is not met blocks those
///   behind it.
/// - In MULTI and scripts it answers like ACQUIRE.
///
/// Replies 1 = the key holds a lease, 0 = timed out. Errors: those of ACQUIRE; timeout; UNBLOCKED
/// if the server became a replica or the slot moved: try again there.
pub struct Bacquire;

impl Command for Bacquire {
    const SPEC: Spec = Spec {
        name: c"limiter.bacquire",
        flags: c"write deny-oom blocking",
        arity: -6,
        keys: Keys::First(Access::Update),
        summary: c"Takes a slot of a limiter, or waits in line until one is free.",
        complexity: c"O(log(N)+log(W)+M) with N the number of leases, W of waiters and M of lapsed leases pruned.",
        since: super::SINCE_CORE,
        args: &[
            Arg::key(c"prefix"),
            Arg::string(c"key"),
            Arg::integer(c"limit"),
            Arg::decimal(c"ttl"),
            Arg::decimal(c"timeout"),
            Arg::option(c"ephemeral", c"EPHEMERAL"),
        ],
    };

    fn run(ctx: &Context, args: &[Str<'_>]) -> CommandResult {
        let [_, prefix, key, limit, ttl, timeout, options @ ..] = args else {
            return Err(errors::arity(Self::SPEC.name));
        };
        let now_ms = ctx.now_ms();
        let limit = parse::integer(limit.bytes()).ok_or(errors::LIMIT)?;
        let ttl_ms = parse::ttl_ms(ttl.bytes(), now_ms)
            .ok_or_else(|| errors::expire_time(Self::SPEC.name))?;
        let deadline_ms = match parse::timeout(timeout.bytes(), now_ms) {
            Timeout::Never => None,
            Timeout::At(deadline_ms) => Some(deadline_ms),
            Timeout::Negative => return Err(errors::TIMEOUT_NEGATIVE),
            Timeout::Invalid => return Err(errors::TIMEOUT),
        };
        let until = match options {
            [] => Until::Lapse,
            [word] if word.bytes().eq_ignore_ascii_case(b"EPHEMERAL") => {
                Until::Closed(ctx.connection().ok_or(errors::NO_CONNECTION)?)
            }
            _ => return Err(errors::SYNTAX),
        };
        let ask = Ask { prefix: *prefix, key: *key, limit, ttl_ms, until };

        match ctx.connection() {
            Some(connection) if !ctx.must_not_block() => {
                let turn =
                    waiters::acquire_or_wait::<Self>(ctx, &ask, connection, deadline_ms, now_ms)?;
                Ok(match turn {
                    Turn::Granted => Reply::Integer(1),
                    Turn::Waits => Reply::Later,
                })
            }
            _ => {
                let taken = waiters::acquire(ctx, &ask, Reacquire::Refresh, now_ms)?;
                Ok(Reply::Integer(i64::from(taken.outcome != Outcome::Denied)))
            }
        }
    }
}

impl Blocking for Bacquire {
    fn reply(_ctx: &Context, number: u64) -> CommandResult {
        match waiters::reply(number) {
            Some(Answer::Granted) => Ok(Reply::Integer(1)),
            Some(Answer::TimedOut) | None => Ok(Reply::Integer(0)),
            Some(Answer::WrongType) => Err(errors::WRONG_TYPE),
            Some(Answer::Moved) => Err(errors::MOVED),
        }
    }

    fn gone(ctx: &Context, client: BlockedClient) {
        waiters::gone(ctx, client);
    }

    fn given_up(ctx: &Context, client: BlockedClient) -> Reply {
        waiters::gone(ctx, client);
        Reply::Integer(0)
    }
}
