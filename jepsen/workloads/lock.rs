//! Locks: clients with leases take turns at the Lock service, and whoever has
//! the turn appends to a list that it read before.
//!
//! A fenced append holds only while the key of its turn is there, and must
//! never be lost. An unfenced one is lost whenever a client believes too long
//! that it has the turn, as etcd's own documentation warns: that is reported
//! and claimed by nobody. Now and then a client forgets to keep its lease alive
//! and is late with its append, to make sure that the fence is met.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use rand::RngExt;
use tokio::task::JoinSet;

use super::crew::{self, Worker};
use super::{Work, Workload};
use crate::client::Client;
use crate::context::Context;
use crate::judge;
use crate::judge::history::{
    Action, ActionReply, Body, Call, Compare, History, Kv, Operand, Outcome, Relation, Span, Txn,
};
use crate::judge::verdict::Verdict;

const NAME: &str = "lock";
/// Contenders for each lock.
const CONTENDERS: usize = 4;
/// Elements after which a list is left for the next: every append carries the whole list.
const ELEMENTS_MAX: usize = 60;
/// How long a contender waits for its turn.
const TURN_TIME_MAX: Duration = Duration::from_secs(6);
/// How many members are asked to end a lease before it is left to run out.
const LEAVE_TRIES_MAX: usize = 3;
/// Turns with one lease.
const TURNS_MAX: usize = 8;

/// See the module.
#[derive(Default)]
pub struct Lock;

impl Workload for Lock {
    fn name(&self) -> &'static str {
        NAME
    }

    fn drive(&self, context: Arc<Context>) -> Work {
        Box::pin(async move {
            let mut crew = JoinSet::new();
            for (number, fenced) in [true, false].into_iter().enumerate() {
                let list = Arc::new(AtomicUsize::new(0));
                for contender in 0..CONTENDERS {
                    let index = number * CONTENDERS + contender;
                    let worker = Worker::new(&context, NAME, index, 2 * CONTENDERS);
                    let contender = Contender {
                        locker: Client::new(&context, NAME, worker.client.node())
                            .with_deadline(TURN_TIME_MAX),
                        worker,
                        fenced,
                        list: Arc::clone(&list),
                        moves: 0,
                    };
                    crew.spawn(contender.contend());
                }
            }
            while let Some(ended) = crew.join_next().await {
                ended?;
            }
            Ok(())
        })
    }

    fn finish(&self, context: Arc<Context>) -> Work {
        Box::pin(async move {
            for fenced in [true, false] {
                crew::read_finally(&context, NAME, Span::prefix(&lists(fenced))).await?;
            }
            Ok(())
        })
    }

    fn judge(&self, history: &History) -> Vec<Verdict> {
        judge::lock::check(history, NAME)
    }
}

/// Where the lists are.
fn lists(fenced: bool) -> String {
    format!("{NAME}/{}/", if fenced { "fenced" } else { "unfenced" })
}

/// A client that wants its turns.
struct Contender {
    worker: Worker,
    /// Waits for turns, which takes longer than other calls may.
    locker: Client,
    fenced: bool,
    /// The list in use, shared with the other contenders.
    list: Arc<AtomicUsize>,
    /// How often it went on to another member, because one did not do as asked.
    moves: usize,
}

impl Contender {
    /// One lease after the other, until the run is over.
    async fn contend(mut self) {
        let mut keeper = Client::new(&self.worker.context, NAME, self.worker.client.node());
        while self.worker.turn(1).await {
            self.stand();
            let id = self.worker.rng.random_range(1..i64::MAX);
            let ttl_s = self.worker.rng.random_range(2..=4);
            let granted = self.worker.client.call(Call::LeaseGrant { id, ttl_s }).await;
            if !matches!(granted, Outcome::Ok(_)) {
                self.moves += 1;
                continue;
            }
            let forgetful = AtomicBool::new(false);
            tokio::select! {
                () = self.take_turns(id, ttl_s, &forgetful) => {}
                () = keep_alive(&mut keeper, id, ttl_s, &forgetful) => {}
            }
            self.leave(id).await;
        }
    }

    /// Turns to the member that its moves have brought it to.
    fn stand(&mut self) {
        let members = self.worker.context.hosts.members();
        if !members.is_empty() {
            let at = members[(self.worker.index + self.moves) % members.len()];
            self.worker.client.turn_to(at);
            self.locker.turn_to(at);
        }
    }

    /// Ends its lease, at whichever member does that: with it goes its place in the queue, for which the
    /// others would have to wait.
    async fn leave(&mut self, lease: i64) {
        for _ in 0..LEAVE_TRIES_MAX {
            match self.worker.client.call(Call::LeaseRevoke { id: lease }).await {
                Outcome::Ok(_) => return,
                Outcome::Failed(_) | Outcome::Unknown(_) => self.moves += 1,
            }
            self.stand();
        }
    }

