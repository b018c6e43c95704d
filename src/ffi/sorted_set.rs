//! A limiter's sorted set, through the server's direct sorted-set functions.
//!
//! Those functions change the data and nothing else. [`SortedSet`] adds what a plain command
//! would have done, so that each change is replicated (as the plain command with absolute times,
//! in the order of the changes), marks the key as modified, and sends its keyspace events. The
//! events go out when the set is closed, since whoever listens may change the key.

use std::ffi::CStr;
use std::marker::PhantomData;
use std::ptr::NonNull;

use redis_module::raw::{self, RedisModuleKey, RedisModuleString};

use super::context::{Context, OwnedStr, Str};
use super::events::anybody_listens;
use super::reply::CallReply;
use crate::limiter::{self, Found, Leases, Pruned, Put};
use crate::trip::trip;

/// Why a key could not be opened as a limiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotOpened {
    /// It holds a value of another type.
    WrongType,
    /// The server is paused or a replica, and an expired key may still be in its place.
    Frozen,
}

/// A limiter's set, opened to be read.
pub struct ReadSet<'c> {
    handle: NonNull<RedisModuleKey>,
    context: PhantomData<&'c Context>,
}

impl<'c> ReadSet<'c> {
    /// Opens the set named `prefix`; `None` if there is no such key.
    ///
    /// # Errors
    /// [`NotOpened::WrongType`].
    pub fn open(ctx: &'c Context, prefix: Str<'c>) -> Result<Option<Self>, NotOpened> {
        // SAFETY: the context and the name are valid during the call.
        let handle = unsafe {
            api!(RedisModule_OpenKey(ctx.as_ptr(), prefix.as_ptr(), raw::REDISMODULE_READ as i32))
        };
        let Some(handle) = NonNull::new(handle.cast()) else {
            return Ok(None);
        };
        let set = Self { handle, context: PhantomData };
        match set.key_type() {
            KeyType::SortedSet => Ok(Some(set)),
            KeyType::Empty => Ok(None),
            KeyType::Other => Err(NotOpened::WrongType),
        }
    }

    /// The number of leases in the set, lapsed ones too.
    #[must_use]
    pub fn count(&self) -> u64 {
        // SAFETY: the handle is open.
        unsafe { api!(RedisModule_ValueLength(self.handle.as_ptr())) as u64 }
    }

    /// Whether a lease has lapsed at `now_ms`.
    #[must_use]
    pub fn any_lapsed(&self, now_ms: i64) -> bool {
        self.seek(Scores::UpTo(limiter::score(now_ms)), End::First)
    }

    /// The first `count` leases that are live at `now_ms`, soonest to lapse first, with the time
    /// they have left in milliseconds, or `None` for one that never lapses.
    #[must_use]
    pub fn live(&self, now_ms: i64, count: u64) -> Vec<(OwnedStr, Option<i64>)> {
        let mut live = Vec::new();
        let mut more = count > 0 && self.seek(Scores::After(limiter::score(now_ms)), End::First);
        while more {
            let Some((key, score)) = self.current() else { break };
            live.push((key, limiter::lapse_ms(score).map(|ms| ms.saturating_sub(now_ms))));
            // SAFETY: the handle is open and a range is being walked.
            more = (live.len() as u64) < count
                && unsafe { api!(RedisModule_ZsetRangeNext(self.handle.as_ptr())) } == 1;
        }
        live
    }

    fn key_type(&self) -> KeyType {
        // SAFETY: the handle is open.
        match unsafe { api!(RedisModule_KeyType(self.handle.as_ptr())) } as isize {
            raw::REDISMODULE_KEYTYPE_EMPTY => KeyType::Empty,
            raw::REDISMODULE_KEYTYPE_ZSET => KeyType::SortedSet,
            _ => KeyType::Other,
        }
    }

