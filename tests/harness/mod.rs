//! Starts real servers with the module loaded, and speaks to them.
//!
//! - The server is `$REDIS_SERVER`, else the `redis-server` on the path. Each has a temporary
//!   folder and a free port of its own, so tests run side by side.
//! - The module is built here, once a test binary, so that a stale one is never tested: a test
//!   run does not build a crate that is only a cdylib.
//! - Nothing waits for a time to pass, only for a condition, with a deadline ([`wait_until`]).
//! - A server is killed and reaped when dropped. If the test failed or the server died by itself,
//!   its log is printed.
//! - `$SERVER_RUNNER`, if set, is a command that the server is run by, such as valgrind with its
//!   options. Since that makes it slow, times are longer then ([`slowness`]); and since it has its
//!   say when the server ends, the server is asked to end before it is killed.

#![allow(dead_code)] // Each test binary uses its own part of this.

pub mod mix;

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use redis::{Parser, Value};
use tempfile::TempDir;

/// How many times longer things take than usual.
pub fn slowness() -> u32 {
    if runner().is_empty() {
        1
    } else {
        20
    }
}

/// How long anything may take before a test gives it up.
pub fn deadline() -> Duration {
    Duration::from_secs(20) * slowness()
}

/// A time in which a test gets a few commands done and then has to wait for, in seconds: as a
/// command takes it.
pub fn short(seconds: f64) -> String {
    (seconds * f64::from(slowness())).to_string()
}

/// Waits until `condition` holds; fails the test, saying `what`, if it does not in time.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let give_up = Instant::now() + deadline();
    while !condition() {
        assert!(Instant::now() < give_up, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1)); // Between two looks, not instead of them.
    }
}

/// The module's library, built with the profile of this test binary.
pub fn module() -> &'static Path {
    static MODULE: OnceLock<PathBuf> = OnceLock::new();
    MODULE.get_or_init(|| build(&["--lib"], "libredis_limiter"))
}

/// Builds a library of this crate with the profile of this test binary; where it is.
pub fn build(what: &[&str], library: &str) -> PathBuf {
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "--quiet", "--locked"]).args(what).current_dir(env!("CARGO_MANIFEST_DIR"));
    if !cfg!(debug_assertions) {
        build.arg("--release");
    }
    assert!(build.status().expect("cargo").success(), "{library} does not build");
    let test_binary = std::env::current_exe().expect("a test binary");
    let profile = test_binary.ancestors().nth(2).expect("target/<profile>/deps/<binary>");
    let library = profile.join(format!("{library}{}", std::env::consts::DLL_SUFFIX));
    assert!(library.exists(), "{} was not built", library.display());
    library
}

/// Makes a library out of a C file below `tests/`.
pub fn compile(source: &str, library: &Path) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(source);
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let built = Command::new(compiler)
        .args(["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o"])
        .args([library, &file])
        .status();
    assert!(built.expect("a C compiler").success(), "{source} does not compile");
}

/// Whether there is such a test: `file::name` for one below `tests/`, `lib::module::tests::name`
/// for one in the source.
pub fn is_test(test: &str) -> bool {
    let (file, name) = test.split_once("::").expect("file::name");
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (files, name) = match name.rsplit_once("::tests::") {
        Some((module, name)) if file == "lib" => {
            let module = project.join("src").join(module.replace("::", "/"));
            (vec![module.with_extension("rs"), module.join("tests.rs")], name)
        }
        _ => (vec![project.join("tests").join(file).with_extension("rs")], name),
    };
    files.iter().filter_map(|file| fs::read_to_string(file).ok()).any(|text| {
        let mut parts = text.split("#[test]").skip(1);
        parts.any(|part| part.trim_start().starts_with(&format!("fn {name}(")))
    })
}

/// The server program that is tested.
pub fn server_program() -> PathBuf {
    std::env::var_os("REDIS_SERVER").map_or_else(|| "redis-server".into(), PathBuf::from)
}

/// The command that the server is run by, in words; none if it runs by itself.
fn runner() -> &'static [String] {
    static RUNNER: OnceLock<Vec<String>> = OnceLock::new();
    RUNNER.get_or_init(|| {
        let runner = std::env::var("SERVER_RUNNER").unwrap_or_default();
        runner.split_whitespace().map(String::from).collect()
    })
}

/// A running server.
pub struct Server {
    process: Child,
    pub port: u16,
    folder: TempDir,
    options: Vec<String>,
    clock: Option<Clock>,
}

