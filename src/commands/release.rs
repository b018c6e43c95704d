//! `LIMITER.RELEASE prefix key [key ...]`: give slots back.

use super::errors;
use crate::ffi::{Access, Arg, Command, CommandResult, Context, Keys, Reply, Spec, Str};
use crate::waiters;

/// Ends the leases of the keys, and hands their slots to the line.
///
/// Replies with how many of them were live. A lapsed lease counts 0, since its holder had lost
/// it, and is removed. Errors: WRONGTYPE; the server's own READONLY. Goes on out of memory.
pub struct Release;

impl Command for Release {
    const SPEC: Spec = Spec {
        name: c"limiter.release",
        flags: c"write fast",
        arity: -3,
        keys: Keys::First(Access::Delete),
        summary: c"Gives back the slots that the keys hold in a limiter.",
        complexity:
            c"O((K+M)*log(N)) with N the number of leases, K of keys and M of lapsed leases pruned.",
        since: super::SINCE_CORE,
        args: &[Arg::key(c"prefix"), Arg::string(c"key").multiple()],
    };

    fn run(ctx: &Context, args: &[Str<'_>]) -> CommandResult {
        let [_, prefix, keys @ ..] = args else {
            return Err(errors::arity(Self::SPEC.name));
        };

        let released = waiters::release(ctx, *prefix, keys)?;

        Ok(Reply::Integer(i64::try_from(released).unwrap_or(i64::MAX)))
    }
}
