//! Proposals of a follower on their way to the leader, and their arrival there.
//!
//! One pipelined link per leader. What was handed to a link that broke is in
//! doubt; what was not yet handed over is certainly in no log. A link that owes
//! answers and is silent for one request timeout is given up: nobody waits for
//! them any longer, and the next link may be to a leader that is there. So a
//! link to a former leader lives on until its answers are in, or for as long.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::control::{ForwardEnd, ForwardItem, ForwardLink, ForwardOutcome, ForwardResult};
use super::core::Core;
use super::propose::{Admitted, BATCH_COUNT_MAX, Outcome, Pending, Proposer, WriteResults, write_batch};
use crate::storage::codec;
use crate::telemetry;
use crate::types::{Command, NodeId, Reply};

/// Batches that wait for one link; the forwarding task waits beyond it.
const LINK_QUEUE_BATCHES: usize = 16;
/// Messages on a link that are not answered yet. What is proposed meanwhile goes
/// with the next one: under load a message carries many proposals, and a lone
/// proposal never waits.
const MESSAGES_IN_FLIGHT_MAX: usize = 4;
/// Links that followers may open before the newest has to wait.
pub(super) const ACCEPT_QUEUE: usize = 16;

struct Link {
    to: NodeId,
    batches: mpsc::Sender<Vec<Pending>>,
}

/// Takes what was proposed here while another leads, and sends it there.
pub(super) async fn run(core: Arc<Core>, mut queue: mpsc::Receiver<Pending>, stop: CancellationToken) {
    let mut links = JoinSet::new();
    let mut current: Option<Link> = None;
    let mut batch = Vec::with_capacity(BATCH_COUNT_MAX);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(ended) = links.join_next(), if !links.is_empty() => {
                if let Err(error) = ended && error.is_panic() {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
            count = queue.recv_many(&mut batch, BATCH_COUNT_MAX) => {
                if count == 0 {
                    break;
                }
                batch.retain(|pending: &Pending| !pending.answer.is_closed());
                let taken = std::mem::replace(&mut batch, Vec::with_capacity(BATCH_COUNT_MAX));
                send(&core, &mut links, &mut current, taken).await;
            }
        }
    }
    links.shutdown().await;
}

async fn send(core: &Arc<Core>, links: &mut JoinSet<()>, current: &mut Option<Link>, batch: Vec<Pending>) {
    let leadership = core.leadership();
    let to = leadership.leader;
    if to == 0 || leadership.here {
        return reject(batch, false);
    }
    let usable = current.as_ref().is_some_and(|link| link.to == to && !link.batches.is_closed());
    if !usable {
        let (batches, waiting) = mpsc::channel(LINK_QUEUE_BATCHES);
        links.spawn(drive(core.clone(), to, waiting));
        *current = Some(Link { to, batches });
    }
    let Some(link) = current.as_ref() else { return reject(batch, false) };
    let mut changes = core.leadership_changes();
    tokio::select! {
        permit = link.batches.reserve() => match permit {
            Ok(permit) => permit.send(batch),
            Err(_) => reject(batch, false),
        },
        // The link is stuck and its leader is no longer ours.
        _ = changes.wait_for(|now| now.leader != to) => reject(batch, false),
    }
}

/// Certainly not proposed: the callers may try again.
fn reject(batch: Vec<Pending>, too_many: bool) {
    for pending in batch {
        drop(pending.admitted);
        let _ = pending.answer.send(Outcome::Rejected { too_many });
    }
}

struct Waiting {
    answer: oneshot::Sender<Outcome>,
    _admitted: Option<Admitted>,
}

/// Opens a link and keeps it until it breaks, or its leader was replaced and
/// the answers are in.
async fn drive(core: Arc<Core>, to: NodeId, mut batches: mpsc::Receiver<Vec<Pending>>) {
    let mut link = match core.carrier.forward(to).await {
        Ok(link) => link,
        Err(error) => {
            tracing::debug!(to = %format!("{to:x}"), %error, "cannot forward");
            batches.close();
            while let Some(batch) = batches.recv().await {
                reject(batch, false);
            }
            return;
        }
    };
    let mut waiting: BTreeMap<u64, Waiting> = BTreeMap::new();
    let mut answering = FuturesUnordered::new();
    exchange(&core, &mut link, &mut batches, &mut waiting, &mut answering).await;
    batches.close();
    while let Some(batch) = batches.recv().await {
        reject(batch, false);
    }
    for (_, waiting) in waiting {
        let _ = waiting.answer.send(Outcome::Unknown);
    }
    while answering.next().await.is_some() {}
}

