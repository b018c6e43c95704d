//! What the server tells without being asked: a timer, changes of keys, of databases, of clients.
//!
//! The callbacks may come in the middle of anything, and nothing may be written in them: a write
//! would travel to replicas before the change it answers. The one exception is the timer's.

use std::ffi::CStr;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_char, c_int, c_void};
use redis_module::raw::{self, RedisModuleCtx, RedisModuleString};

use super::command::contained;
use super::context::{Context, Str};
use super::reply::CallReply;
use super::sorted_set::is_our_event;

/// Who listens.
pub trait Listener {
    /// The timer of [`Timer::start`] has run out. Writing is allowed, if the server may
    /// ([`Context::may_write_unasked`]).
    fn ring(ctx: &Context);
    /// Somebody else's command, or the server, changed this key. Told of what may put another
    /// sorted set in its place after [`listen_for_writes`], of everything else after
    /// [`listen_for_waiters`].
    fn key_changed(ctx: &Context, key: &[u8]);
    /// All data may have been replaced: by a load, or because the server's role changed.
    fn data_replaced();
    /// A database was emptied (`None`: all were).
    fn database_flushed(ctx: &Context, db: Option<i32>);
    /// Two databases changed places.
    fn databases_swapped(ctx: &Context, first: i32, second: i32);
    /// A connection was closed.
    fn disconnected(ctx: &Context, connection: u64);
    /// The server has slept, and now looks what its clients have sent: all replies of the turn
    /// before are on their way, and the clients that could not get theirs are closed. Only told
    /// after [`listen_for_waiters`].
    fn turned(ctx: &Context);
    /// It panicked when it was told of something: any set may be another now.
    fn missed(ctx: &Context);
}

/// The events that come with another content of a sorted set. (A key that is gone needs none: it
/// is seen to be empty when it is opened.)
const WRITES: c_int = raw::REDISMODULE_NOTIFY_ZSET | raw::REDISMODULE_NOTIFY_GENERIC;

/// Starts to tell of changed sorted sets, until the module is unloaded. That costs each such
/// command of others a little, so it is not for servers where nobody uses a limiter.
pub fn listen_for_writes<L: Listener>(ctx: &Context) {
    listen_for_keys::<L>(ctx, WRITES);
}

/// Starts to tell of all other changed keys and of turns, until the module is unloaded. That costs
/// every command that writes and every turn a little, so it is not for servers where nobody ever
/// waits.
pub fn listen_for_waiters<L: Listener>(ctx: &Context) {
    listen_for_keys::<L>(ctx, raw::REDISMODULE_NOTIFY_ALL & !WRITES);
    let turn = server_event(raw::REDISMODULE_EVENT_EVENTLOOP);
    // SAFETY: the context is valid, and the callback of the type asked for.
    unsafe {
        api!(RedisModule_SubscribeToServerEvent(ctx.as_ptr(), turn, Some(turned::<L>)));
    }
}

fn listen_for_keys<L: Listener>(ctx: &Context, classes: c_int) {
    // SAFETY: the context is valid, and the callback of the type asked for.
    unsafe {
        api!(RedisModule_SubscribeToKeyspaceEvents(ctx.as_ptr(), classes, Some(key_changed::<L>)));
    }
}

/// Whether there are, or were, other modules, which may listen to keyspace events.
static OTHER_MODULES: AtomicBool = AtomicBool::new(false);

/// Whether anybody but us may be told of keyspace events: clients, or other modules. Telling costs
/// as much as a third of a command.
pub(super) fn anybody_listens() -> bool {
    // SAFETY: takes nothing, reads the server's setting.
    OTHER_MODULES.load(Ordering::Relaxed)
        || unsafe { api!(RedisModule_GetNotifyKeyspaceEvents()) } != 0
}

/// A timer that runs.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, Hash))]
pub struct Timer(u64);

