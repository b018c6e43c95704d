//! Nothing stops the server: pauses, failovers, demotion, shutdown, reloads and unloading, in the
//! middle of waits, grants, lapses, deadlines and disconnections. All with an AOF and a replica,
//! since what must not be written at a bad moment stops a server only then.

mod harness;

use harness::{error_text, module, short, wait_until, Client, Server, AOF};
use redis::Value;

const ONE: Value = Value::Int(1);

/// A server with an AOF, and a replica without the module.
fn pair() -> (Server, Server) {
    let server = Server::start_with(&AOF);
    let replica = Server::start_bare(&["--replicaof", "127.0.0.1", &server.port.to_string()]);
    let mut client = server.client();
    wait_until("the replica is there", || client.info("replication", "connected_slaves") == "1");
    wait_until("the replica is online", || {
        client.info("replication", "slave0").contains("state=online")
    });
    (server, replica)
}

/// The replica has what the server has.
fn check_replica(server: &Server, replica: &Server) {
    let (mut on_server, mut on_replica) = (server.client(), replica.client());
    wait_until("the replica agrees", || on_replica.members("p") == on_server.members("p"));
    assert_eq!(on_server.int("PEXPIRETIME p"), on_replica.int("PEXPIRETIME p"));
}

/// Something of every kind under way: a lapse, a deadline, a line, an ephemeral lease.
struct Scene {
    first: Client,
    second: Client,
    impatient: Client,
    owner: Client,
}

fn scene(server: &Server) -> Scene {
    let mut owner = server.client();
    owner.int("LIMITER.ACQUIRE p lapses 2 450");
    owner.int("LIMITER.ACQUIRE p ephemeral 2 450 EPHEMERAL");
    let first = server.waiter("LIMITER.BACQUIRE p first 2 450 0");
    let second = server.waiter("LIMITER.BACQUIRE p second 2 450 0 EPHEMERAL");
    // What is short begins last, so that a slow machine sees it begin.
    let mut impatient = server.client();
    impatient.send(&["LIMITER.BACQUIRE", "p", "impatient", "2", "450", "0.4"]);
    assert_eq!(owner.int("LIMITER.RENEW p lapses 0.5"), 1);
    Scene { first, second, impatient, owner }
}

#[test]
fn during_a_pause_nothing_is_granted_and_the_line_moves_on_after_it() {
    for kind in ["WRITE", "ALL"] {
        let (server, replica) = pair();
        let mut admin = server.client();
        let Scene { mut first, mut second, mut impatient, owner } = scene(&server);
        let lapse_ms = (admin.members("p")[0].1 * 1000.0).round() as i64;
        admin.call(&format!("CLIENT PAUSE 900 {kind}"));
        // A lapse, a deadline, and the end of an ephemeral lease fall into the pause.
        owner.close();
        assert_eq!(impatient.receive(), Value::Int(0), "a deadline needs no write");
        if kind == "WRITE" {
            admin.wait_for_clock(lapse_ms + 20);
            assert_eq!(server.blocked(), 2, "nothing is granted");
        }
        assert_eq!(first.receive(), ONE);
        assert_eq!(second.receive(), ONE);
        check_replica(&server, &replica);
        assert_eq!(server.client().strings("ZRANGE p 0 -1").len(), 2);
    }
}

#[test]
fn a_release_in_a_transaction_that_pauses_grants_after_the_pause() {
    let (server, replica) = pair();
    let mut admin = server.client();
    admin.int("LIMITER.ACQUIRE p a 1 450");
    let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
    let paused_ms = admin.now_ms();
    admin.call("MULTI");
    admin.call("CLIENT PAUSE 300 WRITE");
    admin.call("LIMITER.RELEASE p a");
    let Value::Array(replies) = admin.call("EXEC") else { panic!("no replies") };
    assert_eq!(replies[1], ONE);
    assert_eq!(waiter.receive(), ONE);
    assert!(admin.now_ms() >= paused_ms + 300, "it was granted during the pause");
    check_replica(&server, &replica);
}

#[test]
fn a_failover_ends_the_waits_with_an_error_and_the_new_master_goes_on() {
    let server = Server::start_with(&AOF);
    let port = server.port.to_string();
    let successor = Server::start_with(&["--replicaof", "127.0.0.1", &port]);
    let mut admin = server.client();
    wait_until("the replica is online", || {
        admin.info("replication", "connected_slaves") == "1"
            && admin.info("replication", "slave0").contains("state=online")
    });
    let Scene { mut first, mut second, impatient, mut owner } = scene(&server);
    assert_eq!(admin.call("FAILOVER"), Value::Okay);
    for waiter in [&mut first, &mut second] {
        let reply = waiter.receive();
        // The lapse may have come before: then the first was granted in order.
        assert!(reply == ONE || error_text(&reply).starts_with("UNBLOCKED"), "{reply:?}");
    }
    drop(impatient);
    let mut on_successor = successor.client();
    wait_until("it is the master", || on_successor.info("replication", "role") == "master");
    wait_until("the old master follows", || admin.info("replication", "role") == "slave");
    // Its EPHEMERAL lease is in the hands of the new master: here nothing may be written.
    let owner_line = format!("CLIENT LIST ID {}", owner.id());
    owner.close();
    wait_until("its connection is closed", || admin.text(&owner_line).is_empty());
    assert!(admin.error("LIMITER.BACQUIRE p x 9 45 0").starts_with("READONLY"));
    assert_eq!(on_successor.int("LIMITER.ACQUIRE p new 9 45"), 1);
    check_replica(&successor, &server);
    assert_eq!(server.blocked(), 0);
}

