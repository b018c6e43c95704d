//! What can happen, one step at a time: what clients send, what others do, what befalls the server.

use std::fmt;

use super::ffi::{self, with, Blocking, Call, Change, Context, Link, NotOpened, Str};
use super::judge::{Command, Judge};
use super::waiters::{self, Turn, Until};
use super::{Ask, ClientId, LimiterId, Name};
use crate::limiter::{Outcome, Reacquire};

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Step {
    Acquire(Ask),
    /// With another limiter of the same database.
    AcquireAll(Ask, LimiterId),
    /// With the milliseconds it has patience for.
    Wait(Ask, Option<i64>),
    Release(LimiterId, Name),
    Renew(LimiterId, Name, i64),
    /// MULTI, CLIENT PAUSE, RELEASE, EXEC.
    PauseAndRelease(LimiterId, Name),
    /// CLIENT PAUSE, and its end.
    Pause,
    Resume,
    /// min-replicas-to-write is not met, and is again.
    LackReplicas,
    HaveReplicas,
    /// REPLICAOF, with the blocked clients let go by the server or not, and REPLICAOF NO ONE.
    Demote {
        lets_go: bool,
    },
    Promote,
    /// The cluster's slots go to another node, and come back.
    LeaveSlots,
    TakeSlots,
    Others(Change),
    /// Another module does it in the middle of our next command that writes.
    OthersAtOurNext(Change),
    /// The server deletes what has expired.
    ExpireAll,
    /// The connection is closed, and the server sees it at once; at the write of the next reply;
    /// after that.
    Close(ClientId),
    Break(ClientId),
    Quit(ClientId),
    /// CLIENT UNBLOCK.
    Unblock(ClientId),
    UnblockWithError(ClientId),
    /// To the next moment at which something ends.
    PassTime,
    /// By two milliseconds.
    Tick,
    /// The event loop goes round.
    Turn,
    /// The same, and while it sleeps the system's clock is set.
    TurnAndSetClock(i64),
}

struct Bacquire;

impl Blocking for Bacquire {}

impl Step {
    /// Does it, and lets the judge hear of it; whether it was possible.
    pub fn run(self, judge: &mut Judge) -> bool {
        if !with(|server| self.is_possible(server)) {
            return false;
        }
        match self {
            Step::Acquire(ask) => run_acquire(judge, &ask),
            Step::AcquireAll(ask, other) => run_acquire_all(judge, &ask, other),
            Step::Wait(ask, patience_ms) => run_wait(judge, &ask, patience_ms),
            Step::Release(limiter, key) => run_release(judge, limiter, key, false),
            Step::PauseAndRelease(limiter, key) => {
                with(|server| server.is_paused = true);
                run_release(judge, limiter, key, true);
            }
            Step::Renew(limiter, key, ttl_ms) => run_renew(judge, limiter, key, ttl_ms),
            _ => {
                if !self.befall(judge) {
                    return false;
                }
                with(|server| judge.hear(server, Command::None));
            }
        }
        with(|server| judge.check(server));
        true
    }

    /// Whether it can be taken now. It may turn out that nothing comes of it.
    pub fn is_possible(self, server: &ffi::Server) -> bool {
        let is_blocked = |client: ClientId| server.clients[client].blocked.is_some();
        let is_free = |client: ClientId| !is_blocked(client) && !server.clients[client].closes;
        match self {
            Step::Acquire(ask) | Step::Wait(ask, _) => server.takes_writes() && is_free(ask.client),
            // What another module does to the second set between the look at it and the write
            // counts as done after the command, though it is not.
            Step::AcquireAll(ask, _) => {
                server.takes_writes() && is_free(ask.client) && server.meddler.is_none()
            }
            Step::Release(limiter, _)
            | Step::Renew(limiter, ..)
            | Step::PauseAndRelease(limiter, _) => {
                server.takes_writes() && server.keys.contains_key(&limiter)
            }
            Step::Others(_) => server.takes_writes(),
            Step::OthersAtOurNext(_) => server.meddler.is_none(),
            Step::Pause => !server.is_frozen(),
            Step::Resume => server.is_paused,
            Step::LackReplicas => !server.lacks_replicas,
            Step::HaveReplicas => server.lacks_replicas,
            Step::Demote { .. } => !server.is_replica,
            Step::Promote => server.is_replica,
            Step::LeaveSlots => !server.is_elsewhere,
            Step::TakeSlots => server.is_elsewhere,
            Step::Break(client) | Step::Quit(client) => {
                is_blocked(client) && server.clients[client].link == Link::Fine
            }
            Step::Close(client) => server.clients[client].connection.is_some(),
            Step::Unblock(client) | Step::UnblockWithError(client) => is_blocked(client),
            // As long as nobody has waited the module is not told of turns, and does not notice: a
            // lease that is to be taken back then is so the step of the clock later. Nor does it
            // notice two steps within 100 ms of which one undoes the other.
            Step::TurnAndSetClock(_) => !server.forgoes_turns() && server.timer_is_right(),
            Step::PassTime | Step::Tick | Step::ExpireAll | Step::Turn => true,
        }
    }

