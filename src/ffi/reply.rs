//! Replies to commands that we call.

use std::ptr::NonNull;
use std::slice;

use redis_module::raw::{self, RedisModuleCallReply};

/// The reply to a command we called; given back when dropped.
pub(super) struct CallReply(NonNull<RedisModuleCallReply>);

impl CallReply {
    pub fn new(reply: *mut RedisModuleCallReply) -> Option<Self> {
        NonNull::new(reply).map(Self)
    }

    pub fn integer(&self) -> Option<u64> {
        // SAFETY: the reply is valid until dropped.
        unsafe {
            let integer = api!(RedisModule_CallReplyType(self.0.as_ptr())) as isize
                == raw::REDISMODULE_REPLY_INTEGER;
            integer.then(|| api!(RedisModule_CallReplyInteger(self.0.as_ptr())))
        }
        .and_then(|integer| u64::try_from(integer).ok())
    }

    /// The number of elements of an array.
    pub fn len(&self) -> usize {
        // SAFETY: the reply is valid until dropped.
        unsafe { api!(RedisModule_CallReplyLength(self.0.as_ptr())) }
    }

    /// Whether the command was refused: an error that is not about the key.
    pub fn is_refusal(&self) -> bool {
        // SAFETY: the reply is valid until dropped.
        let kind = unsafe { api!(RedisModule_CallReplyType(self.0.as_ptr())) };
        kind as isize == raw::REDISMODULE_REPLY_ERROR
            && !self.text().is_some_and(|text| text.starts_with("WRONGTYPE"))
    }

    /// The text of a string or an error.
    pub fn text(&self) -> Option<&str> {
        // SAFETY: the reply is valid until dropped.
        unsafe { text_of(self.0.as_ptr()) }
    }

    /// The element at `index` of an array, if it is text.
    pub fn text_at(&self, index: usize) -> Option<&str> {
        // SAFETY: the reply, and so its elements, are valid until dropped; the server answers null
        // to an index that is not there.
        unsafe {
            let element = api!(RedisModule_CallReplyArrayElement(self.0.as_ptr(), index));
            text_of(NonNull::new(element)?.as_ptr())
        }
    }
}

/// # Safety
/// `reply` must be valid for `'r`.
unsafe fn text_of<'r>(reply: *mut RedisModuleCallReply) -> Option<&'r str> {
    let mut len = 0;
    // SAFETY: the server answers null to what is no string.
    let bytes = unsafe {
        let start = api!(RedisModule_CallReplyStringPtr(reply, &mut len));
        slice::from_raw_parts(NonNull::new(start.cast_mut())?.as_ptr().cast::<u8>(), len)
    };
    std::str::from_utf8(bytes).ok()
}

impl Drop for CallReply {
    fn drop(&mut self) {
        // SAFETY: ours, and given back once.
        unsafe { api!(RedisModule_FreeCallReply(self.0.as_ptr())) }
    }
}
