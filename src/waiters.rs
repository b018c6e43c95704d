//! Joins leases to the lines of waiters, blocked clients, timers and disconnections.
//!
//! While somebody waits on a limiter, nobody but its line is given a slot: [`acquire`] lets only
//! holders refresh then. A slot goes to the head of the line
//!
//! - inside the command of ours that freed it ([`serve`]), so that both travel in one MULTI;
//! - else from the *pump* ([`Pump::ring`]), which a timer runs before the server sleeps again.
//!   What happens elsewhere (a lapse, a deadline, a DEL, a FLUSHALL, a closed connection) only
//!   marks the line as due and starts the timer: a grant written in the middle of a notification
//!   would reach replicas before the change that made room for it.
//!
//! There is one timer for everything, set to the soonest thing there is to do. The pump writes
//! only what the server would let a client write; else it comes back later, or lets the waiters
//! go if the slot is served elsewhere.
//!
//! A waiter is *waiting* (in its line), then *decided* (out of it, let go, and not replied yet),
//! then gone. A lease granted to it is tied to it until the reply is on its way: if the client
//! turns out to be gone, the lease is taken back and handed on.
//!
//! The state is behind a lock that is never held while the server is called, since the server may
//! call back at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use lazy_static::lazy_static;

// Not `crate::ffi`: in `simulation` this file is compiled once more, beside another server.
use super::ffi::{
    listen_for_waiters, listen_for_writes, BlockedClient, Blocking, Context, Listener, NotOpened,
    OwnedStr, Permit, SortedSet, Str, Timer,
};
use crate::counters::Counters;
use crate::limiter::{self, Facts, Leases, Limiter, Outcome, Reacquire};
use crate::queue::{LineId, Lines, WaiterId};
use crate::records::{Place, Records};
use crate::ties::{Lease, Owner, TieId, Ties};
use crate::trip::trip;

/// How soon the pump comes back when the server may not write: the end of a pause, and the return
/// of a replica, are told by no event.
const REFUSED_RETRY_MS: i64 = 10;

/// How often a line looks whether its slot is still served here, in a cluster. Redis 7.0 lets a
/// slot go without a word.
const CLUSTER_PROBE_MS: i64 = 500;

/// How soon a line is looked at again, or a lease taken back, after a panic: it may well panic again,
/// and everybody else is to get their turn.
const PANICKED_RETRY_MS: i64 = 500;

/// How much later than it should the timer may ring. More means that the system's clock was set.
/// The server starts its timers by that clock and ends them by another, so such a timer would ring
/// as much too late as the clock was moved, in either direction.
const CLOCK_STEP_MS: i64 = 100;

/// How many leases are taken back, and lines served, before the server gets to its clients again.
const WORK_A_TURN: usize = 200;

/// How long a lease may last.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Until {
    /// Until it lapses.
    Lapse,
    /// Until this connection closes, if it has not lapsed before.
    Closed(u64),
}

/// What somebody asks for.
pub struct Ask<'a> {
    /// The limiter.
    pub prefix: Str<'a>,
    /// The holder to be.
    pub key: Str<'a>,
    /// How many leases may be live.
    pub limit: u64,
    /// How long the lease lasts.
    pub ttl_ms: i64,
    /// What else ends it.
    pub until: Until,
}

/// What came of it.
pub struct Taken {
    /// The decision.
    pub outcome: Outcome,
    /// Live leases afterwards.
    pub live: u64,
    /// Lapsed leases that are still in the set, in front of them.
    pub lapsed: u64,
    /// Clients waiting in line afterwards.
    pub waiting: usize,
}

