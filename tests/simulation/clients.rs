//! Clients: each does one thing after another through any node, and tells the
//! oracle what it asked and what it was told.
//!
//! An answer that does not come, or that leaves it open, is no failure: the
//! client goes on, and the oracle knows from the log what happened.

use std::time::Duration;

use bytes::Bytes;
use mainstay::mvcc;
use mainstay::node::{NodeError, ProposeContext};
use mainstay::types::{
    ApplyError, Compare, CompareOp, CompareTarget, DeleteRange, KeyRange, LeaseId, Operation, Outcome, Put,
    RangeQuery, Reply, RequestId, Revision, Space, Txn, TxnOp,
};

use crate::chance::Chance;
use crate::oracle::ReadAnswer;
use crate::world::{Gone, PLACES, World};

/// How long a client waits for a node that does not answer.
const PATIENCE: Duration = Duration::from_secs(7);

/// What became of a write, as its client sees it.
#[derive(Debug)]
pub enum Told {
    /// It was applied, with this reply.
    Reply(Reply),
    /// It was certainly not done.
    NotDone,
    /// Nobody knows.
    Unknown,
}

/// A client and its chance.
pub struct Client {
    pub world: World,
    pub name: String,
    pub chance: Chance,
    /// The node it is connected to.
    place: usize,
}

impl Client {
    pub fn new(world: &World, name: String) -> Client {
        let chance = Chance::new(world.seed, &name);
        Client { world: world.clone(), name, chance, place: 0 }
    }

    /// The node to ask next: mostly the same, sometimes another.
    pub fn choose(&mut self) -> usize {
        let up = self.world.up();
        if !up.contains(&self.place) || self.chance.permille(250) {
            self.place = match up.is_empty() {
                true => self.chance.below(PLACES as u64) as usize,
                false => *self.chance.pick(&up),
            };
        }
        self.place
    }

    /// The next request goes to another node.
    pub fn move_on(&mut self) {
        self.place = PLACES;
    }

