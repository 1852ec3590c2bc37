//! Members, and looking after a cluster. Answers come in the wire's own
//! messages: they are for operators, not for programs' inner loops.

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};

use super::call::Call;
use super::{Client, ClientError};
use crate::types::{NodeId, Revision};
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::cluster_client::ClusterClient;
use crate::wire::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::wire::mainstay_v1::admin_client::AdminClient;
use crate::wire::{mainstay_v1, metadata as names};

impl Client {
    /// Adds a member that votes as soon as it has caught up.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn member_add(&self, peer_urls: Vec<String>) -> Result<pb::MemberAddResponse, ClientError> {
        let request = pb::MemberAddRequest { peer_ur_ls: peer_urls, is_learner: false };
        let response = self
            .calls
            .call(Call::change(), request, |channel, request| async move {
                ClusterClient::new(channel).member_add(request).await
            })
            .await?;
        Ok(response)
    }

    /// Adds a member without a vote, until it is promoted.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn member_add_learner(
        &self,
        peer_urls: Vec<String>,
    ) -> Result<pb::MemberAddResponse, ClientError> {
        let request = pb::MemberAddRequest { peer_ur_ls: peer_urls, is_learner: true };
        let response = self
            .calls
            .call(Call::change(), request, |channel, request| async move {
                ClusterClient::new(channel).member_add(request).await
            })
            .await?;
        Ok(response)
    }

    /// Adds a member that serves reads and watches and never votes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn member_add_observer(
        &self,
        peer_urls: Vec<String>,
    ) -> Result<pb::MemberAddResponse, ClientError> {
        let client =
            self.with_calls(self.calls.with_metadata(names::MEMBER_KIND, names::MEMBER_KIND_OBSERVER)?);
        client.member_add_learner(peer_urls).await
    }

    /// Makes the calling node a member. May be repeated: the same disk gets the same id.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn join(
        &self,
        request: mainstay_v1::JoinRequest,
    ) -> Result<mainstay_v1::JoinResponse, ClientError> {
        let response = self
            .calls
            .call(Call::change().harmless_twice(), request, |channel, request| async move {
                AdminClient::new(channel).join(request).await
            })
            .await?;
        Ok(response)
    }

    /// Removes a member for good.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn member_remove(&self, id: NodeId) -> Result<Vec<pb::Member>, ClientError> {
        let request = pb::MemberRemoveRequest { id };
        let response = self
            .calls
            .call(Call::change(), request, |channel, request| async move {
                ClusterClient::new(channel).member_remove(request).await
            })
            .await?;
        Ok(response.members)
    }

    /// Changes where peers reach a member.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn member_update(
        &self,
        id: NodeId,
        peer_urls: Vec<String>,
    ) -> Result<Vec<pb::Member>, ClientError> {
        let request = pb::MemberUpdateRequest { id, peer_ur_ls: peer_urls };
        let response = self
            .calls
            .call(Call::change(), request, |channel, request| async move {
                ClusterClient::new(channel).member_update(request).await
            })
            .await?;
        Ok(response.members)
    }

    /// Gives a learner that has caught up a vote.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn member_promote(&self, id: NodeId) -> Result<Vec<pb::Member>, ClientError> {
        let request = pb::MemberPromoteRequest { id };
        let response = self
            .calls
            .call(Call::change(), request, |channel, request| async move {
                ClusterClient::new(channel).member_promote(request).await
            })
            .await?;
        Ok(response.members)
    }

    /// Lists the members.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn member_list(&self) -> Result<pb::MemberListResponse, ClientError> {
        let request = pb::MemberListRequest { linearizable: true };
        let response = self
            .calls
            .call(Call::read(None), request, |channel, request| async move {
                ClusterClient::new(channel).member_list(request).await
            })
            .await?;
        Ok(response)
    }

    /// Lists the members as the answering member knows them, which may be behind; works without a leader.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn member_list_serializable(&self) -> Result<pb::MemberListResponse, ClientError> {
        let request = pb::MemberListRequest { linearizable: false };
        let response = self
            .calls
            .call(Call::serializable(None), request, |channel, request| async move {
                ClusterClient::new(channel).member_list(request).await
            })
            .await?;
        Ok(response)
    }

    /// How the answering member is. Connect to one endpoint to ask a certain member.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn status(&self) -> Result<pb::StatusResponse, ClientError> {
        let request = pb::StatusRequest {};
        let response = self
            .calls
            .call(Call::read(None), request, |channel, request| async move {
                MaintenanceClient::new(channel).status(request).await
            })
            .await?;
        Ok(response)
    }

    /// Lists the raised alarms.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn alarm_list(&self) -> Result<Vec<pb::AlarmMember>, ClientError> {
        let request = pb::AlarmRequest {
            action: pb::alarm_request::AlarmAction::Get.into(),
            member_id: 0,
            alarm: pb::AlarmType::None.into(),
        };
        let response = self
            .calls
            .call(Call::read(None), request, |channel, request| async move {
                MaintenanceClient::new(channel).alarm(request).await
            })
            .await?;
        Ok(response.alarms)
    }

    /// Clears an alarm; of all members if `member` is 0.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn alarm_disarm(
        &self,
        member: NodeId,
        alarm: pb::AlarmType,
    ) -> Result<Vec<pb::AlarmMember>, ClientError> {
        let request = pb::AlarmRequest {
            action: pb::alarm_request::AlarmAction::Deactivate.into(),
            member_id: member,
            alarm: alarm.into(),
        };
        let response = self
            .calls
            .call(Call::change().harmless_twice(), request, |channel, request| async move {
                MaintenanceClient::new(channel).alarm(request).await
            })
            .await?;
        Ok(response.alarms)
    }

    /// Gives disk space of the answering member back. Takes as long as it takes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn defragment(&self) -> Result<(), ClientError> {
        self.calls
            .call(Call::change().waiting(), pb::DefragmentRequest {}, |channel, request| async move {
                MaintenanceClient::new(channel).defragment(request).await
            })
            .await?;
        Ok(())
    }

    /// Digests the keys of the answering member up to a revision; 0 is the newest.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn hash_kv(&self, revision: Revision) -> Result<pb::HashKvResponse, ClientError> {
        let request = pb::HashKvRequest { revision: revision.0 };
        let response = self
            .calls
            .call(Call::read(None), request, |channel, request| async move {
                MaintenanceClient::new(channel).hash_kv(request).await
            })
            .await?;
        Ok(response)
    }

    /// Hands leadership to a member. Must be asked of the leader.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn move_leader(&self, target: NodeId) -> Result<(), ClientError> {
        let request = pb::MoveLeaderRequest { target_id: target };
        self.calls
            .call(Call::change(), request, |channel, request| async move {
                MaintenanceClient::new(channel).move_leader(request).await
            })
            .await?;
        Ok(())
    }

    /// The answering member's whole content, in pieces. The last 32 bytes are
    /// the SHA-256 of all before them. A stream that breaks ends with an error;
    /// what came until then is no snapshot.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn snapshot(
        &self,
    ) -> Result<impl Stream<Item = Result<SnapshotPiece, ClientError>> + use<>, ClientError> {
        let pieces = self
            .calls
            .call(Call::read(None).opening(), pb::SnapshotRequest {}, |channel, request| async move {
                MaintenanceClient::new(channel).max_decoding_message_size(usize::MAX).snapshot(request).await
            })
            .await?;
        let piece = |piece: pb::SnapshotResponse| SnapshotPiece {
            bytes: piece.blob,
            remaining_bytes: piece.remaining_bytes,
        };
        Ok(pieces.map_err(|status| ClientError::from_status(status, false)).map_ok(piece))
    }
}

/// A piece of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotPiece {
    /// The next bytes of the file.
    pub bytes: Bytes,
    /// How many bytes follow.
    pub remaining_bytes: u64,
}
