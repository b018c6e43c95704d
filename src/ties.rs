//! Ties: leases that end when somebody goes, and the ones whose somebody has gone.
//!
//! Pure: no Redis, no clock. Two things tie a lease to an owner: the option EPHEMERAL, to the
//! connection that asked for it; and a grant to a waiter, until its reply is on its way, so that
//! a lease granted to a client that is gone is taken back. What always holds:
//!
//! - A lease (database, prefix, key) has one tie at most; a new one takes the old one's place.
//! - A tie may have several owners (two waiters with the same key, granted one lease): the lease is
//!   lost when the last of them has gone.
//! - A tie means one lease and no later one of the same key: whoever takes, refreshes or releases
//!   the lease by another right cuts the tie ([`Ties::cut`]), also after its owner has gone and
//!   before the lease was taken back. A tie is a number that is never used twice, so even a lease
//!   of the same key with the same score is another.
//! - A tie whose lease has lapsed is forgotten when the next one is made. So the table holds no
//!   more than the leases that were taken, not given back to us, and would still be live.
//!
//! Everything is O(log N), but for [`Ties::swap_databases`].

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

/// A tie's name.
pub type TieId = u64;

/// Whose going ends the lease.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq, PartialOrd, Ord)]
pub enum Owner {
    /// A connection, by the server's client id.
    Connection(u64),
    /// A waiter that was granted and has not been answered yet.
    Waiter(u64),
}

/// A tied lease.
#[derive(Clone, Debug, Hash, PartialEq, Eq)]
pub struct Lease {
    /// The database.
    pub db: i32,
    /// The limiter.
    pub prefix: Arc<[u8]>,
    /// The holder.
    pub key: Arc<[u8]>,
    /// When it lapses.
    pub lapse_ms: i64,
}

/// All ties.
#[derive(Default)]
#[cfg_attr(test, derive(Clone))]
pub struct Ties {
    ties: BTreeMap<TieId, Tie>,
    by_lease: BTreeMap<i32, HashMap<Arc<[u8]>, Holders>>,
    by_owner: BTreeSet<(Owner, TieId)>,
    by_lapse: BTreeSet<(i64, TieId)>,
    /// With the time from which on the lease can be taken back.
    lost: BTreeSet<(i64, TieId)>,
    last_id: TieId,
}

/// The ties of one limiter's holders.
type Holders = HashMap<Arc<[u8]>, TieId>;

#[cfg_attr(test, derive(Clone, Hash))]
struct Tie {
    lease: Lease,
    owners: Vec<Owner>, // Empty: all have gone, and the lease is to be taken back.
    take_back_ms: i64,
}

