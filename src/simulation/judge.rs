//! The judge of the model check: knows who asked for what, hears what happened, and finds what
//! must not be. It shares no line with the module, and looks at the server's data only to compare.
//!
//! At every event:
//! - a grant goes to the first of the line, under its limit, not during a pause nor on a replica;
//! - a newcomer is let in under its limit and past nobody, and is denied only with a reason;
//! - a waiter gets one answer, with the reason that it says;
//! - a live lease is ended only by a RELEASE, or when all to whom it belonged have gone.
//!
//! After every step: exactly the leases are in the sets that should be, to the millisecond; what
//! the module thinks it knows of a set is so.
//!
//! When the server sleeps and no timer is due ([`Judge::overdue`]): nobody waits who could be
//! granted, or whose time is over; no lease is left to those who have gone. Excused is only a pump
//! that was refused, for as long as it may take to come back, and a timer that is late because the
//! clock was set.

use std::collections::{BTreeMap, BTreeSet};

use super::ffi::{Event, Server};
use super::waiters::{self, inspect, Answer};
use super::{Ask, ClientId, LimiterId, Name, CLIENTS};
use crate::limiter::{Expiry, Found};

/// How soon the pump must come back when the server took no writes, and when the slot was
/// elsewhere.
const REFUSED_RETRY_MS: i64 = 10;
const CLUSTER_PROBE_MS: i64 = 500;

