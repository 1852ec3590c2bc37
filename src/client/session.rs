//! Sessions: writes that may be repeated and are applied once.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use super::calls::Nature;
use super::{Client, ClientError};
use crate::types::RequestId;
use crate::wire::mainstay_v1 as pb;
use crate::wire::mainstay_v1::sessions_client::SessionsClient;

/// A session, which deals out request ids.
///
/// ```no_run
/// # use mainstay::client::{Client, ClientError};
/// # async fn example(client: Client) -> Result<(), ClientError> {
/// let session = client.open_session(60).await?;
/// let write = session.begin();
/// write.client().put("counter", "1").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Session {
    client: Client,
    id: u64,
    ttl_s: u64,
    sequences: Arc<Mutex<Sequences>>,
}

/// Invariant: every sequence below `next` is in `open` or has been finished.
#[derive(Debug)]
struct Sequences {
    next: u64,
    open: BTreeSet<u64>,
}

impl Sequences {
    fn begin(&mut self) -> (u64, u64) {
        let sequence = self.next;
        self.next += 1;
        self.open.insert(sequence);
        // Everything below the oldest unfinished write has been answered.
        let oldest = self.open.first().copied().unwrap_or(sequence);
        (sequence, oldest - 1)
    }
}

/// One write of a session. The server keeps its reply until this is dropped
/// and a later write says so.
#[derive(Debug)]
pub struct SessionWrite {
    client: Client,
    id: RequestId,
    sequences: Arc<Mutex<Sequences>>,
}

impl SessionWrite {
    /// The client to make the write with. Use it for this one write, again
    /// with the same content if the outcome is unknown.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// The write's request id.
    pub fn id(&self) -> RequestId {
        self.id
    }
}

impl Drop for SessionWrite {
    fn drop(&mut self) {
        let mut sequences = self.sequences.lock().unwrap_or_else(PoisonError::into_inner);
        sequences.open.remove(&self.id.sequence);
    }
}

impl Session {
    /// The session's id.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Seconds it lives without [`Session::renew`].
    pub fn ttl_s(&self) -> u64 {
        self.ttl_s
    }

    /// Begins a write.
    pub fn begin(&self) -> SessionWrite {
        let (sequence, acknowledged) = self.sequences.lock().unwrap_or_else(PoisonError::into_inner).begin();
        let id = RequestId { session: self.id, sequence, acknowledged };
        SessionWrite { client: self.client.with_request_id(id), id, sequences: Arc::clone(&self.sequences) }
    }

    /// Keeps the session alive for another full time to live.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if it has expired; then open a new one.
    pub async fn renew(&self) -> Result<(), ClientError> {
        let request = pb::RenewRequest { session: self.id };
        // Renewing twice is harmless, so it may be repeated like a read.
        self.client
            .calls
            .call(Nature::Read, request, |channel, request| async move {
                SessionsClient::new(channel).renew(request).await
            })
            .await?;
        Ok(())
    }
}

impl Client {
    /// Opens a session that lives `ttl_s` seconds without being renewed; 0
    /// lets the server choose.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn open_session(&self, ttl_s: u64) -> Result<Session, ClientError> {
        // A session that was opened in vain expires by itself, so opening may
        // be repeated like a read.
        let response = self
            .calls
            .call(Nature::Read, pb::OpenRequest { ttl_s }, |channel, request| async move {
                SessionsClient::new(channel).open(request).await
            })
            .await?;
        let sequences = Arc::new(Mutex::new(Sequences { next: 1, open: BTreeSet::new() }));
        Ok(Session { client: self.clone(), id: response.session, ttl_s: response.ttl_s, sequences })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_is_finished_is_acknowledged() {
        let client = Client::connect(["a:1"]).expect("an address");
        let sequences = Arc::new(Mutex::new(Sequences { next: 1, open: BTreeSet::new() }));
        let session = Session { client, id: 9, ttl_s: 60, sequences };
        let first = session.begin();
        let second = session.begin();
        assert_eq!((first.id().sequence, first.id().acknowledged), (1, 0));
        assert_eq!((second.id().sequence, second.id().acknowledged), (2, 0));
        drop(second);
        assert_eq!(session.begin().id().acknowledged, 0, "the first write is still out");
        drop(first);
        assert_eq!(session.begin().id(), RequestId { session: 9, sequence: 4, acknowledged: 3 });
    }
}
