//! Serializable reads: what a member has, which may be old.
//!
//! Claim: such a read is old at worst. It shows the state at the revision that
//! it names, never goes back on one connection, and is never from the future.
//! Every worker stays with one member, also one that is cut off from the others.

use std::sync::Arc;

use super::crew::{self, WORKERS, Worker};
use super::{Work, Workload};
use crate::context::Context;
use crate::judge::history::{Action, Call, History, Span};
use crate::judge::serializable;
use crate::judge::verdict::Verdict;

const NAME: &str = "serializable";
const KEYS: usize = 10;

/// The workload.
pub struct Serializable;

impl Workload for Serializable {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        crew::drive(context, NAME, WORKERS, work)
    }

    /// Every member is asked once more, from what it has.
    fn finish(&self, context: Arc<Context>) -> Work {
        Box::pin(async move {
            let action = Action::Range { span: Span::prefix("serializable/"), revision: 0, limit: 0 };
            for first in 0..context.hosts.members().len() {
                let call = Call::Single { action: action.clone(), serializable: true };
                crew::insist(&context, NAME, first, call).await?;
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        serializable::check(history, NAME)
    }
}

async fn work(mut worker: Worker) -> anyhow::Result<()> {
    while worker.turn(1).await {
        let (action, serializable) = draw(&mut worker);
        worker.client.call(Call::Single { action, serializable }).await;
    }
    Ok(())
}

/// Seven in ten are serializable reads, the others change something.
fn draw(worker: &mut Worker) -> (Action, bool) {
    let key = format!("{NAME}/{}", worker.pick(KEYS));
    match worker.pick(100) {
        0..35 => (Action::Range { span: Span::prefix("serializable/"), revision: 0, limit: 0 }, true),
        35..60 => (Action::Range { span: Span::key(key), revision: 0, limit: 0 }, true),
        60..70 => {
            let limit = 1 + worker.pick(KEYS) as i64;
            (Action::Range { span: Span::prefix("serializable/"), revision: 0, limit }, true)
        }
        70..95 => {
            let prev_kv = worker.chance(0.2);
            (Action::Put { key, value: worker.value(), lease: 0, prev_kv }, false)
        }
        _ => (Action::Delete { span: Span::key(key), prev_kv: false }, false),
    }
}
