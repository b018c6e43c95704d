//! BACQUIRE: who waits, in which order, what moves the line, and how a wait can end.
//!
//! The servers run with an AOF: what must not be written at a bad moment stops a server only then.

mod harness;

use std::ops::Deref;
use std::time::{Duration, Instant};

use harness::{error_text, ints, short, slowness, strings, wait_until, Client, Server, AOF};
use redis::Value;

const ONE: Value = Value::Int(1);
const ZERO: Value = Value::Int(0);

/// A server with an AOF and a replica that has not the module.
struct Pair {
    server: Server,
    replica: Server,
}

impl Deref for Pair {
    type Target = Server;

    fn deref(&self) -> &Server {
        &self.server
    }
}

fn start() -> Pair {
    let server = Server::start_with(&AOF);
    let replica = Server::start_bare(&["--replicaof", "127.0.0.1", &server.port.to_string()]);
    let mut client = server.client();
    wait_until("the replica follows", || {
        client.info("replication", "connected_slaves") == "1"
            && client.info("replication", "slave0").contains("state=online")
    });
    Pair { server, replica }
}

/// Database and key, members, expiry.
type Limiter = (String, Vec<(String, f64)>, i64);

/// Every limiter with its members, in both databases that the tests use, and its expiry.
fn everything(client: &mut Client) -> Vec<Limiter> {
    let mut all = Vec::new();
    for db in ["0", "1"] {
        client.call(&format!("SELECT {db}"));
        let mut keys = client.strings("KEYS *");
        keys.sort();
        keys.retain(|key| client.text(&format!("TYPE {key}")) == "zset");
        for key in keys {
            let expiry_ms = client.int(&format!("PEXPIRETIME {key}"));
            all.push((format!("{db}: {key}"), client.members(&key), expiry_ms));
        }
    }
    all
}

/// Nobody is blocked any more, the replica and the AOF have the same sets, and the server lives.
fn check_at_the_end(pair: Pair) {
    let Pair { server, replica } = pair;
    wait_until("nobody is blocked", || server.blocked() == 0);
    let before = everything(&mut server.client());
    let mut on_replica = replica.client();
    wait_until("the replica agrees", || everything(&mut on_replica) == before);
    let replayed = server.replay(&AOF);
    assert_eq!(everything(&mut replayed.client()), before, "the AOF tells another story");
}

#[test]
fn a_free_slot_is_taken_at_once_and_a_taken_one_is_waited_for() {
    let server = start();
    let mut client = server.client();
    assert_eq!(client.int("LIMITER.BACQUIRE p a 1 45 10"), 1);
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 10");
    assert!(!waiter.has_reply());
    assert_eq!(client.int("LIMITER.RELEASE p a"), 1);
    assert_eq!(waiter.receive(), ONE);
    assert_eq!(client.strings("LIMITER.HOLDERS p")[0], "b");
    drop(waiter);
    assert_eq!(client.int("LIMITER.COUNT p"), 1, "an ordinary lease outlives its connection");
    check_at_the_end(server);
}

#[test]
fn release_and_hand_off_travel_together() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    let before = server.effects().len();
    client.int("LIMITER.RELEASE p a");
    waiter.receive();
    let names: Vec<String> =
        server.effects()[before..].iter().map(|effect| effect[0].clone()).collect();
    assert_eq!(names, ["MULTI", "ZREM", "ZADD", "PEXPIREAT", "EXEC"]);
    check_at_the_end(server);
}

#[test]
fn the_line_is_first_come_first_served() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p first 1 450");
    let mut waiters: Vec<Client> =
        (0..250).map(|n| server.waiter(&format!("LIMITER.BACQUIRE p w{n} 1 450 0"))).collect();
    let mut holder = "first".to_string();
    for (n, waiter) in waiters.iter_mut().enumerate() {
        assert_eq!(client.int(&format!("LIMITER.RELEASE p {holder}")), 1);
        assert_eq!(waiter.receive(), ONE, "waiter {n}");
        holder = format!("w{n}");
        assert_eq!(client.strings("LIMITER.HOLDERS p")[0], holder);
        assert_eq!(server.blocked(), 249 - n, "one wake-up a slot");
    }
    check_at_the_end(server);
}

#[test]
fn nobody_overtakes() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    let mut first = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    let mut second = server.waiter("LIMITER.BACQUIRE p c 100 45 0");
    assert!(!second.has_reply(), "a higher limit does not overtake");
    assert_eq!(client.int("LIMITER.ACQUIRE p d 100 45"), 0, "nor does a plain ACQUIRE");
    assert_eq!(client.int("LIMITER.ACQUIRE p a 1 45"), 1, "a holder takes no slot");
    assert_eq!(client.int("LIMITER.BACQUIRE p a 1 45 0"), 1, "in neither way");
    client.int("LIMITER.RELEASE p a");
    assert_eq!(first.receive(), ONE);
    assert_eq!(second.receive(), ONE, "its own limit is met behind the first");
    check_at_the_end(server);
}