    /// Takes turns until one did not go as it should.
    async fn take_turns(&mut self, lease: i64, ttl_s: i64, forgetful: &AtomicBool) {
        let name = format!("{NAME}/turn/{}", if self.fenced { "fenced" } else { "unfenced" });
        for _ in 0..TURNS_MAX {
            if !self.worker.turn(5).await {
                return;
            }
            self.stand();
            let locked = self.locker.call(Call::Lock { name: name.clone(), lease }).await;
            let Some(key) = key_of(&locked) else { return };
            if !self.append(&key, ttl_s, forgetful).await {
                return;
            }
            let unlocked = self.worker.client.call(Call::Unlock { key }).await;
            if !matches!(unlocked, Outcome::Ok(_)) {
                return;
            }
        }
    }

    /// Reads the list and, some time later, appends to what was read. Returns whether the turn may go on.
    async fn append(&mut self, key: &str, ttl_s: i64, forgetful: &AtomicBool) -> bool {
        let number = self.list.load(Ordering::Relaxed);
        let list = format!("{}{number}", lists(self.fenced));
        let look = |key: &str| Action::Range { span: Span::key(key), revision: 0, limit: 0 };
        let both = Txn { success: vec![look(key), look(&list)], ..Txn::default() };
        let Some([turn, old]) = first_of_two(&self.worker.client.call(Call::Txn(both)).await) else {
            return false;
        };
        // The turn is over already.
        let Some(turn) = turn else { return false };
        let old = old.map(|kv| kv.value).unwrap_or_default();
        if old.split(',').count() >= ELEMENTS_MAX {
            let _ = self.list.compare_exchange(number, number + 1, Ordering::Relaxed, Ordering::Relaxed);
        }
        self.be_busy(ttl_s, forgetful).await;
        let element = self.worker.number();
        let value = if old.is_empty() { element.to_string() } else { format!("{old},{element}") };
        let fence = Compare {
            key: key.to_owned(),
            relation: Relation::Equal,
            operand: Operand::CreateRevision(turn.create_revision),
        };
        let append = Txn {
            compares: if self.fenced { vec![fence] } else { Vec::new() },
            success: vec![Action::Put { key: list, value, lease: 0, prev_kv: false }],
            failure: Vec::new(),
        };
        let appended = self.worker.client.call(Call::Txn(append)).await;
        forgetful.store(false, Ordering::Relaxed);
        crew::succeeded(&appended).unwrap_or(false)
    }

    /// The time between reading and appending: mostly none, sometimes longer than the lease lives.
    async fn be_busy(&mut self, ttl_s: i64, forgetful: &AtomicBool) {
        let busy_ms = match self.worker.pick(20) {
            0 => {
                forgetful.store(true, Ordering::Relaxed);
                ttl_s.unsigned_abs() * 1000 + self.worker.rng.random_range(500..2000)
            }
            1..5 => self.worker.rng.random_range(50..300),
            _ => return,
        };
        self.worker.context.sleep(Duration::from_millis(busy_ms)).await;
    }
}

/// Renews the lease until it is told that it is gone; does not while its holder is forgetful.
async fn keep_alive(keeper: &mut Client, id: i64, ttl_s: i64, forgetful: &AtomicBool) {
    loop {
        tokio::time::sleep(Duration::from_millis(ttl_s.unsigned_abs() * 1000 / 3)).await;
        if forgetful.load(Ordering::Relaxed) {
            continue;
        }
        if let Outcome::Ok(reply) = keeper.call(Call::LeaseKeepAlive { id }).await
            && matches!(reply.body, Body::Lease { ttl_s: ..=0, .. })
        {
            // Its holder finds out by itself.
            std::future::pending::<()>().await;
        }
    }
}

fn key_of(locked: &Outcome) -> Option<String> {
    match locked {
        Outcome::Ok(reply) => match &reply.body {
            Body::Locked { key } => Some(key.clone()),
            _ => None,
        },
        Outcome::Failed(_) | Outcome::Unknown(_) => None,
    }
}

/// The first key of each of two ranges read at once.
fn first_of_two(outcome: &Outcome) -> Option<[Option<Kv>; 2]> {
    let Outcome::Ok(reply) = outcome else { return None };
    let Body::Txn { replies, .. } = &reply.body else { return None };
    let mut found = replies.iter().map(|reply| match reply {
        ActionReply::Range { kvs, .. } => kvs.first().cloned(),
        ActionReply::Put { .. } | ActionReply::Delete { .. } => None,
    });
    Some([found.next()?, found.next()?])
}
