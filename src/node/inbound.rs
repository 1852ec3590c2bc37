//! What other members ask of this node. The gRPC face calls these; they check
//! who asks and whether the question is meant for this node at all.

use super::control::{
    Answer, Ask, ForwardEnd, JoinRefused, JoinReply, JoinRequest, MemberChange, ProbeReply, ProbeRequest,
};
use super::propose::own_version;
use super::{Node, NodeError};
use crate::types::NodeId;

impl Node {
    /// Whether an asker is a member: one that was removed gets no answer, and
    /// so cannot serve a linearizable read. That the message is meant for this
    /// node is the receiver's check (`raft::Receiver::check`).
    ///
    /// # Errors
    /// The reason for the refusal, in words for the other side's log.
    pub fn check_sender(&self, sender: NodeId) -> Result<(), String> {
        if self.inner.core.roster().members.contains_key(&sender) {
            return Ok(());
        }
        Err(format!("{sender:x} is not a member of this cluster, or no longer one"))
    }

    /// Says what this node is, and what it knows of the asker.
    pub fn answer_probe(&self, request: &ProbeRequest) -> ProbeReply {
        let core = &self.inner.core;
        let committed = core.committed_roster();
        let known = committed.members.get(&request.node_id).filter(|_| request.node_id != 0);
        ProbeReply {
            cluster_id: core.cluster_id,
            node_id: core.id,
            disk_id: core.disk,
            name: core.options.name.clone(),
            initialised: self.inner.had_state || !core.roster().members.is_empty(),
            version: own_version(),
            leader: core.leadership().leader,
            membership_version: committed.version(),
            asker_known: known.is_some(),
            asker_disk: known.map_or(0, |view| view.member.disk),
            client_urls: core.options.client_urls.clone(),
        }
    }

    /// Lets a node in, through the leader.
    ///
    /// # Errors
    /// The reason, and whether asking again may help.
    pub async fn answer_join(&self, request: JoinRequest) -> Result<JoinReply, JoinRefused> {
        let deadline = self.inner.core.deadline(None);
        let ask = Ask::Member(MemberChange::Join(request));
        match self.inner.desk.ask_leader(ask, deadline).await {
            Ok(Answer::Member(changed)) => match changed.member {
                Some(member) => {
                    Ok(JoinReply { cluster_id: self.cluster_id(), member, membership_index: changed.index })
                }
                None => {
                    Err(JoinRefused { reason: "the new member is gone again".to_owned(), may_retry: true })
                }
            },
            Ok(_) => Err(JoinRefused {
                reason: "the leader answered another question".to_owned(),
                may_retry: false,
            }),
            Err(error) => Err(JoinRefused {
                may_retry: error.may_retry() || matches!(error, NodeError::NotEnoughStarted),
                reason: error.to_string(),
            }),
        }
    }

    /// Answers a member's question, if this node leads. The sender was checked.
    pub async fn answer_ask(&self, ask: Ask) -> Answer {
        let deadline = self.inner.core.deadline(None);
        self.inner.desk.answer(ask, deadline).await
    }

    /// Serves a follower's proposals until it closes its end. The sender was
    /// checked.
    ///
    /// # Errors
    /// `Stopped` when the node is stopping.
    pub async fn serve_forward(&self, end: ForwardEnd) -> Result<(), NodeError> {
        self.inner.forward_ends.send(end).await.map_err(|_| NodeError::Stopped)
    }
}
