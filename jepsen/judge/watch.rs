//! Watches keep etcd's guarantees, across reconnects to other members too
//! ("Watch APIs" in etcd's "KV API guarantees", and the validators of its
//! robustness tests): ordered, unique, atomic, bookmarkable, resumable,
//! reliable, right about the record before and about creation, filtered.
//!
//! Besides, all watchers together tell one story, that of the watch of
//! everything, and a watch whose history was compacted says so. Every stream is
//! judged by itself first; then the streams of a watcher must follow on each
//! other. Nothing is concluded from when a response came.

use std::collections::{BTreeMap, HashSet};

use super::describe;
use super::event_log::{self, EventLog};
use super::history::{Call, Event, EventKind, FULL_HISTORY, History, Kv, Outcome, Revision, WatchBody};
use super::history::{WatchItem, WatchStream};
use super::model::Store;
use super::verdict::Verdict;

/// What is promised. The order is that of [`CLAIMS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promise {
    Ordered,
    Unique,
    Atomic,
    Bookmarkable,
    Resumable,
    Reliable,
    PrevKv,
    IsCreate,
    Filter,
    Agreed,
    Compacted,
    Continued,
}

const CLAIMS: [&str; 12] = [
    "ordered: a watch never goes back in revisions",
    "unique: no event comes twice on one watch",
    "atomic: a revision is told in one response, unless in marked fragments",
    "bookmarkable: after progress to a revision nothing comes from before it",
    "resumable: a watch begins at the revision asked for",
    "reliable: a watch leaves nothing out",
    "previous: an event comes with the record before it",
    "create: a put is a creation exactly when there was no key",
    "filter: a watch tells only what it was asked for",
    "agreed: all watches tell what the order of revisions tells",
    "compacted: a watch ends with the compact revision when its history is gone, and only then",
    "continued: watchers that reconnect miss nothing in between",
];

/// Judges every stream of `workload` against the [`FULL_HISTORY`](super::history::FULL_HISTORY) watch.
pub fn check(history: &History, workload: &str) -> Vec<Verdict> {
    let log = EventLog::of(history);
    let store = log.store();
    let mut judge = Judge { history, log: &log, store: &store, found: Default::default(), beyond: None };
    let mut watchers: BTreeMap<u64, Vec<&WatchStream>> = BTreeMap::new();
    let of_workload = |stream: &&WatchStream| stream.workload == workload && stream.watcher != FULL_HISTORY;
    for stream in history.watches.iter().filter(of_workload) {
        judge.stream(stream);
        watchers.entry(stream.watcher).or_default().push(stream);
    }
    for streams in watchers.values_mut() {
        streams.sort_by_key(|stream| stream.opened_ns);
        streams.windows(2).for_each(|pair| judge.continued(pair[0], pair[1]));
    }
    judge.verdicts()
}

#[derive(Default)]
struct Found {
    checked: usize,
    findings: Vec<String>,
}

struct Judge<'a> {
    history: &'a History,
    log: &'a EventLog,
    store: &'a Store,
    found: [Found; CLAIMS.len()],
    /// An event from beyond what the watch of everything reached.
    beyond: Option<String>,
}

/// What is known of a stream while its responses are walked through.
struct Walk<'a> {
    stream: &'a WatchStream,
    /// The first revision that it was asked for.
    from: Revision,
    last: Revision,
    promised: Revision,
    /// Whether the last response said that its revision goes on.
    is_open: bool,
    seen: HashSet<(Revision, &'a str)>,
}

impl<'a> Judge<'a> {
    fn verdicts(self) -> Vec<Verdict> {
        let mut beyond = self.beyond;
        let verdict = |(claim, found): (&'static str, Found)| {
            let doubt = if claim == CLAIMS[Promise::Agreed as usize] { beyond.take() } else { None };
            Verdict::unless(claim, found.checked, describe::some(found.findings), doubt)
        };
        CLAIMS.into_iter().zip(self.found).map(verdict).collect()
    }