/// Whether somebody waits now.
pub enum Turn {
    /// The key holds a lease.
    Granted,
    /// The client stands in line, and will be answered.
    Waits,
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Answer {
    /// The key holds a lease.
    Granted,
    /// The time-out came first.
    TimedOut,
    /// The limiter's key has become something else.
    WrongType,
    /// The limiter's slot is served by another node now.
    Moved,
}

/// Forgets everything, when the module loads: the library may have stayed in memory since it was
/// unloaded, while the server has forgotten what it was to tell us.
pub fn reset() {
    with(|hall| *hall = Hall::default());
}

/// Takes a slot now, or not at all. While clients wait in line only a holder gets its lease
/// refreshed.
///
/// # Errors
/// [`NotOpened`].
pub fn acquire(
    ctx: &Context,
    ask: &Ask<'_>,
    reacquire: Reacquire,
    now_ms: i64,
) -> Result<Taken, NotOpened> {
    let mut open = OpenLimiter::open(ctx, ask.prefix)?;
    let outcome = take(ctx, ask, reacquire, now_ms, &mut open);
    open.denied = u64::from(outcome == Outcome::Denied);
    let waiting = open.line.map_or(0, |line| with(|hall| hall.lines.len(line)));
    Ok(Taken { outcome, live: open.limiter.live(), lapsed: open.limiter.lapsed(), waiting })
}

/// Takes a slot in each of the limiters (each with its limit), or in none; whether it did. The rest
/// is as in [`acquire`]: no limiter with a line lets a newcomer in.
///
/// # Errors
/// [`NotOpened`].
pub fn acquire_all(
    ctx: &Context,
    prefixes: &[Str<'_>],
    limits: &[u64],
    ask: &Ask<'_>,
    reacquire: Reacquire,
    now_ms: i64,
) -> Result<bool, NotOpened> {
    for prefix in prefixes {
        SortedSet::open(ctx, *prefix)?; // Nothing is written if one of them cannot be.
    }
    // One after the other: a set must not be open while whoever listens is told of another's
    // changes, since they may write to it.
    let mut is_denied = false;
    for (prefix, limit) in prefixes.iter().zip(limits) {
        let mut open = OpenLimiter::open(ctx, *prefix)?;
        let limit = limit_past_line(ctx, *limit, now_ms, &mut open);
        let denied = !open.limiter.would_acquire(&ask.key, limit, now_ms, reacquire);
        open.denied = u64::from(denied);
        is_denied |= denied;
    }
    if is_denied {
        return Ok(false);
    }
    for prefix in prefixes {
        // What somebody may have made of a set meanwhile counts as done after this command.
        if let Ok(mut open) = OpenLimiter::open(ctx, *prefix) {
            put(ctx, ask, u64::MAX, Reacquire::Refresh, now_ms, &mut open);
        }
    }
    Ok(true)
}

/// Takes a slot, or puts the client at the end of the line.
///
/// # Errors
/// [`NotOpened`].
pub fn acquire_or_wait<B: Blocking>(
    ctx: &Context,
    ask: &Ask<'_>,
    connection: u64,
    deadline_ms: Option<i64>,
    now_ms: i64,
) -> Result<Turn, NotOpened> {
    let mut open = OpenLimiter::open(ctx, ask.prefix)?;
    if take(ctx, ask, Reacquire::Refresh, now_ms, &mut open) != Outcome::Denied {
        return Ok(Turn::Granted);
    }
    if !with(|hall| std::mem::replace(&mut hall.listens_for_waiters, true)) {
        listen_for_waiters::<Pump>(ctx);
    }
    let (db, next_look_ms) = (open.db, next_look_ms(ctx, &open.limiter, now_ms));
    // A client that is blocked must be in a line, or it is never let go: nothing comes between.
    let Some(client) = BlockedClient::block::<B>(ctx) else {
        return Ok(Turn::Waits); // The server has told the client why.
    };
    let prefix: Arc<[u8]> = ask.prefix.bytes().into();
    let waiter = Waiter {
        client,
        connection,
        db,
        prefix: prefix.clone(),
        key: ask.key.bytes().into(),
        since_ms: now_ms,
        limit: ask.limit,
        ttl_ms: ask.ttl_ms,
        until: ask.until,
    };
    with(|hall| {
        let (id, line) = hall.lines.join(db, &prefix, deadline_ms, waiter);
        hall.waiters.insert(client, id);
        let counted = Counters { waits: 1, ..Counters::default() };
        hall.records.note_wait(db, &prefix, &counted);
        if hall.lines.len(line) == 1 {
            hall.lines.set_alarm(line, next_look_ms);
        }
    });
    set_timer(ctx);
    Ok(Turn::Waits)
}

/// Gives slots back, and hands them to the line; how many of the keys held a live lease.
///
/// # Errors
/// [`NotOpened`].
pub fn release(ctx: &Context, prefix: Str<'_>, keys: &[Str<'_>]) -> Result<u64, NotOpened> {
    let now_ms = ctx.now_ms();
    let mut open = OpenLimiter::open(ctx, prefix)?;
    let released = open.limiter.release(keys, now_ms);
    if open.any_ties {
        let cut = |key: &Str<'_>| with(|hall| hall.ties.cut(open.db, prefix.bytes(), key.bytes()));
        keys.iter().for_each(cut);
    }
    serve(ctx, open.line, &mut open.limiter, now_ms);
    Ok(released)
}

/// Moves the end of a live lease to now + ttl; whether there was one.
///
/// # Errors
/// [`NotOpened`].
pub fn renew(
    ctx: &Context,
    prefix: Str<'_>,
    key: Str<'_>,
    ttl_ms: i64,
    now_ms: i64,
) -> Result<bool, NotOpened> {
    let lapse_ms = lapse_ms(now_ms, ttl_ms);
    let mut open = OpenLimiter::open(ctx, prefix)?;
    let renewed = open.limiter.renew(&key, lapse_ms, now_ms);
    if renewed && open.any_ties {
        with(|hall| hall.ties.renewed(open.db, prefix.bytes(), key.bytes(), lapse_ms));
    }
    serve(ctx, open.line, &mut open.limiter, now_ms);
    Ok(renewed)
}

/// The answer to a waiter that was let go, for its reply; `None` if it is not known.
pub fn reply(id: WaiterId) -> Option<Answer> {
    trip("reply");
    with(|hall| {
        let decided = hall.decided.remove(&id)?;
        hall.waiters.remove(&decided.client);
        if let Some(tie) = decided.tie {
            let owner = Owner::Connection(decided.connection);
            hall.ties.hand_over(tie, Owner::Waiter(id), owner);
            if decided.until == Until::Lapse {
                // The reply is not written yet, and cannot be if the connection is broken.
                hall.unproven.push((decided.connection, tie));
            }
        }
        Some(decided.answer)
    })
}

/// What is counted of one limiter, and how many wait in its line.
pub fn counters(db: i32, prefix: &[u8]) -> (Counters, usize) {
    with(|hall| {
        let waiting = hall.lines.line(db, prefix).map_or(0, |line| hall.lines.len(line));
        (hall.records.counters(db, prefix), waiting)
    })
}

/// What is counted of all.
pub struct Totals {
    /// Since the module was loaded.
    pub counters: Counters,
    /// Clients waiting in line now.
    pub waiting: usize,
    /// Limiters with a line now.
    pub lines: usize,
    /// Leases that end with their connection now.
    pub ephemeral: usize,
    /// Leases that ended because their connection closed.
    pub closed: u64,
}

/// What is counted of all limiters.
pub fn totals() -> Totals {
    with(|hall| {
        let (waiting, lines) = hall.lines.totals();
        let (counters, ephemeral) = (hall.records.totals(), hall.ties.to_connections());
        Totals { counters, waiting, lines, ephemeral, closed: hall.closed }
    })
}

/// A waiter's client is gone: before it was let go, or after.
pub fn gone(ctx: &Context, client: BlockedClient) {
    trip("gone");
    let now_ms = ctx.now_ms();
    let was_waiting = with(|hall| {
        let Some(id) = hall.waiters.remove(&client) else { return false };
        if hall.decided.remove(&id).is_some() {
            hall.ties.owner_left(Owner::Waiter(id));
        }
        let waiter = hall.lines.leave(id);
        waiter.inspect(|waiter| hall.count_wait(waiter, None, now_ms)).is_some()
    });
    if was_waiting {
        client.let_go_unanswered();
    }
    set_timer(ctx);
}

/// A limiter, opened for one command.
struct OpenLimiter<'c> {
    limiter: Limiter<SortedSet<'c>>,
    /// Its line, if somebody waited when it was opened.
    line: Option<LineId>,
    denied: u64,
    db: i32,
    prefix: Str<'c>,
    record: Option<Place>,
    /// Whether any lease may be tied to somebody: else there is no tie to look for.
    any_ties: bool,
}

