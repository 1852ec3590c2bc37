//! The SDK as the load uses it, and the history of the store as a foreign client
//! tells it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mainstay::client::{
    Batch, CacheOptions, Client, ClientError, Consistency, Filter, GetOptions, Level, Start,
};
use mainstay::types::{Event, EventKind, KeyRange, KeyValue, LeaseId, Revision, Space};
use parking_lot::Mutex;

use super::BOUND;
use super::judge::Kind;

/// How long a subscription may take to tell what is left.
const FINISH_LIMIT: Duration = Duration::from_secs(30);

/// What a read gave.
pub struct Seen {
    pub kv: Option<KeyValue>,
    pub level: &'static str,
}

/// One client as a service has it: members are found, writes carry request ids, reads are cached.
pub struct Sdk {
    client: Client,
}

impl Sdk {
    /// Its cache holds what is read, and in `dir` if there is one.
    pub async fn connect(endpoints: &[String], dir: Option<PathBuf>) -> Result<Sdk, ClientError> {
        let cache = CacheOptions { prefixes: vec!["chaos/".into()], dir, ..CacheOptions::default() };
        let client = Client::builder(endpoints.iter().cloned()).cache(cache).connect().await?;
        Ok(Sdk { client })
    }

    pub async fn read(&self, key: &str, kind: Kind) -> Result<Seen, ClientError> {
        let consistency = match kind {
            Kind::Bounded => Consistency::Bounded(BOUND),
            Kind::Eventual => Consistency::Eventual,
            Kind::Strong | Kind::Write => Consistency::Strong,
        };
        let answer = self.client.cache().expect("built with one").get(key, consistency).await?;
        let level = match answer.level {
            Level::L1 => "L1",
            Level::L2 => "L2",
            Level::L3 => "L3",
            Level::Server => "server",
        };
        Ok(Seen { kv: answer.kv, level })
    }

    pub async fn write(&self, key: &str, value: String) -> Result<Revision, ClientError> {
        Ok(self.client.put(key.to_owned(), value).await?.revision)
    }

    pub async fn revision(&self) -> Result<Revision, ClientError> {
        Ok(self.client.range(GetOptions::key("chaos").count_only()).await?.revision)
    }
}

/// The filters of the subscriptions.
pub fn filters() -> Vec<(&'static str, Filter)> {
    let some = Filter::suffix("3").expect("not empty");
    let glob = Filter::glob("chaos/1*-*").expect("a pattern");
    let regex = Filter::regex("^chaos/[0-4][05]-").expect("an expression");
    vec![
        ("everything", Filter::prefix("chaos/")),
        ("everything, again", Filter::prefix("chaos/")),
        ("suffix", Filter::prefix("chaos/") & some),
        ("glob", glob),
        ("regex", Filter::prefix("chaos/") & regex),
    ]
}

/// What a subscription has told.
pub struct Told {
    pub filter: Filter,
    pub events: Vec<Event>,
    pub batches: u64,
    pub resumes: u64,
}

/// A subscription whose batches are kept.
pub struct Subscriber {
    name: &'static str,
    filter: Filter,
    delivery: mainstay::client::Delivery,
    batches: Arc<Mutex<Vec<Batch>>>,
}

impl Subscriber {
    pub async fn open(
        sdk: &Sdk,
        (name, filter): (&'static str, Filter),
        after: Revision,
    ) -> Result<Subscriber, ClientError> {
        let batches = Arc::new(Mutex::new(Vec::new()));
        let kept = batches.clone();
        let builder = sdk.client.subscribe(filter.clone()).start(Start::Revision(after.next()));
        let delivery = builder
            .deliver(move |batch| {
                kept.lock().push(batch);
                std::future::ready(())
            })
            .await?;
        Ok(Subscriber { name, filter, delivery, batches })
    }

    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// Waits until everything up to `last` has been handed out, and a little for what comes too much.
    pub async fn finish(self, last: Revision) -> (&'static str, Told) {
        let all_told = async {
            loop {
                let stats = self.delivery.handle().stats();
                tokio::time::sleep(Duration::from_millis(200)).await;
                if stats.delivered_revision >= last && stats.queued == 0 {
                    return;
                }
            }
        };
        if tokio::time::timeout(FINISH_LIMIT, all_told).await.is_err() {
            println!(
                "{}: not all was told within {FINISH_LIMIT:?}: {:?}",
                self.name,
                self.delivery.handle().stats()
            );
        }
        let stats = self.delivery.handle().stats();
        self.delivery.handle().cancel();
        let _ = self.delivery.ended().await;
        let batches = std::mem::take(&mut *self.batches.lock());
        let mut events = Vec::new();
        for batch in &batches {
            // Nothing was compacted, so that a snapshot would hide a gap.
            if batch.snapshot.is_some() || batch.merged + batch.dropped > 0 {
                println!("{}: a batch that is not all events: {batch:?}", self.name);
            } else {
                events.extend(batch.events.iter().cloned());
            }
        }
        let told =
            Told { filter: self.filter, events, batches: batches.len() as u64, resumes: stats.resumes };
        (self.name, told)
    }
}

/// Everything that happened to the keys of the load, told by a foreign client.
pub async fn history(endpoints: &[String], after: Revision, end: Revision) -> Vec<Event> {
    let mut client = crate::cluster::connect_patient(endpoints).await;
    let options = etcd_client::WatchOptions::new()
        .with_prefix()
        .with_start_revision(after.0 + 1)
        .with_progress_notify();
    let mut watch = client.watch("", Some(options)).await.expect("a watch");
    let mut events: Vec<Event> = Vec::new();
    let mut at = 0;
    while at < end.0 {
        let next = tokio::time::timeout(FINISH_LIMIT, watch.message()).await.expect("history ends at `end`");
        let response = next.expect("the watch goes on").expect("the watch goes on");
        for event in response.events() {
            let kv = event.kv().expect("an event has a key");
            at = at.max(kv.mod_revision());
            events.push(Event {
                space: Space::User,
                kind: match event.event_type() {
                    etcd_client::EventType::Put => EventKind::Put,
                    etcd_client::EventType::Delete => EventKind::Delete,
                },
                kv: KeyValue {
                    key: kv.key().to_vec().into(),
                    value: kv.value().to_vec().into(),
                    create_revision: Revision(kv.create_revision()),
                    mod_revision: Revision(kv.mod_revision()),
                    version: kv.version(),
                    lease: LeaseId(kv.lease()),
                },
                prev: None,
            });
        }
    }
    let chaos = KeyRange::prefix("chaos/".into());
    events.retain(|event| chaos.contains(&event.kv.key) && event.kv.mod_revision <= end);
    events
}