    /// Counts one look at a promise, and what was seen if it was broken.
    fn look(&mut self, promise: Promise, is_kept: bool, finding: impl FnOnce() -> String) {
        let found = &mut self.found[promise as usize];
        found.checked += 1;
        if !is_kept {
            found.findings.push(finding());
        }
    }

    fn stream(&mut self, stream: &'a WatchStream) {
        let mut walk = Walk {
            stream,
            from: stream.start_revision.max(1),
            last: 0,
            promised: 0,
            is_open: false,
            seen: HashSet::new(),
        };
        for item in &stream.items {
            match &item.body {
                WatchBody::Created if stream.start_revision == 0 => walk.from = item.revision + 1,
                WatchBody::Created => {}
                WatchBody::Events { events, fragment } => self.response(&mut walk, item, events, *fragment),
                WatchBody::Progress => {
                    let is_kept = item.revision >= walk.promised.max(walk.last) && !walk.is_open;
                    self.look(Promise::Bookmarkable, is_kept, || {
                        format!(
                            "{}: progress to {} came after revision {}",
                            name(stream),
                            item.revision,
                            walk.last
                        )
                    });
                    walk.promised = walk.promised.max(item.revision);
                }
                WatchBody::Canceled { compact_revision, .. } => self.canceled(&walk, item, *compact_revision),
            }
        }
        self.complete(&walk);
    }

    fn response(&mut self, walk: &mut Walk<'a>, item: &WatchItem, events: &'a [Event], fragment: bool) {
        let stream = walk.stream;
        if let Some(first) = events.first() {
            let is_split = first.kv.mod_revision == walk.last && !walk.is_open;
            let is_kept = !is_split && (stream.fragment || !fragment);
            self.look(Promise::Atomic, is_kept, || {
                format!("{}: a response splits revision {}", name(stream), walk.last)
            });
        }
        for event in events {
            let revision = event.kv.mod_revision;
            let told = || format!("{}: {event}", name(stream));
            self.look(Promise::Ordered, revision >= walk.last, || {
                format!("{}, after revision {}", told(), walk.last)
            });
            let is_new = walk.seen.insert((revision, &event.kv.key));
            self.look(Promise::Unique, is_new, told);
            self.look(Promise::Bookmarkable, revision > walk.promised && revision <= item.revision, || {
                format!("{}, after progress to {}, with header {}", told(), walk.promised, item.revision)
            });
            self.look(Promise::Resumable, revision >= walk.from, || {
                format!("{}, before {}", told(), walk.from)
            });
            self.look(Promise::Filter, wanted(stream, event), told);
            self.content(stream, item, event);
            walk.last = walk.last.max(revision);
        }
        walk.is_open = fragment;
    }

    /// What the event says of its key.
    fn content(&mut self, stream: &WatchStream, item: &WatchItem, event: &Event) {
        let revision = event.kv.mod_revision;
        let told = || format!("{}: {event}", name(stream));
        if revision > self.log.reached {
            self.beyond.get_or_insert_with(|| {
                format!("the watch of everything reached revision {}, and {}", self.log.reached, told())
            });
            return;
        }
        let logged = self.log.revisions.get(&revision);
        let is_logged = logged.is_some_and(|all| all.iter().any(|one| event_log::same_event(one, event)));
        self.look(Promise::Agreed, is_logged, || {
            format!(
                "{}; the order of revisions has {}",
                told(),
                describe::events(logged.map_or(&[], Vec::as_slice))
            )
        });
        let before = self.store.get_at(&event.kv.key, revision - 1);
        if event.kind == EventKind::Put {
            let is_create = event.kv.create_revision == revision;
            let is_kept = is_create == before.is_none() && is_create == (event.kv.version == 1);
            self.look(Promise::IsCreate, is_kept, || {
                format!("{}; before it was {}", told(), or_nothing(before))
            });
        }
        let expected = before.filter(|_| stream.prev_kv);
        let may_be_gone = event.prev.is_none() && self.was_compacted(revision, item.at_ns);
        self.look(Promise::PrevKv, event.prev.as_ref() == expected || may_be_gone, || {
            format!("{}; before it was {}", told(), or_nothing(expected))
        });
    }

