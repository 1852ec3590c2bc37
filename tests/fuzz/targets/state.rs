//! What a whole state makes of what decoders let through: commands applied to
//! a machine, and watches opened over it.
//!
//! An entry that can be read but not applied ends every node, and ends it again
//! after a restart; so what a member may forward must apply, however odd it is.

use std::sync::{Arc, LazyLock};

use bytes::Bytes;
use futures_util::FutureExt as _;
use prost::Message;

use mainstay::machine::{Entry, Machine, Payload};
use mainstay::mvcc::{self, EventQuery, Published};
use mainstay::server::watch_spec;
use mainstay::storage::layout::{Family, LogPosition};
use mainstay::storage::{Batch, Read, StateDb, StateOptions, codec};
use mainstay::types::{Command, KeyRange, Operation, Put, Reply, Revision, Space};
use mainstay::watch::{Hub, HubOptions};
use mainstay::wire::etcdserverpb::WatchRequest;
use mainstay::wire::etcdserverpb::watch_request::RequestUnion;

use super::client::draw_watch;
use super::{BASE, Input, Target, Verdict, seal_value};
use crate::draw::draw;
use crate::mutate::varint;
use crate::scratch::scratch;

/// The most items of one input.
const ITEMS_MAX: usize = 24;

/// Items, each after its length as a varint.
fn join(items: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    items.into_iter().flat_map(|item| [varint(item.len() as u64), item].concat()).collect()
}

/// What [`join`] joined; the last item may be cut off.
fn split(mut bytes: &[u8]) -> Vec<&[u8]> {
    let mut items = Vec::new();
    while !bytes.is_empty() && items.len() < ITEMS_MAX {
        let Ok(length) = prost::decode_length_delimiter(&mut bytes) else { break };
        let (item, rest) = bytes.split_at(length.min(bytes.len()));
        items.push(item);
        bytes = rest;
    }
    items
}

/// A machine that begins empty.
struct Rig {
    machine: Machine,
}

impl Rig {
    fn new(db: StateDb) -> Rig {
        Rig { machine: Machine::open(db).expect("a database without content is an empty machine") }
    }

    fn apply(&mut self, entries: Vec<Entry>) -> Vec<Reply> {
        self.machine.apply(entries).expect("what can be read can be applied")
    }

    fn hashes(&self) -> [(u32, u64); 2] {
        let view = self.machine.published().view();
        [Space::User, Space::System].map(|space| {
            let hash = mvcc::hash_kv(&view.data, view.marks(space), space, Revision(0));
            let hash = hash.expect("the newest revision can be hashed");
            (hash.hash, hash.versions)
        })
    }

    /// Reads all history that is left, with what stood before each change.
    fn read_history(&self) {
        let view = self.machine.published().view();
        for space in [Space::User, Space::System] {
            let marks = view.marks(space);
            let query = EventQuery {
                space,
                range: &KeyRange::From(Bytes::new()),
                from: marks.compacted,
                to: marks.revision,
                prev: true,
                budget_bytes: usize::MAX,
                budget_changes: usize::MAX,
            };
            mvcc::events(&view.data, marks, &query).expect("history can be read");
        }
    }
}

/// A new database that keeps so many bytes of records. Its files go with the scratch directory.
fn new_db(record_cache_bytes: usize) -> StateDb {
    let dir = tempfile::tempdir_in(scratch()).expect("a temporary directory").keep();
    let options =
        StateOptions { block_cache_bytes: 1 << 20, record_cache_bytes, write_buffer_bytes: 1 << 20 };
    StateDb::open(&dir, &options).expect("an empty database opens")
}

/// Takes everything out of a database: a hundred times quicker than a new one.
fn empty(db: &StateDb) {
    let mut batch = Batch::default();
    for family in Family::ALL {
        let mut cursor = db.scan(family, &[], None);
        cursor.seek_to_first();
        while let Some((key, _)) = cursor.item().expect("the database is read") {
            batch.delete(db, family, key);
            cursor.next();
        }
    }
    db.write(batch).expect("the database is written");
}