#[test]
fn turned_into_a_replica_in_mid_wait_and_mid_grant() {
    let other = Server::start();
    let port = other.port.to_string();
    for round in 0..12 {
        let server = Server::start_with(&AOF);
        let mut admin = server.client();
        let Scene { mut first, second, impatient, owner } = scene(&server);
        let demote = format!("REPLICAOF 127.0.0.1 {port}\r\n");
        match round % 4 {
            0 => admin.send_raw(demote.as_bytes()),
            // Granted, and demoted before the reply.
            1 => admin.send_raw(format!("LIMITER.RELEASE p ephemeral\r\n{demote}").as_bytes()),
            // Marked as due, and demoted before the pump runs.
            2 => admin.send_raw(format!("DEL p\r\n{demote}").as_bytes()),
            _ => {
                owner.close();
                admin.send_raw(demote.as_bytes());
            }
        }
        let reply = first.receive();
        assert!(reply == ONE || error_text(&reply).starts_with("UNBLOCKED"), "{reply:?}");
        wait_until("all have been let go", || server.blocked() == 0);
        drop((second, impatient));
        let mut client = server.client();
        wait_until("it follows", || client.info("replication", "master_link_status") == "up");
        // And back again.
        client.call("REPLICAOF NO ONE");
        client.call("FLUSHALL");
        assert_eq!(client.int("LIMITER.ACQUIRE p x 1 450"), 1);
        let mut waiter = server.waiter("LIMITER.BACQUIRE p y 1 450 0");
        client.int("LIMITER.RELEASE p x");
        assert_eq!(waiter.receive(), ONE);
    }
}

#[test]
fn shutdown_with_everything_pending() {
    for wait in [false, true] {
        let (mut server, replica) = pair();
        let mut admin = server.client();
        let scene = scene(&server);
        if wait {
            // A replica that lags makes the server pause and wait for it before it goes.
            replica.client().send(&["DEBUG", "SLEEP", "1"]);
            admin.int("LIMITER.ACQUIRE q a 9 45");
        }
        admin.send(&["SHUTDOWN", "NOSAVE"]);
        wait_until("it is down", || !server.is_running());
        let log = server.log();
        assert!(log.contains("is now ready to exit"), "{log}");
        assert!(!log.contains("BUG REPORT"), "{log}");
        drop(scene);
    }
}

#[test]
fn debug_reload_and_loadaof_keep_lines_and_leases() {
    let (server, replica) = pair();
    let mut admin = server.client();
    admin.int("LIMITER.ACQUIRE p a 1 450");
    let mut first = server.waiter("LIMITER.BACQUIRE p first 1 450 0");
    let mut second = server.waiter("LIMITER.BACQUIRE p second 1 0.2 0");
    let mut third = server.waiter("LIMITER.BACQUIRE p third 1 450 0");
    assert_eq!(admin.call("DEBUG RELOAD"), Value::Okay);
    assert!(!first.has_reply());
    assert_eq!(admin.call("DEBUG LOADAOF"), Value::Okay);
    assert!(!first.has_reply());
    assert_eq!(admin.strings("ZRANGE p 0 -1"), ["a"]);
    assert_eq!(admin.int("LIMITER.RELEASE p a"), 1);
    assert_eq!(first.receive(), ONE);
    admin.int("LIMITER.RELEASE p first");
    assert_eq!(second.receive(), ONE);
    assert_eq!(third.receive(), ONE, "after the lapse of the second");
    check_replica(&server, &replica);
}

#[test]
fn a_slot_is_granted_while_maxmemory_is_exceeded() {
    let (server, replica) = pair();
    let mut admin = server.client();
    admin.int("LIMITER.ACQUIRE p a 1 450");
    let mut by_release = server.waiter("LIMITER.BACQUIRE p b 1 0.2 0");
    let mut by_lapse = server.waiter("LIMITER.BACQUIRE p c 1 450 0");
    admin.call("CONFIG SET maxmemory 1");
    assert!(admin.error("LIMITER.BACQUIRE p d 9 450 0").starts_with("OOM"));
    assert_eq!(admin.int("LIMITER.RELEASE p a"), 1);
    assert_eq!(by_release.receive(), ONE);
    assert_eq!(by_lapse.receive(), ONE);
    admin.call("CONFIG SET maxmemory 0");
    check_replica(&server, &replica);
}

