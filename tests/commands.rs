//! Every command: what it does, what it replies, in RESP2 and RESP3, in MULTI and in scripts.

mod harness;

use harness::{error_text, ints, short, string, strings, wait_until, Server};
use redis::Value;

#[test]
fn a_holder_takes_a_slot_and_gives_it_back() {
    let server = Server::start();
    let mut client = server.client();

    for holder in 1..=10 {
        assert_eq!(client.int(&format!("LIMITER.ACQUIRE my-operation op-{holder} 10 45")), 1);
    }
    assert_eq!(client.int("LIMITER.ACQUIRE my-operation op-11 10 45"), 0);
    assert_eq!(client.int("ZCARD my-operation"), 10, "denied means nothing was added");

    assert_eq!(client.int("LIMITER.RELEASE my-operation op-3"), 1);
    assert_eq!(client.int("LIMITER.ACQUIRE my-operation op-11 10 45"), 1);
    assert_eq!(client.int("LIMITER.ACQUIRE my-operation op-3 10 45"), 0);
}

#[test]
fn the_score_is_the_time_the_lease_lapses_rounded_up_to_the_millisecond() {
    let server = Server::start();
    let mut client = server.client();
    for (ttl, ttl_ms) in [("45", 45_000), ("0.25", 250), (".5", 500), ("1.0001", 1_001)] {
        let mut before_ms = 0;
        wait_until("the clock shows the same before and after", || {
            before_ms = client.now_ms();
            assert_eq!(client.int(&format!("LIMITER.ACQUIRE p k 1 {ttl}")), 1);
            client.now_ms() == before_ms
        });
        let (_, score) = client.members("p")[0].clone();
        let lapse_ms = (score * 1000.0).round() as i64;
        assert_eq!(lapse_ms as f64 / 1000.0, score, "whole milliseconds");
        assert_eq!(lapse_ms, before_ms + ttl_ms, "{ttl}");
    }
}

#[test]
fn a_lapsed_lease_frees_its_slot() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.int(&format!("LIMITER.ACQUIRE p short 1 {}", short(0.05))), 1);
    assert_eq!(client.int("LIMITER.ACQUIRE p next 1 45"), 0);
    wait_until("the slot is free", || client.int("LIMITER.ACQUIRE p next 1 45") == 1);
    let holders = client.strings("LIMITER.HOLDERS p");
    assert_eq!(holders[0], "next");
    assert_eq!(client.int("ZCARD p"), 1, "the lapsed lease was pruned");
}

#[test]
fn a_live_holder_refreshes_its_lease_even_over_the_limit() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE p a 2 45");
    client.int("LIMITER.ACQUIRE p b 2 45");
    let before = client.members("p");

    assert_eq!(client.int("LIMITER.ACQUIRE p a 2 100"), 1, "at the limit");
    assert_eq!(client.int("LIMITER.ACQUIRE p a 1 100"), 1, "over the limit");
    assert_eq!(client.int("LIMITER.ACQUIRE p a 0 100"), 1, "limit 0");

    let after = client.members("p");
    assert_eq!(after.len(), 2, "it never takes a second slot");
    assert!(after[1].0 == "a" && after[1].1 > before[0].1 + 50.0, "{after:?}");
}

#[test]
fn nx_denies_a_live_holder_and_leaves_its_lease_alone() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.int("LIMITER.ACQUIRE p a 2 45 NX"), 1);
    let before = client.members("p");
    assert_eq!(client.int("LIMITER.ACQUIRE p a 2 100 nx"), 0, "with a slot free");
    assert_eq!(client.int("LIMITER.ACQUIRE p a 1 100 Nx"), 0, "with none free");
    assert_eq!(client.members("p"), before);

    client.int("LIMITER.ACQUIRE q a 1 0.02 NX");
    wait_until("it lapsed", || client.int("LIMITER.ACQUIRE q a 1 45 NX") == 1);
}

#[test]
fn a_limit_below_the_holders_denies_newcomers_and_evicts_nobody() {
    let server = Server::start();
    let mut client = server.client();
    for holder in 0..5 {
        client.int(&format!("LIMITER.ACQUIRE p h{holder} 5 45"));
    }
    assert_eq!(client.int("LIMITER.ACQUIRE p new 2 45"), 0);
    assert_eq!(client.int("LIMITER.ACQUIRE p new 0 45"), 0);
    assert_eq!(client.int("LIMITER.COUNT p"), 5);
    assert_eq!(client.int("LIMITER.RELEASE p h0 h1 h2"), 3);
    assert_eq!(client.int("LIMITER.ACQUIRE p new 2 45"), 0, "two are still in");
    assert_eq!(client.int("LIMITER.RELEASE p h3"), 1);
    assert_eq!(client.int("LIMITER.ACQUIRE p new 2 45"), 1);
}