    pub async fn pause(&mut self, ms_max: u64) {
        let ms = self.chance.between(1, ms_max);
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    /// Proposes, and tells the oracle what it was told.
    pub async fn propose(&mut self, operation: Operation, request: Option<RequestId>) -> Told {
        let place = self.choose();
        self.propose_at(place, operation, request).await
    }

    pub async fn propose_at(
        &mut self,
        place: usize,
        operation: Operation,
        request: Option<RequestId>,
    ) -> Told {
        let (tag, floor) = self.world.oracle().begin();
        let timeout = Duration::from_millis(*self.chance.pick(&[700, 1500, 4000]));
        let context = ProposeContext { actor: Some(tag.as_str().into()), request, timeout: Some(timeout) };
        self.world.trace.line(format_args!(
            "{} {tag} at n{}: {operation:?} {request:?}",
            self.name,
            place + 1
        ));
        let work = self
            .world
            .at(place, &mut self.chance, move |node| async move { node.propose(operation, context).await });
        let told = tokio::time::timeout(PATIENCE, work).await;
        let trace = &self.world.trace;
        match told {
            Ok(Ok(Ok(reply))) => {
                trace.line(format_args!("{} {tag} was told {reply:?}", self.name));
                self.world.oracle().acknowledged(&tag, floor, &reply);
                Told::Reply(reply)
            }
            Ok(Ok(Err(error))) => {
                trace.line(format_args!("{} {tag} failed: {error}", self.name));
                if matches!(error, NodeError::Internal(_)) {
                    trace.count("internal errors");
                }
                match error.may_have_happened() {
                    true => {
                        trace.count("operations unknown");
                        Told::Unknown
                    }
                    false => {
                        self.world.oracle().not_done(tag);
                        Told::NotDone
                    }
                }
            }
            Ok(Err(Gone)) | Err(_) => {
                trace.line(format_args!("{} {tag} got no answer", self.name));
                trace.count("operations unknown");
                Told::Unknown
            }
        }
    }

    /// Reads, from a confirmed leader's state or from whatever the node has.
    pub async fn read(&mut self, query: RangeQuery, linearizable: bool) {
        let place = self.choose();
        self.read_at(place, query, linearizable).await;
    }

    pub async fn read_at(&mut self, place: usize, query: RangeQuery, linearizable: bool) {
        let (tag, floor) = self.world.oracle().begin();
        let asked = query.clone();
        let work = self.world.at(place, &mut self.chance, move |node| async move {
            if linearizable {
                node.read_barrier().await.map_err(|error| error.to_string())?;
            }
            let view = node.view();
            let marks = view.marks(Space::User);
            match mvcc::range(&view.data, marks, &query, 1 << 20) {
                Ok(reply) => Ok((view.applied.index, marks, Ok(reply))),
                Err(mvcc::ReadError::Refused(error)) => Ok((view.applied.index, marks, Err(error))),
                Err(mvcc::ReadError::Storage(error)) => Err(error.to_string()),
            }
        });
        let Ok(Ok(Ok((index, marks, reply)))) = tokio::time::timeout(PATIENCE, work).await else {
            return self.world.trace.count("reads without an answer");
        };
        let what = format!("{} {tag} at n{}", self.name, place + 1);
        self.world.trace.fold(index);
        let read = ReadAnswer { index, marks, query: asked, reply };
        self.world.oracle().read(&what, &read, linearizable.then_some(floor));
    }
}

/// One of a few keys, so that clients meet.
pub fn key(chance: &mut Chance) -> Bytes {
    let (group, number) = (chance.below(3), chance.below(6));
    Bytes::from(format!("{}/{number}", ["a", "b", "c"][group as usize]))
}

/// A range as clients ask for: one key, a group, a span, everything.
pub fn range(chance: &mut Chance) -> KeyRange {
    match chance.below(5) {
        0 | 1 => KeyRange::Single(key(chance)),
        2 => KeyRange::prefix(Bytes::from(["a/", "b/", "c/"][chance.below(3) as usize])),
        3 => {
            let (one, other) = (key(chance), key(chance));
            let (start, last) = if one <= other { (one, other) } else { (other, one) };
            KeyRange::Span { start, end: [&last[..], b"\0"].concat().into() }
        }
        _ => KeyRange::From(Bytes::from_static(b"\0")),
    }
}

fn put(chance: &mut Chance, key: Bytes, lease: LeaseId) -> Put {
    let mut value = format!("{:016x}", chance.next()).into_bytes();
    if chance.permille(100) {
        value.resize(chance.between(100, 3000) as usize, b'.');
    }
    let prev_kv = chance.permille(300);
    let keeps = chance.permille(60);
    let (ignore_value, ignore_lease) = (keeps && chance.permille(500), keeps && !lease.is_some());
    let value = if ignore_value { Bytes::new() } else { value.into() };
    Put { space: Space::User, key, value, lease, prev_kv, ignore_value, ignore_lease }
}

fn query(chance: &mut Chance, range: KeyRange) -> RangeQuery {
    let limit = if chance.permille(200) { chance.between(1, 4) } else { 0 };
    let (keys_only, count_only) = (chance.permille(100), chance.permille(100));
    RangeQuery {
        limit,
        keys_only: keys_only && !count_only,
        count_only,
        ..RangeQuery::all(Space::User, range)
    }
}

/// Something that changes the store, or tries to.
fn write(chance: &mut Chance) -> Operation {
    match chance.below(10) {
        0..=4 => {
            let key = key(chance);
            Operation::Put(put(chance, key, LeaseId::NONE))
        }
        5 | 6 => {
            let prev_kv = chance.permille(500);
            let range = if chance.permille(800) { KeyRange::Single(key(chance)) } else { range(chance) };
            Operation::DeleteRange(DeleteRange { space: Space::User, range, prev_kv })
        }
        _ => Operation::Txn(txn(chance)),
    }
}

fn compare(chance: &mut Chance) -> Compare {
    let range = if chance.permille(800) { KeyRange::Single(key(chance)) } else { range(chance) };
    let op = *chance.pick(&[CompareOp::Equal, CompareOp::Greater, CompareOp::Less, CompareOp::NotEqual]);
    let target = match chance.below(4) {
        0 => CompareTarget::Version(chance.below(4) as i64),
        1 => CompareTarget::Create(chance.below(600) as i64),
        2 => CompareTarget::Mod(chance.below(900) as i64),
        _ => CompareTarget::Value(Bytes::from(format!("{:x}", chance.below(16)))),
    };
    Compare { space: Space::User, range, op, target }
}

/// A branch that changes no key twice: each step has a group of its own.
fn branch(chance: &mut Chance) -> Vec<TxnOp> {
    let mut steps = Vec::new();
    for group in ["a/", "b/", "c/"] {
        let key = Bytes::from(format!("{group}{}", chance.below(6)));
        match chance.below(6) {
            0 | 1 => steps.push(TxnOp::Put(put(chance, key, LeaseId::NONE))),
            2 => {
                let range = match chance.permille(700) {
                    true => KeyRange::Single(key),
                    false => KeyRange::prefix(Bytes::from_static(group.as_bytes())),
                };
                steps.push(TxnOp::DeleteRange(DeleteRange { space: Space::User, range, prev_kv: true }));
            }
            3 => {
                let range = range(chance);
                steps.push(TxnOp::Range(query(chance, range)));
            }
            4 if chance.permille(300) => {
                let inner = Txn {
                    compare: vec![compare(chance)],
                    success: vec![TxnOp::Put(put(chance, key, LeaseId::NONE))],
                    failure: Vec::new(),
                };
                steps.push(TxnOp::Txn(inner));
            }
            _ => {}
        }
    }
    steps
}

fn txn(chance: &mut Chance) -> Txn {
    let compare = (0..chance.below(3)).map(|_| compare(chance)).collect();
    Txn { compare, success: branch(chance), failure: branch(chance) }
}

/// Puts, deletes, transactions, reads.
pub async fn mixed(mut client: Client, think_ms: u64) {
    while !client.world.is_ending() {
        if client.chance.permille(400) {
            let range = range(&mut client.chance);
            let mut query = query(&mut client.chance, range);
            if client.chance.permille(200) {
                let newest = client.world.oracle().model().revision() as u64;
                query.revision = Revision(newest.saturating_sub(client.chance.below(60)) as i64);
            }
            let linearizable = client.chance.permille(700);
            client.read(query, linearizable).await;
        } else {
            let operation = write(&mut client.chance);
            client.propose(operation, None).await;
        }
        client.pause(think_ms).await;
    }
}

/// Adds to a number by comparing and swapping, reading first.
pub async fn swapping(mut client: Client, think_ms: u64) {
    let key = Bytes::from_static(b"c/0");
    while !client.world.is_ending() {
        let place = client.choose();
        let asked = key.clone();
        let work = client.world.at(place, &mut client.chance, move |node| async move {
            node.read_barrier().await.ok()?;
            let view = node.view();
            let query = RangeQuery::all(Space::User, KeyRange::Single(asked));
            let found = mvcc::range(&view.data, view.marks(Space::User), &query, 1 << 20).ok()?;
            Some(found.kvs.first().map_or(Revision(0), |kv| kv.mod_revision))
        });
        if let Ok(Ok(Some(seen))) = tokio::time::timeout(PATIENCE, work).await {
            let compare = Compare {
                space: Space::User,
                range: KeyRange::Single(key.clone()),
                op: CompareOp::Equal,
                target: CompareTarget::Mod(seen.0),
            };
            let success = vec![TxnOp::Put(put(&mut client.chance, key.clone(), LeaseId::NONE))];
            let failure = vec![TxnOp::Range(RangeQuery::all(Space::User, KeyRange::Single(key.clone())))];
            client.propose(Operation::Txn(Txn { compare: vec![compare], success, failure }), None).await;
        }
        client.pause(think_ms).await;
    }
}

/// Opens sessions and repeats what it has no answer to, through other nodes,
/// until it has one; sometimes it does not even wait for the first.
pub async fn repeating(mut client: Client, think_ms: u64) {
    while !client.world.is_ending() {
        let ttl_s = client.chance.between(3, 8);
        let opened = client.propose(Operation::SessionOpen { ttl_s }, None).await;
        let Told::Reply(Reply { outcome: Ok(Outcome::Session { id }), .. }) = opened else {
            client.pause(think_ms * 4).await;
            continue;
        };
        use_session(&mut client, id, think_ms).await;
    }
}

async fn use_session(client: &mut Client, session: u64, think_ms: u64) {
    let mut acknowledged = 0;
    for sequence in 1..=client.chance.between(5, 60) {
        let operation = write(&mut client.chance);
        let request = RequestId { session, sequence, acknowledged };
        let attempts_max = if client.world.is_ending() { 1 } else { 20 };
        let mut settled = false;
        for attempt in 0..attempts_max {
            if attempt > 0 {
                client.move_on();
                client.pause(100).await;
            }
            match client.propose(operation.clone(), Some(request)).await {
                Told::Reply(Reply { outcome: Err(ApplyError::SessionNotFound { .. }), .. }) => return,
                // Once more, although it is settled: the answer must be the same.
                Told::Reply(_) if client.chance.permille(100) => settled = true,
                Told::Reply(_) => {
                    settled = true;
                    break;
                }
                Told::NotDone | Told::Unknown => {}
            }
            if client.world.is_ending() {
                break;
            }
        }
        if !settled {
            return;
        }
        if client.chance.permille(800) {
            acknowledged = sequence;
        }
        // Now and then so long that the session may run out.
        let pause_ms = if client.chance.permille(15) { 9_000 } else { think_ms };
        client.pause(pause_ms).await;
    }
}

/// Grants leases, hangs keys on them, keeps them alive for a while, and lets
/// them go or ends them.
pub async fn leasing(mut client: Client, think_ms: u64) {
    while !client.world.is_ending() {
        let id = LeaseId((client.chance.next() >> 1) as i64 | 1);
        let ttl_s = client.chance.between(1, 5) as i64;
        let asked_ms = client.world.trace.now_ms();
        let granted = client.propose(Operation::LeaseGrant { id, ttl_s }, None).await;
        let Told::Reply(Reply { outcome: Ok(Outcome::LeaseGrant { ttl_s, .. }), .. }) = granted else {
            client.pause(think_ms * 4).await;
            continue;
        };
        client.world.oracle().promised(id, asked_ms, ttl_s);
        for _ in 0..client.chance.below(3) {
            let key = key(&mut client.chance);
            let put = put(&mut client.chance, key, id);
            client.propose(Operation::Put(put), None).await;
        }
        let mut alive = true;
        for _ in 0..client.chance.below(12) {
            let pause_ms = 1000 * ttl_s as u64 / 2;
            client.pause(pause_ms).await;
            alive = keep_alive(&mut client, id).await;
            if !alive || client.world.is_ending() {
                break;
            }
        }
        if alive && client.chance.permille(300) {
            client.propose(Operation::LeaseRevoke { id }, None).await;
        }
        client.pause(think_ms * 4).await;
    }
}

/// False when the lease is gone.
async fn keep_alive(client: &mut Client, id: LeaseId) -> bool {
    let place = client.choose();
    let asked_ms = client.world.trace.now_ms();
    let work = client
        .world
        .at(place, &mut client.chance, move |node| async move { node.lease_keep_alive(id).await });
    let told = tokio::time::timeout(PATIENCE, work).await;
    client.world.trace.line(format_args!("{} keeps {id} alive: {told:?}", client.name));
    match told {
        Ok(Ok(Ok(0))) => {
            client.world.oracle().told_gone(id);
            false
        }
        Ok(Ok(Ok(ttl_s))) => {
            client.world.trace.count("leases kept alive");
            client.world.oracle().promised(id, asked_ms, ttl_s);
            true
        }
        _ => true,
    }
}

/// Forgets history now and then.
pub async fn compacting(mut client: Client) {
    while !client.world.is_ending() {
        client.pause(3000).await;
        let newest = client.world.oracle().model().revision();
        let kept = *client.chance.pick(&[0, 10, 60]);
        let revision = Revision((newest - client.chance.below(kept + 1) as i64).max(1));
        let told = client.propose(Operation::Compact { space: Space::User, revision }, None).await;
        if let Told::Reply(Reply { outcome: Ok(_), .. }) = told {
            client.world.trace.count("compactions");
        }
    }
}
