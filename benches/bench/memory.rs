//! What a lease and a waiter take of the server's memory, by its own account (`used_memory`),
//! which the module's allocations are part of.
//!
//! Measured once: it is the same every time.

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

/// The same clients waiting by BACQUIRE and by BLPOP, with a time-out.
fn waiters(results: &mut Results) {
    let server = lab::server_with_module(&[]);
    let mut admin = server.client();
    admin.call("LIMITER.ACQUIRE limiter holder 1 3600");
    for way in [Way::Module, Way::Blpop] {
        wait_until_settled(&mut admin);
        let before = lab::used_memory(&mut admin);
        let mut clients: Vec<_> = (0..WAITERS).map(|_| server.client()).collect();
        for (client, number) in clients.iter_mut().zip(0..) {
            let holder = lab::holder(number);
            match way {
                Way::Module => {
                    client.send(&["LIMITER.BACQUIRE", "limiter", &holder, "1", "3600", "3600"]);
                }
                _ => client.send(&["BLPOP", "list", "3600"]),
            }
        }
        wait_until("all wait", || admin.info("clients", "blocked_clients") == WAITERS.to_string());
        wait_until_settled(&mut admin);
        let each = (lab::used_memory(&mut admin) - before) / WAITERS as f64;
        results.add(&waiter_subject(), Quantity::Memory, &way.to_string(), each);
        drop(clients);
        wait_until("all are gone", || admin.info("clients", "connected_clients") == "1");
    }
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
