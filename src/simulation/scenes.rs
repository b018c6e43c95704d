//! What the explorations put together, and how often each of it may happen.

use super::ffi::Change;
use super::steps::Step;
use super::{Ask, ClientId, LimiterId, Name};

pub struct Scene {
    pub name: &'static str,
    /// The steps, each with the number of times it may be taken.
    pub steps: Vec<(Step, u8)>,
    pub is_clustered: bool,
    pub prune_step: u64,
    /// How deep `make test` looks.
    pub quick_depth: usize,
}

const P: LimiterId = LimiterId { db: 0, prefix: b'p' };
const Q: LimiterId = LimiterId { db: 0, prefix: b'q' };
const P1: LimiterId = LimiterId { db: 1, prefix: b'p' };

const fn ask(client: ClientId, limiter: LimiterId, key: Name, limit: u64, ttl_ms: i64) -> Ask {
    Ask { client, limiter, key, limit, ttl_ms, is_ephemeral: false }
}

const fn ephemeral(ask: Ask) -> Ask {
    Ask { is_ephemeral: true, ..ask }
}

fn scene(name: &'static str, quick_depth: usize, steps: &[(Step, u8)]) -> Scene {
    let steps = steps.to_vec();
    Scene { name, steps, is_clustered: false, prune_step: u64::MAX, quick_depth }
}

pub fn all() -> Vec<Scene> {
    vec![line(), twins(), refused(), databases(), outside(), cluster(), clock(), several()]
}

/// Who stands in line, comes, goes, loses patience.
fn line() -> Scene {
    let steps = [
        (Step::Acquire(ask(0, P, b'a', 1, 100)), 1),
        (Step::Wait(ask(1, P, b'b', 1, 200), None), 1),
        (Step::Wait(ask(2, P, b'c', 2, 200), Some(50)), 1),
        (Step::Wait(ephemeral(ask(3, P, b'd', 1, 200)), None), 1),
        (Step::Acquire(ask(0, P, b'x', 3, 100)), 1),
        (Step::Release(P, b'a'), 1),
        (Step::Release(P, b'b'), 1),
        (Step::Close(1), 1),
        (Step::Break(2), 1),
        (Step::Unblock(2), 1),
        (Step::Close(3), 1),
        (Step::Others(Change::Del(P)), 1),
        (Step::PassTime, 3),
        (Step::Turn, 4),
    ];
    scene("line", 5, &steps)
}

/// Several who wait with one key, and somebody else who takes it.
fn twins() -> Scene {
    let steps = [
        (Step::Acquire(ask(0, P, b'a', 1, 100)), 1),
        (Step::Wait(ask(1, P, b't', 1, 200), None), 1),
        (Step::Wait(ask(2, P, b't', 1, 300), None), 1),
        (Step::Wait(ephemeral(ask(3, P, b't', 1, 200)), None), 1),
        (Step::Acquire(ask(0, P, b't', 1, 300)), 1),
        (Step::Renew(P, b't', 400), 1),
        (Step::Release(P, b'a'), 1),
        (Step::Release(P, b't'), 1),
        (Step::Close(1), 1),
        (Step::Close(2), 1),
        (Step::Break(2), 1),
        (Step::UnblockWithError(2), 1),
        (Step::Close(3), 1),
        (Step::Quit(3), 1),
        (Step::Tick, 1),
        (Step::Turn, 3),
    ];
    scene("twins", 5, &steps)
}

/// A server that takes no writes for a while, or no more.
fn refused() -> Scene {
    let steps = [
        (Step::Acquire(ask(0, P, b'a', 1, 100)), 1),
        (Step::Wait(ask(1, P, b'b', 1, 200), Some(150)), 1),
        (Step::Wait(ephemeral(ask(2, P, b'c', 1, 200)), None), 1),
        (Step::Release(P, b'a'), 1),
        (Step::PauseAndRelease(P, b'a'), 1),
        (Step::Pause, 1),
        (Step::Resume, 2),
        (Step::LackReplicas, 1),
        (Step::HaveReplicas, 1),
        (Step::Demote { lets_go: true }, 1),
        (Step::Promote, 1),
        (Step::Close(1), 1),
        (Step::Close(2), 1),
        (Step::Others(Change::Del(P)), 1),
        (Step::PassTime, 3),
        (Step::Turn, 5),
    ];
    scene("refused", 5, &steps)
}

/// Two databases that change places and are emptied.
fn databases() -> Scene {
    let steps = [
        (Step::Acquire(ask(0, P, b'a', 1, 100)), 1),
        (Step::Acquire(ephemeral(ask(0, P1, b'b', 1, 100))), 1),
        (Step::Wait(ephemeral(ask(1, P, b'c', 1, 200)), None), 1),
        (Step::Wait(ask(2, P1, b'd', 1, 200), None), 1),
        (Step::Release(P, b'a'), 1),
        (Step::Others(Change::Swap), 2),
        (Step::Others(Change::Flush(None)), 1),
        (Step::Others(Change::Flush(Some(0))), 1),
        (Step::Others(Change::Flush(Some(1))), 1),
        (Step::Close(0), 1),
        (Step::Close(1), 1),
        (Step::Break(2), 1),
        (Step::PassTime, 2),
        (Step::Turn, 4),
    ];
    scene("databases", 4, &steps)
}