#[test]
fn a_head_whose_limit_is_not_met_blocks_those_behind_it() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 9 45");
    let mut never = server.waiter("LIMITER.BACQUIRE p b 0 45 0");
    let mut behind = server.waiter("LIMITER.BACQUIRE p c 9 45 0");
    client.int("LIMITER.RELEASE p a");
    assert!(!never.has_reply() && !behind.has_reply());
    never.close();
    assert_eq!(behind.receive(), ONE, "the head left, and the next can go at once");
    check_at_the_end(server);
}

#[test]
fn a_newcomer_does_not_slip_in_at_the_instant_of_a_lapse_or_a_del() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    for (make_room, key) in [("DEL p", "x"), ("ZREM p w0", "y"), ("ZADD p 1 w1", "z")] {
        let number = ["x", "y", "z"].iter().position(|name| *name == key).unwrap();
        let mut waiter = server.waiter(&format!("LIMITER.BACQUIRE p w{number} 1 45 0"));
        let barge = format!("LIMITER.ACQUIRE p {key} 1 45");
        if number == 1 {
            client.call("MULTI");
            client.call(make_room);
            client.call(&barge);
            let Value::Array(replies) = client.call("EXEC") else { panic!("no replies") };
            assert_eq!(replies[1], ZERO, "in a transaction");
        } else {
            client.send(&make_room.split(' ').collect::<Vec<_>>());
            client.send(&barge.split(' ').collect::<Vec<_>>());
            client.receive();
            assert_eq!(client.receive(), ZERO, "in a pipeline, after {make_room}");
        }
        assert_eq!(waiter.receive(), ONE, "after {make_room}");
    }
    check_at_the_end(server);
}

#[test]
fn a_newcomer_behind_a_line_that_is_served_to_its_end_takes_what_is_left() {
    let server = start();
    let mut client = server.client();
    for newcomer in ["BACQUIRE", "ACQUIRE"] {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 2 450");
        client.int("LIMITER.ACQUIRE p b 2 450");
        let mut waiter = server.waiter("LIMITER.BACQUIRE p w 2 450 0");
        let timeout = if newcomer == "BACQUIRE" { "0" } else { "" };
        client.send_raw(format!("DEL p\r\nLIMITER.{newcomer} p n 2 450 {timeout}\r\n").as_bytes());
        assert_eq!((client.receive(), client.receive()), (ONE, ONE), "{newcomer}");
        assert_eq!(waiter.receive(), ONE);
        assert_eq!(client.strings("ZRANGE p 0 -1"), ["n", "w"]);
    }
    // The same after a lapse: the server sleeps over it, and finds the newcomer when it wakes.
    client.call("DEL p");
    let (ttl, longer) = (short(0.1), short(0.2));
    client.int(&format!("LIMITER.ACQUIRE p a 2 {ttl}"));
    client.int(&format!("LIMITER.ACQUIRE p b 2 {ttl}"));
    let mut waiter = server.waiter("LIMITER.BACQUIRE p w 2 450 0");
    let pipeline = format!("DEBUG SLEEP {longer}\r\nLIMITER.BACQUIRE p n 2 450 0\r\n");
    client.send_raw(pipeline.as_bytes());
    assert_eq!((client.receive(), client.receive()), (Value::Okay, ONE));
    assert_eq!(waiter.receive(), ONE);
    check_at_the_end(server);
}

#[test]
fn a_lapse_moves_the_line_and_the_ttl_starts_at_the_grant() {
    let server = start();
    let mut client = server.client();
    client.int(&format!("LIMITER.ACQUIRE p a 1 {}", short(0.3)));
    let lapse_ms = (client.members("p")[0].1 * 1000.0).round() as i64;
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    assert_eq!(waiter.receive(), ONE);
    let now_ms = client.now_ms();
    assert!(now_ms >= lapse_ms, "not before the lapse");
    let end_ms = (client.members("p")[0].1 * 1000.0).round() as i64;
    assert!((lapse_ms + 45_000..=now_ms + 45_000).contains(&end_ms), "from the grant on");
    check_at_the_end(server);
}

