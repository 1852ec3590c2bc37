//! Control messages on their way to members: as the bytes of control.proto,
//! over the same connections, breakers and identity checks as Raft's own calls.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, StreamExt};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::MemberView;
use super::control::{
    Answer, Ask, Carrier, ControlError, FORWARD_LINK_BATCHES, ForwardEnd, ForwardItem, ForwardLink,
    ForwardOutcome, ForwardResult,
};
use crate::raft::{PeerError, Peers, Retry};
use crate::storage::{StorageError, codec};
use crate::types::NodeId;
use crate::wire::peer_v1::control_forward_result::Outcome;
use crate::wire::peer_v1::{
    ControlAskRequest, ControlAskResponse, ControlForwardApplied, ControlForwardBatch, ControlForwardItem,
    ControlForwardRejected, ControlForwardResult, ControlForwardResults, ControlForwardUnknown,
};

/// The method of an [`Ask`], as gRPC names it.
pub const ASK_PATH: &str = "/mainstay.peer.v1.Control/Ask";
/// The method of a stream of proposals.
pub const FORWARD_PATH: &str = "/mainstay.peer.v1.Control/Forward";

/// The members, reached through Raft's peers.
pub(super) struct PeerCarrier {
    peers: Arc<Peers>,
    /// Whom the directory was last told of.
    known: Mutex<BTreeSet<NodeId>>,
}

impl PeerCarrier {
    pub fn new(peers: Arc<Peers>) -> PeerCarrier {
        PeerCarrier { peers, known: Mutex::default() }
    }
}

fn lost(to: NodeId, error: PeerError) -> ControlError {
    let (to, reason) = (format!("{to:x}"), error.to_string());
    match error {
        PeerError::Refused(_) => ControlError::Refused { to, reason },
        error if error.may_have_happened() => ControlError::Lost { to, reason },
        _ => ControlError::Unreachable { to, reason },
    }
}

impl Carrier for PeerCarrier {
    fn ask(&self, to: NodeId, ask: Ask, timeout: Duration) -> BoxFuture<'_, Result<Answer, ControlError>> {
        let body = ControlAskRequest { ask: codec::encode(&ask).into() }.encode_to_vec();
        Box::pin(async move {
            let answer = self.peers.call(to, ASK_PATH, body.into(), timeout, Retry::Never).await;
            let bytes = answer.map_err(|error| lost(to, error))?;
            decode_answer(&bytes).map_err(|reason| ControlError::Lost { to: format!("{to:x}"), reason })
        })
    }

    fn forward(&self, to: NodeId) -> BoxFuture<'_, Result<ForwardLink, ControlError>> {
        Box::pin(async move {
            let (items, queue) = mpsc::channel(FORWARD_LINK_BATCHES);
            let bodies = ReceiverStream::new(queue).map(encode_batch).boxed();
            let answers =
                self.peers.call_stream(to, FORWARD_PATH, bodies).await.map_err(|error| lost(to, error))?;
            let results = until_broken(to, answers);
            Ok(ForwardLink { items, results })
        })
    }

    fn take_members(&self, members: &[MemberView]) {
        let directory = self.peers.directory();
        let now: BTreeSet<NodeId> = members.iter().map(|view| view.member.id).collect();
        for view in members {
            directory.update(view.member.id, &view.member);
        }
        let mut known = self.known.lock();
        for gone in known.difference(&now) {
            directory.remove(*gone);
        }
        *known = now;
    }
}

fn until_broken(
    to: NodeId,
    answers: BoxStream<'static, Result<Bytes, PeerError>>,
) -> BoxStream<'static, Vec<ForwardResult>> {
    let decoded = answers.map(move |answer| match answer {
        Ok(bytes) => decode_results(&bytes),
        Err(error) => Err(error.to_string()),
    });
    let sound = decoded.scan((), move |(), results| {
        if let Err(reason) = &results {
            tracing::debug!(to = %format!("{to:x}"), %reason, "the forwarding link broke");
        }
        std::future::ready(results.ok())
    });
    sound.boxed()
}

