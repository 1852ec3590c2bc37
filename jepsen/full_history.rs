//! Every change of the run, as one watch from revision 1 over all keys told it.
//!
//! It runs from the beginning, so that a compaction cannot take away what it
//! has not seen, moves from member to member, and is brought to the last
//! revision when everything was healed. Checkers take it as the list of what
//! happened, so a gap or a repeat in it is a finding of theirs.

use std::sync::Arc;
use std::time::Duration;

use crate::client;
use crate::context::Context;
use crate::judge::history::{FULL_HISTORY, Revision, Span};
use crate::watcher::{Habits, Watcher, Wish};

/// Its workload's name in the history.
pub const WORKLOAD: &str = "full-history";
/// It stays no longer than about this with one member, which may be cut off from the others.
const MOVE_EVERY: Duration = Duration::from_secs(3);

/// The record of every change, while it is made.
pub struct FullHistory {
    watcher: Watcher,
}

impl FullHistory {
    /// Begins with revision 1.
    pub fn start(context: &Arc<Context>) -> FullHistory {
        let everything = Span { key: "\0".to_owned(), end: Some("\0".to_owned()) };
        let wish = Wish::new(WORKLOAD, everything, 1);
        let habits = Habits { move_every: Some(MOVE_EVERY), ..Habits::default() };
        FullHistory { watcher: Watcher::start_as(context, FULL_HISTORY, wish, habits) }
    }

    /// Up to where it is complete. A compaction beyond it would leave a gap.
    pub fn position(&self) -> Revision {
        self.watcher.position().unwrap_or(0)
    }

    /// Completes it up to the revision that the store has now. Nothing may be
    /// written any more, or what is written now is missing.
    ///
    /// # Errors
    /// When no member says its revision, or the watch did not get there in time.
    pub async fn finish(self, context: &Arc<Context>, within: Duration) -> anyhow::Result<Revision> {
        let mut last = anyhow::anyhow!("there is no member to ask");
        for member in context.hosts.members() {
            match client::revision(&context.hosts.hosts[member].client_url()).await {
                Ok(revision) => {
                    let position = self.position();
                    anyhow::ensure!(
                        self.watcher.finish(revision, within).await?,
                        "the full history got from {position} not to {revision} within {within:?}"
                    );
                    return Ok(revision);
                }
                Err(error) => last = error,
            }
        }
        Err(last.context("no member says its revision"))
    }
}
