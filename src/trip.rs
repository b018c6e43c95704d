//! Where tests make the module panic, to see that nothing worse than an error comes of it.
//!
//! In every build but that of `tests/boundary.rs` there is nothing here.

/// Panics, once, if there is a file of this name in the server's folder.
#[cfg(feature = "panic-hook")]
#[expect(clippy::panic)]
pub fn trip(point: &str) {
    let file = format!("panic-at-{point}");
    if std::fs::remove_file(&file).is_ok() {
        panic!("{file}");
    }
}

/// Does nothing.
#[cfg(not(feature = "panic-hook"))]
#[inline(always)]
pub fn trip(_point: &str) {}