impl<'c> OpenLimiter<'c> {
    fn open(ctx: &'c Context, prefix: Str<'c>) -> Result<Self, NotOpened> {
        let set = SortedSet::open(ctx, prefix)?;
        let db = ctx.db();
        let (listens, open) = with(|hall| {
            let listens = std::mem::replace(&mut hall.listens_for_writes, true);
            let (record, facts) = hall.records.look_up(db, prefix.bytes());
            let line = hall.lines.line(db, prefix.bytes());
            let any_ties = !hall.ties.is_empty() || line.is_some();
            (listens, (record, facts, line, any_ties))
        });
        if !listens {
            listen_for_writes::<Pump>(ctx);
        }
        let (record, facts, line, any_ties) = open;
        let limiter = Limiter::new(set, facts);
        Ok(Self { limiter, line, denied: 0, db, prefix, record, any_ties })
    }
}

impl Drop for OpenLimiter<'_> {
    // Before the set is closed, and tells others: they may write to it at once.
    fn drop(&mut self) {
        let counted = Counters { denied: self.denied, ..*self.limiter.counted() };
        // After a panic the facts may be those of before the last write.
        let facts = if thread::panicking() { Facts::UNKNOWN } else { self.limiter.facts() };
        let prefix = self.prefix.bytes();
        with(|hall| hall.records.note(self.record, self.db, prefix, &counted, facts));
    }
}

