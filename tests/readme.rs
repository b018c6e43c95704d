//! The README's redis-cli session, typed into a real redis-cli: it shows what the README shows.

mod harness;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use harness::{wait_until, Server};

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

/// The blocks of this kind in the README.
fn blocks(kind: &str) -> Vec<&'static str> {
    let start = format!("```{kind}\n");
    let rests = include_str!("../README.md").split(&start).skip(1);
    let blocks: Vec<&str> = rests.map(|rest| rest.split("```").next().expect("its end")).collect();
    assert!(!blocks.is_empty());
    blocks
}

#[test]
fn the_sessions_are_true() {
    for session in blocks("redis-cli") {
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

/// A redis-cli that somebody types into.
struct Terminal {
    process: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Terminal {
    fn open(server: &Server) -> Self {
        let mut process = Command::new("redis-cli")
            .args(["-p", &server.port.to_string(), "--no-raw"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("redis-cli");
        let stdin = process.stdin.take().expect("its input");
        let stdout = BufReader::new(process.stdout.take().expect("its output"));
        Self { process, stdin, stdout }
    }

    fn shows(&mut self, line: &str) {
        let mut shown = String::new();
        self.stdout.read_line(&mut shown).expect("a line");
        assert_eq!(without_times(&shown), without_times(line));
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn the_sessions_of_two_terminals_are_true() {
    for session in blocks("two-terminals") {
        let server = Server::start();
        let mut terminals = [Terminal::open(&server), Terminal::open(&server)];
        let mut speaks = 0;
        for line in session.lines() {
            let (who, rest) = line.split_at(1);
            match (who, rest.get(..2)) {
                ("A" | "B", Some("> ")) => {
                    speaks = usize::from(who == "B");
                    writeln!(terminals[speaks].stdin, "{}", &rest[2..]).expect("to type");
                }
                ("A" | "B", Some(": ")) => {
                    let terminal = &mut terminals[usize::from(who == "B")];
                    match &rest[2..] {
                        "Ctrl-C" => terminal.process.kill().expect("to end it"),
                        shown => terminal.shows(shown),
                    }
                }
                _ if line == "(waits)" => wait_until("it waits", || server.blocked() == 1),
                _ => terminals[speaks].shows(line),
            }
        }
    }
}
