//! Churn: a client at every host, members or not, reads, writes and lists the
//! members, while faults add, remove and replace nodes.
//!
//! A client stays with its host through all of that: the host of a removed
//! member is where a stale answer would come from.

use std::sync::{Arc, Mutex};

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
pub struct Membership {
    shape: Arc<Mutex<Shape>>,
}

/// What the cluster was when the run began.
#[derive(Clone, Copy, Default)]
struct Shape {
    members: usize,
    hosts: usize,
}

impl Workload for Membership {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        let hosts = context.hosts.hosts.len();
        *self.shape.lock().expect("nobody panics with it") =
            Shape { members: context.hosts.members().len(), hosts };
        Box::pin(async move {
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
        let Shape { members, hosts } = *self.shape.lock().expect("nobody panics with it");
        let mut verdicts = judge::membership::check(history);
        // As long as nobody was removed, there is nothing to claim about the removed.
        verdicts.retain(|verdict| verdict.checked > 0 || !verdict.held() || was_anyone_removed(history));
        verdicts.extend(judge::member_lists::check(history, members, hosts));
        verdicts
    }
}

/// Whether a member was removed that still ran, and so could have served. One whose disk is damaged does not run.
fn was_anyone_removed(history: &History) -> bool {
    history
        .faults
        .iter()
        .any(|fault| matches!(fault.name, "grow-shrink" | "remove-leader") && fault.effect.is_ok())
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
