//! A fenced write is never lost, and a lock is given to the first in line. That
//! nobody else believes to hold it meanwhile is not claimed: a client that is
//! paused does not know that its lease ran out (etcd, "Lock ... is not a
//! substitute for fencing"). What unfenced writers lose is told as a note.

use super::describe;
use super::history::{Body, Call, History, Span, Txn};
use super::revision_order;
use super::set;
use super::verdict::Verdict;

const FENCED: &str = "a fenced write is never lost";
const TURN: &str = "a lock is given to the first in line";

/// Judges locks: a fenced write is a `Txn` of the workload that compares the create revision (or version) of
/// the lock's key and puts `old + "," + element` to a key below `workload/fenced/`; the same without comparison below
/// `workload/unfenced/` may lose elements, which is counted as information. Elements are unique per key.
pub fn check(history: &History, workload: &str) -> Vec<Verdict> {
    let below = |lists: &str| {
        let prefix = format!("{workload}/{lists}/");
        move |key: &str, _: &Txn| key.starts_with(&prefix)
    };
    let fenced = set::judge(history, workload, below("fenced"));
    let findings = [fenced.lost, fenced.invented, fenced.back].concat();
    let unfenced = set::judge(history, workload, below("unfenced"));
    let (lost, all) = (unfenced.lost.len(), unfenced.acknowledged);
    let mut turn = turns(history, workload);
    turn.note = format!("of {all} unfenced writes {lost} were lost, which nobody promises against");
    vec![Verdict::unless(FENCED, fenced.acknowledged, describe::some(findings), fenced.unread), turn]
}

fn turns(history: &History, workload: &str) -> Verdict {
    let order = revision_order::resolve(history);
    let (mut given, mut findings, mut beyond) = (0, Vec::new(), None);
    for (index, op) in history.ops.iter().enumerate().filter(|(_, op)| op.workload == workload) {
        let (Call::Lock { name, .. }, Some(reply)) = (&op.call, op.reply()) else { continue };
        let Body::Locked { key } = &reply.body else { continue };
        given += 1;
        if reply.revision > order.log.reached {
            let call = describe::call(history, index);
            beyond.get_or_insert_with(|| format!("the watch of everything ended before {call}"));
            continue;
        }
        let line = order.store.range_at(&Span::prefix(&format!("{name}/")), reply.revision);
        let first = line.min_by_key(|kv| kv.create_revision);
        if first.is_none_or(|first| first.key != *key) {
            let first = first.map_or("nobody".to_owned(), |kv| kv.to_string());
            findings.push(format!("{} while {first} was first in line", describe::call(history, index)));
        }
    }
    Verdict::unless(TURN, given, describe::some(findings), beyond)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{Operand, Outcome, Reply};
    use crate::judge::simulator::{Script, equal, get, put_leased, putting, range};

    fn lock(script: &mut Script, at: u64, lease: i64, revision: i64) {
        let call = Call::Lock { name: "lock/turn".into(), lease };
        let body = Body::Locked { key: format!("lock/turn/{lease:x}") };
        script.record(lease as u64, at, at + 5, call, Outcome::Ok(Reply { revision, body }));
    }

    /// A write that holds while the key of a lease is there with its create revision.
    fn write(list: &str, value: &str, fence_of: Option<(i64, i64)>) -> Call {
        let fence = |(lease, create)| equal(&format!("lock/turn/{lease:x}"), Operand::CreateRevision(create));
        let success = vec![putting(&format!("lock/{list}/0"), value)];
        Call::Txn(Txn { compares: fence_of.map(fence).into_iter().collect(), success, failure: vec![] })
    }

    /// Two contenders take turns; the key of lease 17 is made at revision 2, that of 18 at revision 4. The first
    /// one's lease runs out before its last write, which the fence refuses and nothing else does.
    fn script() -> Script {
        let mut script = Script::new("lock");
        script.effect(&put_leased("lock/turn/11", "", 17));
        lock(&mut script, 10, 17, 2);
        script.call(1, 20, 25, write("fenced", "1", Some((17, 2))));
        script.effect(&put_leased("lock/turn/12", "", 18));
        script.effect(&Call::LeaseRevoke { id: 17 });
        lock(&mut script, 40, 18, 5);
        script.call(2, 50, 55, write("fenced", "1,2", Some((18, 4))));
        script.call(1, 60, 65, write("fenced", "1,3", Some((17, 2))));
        script.call(1, 70, 75, write("unfenced", "1", None));
        script.call(2, 80, 85, write("unfenced", "2", None));
        script.call(3, 90, 95, range(Span::prefix("lock/")));
        script
    }

    #[test]
    fn fenced_writes_stay_and_lost_unfenced_ones_are_only_told() {
        let verdicts = check(&script().history(), "lock");
        assert!(verdicts.iter().all(Verdict::held), "{verdicts:?}");
        assert_eq!(verdicts.iter().map(|verdict| verdict.checked).collect::<Vec<_>>(), [2, 2]);
        assert!(verdicts[1].note.starts_with("of 2 unfenced writes 1 were lost"), "{}", verdicts[1].note);
    }

    #[test]
    fn a_fenced_write_that_is_lost_is_found() {
        let mut script = script();
        script.effect(&write("fenced", "1,9", None));
        script.call(3, 100, 110, get("lock/fenced/0"));
        assert!(!check(&script.history(), "lock")[0].held());
    }

    #[test]
    fn a_lock_out_of_turn_or_without_a_key_is_found() {
        for revision in [1, 4] {
            let mut script = script();
            lock(&mut script, 30, 18, revision);
            let verdicts = check(&script.history(), "lock");
            assert_eq!((verdicts[0].held(), verdicts[1].held()), (true, false), "{verdicts:?}");
        }
    }
}
