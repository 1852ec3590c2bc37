//! Leases.

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::call::Call;
use super::routing::{CallKind, Route};
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
    link: Option<Link>,
}

/// One connection of a keeper.
#[derive(Debug)]
struct Link {
    route: Route,
    /// Its two sides, once it is open.
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
        let calls = self.client.calls.clone();
        let deadline = calls.env().monotonic() + calls.options().request_timeout;
        let mut backoff = Backoff::new(calls.options().backoff);
        let mut tried = Vec::new();
        loop {
            // Taken out meanwhile: an answer that comes after its time must not be
            // taken for the next one's.
            let mut link = self.link.take().unwrap_or_else(|| {
                let route = calls.route_past(CallKind::Stream, None, &tried);
                Link { route, stream: None }
            });
            tried.push(link.route.address().to_owned());
            let left = deadline.saturating_sub(calls.env().monotonic());
            let limit = left.min(calls.options().attempt_timeout);
            let kept = match tokio::time::timeout(limit, self.keep_once(&mut link)).await {
                Ok(kept) => kept,
                Err(_) => Err(ClientError::timeout(limit, true)),
            };
            let error = match kept {
                Ok(0) => return Err(ClientError::LeaseGone { id: self.id.0 }),
                Ok(ttl_s) => {
                    link.route.worked();
                    self.link = Some(link);
                    return Ok(ttl_s);
                }
                Err(error) if !error.may_retry() => return Err(error),
                Err(error) => error,
            };
            link.route.failed();
            // Keeping a lease twice is harmless, so doubt is no reason to stop.
            let wait = backoff.next_wait(calls.env().random_u64());
            if calls.env().monotonic() + wait >= deadline {
                return Err(error);
            }
            tokio::time::sleep(wait).await;
        }
    }

    async fn keep_once(&self, link: &mut Link) -> Result<i64, ClientError> {
        let request = pb::LeaseKeepAliveRequest { id: self.id.0 };
        let calls = &self.client.calls;
        let lost = || ClientError::lost("the stream ended", true);
        let failed = |status| ClientError::from_status(status, true);
        let responses = match &mut link.stream {
            Some((requests, responses)) => {
                requests.send(request).await.map_err(|_| lost())?;
                responses
            }
            None => {
                // One request at a time is under way.
                let (requests, outgoing) = mpsc::channel(1);
                requests.send(request).await.map_err(|_| lost())?;
                let outgoing = calls.request(ReceiverStream::new(outgoing));
                let mut leases = LeaseClient::new(link.route.channel());
                let responses = leases.lease_keep_alive(outgoing).await.map_err(failed)?;
                &mut link.stream.insert((requests, responses.into_inner())).1
            }
        };
        let response = responses.message().await.map_err(failed)?.ok_or_else(lost)?;
        calls.check(&response, &link.route)?;
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
    ///
    /// ```no_run
    /// # use mainstay::client::{Client, ClientError};
    /// # use mainstay::types::LeaseId;
    /// # async fn example(client: Client) -> Result<(), ClientError> {
    /// let lease = client.lease_grant(30, LeaseId::NONE).await?;
    /// let mut keeper = client.lease_keeper(lease.id);
    /// println!("{} s left", keeper.keep().await?);
    /// # Ok(())
    /// # }
    /// ```
    pub fn lease_keeper(&self, id: LeaseId) -> LeaseKeeper {
        LeaseKeeper { client: self.clone(), id, link: None }
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
