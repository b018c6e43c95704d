//! The server of the model check: small, deterministic, and strict.
//!
//! It offers to `waiters.rs` what the real [`crate::ffi`] offers, with what the servers were found
//! to do (and when they do it), and notes every change for the [judge](super::judge). It is told
//! what happens by the steps of the exploration. Whatever would stop a real server, or make its
//! replicas differ, is noted as a [fault](Server::fault):
//!
//! - a write while clients are paused, on a replica, or in the middle of a notification;
//! - a key that is opened twice at once, or a call over an open key;
//! - a client that is let go twice, or not when it is gone;
//! - a timer that is stopped while it rings, or that is gone; two timers at once; one that rings
//!   again and again while the server takes no writes;
//! - any call while the module's state is locked, since the server may call back at once.
//!
//! One turn of its event loop: commands, and whatever else happens; [then](end_turn) timers that are
//! due; replies to those who were let go; these are written, or found to be unwritable; connections
//! that are to be closed are closed; it [sleeps](sleep), and tells that it did.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::waiters::{self, inspect, Answer, Pump};
use super::{ClientId, LimiterId, Name, CLIENTS};
use crate::limiter::{Found, Leases, Pruned, Put};

pub use crate::ffi::{NotOpened, Permit};

/// How much later than it should the timer may ring, when the clock was set.
const CLOCK_STEP_MS: i64 = 100;

thread_local! {
    static SERVER: RefCell<Server> = RefCell::new(Server::new(false));
}

/// Everything of the server, at one moment.
#[derive(Clone, Hash)]
pub struct Server {
    /// The system's clock.
    pub now_ms: i64,
    /// The clock that nobody can set.
    uptime_ms: i64,
    pub keys: BTreeMap<LimiterId, Value>,
    pub clients: [Client; CLIENTS],
    let_go: VecDeque<(BlockedClient, u64)>,
    pub timer: Option<SetTimer>,
    ringing: Option<i64>,
    open: BTreeSet<LimiterId>,
    listens_for_writes: bool,
    listens_for_waiters: bool,
    pub is_paused: bool,
    pub is_replica: bool,
    pub is_clustered: bool,
    pub is_elsewhere: bool,
    pub lacks_replicas: bool,
    /// How many leases are pruned at once.
    pub prune_step: u64,
    /// What another module does as soon as it is told of a change of ours.
    pub meddler: Option<Change>,
    /// When the pump was refused last, and when it was told that the slot is elsewhere.
    pub refused_ms: Option<i64>,
    pub elsewhere_ms: Option<i64>,
    pub events: Vec<Event>,
    pub fault: Option<&'static str>,
}

#[derive(Clone, Hash)]
pub enum Value {
    Set(Set),
    Other,
}

/// A sorted set, its scores as milliseconds.
#[derive(Clone, Default, Hash)]
pub struct Set {
    pub members: BTreeMap<Name, i64>,
    pub expiry_ms: Option<i64>,
}

/// Somebody who connects, again and again.
#[derive(Clone, Default, Hash)]
pub struct Client {
    last_id: u64,
    pub connection: Option<u64>,
    pub blocked: Option<Blocked>,
    pub link: Link,
    /// The connection is closed at the end of the turn, and takes no more commands.
    pub closes: bool,
}

#[derive(Clone, Hash)]
pub struct Blocked {
    id: BlockedClient,
    pub is_let_go: bool,
}

/// What becomes of a reply.
#[derive(Clone, Copy, Default, Hash, PartialEq)]
pub enum Link {
    #[default]
    Fine,
    /// It cannot be written; nobody has noticed yet.
    Broken,
    /// It is written, and the connection closed: QUIT came behind.
    Quits,
}

#[derive(Clone, Hash)]
pub struct SetTimer {
    /// It rings when both clocks have reached it. This time is its name, too.
    pub rings_ms: i64,
    uptime_ms: i64,
}

