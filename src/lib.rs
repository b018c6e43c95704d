//! redis-limiter: limits on concurrent operations, inside Redis.
//!
//! A *limiter* lets at most N operations run at once. It is one sorted set: its key is the
//! `prefix`, each member the `key` of one holder, each score the time its lease lapses. The
//! commands prune, count and add in one step inside the server, by the server's clock.
//!
//! | command | file |
//! | --- | --- |
//! | `LIMITER.ACQUIRE prefix key limit ttl [NX] [EPHEMERAL] [WITHSTATE]` | `commands/acquire.rs` |
//! | `LIMITER.BACQUIRE prefix key limit ttl timeout [EPHEMERAL]` | `commands/bacquire.rs` |
//! | `LIMITER.RELEASE prefix key [key ...]` | `commands/release.rs` |
//! | `LIMITER.RENEW prefix key ttl` | `commands/renew.rs` |
//! | `LIMITER.COUNT prefix` | `commands/count.rs` |
//! | `LIMITER.HOLDERS prefix [COUNT n]` | `commands/holders.rs` |
//! | `LIMITER.INFO prefix` | `commands/info.rs` |
//! | `LIMITER.MACQUIRE numlimiters prefix [prefix ...] key ttl limit [limit ...] [NX] [EPHEMERAL]` | `commands/macquire.rs` |
//! | `LIMITER.HELP` | `commands/help.rs` |
//! | `INFO limiter` | `commands/info.rs` |
//!
//! | part | job | knows |
//! | --- | --- | --- |
//! | `commands` | parse, act, reply; every error text | all below |
//! | `waiters` | joins leases to lines, blocked clients, timers, disconnections: the pump | all below |
//! | `limiter` | the rules of leases, pure | `counters` |
//! | `records` | what is remembered of limiters between commands, pure | `limiter`, `counters` |
//! | `counters` | what is counted, pure | std only |
//! | `queue` | first come, first served lines, pure | std only |
//! | `ties` | leases that end when their owner goes, pure | std only |
//! | `trip` | where tests make the module panic; empty in normal builds | std only |
//! | `ffi` | the border to the server, the only `unsafe` | the server, `limiter`'s trait |
//! | `simulation` | tests: `waiters` and what it uses, model-checked | a server of its own in place of `ffi` |

#![deny(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects
    )
)]

mod commands;
mod counters;
#[allow(unsafe_code)]
mod ffi;
mod limiter;
mod queue;
mod records;
#[cfg(test)]
mod simulation;
mod ties;
mod trip;
mod waiters;

use redis_module::{redis_module, Context, RedisString, Status};

// The server's allocator, so that its INFO and maxmemory count our memory. Unit tests run without
// a server.
#[cfg(not(test))]
use redis_module::alloc::RedisAlloc as Allocator;
#[cfg(test)]
use std::alloc::System as Allocator;

/// 1 * major * 10000 + minor * 100 + patch, as MODULE LIST shows it.
const VERSION: i32 = 100;

redis_module! {
    name: "limiter",
    version: VERSION,
    allocator: (Allocator, Allocator),
    data_types: [],
    init: init,
    deinit: deinit,
}

fn init(ctx: &Context, args: &[RedisString]) -> Status {
    let loaded = ffi::contained(|| load(ctx, args));
    match loaded.unwrap_or_else(|| Err("it panicked".into())) {
        Ok(()) => Status::Ok,
        Err(why) => {
            ctx.log_warning(&format!("limiter: not loaded: {why}"));
            Status::Err
        }
    }
}

/// Refuses to go while ACL users' rules name our commands: Redis then stops with a failed assertion.
/// Gives back what is remembered: statics are never dropped.
fn deinit(ctx: &Context) -> Status {
    match ffi::contained(|| ffi::acl_names(ctx, "limiter.")) {
        Some(false) => {}
        Some(true) => {
            ctx.log_warning("limiter: not unloaded: rules of ACL users name its commands");
            return Status::Err;
        }
        None => return Status::Err,
    }
    waiters::reset();
    Status::Ok
}

fn load(ctx: &Context, args: &[RedisString]) -> Result<(), String> {
    if !args.is_empty() {
        return Err("it takes no arguments".into());
    }
    let module = ffi::Module::load(ctx)?;
    waiters::reset();
    trip::trip("load");
    module.listen::<waiters::Pump>()?;
    module.register::<commands::Acquire>()?;
    module.register::<commands::Bacquire>()?;
    module.register::<commands::Release>()?;
    module.register::<commands::Renew>()?;
    module.register::<commands::Count>()?;
    module.register::<commands::Holders>()?;
    module.register::<commands::Info>()?;
    module.register::<commands::Macquire>()?;
    module.register::<commands::Help>()?;
    module.inform::<commands::Info>()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_version_is_the_crates() {
        let part = |text: &str| text.parse::<i32>().unwrap();
        let version = part(env!("CARGO_PKG_VERSION_MAJOR")) * 10_000
            + part(env!("CARGO_PKG_VERSION_MINOR")) * 100
            + part(env!("CARGO_PKG_VERSION_PATCH"));
        assert_eq!(super::VERSION, version);
    }
}