/// The command that runs, for what it may do.
#[derive(Clone, Copy)]
pub enum Command<'s> {
    /// Of nobody: the pump, others' changes.
    None,
    Acquire(&'s Ask),
    AcquireAll(&'s Ask, LimiterId),
    Release(LimiterId, Name),
    Renew(LimiterId, Name, i64),
}

#[derive(Clone, Default, Hash)]
pub struct Judge {
    lines: BTreeMap<LimiterId, Vec<ClientId>>,
    waits: [Option<Wait>; CLIENTS],
    leases: BTreeMap<(LimiterId, Name), Lease>,
    /// Where the command at hand has given leases to its own client, and whether others changed
    /// something in the middle of it.
    given: Vec<LimiterId>,
    others_came_between: bool,
    /// Leases that would have ended with a connection, and were ended by others or lapsed: the
    /// module may still count them.
    ended_unasked: usize,
    /// The keys of another type before the step at hand.
    others: BTreeSet<LimiterId>,
    /// The slots have gone, or the server has become a replica that lets nobody go, at this time.
    pub left_ms: Option<i64>,
}

#[derive(Clone, Hash)]
struct Wait {
    ask: Ask,
    connection: u64,
    deadline_ms: Option<i64>,
    let_go: Option<LetGo>,
}

/// What was so when a waiter was let go.
#[derive(Clone, Copy, Hash)]
struct LetGo {
    was_granted: bool,
    was_over: bool,
    was_other: bool,
    was_moved: bool,
}

#[derive(Clone, Hash)]
struct Lease {
    lapse_ms: i64,
    whose: Whose,
    /// Those who were granted it and have no answer yet.
    granted: Vec<ClientId>,
    /// It has lapsed once, or its set has, or the server was a replica: nobody answers for what
    /// becomes of it.
    is_uncertain: bool,
}

/// Who was told that the lease is theirs.
#[derive(Clone, Copy, Hash, PartialEq)]
enum Whose {
    Nobodys,
    /// Somebody's, until it lapses.
    Somebodys,
    /// This connection's.
    Of(u64),
}

impl Lease {
    fn is_ephemeral(&self) -> bool {
        matches!(self.whose, Whose::Of(_))
    }

    fn may_be_tied(&self) -> bool {
        self.is_ephemeral() || !self.granted.is_empty()
    }

    fn belongs_to_nobody(&self) -> bool {
        self.whose == Whose::Nobodys && self.granted.is_empty()
    }
}

/// A lease that was just given, to a waiter or by the command.
struct Put {
    limiter: LimiterId,
    key: Name,
    found: Found,
    lapse_ms: i64,
    live_before: u64,
}

impl Judge {
    /// Hears what happened in a step.
    pub fn hear(&mut self, server: &mut Server, command: Command<'_>) {
        self.given.clear();
        self.others_came_between = false;
        let mut put: Option<Put> = None;
        for event in std::mem::take(&mut server.events) {
            if let (Event::LetGo(client), Some(given)) = (event, &put) {
                let is_its = |wait: &Wait| {
                    (wait.ask.limiter, wait.ask.key) == (given.limiter, given.key)
                        && wait.let_go.is_none()
                };
                if self.waits[client].as_ref().is_some_and(is_its) {
                    if let Some(put) = put.take() {
                        self.granted(server, client, &put);
                    }
                    continue;
                }
            }
            if let Some(put) = put.take() {
                self.given_by_command(server, command, &put);
            }
            match event {
                Event::Put { limiter, key, found, lapse_ms, live_before } => {
                    put = Some(Put { limiter, key, found, lapse_ms, live_before });
                }
                other => self.hear_other(server, command, other),
            }
        }
        if let Some(put) = put {
            self.given_by_command(server, command, &put);
        }
    }

    fn hear_other(&mut self, server: &mut Server, command: Command<'_>, event: Event) {
        match event {
            Event::Put { .. } => {}
            Event::Removed { limiter, key } => {
                let Some(lease) = self.leases.remove(&(limiter, key)) else { return };
                if lease.lapse_ms <= server.now_ms {
                    self.ended_unasked += usize::from(lease.may_be_tied());
                }
                let by_release =
                    matches!(command, Command::Release(l, k) if (l, k) == (limiter, key));
                let may_end = by_release
                    || lease.lapse_ms <= server.now_ms
                    || lease.belongs_to_nobody()
                    || lease.is_uncertain;
                server.demand(may_end, "a lease was taken from its holder");
            }
            Event::Lost { limiter, key } => {
                self.others_came_between = true;
                let lost = self.leases.remove(&(limiter, key));
                self.ended_unasked += usize::from(lost.is_some_and(|lease| lease.may_be_tied()));
            }
            Event::Wrote { limiter, key, lapse_ms } => {
                self.others_came_between = true;
                let (whose, granted) = (Whose::Somebodys, Vec::new());
                let lease = Lease { lapse_ms, whose, granted, is_uncertain: false };
                let lost = self.leases.insert((limiter, key), lease);
                self.ended_unasked += usize::from(lost.is_some_and(|lease| lease.may_be_tied()));
            }
            Event::Swapped => {
                let leases = std::mem::take(&mut self.leases).into_iter();
                let swapped =
                    leases.map(|((limiter, key), lease)| ((limiter.swapped(), key), lease));
                self.leases = swapped.collect();
            }
            Event::LetGo(client) => {
                self.leave_line(client);
                let Some(wait) = &mut self.waits[client] else {
                    return server.demand(false, "a client is let go that does not wait");
                };
                wait.let_go = Some(LetGo {
                    was_granted: false,
                    was_over: wait.deadline_ms.is_some_and(|ms| ms <= server.now_ms),
                    was_other: self.others.contains(&wait.ask.limiter),
                    was_moved: server.is_elsewhere || server.is_replica,
                });
            }
            Event::Replied(client, answer) => {
                let let_go = self.waits[client].as_ref().and_then(|wait| wait.let_go);
                let Some(let_go) = let_go else {
                    return server.demand(false, "a reply to somebody who was not let go");
                };
                let is_true = match answer {
                    Some(Answer::Granted) => let_go.was_granted,
                    Some(Answer::TimedOut) => !let_go.was_granted && let_go.was_over,
                    Some(Answer::WrongType) => !let_go.was_granted && let_go.was_other,
                    Some(Answer::Moved) => !let_go.was_granted && let_go.was_moved,
                    None => false,
                };
                server.demand(is_true, "the answer is not true");
            }
            Event::Written(client) => {
                let Some(wait) = self.waits[client].take() else { return };
                for lease in self.granted_to(client) {
                    lease.granted.retain(|other| *other != client);
                    if wait.ask.is_ephemeral {
                        lease.whose = Whose::Of(wait.connection);
                    } else {
                        lease.whose = Whose::Somebodys;
                        lease.granted.clear();
                    }
                }
            }
            Event::Unwritten(client) | Event::TakenFromLine(client) => {
                self.leave_line(client);
                self.waits[client] = None;
                self.granted_to(client)
                    .for_each(|lease| lease.granted.retain(|other| *other != client));
            }
            Event::Closed { connection, .. } => {
                for lease in self.leases.values_mut() {
                    if lease.whose == Whose::Of(connection) {
                        lease.whose = Whose::Nobodys;
                    }
                }
            }
        }
    }

    /// A waiter was let go with a lease.
    fn granted(&mut self, server: &mut Server, client: ClientId, put: &Put) {
        let Some(wait) = &mut self.waits[client] else { return };
        let (was_over, was_other, was_moved) = (false, false, false);
        wait.let_go = Some(LetGo { was_granted: true, was_over, was_other, was_moved });
        let ask = wait.ask;
        let line = self.lines.get(&ask.limiter);
        let is_first = line.is_some_and(|line| line.first() == Some(&client));
        server.demand(is_first, "a waiter was passed by one who came later");
        server.demand(!server.is_paused, "a grant during a pause");
        self.leave_line(client);
        self.check_limit(server, put, ask.limit);
        server.demand(put.lapse_ms == server.now_ms + ask.ttl_ms, "the lease's end is wrong");
        let lease = self.leases.entry((put.limiter, put.key)).or_insert(Lease {
            lapse_ms: put.lapse_ms,
            whose: Whose::Nobodys,
            granted: Vec::new(),
            is_uncertain: false,
        });
        lease.lapse_ms = put.lapse_ms;
        if put.found == Found::Added || ask.is_ephemeral {
            // It is this waiter's alone: EPHEMERAL ties it to whoever asked last.
            (lease.whose, lease.granted) = (Whose::Nobodys, vec![client]);
            lease.is_uncertain = false;
        } else if lease.whose == Whose::Nobodys {
            lease.granted.push(client);
        } else {
            (lease.whose, lease.granted) = (Whose::Somebodys, Vec::new());
        }
    }

    fn given_by_command(&mut self, server: &mut Server, command: Command<'_>, put: &Put) {
        let is_of = |ask: &Ask, limiter| (limiter, ask.key) == (put.limiter, put.key);
        match command {
            Command::Acquire(ask) if is_of(ask, ask.limiter) => self.acquired(server, ask, put),
            Command::AcquireAll(ask, other) if is_of(ask, ask.limiter) || is_of(ask, other) => {
                self.acquired(server, ask, put);
            }
            Command::Renew(limiter, key, ttl_ms) if (limiter, key) == (put.limiter, put.key) => {
                server.demand(put.found != Found::Added, "a renewal made a lease");
                server.demand(put.lapse_ms == server.now_ms + ttl_ms, "the lease's end is wrong");
                if let Some(lease) = self.leases.get_mut(&(limiter, key)) {
                    lease.lapse_ms = put.lapse_ms;
                }
            }
            _ => server.demand(false, "a lease was given to nobody who asked for it"),
        }
    }

    fn acquired(&mut self, server: &mut Server, ask: &Ask, put: &Put) {
        self.given.push(put.limiter);
        self.check_limit(server, put, ask.limit);
        let passed = put.found == Found::Added && self.lines.contains_key(&put.limiter);
        server.demand(!passed, "a newcomer passed the line");
        server.demand(put.lapse_ms == server.now_ms + ask.ttl_ms, "the lease's end is wrong");
        let connection = server.clients[ask.client].connection;
        let whose = match connection.filter(|_| ask.is_ephemeral) {
            Some(connection) => Whose::Of(connection),
            None => Whose::Somebodys,
        };
        let (lapse_ms, granted) = (put.lapse_ms, Vec::new());
        let lease = Lease { lapse_ms, whose, granted, is_uncertain: false };
        self.leases.insert((put.limiter, put.key), lease);
    }

    fn check_limit(&mut self, server: &mut Server, put: &Put, limit: u64) {
        match put.found {
            Found::Added => server.demand(put.live_before < limit, "more leases than the limit"),
            _ => {
                let is_live = self
                    .leases
                    .get(&(put.limiter, put.key))
                    .is_some_and(|lease| lease.lapse_ms > server.now_ms);
                server.demand(is_live, "a lapsed lease was refreshed");
            }
        }
    }

    /// The command answered that its client holds a lease, or does not.
    pub fn answered(&self, server: &mut Server, ask: &Ask, limiters: &[LimiterId], granted: bool) {
        let expected = if granted { limiters } else { &[] };
        server.demand(self.given == expected, "the answer is not what was done");
        // What another module has done since is no reason.
        if !granted && !self.others_came_between {
            let has_reason = limiters.iter().any(|limiter| {
                !server.holds_live(*limiter, ask.key)
                    && (self.lines.contains_key(limiter) || server.live(*limiter) >= ask.limit)
            });
            server.demand(has_reason, "denied without a reason");
        }
    }

    /// The client stands in line from now on.
    pub fn waits(&mut self, ask: Ask, connection: u64, deadline_ms: Option<i64>) {
        self.lines.entry(ask.limiter).or_default().push(ask.client);
        self.waits[ask.client] = Some(Wait { ask, connection, deadline_ms, let_go: None });
    }

    /// How many stand in line.
    pub fn waiting(&self, limiter: LimiterId) -> usize {
        self.lines.get(&limiter).map_or(0, Vec::len)
    }

    /// From now on the server is a replica: its master says what the data is.
    pub fn demoted(&mut self) {
        self.leases.values_mut().for_each(|lease| lease.is_uncertain = true);
    }

    /// The time at which something is to happen next.
    pub fn next_deadline_ms(&self, now_ms: i64) -> Option<i64> {
        let waits = self.waits.iter().flatten();
        waits.filter_map(|wait| wait.deadline_ms).filter(|ms| *ms > now_ms).min()
    }

    /// After every step.
    pub fn check(&mut self, server: &mut Server) {
        for ((limiter, _), lease) in &mut self.leases {
            // What has lapsed may be pruned, or live again if the clock is set back.
            lease.is_uncertain |= lease.lapse_ms <= server.now_ms || server.has_expired(*limiter);
        }
        let limiters: Vec<LimiterId> = server.keys.keys().copied().collect();
        self.others =
            limiters.iter().copied().filter(|limiter| server.is_other(*limiter)).collect();
        for limiter in limiters {
            let Some(set) = server.set(limiter).cloned() else { continue };
            for (key, lapse_ms) in &set.members {
                let known = self.leases.get(&(limiter, *key));
                let is_known = known.is_some_and(|lease| lease.lapse_ms == *lapse_ms);
                let matters = *lapse_ms > server.now_ms;
                server.demand(is_known || !matters, "a lease is there that nobody was given");
            }
            let facts = inspect::facts(limiter.db, &[limiter.prefix]);
            let first_ms = set.members.values().min().copied().unwrap_or(i64::MAX);
            let last_ms = set.members.values().max().copied().unwrap_or(i64::MIN);
            let are_true = facts.none_lapses_before_ms <= first_ms
                && match facts.expiry {
                    Expiry::Unknown => true,
                    Expiry::Absent => false,
                    Expiry::Covers(ms) => set.expiry_ms == Some(ms) && last_ms <= ms,
                };
            server.demand(are_true, "what is remembered of a set is not so");
        }
        for ((limiter, key), lease) in &self.leases {
            let matters =
                lease.lapse_ms > server.now_ms && !lease.belongs_to_nobody() && !lease.is_uncertain;
            let lapse_ms = server.set(*limiter).and_then(|set| set.members.get(key).copied());
            let is_there = lapse_ms == Some(lease.lapse_ms);
            server.demand(is_there || !matters, "a lease is gone before its end");
        }
        let waiting: usize = self.lines.values().map(Vec::len).sum();
        let totals = waiters::totals();
        let is_known = (totals.waiting, totals.lines) == (waiting, self.lines.len());
        server.demand(is_known, "the module counts other waiters than there are");
        let ephemeral = || self.leases.values().filter(|lease| lease.is_ephemeral());
        let (certain, most) =
            (ephemeral().filter(|lease| !lease.is_uncertain).count(), ephemeral().count());
        let is_known = (certain..=most + self.ended_unasked).contains(&totals.ephemeral);
        server.demand(is_known, "the module counts other ephemeral leases than there are");
    }

    /// What should have been done by now, if the server sleeps and no timer is due.
    pub fn overdue(&self, server: &Server) -> Option<&'static str> {
        let now_ms = server.now_ms;
        let undone = self.undone(server)?;
        if server.timer_is_a_little_late() {
            return None;
        }
        let latest_ms = [
            server.refused_ms.map(|ms| ms + REFUSED_RETRY_MS),
            server.elsewhere_ms.map(|ms| ms + CLUSTER_PROBE_MS),
            self.left_ms.map(|ms| ms + CLUSTER_PROBE_MS),
        ];
        let latest_ms = latest_ms.into_iter().flatten().max().unwrap_or(i64::MIN);
        let comes_back = server.timer.as_ref().is_some_and(|timer| timer.rings_ms <= latest_ms);
        (!comes_back || latest_ms <= now_ms).then_some(undone)
    }

    /// What is to be done now.
    pub fn undone(&self, server: &Server) -> Option<&'static str> {
        for wait in self.waits.iter().flatten() {
            if wait.let_go.is_some() {
                return Some("who was let go has no answer");
            }
            if wait.deadline_ms.is_some_and(|ms| ms <= server.now_ms) {
                return Some("the time of a waiter is over, and it waits");
            }
        }
        for (limiter, line) in &self.lines {
            let Some(head) = line.first().and_then(|head| self.waits[*head].as_ref()) else {
                return Some("nobody stands in line");
            };
            if server.is_replica || server.is_elsewhere {
                return Some("somebody waits for a slot that another server gives");
            }
            if server.is_other(*limiter) {
                return Some("somebody waits for a key of another type");
            }
            if server.live(*limiter) < head.ask.limit || server.holds_live(*limiter, head.ask.key) {
                return Some("the first of the line could have a slot, and waits");
            }
        }
        for ((limiter, key), lease) in &self.leases {
            let is_left = lease.belongs_to_nobody() && !lease.is_uncertain;
            if is_left && server.holds_live(*limiter, *key) {
                return Some("a slot is held by nobody");
            }
        }
        None
    }

    fn leave_line(&mut self, client: ClientId) {
        self.lines.values_mut().for_each(|line| line.retain(|other| *other != client));
        self.lines.retain(|_, line| !line.is_empty());
    }

    fn granted_to(&mut self, client: ClientId) -> impl Iterator<Item = &mut Lease> {
        self.leases.values_mut().filter(move |lease| lease.granted.contains(&client))
    }
}