    /// Does what is no command of ours; whether anything came of it.
    fn befall(self, judge: &mut Judge) -> bool {
        let now_ms = with(|server| server.now_ms);
        match self {
            Step::Pause => with(|server| server.is_paused = true),
            Step::Resume => with(|server| server.is_paused = false),
            Step::LackReplicas => with(|server| server.lacks_replicas = true),
            Step::HaveReplicas => with(|server| server.lacks_replicas = false),
            Step::Demote { lets_go } => {
                judge.left_ms = Some(now_ms);
                judge.demoted();
                ffi::demote(lets_go);
            }
            Step::Promote => ffi::promote(),
            Step::LeaveSlots => {
                judge.left_ms = Some(now_ms);
                with(|server| server.is_elsewhere = true);
            }
            Step::TakeSlots => with(|server| server.is_elsewhere = false),
            Step::Others(change) => return ffi::change(change),
            Step::OthersAtOurNext(change) => with(|server| server.meddler = Some(change)),
            Step::ExpireAll => return ffi::expire_all(),
            Step::Close(client) => return ffi::close(client),
            Step::Break(client) => with(|server| server.clients[client].link = Link::Broken),
            Step::Quit(client) => with(|server| server.clients[client].link = Link::Quits),
            Step::Unblock(client) => return ffi::unblock(client),
            Step::UnblockWithError(client) => return ffi::take_from_line(client),
            Step::PassTime => {
                let Some(next_ms) = next_ms(judge) else { return false };
                with(|server| server.wait_until(next_ms));
            }
            Step::Tick => with(|server| server.wait_until(now_ms + 2)),
            Step::Turn => {
                ffi::end_turn();
                ffi::sleep(0);
            }
            Step::TurnAndSetClock(by_ms) => {
                ffi::end_turn();
                with(|server| judge.hear(server, Command::None));
                judge.left_ms = None; // By another clock.
                ffi::sleep(by_ms);
            }
            _ => unreachable!("a command"),
        }
        true
    }
}

/// When something ends next.
pub fn next_ms(judge: &Judge) -> Option<i64> {
    with(|server| {
        let now_ms = server.now_ms;
        let sets = server.keys.values().filter_map(|value| match value {
            ffi::Value::Set(set) => Some(set),
            ffi::Value::Other => None,
        });
        let of_set = |set: &ffi::Set| {
            let ends = set.members.values().copied().chain(set.expiry_ms);
            ends.filter(|ms| *ms > now_ms && *ms < i64::MAX).min()
        };
        let others = [server.next_timer_ms(), judge.next_deadline_ms(now_ms)].into_iter().flatten();
        sets.filter_map(of_set).chain(others).filter(|ms| *ms > now_ms).min()
    })
}

fn command(ask_client: ClientId, limiter: LimiterId, may_write_paused: bool) -> Context {
    Context::new(limiter.db, Call::Command { client: ask_client, may_write_paused })
}

/// What a command that finds the key unfit must be right about.
fn refused(judge: &mut Judge, limiters: &[LimiterId], why: NotOpened) {
    with(|server| {
        judge.hear(server, Command::None);
        let is_so = match why {
            NotOpened::WrongType => limiters.iter().any(|limiter| server.is_other(*limiter)),
            NotOpened::Frozen => server.is_frozen(),
        };
        server.demand(is_so, "the error is not true");
    });
}