impl Timer {
    /// Starts a timer that rings once after `period_ms`; 0: before the server sleeps again.
    #[must_use]
    pub fn start<L: Listener>(ctx: &Context, period_ms: i64) -> Self {
        // SAFETY: the context is valid, the callback of the type asked for, and needs no data.
        Self(unsafe {
            api!(RedisModule_CreateTimer(ctx.as_ptr(), period_ms, Some(ring::<L>), ptr::null_mut()))
        })
    }

    /// Stops it before it rings. Must not be called while it rings: the server would free it
    /// twice.
    pub fn stop(self, ctx: &Context) {
        // SAFETY: the server looks the timer up by its number, and refuses one it does not have.
        unsafe { api!(RedisModule_StopTimer(ctx.as_ptr(), self.0, ptr::null_mut())) };
    }
}

/// Starts to listen, while the module loads.
///
/// # Errors
/// If the server refuses.
pub(super) fn listen<L: Listener>(ctx: *mut RedisModuleCtx) -> Result<(), String> {
    let ok = raw::REDISMODULE_OK as c_int;
    let flush = server_event(raw::REDISMODULE_EVENT_FLUSHDB);
    let swap = server_event(raw::REDISMODULE_EVENT_SWAPDB);
    let client = server_event(raw::REDISMODULE_EVENT_CLIENT_CHANGE);
    let module = server_event(raw::REDISMODULE_EVENT_MODULE_CHANGE);
    let replaced = [
        raw::REDISMODULE_EVENT_LOADING,
        raw::REDISMODULE_EVENT_REPL_ASYNC_LOAD,
        raw::REDISMODULE_EVENT_REPLICATION_ROLE_CHANGED,
    ];
    // SAFETY: the context is that of the load, and the callbacks are of the types asked for.
    let subscribed = unsafe {
        api!(RedisModule_SubscribeToServerEvent(ctx, flush, Some(flushed::<L>))) == ok
            && api!(RedisModule_SubscribeToServerEvent(ctx, swap, Some(swapped::<L>))) == ok
            && api!(RedisModule_SubscribeToServerEvent(ctx, client, Some(client_changed::<L>)))
                == ok
            && api!(RedisModule_SubscribeToServerEvent(ctx, module, Some(module_changed))) == ok
            && replaced.into_iter().all(|id| {
                let event = server_event(id);
                api!(RedisModule_SubscribeToServerEvent(ctx, event, Some(data_replaced::<L>))) == ok
            })
    };
    // SAFETY: "c" takes a text ending with NUL. This module is not in the list yet.
    let others = CallReply::new(unsafe {
        api!(RedisModule_Call(ctx, c"MODULE".as_ptr(), c"c".as_ptr(), c"LIST".as_ptr()))
    });
    OTHER_MODULES.store(others.is_none_or(|list| list.len() > 0), Ordering::Relaxed);
    subscribed.then_some(()).ok_or_else(|| "the server refused to tell of its events".into())
}

fn server_event(id: u64) -> raw::RedisModuleEvent {
    raw::RedisModuleEvent { id, dataver: 1 }
}

/// Tells the listener of something. If it panics it does not know what has changed.
fn tell<L: Listener>(ctx: &Context, what: impl FnOnce()) {
    if contained(what).is_none() {
        contained(|| L::missed(ctx));
    }
}

/// # Safety
/// Only the server calls it, with a valid context.
unsafe extern "C" fn ring<L: Listener>(ctx: *mut RedisModuleCtx, _data: *mut c_void) {
    // SAFETY: the server's context of the call at hand.
    let ctx = unsafe { Context::new(ctx) };
    contained(|| L::ring(&ctx));
}

/// # Safety
/// Only the server calls it, with a valid context, text and string.
unsafe extern "C" fn key_changed<L: Listener>(
    ctx: *mut RedisModuleCtx,
    _class: c_int,
    event: *const c_char,
    key: *mut RedisModuleString,
) -> c_int {
    // SAFETY: the text ends with NUL and is valid during the call.
    if !is_our_event(unsafe { CStr::from_ptr(event) }) {
        // SAFETY: the server's context and one string, valid during the call.
        let (ctx, key) = unsafe { (Context::new(ctx), Str::from_ptr(key)) };
        tell::<L>(&ctx, || {
            if let Some(key) = key {
                L::key_changed(&ctx, key.bytes());
            }
        });
    }
    raw::REDISMODULE_OK as c_int
}

