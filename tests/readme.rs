//! The README's redis-cli session, typed into a real redis-cli: it shows what the README shows.

mod harness;

use std::process::Command;

use harness::Server;

/// The text with every time (a run of four digits or more, with a fraction or not) as `<time>`:
/// times differ from run to run.
fn without_times(text: &str) -> String {
    let mut out = String::new();
    let mut number = String::new();
    for character in text.chars().chain(['\n']) {
        if character.is_ascii_digit() || (character == '.' && !number.is_empty()) {
            number.push(character);
            continue;
        }
        out.push_str(if number.len() >= 4 { "<time>" } else { &number });
        number.clear();
        out.push(character);
    }
    out.trim_end().to_string()
}

#[test]
fn the_sessions_are_true() {
    let readme = include_str!("../README.md");
    let sessions: Vec<&str> = readme
        .split("```redis-cli\n")
        .skip(1)
        .map(|rest| rest.split("```").next().expect("its end"))
        .collect();
    assert!(!sessions.is_empty());
    for session in sessions {
        let server = Server::start();
        let mut typed = 0;
        for step in session.split("> ").skip(1) {
            let (command, shown) = step.split_once('\n').expect("a reply");
            let output = Command::new("redis-cli")
                .args(["-p", &server.port.to_string(), "--no-raw"])
                .args(command.split_whitespace())
                .output()
                .expect("redis-cli");
            let reply = String::from_utf8_lossy(&output.stdout).into_owned();
            assert_eq!(without_times(&reply), without_times(shown), "> {command}");
            typed += 1;
        }
        assert!(typed > 3);
    }
}