/// The ask as the module gets it, its connection made if need be.
fn with_ask<R>(ask: &Ask, work: impl FnOnce(&waiters::Ask<'_>, u64) -> R) -> R {
    let connection = ffi::connection(ask.client);
    let until = if ask.is_ephemeral { Until::Closed(connection) } else { Until::Lapse };
    let (prefix, key) = (Str::new(&ask.limiter.prefix), Str::new(&ask.key));
    let Ask { limit, ttl_ms, .. } = *ask;
    work(&waiters::Ask { prefix, key, limit, ttl_ms, until }, connection)
}

fn run_acquire(judge: &mut Judge, ask: &Ask) {
    let ctx = command(ask.client, ask.limiter, false);
    let taken =
        with_ask(ask, |ask, _| waiters::acquire(&ctx, ask, Reacquire::Refresh, ctx.now_ms()));
    let taken = match taken {
        Ok(taken) => taken,
        Err(why) => return refused(judge, &[ask.limiter], why),
    };
    with(|server| {
        judge.hear(server, Command::Acquire(ask));
        judge.answered(server, ask, &[ask.limiter], taken.outcome != Outcome::Denied);
        let waiting = judge.waiting(ask.limiter);
        server.demand(taken.waiting == waiting, "the state tells of other waiters");
    });
}

fn run_acquire_all(judge: &mut Judge, ask: &Ask, other: LimiterId) {
    let ctx = command(ask.client, ask.limiter, false);
    let prefixes = [Str::new(&ask.limiter.prefix), Str::new(&other.prefix)];
    let limits = [ask.limit; 2];
    let taken = with_ask(ask, |ask, _| {
        let now_ms = ctx.now_ms();
        waiters::acquire_all(&ctx, &prefixes, &limits, ask, Reacquire::Refresh, now_ms)
    });
    let limiters = [ask.limiter, other];
    match taken {
        Ok(taken) => with(|server| {
            judge.hear(server, Command::AcquireAll(ask, other));
            judge.answered(server, ask, &limiters, taken);
        }),
        Err(why) => refused(judge, &limiters, why),
    }
}

fn run_wait(judge: &mut Judge, ask: &Ask, patience_ms: Option<i64>) {
    let ctx = command(ask.client, ask.limiter, false);
    let now_ms = ctx.now_ms();
    let deadline_ms = patience_ms.map(|ms| now_ms + ms);
    let (turn, connection) = with_ask(ask, |ask, connection| {
        let turn = waiters::acquire_or_wait::<Bacquire>(&ctx, ask, connection, deadline_ms, now_ms);
        (turn, connection)
    });
    let granted = match turn {
        Ok(turn) => matches!(turn, Turn::Granted),
        Err(why) => return refused(judge, &[ask.limiter], why),
    };
    with(|server| {
        judge.hear(server, Command::Acquire(ask));
        judge.answered(server, ask, &[ask.limiter], granted);
        let is_blocked = server.clients[ask.client].blocked.is_some();
        server.demand(is_blocked != granted, "it was answered and blocked, or neither");
        if is_blocked {
            judge.waits(*ask, connection, deadline_ms);
        }
    });
}

/// The connection of the one who releases and renews is nobody else's.
const ANYBODY: ClientId = 0;

fn run_release(judge: &mut Judge, limiter: LimiterId, key: Name, may_write_paused: bool) {
    let ctx = command(ANYBODY, limiter, may_write_paused);
    let live = with(|server| u64::from(server.holds_live(limiter, key)));
    match waiters::release(&ctx, Str::new(&limiter.prefix), &[Str::new(&key)]) {
        Ok(released) => with(|server| {
            judge.hear(server, Command::Release(limiter, key));
            server.demand(released == live, "released another number than were live");
        }),
        Err(why) => refused(judge, &[limiter], why),
    }
}

fn run_renew(judge: &mut Judge, limiter: LimiterId, key: Name, ttl_ms: i64) {
    let ctx = command(ANYBODY, limiter, false);
    let was_live = with(|server| server.holds_live(limiter, key));
    let (prefix, name) = (Str::new(&limiter.prefix), Str::new(&key));
    match waiters::renew(&ctx, prefix, name, ttl_ms, ctx.now_ms()) {
        Ok(renewed) => with(|server| {
            judge.hear(server, Command::Renew(limiter, key, ttl_ms));
            server.demand(renewed == was_live, "renewed what was not live, or did not");
        }),
        Err(why) => refused(judge, &[limiter], why),
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |key: &Name| char::from(*key);
        match self {
            Step::Acquire(ask) => write!(f, "{}: ACQUIRE {ask}", ask.client),
            Step::AcquireAll(ask, other) => {
                write!(f, "{}: MACQUIRE also {other}, {ask}", ask.client)
            }
            Step::Wait(ask, None) => write!(f, "{}: BACQUIRE {ask}", ask.client),
            Step::Wait(ask, Some(ms)) => {
                write!(f, "{}: BACQUIRE {ask} timeout {ms} ms", ask.client)
            }
            Step::Release(limiter, key) => write!(f, "RELEASE {limiter} {}", name(key)),
            Step::Renew(limiter, key, ms) => {
                write!(f, "RENEW {limiter} {} ttl {ms} ms", name(key))
            }
            Step::PauseAndRelease(limiter, key) => {
                write!(f, "MULTI, CLIENT PAUSE, RELEASE {limiter} {}, EXEC", name(key))
            }
            Step::Pause => f.write_str("CLIENT PAUSE"),
            Step::Resume => f.write_str("the pause ends"),
            Step::LackReplicas => f.write_str("min-replicas-to-write is not met"),
            Step::HaveReplicas => f.write_str("min-replicas-to-write is met"),
            Step::Demote { lets_go: true } => f.write_str("REPLICAOF"),
            Step::Demote { lets_go: false } => f.write_str("demoted, nobody let go"),
            Step::Promote => f.write_str("REPLICAOF NO ONE"),
            Step::LeaveSlots => f.write_str("the slots go to another node"),
            Step::TakeSlots => f.write_str("the slots come back"),
            Step::Others(change) => write!(f, "others: {change}"),
            Step::OthersAtOurNext(change) => {
                write!(f, "another module, when we write next: {change}")
            }
            Step::ExpireAll => f.write_str("the server expires keys"),
            Step::Close(client) => write!(f, "{client}: closed"),
            Step::Break(client) => write!(f, "{client}: breaks, seen at the next write"),
            Step::Quit(client) => write!(f, "{client}: QUIT, behind what it waits for"),
            Step::Unblock(client) => write!(f, "{client}: CLIENT UNBLOCK TIMEOUT"),
            Step::UnblockWithError(client) => write!(f, "{client}: CLIENT UNBLOCK ERROR"),
            Step::PassTime => f.write_str("time passes, until something ends"),
            Step::Tick => f.write_str("2 ms pass"),
            Step::Turn => f.write_str("turn of the event loop"),
            Step::TurnAndSetClock(ms) => {
                write!(f, "turn of the event loop, and the clock is set by {ms} ms")
            }
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |key: &Name| char::from(*key);
        match self {
            Change::Del(limiter) => write!(f, "DEL {limiter}"),
            Change::Zrem(limiter, key) => write!(f, "ZREM {limiter} {}", name(key)),
            Change::Zadd(limiter, key, ms) => {
                write!(f, "ZADD {limiter} {}, to lapse in {ms} ms", name(key))
            }
            Change::Set(limiter) => write!(f, "SET {limiter}"),
            Change::Pexpire(limiter, ms) => write!(f, "PEXPIRE {limiter} {ms}"),
            Change::Flush(None) => f.write_str("FLUSHALL"),
            Change::Flush(Some(db)) => write!(f, "FLUSHDB in {db}"),
            Change::Swap => f.write_str("SWAPDB 0 1"),
        }
    }
}

impl fmt::Display for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ask { limiter, limit, ttl_ms, .. } = self;
        write!(f, "{limiter} {} limit {limit} ttl {ttl_ms} ms", char::from(self.key))?;
        f.write_str(if self.is_ephemeral { " EPHEMERAL" } else { "" })
    }
}

impl fmt::Display for LimiterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.db, char::from(self.prefix))
    }
}
