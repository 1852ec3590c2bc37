//! What all workloads share: workers spread over all members, each with one
//! client, its own random numbers and its own pace.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Work;
use crate::client::Client;
use crate::context::Context;
use crate::judge::history::{Action, ActionReply, Body, Call, Kv, Outcome, Revision, Span};

/// Workers of one workload: enough that every member of a cluster of five is asked.
pub const WORKERS: usize = 6;
/// How long reading may take after everything was healed.
const FINAL_READ_TIME_MAX: Duration = Duration::from_secs(20);

/// One worker of a workload.
pub struct Worker {
    pub context: Arc<Context>,
    pub client: Client,
    pub index: usize,
    pub rng: StdRng,
    workload: &'static str,
    /// Time between two calls.
    every: Duration,
    next: Instant,
    values: u64,
}

impl Worker {
    /// The worker `index` of `workers` that share the workload's rate.
    pub fn new(context: &Arc<Context>, workload: &'static str, index: usize, workers: usize) -> Worker {
        let salt = workload.bytes().fold(index as u64 + 1, |sum, byte| {
            sum.wrapping_mul(0x0100_0000_01b3).wrapping_add(u64::from(byte))
        });
        let mut rng = StdRng::seed_from_u64(context.seed ^ salt);
        let every = Duration::from_secs(1) * workers as u32 / context.rate.max(1);
        // Workers begin one after the other, not all at once.
        let next = Instant::now() + every.mul_f64(rng.random_range(0.0..1.0));
        let client = Client::new(context, workload, member_for(context, index));
        Worker { context: Arc::clone(context), client, index, rng, workload, every, next, values: 0 }
    }

    /// Waits until it is time for the next `calls` calls; `false` when the run is over.
    pub async fn turn(&mut self, calls: u32) -> bool {
        let now = Instant::now();
        self.context.sleep(self.next.saturating_duration_since(now)).await;
        // What was missed while a node did not answer is not made up for in a burst.
        let jitter = self.rng.random_range(0.5..1.5);
        self.next = self.next.max(now) + (self.every * calls).mul_f64(jitter);
        self.client.turn_to(member_for(&self.context, self.index));
        !self.context.stopped()
    }

    /// A value that nobody else writes in this run.
    pub fn value(&mut self) -> String {
        self.values += 1;
        format!("{}.{}.{}", self.workload, self.index, self.values)
    }

    /// A number that no other worker of this workload has, from 1.
    pub fn number(&mut self) -> u64 {
        self.values += 1;
        self.values * 100 + self.index as u64
    }

    /// One of `0..count`.
    pub fn pick(&mut self, count: usize) -> usize {
        self.rng.random_range(0..count)
    }

    pub fn chance(&mut self, probability: f64) -> bool {
        self.rng.random_bool(probability)
    }

    /// What a linearizable read gives, when it gives something.
    pub async fn read(&mut self, span: Span) -> Option<Vec<Kv>> {
        kvs(&self.client.act(Action::Range { span, revision: 0, limit: 0 }).await)
    }
}

/// The member that the worker of this index asks.
fn member_for(context: &Context, index: usize) -> usize {
    let members = context.hosts.members();
    members.get(index % members.len().max(1)).copied().unwrap_or(0)
}

/// The keys that a read answered with.
pub fn kvs(outcome: &Outcome) -> Option<Vec<Kv>> {
    match outcome {
        Outcome::Ok(reply) => match &reply.body {
            Body::Single(ActionReply::Range { kvs, .. }) => Some(kvs.clone()),
            _ => None,
        },
        Outcome::Failed(_) | Outcome::Unknown(_) => None,
    }
}

/// Whether a transaction took its first branch; `None` when that is not known.
pub fn succeeded(outcome: &Outcome) -> Option<bool> {
    match outcome {
        Outcome::Ok(reply) => match &reply.body {
            Body::Txn { succeeded, .. } => Some(*succeeded),
            _ => None,
        },
        Outcome::Failed(_) | Outcome::Unknown(_) => None,
    }
}

/// Runs the workers of a workload until all have ended.
pub fn drive<F, R>(context: Arc<Context>, workload: &'static str, workers: usize, work: F) -> Work
where
    F: Fn(Worker) -> R + Send + 'static,
    R: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    Box::pin(async move {
        let mut crew = JoinSet::new();
        for index in 0..workers {
            crew.spawn(work(Worker::new(&context, workload, index, workers)));
        }
        while let Some(ended) = crew.join_next().await {
            ended??;
        }
        Ok(())
    })
}

/// Calls until there is an answer, each time at the next member, beginning with
/// the `first`. For what claims need at the end, when every member serves.
///
/// # Errors
/// When nobody answers for long, which after healing nobody may do.
pub async fn insist(
    context: &Arc<Context>,
    workload: &'static str,
    first: usize,
    call: Call,
) -> anyhow::Result<Outcome> {
    let deadline = Instant::now() + FINAL_READ_TIME_MAX;
    let mut last = Outcome::Unknown("no member was asked".to_owned());
    for turn in first.. {
        if Instant::now() > deadline {
            break;
        }
        let member = member_for(context, turn);
        let mut client = Client::new(context, workload, member).with_deadline(Duration::from_secs(5));
        last = client.call(call.clone()).await;
        if matches!(last, Outcome::Ok(_)) {
            return Ok(last);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    anyhow::bail!("{workload}: nobody answered {call:?} after healing; the last outcome was {last:?}")
}

/// A linearizable read at the end.
///
/// # Errors
/// See [`insist`].
pub async fn read_finally(
    context: &Arc<Context>,
    workload: &'static str,
    span: Span,
) -> anyhow::Result<Vec<Kv>> {
    let action = Action::Range { span, revision: 0, limit: 0 };
    let outcome = insist(context, workload, 0, Call::Single { action, serializable: false }).await?;
    Ok(kvs(&outcome).unwrap_or_default())
}

/// The store's revision at the end, from a linearizable read.
///
/// # Errors
/// See [`insist`].
pub async fn revision_finally(context: &Arc<Context>, workload: &'static str) -> anyhow::Result<Revision> {
    let action = Action::Range { span: Span::key(format!("{workload}/")), revision: 0, limit: 0 };
    match insist(context, workload, 0, Call::Single { action, serializable: false }).await? {
        Outcome::Ok(reply) => Ok(reply.revision),
        doubtful => anyhow::bail!("{workload}: an answer was {doubtful:?}"),
    }
}