/// # Safety
/// Only the server calls it, with a valid context and the data of a flush.
unsafe extern "C" fn flushed<L: Listener>(
    ctx: *mut RedisModuleCtx,
    _event: raw::RedisModuleEvent,
    _when: u64,
    data: *mut c_void,
) {
    // SAFETY: the server's context, and the structure that this event comes with.
    let (ctx, info) =
        unsafe { (Context::new(ctx), data.cast::<raw::RedisModuleFlushInfoV1>().as_ref()) };
    let db = info.map(|info| info.dbnum).filter(|db| *db >= 0);
    tell::<L>(&ctx, || L::database_flushed(&ctx, db));
}

/// # Safety
/// Only the server calls it, with a valid context and the data of a swap.
unsafe extern "C" fn swapped<L: Listener>(
    ctx: *mut RedisModuleCtx,
    _event: raw::RedisModuleEvent,
    _when: u64,
    data: *mut c_void,
) {
    // SAFETY: the server's context, and the structure that this event comes with.
    let (ctx, info) =
        unsafe { (Context::new(ctx), data.cast::<raw::RedisModuleSwapDbInfo>().as_ref()) };
    let Some(info) = info else { return };
    tell::<L>(&ctx, || L::databases_swapped(&ctx, info.dbnum_first, info.dbnum_second));
}

/// # Safety
/// Only the server calls it, with a valid context and the data of a client.
unsafe extern "C" fn client_changed<L: Listener>(
    ctx: *mut RedisModuleCtx,
    _event: raw::RedisModuleEvent,
    change: u64,
    data: *mut c_void,
) {
    if change != raw::REDISMODULE_SUBEVENT_CLIENT_CHANGE_DISCONNECTED {
        return;
    }
    // SAFETY: the server's context, and the structure that this event comes with.
    let (ctx, info) =
        unsafe { (Context::new(ctx), data.cast::<raw::RedisModuleClientInfoV1>().as_ref()) };
    let Some(info) = info else { return };
    let tell = || L::disconnected(&ctx, info.id);
    contained(tell).or_else(|| contained(tell)); // Nobody else will ever tell of it.
}

/// # Safety
/// Only the server calls it. Our own load may be told of, too.
unsafe extern "C" fn module_changed(
    _ctx: *mut RedisModuleCtx,
    _event: raw::RedisModuleEvent,
    _change: u64,
    data: *mut c_void,
) {
    // SAFETY: the structure that this event comes with, whose text ends with NUL.
    let name = unsafe {
        let info = data.cast::<raw::RedisModuleModuleChange>().as_ref();
        info.map(|info| CStr::from_ptr(info.module_name))
    };
    contained(|| {
        if name != Some(c"limiter") {
            OTHER_MODULES.store(true, Ordering::Relaxed);
        }
    });
}

/// # Safety
/// Only the server calls it, with a valid context.
unsafe extern "C" fn data_replaced<L: Listener>(
    ctx: *mut RedisModuleCtx,
    _event: raw::RedisModuleEvent,
    _when: u64,
    _data: *mut c_void,
) {
    // SAFETY: the server's context of the call at hand.
    let ctx = unsafe { Context::new(ctx) };
    tell::<L>(&ctx, L::data_replaced);
}

/// # Safety
/// Only the server calls it, with a valid context.
unsafe extern "C" fn turned<L: Listener>(
    ctx: *mut RedisModuleCtx,
    _event: raw::RedisModuleEvent,
    when: u64,
    _data: *mut c_void,
) {
    if when == raw::REDISMODULE_SUBEVENT_EVENTLOOP_AFTER_SLEEP {
        // SAFETY: the server's context of the call at hand.
        let ctx = unsafe { Context::new(ctx) };
        tell::<L>(&ctx, || L::turned(&ctx));
    }
}
