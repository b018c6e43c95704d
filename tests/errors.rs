//! Every error of every command, and that nothing is written when one is answered.

mod harness;

use harness::{error_text, Server};
use redis::Value;

const NOT_SECONDS: [&str; 18] = [
    "-1",
    "+1",
    "-0",
    "1e3",
    "0x10",
    "inf",
    "-inf",
    "nan",
    "infinity",
    "ten",
    "1.",
    ".",
    "1.2.3",
    "1,5",
    "9007199254741",
    "9223372036854775808",
    "99999999999999999999999999",
    "1s",
];

#[test]
fn the_number_of_arguments() {
    let server = Server::start();
    let mut client = server.client();
    for command in [
        "LIMITER.ACQUIRE",
        "LIMITER.ACQUIRE p k 1",
        "LIMITER.RELEASE p",
        "LIMITER.RENEW p k",
        "LIMITER.RENEW p k 1 2",
        "LIMITER.COUNT",
        "LIMITER.COUNT p q",
        "LIMITER.HOLDERS",
        "LIMITER.HELP me",
    ] {
        let name = command.split(' ').next().unwrap().to_lowercase();
        let expected = format!("ERR wrong number of arguments for '{name}' command");
        assert_eq!(client.error(command), expected);
    }
}

#[test]
fn the_limit() {
    let server = Server::start();
    let mut client = server.client();
    for limit in [
        "-1",
        "+1",
        "1.0",
        "1e3",
        "0x10",
        "ten",
        "inf",
        "nan",
        "9223372036854775808",
        "18446744073709551617",
        "٣",
    ] {
        assert_eq!(
            client.error(&format!("LIMITER.ACQUIRE p k {limit} 45")),
            "ERR limit is not an integer or out of range",
            "{limit}"
        );
    }
    for limit in ["", " 1", "1 ", "1\0"] {
        let reply = client.run(&["LIMITER.ACQUIRE", "p", "k", limit, "45"]);
        assert_eq!(error_text(&reply), "ERR limit is not an integer or out of range", "{limit:?}");
    }
    assert_eq!(client.int("EXISTS p"), 0);
}

#[test]
fn the_ttl() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p held 9 45");
    let before = client.members("p");
    for ttl in NOT_SECONDS.iter().chain(&["0", "0.0", ".000", "", " 1", "1 "]) {
        for (command, name) in [
            (["LIMITER.ACQUIRE", "p", "k", "9", ttl].as_slice(), "limiter.acquire"),
            (["LIMITER.RENEW", "p", "held", ttl].as_slice(), "limiter.renew"),
        ] {
            let expected = format!("ERR invalid expire time in '{name}' command");
            assert_eq!(error_text(&client.run(command)), expected, "{ttl:?}");
        }
    }
    assert_eq!(client.members("p"), before);
}

#[test]
fn the_largest_ttl_ends_2_to_the_53_milliseconds_after_1970() {
    let server = Server::start();
    let mut client = server.client();
    let largest_ms = (1_i64 << 53) - client.now_ms();
    // A second's margin for the clock that runs on; the exact edge is a unit test's.
    let (fits, beyond) = (largest_ms / 1000 - 1, largest_ms / 1000 + 1);
    assert_eq!(client.int(&format!("LIMITER.ACQUIRE p k 1 {fits}")), 1);
    assert_eq!(
        client.error(&format!("LIMITER.ACQUIRE p k 1 {beyond}")),
        "ERR invalid expire time in 'limiter.acquire' command"
    );
}

#[test]
fn options_that_are_unknown_repeated_or_unfit() {
    let server = Server::start();
    let mut client = server.client();
    for command in [
        "LIMITER.ACQUIRE p k 1 45 XX",
        "LIMITER.ACQUIRE p k 1 45 NX NX",
        "LIMITER.ACQUIRE p k 1 45 WITHSTATE NX WITHSTATE",
        "LIMITER.ACQUIRE p k 1 45 NX 1",
        "LIMITER.HOLDERS p COUNT",
        "LIMITER.HOLDERS p LIMIT 1",
        "LIMITER.HOLDERS p COUNT 1 COUNT 1",
        "LIMITER.HOLDERS p COUNT 1 2",
    ] {
        assert_eq!(client.error(command), "ERR syntax error", "{command}");
    }
    for count in ["-1", "x", "1.5", "9223372036854775808"] {
        assert_eq!(
            client.error(&format!("LIMITER.HOLDERS p COUNT {count}")),
            "ERR value is not an integer or out of range"
        );
    }
    assert_eq!(client.int("EXISTS p"), 0);
}

