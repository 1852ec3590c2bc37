//! Leases end when they must and not before, and take all of their keys with
//! them in one revision (etcd's Lease API; the time to live counts from the
//! last renewal that was acknowledged).
//!
//! What a renewal promises begins at some moment after its invocation, so the
//! earliest end is counted from there, on the fastest clock of any node. When a
//! lease had ended at the latest is told by the first answer with its last
//! revision or a higher one; that it had not, by the last read with a lower one.
//! A new leader may begin every lease anew, so lateness counts from the last
//! healing. Watches are not asked for times.

use std::collections::BTreeMap;

use super::describe;
use super::history::{Body, Call, EventKind, History, Outcome, Revision};
use super::revision_order::{self, Maker, Order};
use super::verdict::Verdict;

const EARLY: &str = "no lease ends before its time";
const LATE: &str = "a lease that nobody keeps alive ends in time";
const WHOLE: &str = "a lease that ran out takes all of its keys in one revision, for good";

/// How far clocks may be from true time, and how late an expiry may come.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The fastest clock of any node, as a multiple of true time; 1.0 without clock faults.
    pub clock_rate_max: f64,
    /// What is forgiven before a lease's time is up.
    pub early_ms: u64,
    /// What is forgiven after it, counted from the last healing.
    pub late_ms: u64,
}

/// Judges leases that were granted by calls of `workload`. Reads in the end (ranges, times to live) show that
/// they are gone.
pub fn check(history: &History, workload: &str, bounds: &Bounds) -> Vec<Verdict> {
    let order = revision_order::resolve(history);
    let lives = lives(history, workload);
    let known = Known::of(history);
    let healed_ns = history.faults.iter().map(|fault| fault.healed_ns).max().unwrap_or(0);
    let mut found = [Found::default(), Found::default()];
    for life in lives.values() {
        let judge = Judge { history, order: &order, known: &known, bounds, life };
        let [early, late] = &mut found;
        judge.early(early);
        judge.late(healed_ns, late);
    }
    let [early, late] = found;
    let whole = whole(&order, &lives);
    [(EARLY, early), (LATE, late), (WHOLE, whole)]
        .map(|(claim, found)| Verdict::from_findings(claim, found.checked, describe::some(found.findings)))
        .into()
}

#[derive(Default)]
struct Found {
    checked: usize,
    findings: Vec<String>,
}

/// What was asked and told of one lease.
#[derive(Default)]
struct Life {
    id: i64,
    /// Acknowledged grant and renewals: the time to live and the call.
    renewed: Vec<(i64, usize)>,
    /// When the last attempt to renew it was over.
    last_try_ns: u64,
    /// Calls that were told it was gone.
    told_gone: Vec<usize>,
    /// When somebody first asked to end it, successfully or perhaps.
    revoked_ns: Option<u64>,
}

fn lives(history: &History, workload: &str) -> BTreeMap<i64, Life> {
    let mut lives: BTreeMap<i64, Life> = BTreeMap::new();
    for op in history.ops.iter().filter(|op| op.workload == workload) {
        if let (Call::LeaseGrant { .. }, Some(Body::Lease { id, .. })) =
            (&op.call, op.reply().map(|reply| &reply.body))
        {
            lives.insert(*id, Life { id: *id, ..Life::default() });
        }
    }
    for (index, op) in history.ops.iter().enumerate() {
        let told = match op.reply().map(|reply| &reply.body) {
            Some(Body::Lease { ttl_s, .. }) => Some(*ttl_s),
            _ => None,
        };
        let (id, renews) = match op.call {
            Call::LeaseGrant { id, .. } => (id, true),
            Call::LeaseKeepAlive { id } => (id, true),
            Call::LeaseTimeToLive { id } | Call::LeaseRevoke { id } => (id, false),
            _ => continue,
        };
        // A server that chose the id itself says which.
        let id = match op.reply().map(|reply| &reply.body) {
            Some(Body::Lease { id, .. }) => *id,
            _ => id,
        };
        let (Some(life), false) = (lives.get_mut(&id), matches!(op.outcome, Outcome::Failed(_))) else {
            continue;
        };
        match told {
            Some(ttl_s) if renews && ttl_s > 0 => life.renewed.push((ttl_s, index)),
            // Of a time to live, 0 means less than a second.
            Some(ttl_s) if ttl_s < 0 || (renews && ttl_s == 0) => life.told_gone.push(index),
            _ => {}
        }
        if renews {
            life.last_try_ns = life.last_try_ns.max(op.returned_ns);
        }
        if matches!(op.call, Call::LeaseRevoke { .. }) {
            life.revoked_ns = Some(life.revoked_ns.map_or(op.invoked_ns, |at| at.min(op.invoked_ns)));
        }
    }
    lives
}

