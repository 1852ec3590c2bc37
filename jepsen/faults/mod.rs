//! What is done to the cluster.
//!
//! A fault says how it was seen to have taken effect, or why not: a fault that
//! had none proves nothing. Healing leaves the cluster as it was.

pub mod catalogue;
pub mod check;
pub mod clock;
mod damage;
pub mod delay;
mod disk;
mod maintenance;
mod membership;
pub mod network;
mod operator;
mod partition;
mod power;
mod process;
mod whom;
mod wiped;

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use tokio::time::Instant;

use crate::context::Context;

/// What a fault does in its own time.
pub type Deed<'a, T> = Pin<Box<dyn Future<Output = anyhow::Result<T>> + Send + 'a>>;

/// One kind of fault, with what it must remember to heal.
pub trait Fault: Send {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// Begins it and confirms it; returns whom it hit and how that was seen.
    /// What it draws, it draws from `rng` alone.
    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String>;

    /// Ends it. Called once after `inject`, whether that worked or not.
    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()>;
}

/// How long a fault that wants the leader waits for there to be one.
const LEADER_TIME_MAX: Duration = Duration::from_secs(3);
/// Between two looks at something that is waited for.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The host whose node leads; without a leader, the first of `members`.
async fn leader_or_any(context: &Context, members: &[usize]) -> usize {
    let asked = within(LEADER_TIME_MAX, || async {
        let leader = context.hosts.leader().await;
        leader.filter(|leader| members.contains(leader)).ok_or_else(|| anyhow::anyhow!("nobody leads"))
    });
    asked.await.unwrap_or(members[0])
}

/// Tries again until it succeeds or the time is over; then gives the last error.
async fn within<T, F: Future<Output = anyhow::Result<T>>>(
    time: Duration,
    mut attempt: impl FnMut() -> F,
) -> anyhow::Result<T> {
    let until = Instant::now() + time;
    loop {
        match attempt().await {
            Err(_) if Instant::now() < until => tokio::time::sleep(LOOK_INTERVAL).await,
            other => return other,
        }
    }
}

/// The names of hosts.
fn names(context: &Context, indices: &[usize]) -> String {
    let names: Vec<&str> = indices.iter().map(|index| context.hosts.hosts[*index].name.as_str()).collect();
    names.join(" ")
}