/// Sends and receives until either side is done.
async fn exchange<'a>(
    core: &'a Core,
    link: &mut ForwardLink,
    batches: &mut mpsc::Receiver<Vec<Pending>>,
    waiting: &mut BTreeMap<u64, Waiting>,
    answering: &mut FuturesUnordered<BoxFuture<'a, ()>>,
) {
    let mut sequence = 0;
    let mut outgoing: Option<Vec<Pending>> = None;
    // The last sequence of each message that is not answered yet.
    let mut messages: VecDeque<u64> = VecDeque::new();
    // Set when the leader was replaced and only answers are waited for.
    let mut draining = false;
    let silence_max = core.options.request_timeout();
    // The last answer, or when the link began to owe one. The timer looks at it only when it
    // fires, so that an answer does not cost setting one.
    let mut heard = Instant::now();
    let mut silence = std::pin::pin!(tokio::time::sleep(silence_max));
    loop {
        let owes = !waiting.is_empty() || outgoing.is_some();
        if draining && !owes {
            return;
        }
        while messages.front().is_some_and(|last| !waiting.contains_key(last)) {
            messages.pop_front();
        }
        let takes_more = outgoing.is_none() && !draining && messages.len() < MESSAGES_IN_FLIGHT_MAX;
        tokio::select! {
            results = link.results.next() => match results {
                Some(results) => {
                    heard = Instant::now();
                    answering.push(answer_when_applied(core, settle(waiting, results)).boxed());
                }
                None => break,
            },
            Some(()) = answering.next(), if !answering.is_empty() => {}
            // Both directions at once: a full link must not stop its answers.
            permit = link.items.reserve(), if outgoing.is_some() => match permit {
                Ok(permit) => {
                    let batch = outgoing.take().unwrap_or_default();
                    permit.send(number(batch, &mut sequence, waiting));
                    messages.push_back(sequence);
                }
                Err(_) => break,
            },
            batch = batches.recv(), if takes_more => match batch {
                Some(mut batch) => {
                    while batch.len() < BATCH_COUNT_MAX
                        && let Ok(more) = batches.try_recv()
                    {
                        batch.extend(more);
                    }
                    if !owes {
                        heard = Instant::now();
                    }
                    outgoing = Some(batch);
                }
                None => draining = true,
            },
            () = &mut silence => {
                if owes && heard.elapsed() >= silence_max {
                    tracing::debug!("the forwarding link is silent and given up");
                    break;
                }
                let since = if owes { heard } else { Instant::now() };
                silence.as_mut().reset(since + silence_max);
            }
        }
    }
    reject(outgoing.unwrap_or_default(), false);
}

fn number(batch: Vec<Pending>, sequence: &mut u64, waiting: &mut BTreeMap<u64, Waiting>) -> Vec<ForwardItem> {
    let mut items = Vec::with_capacity(batch.len());
    for pending in batch {
        *sequence += 1;
        items.push(ForwardItem { sequence: *sequence, body: pending.body });
        waiting.insert(*sequence, Waiting { answer: pending.answer, _admitted: pending.admitted });
    }
    metrics::histogram!(telemetry::FORWARD_BATCH_ENTRIES).record(items.len() as f64);
    metrics::counter!(telemetry::PROPOSALS_FORWARDED).increment(items.len() as u64);
    items
}

/// What became of commands, with those who wait for it.
type Settled = Vec<(Waiting, Outcome)>;

fn settle(waiting: &mut BTreeMap<u64, Waiting>, results: Vec<ForwardResult>) -> Settled {
    let mut settled = Vec::with_capacity(results.len());
    for result in results {
        let Some(waiting) = waiting.remove(&result.sequence) else { continue };
        let outcome = match result.outcome {
            ForwardOutcome::Applied { index, reply } => match codec::decode::<Reply>("a reply", &reply) {
                Ok(reply) => Outcome::Applied { index, reply },
                Err(error) => {
                    // It was applied, but what came of it cannot be told.
                    tracing::error!(%error, "a forwarded proposal's reply is damaged");
                    Outcome::Unknown
                }
            },
            ForwardOutcome::Rejected { too_many, .. } => Outcome::Rejected { too_many },
            ForwardOutcome::Unknown => Outcome::Unknown,
        };
        settled.push((waiting, outcome));
    }
    settled
}

/// Answers once this node has applied all of them itself. Who waits would have to wait for that
/// anyway; so each is woken once, and not by every chunk that is applied meanwhile.
async fn answer_when_applied(core: &Core, settled: Settled) {
    let index = |(_, outcome): &(Waiting, Outcome)| match outcome {
        Outcome::Applied { index, .. } => Some(*index),
        Outcome::Rejected { .. } | Outcome::Unknown => None,
    };
    if let Some(last) = settled.iter().filter_map(index).max() {
        // When it takes too long, each one's own deadline decides.
        let _ = core.applied(last, core.deadline(None)).await;
    }
    for (waiting, outcome) in settled {
        let _ = waiting.answer.send(outcome);
    }
}

