//! Appends that are answered when they are sent: the rest of
//! `Mutant::AckBeforeQuorum`.
//!
//! Only the first answer of a stream is waited for, because it says where the
//! follower's log matches. From there on an entry counts as replicated once it
//! has left this node, so that a leader commits, applies and acknowledges what
//! no other member may ever have had. True answers are dropped, but an error
//! still ends the stream.

use std::collections::VecDeque;
use std::sync::Arc;

use futures_util::{StreamExt as _, stream};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::peers::Peers;
use super::transport::{AppendRequest, AppendResult, BoxStream, PeerError};
use super::types::LogId;
use crate::mutant::{self, Mutant};
use crate::types::NodeId;

type Answer = Result<AppendResult, PeerError>;

/// The requests that left this node and have had no answer yet.
#[derive(Default)]
struct Sent {
    last: Mutex<VecDeque<Option<LogId>>>,
    news: Notify,
}

struct Answers {
    true_answers: BoxStream<Answer>,
    sent: Arc<Sent>,
    /// A true answer has said where the logs match.
    matched: bool,
    /// Requests answered early whose true answer is still to come.
    early: usize,
}

/// `Peers::append`, unless the bug was chosen.
pub(super) async fn append(
    peers: &Peers,
    target: NodeId,
    requests: BoxStream<AppendRequest>,
) -> Result<BoxStream<Answer>, PeerError> {
    if !mutant::is(Mutant::AckBeforeQuorum) {
        return peers.append(target, requests).await;
    }
    let sent = Arc::<Sent>::default();
    let sending = sent.clone();
    let requests = requests.inspect(move |request| {
        let last = request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id);
        sending.last.lock().push_back(last);
        sending.news.notify_one();
    });
    let true_answers = peers.append(target, requests.boxed()).await?;
    let answers = Answers { true_answers, sent, matched: false, early: 0 };
    Ok(stream::unfold(answers, |mut answers| async move {
        let answer = answers.next().await?;
        Some((answer, answers))
    })
    .boxed())
}

impl Answers {
    async fn next(&mut self) -> Option<Answer> {
        loop {
            let unanswered = if self.matched { self.sent.last.lock().pop_front() } else { None };
            if let Some(last) = unanswered {
                self.early += 1;
                return Some(Ok(Ok(last)));
            }
            tokio::select! {
                biased;
                answer = self.true_answers.next() => match answer {
                    Some(Ok(Ok(_))) if self.early > 0 => self.early -= 1,
                    Some(Ok(Ok(last))) => {
                        self.sent.last.lock().pop_front();
                        self.matched = true;
                        return Some(Ok(Ok(last)));
                    }
                    other => return other,
                },
                () = self.sent.news.notified() => {}
            }
        }
    }
}