/// What others do to keys.
#[derive(Clone, Copy, Debug, Hash, PartialEq)]
pub enum Change {
    Del(LimiterId),
    Zrem(LimiterId, Name),
    Zadd(LimiterId, Name, i64),
    Set(LimiterId),
    Pexpire(LimiterId, i64),
    Flush(Option<i32>),
    Swap,
}

/// What happened, for the judge.
#[derive(Clone, Copy, Debug, Hash)]
pub enum Event {
    /// We gave a lease.
    Put {
        limiter: LimiterId,
        key: Name,
        found: Found,
        lapse_ms: i64,
        live_before: u64,
    },
    /// We ended a lease, or pruned it.
    Removed {
        limiter: LimiterId,
        key: Name,
    },
    /// Somebody else did, or the set's expiry.
    Lost {
        limiter: LimiterId,
        key: Name,
    },
    /// Somebody else gave a lease.
    Wrote {
        limiter: LimiterId,
        key: Name,
        lapse_ms: i64,
    },
    Swapped,
    /// We let a blocked client go.
    LetGo(ClientId),
    /// We answered it; the answer was written; it could not be.
    Replied(ClientId, Option<Answer>),
    Written(ClientId),
    Unwritten(ClientId),
    /// The server answered it itself.
    TakenFromLine(ClientId),
    Closed {
        client: ClientId,
        connection: u64,
    },
}

impl Server {
    pub fn new(is_clustered: bool) -> Self {
        Self {
            now_ms: 1_000_000,
            uptime_ms: 0,
            keys: BTreeMap::new(),
            clients: Default::default(),
            let_go: VecDeque::new(),
            timer: None,
            ringing: None,
            open: BTreeSet::new(),
            listens_for_writes: false,
            listens_for_waiters: false,
            is_paused: false,
            is_replica: false,
            is_clustered,
            is_elsewhere: false,
            lacks_replicas: false,
            prune_step: u64::MAX,
            meddler: None,
            refused_ms: None,
            elsewhere_ms: None,
            events: Vec::new(),
            fault: None,
        }
    }

    /// Notes the first thing that must not be.
    pub fn demand(&mut self, holds: bool, fault: &'static str) {
        if !holds {
            self.fault.get_or_insert(fault);
        }
    }

    /// Whether clients' writes are run now.
    pub fn takes_writes(&self) -> bool {
        !self.is_frozen() && !self.is_elsewhere && !self.lacks_replicas
    }

    pub fn is_frozen(&self) -> bool {
        self.is_paused || self.is_replica
    }

    /// Whether it does not tell when it has slept.
    pub fn forgoes_turns(&self) -> bool {
        !self.listens_for_waiters
    }

    /// A number that was never used. Each client has its own, so that the states after what two
    /// of them have done do not tell who came first.
    fn new_id(&mut self, client: ClientId) -> u64 {
        let last_id = &mut self.clients[client].last_id;
        *last_id += 1;
        *last_id * CLIENTS as u64 + client as u64
    }

    /// The set, unless it has expired, whether it is still there or not. It does not expire as long
    /// as it is open, also when it is given an expiry that has passed.
    pub fn set(&self, limiter: LimiterId) -> Option<&Set> {
        match self.keys.get(&limiter) {
            Some(Value::Set(set)) if self.open.contains(&limiter) => Some(set),
            Some(Value::Set(set)) if !self.has_expired(limiter) => Some(set),
            _ => None,
        }
    }

    pub fn is_other(&self, limiter: LimiterId) -> bool {
        matches!(self.keys.get(&limiter), Some(Value::Other))
    }

    pub fn has_expired(&self, limiter: LimiterId) -> bool {
        matches!(self.keys.get(&limiter), Some(Value::Set(set))
            if set.expiry_ms.is_some_and(|ms| ms <= self.now_ms))
    }

    pub fn live(&self, limiter: LimiterId) -> u64 {
        let lapses = self.set(limiter).into_iter().flat_map(|set| set.members.values());
        lapses.filter(|lapse_ms| **lapse_ms > self.now_ms).count() as u64
    }