pub const APPLY: Target = Target {
    name: "apply",
    what: "commands that a log may hold, applied at once and one by one",
    draw: |rng| {
        let commands = (0..1 + rng.below(ITEMS_MAX)).map(|_| {
            let mut command: Command = draw(rng);
            if rng.one_in(2) {
                command.request = None;
            }
            codec::encode(&command)
        });
        Input { bytes: join(commands), is_whole: false }
    },
    seal: |bytes| {
        let sealed = split(bytes).into_iter().map(|item| {
            let mut item = item.to_vec();
            seal_value(&mut item);
            item
        });
        *bytes = join(sealed);
    },
    run: |bytes| {
        let readable = |item: &&[u8]| codec::decode::<Command>("fuzz", item).is_ok();
        let commands: Vec<&[u8]> = split(bytes).into_iter().filter(readable).collect();
        if commands.is_empty() {
            return Verdict::Refused;
        }
        let entries: Vec<Entry> = (1..)
            .zip(&commands)
            .map(|(index, command)| Entry {
                position: LogPosition { term: 1, node: 1, index },
                time_ms: index,
                payload: Payload::Command(Bytes::copy_from_slice(command)),
            })
            .collect();
        static DATABASES: LazyLock<[StateDb; 2]> = LazyLock::new(|| [new_db(1 << 20), new_db(0)]);
        DATABASES.iter().for_each(empty);
        let [mut at_once, mut one_by_one] = [0, 1].map(|place| Rig::new(DATABASES[place].clone()));
        let replies = at_once.apply(entries.clone());
        let others: Vec<Reply> =
            entries.into_iter().flat_map(|entry| one_by_one.apply(vec![entry])).collect();
        assert_eq!(replies, others, "how entries are gathered, or what is remembered, changes what they do");
        assert_eq!(at_once.hashes(), one_by_one.hashes());
        at_once.read_history();
        for reply in &replies {
            let again = codec::decode::<Reply>("fuzz", &codec::encode(reply));
            assert_eq!(again.as_ref().expect("a reply can be read"), reply);
        }
        Verdict::Accepted(join(commands.into_iter().map(<[u8]>::to_vec)))
    },
    bytes_max: 16 << 10,
    ..BASE
};

/// A state with a little history, made once.
fn watched() -> Arc<Published> {
    static PUBLISHED: LazyLock<Arc<Published>> = LazyLock::new(|| {
        let mut rig = Rig::new(new_db(1 << 20));
        let put = |index: u64| {
            let key = Bytes::copy_from_slice(&b"abk"[(index % 3) as usize..][..1]);
            let put = Operation::Put(Put {
                space: Space::User,
                key,
                value: index.to_string().into(),
                lease: mainstay::types::LeaseId::NONE,
                prev_kv: false,
                ignore_value: false,
                ignore_lease: false,
            });
            let operation = match index {
                10 => Operation::Compact { space: Space::User, revision: Revision(5) },
                _ => put,
            };
            Entry {
                position: LogPosition { term: 1, node: 1, index },
                time_ms: index,
                payload: Payload::Command(codec::encode(&Command::internal(operation)).into()),
            }
        };
        rig.apply((1..20).map(put).collect());
        rig.machine.db().flush().expect("the history is written");
        rig.machine.published()
    });
    PUBLISHED.clone()
}

pub const WATCH: Target = Target {
    name: "watch",
    what: "the requests of a client's stream of watches",
    draw: |rng| {
        let requests = (0..1 + rng.below(8)).map(|_| draw_watch(rng).encode_to_vec());
        Input { bytes: join(requests), is_whole: false }
    },
    run: |bytes| {
        let requests: Vec<WatchRequest> =
            split(bytes).into_iter().filter_map(|item| WatchRequest::decode(item).ok()).collect();
        if requests.is_empty() {
            return Verdict::Refused;
        }
        let options = HubOptions { inline_reads: true, ..HubOptions::default() };
        let hub = Hub::new(watched(), options);
        let mut stream = hub.stream();
        for request in &requests {
            match &request.request_union {
                Some(RequestUnion::CreateRequest(create)) if create.start_revision >= 0 => {
                    let id = Some(create.watch_id).filter(|id| *id != 0);
                    // One that exists, or an empty range, is refused.
                    let _ = stream.create(id, watch_spec(create.clone()));
                }
                Some(RequestUnion::CancelRequest(cancel)) => stream.cancel(cancel.watch_id),
                Some(RequestUnion::ProgressRequest(_)) => stream.request_progress(),
                _ => {}
            }
            for _ in 0..4 {
                let _ = stream.next().now_or_never();
            }
        }
        Verdict::Accepted(join(requests.iter().map(|request| request.encode_to_vec())))
    },
    bytes_max: 4 << 10,
    ..BASE
};
