//! The rules of leases, against the model of their own tests.

#![no_main]

use libfuzzer_sys::arbitrary::{Arbitrary, Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use redis_limiter_fuzz::limiter::tests::{check, Step, START_MS};
use redis_limiter_fuzz::limiter::EXPIRY_SLACK_MAX_MS;
use redis_limiter_fuzz::steps;

fn ms(bytes: &mut Unstructured<'_>) -> Result<i64> {
    let longest = *bytes.choose(&[50, 30_000, 3 * EXPIRY_SLACK_MAX_MS])?;
    bytes.int_in_range(1..=longest)
}

/// Any score but nan, which the server refuses; often one that is near.
fn score(bytes: &mut Unstructured<'_>) -> Result<f64> {
    if bool::arbitrary(bytes)? {
        return Ok((START_MS - 1_000 + ms(bytes)?) as f64 / 1000.0);
    }
    let score = f64::arbitrary(bytes)?;
    Ok(if score.is_nan() { f64::INFINITY } else { score })
}

fn step(bytes: &mut Unstructured<'_>) -> Result<Step> {
    let key = bytes.int_in_range(0..=7)?;
    Ok(match bytes.int_in_range(0..=9)? {
        0..3 => {
            let limit = *bytes.choose(&[0, 1, 2, 3, 4, 5, i64::MAX as u64])?;
            Step::Acquire { key, limit, ttl_ms: ms(bytes)?, nx: bool::arbitrary(bytes)? }
        }
        3 => Step::Renew { key, ttl_ms: ms(bytes)? },
        4 => Step::Release { keys: vec![key, bytes.int_in_range(0..=7)?] },
        5 | 6 => Step::Wait { ms: ms(bytes)? },
        7 => Step::ForeignAdd { key, score: score(bytes)? },
        8 => Step::ForeignRemove { key },
        _ => {
            let expiry_ms = bool::arbitrary(bytes)?.then(|| ms(bytes)).transpose()?;
            Step::ForeignExpiry { expiry_ms: expiry_ms.map(|ms| START_MS + ms) }
        }
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let prune_step = u64::from(first % 3);
    check(steps(bytes, step), (prune_step > 0).then_some(prune_step));
});
