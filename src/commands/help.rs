//! `LIMITER.HELP`: the commands, as `OBJECT HELP` has them.

use std::ffi::CStr;

use crate::ffi::{Command, CommandResult, Context, Keys, Reply, Spec, Str};

/// Replies with lines of help.
pub struct Help;

const LINES: &[&CStr] = &[
    c"LIMITER.<command> [<arg> [value] [opt] ...]. Commands are:",
    c"ACQUIRE <prefix> <key> <limit> <ttl> [NX] [EPHEMERAL] [WITHSTATE]",
    c"    Take a slot of the limiter <prefix> for <key>, or refresh the lease it holds, for <ttl>",
    c"    seconds (10, 0.25). Return 1, or 0 if <limit> leases are live. Options:",
    c"    * NX: Return 0 if <key> holds a lease, and leave it alone.",
    c"    * EPHEMERAL: The lease also ends when this connection closes.",
    c"    * WITHSTATE: Return outcome (0 denied, 1 acquired, 2 refreshed), live leases,",
    c"      milliseconds until a slot is free (-1: never), and clients waiting.",
    c"BACQUIRE <prefix> <key> <limit> <ttl> <timeout> [EPHEMERAL]",
    c"    The same, but wait in line for at most <timeout> seconds (0: without end), first come,",
    c"    first served. Return 1, or 0 on timeout.",
    c"COUNT <prefix>",
    c"    Return the number of live leases.",
    c"HELP",
    c"    Print this help.",
    c"HOLDERS <prefix> [COUNT <n>]",
    c"    Return the keys that hold a live lease with the milliseconds left (-1: never lapses),",
    c"    soonest to lapse first.",
    c"INFO <prefix>",
    c"    Return how many leases are held and clients wait, when the next lease lapses, and what was",
    c"    counted of the limiter.",
    c"MACQUIRE <numlimiters> <prefix> [<prefix> ...] <key> <ttl> <limit> [<limit> ...] [NX] [EPHEMERAL]",
    c"    Take a slot in each of the limiters, or in none. Return 1, or 0 if one of them denies it.",
    c"RELEASE <prefix> <key> [<key> ...]",
    c"    Give slots back. Return how many of the keys held a live lease.",
    c"RENEW <prefix> <key> <ttl>",
    c"    Move the end of a live lease to now + <ttl> seconds. Return 1, or 0 if there is none.",
];

impl Command for Help {
    const SPEC: Spec = Spec {
        name: c"limiter.help",
        flags: c"allow-loading allow-stale fast",
        arity: 1,
        keys: Keys::None,
        summary: c"Returns helpful text about the commands of the limiter.",
        complexity: c"O(1)",
        since: super::SINCE_CORE,
        args: &[],
    };

    fn run(_ctx: &Context, _args: &[Str<'_>]) -> CommandResult {
        Ok(Reply::Lines(LINES))
    }
}
