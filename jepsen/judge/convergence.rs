//! Members agree, and writes flow again: equal hashes at equal revisions on
//! every member, and a write acknowledged soon after healing (etcd's HashKV and
//! its robustness tests' hash check; the time is this project's own promise).
//!
//! Hashes are compared over the whole run, wherever two were told of the same
//! revision with the same compaction; in the end all must tell of the same
//! compaction, as they were asked once nothing was compacted any more. Writes must flow where nothing else was
//! broken for as long as they may take.

use std::collections::{BTreeMap, BTreeSet};

use super::describe;
use super::history::{Body, Call, History, Op, Revision};
use super::revision_order::changed;
use super::verdict::Verdict;

const HASHES: &str = "hashes at one revision are equal";
const MEMBERS: &str = "every member told its hash of the last revision asked for";
const COMPACTED: &str = "in the end all members have compacted up to the same revision";
const FLOW: &str = "writes are acknowledged within 10 s of healing";

/// How long writes may take to flow again.
const FLOW_NS_MAX: u64 = 10_000_000_000;

/// Judges hashes and the return of writes. `members` are the hosts that must have answered in the end.
pub fn check(history: &History, members: &[usize]) -> Vec<Verdict> {
    let mut by_state: BTreeMap<(Revision, Revision), Vec<(usize, u32)>> = BTreeMap::new();
    let mut by_revision: BTreeMap<Revision, BTreeSet<usize>> = BTreeMap::new();
    for (index, op) in history.ops.iter().enumerate() {
        let Some(Body::HashKv { hash, hash_revision, compact_revision }) =
            op.reply().map(|reply| &reply.body)
        else {
            continue;
        };
        by_state.entry((*hash_revision, *compact_revision)).or_default().push((index, *hash));
        by_revision.entry(*hash_revision).or_default().insert(op.node);
    }
    let (mut compared, mut unequal) = (0, Vec::new());
    for hashes in by_state.values() {
        let (first, hash) = hashes[0];
        compared += hashes.len() - 1;
        for (index, _) in hashes.iter().filter(|(_, other)| *other != hash) {
            let [one, other] = [first, *index].map(|index| describe::call(history, index));
            unequal.push(format!("{one}, but {other}"));
        }
    }
    let last = by_revision.last_key_value();
    let missing = members.iter().filter(|member| last.is_none_or(|(_, nodes)| !nodes.contains(member)));
    let revision = last.map_or(0, |(revision, _)| *revision);
    let missing = missing.map(|member| format!("node {member} did not tell its hash of revision {revision}"));
    let compacted: BTreeSet<Revision> =
        by_state.keys().filter(|(at, _)| *at == revision).map(|(_, compacted)| *compacted).collect();
    let differing = (compacted.len() > 1).then(|| format!("at revision {revision} they are {compacted:?}"));
    vec![
        Verdict::from_findings(HASHES, compared, describe::some(unequal)),
        Verdict::from_findings(MEMBERS, members.len(), missing.collect()),
        Verdict::from_findings(COMPACTED, members.len(), differing.into_iter().collect()),
        flow(history, members),
    ]
}

fn flow(history: &History, members: &[usize]) -> Verdict {
    let (mut checked, mut findings) = (0, Vec::new());
    let mut look = |healed_ns: u64, node: Option<usize>, name: &str| {
        let until = healed_ns.saturating_add(FLOW_NS_MAX);
        let tried = |op: &&Op| node.is_none_or(|node| op.node == node) && is_write(op);
        let mut writes = history.ops.iter().filter(tried).filter(|op| op.returned_ns >= healed_ns);
        // Without a write that had all of the time nothing can be said.
        let had_time = |op: &Op| op.invoked_ns >= healed_ns && op.invoked_ns <= until;
        let was_done =
            |op: &Op| op.returned_ns <= until && op.reply().is_some_and(|reply| changed(&reply.body));
        if !writes.clone().any(had_time) {
            return;
        }
        checked += 1;
        if !writes.any(was_done) {
            let whom = node.map_or("the cluster".to_owned(), |node| format!("node {node}"));
            let healed = describe::seconds(healed_ns);
            findings.push(format!(
                "{whom} acknowledged no write within 10 s of the healing of {name} at {healed} s"
            ));
        }
    };
    for fault in &history.faults {
        let until = fault.healed_ns.saturating_add(FLOW_NS_MAX);
        let is_broken_by = |other: &&super::history::FaultRecord| {
            !std::ptr::eq(*other, fault) && other.started_ns <= until && other.healed_ns > fault.healed_ns
        };
        if !history.faults.iter().any(|other| is_broken_by(&other)) {
            look(fault.healed_ns, None, fault.name);
        }
    }
    let last = history.faults.iter().max_by_key(|fault| fault.healed_ns);
    for member in members {
        look(
            last.map_or(0, |fault| fault.healed_ns),
            Some(*member),
            last.map_or("nothing", |fault| fault.name),
        );
    }
    Verdict::from_findings(FLOW, checked, describe::some(findings))
}