#[test]
fn limit_0_denies_every_newcomer_and_the_largest_limit_none() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.int("LIMITER.ACQUIRE p a 0 45"), 0);
    assert_eq!(client.int("EXISTS p"), 0);
    assert_eq!(client.int("LIMITER.ACQUIRE p a 9223372036854775807 45"), 1);
    assert_eq!(client.int("LIMITER.ACQUIRE p b 9223372036854775807 45"), 1);
}

#[test]
fn withstate_tells_outcome_holders_and_the_time_until_a_slot_is_free() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.call("LIMITER.ACQUIRE p a 2 10 WITHSTATE"), ints(&[1, 1, 0, 0]));
    assert_eq!(client.call("LIMITER.ACQUIRE p b 2 20 WITHSTATE"), ints(&[1, 2, 0, 0]));
    assert_eq!(client.call("LIMITER.ACQUIRE p a 2 10 WITHSTATE"), ints(&[2, 2, 0, 0]));
    assert_eq!(client.call("LIMITER.ACQUIRE p a 3 10 NX WITHSTATE"), ints(&[0, 2, 0, 0]));
    assert_eq!(client.call("LIMITER.ACQUIRE p c 0 10 WITHSTATE"), ints(&[0, 2, -1, 0]));

    // One lease must lapse at limit 2, both at limit 1.
    for (limit, rank) in [(2, 0), (1, 1)] {
        let lapse_ms = (client.members("p")[rank].1 * 1000.0).round() as i64;
        let before_ms = client.now_ms();
        let state = client.strings(&format!("LIMITER.ACQUIRE p c {limit} 10 WITHSTATE NX"));
        let after_ms = client.now_ms();
        assert_eq!((state[0].as_str(), state[1].as_str()), ("0", "2"));
        let wait_ms: i64 = state[2].parse().unwrap();
        assert!((lapse_ms - after_ms..=lapse_ms - before_ms).contains(&wait_ms), "{wait_ms}");
    }

    client.int("ZADD p +inf forever");
    let state = client.strings("LIMITER.ACQUIRE p c 1 10 WITHSTATE");
    assert_eq!(state[2], "-1", "the last of three never lapses");
    let state = client.strings("LIMITER.ACQUIRE p c 3 10 WITHSTATE");
    assert_ne!(state[2], "-1");
}

#[test]
fn the_hint_is_the_first_millisecond_at_which_a_slot_is_free() {
    let server = Server::start();
    let mut client = server.client();
    for ttl in [0.1, 0.15, 0.2].map(short) {
        client.int(&format!("LIMITER.ACQUIRE p {ttl} 3 {ttl}"));
    }
    let second_to_lapse_ms = (client.members("p")[1].1 * 1000.0).round() as i64;
    loop {
        let before_ms = client.now_ms();
        let state = client.strings("LIMITER.ACQUIRE p new 2 45 WITHSTATE");
        let after_ms = client.now_ms();
        if state[0] == "1" {
            assert!(after_ms >= second_to_lapse_ms, "let in before two had lapsed");
            break;
        }
        assert!(before_ms < second_to_lapse_ms, "denied though two had lapsed");
        let wait_ms: i64 = state[2].parse().unwrap();
        assert!(before_ms + wait_ms <= second_to_lapse_ms);
        assert!(after_ms + wait_ms >= second_to_lapse_ms);
    }
}

#[test]
fn release_counts_the_live_leases_and_removes_the_lapsed() {
    let server = Server::start();
    let mut client = server.client();
    for holder in ["a", "b", "c"] {
        client.int(&format!("LIMITER.ACQUIRE p {holder} 10 45"));
    }
    client.int("ZADD p 1 lapsed 2 lapsed-too");
    assert_eq!(client.int("LIMITER.RELEASE p a lapsed nobody a b"), 2);
    assert_eq!(client.strings("ZRANGE p 0 -1"), ["c"]);
    assert_eq!(client.int("LIMITER.RELEASE p c"), 1);
    assert_eq!(client.int("EXISTS p"), 0, "nothing is left behind");
    assert_eq!(client.int("LIMITER.RELEASE p c"), 0);
    client.int("ZADD only-lapsed 1 a");
    assert_eq!(client.int("LIMITER.RELEASE only-lapsed a"), 0, "its holder had lost it");
    assert_eq!(client.int("EXISTS only-lapsed"), 0);
}