    pub fn holds_live(&self, limiter: LimiterId, key: Name) -> bool {
        self.set(limiter).and_then(|set| set.members.get(&key)).is_some_and(|ms| *ms > self.now_ms)
    }

    pub fn timer_is_due(&self) -> bool {
        self.timer
            .as_ref()
            .is_some_and(|timer| timer.rings_ms <= self.now_ms && timer.uptime_ms <= self.uptime_ms)
    }

    /// When the timer rings, or is seen to be late because the clock was set forward.
    pub fn next_timer_ms(&self) -> Option<i64> {
        let timer = self.timer.as_ref()?;
        if timer.rings_ms > self.now_ms {
            return Some(timer.rings_ms);
        }
        let seen_ms = timer.rings_ms + CLOCK_STEP_MS + 1;
        let rings_ms = self.now_ms + (timer.uptime_ms - self.uptime_ms).max(0);
        Some(if seen_ms > self.now_ms { seen_ms.min(rings_ms) } else { rings_ms })
    }

    /// Whether the timer is late because the clock was set forward, and not as much as is noticed.
    pub fn timer_is_a_little_late(&self) -> bool {
        self.timer.as_ref().is_some_and(|timer| {
            let late_ms = self.now_ms - timer.rings_ms;
            timer.uptime_ms > self.uptime_ms && (0..=CLOCK_STEP_MS).contains(&late_ms)
        })
    }

    /// Whether the clock was not set since the timer was.
    pub fn timer_is_right(&self) -> bool {
        self.timer
            .as_ref()
            .is_none_or(|timer| timer.rings_ms - self.now_ms == timer.uptime_ms - self.uptime_ms)
    }

    /// Time passes. The clock shows even milliseconds, so that the leases of others, which end at odd
    /// ones, are never taken for ours: a key with the same end is the same lease to the module.
    pub fn wait_until(&mut self, now_ms: i64) {
        let now_ms = now_ms + now_ms % 2;
        self.uptime_ms += now_ms - self.now_ms;
        self.now_ms = now_ms;
    }

    fn client_of(&self, blocked: BlockedClient) -> Option<ClientId> {
        let is_it =
            |client: &Client| client.blocked.as_ref().is_some_and(|other| other.id == blocked);
        self.clients.iter().position(is_it)
    }

    fn open_set(&mut self, limiter: LimiterId) -> &mut Set {
        self.demand(self.open.contains(&limiter), "a closed set is used");
        let new = || Value::Set(Set::default());
        match self.keys.entry(limiter).or_insert_with(new) {
            Value::Set(set) => set,
            Value::Other => unreachable!("a key of another type is not opened"),
        }
    }

    fn remove_if_empty(&mut self, limiter: LimiterId) {
        if matches!(self.keys.get(&limiter), Some(Value::Set(set)) if set.members.is_empty()) {
            self.keys.remove(&limiter);
        }
    }

    fn remove_member(&mut self, limiter: LimiterId, key: Name) -> bool {
        let Some(Value::Set(set)) = self.keys.get_mut(&limiter) else { return false };
        let removed = set.members.remove(&key).is_some();
        self.remove_if_empty(limiter);
        removed
    }

    /// Removes a key that is not ours to remove; whether it was there.
    fn remove_key(&mut self, limiter: LimiterId) -> bool {
        let value = self.keys.remove(&limiter);
        if let Some(Value::Set(set)) = &value {
            let lost = set.members.keys().map(|key| Event::Lost { limiter, key: *key });
            self.events.extend(lost);
        }
        value.is_some()
    }
}

/// Works on the server. Nothing in `work` may call the module.
pub fn with<R>(work: impl FnOnce(&mut Server) -> R) -> R {
    SERVER.with_borrow_mut(|server| {
        server.demand(!inspect::is_locked(), "the server is called while the state is locked");
        work(server)
    })
}

/// Which events tell of a change.
#[derive(Clone, Copy)]
enum Class {
    Writes,
    Others,
}