/// Takes a slot as [`acquire`] says, and serves the line if there is one.
fn take(
    ctx: &Context,
    ask: &Ask<'_>,
    reacquire: Reacquire,
    now_ms: i64,
    open: &mut OpenLimiter<'_>,
) -> Outcome {
    let limit = limit_past_line(ctx, ask.limit, now_ms, open);
    put(ctx, ask, limit, reacquire, now_ms, open)
}

/// The limit for a newcomer: 0 while somebody waits, so that nobody is let in past the line, also
/// not into a slot that it could not be given yet.
fn limit_past_line(ctx: &Context, limit: u64, now_ms: i64, open: &mut OpenLimiter<'_>) -> u64 {
    if open.line.is_none() {
        return limit;
    }
    // The line comes first. It may be served to its end, and is in nobody's way then.
    serve(ctx, open.line, &mut open.limiter, now_ms);
    open.line = with(|hall| hall.lines.line(open.db, open.prefix.bytes()));
    if open.line.is_some() {
        0
    } else {
        limit
    }
}

/// Takes a slot under this limit, and serves the line if there is one.
fn put(
    ctx: &Context,
    ask: &Ask<'_>,
    limit: u64,
    reacquire: Reacquire,
    now_ms: i64,
    open: &mut OpenLimiter<'_>,
) -> Outcome {
    let (db, prefix, key) = (open.db, open.prefix.bytes(), ask.key.bytes());
    let lapse_ms = lapse_ms(now_ms, ask.ttl_ms);
    let outcome = open.limiter.acquire(&ask.key, limit, lapse_ms, now_ms, reacquire);
    if outcome == Outcome::Denied {
        return outcome;
    }
    match ask.until {
        Until::Closed(connection) => {
            let lease = Lease { db, prefix: prefix.into(), key: key.into(), lapse_ms };
            with(|hall| hall.ties.tie(lease, Owner::Connection(connection), now_ms));
        }
        Until::Lapse if open.any_ties => with(|hall| hall.ties.cut(db, prefix, key)),
        Until::Lapse => {}
    }
    // What was refreshed lapses at another time.
    serve(ctx, open.line, &mut open.limiter, now_ms);
    outcome
}

/// The end of a lease granted now. What was asked for fitted when it was asked; a long wait may
/// have moved its end past the last there is.
fn lapse_ms(now_ms: i64, ttl_ms: i64) -> i64 {
    limiter::lapse_after(now_ms, ttl_ms).unwrap_or(limiter::LAST_LAPSE_MS)
}

/// Gives what slots there are to the head of the line and those behind it, in a command of ours.
fn serve(ctx: &Context, line: Option<LineId>, limiter: &mut Limiter<SortedSet<'_>>, now_ms: i64) {
    let Some(line) = line else { return };
    // In a cluster, a key that is gone may have to be made on another node: the pump will ask.
    if ctx.is_paused() || (ctx.is_clustered() && limiter.leases().count() == 0) {
        with(|hall| hall.lines.touch_line(line));
    } else {
        let _again = AgainAfterPanic { ctx, line, now_ms };
        grant(ctx, line, limiter, now_ms);
    }
    set_timer(ctx);
}

