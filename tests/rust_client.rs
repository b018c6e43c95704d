//! The README's example for Rust: the crate `redis` and its multiplexed connections.
//!
//! What lies between the two marks below is in the README, word for word. It is a test of this
//! crate rather than a crate of its own: the tests depend on `redis` anyway, so it costs one more
//! feature of it, and no second build.

mod harness;

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::{deadline, Server};
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Client, RedisResult};

// README: from here
/// Waits in line for one of `limit` slots, at most `timeout` seconds (0: no limit).
async fn acquire(client: &Client, prefix: &str, key: &str, timeout: f64) -> RedisResult<bool> {
    // A connection of its own: on a shared one everybody's commands would wait behind this one,
    // also the RELEASE it waits for. And a reply may take longer than the crate allows by default.
    let config = AsyncConnectionConfig::new().set_response_timeout(None);
    let mut own = client.get_multiplexed_async_connection_with_config(&config).await?;
    let (limit, ttl) = (2, 45);
    let mut command = redis::cmd("LIMITER.BACQUIRE");
    command.arg(prefix).arg(key).arg(limit).arg(ttl).arg(timeout).query_async(&mut own).await
}

/// All else can go over a connection that is shared. False: the lease had lapsed.
async fn release(shared: &MultiplexedConnection, prefix: &str, key: &str) -> RedisResult<bool> {
    let mut command = redis::cmd("LIMITER.RELEASE");
    command.arg(prefix).arg(key).query_async(&mut shared.clone()).await
}
// README: to here

/// The limit in the example.
const LIMIT: usize = 2;

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(test)
}

fn client(server: &Server) -> Client {
    Client::open(("127.0.0.1", server.port)).expect("an address")
}

/// Waits until so many clients wait in line, letting the other tasks go on.
async fn until_in_line(server: &Server, count: usize) {
    let give_up = Instant::now() + deadline();
    while server.blocked() != count {
        assert!(Instant::now() < give_up, "waited in vain until {count} clients wait");
        tokio::time::sleep(Duration::from_millis(1)).await; // Between two looks.
    }
}

#[test]
fn the_readme_shows_the_example() {
    let rest = include_str!("rust_client.rs").split("// README: from here\n").nth(1);
    let example = rest.and_then(|rest| rest.split("// README: to here").next()).expect("marks");
    assert!(include_str!("../README.md").contains(&format!("```rust\n{example}```\n")));
}

#[test]
fn the_example_never_exceeds_the_limit_and_everybody_gets_a_slot() {
    let server = Server::start();
    run(async {
        let client = client(&server);
        // By default the crate gives a reply half a second.
        let config = AsyncConnectionConfig::new().set_response_timeout(Some(deadline()));
        let shared = client.get_multiplexed_async_connection_with_config(&config).await;
        let shared = shared.expect("a connection");
        let inside = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..20)
            .map(|n| {
                let (client, mut shared, inside) = (client.clone(), shared.clone(), inside.clone());
                tokio::spawn(async move {
                    let key = format!("op-{n}");
                    assert_eq!(acquire(&client, "p", &key, 0.0).await, Ok(true));
                    let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                    let pong = redis::cmd("PING").query_async::<String>(&mut shared).await;
                    assert_eq!(pong.as_deref(), Ok("PONG"));
                    inside.fetch_sub(1, Ordering::SeqCst);
                    assert_eq!(release(&shared, "p", &key).await, Ok(true));
                    now
                })
            })
            .collect();
        let mut most = 0;
        for task in tasks {
            most = most.max(task.await.expect("no panic"));
        }
        assert!(most <= LIMIT, "{most} at once");
        assert_eq!(release(&shared, "p", "op-1").await, Ok(false));
    });
}

#[test]
fn the_example_waits_longer_than_the_crate_waits_for_a_reply_by_default() {
    let server = Server::start();
    run(async {
        let client = client(&server);
        let mut holder = server.client();
        assert_eq!(holder.int("LIMITER.ACQUIRE p a 2 60"), 1);
        assert_eq!(holder.int("LIMITER.ACQUIRE p b 2 60"), 1);
        let begun = Instant::now();
        assert_eq!(acquire(&client, "p", "c", 0.8).await, Ok(false)); // The crate's is 0.5.
        assert!(begun.elapsed() > Duration::from_millis(700));

        // Whoever no longer wants the slot drops the future, and leaves the line.
        let waiter = tokio::spawn({
            let client = client.clone();
            async move { acquire(&client, "p", "c", 0.0).await }
        });
        until_in_line(&server, 1).await;
        waiter.abort();
        until_in_line(&server, 0).await;
        assert_eq!(holder.int("LIMITER.RELEASE p a"), 1);
        assert_eq!(holder.int("LIMITER.ACQUIRE p d 2 60"), 1);
    });
}

/// Why the example opens a connection for the wait.
#[test]
fn on_a_shared_connection_everything_waits_behind_the_wait() {
    let server = Server::start();
    run(async {
        let shared = client(&server).get_multiplexed_async_connection().await;
        let mut shared = shared.expect("a connection");
        let mut holder = server.client();
        assert_eq!(holder.int("LIMITER.ACQUIRE p a 1 60"), 1);
        let mut waiting = shared.clone();
        let waiter = tokio::spawn(async move {
            let mut command = redis::cmd("LIMITER.BACQUIRE");
            command.arg("p").arg("b").arg(1).arg(60).arg(0).query_async::<bool>(&mut waiting).await
        });
        until_in_line(&server, 1).await;
        let ping = redis::cmd("PING").query_async::<String>(&mut shared).await;
        assert!(ping.expect_err("no reply").is_timeout());
        waiter.abort();
        assert_eq!(holder.int("LIMITER.RELEASE p a"), 1);
    });
}
