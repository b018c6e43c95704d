//! `LIMITER.INFO prefix`: one limiter at a glance; and the section `INFO limiter`: all of them.

use std::ffi::CStr;

use super::count::live;
use super::errors;
use crate::counters::Counters;
use crate::ffi::{
    Access, Arg, Command, CommandResult, Context, Keys, ReadSet, Reply, Section, Spec, Str,
};
use crate::trip::trip;
use crate::waiters::{self, Totals};

/// Tells what is to be seen of a limiter, and what was counted of it. Reads only.
///
/// Replies with pairs of field and integer, a map in RESP3: `held` and `waiting` now,
/// `next_lapse_ms` (-1: none ever), and the [`Counters`], which start at 0 when the server or the
/// module is loaded, and when more limiters are in use than are remembered. Errors: WRONGTYPE.
pub struct Info;

impl Command for Info {
    const SPEC: Spec = Spec {
        name: c"limiter.info",
        flags: c"readonly fast",
        arity: 2,
        keys: Keys::First(Access::Read),
        summary: c"Returns what is to be seen of a limiter, and what was counted of it.",
        complexity: c"O(log(N)) with N the number of leases.",
        since: super::SINCE_CORE,
        args: &[Arg::key(c"prefix")],
    };

    fn run(ctx: &Context, args: &[Str<'_>]) -> CommandResult {
        let [_, prefix] = args else {
            return Err(errors::arity(Self::SPEC.name));
        };

        let now_ms = ctx.now_ms();
        let next_lapse_ms = match ReadSet::open(ctx, *prefix)? {
            None => None,
            Some(set) => set.live(now_ms, 1).first().and_then(|(_, left_ms)| *left_ms),
        };
        let held = live(ctx, *prefix, now_ms)?;
        let (counters, waiting) = waiters::counters(ctx.db(), prefix.bytes());

        let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let mut fields = vec![
            (c"held", number(held)),
            (c"waiting", number(waiting as u64)),
            (c"next_lapse_ms", next_lapse_ms.unwrap_or(-1)),
        ];
        fields.extend(counts(&counters).map(|(name, count)| (name, number(count))));
        fields.push((c"wait_ms_total", number(counters.wait_ms_total)));
        fields.push((c"wait_ms_max", number(counters.wait_ms_max)));
        Ok(Reply::Fields(fields))
    }
}

impl Section for Info {
    const VERSION: &'static CStr =
        match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
            Ok(version) => version,
            Err(_) => c"",
        };

    fn fields() -> Vec<(&'static CStr, u64)> {
        trip("info");
        let Totals { counters, waiting, lines, ephemeral, closed } = waiters::totals();
        let mut fields = vec![(c"waiting", waiting as u64), (c"lines", lines as u64)];
        fields.extend(counts(&counters));
        fields.push((c"wait_ms", counters.wait_ms_total));
        fields.push((c"ephemeral", ephemeral as u64));
        fields.push((c"ephemeral_released", closed));
        fields
    }
}

/// The counts that have the same names in both.
fn counts(counters: &Counters) -> [(&'static CStr, u64); 7] {
    [
        (c"acquired", counters.acquired),
        (c"refreshed", counters.refreshed),
        (c"denied", counters.denied),
        (c"released", counters.released),
        (c"lapsed", counters.lapsed),
        (c"waits", counters.waits),
        (c"wait_timeouts", counters.wait_timeouts),
    ]
}