    /// Moves the cursor to the first or last lease within `scores`; whether there is one.
    fn seek(&self, scores: Scores, end: End) -> bool {
        let (min, max, min_excluded) = match scores {
            Scores::All => (f64::NEG_INFINITY, f64::INFINITY, 0),
            Scores::UpTo(max) => (f64::NEG_INFINITY, max, 0),
            Scores::After(min) => (min, f64::INFINITY, 1),
        };
        let handle = self.handle.as_ptr();
        // SAFETY: the handle is open; on a key that is empty both calls only say so.
        unsafe {
            match end {
                End::First => {
                    api!(RedisModule_ZsetFirstInScoreRange(handle, min, max, min_excluded, 0))
                }
                End::Last => {
                    api!(RedisModule_ZsetLastInScoreRange(handle, min, max, min_excluded, 0))
                }
            };
            api!(RedisModule_ZsetRangeEndReached(handle)) == 0
        }
    }

    /// The key and score under the cursor.
    fn current(&self) -> Option<(OwnedStr, f64)> {
        let mut score = 0.0;
        // SAFETY: the handle is open; what comes back is ours to free.
        unsafe {
            let handle = self.handle.as_ptr();
            let key = api!(RedisModule_ZsetRangeCurrentElement(handle, &mut score));
            NonNull::new(key).map(|key| (OwnedStr::new(key), score))
        }
    }
}

impl Drop for ReadSet<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle is open, and closed once.
        unsafe { api!(RedisModule_CloseKey(self.handle.as_ptr())) }
    }
}

/// A limiter's set, opened to be changed. It may be empty: the server makes the key with the
/// first member and deletes it with the last.
pub struct SortedSet<'c> {
    // Declared first: closed before `events` tells anybody about the changes.
    set: ReadSet<'c>,
    ctx: &'c Context,
    prefix: Str<'c>,
    events: Events<'c>,
}

impl<'c> SortedSet<'c> {
    /// Opens the set named `prefix`.
    ///
    /// # Errors
    /// [`NotOpened`].
    pub fn open(ctx: &'c Context, prefix: Str<'c>) -> Result<Self, NotOpened> {
        let mode = (raw::REDISMODULE_READ | raw::REDISMODULE_WRITE) as i32;
        // SAFETY: the context and the name are valid during the call. Opened to be written, a
        // handle comes back also where there is no key.
        let set = unsafe {
            let handle = api!(RedisModule_OpenKey(ctx.as_ptr(), prefix.as_ptr(), mode));
            NonNull::new(handle.cast())
                .map(|handle| ReadSet { handle, context: PhantomData })
                .ok_or(NotOpened::Frozen)?
        };
        match set.key_type() {
            KeyType::Other => Err(NotOpened::WrongType),
            KeyType::Empty if ctx.data_is_frozen() => Err(NotOpened::Frozen),
            KeyType::Empty | KeyType::SortedSet => Ok(Self {
                set,
                ctx,
                prefix,
                events: Events { ctx, prefix, any: false, in_order: Vec::new() },
            }),
        }
    }

    fn handle(&self) -> *mut RedisModuleKey {
        self.set.handle.as_ptr()
    }

    /// Removes one member without telling anybody; whether it was there.
    fn remove_silently(&mut self, key: *mut RedisModuleString) -> bool {
        let mut removed = 0;
        // SAFETY: the handle is open for writing, the key a valid string.
        unsafe {
            api!(RedisModule_ZsetRem(self.handle(), key, &mut removed));
        }
        removed == 1
    }

    fn lapse_ms_at(&self, end: End) -> Option<i64> {
        if !self.set.seek(Scores::All, end) {
            return None;
        }
        self.set.current().and_then(|(_, score)| limiter::lapse_ms(score))
    }

    /// Whether `key` holds a lease that ends at just that time.
    #[must_use]
    pub fn holds_until(&self, key: Str<'_>, lapse_ms: i64) -> bool {
        self.score(key) == Some(limiter::score(lapse_ms))
    }

    fn score(&self, key: Str<'_>) -> Option<f64> {
        let mut score = 0.0;
        // SAFETY: the handle is open, the key a valid string.
        let status =
            unsafe { api!(RedisModule_ZsetScore(self.handle(), key.as_ptr(), &mut score)) };
        (status == raw::REDISMODULE_OK as i32).then_some(score)
    }

    /// Whether the set's own expiry may be reached before the command at hand is done, even if the
    /// machine stands still for a moment.
    fn may_expire(&self, now_ms: i64) -> bool {
        self.expiry_ms().is_some_and(|ms| ms <= now_ms.saturating_add(EXPIRY_MARGIN_MS))
    }

