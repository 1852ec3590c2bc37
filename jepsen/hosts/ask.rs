//! What the harness itself asks nodes, apart from what clients do: who leads,
//! and whether a node serves.

use std::time::Duration;

use anyhow::{Context as _, bail};
use mainstay::wire::etcdserverpb::kv_client::KvClient;
use mainstay::wire::etcdserverpb::maintenance_client::MaintenanceClient;
use mainstay::wire::etcdserverpb::{RangeRequest, StatusRequest};
use tonic::transport::{Channel, Endpoint};

/// A node that takes longer is taken for one that does not answer.
const ANSWER_TIME_MAX: Duration = Duration::from_millis(1500);

/// How a node sees its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub member: u64,
    /// 0 when it knows none.
    pub leader: u64,
    pub term: u64,
    pub applied: u64,
    pub is_learner: bool,
    /// Alarms and other trouble, in the node's words.
    pub errors: Vec<String>,
}

async fn in_time<T>(what: &str, answer: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    match tokio::time::timeout(ANSWER_TIME_MAX, answer).await {
        Ok(answer) => answer,
        Err(_) => bail!("{what}: no answer in {ANSWER_TIME_MAX:?}"),
    }
}

async fn connect(url: &str) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(url.to_owned())?.connect_timeout(ANSWER_TIME_MAX);
    endpoint.connect().await.with_context(|| format!("connecting to {url}"))
}

/// Asks the node at `url` for its status.
///
/// # Errors
/// When it does not answer in time.
pub async fn status(url: &str) -> anyhow::Result<Status> {
    in_time("status", async {
        let mut client = MaintenanceClient::new(connect(url).await?);
        let got = client.status(StatusRequest {}).await?.into_inner();
        let header = got.header.context("a status without a header")?;
        Ok(Status {
            member: header.member_id,
            leader: got.leader,
            term: got.raft_term,
            applied: got.raft_applied_index,
            is_learner: got.is_learner,
            errors: got.errors,
        })
    })
    .await
}

/// Reads linearizably through the node at `url`; gives the store's revision.
///
/// # Errors
/// When it does not answer in time, or refuses.
pub async fn read(url: &str) -> anyhow::Result<i64> {
    in_time("a linearizable read", async {
        let mut client = KvClient::new(connect(url).await?);
        let request = RangeRequest { key: b"settled".to_vec().into(), ..RangeRequest::default() };
        let got = client.range(request).await?.into_inner();
        Ok(got.header.context("an answer without a header")?.revision)
    })
    .await
}