/// Others write to the set, also in the middle of our commands; lapsed leases are pruned one by
/// one.
fn outside() -> Scene {
    let steps = [
        (Step::Acquire(ephemeral(ask(0, P, b'a', 2, 100))), 1),
        (Step::Wait(ask(1, P, b'b', 1, 200), None), 1),
        (Step::Wait(ask(2, P, b'c', 2, 200), None), 1),
        (Step::Close(0), 1),
        (Step::Release(P, b'a'), 1),
        (Step::Others(Change::Zadd(P, b'y', 51)), 1),
        (Step::Others(Change::Zadd(P, b'z', 51)), 1),
        (Step::Others(Change::Zadd(P, b'a', 71)), 1),
        (Step::Others(Change::Zrem(P, b'z')), 1),
        (Step::Others(Change::Set(P)), 1),
        (Step::Others(Change::Del(P)), 1),
        (Step::Others(Change::Pexpire(P, 30)), 1),
        (Step::OthersAtOurNext(Change::Del(P)), 1),
        (Step::OthersAtOurNext(Change::Zadd(P, b'z', 41)), 1),
        (Step::ExpireAll, 1),
        (Step::PassTime, 3),
        (Step::Turn, 4),
    ];
    Scene { prune_step: 1, ..scene("outside", 4, &steps) }
}

/// Slots that are served elsewhere for a while, and a master that is demoted without a word.
fn cluster() -> Scene {
    let steps = [
        (Step::Acquire(ask(0, P, b'a', 1, 100)), 1),
        (Step::Wait(ask(1, P, b'b', 1, 200), None), 1),
        (Step::Wait(ephemeral(ask(2, P, b'c', 1, 900)), None), 1),
        (Step::Release(P, b'a'), 1),
        (Step::LeaveSlots, 1),
        (Step::TakeSlots, 1),
        (Step::Demote { lets_go: false }, 1),
        (Step::Promote, 1),
        (Step::Others(Change::Del(P)), 1),
        (Step::Close(1), 1),
        (Step::Close(2), 1),
        (Step::PassTime, 4),
        (Step::Turn, 5),
    ];
    Scene { is_clustered: true, ..scene("cluster", 5, &steps) }
}

/// A system clock that is set.
fn clock() -> Scene {
    let steps = [
        (Step::Acquire(ephemeral(ask(0, P, b'a', 1, 100))), 1),
        (Step::Wait(ask(1, P, b'b', 1, 200), Some(50)), 1),
        (Step::Wait(ask(2, P, b'c', 1, 300), None), 1),
        (Step::TurnAndSetClock(10_000), 1),
        (Step::TurnAndSetClock(-10_000), 1),
        (Step::Pause, 1),
        (Step::Resume, 1),
        (Step::Close(0), 1),
        (Step::Tick, 1),
        (Step::PassTime, 3),
        (Step::Turn, 5),
    ];
    scene("clock", 5, &steps)
}

/// One operation under two limiters, each with a line.
fn several() -> Scene {
    let steps = [
        (Step::AcquireAll(ask(0, P, b'k', 1, 100), Q), 2),
        (Step::Acquire(ask(0, Q, b'a', 1, 50)), 1),
        (Step::Wait(ask(1, P, b'b', 1, 200), None), 1),
        (Step::Wait(ask(2, Q, b'k', 2, 200), None), 1),
        (Step::Release(P, b'k'), 1),
        (Step::Release(Q, b'a'), 1),
        (Step::Renew(Q, b'k', 300), 1),
        (Step::Close(1), 1),
        (Step::Break(2), 1),
        (Step::PassTime, 3),
        (Step::Turn, 4),
    ];
    scene("several", 5, &steps)
}

/// All of it at once, as often as can be, for walks.
pub fn everything() -> [Scene; 2] {
    let mut steps: Vec<(Step, u8)> = Vec::new();
    for (step, _) in all().into_iter().flat_map(|scene| scene.steps) {
        if !steps.iter().any(|(other, _)| *other == step) {
            steps.push((step, u8::MAX));
        }
    }
    // Most of the time somebody comes, something ends, the loop goes round.
    let ordinary = [
        Step::Wait(ask(1, P, b'b', 2, 100), Some(30)),
        Step::Wait(ephemeral(ask(2, P, b'c', 1, 100)), None),
        Step::Wait(ask(3, P, b't', 2, 40), None),
        Step::Acquire(ask(0, P, b't', 2, 60)),
        Step::Release(P, b'b'),
        Step::Release(P, b'c'),
        Step::Release(P, b't'),
        Step::PassTime,
        Step::Turn,
        Step::Turn,
        Step::Resume,
        Step::HaveReplicas,
        Step::Promote,
        Step::TakeSlots,
    ];
    for step in ordinary.into_iter().cycle().take(ordinary.len() * 3) {
        steps.push((step, u8::MAX));
    }
    let only_clustered = |step: &Step| {
        matches!(step, Step::LeaveSlots | Step::TakeSlots | Step::Demote { lets_go: false })
    };
    // A cluster has one database.
    let never_clustered = |step: &Step| match step {
        Step::Wait(ask, _) | Step::Acquire(ask) => ask.limiter.db != 0,
        Step::Others(Change::Swap | Change::Flush(Some(_))) => true,
        _ => false,
    };
    let (mut walk, mut in_cluster) = (scene("walk", 0, &steps), scene("cluster walk", 0, &steps));
    walk.steps.retain(|(step, _)| !only_clustered(step));
    in_cluster.steps.retain(|(step, _)| !never_clustered(step));
    [Scene { prune_step: 1, ..walk }, Scene { is_clustered: true, ..in_cluster }]
}
