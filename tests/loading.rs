//! The module as a whole: how it loads, refuses to load, and goes.

mod harness;

use harness::{module, string, Client, Server};
use redis::Value;

#[test]
fn module_load_and_unload_at_run_time() {
    let server = Server::start_bare(&[]);
    let mut client = server.client();
    let path = module().to_str().unwrap();
    for _ in 0..3 {
        assert_eq!(client.run(&["MODULE", "LOAD", path]), Value::Okay);
        assert_eq!(client.int("LIMITER.ACQUIRE p k 2 45"), 1);
        assert!(modules(&mut client).contains(&"limiter".to_string()));
        assert_eq!(client.call("MODULE UNLOAD limiter"), Value::Okay);
        assert!(client.error("LIMITER.COUNT p").starts_with("ERR unknown command"));
        assert_eq!(client.int("ZCARD p"), 1, "the leases are plain data");
    }
}

#[test]
fn what_is_remembered_of_limiters_is_given_back_with_the_module() {
    let server = Server::start_bare(&[]);
    let mut client = server.client();
    let path = module().to_str().unwrap();
    let mut used = Vec::new();
    for _ in 0..3 {
        assert_eq!(client.run(&["MODULE", "LOAD", path]), Value::Okay);
        for number in 0..1_000 {
            assert_eq!(client.int(&format!("LIMITER.RELEASE limiter-{number} k")), 0);
        }
        assert_eq!(client.call("MODULE UNLOAD limiter"), Value::Okay);
        used.push(client.info("memory", "used_memory").parse::<i64>().unwrap());
    }
    // The crate redis-module keeps 20,000 bytes a time, 1,000 limiters are 250,000.
    assert!(used[2] - used[0] < 100_000, "{used:?}");
}

#[test]
fn it_does_not_go_while_access_rules_name_its_commands() {
    // Redis up to 8.2 would stop with a failed assertion, at once or when it shows the rules.
    let server = Server::start();
    let mut client = server.client();
    for rules in ["+limiter.acquire", "+@all -limiter.acquire", "-@all (+limiter.count ~p)"] {
        let (before, selector) = rules.split_once('(').unwrap_or((rules, ""));
        let mut command = vec!["ACL", "SETUSER", "worker", "reset"];
        command.extend(before.split_whitespace());
        let selector = format!("({selector}");
        command.extend((selector.len() > 1).then_some(selector.as_str()));
        assert_eq!(client.run(&command), Value::Okay);
        assert!(matches!(client.call("MODULE UNLOAD limiter"), Value::ServerError(_)), "{rules}");
        assert!(client.strings("ACL LIST").iter().any(|user| user.contains("limiter.")));
        assert_eq!(client.int("LIMITER.COUNT p"), 0);
    }
    assert_eq!(client.call("ACL DELUSER worker"), Value::Int(1));
    assert_eq!(client.call("MODULE UNLOAD limiter"), Value::Okay);
    client.strings("ACL LIST");
}

#[test]
fn arguments_are_refused_with_a_line_in_the_log() {
    let server = Server::start_bare(&[]);
    let mut client = server.client();
    let path = module().to_str().unwrap();
    let reply = client.run(&["MODULE", "LOAD", path, "speed", "high"]);
    assert!(matches!(reply, Value::ServerError(_)), "{reply:?}");
    assert!(server.log().contains("not loaded: it takes no arguments"), "{}", server.log());
    assert_eq!(client.run(&["MODULE", "LOAD", path]), Value::Okay);
}

#[test]
fn a_server_that_renamed_what_the_module_needs_is_refused_with_a_line_in_the_log() {
    let server = Server::start_bare(&["--rename-command", "ZREMRANGEBYSCORE", "prune"]);
    let mut client = server.client();
    let reply = client.run(&["MODULE", "LOAD", module().to_str().unwrap()]);
    assert!(matches!(reply, Value::ServerError(_)), "{reply:?}");
    let why = "not loaded: rename-command took away ZREMRANGEBYSCORE";
    assert!(server.log().contains(why), "{}", server.log());
}

#[test]
fn replicas_may_still_load_by_swap_without_a_disk() {
    // A module that does not say it can bear it turns swapdb off for the whole server: the log
    // of a replica that syncs then says so, and it answers LOADING instead of old data.
    let master = Server::start();
    let port = master.port.to_string();
    let replica = Server::start_with(&["--repl-diskless-load", "swapdb"]);
    let (mut on_master, mut on_replica) = (master.client(), replica.client());
    on_master.int("LIMITER.ACQUIRE p k 1 45");
    on_replica.call(&format!("REPLICAOF 127.0.0.1 {port}"));
    harness::wait_until("the replica has synced", || on_replica.int("EXISTS p") == 1);
    assert_eq!(on_replica.int("LIMITER.COUNT p"), 1);
    assert!(!replica.log().contains("Skipping diskless-load"), "{}", replica.log());
}

#[test]
fn the_example_configuration_starts_as_it_is() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/redis.conf.example");
    let text = std::fs::read_to_string(example).unwrap();
    let module = module().to_str().unwrap();
    // Where the library lies and which port is free are this machine's affair, the rest is not.
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        match line.split_whitespace().next() {
            Some("loadmodule") => lines.push(format!("loadmodule {module}")),
            Some("port") => {}
            _ => lines.push(line.to_string()),
        }
    }
    let folder = tempfile::TempDir::new().unwrap();
    let file = folder.path().join("redis.conf");
    std::fs::write(&file, lines.join("\n")).unwrap();
    let server = Server::start_bare_from(&file);
    let mut client = server.client();
    assert_eq!(client.int("LIMITER.ACQUIRE p k 1 45"), 1);
    assert_eq!(client.strings("CONFIG GET maxmemory-policy")[1], "noeviction");
    assert_eq!(client.strings("CONFIG GET appendonly")[1], "yes");
    assert_eq!(client.strings("CONFIG GET zset-max-listpack-entries")[1], "0");
    assert!(modules(&mut client).contains(&"limiter".to_string()));
}

/// The names of the modules that are loaded. Redis 8 brings some of its own, in any order.
fn modules(client: &mut Client) -> Vec<String> {
    let Value::Array(modules) = client.call("MODULE LIST") else { panic!("no list") };
    let name = |module: &Value| match module {
        Value::Array(fields) => string(&fields[1]),
        other => panic!("{other:?} is no module"),
    };
    modules.iter().map(name).collect()
}