/// All that a server holds: by database and key, the type, the value, the expiry.
pub type Contents = BTreeMap<(u32, Vec<u8>), (String, Value, i64)>;

impl Server {
    /// Starts a server with the module and nothing else of note.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a server with the module and more options, such as `["--appendonly", "yes"]`.
    pub fn start_with(options: &[&str]) -> Self {
        let module = module().to_str().expect("a path in UTF-8");
        Self::start_bare(&[&["--loadmodule", module], options].concat())
    }

    /// Starts a server without the module.
    pub fn start_bare(options: &[&str]) -> Self {
        let options: Vec<_> = options.iter().map(ToString::to_string).collect();
        Self::launch(&options, None, |_| ())
    }

    /// Starts a server with the module, whose system clock can be set.
    pub fn start_with_clock(options: &[&str]) -> Self {
        let module = module().to_str().expect("a path in UTF-8");
        let options = [&["--loadmodule", module], options].concat();
        let options: Vec<_> = options.iter().map(ToString::to_string).collect();
        Self::launch(&options, Some(Clock::new()), |_| ())
    }

    /// Starts a server without the module on a copy of the AOF or RDB file that this one has
    /// written so far, as `options` tell it.
    pub fn replay(&self, options: &[&str]) -> Self {
        let options: Vec<_> = options.iter().map(ToString::to_string).collect();
        Self::launch(&options, None, |folder| copy(self.folder.path(), folder))
    }

    /// Starts a server with a configuration file, and nothing added but port, folder and log.
    pub fn start_bare_from(file: &Path) -> Self {
        Self::start_bare(&[file.to_str().expect("a path in UTF-8")])
    }

    /// Starts a sentinel that does as `rules` say, the text of its configuration file.
    pub fn start_sentinel(rules: &str) -> Self {
        let options = ["sentinel.conf", "--sentinel"].map(ToString::to_string);
        Self::launch(&options, None, |folder| {
            fs::write(folder.join("sentinel.conf"), rules).expect("the sentinel's rules");
        })
    }

    fn launch(options: &[String], clock: Option<Clock>, prepare: impl Fn(&Path)) -> Self {
        // Another process may take the port between our look and the server's: try again then.
        for _ in 0..20 {
            let folder = TempDir::new().expect("a temporary folder");
            prepare(folder.path());
            let port = free_port();
            let mut options = options.to_vec();
            if options.iter().any(|option| option == "--cluster-enabled") {
                // Its own choice, 10,000 more, may be taken, or no port at all.
                options.extend(["--cluster-port".into(), free_port().to_string()]);
            }
            let process = spawn(&folder, port, &options, clock.as_ref());
            let mut server = Self { process, port, folder, options, clock: clock.clone() };
            if server.comes_up() {
                return server;
            }
            let log = server.log();
            let port_was_taken =
                log.contains("Address already in use") || log.contains("Failed listening on port");
            assert!(port_was_taken, "the server did not start:\n{log}");
        }
        panic!("no free port");
    }