#[test]
fn a_renewal_moves_the_lapse_that_is_waited_for() {
    let server = start();
    let mut client = server.client();
    client.int(&format!("LIMITER.ACQUIRE p a 1 {}", short(0.5)));
    let first_ms = (client.members("p")[0].1 * 1000.0).round() as i64;
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    assert_eq!(client.int("LIMITER.RENEW p a 45"), 1, "longer");
    client.wait_for_clock(first_ms + 20);
    assert!(!waiter.has_reply());
    assert_eq!(client.int("LIMITER.RENEW p a 0.05"), 1, "shorter");
    assert_eq!(waiter.receive(), ONE);
    check_at_the_end(server);
}

#[test]
fn every_change_by_others_moves_the_line() {
    let server = start();
    let mut client = server.client();
    client.run(&["FUNCTION", "LOAD", "#!lua name=lib\nredis.register_function('drop', function(keys) return redis.call('DEL', keys[1]) end)"]);
    let rename_in = "RENAME q p";
    for change in [
        "DEL p",
        "UNLINK p",
        "ZREM p a",
        "ZPOPMIN p",
        "ZPOPMAX p",
        "ZREMRANGEBYRANK p 0 -1",
        "ZREMRANGEBYSCORE p -inf +inf",
        "ZREMRANGEBYLEX p - +",
        "ZADD p 1 a",
        "RENAME p elsewhere",
        rename_in,
        "MOVE p 5",
        "PEXPIRE p 1",
        "EXPIREAT p 1",
        "ZRANGESTORE p q 0 -1",
        "ZUNIONSTORE p 1 q",
        "COPY q p REPLACE",
        "RESTORE",
        "FLUSHDB",
        "FLUSHALL",
        "FLUSHALL ASYNC",
        "FLUSHDB ASYNC",
        "EVAL return(redis.call('DEL',KEYS[1])) 1 p",
        "FCALL drop 1 p",
        "SWAPDB 0 1",
    ] {
        client.call("FLUSHALL");
        // q is another limiter whose one lease has lapsed.
        client.int("ZADD q 1 lapsed");
        assert_eq!(client.int("LIMITER.ACQUIRE p a 1 450"), 1);
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
        let reply = if change == "RESTORE" {
            let Value::BulkString(dump) = client.call("DUMP q") else { panic!("no dump") };
            client.run(&[b"RESTORE" as &[u8], b"p", b"0", &dump, b"REPLACE"])
        } else {
            client.call(change)
        };
        assert!(!matches!(reply, Value::ServerError(_)), "{change}: {reply:?}");
        assert_eq!(waiter.receive(), ONE, "after {change}");
        assert_eq!(client.strings("LIMITER.HOLDERS p")[0], "b", "after {change}");
    }
    check_at_the_end(server);
}

#[test]
fn the_sets_own_expiry_moves_the_line_when_nothing_else_looks_at_it() {
    let server = start();
    let mut client = server.client();
    client.call("DEBUG SET-ACTIVE-EXPIRE 0");
    client.int("LIMITER.ACQUIRE p a 1 450");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
    client.int("PEXPIRE p 50");
    assert_eq!(waiter.receive(), ONE);
    check_at_the_end(server);
}

#[test]
fn a_change_in_a_transaction_moves_the_line_after_it() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    let before = server.effects().len();
    client.call("MULTI");
    client.call("DEL p");
    client.call("SET q v");
    client.call("EXEC");
    assert_eq!(waiter.receive(), ONE);
    let names: Vec<String> =
        server.effects()[before..].iter().map(|effect| effect[0].to_uppercase()).collect();
    let place = |name: &str| names.iter().position(|other| other == name).expect(name);
    assert!(place("DEL") < place("ZADD") && place("SET") < place("ZADD"), "{names:?}");
    check_at_the_end(server);
}

#[test]
fn eviction_moves_the_line() {
    let server = start();
    let mut client = server.client();
    client.call("CONFIG SET maxmemory-policy allkeys-random");
    client.int("LIMITER.ACQUIRE p a 1 450");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
    client.call("CONFIG SET maxmemory 1");
    client.call("PING");
    wait_until("the key is evicted", || {
        client.call("SET x y"); // Refused or not, it makes the server evict.
        client.info("stats", "evicted_keys") != "0"
    });
    client.call("CONFIG SET maxmemory 0");
    assert_eq!(waiter.receive(), ONE, "though maxmemory was exceeded");
    check_at_the_end(server);
}

#[test]
fn a_raised_limit_at_the_head_moves_the_line() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 9 45");
    let low = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    let mut high = server.waiter("LIMITER.BACQUIRE p c 2 45 0");
    low.close();
    assert_eq!(high.receive(), ONE);
    check_at_the_end(server);
}

