//! What became of each message that a client sent, written down for whoever
//! wants to explain an answer. It decides nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{CallKind, ClientError};

/// Attempts that are kept; older ones make room.
const ATTEMPTS_MAX: usize = 256;

/// One message to one endpoint.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// The endpoint's address.
    pub address: String,
    /// What the call was.
    pub kind: CallKind,
    /// What it was about, if that was one key or prefix.
    pub key: Option<Bytes>,
    /// How long it took.
    pub time: Duration,
    /// Why it gave no answer; `None` if it did.
    pub error: Option<ClientError>,
}

/// The attempts of a client's calls, as they end: see
/// [`ClientBuilder::trace`](super::ClientBuilder::trace). For diagnosis, as
/// `mainstay get --explain` does. Of streams it has their openings only.
#[derive(Clone, Debug, Default)]
pub struct CallTrace {
    attempts: Arc<Mutex<VecDeque<Attempt>>>,
}

impl CallTrace {
    /// The attempts so far, at most the last 256.
    pub fn attempts(&self) -> Vec<Attempt> {
        self.attempts.lock().iter().cloned().collect()
    }

    pub(super) fn add(&self, attempt: Attempt) {
        let mut attempts = self.attempts.lock();
        if attempts.len() == ATTEMPTS_MAX {
            attempts.pop_front();
        }
        attempts.push_back(attempt);
    }
}
