//! A serializable read is old at worst: it shows the state of the revision that
//! it names, that revision was there, and no client goes back on one node
//! (etcd, "KV API guarantees": such reads may be stale).
//!
//! A revision is from the future when the call that made it had not begun when
//! the read was answered. A node that was stopped may come back with an older
//! state, so nothing is said across faults that may stop nodes.

use std::collections::HashMap;

use super::calls;
use super::describe;
use super::history::{Call, FaultRecord, History, Revision};
use super::revision_order::{self, Maker};
use super::verdict::Verdict;

const CONTENT: &str = "a serializable read shows the state of the revision it names";
const FUTURE: &str = "no serializable read is from the future";
const MONOTONIC: &str = "serializable reads of one client on one node do not go back";

/// How the names of faults begin that stop no node.
const HARMLESS: [&str; 11] = [
    "pause",
    "partition",
    "delay",
    "jitter",
    "loss",
    "bandwidth",
    "cut",
    "clock",
    "leader-transfer",
    "compact",
    "disk-slow",
];

/// Judges serializable ranges of `workload`.
pub fn check(history: &History, workload: &str) -> Vec<Verdict> {
    let order = revision_order::resolve(history);
    let (mut content, mut future, mut back) = (Vec::new(), Vec::new(), Vec::new());
    let (mut reads, mut pairs) = (0, 0);
    let mut beyond = None;
    let mut last: HashMap<(u64, usize), (Revision, usize)> = HashMap::new();
    for call in calls::done(history).iter().filter(|call| call.op.workload == workload) {
        let (Call::Single { serializable: true, .. }, Some(reply)) = (&call.op.call, call.reply()) else {
            continue;
        };
        let name = || describe::call(history, call.index);
        reads += 1;
        if reply.revision > order.log.reached {
            let reached = order.log.reached;
            beyond.get_or_insert_with(|| {
                format!("the watch of everything only reached {reached}, before {}", name())
            });
        } else {
            let expected = order.store.execute_at(&call.op.call, reply.revision);
            if expected.as_ref() != Some(&reply.body) {
                let expected = expected.map_or("an error".to_owned(), |body| body.to_string());
                content.push(format!("the answer should be {}: {}", describe::short(expected), name()));
            }
        }
        if let Some(Maker::Call { index, invoked_ns }) = order.makers.get(&reply.revision)
            && *invoked_ns > call.op.returned_ns
        {
            future.push(format!("{} knows the revision of {}", name(), describe::call(history, *index)));
        }
        let before = last.insert((call.op.process, call.op.node), (reply.revision, call.index));
        if let Some((revision, index)) = before
            && !history
                .faults
                .iter()
                .any(|fault| may_stop(fault, history.ops[index].invoked_ns, call.op.returned_ns))
        {
            pairs += 1;
            if reply.revision < revision {
                back.push(format!("{} came after {}", name(), describe::call(history, index)));
            }
        }
    }
    vec![
        Verdict::unless(CONTENT, reads, describe::some(content), beyond),
        Verdict::from_findings(FUTURE, reads, describe::some(future)),
        Verdict::from_findings(MONOTONIC, pairs, describe::some(back)),
    ]
}

/// Whether a fault may have stopped a node between two times.
fn may_stop(fault: &FaultRecord, from_ns: u64, to_ns: u64) -> bool {
    let is_meanwhile = fault.started_ns <= to_ns && (fault.healed_ns >= from_ns || fault.healed_ns == 0);
    is_meanwhile && !HARMLESS.iter().any(|name| fault.name.starts_with(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{Action, ActionReply, Body, Outcome, Reply, Span};
    use crate::judge::simulator::{Script, put};

    fn read(script: &mut Script, process: u64, from: u64, to: u64, revision: Revision) -> usize {
        let action = Action::Range { span: Span::prefix("k/"), revision: 0, limit: 2 };
        let call = Call::Single { action, serializable: true };
        let body = script.store.execute_at(&call, revision).expect("a range");
        script.record(process, from, to, call, Outcome::Ok(Reply { revision, body }))
    }

    /// Three writes, and reads that lag behind them, on two nodes.
    fn script() -> Script {
        let mut script = Script::new("test");
        for (at, value) in [(10, "1"), (30, "2"), (50, "3")] {
            script.call(0, at, at + 10, put(&format!("k/{value}"), value));
        }
        read(&mut script, 1, 70, 80, 2);
        read(&mut script, 2, 75, 85, 4);
        read(&mut script, 1, 90, 95, 3);
        script
    }

    fn broken(history: &History) -> Vec<&'static str> {
        let verdicts = check(history, "test").into_iter();
        verdicts.filter(|verdict| !verdict.held()).map(|verdict| verdict.claim).collect()
    }

    #[test]
    fn reads_may_be_old() {
        let verdicts = check(&script().history(), "test");
        assert!(verdicts.iter().all(Verdict::held), "{verdicts:?}");
        assert_eq!(verdicts.iter().map(|verdict| verdict.checked).collect::<Vec<_>>(), [3, 3, 1]);
    }

    #[test]
    fn a_mixed_state_is_found() {
        let mut history = script().history();
        let Outcome::Ok(reply) = &mut history.ops[5].outcome else { panic!("a read") };
        let Body::Single(ActionReply::Range { count, .. }) = &mut reply.body else { panic!("a range") };
        *count = 3;
        assert_eq!(broken(&history), [CONTENT]);
    }

    #[test]
    fn going_back_is_found_unless_the_node_may_have_been_stopped() {
        let mut script = script();
        read(&mut script, 1, 100, 110, 2);
        let mut history = script.history();
        assert_eq!(broken(&history), [MONOTONIC]);
        let (effect, heal_error) = (Ok("n2".to_owned()), None);
        let mut fault =
            FaultRecord { name: "pause-leader", started_ns: 92, healed_ns: 94, effect, heal_error };
        history.faults.push(fault.clone());
        assert_eq!(broken(&history), [MONOTONIC]);
        fault.name = "kill-one";
        history.faults.push(fault);
        assert_eq!(broken(&history), [""; 0]);
    }

    #[test]
    fn a_revision_that_nobody_had_asked_for_yet_is_found() {
        let mut script = script();
        script.call(0, 200, 210, put("k/4", "4"));
        read(&mut script, 5, 100, 110, 5);
        let copy = Script { ops: script.ops.clone(), log: script.log.clone(), ..Script::new("test") };
        assert_eq!(broken(&copy.history()), [FUTURE]);
        // It had, when an attempt before was in doubt.
        let again = script.unknown(6, 90, 95, put("k/4", "4"), false);
        for index in [again - 2, again] {
            script.ops[index].request_id = Some("7/1".into());
        }
        assert_eq!(broken(&script.history()), [""; 0]);
    }
}
