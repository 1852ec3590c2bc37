//! One stream of watchers: what to say next.
//!
//! The task that serves the client owns the [`WatchStream`] and asks it for
//! messages one by one, so a client that does not read holds nothing but
//! its cursors. The hub only marks which watchers a revision concerns.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::task::{Context, Poll};

use futures_util::task::AtomicWaker;

use super::cursor::{Mode, StreamShared, StreamState, Watcher, WatcherState};
use super::history::{Chunk, Past, PastQuery};
use super::hub::Hub;
use super::ring::{Entry, WatchEvent};
use super::{CreateError, WatchMessage, WatchMessageKind, WatchSpec};
use crate::mutant::{self, Mutant};
use crate::storage::StorageError;
use crate::types::{KeyRange, Revision, Space};

/// Entries of the ring a watcher behind looks through at once.
const RING_STEP: usize = if cfg!(test) { 3 } else { 256 };
/// Steps without a message after which a stream lets other tasks run.
const STEPS_PER_TURN: usize = 32;

/// The watchers of one gRPC stream; owned by the task that serves it.
pub struct WatchStream {
    hub: Arc<Hub>,
    number: u64,
    shared: Arc<StreamShared>,
    /// The next automatic id, unless the client has taken it.
    next_id: i64,
    /// The read of the past in flight, at most one for each stream.
    step: Option<Step>,
    /// Whether a watcher that is behind has the next turn.
    behind_first: bool,
    /// Followed while the client waits for progress.
    matched: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

type Step = Pin<Box<dyn Future<Output = (Arc<Watcher>, Result<Caught, StorageError>)> + Send>>;

/// What a read of the past brought.
enum Caught {
    /// A piece of the past of all keys.
    Chunk(Arc<Chunk>),
    /// The watcher's own events, and the next revision to ask for.
    Own(Vec<Arc<WatchEvent>>, Revision),
    /// The watcher's position lies below this compact mark.
    Compacted(Revision),
}

impl WatchStream {
    pub(super) fn new(hub: Arc<Hub>, number: u64, shared: Arc<StreamShared>) -> WatchStream {
        WatchStream { hub, number, shared, next_id: 0, step: None, behind_first: false, matched: None }
    }

    /// Says, in its turn among what the client's other requests cause, that a
    /// watcher was not created.
    pub fn refuse(&mut self, reason: String) {
        let message =
            WatchMessage { watch_id: -1, revision: self.revision(), kind: WatchMessageKind::Refused(reason) };
        self.shared.state.lock().outbox.push_back(message);
    }

    /// Adds a watcher; a `Created` message follows. Without an id it gets the next
    /// number from 0 that is not in use; numbers are not given out twice.
    ///
    /// # Errors
    /// [`CreateError`]; the stream goes on.
    pub fn create(&mut self, id: Option<i64>, spec: WatchSpec) -> Result<i64, CreateError> {
        if spec.range.is_empty() {
            return Err(CreateError::EmptyRange);
        }
        let id = self.choose_id(id)?;
        let position = self.hub.history.position(spec.space);
        let start = spec.start;
        let cursor = match start.0 {
            0 => position.revision.next(),
            _ if mutant::is(Mutant::WatchSkipsOnResume) && start <= position.revision => start.next(),
            _ => start,
        };
        let message = |kind| WatchMessage { watch_id: id, revision: position.revision, kind };
        let compacted = cursor < position.compacted;
        let progress = spec.progress_notify && !compacted;
        let stream = self.shared.clone();
        let make = |number| Watcher { number, due_tick: AtomicU64::new(0), stream, id, spec };
        let watcher = self.hub.register(progress, make);
        if compacted {
            self.hub.unregister([&watcher]);
        }
        let mut state = self.shared.state.lock();
        let state = &mut *state;
        state.outbox.push_back(message(WatchMessageKind::Created));
        let mode = if compacted {
            let compact_revision = position.compacted;
            state.outbox.push_back(message(WatchMessageKind::Compacted { compact_revision }));
            Mode::Gone
        } else {
            self.hub.gauges.watchers.increment(1.0);
            Mode::Live(VecDeque::new())
        };
        let behind = !compacted && cursor <= self.hub.matching();
        state.watchers.insert(id, WatcherState { watcher, cursor, mode, heard_tick: self.hub.tick() });
        if behind {
            state.fall_behind(&self.hub, id, cursor);
        }
        Ok(id)
    }

