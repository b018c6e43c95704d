//! What somebody can and cannot do whose access rules allow the module's commands on some prefixes
//! and nothing else. SECURITY.md says it line by line, and names the test of each line.
//!
//! Eve is that somebody, and what starts with `tenant:` is hers.

mod harness;

use harness::{error_text, packed, text, wait_until, Client, Server};
use redis::Value;

const ONE: Value = Value::Int(1);

/// Eve's rules, as SECURITY.md recommends them.
const RULES: &str = "~tenant:* +@connection -@dangerous \
    +limiter.acquire +limiter.bacquire +limiter.macquire +limiter.release +limiter.renew \
    +limiter.count +limiter.holders +limiter.info +limiter.help";

/// Every command with a key, in a form that its rules alone may refuse.
const COMMANDS: [&str; 8] = [
    "LIMITER.ACQUIRE {p} k 9 45",
    "LIMITER.BACQUIRE {p} k 9 45 1",
    "LIMITER.MACQUIRE 1 {p} k 45 9",
    "LIMITER.RELEASE {p} k",
    "LIMITER.RENEW {p} k 45",
    "LIMITER.COUNT {p}",
    "LIMITER.HOLDERS {p}",
    "LIMITER.INFO {p}",
];

/// A connection of Eve's, with some rules more than hers.
fn eve_with(server: &Server, more: &str) -> Client {
    server.client().call(&format!("ACL SETUSER eve reset on >secret {RULES} {more}"));
    let mut eve = server.client();
    assert_eq!(eve.call("AUTH eve secret"), Value::Okay);
    eve
}

fn eve(server: &Server) -> Client {
    eve_with(server, "")
}

fn used_memory(client: &mut Client) -> i64 {
    client.info("memory", "used_memory").parse().expect("a number")
}

fn waiting(client: &mut Client) -> usize {
    client.info("limiter", "limiter_waiting").parse().expect("a number")
}

#[test]
fn no_command_reaches_a_key_outside_her_patterns() {
    let server = Server::start();
    let mut admin = server.client();
    admin.int("ZADD other +inf k");
    admin.int("LIMITER.ACQUIRE tenant k 9 4500");
    admin.call("SET text k");
    let before = server.contents();
    let mut eve = eve_with(&server, "+@transaction +eval");
    for key in ["other", "tenant", "text", "TENANT:p", "tenant", "xtenant:p"] {
        for command in COMMANDS.map(|command| command.replace("{p}", key)) {
            assert!(eve.error(&command).starts_with("NOPERM"), "{command}");
            eve.call("MULTI");
            assert!(eve.error(&command).starts_with("NOPERM"), "{command}");
            assert!(eve.error("EXEC").starts_with("EXECABORT"), "{command}");
            let words: Vec<String> =
                command.split_whitespace().map(|word| format!("'{word}'")).collect();
            let script = format!("return redis.call({})", words.join(","));
            let reply = eve.run(&["EVAL", &script, "0"]);
            assert!(matches!(reply, Value::ServerError(_)), "{script}: {reply:?}");
            let reply = eve.run(&["EVAL", &script, "1", "tenant:p"]);
            assert!(matches!(reply, Value::ServerError(_)), "{script}: {reply:?}");
        }
    }
    assert_eq!(server.contents(), before);
}

#[test]
fn no_number_of_keys_hides_one_from_the_rules() {
    let server = Server::start();
    let mut admin = server.client();
    admin.int("ZADD other +inf k");
    let before = server.contents();
    let mut eve = eve(&server);
    for prefixes in ["tenant:a other", "other tenant:a", "other other", "tenant:a text other"] {
        let number = prefixes.split(' ').count();
        let command = format!("LIMITER.MACQUIRE {number} {prefixes} k 45{}", " 9".repeat(number));
        assert!(eve.error(&command).starts_with("NOPERM"), "{command}");
    }
    // If the rules read fewer keys out of one of these than the command does, a slot is taken.
    for number in [
        "0",
        "-1",
        "+2",
        "002",
        " 2",
        "2 ",
        "2\0",
        "0x2",
        "2.0",
        "2e0",
        "",
        "x",
        "\u{0662}",
        "4294967298",
        "9223372036854775808",
        "18446744073709551618",
    ] {
        let command = ["LIMITER.MACQUIRE", number, "tenant:a", "other", "k", "45", "9", "9"];
        let reply = eve.run(&command);
        assert!(matches!(reply, Value::ServerError(_)), "{number:?}: {reply:?}");
    }
    assert_eq!(server.contents(), before);
    assert_eq!(eve.int("LIMITER.MACQUIRE 1 tenant:a other 45 9"), 1, "here `other` is no key");
}

