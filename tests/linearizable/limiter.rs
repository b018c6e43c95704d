//! What a limiter is, for a checker: which replies are right after which, and when.
//!
//! - Time is part of it. A command happens at one millisecond of the server's clock, between its
//!   request and its reply. A lease taken then is live until its ttl has passed.
//! - A wait happens twice: the client arrives, and the wait ends. So the line is part of the state,
//!   and first come, first served is part of the specification: only the head is granted; a command
//!   that frees a slot hands it over itself; and where a lapse did, no command that could write
//!   comes before the head has it.
//! - What nobody saw is left open: the state is the set of all [`Guess`]es that explain the replies
//!   so far. None is left when a reply is wrong.
//! - A command that was not answered happened, or did not. A wait that was not answered may have
//!   been granted; that lease ends at its time, or at any time before if it was taken back.

use std::cell::Cell;
use std::sync::Arc;

use todc_utils::Specification;

use crate::history::{Call, Operation, Reply};
use crate::times::{Times, FAR_MS};

thread_local! {
    /// How many steps the search may still try. After that every step is refused, so that the
    /// search ends, and has not found out.
    pub static STEPS_LEFT: Cell<usize> = const { Cell::new(0) };
}

pub struct Limiter;

/// A step that happens at one moment: a whole operation, or a part of a wait.
#[derive(Clone, Debug)]
pub struct Step {
    pub part: Part,
    pub operation: Arc<Operation>,
    /// The operation's number in its history.
    pub number: usize,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Part {
    Whole,
    /// A waiter lines up.
    Arrives,
    /// It is granted, or leaves the line.
    Ends,
}

/// One way the limiter may be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Guess {
    /// The live leases, soonest to lapse first.
    leases: Vec<Lease>,
    line: Vec<Waiter>,
    /// Those who asked and did not have to line up, by number.
    answered: Vec<usize>,
    /// The head of the line gets a slot before anything else happens: a command has made it free, or
    /// somebody before it got one. (A lapse is noticed a moment later, or after a pause.)
    hands_over: bool,
    times: Times,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Lease {
    key: Arc<str>,
    /// Whether it was granted to a waiter that may be gone, so that it may be taken back.
    is_doubtful: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Waiter {
    number: usize,
    key: Arc<str>,
    limit: usize,
    ttl_ms: i64,
}

impl Specification for Limiter {
    type State = Vec<Guess>;
    type Operation = Step;

    fn init() -> Vec<Guess> {
        vec![Guess::empty()]
    }

    fn apply(step: &Step, guesses: &Vec<Guess>) -> (bool, Vec<Guess>) {
        let Some(left) = STEPS_LEFT.get().checked_sub(guesses.len()) else {
            STEPS_LEFT.set(0);
            return (false, Vec::new());
        };
        STEPS_LEFT.set(left);
        let next = guesses.iter().flat_map(|guess| step.apply(guess));
        // When it was does not matter any more: what differs by it only is one.
        let mut next: Vec<_> = next.map(Guess::and_later).collect();
        next.sort();
        next.dedup();
        (!next.is_empty(), next)
    }
}

impl Step {
    /// What may be afterwards.
    fn apply(&self, guess: &Guess) -> Vec<Guess> {
        let Operation { call, reply, invoked_us, returned_us, waits_us, whole_us, .. } =
            &*self.operation;
        let ms = |us: i64| us.div_euclid(1000);
        let (from_ms, to_ms) = (ms(*invoked_us), ms(*returned_us));
        let mut next = Vec::new();
        match (self.part, call) {
            (Part::Whole, call) => {
                for guess in guess.pass((from_ms, to_ms)) {
                    if call.reads_only() && !guess.hands_over {
                        next.extend(guess.run(call, reply));
                    } else if !guess.owes_a_slot() {
                        next.extend(guess.run(call, reply).into_iter().map(Guess::hand_over));
                    }
                }
                if *reply == Reply::Unknown {
                    next.push(guess.clone());
                }
            }
            (Part::Arrives, Call::Bacquire { key, limit, ttl_ms, .. }) => {
                let (number, key) = (self.number, key.clone());
                let waiter = Waiter { number, key, limit: *limit, ttl_ms: *ttl_ms };
                for guess in guess.pass((from_ms, ms(self.operation.arrived_us()))) {
                    if !guess.owes_a_slot() {
                        let arrived = guess.arrive(waiter.clone());
                        next.extend(arrived.into_iter().map(Guess::hand_over));
                    }
                }
                if matches!(reply, Reply::Unknown | Reply::Error) && waits_us.is_none() {
                    next.push(guess.clone().answer(number)); // It did not arrive.
                }
            }
            (Part::Ends, _) if !guess.may_end(self.number, reply) => {} // Not worth the trouble.
            (Part::Ends, Call::Bacquire { timeout_ms, .. }) => {
                let patience_ms = if *timeout_ms == 0 { FAR_MS } else { *timeout_ms };
                let times_out_ms = from_ms + patience_ms;
                let leaves_ms = match (reply, whole_us) {
                    (Reply::Number(_), _) => times_out_ms,
                    (_, Some(whole_us)) => times_out_ms.min(ms(*whole_us)),
                    (_, None) => from_ms,
                };
                if *reply != Reply::Number(1) && !guess.hands_over {
                    let left = guess.pass((leaves_ms, to_ms)).into_iter();
                    next.extend(left.filter_map(|guess| guess.left(self.number)));
                }
                if matches!(reply, Reply::Number(1) | Reply::Unknown) {
                    let is_doubtful = *reply == Reply::Unknown;
                    let granted = guess.pass((from_ms, to_ms)).into_iter();
                    next.extend(granted.flat_map(|guess| guess.granted(self.number, is_doubtful)));
                }
                if !matches!(reply, Reply::Number(_)) {
                    next.extend(guess.clone().told(self.number));
                }
            }
            (part, call) => unreachable!("{part:?} of {call}"),
        }
        next
    }
}

impl Guess {
    pub fn empty() -> Self {
        let times = Times::start();
        Guess {
            leases: Vec::new(),
            line: Vec::new(),
            answered: Vec::new(),
            hands_over: false,
            times,
        }
    }

    /// Time passes; some leases may lapse, or be taken back.
    fn pass(&self, window_ms: (i64, i64)) -> Vec<Self> {
        let Some(times) = self.times.clone().pass(window_ms) else { return Vec::new() };
        let mut guess = Self { times, ..self.clone() };
        let mut next = Vec::new();
        while !guess.leases.is_empty() {
            let live = guess.times.clone().live(0);
            next.extend(live.map(|times| Self { times, ..guess.clone() }));
            let Some(times) = guess.times.clone().lapsed(0) else { break };
            guess = Self { times, ..guess }.end(0);
        }
        if guess.leases.is_empty() {
            next.push(guess);
        }
        for Lease { key, .. } in self.leases.iter().filter(|lease| lease.is_doubtful) {
            let taken_back = |guess: &Self| Some(guess.clone().end(guess.place(key)?));
            next.extend(next.iter().filter_map(taken_back).collect::<Vec<_>>());
        }
        next
    }

    fn and_later(self) -> Self {
        Self { times: self.times.and_later(), ..self }
    }

    fn place(&self, key: &str) -> Option<usize> {
        self.leases.iter().position(|lease| *lease.key == *key)
    }

    /// Whether the head of the line could have a slot.
    fn owes_a_slot(&self) -> bool {
        self.line
            .first()
            .is_some_and(|head| self.leases.len() < head.limit || self.place(&head.key).is_some())
    }

    fn end(mut self, place: usize) -> Self {
        self.leases.remove(place);
        self.times = self.times.remove(place);
        self
    }

    /// A lease from now on, at each place where its end may be in the order of ends.
    fn take(self, lease: Lease, ttl_ms: i64) -> Vec<Self> {
        let mut next = Vec::new();
        for place in 0..=self.leases.len() {
            let mut times = Some(self.times.insert(place, ttl_ms));
            if place > 0 {
                times = times.and_then(|times| times.before(place - 1, place, 0));
            }
            if place < self.leases.len() {
                times = times.and_then(|times| times.before(place, place + 1, 1));
            }
            if let Some(times) = times {
                let mut guess = Self { times, ..self.clone() };
                guess.leases.insert(place, lease.clone());
                next.push(guess);
            }
        }
        next
    }

    /// The same for a key that has a lease.
    fn refresh(self, place: usize, ttl_ms: i64) -> Vec<Self> {
        let lease = self.leases[place].clone();
        self.end(place).take(lease, ttl_ms)
    }

    fn arrive(mut self, waiter: Waiter) -> Vec<Self> {
        match self.place(&waiter.key) {
            Some(place) => self.answer(waiter.number).refresh(place, waiter.ttl_ms),
            None => {
                self.line.push(waiter);
                vec![self]
            }
        }
    }

    fn answer(mut self, number: usize) -> Self {
        self.answered.push(number);
        self.answered.sort_unstable();
        self
    }

    /// Whether its wait may end like this, as far as the line goes.
    fn may_end(&self, number: usize, reply: &Reply) -> bool {
        let place = self.line.iter().position(|waiter| waiter.number == number);
        match place {
            Some(place) => place == 0 || *reply != Reply::Number(1),
            None => self.answered.contains(&number),
        }
    }

    /// It learns what has been decided already.
    fn told(mut self, number: usize) -> Option<Self> {
        let at = self.answered.iter().position(|other| *other == number)?;
        self.answered.remove(at);
        Some(self)
    }

    /// It goes out of the line with nothing.
    fn left(mut self, number: usize) -> Option<Self> {
        let at = self.line.iter().position(|waiter| waiter.number == number)?;
        self.line.remove(at);
        Some(self)
    }

    /// It goes out of the line with a lease, or has got one already.
    fn granted(mut self, number: usize, is_doubtful: bool) -> Vec<Self> {
        if let Some(guess) = self.clone().told(number) {
            return vec![guess];
        }
        if !self.owes_a_slot() || self.line[0].number != number {
            return Vec::new();
        }
        let Waiter { key, ttl_ms, .. } = self.line.remove(0);
        let granted = match self.place(&key) {
            Some(place) => self.refresh(place, ttl_ms),
            None => self.take(Lease { key, is_doubtful }, ttl_ms),
        };
        granted.into_iter().map(Self::hand_over).collect()
    }

    /// The line is served as far as it goes.
    fn hand_over(mut self) -> Self {
        self.hands_over = self.owes_a_slot();
        self
    }

    /// What may be after a command that happens now, if this is a right reply.
    fn run(self, call: &Call, reply: &Reply) -> Vec<Self> {
        let live = self.leases.len();
        let (right, next) = match call {
            Call::Acquire { key, limit, ttl_ms, is_new } => {
                let (outcome, next) = match self.place(key) {
                    Some(_) if *is_new => (0, vec![self]),
                    Some(place) => (2, self.refresh(place, *ttl_ms)),
                    None if live < *limit && self.line.is_empty() => {
                        let lease = Lease { key: key.clone(), is_doubtful: false };
                        (1, self.take(lease, *ttl_ms))
                    }
                    None => (0, vec![self]),
                };
                if let Reply::State(state) = reply {
                    let told =
                        next.into_iter().filter_map(|guess| guess.shows(*limit, outcome, state));
                    return told.collect();
                }
                (i64::from(outcome > 0), next)
            }
            Call::Release { key } => match self.place(key) {
                Some(place) => (1, vec![self.end(place)]),
                None => (0, vec![self]),
            },
            Call::Renew { key, ttl_ms } => match self.place(key) {
                Some(place) => (1, self.refresh(place, *ttl_ms)),
                None => (0, vec![self]),
            },
            Call::Count => (live as i64, vec![self]),
            Call::Holders => match reply {
                Reply::Holders(holders) => return self.has(holders).into_iter().collect(),
                _ => (0, vec![self]),
            },
            Call::Info => match reply {
                Reply::Info(info) => return self.informs(info).into_iter().collect(),
                _ => (0, vec![self]),
            },
            Call::Bacquire { .. } => unreachable!("a wait has two parts"),
        };
        match reply {
            Reply::Number(number) if *number != right => Vec::new(),
            _ => next,
        }
    }

    /// The reply to WITHSTATE.
    fn shows(self, limit: usize, outcome: i64, state: &[i64; 4]) -> Option<Self> {
        let (live, waiting) = (self.leases.len(), self.line.len());
        let [said, said_live, wait_ms, said_waiting] = *state;
        if (said, said_live, said_waiting) != (outcome, live as i64, waiting as i64) {
            return None;
        }
        match (outcome, live.checked_sub(limit)) {
            (0, _) if limit == 0 => (wait_ms == -1).then_some(self),
            (0, Some(rank)) => self.lapses_in(rank, wait_ms),
            _ => (wait_ms == 0).then_some(self),
        }
    }

    fn has(self, holders: &[(Arc<str>, i64)]) -> Option<Self> {
        if holders.len() != self.leases.len() || !holders.is_sorted_by_key(|(_, ms)| *ms) {
            return None;
        }
        holders.iter().try_fold(self, |guess, (key, left_ms)| {
            let place = guess.place(key)?;
            guess.lapses_in(place, *left_ms)
        })
    }

    fn informs(self, info: &[i64; 3]) -> Option<Self> {
        let [held, waiting, next_lapse_ms] = *info;
        if (held, waiting) != (self.leases.len() as i64, self.line.len() as i64) {
            return None;
        }
        match held {
            0 => (next_lapse_ms == -1).then_some(self),
            _ => self.lapses_in(0, next_lapse_ms),
        }
    }

    fn lapses_in(self, place: usize, left_ms: i64) -> Option<Self> {
        let times = self.times.clone().lapses_in(place, left_ms)?;
        Some(Self { times, ..self })
    }
}