    /// Whether what was before `revision` may have been compacted away at a time.
    fn was_compacted(&self, revision: Revision, at_ns: u64) -> bool {
        self.compactions(at_ns).any(|compacted| compacted >= revision)
    }

    fn compactions(&self, at_ns: u64) -> impl Iterator<Item = Revision> {
        let begun = self.history.ops.iter().filter(move |op| op.invoked_ns <= at_ns);
        begun.filter(|op| !matches!(op.outcome, Outcome::Failed(_))).filter_map(|op| match op.call {
            Call::Compact { revision } => Some(revision),
            _ => None,
        })
    }

    fn canceled(&mut self, walk: &Walk<'_>, item: &WatchItem, compact_revision: Revision) {
        if compact_revision == 0 {
            return;
        }
        let needed = event_log::told(walk.stream).complete.max(walk.from - 1) + 1;
        let is_compacted = self.compactions(item.at_ns).any(|revision| revision == compact_revision);
        self.look(Promise::Compacted, is_compacted && needed < compact_revision, || {
            let why = if is_compacted { "which it did not need" } else { "which nobody asked for" };
            format!(
                "{}: ended by compaction to {compact_revision}, {why}; it was at {needed}",
                name(walk.stream)
            )
        });
    }

    /// Everything between the beginning and the end of what the stream completed must be there.
    fn complete(&mut self, walk: &Walk<'_>) {
        let stream = walk.stream;
        let complete = event_log::told(stream).complete.min(self.log.reached);
        if complete < walk.from {
            return;
        }
        let first = walk.seen.iter().map(|(revision, _)| *revision).min().unwrap_or(Revision::MAX);
        for (revision, events) in self.log.revisions.range(walk.from..=complete) {
            for event in events.iter().filter(|event| wanted(stream, event)) {
                let promise = if *revision < first { Promise::Resumable } else { Promise::Reliable };
                let is_there = walk.seen.contains(&(*revision, &event.kv.key));
                self.look(promise, is_there, || format!("{}: left out {event}", name(stream)));
            }
        }
    }

    /// Whether a watcher's next stream goes on where the one before was complete.
    fn continued(&mut self, one: &WatchStream, next: &WatchStream) {
        let complete = event_log::told(one).complete;
        let compacted = one.items.iter().filter_map(|item| match item.body {
            WatchBody::Canceled { compact_revision, .. } => Some(compact_revision),
            _ => None,
        });
        let until = compacted.max().unwrap_or(0).max(complete + 1);
        let is_kept = next.start_revision != 0 && next.start_revision <= until;
        self.look(Promise::Continued, is_kept, || {
            format!("{} follows on {}, which had told all up to {complete}", name(next), name(one))
        });
    }
}

fn wanted(stream: &WatchStream, event: &Event) -> bool {
    let is_filtered = match event.kind {
        EventKind::Put => stream.no_put,
        EventKind::Delete => stream.no_delete,
    };
    stream.span.contains(&event.kv.key) && !is_filtered
}

fn or_nothing(kv: Option<&Kv>) -> String {
    kv.map_or("nothing".to_owned(), Kv::to_string)
}