#[test]
fn keys_of_other_types() {
    let server = Server::start();
    let mut client = server.client();
    for make in ["SET p v", "RPUSH p v", "SADD p v", "HSET p f v", "XADD p * f v", "PFADD p v"] {
        client.call("DEL p");
        client.call(make);
        for command in [
            "LIMITER.ACQUIRE p k 1 45",
            "LIMITER.ACQUIRE p k 1 45 NX WITHSTATE",
            "LIMITER.RELEASE p k",
            "LIMITER.RENEW p k 45",
            "LIMITER.COUNT p",
            "LIMITER.HOLDERS p",
        ] {
            assert_eq!(
                client.error(command),
                "WRONGTYPE Operation against a key holding the wrong kind of value",
                "{command} after {make}"
            );
        }
        assert_eq!(client.int("PTTL p"), -1);
    }
}

#[test]
fn bad_arguments_are_told_before_the_type_of_the_key() {
    let server = Server::start();
    let mut client = server.client();
    client.call("SET p v");
    assert!(client.error("LIMITER.ACQUIRE p k x 45").starts_with("ERR limit"));
    assert!(client.error("LIMITER.ACQUIRE p k 1 x").starts_with("ERR invalid expire"));
    assert!(client.error("LIMITER.ACQUIRE p k 1 1 x").starts_with("ERR syntax"));
    assert!(client.error("LIMITER.HOLDERS p COUNT x").starts_with("ERR value"));
}

#[test]
fn out_of_memory_denies_acquire_and_lets_release_and_renew_go_on() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 9 45");
    client.int("LIMITER.ACQUIRE p b 9 45");
    client.call("CONFIG SET maxmemory 1");
    assert!(client.error("LIMITER.ACQUIRE p c 9 45").starts_with("OOM command not allowed"));
    assert!(client.error("LIMITER.ACQUIRE p a 9 45").starts_with("OOM command not allowed"));
    assert_eq!(client.int("LIMITER.RENEW p a 60"), 1);
    assert_eq!(client.int("LIMITER.RELEASE p b"), 1);
    assert_eq!(client.int("LIMITER.COUNT p"), 1);
    assert_eq!(client.strings("LIMITER.HOLDERS p")[0], "a");
}

#[test]
fn malformed_commands_in_a_pipeline_are_each_answered() {
    let server = Server::start();
    let mut client = server.client();
    let hostile: [&[u8]; 9] =
        [b"", b"\0", b"\xff", b"-1", b"0", b"1", b"NX", b"9223372036854775808", &[b'9'; 5000]];
    let mut sent = 0;
    for command in ["ACQUIRE", "RELEASE", "RENEW", "COUNT", "HOLDERS", "HELP"] {
        let name = format!("LIMITER.{command}");
        for first in hostile {
            for second in hostile {
                for third in hostile {
                    client.send(&[name.as_bytes(), b"p", first, second, third]);
                    client.send(&[name.as_bytes(), first, second, third, b"1", first]);
                    client.send(&[name.as_bytes(), first, second]);
                    sent += 3;
                }
            }
            while sent > 0 {
                client.receive();
                sent -= 1;
            }
        }
    }
    assert_eq!(client.call("ECHO alive"), Value::BulkString(b"alive".to_vec()));
}

#[test]
fn a_pause_inside_a_transaction_over_an_expired_key_stops_nothing() {
    let server = Server::start_with(&harness::AOF);
    let mut client = server.client();
    // The expired key must still be there, hidden: no active expiry.
    client.call("DEBUG SET-ACTIVE-EXPIRE 0");
    client.call("ZADD p 1 a");
    let expiry_ms = client.now_ms() + 30;
    client.int(&format!("PEXPIREAT p {expiry_ms}"));
    client.wait_for_clock(expiry_ms + 1);
    client.call("MULTI");
    client.call("CLIENT PAUSE 100 WRITE");
    client.call("LIMITER.ACQUIRE p b 1 45");
    client.call("LIMITER.RENEW p b 45");
    let Value::Array(replies) = client.call("EXEC") else { panic!("no replies") };
    assert!(error_text(&replies[1]).starts_with("TRYAGAIN"), "{replies:?}");
    assert_eq!(client.int("LIMITER.ACQUIRE p b 1 45"), 1, "after the pause");
}
