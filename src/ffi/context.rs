//! One call of the server into the module: its clock, its log, the strings it passes.
//!
//! A [`Context`] lives as long as the call; strings and sets borrow it.

use std::ffi::CStr;
use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::slice;

use libc::c_char;
use redis_module::raw::{self, RedisModuleCtx, RedisModuleString};

use super::clock;
use super::reply::CallReply;

/// Whether a key may be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    /// It may.
    Granted,
    /// Not at the moment: too few replicas follow (`min-replicas-to-write`), or the last save or
    /// AOF write failed (`stop-writes-on-bgsave-error`).
    NotNow,
    /// The cluster is down, or the key's slot is not served here, or is on its way to another node
    /// (a key that is not here any more is asked for there).
    Elsewhere,
}

/// The server's side of the call at hand.
pub struct Context {
    raw: *mut RedisModuleCtx,
}

impl Context {
    /// # Safety
    /// `raw` must be the context the server passed to the call at hand.
    pub(super) unsafe fn new(raw: *mut RedisModuleCtx) -> Self {
        Self { raw }
    }

    pub(super) fn as_ptr(&self) -> *mut RedisModuleCtx {
        self.raw
    }

    /// The server's clock: milliseconds after 1970. In a transaction or a script it only runs
    /// forward.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        // SAFETY: takes nothing, reads the clock.
        let now_ms = unsafe { api!(RedisModule_Milliseconds()) };
        clock::read(now_ms, || {
            self.has_flag(raw::REDISMODULE_CTX_FLAGS_MULTI | raw::REDISMODULE_CTX_FLAGS_LUA)
        })
    }

    /// The number of the database that the call works on.
    #[must_use]
    pub fn db(&self) -> i32 {
        // SAFETY: the context is valid during the call.
        unsafe { api!(RedisModule_GetSelectedDb(self.raw)) }
    }

    /// Works on another database from now on; whether there is one of that number. Only for
    /// contexts that are not a client's, such as a timer's.
    pub fn select_db(&self, db: i32) -> bool {
        // SAFETY: the context is valid during the call.
        unsafe { api!(RedisModule_SelectDb(self.raw, db)) == raw::REDISMODULE_OK as i32 }
    }

    /// The id of the connection that sent the command; `None` in a script, which has none.
    #[must_use]
    pub fn connection(&self) -> Option<u64> {
        if self.has_flag(raw::REDISMODULE_CTX_FLAGS_LUA) {
            return None;
        }
        // SAFETY: the context is valid during the call; null asks only whether there is such a
        // client. Called by another module the id is that of a client in no list of clients.
        unsafe {
            let id = api!(RedisModule_GetClientId(self.raw));
            let status = api!(RedisModule_GetClientInfoById(std::ptr::null_mut(), id));
            (status == raw::REDISMODULE_OK as i32).then_some(id)
        }
    }

    /// Whether the command must answer at once: in MULTI, in a script, called by a module.
    #[must_use]
    pub fn must_not_block(&self) -> bool {
        self.has_flag(
            raw::REDISMODULE_CTX_FLAGS_DENY_BLOCKING
                | raw::REDISMODULE_CTX_FLAGS_MULTI
                | raw::REDISMODULE_CTX_FLAGS_LUA,
        )
    }

    /// Whether the server is part of a cluster.
    #[must_use]
    pub fn is_clustered(&self) -> bool {
        self.has_flag(raw::REDISMODULE_CTX_FLAGS_CLUSTER)
    }

    /// Whether the server follows a master, and takes no writes but its master's.
    #[must_use]
    pub fn is_read_only_replica(&self) -> bool {
        self.has_flag(raw::REDISMODULE_CTX_FLAGS_SLAVE)
            && self.has_flag(raw::REDISMODULE_CTX_FLAGS_READONLY)
    }

    /// Whether the server closes this connection as soon as its replies are written, because the
    /// client or an administrator asked for it. In doubt it does.
    #[must_use]
    pub fn closes_after_replies(&self, connection: u64) -> bool {
        // SAFETY: "ccl" takes two texts ending with NUL, and a number.
        let reply = CallReply::new(unsafe {
            api!(RedisModule_Call(
                self.raw,
                c"CLIENT".as_ptr(),
                c"ccl".as_ptr(),
                c"LIST".as_ptr(),
                c"ID".as_ptr(),
                connection
            ))
        });
        let Some(line) = reply.as_ref().and_then(CallReply::text) else { return true };
        let flags = line.split(' ').find_map(|field| field.strip_prefix("flags="));
        flags.is_none_or(|flags| flags.contains('c'))
    }

    /// Whether data may be written that no client asks for at this moment, if the key's
    /// [permit](Self::write_permit) is given too. Not on a read-only
    /// replica, not while loading, and not while clients are paused (CLIENT PAUSE, a failover, the
    /// wait at SHUTDOWN): the server stops if something is replicated then.
    #[must_use]
    pub fn may_write_unasked(&self) -> bool {
        !self.data_is_frozen()
            && !self.has_flag(
                raw::REDISMODULE_CTX_FLAGS_LOADING | raw::REDISMODULE_CTX_FLAGS_ASYNC_LOADING,
            )
    }

    /// Whether clients are paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        // SAFETY: takes nothing, reads a flag.
        unsafe { api!(RedisModule_AvoidReplicaTraffic()) != 0 }
    }

    /// Whether the server would let a client write this key now. Open no key meanwhile.
    #[must_use]
    pub fn write_permit(&self, key: Str<'_>) -> Permit {
        // A write that changes nothing, since its range is empty. In script mode ("S") the server
        // refuses it as it would refuse a client's, and errno tells why. Without "E", which has it
        // said in words as well, Valkey 9 looks for the words that are not there, and crashes.
        // SAFETY: "SEscc" takes a string and two texts ending with NUL.
        let reply = CallReply::new(unsafe {
            api!(RedisModule_Call(
                self.raw,
                c"ZREMRANGEBYRANK".as_ptr(),
                c"SEscc".as_ptr(),
                key.as_ptr(),
                c"1".as_ptr(),
                c"0".as_ptr()
            ))
        });
        let errno = io::Error::last_os_error().raw_os_error();
        if reply.is_some_and(|reply| !reply.is_refusal()) {
            return Permit::Granted;
        }
        match errno {
            Some(libc::EPERM | libc::ENETDOWN | libc::EROFS) => Permit::Elsewhere,
            _ => Permit::NotNow,
        }
    }

    fn has_flag(&self, any_of: u32) -> bool {
        // SAFETY: the context is valid during the call.
        let flags = unsafe { api!(RedisModule_GetContextFlags(self.raw)) };
        flags & any_of as i32 != 0
    }

    /// Whether the data must stay as it is: clients are paused (so is a failover under way), or
    /// this is a read-only replica. The server hides an expired key then without deleting it, and
    /// adding a key under that name would stop the server.
    pub(super) fn data_is_frozen(&self) -> bool {
        self.is_paused() || self.is_read_only_replica()
    }
}