impl Ties {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ties.is_empty()
    }

    /// How many leases end with a connection.
    #[must_use]
    pub fn to_connections(&self) -> usize {
        let to_waiters = self.by_owner.range((Owner::Waiter(0), 0)..).count(); // A turn's at most.
        self.by_owner.len().saturating_sub(to_waiters)
    }

    /// When a lease is to be taken back next; `i64::MIN` = now.
    #[must_use]
    pub fn next_lost_ms(&self) -> Option<i64> {
        self.lost.first().map(|(take_back_ms, _)| *take_back_ms)
    }

    /// Ties a lease to an owner, in place of any other tie it has.
    pub fn tie(&mut self, lease: Lease, owner: Owner, now_ms: i64) -> TieId {
        self.forget_lapsed(now_ms);
        self.last_id = self.last_id.wrapping_add(1);
        let id = self.last_id;
        let limiters = self.by_lease.entry(lease.db).or_default();
        let holders = limiters.entry(lease.prefix.clone()).or_default();
        if let Some(old) = holders.insert(lease.key.clone(), id) {
            self.remove_but_for_lease(old);
        }
        self.by_owner.insert((owner, id));
        self.by_lapse.insert((lease.lapse_ms, id));
        self.ties.insert(id, Tie { lease, owners: vec![owner], take_back_ms: i64::MIN });
        id
    }

    /// One more waiter was granted the lease, which was moved to its end: it shares the tie, if
    /// nobody was told yet that the lease is theirs; else the tie is cut.
    pub fn share_or_cut(&mut self, lease: &Lease, waiter: Owner) -> Option<TieId> {
        let Lease { db, prefix, key, lapse_ms } = lease;
        let id = self.find(*db, prefix, key)?;
        let tie = self.ties.get_mut(&id)?;
        if tie.owners.iter().any(|owner| matches!(owner, Owner::Connection(_))) {
            self.remove(id);
            return None;
        }
        self.lost.remove(&(tie.take_back_ms, id));
        tie.owners.push(waiter);
        self.by_owner.insert((waiter, id));
        self.renewed(*db, prefix, key, *lapse_ms);
        Some(id)
    }

    /// The lease no longer ends with anybody: it was released, or taken by another right.
    pub fn cut(&mut self, db: i32, prefix: &[u8], key: &[u8]) {
        if let Some(id) = self.find(db, prefix, key) {
            self.remove(id);
        }
    }

    /// The same by the tie's name, unless its owner has gone: then the lease is still to be taken
    /// back.
    pub fn cut_unless_lost(&mut self, id: TieId) {
        if self.ties.get(&id).is_some_and(|tie| !tie.owners.is_empty()) {
            self.remove(id);
        }
    }

    /// The lease was renewed: its tie, if any, stays.
    pub fn renewed(&mut self, db: i32, prefix: &[u8], key: &[u8], lapse_ms: i64) {
        let Some(id) = self.find(db, prefix, key) else { return };
        let Some(tie) = self.ties.get_mut(&id) else { return };
        self.by_lapse.remove(&(tie.lease.lapse_ms, id));
        tie.lease.lapse_ms = lapse_ms;
        self.by_lapse.insert((lapse_ms, id));
    }

    /// From now on the tie is to `to` instead of `from`, if it is to `from` at all.
    pub fn hand_over(&mut self, id: TieId, from: Owner, to: Owner) {
        let Some(tie) = self.ties.get_mut(&id) else { return };
        if let Some(owner) = tie.owners.iter_mut().find(|owner| **owner == from) {
            *owner = to;
            self.by_owner.remove(&(from, id));
            self.by_owner.insert((to, id));
        }
    }

    /// The owner has gone: the leases that were tied to it alone are to be taken back. Whether
    /// there are any.
    pub fn owner_left(&mut self, owner: Owner) -> bool {
        let mut any = false;
        while let Some((_, id)) = self.by_owner.range((owner, 0)..=(owner, TieId::MAX)).next() {
            let id = *id;
            self.by_owner.remove(&(owner, id));
            if let Some(tie) = self.ties.get_mut(&id) {
                tie.owners.retain(|other| *other != owner);
                if tie.owners.is_empty() {
                    self.lost.insert((tie.take_back_ms, id));
                    any = true;
                }
            }
        }
        any
    }

    /// A lease that is to be taken back at `now_ms`. It stays so until it is [cut](Self::cut_tie)
    /// or [postponed](Self::postpone).
    #[must_use]
    pub fn next_lost(&self, now_ms: i64) -> Option<(TieId, Lease)> {
        let (take_back_ms, id) = self.lost.first()?;
        let tie = self.ties.get(id).filter(|_| *take_back_ms <= now_ms)?;
        Some((*id, tie.lease.clone()))
    }

    /// The tie ends: the lease was taken back.
    pub fn cut_tie(&mut self, id: TieId) {
        self.remove(id);
    }

    /// The lease cannot be taken back before that time.
    pub fn postpone(&mut self, id: TieId, take_back_ms: i64) {
        let Some(tie) = self.ties.get_mut(&id) else { return };
        if self.lost.remove(&(tie.take_back_ms, id)) {
            tie.take_back_ms = take_back_ms;
            self.lost.insert((take_back_ms, id));
        }
    }

    /// What could not be taken back before some time is to be tried at once.
    pub fn hurry(&mut self) {
        let lost = std::mem::take(&mut self.lost);
        for (_, id) in lost {
            let Some(tie) = self.ties.get_mut(&id) else { continue };
            tie.take_back_ms = i64::MIN;
            self.lost.insert((i64::MIN, id));
        }
    }

    /// Gives up all that is to be taken back.
    pub fn forget_lost(&mut self) {
        while let Some((_, id)) = self.lost.pop_first() {
            self.remove(id);
        }
    }

    /// Two databases change places, their leases with them.
    pub fn swap_databases(&mut self, first: i32, second: i32) {
        for tie in self.ties.values_mut() {
            tie.lease.db = match tie.lease.db {
                db if db == first => second,
                db if db == second => first,
                db => db,
            };
        }
        let (of_first, of_second) = (self.by_lease.remove(&first), self.by_lease.remove(&second));
        self.by_lease.extend(of_first.map(|leases| (second, leases)));
        self.by_lease.extend(of_second.map(|leases| (first, leases)));
    }

    /// A database was emptied (`None`: all were), its leases with it.
    pub fn forget_database(&mut self, db: Option<i32>) {
        let gone = |tie: &Tie| db.is_none_or(|db| db == tie.lease.db);
        let ids: Vec<TieId> =
            self.ties.iter().filter(|(_, tie)| gone(tie)).map(|(id, _)| *id).collect();
        for id in ids {
            self.remove(id);
        }
    }

    fn forget_lapsed(&mut self, now_ms: i64) {
        while let Some((lapse_ms, id)) = self.by_lapse.first().copied() {
            if lapse_ms > now_ms {
                return;
            }
            self.remove(id);
        }
    }

    fn find(&self, db: i32, prefix: &[u8], key: &[u8]) -> Option<TieId> {
        self.by_lease.get(&db)?.get(prefix)?.get(key).copied()
    }

    fn remove(&mut self, id: TieId) {
        let Some(Lease { db, prefix, key, .. }) = self.remove_but_for_lease(id) else { return };
        let Some(limiters) = self.by_lease.get_mut(&db) else { return };
        if let Entry::Occupied(mut holders) = limiters.entry(prefix) {
            holders.get_mut().remove(&key);
            if holders.get().is_empty() {
                holders.remove();
            }
        }
        if limiters.is_empty() {
            self.by_lease.remove(&db);
        }
    }

    /// Removes a tie, but leaves its lease to the caller.
    fn remove_but_for_lease(&mut self, id: TieId) -> Option<Lease> {
        let Tie { lease, owners, take_back_ms } = self.ties.remove(&id)?;
        self.by_lapse.remove(&(lease.lapse_ms, id));
        self.lost.remove(&(take_back_ms, id));
        for owner in owners {
            self.by_owner.remove(&(owner, id));
        }
        Some(lease)
    }
}