/// Grants slots from the head of the line on, as far as they go, and sets the line's alarm.
fn grant(ctx: &Context, line: LineId, limiter: &mut Limiter<SortedSet<'_>>, now_ms: i64) {
    while let Some((id, head)) = with(|hall| hall.lines.head(line).map(|(id, w)| (id, w.clone()))) {
        let Some(key) = OwnedStr::copy(&head.key) else { return };
        let lapse_ms = lapse_ms(now_ms, head.ttl_ms);
        let key = key.as_str();
        let refresh = Reacquire::Refresh;
        let outcome = limiter.acquire(&key, head.limit, lapse_ms, now_ms, refresh);
        if outcome == Outcome::Denied {
            let next_look_ms = next_look_ms(ctx, limiter, now_ms);
            with(|hall| hall.lines.set_alarm(line, next_look_ms));
            return;
        }
        trip("grant");
        with(|hall| hall.note_grant(id, line, &head, outcome, lapse_ms, now_ms));
        head.client.let_go(id);
    }
}

/// Has the line looked at again if serving it panics: its waiters have nobody else.
struct AgainAfterPanic<'c> {
    ctx: &'c Context,
    line: LineId,
    now_ms: i64,
}

impl Drop for AgainAfterPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let later_ms = self.now_ms.saturating_add(PANICKED_RETRY_MS);
            with(|hall| hall.lines.set_alarm(self.line, Some(later_ms)));
            set_timer(self.ctx);
        }
    }
}

/// When the line is to be looked at though nobody touches the limiter.
fn next_look_ms(ctx: &Context, limiter: &Limiter<SortedSet<'_>>, now_ms: i64) -> Option<i64> {
    let probe_ms = ctx.is_clustered().then(|| now_ms.saturating_add(CLUSTER_PROBE_MS));
    [limiter.next_change_ms(), probe_ms].into_iter().flatten().min()
}

/// Answers everybody in the line at once.
fn dismiss(line: LineId, answer: Answer, now_ms: i64) {
    while let Some((id, client)) = with(|hall| {
        let (id, _) = hall.lines.head(line)?;
        let waiter = hall.lines.answered(id)?;
        hall.decide(id, &waiter, answer, None, now_ms);
        Some((id, waiter.client))
    }) {
        client.let_go(id);
    }
}

/// Sets the timer to the soonest thing there is to do. If there is nothing, it is stopped at the
/// next turn: a waiter's reply need not wait for that.
fn set_timer(ctx: &Context) {
    let Some(next_ms) = with(|hall| hall.next_ms()) else { return };
    let now_ms = ctx.now_ms();
    let old = with(|hall| hall.timer.take_if(|timer| timer.rings_ms > next_ms.max(now_ms)));
    if let Some(old) = old {
        old.timer.stop(ctx);
    } else if with(|hall| hall.timer.is_some()) {
        return; // In time.
    }
    // No longer than an hour, so that the server's own sum does not overflow.
    let period_ms = next_ms.saturating_sub(now_ms).clamp(0, 3_600_000);
    let timer = Timer::start::<Pump>(ctx, period_ms);
    let rings_ms = now_ms.saturating_add(period_ms);
    with(|hall| hall.timer = Some(SetTimer { timer, set_ms: now_ms, rings_ms }));
}

/// What runs when nobody's command does.
pub struct Pump;

impl Listener for Pump {
    fn ring(ctx: &Context) {
        with(|hall| {
            hall.timer = None; // While it rings it must not be stopped.
            hall.not_before_ms = i64::MIN;
        });
        let _end = RingEnd(ctx);
        trip("ring");
        let now_ms = ctx.now_ms();
        while let Some((id, client)) = with(|hall| hall.next_timed_out(now_ms)) {
            client.let_go(id);
        }
        if ctx.is_read_only_replica() {
            // What is lost on a replica is its master's affair, where the ttl will end it.
            with(|hall| hall.ties.forget_lost());
            Self::dismiss_all(now_ms);
        }
        if Self::work(ctx, now_ms).is_err() {
            with(|hall| hall.not_before_ms = now_ms.saturating_add(REFUSED_RETRY_MS));
        }
    }

    fn key_changed(ctx: &Context, key: &[u8]) {
        trip("key");
        let db = ctx.db();
        let has_line = with(|hall| {
            hall.records.forget_facts(db, key);
            hall.lines.touch(db, key)
        });
        if has_line {
            set_timer(ctx);
        }
    }

    fn data_replaced() {
        with(|hall| hall.records.forget_all_facts());
    }

    fn database_flushed(ctx: &Context, db: Option<i32>) {
        trip("flush");
        with(|hall| {
            hall.records.forget_all_facts();
            hall.lines.touch_database(db);
            hall.ties.forget_database(db);
        });
        set_timer(ctx);
    }