#[test]
fn renew_moves_a_live_lease_and_revives_none() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.int("LIMITER.RENEW p a 45"), 0);
    assert_eq!(client.int("EXISTS p"), 0, "none is made");

    client.int("LIMITER.ACQUIRE p a 1 10");
    let first = client.members("p")[0].1;
    assert_eq!(client.int("LIMITER.RENEW p a 100"), 1);
    let longer = client.members("p")[0].1;
    assert_eq!(client.int("LIMITER.RENEW p a 1"), 1);
    let shorter = client.members("p")[0].1;
    assert!(shorter < first && first < longer, "{shorter} {first} {longer}");

    client.int("ZADD q 1 lapsed");
    assert_eq!(client.int("LIMITER.RENEW q lapsed 45"), 0);
    assert_eq!(client.int("LIMITER.COUNT q"), 0);
}

#[test]
fn members_of_other_programs_count_like_any_lease() {
    let server = Server::start();
    let mut client = server.client();
    let later = client.now_ms() as f64 / 1000.0 + 1000.0;
    client.call(&format!("ZADD p {later} theirs +inf forever -inf lapsed 1e300 far"));
    assert_eq!(client.int("LIMITER.COUNT p"), 3);
    assert_eq!(client.int("LIMITER.ACQUIRE p mine 3 45"), 0);
    assert_eq!(client.strings("ZRANGE p 0 -1"), ["theirs", "far", "forever"]);
    assert_eq!(client.int("LIMITER.ACQUIRE p mine 4 45"), 1);
    assert_eq!(client.int("LIMITER.RENEW p forever 45"), 1);
    assert_eq!(client.int("LIMITER.RELEASE p theirs forever far"), 3);
    assert_eq!(client.strings("ZRANGE p 0 -1"), ["mine"]);
}

#[test]
fn keys_are_any_bytes_of_any_length() {
    let server = Server::start();
    let mut client = server.client();
    let megabyte = vec![b'x'; 1 << 20];
    let names: [&[u8]; 5] = [b"", b"\0", b"\xff\xfe\r\n", b"a b", &megabyte];
    for prefix in names {
        for key in names {
            let acquire: [&[u8]; 5] = [b"LIMITER.ACQUIRE", prefix, key, b"5", b"45"];
            assert_eq!(client.run(&acquire), Value::Int(1));
            assert_eq!(client.run(&acquire), Value::Int(1), "refreshed");
        }
        assert_eq!(client.run(&[b"LIMITER.COUNT", prefix]), Value::Int(5));
        assert_eq!(client.run(&[b"LIMITER.ACQUIRE", prefix, b"sixth", b"5", b"45"]), Value::Int(0));
        let release = [&[b"LIMITER.RELEASE", prefix][..], &names[..]].concat();
        assert_eq!(client.run(&release), Value::Int(5));
        assert_eq!(client.run(&[b"EXISTS", prefix]), Value::Int(0));
    }
}

#[test]
fn count_and_holders_see_the_live_and_prune_nothing() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.int("LIMITER.COUNT nothing"), 0);
    assert!(client.strings("LIMITER.HOLDERS nothing").is_empty());

    let before_ms = client.now_ms();
    client.int("ZADD p 1 lapsed -inf long-lapsed +inf forever");
    assert_eq!(client.int("LIMITER.COUNT p"), 1);
    let (soon_ms, late_ms) = (before_ms + 60_000, before_ms + 90_000);
    client.call(&format!("ZADD p {} late {} soon", late_ms as f64 / 1e3, soon_ms as f64 / 1e3));
    assert_eq!(client.int("LIMITER.COUNT p"), 3);

    let holders = client.strings("LIMITER.HOLDERS p");
    let after_ms = client.now_ms();
    assert_eq!([&holders[0], &holders[2], &holders[4]], ["soon", "late", "forever"]);
    assert_eq!(holders[5], "-1", "never lapses");
    for (left_ms, end_ms) in [(&holders[1], soon_ms), (&holders[3], late_ms)] {
        let left_ms: i64 = left_ms.parse().unwrap();
        assert!((end_ms - after_ms..=end_ms - before_ms).contains(&left_ms), "{left_ms}");
    }
    assert_eq!(client.strings("LIMITER.HOLDERS p COUNT 1")[0], "soon");
    assert_eq!(client.strings("LIMITER.HOLDERS p COUNT 1").len(), 2);
    assert_eq!(client.strings("LIMITER.HOLDERS p count 100").len(), 6);
    assert!(client.strings("LIMITER.HOLDERS p COUNT 0").is_empty());
    assert_eq!(client.int("ZCARD p"), 5, "not even lapsed members are gone");
}

