//! The model check of the line and its pump: the real `waiters.rs`, compiled here once more beside
//! a simulated server ([`ffi`]), taken through every interleaving of what can happen ([`Step`]),
//! with a [`Judge`] that hears of all of it.
//!
//! A [scene](scenes) is a handful of steps, each with the number of times it may be taken. From
//! the start, every step that is possible is taken in every state, breadth first, so the first
//! fault found comes with its shortest trace. States that were seen before (by a 64-bit hash of
//! the module's whole state, the server's and the judge's) are not gone through again. In every
//! state it is also tried whether all comes to rest: troubles end, then everybody goes, and
//! nothing may be left behind.
//!
//! `make test` explores each scene to a depth that takes seconds, `make explore` as deep as time
//! allows, up to the end. [`long_walks`](tests::long_walks) takes hundreds of steps at random
//! instead.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{self, AssertUnwindSafe};
use std::time::{Duration, Instant};

mod ffi;
mod judge;
mod scenes;
mod steps;
// Here `super::ffi` is the simulated server.
#[allow(dead_code, clippy::duplicate_mod)]
#[path = "waiters.rs"]
mod waiters;

use ffi::{with, Server};
use judge::Judge;
use scenes::Scene;
use steps::Step;
use waiters::inspect;

/// Who sends commands, one connection at a time each.
type ClientId = usize;
const CLIENTS: usize = 4;

/// A key of a holder, or a prefix: a letter.
type Name = u8;

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
struct LimiterId {
    db: i32,
    prefix: Name,
}

impl LimiterId {
    /// What it is called after SWAPDB 0 1.
    fn swapped(self) -> Self {
        Self { db: 1 - self.db, ..self }
    }
}

/// What a client asks for.
#[derive(Clone, Copy, Debug, Hash, PartialEq)]
struct Ask {
    client: ClientId,
    limiter: LimiterId,
    key: Name,
    limit: u64,
    ttl_ms: i64,
    is_ephemeral: bool,
}

/// How many times the timer may ring until there is nothing more to do: more than there are leases
/// and waiters at once.
const RINGS_TO_REST: usize = 20;

/// What must not be.
type Fault = &'static str;

/// All there is, at one moment.
#[derive(Clone, Hash)]
struct World {
    module: inspect::State,
    server: Server,
    judge: Judge,
    /// How many times each step of the scene may still be taken.
    left: Vec<u8>,
}

impl World {
    fn start(scene: &Scene) -> Self {
        waiters::reset();
        let mut server = Server::new(scene.is_clustered);
        server.prune_step = scene.prune_step;
        let left = scene.steps.iter().map(|(_, times)| *times).collect();
        Self { module: inspect::State::now(), server, judge: Judge::default(), left }
    }

    /// The world after one more of the scene's steps; `None` if it is not possible.
    ///
    /// # Errors
    /// What must not be.
    fn after(&self, scene: &Scene, index: usize) -> Result<Option<Self>, Fault> {
        let step = scene.steps[index].0;
        if self.left[index] == 0 || !step.is_possible(&self.server) {
            return Ok(None);
        }
        let mut judge = self.enter();
        if !take(step, &mut judge)? {
            return Ok(None);
        }
        let mut left = self.left.clone();
        left[index] -= 1;
        Ok(Some(Self { module: inspect::State::now(), server: ffi::now(), judge, left }))
    }

    /// The world after these steps, which are known to be possible.
    fn after_all(&self, scene: &Scene, indices: &[usize]) -> Result<Self, Fault> {
        let mut judge = self.enter();
        let mut left = self.left.clone();
        for index in indices {
            if !take(scene.steps[*index].0, &mut judge)? {
                return Err("the second time it went otherwise");
            }
            left[*index] -= 1;
        }
        Ok(Self { module: inspect::State::now(), server: ffi::now(), judge, left })
    }

    /// Whether all comes to rest from here.
    fn comes_to_rest(&self) -> Result<(), Fault> {
        let mut judge = self.enter();
        come_to_rest(&mut judge)
    }