/// The model check tells states apart by their hash. `last_id` is nothing but a name to come.
#[cfg(test)]
impl std::hash::Hash for Ties {
    fn hash<H: std::hash::Hasher>(&self, hasher: &mut H) {
        let Self { ties, by_lease, by_owner, by_lapse, lost, last_id: _ } = self;
        (ties, by_owner, by_lapse, lost).hash(hasher);
        for (db, limiters) in by_lease {
            let sorted = |holders: &Holders| {
                holders.iter().map(|(key, id)| (key.clone(), *id)).collect::<BTreeMap<_, _>>()
            };
            let limiters = limiters.iter().map(|(prefix, holders)| (prefix, sorted(holders)));
            (db, limiters.collect::<BTreeMap<_, _>>()).hash(hasher);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lease(db: i32, key: u8, lapse_ms: i64) -> Lease {
        Lease { db, prefix: [b'p', key % 2].into(), key: [key].into(), lapse_ms }
    }

    fn lost(ties: &mut Ties) -> Vec<Lease> {
        std::iter::from_fn(|| {
            let (id, lease) = ties.next_lost(i64::MAX)?;
            ties.cut_tie(id);
            Some(lease)
        })
        .take(1_000) // More than any test ties: what is cut does not come again.
        .collect()
    }

    fn is_empty(ties: &Ties) -> bool {
        ties.ties.is_empty()
            && ties.by_lease.is_empty()
            && ties.by_owner.is_empty()
            && ties.by_lapse.is_empty()
            && ties.lost.is_empty()
    }

    const ME: Owner = Owner::Connection(1);
    const OTHER: Owner = Owner::Connection(2);

    #[test]
    fn a_lease_is_lost_with_its_owner() {
        let mut ties = Ties::default();
        ties.tie(lease(0, 1, 100), ME, 0);
        ties.tie(lease(0, 2, 100), OTHER, 0);
        assert!(ties.owner_left(ME));
        assert!(!ties.owner_left(ME));
        assert_eq!(lost(&mut ties), [lease(0, 1, 100)]);
        assert!(ties.owner_left(OTHER));
        assert_eq!(lost(&mut ties), [lease(0, 2, 100)]);
        assert!(is_empty(&ties));
    }

    #[test]
    fn who_takes_over_a_lost_lease_keeps_it() {
        let mut ties = Ties::default();
        ties.tie(lease(0, 1, 100), ME, 0);
        ties.owner_left(ME);
        ties.cut(0, &lease(0, 1, 0).prefix, &[1]); // Refreshed by somebody, to the same end.
        assert_eq!(ties.next_lost_ms(), None);
        ties.tie(lease(0, 1, 100), ME, 0);
        ties.owner_left(ME);
        ties.tie(lease(0, 1, 100), OTHER, 0);
        assert!(lost(&mut ties).is_empty());
        assert!(!ties.is_empty());
    }

    #[test]
    fn a_waiters_tie_becomes_its_connections() {
        let mut ties = Ties::default();
        let id = ties.tie(lease(0, 1, 100), Owner::Waiter(1), 0);
        ties.hand_over(id, Owner::Waiter(1), ME);
        assert!(!ties.owner_left(Owner::Waiter(1)));
        assert!(ties.owner_left(ME));
        ties.hand_over(id, ME, OTHER);
        assert!(!ties.owner_left(OTHER), "what is lost is not handed over");
        assert_eq!(lost(&mut ties).len(), 1);
        assert!(is_empty(&ties));
    }

    #[test]
    fn a_lease_granted_to_two_waiters_is_lost_with_the_last_of_them() {
        let (mut ties, key) = (Ties::default(), lease(0, 1, 100));
        let share = |ties: &mut Ties, waiter| ties.share_or_cut(&key, Owner::Waiter(waiter));
        let id = ties.tie(key.clone(), Owner::Waiter(1), 0);
        assert_eq!(share(&mut ties, 2), Some(id));
        assert!(!ties.owner_left(Owner::Waiter(1)));
        assert!(ties.owner_left(Owner::Waiter(2)));
        assert_eq!(share(&mut ties, 3), Some(id), "lost, but nobody was ever told");
        assert_eq!(ties.next_lost_ms(), None);
        ties.hand_over(id, Owner::Waiter(3), ME);
        assert_eq!(share(&mut ties, 4), None, "somebody was told that it is theirs");
        assert!(is_empty(&ties));
    }

    #[test]
    fn a_lease_that_is_shared_ends_when_it_was_last_moved_to() {
        let mut ties = Ties::default();
        let (first, second) = (Owner::Waiter(1), Owner::Waiter(2));
        ties.tie(lease(0, 1, 100), first, 0);
        ties.share_or_cut(&lease(0, 1, 200), second);
        ties.owner_left(first);
        ties.owner_left(second);
        assert_eq!(lost(&mut ties), [lease(0, 1, 200)]);
        assert!(is_empty(&ties));
    }

    #[test]
    fn what_cannot_be_taken_back_now_is_tried_later() {
        let mut ties = Ties::default();
        ties.tie(lease(0, 1, 100), ME, 0);
        ties.tie(lease(0, 2, 100), ME, 0);
        ties.owner_left(ME);
        let (first, _) = ties.next_lost(0).unwrap();
        ties.postpone(first, 50);
        let (second, _) = ties.next_lost(0).unwrap();
        assert_ne!(first, second);
        ties.cut_tie(second);
        assert_eq!((ties.next_lost(49), ties.next_lost_ms()), (None, Some(50)));
        assert_eq!(ties.next_lost(50).unwrap().0, first);
        ties.hurry();
        assert_eq!(ties.next_lost(0).unwrap().0, first);
        ties.forget_lost();
        assert!(is_empty(&ties));
    }

    #[test]
    fn a_lost_lease_stays_lost_when_its_tie_would_end() {
        let mut ties = Ties::default();
        let id = ties.tie(lease(0, 1, 100), ME, 0);
        ties.owner_left(ME);
        ties.cut_unless_lost(id);
        assert_eq!(lost(&mut ties).len(), 1);
        let id = ties.tie(lease(0, 1, 100), ME, 0);
        ties.cut_unless_lost(id);
        assert!(!ties.owner_left(ME));
        assert!(is_empty(&ties));
    }

    #[test]
    fn a_swap_leaves_the_leases_of_other_databases_where_they_are() {
        let mut ties = Ties::default();
        for db in 0..3 {
            ties.tie(lease(db, 1, 100 + i64::from(db)), ME, 0);
        }
        ties.swap_databases(0, 1);
        ties.owner_left(ME);
        let ends: Vec<(i32, i64)> =
            lost(&mut ties).iter().map(|lease| (lease.db, lease.lapse_ms)).collect();
        assert_eq!(ends, [(1, 100), (0, 101), (2, 102)]);
        assert!(is_empty(&ties));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Tie { key: u8, owner: u64, ttl_ms: i64 },
        Cut { key: u8 },
        Renew { key: u8, ttl_ms: i64 },
        Leave { owner: u64 },
        TakeBack,
        Swap,
        Flush { db: Option<i32> },
        TimePasses { ms: i64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        let (key, owner, ttl_ms) = (0..6_u8, 0..3_u64, 1..50_i64);
        prop_oneof![
            5 => (key.clone(), owner.clone(), ttl_ms.clone())
                .prop_map(|(key, owner, ttl_ms)| Step::Tie { key, owner, ttl_ms }),
            2 => key.clone().prop_map(|key| Step::Cut { key }),
            2 => (key, ttl_ms).prop_map(|(key, ttl_ms)| Step::Renew { key, ttl_ms }),
            2 => owner.prop_map(|owner| Step::Leave { owner }),
            2 => Just(Step::TakeBack),
            1 => Just(Step::Swap),
            1 => prop::option::of(0..2_i32).prop_map(|db| Step::Flush { db }),
            1 => (0..30_i64).prop_map(|ms| Step::TimePasses { ms }),
        ]
    }

    proptest! {
        /// Against a list of (lease, owner), where the owner `None` is one that has gone.
        #[test]
        fn ties_do_as_a_list_would(steps in prop::collection::vec(step(), 1..60)) {
            let mut ties = Ties::default();
            let mut model: Vec<(Lease, Option<u64>)> = Vec::new();
            let mut now_ms = 0;
            for step in steps {
                match step {
                    Step::Tie { key, owner, ttl_ms } => {
                        let lease = lease(0, key, now_ms + ttl_ms);
                        ties.tie(lease.clone(), Owner::Connection(owner), now_ms);
                        model.retain(|(old, _)| {
                            old.lapse_ms > now_ms && (old.db, &old.key) != (0, &lease.key)
                        });
                        model.push((lease, Some(owner)));
                    }
                    Step::Cut { key } => {
                        ties.cut(0, &lease(0, key, 0).prefix, &[key]);
                        model.retain(|(old, _)| (old.db, &*old.key) != (0, &[key][..]));
                    }
                    Step::Renew { key, ttl_ms } => {
                        ties.renewed(0, &lease(0, key, 0).prefix, &[key], now_ms + ttl_ms);
                        for (old, _) in &mut model {
                            if (old.db, &*old.key) == (0, &[key][..]) {
                                old.lapse_ms = now_ms + ttl_ms;
                            }
                        }
                    }
                    Step::Leave { owner } => {
                        let any = model.iter().any(|(_, of)| *of == Some(owner));
                        prop_assert_eq!(ties.owner_left(Owner::Connection(owner)), any);
                        for (_, of) in &mut model {
                            if *of == Some(owner) {
                                *of = None;
                            }
                        }
                    }
                    Step::TakeBack => {
                        let order = |lease: &Lease| (lease.db, lease.key.clone());
                        let mut taken = lost(&mut ties);
                        taken.sort_by_key(order);
                        let gone = |of: &Option<u64>| of.is_none();
                        let mut expected: Vec<Lease> = model
                            .iter()
                            .filter(|(_, of)| gone(of))
                            .map(|(lease, _)| lease.clone())
                            .collect();
                        expected.sort_by_key(order);
                        prop_assert_eq!(taken, expected);
                        model.retain(|(_, of)| !gone(of));
                    }
                    Step::Swap => {
                        ties.swap_databases(0, 1);
                        model.iter_mut().for_each(|(lease, _)| lease.db = 1 - lease.db);
                    }
                    Step::Flush { db } => {
                        ties.forget_database(db);
                        model.retain(|(lease, _)| db.is_some_and(|db| db != lease.db));
                    }
                    Step::TimePasses { ms } => now_ms += ms,
                }
                prop_assert_eq!(ties.is_empty(), model.is_empty());
                let tied = model.iter().filter(|(_, of)| of.is_some()).count();
                prop_assert_eq!(ties.to_connections(), tied);
            }
            (0..3).for_each(|owner| {
                ties.owner_left(Owner::Connection(owner));
            });
            prop_assert_eq!(lost(&mut ties).len(), model.len());
            prop_assert!(is_empty(&ties));
        }
    }
}
