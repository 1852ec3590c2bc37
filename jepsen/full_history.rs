//! Every change of the run, as one watch from revision 1 over all keys told it.
//!
//! It runs from the beginning and says how far it is, so that whoever compacts
//! can leave what it has not seen, moves from member to member, and is brought to the last
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

/// How long it may take to see everything after healing.
const FINISH_TIME_MAX: Duration = Duration::from_secs(40);

/// The record of every change, while it is made.
pub struct FullHistory {
    context: Arc<Context>,
    watcher: Watcher,
}

impl FullHistory {
    /// Begins with revision 1.
    pub fn begin(context: Arc<Context>) -> FullHistory {
        let everything = Span { key: "\0".to_owned(), end: Some("\0".to_owned()) };
        let wish = Wish::new(WORKLOAD, everything, 1);
        let habits = Habits { move_every: Some(MOVE_EVERY), ..Habits::default() };
        let watcher = Watcher::start_as(&context, FULL_HISTORY, wish, habits);
        context.follow_recorded(watcher.follow());
        FullHistory { context, watcher }
    }

    /// Completes it up to the revision that the store has now. What is written
    /// after this was called may be missing.
    ///
    /// # Errors
    /// When no member says its revision, or the watch did not get there in time.
    pub async fn finish(self) -> anyhow::Result<()> {
        let mut last = anyhow::anyhow!("there is no member to ask");
        for member in self.context.hosts.members() {
            match client::revision(&self.context.hosts.hosts[member].client_url()).await {
                Ok(revision) => return self.reach(revision).await,
                Err(error) => last = error,
            }
        }
        Err(last.context("no member says its revision"))
    }

    async fn reach(self, revision: Revision) -> anyhow::Result<()> {
        let position = self.context.recorded();
        anyhow::ensure!(
            self.watcher.finish(revision, FINISH_TIME_MAX).await?,
            "it got from {position} not to {revision} within {FINISH_TIME_MAX:?}"
        );
        Ok(())
    }
}
