//! Commands as the server sees them: registered with their documentation, entered through one
//! function that parses nothing, lets no panic out, and writes the reply.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::io;
use std::panic::{self, AssertUnwindSafe};
use std::ptr;

use libc::c_int;
use redis_module::raw::{self, RedisModuleCtx, RedisModuleString};

use super::api;
use super::context::{log_warning, Context, OwnedStr, Str};
use super::events::{self, Listener};
use super::info::{self, Section};
use super::reply::CallReply;
use crate::trip::trip;

/// A command of the module.
pub trait Command {
    /// How it is registered and documented.
    const SPEC: Spec;

    /// Runs it. `args` are as the client sent them, the command's name first; the server has
    /// checked their number against [`Spec::arity`].
    ///
    /// # Errors
    /// The error's text, starting with its code ("ERR ...").
    fn run(ctx: &Context, args: &[Str<'_>]) -> CommandResult;
}

/// What a command answers: a reply, or an error's text.
pub type CommandResult = Result<Reply, Cow<'static, CStr>>;

/// A reply.
pub enum Reply {
    /// An integer.
    Integer(i64),
    /// An array of integers.
    Integers(Vec<i64>),
    /// Pairs: a map in RESP3, a flat array in RESP2.
    Map(Vec<(OwnedStr, i64)>),
    /// The same, with names that are always the same.
    Fields(Vec<(&'static CStr, i64)>),
    /// An array of simple strings.
    Lines(&'static [&'static CStr]),
    /// None yet: the client is blocked.
    Later,
}

/// How a command is registered, and what COMMAND INFO and COMMAND DOCS say of it.
pub struct Spec {
    /// The name, in lower case.
    pub name: &'static CStr,
    /// The server's command flags, as `RedisModule_CreateCommand` takes them.
    pub flags: &'static CStr,
    /// The number of arguments with the name; negative: at least that many.
    pub arity: c_int,
    /// Where its keys are.
    pub keys: Keys,
    /// One line.
    pub summary: &'static CStr,
    /// In the server's manner: "O(1)".
    pub complexity: &'static CStr,
    /// The module's version that brought it.
    pub since: &'static CStr,
    /// The arguments after the name.
    pub args: &'static [Arg],
}

/// Where the keys of a command are.
#[derive(Clone, Copy)]
pub enum Keys {
    /// It has none.
    None,
    /// The first argument is its one key.
    First(Access),
    /// The first argument is the number of its keys, which follow. Its flags have "getkeys-api".
    Counted(Access),
}

/// What a command does with its key.
#[derive(Clone, Copy)]
pub enum Access {
    /// Reads it, and returns some of it.
    Read,
    /// Adds to it or changes what is there.
    Update,
    /// Takes something out of it.
    Delete,
}

/// One argument, as COMMAND DOCS shows it.
#[derive(Clone, Copy)]
pub struct Arg {
    name: &'static CStr,
    kind: raw::RedisModuleCommandArgType,
    token: Option<&'static CStr>,
    flags: u32,
}

impl Arg {
    const fn new(name: &'static CStr, kind: raw::RedisModuleCommandArgType) -> Self {
        Self { name, kind, token: None, flags: raw::REDISMODULE_CMD_ARG_NONE }
    }

    /// The command's key.
    #[must_use]
    pub const fn key(name: &'static CStr) -> Self {
        Self::new(name, raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_KEY)
    }

    /// Any bytes.
    #[must_use]
    pub const fn string(name: &'static CStr) -> Self {
        Self::new(name, raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_STRING)
    }

    /// An integer.
    #[must_use]
    pub const fn integer(name: &'static CStr) -> Self {
        Self::new(name, raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_INTEGER)
    }

    /// A decimal number.
    #[must_use]
    pub const fn decimal(name: &'static CStr) -> Self {
        Self::new(name, raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_DOUBLE)
    }

    /// An optional word by itself, such as NX.
    #[must_use]
    pub const fn option(name: &'static CStr, token: &'static CStr) -> Self {
        Self::new(name, raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_PURE_TOKEN)
            .after(token)
            .optional()
    }

    /// Preceded by this word, as in COUNT n.
    #[must_use]
    pub const fn after(mut self, token: &'static CStr) -> Self {
        self.token = Some(token);
        self
    }

    /// May be left out.
    #[must_use]
    pub const fn optional(mut self) -> Self {
        self.flags |= raw::REDISMODULE_CMD_ARG_OPTIONAL;
        self
    }

    /// May be repeated.
    #[must_use]
    pub const fn multiple(mut self) -> Self {
        self.flags |= raw::REDISMODULE_CMD_ARG_MULTIPLE;
        self
    }
}

/// Whether the server has a command of this name.
fn exists(ctx: *mut RedisModuleCtx, command: &CStr) -> bool {
    // SAFETY: the context is that of the load, the name ends with NUL, and "" takes nothing. The
    // command is not run: it lacks its arguments, or does not exist, as errno tells.
    let reply = unsafe { api!(RedisModule_Call(ctx, command.as_ptr(), c"".as_ptr())) };
    CallReply::new(reply).is_some()
        || io::Error::last_os_error().raw_os_error() != Some(libc::ENOENT)
}

/// Whether a rule of an ACL user names a command that starts so.
pub fn acl_names(ctx: &redis_module::Context, start: &str) -> bool {
    // SAFETY: the context is that of the unload; the texts end with NUL, as the format says.
    let reply = unsafe {
        api!(RedisModule_Call(ctx.ctx, c"ACL".as_ptr(), c"c".as_ptr(), c"LIST".as_ptr()))
    };
    let Some(users) = CallReply::new(reply) else { return false };
    let mut rules =
        (0..users.len()).filter_map(|index| users.text_at(index)).flat_map(str::split_whitespace);
    rules.any(|rule| {
        let rule = rule.trim_start_matches('(');
        rule.strip_prefix(['+', '-']).is_some_and(|command| command.starts_with(start))
    })
}

/// The module while it loads.
pub struct Module {
    ctx: *mut RedisModuleCtx,
}

impl Module {
    /// Starts loading: checks the server, and sets the module's options.
    ///
    /// # Errors
    /// What the server lacks.
    pub fn load(ctx: &redis_module::Context) -> Result<Self, String> {
        if let Some(function) = api::missing() {
            return Err(format!("this server is too old: it has no {function}"));
        }
        if let Some(command) = api::COMMANDS.into_iter().find(|name| !exists(ctx.ctx, name)) {
            let command = command.to_string_lossy();
            return Err(format!("rename-command took away {command}, which the module needs"));
        }
        // Without the first option, closing a set that was opened to be written aborts every
        // WATCH on it, changed or not. Without the second, loading this module switches diskless
        // loading by swap off for the whole server.
        let options = raw::REDISMODULE_OPTION_NO_IMPLICIT_SIGNAL_MODIFIED
            | raw::REDISMODULE_OPTIONS_HANDLE_REPL_ASYNC_LOAD;
        // SAFETY: the server is loading the module with this context.
        unsafe { api!(RedisModule_SetModuleOptions(ctx.ctx, options as c_int)) };
        Ok(Self { ctx: ctx.ctx })
    }

    /// Starts to listen to the server's events.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn listen<L: Listener>(&self) -> Result<(), String> {
        events::listen::<L>(self.ctx)
    }

    /// Adds a section to INFO.
    ///
    /// # Errors
    /// If the server refuses.
    pub fn inform<S: Section>(&self) -> Result<(), String> {
        info::register::<S>(self.ctx)
    }

    /// Registers a command with its documentation.
    ///
    /// # Errors
    /// If the server refuses it.
    pub fn register<C: Command>(&self) -> Result<(), String> {
        let spec = &C::SPEC;
        let refused = |what| format!("the server refused {what} {}", spec.name.to_string_lossy());
        let (first_key, last_key, step) = match spec.keys {
            // No range is that of counted keys: see `tell_keys`.
            Keys::None | Keys::Counted(_) => (0, 0, 0),
            Keys::First(_) => (1, 1, 1),
        };
        // SAFETY: the context is that of the load, the texts end with NUL, and `entry` is a
        // command function. The server copies what it keeps.
        let status = unsafe {
            api!(RedisModule_CreateCommand(
                self.ctx,
                spec.name.as_ptr(),
                Some(entry::<C>),
                spec.flags.as_ptr(),
                first_key,
                last_key,
                step
            ))
        };
        if status != raw::REDISMODULE_OK as c_int {
            return Err(refused("the command"));
        }
        if self.document(spec) != raw::REDISMODULE_OK as c_int {
            return Err(refused("the documentation of"));
        }
        if self.categorize(spec) != raw::REDISMODULE_OK as c_int {
            return Err(refused("the ACL categories of"));
        }
        Ok(())
    }

    /// Puts it into the ACL categories that the server gives its own commands, where the server
    /// lets modules do so: Redis 7.0 does not.
    fn categorize(&self, spec: &Spec) -> c_int {
        // SAFETY: reads a pointer that was written while loading.
        let Some(set_categories) = (unsafe { raw::RedisModule_SetCommandACLCategories }) else {
            return raw::REDISMODULE_OK as c_int;
        };
        let categories = categories(spec);
        // SAFETY: the command was just registered, in the load at hand; the text ends with NUL and
        // is only read.
        unsafe {
            let command = api!(RedisModule_GetCommand(self.ctx, spec.name.as_ptr()));
            set_categories(command, categories.as_ptr())
        }
    }

    fn document(&self, spec: &Spec) -> c_int {
        let mut key_specs = key_specs(spec.keys);
        let mut args = raw_args(spec.args);
        let version = raw::RedisModuleCommandInfoVersion {
            version: 1,
            sizeof_historyentry: size_of::<raw::RedisModuleCommandHistoryEntry>(),
            sizeof_keyspec: size_of::<raw::RedisModuleCommandKeySpec>(),
            sizeof_arg: size_of::<raw::RedisModuleCommandArg>(),
        };
        let info = raw::RedisModuleCommandInfo {
            version: &version,
            summary: spec.summary.as_ptr(),
            complexity: spec.complexity.as_ptr(),
            since: spec.since.as_ptr(),
            history: ptr::null_mut(),
            tips: ptr::null(),
            arity: spec.arity,
            key_specs: key_specs.as_mut_ptr(),
            args: args.as_mut_ptr(),
        };
        // SAFETY: the command was just registered; `info` points to arrays that end with a
        // zeroed element, and the server copies all of it.
        unsafe {
            let command = api!(RedisModule_GetCommand(self.ctx, spec.name.as_ptr()));
            if command.is_null() {
                return raw::REDISMODULE_ERR as c_int;
            }
            api!(RedisModule_SetCommandInfo(command, &info))
        }
    }
}

/// The ACL categories that follow from the flags and the key, as the server's text.
fn categories(spec: &Spec) -> CString {
    let flags = spec.flags.to_string_lossy();
    let has = |flag| flags.split(' ').any(|have| have == flag);
    let mut categories = vec![if has("fast") { "fast" } else { "slow" }];
    categories.extend(has("write").then_some("write"));
    categories.extend(has("readonly").then_some("read"));
    categories.extend(has("blocking").then_some("blocking"));
    categories.extend((!matches!(spec.keys, Keys::None)).then_some("sortedset"));
    CString::new(categories.join(" ")).unwrap_or_default()
}

/// The key specs, with the zeroed one that ends them.
fn key_specs(keys: Keys) -> Vec<raw::RedisModuleCommandKeySpec> {
    // SAFETY: a plain C struct, for which all zeroes is the value that ends an array.
    let end: raw::RedisModuleCommandKeySpec = unsafe { std::mem::zeroed() };
    let (Keys::First(access) | Keys::Counted(access)) = keys else {
        return vec![end];
    };
    let mut first = end;
    first.flags = u64::from(key_flags(access));
    first.begin_search_type = raw::RedisModuleKeySpecBeginSearchType_REDISMODULE_KSPEC_BS_INDEX;
    first.bs.index.pos = 1;
    if matches!(keys, Keys::Counted(_)) {
        first.find_keys_type = raw::RedisModuleKeySpecFindKeysType_REDISMODULE_KSPEC_FK_KEYNUM;
        first.fk.keynum = raw::RedisModuleCommandKeySpec__bindgen_ty_2__bindgen_ty_2 {
            keynumidx: 0,
            firstkey: 1,
            keystep: 1,
        };
    } else {
        first.find_keys_type = raw::RedisModuleKeySpecFindKeysType_REDISMODULE_KSPEC_FK_RANGE;
        first.fk.range = raw::RedisModuleCommandKeySpec__bindgen_ty_2__bindgen_ty_1 {
            lastkey: 0,
            keystep: 1,
            limit: 0,
        };
    }
    vec![first, end]
}

/// The arguments, with the zeroed one that ends them.
fn raw_args(args: &[Arg]) -> Vec<raw::RedisModuleCommandArg> {
    // SAFETY: a plain C struct, for which all zeroes is the value that ends an array.
    let end: raw::RedisModuleCommandArg = unsafe { std::mem::zeroed() };
    let is_key = |arg: &Arg| arg.kind == raw::RedisModuleCommandArgType_REDISMODULE_ARG_TYPE_KEY;
    args.iter()
        .map(|arg| raw::RedisModuleCommandArg {
            name: arg.name.as_ptr(),
            type_: arg.kind,
            key_spec_index: if is_key(arg) { 0 } else { -1 },
            token: arg.token.map_or(ptr::null(), CStr::as_ptr),
            flags: arg.flags as c_int,
            ..end
        })
        .chain([end])
        .collect()
}

/// Where the server enters a command.
///
/// # Safety
/// Only the server calls it, with a valid context and `argc` strings at `argv`.
unsafe extern "C" fn entry<C: Command>(
    ctx: *mut RedisModuleCtx,
    argv: *mut *mut RedisModuleString,
    argc: c_int,
) -> c_int {
    // SAFETY: the server's arguments of the call at hand; neither value outlives it.
    let (ctx, args) = unsafe { (Context::new(ctx), Str::slice(argv, argc)) };
    if let Keys::Counted(access) = C::SPEC.keys {
        // SAFETY: the context is valid.
        if unsafe { api!(RedisModule_IsKeysPositionRequest(ctx.as_ptr())) } != 0 {
            contained(|| tell_keys(&ctx, args, access));
            return raw::REDISMODULE_OK as c_int;
        }
    }
    let result = contained(|| {
        trip("command");
        C::run(&ctx, args)
    });
    answer(&ctx, result)
}

/// Tells the server where the counted keys are. Redis 7.0 does not go by the documentation when it
/// looks for the node of a command.
fn tell_keys(ctx: &Context, args: &[Str<'_>], access: Access) {
    trip("keys");
    let number =
        args.get(1).and_then(|number| std::str::from_utf8(number.bytes()).ok()?.parse().ok());
    let keys = args.get(2..).unwrap_or_default().len();
    // What does not fit is answered with an error, and touches no key.
    let number = number.filter(|number: &usize| *number <= keys).unwrap_or(0);
    for (position, _) in args.iter().enumerate().skip(2).take(number) {
        let position = c_int::try_from(position).unwrap_or(c_int::MAX);
        let flags = key_flags(access) as c_int;
        // SAFETY: the context is valid, and the server asked for positions.
        unsafe { api!(RedisModule_KeyAtPosWithFlags(ctx.as_ptr(), position, flags)) };
    }
}

fn key_flags(access: Access) -> u32 {
    match access {
        Access::Read => raw::REDISMODULE_CMD_KEY_RO | raw::REDISMODULE_CMD_KEY_ACCESS,
        Access::Update => {
            raw::REDISMODULE_CMD_KEY_RW
                | raw::REDISMODULE_CMD_KEY_ACCESS
                | raw::REDISMODULE_CMD_KEY_UPDATE
        }
        Access::Delete => raw::REDISMODULE_CMD_KEY_RW | raw::REDISMODULE_CMD_KEY_DELETE,
    }
}

/// Writes the reply that came of a command or a wait (`None`: a panic); what a command function
/// returns to the server.
pub(super) fn answer(ctx: &Context, result: Option<CommandResult>) -> c_int {
    match result {
        Some(Ok(reply)) => reply.send(ctx),
        Some(Err(text)) => send_error(ctx, &text),
        None => {
            send_error(ctx, c"ERR internal error in the module limiter, see the server's log");
        }
    }
    raw::REDISMODULE_OK as c_int
}

/// Runs what the server calls in for. A panic ends here, in a line of the log: unwinding across
/// the border would abort the server.
pub fn contained<R>(run: impl FnOnce() -> R) -> Option<R> {
    panic::catch_unwind(AssertUnwindSafe(run)).map_err(|panic| log_panic(panic.as_ref())).ok()
}

fn log_panic(panic: &(dyn std::any::Any + Send)) {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    let line = format!("limiter: a panic was contained: {}", text.unwrap_or("no text"));
    let line = CString::new(line.replace('\0', " ")).unwrap_or_default();
    log_warning(&line);
}

fn send_error(ctx: &Context, text: &CStr) {
    // SAFETY: the context is valid, the text ends with NUL and is copied.
    unsafe { api!(RedisModule_ReplyWithError(ctx.as_ptr(), text.as_ptr())) };
}

impl Reply {
    fn send(self, ctx: &Context) {
        let ctx = ctx.as_ptr();
        // SAFETY: the context is valid; strings and texts are copied before they are dropped.
        unsafe {
            match self {
                Reply::Later => {}
                Reply::Integer(integer) => {
                    api!(RedisModule_ReplyWithLongLong(ctx, integer));
                }
                Reply::Integers(integers) => {
                    api!(RedisModule_ReplyWithArray(ctx, integers.len() as _));
                    for integer in integers {
                        api!(RedisModule_ReplyWithLongLong(ctx, integer));
                    }
                }
                Reply::Map(pairs) => {
                    api!(RedisModule_ReplyWithMap(ctx, pairs.len() as _));
                    for (name, integer) in pairs {
                        api!(RedisModule_ReplyWithString(ctx, name.as_ptr()));
                        api!(RedisModule_ReplyWithLongLong(ctx, integer));
                    }
                }
                Reply::Fields(fields) => {
                    api!(RedisModule_ReplyWithMap(ctx, fields.len() as _));
                    for (name, integer) in fields {
                        api!(RedisModule_ReplyWithCString(ctx, name.as_ptr()));
                        api!(RedisModule_ReplyWithLongLong(ctx, integer));
                    }
                }
                Reply::Lines(lines) => {
                    api!(RedisModule_ReplyWithArray(ctx, lines.len() as _));
                    for line in lines {
                        api!(RedisModule_ReplyWithSimpleString(ctx, line.as_ptr()));
                    }
                }
            }
        }
    }
}