    fn databases_swapped(ctx: &Context, first: i32, second: i32) {
        with(|hall| {
            hall.records.forget_all_facts();
            hall.lines.touch_database(Some(first));
            hall.lines.touch_database(Some(second));
            hall.ties.swap_databases(first, second);
        });
        set_timer(ctx);
    }

    fn disconnected(ctx: &Context, connection: u64) {
        trip("disconnect");
        // Closed in the turn of its reply: because that could not be written, or after it was, as
        // with a QUIT in the same pipeline?
        let unproven = with(|hall| hall.take_unproven(connection));
        if !unproven.is_empty() && ctx.closes_after_replies(connection) {
            with(|hall| unproven.iter().for_each(|tie| hall.ties.cut_unless_lost(*tie)));
        }
        if with(|hall| hall.ties.owner_left(Owner::Connection(connection))) {
            set_timer(ctx);
        }
    }

    fn turned(ctx: &Context) {
        let now_ms = ctx.now_ms();
        let old = with(|hall| {
            for (_, tie) in std::mem::take(&mut hall.unproven) {
                hall.ties.cut_unless_lost(tie);
            }
            let has_nothing_to_do = hall.next_ms().is_none();
            if has_nothing_to_do {
                // Refused or not, the pump need not come back; and when it must, that time may be
                // far away, by a clock that was set back.
                hall.not_before_ms = i64::MIN;
            }
            let timer = hall.timer.as_ref()?;
            let late_ms = now_ms.saturating_sub(timer.rings_ms);
            let clock_was_set = now_ms < timer.set_ms || late_ms > CLOCK_STEP_MS;
            if clock_was_set {
                hall.not_before_ms = i64::MIN;
                hall.lines.touch_database(None);
                hall.ties.hurry();
            } else if !has_nothing_to_do {
                return None;
            }
            hall.timer.take()
        });
        if let Some(old) = old {
            old.timer.stop(ctx);
            set_timer(ctx);
        }
    }

    fn missed(ctx: &Context) {
        with(|hall| {
            hall.records.forget_all_facts();
            hall.lines.touch_database(None);
        });
        set_timer(ctx);
    }
}

/// The server takes no writes now.
struct Refused;

impl Pump {
    /// Does what is due, if the server may write.
    fn work(ctx: &Context, now_ms: i64) -> Result<(), Refused> {
        if !ctx.may_write_unasked() {
            return Err(Refused);
        }
        Self::take_back(ctx, now_ms)?;
        Self::serve_due(ctx, now_ms)
    }

    /// Lets everybody go. A server that becomes a replica does so itself, but not Valkey 9.1 in a
    /// cluster.
    fn dismiss_all(now_ms: i64) {
        with(|hall| hall.lines.touch_database(None));
        while let Some(line) = with(|hall| hall.lines.next_due()) {
            dismiss(line, Answer::Moved, now_ms);
        }
    }

    /// Ends the leases whose owner has gone.
    fn take_back(ctx: &Context, now_ms: i64) -> Result<(), Refused> {
        for _ in 0..WORK_A_TURN {
            let Some((tie, lease)) = with(|hall| hall.ties.next_lost(now_ms)) else { break };
            let postpone = |to_ms: i64| with(|hall| hall.ties.postpone(tie, to_ms));
            postpone(now_ms.saturating_add(PANICKED_RETRY_MS)); // In case it panics.
            let ended = lease.lapse_ms <= now_ms
                || Self::end(ctx, &lease, now_ms).inspect_err(|Refused| postpone(i64::MIN))?;
            if ended {
                with(|hall| {
                    hall.ties.cut_tie(tie);
                    hall.lines.touch(lease.db, &lease.prefix);
                });
            } else {
                postpone(now_ms.saturating_add(CLUSTER_PROBE_MS));
            }
        }
        Ok(())
    }

