//! Writes with a request id, sent again under the same id: until there is an
//! answer, through the same member and others, and now and then long after it
//! was answered.
//!
//! Claim: a retried write is applied once. A late retry would bring an old
//! value back if it were not recognised, because all workers share few keys.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::crew::{self, WORKERS, Worker};
use super::{Work, Workload};
use crate::client::RequestId;
use crate::context::Context;
use crate::judge::history::{Action, Call, Compare, History, Operand, Outcome, Relation, Span, Txn};
use crate::judge::request_ids;
use crate::judge::verdict::Verdict;

const NAME: &str = "request-ids";
const KEYS: usize = 5;
/// How long a session lives without a write of its own: longer than any fault.
const SESSION_TTL_S: u64 = 3_600;
/// How long one write is tried when nobody answers: longer than most faults.
const INSIST_TIME_MAX: Duration = Duration::from_secs(15);
/// Answered writes of a worker that may still be repeated.
const KEPT: usize = 6;

/// The workload.
pub struct RequestIds;

impl Workload for RequestIds {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        crew::drive(context, NAME, WORKERS, work)
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        Box::pin(
            async move { crew::read_finally(&context, NAME, Span::prefix("request-ids/")).await.map(drop) },
        )
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        request_ids::check(history, NAME)
    }
}

/// A session of one worker.
struct Session {
    id: u64,
    /// The last sequence that was dealt out.
    last: u64,
    /// Answered writes that may be repeated, oldest first.
    kept: VecDeque<(u64, Call)>,
}

impl Session {
    fn new(id: u64) -> Session {
        Session { id, last: 0, kept: VecDeque::new() }
    }

    /// Everything below the oldest write that may be repeated has been answered or given up.
    fn id_of(&self, sequence: u64) -> RequestId {
        let oldest = self.kept.front().map_or(sequence, |(oldest, _)| (*oldest).min(sequence));
        RequestId { session: self.id, sequence, acknowledged: oldest - 1 }
    }

    fn keep(&mut self, sequence: u64, call: Call) {
        self.kept.push_back((sequence, call));
        if self.kept.len() > KEPT {
            self.kept.pop_front();
        }
    }
}

async fn work(mut worker: Worker) -> anyhow::Result<()> {
    let Some(mut session) = open(&mut worker).await else { return Ok(()) };
    while worker.turn(1).await {
        if worker.chance(0.2) {
            // In between, others write and read the same keys without any id.
            let call = if worker.chance(0.7) { draw(&mut worker) } else { look(&mut worker) };
            worker.client.call(call).await;
            continue;
        }
        if !session.kept.is_empty() && worker.chance(0.2) {
            let (sequence, call) = session.kept[worker.pick(session.kept.len())].clone();
            elsewhere(&mut worker);
            worker.client.call_with_id(call, Some(session.id_of(sequence))).await;
            continue;
        }
        session.last += 1;
        let sequence = session.last;
        let call = draw(&mut worker);
        match insist(&mut worker, &call, session.id_of(sequence)).await {
            Outcome::Ok(_) => session.keep(sequence, call),
            // Its session may be what is wrong; another one has other ids.
            Outcome::Failed(why) | Outcome::Unknown(why) if why.contains("mainstay: session") => {
                let Some(another) = open(&mut worker).await else { return Ok(()) };
                session = another;
            }
            Outcome::Failed(_) | Outcome::Unknown(_) => {}
        }
    }
    Ok(())
}

/// A session, or none when the run is over before there is one.
async fn open(worker: &mut Worker) -> Option<Session> {
    while worker.turn(1).await {
        match worker.client.open_session(SESSION_TTL_S).await {
            Ok(id) => return Some(Session::new(id)),
            Err(_) => worker.context.sleep(Duration::from_millis(200)).await,
        }
    }
    None
}

/// The same write under the same id until it is answered, given up, or the run is over.
async fn insist(worker: &mut Worker, call: &Call, id: RequestId) -> Outcome {
    let give_up_at = Instant::now() + INSIST_TIME_MAX;
    let mut outcome = worker.client.call_with_id(call.clone(), Some(id)).await;
    while Instant::now() < give_up_at {
        if matches!(outcome, Outcome::Ok(_)) || worker.context.stopped() {
            break;
        }
        worker.context.sleep(Duration::from_millis(200)).await;
        if worker.chance(0.6) {
            elsewhere(worker);
        }
        outcome = worker.client.call_with_id(call.clone(), Some(id)).await;
    }
    outcome
}

/// Turns to any member.
fn elsewhere(worker: &mut Worker) {
    let members = worker.context.hosts.members();
    if !members.is_empty() {
        let at = worker.pick(members.len());
        worker.client.turn_to(members[at]);
    }
}

fn look(worker: &mut Worker) -> Call {
    let action = Action::Range { span: Span::key(key(worker)), revision: 0, limit: 0 };
    Call::Single { action, serializable: false }
}

fn key(worker: &mut Worker) -> String {
    format!("{NAME}/{}", worker.pick(KEYS))
}

fn draw(worker: &mut Worker) -> Call {
    let key = key(worker);
    let (value, prev_kv) = (worker.value(), worker.chance(0.3));
    let put = Action::Put { key: key.clone(), value, lease: 0, prev_kv };
    match worker.pick(10) {
        0..7 => Call::Single { action: put, serializable: false },
        7 => Call::Single { action: Action::Delete { span: Span::key(key), prev_kv }, serializable: false },
        _ => {
            let operand = Operand::Version(worker.pick(30) as i64);
            let compares = vec![Compare { key: key.clone(), relation: Relation::Greater, operand }];
            let look = Action::Range { span: Span::key(key), revision: 0, limit: 0 };
            Call::Txn(Txn { compares, success: vec![put], failure: vec![look] })
        }
    }
}
