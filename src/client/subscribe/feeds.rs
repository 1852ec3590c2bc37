//! One watch for all subscriptions of a client that need the same one.
//!
//! A [`Feed`] follows a mirror and tells everyone who joined, waiting for
//! nobody. Who falls behind is on his own: he goes on with a mirror of his own
//! from where he was, and joins again when that has caught up. So the slow one
//! holds nobody back, and a put is sent once to each client, however many of
//! its subscriptions it concerns.
//!
//! Invariant: who joins holds everything up to the feed's revision at that
//! moment, and hears everything after it or that he was left behind.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::AbortHandle;

use crate::client::{Client, ClientError, Mirror, MirrorUpdate};
use crate::types::{KeyRange, Revision};

/// How many updates a subscription may be behind before it is left behind.
const UPDATES_MAX: usize = 256;

/// What a watch asks for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Wanted {
    pub range: KeyRange,
    pub prev_kv: bool,
    /// Keys that are set, keys that are removed.
    pub kinds: (bool, bool),
}

impl Wanted {
    fn mirror(&self, client: &Client, known: Revision) -> Mirror {
        let mirror = client.mirror(self.range.clone(), known).with_kinds(self.kinds.0, self.kinds.1);
        if self.prev_kv { mirror.with_prev_kv() } else { mirror }
    }
}

/// The feeds of a client. Those that nobody listens to are gone.
#[derive(Debug, Default)]
pub(in crate::client) struct Feeds {
    feeds: Mutex<HashMap<Wanted, Weak<Feed>>>,
}

impl Feeds {
    /// Joins the feed of what is wanted, for one who knows everything up to
    /// `known`. `may_begin`: if there is none, one begins there.
    fn join(&self, client: &Client, wanted: &Wanted, known: Revision, may_begin: bool) -> Option<Joined> {
        let mut feeds = self.feeds.lock();
        let feed = match feeds.entry(wanted.clone()) {
            Entry::Occupied(entry) => entry.get().upgrade().filter(|feed| feed.told.lock().updates.is_some()),
            Entry::Vacant(_) => None,
        };
        let feed = match feed {
            Some(feed) => feed,
            None if may_begin => {
                feeds.retain(|_, feed| feed.strong_count() > 0);
                let feed = Feed::begin(wanted.mirror(client, known), known);
                feeds.insert(wanted.clone(), Arc::downgrade(&feed));
                feed
            }
            None => return None,
        };
        let told = feed.told.lock();
        if told.revision > known {
            return None;
        }
        let updates = told.updates.as_ref()?.subscribe();
        let resumes = told.resumes;
        drop(told);
        Some(Joined { feed, updates, resumes })
    }
}

/// A mirror whose updates go to many. Ends with the last of them.
#[derive(Debug)]
struct Feed {
    told: Arc<Mutex<Told>>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Told {
    /// Everything up to here was told.
    revision: Revision,
    resumes: u64,
    /// `None` when the mirror has ended: everyone is to learn why from his own.
    updates: Option<broadcast::Sender<Arc<MirrorUpdate>>>,
}

impl Feed {
    fn begin(mut mirror: Mirror, revision: Revision) -> Arc<Feed> {
        let (updates, _) = broadcast::channel(UPDATES_MAX);
        let told = Arc::new(Mutex::new(Told { revision, resumes: 0, updates: Some(updates) }));
        let shared = told.clone();
        let task = tokio::spawn(async move {
            loop {
                let update = mirror.next().await;
                let mut told = shared.lock();
                told.resumes = mirror.resumes();
                match update {
                    Ok(update) => told.tell(update),
                    Err(error) => {
                        tracing::debug!(%error, "a shared watch ends");
                        told.updates = None;
                        return;
                    }
                }
            }
        });
        Arc::new(Feed { told, task: task.abort_handle() })
    }
}

impl Told {
    fn tell(&mut self, update: MirrorUpdate) {
        self.revision = update.revision();
        if let Some(updates) = &self.updates {
            // That nobody listens is no error: the last one is about to leave.
            let _ = updates.send(Arc::new(update));
        }
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug)]
struct Joined {
    feed: Arc<Feed>,
    updates: broadcast::Receiver<Arc<MirrorUpdate>>,
    /// The feed's, when it was joined.
    resumes: u64,
}

/// Where one subscription gets its updates from.
#[derive(Debug)]
pub(super) struct Source {
    client: Client,
    wanted: Wanted,
    /// Everything up to here was handed out; 0 before a snapshot.
    known: Revision,
    /// Whether `known` is new, so that others need not wait for a feed that begins there.
    is_recent: bool,
    joined: Option<Joined>,
    /// While it is not joined.
    mirror: Option<Mirror>,
    /// Of feeds and mirrors that were left.
    resumes: u64,
}

impl Source {
    /// Begins after `known`, or with a snapshot if that is 0.
    pub(super) fn new(client: Client, wanted: Wanted, known: Revision, is_recent: bool) -> Source {
        Source { client, wanted, known, is_recent, joined: None, mirror: None, resumes: 0 }
    }

