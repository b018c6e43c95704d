//! The border to the server: the only folder with `unsafe` in it.
//!
//! What is here is safe to call from the rest of the module, because:
//!
//! - Every server function that is used is in the list of [`api`], and the module refuses to load
//!   if the server lacks one of them; but for the one that sets ACL categories, which is called only
//!   where there is one.
//! - The server calls in on its one main thread, and each of our types that holds a server's
//!   pointer borrows the [`Context`] of the call it came from, so it cannot outlive the call.
//! - A panic never crosses into the server: whatever it calls runs [`contained`].
//! - While a key is open, nothing runs that could change it behind the handle: no keyspace
//!   notification (those are sent when the handle is closed), and no `RM_Call` but one that reads,
//!   where the key cannot expire meanwhile.
//!
//! | file | what it wraps |
//! | --- | --- |
//! | `api.rs` | the server's functions, checked at load |
//! | `clock.rs` | time that runs forward inside a transaction |
//! | `context.rs` | one call into the module: clock, log, arguments, replies |
//! | `command.rs` | registering a command with its documentation, and the way in |
//! | `blocked.rs` | clients that wait for their reply |
//! | `events.rs` | the timer, and what the server tells of keys, databases, clients |
//! | `info.rs` | the section of INFO |
//! | `reply.rs` | replies to commands that we call |
//! | `sorted_set.rs` | a limiter's sorted set, as [`crate::limiter::Leases`] |

#[macro_use]
mod api;
mod blocked;
mod clock;
mod command;
mod context;
mod events;
mod info;
mod reply;
mod sorted_set;

pub use blocked::{BlockedClient, Blocking};
pub use command::{
    acl_names, contained, Access, Arg, Command, CommandResult, Keys, Module, Reply, Spec,
};
pub use context::{Context, OwnedStr, Permit, Str};
pub use events::{listen_for_waiters, listen_for_writes, Listener, Timer};
pub use info::Section;
pub use sorted_set::{count_after, score_of_rank, NotOpened, ReadSet, SortedSet};