fn notify(limiter: LimiterId, class: Class) {
    let listens = with(|server| match class {
        Class::Writes => server.listens_for_writes,
        Class::Others => server.listens_for_waiters,
    });
    if listens {
        Pump::key_changed(&Context::new(limiter.db, Call::Notice), &[limiter.prefix]);
    }
}

/// Deletes the key if its expiry is reached, as a look at it does.
fn expire(limiter: LimiterId) {
    let expires = with(|server| server.has_expired(limiter) && !server.is_frozen());
    if expires {
        with(|server| server.remove_key(limiter));
        notify(limiter, Class::Others);
    }
}

/// The server looks for keys whose expiry is reached by itself; whether there were any.
pub fn expire_all() -> bool {
    let expired: Vec<LimiterId> = with(|server| {
        let limiters = server.keys.keys().copied();
        limiters.filter(|limiter| server.has_expired(*limiter) && !server.is_frozen()).collect()
    });
    expired.iter().for_each(|limiter| expire(*limiter));
    !expired.is_empty()
}

/// Somebody else's command; whether it changed anything.
pub fn change(change: Change) -> bool {
    if let Change::Del(limiter)
    | Change::Zrem(limiter, _)
    | Change::Zadd(limiter, ..)
    | Change::Set(limiter)
    | Change::Pexpire(limiter, _) = change
    {
        expire(limiter);
    }
    let notice = |db| Context::new(db, Call::Notice);
    match change {
        Change::Del(limiter) => {
            let changed = with(|server| server.remove_key(limiter));
            if changed {
                notify(limiter, Class::Writes);
            }
            changed
        }
        Change::Zrem(limiter, key) => {
            let changed = with(|server| {
                let removed = server.remove_member(limiter, key);
                server.events.extend(removed.then_some(Event::Lost { limiter, key }));
                removed
            });
            if changed {
                notify(limiter, Class::Writes);
            }
            changed
        }
        Change::Zadd(limiter, key, ttl_ms) => {
            let changed = with(|server| {
                let lapse_ms = server.now_ms + ttl_ms;
                let new = || Value::Set(Set::default());
                let Value::Set(set) = server.keys.entry(limiter).or_insert_with(new) else {
                    return false;
                };
                if set.members.insert(key, lapse_ms) == Some(lapse_ms) {
                    return false;
                }
                server.events.push(Event::Wrote { limiter, key, lapse_ms });
                true
            });
            if changed {
                notify(limiter, Class::Writes);
            }
            changed
        }
        Change::Set(limiter) => {
            with(|server| {
                server.remove_key(limiter);
                server.keys.insert(limiter, Value::Other);
            });
            notify(limiter, Class::Others);
            true
        }
        Change::Pexpire(limiter, ms) => {
            let changed = with(|server| {
                let expiry_ms = server.now_ms + ms;
                match server.keys.get_mut(&limiter) {
                    Some(Value::Set(set)) => set.expiry_ms = Some(expiry_ms),
                    _ => return false,
                }
                true
            });
            if changed {
                notify(limiter, Class::Writes);
            }
            changed
        }
        Change::Flush(db) => {
            Pump::database_flushed(&notice(0), db);
            with(|server| {
                let all: Vec<LimiterId> = server.keys.keys().copied().collect();
                for limiter in all {
                    if db.is_none_or(|db| db == limiter.db) {
                        server.remove_key(limiter);
                    }
                }
            });
            Pump::database_flushed(&notice(0), db); // Told of the start and of the end.
            true
        }
        Change::Swap => {
            with(|server| {
                let keys = std::mem::take(&mut server.keys).into_iter();
                server.keys = keys.map(|(limiter, value)| (limiter.swapped(), value)).collect();
                server.events.push(Event::Swapped);
            });
            Pump::databases_swapped(&notice(0), 0, 1);
            true
        }
    }
}

