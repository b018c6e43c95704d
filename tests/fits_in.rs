//! The module among the rest of a server: its limiters are as plain keys to access rules, client
//! caches, listeners, logs and tools, and it runs beside other modules.
//!
//! What one command sends to listeners, caches and MONITOR is in `effects.rs` and `tables.rs`.

mod harness;

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::{
    compile, module, server_program, short, slowness, string, strings, wait_until, Client, Server,
};
use redis::Value;
use tempfile::TempDir;

/// Every command that has a key, in a form that changes nothing for long and waits for nothing.
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

/// The names of those commands that this user may run on this prefix.
fn allowed(server: &Server, user: &str, prefix: &str) -> Vec<String> {
    let mut client = server.client();
    client.call(&format!("AUTH {user} secret"));
    let mut names = Vec::new();
    for command in COMMANDS.map(|command| command.replace("{p}", prefix)) {
        match client.call(&command) {
            Value::ServerError(error) => assert_eq!(error.code(), "NOPERM", "{command}: {error:?}"),
            _ => names.push(command.split(' ').next().expect("a name")[8..].to_lowercase()),
        }
    }
    names
}

#[test]
fn key_patterns_of_access_rules_hold_for_every_command() {
    let server = Server::start();
    let mut admin = server.client();
    let all = ["acquire", "bacquire", "macquire", "release", "renew", "count", "holders", "info"];
    for (rules, may) in [
        ("~mine:*", &all[..]),
        ("%RW~mine:*", &all),
        // COUNT, HOLDERS and INFO read; RELEASE only takes away, as ZREM does.
        ("%R~mine:*", &["count", "holders", "info"]),
        ("%W~mine:*", &["release"]),
        ("~yours:*", &[]),
    ] {
        admin.call(&format!("ACL SETUSER user reset on >secret +@all {rules}"));
        assert_eq!(allowed(&server, "user", "mine:p"), may, "{rules}");
    }
    admin.call("ACL SETUSER user reset on >secret +@all ~mine:*");
    assert_eq!(allowed(&server, "user", "yours:p"), [""; 0]);
    // One selector for the work, one for a look at everything.
    admin.run(&["ACL", "SETUSER", "user", "(+limiter.count +limiter.holders %R~*)"]);
    assert_eq!(allowed(&server, "user", "yours:p"), ["count", "holders"]);
    assert_eq!(allowed(&server, "user", "mine:p"), all);
}

#[test]
fn categories_hold_for_users_that_were_there_before_the_module() {
    let server = Server::start_bare(&[]);
    let mut admin = server.client();
    admin.call("ACL SETUSER reader on >secret ~* +@read");
    admin.call("ACL SETUSER nowrite on >secret ~* +@all -@write");
    admin.call("ACL SETUSER zsets on >secret ~* +@sortedset");
    assert_eq!(admin.run(&["MODULE", "LOAD", module().to_str().expect("UTF-8")]), Value::Okay);
    let may = |user| allowed(&server, user, "p").join(" ");
    let all = "acquire bacquire macquire release renew count holders info";
    // Redis 7.0 has modules' commands in no category.
    if admin.info("server", "redis_version").starts_with("7.0.") {
        assert_eq!([may("reader"), may("nowrite"), may("zsets")], ["", all, ""]);
    } else {
        let reads = "count holders info";
        assert_eq!([may("reader"), may("nowrite"), may("zsets")], [reads, reads, all]);
    }
}

#[test]
fn a_client_that_caches_a_limiter_is_told_whatever_changes_it() {
    let server = Server::start();
    let (mut client, mut tracker) = (server.client(), server.client());
    tracker.call("HELLO 3");
    tracker.call("CLIENT TRACKING ON");
    for read in ["LIMITER.COUNT p", "LIMITER.HOLDERS p", "ZRANGE p 0 -1"] {
        let mut told = |why: &str, change: &mut dyn FnMut()| {
            tracker.call(read);
            change();
            let told = tracker.try_receive();
            let Ok(Value::Push { data, .. }) = told else { panic!("{why}, {read}: {told:?}") };
            assert_eq!(strings(&data[0]), ["p"]);
            // One change may be told in two parts; what is left belongs to no later one.
            while tracker.has_reply() {
                tracker.receive();
            }
        };
        client.int("LIMITER.ACQUIRE p a 1 45");
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
        told("RELEASE hands the slot over", &mut || {
            client.int("LIMITER.RELEASE p a");
        });
        assert_eq!(waiter.receive(), Value::Int(1));
        told("RENEW", &mut || {
            client.int("LIMITER.RENEW p b 46");
        });

        client.int("LIMITER.RELEASE p b");
        let mut closes = server.client();
        closes.int("LIMITER.ACQUIRE p a 1 45 EPHEMERAL");
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
        let mut closes = Some(closes);
        told("a closed connection", &mut || closes.take().expect("it").close());
        assert_eq!(waiter.receive(), Value::Int(1));
        client.int("LIMITER.RELEASE p b");

        client.int("ZADD p 1 lapsed");
        told("a prune by a denied ACQUIRE", &mut || {
            client.int("LIMITER.ACQUIRE p a 0 45");
        });
        // Nobody sends a command here: the module prunes and grants by its timer.
        client.int("LIMITER.ACQUIRE p a 1 1");
        let lapses_ms = client.now_ms() + 1000;
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
        told("a lapse that moves the line", &mut || client.wait_for_clock(lapses_ms));
        assert_eq!(waiter.receive(), Value::Int(1));
        client.int("LIMITER.RELEASE p b");
    }
}

