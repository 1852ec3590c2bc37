//! The node's tasks: each with a name, a handle and a place in the stop order,
//! and the one place where the node's end is announced.
//!
//! A task that panics ends the node: nothing may go on beside a part that is
//! no longer there.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long one task may take to stop before it is cut off.
const STOP_TASK_MAX: Duration = Duration::from_secs(2);

/// Why the node has ended, or must end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExitReason {
    /// It was asked to stop.
    Stopped,
    /// It is no longer a member of its cluster.
    Removed,
    /// It may not come into the cluster as it is; the message says what to do.
    Refused(String),
    /// It cannot be sure of its state any more; the message says why.
    Failed(String),
}

/// The node's end. The first reason stands.
#[derive(Clone)]
pub struct Exit {
    reason: watch::Sender<Option<ExitReason>>,
}

impl Default for Exit {
    fn default() -> Exit {
        Exit { reason: watch::channel(None).0 }
    }
}

impl Exit {
    /// Announces the end. Later reasons are ignored.
    pub fn announce(&self, reason: ExitReason) {
        self.reason.send_if_modified(|standing| {
            if standing.is_some() {
                return false;
            }
            match &reason {
                ExitReason::Stopped => tracing::info!("the node stops"),
                ExitReason::Removed => tracing::warn!("this node was removed from its cluster and stops"),
                ExitReason::Refused(why) => tracing::error!(%why, "this node may not take part and stops"),
                ExitReason::Failed(why) => tracing::error!(%why, "the node cannot go on and stops"),
            }
            *standing = Some(reason);
            true
        });
    }

    /// The reason, once there is one.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.borrow().clone()
    }

    /// Waits for the node's end.
    pub async fn wait(&self) -> ExitReason {
        let mut reason = self.reason.subscribe();
        let standing = reason.wait_for(Option::is_some).await.expect("the sender lives in self");
        standing.clone().expect("waited for a reason")
    }
}

struct Task {
    name: &'static str,
    stop: CancellationToken,
    handle: JoinHandle<()>,
}

/// The running tasks, in the order in which they were started.
#[derive(Clone)]
pub struct Tasks {
    running: Arc<Mutex<Vec<Task>>>,
    exit: Exit,
}

impl Tasks {
    /// No task yet. A panic of one is announced on `exit`.
    pub fn new(exit: Exit) -> Tasks {
        Tasks { running: Arc::default(), exit }
    }

    /// Starts a task. It must end soon after its token is cancelled.
    pub fn start<F, T>(&self, name: &'static str, task: F)
    where
        F: FnOnce(CancellationToken) -> T,
        T: Future<Output = ()> + Send + 'static,
    {
        let stop = CancellationToken::new();
        let future = AssertUnwindSafe(task(stop.clone())).catch_unwind();
        let exit = self.exit.clone();
        let handle = tokio::spawn(async move {
            if future.await.is_err() {
                exit.announce(ExitReason::Failed(format!("the task {name:?} panicked")));
            }
        });
        self.running.lock().push(Task { name, stop, handle });
    }

    /// Stops every task, the last started first: a task may rely on those
    /// started before it until it has ended.
    pub async fn stop(&self) {
        let mut tasks = std::mem::take(&mut *self.running.lock());
        while let Some(mut task) = tasks.pop() {
            task.stop.cancel();
            if tokio::time::timeout(STOP_TASK_MAX, &mut task.handle).await.is_err() {
                tracing::warn!(task = task.name, "did not stop in time and is cut off");
                task.handle.abort();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panicking_task_ends_the_node_and_the_first_reason_stands() {
        let exit = Exit::default();
        let tasks = Tasks::new(exit.clone());
        tasks.start("sound", |stop| async move { stop.cancelled().await });
        tasks.start("broken", |_| async { panic!("as intended") });
        assert_eq!(exit.wait().await, ExitReason::Failed("the task \"broken\" panicked".to_owned()));
        exit.announce(ExitReason::Stopped);
        assert!(matches!(exit.reason(), Some(ExitReason::Failed(_))));
        tasks.stop().await;
    }
}