/// Which revisions calls knew, and when.
struct Known {
    /// By return: the highest revision that was answered until then.
    until: Vec<(u64, Revision, usize)>,
    /// By revision of linearizable answers: the latest invocation of one with it or a lower one.
    since: Vec<(Revision, u64, usize)>,
}

impl Known {
    fn of(history: &History) -> Known {
        let (mut until, mut since) = (Vec::new(), Vec::new());
        for (index, op) in history.ops.iter().enumerate() {
            let Some(reply) = op.reply().filter(|_| op.request_id.is_none()) else { continue };
            if !matches!(reply.body, Body::Single(_) | Body::Txn { .. }) {
                continue;
            }
            until.push((op.returned_ns, reply.revision, index));
            if !matches!(op.call, Call::Single { serializable: true, .. }) {
                since.push((reply.revision, op.invoked_ns, index));
            }
        }
        until.sort_unstable();
        since.sort_unstable();
        let mut highest = (0, 0);
        for (_, revision, index) in &mut until {
            highest = highest.max((*revision, *index));
            (*revision, *index) = highest;
        }
        let mut latest = (0, 0);
        for (_, at, index) in &mut since {
            latest = latest.max((*at, *index));
            (*at, *index) = latest;
        }
        Known { until, since }
    }

    /// When `revision` was there at the latest, and who was told.
    fn there(&self, revision: Revision) -> Option<(u64, usize)> {
        let before = self.until.partition_point(|(_, highest, _)| *highest < revision);
        self.until.get(before).map(|(at, _, index)| (*at, *index))
    }

    /// When `revision` was not there yet at the earliest, and who saw that; without one, the last of all calls.
    fn not_yet(&self, revision: Option<Revision>) -> Option<(u64, usize)> {
        let below =
            revision.map_or(self.since.len(), |end| self.since.partition_point(|(known, ..)| *known < end));
        self.since[..below].last().map(|(_, at, index)| (*at, *index))
    }
}

struct Judge<'a> {
    history: &'a History,
    order: &'a Order,
    known: &'a Known,
    bounds: &'a Bounds,
    life: &'a Life,
}

impl Judge<'_> {
    /// The revision in which the lease ran out.
    fn expired(&self) -> Option<Revision> {
        let by = |(revision, maker): (&Revision, &Maker)| {
            (*maker == Maker::Expiry(self.life.id)).then_some(*revision)
        };
        self.order.makers.iter().find_map(by)
    }

    fn early(&self, found: &mut Found) {
        let logged = self.expired().and_then(|revision| self.known.there(revision));
        let told = |index: &usize| (self.history.ops[*index].returned_ns, *index);
        let told = self.life.told_gone.iter().map(told).min();
        let told = told.filter(|(at, _)| self.life.revoked_ns.is_none_or(|revoked| revoked > *at));
        let Some((gone_ns, by)) = logged.into_iter().chain(told).min() else { return };
        found.checked += 1;
        for (ttl_s, index) in &self.life.renewed {
            let renewal = &self.history.ops[*index];
            // Whoever was only told that it was gone may have been told too soon, by a leader that was none.
            if logged.is_none() && renewal.returned_ns > self.history.ops[by].invoked_ns {
                continue;
            }
            let ttl_ns = (*ttl_s as f64 * 1e9 / self.bounds.clock_rate_max) as u64;
            let due_ns = (renewal.invoked_ns + ttl_ns).saturating_sub(self.bounds.early_ms * 1_000_000);
            if gone_ns < due_ns {
                let (renewal, by) = (describe::call(self.history, *index), describe::call(self.history, by));
                let (id, due) = (self.life.id, describe::seconds(due_ns));
                found.findings.push(format!(
                    "lease {id} should live until {due} s by {renewal}, but was gone for {by}"
                ));
            }
        }
    }

    fn late(&self, healed_ns: u64, found: &mut Found) {
        let store = &self.order.store;
        let end = self.expired();
        let has_keys = store.lease_keys(self.life.id).next().is_some();
        let ttl_s = self.life.renewed.iter().map(|(ttl_s, _)| *ttl_s).max().unwrap_or(0);
        let grace_ns = ttl_s as u64 * 1_000_000_000 + self.bounds.late_ms * 1_000_000;
        let due_ns = self.life.last_try_ns.max(healed_ns) + grace_ns;
        let seen = if end.is_some() || has_keys { self.known.not_yet(end) } else { None };
        let alive = |(_, index): &&(i64, usize)| self.history.ops[*index].invoked_ns > due_ns;
        let told = self.alive_for().filter(|index| self.history.ops[*index].invoked_ns > due_ns);
        let seen = seen.filter(|(at, _)| *at > due_ns).map(|(_, index)| index);
        let finding = seen
            .into_iter()
            .chain(told)
            .chain(self.life.renewed.iter().find(alive).map(|(_, index)| *index))
            .next();
        // It was looked at if it ended, or if somebody looked after it should have.
        found.checked += usize::from(end.is_some() || !self.life.told_gone.is_empty() || finding.is_some());
        if let Some(index) = finding {
            let (id, due) = (self.life.id, describe::seconds(due_ns));
            let call = describe::call(self.history, index);
            found.findings.push(format!("lease {id} should be gone since {due} s, but was there for {call}"));
        }
    }

    /// Calls that were told how long it still lives.
    fn alive_for(&self) -> impl Iterator<Item = usize> {
        let id = self.life.id;
        let ops = self.history.ops.iter().enumerate();
        ops.filter(move |(_, op)| matches!(op.call, Call::LeaseTimeToLive { id: asked } if asked == id))
            .filter(|(_, op)| {
                matches!(op.reply().map(|reply| &reply.body), Some(Body::Lease { ttl_s: 0.., .. }))
            })
            .map(|(index, _)| index)
    }
}