    /// Ends a lease; false if it is not this node's to end now.
    fn end(ctx: &Context, lease: &Lease, now_ms: i64) -> Result<bool, Refused> {
        let (Some(prefix), Some(key)) = (OwnedStr::copy(&lease.prefix), OwnedStr::copy(&lease.key))
        else {
            return Ok(false);
        };
        let (prefix, key) = (prefix.as_str(), key.as_str());
        if !ctx.select_db(lease.db) {
            return Ok(false);
        }
        match ctx.write_permit(prefix) {
            Permit::Granted => {}
            Permit::NotNow => return Err(Refused),
            Permit::Elsewhere => return Ok(false),
        }
        let mut open = match OpenLimiter::open(ctx, prefix) {
            Ok(open) => open,
            Err(why) => return Ok(why == NotOpened::WrongType),
        };
        trip("take-back");
        // Another end is another lease: somebody wrote there without asking us.
        if open.limiter.leases().holds_until(key, lease.lapse_ms) {
            let ended = open.limiter.release(&[key], now_ms);
            with(|hall| hall.closed = hall.closed.saturating_add(ended));
        }
        Ok(true)
    }

    /// Serves the lines that are due.
    fn serve_due(ctx: &Context, now_ms: i64) -> Result<(), Refused> {
        let mut gone = None;
        for _ in 0..WORK_A_TURN {
            let due = with(|hall| {
                let line = hall.lines.next_due()?;
                hall.lines.limiter(line).map(|(db, prefix)| (line, db, prefix.clone()))
            });
            let Some((line, db, prefix)) = due else { break };
            let _again = AgainAfterPanic { ctx, line, now_ms };
            let Some(prefix) = OwnedStr::copy(&prefix) else { break };
            if !ctx.select_db(db) {
                continue;
            }
            match ctx.write_permit(prefix.as_str()) {
                Permit::Granted => {}
                Permit::NotNow => {
                    with(|hall| hall.lines.touch_line(line));
                    return Err(Refused);
                }
                Permit::Elsewhere => {
                    dismiss(line, Answer::Moved, now_ms);
                    continue;
                }
            }
            match OpenLimiter::open(ctx, prefix.as_str()) {
                // In a cluster a key that is gone may have to be made on another node. This one may
                // have expired since the server was asked: it is asked once more.
                Ok(open)
                    if gone != Some(line)
                        && ctx.is_clustered()
                        && open.limiter.leases().count() == 0 =>
                {
                    gone = Some(line);
                    with(|hall| hall.lines.touch_line(line));
                }
                Ok(mut open) => grant(ctx, line, &mut open.limiter, now_ms),
                Err(NotOpened::WrongType) => dismiss(line, Answer::WrongType, now_ms),
                Err(NotOpened::Frozen) => with(|hall| hall.lines.touch_line(line)),
            };
        }
        Ok(())
    }
}

/// Sets the timer again at the end of a ring, however it ends.
struct RingEnd<'c>(&'c Context);

impl Drop for RingEnd<'_> {
    fn drop(&mut self) {
        set_timer(self.0);
    }
}

lazy_static! {
    static ref HALL: Mutex<Hall> = Mutex::default();
}

/// Works on the state. Nothing in `work` may call the server.
fn with<R>(work: impl FnOnce(&mut Hall) -> R) -> R {
    // A panic is contained at the border; what it left is no worse than any other moment's.
    work(&mut HALL.lock().unwrap_or_else(PoisonError::into_inner))
}

/// All there is to remember.
#[derive(Default)]
#[cfg_attr(test, derive(Clone, Hash))]
struct Hall {
    lines: Lines<Waiter>,
    ties: Ties,
    /// Everybody the server has blocked for us.
    waiters: BTreeMap<BlockedClient, WaiterId>,
    /// Those that were let go, and not replied yet.
    decided: BTreeMap<WaiterId, Decided>,
    /// Ties of leases whose holders are replied in this turn of the event loop.
    unproven: Vec<(u64, TieId)>,
    records: Records,
    /// Leases that ended because their connection closed.
    closed: u64,
    listens_for_writes: bool,
    listens_for_waiters: bool,
    timer: Option<SetTimer>,
    not_before_ms: i64,
}

/// The timer that runs.
#[cfg_attr(test, derive(Clone, Hash))]
struct SetTimer {
    timer: Timer,
    set_ms: i64,
    rings_ms: i64,
}

/// Somebody in a line.
#[derive(Clone)]
#[cfg_attr(test, derive(Hash))]
struct Waiter {
    client: BlockedClient,
    connection: u64,
    db: i32,
    prefix: Arc<[u8]>,
    key: Arc<[u8]>,
    since_ms: i64,
    limit: u64,
    ttl_ms: i64,
    until: Until,
}

/// What will be replied.
#[cfg_attr(test, derive(Clone, Hash))]
struct Decided {
    client: BlockedClient,
    connection: u64,
    until: Until,
    answer: Answer,
    tie: Option<TieId>,
}