#[test]
fn a_key_of_another_type_ends_the_wait() {
    let server = start();
    let mut client = server.client();
    let wrong_type = "WRONGTYPE Operation against a key holding the wrong kind of value";
    client.call("SET text v");
    assert_eq!(client.error("LIMITER.BACQUIRE text b 1 45 0"), wrong_type);
    client.int("LIMITER.ACQUIRE p a 1 45");
    let mut waiters = [
        server.waiter("LIMITER.BACQUIRE p b 1 45 0"),
        server.waiter("LIMITER.BACQUIRE p c 9 45 9"),
    ];
    client.call("SET p v");
    for waiter in &mut waiters {
        assert_eq!(error_text(&waiter.receive()), wrong_type);
    }
    check_at_the_end(server);
}

#[test]
fn a_wait_times_out_in_time_and_leaves_nothing() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    let started = Instant::now();
    assert_eq!(client.int("LIMITER.BACQUIRE p b 1 45 0.2"), 0);
    let waited = started.elapsed();
    // The server counts whole milliseconds of its clock.
    assert!(waited.as_millis() >= 199, "{waited:?}");
    assert!(waited < Duration::from_secs(2) * slowness(), "{waited:?}");
    assert_eq!(client.int("LIMITER.COUNT p"), 1);
    client.int("LIMITER.RELEASE p a");
    assert_eq!(client.int("LIMITER.COUNT p"), 0, "the one that timed out got nothing");

    client.int("LIMITER.ACQUIRE p a 9 45");
    let mut never = server.waiter("LIMITER.BACQUIRE p b 0 45 0.1");
    let mut behind = server.waiter("LIMITER.BACQUIRE p c 2 45 0");
    assert_eq!(never.receive(), ZERO);
    assert_eq!(behind.receive(), ONE, "the head timed out, and the next can go at once");
    check_at_the_end(server);
}

#[test]
fn time_outs_that_are_none() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    for timeout in ["nan", "inf", "x", "1e3", "1.", "9223372036854775807", "99999999999999999999"] {
        assert_eq!(
            client.error(&format!("LIMITER.BACQUIRE p b 1 45 {timeout}")),
            "ERR timeout is not a float or out of range",
            "{timeout}"
        );
    }
    for timeout in ["-1", "-0.5"] {
        let command = format!("LIMITER.BACQUIRE p b 1 45 {timeout}");
        assert_eq!(client.error(&command), "ERR timeout is negative", "{timeout}");
    }
    assert_eq!(
        client.error("LIMITER.BACQUIRE p b x 45 0"),
        "ERR limit is not an integer or out of range"
    );
    assert_eq!(
        client.error("LIMITER.BACQUIRE p b 1 0 0"),
        "ERR invalid expire time in 'limiter.bacquire' command"
    );
    assert_eq!(client.error("LIMITER.BACQUIRE p b 1 45 0 NX"), "ERR syntax error");
    assert_eq!(client.error("LIMITER.BACQUIRE p b 1 45 0 EPHEMERAL EPHEMERAL"), "ERR syntax error");
    // The largest there is: it waits, and no sum of times overflows.
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 9007199254740");
    client.int("LIMITER.RELEASE p a");
    assert_eq!(waiter.receive(), ONE);
    check_at_the_end(server);
}

#[test]
fn in_transactions_scripts_and_functions_it_answers_at_once() {
    let server = start();
    let mut client = server.client();
    client.call("MULTI");
    client.call("LIMITER.BACQUIRE p a 1 45 0");
    client.call("LIMITER.BACQUIRE p b 1 45 0");
    assert_eq!(client.call("EXEC"), ints(&[1, 0]));
    let script = "return redis.call('LIMITER.BACQUIRE', KEYS[1], ARGV[1], 1, 45, 0)";
    assert_eq!(client.run(&["EVAL", script, "1", "p", "b"]), ZERO);
    assert_eq!(client.run(&["EVAL", script, "1", "p", "a"]), ONE);
    client.run(&["FUNCTION", "LOAD", "#!lua name=lib\nredis.register_function('wait', function(keys, args) return redis.call('LIMITER.BACQUIRE', keys[1], args[1], 1, 45, 0) end)"]);
    assert_eq!(client.int("FCALL wait 1 p b"), 0);
    assert_eq!(client.int("FCALL wait 1 q b"), 1);
    check_at_the_end(server);
}

#[test]
fn the_same_key_waits_twice_and_takes_one_slot() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    let mut first = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    let mut again = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
    let mut other = server.waiter("LIMITER.BACQUIRE p c 1 45 0");
    client.int("LIMITER.RELEASE p a");
    assert_eq!(first.receive(), ONE);
    assert_eq!(again.receive(), ONE, "it holds a lease when its turn comes");
    assert!(!other.has_reply());
    assert_eq!(client.int("LIMITER.COUNT p"), 1);
    client.int("LIMITER.RELEASE p b");
    assert_eq!(other.receive(), ONE);
    check_at_the_end(server);
}

