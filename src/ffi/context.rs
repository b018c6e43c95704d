//! One call of the server into the module: its clock, its log, the strings it passes.
//!
//! A [`Context`] lives as long as the call; strings and sets borrow it.

use std::ffi::CStr;
use std::marker::PhantomData;
use std::os::raw::c_char;
use std::ptr::NonNull;
use std::slice;

use redis_module::raw::{self, RedisModuleCtx, RedisModuleString};

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

    /// The server's clock: milliseconds after 1970.
    #[must_use]
    pub fn now_ms(&self) -> i64 {
        // SAFETY: takes nothing, reads the clock.
        unsafe { api!(RedisModule_Milliseconds()) }
    }

    /// Whether the data must stay as it is: clients are paused (so is a failover under way), or
    /// this is a read-only replica. The server hides an expired key then without deleting it, and
    /// adding a key under that name would stop the server.
    pub(super) fn data_is_frozen(&self) -> bool {
        // SAFETY: takes nothing, reads a flag.
        if unsafe { api!(RedisModule_AvoidReplicaTraffic()) } != 0 {
            return true;
        }
        let read_only_replica =
            (raw::REDISMODULE_CTX_FLAGS_SLAVE | raw::REDISMODULE_CTX_FLAGS_READONLY) as i32;
        // SAFETY: the context is valid during the call.
        let flags = unsafe { api!(RedisModule_GetContextFlags(self.raw)) };
        flags & read_only_replica == read_only_replica
    }

    /// Writes a line at level warning to the server's log.
    pub(super) fn log_warning(&self, line: &CStr) {
        // SAFETY: the context is valid, and the texts end with NUL; "%s" takes one text.
        unsafe {
            api!(RedisModule_Log(self.raw, c"warning".as_ptr(), c"%s".as_ptr(), line.as_ptr()));
        }
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