    fn replicate_zrem(&self, keys: &mut [*mut RedisModuleString]) {
        // SAFETY: "sv" takes a string and an array of strings with its length.
        unsafe {
            api!(RedisModule_Replicate(
                self.ctx.as_ptr(),
                c"ZREM".as_ptr(),
                c"sv".as_ptr(),
                self.prefix.as_ptr(),
                keys.as_mut_ptr(),
                keys.len()
            ));
        }
    }

    fn removed(&mut self, event: &'static CStr) {
        self.events.add(raw::REDISMODULE_NOTIFY_ZSET, event);
        if self.count() == 0 {
            self.events.add(raw::REDISMODULE_NOTIFY_GENERIC, event::DEL);
        }
    }
}

impl Leases for SortedSet<'_> {
    type Key<'k> = Str<'k>;

    fn prune(&mut self, now_ms: i64, at_most: u64) -> Pruned {
        let lapsed = Scores::UpTo(limiter::score(now_ms));
        let mut removed: Vec<OwnedStr> = Vec::new();
        let mut left = 0;
        while self.set.seek(lapsed, End::First) {
            if removed.len() as u64 == at_most && !self.may_expire(now_ms) {
                // The one call while a key is open: it reads, and the key does not expire under it.
                let live = count_after(self.ctx, self.prefix, now_ms);
                // If the server does not tell how many are left, none is left.
                left = live.map_or(0, |live| self.count().saturating_sub(live));
                if left > 0 {
                    break;
                }
            }
            let Some((key, _)) = self.set.current() else { break };
            if !self.remove_silently(key.as_ptr()) {
                break;
            }
            removed.push(key);
        }
        if left > 0 {
            let mut keys: Vec<_> = removed.iter().map(OwnedStr::as_ptr).collect();
            self.replicate_zrem(&mut keys);
            self.removed(event::ZREM);
        } else if !removed.is_empty() {
            let now = ScoreText::new(now_ms);
            // SAFETY: "scb" takes a string, a text ending with NUL, and bytes with their length.
            unsafe {
                api!(RedisModule_Replicate(
                    self.ctx.as_ptr(),
                    c"ZREMRANGEBYSCORE".as_ptr(),
                    c"scb".as_ptr(),
                    self.prefix.as_ptr(),
                    c"-inf".as_ptr(),
                    now.bytes().as_ptr(),
                    now.bytes().len()
                ));
            }
            self.removed(event::ZREMRANGEBYSCORE);
        }
        Pruned { removed: removed.len() as u64, left }
    }

    fn holds(&self, key: &Str<'_>) -> bool {
        self.score(*key).is_some()
    }

    fn has_lapsed(&self, key: &Str<'_>, now_ms: i64) -> bool {
        self.score(*key).is_some_and(|score| score <= limiter::score(now_ms))
    }

    fn count(&self) -> u64 {
        self.set.count()
    }

    fn put(&mut self, key: &Str<'_>, lapse_ms: i64, put: Put) -> Found {
        let mut flags = match put {
            Put::AddOrMove => 0,
            Put::AddOnly => raw::REDISMODULE_ZADD_NX,
            // On a missing key the server would leave an empty set behind.
            Put::MoveOnly if self.count() == 0 => return Found::Refused,
            Put::MoveOnly => raw::REDISMODULE_ZADD_XX,
        } as i32;
        // SAFETY: the handle is open for writing, the key a valid string.
        unsafe {
            let score = limiter::score(lapse_ms);
            api!(RedisModule_ZsetAdd(self.handle(), score, key.as_ptr(), &mut flags));
        }
        let found = match flags as u32 {
            raw::REDISMODULE_ZADD_ADDED => Found::Added,
            raw::REDISMODULE_ZADD_UPDATED => Found::Moved,
            raw::REDISMODULE_ZADD_NOP => Found::Refused,
            _ => Found::Same, // The server sets no flag then.
        };
        if matches!(found, Found::Added | Found::Moved) {
            let score = ScoreText::new(lapse_ms);
            // SAFETY: "sbs" takes a string, bytes with their length, and a string.
            unsafe {
                api!(RedisModule_Replicate(
                    self.ctx.as_ptr(),
                    c"ZADD".as_ptr(),
                    c"sbs".as_ptr(),
                    self.prefix.as_ptr(),
                    score.bytes().as_ptr(),
                    score.bytes().len(),
                    key.as_ptr()
                ));
            }
            self.events.add(raw::REDISMODULE_NOTIFY_ZSET, event::ZADD);
            trip("write");
        }
        found
    }

    fn remove(&mut self, keys: &[Str<'_>]) -> u64 {
        // One key is by far the most frequent number, and takes no memory of its own.
        let mut one;
        let mut many = Vec::new();
        let removed: &mut [*mut RedisModuleString] = if let [key] = keys {
            one = [key.as_ptr()];
            let len = usize::from(self.remove_silently(key.as_ptr()));
            one.get_mut(..len).unwrap_or_default()
        } else {
            for key in keys {
                if self.remove_silently(key.as_ptr()) {
                    many.push(key.as_ptr());
                }
            }
            &mut many
        };
        if !removed.is_empty() {
            self.replicate_zrem(removed);
            self.removed(event::ZREM);
        }
        removed.len() as u64
    }

    fn any_after(&self, time_ms: i64) -> bool {
        self.set.seek(Scores::After(limiter::score(time_ms)), End::First)
    }

    fn next_lapse_ms(&self) -> Option<i64> {
        self.lapse_ms_at(End::First)
    }

    fn last_lapse_ms(&self) -> Option<i64> {
        self.lapse_ms_at(End::Last)
    }

    fn expiry_ms(&self) -> Option<i64> {
        if self.count() == 0 {
            return None; // Redis 8.2 looks into the value without asking whether there is one.
        }
        // SAFETY: the handle is open, on a value.
        let expiry_ms = unsafe { api!(RedisModule_GetAbsExpire(self.handle())) };
        (expiry_ms != NO_EXPIRY_MS).then_some(expiry_ms)
    }

    fn set_expiry_ms(&mut self, expiry_ms: Option<i64>) {
        // SAFETY: the handle is open for writing, and the set not empty. "sl" takes a string and
        // a number, "s" a string.
        unsafe {
            api!(RedisModule_SetAbsExpire(self.handle(), expiry_ms.unwrap_or(NO_EXPIRY_MS)));
            let (ctx, prefix) = (self.ctx.as_ptr(), self.prefix.as_ptr());
            match expiry_ms {
                Some(ms) => api!(RedisModule_Replicate(
                    ctx,
                    c"PEXPIREAT".as_ptr(),
                    c"sl".as_ptr(),
                    prefix,
                    ms
                )),
                None => {
                    api!(RedisModule_Replicate(ctx, c"PERSIST".as_ptr(), c"s".as_ptr(), prefix))
                }
            };
        }
        let event = if expiry_ms.is_some() { event::EXPIRE } else { event::PERSIST };
        self.events.add(raw::REDISMODULE_NOTIFY_GENERIC, event);
    }
}