#[test]
fn waiters_leave_in_every_way_before_the_grant() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    let mut killed = server.client();
    let id = killed.id();
    killed.send(&["LIMITER.BACQUIRE", "p", "killed", "1", "45", "0"]);
    wait_until("it waits", || server.blocked() == 1);
    let closed = server.waiter("LIMITER.BACQUIRE p closed 1 45 0");
    let mut stays = server.waiter("LIMITER.BACQUIRE p stays 1 45 0");
    assert_eq!(client.int(&format!("CLIENT KILL ID {id}")), 1);
    closed.close();
    wait_until("two have left", || server.blocked() == 1);
    client.int("LIMITER.RELEASE p a");
    assert_eq!(stays.receive(), ONE);
    assert_eq!(client.strings("ZRANGE p 0 -1"), ["stays"]);
    check_at_the_end(server);
}

#[test]
fn a_waiter_that_goes_in_the_turn_of_its_grant_loses_the_lease_to_the_next() {
    let server = start();
    let mut client = server.client();
    for round in 0..60 {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 1 450");
        let mut going = server.client();
        let id = going.id();
        going.send(&["LIMITER.BACQUIRE", "p", "going", "1", "450", "0"]);
        wait_until("it waits", || server.blocked() == 1);
        let mut next = server.waiter("LIMITER.BACQUIRE p next 1 450 0");
        let release = "LIMITER.RELEASE p a";
        match round % 3 {
            0 => {
                // Granted and killed in one pipeline, so in one turn of the event loop.
                client.send_raw(format!("{release}\r\nCLIENT KILL ID {id}\r\n").as_bytes());
                assert_eq!((client.receive(), client.receive()), (ONE, ONE));
            }
            1 => {
                client.send_raw(format!("CLIENT KILL ID {id}\r\n{release}\r\n").as_bytes());
                assert_eq!((client.receive(), client.receive()), (ONE, ONE));
            }
            _ => {
                // The server finds both in one look at its sockets: it sleeps meanwhile.
                let mut busy = server.client();
                busy.send(&["DEBUG", "SLEEP", "0.02"]);
                going.close();
                client.send(&release.split(' ').collect::<Vec<_>>());
                assert_eq!(client.receive(), ONE);
            }
        }
        assert_eq!(next.receive(), ONE, "round {round}");
        assert_eq!(client.strings("ZRANGE p 0 -1"), ["next"], "round {round}");
    }
    check_at_the_end(server);
}

#[test]
fn a_lease_whose_reply_was_written_stays_though_the_connection_closes_in_that_turn() {
    let server = start();
    let mut client = server.client();
    for behind in ["QUIT", "CLIENT KILL ID"] {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 1 450");
        let mut waiter = server.client();
        let behind = match behind {
            "CLIENT KILL ID" => format!("{behind} {} SKIPME no", waiter.id()),
            other => other.to_string(),
        };
        waiter.send_raw(format!("LIMITER.BACQUIRE p w 1 450 0\r\n{behind}\r\n").as_bytes());
        wait_until("it waits", || server.blocked() == 1);
        client.int("LIMITER.RELEASE p a");
        assert_eq!(waiter.receive(), ONE);
        while waiter.try_receive().is_ok() {} // Until it is closed.
        client.call("PING");
        assert_eq!(client.int("LIMITER.COUNT p"), 1, "acknowledged, and lost by {behind}");
    }
    check_at_the_end(server);
}

#[test]
fn a_user_deleted_in_the_turn_of_a_grant_takes_no_slot_along() {
    let server = start();
    let mut client = server.client();
    client.call("ACL SETUSER guest on nopass ~* +@all");
    client.int("LIMITER.ACQUIRE p a 1 450");
    let mut guest = server.client();
    guest.call("AUTH guest x");
    guest.send(&["LIMITER.BACQUIRE", "p", "guest", "1", "450", "0"]);
    wait_until("it waits", || server.blocked() == 1);
    let mut next = server.waiter("LIMITER.BACQUIRE p next 1 450 0");
    client.send_raw(b"LIMITER.RELEASE p a\r\nACL DELUSER guest\r\n");
    assert_eq!((client.receive(), client.receive()), (ONE, ONE));
    assert_eq!(next.receive(), ONE);
    assert_eq!(client.strings("ZRANGE p 0 -1"), ["next"]);
    check_at_the_end(server);
}

