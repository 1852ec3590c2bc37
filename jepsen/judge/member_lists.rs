//! Linearizable member lists name who is a member: everyone whose addition was
//! acknowledged before the list was asked for, and nobody whose removal was.
//!
//! While a change is under way, or for as long as it is in doubt, a list may
//! show either. A member is known by its name, `n1` being the one of node 0.

use super::describe;
use super::history::{Body, Call, History, Op, Outcome};
use super::verdict::Verdict;

const CLAIM: &str = "member lists name who is a member";

/// Judges every answer to `Call::MemberList` against the recorded changes. `first` are the members that the
/// cluster began with, of `hosts` nodes that there are.
pub fn check(history: &History, first: usize, hosts: usize) -> Vec<Verdict> {
    let (mut checked, mut findings) = (0, Vec::new());
    for (index, op) in history.ops.iter().enumerate() {
        let Some(Body::Members { names }) = op.reply().map(|reply| &reply.body) else { continue };
        if op.call != Call::MemberList {
            continue;
        }
        for node in 0..hosts {
            let Some(is_member) = is_member(history, op, node, node < first) else { continue };
            checked += 1;
            if names.contains(&format!("n{}", node + 1)) != is_member {
                let should = if is_member { "is a member" } else { "is none" };
                let list = describe::call(history, index);
                findings.push(format!(
                    "{list}, but n{} {should}: {}",
                    node + 1,
                    last_change(history, op, node)
                ));
            }
        }
    }
    vec![Verdict::from_findings(CLAIM, checked, describe::some(findings))]
}

/// Changes of a node's membership that began before the call ended, and may have been made.
fn changes<'a>(history: &'a History, list: &'a Op, node: usize) -> impl Iterator<Item = (usize, &'a Op)> {
    history.ops.iter().enumerate().filter(move |(_, op)| {
        let is_about =
            matches!(op.call, Call::MemberAdd { node: of } | Call::MemberRemove { node: of } if of == node);
        is_about && op.invoked_ns <= list.returned_ns && !matches!(op.outcome, Outcome::Failed(_))
    })
}

/// Whether the node was a member while the list was made; `None` when that was open.
fn is_member(history: &History, list: &Op, node: usize, at_first: bool) -> Option<bool> {
    let mut is_member = at_first;
    let mut done_ns = 0;
    for (_, change) in changes(history, list, node) {
        // A change in doubt may still be made at any time, and two at once in either order.
        let is_settled = change.reply().is_some() && change.returned_ns < list.invoked_ns;
        if !is_settled || change.invoked_ns < done_ns {
            return None;
        }
        done_ns = change.returned_ns;
        is_member = matches!(change.call, Call::MemberAdd { .. });
    }
    Some(is_member)
}

fn last_change(history: &History, list: &Op, node: usize) -> String {
    let last = changes(history, list, node).last();
    last.map_or("it never changed".to_owned(), |(index, _)| describe::call(history, index))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::Reply;
    use crate::judge::simulator::Script;

    fn members(names: &[&str]) -> Outcome {
        let names = names.iter().map(ToString::to_string).collect();
        Outcome::Ok(Reply { revision: 2, body: Body::Members { names } })
    }

    /// Three members; n1 leaves from 10 to 20, n4 joins from 30 to 40. Lists are made before, between and after.
    fn script() -> Script {
        let mut script = Script::new("test");
        script.record(0, 10, 20, Call::MemberRemove { node: 0 }, members(&[]));
        script.record(0, 30, 40, Call::MemberAdd { node: 3 }, members(&[]));
        script.record(1, 1, 2, Call::MemberList, members(&["n1", "n2", "n3"]));
        script.record(1, 22, 25, Call::MemberList, members(&["n2", "n3"]));
        script.record(1, 50, 60, Call::MemberList, members(&["n2", "n3", "n4"]));
        script
    }

    fn verdict(script: Script) -> Verdict {
        check(&script.history(), 3, 4).remove(0)
    }

    #[test]
    fn lists_that_follow_the_changes_hold() {
        assert_eq!(verdict(script()), Verdict::from_findings(CLAIM, 12, vec![]));
    }

    #[test]
    fn lists_from_before_a_change_are_found_after_it() {
        for stale in [&["n1", "n2", "n3"][..], &["n2", "n3"], &["n1", "n2", "n3", "n4"], &["n3", "n4"], &[]] {
            let mut lying = script();
            lying.record(2, 70, 80, Call::MemberList, members(stale));
            assert!(!verdict(lying).held(), "{stale:?}");
        }
    }

    #[test]
    fn while_a_change_is_under_way_or_in_doubt_either_list_is_right() {
        for during in [&["n1", "n2", "n3"][..], &["n2", "n3"]] {
            let mut script = script();
            script.record(2, 12, 15, Call::MemberList, members(during));
            script.record(2, 18, 28, Call::MemberList, members(during));
            assert!(verdict(script).held(), "{during:?}");
        }
        let mut doubtful = script();
        doubtful.ops[0].outcome = Outcome::Unknown("timeout".into());
        doubtful.record(2, 70, 80, Call::MemberList, members(&["n1", "n2", "n3", "n4"]));
        assert!(verdict(doubtful).held());
    }
}
