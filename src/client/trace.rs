//! What became of each message that a client sent, written down for whoever
//! wants to explain an answer. It decides nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use super::{CallKind, Client, ClientError};

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

/// The attempts of a client's calls, as they end.
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

impl Client {
    /// A client whose calls are written down, and where. For diagnosis: see
    /// `mainstay get --explain`. Streams are not in it, only their openings.
    ///
    /// ```no_run
    /// # use mainstay::client::{Client, ClientError};
    /// # async fn example(client: Client) -> Result<(), ClientError> {
    /// let (client, trace) = client.traced();
    /// client.get("greeting").await?;
    /// for attempt in trace.attempts() {
    ///     println!("{} after {:?}: {:?}", attempt.address, attempt.time, attempt.error);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn traced(&self) -> (Client, CallTrace) {
        let trace = CallTrace::default();
        (self.with_calls(self.calls.with_trace(trace.clone())), trace)
    }
}