#[test]
fn two_waiters_with_one_key_that_both_go_leave_no_lease() {
    let server = start();
    let mut client = server.client();
    for first_stays in [false, true] {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 1 450");
        let mut ids = Vec::new();
        let mut twins: Vec<Client> = (1..=2)
            .map(|waiting| {
                let mut twin = server.client();
                ids.push(twin.id());
                let ttl = (450 + waiting).to_string(); // The last grant moves its end.
                twin.send(&["LIMITER.BACQUIRE", "p", "twin", "1", &ttl, "0"]);
                wait_until("it waits", || server.blocked() == waiting);
                twin
            })
            .collect();
        let next = server.waiter("LIMITER.BACQUIRE p next 1 450 0");
        let kill_first = format!("CLIENT KILL ID {}\r\n", ids[0]);
        let kill_first = if first_stays { "" } else { &kill_first };
        client.send_raw(
            format!("LIMITER.RELEASE p a\r\n{kill_first}CLIENT KILL ID {}\r\n", ids[1]).as_bytes(),
        );
        (0..if first_stays { 2 } else { 3 }).for_each(|_| assert_eq!(client.receive(), ONE));
        if first_stays {
            assert_eq!(twins[0].receive(), ONE);
            client.call("PING");
            assert_eq!(client.strings("ZRANGE p 0 -1"), ["twin"], "one was told that it is its");
        } else {
            wait_until("the next has it", || client.strings("ZRANGE p 0 -1") == ["next"]);
        }
        drop((next, twins));
        wait_until("all have left", || server.blocked() == 0);
    }
    check_at_the_end(server);
}

/// Releases `a`, in a turn that goes on long enough for a connection to be reset meanwhile.
fn release_in_a_long_turn(server: &Server, client: &mut Client) {
    client.send_raw(b"LIMITER.RELEASE p a\r\nDEBUG SLEEP 0.2\r\n");
    let mut probe = server.client();
    wait_until("the server sleeps", || {
        probe.send(&["PING"]);
        let answers = probe.has_reply();
        if answers {
            probe.receive();
        }
        !answers
    });
}

#[test]
fn a_lease_whose_reply_cannot_be_written_goes_to_the_next() {
    let server = start();
    let mut client = server.client();
    for round in 0..10 {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 1 450");
        let going = server.waiter("LIMITER.BACQUIRE p going 1 450 0");
        let mut next = server.waiter("LIMITER.BACQUIRE p next 1 450 0");
        release_in_a_long_turn(&server, &mut client);
        going.abort();
        assert_eq!((client.receive(), client.receive()), (ONE, Value::Okay));
        assert_eq!(next.receive(), ONE, "round {round}");
        assert_eq!(client.strings("ZRANGE p 0 -1"), ["next"], "round {round}");
    }
    check_at_the_end(server);
}

#[test]
fn a_reply_that_cannot_be_written_does_not_untie_the_lease_of_another_waiter() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 450");
    let mut stays = server.waiter("LIMITER.BACQUIRE p twin 1 450 0 EPHEMERAL");
    let goes = server.waiter("LIMITER.BACQUIRE p twin 1 450 0");
    release_in_a_long_turn(&server, &mut client);
    goes.abort();
    assert_eq!(stays.receive(), ONE);
    assert_eq!((client.receive(), client.receive()), (ONE, Value::Okay));
    stays.close();
    wait_until("the lease ends with its connection", || client.int("LIMITER.COUNT p") == 0);
    check_at_the_end(server);
}

#[test]
fn a_lease_taken_over_in_the_turn_its_waiter_goes_stays() {
    let server = start();
    let mut client = server.client();
    for _ in 0..20 {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 1 450");
        let mut going = server.client();
        let id = going.id();
        going.send(&["LIMITER.BACQUIRE", "p", "k", "1", "450", "0"]);
        wait_until("it waits", || server.blocked() == 1);
        // Granted, its client killed, and the same key acquired by us: all in one turn, mostly in
        // one millisecond, so to the same score.
        client.send_raw(
            format!("LIMITER.RELEASE p a\r\nCLIENT KILL ID {id}\r\nLIMITER.ACQUIRE p k 1 450\r\n")
                .as_bytes(),
        );
        assert_eq!([client.receive(), client.receive(), client.receive()], [ONE, ONE, ONE]);
        wait_until("it is gone", || server.blocked() == 0);
        client.call("PING");
        assert_eq!(client.int("LIMITER.COUNT p"), 1, "what was acknowledged is not taken back");
    }
    check_at_the_end(server);
}

#[test]
fn a_holder_that_closes_right_after_its_reply_keeps_its_lease() {
    let server = start();
    let mut client = server.client();
    for round in 0..200 {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 1 450");
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
        client.send(&["DEL", "p"]);
        assert_eq!(waiter.receive(), ONE);
        drop(waiter);
        client.receive();
        assert_eq!(client.int("LIMITER.ACQUIRE p x 1 450"), 0, "acknowledged, lost in {round}");
    }
    check_at_the_end(server);
}