    /// Waits until it answers; false if it ended instead.
    fn comes_up(&mut self) -> bool {
        let mut up = false;
        wait_until("the server is up", || {
            if !self.is_running() {
                return true;
            }
            let Ok(stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return false };
            up = Client::over(stream).try_run(&["PING"]).is_ok_and(|reply| reply == text("PONG"));
            up
        });
        up
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// A new connection.
    pub fn client(&self) -> Client {
        Client::over(TcpStream::connect(("127.0.0.1", self.port)).expect("a connection"))
    }

    /// How many clients are blocked.
    pub fn blocked(&self) -> usize {
        self.client().info("clients", "blocked_clients").parse().expect("a number")
    }

    /// A client that waits in line: it has sent the command, and the server has blocked it.
    pub fn waiter(&self, command: &str) -> Client {
        let before = self.blocked();
        let mut waiter = self.client();
        waiter.send(&command.split_whitespace().collect::<Vec<_>>());
        wait_until("the client is blocked", || self.blocked() > before);
        waiter
    }

    /// What the server wrote to its log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Where it writes a file of this name.
    pub fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Everything it holds.
    pub fn contents(&self) -> Contents {
        let mut client = self.client();
        client.call("READONLY"); // A replica in a cluster reads only then; elsewhere an error.
        let mut contents = Contents::new();
        let keyspace = client.text("INFO keyspace");
        let dbs = keyspace.lines().filter_map(|line| line.strip_prefix("db")?.split(':').next());
        for db in dbs.map(|db| db.parse::<u32>().expect("a number")) {
            client.call(&format!("SELECT {db}"));
            let Value::Array(keys) = client.call("KEYS *") else { panic!("no keys") };
            for key in keys {
                let Value::BulkString(key) = key else { panic!("{key:?} is no key") };
                let kind = string(&client.run(&[b"TYPE", key.as_slice()]));
                let value = match kind.as_str() {
                    "zset" => {
                        let args: [&[u8]; 5] = [b"ZRANGE", &key, b"0", b"-1", b"WITHSCORES"];
                        client.run(&args)
                    }
                    "string" => client.run(&[b"GET", key.as_slice()]),
                    "none" => continue, // It has expired between the two looks.
                    other => panic!("{other} is not expected here"),
                };
                let Value::Int(expiry_ms) = client.run(&[b"PEXPIRETIME", key.as_slice()]) else {
                    panic!("no expiry")
                };
                contents.insert((db, key), (kind, value, expiry_ms));
            }
        }
        contents
    }

    /// Kills it as `kill -9` does.
    pub fn kill(&mut self) {
        self.process.kill().expect("to kill the server");
        self.process.wait().expect("to reap the server");
    }

    /// Starts it again after a kill, on the same port and in the same folder.
    pub fn restart(&mut self) {
        self.process.wait().expect("to reap the server");
        self.process = spawn(&self.folder, self.port, &self.options, self.clock.as_ref());
        assert!(self.comes_up(), "the server did not start again:\n{}", self.log());
    }

    /// The two in one.
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.restart();
    }

    /// Kills the process, stops it in its tracks, or lets it go on: as a machine that stands still,
    /// or a network that does.
    pub fn signal(&self, signal: Signal) {
        let name = match signal {
            Signal::Kill => "-KILL",
            Signal::Freeze => "-STOP",
            Signal::Thaw => "-CONT",
        };
        let pid = self.process.id().to_string();
        let status = Command::new("kill").args([name, &pid]).status().expect("kill");
        assert!(status.success(), "kill {name}");
    }

    /// Asks it to end, and waits until it has. Whether it did.
    fn end(&mut self) -> bool {
        let pid = self.process.id().to_string();
        let give_up = Instant::now() + deadline();
        while self.is_running() && Instant::now() < give_up {
            // More than once: it refuses while it writes a new AOF. First -TERM: it may be frozen.
            for signal in ["-TERM", "-CONT"] {
                let _ = Command::new("kill").args([signal, &pid]).stderr(Stdio::null()).status();
            }
            thread::sleep(Duration::from_millis(100)); // Between two looks, not instead of them.
        }
        !self.is_running()
    }

    /// Sets the server's system clock to so many milliseconds from the real time.
    pub fn set_clock(&self, offset_ms: i64) {
        let clock = self.clock.as_ref().expect("a server started with a clock");
        let file = fs::File::options().write(true).open(&clock.file).expect("the clock's file");
        file.write_all_at(&offset_ms.to_ne_bytes(), 0).expect("to set the clock");
    }

    /// The same, but from now on it runs without the module.
    pub fn kill_and_restart_bare(&mut self) {
        let module = self.options.iter().position(|option| option == "--loadmodule");
        let module = module.expect("the module");
        self.options.drain(module..module + 2);
        self.kill_and_restart();
    }

    /// Every command that reached the AOF, in order. The server must run with [`AOF`].
    pub fn effects(&self) -> Vec<Vec<String>> {
        let folder = self.folder.path().join("appendonlydir");
        let increment = fs::read_dir(&folder)
            .expect("the AOF's folder")
            .map(|entry| entry.expect("a file").path())
            .find(|path| path.to_string_lossy().ends_with(".incr.aof"))
            .expect("the AOF");
        let bytes = fs::read(increment).expect("the AOF");
        let mut rest = bytes.as_slice();
        let mut parser = Parser::new();
        let mut commands = Vec::new();
        loop {
            match parser.parse_value(&mut rest) {
                Ok(command) => commands.push(strings(&command)),
                Err(error) if error.is_io_error() => break, // The end of the file.
                Err(error) => panic!("the AOF: {error}"),
            }
        }
        commands.retain(|command| command[0] != "SELECT");
        commands
    }
}

/// Options under which [`Server::effects`] works, and every reply means the AOF is on disk.
pub const AOF: [&str; 6] =
    ["--appendonly", "yes", "--appendfsync", "always", "--aof-use-rdb-preamble", "no"];

