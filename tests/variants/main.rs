//! Broken variants of the module, kept: each breaks one rule of it in the source, and names the
//! test that must fail then. The list is in `table.rs`.
//!
//! `make variants` applies one after the other to a copy of the project below `target/`, builds it,
//! and runs the one test (VARIANT=word: only those whose name has the word). Before, the same tests
//! must all pass on the copy as it is, so that each failure is the variant's doing. The quick test
//! here sees that no variant has gone stale.

#[path = "../harness/mod.rs"]
mod harness;
mod table;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use table::{Change, Variant, VARIANTS};

/// How long one test may take, with what it has to build first.
const PATIENCE: Duration = Duration::from_secs(600);

/// Where in the text `old` is, however it is wrapped.
fn places(text: &str, old: &str) -> Vec<(usize, usize)> {
    let mut words = old.split_whitespace();
    let first = words.next().expect("something to replace");
    let end_from = |start: usize| {
        let mut rest = &text[start + first.len()..];
        for word in words.clone() {
            rest = rest.trim_start().strip_prefix(word)?;
        }
        Some(text.len() - rest.len())
    };
    text.match_indices(first).filter_map(|(start, _)| Some((start, end_from(start)?))).collect()
}

/// The text with the change.
fn changed(text: &str, change: &Change) -> String {
    let Change { file, old, new } = change;
    let places = places(text, old);
    let [(start, end)] = places[..] else {
        panic!("{file} has {} places that read: {old}", places.len())
    };
    [&text[..start], new, &text[end..]].concat()
}

#[test]
fn every_variant_still_applies_and_its_test_exists() {
    let project = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names = BTreeSet::new();
    for Variant { name, changes, caught_by } in VARIANTS {
        assert!(names.insert(name), "{name}: twice");
        assert!(!changes.is_empty(), "{name}");
        for change in *changes {
            let text = fs::read_to_string(project.join(change.file)).expect("a source file");
            assert_ne!(changed(&text, change), text, "{name}");
        }
        assert!(harness::is_test(caught_by), "{name}: there is no test {caught_by}");
    }
}

/// A copy of the project.
struct Copy {
    folder: PathBuf,
}

/// What became of a test.
#[derive(Debug, PartialEq)]
enum Outcome {
    Passed,
    Failed,
    /// It did not come to that: the copy does not build, the test is not there, or never ends.
    NotRun,
}

impl Copy {
    fn new() -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("variants");
        let _ = fs::remove_dir_all(folder.join("project"));
        copy(Path::new(env!("CARGO_MANIFEST_DIR")), &folder.join("project"));
        Self { folder }
    }

    /// The copy is broken as long as `work` works.
    fn with<R>(&self, changes: &[Change], work: impl FnOnce() -> R) -> R {
        let mut before = Vec::new();
        for change in changes {
            let path = self.folder.join("project").join(change.file);
            let text = fs::read_to_string(&path).expect("a source file");
            fs::write(&path, changed(&text, change)).expect("to change it");
            before.push((path, text));
        }
        let result = work();
        for (path, text) in before.into_iter().rev() {
            fs::write(path, text).expect("to change it back");
        }
        result
    }

    fn run(&self, test: &str) -> Outcome {
        let (file, name) = test.split_once("::").expect("file::name");
        let which: &[&str] = if file == "lib" { &["--lib"] } else { &["--test", file] };
        if self.cargo(&[&["build", "--lib"]]) != Some(true)
            || self.cargo(&[&["test", "--no-run"], which]) != Some(true)
        {
            return Outcome::NotRun;
        }
        let ended = self.cargo(&[&["test"], which, &["--", "--exact", name]]);
        let said = self.said();
        let was_run = said.contains("\nrunning 1 test\n");
        let failed = said.contains("\ntest result: FAILED. 0 passed; 1 failed;");
        match (was_run, ended) {
            (true, Some(true)) => Outcome::Passed,
            (true, Some(false)) if failed => Outcome::Failed,
            _ => Outcome::NotRun,
        }
    }

    /// Whether it succeeded; `None` if it did not end.
    fn cargo(&self, args: &[&[&str]]) -> Option<bool> {
        let said = File::create(self.folder.join("log")).expect("a log");
        let args = args.concat();
        let mut process = Command::new(env!("CARGO"))
            .arg(args[0])
            .arg("--locked")
            .args(&args[1..])
            .current_dir(self.folder.join("project"))
            .env("CARGO_TARGET_DIR", self.folder.join("target"))
            .env("CARGO_TERM_COLOR", "never")
            .stdin(Stdio::null())
            .stdout(said.try_clone().expect("a second handle"))
            .stderr(said)
            .process_group(0)
            .spawn()
            .expect("cargo");
        let give_up = Instant::now() + PATIENCE;
        while Instant::now() < give_up {
            if let Some(status) = process.try_wait().expect("to wait for cargo") {
                return Some(status.success());
            }
            thread::sleep(Duration::from_millis(20));
        }
        // With the servers that it has started.
        let group = format!("-{}", process.id());
        let _ = Command::new("kill").args(["-KILL", "--", &group]).status();
        let _ = process.wait();
        None
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }
}

/// Copies what the tests need: all but what is hidden, and what was built.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder");
    for entry in fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("a file");
        let (name, kind) = (entry.file_name(), entry.file_type().expect("its type"));
        let is_left_out = name.to_string_lossy().starts_with('.')
            || ["target", "dist", "node_modules"].map(OsStr::new).contains(&&*name);
        if is_left_out {
            continue;
        }
        if kind.is_dir() {
            copy(&entry.path(), &to.join(name));
        } else if kind.is_file() {
            fs::copy(entry.path(), to.join(name)).expect("to copy a file");
        }
    }
}

#[test]
#[ignore = "takes many minutes: make variants"]
fn every_variant_is_caught() {
    let word = std::env::var("VARIANT").unwrap_or_default();
    let chosen: Vec<&Variant> = VARIANTS.iter().filter(|one| one.name.contains(&word)).collect();
    assert!(!chosen.is_empty(), "no variant has {word:?} in its name");
    let copy = Copy::new();
    let started = Instant::now();
    let tests: BTreeSet<&str> = chosen.iter().map(|variant| variant.caught_by).collect();
    for test in &tests {
        let outcome = copy.run(test);
        assert_eq!(outcome, Outcome::Passed, "{test}, with nothing broken:\n{}", copy.said());
    }
    println!("{} tests pass as it is, {:.0?}", tests.len(), started.elapsed());

    let mut not_caught = Vec::new();
    for Variant { name, changes, caught_by } in &chosen {
        let started = Instant::now();
        let outcome = copy.with(changes, || copy.run(caught_by));
        let verdict = match outcome {
            Outcome::Failed => "caught",
            Outcome::Passed => "NOT CAUGHT",
            Outcome::NotRun => "NOT RUN",
        };
        println!("{verdict:10} {:5.1?} s  {name}  {caught_by}", started.elapsed().as_secs_f32());
        if outcome != Outcome::Failed {
            let said = if outcome == Outcome::NotRun { copy.said() } else { String::new() };
            not_caught.push(format!("{name}: {outcome:?}, {caught_by}\n{said}"));
        }
    }
    let caught = chosen.len() - not_caught.len();
    println!("{caught} of {} variants caught, {:.0?}", chosen.len(), started.elapsed());
    assert!(not_caught.is_empty(), "{}", not_caught.join("\n"));
}