#[test]
fn a_grant_and_a_deadline_in_one_turn_give_one_reply() {
    let server = start();
    let mut client = server.client();
    let mut granted = 0;
    for round in 0..40 {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 1 450");
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0.05");
        // The server sleeps past the deadline, and finds the release when it wakes.
        let mut busy = server.client();
        busy.send(&["DEBUG", "SLEEP", "0.06"]);
        if round % 2 == 0 {
            client.send(&["LIMITER.RELEASE", "p", "a"]);
            client.receive();
        }
        let reply = waiter.receive();
        busy.receive();
        let holds = client.strings("LIMITER.HOLDERS p").iter().any(|key| key == "b");
        assert_eq!(holds, reply == ONE, "a lease exists if and only if the reply was 1");
        assert!(!waiter.has_reply(), "one reply");
        granted += i32::from(holds);
    }
    println!("{granted} of 20 that could be granted were");
    check_at_the_end(server);
}

#[test]
fn client_unblock_works_where_the_server_does_it_safely() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    // Redis 7.4 and later, Valkey 8 and later.
    let version = |field| -> Option<Vec<u32>> {
        let info = server.client().text("INFO server");
        let line = info.lines().find(|line| line.starts_with(field))?.to_string();
        let digits = line.split(':').nth(1)?.trim().split('.').map(|part| part.parse().unwrap());
        Some(digits.collect())
    };
    let safe = version("valkey_version:").map_or_else(
        || version("redis_version:").is_some_and(|redis| redis >= vec![7, 4]),
        |valkey| valkey >= vec![8],
    );
    for (how, expected) in
        [("", "0"), ("TIMEOUT", "0"), ("ERROR", "UNBLOCKED client unblocked via CLIENT UNBLOCK")]
    {
        let mut waiter = server.client();
        let id = waiter.id();
        waiter.send(&["LIMITER.BACQUIRE", "p", "b", "1", "45", "0"]);
        wait_until("it waits", || server.blocked() == 1);
        assert_eq!(client.int(&format!("CLIENT UNBLOCK {id} {how}")), i64::from(safe));
        if safe {
            match waiter.receive() {
                Value::Int(integer) => assert_eq!(integer.to_string(), expected),
                error => assert_eq!(error_text(&error), expected),
            }
            assert_eq!(waiter.call("PING"), harness::text("PONG"), "it is still connected");
        } else {
            assert!(!waiter.has_reply(), "it waits on");
        }
        waiter.close();
        wait_until("nobody waits", || server.blocked() == 0);
    }
    // Granted and unblocked in one turn: the reply is one of the two, and the lease follows it.
    for round in 0..20 {
        client.call("DEL p");
        client.int("LIMITER.ACQUIRE p a 1 45");
        let mut waiter = server.client();
        let id = waiter.id();
        waiter.send(&["LIMITER.BACQUIRE", "p", "b", "1", "45", "0"]);
        wait_until("it waits", || server.blocked() == 1);
        let how = ["TIMEOUT", "ERROR"][round % 2];
        client.send_raw(format!("LIMITER.RELEASE p a\r\nCLIENT UNBLOCK {id} {how}\r\n").as_bytes());
        client.receive();
        client.receive();
        let granted = waiter.receive() == ONE;
        wait_until("lease and reply agree", || client.int("LIMITER.COUNT p") == i64::from(granted));
    }
    check_at_the_end(server);
}

#[test]
fn withstate_tells_who_waits() {
    let server = start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 45");
    let waiters: Vec<Client> =
        (0..3).map(|n| server.waiter(&format!("LIMITER.BACQUIRE p w{n} 1 45 0"))).collect();
    let state = strings(&client.call("LIMITER.ACQUIRE p x 1 45 WITHSTATE"));
    assert_eq!((state[0].as_str(), state[1].as_str(), state[3].as_str()), ("0", "1", "3"));
    let state = strings(&client.call("LIMITER.ACQUIRE p a 1 45 WITHSTATE"));
    assert_eq!((state[0].as_str(), state[3].as_str()), ("2", "3"));
    drop(waiters);
    wait_until("nobody waits", || server.blocked() == 0);
    let state = strings(&client.call("LIMITER.ACQUIRE p x 1 45 WITHSTATE"));
    assert_eq!(state[3], "0");
}

