//! Clients that wait for their reply.
//!
//! A blocked client must be let go with [`BlockedClient::let_go`] exactly once, whatever becomes
//! of it: never, and it leaks and the module cannot be unloaded; twice, and the server frees it
//! twice. Letting go only queues it: the server asks for the reply ([`Blocking::reply`]) before it
//! sleeps the next time, if the client is still there then.

use std::ptr;

use libc::{c_int, c_void};
use redis_module::raw::{self, RedisModuleBlockedClient, RedisModuleCtx, RedisModuleString};

use super::command::{answer, contained, CommandResult, Reply};
use super::context::Context;

/// The command that blocks clients: what the server calls back.
pub trait Blocking {
    /// The reply to a client that was let go with this number.
    ///
    /// # Errors
    /// An error's text, to be the reply.
    fn reply(ctx: &Context, number: u64) -> CommandResult;

    /// The client is gone, or the server answered it with an error and let it go: on
    /// disconnection, CLIENT KILL, CLIENT UNBLOCK ERROR, on becoming a replica. Before or after
    /// it was let go; nothing may be written here, it may happen in the middle of anything.
    fn gone(ctx: &Context, client: BlockedClient);

    /// CLIENT UNBLOCK ends the wait of a client that was not let go yet: its reply.
    fn given_up(ctx: &Context, client: BlockedClient) -> Reply;
}

/// A blocked client.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockedClient(usize);

impl BlockedClient {
    /// Blocks the client of the command at hand, without a time-out of the server's: on Redis 7.0
    /// and 7.2 a reply and a time-out in the same turn lose the reply, or stop the server.
    ///
    /// `None` if the server does not block it, and has answered it with an error.
    #[must_use]
    pub fn block<B: Blocking>(ctx: &Context) -> Option<Self> {
        // CLIENT UNBLOCK works for those who have a time-out callback, and has the same fault in
        // the versions before Redis 7.4 and Valkey 8. They are told by a function they lack.
        // SAFETY: reads a pointer that was written while loading.
        let unblock_is_safe = unsafe { raw::RedisModule_ClusterKeySlot }.is_some();
        let given_up: raw::RedisModuleCmdFunc =
            if unblock_is_safe { Some(given_up::<B>) } else { None };
        // SAFETY: the context is that of the command; the callbacks are of the types asked for,
        // and there is no private data to free. A time-out of 0 is none.
        let client = unsafe {
            api!(RedisModule_BlockClient(ctx.as_ptr(), Some(reply::<B>), given_up, None, 0))
        };
        if client.is_null() {
            return None;
        }
        // SAFETY: the client was just blocked.
        unsafe { api!(RedisModule_SetDisconnectCallback(client, Some(gone::<B>))) };
        Some(Self(client as usize))
    }

    /// Lets the client go: the server will ask for the reply by `number`, which must not be 0.
    pub fn let_go(self, number: u64) {
        self.unblock(number as *mut c_void);
    }

    /// Lets a client go that is gone.
    pub fn let_go_unanswered(self) {
        self.unblock(ptr::null_mut());
    }

    fn unblock(self, data: *mut c_void) {
        // SAFETY: the handle stays valid until it is unblocked, which the callers do once.
        unsafe { api!(RedisModule_UnblockClient(self.0 as *mut RedisModuleBlockedClient, data)) };
    }
}

/// # Safety
/// Only the server calls it, with a valid context.
unsafe extern "C" fn reply<B: Blocking>(
    ctx: *mut RedisModuleCtx,
    _argv: *mut *mut RedisModuleString,
    _argc: c_int,
) -> c_int {
    // SAFETY: the server's context of the call at hand. The data is the number, not a pointer.
    let (ctx, number, client) = unsafe {
        let number = api!(RedisModule_GetBlockedClientPrivateData(ctx)) as usize as u64;
        (Context::new(ctx), number, api!(RedisModule_GetBlockedClientHandle(ctx)))
    };
    answer_or_lose::<B>(&ctx, client, || B::reply(&ctx, number))
}

/// # Safety
/// Only the server calls it, with a valid context.
unsafe extern "C" fn given_up<B: Blocking>(
    ctx: *mut RedisModuleCtx,
    _argv: *mut *mut RedisModuleString,
    _argc: c_int,
) -> c_int {
    // SAFETY: the server's context of the call at hand.
    let (ctx, client) =
        unsafe { (Context::new(ctx), api!(RedisModule_GetBlockedClientHandle(ctx))) };
    answer_or_lose::<B>(&ctx, client, || Ok(B::given_up(&ctx, BlockedClient(client as usize))))
}

/// # Safety
/// Only the server calls it, with a valid context.
unsafe extern "C" fn gone<B: Blocking>(
    ctx: *mut RedisModuleCtx,
    client: *mut RedisModuleBlockedClient,
) {
    // SAFETY: the server's context of the call at hand.
    let ctx = unsafe { Context::new(ctx) };
    lose::<B>(&ctx, client);
}

/// Answers the client. If that panics it is told of an error, and must not hold what it was granted.
fn answer_or_lose<B: Blocking>(
    ctx: &Context,
    client: *mut RedisModuleBlockedClient,
    run: impl FnOnce() -> CommandResult,
) -> c_int {
    let result = contained(run);
    if result.is_none() {
        lose::<B>(ctx, client);
    }
    answer(ctx, result)
}

/// The client is gone. The server frees it now, whatever we do: if it stayed in a line it would be
/// let go later, which would be twice. So a panic gets a second try.
fn lose<B: Blocking>(ctx: &Context, client: *mut RedisModuleBlockedClient) {
    let gone = || B::gone(ctx, BlockedClient(client as usize));
    contained(gone).or_else(|| contained(gone));
}