/// A connection is closed.
pub fn close(client: ClientId) -> bool {
    let Some(connection) = with(|server| server.clients[client].connection) else { return false };
    Pump::disconnected(&Context::new(0, Call::Notice), connection);
    take_from_line(client);
    with(|server| {
        let last_id = server.clients[client].last_id;
        server.clients[client] = Client { last_id, ..Client::default() };
        server.events.push(Event::Closed { client, connection });
    });
    true
}

/// The server ends a wait by itself: the client is gone, or is answered with an error. Whether it
/// was blocked.
pub fn take_from_line(client: ClientId) -> bool {
    let Some(blocked) = with(|server| server.clients[client].blocked.clone()) else { return false };
    waiters::gone(&Context::new(0, Call::Notice), blocked.id);
    forget_blocked(client);
    true
}

/// CLIENT UNBLOCK, where the server does it safely; whether the client waited.
pub fn unblock(client: ClientId) -> bool {
    let blocked = with(|server| server.clients[client].blocked.clone());
    let Some(blocked) = blocked.filter(|blocked| !blocked.is_let_go) else { return false };
    waiters::gone(&Context::new(0, Call::Notice), blocked.id);
    forget_blocked(client);
    true
}

fn forget_blocked(client: ClientId) {
    with(|server| {
        let blocked = server.clients[client].blocked.take();
        let is_let_go = blocked.is_some_and(|blocked| blocked.is_let_go);
        server.demand(is_let_go, "a client that is gone was not let go");
        server.events.push(Event::TakenFromLine(client));
    });
}

/// The server becomes a replica. It lets blocked clients go, but for Valkey 9.1 in a cluster.
pub fn demote(lets_go: bool) {
    with(|server| server.is_replica = true);
    for client in 0..CLIENTS {
        if lets_go && take_from_line(client) {
            with(|server| {
                let client = &mut server.clients[client];
                (client.link, client.closes) = (Link::Quits, true); // When the error is written.
            });
        }
    }
    Pump::data_replaced();
}

/// It becomes a master again.
pub fn promote() {
    with(|server| server.is_replica = false);
    Pump::data_replaced();
}

/// The end of a turn of the event loop: timers, replies, what is to be closed.
pub fn end_turn() {
    let due = with(|server| server.timer.clone().filter(|_| server.timer_is_due()));
    if let Some(timer) = due {
        let refused_ms = with(|server| {
            server.ringing = server.timer.take().map(|timer| timer.rings_ms);
            server.refused_ms.take()
        });
        Pump::ring(&Context::new(0, Call::Timer));
        with(|server| {
            server.demand(server.ringing == Some(timer.rings_ms), "the timer was freed twice");
            server.ringing = None;
            let spins = server.refused_ms.is_some() && server.timer_is_due();
            server.demand(!spins, "a pump that was refused comes back at once");
            server.refused_ms = server.refused_ms.or(refused_ms);
        });
    }
    let mut replied = Vec::new();
    while let Some((blocked, number)) = with(|server| server.let_go.pop_front()) {
        let Some(client) = with(|server| server.client_of(blocked)) else { continue };
        with(|server| server.clients[client].blocked = None);
        let answer = waiters::reply(number);
        with(|server| server.events.push(Event::Replied(client, answer)));
        replied.push(client);
    }
    for client in replied {
        with(|server| {
            let link = server.clients[client].link;
            server.clients[client].closes |= link != Link::Fine;
            server.events.push(match link {
                Link::Broken => Event::Unwritten(client),
                Link::Fine | Link::Quits => Event::Written(client),
            });
        });
    }
    for client in 0..CLIENTS {
        if with(|server| server.clients[client].closes) {
            close(client);
        }
    }
}

/// The server sleeps, and wakes. Meanwhile the system's clock may have been set.
pub fn sleep(clock_is_set_by_ms: i64) {
    with(|server| {
        server.now_ms += clock_is_set_by_ms;
        if clock_is_set_by_ms != 0 {
            (server.refused_ms, server.elsewhere_ms) = (None, None); // By another clock.
        }
    });
    if with(|server| server.listens_for_waiters) {
        Pump::turned(&Context::new(0, Call::Notice));
    }
}