#[test]
fn lines_of_several_databases_are_apart_and_stay_where_they_are_in_a_swap() {
    let server = start();
    let (mut zero, mut one) = (server.client(), server.client());
    one.call("SELECT 1");
    zero.int("LIMITER.ACQUIRE p a 1 45");
    one.int("LIMITER.ACQUIRE p b 1 45");
    let mut on_zero = server.waiter("LIMITER.BACQUIRE p c 1 45 0");
    let mut on_one = server.client();
    on_one.call("SELECT 1");
    on_one.send(&["LIMITER.BACQUIRE", "p", "d", "1", "45", "0"]);
    wait_until("both wait", || server.blocked() == 2);
    zero.call("SWAPDB 0 1");
    assert_eq!(zero.strings("LIMITER.HOLDERS p")[0], "b", "the leases have changed places");
    // In the order of their arrival they would be granted only if they stood in one line.
    one.int("LIMITER.RELEASE p a");
    assert_eq!(on_one.receive(), ONE, "the waiter waits for its database's number");
    assert!(!on_zero.has_reply());
    zero.int("LIMITER.RELEASE p b");
    assert_eq!(on_zero.receive(), ONE);
    check_at_the_end(server);
}

#[test]
fn five_thousand_waiters_leave_at_once() {
    let server = Server::start_with(&["--maxclients", "6000"]);
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 1 4500");
    let mut waiters: Vec<Client> = (0..5_000).map(|_| server.client()).collect();
    for (n, waiter) in waiters.iter_mut().enumerate() {
        waiter.send(&["LIMITER.BACQUIRE", "p", &n.to_string(), "1", "4500", "60"]);
    }
    wait_until("all wait", || server.blocked() == 5_000);
    let memory =
        |client: &mut Client| -> i64 { client.info("memory", "used_memory").parse().unwrap() };
    let before = memory(&mut client);
    assert_eq!(client.int("LIMITER.RELEASE p a"), 1);
    wait_until("one was woken", || server.blocked() == 4_999);
    drop(waiters);
    wait_until("all have left", || server.blocked() == 0);
    assert!(client.int("LIMITER.COUNT p") <= 1);
    assert_eq!(client.call("FLUSHALL"), Value::Okay);
    assert!(memory(&mut client) < before, "their memory came back");
}

/// `work` makes so many clients wait for the slot of `p` that `a` holds; what is kept of them goes.
fn check_that_nothing_is_kept(count: usize, work: impl Fn(&Server, &mut Client, usize)) {
    let server = Server::start();
    let mut client = server.client();
    let number = |client: &mut Client, section: &str, field: &str| -> i64 {
        client.info(section, field).parse().unwrap()
    };
    client.int("LIMITER.ACQUIRE p a 1 450");
    work(&server, &mut client, count / 10);
    let waits = number(&mut client, "limiter", "limiter_waits");
    let memory = number(&mut client, "memory", "used_memory");
    work(&server, &mut client, count);
    let waited = number(&mut client, "limiter", "limiter_waits") - waits;
    assert!(waited > count as i64 * 9 / 10, "{waited} of {count} waited");
    // What is kept of so many would be more, and the server's buffers are less.
    let bound = memory + 90_000;
    wait_until("their memory is back", || number(&mut client, "memory", "used_memory") < bound);
}

#[test]
fn what_is_kept_of_a_wait_goes_with_it() {
    check_that_nothing_is_kept(8_000, |server, client, count| {
        let mut waiter = server.client();
        for _ in 0..count {
            waiter.send(&["LIMITER.BACQUIRE", "p", "b", "1", "450", "0"]);
            client.call("PING"); // The waiter's command was read by now, or is read with the next.
            client.int("LIMITER.RELEASE p a");
            assert_eq!(waiter.receive(), ONE);
            client.send_raw(b"LIMITER.RELEASE p b\r\nLIMITER.ACQUIRE p a 1 450\r\n");
            assert_eq!((client.receive(), client.receive()), (ONE, ONE));
        }
    });
}

#[test]
fn what_is_kept_of_a_wait_goes_with_a_client_that_is_gone_before_its_reply() {
    check_that_nothing_is_kept(2_000, |server, client, count| {
        for _ in 0..count {
            let mut waiter = server.client();
            let id = waiter.id();
            waiter.send(&["LIMITER.BACQUIRE", "p", "b", "1", "450", "0"]);
            client.call("PING");
            client.send_raw(format!("LIMITER.RELEASE p a\r\nCLIENT KILL ID {id}\r\n").as_bytes());
            assert_eq!((client.receive(), client.receive()), (ONE, ONE));
            // Taken back, or never waited for.
            wait_until("the slot is free", || {
                client.int("LIMITER.RELEASE p b") == 1 || client.int("LIMITER.COUNT p") == 0
            });
            assert_eq!(client.int("LIMITER.ACQUIRE p a 1 450"), 1);
        }
    });
}