#[test]
fn unloading_is_refused_while_somebody_waits_and_works_when_nobody_does() {
    let server = Server::start_with(&AOF);
    let mut admin = server.client();
    for _ in 0..3 {
        let Scene { mut first, mut second, mut impatient, owner } = scene(&server);
        assert!(matches!(admin.call("MODULE UNLOAD limiter"), Value::ServerError(_)));
        assert_eq!(impatient.receive(), Value::Int(0));
        owner.close();
        assert_eq!(first.receive(), ONE);
        assert_eq!(second.receive(), ONE);
        let leaves = server.waiter("LIMITER.BACQUIRE p leaves 2 450 0");
        leaves.close();
        // The tie of the second is still there. Nothing else may hold the module back, but for the
        // timer, which runs on for a moment.
        wait_until("it goes", || admin.call("MODULE UNLOAD limiter") == Value::Okay);
        drop((first, second, impatient));
        admin.run(&["MODULE", "LOAD", module().to_str().unwrap()]);
        admin.call("FLUSHALL");
        // What was remembered is forgotten: an ordinary lease outlives its connection.
        admin.int("LIMITER.ACQUIRE p a 1 450");
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
        admin.int("LIMITER.RELEASE p a");
        assert_eq!(waiter.receive(), ONE);
        drop(waiter);
        wait_until("it is closed", || admin.info("clients", "connected_clients") == "1");
        assert_eq!(admin.int("LIMITER.COUNT p"), 1);
        admin.call("FLUSHALL");
    }
}

#[test]
fn a_hand_off_after_a_del_reaches_the_replica_after_the_del() {
    let (server, replica) = pair();
    let mut admin = server.client();
    for change in ["DEL p", "FLUSHALL", "SET p x", "PEXPIRE p 1"] {
        admin.call("FLUSHALL");
        admin.int("LIMITER.ACQUIRE p a 1 450");
        let mut waiter = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
        admin.call(change);
        let reply = waiter.receive();
        if change == "SET p x" {
            assert!(error_text(&reply).starts_with("WRONGTYPE"));
            admin.call("DEL p");
        } else {
            assert_eq!(reply, ONE, "{change}");
            assert_eq!(admin.strings("ZRANGE p 0 -1"), ["b"], "{change}");
        }
        check_replica(&server, &replica);
    }
}

#[test]
fn on_a_writable_replica_the_line_moves_too() {
    let master = Server::start();
    let port = master.port.to_string();
    let writable = ["--replicaof", "127.0.0.1", &port, "--replica-read-only", "no"];
    let server = Server::start_with(&writable);
    let mut client = server.client();
    wait_until("it follows", || client.info("replication", "master_link_status") == "up");
    client.int(&format!("LIMITER.ACQUIRE p a 1 {}", short(0.1)));
    let mut by_lapse = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
    let mut by_del = server.waiter("LIMITER.BACQUIRE p c 1 450 0");
    assert_eq!(by_lapse.receive(), ONE);
    client.int("DEL p");
    assert_eq!(by_del.receive(), ONE);
}

#[test]
fn in_a_cluster_waits_end_when_the_slot_goes_and_leases_end_when_it_is_back() {
    let server = Server::start_with(&["--cluster-enabled", "yes"]);
    let mut client = server.client();
    let is_ok = |client: &mut Client| client.text("CLUSTER INFO").contains("cluster_state:ok");
    client.call("CLUSTER ADDSLOTSRANGE 0 16383");
    wait_until("the cluster is up", || is_ok(&mut client));
    let slot = client.int("CLUSTER KEYSLOT p");

    // An ephemeral lease whose connection closes while nothing is served.
    let mut owner = server.client();
    assert_eq!(owner.int("LIMITER.ACQUIRE p ephemeral 1 450 EPHEMERAL"), 1);
    let mut moves = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
    let elsewhere = (slot + 1) % 16384;
    client.call(&format!("CLUSTER DELSLOTS {elsewhere}"));
    wait_until("the cluster is down", || !is_ok(&mut client));
    let started = std::time::Instant::now();
    // The server itself answers a client that is blocked while the cluster is down, if it looks
    // at it before the pump does.
    let is_let_go =
        |error: &str| error.starts_with("UNBLOCKED") || error.starts_with("CLUSTERDOWN");
    let error = error_text(&moves.receive());
    assert!(is_let_go(&error), "{error}");
    assert!(started.elapsed().as_millis() < 2_000, "{:?}", started.elapsed());
    owner.close();
    client.call(&format!("CLUSTER ADDSLOTS {elsewhere}"));
    wait_until("the cluster is up", || is_ok(&mut client));
    wait_until("the lease has ended", || client.int("LIMITER.COUNT p") == 0);

    // The slot itself goes, and the server writes no key into it.
    client.int("LIMITER.ACQUIRE p a 1 0.3");
    let mut moves = server.waiter("LIMITER.BACQUIRE p b 1 450 0");
    client.call(&format!("CLUSTER DELSLOTS {slot}"));
    let error = error_text(&moves.receive());
    assert!(is_let_go(&error), "{error}");
    assert_eq!(client.int(&format!("CLUSTER COUNTKEYSINSLOT {slot}")), 1, "the lease of a alone");
}