    /// Makes this the state of the module and the server.
    fn enter(&self) -> Judge {
        self.module.put_back();
        ffi::put_back(&self.server);
        self.judge.clone()
    }

    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.hash(&mut hasher);
        hasher.finish()
    }
}

/// Takes a step; whether it was possible.
///
/// # Errors
/// What must not be.
fn take(step: Step, judge: &mut Judge) -> Result<bool, Fault> {
    let run = panic::catch_unwind(AssertUnwindSafe(|| step.run(judge)));
    let was_possible = run.map_err(|_| "a panic")?;
    let fault = with(|server| {
        let turns = matches!(step, Step::Turn | Step::TurnAndSetClock(_));
        let sleeps = was_possible && turns && !server.timer_is_due();
        server.fault.take().or_else(|| judge.overdue(server).filter(|_| sleeps))
    });
    fault.map_or(Ok(was_possible), Err)
}

/// Ends all troubles, and sees that everything is done then; lets everybody go, and sees that
/// nothing is left.
fn come_to_rest(judge: &mut Judge) -> Result<(), Fault> {
    for step in [Step::Resume, Step::HaveReplicas, Step::Promote, Step::TakeSlots] {
        take(step, judge)?;
    }
    do_all(judge)?;
    for client in 0..CLIENTS {
        take(Step::Close(client), judge)?;
    }
    do_all(judge)?;
    for _ in 0..RINGS_TO_REST {
        take(Step::Turn, judge)?;
        if inspect::is_empty() && with(|server| server.timer.is_none()) {
            return Ok(());
        }
        // The pump has yet to come back for leases that the judge is uncertain of, each at its own
        // time. Or nobody has ever waited: then a timer without a purpose is not stopped, and rings.
        if inspect::is_due() || with(|server| server.forgoes_turns()) {
            wait_for_timer();
        }
    }
    Err("something is remembered of those who have gone")
}

/// Lets the server go on until there is nothing to be done.
fn do_all(judge: &mut Judge) -> Result<(), Fault> {
    for _ in 0..RINGS_TO_REST {
        take(Step::Turn, judge)?;
        if with(|server| server.timer_is_due()) {
            continue;
        }
        if with(|server| judge.undone(server)).is_none() {
            return Ok(());
        }
        wait_for_timer(); // The pump is excused for now, or that were a fault.
    }
    Err("it never comes to rest")
}

fn wait_for_timer() {
    with(|server| server.wait_until(server.next_timer_ms().unwrap_or(server.now_ms)));
}

/// How far an exploration went.
#[derive(Debug)]
struct Explored {
    states: usize,
    steps: usize,
    depth: usize,
    /// Nothing more can happen in this scene than what was tried.
    is_complete: bool,
}

/// Takes every step in every state, as deep as `depth` and until `end`.
///
/// # Errors
/// What must not be, with the steps that lead to it.
fn explore(scene: &Scene, depth: usize, end: Instant) -> Result<Explored, String> {
    struct Seen {
        from: usize,
        by: usize,
    }
    let trace = |seen: &[Seen], mut at: usize| {
        let mut steps = Vec::new();
        while at != 0 {
            steps.push(seen[at].by);
            at = seen[at].from;
        }
        steps.reverse();
        steps
    };
    let tell = |steps: &[usize], fault: &str| {
        let steps = steps.iter().map(|step| scene.steps[*step].0);
        told(scene.name, steps, fault)
    };

    let start = World::start(scene);
    let mut digests = HashSet::from([start.digest()]);
    let mut seen = vec![Seen { from: 0, by: 0 }];
    let (mut steps_taken, mut reached) = (0, 0);
    let mut at = 0;
    while at < seen.len() && Instant::now() < end {
        let steps = trace(&seen, at);
        reached = steps.len();
        // What led here is taken again, so that not every state is to be kept.
        let world = start.after_all(scene, &steps).map_err(|fault| tell(&steps, fault))?;
        world.comes_to_rest().map_err(|fault| tell(&steps, &format!("at the end: {fault}")))?;
        if steps.len() < depth {
            for step in 0..scene.steps.len() {
                let next = world.after(scene, step);
                let next = next.map_err(|fault| tell(&[&steps[..], &[step]].concat(), fault))?;
                let Some(next) = next else { continue };
                steps_taken += 1;
                if digests.insert(next.digest()) {
                    seen.push(Seen { from: at, by: step });
                }
            }
        }
        at += 1;
    }
    let is_complete = at == seen.len() && reached < depth;
    Ok(Explored { states: at, steps: steps_taken, depth: reached, is_complete })
}