impl Hall {
    /// When something is to be done; `i64::MIN` = now.
    fn next_ms(&self) -> Option<i64> {
        let next_ms = [self.ties.next_lost_ms(), self.lines.next_ms()].into_iter().flatten().min();
        next_ms.map(|ms| ms.max(self.not_before_ms))
    }

    /// The ties of leases whose holder was replied in this turn on this connection. They are the
    /// caller's to decide.
    fn take_unproven(&mut self, connection: u64) -> Vec<TieId> {
        let is_its = |(other, _): &(u64, TieId)| *other == connection;
        let its = self.unproven.iter().filter(|one| is_its(one)).map(|(_, tie)| *tie).collect();
        self.unproven.retain(|one| !is_its(one));
        its
    }

    /// A waiter has left its line, after so long; counts it.
    fn count_wait(&mut self, waiter: &Waiter, answer: Option<Answer>, now_ms: i64) {
        let wait_ms = u64::try_from(now_ms.saturating_sub(waiter.since_ms)).unwrap_or(0);
        let counted = Counters {
            wait_timeouts: u64::from(answer == Some(Answer::TimedOut)),
            wait_ms_total: wait_ms,
            wait_ms_max: wait_ms,
            ..Counters::default()
        };
        self.records.note_wait(waiter.db, &waiter.prefix, &counted);
    }

    fn decide(
        &mut self,
        id: WaiterId,
        waiter: &Waiter,
        answer: Answer,
        tie: Option<TieId>,
        now_ms: i64,
    ) {
        self.count_wait(waiter, Some(answer), now_ms);
        let Waiter { client, connection, until, .. } = *waiter;
        self.decided.insert(id, Decided { client, connection, until, answer, tie });
    }

    fn next_timed_out(&mut self, now_ms: i64) -> Option<(WaiterId, BlockedClient)> {
        let (id, waiter) = self.lines.next_timed_out(now_ms)?;
        self.decide(id, &waiter, Answer::TimedOut, None, now_ms);
        Some((id, waiter.client))
    }

    /// Takes the head, which was granted, out of its line.
    fn note_grant(
        &mut self,
        id: WaiterId,
        line: LineId,
        waiter: &Waiter,
        outcome: Outcome,
        lapse_ms: i64,
        now_ms: i64,
    ) {
        let Some((db, prefix)) = self.lines.limiter(line) else { return };
        let (prefix, key) = (prefix.clone(), waiter.key.clone());
        let lease = Lease { db, prefix, key, lapse_ms };
        let owner = Owner::Waiter(id);
        let tie = if outcome == Outcome::Acquired || waiter.until != Until::Lapse {
            Some(self.ties.tie(lease, owner, now_ms))
        } else {
            // Only refreshed: a lease that somebody has held before is not the waiter's to lose.
            self.ties.share_or_cut(&lease, owner)
        };
        self.lines.answered(id);
        self.decide(id, waiter, Answer::Granted, tie, now_ms);
    }
}

/// What the model check looks at, in `simulation`, where this file is compiled once more.
#[cfg(test)]
#[allow(dead_code)]
pub mod inspect {
    use super::{with, Hall, HALL};
    use crate::limiter::Facts;

    /// All there is to remember, at one moment.
    #[derive(Clone, Hash)]
    pub struct State(Hall);

    impl State {
        pub fn now() -> Self {
            with(|hall| Self(hall.clone()))
        }

        pub fn put_back(&self) {
            with(|hall| hall.clone_from(&self.0));
        }
    }

    pub fn is_locked() -> bool {
        HALL.try_lock().is_err()
    }

    /// Whether something is to be done, now or later.
    pub fn is_due() -> bool {
        with(|hall| hall.next_ms().is_some())
    }

    /// Whether nobody waits, nothing is tied, and nothing is to be done.
    pub fn is_empty() -> bool {
        with(|hall| {
            hall.lines.totals() == (0, 0)
                && hall.next_ms().is_none()
                && hall.ties.is_empty()
                && hall.waiters.is_empty()
                && hall.decided.is_empty()
                && hall.unproven.is_empty()
                && hall.timer.is_none()
        })
    }

    pub fn facts(db: i32, prefix: &[u8]) -> Facts {
        with(|hall| hall.records.look_up(db, prefix).1)
    }
}
