//! `LIMITER.HOLDERS prefix [COUNT n]`: who holds a slot, and for how long yet. Reads only.

use super::{errors, parse};
use crate::ffi::{Access, Arg, Command, CommandResult, Context, Keys, ReadSet, Reply, Spec, Str};

/// Lists the live leases, soonest to lapse first, and prunes nothing: it works on replicas.
///
/// Replies with pairs of key and remaining milliseconds (-1: never lapses), a map in RESP3. With
/// `COUNT n` the first n. Errors: n, syntax, WRONGTYPE.
pub struct Holders;

impl Command for Holders {
    const SPEC: Spec = Spec {
        name: c"limiter.holders",
        flags: c"readonly",
        arity: -2,
        keys: Keys::First(Access::Read),
        summary: c"Lists the holders of a limiter with the milliseconds their leases have left.",
        complexity: c"O(log(N)+M) with N the number of leases and M the number listed.",
        since: super::SINCE_CORE,
        args: &[Arg::key(c"prefix"), Arg::integer(c"count").after(c"COUNT").optional()],
    };

    fn run(ctx: &Context, args: &[Str<'_>]) -> CommandResult {
        let (prefix, count) = match args {
            [_, prefix] => (prefix, u64::MAX),
            [_, prefix, word, count] if word.bytes().eq_ignore_ascii_case(b"COUNT") => {
                (prefix, parse::integer(count.bytes()).ok_or(errors::INTEGER)?)
            }
            _ => return Err(errors::SYNTAX),
        };

        let live = match ReadSet::open(ctx, *prefix)? {
            None => Vec::new(),
            Some(set) => set.live(ctx.now_ms(), count),
        };

        let never_as_minus_1 = |ms: Option<i64>| ms.unwrap_or(-1);
        Ok(Reply::Map(live.into_iter().map(|(key, ms)| (key, never_as_minus_1(ms))).collect()))
    }
}