/// Writes a line at level warning to the server's log.
pub(super) fn log_warning(line: &CStr) {
    // SAFETY: a line needs no context, and the texts end with NUL; "%s" takes one text.
    unsafe {
        let no_context = std::ptr::null_mut();
        api!(RedisModule_Log(no_context, c"warning".as_ptr(), c"%s".as_ptr(), line.as_ptr()));
    }
}

/// A string of the server's that lives as long as the call it was passed to: an argument.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub struct Str<'c> {
    raw: NonNull<RedisModuleString>,
    call: PhantomData<&'c RedisModuleString>,
}

impl<'c> Str<'c> {
    /// The arguments of a call, the command's name first.
    ///
    /// # Safety
    /// `argv` and `argc` must be those the server passed to the call at hand, and `'c` must not
    /// outlive it.
    pub(super) unsafe fn slice(argv: *mut *mut RedisModuleString, argc: i32) -> &'c [Self] {
        let count = usize::try_from(argc).unwrap_or(0);
        // SAFETY: the server passes `argc` pointers, none of them null, that stay valid during
        // the call; `Str` is such a pointer and nothing else.
        unsafe { slice::from_raw_parts(argv.cast::<Self>(), count) }
    }

    /// # Safety
    /// `raw` must be null, or a string that is valid for `'c`.
    pub(super) unsafe fn from_ptr(raw: *mut RedisModuleString) -> Option<Self> {
        NonNull::new(raw).map(|raw| Self { raw, call: PhantomData })
    }

    pub(super) fn as_ptr(self) -> *mut RedisModuleString {
        self.raw.as_ptr()
    }

    /// The bytes: any, none, or many.
    #[must_use]
    pub fn bytes(&self) -> &'c [u8] {
        let mut len = 0;
        // SAFETY: the string is valid during the call, and the server does not change arguments.
        unsafe {
            let start: *const c_char = api!(RedisModule_StringPtrLen(self.as_ptr(), &mut len));
            slice::from_raw_parts(start.cast::<u8>(), len)
        }
    }
}

/// A string that the server made for us; given back when dropped.
pub struct OwnedStr {
    raw: NonNull<RedisModuleString>,
}

impl OwnedStr {
    /// # Safety
    /// `raw` must be a string whose ownership the server just passed to us.
    pub(super) unsafe fn new(raw: NonNull<RedisModuleString>) -> Self {
        Self { raw }
    }

    /// A copy of these bytes; `None` if the server makes none.
    #[must_use]
    pub fn copy(bytes: &[u8]) -> Option<Self> {
        // SAFETY: the server copies that many bytes; without a context the string is ours.
        let raw = unsafe {
            let start = bytes.as_ptr().cast::<c_char>();
            api!(RedisModule_CreateString(std::ptr::null_mut(), start, bytes.len()))
        };
        NonNull::new(raw).map(|raw| Self { raw })
    }

    /// The string, as long as it is not dropped.
    #[must_use]
    pub fn as_str(&self) -> Str<'_> {
        Str { raw: self.raw, call: PhantomData }
    }

    pub(super) fn as_ptr(&self) -> *mut RedisModuleString {
        self.raw.as_ptr()
    }
}

impl Drop for OwnedStr {
    fn drop(&mut self) {
        // SAFETY: ours, and given back once. No context: automatic memory is never switched on.
        unsafe { api!(RedisModule_FreeString(std::ptr::null_mut(), self.as_ptr())) }
    }
}
