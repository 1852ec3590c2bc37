//! Leases.

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::call::Call;
use super::routing::CallKind;
use super::{Client, ClientError};
use crate::resilience::Backoff;
use crate::types::LeaseId;
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::lease_client::LeaseClient;

/// A lease as it was granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseGranted {
    /// Its id.
    pub id: LeaseId,
    /// Its time to live in seconds; the server may give more than was asked.
    pub ttl_s: i64,
}

/// What a lease has left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseRemaining {
    /// Seconds left.
    pub ttl_s: i64,
    /// Its full time to live in seconds.
    pub granted_ttl_s: i64,
    /// Its keys, if that was asked for.
    pub keys: Vec<Bytes>,
}

/// Keeps one lease alive over one stream, which is made anew when it breaks.
#[derive(Debug)]
pub struct LeaseKeeper {
    client: Client,
    id: LeaseId,
    stream: Option<(mpsc::Sender<pb::LeaseKeepAliveRequest>, Streaming<pb::LeaseKeepAliveResponse>)>,
}

impl LeaseKeeper {
    /// Starts the lease's time anew; the seconds it has from now. Call it every
    /// third of the time to live or so.
    ///
    /// # Errors
    /// [`ClientError::LeaseGone`] when the lease does not exist, and those of a
    /// call that could not be made within the request timeout.
    pub async fn keep(&mut self) -> Result<i64, ClientError> {
        let limit = self.client.calls.options().request_timeout;
        let kept = match tokio::time::timeout(limit, self.keep_unlimited()).await {
            Ok(kept) => kept,
            // An answer that comes later must not be taken for the next one's.
            Err(_) => Err(ClientError::timeout(limit, true)),
        };
        if kept.is_err() {
            self.stream = None;
        }
        kept
    }

    async fn keep_unlimited(&mut self) -> Result<i64, ClientError> {
        let mut backoff = Backoff::new(self.client.calls.options().backoff);
        loop {
            let route = self.client.calls.route(CallKind::Stream, None);
            match self.keep_once(route.channel()).await {
                Ok(0) => return Err(ClientError::LeaseGone { id: self.id.0 }),
                Ok(ttl_s) => return Ok(ttl_s),
                Err(error) if !error.may_retry() => return Err(error),
                // Keeping a lease twice is harmless, so doubt is no reason to stop.
                Err(_) => {
                    self.stream = None;
                    route.failed();
                    tokio::time::sleep(backoff.next_wait(self.client.calls.env().random_u64())).await;
                }
            }
        }
    }

    async fn keep_once(&mut self, channel: tonic::transport::Channel) -> Result<i64, ClientError> {
        let request = pb::LeaseKeepAliveRequest { id: self.id.0 };
        let lost = || ClientError::lost("the stream ended", true);
        let failed = |status| ClientError::from_status(status, true);
        let responses = match &mut self.stream {
            Some((requests, responses)) => {
                requests.send(request).await.map_err(|_| lost())?;
                responses
            }
            None => {
                // One request at a time is under way.
                let (requests, outgoing) = mpsc::channel(1);
                requests.send(request).await.map_err(|_| lost())?;
                let outgoing = self.client.calls.request(ReceiverStream::new(outgoing));
                let responses = LeaseClient::new(channel).lease_keep_alive(outgoing).await.map_err(failed)?;
                &mut self.stream.insert((requests, responses.into_inner())).1
            }
        };
        let response = responses.message().await.map_err(failed)?.ok_or_else(lost)?;
        Ok(response.ttl)
    }
}

impl Client {
    /// Makes a lease of `ttl_s` seconds. With [`LeaseId::NONE`] the server
    /// chooses the id.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn lease_grant(&self, ttl_s: i64, id: LeaseId) -> Result<LeaseGranted, ClientError> {
        let request = pb::LeaseGrantRequest { ttl: ttl_s, id: id.0 };
        let response = self
            .calls
            .call(Call::write(None), request, |channel, request| async move {
                LeaseClient::new(channel).lease_grant(request).await
            })
            .await?;
        Ok(LeaseGranted { id: LeaseId(response.id), ttl_s: response.ttl })
    }

    /// Removes a lease and its keys.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn lease_revoke(&self, id: LeaseId) -> Result<(), ClientError> {
        self.calls
            .call(Call::write(None), pb::LeaseRevokeRequest { id: id.0 }, |channel, request| async move {
                LeaseClient::new(channel).lease_revoke(request).await
            })
            .await?;
        Ok(())
    }

    /// What keeps a lease alive. Does nothing before its first
    /// [`LeaseKeeper::keep`].
    pub fn lease_keeper(&self, id: LeaseId) -> LeaseKeeper {
        LeaseKeeper { client: self.clone(), id, stream: None }
    }

    /// What a lease has left, with its keys if `keys` asks for them; `None` if
    /// it does not exist.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn lease_ttl(&self, id: LeaseId, keys: bool) -> Result<Option<LeaseRemaining>, ClientError> {
        let request = pb::LeaseTimeToLiveRequest { id: id.0, keys };
        let response = self
            .calls
            .call(Call::read(None), request, |channel, request| async move {
                LeaseClient::new(channel)
                    .max_decoding_message_size(usize::MAX)
                    .lease_time_to_live(request)
                    .await
            })
            .await?;
        let remaining =
            LeaseRemaining { ttl_s: response.ttl, granted_ttl_s: response.granted_ttl, keys: response.keys };
        Ok((response.ttl >= 0).then_some(remaining))
    }

    /// All leases.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn lease_list(&self) -> Result<Vec<LeaseId>, ClientError> {
        let response = self
            .calls
            .call(Call::read(None), pb::LeaseLeasesRequest {}, |channel, request| async move {
                LeaseClient::new(channel).max_decoding_message_size(usize::MAX).lease_leases(request).await
            })
            .await?;
        Ok(response.leases.into_iter().map(|lease| LeaseId(lease.id)).collect())
    }
}
