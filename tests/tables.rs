//! What the server tells clients about the commands: COMMAND DOCS, INFO and GETKEYS, and the
//! hint that redis-cli makes of them.

mod harness;

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use harness::{string, strings, wait_until, Client, Server};
use redis::Value;

/// A map, or the flat array that RESP2 has for one, by its field names.
fn fields(reply: &Value) -> BTreeMap<String, Value> {
    match reply {
        Value::Map(pairs) => {
            pairs.iter().map(|(name, value)| (string(name), value.clone())).collect()
        }
        Value::Array(flat) => {
            flat.chunks(2).map(|pair| (string(&pair[0]), pair[1].clone())).collect()
        }
        other => panic!("{other:?} is no map"),
    }
}

fn elements(reply: &Value) -> &[Value] {
    match reply {
        Value::Array(elements) | Value::Set(elements) => elements,
        other => panic!("{other:?} is no array"),
    }
}

fn docs(client: &mut Client, command: &str) -> BTreeMap<String, Value> {
    fields(&fields(&client.call(&format!("COMMAND DOCS {command}")))[command])
}

const COMMANDS: [(&str, i64, &str); 9] = [
    ("limiter.acquire", -5, "prefix key limit ttl [nx] [ephemeral] [withstate]"),
    ("limiter.bacquire", -6, "prefix key limit ttl timeout [ephemeral]"),
    ("limiter.release", -3, "prefix key..."),
    ("limiter.renew", 4, "prefix key ttl"),
    ("limiter.count", 2, "prefix"),
    ("limiter.holders", -2, "prefix [count]"),
    ("limiter.info", 2, "prefix"),
    ("limiter.macquire", -6, "numlimiters prefix... key ttl limit... [nx] [ephemeral]"),
    ("limiter.help", 1, ""),
];

#[test]
fn command_docs_has_summary_arguments_complexity_and_since() {
    let server = Server::start();
    let mut client = server.client();
    for (command, _, expected) in COMMANDS {
        let docs = docs(&mut client, command);
        assert!(string(&docs["summary"]).ends_with('.'), "{command}");
        assert!(string(&docs["complexity"]).starts_with("O("), "{command}");
        assert_eq!(string(&docs["since"]), "0.1.0", "{command}");
        assert_eq!(string(&docs["group"]), "module", "{command}");
        assert_eq!(string(&docs["module"]), "limiter", "{command}");
        let arguments = docs.get("arguments").map(elements).unwrap_or_default();
        let words: Vec<String> = arguments
            .iter()
            .map(|argument| {
                let argument = fields(argument);
                let flags = argument.get("flags").map(strings).unwrap_or_default();
                let name = string(&argument["name"]);
                match flags.first().map(String::as_str) {
                    Some("optional") => format!("[{name}]"),
                    Some("multiple") => format!("{name}..."),
                    _ => name,
                }
            })
            .collect();
        assert_eq!(words.join(" "), expected, "{command}");
    }
    let acquire = docs(&mut client, "limiter.acquire");
    let types: Vec<String> = elements(&acquire["arguments"])
        .iter()
        .map(|argument| string(&fields(argument)["type"]))
        .collect();
    assert_eq!(
        types,
        ["key", "string", "integer", "double", "pure-token", "pure-token", "pure-token"]
    );
}

#[test]
fn command_info_has_arity_flags_and_key_positions() {
    let server = Server::start();
    let mut client = server.client();
    for (command, arity, _) in COMMANDS {
        let reply = client.call(&format!("COMMAND INFO {command}"));
        let info = elements(&elements(&reply)[0]);
        assert_eq!(info[1], Value::Int(arity), "{command}");
        let flags = strings(&info[2]);
        let has = |flag: &str| flags.iter().any(|have| have == flag);
        let acquires =
            ["limiter.acquire", "limiter.bacquire", "limiter.macquire"].contains(&command);
        let writes = acquires || ["limiter.release", "limiter.renew"].contains(&command);
        let reads = ["limiter.count", "limiter.holders", "limiter.info"].contains(&command);
        assert_eq!(has("write"), writes, "{command}: {flags:?}");
        assert_eq!(has("readonly"), reads, "{command}: {flags:?}");
        assert_eq!(has("denyoom"), acquires, "{command}: {flags:?}");
        let counted = command == "limiter.macquire";
        let slow = ["limiter.holders", "limiter.bacquire"].contains(&command) || counted;
        assert_eq!(has("fast"), !slow, "{command}: {flags:?}");
        assert_eq!(has("blocking"), command == "limiter.bacquire", "{command}: {flags:?}");
        assert_eq!(has("movablekeys"), counted, "{command}: {flags:?}");
        let positions = if (writes || reads) && !counted { [1, 1, 1] } else { [0, 0, 0] };
        assert_eq!(info[3..6], positions.map(Value::Int), "{command}");
        let specs = elements(&info[8]);
        assert_eq!(specs.len(), usize::from(writes || reads), "{command}");
        if let Some(spec) = specs.first() {
            let access = strings(&fields(spec)["flags"]);
            assert_eq!(access[0], if writes { "RW" } else { "RO" }, "{command}");
        }
    }
}

