//! A retried write is applied once, however often and through whomever it was
//! sent: all attempts get one answer, and what it wrote is in one revision.
//!
//! Values are unique over the run, so a value in two revisions was written
//! twice. What such a write did besides, and when, is judged with everything
//! else by [`super::revision_order`], to which all attempts are one call.

use std::collections::{BTreeMap, HashMap};

use super::attribution;
use super::describe;
use super::event_log::EventLog;
use super::history::{Body, EventKind, History, Outcome, Revision};
use super::revision_order::changed;
use super::verdict::Verdict;

const ONCE: &str = "a retried write is applied once";
const ANSWER: &str = "all answers to one request id are the same";

/// Judges calls of `workload` that carry a request id. Each attempt is a call of its own with the same id.
pub fn check(history: &History, workload: &str) -> Vec<Verdict> {
    let log = EventLog::of(history);
    let mut written: HashMap<(&str, &str), Vec<Revision>> = HashMap::new();
    for (revision, events) in &log.revisions {
        for event in events.iter().filter(|event| event.kind == EventKind::Put) {
            written.entry((&event.kv.key, &event.kv.value)).or_default().push(*revision);
        }
    }
    let mut attempts: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (index, op) in history.ops.iter().enumerate().filter(|(_, op)| op.workload == workload) {
        if let Some(id) = &op.request_id {
            attempts.entry(id).or_default().push(index);
        }
    }
    let (mut retried, mut answered) = (0, 0);
    let (mut once, mut answers) = (Vec::new(), Vec::new());
    for (id, attempts) in &attempts {
        let bodies: Vec<(usize, &Body)> =
            attempts.iter().filter_map(|index| Some((*index, &history.ops[*index].reply()?.body))).collect();
        retried += usize::from(attempts.len() > 1);
        answered += usize::from(bodies.len() > 1);
        if let Some((other, _)) = bodies.iter().find(|(_, body)| *body != bodies[0].1) {
            let [one, other] = [bodies[0].0, *other].map(|index| describe::call(history, index));
            answers.push(format!("id {id}: {one}, but {other}"));
        }
        let is_done = bodies.first().is_some_and(|(_, body)| changed(body));
        let is_refused =
            attempts.iter().all(|index| matches!(history.ops[*index].outcome, Outcome::Failed(_)));
        for put in attribution::puts(&history.ops[attempts[0]].call) {
            let revisions = written.get(&put).map_or(&[][..], Vec::as_slice);
            let told = || {
                let all: Vec<String> = attempts.iter().map(|index| describe::call(history, *index)).collect();
                format!("id {id}: {}={:?} is in revisions {revisions:?}: {}", put.0, put.1, all.join("; "))
            };
            // Which branch was taken is for the replay to judge; twice is wrong in any.
            if revisions.len() > 1 || (is_refused && !revisions.is_empty()) {
                once.push(told());
            }
            let is_put = matches!(bodies.first(), Some((_, Body::Single(_))));
            if is_done && is_put && revisions.is_empty() && log.reached > 1 {
                once.push(told());
            }
        }
    }
    let doubt =
        (log.reached <= 1 && retried > 0).then(|| "the watch of everything is not in the history".to_owned());
    vec![
        Verdict::unless(ONCE, retried, describe::some(once), doubt),
        Verdict::from_findings(ANSWER, answered, describe::some(answers)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{Call, Outcome, Reply};
    use crate::judge::simulator::{Script, cas, put};

    /// A put that was tried three times and applied at one of them, with two answers; a failed comparison.
    fn script(call: Call) -> Script {
        let mut script = Script::new("test");
        script.call(9, 1, 2, put("k", "0"));
        script.unknown(0, 10, 20, call.clone(), true);
        let Some(done) = Script::new("test").store.execute(&call) else { panic!("a write") };
        for (process, at) in [(1, 30), (2, 50)] {
            let reply = Reply { revision: 3, body: done.body.clone() };
            script.record(process, at, at + 10, call.clone(), Outcome::Ok(reply));
        }
        script.ops[1..].iter_mut().for_each(|op| op.request_id = Some("7/1".into()));
        script
    }

    fn broken(history: &History) -> Vec<&'static str> {
        let verdicts = check(history, "test").into_iter();
        verdicts.filter(|verdict| !verdict.held()).map(|verdict| verdict.claim).collect()
    }

    #[test]
    fn one_write_with_one_answer_holds() {
        let verdicts = check(&script(put("a", "1")).history(), "test");
        assert!(verdicts.iter().all(Verdict::held), "{verdicts:?}");
        assert_eq!(verdicts.iter().map(|verdict| verdict.checked).collect::<Vec<_>>(), [1, 1]);
        assert_eq!(broken(&script(cas("a", None, "1")).history()), [""; 0]);
    }

    #[test]
    fn a_write_applied_twice_is_found() {
        for call in [put("a", "1"), put("k", "1")] {
            let mut script = script(call.clone());
            script.effect(&call);
            assert_eq!(broken(&script.history()), [ONCE]);
        }
    }

    #[test]
    fn a_write_that_was_answered_but_is_nowhere_is_found() {
        let mut history = script(put("a", "1")).history();
        history.watches[0].items.remove(2);
        assert_eq!(broken(&history), [ONCE]);
    }

    #[test]
    fn a_write_that_was_refused_each_time_but_is_there_is_found() {
        let mut history = script(put("a", "1")).history();
        history.ops[1..].iter_mut().for_each(|op| op.outcome = Outcome::Failed("no session".into()));
        assert_eq!(broken(&history), [ONCE]);
    }

    #[test]
    fn different_answers_are_found() {
        let mut history = script(cas("a", None, "1")).history();
        let Outcome::Ok(reply) = &mut history.ops[3].outcome else { panic!("an answer") };
        reply.body = Body::Txn { succeeded: false, replies: vec![] };
        assert_eq!(broken(&history), [ANSWER]);
    }
}
