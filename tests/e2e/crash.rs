//! Nothing acknowledged is lost, whatever dies when: kill -9 of random nodes,
//! all at once too, again and again under load.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use etcd_client::{GetOptions, PutOptions};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::Mutex;

use crate::checks::*;
use crate::cluster::{Cluster, Spec, connect, on_own_cluster};
use crate::raw::WatchCreate;
use crate::semantics_watch::{Watch, told};

const KILLS: usize = 50;
const WRITERS: usize = 6;

/// One write as its writer saw it.
#[derive(Clone, Debug)]
struct Write {
    number: u64,
    /// `None`: the outcome is unknown.
    revision: Option<i64>,
    invoked: Instant,
    answered: Instant,
}

/// A writer owns one key and puts rising numbers until told to stop.
async fn write(
    key: String,
    endpoints: Vec<String>,
    stop: Arc<AtomicBool>,
    log: Arc<Mutex<Vec<Write>>>,
    acked: Arc<AtomicU64>,
) {
    let mut number = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut client = connect(&endpoints).await;
        while !stop.load(Ordering::Relaxed) {
            number += 1;
            let invoked = Instant::now();
            let call = client.put(key.as_str(), number.to_string(), None);
            let result = tokio::time::timeout(Duration::from_secs(3), call).await;
            let answered = Instant::now();
            let revision = match &result {
                Ok(Ok(put)) => Some(put.header().expect("every answer has one").revision()),
                _ => None,
            };
            log.lock().await.push(Write { number, revision, invoked, answered });
            if revision.is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
                break;
            }
            acked.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Everything that ever happened to the writers' keys, by the node's own history.
async fn history(c: &Cluster, node: usize, until: i64) -> Vec<(String, i64)> {
    let mut watch = Watch::open(c, node, &[]).await;
    watch
        .create(WatchCreate {
            key: b"w/".to_vec(),
            range_end: b"w0".to_vec(),
            start_revision: 1,
            ..Default::default()
        })
        .await;
    let mut all = Vec::new();
    while all.last().is_none_or(|(_, revision)| *revision < until) {
        all.extend(watch.next().await.events.iter().map(|event| told(event, "w/")));
    }
    all
}

/// Acknowledged writes are there at their revisions; no number comes twice or out of order;
/// a write answered before another was asked stands before it.
fn check(writer: usize, writes: &[Write], story: &[(String, i64)]) {
    let prefix = format!("+{writer}=");
    let mine: Vec<(u64, i64)> = story
        .iter()
        .filter_map(|(text, revision)| Some((text.strip_prefix(&prefix)?.parse().ok()?, *revision)))
        .collect();
    assert!(mine.windows(2).all(|pair| pair[0].1 < pair[1].1), "writer {writer}: revisions rise");
    let mut found = mine.iter().peekable();
    let mut last_acknowledged = 0;
    for write in writes {
        let at = mine.iter().find(|(number, _)| *number == write.number).map(|(_, revision)| *revision);
        match write.revision {
            Some(revision) => {
                assert_eq!(
                    at,
                    Some(revision),
                    "writer {writer}: acknowledged write {} is not there",
                    write.number
                );
                assert!(revision > last_acknowledged, "writer {writer}: write {} went back", write.number);
                last_acknowledged = revision;
            }
            // Unknown: absent, or present exactly once (a late one may stand behind acknowledged ones).
            None => assert!(mine.iter().filter(|(number, _)| *number == write.number).count() <= 1),
        }
    }
    assert!(found.all(|(number, _)| writes.iter().any(|write| write.number == *number)), "invented");
}

#[test]
fn no_acknowledged_write_is_lost_when_nodes_die_at_random() {
    on_own_cluster(Spec::nodes(3).flag("snapshot-count", 2000), async |c| {
        let seed = seed("crash::no_acknowledged_write_is_lost_when_nodes_die_at_random");
        let mut random = StdRng::seed_from_u64(seed);
        let (stop, acked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writers = Vec::new();
        for i in 0..WRITERS {
            let log = Arc::new(Mutex::new(Vec::new()));
            // Half of them know one node only, half of them all.
            let endpoints = if i % 2 == 0 { vec![c.nodes[i % 3].url()] } else { c.endpoints() };
            let task =
                tokio::spawn(write(format!("w/{i}"), endpoints, stop.clone(), log.clone(), acked.clone()));
            writers.push((task, log));
        }
        let (mut kills, mut rounds_without_progress, mut slowest) = (0, 0, Duration::ZERO);
        let began = Instant::now();
        while kills < KILLS {
            let before = acked.load(Ordering::Relaxed);
            // All at once in half of the rounds, else one or two.
            let victims: Vec<usize> = match random.random_range(0..4) {
                0 | 1 => vec![0, 1, 2],
                2 => vec![random.random_range(0..3)],
                _ => {
                    let spared = random.random_range(0..3);
                    (0..3).filter(|i| *i != spared).collect()
                }
            };
            tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
            for victim in &victims {
                c.nodes[*victim].kill();
                kills += 1;
            }
            tokio::time::sleep(Duration::from_millis(random.random_range(0..150))).await;
            let back = Instant::now();
            c.start_all();
            // Not always until all is well: sometimes the next blow comes while they start.
            if random.random_range(0..5) > 0 {
                c.wait_ready().await;
                let limit = Instant::now() + Duration::from_secs(20);
                while acked.load(Ordering::Relaxed) < before + 20 && Instant::now() < limit {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                slowest = slowest.max(back.elapsed());
            }
            rounds_without_progress += usize::from(acked.load(Ordering::Relaxed) == before);
        }
        c.wait_ready().await;
        stop.store(true, Ordering::Relaxed);
        let mut logs = Vec::new();
        for (task, log) in writers {
            task.await.unwrap();
            logs.push(Arc::try_unwrap(log).unwrap().into_inner());
        }
        let took = began.elapsed();
        c.client(0).await.put("w/end", "0", None).await.unwrap();
        let end = revision(&mut c.client(0).await).await;
        let mut stories = Vec::new();
        for node in 0..3 {
            revision(&mut c.client(node).await).await;
            stories.push(history(c, node, end).await);
        }
        assert!(stories[0] == stories[1] && stories[1] == stories[2], "the nodes tell different stories");
        for (writer, writes) in logs.iter().enumerate() {
            check(writer, writes, &stories[0]);
        }
        real_time(&logs);
        let mut hashes = Vec::new();
        for node in 0..3 {
            hashes.push(hash_kv(&mut c.client(node).await, end).await);
        }
        assert!(hashes.iter().all(|hash| *hash == hashes[0]), "{hashes:?}");
        let unknown = logs.iter().flatten().filter(|write| write.revision.is_none()).count();
        eprintln!(
            "REPORT crash: {kills} kills in {took:?}, {} acknowledged, {unknown} unknown, slowest recovery {slowest:?}",
            acked.load(Ordering::Relaxed)
        );
        assert!(acked.load(Ordering::Relaxed) > 500, "too little was written to prove anything");
        assert!(rounds_without_progress < KILLS / 3, "the load did not run between the kills");
    });
}

/// Across writers: answered before asked means a smaller revision.
fn real_time(logs: &[Vec<Write>]) {
    let mut all: Vec<&Write> = logs.iter().flatten().filter(|write| write.revision.is_some()).collect();
    all.sort_by_key(|write| write.invoked);
    let mut answered: Vec<&Write> = all.clone();
    answered.sort_by_key(|write| write.answered);
    let (mut highest, mut next) = (0, 0);
    for write in all {
        while next < answered.len() && answered[next].answered < write.invoked {
            highest = highest.max(answered[next].revision.expect("only acknowledged ones"));
            next += 1;
        }
        let revision = write.revision.expect("only acknowledged ones");
        assert!(revision > highest, "write {write:?} stands before one answered earlier ({highest})");
    }
}

#[test]
fn a_node_killed_between_snapshots_comes_back_with_everything() {
    on_own_cluster(Spec::nodes(1).flag("snapshot-count", 100), async |c| {
        let mut expected = Vec::new();
        for round in 0..6 {
            let mut client = c.client(0).await;
            let lease = client.lease_grant(1000, None).await.unwrap().id();
            for i in 0..130 {
                let key = format!("k{:03}", (round * 37 + i) % 200);
                let options = (i % 10 == 0).then(|| PutOptions::new().with_lease(lease));
                client.put(key, format!("{round}-{i}"), options).await.unwrap();
            }
            if round == 3 {
                let at = revision(&mut client).await;
                client.compact(at - 50, None).await.unwrap();
            }
            let all = client.get("k", Some(GetOptions::new().with_prefix())).await.unwrap();
            expected.clear();
            expected.extend(all.kvs().iter().map(|kv| (kv.key().to_vec(), marks(kv), kv.lease())));
            let at = all.header().unwrap().revision();
            let hash = hash_kv(&mut client, at).await;
            c.nodes[0].kill();
            c.start_all();
            c.wait_ready().await;
            let mut client = c.client(0).await;
            let all = client.get("k", Some(GetOptions::new().with_prefix())).await.unwrap();
            let got: Vec<_> = all.kvs().iter().map(|kv| (kv.key().to_vec(), marks(kv), kv.lease())).collect();
            assert_eq!(got, expected, "round {round}");
            assert_eq!(all.header().unwrap().revision(), at);
            assert_eq!(hash_kv(&mut client, at).await, hash);
        }
    });
}
