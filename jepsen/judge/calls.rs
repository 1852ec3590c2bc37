//! Calls as the store may have done them: attempts that carry one request id
//! are one call, and calls that certainly did nothing are none.

use std::collections::HashMap;

use super::history::{Body, History, Op, Outcome, Reply, Revision};

/// One call that was done, or may have been.
#[derive(Clone, Copy, Debug)]
pub struct Done<'a> {
    /// Its place in the history: of the attempt that was answered first, else of the first attempt.
    pub index: usize,
    pub op: &'a Op,
    /// When the first attempt was invoked.
    pub invoked_ns: u64,
    /// When the first answer was there; without one it may happen at any time after the invocation.
    pub returned_ns: Option<u64>,
}

impl<'a> Done<'a> {
    pub fn reply(&self) -> Option<&'a Reply> {
        self.op.reply()
    }

    pub fn body(&self) -> Option<&'a Body> {
        self.reply().map(|reply| &reply.body)
    }

    /// The revision of the state that answered, or that a write made. The answer to a write that carries a
    /// request id may come from a retry, whose header is of the retry's time: then it says nothing exact.
    pub fn revision(&self) -> Option<Revision> {
        self.reply().filter(|_| self.op.request_id.is_none()).map(|reply| reply.revision)
    }
}

/// All calls that were or may have been done, in the order of their invocation.
pub fn done(history: &History) -> Vec<Done<'_>> {
    let mut calls: Vec<Done<'_>> = Vec::with_capacity(history.ops.len());
    let mut by_id: HashMap<&str, usize> = HashMap::new();
    for (index, op) in history.ops.iter().enumerate() {
        let returned_ns = match &op.outcome {
            Outcome::Ok(_) => Some(op.returned_ns),
            Outcome::Unknown(_) => None,
            Outcome::Failed(_) => continue,
        };
        let call = Done { index, op, invoked_ns: op.invoked_ns, returned_ns };
        let earlier = op.request_id.as_deref().and_then(|id| match by_id.get(id) {
            Some(place) => Some(*place),
            None => {
                by_id.insert(id, calls.len());
                None
            }
        });
        let Some(place) = earlier else {
            calls.push(call);
            continue;
        };
        let known = &mut calls[place];
        let invoked_ns = known.invoked_ns.min(call.invoked_ns);
        if call.returned_ns.is_some_and(|at| known.returned_ns.is_none_or(|before| at < before)) {
            *known = call;
        }
        known.invoked_ns = invoked_ns;
    }
    calls.sort_by_key(|call| call.invoked_ns);
    calls
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::simulator::{Script, put};

    #[test]
    fn attempts_with_one_id_are_one_call_from_the_first_to_the_first_answer() {
        let mut script = Script::new("test");
        script.unknown(0, 10, 20, put("a", "1"), true);
        script.call(1, 15, 40, put("b", "2"));
        script.record(2, 30, 35, put("a", "1"), Outcome::Failed("refused".into()));
        script.call(3, 50, 90, put("a", "1"));
        script.call(4, 55, 60, put("a", "1"));
        for index in [0, 2, 3, 4] {
            script.ops[index].request_id = Some("7/1".into());
        }
        let history = History { ops: script.ops, ..History::default() };
        let calls = done(&history);
        let told: Vec<_> = calls.iter().map(|call| (call.index, call.invoked_ns, call.returned_ns)).collect();
        assert_eq!(told, [(4, 10, Some(60)), (1, 15, Some(40))]);
        // A retry's header is of its own time, so it does not say which revision the write made.
        assert_eq!((calls[0].revision(), calls[1].revision()), (None, Some(3)));
    }

    #[test]
    fn what_was_never_answered_may_still_happen_and_what_failed_did_not() {
        let mut script = Script::new("test");
        script.unknown(0, 10, 20, put("a", "1"), false);
        script.record(1, 30, 40, put("a", "2"), Outcome::Failed("refused".into()));
        let history = History { ops: script.ops, ..History::default() };
        assert_eq!(
            done(&history).iter().map(|call| (call.index, call.returned_ns)).collect::<Vec<_>>(),
            [(0, None)]
        );
    }
}
