//! What became of a call's attempts, and the verdict on all of them.
//!
//! Invariant: after an attempt in doubt the verdict is in doubt too, whatever
//! later attempts met, unless one was answered by the state machine itself,
//! which sees every attempt under one request id.

use super::calls::Failure;
use super::{ClientError, ErrorClass};
use crate::types::ApplyError;

/// The attempts of one call so far.
pub(super) struct Trail {
    writes: bool,
    /// The endpoints that were asked since all of them had been.
    tried: Vec<String>,
    /// Each endpoint's newest failure.
    reasons: Vec<(String, String)>,
    /// Whether nothing was ever sent.
    unsent: bool,
    /// The first attempt that may have been carried out.
    doubt: Option<(ErrorClass, String)>,
}

impl Trail {
    pub fn new(writes: bool) -> Trail {
        Trail { writes, tried: Vec::new(), reasons: Vec::new(), unsent: true, doubt: None }
    }

    /// The endpoints to avoid.
    pub fn tried(&self) -> &[String] {
        &self.tried
    }

    /// An endpoint is asked. One that is asked again begins another round.
    pub fn visit(&mut self, address: &str) {
        match self.tried.iter().any(|tried| tried == address) {
            true => self.tried = vec![address.to_owned()],
            false => self.tried.push(address.to_owned()),
        }
    }

    /// An attempt failed, and another follows.
    pub fn add(&mut self, failure: Failure) {
        let Failure { error, address, .. } = failure;
        self.unsent &= error.never_left();
        let reason = error.to_string();
        if error.may_have_happened() && self.doubt.is_none() {
            self.doubt = Some((error.class(), format!("{address}: {reason}")));
        }
        match self.reasons.iter_mut().find(|(known, _)| *known == address) {
            Some((_, newest)) => *newest = reason,
            None => self.reasons.push((address, reason)),
        }
    }

    /// Whether an attempt may have been carried out.
    pub fn in_doubt(&self) -> bool {
        self.doubt.is_some()
    }

    /// What to tell the caller, now that the last attempt failed too.
    pub fn verdict(mut self, last: Failure) -> ClientError {
        let settled = last.error.may_have_happened() || settles(&last.error);
        if let Some((class, doubt)) = self.doubt.take().filter(|_| !settled) {
            let message = format!("{} (but it may have been done before: {doubt})", last.error);
            return ClientError::Unknown { message, write: self.writes, class };
        }
        if self.unsent && last.error.never_left() {
            self.add(last);
            return ClientError::Unreachable { endpoints: self.reasons };
        }
        last.error
    }
}

/// Whether this refusal is the state machine's own: it looks for the request id
/// first, so the write was not done before either.
fn settles(error: &ClientError) -> bool {
    let ClientError::Refused { message, .. } = error else { return false };
    let own = [
        ApplyError::KeyNotFound,
        ApplyError::LeaseNotFound,
        ApplyError::LeaseExists,
        ApplyError::Compacted,
        ApplyError::FutureRevision,
        ApplyError::NoSpace,
        ApplyError::Corrupt,
    ];
    own.iter().any(|own| own.to_string() == *message)
}
