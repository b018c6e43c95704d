//! The lines of waiters, against the model of their own tests.

#![no_main]

use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use redis_limiter_fuzz::queue::tests::{run, Step};
use redis_limiter_fuzz::steps;

fn step(bytes: &mut Unstructured<'_>) -> Result<Step> {
    let (db, prefix) = (bytes.int_in_range(0..=1)?, bytes.int_in_range(0..=2)?);
    let later_ms = |bytes: &mut Unstructured<'_>| {
        bool::arbitrary(bytes)?.then(|| bytes.int_in_range(0..=99)).transpose()
    };
    Ok(match bytes.int_in_range(0..=7)? {
        0 => Step::Join { db, prefix, deadline_ms: later_ms(bytes)? },
        1 => Step::Leave { nth: bytes.int_in_range(0..=255)? },
        2 => Step::Grant { nth_line: bytes.int_in_range(0..=5)? },
        3 => Step::Touch { db, prefix },
        4 => Step::TouchDatabase { db: bool::arbitrary(bytes)?.then_some(db) },
        5 => Step::SetAlarm { nth_line: bytes.int_in_range(0..=5)?, alarm_ms: later_ms(bytes)? },
        6 => Step::TimePasses { ms: bytes.int_in_range(0..=19)? },
        _ => Step::TakeDue,
    })
}

fuzz_target!(|bytes: &[u8]| run(steps(bytes, step)));
