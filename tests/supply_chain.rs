//! What the library is made of is what the documents say: its dependencies, its `unsafe` code, and
//! that every build goes by the lock file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use proc_macro2::{Delimiter, TokenStream, TokenTree};

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The cells of a Markdown document's table rows, below the heading.
fn rows<'d>(document: &'d str, heading: &str) -> Vec<Vec<&'d str>> {
    let section = document.split_once(heading).unwrap_or_else(|| panic!("no {heading}")).1;
    let section = section.split("\n## ").next().expect("it");
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

/// The crates that Cargo resolves along these edges, but for our own.
fn resolved(edges: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--prefix", "none", "--format", "{p}", "--edges", edges])
        .args(["--target", "x86_64-unknown-linux-gnu"]) // The same list wherever this runs.
        .current_dir(project())
        .output()
        .expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).expect("UTF-8");
    let names = names.lines().filter_map(|line| line.split(' ').next());
    names.filter(|name| *name != env!("CARGO_PKG_NAME")).map(String::from).collect()
}

#[test]
fn every_dependency_of_the_library_is_listed_with_its_reason() {
    let document = include_str!("../docs/dependencies.md");
    let linked = resolved("normal,no-proc-macro");
    let all = resolved("normal,build");
    let run = all.difference(&linked).cloned().collect();
    for (heading, expected) in [("## Linked into it", linked), ("## Run while it is built", run)] {
        let mut listed = BTreeSet::new();
        for row in rows(document, heading) {
            let [name, asked_for_by, reason] = row[..] else { panic!("{row:?}") };
            assert!(!asked_for_by.is_empty() && !reason.is_empty(), "{name} has no reason");
            assert!(listed.insert(name.trim_matches('`').to_string()), "{name} twice");
        }
        assert!(!expected.is_empty());
        let missing: Vec<_> = expected.difference(&listed).collect();
        let too_many: Vec<_> = listed.difference(&expected).collect();
        assert!(
            missing.is_empty() && too_many.is_empty(),
            "docs/dependencies.md, {heading}: {missing:?} missing, {too_many:?} too many"
        );
    }
}

/// The `unsafe` of a file: blocks, and functions that only the server or their callers make safe.
#[derive(Debug, Default, PartialEq, Eq)]
struct Unsafe {
    blocks: usize,
    functions: usize,
}

impl Unsafe {
    /// Counts in all that the compiler sees: not in comments and texts, but in macros.
    fn count(&mut self, tokens: TokenStream) {
        let mut tokens = tokens.into_iter().peekable();
        while let Some(token) = tokens.next() {
            match token {
                TokenTree::Group(group) => self.count(group.stream()),
                TokenTree::Ident(word) if word == "unsafe" => match tokens.peek() {
                    Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
                        self.blocks += 1;
                    }
                    Some(TokenTree::Ident(next)) if next == "fn" || next == "extern" => {
                        self.functions += 1;
                    }
                    other => panic!("another kind of unsafe: before {other:?}"),
                },
                _ => {}
            }
        }
    }
}

/// All Rust files below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder");
    let paths = entries.map(|entry| entry.expect("a file").path());
    paths.flat_map(|path| if path.is_dir() { sources(&path) } else { vec![path] }).collect()
}

#[test]
fn unsafe_is_in_the_folder_ffi_alone_and_counted() {
    let mut counted = BTreeMap::new();
    for path in sources(&project().join("src")) {
        let text = fs::read_to_string(&path).expect("a source file");
        let name = path.strip_prefix(project()).expect("below it").display().to_string();
        // Denied once and let through once, both in lib.rs.
        let lints = text.matches("(unsafe_code)").count();
        assert_eq!(lints, if name == "src/lib.rs" { 2 } else { 0 }, "{name}");
        let mut found = Unsafe::default();
        found.count(text.parse().expect("Rust"));
        if found != Unsafe::default() {
            counted.insert(name, found);
        }
    }
    let lib = include_str!("../src/lib.rs");
    assert!(lib.contains("#![deny(unsafe_code)]"));
    assert!(lib.contains("#[allow(unsafe_code)]\nmod ffi;\n"));
    assert!(counted.keys().all(|name| name.starts_with("src/ffi/")), "{counted:?}");

    let document = include_str!("../SECURITY.md");
    let number = |cell: &str| cell.parse::<usize>().unwrap_or_else(|_| panic!("{cell:?}"));
    let listed: BTreeMap<String, Unsafe> = rows(document, "## Unsafe code")
        .iter()
        .map(|row| {
            let [name, blocks, functions, _] = row[..] else { panic!("{row:?}") };
            let found = Unsafe { blocks: number(blocks), functions: number(functions) };
            (name.trim_matches('`').to_string(), found)
        })
        .collect();
    let differ = |found: &(&String, &Unsafe)| listed.get(found.0) != Some(found.1);
    let differ: Vec<_> = counted.iter().filter(differ).collect();
    assert!(differ.is_empty(), "SECURITY.md counts otherwise. In the code: {differ:#?}");
    assert_eq!(listed.len(), counted.len(), "SECURITY.md counts files that have none");
    let total: usize = counted.values().map(|found| found.blocks).sum();
    let shown = format!("{total} blocks");
    assert!(document.contains(&shown), "SECURITY.md does not say \"{shown}\"");
}

/// Whether this line of a shell script or a Makefile has Cargo go by dependencies.
fn resolves(line: &str) -> bool {
    let words = ["build", "test", "bench", "clippy", "run", "install", "tree", "deny"];
    let command = line.split_once('#').map_or(line, |(command, _)| command);
    words.iter().any(|word| command.contains(&format!("cargo {word}")))
}

#[test]
fn every_build_goes_by_the_lock_file() {
    let mut checked = 0;
    let scripts = sources(&project().join("scripts"));
    let others = ["Makefile", ".ci/run"].map(|name| project().join(name));
    for path in scripts.into_iter().chain(others) {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for line in text.lines().filter(|line| resolves(line)) {
            assert!(line.contains("--locked"), "{}: {line}", path.display());
            checked += 1;
        }
    }
    for path in [sources(&project().join("tests")), sources(&project().join("benches"))].concat() {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for call in text.split("env!(\"CARGO\")").skip(1) {
            let call: String = call.chars().take(200).collect();
            assert!(call.contains("--locked"), "{}: {call}", path.display());
            checked += 1;
        }
    }
    assert!(checked > 5, "{checked} places");
}