#[test]
fn her_prefixes_are_hers_in_every_database() {
    let server = Server::start();
    let mut eve = eve(&server);
    assert_eq!(eve.call("SELECT 1"), Value::Okay);
    assert_eq!(eve.int("LIMITER.ACQUIRE tenant:p k 1 45"), 1);
    assert!(eve.error("LIMITER.ACQUIRE other k 1 45").starts_with("NOPERM"));
}

#[test]
fn what_her_rules_do_not_name_is_refused() {
    let server = Server::start();
    let mut eve = eve(&server);
    for command in [
        "ZADD tenant:p 1 k",
        "ZRANGE tenant:p 0 -1",
        "DEL tenant:p",
        "KEYS *",
        "MULTI",
        "EVAL return 0",
        "CLIENT KILL ID 1",
        "CLIENT PAUSE 1000",
        "CLIENT UNBLOCK 1",
        "CLIENT LIST",
        "INFO limiter",
        "MODULE UNLOAD limiter",
        "CONFIG SET maxmemory 1",
        "ACL LIST",
        "MONITOR",
        "SLOWLOG GET",
        "FLUSHALL",
        "SWAPDB 0 1",
        "DEBUG SEGFAULT",
        "SHUTDOWN NOSAVE",
    ] {
        assert!(eve.error(command).starts_with("NOPERM"), "{command}");
    }
}

#[test]
fn the_largest_numbers_hold_for_ever_and_an_administrator_ends_it() {
    let server = Server::start();
    let mut eve = eve(&server);
    let forever = "9223372036854775807 9000000000000"; // Some 285,000 years.
    for key in 0..1_000 {
        assert_eq!(eve.int(&format!("LIMITER.ACQUIRE tenant:p {key} {forever}")), 1);
    }
    let mut admin = server.client();
    assert_eq!(admin.int("LIMITER.ACQUIRE tenant:p other 1000 45"), 0, "she has them all");
    let waiter = server.waiter("LIMITER.BACQUIRE tenant:p waits 1000 45 9000000000000000");
    assert_eq!(admin.int("LIMITER.ACQUIRE other k 1 45"), 1, "it is her limiter alone");
    drop(waiter);
    wait_until("nobody waits", || waiting(&mut admin) == 0);
    assert_eq!(admin.int("DEL tenant:p"), 1);
    assert_eq!(admin.int("LIMITER.ACQUIRE tenant:p other 1 45"), 1);
}

#[test]
fn a_head_with_limit_0_holds_up_its_line_and_no_other() {
    let server = Server::start();
    let mut admin = server.client();
    let mut eve = eve(&server);
    eve.send(&["LIMITER.BACQUIRE", "tenant:p", "k", "0", "45", "0"]);
    wait_until("she waits", || waiting(&mut admin) == 1);
    let mut behind = server.waiter("LIMITER.BACQUIRE tenant:p behind 9 45 0");
    assert_eq!(admin.int("LIMITER.ACQUIRE tenant:p newcomer 9 45"), 0);
    assert_eq!(admin.int("LIMITER.ACQUIRE tenant:q newcomer 9 45"), 1);
    assert_eq!(admin.int("LIMITER.ACQUIRE other newcomer 9 45"), 1);
    assert!(!behind.has_reply());
    assert_eq!(admin.int("CLIENT KILL USER eve"), 1);
    assert_eq!(behind.receive(), ONE);
}

