//! The watch of everything, put together: each revision with its events.
//!
//! The watch may have been recorded at the end or live across reconnects, so
//! revisions may come twice; they must be the same each time. What the log holds
//! is what watches said, not yet what is true: [`super::revision_order`] holds
//! it against the calls.

use std::collections::BTreeMap;

use super::describe;
use super::history::{Event, FULL_HISTORY, History, Revision, WatchBody, WatchStream};
use super::model::Store;

/// Every revision's events, as the watch of everything told them.
#[derive(Debug, Default)]
pub struct EventLog {
    pub revisions: BTreeMap<Revision, Vec<Event>>,
    /// Everything up to here was told.
    pub reached: Revision,
    /// Where the streams contradict each other, or are no watch of everything.
    pub contradictions: Vec<String>,
}

/// The events of one stream, revision by revision, and how far it is complete.
#[derive(Debug, Default)]
pub struct Told {
    pub revisions: BTreeMap<Revision, Vec<Event>>,
    /// Every revision up to here is complete in `revisions`, as far as it was told at all.
    pub complete: Revision,
}

/// What one stream told, without judging it.
pub fn told(stream: &WatchStream) -> Told {
    let mut told = Told { complete: stream.start_revision - 1, ..Told::default() };
    for item in &stream.items {
        match &item.body {
            WatchBody::Events { events, fragment } => {
                for event in events {
                    told.revisions.entry(event.kv.mod_revision).or_default().push(event.clone());
                }
                if let Some(last) = events.last() {
                    // Of a response that goes on, the last revision may be half told.
                    let whole = last.kv.mod_revision - i64::from(*fragment);
                    told.complete = told.complete.max(whole);
                }
            }
            WatchBody::Progress => told.complete = told.complete.max(item.revision),
            WatchBody::Created if stream.start_revision == 0 => told.complete = item.revision,
            WatchBody::Created | WatchBody::Canceled { .. } => {}
        }
    }
    told
}

impl EventLog {
    /// The log of a history; a history without a watch of everything has an empty one.
    pub fn of(history: &History) -> EventLog {
        let mut streams: Vec<&WatchStream> =
            history.watches.iter().filter(|stream| stream.watcher == FULL_HISTORY).collect();
        streams.sort_by_key(|stream| stream.opened_ns);
        let mut log = EventLog { reached: 1, ..EventLog::default() };
        for stream in streams {
            log.take(stream);
        }
        log
    }

    fn take(&mut self, stream: &WatchStream) {
        let told = told(stream);
        if stream.start_revision > self.reached + 1 {
            let (from, reached) = (stream.start_revision, self.reached);
            self.contradictions
                .push(format!("the watch of everything goes on from {from}, but had only reached {reached}"));
        }
        for (revision, events) in told.revisions {
            if revision > told.complete {
                continue;
            }
            match self.revisions.get(&revision) {
                None => {
                    if revision <= self.reached {
                        self.contradictions.push(format!(
                            "revision {revision} was told late, after everything up to {}: {}",
                            self.reached,
                            describe::events(&events)
                        ));
                    }
                    self.revisions.insert(revision, events);
                }
                Some(known) if same(known, &events) => {}
                Some(known) => self.contradictions.push(format!(
                    "revision {revision} was told as {} and then as {}",
                    describe::events(known),
                    describe::events(&events)
                )),
            }
        }
        self.reached = self.reached.max(told.complete);
    }

    /// The store that these events make, at every revision.
    pub fn store(&self) -> Store {
        let mut store = Store::default();
        for (revision, events) in &self.revisions {
            store.commit(*revision, events);
        }
        store
    }
}

/// Whether two tellings agree; the record before an event may be missing in one of them.
pub fn same(one: &[Event], other: &[Event]) -> bool {
    one.len() == other.len()
        && one.iter().zip(other).all(|(a, b)| {
            let agree = a.prev.is_none() || b.prev.is_none() || a.prev == b.prev;
            same_event(a, b) && agree
        })
}

/// Whether two events say the same of their key.
pub fn same_event(one: &Event, other: &Event) -> bool {
    use super::history::EventKind::{Delete, Put};
    match (one.kind, other.kind) {
        (Put, Put) => one.kv == other.kv,
        (Delete, Delete) => one.kv.key == other.kv.key && one.kv.mod_revision == other.kv.mod_revision,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::{Call, Span, Txn};
    use crate::judge::simulator::{Script, put, putting};

    /// Revisions 2 to 5, the last one with two events, told by two streams of which the second begins at `from`.
    fn two_streams(from: Revision, change: impl FnOnce(&mut WatchStream)) -> EventLog {
        let mut script = Script::new("test");
        for value in ["1", "2", "3"] {
            script.call(0, 1, 2, put("a", value));
        }
        let both = vec![putting("a", "4"), putting("b", "5")];
        script.call(0, 1, 2, Call::Txn(Txn { success: both, ..Txn::default() }));
        let everything = Span { key: "\0".to_owned(), end: Some("\0".to_owned()) };
        let mut first = script.watch(FULL_HISTORY, everything.clone(), 1);
        first.items.truncate(3);
        let mut second = script.watch(FULL_HISTORY, everything, from);
        second.opened_ns = 9;
        change(&mut second);
        EventLog::of(&History { watches: vec![second, first], ..History::default() })
    }

    #[test]
    fn streams_that_follow_on_each_other_make_one_log() {
        for from in [4, 3, 1] {
            let log = two_streams(from, |_| {});
            assert_eq!(
                (log.reached, log.revisions.len(), log.contradictions.len()),
                (5, 4, 0),
                "from {from}"
            );
            assert_eq!(log.store().get("a").map(|kv| kv.version), Some(4));
        }
    }

    #[test]
    fn a_gap_and_two_tellings_of_one_revision_are_contradictions() {
        assert_eq!(two_streams(5, |_| {}).contradictions.len(), 1);
        let other = two_streams(3, |stream| {
            let WatchBody::Events { events, .. } = &mut stream.items[1].body else { panic!("events") };
            events[0].kv.value = "x".into();
        });
        assert_eq!(other.contradictions.len(), 1);
    }

    #[test]
    fn a_revision_that_was_half_told_does_not_count() {
        let log = two_streams(4, |stream| {
            stream.items.truncate(3);
            let WatchBody::Events { events, fragment } = &mut stream.items[2].body else { panic!("events") };
            events.truncate(1);
            *fragment = true;
        });
        assert_eq!((log.reached, log.revisions.len(), log.contradictions.len()), (4, 3, 0));
    }
}
