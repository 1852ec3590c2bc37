//! The durable level: offline starts, and files that are not what they should be.

use std::time::Duration;

use super::store::{CLUSTER, Dir, Store, eventually};
use crate::client::ClientError;
use crate::client::cache::{
    Cache, CacheError, CacheOptions, Consistency, DiskState, Level, OnTrouble, Phase,
};

const SECOND: Duration = Duration::from_secs(1);

fn options(dir: &Dir) -> CacheOptions {
    CacheOptions {
        dir: Some(dir.path().into()),
        prefixes: vec!["a/".into()],
        verify_interval: SECOND,
        ..CacheOptions::default()
    }
}

async fn filled(store: &std::sync::Arc<Store>, dir: &Dir, count: usize) {
    for i in 0..count {
        store.put(&format!("a/{i}"), &format!("value {i}"));
    }
    store.set("a/binary", Some(bytes::Bytes::from_static(&[0xff, 0, 0xfe, 0x80])));
    store.put("other", "elsewhere");
    let cache = store.open(options(dir)).await;
    cache.wait_for(|state| state.is_live()).await.unwrap();
    cache.get("other", Consistency::Eventual).await.unwrap();
    cache.close().await;
}

async fn text(cache: &Cache, key: &str) -> Option<String> {
    let answer = cache.get(key, Consistency::Eventual).await.expect("an answer");
    answer.kv.map(|kv| String::from_utf8_lossy(&kv.value).into_owned())
}

#[tokio::test(start_paused = true)]
async fn it_starts_while_the_store_is_down_and_catches_up() {
    let (store, dir) = (Store::new(), Dir::new());
    filled(&store, &dir, 100).await;
    store.with(|store| store.down = true);
    let cache = store.open(options(&dir)).await;
    let answer = cache.get("a/7", Consistency::Eventual).await.unwrap();
    assert_eq!((answer.level, answer.stale), (Level::L3, true));
    assert!(answer.age.is_some());
    assert_eq!(cache.get("a/7", Consistency::Eventual).await.unwrap().level, Level::L1);
    assert_eq!(text(&cache, "a/none").await, None);
    assert_eq!(text(&cache, "other").await.as_deref(), Some("elsewhere"));
    let binary = cache.get("a/binary", Consistency::Eventual).await.unwrap();
    assert_eq!(&binary.kv.unwrap().value[..], [0xff, 0, 0xfe, 0x80]);
    assert!(
        cache.get("a/7", Consistency::Bounded(3600 * SECOND)).await.is_err(),
        "the wall clock proves nothing"
    );
    assert_eq!(cache.state().scopes[0].phase, Phase::Offline);

    store.put("a/7", "new");
    store.set("a/8", None);
    store.with(|store| store.down = false);
    cache.wait_for(|state| state.is_live()).await.unwrap();
    eventually("the change is here", || cache.state().scopes[0].revision.0 >= 104).await;
    assert_eq!(text(&cache, "a/7").await.as_deref(), Some("new"));
    assert_eq!(text(&cache, "a/8").await, None);
    assert_eq!(store.inner.lock().snapshots, 1, "it resumed where the disk was");
}

#[tokio::test(start_paused = true)]
async fn a_compaction_while_it_was_away_is_made_good() {
    let (store, dir) = (Store::new(), Dir::new());
    filled(&store, &dir, 20).await;
    store.set("a/3", None);
    store.put("a/4", "new");
    store.with(|store| store.compacted = store.revision);
    let cache = store.open(options(&dir)).await;
    cache.wait_for(|state| state.is_live()).await.unwrap();
    cache.close().await;
    store.with(|store| store.down = true);
    let cache = store.open(options(&dir)).await;
    assert_eq!(text(&cache, "a/3").await, None);
    assert_eq!(text(&cache, "a/4").await.as_deref(), Some("new"));
    assert_eq!(text(&cache, "a/5").await.as_deref(), Some("value 5"));
}

