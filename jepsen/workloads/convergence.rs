//! Convergence: after healing, writes flow through every member again, and all
//! members hold the same at the same revision.
//!
//! Its writers go on while faults are healed and members settle, slowly, so
//! that the history shows when writes came back; the hashes are asked for when
//! they have ended.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::crew;
use super::{Work, Workload};
use crate::client::Client;
use crate::context::Context;
use crate::judge;
use crate::judge::history::{Action, Call, History, Outcome, Span};
use crate::judge::verdict::Verdict;

const NAME: &str = "convergence";
const WRITE_EVERY: Duration = Duration::from_millis(250);
/// How long writers go on after settling: each has time for some writes.
const FLOW_TIME: Duration = Duration::from_secs(1);
/// How long a member may take until it has the last revision and tells its hash.
const HASH_TIME_MAX: Duration = Duration::from_secs(20);
const HASH_EVERY: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Default)]
pub struct Convergence {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    writers: Vec<JoinHandle<()>>,
    enough: CancellationToken,
    /// Who was a member in the end.
    members: Vec<usize>,
}

impl Workload for Convergence {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        let state = Arc::clone(&self.state);
        Box::pin(async move {
            {
                let mut state = lock(&state);
                for host in 0..context.hosts.hosts.len() {
                    let writing = write(Arc::clone(&context), host, state.enough.clone());
                    state.writers.push(tokio::spawn(writing));
                }
            }
            while !context.stopped() {
                context.sleep(Duration::from_secs(60)).await;
            }
            Ok(())
        })
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        let state = Arc::clone(&self.state);
        Box::pin(async move {
            tokio::time::sleep(FLOW_TIME).await;
            let writers = {
                let mut state = lock(&state);
                state.enough.cancel();
                state.members = context.hosts.members();
                std::mem::take(&mut state.writers)
            };
            for writer in writers {
                writer.await?;
            }
            let revision = crew::revision_finally(&context, NAME).await?;
            let members = lock(&state).members.clone();
            for member in members {
                ask_hash(&context, member, revision).await;
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        judge::convergence::check(history, &lock(&self.state).members)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("nobody panics with it")
}

/// Writes through one host, while it is a member, until it is enough.
async fn write(context: Arc<Context>, host: usize, enough: CancellationToken) {
    let mut client = Client::new(&context, NAME, host);
    let mut number = 0_u64;
    while !enough.is_cancelled() {
        if context.hosts.members().contains(&host) {
            number += 1;
            let (key, value) = (format!("{NAME}/{host}"), format!("{NAME}.{host}.{number}"));
            client.act(Action::Put { key, value, lease: 0, prev_kv: false }).await;
        }
        let _ = tokio::time::timeout(WRITE_EVERY, enough.cancelled()).await;
    }
}

/// Asks one member until it tells the hash. One that never does is missed by the checker.
async fn ask_hash(context: &Arc<Context>, member: usize, revision: i64) {
    let until = Instant::now() + HASH_TIME_MAX;
    let mut client = Client::new(context, NAME, member).with_deadline(Duration::from_secs(5));
    while Instant::now() < until {
        // A linearizable read first: after it, the member has applied every compaction that there was.
        let read = Action::Range { span: Span::key(format!("{NAME}/{member}")), revision: 0, limit: 0 };
        if let Outcome::Ok(_) = client.act(read).await
            && let Outcome::Ok(_) = client.call(Call::HashKv { revision }).await
        {
            return;
        }
        tokio::time::sleep(HASH_EVERY).await;
    }
}