/// What [`Server::signal`] does.
#[derive(Clone, Copy)]
pub enum Signal {
    Kill,
    Freeze,
    Thaw,
}

/// A clock that can be set, by a library that is loaded into the server.
#[derive(Clone)]
struct Clock {
    library: PathBuf,
    file: PathBuf,
    _folder: Arc<TempDir>,
}

impl Clock {
    fn new() -> Self {
        let folder = TempDir::new().expect("a temporary folder");
        let (library, file) = (folder.path().join("clock.so"), folder.path().join("clock"));
        compile("harness/clock.c", &library);
        fs::write(&file, 0_i64.to_ne_bytes()).expect("the clock's file");
        Self { library, file, _folder: Arc::new(folder) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let died = !self.is_running();
        let hangs = !died && !runner().is_empty() && !self.end();
        let _ = self.process.kill();
        let _ = self.process.wait();
        if thread::panicking() || died || hangs {
            eprintln!("--- log of the server on port {} ---\n{}", self.port, self.log());
        }
        assert!(!hangs || thread::panicking(), "the server does not end");
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("a file");
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if source.is_dir() {
            fs::create_dir(&target).expect("a folder");
            copy(&source, &target);
        } else if source.file_name().is_none_or(|name| name != "log") {
            fs::copy(&source, &target).expect("to copy a file");
        }
    }
}

fn spawn(folder: &TempDir, port: u16, options: &[String], clock: Option<&Clock>) -> Child {
    // A configuration file comes first, or not at all.
    let has_file = options.first().is_some_and(|option| !option.starts_with("--"));
    let (file, options) = options.split_at(usize::from(has_file));
    let program = server_program();
    let mut command = match runner() {
        [] => Command::new(program),
        [runner, options @ ..] => {
            let mut command = Command::new(runner);
            command.args(options).arg(program);
            command
        }
    };
    if let Some(clock) = clock {
        command.env("LD_PRELOAD", &clock.library).env("TEST_CLOCK", &clock.file);
    }
    command
        .args(file)
        .args(["--port", &port.to_string(), "--save", "", "--logfile", "log"])
        .args(["--enable-debug-command", "yes", "--enable-module-command", "yes"])
        .args(["--repl-diskless-sync-delay", "0"])
        .args(options)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("{}: {error}", server_program().display()))
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// A connection that does what it is told and nothing by itself: no retries, no reconnects.
pub struct Client {
    stream: TcpStream,
    parser: Parser,
}

impl Client {
    /// A connection that is given up when a reply takes longer than `patience`.
    pub fn connect(port: u16, patience: Duration) -> std::io::Result<Self> {
        let client = Self::over(TcpStream::connect(("127.0.0.1", port))?);
        client.stream.set_read_timeout(Some(patience))?;
        Ok(client)
    }

    fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("TCP_NODELAY");
        stream.set_read_timeout(Some(deadline())).expect("a time-out");
        Self { stream, parser: Parser::new() }
    }

    /// Sends a command and does not wait for the reply.
    pub fn send<A: AsRef<[u8]>>(&mut self, args: &[A]) {
        self.send_raw(&packed(args));
    }

    pub fn try_send<A: AsRef<[u8]>>(&mut self, args: &[A]) -> std::io::Result<()> {
        self.stream.write_all(&packed(args))
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("to send");
    }

    /// The next reply.
    pub fn receive(&mut self) -> Value {
        self.try_receive().expect("a reply")
    }

    /// The next reply, or why there is none.
    pub fn try_receive(&mut self) -> redis::RedisResult<Value> {
        self.parser.parse_value(Uninterrupted(&mut self.stream))
    }

    /// Sends a command and returns its reply, or why there is none.
    pub fn try_run<A: AsRef<[u8]>>(&mut self, args: &[A]) -> redis::RedisResult<Value> {
        self.stream.write_all(&packed(args))?;
        self.try_receive()
    }

    /// Sends a command and returns its reply, an error too.
    pub fn run<A: AsRef<[u8]>>(&mut self, args: &[A]) -> Value {
        self.send(args);
        self.receive()
    }

    /// The same for a command written as one text, without blanks in its arguments.
    pub fn call(&mut self, command: &str) -> Value {
        self.run(&command.split_whitespace().collect::<Vec<_>>())
    }

    /// The integer a command replies.
    pub fn int(&mut self, command: &str) -> i64 {
        match self.call(command) {
            Value::Int(integer) => integer,
            other => panic!("{command}: {other:?} is no integer"),
        }
    }

