//! `LIMITER.RENEW prefix key ttl`: a holder's heartbeat.

use super::{errors, parse};
use crate::ffi::{Access, Arg, Command, CommandResult, Context, Keys, Reply, Spec, Str};
use crate::waiters;

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
        let ttl_ms = parse::ttl_ms(ttl.bytes(), now_ms)
            .ok_or_else(|| errors::expire_time(Self::SPEC.name))?;

        let renewed = waiters::renew(ctx, *prefix, *key, ttl_ms, now_ms)?;

        Ok(Reply::Integer(i64::from(renewed)))
    }
}