#[test]
fn a_wait_without_a_time_out_lasts_until_somebody_ends_it() {
    let server = Server::start();
    let mut admin = server.client();
    let (mut eve, _idle) = (eve(&server), server.client());
    eve.send(&["LIMITER.BACQUIRE", "tenant:p", "k", "0", "45", "0"]);
    wait_until("she waits", || waiting(&mut admin) == 1);
    admin.call("CONFIG SET timeout 1"); // Of idle connections: a wait is not idle.
    wait_until("the idle one is closed", || {
        admin.info("clients", "connected_clients") == "2" // This one, and hers.
    });
    assert_eq!(waiting(&mut admin), 1);
    // Nor is one that may not wait any more. What ends it is the end of the connection.
    admin.call("ACL SETUSER eve -limiter.bacquire");
    assert_eq!(waiting(&mut admin), 1);
    assert_eq!(admin.int("ACL DELUSER eve"), 1);
    wait_until("her wait has ended", || waiting(&mut admin) == 0);
    assert!(eve.try_receive().is_err());
}

#[test]
fn her_waiters_are_as_many_as_maxclients_lets_in() {
    let server = Server::start_with(&["--maxclients", "100"]);
    let mut admin = server.client();
    let _first = eve(&server);
    let mut waiters = Vec::new();
    loop {
        let mut eve = server.client();
        // A connection that is refused gets an error, or is closed before it can ask.
        if !matches!(eve.try_run(&["AUTH", "eve", "secret"]), Ok(Value::Okay)) {
            break;
        }
        eve.send(&["LIMITER.BACQUIRE", "tenant:p", "k", "0", "45", "0"]);
        waiters.push(eve);
    }
    assert!((90..100).contains(&waiters.len()), "{} were let in", waiters.len());
    wait_until("all wait", || waiting(&mut admin) == waiters.len());
    assert_eq!(admin.int("LIMITER.ACQUIRE other k 1 45"), 1, "who is in is served");
    admin.call("CLIENT KILL USER eve");
    wait_until("nobody waits", || waiting(&mut admin) == 0);
    assert_eq!(server.client().call("PING"), text("PONG"));
}

#[test]
fn a_waiter_that_sends_on_is_cut_off_at_the_query_buffers_limit() {
    let server = Server::start();
    let mut admin = server.client();
    admin.call("CONFIG SET client-query-buffer-limit 1mb");
    let mut eve = eve(&server);
    eve.send(&["LIMITER.BACQUIRE", "tenant:p", "k", "0", "45", "0"]);
    wait_until("she waits", || waiting(&mut admin) == 1);
    let before = used_memory(&mut admin);
    let flood = vec![b'x'; 4 << 20];
    let _ = eve.try_send(&[b"PING", flood.as_slice()]); // It breaks off, or did so at once.
    wait_until("she is cut off", || waiting(&mut admin) == 0);
    wait_until("the memory is back", || used_memory(&mut admin) < before + (1 << 20));
}

#[test]
fn memory_ends_at_maxmemory_and_comes_back() {
    let server = Server::start();
    let mut admin = server.client();
    let mut eve = eve(&server);
    let before = used_memory(&mut admin);
    let maxmemory = before + (20 << 20);
    admin.call(&format!("CONFIG SET maxmemory {maxmemory}"));
    let mut key = vec![b'k'; 64 << 10];
    let mut acquire = |eve: &mut Client, number: u32| {
        key[..4].copy_from_slice(&number.to_be_bytes());
        let ephemeral: &[&[u8]] = if number % 2 == 0 { &[b"EPHEMERAL"] } else { &[] };
        let command: [&[u8]; 5] = [b"LIMITER.ACQUIRE", b"tenant:p", &key, b"99999", b"450"];
        eve.run(&[&command, ephemeral].concat())
    };
    let held = (0..10_000).take_while(|number| acquire(&mut eve, *number) == ONE).count();
    assert!((50..320).contains(&held), "{held} leases of 64 KiB in 20 MiB");
    // What buffers give back at any moment is no room for a lease.
    admin.call(&format!("CONFIG SET maxmemory {}", maxmemory - (4 << 20)));
    let refused = acquire(&mut eve, 10_001);
    assert!(error_text(&refused).starts_with("OOM"), "{refused:?}");
    assert!(eve.error("LIMITER.BACQUIRE tenant:q k 1 45 0").starts_with("OOM"));
    assert!(eve.error("LIMITER.MACQUIRE 1 tenant:q k 45 1").starts_with("OOM"));
    assert!(used_memory(&mut admin) < maxmemory + (2 << 20), "counted with all that is kept");
    assert_eq!(admin.int("LIMITER.RELEASE other k"), 0, "what gives back goes on");

    eve.close();
    wait_until("what was ephemeral has ended", || {
        admin.int("LIMITER.COUNT tenant:p") == (held / 2) as i64
    });
    assert_eq!(admin.int("DEL tenant:p"), 1);
    wait_until("the memory is back", || used_memory(&mut admin) < before + (2 << 20));
}

