//! What clients do to the store, and which claims are checked afterwards.
//!
//! A workload keeps to keys below its own prefix, so that several can share a
//! run. It never decides whether an answer is right while it runs: it records.

mod crew;
pub mod watch;

use std::sync::Arc;

use crate::context::Context;
use crate::judge::history::History;
use crate::judge::verdict::Verdict;

/// What a workload does in its own time.
pub type Work = std::pin::Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

/// One workload.
pub trait Workload: Send + Sync {
    /// Its name on the command line; its keys begin with the name and a slash.
    fn name(&self) -> &'static str;

    /// Drives the store with its own clients until [`Context::stopped`]. An
    /// error means that the harness itself failed, not that a call did.
    fn drive(&self, context: Arc<Context>) -> Work;

    /// After every fault was healed: the reads that its claims need.
    fn finish(&self, context: Arc<Context>) -> Work;

    /// Judges its own part of the history.
    fn judge(&self, history: &History) -> Vec<Verdict>;
}