/// The question in a request's bytes.
///
/// # Errors
/// What is malformed about it.
pub fn decode_ask(request: &ControlAskRequest) -> Result<Ask, StorageError> {
    codec::decode("a member's question", &request.ask)
}

/// An answer, ready for the wire.
pub fn encode_answer(answer: &Answer) -> ControlAskResponse {
    ControlAskResponse { answer: codec::encode(answer).into() }
}

/// What [`encode_answer`] encoded, from a message's bytes.
///
/// # Errors
/// What is malformed about it.
pub fn decode_answer(bytes: &[u8]) -> Result<Answer, String> {
    let response = ControlAskResponse::decode(bytes).map_err(|error| error.to_string())?;
    codec::decode("the leader's answer", &response.answer).map_err(|error| error.to_string())
}

fn encode_batch(items: Vec<ForwardItem>) -> Bytes {
    let items = items.into_iter().map(|item| ControlForwardItem { sequence: item.sequence, body: item.body });
    ControlForwardBatch { items: items.collect() }.encode_to_vec().into()
}

fn decode_batch(batch: ControlForwardBatch) -> Vec<ForwardItem> {
    let items = batch.items.into_iter();
    items.map(|item| ForwardItem { sequence: item.sequence, body: item.body }).collect()
}

/// Results, ready for the wire.
pub fn encode_results(results: Vec<ForwardResult>) -> ControlForwardResults {
    let encode = |result: ForwardResult| {
        let outcome = match result.outcome {
            ForwardOutcome::Applied { index, reply } => {
                Outcome::Applied(ControlForwardApplied { index, reply })
            }
            ForwardOutcome::Rejected { leader, too_many } => {
                Outcome::Rejected(ControlForwardRejected { leader, too_many })
            }
            ForwardOutcome::Unknown => Outcome::Unknown(ControlForwardUnknown {}),
        };
        ControlForwardResult { sequence: result.sequence, outcome: Some(outcome) }
    };
    ControlForwardResults { results: results.into_iter().map(encode).collect() }
}

/// What [`encode_results`] encoded, from a message's bytes.
///
/// # Errors
/// What is malformed about it.
pub fn decode_results(bytes: &[u8]) -> Result<Vec<ForwardResult>, String> {
    let results = ControlForwardResults::decode(bytes).map_err(|error| error.to_string())?;
    let decode = |result: ControlForwardResult| {
        let outcome = match result.outcome {
            Some(Outcome::Applied(applied)) => {
                ForwardOutcome::Applied { index: applied.index, reply: applied.reply }
            }
            Some(Outcome::Rejected(rejected)) => {
                ForwardOutcome::Rejected { leader: rejected.leader, too_many: rejected.too_many }
            }
            // An outcome of a later version is one that this one cannot tell.
            Some(Outcome::Unknown(_)) | None => ForwardOutcome::Unknown,
        };
        ForwardResult { sequence: result.sequence, outcome }
    };
    Ok(results.results.into_iter().map(decode).collect())
}

/// The leader's end of a link, and the results to send back on it. A batch that
/// cannot be read ends the link.
pub fn forward_end<E: std::fmt::Display + Send + 'static>(
    batches: BoxStream<'static, Result<ControlForwardBatch, E>>,
) -> (ForwardEnd, BoxStream<'static, ControlForwardResults>) {
    let (results, queue) = mpsc::channel(FORWARD_LINK_BATCHES);
    let items = batches.scan((), |(), batch| {
        if let Err(error) = &batch {
            tracing::debug!(%error, "a follower's forwarding link broke");
        }
        std::future::ready(batch.ok().map(decode_batch))
    });
    let answers = ReceiverStream::new(queue).map(encode_results).boxed();
    (ForwardEnd { items: items.boxed(), results }, answers)
}
