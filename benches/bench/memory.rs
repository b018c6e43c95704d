//! What a lease and a waiter take of the server's memory, by its own account (`used_memory`),
//! which the module's allocations are part of.
//!
//! Measured once: it is the same every time.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::contenders::{number, Contender};
use crate::harness::{wait_until, Client};
use crate::lab;
use crate::results::{Quantity, Results};
use crate::waiting::Way;

const LEASES: u64 = 100_000;
const WAITERS: usize = 1_000;

pub fn lease_subject() -> String {
    format!("memory of a lease, {} held", number(LEASES))
}

pub fn waiter_subject() -> String {
    format!("memory of a waiter and its connection, {} waiting", number(WAITERS as u64))
}

pub fn measure(results: &mut Results) {
    leases(results);
    waiters(results);
}

/// The same holders in a set that ACQUIRE filled, and in one that ZADD did.
fn leases(results: &mut Results) {
    let server = lab::server_with_module(&[]);
    let mut client = server.client();
    let from_s = client.now_ms() / 1000 + 3600;
    let limit = LEASES.to_string();
    for contender in [Contender::Module, Contender::Plain] {
        let add = |number: u64| -> Vec<String> {
            let score = format!("{from_s}.{:03}", number % 1000);
            let holder = lab::holder(number);
            let args = match contender {
                Contender::Module => ["LIMITER.ACQUIRE", "set", &holder, &limit, "3600"].to_vec(),
                _ => ["ZADD", "set", &score, &holder].to_vec(),
            };
            args.into_iter().map(String::from).collect()
        };
        // Once before, so that what the connection needs is not counted.
        let commands: Vec<_> = lab::shuffled(LEASES).into_iter().map(add).collect();
        lab::pipeline(&mut client, &commands[..1_000], 1);
        client.call("DEL set");
        let before = lab::used_memory(&mut client);
        lab::pipeline(&mut client, &commands, 1);
        let each = (lab::used_memory(&mut client) - before) / LEASES as f64;
        client.call("DEL set");
        results.add(&lease_subject(), Quantity::Memory, &contender.to_string(), each);
    }
}

/// The same clients, blocked by BACQUIRE, by a module that does nothing else, and by BLPOP. The
/// first two have in common what the server takes for a client that a module blocks.
fn waiters(results: &mut Results) {
    let block = block_module();
    let block = block.to_str().expect("a path in UTF-8");
    let servers = [
        (Way::Module.to_string(), lab::server_with_module(&[])),
        (BLOCK.into(), lab::bare_server(&["--loadmodule", block])),
        (Way::Blpop.to_string(), lab::bare_server(&[])),
    ];
    let command = |contender: &str, number| {
        let holder = lab::holder(number);
        if contender == BLOCK {
            vec!["BLOCK".to_string()]
        } else if contender == Way::Blpop.to_string() {
            ["BLPOP", "list", "3600"].map(String::from).to_vec()
        } else {
            ["LIMITER.BACQUIRE", "limiter", &holder, "0", "3600", "3600"].map(String::from).to_vec()
        }
    };
    for (contender, server) in &servers {
        let mut admin = server.client();
        let before = lab::used_memory(&mut admin);
        let mut clients: Vec<_> = (0..WAITERS).map(|_| server.client()).collect();
        for (client, number) in clients.iter_mut().zip(0..) {
            client.send(&command(contender, number));
        }
        wait_until("all wait", || admin.info("clients", "blocked_clients") == WAITERS.to_string());
        wait_until_settled(&mut admin);
        let each = (lab::used_memory(&mut admin) - before) / WAITERS as f64;
        results.add(&waiter_subject(), Quantity::Memory, contender, each);
    }
}

/// The name of the module that does nothing but block.
pub const BLOCK: &str = "a module that only blocks";

/// Builds that module.
fn block_module() -> PathBuf {
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/bench/block.c");
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("block.so");
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let mut build = Command::new(compiler);
    build.args(["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o"]);
    let built = build.args([library.as_path(), Path::new(source)]).status();
    assert!(built.expect("a C compiler").success(), "{source} does not compile");
    library
}

/// Waits until the server has taken back the buffers that clients needed to send a command, which
/// are larger than all the rest.
fn wait_until_settled(admin: &mut Client) {
    wait_until("buffers are small", || {
        let clients = admin.text("CLIENT LIST");
        let mut others = clients.lines().filter(|client| !client.contains(" cmd=client|list "));
        others.all(|client| client.contains(" qbuf-free=0 ") && client.contains(" rbs=1024 "))
    });
}