#[test]
fn acl_categories_are_those_of_plain_commands_where_modules_may_say_so() {
    let server = Server::start();
    let mut client = server.client();
    let names = |client: &mut Client, command: &str| {
        let mut names = client.strings(command);
        names.retain(|name| name.starts_with("limiter."));
        names.sort();
        names.join(" ")
    };
    // A Valkey names the Redis that it is compatible with: 7.2 or later.
    let version = client.info("server", "redis_version");
    let all = "limiter.acquire limiter.bacquire limiter.count limiter.holders limiter.info \
               limiter.macquire limiter.release limiter.renew";
    for (category, commands) in [
        ("sortedset", all),
        (
            "write",
            "limiter.acquire limiter.bacquire limiter.macquire limiter.release limiter.renew",
        ),
        ("read", "limiter.count limiter.holders limiter.info"),
        ("blocking", "limiter.bacquire"),
        ("slow", "limiter.bacquire limiter.holders limiter.macquire"),
        ("dangerous", ""),
    ] {
        let found = names(&mut client, &format!("COMMAND LIST FILTERBY ACLCAT {category}"));
        let expected = if version.starts_with("7.0.") { "" } else { commands };
        assert_eq!(found, expected, "{category}");
    }
}

#[test]
fn command_getkeys_is_the_prefix_alone() {
    let server = Server::start();
    let mut client = server.client();
    for command in [
        "limiter.acquire p k 1 45",
        "limiter.acquire p k 1 45 NX WITHSTATE",
        "limiter.bacquire p k 1 45 0 EPHEMERAL",
        "limiter.release p k l m",
        "limiter.renew p k 45",
        "limiter.count p",
        "limiter.holders p COUNT 1",
        "limiter.info p",
        "limiter.macquire 1 p k 45 1",
    ] {
        assert_eq!(client.strings(&format!("COMMAND GETKEYS {command}")), ["p"], "{command}");
    }
}

#[test]
fn redis_cli_shows_the_arguments() {
    let server = Server::start();
    let port = server.port.to_string();
    for (command, line) in [
        ("LIMITER.ACQUIRE", "prefix key limit ttl [NX] [EPHEMERAL] [WITHSTATE]"),
        ("LIMITER.RELEASE", "prefix key [key ...]"),
        ("LIMITER.HOLDERS", "prefix [COUNT count]"),
    ] {
        // It asks the server for COMMAND DOCS, and shows in HELP and as a hint what it made of it.
        let mut cli = Command::new("redis-cli")
            .args(["-p", &port])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("redis-cli");
        let mut stdin = cli.stdin.take().expect("its input");
        writeln!(stdin, "HELP {command}").expect("to type");
        drop(stdin);
        let output = cli.wait_with_output().expect("its output");
        let shown = String::from_utf8_lossy(&output.stdout);
        assert!(shown.contains(line), "{line:?} in {shown}");
    }
}

#[test]
fn access_rules_apply_to_the_prefix_and_to_commands() {
    let server = Server::start();
    let (mut admin, mut client) = (server.client(), server.client());
    admin.call("ACL SETUSER worker on >secret ~mine:* +limiter.acquire +limiter.count");
    client.call("AUTH worker secret");
    assert_eq!(client.int("LIMITER.ACQUIRE mine:p k 1 45"), 1);
    for command in
        ["LIMITER.ACQUIRE other k 1 45", "LIMITER.COUNT other", "LIMITER.RELEASE mine:p k"]
    {
        assert!(client.error(command).starts_with("NOPERM"), "{command}");
    }
}

#[test]
fn slowlog_monitor_and_commandstats_show_the_commands() {
    let server = Server::start_with(&["--slowlog-log-slower-than", "0"]);
    let (mut client, mut monitor) = (server.client(), server.client());
    monitor.call("MONITOR");
    client.int("LIMITER.ACQUIRE p k 1 45");
    let mut seen = String::new();
    wait_until("MONITOR shows it", || {
        seen = string(&monitor.receive());
        seen.contains("LIMITER.ACQUIRE")
    });
    assert!(seen.ends_with(r#""LIMITER.ACQUIRE" "p" "k" "1" "45""#), "{seen}");
    let stats = client.info("commandstats", "cmdstat_limiter.acquire");
    assert!(stats.starts_with("calls=1,"), "{stats}");
    let Value::Array(entries) = client.call("SLOWLOG GET") else { panic!("no entries") };
    let logged = entries.iter().map(|entry| strings(&elements(entry)[3])[0].clone());
    assert!(logged.into_iter().any(|name| name == "LIMITER.ACQUIRE"));
}