#[test]
fn whoever_may_write_a_prefix_may_end_every_lease_of_it() {
    let server = Server::start();
    let mut admin = server.client();
    for end in [
        "LIMITER.RELEASE tenant:p k",
        "LIMITER.RENEW tenant:p k 0.001",
        "LIMITER.ACQUIRE tenant:p k 0 0.001",
        "LIMITER.ACQUIRE tenant:p k 0 450 EPHEMERAL",
    ] {
        assert_eq!(admin.int("LIMITER.ACQUIRE tenant:p k 1 450"), 1);
        let mut eve = eve(&server);
        assert_eq!(eve.int(end), 1);
        eve.close();
        wait_until(&format!("{end} ended it"), || admin.int("LIMITER.COUNT tenant:p") == 0);
    }
}

#[test]
fn what_is_told_of_the_server_names_no_limiter_and_no_holder() {
    let server = Server::start();
    let mut admin = server.client();
    assert_eq!(admin.int("LIMITER.ACQUIRE hidden-limiter hidden-holder 1 45"), 1);
    let waiter = server.waiter("LIMITER.BACQUIRE hidden-limiter hidden-waiter 1 45 0");
    for hidden in ["LIMITER.ACQUIRE hidden-limiter hidden x x", "LIMITER.RENEW hidden-limiter k x"]
    {
        admin.error(hidden);
    }
    let told = admin.text("INFO everything");
    assert!(told.contains("limiter_waiting:1"), "{told}");
    assert!(!told.contains("hidden"), "{told}");
    assert!(!server.log().contains("hidden"));
    drop(waiter);
}

#[test]
fn ten_thousand_limiters_make_the_counters_of_others_start_again() {
    let server = Server::start();
    let mut admin = server.client();
    let mut eve = eve(&server);
    admin.int("LIMITER.ACQUIRE other k 1 45");
    let acquired = |client: &mut Client| client.strings("LIMITER.INFO other")[7].clone();
    assert_eq!(admin.strings("LIMITER.INFO other")[6], "acquired");
    assert_eq!(acquired(&mut admin), "1");
    for number in 0..10_000 {
        eve.send(&["LIMITER.ACQUIRE", &format!("tenant:{number}"), "k", "1", "450"]);
        assert_eq!(eve.receive(), ONE);
    }
    assert_eq!(acquired(&mut admin), "0");
    assert_eq!(admin.int("LIMITER.ACQUIRE other l 1 45"), 0, "the lease itself counts as before");
    assert_eq!(admin.info("limiter", "limiter_acquired"), "10001", "and so do the totals");
}

#[test]
fn no_command_writes_a_line_to_the_log() {
    let server = Server::start();
    let mut eve = eve(&server);
    let before = server.log();
    for prefix in ["tenant:p", "other"] {
        for command in COMMANDS.map(|command| command.replace("{p}", prefix)) {
            eve.call(&command);
            eve.call(&format!("{command} NX"));
            eve.call(&format!("{command} x x"));
            eve.call(&command.replace("45", "-1"));
            eve.call(&command.replace('9', "x"));
        }
    }
    eve.send(&["LIMITER.BACQUIRE", "tenant:p", "waits", "0", "45", "0.001"]);
    assert_eq!(eve.receive(), Value::Int(0));
    eve.close();
    wait_until("she is gone", || {
        server.client().text("CLIENT LIST").lines().all(|line| !line.contains("user=eve"))
    });
    assert_eq!(server.log(), before);
}

