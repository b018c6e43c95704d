//! Every error text of the module.

use std::borrow::Cow;
use std::ffi::{CStr, CString};

use crate::ffi::NotOpened;

/// An error's text, starting with its code.
pub type ErrorText = Cow<'static, CStr>;

/// A limit that is no integer from 0 to 2^63-1.
pub const LIMIT: ErrorText = Cow::Borrowed(c"ERR limit is not an integer or out of range");

/// A number of limiters that is none, or 0.
pub const NUMLIMITERS: ErrorText = Cow::Borrowed(c"ERR numlimiters should be greater than 0");

/// An option that is unknown, repeated or does not fit.
pub const SYNTAX: ErrorText = Cow::Borrowed(c"ERR syntax error");

/// A timeout that is no decimal number, or too large.
pub const TIMEOUT: ErrorText = Cow::Borrowed(c"ERR timeout is not a float or out of range");

/// A timeout with a minus.
pub const TIMEOUT_NEGATIVE: ErrorText = Cow::Borrowed(c"ERR timeout is negative");

/// EPHEMERAL where there is no connection that could close.
pub const NO_CONNECTION: ErrorText =
    Cow::Borrowed(c"ERR EPHEMERAL ties the lease to a connection, and a script has none");

/// The wait is over because the limiter is served elsewhere.
pub const MOVED: ErrorText =
    Cow::Borrowed(c"UNBLOCKED the limiter's slot is served by another node now, try again there");

/// Any other number that is none, as the server says it.
pub const INTEGER: ErrorText = Cow::Borrowed(c"ERR value is not an integer or out of range");

/// The key holds another type, as the server says it.
pub const WRONG_TYPE: ErrorText =
    Cow::Borrowed(c"WRONGTYPE Operation against a key holding the wrong kind of value");

/// Writing is not possible at the moment.
const FROZEN: ErrorText =
    Cow::Borrowed(c"TRYAGAIN the server is paused or a replica, and takes no writes");

/// The server refused a command that this one is built on.
pub const REFUSED: ErrorText =
    Cow::Borrowed(c"ERR the server refused the plain command this one is built on (renamed?)");

/// A ttl that is no decimal number greater than 0, or too large.
pub fn expire_time(command: &CStr) -> ErrorText {
    with_name("ERR invalid expire time in '", command, "' command")
}

/// The server counts the arguments before it calls, and answers this in the same words.
pub fn arity(command: &CStr) -> ErrorText {
    with_name("ERR wrong number of arguments for '", command, "' command")
}

fn with_name(before: &str, name: &CStr, after: &str) -> ErrorText {
    let text = format!("{before}{}{after}", name.to_string_lossy());
    CString::new(text).unwrap_or_default().into()
}

impl From<NotOpened> for ErrorText {
    fn from(why: NotOpened) -> Self {
        match why {
            NotOpened::WrongType => WRONG_TYPE,
            NotOpened::Frozen => FROZEN,
        }
    }
}
