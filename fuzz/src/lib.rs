//! The pure files of the module, and the models they are tested against, for the fuzz targets. The
//! module itself is a library for servers only, so its files are taken in one by one, under the
//! names they know each other by.

#![allow(dead_code)] // Each is used in part.

#[path = "../../src/counters.rs"]
pub mod counters;
#[path = "../../src/limiter.rs"]
pub mod limiter;
#[path = "../../src/commands/parse.rs"]
pub mod parse;
#[path = "../../src/queue.rs"]
pub mod queue;

use libfuzzer_sys::arbitrary::{Result, Unstructured};

/// The steps that the bytes spell, until there are no more.
pub fn steps<S>(bytes: &[u8], step: impl Fn(&mut Unstructured<'_>) -> Result<S>) -> Vec<S> {
    let mut bytes = Unstructured::new(bytes);
    let mut steps = Vec::new();
    while !bytes.is_empty() && steps.len() < 200 {
        steps.extend(step(&mut bytes));
    }
    steps
}