#[tokio::test(start_paused = true)]
async fn one_directory_is_for_one_cache() {
    let (store, dir) = (Store::new(), Dir::new());
    let first = store.open(options(&dir)).await;
    let refused = Cache::over(std::sync::Arc::new(store.clone()), options(&dir), None).await.unwrap_err();
    assert!(
        matches!(&refused, ClientError::Cache(CacheError::InUse { path }) if path == dir.path()),
        "{refused}"
    );
    assert!(refused.to_string().contains(&dir.path().display().to_string()));
    let memory = store.open(CacheOptions { on_trouble: OnTrouble::MemoryOnly, ..options(&dir) }).await;
    assert!(matches!(memory.state().disk, DiskState::Failed { .. }));
    first.close().await;
    store.open(options(&dir)).await.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_file_of_another_cluster_is_refused_and_stays() {
    let (store, dir) = (Store::new(), Dir::new());
    filled(&store, &dir, 5).await;
    let refused = Cache::over(std::sync::Arc::new(store.clone()), options(&dir), Some(9)).await.unwrap_err();
    let ClientError::Cache(CacheError::ForeignCluster { expected, actual, .. }) = refused else {
        panic!("{refused}")
    };
    assert_eq!((expected, actual), (CLUSTER, 9));
    let cache = Cache::over(std::sync::Arc::new(store.clone()), options(&dir), Some(CLUSTER)).await.unwrap();
    assert_eq!(text(&cache, "a/1").await.as_deref(), Some("value 1"));
    cache.close().await;

    // Without a known id it is the store's answer that tells, and nothing is taken in.
    store.with(|store| store.cluster = 9);
    store.put("a/1", "foreign");
    let cache = store.open(options(&dir)).await;
    eventually("it is noticed", || cache.state().foreign_cluster == Some(9)).await;
    assert_eq!(text(&cache, "a/1").await.as_deref(), Some("value 1"));
    assert!(cache.get("a/1", Consistency::Strong).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_a_directory_is_named() {
    let (store, dir) = (Store::new(), Dir::new());
    std::fs::write(dir.path(), "a file").unwrap();
    let refused = Cache::over(std::sync::Arc::new(store.clone()), options(&dir), None).await.unwrap_err();
    assert!(matches!(&refused, ClientError::Cache(CacheError::Disk { .. })), "{refused}");
    assert!(refused.to_string().contains(&dir.path().display().to_string()));
    std::fs::remove_file(dir.path()).unwrap();
}

/// Opens a file that was tampered with; the cache must work and tell no lies.
async fn opened_anew(store: &std::sync::Arc<Store>, dir: &Dir) {
    let cache = store.open(options(dir)).await;
    cache.wait_for(|state| state.is_live()).await.unwrap();
    assert_eq!(text(&cache, "a/1").await.as_deref(), Some("value 1"));
    assert_eq!(cache.state().disk, DiskState::Working);
    cache.close().await;
    assert!(dir.path().join("cache.redb.aside").exists());
}

#[tokio::test(start_paused = true)]
async fn a_file_that_was_cut_in_half_is_set_aside() {
    let (store, dir) = (Store::new(), Dir::new());
    filled(&store, &dir, 2000).await;
    let file = std::fs::OpenOptions::new().write(true).open(dir.file()).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    drop(file);
    opened_anew(&store, &dir).await;
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_no_cache_is_set_aside() {
    let (store, dir) = (Store::new(), Dir::new());
    filled(&store, &dir, 2).await;
    std::fs::write(dir.file(), "this is no cache ".repeat(1000)).unwrap();
    opened_anew(&store, &dir).await;
}

#[tokio::test(start_paused = true)]
async fn a_file_of_another_version_is_set_aside() {
    let (store, dir) = (Store::new(), Dir::new());
    filled(&store, &dir, 2).await;
    let db = redb::Database::open(dir.file()).unwrap();
    let txn = db.begin_write().unwrap();
    txn.open_table(redb::TableDefinition::<&str, u64>::new("meta")).unwrap().insert("format", 2).unwrap();
    txn.commit().unwrap();
    drop(db);
    opened_anew(&store, &dir).await;
}

#[tokio::test(start_paused = true)]
async fn a_prefix_that_nobody_watches_any_more_is_dropped() {
    let (store, dir) = (Store::new(), Dir::new());
    filled(&store, &dir, 100).await;
    let cache = store.open(CacheOptions { prefixes: vec!["a/b".into()], ..options(&dir) }).await;
    cache.wait_for(|state| state.is_live()).await.unwrap();
    assert_eq!(
        text(&cache, "a/binary").await.map(|text| text.len()),
        Some("\u{fffd}\0\u{fffd}\u{fffd}".len())
    );
    cache.close().await;
    store.with(|store| store.down = true);
    let cache = store.open(CacheOptions { prefixes: vec!["a/b".into()], ..options(&dir) }).await;
    assert!(cache.get("a/1", Consistency::Eventual).await.is_err());
    assert!(cache.get("a/binary", Consistency::Eventual).await.unwrap().kv.is_some());
}

#[tokio::test(start_paused = true)]
async fn watched_prefixes_that_do_not_fit_stop_the_disk_and_nothing_else() {
    let (store, dir) = (Store::new(), Dir::new());
    let mut random = 1u64;
    let mut noise = |bytes: usize| -> bytes::Bytes {
        let step = |random: &mut u64| {
            *random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (*random >> 56) as u8
        };
        (0..bytes).map(|_| step(&mut random)).collect()
    };
    let cache = store.open(CacheOptions { l3_bytes: 1 << 20, ..options(&dir) }).await;
    // Other keys make room for each other.
    for i in 0..40 {
        store.set(&format!("k{i}"), Some(noise(50_000)));
        cache.get(format!("k{i}"), Consistency::Eventual).await.unwrap();
    }
    eventually("they are written", || cache.stats().l3_bytes > 500_000).await;
    assert!(cache.stats().l3_bytes <= 1 << 20);
    assert_eq!(cache.state().disk, DiskState::Working);
    for i in 0..40 {
        store.set(&format!("a/{i}"), Some(noise(50_000)));
    }
    let failed = cache.wait_for(|state| matches!(state.disk, DiskState::Failed { .. })).await.unwrap();
    assert!(format!("{:?}", failed.disk).contains("l3_bytes is 1048576"), "{:?}", failed.disk);
    for i in 0..40 {
        let answer = cache.get(format!("a/{i}"), Consistency::Bounded(5 * SECOND)).await.unwrap();
        assert_eq!(answer.kv.map(|kv| kv.value.len()), Some(50_000));
    }
}

/// Whatever is done to the bytes of the file: what is handed out of it without the
/// store is either right or nothing, and with the store all is right.
#[test]
fn no_damage_to_the_file_makes_a_wrong_answer() {
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    let (store, dir) = (Store::new(), Dir::new());
    runtime().block_on(filled(&store, &dir, 300));
    let whole = std::fs::read(dir.file()).unwrap();
    let used: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != 0).collect();
    let mut random = 88_172_645_463_325_252u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random >> 11) as usize % below
    };
    let mut damage_seen = 0;
    for round in 0..40 {
        let mut bytes = whole.clone();
        for _ in 0..=round % 4 {
            // Most of the file is empty: half of the hits go where something is.
            let at = if round % 2 == 0 { used[next(used.len())] } else { next(bytes.len()) };
            let end = (at + 1 + next(if round % 3 == 0 { 4000 } else { 4 })).min(bytes.len());
            bytes[at..end].iter_mut().for_each(|byte| *byte ^= 1 + next(255) as u8);
        }
        std::fs::write(dir.file(), &bytes).unwrap();
        runtime().block_on(async {
            store.with(|store| store.down = true);
            let cache = store.open(options(&dir)).await;
            for i in 0..300 {
                let answer = cache.get(format!("a/{i}"), Consistency::Eventual).await;
                match answer.map(|answer| answer.kv.map(|kv| kv.value)) {
                    Ok(value) => assert_eq!(value, Some(format!("value {i}").into()), "round {round}"),
                    Err(_) => damage_seen += 1,
                }
            }
            store.with(|store| store.down = false);
            cache.wait_for(|state| state.is_live()).await.unwrap();
            for i in 0..300 {
                assert_eq!(
                    text(&cache, &format!("a/{i}")).await,
                    Some(format!("value {i}")),
                    "round {round}"
                );
            }
            cache.close().await;
        });
    }
    assert!(damage_seen > 0, "nothing was ever hit");
}
