//! `LIMITER.COUNT prefix`: how many leases are live. Reads only.

use super::errors::{self, ErrorText};
use crate::ffi::{
    count_after, Access, Arg, Command, CommandResult, Context, Keys, ReadSet, Reply, Spec, Str,
};

/// Counts the live leases, and prunes nothing: it works on replicas.
///
/// Replies with the number; 0 if there is no such limiter. Errors: WRONGTYPE.
pub struct Count;

impl Command for Count {
    const SPEC: Spec = Spec {
        name: c"limiter.count",
        flags: c"readonly fast",
        arity: 2,
        keys: Keys::First(Access::Read),
        summary: c"Counts the live leases of a limiter.",
        complexity: c"O(log(N)) with N the number of leases.",
        since: super::SINCE_CORE,
        args: &[Arg::key(c"prefix")],
    };

    fn run(ctx: &Context, args: &[Str<'_>]) -> CommandResult {
        let [_, prefix] = args else {
            return Err(errors::arity(Self::SPEC.name));
        };

        let live = live(ctx, *prefix, ctx.now_ms())?;

        Ok(Reply::Integer(i64::try_from(live).unwrap_or(i64::MAX)))
    }
}

/// The number of leases of the limiter that are live at `now_ms`.
///
/// # Errors
/// WRONGTYPE.
pub(super) fn live(ctx: &Context, prefix: Str<'_>, now_ms: i64) -> Result<u64, ErrorText> {
    match ReadSet::open(ctx, prefix)? {
        None => Ok(0),
        Some(set) if !set.any_lapsed(now_ms) => Ok(set.count()),
        Some(set) => {
            drop(set); // Nothing runs while a key is open.
            count_after(ctx, prefix, now_ms).ok_or(errors::REFUSED)
        }
    }
}