#[test]
fn listeners_hear_the_effects_when_a_slot_changes_hands() {
    let server = Server::start_with(&["--notify-keyspace-events", "KA"]);
    let (mut client, mut listener) = (server.client(), server.client());
    client.int("LIMITER.ACQUIRE p other 9 45");
    listener.call("SUBSCRIBE __keyspace@0__:p");
    let mut hears = |expected: &[&str]| {
        for event in expected {
            assert_eq!(strings(&listener.receive())[2], *event);
        }
    };
    client.int("LIMITER.ACQUIRE p a 9 45");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 2 45 0");
    client.int("LIMITER.RELEASE p a");
    assert_eq!(waiter.receive(), Value::Int(1));
    hears(&["zadd", "zrem", "zadd"]);

    client.int("LIMITER.RENEW p b 1");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p c 2 45 0");
    assert_eq!(waiter.receive(), Value::Int(1));
    hears(&["zadd", "zremrangebyscore", "zadd"]);
    client.call("DEL p");
    hears(&["del"]);
}

#[test]
fn monitor_and_slowlog_show_what_clients_sent_and_a_wait_is_no_slow_time() {
    let server = Server::start_with(&["--slowlog-log-slower-than", "0"]);
    let (mut client, mut monitor) = (server.client(), server.client());
    client.int("LIMITER.ACQUIRE p a 1 45");
    monitor.call("MONITOR");
    let (wait, wait_us) = (short(0.3), 300_000 * i64::from(slowness()));
    assert_eq!(client.int(&format!("LIMITER.BACQUIRE p b 1 45 {wait}")), 0);
    client.call("PING end");
    let mut lines = Vec::new();
    while !lines.last().is_some_and(|line: &String| line.ends_with(r#""PING" "end""#)) {
        lines.push(string(&monitor.receive()));
    }
    let shown = format!(r#""LIMITER.BACQUIRE" "p" "b" "1" "45" "{wait}""#);
    assert!(lines[0].ends_with(&shown), "{lines:?}");
    assert_eq!(lines.len(), 2, "once, and no inner workings: {lines:?}");

    let Value::Array(entries) = client.call("SLOWLOG GET") else { panic!("no entries") };
    let entries = entries.iter().map(|entry| match entry {
        Value::Array(fields) => fields,
        other => panic!("{other:?} is no entry"),
    });
    let mut of_bacquire = entries.filter(|entry| strings(&entry[3])[0] == "LIMITER.BACQUIRE");
    let entry = of_bacquire.next().expect("an entry");
    assert_eq!(strings(&entry[3]), ["LIMITER.BACQUIRE", "p", "b", "1", "45", wait.as_str()]);
    let Value::Int(took_us) = entry[2] else { panic!("no time") };
    assert!(took_us < wait_us, "it took {took_us} us");
    let stats = client.info("commandstats", "cmdstat_limiter.bacquire");
    let usec = stats.split("usec=").nth(1).and_then(|rest| rest.split(',').next());
    assert!(usec.expect("a time").parse::<i64>().expect("a number") < wait_us, "{stats}");
}

#[test]
fn bigkeys_counts_limiters_as_sorted_sets() {
    let server = Server::start();
    let mut client = server.client();
    for holder in ["a", "b", "c"] {
        client.int(&format!("LIMITER.ACQUIRE p {holder} 9 45"));
    }
    client.int("LIMITER.ACQUIRE small a 9 45");
    let port = server.port.to_string();
    let output = Command::new("redis-cli").args(["-p", &port, "--bigkeys"]).output();
    let shown = String::from_utf8_lossy(&output.expect("redis-cli").stdout).into_owned();
    assert!(shown.contains("2 zsets with 4 members"), "{shown}");
    let biggest = shown.lines().find(|line| line.starts_with("Biggest")).expect("the biggest");
    assert!(biggest.contains("zset") && biggest.ends_with("has 3 members"), "{shown}");
}

#[test]
fn dumps_and_rdb_files_need_no_module() {
    let server = Server::start();
    let mut client = server.client();
    for (holder, ttl) in [("a", "45"), ("b", "300.5")] {
        client.int(&format!("LIMITER.ACQUIRE p {holder} 9 {ttl}"));
    }
    let (members, expiry_ms) = (client.members("p"), client.int("PEXPIRETIME p"));
    let Value::BulkString(dump) = client.call("DUMP p") else { panic!("no dump") };
    let plain = Server::start_bare(&[]);
    let mut other = plain.client();
    let expiry = expiry_ms.to_string();
    let restore: [&[u8]; 5] = [b"RESTORE", b"p", expiry.as_bytes(), &dump, b"ABSTTL"];
    assert_eq!(other.run(&restore), Value::Okay);
    assert_eq!(other.members("p"), members);
    assert_eq!(other.int("PEXPIRETIME p"), expiry_ms);

    assert_eq!(client.call("SAVE"), Value::Okay);
    // The server's program is the tool, too, by another name.
    let check = Command::new(server_program())
        .arg0("redis-check-rdb")
        .arg(server.path("dump.rdb"))
        .output()
        .expect("the server's program");
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.success() && said.contains("RDB looks OK"), "{said}");
    assert!(!said.contains("MODULE"), "{said}");
    let loaded = server.replay(&[]);
    assert_eq!(loaded.client().members("p"), members);
}

/// Other modules, in a folder of their own.
struct Others {
    folder: TempDir,
}

impl Others {
    fn new() -> Self {
        let others = Self { folder: TempDir::new().expect("a temporary folder") };
        for name in ["listener", "typed"] {
            compile(&format!("fits_in/{name}.c"), &others.path(name));
        }
        others
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name).with_extension("so")
    }

    /// Servers with all three modules, loaded in one order and in the other.
    fn servers(&self) -> [Server; 2] {
        let (listener, typed) = (self.path("listener"), self.path("typed"));
        let mut modules = [module(), &listener, &typed];
        [(); 2].map(|()| {
            modules.reverse();
            let load = |path: &&Path| [String::from("--loadmodule"), path.display().to_string()];
            let options: Vec<String> = modules.iter().flat_map(load).collect();
            Server::start_bare(&options.iter().map(String::as_str).collect::<Vec<_>>())
        })
    }
}