    /// Waits for the next update that is not known yet. Changes may begin with
    /// some that are: see [`Source::known`]. To be called to its end.
    ///
    /// # Errors
    /// Those of [`Mirror::next`].
    pub(super) async fn next(&mut self) -> Result<Arc<MirrorUpdate>, ClientError> {
        loop {
            self.join();
            let update = if let Some(joined) = &mut self.joined {
                match joined.updates.recv().await {
                    Ok(update) if update.revision() > self.known => update,
                    Ok(_) => continue,
                    Err(RecvError::Lagged(_) | RecvError::Closed) => {
                        self.leave();
                        continue;
                    }
                }
            } else {
                let own = || self.wanted.mirror(&self.client, self.known);
                Arc::new(self.mirror.get_or_insert_with(own).next().await?)
            };
            return Ok(update);
        }
    }

    /// Everything up to this revision was handed out before; a change at or
    /// below it is not new.
    pub(super) fn known(&self) -> Revision {
        self.known
    }

    /// Takes note that an update was taken in.
    pub(super) fn took(&mut self, update: &MirrorUpdate) {
        self.is_recent |= matches!(update, MirrorUpdate::Snapshot { .. });
        self.known = update.revision();
    }

    /// Lets go of everything that would pile up; [`Source::next`] goes on after
    /// what was taken in.
    pub(super) fn leave(&mut self) {
        self.resumes = self.resumes() + 1;
        self.is_recent = false;
        (self.joined, self.mirror) = (None, None);
    }

    /// How often it went on after a break.
    pub(super) fn resumes(&self) -> u64 {
        let joined = self.joined.as_ref();
        self.resumes
            + joined.map_or(0, |joined| joined.feed.told.lock().resumes.saturating_sub(joined.resumes))
            + self.mirror.as_ref().map_or(0, Mirror::resumes)
    }

    fn join(&mut self) {
        if self.joined.is_some() || self.known.0 == 0 {
            return;
        }
        let feeds = &self.client.feeds;
        if let Some(joined) = feeds.join(&self.client, &self.wanted, self.known, self.is_recent) {
            self.resumes += self.mirror.take().map_or(0, |mirror| mirror.resumes());
            self.joined = Some(joined);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::WatchBatch;

    fn wanted() -> Wanted {
        Wanted { range: KeyRange::prefix("a".into()), prev_kv: false, kinds: (true, true) }
    }

    fn source(client: &Client, known: i64, is_recent: bool) -> Source {
        Source::new(client.clone(), wanted(), Revision(known), is_recent)
    }

    /// A client whose feeds are told of changes by hand: nobody is at its endpoint.
    fn lonely() -> Client {
        Client::connect(["127.0.0.1:1"]).expect("an address")
    }

    fn tell(source: &Source, revision: i64) {
        let joined = source.joined.as_ref().expect("it has joined");
        let batch = WatchBatch { revision: Revision(revision), events: Vec::new() };
        joined.feed.told.lock().tell(MirrorUpdate::Changes(batch));
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_want_the_same_share_it_and_it_ends_with_them() {
        let client = lonely();
        let (mut first, mut second) = (source(&client, 5, true), source(&client, 7, false));
        second.join();
        assert!(second.joined.is_none(), "one that replays begins none");
        first.join();
        second.join();
        tell(&first, 6);
        assert_eq!(first.next().await.expect("an update").revision(), Revision(6));
        tell(&first, 9);
        assert_eq!(second.next().await.expect("an update").revision(), Revision(9), "6 was known");
        let feed = Arc::downgrade(&first.joined.as_ref().expect("joined").feed);
        drop(first);
        assert!(feed.upgrade().is_some());
        drop(second);
        assert!(feed.upgrade().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn who_does_not_know_what_was_told_already_must_catch_up_first() {
        let client = lonely();
        let mut first = source(&client, 5, true);
        first.join();
        tell(&first, 8);
        let mut late = source(&client, 7, true);
        late.join();
        assert!(late.joined.is_none(), "8 would be missing");
        late.known = Revision(8);
        late.join();
        assert!(late.joined.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_too_slow_goes_on_alone_where_he_was() {
        let client = lonely();
        let mut slow = source(&client, 5, true);
        slow.join();
        (6..8 + UPDATES_MAX as i64).for_each(|revision| tell(&slow, revision));
        let waits = tokio::time::timeout(std::time::Duration::from_secs(1), slow.next()).await;
        assert!(waits.is_err(), "nobody is at the endpoint");
        assert!(slow.joined.is_none() && slow.mirror.is_some());
        assert_eq!((slow.known, slow.resumes() > 0), (Revision(5), true));
    }
}
