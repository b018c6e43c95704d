//! The system's clock is set while leases are held and clients wait. Leases end by that clock, as
//! every expiry in the server does; but no waiter sleeps beside a free slot because of it, and
//! inside a transaction or a script time only runs forward. (Valkey 9 looks at the system's clock
//! only now and then, so the tests wait until it has seen the change.)

mod harness;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use harness::{slowness, strings, wait_until, Server, AOF};
use redis::Value;

const ONE: Value = Value::Int(1);
const HOUR_MS: i64 = 3_600_000;

/// The milliseconds that the one lease of `p` has left.
fn left_ms(server: &Server) -> i64 {
    server.client().strings("LIMITER.HOLDERS p")[1].parse().expect("a number")
}

#[test]
fn set_forward_leases_lapse_and_their_slots_go_to_the_line() {
    let server = Server::start_with_clock(&AOF);
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 1800");
    let mut first = server.waiter("LIMITER.BACQUIRE p first 1 3600 0");
    let mut second = server.waiter("LIMITER.BACQUIRE p second 1 1800 0");
    server.set_clock(HOUR_MS);
    assert_eq!(first.receive(), ONE);
    assert!(!second.has_reply());
    server.set_clock(3 * HOUR_MS);
    assert_eq!(second.receive(), ONE);
    assert_eq!(client.strings("ZRANGE p 0 -1"), ["second"]);
}

#[test]
fn set_back_leases_last_longer_and_the_line_still_moves() {
    let server = Server::start_with_clock(&AOF);
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 10");
    let mut by_release = server.waiter("LIMITER.BACQUIRE p b 1 10 0");
    let mut by_del = server.waiter("LIMITER.BACQUIRE p c 1 10 0 EPHEMERAL");
    let mut by_close = server.waiter("LIMITER.BACQUIRE p d 1 0.2 0");
    let mut by_lapse = server.waiter("LIMITER.BACQUIRE p e 1 10 0");
    server.set_clock(-HOUR_MS);
    wait_until("the lease lasts longer", || left_ms(&server) > HOUR_MS);
    assert_eq!(client.int("LIMITER.RELEASE p a"), 1);
    assert_eq!(by_release.receive(), ONE);
    assert!(left_ms(&server) <= 10_000, "a new lease goes by the new time");
    assert_eq!(client.int("DEL p"), 1);
    assert_eq!(by_del.receive(), ONE);
    server.set_clock(-2 * HOUR_MS);
    wait_until("the lease lasts longer", || left_ms(&server) > HOUR_MS);
    by_del.close();
    assert_eq!(by_close.receive(), ONE);
    assert_eq!(by_lapse.receive(), ONE);
}

#[test]
fn set_back_in_a_pause_the_line_moves_when_the_pause_ends() {
    let server = Server::start_with_clock(&AOF);
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 10");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 10 0");
    client.call("MULTI");
    client.call("CLIENT PAUSE 1000000 WRITE");
    client.call("DEL p");
    client.call("EXEC");
    assert!(!waiter.has_reply());
    // Whatever was to be looked at again soon is now an hour away, by the clock.
    server.set_clock(-HOUR_MS);
    assert!(!waiter.has_reply());
    client.call("CLIENT UNPAUSE");
    assert_eq!(waiter.receive(), ONE);
}

#[test]
fn set_back_after_a_wait_that_timed_out_in_a_pause_the_next_line_moves() {
    let server = Server::start_with_clock(&AOF);
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 10");
    let mut impatient = server.waiter("LIMITER.BACQUIRE p b 1 10 0.5");
    client.call("CLIENT PAUSE 1000000 WRITE");
    assert_eq!(impatient.receive(), Value::Int(0));
    server.set_clock(-HOUR_MS);
    wait_until("the lease lasts longer", || left_ms(&server) > HOUR_MS);
    client.call("CLIENT UNPAUSE");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p c 1 10 0");
    client.int("DEL p");
    assert_eq!(waiter.receive(), ONE);
}

/// Runs `work` while the server's clock is set back by a second a hundred times a second.
fn while_the_clock_runs_back<R>(server: &Server, work: impl FnOnce() -> R) -> R {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut offset_ms = 0;
            while !over.load(Ordering::Relaxed) {
                offset_ms -= 1_000;
                server.set_clock(offset_ms);
                thread::sleep(Duration::from_millis(10));
            }
        });
        let result = work();
        over.store(true, Ordering::Relaxed);
        result
    })
}

#[test]
fn in_a_transaction_time_only_runs_forward() {
    let server = Server::start_with_clock(&[]);
    let mut client = server.client();
    let replies = while_the_clock_runs_back(&server, || {
        client.call("MULTI");
        client.call("LIMITER.ACQUIRE p a 1 100");
        for _ in 0..50 {
            client.call("LIMITER.HOLDERS p");
            client.call("DEBUG SLEEP 0.01");
        }
        client.call("EXEC")
    });
    let Value::Array(replies) = replies else { panic!("{replies:?}") };
    let left = replies.iter().skip(1).step_by(2).map(|reply| strings(reply)[1].parse().unwrap());
    let left_ms: Vec<i64> = left.collect();
    assert_eq!(left_ms.len(), 50);
    assert!(left_ms[0] <= 100_000, "{left_ms:?}");
    assert!(left_ms.is_sorted_by(|earlier, later| earlier >= later), "{left_ms:?}");
}

#[test]
fn in_a_script_time_only_runs_forward() {
    let server = Server::start_with_clock(&[]);
    let mut client = server.client();
    let script = "
        redis.call('LIMITER.ACQUIRE', KEYS[1], 'a', 1, 1000000)
        local least, most = 1e18, 0
        for i = 1, ARGV[1] do
            local left = redis.call('LIMITER.HOLDERS', KEYS[1])[2]
            if left > least then return {left, least} end
            least = left
        end
        return 'forward'";
    let reply = while_the_clock_runs_back(&server, || {
        // For less than the 5 s after which it is taken for another script.
        let looks = (100_000 / slowness()).to_string();
        client.run(&["EVAL", script, "1", "p", &looks])
    });
    assert_eq!(reply, Value::BulkString(b"forward".to_vec()));
}