/// A fault, and the steps that lead to it.
fn told(scene: &str, steps: impl Iterator<Item = Step>, fault: &str) -> String {
    let steps: Vec<String> =
        steps.enumerate().map(|(number, step)| format!("  {:>3}. {step}\n", number + 1)).collect();
    format!("in the scene \"{scene}\": {fault}\n{}", steps.concat())
}

/// Takes these steps, as far as they are possible, and comes to rest.
///
/// # Errors
/// What must not be, with the steps that led to it.
fn walk(scene: &Scene, steps: &[Step]) -> Result<(), String> {
    let mut judge = World::start(scene).enter();
    let mut taken = Vec::new();
    for step in steps {
        let was_possible = with(|server| step.is_possible(server));
        taken.extend(was_possible.then_some(*step));
        take(*step, &mut judge).map_err(|fault| told(scene.name, taken.iter().copied(), fault))?;
    }
    come_to_rest(&mut judge)
        .map_err(|fault| told(scene.name, taken.iter().copied(), &format!("at the end: {fault}")))
}

mod tests {
    use std::env;
    use std::sync::{Mutex, PoisonError};

    use proptest::prelude::*;
    use proptest::test_runner::{Config, RngSeed, TestError, TestRunner};

    use super::*;

    /// There is one state of the module.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    fn number(name: &str) -> Option<u64> {
        env::var(name).ok().map(|text| text.parse().expect("a number"))
    }

    /// EXPLORE_SECONDS gives each scene so much time and no end of depth.
    #[test]
    fn every_interleaving() {
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = number("EXPLORE_SECONDS");
        for scene in scenes::all() {
            let start = Instant::now();
            let (depth, time) = match seconds {
                Some(seconds) => (usize::MAX, Duration::from_secs(seconds)),
                None => (scene.quick_depth, Duration::from_secs(600)),
            };
            let explored = match explore(&scene, depth, start + time) {
                Ok(explored) => explored,
                Err(fault) => panic!("{fault}"),
            };
            let Explored { states, steps, depth, is_complete } = explored;
            println!(
                "{:<12} {states:>9} states, {steps:>10} steps, depth {depth:>2}{}, {:.1} s",
                scene.name,
                if is_complete { " (the end)" } else { "" },
                start.elapsed().as_secs_f64()
            );
        }
    }

    /// Always the same walks, or as many others of each kind as EXPLORE_WALKS says. A walk that fails
    /// is made as short as can be.
    #[test]
    fn long_walks() {
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let (walks, rng_seed) = match number("EXPLORE_WALKS") {
            Some(walks) => (walks as u32, RngSeed::Random),
            None => (300, RngSeed::Fixed(0)),
        };
        let config =
            Config { cases: walks, failure_persistence: None, rng_seed, ..Config::default() };
        for scene in scenes::everything() {
            let start = Instant::now();
            let all: Vec<Step> = scene.steps.iter().map(|(step, _)| *step).collect();
            let steps = prop::collection::vec(prop::sample::select(all), 1..=600);
            let run = |steps: Vec<Step>| walk(&scene, &steps).map_err(TestCaseError::fail);
            match TestRunner::new(config.clone()).run(&steps, run) {
                Ok(()) => {}
                Err(TestError::Fail(fault, _)) => panic!("{fault}"),
                Err(other) => panic!("{other}"),
            }
            let seconds = start.elapsed().as_secs_f64();
            println!("{:<12} {walks} walks, {seconds:.1} s", scene.name);
        }
    }
}