/// Sends commands in one go, and reads as many replies; the last one.
fn pipeline(client: &mut Client, commands: &[Vec<String>]) -> Value {
    let bytes: Vec<u8> = commands.iter().flat_map(|command| packed(command)).collect();
    let mut writer = client.second_handle();
    // From another thread: what comes back is long as well.
    let sender = std::thread::spawn(move || writer(&bytes));
    let replies: Vec<Value> = commands.iter().map(|_| client.receive()).collect();
    sender.join().expect("to send");
    replies.into_iter().last().expect("a reply")
}

/// How much of a processor's time the server has used, in microseconds: that of others on the same
/// machine does not count.
fn used_us(client: &mut Client) -> u64 {
    let mut seconds = |field| client.info("cpu", field).parse::<f64>().expect("seconds");
    ((seconds("used_cpu_user") + seconds("used_cpu_sys")) * 1e6) as u64
}

/// What a command costs the server, in microseconds, while Eve holds `held` leases that end with
/// her connection, so that all tables take part.
fn cost_us(server: &Server, held: usize, command: &[String]) -> u64 {
    let mut admin = server.client();
    admin.call("FLUSHALL");
    let mut eve = eve(server);
    let acquire = |number| format!("LIMITER.ACQUIRE tenant:p k{number} 999999 450 EPHEMERAL");
    let acquire = |number| acquire(number).split(' ').map(String::from).collect();
    pipeline(&mut eve, &(0..held).map(acquire).collect::<Vec<_>>());
    let before = used_us(&mut admin);
    let reply = pipeline(&mut eve, &[command.to_vec()]);
    assert!(!matches!(reply, Value::ServerError(_)), "{}: {reply:?}", command[0]);
    used_us(&mut admin) - before
}

#[test]
fn a_command_costs_in_proportion_to_its_length() {
    let server = Server::start();
    let words = |text: &str| -> Vec<String> { text.split(' ').map(String::from).collect() };
    let numbered = |count: usize, start: &str| -> Vec<String> {
        (0..count).map(|number| format!("{start}{number}")).collect()
    };
    let release = |count| [words("LIMITER.RELEASE tenant:p"), numbered(count, "k")].concat();
    let holders = |_| words("LIMITER.HOLDERS tenant:p");
    let macquire = |count: usize| {
        let (prefixes, limits) = (numbered(count, "tenant:"), vec!["9".to_string(); count]);
        let number = words(&format!("LIMITER.MACQUIRE {count}"));
        [number, prefixes, words("k 450"), limits, words("EPHEMERAL")].concat()
    };
    let digits =
        |count| words(&format!("LIMITER.ACQUIRE tenant:p k 1 0.{}1", "0".repeat(100 * count)));
    let commands: [&dyn Fn(usize) -> Vec<String>; 4] = [&release, &holders, &macquire, &digits];
    for command in commands {
        let [of_few, of_many] = [500, 10_000].map(|count| cost_us(&server, count, &command(count)));
        // 20 times as long. What grows with the square would take 400 times as long.
        let name = command(1)[0].clone();
        println!("{name}: {of_few} us, and {of_many} us for 20 times as many");
        assert!(of_many < 120 * of_few.max(200), "{name}: {of_few} us, and {of_many} us");
    }
}

#[test]
fn security_md_names_tests_that_exist_and_the_rules_of_these_tests() {
    let document = include_str!("../SECURITY.md");
    let shown = document.replace("\\\n", "").split_whitespace().collect::<Vec<_>>().join(" ");
    let rules = RULES.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(shown.contains(&format!("ACL SETUSER eve on >secret {rules}")), "other rules");

    let named: Vec<&str> = document.split('`').filter(|word| word.contains("::")).collect();
    assert!(named.len() > 30, "{} tests are named", named.len());
    for test in named {
        assert!(harness::is_test(test), "there is no test {test}");
    }
    // And no test of this file is without its line.
    for name in include_str!("security.rs").split("#[test]\nfn ").skip(1) {
        let name = name.split('(').next().expect("a name");
        let is_named = document.contains(&format!("`security::{name}`"));
        assert!(is_named || name.starts_with("security_md"), "{name} has no line in SECURITY.md");
    }
}