/// What the server runs at the moment.
#[derive(Clone, Copy, PartialEq)]
pub enum Call {
    /// A command, maybe in a transaction that has paused the clients itself.
    Command {
        client: ClientId,
        may_write_paused: bool,
    },
    Timer,
    /// A notification, or a client that is gone: nothing may be written.
    Notice,
}

pub struct Context {
    db: Cell<i32>,
    call: Call,
}

impl Context {
    pub fn new(db: i32, call: Call) -> Self {
        Self { db: Cell::new(db), call }
    }

    pub fn now_ms(&self) -> i64 {
        with(|server| server.now_ms)
    }

    pub fn db(&self) -> i32 {
        self.db.get()
    }

    pub fn select_db(&self, db: i32) -> bool {
        with(|server| server.demand(self.call == Call::Timer, "a client's database is changed"));
        self.db.set(db);
        true
    }

    pub fn is_clustered(&self) -> bool {
        with(|server| server.is_clustered)
    }

    pub fn is_read_only_replica(&self) -> bool {
        with(|server| server.is_replica)
    }

    pub fn is_paused(&self) -> bool {
        with(|server| server.is_paused)
    }

    pub fn may_write_unasked(&self) -> bool {
        with(|server| {
            if server.is_frozen() {
                server.refused_ms = Some(server.now_ms);
            }
            !server.is_frozen()
        })
    }

    pub fn write_permit(&self, key: Str<'_>) -> Permit {
        let limiter = self.limiter(key);
        let permit = with(|server| {
            server.demand(server.open.is_empty(), "a command is called over an open key");
            server.demand(self.call == Call::Timer, "a command is called in a notification");
            if server.is_elsewhere {
                server.elsewhere_ms = Some(server.now_ms);
                Permit::Elsewhere
            } else if server.lacks_replicas {
                server.refused_ms = Some(server.now_ms);
                Permit::NotNow
            } else {
                Permit::Granted
            }
        });
        if permit == Permit::Granted {
            expire(limiter);
        }
        permit
    }

    pub fn closes_after_replies(&self, connection: u64) -> bool {
        with(|server| {
            let mut clients = server.clients.iter();
            let client = clients.find(|client| client.connection == Some(connection));
            client.is_none_or(|client| client.link == Link::Quits)
        })
    }

    fn limiter(&self, prefix: Str<'_>) -> LimiterId {
        LimiterId { db: self.db(), prefix: prefix.name() }
    }

    fn check_write(&self, server: &mut Server) {
        let may_write_paused = matches!(self.call, Call::Command { may_write_paused: true, .. });
        server.demand(!server.is_replica, "a write on a replica");
        server.demand(!server.is_paused || may_write_paused, "a write during a pause");
        server.demand(self.call != Call::Notice, "a write in a notification");
    }
}

/// A string: a name of one byte, for the limiters and holders here.
#[derive(Clone, Copy)]
pub struct Str<'c>(&'c [u8]);

impl<'c> Str<'c> {
    pub fn new(name: &'c Name) -> Self {
        Self(std::slice::from_ref(name))
    }

    pub fn bytes(&self) -> &'c [u8] {
        self.0
    }

    fn name(self) -> Name {
        self.0[0]
    }
}

pub struct OwnedStr(Name);

impl OwnedStr {
    pub fn copy(bytes: &[u8]) -> Option<Self> {
        Some(Self(bytes[0]))
    }

    pub fn as_str(&self) -> Str<'_> {
        Str::new(&self.0)
    }
}

pub struct SortedSet<'c> {
    ctx: &'c Context,
    limiter: LimiterId,
    is_changed: bool,
}

