//! Puts the node together and takes it apart.

use std::sync::Arc;
use std::time::Duration;

use openraft::async_runtime::WatchReceiver;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::ask::Desk;
use super::control::ForwardEnd;
use super::core::Core;
use super::read::Reads;
use super::tasks::Tasks;
use super::{NodeError, NodeStatus, SnapshotFile};
use crate::watch::Hub;

/// x
pub struct NodeParts {}

pub(super) struct Inner {
    pub core: Arc<Core>,
    pub desk: Arc<Desk>,
    pub reads: Arc<Reads>,
    pub hub: Arc<Hub>,
    pub forward_ends: mpsc::Sender<ForwardEnd>,
    tasks: Tasks,
}

impl Inner {
    pub fn status(&self) -> NodeStatus {
        todo!()
    }
    pub async fn defragment(&self) -> Result<(), NodeError> {
        todo!()
    }
    pub async fn snapshot_file(&self) -> Result<SnapshotFile, NodeError> {
        todo!()
    }
    pub async fn stop(&self, hand_over_max: Duration) {
        todo!()
    }
}
