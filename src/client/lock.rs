//! Locks and elections. Waiting for one has no time limit: drop the future to
//! give up, and revoke the lease to leave the queue for sure.

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};

use super::call::Call;
use super::{Client, ClientError};
use crate::types::{KeyValue, LeaseId};
use crate::wire::key_value_from_wire;
use crate::wire::v3electionpb as election;
use crate::wire::v3electionpb::election_client::ElectionClient;
use crate::wire::v3lockpb as lock;
use crate::wire::v3lockpb::lock_client::LockClient;

impl Client {
    /// Waits until it holds the lock `name`, for as long as the lease lives.
    /// Returns the key that stands for the holder: compare its create revision
    /// in the transactions that the lock is to guard.
    ///
    /// ```no_run
    /// # use mainstay::client::{Client, ClientError};
    /// # use mainstay::types::LeaseId;
    /// # async fn example(client: Client) -> Result<(), ClientError> {
    /// let lease = client.lease_grant(30, LeaseId::NONE).await?;
    /// let held = client.lock("nightly", lease.id).await?;
    /// // Work, and keep the lease alive meanwhile.
    /// client.unlock(held).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn lock(&self, name: impl Into<Bytes>, lease: LeaseId) -> Result<Bytes, ClientError> {
        let request = lock::LockRequest { name: name.into(), lease: lease.0 };
        let response = self
            .calls
            .call(Call::change().waiting(), request, |channel, request| async move {
                LockClient::new(channel).lock(request).await
            })
            .await?;
        Ok(response.key)
    }

    /// Gives a lock back, named by the holder's key.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn unlock(&self, key: impl Into<Bytes>) -> Result<(), ClientError> {
        let request = lock::UnlockRequest { key: key.into() };
        let key = Some(request.key.clone());
        self.calls
            .call(Call::write(key), request, |channel, request| async move {
                LockClient::new(channel).unlock(request).await
            })
            .await?;
        Ok(())
    }

    /// Waits until it is elected in the election `name`, for as long as the
    /// lease lives, and then proclaims `value`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn campaign(
        &self,
        name: impl Into<Bytes>,
        lease: LeaseId,
        value: impl Into<Bytes>,
    ) -> Result<election::LeaderKey, ClientError> {
        let request = election::CampaignRequest { name: name.into(), lease: lease.0, value: value.into() };
        let response = self
            .calls
            .call(Call::change().waiting(), request, |channel, request| async move {
                ElectionClient::new(channel).campaign(request).await
            })
            .await?;
        response.leader.ok_or(ClientError::Protocol("an election without a leader"))
    }

    /// Who is elected: the leader's key, whose value is what it proclaimed.
    ///
    /// # Errors
    /// See [`ClientError`]; an election without a leader is refused with
    /// `election: no leader`.
    pub async fn leader(&self, name: impl Into<Bytes>) -> Result<KeyValue, ClientError> {
        let request = election::LeaderRequest { name: name.into() };
        let response = self
            .calls
            .call(Call::read(None), request, |channel, request| async move {
                ElectionClient::new(channel).leader(request).await
            })
            .await?;
        response.kv.map(key_value_from_wire).ok_or(ClientError::Protocol("a leader without a key"))
    }

    /// Changes what the leader says about itself.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn proclaim(
        &self,
        leader: election::LeaderKey,
        value: impl Into<Bytes>,
    ) -> Result<(), ClientError> {
        let request = election::ProclaimRequest { leader: Some(leader), value: value.into() };
        self.calls
            .call(Call::change(), request, |channel, request| async move {
                ElectionClient::new(channel).proclaim(request).await
            })
            .await?;
        Ok(())
    }

    /// Gives leadership up.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn resign(&self, leader: election::LeaderKey) -> Result<(), ClientError> {
        let request = election::ResignRequest { leader: Some(leader) };
        self.calls
            .call(Call::change().harmless_twice(), request, |channel, request| async move {
                ElectionClient::new(channel).resign(request).await
            })
            .await?;
        Ok(())
    }

    /// Who is elected, now and after every change. The stream ends with an
    /// error when the connection does; observe again then.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn observe(
        &self,
        name: Bytes,
    ) -> Result<impl Stream<Item = Result<KeyValue, ClientError>> + use<>, ClientError> {
        let request = election::LeaderRequest { name };
        let leaders = self
            .calls
            .call(Call::read(None).opening(), request, |channel, request| async move {
                ElectionClient::new(channel).observe(request).await
            })
            .await?;
        Ok(leaders.map_err(|status| ClientError::from_status(status, false)).and_then(|leader| async {
            leader.kv.map(key_value_from_wire).ok_or(ClientError::Protocol("a leader without a key"))
        }))
    }
}
