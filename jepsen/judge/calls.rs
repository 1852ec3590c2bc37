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
