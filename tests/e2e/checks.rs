//! Small words the tests share: errors by code and message, keys by prefix,
//! things that must become true.

use std::time::{Duration, Instant};

use etcd_client::{Client, Error, GetOptions, GetResponse, KeyValue};
use tonic::Code;

/// How long something that must become true may take.
pub const SOON: Duration = Duration::from_secs(20);

/// Asserts that a call was refused with exactly this code and message.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, Error>, code: Code, message: &str) {
    match result {
        Err(Error::GRpcStatus(status)) => {
            assert_eq!((status.code(), status.message()), (code, message));
        }
        other => panic!("expected {code:?} {message:?}, got {other:?}"),
    }
}

/// Asserts that a raw call was refused with exactly this code and message.
#[track_caller]
pub fn raw_refused<T: std::fmt::Debug>(result: Result<T, tonic::Status>, code: Code, message: &str) {
    match result {
        Err(status) => assert_eq!((status.code(), status.message()), (code, message)),
        other => panic!("expected {code:?} {message:?}, got {other:?}"),
    }
}

/// The status of a refused call.
#[track_caller]
pub fn status_of<T: std::fmt::Debug>(result: Result<T, Error>) -> tonic::Status {
    match result {
        Err(Error::GRpcStatus(status)) => status,
        other => panic!("expected a status, got {other:?}"),
    }
}

/// A key prefix nobody else has.
pub fn unique(label: &str) -> String {
    format!("{label}-{:016x}/", rand::random::<u64>())
}

/// Keys of a response as text.
pub fn keys(response: &GetResponse) -> Vec<String> {
    response.kvs().iter().map(|kv| String::from_utf8_lossy(kv.key()).into_owned()).collect()
}

/// Keys of a response as text, without their prefix.
pub fn short_keys(response: &GetResponse, prefix: &str) -> Vec<String> {
    keys(response).iter().map(|key| key.strip_prefix(prefix).unwrap_or(key).to_owned()).collect()
}

/// Create revision, mod revision, version, value as text.
pub fn marks(kv: &KeyValue) -> (i64, i64, i64, String) {
    (kv.create_revision(), kv.mod_revision(), kv.version(), String::from_utf8_lossy(kv.value()).into_owned())
}

/// The one key of that name, read linearizably.
pub async fn get_one(client: &mut Client, key: &str) -> Option<KeyValue> {
    client.get(key, None).await.expect("a read").kvs().first().cloned()
}

/// The value of a key as text, read linearizably.
pub async fn value(client: &mut Client, key: &str) -> Option<String> {
    get_one(client, key).await.map(|kv| String::from_utf8_lossy(kv.value()).into_owned())
}

/// The revision of the header of a fresh linearizable read.
pub async fn revision(client: &mut Client) -> i64 {
    let response = client.get("revision?", Some(GetOptions::new().with_count_only())).await.expect("a read");
    response.header().expect("every answer has one").revision()
}

/// Polls until `check` gives something, or fails naming what did not happen.
pub async fn eventually<T>(what: &str, limit: Duration, mut check: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(found) = check().await {
            return found;
        }
        assert!(Instant::now() < deadline, "did not happen within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

/// Repeats a member change while the cluster says it is not settled: etcd wants every member
/// connected for some seconds before it changes any.
pub async fn settled<T>(mut change: impl AsyncFnMut() -> Result<T, Error>) -> Result<T, Error> {
    let deadline = Instant::now() + SOON;
    loop {
        match change().await {
            Err(Error::GRpcStatus(status))
                if status.code() == Code::Unavailable && Instant::now() < deadline =>
            {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            other => return other,
        }
    }
}

/// The HashKV of one node at a revision, 0 for its newest.
pub async fn hash_kv(client: &mut Client, revision: i64) -> (u32, i64) {
    let response = client.hash_kv(revision).await.expect("a hash");
    (response.hash(), response.compact_version())
}

/// The seed of a random test: from the environment, or drawn; printed with the replay command.
pub fn seed(test: &str) -> u64 {
    let seed =
        std::env::var("MAINSTAY_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(rand::random);
    eprintln!(
        "seed {seed}; replay: MAINSTAY_TEST_SEED={seed} cargo test --release --test e2e {test} -- --exact"
    );
    seed
}