/// The number of leases in the set named `prefix` that end after `time_ms`. O(log N), as ZCOUNT;
/// `None` if the server does not let us ask.
#[must_use]
pub fn count_after(ctx: &Context, prefix: Str<'_>, time_ms: i64) -> Option<u64> {
    let mut min = Vec::from(*b"(");
    min.extend_from_slice(ScoreText::new(time_ms).bytes());
    // SAFETY: "sbc" takes a string, bytes with their length, and a text ending with NUL.
    let reply = CallReply::new(unsafe {
        api!(RedisModule_Call(
            ctx.as_ptr(),
            c"ZCOUNT".as_ptr(),
            c"sbc".as_ptr(),
            prefix.as_ptr(),
            min.as_ptr(),
            min.len(),
            c"+inf".as_ptr()
        ))
    })?;
    reply.integer()
}

/// The score of the lease of this rank (0 = the soonest to lapse) in the set named `prefix`.
/// O(log N), as ZRANGE; `None` if there is no such lease.
#[must_use]
pub fn score_of_rank(ctx: &Context, prefix: Str<'_>, rank: u64) -> Option<f64> {
    let rank = i64::try_from(rank).ok()?;
    // SAFETY: "sllc" takes a string, two numbers, and a text ending with NUL.
    let reply = CallReply::new(unsafe {
        api!(RedisModule_Call(
            ctx.as_ptr(),
            c"ZRANGE".as_ptr(),
            c"sllc".as_ptr(),
            prefix.as_ptr(),
            rank,
            rank,
            c"WITHSCORES".as_ptr()
        ))
    })?;
    reply.text_at(1)?.parse().ok()
}