impl<'c> SortedSet<'c> {
    pub fn open(ctx: &'c Context, prefix: Str<'c>) -> Result<Self, NotOpened> {
        let limiter = ctx.limiter(prefix);
        expire(limiter);
        with(|server| {
            server.demand(ctx.call != Call::Notice, "a key is opened in a notification");
            if server.is_other(limiter) {
                return Err(NotOpened::WrongType);
            }
            if server.set(limiter).is_none() && server.is_frozen() {
                return Err(NotOpened::Frozen);
            }
            let opened = server.open.insert(limiter);
            server.demand(opened, "a key is opened twice at once");
            Ok(Self { ctx, limiter, is_changed: false })
        })
    }

    pub fn holds_until(&self, key: Str<'_>, lapse_ms: i64) -> bool {
        self.look(|set| set.members.get(&key.name()) == Some(&lapse_ms))
    }

    fn look<R>(&self, look: impl FnOnce(&Set) -> R) -> R {
        with(|server| {
            server.demand(server.open.contains(&self.limiter), "a closed set is used");
            look(server.set(self.limiter).unwrap_or(&Set::default()))
        })
    }
}

impl Leases for SortedSet<'_> {
    type Key<'k> = Str<'k>;

    fn prune(&mut self, now_ms: i64, at_most: u64) -> Pruned {
        let mut lapsed: Vec<(i64, Name)> = self.look(|set| {
            let members = set.members.iter().map(|(key, lapse_ms)| (*lapse_ms, *key));
            members.filter(|(lapse_ms, _)| *lapse_ms <= now_ms).collect()
        });
        lapsed.sort_unstable();
        let at_most = at_most.min(with(|server| server.prune_step)) as usize;
        let removed = lapsed.len().min(at_most);
        let keys: Vec<Name> = lapsed.iter().map(|(_, key)| *key).collect();
        let names: Vec<Str<'_>> = keys[..removed].iter().map(Str::new).collect();
        self.remove(&names);
        Pruned { removed: removed as u64, left: (lapsed.len() - removed) as u64 }
    }

    fn holds(&self, key: &Str<'_>) -> bool {
        self.look(|set| set.members.contains_key(&key.name()))
    }

    fn has_lapsed(&self, key: &Str<'_>, now_ms: i64) -> bool {
        self.look(|set| set.members.get(&key.name()).is_some_and(|ms| *ms <= now_ms))
    }

    fn count(&self) -> u64 {
        self.look(|set| set.members.len() as u64)
    }

    fn put(&mut self, key: &Str<'_>, lapse_ms: i64, put: Put) -> Found {
        let (limiter, key) = (self.limiter, key.name());
        let old = self.look(|set| set.members.get(&key).copied());
        let found = match (old, put) {
            (None, Put::MoveOnly) | (Some(_), Put::AddOnly) => return Found::Refused,
            (None, _) => Found::Added,
            (Some(old_ms), _) if old_ms == lapse_ms => Found::Same,
            (Some(_), _) => Found::Moved,
        };
        with(|server| {
            let live_before = server.live(limiter);
            server.events.push(Event::Put { limiter, key, found, lapse_ms, live_before });
            if found != Found::Same {
                self.is_changed = true;
                self.ctx.check_write(server);
                server.open_set(limiter).members.insert(key, lapse_ms);
            }
        });
        found
    }

    fn remove(&mut self, keys: &[Str<'_>]) -> u64 {
        let limiter = self.limiter;
        let mut removed = 0;
        for key in keys {
            with(|server| {
                if server.remove_member(limiter, key.name()) {
                    removed += 1;
                    self.is_changed = true;
                    self.ctx.check_write(server);
                    server.events.push(Event::Removed { limiter, key: key.name() });
                }
            });
        }
        removed
    }

    fn any_after(&self, time_ms: i64) -> bool {
        self.look(|set| set.members.values().any(|ms| *ms > time_ms))
    }

    fn next_lapse_ms(&self) -> Option<i64> {
        self.look(|set| set.members.values().min().copied())
    }

    fn last_lapse_ms(&self) -> Option<i64> {
        self.look(|set| set.members.values().max().copied())
    }

    fn expiry_ms(&self) -> Option<i64> {
        self.look(|set| set.expiry_ms)
    }

    fn set_expiry_ms(&mut self, expiry_ms: Option<i64>) {
        self.is_changed = true;
        with(|server| {
            self.ctx.check_write(server);
            server.open_set(self.limiter).expiry_ms = expiry_ms;
        });
    }
}