fn is_write(op: &Op) -> bool {
    !super::attribution::puts(&op.call).is_empty() || matches!(op.call, Call::LeaseRevoke { .. })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{FaultRecord, Outcome, Reply};
    use crate::judge::simulator::{Script, put};

    const SECOND: u64 = 1_000_000_000;

    fn hash(script: &mut Script, node: usize, revision: Revision, hash: u32, compact_revision: Revision) {
        let body = Body::HashKv { hash, hash_revision: revision, compact_revision };
        let reply = Outcome::Ok(Reply { revision, body });
        let index = script.record(9, 90 * SECOND, 91 * SECOND, Call::HashKv { revision }, reply);
        script.ops[index].node = node;
    }

    fn fault(started_s: u64, healed_s: u64) -> FaultRecord {
        let (started_ns, healed_ns) = (started_s * SECOND, healed_s * SECOND);
        FaultRecord { name: "kill-one", started_ns, healed_ns, effect: Ok("n1".into()), heal_error: None }
    }

    /// Writes through two nodes from second 20 on, and equal hashes of both in the end.
    fn script() -> Script {
        let mut script = Script::new("test");
        for at in 20..40 {
            let index = script.call(at, at * SECOND, at * SECOND + 5, put("a", &at.to_string()));
            script.ops[index].node = at as usize % 2;
        }
        for (node, revision) in [(0, 20), (0, 21), (1, 21)] {
            hash(&mut script, node, revision, 7, 1);
        }
        script
    }

    fn broken(script: Script, faults: &[FaultRecord]) -> Vec<&'static str> {
        let history = History { faults: faults.to_vec(), ..script.history() };
        let verdicts = check(&history, &[0, 1]).into_iter();
        verdicts.filter(|verdict| !verdict.held()).map(|verdict| verdict.claim).collect()
    }

    #[test]
    fn equal_hashes_and_flowing_writes_hold() {
        let history = History { faults: vec![fault(5, 19)], ..script().history() };
        let verdicts = check(&history, &[0, 1]);
        assert!(verdicts.iter().all(Verdict::held), "{verdicts:?}");
        assert_eq!(verdicts.iter().map(|verdict| verdict.checked).collect::<Vec<_>>(), [1, 2, 2, 3]);
    }

    #[test]
    fn unequal_hashes_are_found_where_they_are_comparable() {
        let mut unequal = script();
        hash(&mut unequal, 2, 20, 8, 1);
        assert_eq!(broken(unequal, &[]), [HASHES]);
        let mut compacted = script();
        hash(&mut compacted, 2, 20, 8, 15);
        assert_eq!(broken(compacted, &[]), [""; 0]);
        let mut differing = script();
        hash(&mut differing, 2, 21, 8, 15);
        assert_eq!(broken(differing, &[]), [COMPACTED]);
        let mut alone = script();
        hash(&mut alone, 0, 30, 9, 1);
        assert_eq!(broken(alone, &[]), [MEMBERS]);
    }

    #[test]
    fn writes_that_do_not_come_back_are_found() {
        let stalled = |from: u64| {
            let mut script = script();
            for op in script.ops.iter_mut().filter(|op| op.invoked_ns < from * SECOND) {
                op.outcome = Outcome::Unknown("timeout".into());
            }
            script
        };
        assert_eq!(broken(stalled(27), &[fault(5, 19)]), [""; 0]);
        assert_eq!(broken(stalled(32), &[fault(5, 19)]), [FLOW]);
        // Another fault came too soon to say anything of the first, and nothing was tried after it.
        assert_eq!(broken(stalled(32), &[fault(5, 19), fault(27, 60)]), [""; 0]);
    }

    #[test]
    fn one_member_that_writes_do_not_flow_through_is_found() {
        let mut script = script();
        for op in script.ops.iter_mut().filter(|op| op.node == 1 && is_write(op)) {
            op.outcome = Outcome::Unknown("timeout".into());
        }
        assert_eq!(broken(script, &[fault(5, 19)]), [FLOW]);
    }
}
