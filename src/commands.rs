//! The commands: each file reads from top to bottom — parse, act, reply.
//!
//! What always holds: all arguments are parsed before anything is touched, so nothing is written
//! when a command answers with an error.

mod acquire;
mod bacquire;
mod count;
mod errors;
mod help;
mod holders;
mod info;
mod macquire;
mod parse;
mod release;
mod renew;

pub use acquire::Acquire;
pub use bacquire::Bacquire;
pub use count::Count;
pub use help::Help;
pub use holders::Holders;
pub use info::Info;
pub use macquire::Macquire;
pub use release::Release;
pub use renew::Renew;

/// The version that brought the commands of the core.
const SINCE_CORE: &std::ffi::CStr = c"0.1.0";
