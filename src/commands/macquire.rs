//! `LIMITER.MACQUIRE numlimiters prefix [prefix ...] key ttl limit [limit ...] [NX] [EPHEMERAL]`: a
//! slot under several limits at once, or none.

use std::collections::HashSet;

use super::acquire::{Answer, Options};
use super::errors;
use super::parse;
use crate::ffi::{Access, Arg, Command, CommandResult, Context, Keys, Reply, Spec, Str};
use crate::waiters::{self, Ask};

/// Takes a slot in each of the limiters, or in none: one atomic step.
///
/// - `numlimiters`: how many prefixes follow, and limits at the end, in the same order.
/// - `key`, `ttl`, `limit`, `NX`, `EPHEMERAL`: as for ACQUIRE. A key that holds a lease in some of
///   the limiters has it refreshed there; with `NX` it is denied.
///
/// Replies 1 = the key holds a lease to now + ttl in each, 0 = one of them denied it. Errors:
/// numlimiters, limit, ttl, syntax (also a prefix that is named twice), WRONGTYPE; the server's own
/// OOM, READONLY and CROSSSLOT.
pub struct Macquire;

impl Command for Macquire {
    const SPEC: Spec = Spec {
        name: c"limiter.macquire",
        flags: c"write deny-oom getkeys-api",
        arity: -6,
        keys: Keys::Counted(Access::Update),
        summary: c"Takes a slot in each of several limiters, or in none.",
        complexity: c"O(L*log(N)+M) with L the number of limiters, N of leases and M of lapsed leases pruned.",
        since: super::SINCE_CORE,
        args: &[
            Arg::integer(c"numlimiters"),
            Arg::key(c"prefix").multiple(),
            Arg::string(c"key"),
            Arg::decimal(c"ttl"),
            Arg::integer(c"limit").multiple(),
            Arg::option(c"nx", c"NX"),
            Arg::option(c"ephemeral", c"EPHEMERAL"),
        ],
    };

    fn run(ctx: &Context, args: &[Str<'_>]) -> CommandResult {
        let [_, number, rest @ ..] = args else {
            return Err(errors::arity(Self::SPEC.name));
        };
        let now_ms = ctx.now_ms();
        let number = parse::integer(number.bytes()).filter(|number| *number > 0);
        let number = usize::try_from(number.ok_or(errors::NUMLIMITERS)?).unwrap_or(usize::MAX);
        let (prefixes, rest) = rest.split_at_checked(number).ok_or(errors::SYNTAX)?;
        let [key, ttl, rest @ ..] = rest else {
            return Err(errors::SYNTAX);
        };
        let (limits, options) = rest.split_at_checked(number).ok_or(errors::SYNTAX)?;
        let names: HashSet<&[u8]> = prefixes.iter().map(Str::bytes).collect();
        if names.len() < prefixes.len() {
            return Err(errors::SYNTAX);
        }
        let limit = |text: &Str<'_>| parse::integer(text.bytes()).ok_or(errors::LIMIT);
        let limits = limits.iter().map(limit).collect::<Result<Vec<_>, _>>()?;
        let ttl_ms = parse::ttl_ms(ttl.bytes(), now_ms)
            .ok_or_else(|| errors::expire_time(Self::SPEC.name))?;
        let Options { reacquire, until, answer: Answer::Integer } = Options::parse(ctx, options)?
        else {
            return Err(errors::SYNTAX); // WITHSTATE tells of one limiter.
        };

        let Some(first) = prefixes.first() else { return Err(errors::NUMLIMITERS) };
        let ask = Ask { prefix: *first, key: *key, limit: 0, ttl_ms, until };
        let taken = waiters::acquire_all(ctx, prefixes, &limits, &ask, reacquire, now_ms)?;

        Ok(Reply::Integer(i64::from(taken)))
    }
}
