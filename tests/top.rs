//! `make top` with a real server, and the tests of its table (`top/table.py`): what people see is
//! what LIMITER.INFO says.

mod harness;

use std::path::Path;
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::thread;

use harness::Server;

/// make in the project's folder, without what an outer make has handed down.
fn make(args: &[&str]) -> Output {
    let mut make = Command::new("make");
    make.arg("--no-print-directory").args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
    for name in ["MAKEFLAGS", "MAKELEVEL", "PORT", "HOST", "DB", "INTERVAL", "PREFIXES"] {
        make.env_remove(name);
    }
    make.output().expect("make")
}

/// The Python that `make top` runs, with what it needs; installed once.
fn python() -> &'static Path {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let output = make(&[".venv/top"]);
        assert!(output.status.success(), "{output:?}");
    });
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.venv/bin/python"))
}

/// What `make top` prints about a server: the table's cells, row by row.
fn top(server: &Server, args: &[&str]) -> Vec<Vec<String>> {
    python();
    let port = format!("PORT={}", server.port);
    let output = make(&[&["top", &port, "INTERVAL=0.3"], args].concat());
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let cells = |line: &str| {
        let cells = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty());
        cells.map(String::from).collect()
    };
    text.lines().map(cells).collect()
}

#[test]
fn the_table_is_right_for_given_replies() {
    let tests = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/top/table.py");
    let output = Command::new(python()).arg(tests).output().expect("python");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !said.contains("Ran 0 tests"), "{said}");
}

#[test]
fn it_shows_the_limiters_of_a_server_and_no_other_sorted_sets() {
    let server = Server::start();
    let mut client = server.client();
    client.int("LIMITER.ACQUIRE full a 2 45");
    client.int("LIMITER.ACQUIRE full b 2 3000");
    let _waiter = server.waiter("LIMITER.BACQUIRE full c 2 45 0");
    client.int("LIMITER.ACQUIRE calm a 2 45");
    client.int("ZADD scores 12 anna 7 ben");
    client.call("SET text hello");

    let rows = thread::scope(|scope| {
        let looks = scope.spawn(|| top(&server, &[]));
        while !looks.is_finished() {
            client.int("LIMITER.ACQUIRE full d 2 45");
        }
        looks.join().expect("the table")
    });
    assert_eq!(rows[0][..3], ["prefix", "held", "waiting"]);
    assert_eq!(rows[0][5], "denied/s");
    assert_eq!(rows[1][..3], ["full", "2", "1"]);
    assert!(rows[1][3].ends_with('s'), "the next lapse: {rows:?}");
    assert!(rows[1][5].parse::<f64>().expect("a rate") > 0.0, "{rows:?}");
    assert_eq!(rows[2][..3], ["calm", "1", "0"]);
    assert_eq!(rows[2][5], "0.0");
    assert_eq!(rows.len(), 3, "{rows:?}");

    let rows = top(&server, &["PREFIXES=scores text"]);
    assert_eq!(rows[1][..3], ["scores", "0", "0"]);
    assert!(rows[2][0].starts_with("text: WRONGTYPE"), "{rows:?}");
    assert_eq!(rows.len(), 3, "{rows:?}");
}

#[test]
fn a_server_without_the_module_or_none_at_all_is_said_so() {
    python();
    let server = Server::start_bare(&[]);
    let port = format!("PORT={}", server.port);
    let output = make(&["top", &port]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("is the module loaded"), "{said}");
    drop(server);
    let output = make(&["top", &port]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("Connection refused"), "{said}");
    assert!(!said.contains("Traceback"), "{said}");
}