/// A set whose expiry is nearer than that is not left to the server while it is open.
const EXPIRY_MARGIN_MS: i64 = 60_000;

const NO_EXPIRY_MS: i64 = raw::REDISMODULE_NO_EXPIRE as i64;

#[derive(Clone, Copy)]
enum KeyType {
    Empty,
    SortedSet,
    Other,
}

#[derive(Clone, Copy)]
enum Scores {
    All,
    /// Up to and including this one.
    UpTo(f64),
    /// Greater than this one.
    After(f64),
}

#[derive(Clone, Copy)]
enum End {
    First,
    Last,
}

/// The events we send. The server hands our text on as it is, so its address tells our events
/// from the same events of others.
mod event {
    use std::ffi::CStr;

    pub static ZADD: &CStr = c"zadd";
    pub static ZREM: &CStr = c"zrem";
    pub static ZREMRANGEBYSCORE: &CStr = c"zremrangebyscore";
    pub static DEL: &CStr = c"del";
    pub static EXPIRE: &CStr = c"expire";
    pub static PERSIST: &CStr = c"persist";
}

/// Whether this very text is one of those we send.
pub(super) fn is_our_event(text: &CStr) -> bool {
    [event::ZADD, event::ZREM, event::ZREMRANGEBYSCORE, event::DEL, event::EXPIRE, event::PERSIST]
        .into_iter()
        .any(|ours| std::ptr::eq(ours.as_ptr(), text.as_ptr()))
}

/// The keyspace events of one command. Sent when dropped, after marking the key as modified.
struct Events<'c> {
    ctx: &'c Context,
    prefix: Str<'c>,
    any: bool,
    in_order: Vec<(i32, &'static CStr)>,
}

impl Events<'_> {
    fn add(&mut self, class: i32, event: &'static CStr) {
        self.any = true;
        if anybody_listens() {
            self.in_order.push((class, event));
        }
    }
}

impl Drop for Events<'_> {
    fn drop(&mut self) {
        if !self.any {
            return; // What did not change must not abort a WATCH.
        }
        let (ctx, prefix) = (self.ctx.as_ptr(), self.prefix.as_ptr());
        // SAFETY: context and name are valid during the call, and no handle on the key is open.
        unsafe {
            api!(RedisModule_SignalModifiedKey(ctx, prefix));
            for (class, event) in &self.in_order {
                api!(RedisModule_NotifyKeyspaceEvent(ctx, *class, event.as_ptr(), prefix));
            }
        }
    }
}

/// A time as the text of its score, "seconds.millis": what replicas and the AOF get. It parses
/// to the very double that [`limiter::score`] gives.
struct ScoreText {
    digits: [u8; 24],
    start: usize,
}

impl ScoreText {
    fn new(time_ms: i64) -> Self {
        // By hand: this runs in every command that writes, and formatting costs several times it.
        let mut text = Self { digits: [b'0'; 24], start: 24 };
        let mut rest = time_ms.unsigned_abs();
        for (place, digit) in text.digits.iter_mut().rev().enumerate() {
            if place == 3 {
                *digit = b'.';
                continue;
            }
            *digit = b'0'.saturating_add((rest % 10) as u8);
            rest /= 10;
            text.start = text.start.saturating_sub(1);
            if rest == 0 && place >= 4 {
                break;
            }
        }
        text.start = text.start.saturating_sub(1); // The point.
        text
    }

    fn bytes(&self) -> &[u8] {
        self.digits.get(self.start..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_score_as_text_parses_to_the_same_score(time_ms in 0..=limiter::LAST_LAPSE_MS) {
            let text = ScoreText::new(time_ms);
            let text = std::str::from_utf8(text.bytes()).unwrap();
            prop_assert_eq!(text.parse::<f64>().unwrap(), limiter::score(time_ms));
            prop_assert_eq!(text, format!("{}.{:03}", time_ms / 1000, time_ms % 1000));
        }
    }
}
