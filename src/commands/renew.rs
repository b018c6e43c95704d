//! `LIMITER.RENEW prefix key ttl`: a holder's heartbeat.

use super::{errors, parse};
use crate::ffi::{Access, Arg, Command, CommandResult, Context, Keys, Reply, SortedSet, Spec, Str};
use crate::limiter;

/// Moves the end of a live lease to now + ttl, longer or shorter.
///
/// Replies 1, or 0 if the key holds no live lease: a lost lease is never revived. Errors: ttl,
/// WRONGTYPE; the server's own READONLY. Goes on out of memory.
pub struct Renew;

impl Command for Renew {
    const SPEC: Spec = Spec {
        name: c"limiter.renew",
        flags: c"write fast",
        arity: 4,
        keys: Keys::First(Access::Update),
        summary: c"Moves the end of a live lease to now + ttl. A lost lease is not revived.",
        complexity:
            c"O(log(N)+M) with N the number of leases and M the number of lapsed ones pruned.",
        since: super::SINCE_CORE,
        args: &[Arg::key(c"prefix"), Arg::string(c"key"), Arg::decimal(c"ttl")],
    };

    fn run(ctx: &Context, args: &[Str<'_>]) -> CommandResult {
        let [_, prefix, key, ttl] = args else {
            return Err(errors::arity(Self::SPEC.name));
        };
        let now_ms = ctx.now_ms();
        let lapse_ms = parse::seconds_as_ms(ttl.bytes())
            .and_then(|ttl_ms| limiter::lapse_after(now_ms, ttl_ms))
            .ok_or_else(|| errors::expire_time(Self::SPEC.name))?;

        let mut set = SortedSet::open(ctx, *prefix)?;
        let renewed = limiter::renew(&mut set, key, lapse_ms, now_ms);

        Ok(Reply::Integer(i64::from(renewed)))
    }
}