fn whole(order: &Order, lives: &BTreeMap<i64, Life>) -> Found {
    let mut found = Found::default();
    let mut expired: BTreeMap<i64, Revision> = BTreeMap::new();
    for (revision, events) in &order.log.revisions {
        let before = |key: &str| order.store.get_at(key, revision - 1).map_or(0, |kv| kv.lease);
        match order.makers.get(revision) {
            Some(Maker::Expiry(lease)) if lives.contains_key(lease) => {
                found.checked += 1;
                if let Some(first) = expired.insert(*lease, *revision) {
                    found
                        .findings
                        .push(format!("lease {lease} ran out at revision {first} and again at {revision}"));
                }
            }
            Some(Maker::Nobody) => {
                let leased = events.iter().find(|event| {
                    event.kind == EventKind::Delete && lives.contains_key(&before(&event.kv.key))
                });
                if let Some(event) = leased {
                    let lease = before(&event.kv.key);
                    let events = describe::events(events);
                    found
                        .findings
                        .push(format!("a part of lease {lease} went at revision {revision}: {events}"));
                }
            }
            _ => {}
        }
        for event in events.iter().filter(|event| event.kind == EventKind::Put) {
            if let Some(end) = expired.get(&event.kv.lease) {
                found.findings.push(format!("{event} came after its lease had run out at revision {end}"));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{FaultRecord, Reply, Span};
    use crate::judge::simulator::{Script, delete, get, put, put_leased};

    const SECOND: u64 = 1_000_000_000;
    const BOUNDS: Bounds = Bounds { clock_rate_max: 1.0, early_ms: 100, late_ms: 2_000 };

    fn lease(script: &mut Script, at_s: f64, call: Call, ttl_s: i64) -> usize {
        let at = (at_s * SECOND as f64) as u64;
        let body = Body::Lease { id: 7, ttl_s, granted_ttl_s: 3, keys: vec![] };
        script.record(
            0,
            at,
            at + SECOND / 100,
            call,
            Outcome::Ok(Reply { revision: script.store.revision(), body }),
        )
    }

    fn at(script: &mut Script, at_s: f64, call: Call) -> usize {
        let at = (at_s * SECOND as f64) as u64;
        script.call(1, at, at + SECOND / 100, call)
    }

    /// Granted at 1 s for 3 s, kept alive at 2 s, gone at `gone_s`, as the next call sees.
    fn script(gone_s: f64) -> Script {
        let mut script = Script::new("test");
        lease(&mut script, 1.0, Call::LeaseGrant { id: 7, ttl_s: 3 }, 3);
        at(&mut script, 1.1, put_leased("a", "1", 7));
        at(&mut script, 1.2, put_leased("b", "2", 7));
        lease(&mut script, 2.0, Call::LeaseKeepAlive { id: 7 }, 3);
        at(&mut script, gone_s - 0.1, get("a"));
        script.effect(&Call::LeaseRevoke { id: 7 });
        at(&mut script, gone_s, get("a"));
        script
    }

    fn broken(script: Script, bounds: &Bounds) -> Vec<&'static str> {
        let verdicts = check(&script.history(), "test", bounds).into_iter();
        verdicts.filter(|verdict| !verdict.held()).map(|verdict| verdict.claim).collect()
    }

    #[test]
    fn a_lease_that_ends_in_its_time_holds() {
        for gone_s in [4.95, 5.5, 6.9] {
            let verdicts = check(&script(gone_s).history(), "test", &BOUNDS);
            assert!(verdicts.iter().all(Verdict::held), "{verdicts:?}");
            assert_eq!(verdicts.iter().map(|verdict| verdict.checked).collect::<Vec<_>>(), [1, 1, 1]);
        }
    }

    #[test]
    fn a_lease_that_ends_early_is_found() {
        assert_eq!(broken(script(4.5), &BOUNDS), [EARLY]);
        assert_eq!(broken(script(4.5), &Bounds { clock_rate_max: 2.0, ..BOUNDS }), [""; 0]);
        assert_eq!(broken(script(3.0), &Bounds { clock_rate_max: 2.0, ..BOUNDS }), [EARLY]);
        let mut told = script(6.0);
        lease(&mut told, 4.0, Call::LeaseKeepAlive { id: 7 }, 0);
        assert_eq!(broken(told, &BOUNDS), [EARLY]);
    }

    #[test]
    fn a_lease_that_lives_on_is_found_unless_something_was_broken() {
        assert_eq!(broken(script(8.0), &BOUNDS), [LATE]);
        let mut history = script(8.0).history();
        let (effect, heal_error) = (Ok("n1".to_owned()), None);
        history.faults.push(FaultRecord {
            name: "kill",
            started_ns: 0,
            healed_ns: 4 * SECOND,
            effect,
            heal_error,
        });
        assert!(check(&history, "test", &BOUNDS).iter().all(Verdict::held));
        let mut never = Script::new("test");
        lease(&mut never, 1.0, Call::LeaseGrant { id: 7, ttl_s: 3 }, 3);
        at(&mut never, 1.1, put_leased("a", "1", 7));
        at(&mut never, 9.0, get("b"));
        assert_eq!(broken(never, &BOUNDS), [LATE]);
        let mut told = script(6.0);
        lease(&mut told, 9.0, Call::LeaseTimeToLive { id: 7 }, 0);
        assert_eq!(broken(told, &BOUNDS), [LATE]);
    }

    #[test]
    fn a_lease_that_is_revoked_or_whose_keys_are_deleted_says_nothing_early() {
        let mut script = Script::new("test");
        lease(&mut script, 1.0, Call::LeaseGrant { id: 7, ttl_s: 3 }, 3);
        at(&mut script, 1.1, put_leased("a", "1", 7));
        at(&mut script, 1.2, delete(Span::key("a")));
        at(&mut script, 1.3, put_leased("a", "2", 7));
        at(&mut script, 1.4, Call::LeaseRevoke { id: 7 });
        lease(&mut script, 1.5, Call::LeaseTimeToLive { id: 7 }, -1);
        let verdicts = check(&script.history(), "test", &BOUNDS);
        assert!(verdicts.iter().all(Verdict::held), "{verdicts:?}");
        assert_eq!(verdicts[0].checked, 0);
    }

    #[test]
    fn keys_left_behind_and_keys_that_come_later_are_found() {
        let mut torn = Script::new("test");
        lease(&mut torn, 1.0, Call::LeaseGrant { id: 7, ttl_s: 3 }, 3);
        at(&mut torn, 1.1, put_leased("a", "1", 7));
        at(&mut torn, 1.2, put_leased("b", "2", 7));
        torn.effect(&delete(Span::key("a")));
        torn.effect(&delete(Span::key("b")));
        at(&mut torn, 6.0, put("c", "3"));
        assert!(broken(torn, &BOUNDS).contains(&WHOLE));
        let mut later = script(5.5);
        at(&mut later, 5.6, put_leased("a", "5", 7));
        assert_eq!(broken(later, &BOUNDS), [WHOLE]);
    }

    #[test]
    fn a_renewal_promised_after_the_end_is_found() {
        let mut script = script(5.5);
        lease(&mut script, 5.7, Call::LeaseKeepAlive { id: 7 }, 3);
        assert_eq!(broken(script, &BOUNDS), [EARLY]);
    }
}