    fn choose_id(&mut self, id: Option<i64>) -> Result<i64, CreateError> {
        let state = self.shared.state.lock();
        match id {
            Some(id) if state.watchers.contains_key(&id) => Err(CreateError::DuplicateId),
            Some(id) => Ok(id),
            None => {
                while state.watchers.contains_key(&self.next_id) {
                    self.next_id += 1;
                }
                self.next_id += 1;
                Ok(self.next_id - 1)
            }
        }
    }

    /// Removes a watcher; a `Canceled` message follows. Unknown ids are ignored.
    pub fn cancel(&mut self, id: i64) {
        let revision = self.revision();
        let mut state = self.shared.state.lock();
        let Some(removed) = state.watchers.remove(&id) else { return };
        state.progress.remove(&id);
        if matches!(removed.mode, Mode::Behind) {
            state.leave_behind(&self.hub);
        }
        state.outbox.push_back(WatchMessage { watch_id: id, revision, kind: WatchMessageKind::Canceled });
        drop(state);
        if !matches!(removed.mode, Mode::Gone) {
            self.hub.unregister([&removed.watcher]);
            self.hub.gauges.watchers.decrement(1.0);
        }
    }

    /// Asks for one progress message (id -1), to be sent as soon as every watcher
    /// has been sent everything up to the present revision. Requests that wait
    /// together get one answer; a stream without watchers gives none, as in etcd.
    pub fn request_progress(&mut self) {
        let revision = self.revision();
        if mutant::is(Mutant::ProgressBeforeEvents) {
            let message = WatchMessage { watch_id: -1, revision, kind: WatchMessageKind::Progress };
            return self.shared.state.lock().outbox.push_front(message);
        }
        self.shared.state.lock().progress_all = Some(revision);
        self.follow_matched();
    }

    /// The store's revision, for messages that are about the stream.
    pub fn revision(&self) -> Revision {
        self.hub.history.position(Space::User).revision
    }

    /// The next message; `None` once the hub is closed. Cancel-safe.
    pub async fn next(&mut self) -> Option<WatchMessage> {
        poll_fn(|context| self.poll_next(context)).await
    }

    /// What [`WatchStream::poll_next`] last registered its task with, before it
    /// looked at anything: for who else has something to wake that task for.
    pub fn task(&self) -> &Arc<AtomicWaker> {
        &self.shared.task
    }

