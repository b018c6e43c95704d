//! Numbers in arguments, against the same grammar read from the text as a whole.

#![no_main]

use libfuzzer_sys::fuzz_target;
use redis_limiter_fuzz::limiter::LAST_LAPSE_MS;
use redis_limiter_fuzz::parse::{integer, seconds_as_ms, timeout, ttl_ms, Timeout};

/// Digits, as a number; `None` if it is one of more digits than matter.
fn number(digits: &str) -> Option<i64> {
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        Some(0)
    } else {
        digits.parse().ok()
    }
}

fn is_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

fn expected_integer(text: &str) -> Option<i64> {
    (!text.is_empty() && is_digits(text)).then(|| number(text)).flatten()
}

fn expected_ms(text: &str) -> Option<i64> {
    let (whole, fraction) = match text.split_once('.') {
        None if text.is_empty() => return None,
        None => (text, "0"),
        Some((_, "")) => return None,
        Some(parts) => parts,
    };
    if !is_digits(whole) || !is_digits(fraction) {
        return None;
    }
    let padded = format!("{fraction:0<3}");
    let (ms, finer) = padded.split_at(3);
    let rounds_up = finer.bytes().any(|digit| digit != b'0');
    number(&format!("{whole}{ms}"))?.checked_add(i64::from(rounds_up))
}

fuzz_target!(|input: (i64, &[u8])| {
    let (now_ms, bytes) = input;
    let now_ms = now_ms.rem_euclid(LAST_LAPSE_MS);
    // What is no text is no number: nothing in it counts as a digit.
    let text = String::from_utf8_lossy(bytes);
    assert_eq!(integer(bytes), expected_integer(&text).map(|value| value as u64));
    let ms = expected_ms(&text);
    assert_eq!(seconds_as_ms(bytes), ms);
    let fits = |ms: &i64| *ms > 0 && *ms <= LAST_LAPSE_MS - now_ms;
    assert_eq!(ttl_ms(bytes, now_ms), ms.filter(fits));
    let expected = match (text.strip_prefix('-').map(expected_ms), ms) {
        (Some(Some(_)), _) => Timeout::Negative,
        (Some(None), _) | (None, None) => Timeout::Invalid,
        (None, Some(0)) => Timeout::Never,
        (None, Some(ms)) => now_ms.checked_add(ms).map_or(Timeout::Invalid, Timeout::At),
    };
    assert_eq!(timeout(bytes, now_ms), expected);
});