#[test]
fn a_data_type_of_another_module_lives_beside_limiters() {
    for mut server in Others::new().servers() {
        let mut client = server.client();
        assert_eq!(client.int("TYPED.SET t 42"), 42);
        assert_eq!(client.int("LIMITER.ACQUIRE p a 9 45"), 1);
        for command in COMMANDS.map(|command| command.replace("{p}", "t")) {
            assert!(client.error(&command).starts_with("WRONGTYPE"), "{command}");
        }
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 45 0");
        client.int("TYPED.SET p 43");
        client.call("DEL p"); // The other module tells nobody of its change; this is told.
        assert_eq!(waiter.receive(), Value::Int(1));
        let members = client.members("p");
        assert_eq!(members.len(), 1);

        assert_eq!(client.call("SAVE"), Value::Okay);
        server.kill_and_restart();
        let mut client = server.client();
        assert_eq!(client.int("TYPED.GET t"), 42);
        assert_eq!(client.members("p"), members);
        assert_eq!(client.int("LIMITER.RELEASE p b"), 1);
        assert_eq!(client.call("MODULE UNLOAD limiter"), Value::Okay);
        assert_eq!(client.int("TYPED.GET t"), 42);
    }
}

#[test]
fn a_module_that_writes_when_it_hears_of_ours_confuses_neither() {
    for server in Others::new().servers() {
        let replica = Server::start_bare(&["--replicaof", "127.0.0.1", &server.port.to_string()]);
        let mut client = server.client();
        let mut heard = 0;
        let mut hears = |client: &mut Client| {
            let before = heard;
            heard = string(&client.call("GET heard")).parse().unwrap_or(0);
            assert!(heard > before, "the listener hears of it");
        };
        // It joins in the middle of our command: its slot counts at once.
        assert_eq!(client.int("LIMITER.ACQUIRE joined a 3 45"), 1);
        hears(&mut client);
        assert_eq!(client.int("LIMITER.COUNT joined"), 2);
        assert_eq!(client.int("LIMITER.ACQUIRE joined b 3 45"), 1);
        hears(&mut client);
        assert_eq!(client.int("LIMITER.ACQUIRE joined c 3 45"), 0);
        assert_eq!(client.int("PEXPIRETIME joined"), -1, "its member never lapses");

        let mut waiter = server.waiter("LIMITER.BACQUIRE joined c 3 45 0");
        assert_eq!(client.int("LIMITER.RELEASE joined a"), 1);
        assert_eq!(waiter.receive(), Value::Int(1));
        hears(&mut client);
        // The last of the line comes in by the timer, and the listener stays.
        client.int("LIMITER.RENEW joined b 1");
        let mut waiter = server.waiter("LIMITER.BACQUIRE joined d 3 45 0");
        assert_eq!(waiter.receive(), Value::Int(1));
        hears(&mut client);
        let names: Vec<_> = client.members("joined").into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["c", "d", "listener"]);

        wait_until("the replica is the same", || replica.contents() == server.contents());
        for name in ["listener", "limiter"] {
            assert_eq!(client.call(&format!("MODULE UNLOAD {name}")), Value::Okay, "{name}");
            assert_eq!(client.int("ZCARD joined"), 3);
        }
    }
}
