//! A removed member serves no linearizable read once its removal was
//! acknowledged, until it is added again: it cannot know what the others decide
//! without it (openraft and etcd both let it serve stale ones otherwise).

use super::describe;
use super::history::{Action, Call, History, Op, Outcome};
use super::verdict::Verdict;

const CLAIM: &str = "a removed member serves no linearizable read";

/// Judges linearizable reads asked of a host between its removal (`Call::MemberRemove`, acknowledged) and its
/// next addition (`Call::MemberAdd`, invoked).
pub fn check(history: &History) -> Vec<Verdict> {
    let (mut asked, mut findings) = (0, Vec::new());
    for (removal, op) in history.ops.iter().enumerate() {
        let (Call::MemberRemove { node: removed }, Outcome::Ok(_)) = (&op.call, &op.outcome) else {
            continue;
        };
        let since = op.returned_ns;
        let is_addition = |op: &&Op| matches!(&op.call, Call::MemberAdd { node } if node == removed);
        let additions = history.ops.iter().filter(is_addition).map(|op| op.invoked_ns);
        // One that was under way meanwhile may have come after the removal.
        let until = additions.filter(|at| *at > op.invoked_ns).min().unwrap_or(u64::MAX);
        for (index, read) in history.ops.iter().enumerate() {
            if read.node != *removed
                || read.invoked_ns <= since
                || read.returned_ns >= until
                || !is_read(read)
            {
                continue;
            }
            asked += 1;
            if read.reply().is_some() {
                let [read, removal] = [index, removal].map(|index| describe::call(history, index));
                findings.push(format!("{read} was answered after {removal}"));
            }
        }
    }
    vec![Verdict::from_findings(CLAIM, asked, describe::some(findings))]
}

/// Whether it is a read that must be linearizable.
fn is_read(op: &Op) -> bool {
    match &op.call {
        Call::Single { action: Action::Range { .. }, serializable } => !serializable,
        Call::Txn(txn) => {
            txn.success.iter().chain(&txn.failure).all(|action| matches!(action, Action::Range { .. }))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{Body, Reply};
    use crate::judge::simulator::{Script, get, put};

    /// Node 2 is removed at 20 and added again at 60. Processes 2, 5 and 8 are its clients.
    fn script() -> Script {
        let mut script = Script::new("test");
        let done = || Outcome::Ok(Reply { revision: 2, body: Body::Members { names: vec![] } });
        script.call(0, 1, 2, put("a", "1"));
        script.record(0, 10, 20, Call::MemberRemove { node: 2 }, done());
        script.record(1, 60, 70, Call::MemberAdd { node: 2 }, done());
        script.call(2, 5, 15, get("a"));
        script.call(5, 12, 30, get("a"));
        script.call(2, 80, 90, get("a"));
        script.call(0, 30, 40, get("a"));
        script.record(8, 30, 40, get("a"), Outcome::Unknown("refused".into()));
        script
    }

    #[test]
    fn reads_before_a_removal_and_after_an_addition_are_fine() {
        let verdicts = check(&script().history());
        assert_eq!(verdicts, [Verdict::from_findings(CLAIM, 1, vec![])]);
    }

    #[test]
    fn a_read_from_a_removed_member_is_found() {
        let mut script = script();
        script.call(8, 50, 55, get("a"));
        assert!(!check(&script.history())[0].held());
    }

    #[test]
    fn a_removal_in_doubt_and_a_serializable_read_say_nothing() {
        let mut doubtful = script();
        doubtful.call(8, 50, 55, get("a"));
        doubtful.ops[1].outcome = Outcome::Unknown("timeout".into());
        assert!(check(&doubtful.history())[0].held());
        let mut serializable = script();
        let index = serializable.call(8, 50, 55, get("a"));
        let Call::Single { serializable: relaxed, .. } = &mut serializable.ops[index].call else {
            panic!("a read")
        };
        *relaxed = true;
        assert!(check(&serializable.history())[0].held());
    }
}