    /// [`WatchStream::next`], for who has other things to wait for. Wakes the task
    /// that asked last.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<WatchMessage>> {
        // First, so that what comes while the rest is looked at is not missed.
        self.shared.task.register(context.waker());
        for _ in 0..STEPS_PER_TURN {
            if self.hub.is_closed() {
                return Poll::Ready(None);
            }
            if let Some(message) = self.say() {
                return Poll::Ready(Some(message));
            }
            if !self.work() && !self.heard(context) {
                return Poll::Pending;
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Takes in what was read of the past, and whether revisions were matched.
    /// False when there is only to wait.
    fn heard(&mut self, context: &mut Context<'_>) -> bool {
        if let Some(step) = &mut self.step
            && let Poll::Ready((watcher, caught)) = step.as_mut().poll(context)
        {
            self.step = None;
            match caught {
                Ok(caught) => self.take_in(&watcher, caught),
                Err(error) => self.hub.fail(error),
            }
            return true;
        }
        let Some(matched) = &mut self.matched else { return false };
        match matched.as_mut().poll(context) {
            Poll::Ready(()) => {
                self.follow_matched();
                true
            }
            Poll::Pending => false,
        }
    }

    /// Hears of the revisions matched from now on.
    fn follow_matched(&mut self) {
        let mut matched = self.hub.matched().subscribe();
        // The hub, which this stream keeps alive, owns the sender.
        self.matched = Some(Box::pin(async move { drop(matched.changed().await) }));
    }

    /// What is decided, or can be decided without a step.
    fn say(&mut self) -> Option<WatchMessage> {
        let mut state = self.shared.state.lock();
        if state.outbox.is_empty() {
            self.announce_progress(&mut state);
        }
        if state.progress_all.is_none() {
            self.matched = None;
        }
        let message = state.outbox.pop_front()?;
        drop(state);
        if let WatchMessageKind::Events { events, .. } = &message.kind {
            self.hub.gauges.events_sent.increment(events.len() as u64);
        }
        Some(message)
    }

    /// Puts the progress messages that are due into the outbox, which is empty.
    fn announce_progress(&self, state: &mut StreamState) {
        if state.progress.is_empty() && state.progress_all.is_none() {
            return;
        }
        // Read under the stream's lock: of every revision up to this one the
        // stream was told before.
        let matched = *self.hub.matched().borrow();
        let synced = |found: &WatcherState| match &found.mode {
            Mode::Live(pending) => {
                pending.is_empty() && found.cursor <= matched.next() && found.watcher.spec.start <= matched
            }
            Mode::Behind => false,
            Mode::Gone => true,
        };
        let progress =
            |watch_id| WatchMessage { watch_id, revision: matched, kind: WatchMessageKind::Progress };
        // Who is not synced has events coming, or asks again an interval later.
        for id in std::mem::take(&mut state.progress) {
            let live = state.watchers.get(&id).filter(|found| matches!(found.mode, Mode::Live(_)));
            if live.is_some_and(synced) {
                state.outbox.push_back(progress(id));
            }
        }
        let Some(wanted) = state.progress_all else { return };
        if state.watchers.values().all(|found| matches!(found.mode, Mode::Gone)) {
            state.progress_all = None;
        } else if matched >= wanted && state.behind_count == 0 && state.watchers.values().all(synced) {
            state.progress_all = None;
            state.outbox.push_back(progress(-1));
        }
    }

    /// One step for one watcher. False when there is nothing to do but wait.
    fn work(&mut self) -> bool {
        self.behind_first = !self.behind_first;
        let mut kinds: [fn(&mut Self) -> bool; 2] = [Self::work_behind, Self::work_live];
        if !self.behind_first {
            kinds.reverse();
        }
        kinds.iter().any(|work| work(self))
    }

    /// Sends a live watcher what waits for it, as much as one message takes.
    fn work_live(&mut self) -> bool {
        let mut state = self.shared.state.lock();
        let state = &mut *state;
        let Some(id) = state.ready.pop_front() else { return false };
        let Some(found) = state.watchers.get_mut(&id) else { return true };
        let Mode::Live(pending) = &mut found.mode else { return true };
        let entries: Vec<_> = {
            let ring = self.hub.ring.lock();
            pending.iter().map_while(|revision| ring.get(*revision).cloned()).collect()
        };
        if entries.is_empty() {
            if let Some(first) = pending.front().copied() {
                state.fall_behind(&self.hub, id, first);
            }
            return true;
        }
        let (events, next) = collect(&found.watcher, &entries, self.hub.options.message_bytes);
        found.cursor = next;
        while pending.front().is_some_and(|revision| *revision < next) {
            pending.pop_front();
        }
        if !pending.is_empty() {
            state.ready.push_back(id);
        }
        self.post(state, id, events, next.prev());
        true
    }

    /// Lets a watcher that is behind look through a piece of the ring or of a
    /// chunk, or starts a read for it.
    fn work_behind(&mut self) -> bool {
        if self.step.is_some() {
            return false;
        }
        let (watcher, cursor) = {
            let mut state = self.shared.state.lock();
            let Some(id) = state.behind.pop_front() else { return false };
            match state.watchers.get(&id) {
                Some(found) if matches!(found.mode, Mode::Behind) => (found.watcher.clone(), found.cursor),
                _ => return true,
            }
        };
        let slice = self.hub.ring.lock().slice(cursor, RING_STEP);
        if let Some(entries) = slice {
            let (events, next) = collect(&watcher, &entries, self.hub.options.message_bytes);
            self.advance(&watcher, events, next.max(cursor));
            return true;
        }
        let compacted = self.hub.history.position(watcher.spec.space).compacted;
        if cursor < compacted {
            self.take_in(&watcher, Caught::Compacted(compacted));
            return true;
        }
        if shares_reads(&watcher.spec)
            && let Some(chunk) = self.hub.chunks.find(watcher.spec.space, cursor)
        {
            self.take_in(&watcher, Caught::Chunk(chunk));
            return true;
        }
        let hub = self.hub.clone();
        self.step = Some(Box::pin(async move {
            let caught = read_past(hub, &watcher.spec, cursor).await;
            (watcher, caught)
        }));
        true
    }

    /// Gives a watcher what was read for it.
    fn take_in(&mut self, watcher: &Arc<Watcher>, caught: Caught) {
        match caught {
            Caught::Chunk(chunk) => {
                let cursor = self.shared.state.lock().get_mut(watcher).map(|found| found.cursor);
                let Some(cursor) = cursor else { return };
                let mut events = chunk.select(watcher.range(), cursor);
                events.retain(|event| watcher.wants(event.event().kind));
                self.advance(watcher, events, chunk.next);
            }
            Caught::Own(mut events, next) => {
                events.retain(|event| watcher.wants(event.event().kind));
                self.advance(watcher, events, next);
            }
            Caught::Compacted(compact_revision) => {
                let revision = self.revision();
                let mut state = self.shared.state.lock();
                let Some(found) = state.get_mut(watcher) else { return };
                found.mode = Mode::Gone;
                let kind = WatchMessageKind::Compacted { compact_revision };
                state.outbox.push_back(WatchMessage { watch_id: watcher.id, revision, kind });
                state.leave_behind(&self.hub);
                drop(state);
                self.hub.unregister([watcher]);
                self.hub.gauges.watchers.decrement(1.0);
            }
        }
    }

    /// Moves a watcher that is behind to `next`, and makes it live when it has met
    /// the hub there.
    fn advance(&self, watcher: &Watcher, events: Vec<Arc<WatchEvent>>, next: Revision) {
        let mut state = self.shared.state.lock();
        let Some(found) = state.get_mut(watcher) else { return };
        found.cursor = next;
        if next > self.hub.matching() {
            found.mode = Mode::Live(VecDeque::new());
            state.leave_behind(&self.hub);
        } else {
            state.behind.push_back(watcher.id);
        }
        self.post(&mut state, watcher.id, events, next.prev());
    }

    /// Puts events into the outbox: one message, or its fragments.
    fn post(&self, state: &mut StreamState, id: i64, events: Vec<Arc<WatchEvent>>, revision: Revision) {
        if events.is_empty() {
            return;
        }
        state.progress.remove(&id);
        let Some(found) = state.watchers.get_mut(&id) else { return };
        found.heard_tick = self.hub.tick();
        let spec = &found.watcher.spec;
        let prev_kv = spec.prev_kv;
        let limit = if spec.fragment { self.hub.options.fragment_bytes } else { usize::MAX };
        let mut parts = split(events, prev_kv, limit).into_iter().peekable();
        while let Some(events) = parts.next() {
            let fragment = parts.peek().is_some();
            let kind = WatchMessageKind::Events { events, prev_kv, fragment };
            state.outbox.push_back(WatchMessage { watch_id: id, revision, kind });
        }
    }
}

impl Drop for WatchStream {
    fn drop(&mut self) {
        // Taking the watchers out also breaks the circle of each with its stream.
        let watchers = std::mem::take(&mut self.shared.state.lock().watchers);
        let behind = watchers.values().filter(|found| matches!(found.mode, Mode::Behind)).count();
        let watching: Vec<_> = watchers.values().filter(|found| !matches!(found.mode, Mode::Gone)).collect();
        self.hub.unregister(watching.iter().map(|found| &found.watcher));
        self.hub.gauges.slow.decrement(behind as f64);
        self.hub.gauges.watchers.decrement(watching.len() as f64);
        self.hub.forget(self.number);
    }
}

/// What of `entries`, whole revisions, concerns a watcher, until a message is
/// full; and the revision after the last looked at. 0 when there are none.
fn collect(watcher: &Watcher, entries: &[Arc<Entry>], bytes_max: usize) -> (Vec<Arc<WatchEvent>>, Revision) {
    let (mut events, mut bytes, mut next) = (Vec::new(), 0, Revision(0));
    for entry in entries {
        if bytes >= bytes_max {
            break;
        }
        for event in entry.select(watcher.spec.space, &watcher.spec.range) {
            if watcher.wants(event.event().kind) {
                bytes += event.size_bytes_max(watcher.spec.prev_kv);
                events.push(event.clone());
            }
        }
        next = entry.revision.next();
    }
    (events, next)
}

/// Divides events into parts of at most `limit` bytes, or of one event.
fn split(events: Vec<Arc<WatchEvent>>, prev: bool, limit: usize) -> Vec<Vec<Arc<WatchEvent>>> {
    /// What a message holds beside its events: the header, and seven small fields.
    const ENVELOPE_BYTES: usize = 128;
    let mut parts = Vec::new();
    let (mut part, mut bytes) = (Vec::new(), ENVELOPE_BYTES);
    for event in events {
        let size = event.size_bytes_max(prev);
        if !part.is_empty() && bytes.saturating_add(size) > limit {
            parts.push(std::mem::take(&mut part));
            bytes = ENVELOPE_BYTES;
        }
        bytes = bytes.saturating_add(size);
        part.push(event);
    }
    parts.push(part);
    parts
}

/// Whether a watcher takes part in shared reads of all keys. A single key has
/// an index of its own; the key before is looked up only for who wants it.
fn shares_reads(spec: &WatchSpec) -> bool {
    !spec.prev_kv && !matches!(spec.range, KeyRange::Single(_))
}

/// Reads a piece of the past for one watcher, when its turn comes.
async fn read_past(hub: Arc<Hub>, spec: &WatchSpec, from: Revision) -> Result<Caught, StorageError> {
    let turn = hub.reads.clone().acquire_owned().await;
    let shared = shares_reads(spec);
    if shared && let Some(chunk) = hub.chunks.find(spec.space, from) {
        return Ok(Caught::Chunk(chunk));
    }
    hub.gauges.catch_up_reads.increment(1);
    let range = if shared { KeyRange::From(bytes::Bytes::new()) } else { spec.range.clone() };
    let budget_bytes = hub.options.message_bytes;
    let query = PastQuery { space: spec.space, range, from, prev: spec.prev_kv, budget_bytes };
    let inline = hub.options.inline_reads;
    let read = move || {
        let caught = match hub.history.read(&query)? {
            Past::Compacted(mark) => Caught::Compacted(mark),
            Past::Events(revisions, next) if shared && next > from => {
                let chunk = Arc::new(Chunk::new(query.space, from, next, &revisions));
                hub.chunks.keep(chunk.clone());
                Caught::Chunk(chunk)
            }
            Past::Events(revisions, next) => {
                let events = revisions.into_iter().flat_map(|revision| revision.events);
                Caught::Own(events.map(|event| Arc::new(WatchEvent::new(event))).collect(), next)
            }
        };
        // The turn ends with the read, also when nobody waits for it any more.
        drop(turn);
        Ok(caught)
    };
    if inline {
        return read();
    }
    match tokio::task::spawn_blocking(read).await {
        Ok(caught) => caught,
        Err(error) => Err(StorageError::Refused(format!("a read of history was broken off: {error}"))),
    }
}