    /// The error a command replies, as it stands in the protocol.
    pub fn error(&mut self, command: &str) -> String {
        error_text(&self.call(command))
    }

    /// The strings of the array a command replies.
    pub fn strings(&mut self, command: &str) -> Vec<String> {
        strings(&self.call(command))
    }

    /// The text a command replies.
    pub fn text(&mut self, command: &str) -> String {
        string(&self.call(command))
    }

    /// The value of a field of INFO.
    pub fn info(&mut self, section: &str, field: &str) -> String {
        let info = self.text(&format!("INFO {section}"));
        let start = format!("{field}:");
        let line = info.lines().find(|line| line.starts_with(&start));
        line.unwrap_or_else(|| panic!("no {field} in {info}"))[start.len()..].to_string()
    }

    /// The server's clock, in milliseconds.
    pub fn now_ms(&mut self) -> i64 {
        let time: Vec<i64> =
            self.strings("TIME").iter().map(|part| part.parse().expect("a number")).collect();
        time[0] * 1000 + time[1] / 1000
    }

    /// Waits until the server's clock shows `time_ms`.
    pub fn wait_for_clock(&mut self, time_ms: i64) {
        wait_until("the clock shows the time", || self.now_ms() >= time_ms);
    }

    /// The connection's id.
    pub fn id(&mut self) -> i64 {
        self.int("CLIENT ID")
    }

    /// Whether a reply is there, or comes within a moment that is short beside any wait.
    pub fn has_reply(&mut self) -> bool {
        self.stream.set_read_timeout(Some(Duration::from_millis(30))).expect("a time-out");
        let there = self.stream.peek(&mut [0]).is_ok_and(|bytes| bytes > 0);
        self.stream.set_read_timeout(Some(deadline())).expect("a time-out");
        there
    }

    /// Members and scores of a sorted set, in order.
    pub fn members(&mut self, prefix: &str) -> Vec<(String, f64)> {
        let flat = self.strings(&format!("ZRANGE {prefix} 0 -1 WITHSCORES"));
        let pair = |pair: &[String]| (pair[0].clone(), pair[1].parse().expect("a score"));
        flat.chunks(2).map(pair).collect()
    }

    /// What sends bytes on this connection from another thread, so that both ends of a long
    /// pipeline keep moving.
    pub fn second_handle(&self) -> impl FnMut(&[u8]) + Send + 'static {
        let mut stream = self.stream.try_clone().expect("a second handle");
        move |bytes| stream.write_all(bytes).expect("to send")
    }

    /// Closes the connection so that the server's next write to it fails.
    pub fn abort(self) {
        let linger = socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        linger.expect("to set it to be reset");
    }

    pub fn close(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Reads on after a signal, which a socket with a time-out does not do by itself: a machine that
/// stood still for a moment is no failure.
struct Uninterrupted<'s>(&'s mut TcpStream);

impl Read for Uninterrupted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.0.read(buffer) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }
}

/// A command as it goes over the wire.
pub fn packed<A: AsRef<[u8]>>(args: &[A]) -> Vec<u8> {
    let mut command = redis::Cmd::new();
    for arg in args {
        command.arg(arg.as_ref());
    }
    command.get_packed_command()
}

/// A reply that is this text, as a simple string.
pub fn text(text: &str) -> Value {
    Value::SimpleString(text.into())
}

/// A reply that is an array of these integers.
pub fn ints(integers: &[i64]) -> Value {
    Value::Array(integers.iter().copied().map(Value::Int).collect())
}

/// An error as it stands in the protocol.
pub fn error_text(reply: &Value) -> String {
    match reply {
        Value::ServerError(error) => {
            // The library has its own name for the plainest code.
            let code = if error.code() == "ResponseError" { "ERR" } else { error.code() };
            format!("{code} {}", error.details().unwrap_or_default())
        }
        other => panic!("{other:?} is no error"),
    }
}

/// A reply as text.
pub fn string(reply: &Value) -> String {
    match reply {
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => text.clone(),
        Value::Int(integer) => integer.to_string(),
        Value::Okay => "OK".into(),
        Value::Nil => "nil".into(),
        other => panic!("{other:?} is no text"),
    }
}

/// The elements of an array as texts.
pub fn strings(reply: &Value) -> Vec<String> {
    match reply {
        Value::Array(elements) | Value::Set(elements) => elements.iter().map(string).collect(),
        other => panic!("{other:?} is no array"),
    }
}