/// Serves the links that followers open.
pub(super) async fn accept(
    core: Arc<Core>,
    proposer: Arc<Proposer>,
    mut ends: mpsc::Receiver<ForwardEnd>,
    stop: CancellationToken,
) {
    let mut serving = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(ended) = serving.join_next(), if !serving.is_empty() => {
                if let Err(error) = ended && error.is_panic() {
                    std::panic::resume_unwind(error.into_panic());
                }
            }
            end = ends.recv() => match end {
                Some(end) => { serving.spawn(serve(core.clone(), proposer.clone(), end)); }
                None => break,
            }
        }
    }
    serving.shutdown().await;
}

async fn serve(core: Arc<Core>, proposer: Arc<Proposer>, mut end: ForwardEnd) {
    // Bounded by the admission of what is forwarded.
    let mut answering = FuturesUnordered::new();
    loop {
        tokio::select! {
            Some(()) = answering.next(), if !answering.is_empty() => {}
            items = end.items.next() => {
                let Some(items) = items else { break };
                if let Some(answer) = take(&core, &proposer, items, &end.results).await {
                    answering.push(answer);
                }
            }
        }
    }
    while answering.next().await.is_some() {}
}

/// Proposes what there is room for; the rest is rejected at once.
async fn take(
    core: &Core,
    proposer: &Proposer,
    items: Vec<ForwardItem>,
    results: &mpsc::Sender<Vec<ForwardResult>>,
) -> Option<impl Future<Output = ()> + use<>> {
    let leadership = core.leadership();
    let mut rejected = Vec::new();
    let mut admitted = Vec::with_capacity(items.len());
    let mut bodies = Vec::with_capacity(items.len());
    for item in items {
        if !is_command(&item.body) {
            // Every replica would stop at it. The follower's own copy is whole,
            // or it is at fault; either way this one does not go into the log.
            tracing::error!("a forwarded proposal is no command and is refused");
            let outcome = ForwardOutcome::Rejected { leader: leadership.leader, too_many: false };
            rejected.push(ForwardResult { sequence: item.sequence, outcome });
            continue;
        }
        let room = if leadership.here { proposer.admit_forwarded(item.body.len()) } else { None };
        match room {
            Some(room) => {
                admitted.push((item.sequence, room));
                bodies.push(item.body);
            }
            None => {
                let too_many = leadership.here;
                let outcome = ForwardOutcome::Rejected { leader: leadership.leader, too_many };
                rejected.push(ForwardResult { sequence: item.sequence, outcome });
            }
        }
    }
    // A follower that is gone gets no answers; its callers see the link break.
    if !rejected.is_empty() && results.send(rejected).await.is_err() {
        return None;
    }
    if bodies.is_empty() {
        return None;
    }
    let written = write_batch(core, bodies).await.ok()?;
    Some(report(admitted, written, results.clone(), leadership.leader))
}

/// Whether bytes from the network are a command that apply can read: an entry
/// that it cannot read ends every node.
fn is_command(body: &[u8]) -> bool {
    codec::decode::<Command>("a forwarded command", body).is_ok()
}

/// Results are sent no later than when they have this many bytes together.
const RESULTS_BYTES_MAX: usize = 8 << 20;

/// Sends results as they come, as many at a time as are ready.
async fn report(
    admitted: Vec<(u64, Admitted)>,
    mut written: WriteResults,
    results: mpsc::Sender<Vec<ForwardResult>>,
    leader: NodeId,
) {
    let (mut ready, mut ready_bytes) = (Vec::new(), 0);
    for (sequence, room) in admitted {
        let outcome = match written.next().now_or_never() {
            Some(outcome) => outcome,
            None => {
                ready_bytes = 0;
                if !ready.is_empty() && results.send(std::mem::take(&mut ready)).await.is_err() {
                    return;
                }
                written.next().await
            }
        };
        drop(room);
        let outcome = match outcome {
            Some(Outcome::Applied { index, reply }) => {
                let reply = Bytes::from(codec::encode(&reply));
                // Two large replies together could be more than one message may have.
                if ready_bytes + reply.len() > RESULTS_BYTES_MAX && !ready.is_empty() {
                    ready_bytes = 0;
                    if results.send(std::mem::take(&mut ready)).await.is_err() {
                        return;
                    }
                }
                ready_bytes += reply.len();
                ForwardOutcome::Applied { index, reply }
            }
            Some(Outcome::Rejected { too_many }) => ForwardOutcome::Rejected { leader, too_many },
            Some(Outcome::Unknown) | None => ForwardOutcome::Unknown,
        };
        ready.push(ForwardResult { sequence, outcome });
    }
    let _ = results.send(ready).await;
}