#[test]
fn holders_of_many_leases_come_in_order() {
    let server = Server::start();
    let mut client = server.client();
    for holder in 0..300 {
        client.int(&format!("LIMITER.ACQUIRE p {holder} 300 {}", 1000 - holder));
    }
    let holders = client.strings("LIMITER.HOLDERS p");
    let names: Vec<&String> = holders.iter().step_by(2).collect();
    assert_eq!(
        names,
        (0..300).rev().map(|n| n.to_string()).collect::<Vec<_>>().iter().collect::<Vec<_>>()
    );
}

#[test]
fn resp3_has_a_map_for_holders_and_integers_for_the_rest() {
    let server = Server::start();
    let mut client = server.client();
    client.call("HELLO 3");
    assert_eq!(client.call("LIMITER.ACQUIRE p forever 1 45"), Value::Int(1));
    client.call("ZADD p +inf forever");
    let key = Value::BulkString(b"forever".to_vec());
    assert_eq!(client.call("LIMITER.HOLDERS p"), Value::Map(vec![(key, Value::Int(-1))]));
    assert_eq!(client.call("LIMITER.HOLDERS none"), Value::Map(vec![]));
    assert_eq!(client.call("LIMITER.ACQUIRE p x 1 45 WITHSTATE"), ints(&[0, 1, -1, 0]));
    assert_eq!(client.call("LIMITER.COUNT p"), Value::Int(1));
    assert_eq!(client.call("LIMITER.RELEASE p forever"), Value::Int(1));
    assert!(error_text(&client.call("LIMITER.ACQUIRE p x 1 0")).starts_with("ERR invalid expire"));
}

#[test]
fn help_names_every_command() {
    let server = Server::start();
    let mut client = server.client();
    let help = client.strings("LIMITER.HELP").join("\n");
    for command in ["ACQUIRE", "BACQUIRE", "RELEASE", "RENEW", "COUNT", "HOLDERS", "HELP"] {
        assert!(help.contains(&format!("\n{command}")), "{command} in {help}");
    }
}

#[test]
fn in_multi_the_commands_act_together() {
    let server = Server::start();
    let mut client = server.client();
    client.call("MULTI");
    for command in [
        "LIMITER.ACQUIRE p a 1 45",
        "LIMITER.ACQUIRE p b 1 45",
        "LIMITER.RENEW p a 60",
        "LIMITER.COUNT p",
        "LIMITER.RELEASE p a",
        "LIMITER.ACQUIRE p b 1 45",
        "LIMITER.HOLDERS p COUNT 1",
    ] {
        assert_eq!(string(&client.call(command)), "QUEUED");
    }
    let Value::Array(replies) = client.call("EXEC") else { panic!("no replies") };
    let integers: Vec<String> = replies[..6].iter().map(string).collect();
    assert_eq!(integers, ["1", "0", "1", "1", "1", "1"]);
    assert_eq!(strings(&replies[6])[0], "b");
}

#[test]
fn scripts_and_functions_call_the_commands() {
    let server = Server::start();
    let mut client = server.client();
    let script = "local first = redis.call('LIMITER.ACQUIRE', KEYS[1], 'a', 1, '45') \
                  local second = redis.call('LIMITER.ACQUIRE', KEYS[1], 'b', 1, '45', 'WITHSTATE') \
                  local held = redis.call('LIMITER.COUNT', KEYS[1]) \
                  local gone = redis.call('LIMITER.RELEASE', KEYS[1], 'a') \
                  return {first, second[1], second[2], held, gone}";
    assert_eq!(client.run(&["EVAL", script, "1", "p"]), ints(&[1, 0, 1, 1, 1]));
    assert_eq!(client.int("EXISTS p"), 0);

    let library = "#!lua name=lib\n\
                   redis.register_function('acquire', function(keys, args) \
                     return redis.call('LIMITER.ACQUIRE', keys[1], args[1], 1, 45) end)";
    client.run(&["FUNCTION", "LOAD", library]);
    assert_eq!(client.int("FCALL acquire 1 p a"), 1);
    assert_eq!(client.int("FCALL acquire 1 p b"), 0);

    let read_only = "return redis.call('LIMITER.ACQUIRE', KEYS[1], 'b', 9, 45)";
    assert!(error_text(&client.run(&["EVAL_RO", read_only, "1", "p"])).contains("read-only"));
    let count = "return redis.call('LIMITER.COUNT', KEYS[1])";
    assert_eq!(client.run(&["EVAL_RO", count, "1", "p"]), Value::Int(1));
}

#[test]
fn limiters_of_the_same_name_in_two_databases_are_two() {
    let server = Server::start();
    let mut client = server.client();
    assert_eq!(client.int("LIMITER.ACQUIRE p a 1 45"), 1);
    client.call("SELECT 1");
    assert_eq!(client.int("LIMITER.COUNT p"), 0);
    assert_eq!(client.int("LIMITER.ACQUIRE p a 1 45"), 1);
}
