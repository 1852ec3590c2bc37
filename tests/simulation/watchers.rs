//! Watchers: each follows a range through one node after another and must see
//! what the model says, each change once, in order, and nothing promised early.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay::types::{EventKind, KeyRange, Revision, Space};
use mainstay::watch::{WatchEvent, WatchMessage, WatchMessageKind, WatchSpec};
use tokio::sync::mpsc;

use crate::clients::{Client, range};
use crate::oracle::Wants;

/// Messages on their way to a client; a slow one holds its stream up, not the node.
const ON_THE_WAY_MAX: usize = 4;

struct Watcher {
    client: Client,
    /// It watches through this node only.
    stays_at: Option<usize>,
    range: KeyRange,
    wants: Wants,
    fragment: bool,
    /// Everything below was seen; 0 before the first connection is made.
    next: i64,
    /// The parts of a divided message.
    parts: Vec<Arc<WatchEvent>>,
    /// It is to end once it has seen this revision.
    goal: Option<i64>,
}

/// Follows one range until the run has come to rest and everything was seen.
pub async fn watching(mut client: Client) {
    let range = range(&mut client.chance);
    let kind = match client.chance.below(6) {
        0 => Some(EventKind::Put),
        1 => Some(EventKind::Delete),
        _ => None,
    };
    let wants = Wants { prev: client.chance.permille(400), kind };
    let fragment = client.chance.permille(300);
    let mut watcher =
        Watcher { client, stays_at: None, range, wants, fragment, next: 0, parts: Vec::new(), goal: None };
    if watcher.client.chance.permille(500) {
        watcher.client.pause(5000).await;
        let newest = watcher.client.world.oracle().model().revision() as u64;
        watcher.next = watcher.client.chance.between(1, newest + 3) as i64;
    }
    while watcher.connect().await {}
}

/// Follows everything through one node, whatever becomes of that.
pub async fn staying(client: Client, place: usize) {
    let (range, wants) = (KeyRange::From(Bytes::from_static(b"\0")), Wants::default());
    let stays_at = Some(place);
    let mut watcher =
        Watcher { client, stays_at, range, wants, fragment: false, next: 1, parts: Vec::new(), goal: None };
    while watcher.connect().await {}
}

impl Watcher {
    fn spec(&self) -> WatchSpec {
        WatchSpec {
            prev_kv: self.wants.prev,
            no_put: self.wants.kind == Some(EventKind::Delete),
            no_delete: self.wants.kind == Some(EventKind::Put),
            progress_notify: true,
            fragment: self.fragment,
            ..WatchSpec::new(Space::User, self.range.clone(), Revision(self.next))
        }
    }

    /// Watches through one node for a while. False when there is nothing more to do.
    async fn connect(&mut self) -> bool {
        if self.client.world.trace.failed().is_some() {
            return false;
        }
        let place = self.stays_at.unwrap_or_else(|| self.client.choose());
        let (messages, mut arriving) = mpsc::channel(ON_THE_WAY_MAX);
        let (ask, asked) = mpsc::channel(ON_THE_WAY_MAX);
        let spec = self.spec();
        let world = self.client.world.clone();
        let opened = world.at(place, &mut self.client.chance, move |node| async move {
            let mut stream = node.hub().stream();
            if stream.create(None, spec).is_ok() {
                tokio::spawn(serve(stream, asked, messages));
            }
        });
        let opened = tokio::time::timeout(Duration::from_secs(5), opened).await;
        if !matches!(opened, Ok(Ok(()))) {
            self.client.pause(200).await;
            self.client.move_on();
            return true;
        }
        let name = &self.client.name;
        world.trace.line(format_args!(
            "{name} watches {:?} at n{} from {}",
            self.range,
            place + 1,
            self.next
        ));
        if self.next > 1 {
            world.trace.count("watches resumed");
        }
        let stays_ms =
            if self.stays_at.is_some() { 600_000 } else { self.client.chance.between(200, 12_000) };
        let until = tokio::time::Instant::now() + Duration::from_millis(stays_ms);
        loop {
            if world.is_ending() && self.goal.is_none() {
                self.goal = Some(world.oracle().model().revision());
                let _ = ask.try_send(());
            }
            if self.goal.is_some_and(|goal| self.next > goal) || world.trace.failed().is_some() {
                return false;
            }
            if self.client.chance.permille(30) {
                let _ = ask.try_send(());
            }
            let message = tokio::time::timeout(Duration::from_millis(500), arriving.recv()).await;
            match message {
                Ok(Some(message)) => {
                    if !self.take(message) {
                        return true;
                    }
                }
                // The node is gone, or stops.
                Ok(None) => break,
                Err(_) if self.goal.is_some() => {
                    let _ = ask.try_send(());
                }
                Err(_) => {}
            }
            if self.client.chance.permille(20) {
                self.client.pause(700).await;
            }
            if tokio::time::Instant::now() >= until {
                break;
            }
        }
        self.parts.clear();
        self.client.move_on();
        // Now and then for so long that what follows is forgotten.
        let away_ms = if self.goal.is_none() && self.client.chance.permille(150) { 6000 } else { 100 };
        self.client.pause(away_ms).await;
        true
    }

    /// Takes a message in. False when the watch has to be made anew.
    fn take(&mut self, message: WatchMessage) -> bool {
        let what = format!("{} of {:?}", self.client.name, self.range);
        let world = self.client.world.clone();
        let revision = message.revision.0;
        world.trace.fold(revision as u64);
        match message.kind {
            WatchMessageKind::Created => {
                if self.next == 0 {
                    // From now on: after what the node had when it answered.
                    self.next = revision + 1;
                }
            }
            WatchMessageKind::Events { events, fragment, .. } => {
                world.trace.count("watch messages");
                self.parts.extend(events);
                if fragment {
                    world.trace.count("watch fragments");
                    return true;
                }
                let events = std::mem::take(&mut self.parts);
                world.oracle().watched(&what, &self.range, self.wants, self.next, revision, &events);
                self.next = revision + 1;
            }
            WatchMessageKind::Progress => {
                world.trace.count("watch progress");
                if !self.parts.is_empty() {
                    world.trace.violation(format_args!("{what}: progress between the parts of a message"));
                }
                if revision >= self.next {
                    world.oracle().watched(&what, &self.range, self.wants, self.next, revision, &[]);
                    self.next = revision + 1;
                }
            }
            WatchMessageKind::Compacted { compact_revision } => {
                world.trace.count("watches compacted");
                world.trace.line(format_args!("{what} was compacted at {compact_revision}"));
                world.oracle().compacted(&what, self.next, compact_revision.0);
                self.next = compact_revision.0;
                return false;
            }
            WatchMessageKind::Canceled | WatchMessageKind::Refused(_) => {
                world.trace.violation(format_args!("{what} ended without being asked: {:?}", message.kind));
                return false;
            }
        }
        true
    }
}

/// The node's end of a watch.
async fn serve(
    mut stream: mainstay::watch::WatchStream,
    mut asked: mpsc::Receiver<()>,
    messages: mpsc::Sender<WatchMessage>,
) {
    loop {
        tokio::select! {
            biased;
            request = asked.recv() => match request {
                Some(()) => stream.request_progress(),
                None => return,
            },
            message = stream.next() => match message {
                Some(message) => if messages.send(message).await.is_err() { return },
                None => return,
            }
        }
    }
}
