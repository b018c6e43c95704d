//! Numbers as clients write them: ASCII digits, with a fraction where decimals are allowed.
//! No sign, exponent, space, hex, inf or nan. Nothing is rounded on the way, and nothing
//! overflows.

use crate::limiter;

/// An integer from 0 to 2^63-1.
pub fn integer(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    digits(text).filter(|value| i64::try_from(*value).is_ok())
}

/// A decimal number of seconds (`10`, `0.25`, `.5`) as milliseconds, rounded up.
pub fn seconds_as_ms(text: &[u8]) -> Option<i64> {
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        None => (text, None),
        Some(point) => (text.get(..point)?, Some(text.get(point.checked_add(1)?..)?)),
    };
    // A point wants digits after it, a number without one wants digits at all.
    if fraction.unwrap_or(whole).is_empty() {
        return None;
    }
    let whole_ms = digits(whole)?.checked_mul(1000)?;
    let fraction_ms = fraction_as_ms(fraction.unwrap_or_default())?;
    i64::try_from(whole_ms.checked_add(fraction_ms)?).ok()
}

/// A ttl in seconds, greater than 0, as milliseconds; its end from now on must be one that a score
/// can tell.
pub fn ttl_ms(text: &[u8], now_ms: i64) -> Option<i64> {
    let ttl_ms = seconds_as_ms(text)?;
    limiter::lapse_after(now_ms, ttl_ms).map(|_| ttl_ms)
}

/// How long somebody waits.
#[derive(Debug, PartialEq, Eq)]
pub enum Timeout {
    /// Without end.
    Never,
    /// Until this time.
    At(i64),
    /// A number below 0.
    Negative,
    /// No number, or too large a one.
    Invalid,
}

/// A timeout in seconds; 0 is without end.
pub fn timeout(text: &[u8], now_ms: i64) -> Timeout {
    if let Some(number) = text.strip_prefix(b"-") {
        return seconds_as_ms(number).map_or(Timeout::Invalid, |_| Timeout::Negative);
    }
    match seconds_as_ms(text) {
        Some(0) => Timeout::Never,
        Some(ms) => now_ms.checked_add(ms).map_or(Timeout::Invalid, Timeout::At),
        None => Timeout::Invalid,
    }
}

fn digits(text: &[u8]) -> Option<u64> {
    text.iter().try_fold(0_u64, |value, byte| value.checked_mul(10)?.checked_add(digit(*byte)?))
}

/// The digits after the point, in milliseconds, rounded up.
fn fraction_as_ms(text: &[u8]) -> Option<u64> {
    let mut ms: u64 = 0;
    let mut place: u64 = 100;
    let mut rest = false;
    for byte in text {
        let digit = digit(*byte)?;
        rest |= place == 0 && digit > 0;
        ms = ms.checked_add(digit.checked_mul(place)?)?;
        place /= 10;
    }
    ms.checked_add(u64::from(rest))
}

fn digit(byte: u8) -> Option<u64> {
    char::from(byte).to_digit(10).map(u64::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn integers() {
        for (text, value) in [
            ("0", Some(0)),
            ("007", Some(7)),
            ("9223372036854775807", Some(i64::MAX as u64)),
            ("9223372036854775808", None),
            ("18446744073709551616", None),
            ("", None),
            ("-1", None),
            ("+1", None),
            (" 1", None),
            ("1 ", None),
            ("1.0", None),
            ("1e3", None),
            ("0x10", None),
            ("inf", None),
            ("١", None),
            ("1\0", None),
        ] {
            assert_eq!(integer(text.as_bytes()), value, "{text:?}");
        }
    }

    #[test]
    fn seconds() {
        for (text, ms) in [
            ("0", Some(0)),
            ("10", Some(10_000)),
            ("0.25", Some(250)),
            (".5", Some(500)),
            ("1.0001", Some(1_001)),
            ("0.0000000000000000000000000000000000001", Some(1)),
            ("1.000000000000000000000000000000000000", Some(1_000)),
            ("9223372036854775.807", Some(i64::MAX)),
            ("9223372036854775.8070001", None),
            ("99999999999999999999", None),
            ("", None),
            (".", None),
            ("1.", None),
            ("1.2.3", None),
            ("-1", None),
            ("-0", None),
            ("+1", None),
            ("1e3", None),
            ("1,5", None),
            ("nan", None),
            ("inf", None),
            ("infinity", None),
            ("0x1p3", None),
            (" 1", None),
        ] {
            assert_eq!(seconds_as_ms(text.as_bytes()), ms, "{text:?}");
        }
    }

    #[test]
    fn ttls() {
        let last = limiter::LAST_LAPSE_MS;
        for (text, now_ms, ms) in [
            ("10", 1_000, Some(10_000)),
            ("0.0001", 1_000, Some(1)),
            ("0", 1_000, None),
            ("0.000", 1_000, None),
            ("-1", 1_000, None),
            ("", 1_000, None),
            ("0.001", last - 1, Some(1)),
            ("0.0010001", last - 1, None),
            ("9223372036854775.807", 1_000, None),
        ] {
            assert_eq!(ttl_ms(text.as_bytes(), now_ms), ms, "{text:?}");
        }
    }

    #[test]
    fn timeouts() {
        for (text, parsed) in [
            ("0", Timeout::Never),
            ("0.0", Timeout::Never),
            ("0.0001", Timeout::At(1_001)),
            ("1.5", Timeout::At(2_500)),
            ("-1", Timeout::Negative),
            ("-0.5", Timeout::Negative),
            ("--1", Timeout::Invalid),
            ("-x", Timeout::Invalid),
            ("nan", Timeout::Invalid),
            ("inf", Timeout::Invalid),
            ("", Timeout::Invalid),
            ("9223372036854775.807", Timeout::Invalid),
            ("9223372036854774.807", Timeout::At(i64::MAX)),
        ] {
            assert_eq!(timeout(text.as_bytes(), 1_000), parsed, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn milliseconds_come_back(ms in 0..i64::MAX) {
            let text = format!("{}.{:03}", ms / 1000, ms % 1000);
            prop_assert_eq!(seconds_as_ms(text.as_bytes()), Some(ms));
        }

        #[test]
        fn whatever_is_finer_rounds_up(ms in 0..i64::MAX - 1, finer in "[0-9]{0,30}[1-9][0-9]{0,30}") {
            let text = format!("{}.{:03}{finer}", ms / 1000, ms % 1000);
            prop_assert_eq!(seconds_as_ms(text.as_bytes()), Some(ms + 1));
        }

        #[test]
        fn any_bytes_are_taken_or_refused(bytes: Vec<u8>) {
            let plain = !bytes.is_empty() && bytes.iter().all(u8::is_ascii_digit);
            prop_assert!(plain || integer(&bytes).is_none());
            let _ = seconds_as_ms(&bytes);
        }
    }
}
