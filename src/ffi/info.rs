//! The module's section of INFO.

use std::ffi::CStr;

use libc::c_int;
use redis_module::raw::{self, RedisModuleCtx, RedisModuleInfoCtx};

use super::command::contained;

/// A section of INFO, named as the module. The server puts "limiter_" before each name.
pub trait Section {
    /// The field "version".
    const VERSION: &'static CStr;
    /// The other fields.
    fn fields() -> Vec<(&'static CStr, u64)>;
}

/// Adds the section, while the module loads.
///
/// # Errors
/// If the server refuses.
pub(super) fn register<S: Section>(ctx: *mut RedisModuleCtx) -> Result<(), String> {
    // SAFETY: the context is that of the load, and the callback of the type asked for.
    let status = unsafe { api!(RedisModule_RegisterInfoFunc(ctx, Some(fill::<S>))) };
    let ok = status == raw::REDISMODULE_OK as c_int;
    ok.then_some(()).ok_or_else(|| "the server refused the section of INFO".into())
}

/// # Safety
/// Only the server calls it, with a valid context.
unsafe extern "C" fn fill<S: Section>(ctx: *mut RedisModuleInfoCtx, for_crash_report: c_int) {
    if for_crash_report != 0 {
        return; // We may have been in the middle of anything, and hold our own lock.
    }
    let Some(fields) = contained(S::fields) else { return };
    // SAFETY: the context is valid during the call, and the texts end with NUL and are copied.
    unsafe {
        if api!(RedisModule_InfoAddSection(ctx, std::ptr::null())) != raw::REDISMODULE_OK as c_int {
            return; // Another section was asked for.
        }
        let version = (c"version".as_ptr(), S::VERSION.as_ptr());
        api!(RedisModule_InfoAddFieldCString(ctx, version.0, version.1));
        for (name, number) in fields {
            api!(RedisModule_InfoAddFieldULongLong(ctx, name.as_ptr(), number));
        }
    }
}