fn name(stream: &WatchStream) -> String {
    let WatchStream { watcher, node, span, start_revision, opened_ns, .. } = stream;
    let opened = describe::seconds(*opened_ns);
    format!("watcher {watcher} on node {node} of {span} from {start_revision}, opened at {opened} s")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::history::Span;
    use crate::judge::random::Random;
    use crate::judge::simulator::{Script, delete, mixed, put};
    use crate::judge::verdict::Held;

    /// Two keys put at 2 and 3, one put again at 4 and deleted at 5, a pair at 6, with a watch of all.
    fn watched() -> History {
        let mut script = Script::new("test");
        script.call(0, 10, 20, put("k/a", "1"));
        script.call(0, 30, 40, put("k/b", "2"));
        script.call(0, 50, 60, put("k/a", "3"));
        script.call(0, 70, 80, delete(Span::key("k/a")));
        script.call(0, 90, 100, pair());
        let stream = script.watch(1, Span::prefix("k/"), 2);
        let mut history = script.history();
        history.watches.push(stream);
        history
    }

    fn pair() -> Call {
        use crate::judge::history::Txn;
        use crate::judge::simulator::putting;
        Call::Txn(Txn { success: vec![putting("k/a", "5"), putting("k/b", "6")], ..Txn::default() })
    }

    fn broken(history: &History) -> Vec<&'static str> {
        let words = check(history, "test").into_iter().filter(|verdict| !verdict.held());
        words.map(|verdict| verdict.claim.split(':').next().expect("a first word")).collect()
    }

    /// The watch with something done to it.
    fn with(change: impl FnOnce(&mut WatchStream)) -> Vec<&'static str> {
        let mut history = watched();
        change(&mut history.watches[1]);
        broken(&history)
    }

    fn events(item: &mut WatchItem) -> &mut Vec<Event> {
        let WatchBody::Events { events, .. } = &mut item.body else { panic!("no events") };
        events
    }

    #[test]
    fn a_right_watch_keeps_every_promise_and_each_was_looked_at() {
        let verdicts = check(&watched(), "test");
        let unchecked: Vec<_> = verdicts.iter().filter(|v| v.checked == 0).map(|v| v.claim).collect();
        assert!(verdicts.iter().all(Verdict::held), "{verdicts:?}");
        assert_eq!(unchecked, [CLAIMS[Promise::Compacted as usize], CLAIMS[Promise::Continued as usize]]);
    }

    #[test]
    fn each_broken_promise_is_found() {
        assert_eq!(with(|stream| stream.items.swap(2, 3)), ["ordered"]);
        assert_eq!(with(|stream| stream.items.insert(3, stream.items[2].clone())), ["unique", "atomic"]);
        assert_eq!(
            with(|stream| {
                let mut rest = stream.items[5].clone();
                events(&mut stream.items[5]).truncate(1);
                events(&mut rest).remove(0);
                stream.items.insert(6, rest);
            }),
            ["atomic"]
        );
        assert_eq!(with(|stream| stream.items.swap(5, 6)), ["bookmarkable"]);
        assert_eq!(with(|stream| stream.start_revision = 3), ["resumable"]);
        assert_eq!(with(|stream| drop(stream.items.remove(1))), ["resumable"]);
        assert_eq!(with(|stream| drop(stream.items.remove(3))), ["reliable"]);
        assert_eq!(with(|stream| drop(events(&mut stream.items[5]).remove(1))), ["reliable"]);
        assert_eq!(with(|stream| events(&mut stream.items[3])[0].prev = None), ["previous"]);
        assert_eq!(with(|stream| stream.prev_kv = false), ["previous"]);
        assert_eq!(with(|stream| stream.span = Span::key("k/b")), ["filter"]);
        assert_eq!(with(|stream| stream.no_delete = true), ["filter"]);
        assert_eq!(with(|stream| events(&mut stream.items[2])[0].kv.value = "x".into()), ["agreed"]);
        assert_eq!(
            with(|stream| events(&mut stream.items[3])[0].kv.create_revision = 4),
            ["create", "agreed"]
        );
    }

    #[test]
    fn fragments_may_split_a_revision_when_they_were_asked_for() {
        let split = |stream: &mut WatchStream| {
            let mut rest = stream.items[5].clone();
            events(&mut rest).remove(0);
            let first = events(&mut stream.items[5])[0].clone();
            stream.items[5].body = WatchBody::Events { events: vec![first], fragment: true };
            stream.items.insert(6, rest);
        };
        assert_eq!(with(split), ["atomic"]);
        let asked = |stream: &mut WatchStream| {
            split(stream);
            stream.fragment = true;
        };
        assert_eq!(with(asked), [""; 0]);
        // A stream that ends amid a revision owes the rest to the next one.
        let cut = |stream: &mut WatchStream| {
            asked(stream);
            stream.items.truncate(6);
        };
        assert_eq!(with(cut), [""; 0]);
    }

    #[test]
    fn compaction_ends_a_watch_with_the_right_revision_or_not_at_all() {
        let ended = |at: Revision, asked: Option<Revision>| {
            let mut history = watched();
            let stream = &mut history.watches[1];
            stream.items.truncate(2);
            let body = WatchBody::Canceled { compact_revision: at, reason: "compacted".into() };
            stream.items.push(WatchItem { at_ns: 500, revision: 6, body });
            if let Some(revision) = asked {
                let mut script = Script { ops: history.ops, ..Script::new("test") };
                script.record(5, 200, 210, Call::Compact { revision }, Outcome::Unknown("timeout".into()));
                history.ops = script.ops;
            }
            broken(&history)
        };
        assert_eq!(ended(5, Some(5)), [""; 0]);
        assert_eq!(ended(5, Some(4)), ["compacted"]);
        assert_eq!(ended(5, None), ["compacted"]);
        assert_eq!(ended(3, Some(3)), ["compacted"]);
    }

    #[test]
    fn a_record_before_may_be_missing_only_after_compaction() {
        let mut history = watched();
        events(&mut history.watches[1].items[3])[0].prev = None;
        let mut script = Script { ops: history.ops, ..Script::new("test") };
        script.record(5, 85, 86, Call::Compact { revision: 3 }, Outcome::Unknown("timeout".into()));
        history.ops = script.ops;
        assert_eq!(broken(&history), ["previous"]);
        history.ops.last_mut().expect("the compaction").call = Call::Compact { revision: 4 };
        assert_eq!(broken(&history), [""; 0]);
    }

    #[test]
    fn a_watcher_goes_on_where_it_was() {
        let resumed = |from: Revision| {
            let mut history = watched();
            let mut rest = history.watches[1].clone();
            history.watches[1].items.truncate(3);
            (rest.start_revision, rest.opened_ns) = (from, 5);
            rest.items.retain(|item| !matches!(&item.body, WatchBody::Events { events, .. } if events[0].kv.mod_revision < from));
            history.watches.push(rest);
            broken(&history)
        };
        assert_eq!(resumed(4), [""; 0]);
        assert_eq!(resumed(3), [""; 0]);
        assert_eq!(resumed(5), ["continued"]);
    }

    #[test]
    fn events_beyond_the_watch_of_everything_are_undecided() {
        let mut history = watched();
        history.watches[0].items.truncate(4);
        assert_eq!(broken(&history), ["agreed"]);
        let agreed = check(&history, "test").swap_remove(Promise::Agreed as usize);
        assert!(matches!(agreed.outcome, Held::Undecided(_)));
    }

    #[test]
    fn simulated_watches_hold_and_every_planted_lie_is_found() {
        for seed in 0..30 {
            let script = mixed(seed, 300, 20);
            let stream = script.watch(1, Span::prefix("kv/"), 1 + seed as Revision);
            let mut history = script.history();
            history.watches.push(WatchStream { workload: "test", ..stream });
            assert_eq!(broken(&history), [""; 0], "seed {seed}");
            let mut random = Random::new(seed);
            for lie in 0..20 {
                let mut lying = history.clone();
                let items = &mut lying.watches[1].items;
                let at = 1 + random.below(items.len() as u64 - 3) as usize;
                let one = &mut events(&mut items[at])[0];
                match lie % 5 {
                    0 => drop(items.remove(at)),
                    1 => items.swap(at, at + 1),
                    2 => one.kv.mod_revision += 1,
                    3 => one.prev = Some(Kv::default()),
                    _ => items.insert(at, items[at].clone()),
                }
                assert_ne!(broken(&lying), [""; 0], "seed {seed}, lie {lie}");
            }
        }
    }
}
