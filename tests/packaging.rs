//! `make install` and `make dist` with the library that these tests are about: what they put where
//! is what a server loads.

mod harness;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use harness::{module, Server};
use redis::Value;
use tempfile::TempDir;

/// Runs make with our library, and without what an outer make has handed down.
fn make(args: &[String]) -> Output {
    let output = Command::new("make")
        .args(["--no-print-directory", &format!("LIBRARY={}", module().display())])
        .args(args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL")
        .env_remove("DESTDIR")
        .env_remove("PREFIX")
        .output()
        .expect("make");
    assert!(output.status.success(), "make {args:?}: {output:?}");
    output
}

/// Starts a server on this library, and takes a slot.
fn a_server_runs_on(library: &Path) -> Server {
    let server = Server::start_bare(&["--loadmodule", library.to_str().expect("UTF-8")]);
    assert_eq!(server.client().int("LIMITER.ACQUIRE p k 1 45"), 1);
    server
}

fn mode(file: &Path) -> u32 {
    fs::metadata(file).expect("the file").permissions().mode() & 0o777
}

/// The library's name on this system.
fn library_name() -> &'static str {
    module().file_name().expect("a name").to_str().expect("UTF-8")
}

#[test]
fn install_puts_the_library_where_servers_look() {
    let folder = TempDir::new().expect("a temporary folder");
    let destination = format!("DESTDIR={}", folder.path().display());
    for (prefix, under) in [(None, "usr/local"), (Some("/opt/redis"), "opt/redis")] {
        let prefix = prefix.map(|prefix| format!("PREFIX={prefix}"));
        make(&[vec!["install".into(), destination.clone()], prefix.into_iter().collect()].concat());
        let installed = folder.path().join(under).join("lib/redis/modules").join(library_name());
        assert_eq!(mode(&installed), 0o755, "a server refuses what it may not execute");
        assert_eq!(fs::read(&installed).unwrap(), fs::read(module()).unwrap());
        a_server_runs_on(&installed);
    }
}

#[test]
fn installing_over_a_library_leaves_the_server_that_runs_on_it_alone() {
    let folder = TempDir::new().expect("a temporary folder");
    let install = ["install".into(), format!("DESTDIR={}", folder.path().display())];
    make(&install);
    let installed = folder.path().join("usr/local/lib/redis/modules").join(library_name());
    let server = a_server_runs_on(&installed);
    let old = fs::File::open(&installed).expect("the library");
    make(&install);
    // The server maps the old file: written over, it would run on other code in mid-flight.
    let (old, new) = (old.metadata().unwrap(), fs::metadata(&installed).unwrap());
    assert_ne!(inode(&old), inode(&new), "the file was written over");
    assert_eq!(server.client().int("LIMITER.RELEASE p k"), 1);
    assert_eq!(server.client().call("MODULE UNLOAD limiter"), Value::Okay);
}

fn inode(metadata: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

/// Whether all checksums of the folder's SHA256SUMS are right.
fn sums_are_right(folder: &Path) -> bool {
    let program = if cfg!(target_os = "macos") { "shasum" } else { "sha256sum" };
    let mut check = Command::new(program);
    check.args(["-c", "SHA256SUMS"]).current_dir(folder);
    check.output().expect(program).status.success()
}

fn files(folder: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string();
    let mut files: Vec<String> =
        fs::read_dir(folder).unwrap().map(|entry| name(entry).unwrap()).collect();
    files.sort();
    files
}

#[test]
fn dist_packs_what_a_server_needs_with_right_checksums() {
    let folder = TempDir::new().expect("a temporary folder");
    let dist = folder.path().join("dist");
    make(&["dist".into(), format!("DIST={}", dist.display())]);
    let system = if cfg!(target_os = "macos") { "darwin" } else { std::env::consts::OS };
    let archive = files(&dist).into_iter().find(|file| file.ends_with(".tar.gz")).expect("it");
    let start = format!("redis-limiter-{}-{system}-", env!("CARGO_PKG_VERSION"));
    assert!(archive.starts_with(&start), "{archive}");
    assert_eq!(files(&dist), ["SHA256SUMS", &archive]);
    assert!(sums_are_right(&dist));

    let mut unpack = Command::new("tar");
    unpack.arg("-xzf").arg(dist.join(&archive)).arg("-C").arg(folder.path());
    assert!(unpack.status().expect("tar").success());
    let unpacked = folder.path().join(archive.trim_end_matches(".tar.gz"));
    let mut expected = [
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "SHA256SUMS",
        library_name(),
        "redis.conf.example",
    ];
    expected.sort_unstable();
    assert_eq!(files(&unpacked), expected);
    assert!(sums_are_right(&unpacked));

    // The example names the library as it lies in the archive.
    let example = fs::read_to_string(unpacked.join("redis.conf.example")).unwrap();
    let library = example.lines().find_map(|line| line.strip_prefix("loadmodule ")).expect("it");
    let library: PathBuf = unpacked.join(library);
    assert_eq!(mode(&library), 0o755);
    a_server_runs_on(&library);

    fs::write(unpacked.join("LICENSE"), "another").unwrap();
    assert!(!sums_are_right(&unpacked), "the sums tell a file that was changed");
}
