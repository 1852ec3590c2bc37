//! Questions to the leader: asked from wherever a client came in, answered
//! where the leader is.

use std::sync::Arc;

use tokio::time::Instant;

use super::NodeError;
use super::control::{Answer, Ask, ControlError, MemberChange};
use super::core::{Core, Pause};
use super::lessor::{LeaseTimes, Lessor};
use super::membership::{ChangeError, Membership};
use super::propose::Proposer;
use super::read::Reads;

/// What answers questions while this node leads, and asks while another does.
pub(super) struct Desk {
    pub core: Arc<Core>,
    pub reads: Arc<Reads>,
    pub proposer: Arc<Proposer>,
    pub lessor: Arc<Lessor>,
    pub membership: Arc<Membership>,
}

impl Desk {
    /// Asks the leader, wherever it is. Follows it when it changes; a question
    /// that must not be asked twice is not repeated once it may have arrived.
    pub async fn ask_leader(&self, ask: Ask, deadline: Instant) -> Result<Answer, NodeError> {
        let mut pause = Pause::default();
        loop {
            let leadership = self.core.leadership();
            let left = deadline.saturating_duration_since(Instant::now());
            if leadership.leader == 0 {
                self.core.leadership_beyond(leadership, deadline).await;
            } else if leadership.here {
                match self.answer(ask.clone(), deadline).await {
                    Answer::NotLeader { .. } => {}
                    Answer::Failed(error) => return Err(error),
                    answer => return Ok(answer),
                }
            } else {
                match self.core.ask(leadership.leader, ask.clone(), left).await {
                    Ok(Answer::NotLeader { .. }) => {}
                    Ok(Answer::Failed(error)) => return Err(error),
                    Ok(answer) => return Ok(answer),
                    Err(ControlError::Lost { reason, .. }) if !repeatable(&ask) => {
                        tracing::debug!(%reason, "the leader's answer is lost");
                        return Err(NodeError::Timeout);
                    }
                    Err(error) => tracing::debug!(%error, "the leader did not answer"),
                }
            }
            if !pause.wait(&self.core.env, deadline).await {
                let leaderless = self.core.leadership().leader == 0;
                return Err(if leaderless { NodeError::NoLeader } else { NodeError::Timeout });
            }
        }
    }

    /// Answers a question if this node leads.
    pub async fn answer(&self, ask: Ask, deadline: Instant) -> Answer {
        let leadership = self.core.leadership();
        let not_leader = Answer::NotLeader { leader: leadership.leader };
        if !leadership.here {
            return not_leader;
        }
        match ask {
            Ask::ReadIndex => match self.reads.confirm(deadline).await {
                Ok(confirmed) if confirmed.leader == self.core.id => {
                    Answer::ReadIndex { index: confirmed.index }
                }
                Ok(_) => not_leader,
                Err(error) => Answer::Failed(error),
            },
            Ask::LeaseKeepAlive { ids } => {
                match self.lessor.keep_alive(&self.core, &self.reads, &self.proposer, &ids, deadline).await {
                    Ok(Some(ttls_s)) => Answer::LeaseKeptAlive { ttls_s },
                    Ok(None) => not_leader,
                    Err(error) => Answer::Failed(error),
                }
            }
            Ask::LeaseTimeToLive { id } => {
                match self.lessor.time_to_live(&self.core, &self.reads, id, deadline).await {
                    Ok(Some(LeaseTimes { ttl_s, granted_ttl_s })) => {
                        Answer::LeaseTimeToLive { ttl_s, granted_ttl_s }
                    }
                    Ok(None) => not_leader,
                    Err(error) => Answer::Failed(error),
                }
            }
            Ask::Member(change) => match self.membership.change(&change, deadline).await {
                Ok(changed) => Answer::Member(changed),
                Err(ChangeError::NotLeader) => Answer::NotLeader { leader: self.core.leadership().leader },
                Err(ChangeError::Failed(error)) => Answer::Failed(error),
            },
        }
    }
}

/// Whether a second asking does no harm when the first arrived after all.
fn repeatable(ask: &Ask) -> bool {
    match ask {
        Ask::ReadIndex | Ask::LeaseKeepAlive { .. } | Ask::LeaseTimeToLive { .. } => true,
        Ask::Member(MemberChange::Publish { .. } | MemberChange::Join(_)) => true,
        Ask::Member(_) => false,
    }
}
