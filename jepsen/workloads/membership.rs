//! Churn: a client at every host, members or not, reads, writes and lists the
//! members, while faults add, remove and replace nodes.
//!
//! A client stays with its host through all of that: the host of a removed
//! member is where a stale answer would come from.

use std::sync::Arc;

use tokio::task::JoinSet;

use super::crew::{self, Worker};
use super::{Work, Workload};
use crate::context::Context;
use crate::judge;
use crate::judge::history::{Action, Call, History, Span};
use crate::judge::verdict::Verdict;

const NAME: &str = "membership";
const KEYS: usize = 6;
/// Clients of each host.
const CLIENTS: usize = 2;

/// See the module.
#[derive(Default)]
pub struct Membership;

impl Workload for Membership {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        Box::pin(async move {
            let hosts = context.hosts.hosts.len();
            let mut crew = JoinSet::new();
            for index in 0..hosts * CLIENTS {
                let worker = Worker::new(&context, NAME, index, hosts * CLIENTS);
                crew.spawn(stay(worker, index % hosts));
            }
            while let Some(ended) = crew.join_next().await {
                ended?;
            }
            Ok(())
        })
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        Box::pin(async move {
            crew::read_finally(&context, NAME, Span::prefix("membership/")).await?;
            for (first, _) in context.hosts.members().into_iter().enumerate() {
                crew::insist(&context, NAME, first, Call::MemberList).await?;
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        // A removed member's stale answer to a read also contradicts the order of all revisions.
        let mut verdicts = judge::membership::check(history);
        verdicts.extend(judge::revision_order::check(history));
        verdicts
    }
}

async fn stay(mut worker: Worker, host: usize) {
    while worker.turn(1).await {
        worker.client.turn_to(host);
        let key = format!("{NAME}/{}", worker.pick(KEYS));
        let call = match worker.pick(100) {
            0..35 => {
                let action = Action::Put { key, value: worker.value(), lease: 0, prev_kv: false };
                Call::Single { action, serializable: false }
            }
            35..80 => {
                let action = Action::Range { span: Span::key(key), revision: 0, limit: 0 };
                Call::Single { action, serializable: false }
            }
            _ => Call::MemberList,
        };
        worker.client.call(call).await;
    }
}
