//! What clients do to the store, and which claims are checked afterwards.
//!
//! A workload keeps to keys below its own prefix, so that several can share a
//! run. It never decides whether an answer is right while it runs: it records.

mod crew;

mod append;
mod bank;
mod convergence;
mod kv;
mod lease;
mod lock;
mod membership;
mod register;
mod request_ids;
mod serializable;
mod set;
mod watch;

use std::sync::Arc;

use anyhow::Context as _;

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

    /// Judges its own part of the history. The order of revisions, which every
    /// workload's calls are part of, is judged for all of them together.
    fn judge(&self, history: &History) -> Vec<Verdict>;
}

/// One line of the catalogue: a name, what the workload does, and how it is made.
pub struct Entry {
    pub name: &'static str,
    pub about: &'static str,
    pub make: fn() -> Box<dyn Workload>,
}

/// Every workload there is.
pub const CATALOGUE: &[Entry] = &[
    Entry {
        name: "register",
        about: "reads, writes and compare-and-sets of single keys; linearizable",
        make: || Box::<register::Register>::default(),
    },
    Entry {
        name: "kv",
        about: "puts, deletions, ranges, transactions and leases on few keys; one order explains all",
        make: || Box::new(kv::MixedKv),
    },
    Entry {
        name: "append",
        about: "transactions that append to lists; strictly serializable",
        make: || Box::<append::Append>::default(),
    },
    Entry {
        name: "set",
        about: "elements added by compare-and-set; none lost, none invented",
        make: || Box::<set::Set>::default(),
    },
    Entry {
        name: "bank",
        about: "transfers between accounts; the total never changes",
        make: || Box::<bank::Bank>::default(),
    },
    Entry {
        name: "serializable",
        about: "serializable reads at every member; old at worst",
        make: || Box::new(serializable::Serializable),
    },
    Entry {
        name: "request-ids",
        about: "writes repeated under the same id; each applied once",
        make: || Box::new(request_ids::RequestIds),
    },
    Entry {
        name: "watch",
        about: "watchers of every kind that move from member to member; nine guarantees",
        make: || Box::<watch::Watch>::default(),
    },
    Entry {
        name: "lease",
        about: "leases kept alive, revoked and left to run out; never too early, never for good",
        make: || Box::<lease::Lease>::default(),
    },
    Entry {
        name: "lock",
        about: "turns of the Lock service around appends; fenced ones are never lost",
        make: || Box::new(lock::Lock),
    },
    Entry {
        name: "membership",
        about: "a client at every host while members come and go; the removed serve no reads",
        make: || Box::<membership::Membership>::default(),
    },
    Entry {
        name: "convergence",
        about: "writes through every member, and its hash in the end; all members agree",
        make: || Box::<convergence::Convergence>::default(),
    },
];

/// The names of all workloads.
pub fn names() -> Vec<&'static str> {
    CATALOGUE.iter().map(|entry| entry.name).collect()
}

/// The workload of this name.
///
/// # Errors
/// Names the workloads there are.
pub fn by_name(name: &str) -> anyhow::Result<Box<dyn Workload>> {
    let entry = CATALOGUE.iter().find(|entry| entry.name == name);
    let entry = entry.with_context(|| {
        let line = |entry: &Entry| format!("  {:<12} {}", entry.name, entry.about);
        let lines: Vec<String> = CATALOGUE.iter().map(line).collect();
        format!("no workload `{name}`; there are:\n{}", lines.join("\n"))
    })?;
    Ok((entry.make)())
}