impl Drop for SortedSet<'_> {
    fn drop(&mut self) {
        let meddler = with(|server| {
            server.open.remove(&self.limiter);
            if self.is_changed {
                server.meddler.take()
            } else {
                None
            }
        });
        meddler.map(change);
    }
}

/// What the command that blocks is to the server: [`waiters::reply`] and [`waiters::gone`].
pub trait Blocking {}

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockedClient(u64);

impl BlockedClient {
    pub fn block<B: Blocking>(ctx: &Context) -> Option<Self> {
        with(|server| {
            let Call::Command { client, .. } = ctx.call else {
                server.demand(false, "nobody is there to be blocked");
                return None;
            };
            let blocked = Self(server.new_id(client));
            server.clients[client].blocked = Some(Blocked { id: blocked, is_let_go: false });
            Some(blocked)
        })
    }

    pub fn let_go(self, number: u64) {
        self.unblock(number);
    }

    pub fn let_go_unanswered(self) {
        self.unblock(0);
    }

    fn unblock(self, number: u64) {
        with(|server| {
            let client = server.client_of(self);
            server.demand(client.is_some(), "a client is let go that is not blocked");
            let Some(client) = client else { return };
            if let Some(blocked) = &mut server.clients[client].blocked {
                let was_let_go = std::mem::replace(&mut blocked.is_let_go, true);
                server.demand(!was_let_go, "a client is let go twice");
            }
            if number != 0 {
                server.let_go.push_back((self, number));
                server.events.push(Event::LetGo(client));
            }
        });
    }
}

pub trait Listener {
    fn ring(ctx: &Context);
    fn key_changed(ctx: &Context, key: &[u8]);
    fn data_replaced();
    fn database_flushed(ctx: &Context, db: Option<i32>);
    fn databases_swapped(ctx: &Context, first: i32, second: i32);
    fn disconnected(ctx: &Context, connection: u64);
    fn turned(ctx: &Context);
    #[allow(dead_code)] // What panics here ends the test.
    fn missed(ctx: &Context);
}

pub fn listen_for_writes<L: Listener>(_: &Context) {
    with(|server| {
        server.demand(!server.listens_for_writes, "it listens twice");
        server.listens_for_writes = true;
    });
}

pub fn listen_for_waiters<L: Listener>(_: &Context) {
    with(|server| {
        server.demand(!server.listens_for_waiters, "it listens twice");
        server.listens_for_waiters = true;
    });
}

#[derive(Clone, Debug, Hash)]
pub struct Timer(i64);

impl Timer {
    pub fn start<L: Listener>(_: &Context, period_ms: i64) -> Self {
        with(|server| {
            server.demand(server.timer.is_none(), "there are two timers");
            let (rings_ms, uptime_ms) = (server.now_ms + period_ms, server.uptime_ms + period_ms);
            server.timer = Some(SetTimer { rings_ms, uptime_ms });
            Self(rings_ms)
        })
    }

    pub fn stop(self, _: &Context) {
        with(|server| {
            if server.ringing == Some(self.0) {
                server.ringing = None;
            }
            let runs = server.timer.take_if(|timer| timer.rings_ms == self.0).is_some();
            server.demand(runs, "a timer is stopped that does not run");
        });
    }
}

/// A client connects, if it is not connected.
pub fn connection(client: ClientId) -> u64 {
    with(|server| {
        if let Some(connection) = server.clients[client].connection {
            return connection;
        }
        let connection = server.new_id(client);
        server.clients[client].connection = Some(connection);
        connection
    })
}

/// The server of this thread, at this moment.
pub fn now() -> Server {
    with(|server| server.clone())
}

pub fn put_back(server: &Server) {
    SERVER.with_borrow_mut(|it| it.clone_from(server));
}
