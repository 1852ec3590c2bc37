//! Bindings by their rules: keys as paths, values as the type wants them, and a
//! value that outlives everything that is not good.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::follow::{Reader, Source, start};
use super::tree::{DEPTH_MAX, Place};
use super::*;
use crate::client::{ClientError, MirrorUpdate, WatchBatch};
use crate::env::SystemEnv;
use crate::types::{Event, EventKind, KeyValue, LeaseId};

fn reader<T>(format: Format) -> Reader<T> {
    Reader { place: Place::below("p/"), format, default: None, check: None, reads: PhantomData }
}

fn map<V: AsRef<[u8]>>(kvs: &[(&str, V)]) -> BTreeMap<Bytes, Bytes> {
    kvs.iter()
        .map(|(key, value)| (Bytes::from((*key).to_owned()), Bytes::copy_from_slice(value.as_ref())))
        .collect()
}

fn read_as<T: DeserializeOwned>(format: Format, kvs: &[(&str, &str)]) -> Result<T, BindError> {
    reader(format).read(&map(kvs))
}

fn auto<T: DeserializeOwned>(kvs: &[(&str, &str)]) -> Result<T, BindError> {
    read_as(Format::Auto, kvs)
}

/// The one value, read from the key `p/v`.
fn value<T: DeserializeOwned>(text: &str) -> Result<T, BindError> {
    auto::<HashMap<String, T>>(&[("p/v", text)]).map(|mut map| map.remove("v").expect("the one key"))
}

#[track_caller]
fn fails<T: Debug>(result: Result<T, BindError>, words: &str) {
    let text = result.expect_err("must be refused").to_string();
    assert!(text.contains(words), "{text:?} does not say {words:?}");
}

#[derive(Debug, PartialEq, Deserialize)]
struct Settings {
    port: u16,
    #[serde(default)]
    debug: bool,
    host: Option<String>,
    #[serde(default)]
    db: Db,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
struct Db {
    url: String,
    pool: Option<Pool>,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
struct Pool {
    max: u32,
}

#[test]
fn keys_are_paths() {
    let settings: Settings = auto(&[
        ("p/port", "8080"),
        ("p/debug", "true\n"),
        ("p/host", "example.org"),
        ("p/db/url", "pg://x"),
        ("p//db/pool//max/", "7"),
        ("p/unknown", "{ not read by anyone"),
    ])
    .expect("good keys");
    let db = Db { url: "pg://x".into(), pool: Some(Pool { max: 7 }) };
    assert_eq!(settings, Settings { port: 8080, debug: true, host: Some("example.org".into()), db });
}

#[test]
fn a_prefix_is_a_folder() {
    assert_eq!(Place::below("svc/checkout"), Place::below("svc/checkout/"));
    assert_eq!(Place::below("").start, "");
}

#[test]
fn folder_marks_are_left_out() {
    let pool: Pool = auto(&[("p/", ""), ("p/max", "1"), ("p/max/", "")]).expect("good keys");
    assert_eq!(pool.max, 1);
    fails(auto::<Pool>(&[("p/", "")]), "no key below `p/`");
}

#[test]
fn a_place_belongs_to_one_key() {
    for (kvs, words) in [
        (&[("p/a", "1"), ("p/a/b", "2")][..], ["`p/a/b`", "`p/a`"]),
        (&[("p//a", "1"), ("p/a", "2")], ["`p//a`", "`p/a`"]),
        (&[("p/a.json", "1"), ("p/a.toml", "x=2")], ["`p/a.json`", "`p/a.toml`"]),
        (&[("p/a.json", "{}"), ("p/a/b", "2")], ["`p/a.json`", "`p/a/b`"]),
        // The folder's key comes first in the order of keys.
        (&[("p/a-/b", "1"), ("p/a/b", "2"), ("p/a//", "3")], ["`p/a//`", "`p/a/b`"]),
        (&[("p/", "1"), ("p/a", "2")], ["`p/`", "`p/a`"]),
    ] {
        let error = auto::<serde_json::Value>(kvs).expect_err("a conflict");
        assert!(matches!(error, BindError::Conflict { .. }), "{error:?}");
        assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
    }
}

#[test]
fn text_is_read_as_the_type_wants_it() {
    assert_eq!(value::<u16>("8080").expect("a number"), 8080);
    assert_eq!(value::<i64>(" -5\n").expect("a number"), -5);
    assert_eq!(value::<f64>("1e3").expect("a number"), 1000.0);
    assert_eq!(value::<f32>("2").expect("a number"), 2.0);
    assert_eq!(value::<u128>("340282366920938463463374607431768211455").expect("a number"), u128::MAX);
    assert!(value::<bool>("true").expect("a truth value"));
    assert_eq!(value::<String>("007").expect("text"), "007");
    assert_eq!(value::<String>(" a\n").expect("text"), " a\n");
    assert_eq!(value::<String>("\"a\\n\"\n").expect("text"), "a\n");
    assert_eq!(value::<String>("\"a\" b").expect("text"), "\"a\" b");
    assert_eq!(value::<String>("[1,2]").expect("text"), "[1,2]");
    assert_eq!(value::<char>("x").expect("a character"), 'x');
    assert_eq!(value::<Option<u8>>("null").expect("nothing"), None);
    assert_eq!(value::<Option<u8>>("1").expect("a number"), Some(1));
    assert_eq!(value::<Vec<u8>>("[1, 2]").expect("a list"), [1, 2]);
    assert_eq!(value::<(u8, String)>("[1, \"a\"]").expect("a pair"), (1, "a".into()));
    assert_eq!(value::<Pool>("{\"max\": 3}").expect("a table"), Pool { max: 3 });
    assert_eq!(value::<serde_json::Value>("8080").expect("JSON"), 8080);
    assert_eq!(value::<serde_json::Value>("80 80").expect("text"), "80 80");
}

#[test]
fn text_is_not_read_as_what_it_is_not() {
    fails(value::<u16>("70000"), "field `v` (key `p/v`): `70000` is no u16: number too large");
    fails(value::<u16>(""), "`` is no u16");
    fails(value::<u16>("8080x"), "`8080x` is no u16: invalid digit");
    fails(value::<bool>("yes"), "`yes` is no bool");
    fails(value::<Vec<u8>>("1,2"), "value of key `p/v` is no JSON at line 1 column 2");
    fails(value::<Vec<u8>>("1"), "expected a sequence");
    fails(value::<Pool>("{\"max\": 3"), "value of key `p/v` is no JSON at line 1 column 9: EOF");
    // Documents mean what they say: text in them is text.
    fails(value::<Pool>("{\"max\": \"3\"}"), "field `v.max` (key `p/v`): invalid type: string \"3\"");
    fails(value::<Pool>("{\"max\": 1, \"max\": 2}"), "the name `max` stands twice");
    fails(auto::<Settings>(&[("p/debug", "true")]), "the whole: missing field `port`");
    fails(auto::<Settings>(&[("p/port", "1"), ("p/db/pool/max", "3")]), "field `db`: missing field `url`");
    fails(auto::<Settings>(&[("p/port/x", "1")]), "field `port`: invalid type: map, expected u16");
    let long = "x".repeat(10_000);
    assert!(value::<u16>(&long).expect_err("no number").to_string().len() < 500, "quotes stay short");
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    Fast,
    Slow { wait_ms: u32 },
    Named(String),
    Pair(u8, u8),
}

#[test]
fn kinds_are_named() {
    assert_eq!(value::<Mode>("fast\n").expect("a kind"), Mode::Fast);
    assert_eq!(value::<Mode>("\"fast\"").expect("a kind"), Mode::Fast);
    assert_eq!(value::<Mode>("{\"slow\": {\"wait_ms\": 5}}").expect("a kind"), Mode::Slow { wait_ms: 5 });
    assert_eq!(auto::<Mode>(&[("p/slow/wait_ms", "5")]).expect("a kind"), Mode::Slow { wait_ms: 5 });
    assert_eq!(auto::<Mode>(&[("p/named", "x")]).expect("a kind"), Mode::Named("x".into()));
    assert_eq!(auto::<Mode>(&[("p/pair", "[1,2]")]).expect("a kind"), Mode::Pair(1, 2));
    fails(value::<Mode>("quick"), "unknown variant `quick`");
    fails(auto::<Mode>(&[("p/named", "x"), ("p/fast", "")]), "one of fast, slow, named, pair is wanted");
    fails(auto::<Mode>(&[("p/slow/wait_ms", "x")]), "field `slow.wait_ms` (key `p/slow/wait_ms`)");
    fails(value::<Mode>("slow"), "`slow` wants content");
}

#[test]
fn a_folder_of_numbers_can_be_a_list() {
    let hosts: Vec<String> = auto(&[("p/10", "c"), ("p/2", "b"), ("p/0", "a")]).expect("a list");
    assert_eq!(hosts, ["a", "b", "c"]);
    fails(auto::<Vec<String>>(&[("p/0", "a"), ("p/01", "b")]), "a list's keys are numbers, and `01` is none");
    let ports: HashMap<u16, String> = auto(&[("p/80", "http"), ("p/443", "https")]).expect("a map");
    assert_eq!(ports[&443], "https");
}

#[test]
fn extensions_name_formats() {
    let settings: Settings =
        auto(&[("p/port", "1"), ("p/db.toml", "url = 'pg://y'\n[pool]\nmax = 9\n")]).expect("good keys");
    assert_eq!(settings.db, Db { url: "pg://y".into(), pool: Some(Pool { max: 9 }) });
    assert_eq!(auto::<Settings>(&[("p/port.json", " 2 ")]).expect("good keys").port, 2);
    fails(
        auto::<Settings>(&[("p/port", "1"), ("p/db.toml", "url = 'x'\npool = = 2\n")]),
        "value of key `p/db.toml` is no TOML at line 2 column 8",
    );
    fails(
        auto::<Settings>(&[("p/port", "1"), ("p/db.toml", "url = 'x'\n[pool]\nmax = -1\n")]),
        "field `db.pool.max` (key `p/db.toml`): invalid value: integer `-1`, expected u32",
    );
    fails(auto::<Settings>(&[("p/port.json", "{\n  \"a\": }")]), "no JSON at line 2 column 8");
    let kept: HashMap<String, String> = read_as(Format::Plain, &[("p/a.json", "{")]).expect("plain text");
    assert_eq!(kept["a.json"], "{");
    let dots: HashMap<String, String> = auto(&[("p/.json", "x"), ("p/v1.2", "y")]).expect("plain names");
    assert_eq!((&dots[".json"][..], &dots["v1.2"][..]), ("x", "y"));
}

#[test]
fn a_format_may_be_fixed() {
    let pools: HashMap<String, Pool> =
        read_as(Format::Toml, &[("p/a", "max = 1"), ("p/b", "max = 2")]).expect("TOML");
    assert_eq!(pools["b"].max, 2);
    let limits: HashMap<String, u8> = read_as(Format::Json, &[("p/a", "1")]).expect("JSON");
    assert_eq!(limits["a"], 1);
    fails(
        read_as::<HashMap<String, u8>>(Format::Json, &[("p/a", "1 2")]),
        "key `p/a` is no JSON at line 1 column 3",
    );
    fails(read_as::<HashMap<String, String>>(Format::Json, &[("p/a", "text")]), "key `p/a` is no JSON");
    fails(read_as::<HashMap<String, Pool>>(Format::Plain, &[("p/a", "{\"max\":1}")]), "invalid type: string");
    assert_eq!(read_as::<HashMap<String, u8>>(Format::Plain, &[("p/a", "1")]).expect("plain")["a"], 1);
    let quoted: HashMap<String, String> = read_as(Format::Plain, &[("p/a", "\"x\"")]).expect("plain");
    assert_eq!(quoted["a"], "\"x\"");
    #[derive(Debug, Deserialize)]
    struct Dates {
        at: String,
    }
    let dates: HashMap<String, Dates> =
        read_as(Format::Toml, &[("p/a", "at = 2026-01-02T03:04:05Z")]).expect("TOML");
    assert_eq!(dates["a"].at, "2026-01-02T03:04:05Z");
}

#[cfg(feature = "yaml")]
#[test]
fn yaml_is_read() {
    let settings: Settings =
        auto(&[("p/port", "1"), ("p/db.yaml", "url: pg://z\npool:\n  max: 4\n")]).expect("good keys");
    assert_eq!(settings.db, Db { url: "pg://z".into(), pool: Some(Pool { max: 4 }) });
    let names: HashMap<String, BTreeMap<u16, bool>> =
        auto(&[("p/x.yml", "1: true\n2: false\n")]).expect("YAML");
    assert_eq!(names["x"], BTreeMap::from([(1, true), (2, false)]));
    fails(auto::<Settings>(&[("p/port.yaml", "a: [1")]), "value of key `p/port.yaml` is no YAML at line");
    fails(auto::<Settings>(&[("p/port.yaml", "a: 1\na: 2")]), "no YAML at line 2");
}

#[cfg(not(feature = "yaml"))]
#[test]
fn without_the_feature_yaml_says_so() {
    fails(
        auto::<Settings>(&[("p/port.yaml", "1")]),
        "key `p/port.yaml` is no YAML: this program is built without",
    );
}

#[test]
fn bytes_that_are_no_text_are_named() {
    let bad = [b'a', 0xff];
    let error = reader::<Pool>(Format::Auto).read(&map(&[("p/max", &bad[..])])).expect_err("no text");
    assert_eq!(error.to_string(), "the value of key `p/max` is not UTF-8: byte 1");
    let key = BTreeMap::from([(Bytes::from_static(b"p/\xfe"), Bytes::new())]);
    fails(reader::<Pool>(Format::Auto).read(&key), "the name of key `p/\u{fffd}` is not UTF-8: byte 2");
}

#[test]
fn depth_has_a_bound() {
    let key = format!("p{}", "/a".repeat(DEPTH_MAX));
    assert!(auto::<serde_json::Value>(&[(&key, "1")]).is_ok());
    fails(auto::<serde_json::Value>(&[(&format!("{key}/a"), "1")]), "has 65 segments");
    let deep = "[".repeat(100_000);
    assert_eq!(value::<serde_json::Value>(&deep).expect("text"), deep);
    for (format, text) in [
        (Format::Json, deep.clone()),
        (Format::Toml, format!("a={deep}")),
        (Format::Yaml, deep.clone()),
        (Format::Toml, format!("a{}=1", ".a".repeat(100_000))),
    ] {
        let error = read_as::<serde_json::Value>(format, &[("p/a", &text)]).expect_err("too deep");
        assert!(matches!(error, BindError::Syntax { .. }), "{error:?}");
    }
}

#[test]
fn one_key_can_be_the_whole() {
    let mut reader = reader::<Pool>(Format::Auto);
    reader.place = Place::key("svc/pool.toml");
    assert_eq!(reader.read(&map(&[("svc/pool.toml", "max = 3")])).expect("a document").max, 3);
    fails(
        reader.read(&map(&[("svc/pool.toml", "max = x")])),
        "value of key `svc/pool.toml` is no TOML at line 1",
    );
    fails(reader.read(&map(&[("svc/pool.toml", "max = 'x'")])), "field `max` (key `svc/pool.toml`)");
}

/// Updates as a test sends them.
struct Fed {
    updates: mpsc::Receiver<Result<MirrorUpdate, ClientError>>,
    asked: Arc<AtomicU32>,
}

impl Source for Fed {
    async fn next(&mut self) -> Result<MirrorUpdate, ClientError> {
        match self.updates.recv().await {
            Some(update) => update,
            None => std::future::pending().await,
        }
    }

    fn request_progress(&mut self) {
        self.asked.fetch_add(1, Ordering::Relaxed);
    }
}

fn kv(key: &str, value: &str, revision: i64) -> KeyValue {
    KeyValue {
        key: key.to_owned().into(),
        value: value.to_owned().into(),
        create_revision: Revision(revision),
        mod_revision: Revision(revision),
        version: 1,
        lease: LeaseId::NONE,
    }
}

fn snapshot(revision: i64, kvs: &[(&str, &str)]) -> MirrorUpdate {
    let kvs = kvs.iter().map(|(key, value)| kv(key, value, revision)).collect();
    MirrorUpdate::Snapshot { revision: Revision(revision), kvs }
}

/// Puts; a deletion where there is no value.
fn changes(revision: i64, kvs: &[(&str, Option<&str>)]) -> MirrorUpdate {
    let event = |(key, value): &(&str, Option<&str>)| Event {
        space: crate::types::Space::User,
        kind: if value.is_some() { EventKind::Put } else { EventKind::Delete },
        kv: kv(key, value.unwrap_or(""), revision),
        prev: None,
    };
    MirrorUpdate::Changes(WatchBatch {
        revision: Revision(revision),
        events: kvs.iter().map(event).collect(),
    })
}

type Feed = mpsc::Sender<Result<MirrorUpdate, ClientError>>;

async fn bound<T>(
    reader: Reader<T>,
    first: MirrorUpdate,
) -> (Feed, Arc<AtomicU32>, Result<Binding<T>, BindError>)
where
    T: DeserializeOwned + Send + Sync + 'static,
{
    let (feed, updates) = mpsc::channel(16);
    let asked = Arc::new(AtomicU32::new(0));
    feed.send(Ok(first)).await.expect("room");
    let source = Fed { updates, asked: asked.clone() };
    let binding = start(source, None, reader, Duration::from_secs(10), SystemEnv::shared()).await;
    (feed, asked, binding)
}

#[tokio::test(start_paused = true)]
async fn what_is_not_good_leaves_the_last_good_value() {
    let (feed, _, binding) = bound(reader::<Pool>(Format::Auto), snapshot(5, &[("p/max", "1")])).await;
    let mut binding = binding.expect("good keys");
    assert_eq!((binding.load().max, binding.revision()), (1, Revision(5)));

    feed.send(Ok(changes(6, &[("p/max", Some("x"))]))).await.expect("room");
    let error = binding.changed().await.expect_err("not good");
    assert_eq!((error.key(), binding.load().max), (Some("p/max"), 1));
    let status = binding.status();
    assert_eq!((status.known, status.loaded, status.refusals), (Revision(6), Revision(5), 1));
    assert!(binding.wait_for(Revision(6)).await.is_err());

    feed.send(Ok(changes(7, &[("p/max", Some("2"))]))).await.expect("room");
    assert_eq!(binding.changed().await.expect("good again").max, 2);
    assert_eq!(binding.load_with_revision().1, Revision(7));
    assert!(binding.status().problem.is_none());

    feed.send(Ok(changes(8, &[("p/max", None)]))).await.expect("room");
    assert!(matches!(binding.changed().await, Err(BindError::Absent { .. })));
    assert_eq!(binding.load().max, 2);
}

#[tokio::test(start_paused = true)]
async fn only_changes_are_told() {
    let (feed, _, binding) = bound(reader::<Pool>(Format::Auto), snapshot(5, &[("p/max", "1")])).await;
    let mut binding = binding.expect("good keys");
    let mut other = binding.clone();
    // A notice, and a snapshot of the same keys, move the revision only.
    feed.send(Ok(changes(8, &[]))).await.expect("room");
    feed.send(Ok(snapshot(9, &[("p/max", "1")]))).await.expect("room");
    assert_eq!(binding.wait_for(Revision(9)).await.expect("good").max, 1);
    assert_eq!((binding.status().loads, binding.revision()), (1, Revision(9)));
    let told = tokio::time::timeout(Duration::from_secs(1), binding.changed()).await;
    assert!(told.is_err(), "nothing changed");
    feed.send(Ok(snapshot(12, &[("p/max", "3")]))).await.expect("room");
    assert_eq!(binding.changed().await.expect("good").max, 3);
    assert_eq!(other.changed().await.expect("each clone hears of it").max, 3);
}

#[tokio::test(start_paused = true)]
async fn a_wait_asks_how_far_the_keys_are_known_but_not_all_the_time() {
    let (feed, asked, binding) = bound(reader::<Pool>(Format::Auto), snapshot(5, &[("p/max", "1")])).await;
    let binding = binding.expect("good keys");
    let waits = (0..100).map(|_| binding.wait_for(Revision(9)));
    let waits = futures_util::future::join_all(waits);
    assert!(tokio::time::timeout(Duration::from_secs(30), waits).await.is_err());
    let count = asked.load(Ordering::Relaxed);
    assert!((8..=14).contains(&count), "asked {count} times in 30 s");
    feed.send(Ok(changes(9, &[]))).await.expect("room");
    assert_eq!(binding.wait_for(Revision(9)).await.expect("good").max, 1);
}

#[tokio::test(start_paused = true)]
async fn the_check_refuses_and_its_panic_does_too() {
    let mut reader = reader::<Pool>(Format::Auto);
    reader.check = Some(Box::new(|pool| match pool.max {
        0 => Err("max must not be 0".to_owned()),
        99 => panic!("a bug of the check"),
        _ => Ok(()),
    }));
    let (feed, _, binding) = bound(reader, snapshot(5, &[("p/max", "1")])).await;
    let mut binding = binding.expect("good keys");
    for (at, bad, words) in [(6, "0", "max must not be 0"), (7, "99", "a bug of the check")] {
        feed.send(Ok(changes(at, &[("p/max", Some(bad))]))).await.expect("room");
        fails(binding.changed().await, words);
        assert_eq!(binding.load().max, 1);
    }
    feed.send(Ok(changes(8, &[("p/max", Some("2"))]))).await.expect("room");
    assert_eq!(binding.changed().await.expect("good").max, 2);
}

#[tokio::test(start_paused = true)]
async fn a_source_in_trouble_is_told_and_tried_again() {
    let (feed, _, binding) = bound(reader::<Pool>(Format::Auto), snapshot(5, &[("p/max", "1")])).await;
    let mut binding = binding.expect("good keys");
    feed.send(Err(ClientError::Protocol("nonsense"))).await.expect("room");
    assert!(matches!(binding.changed().await, Err(BindError::Read { .. })));
    assert_eq!(binding.load().max, 1);
    feed.send(Ok(changes(7, &[]))).await.expect("room");
    assert_eq!(binding.changed().await.expect("it is read again").max, 1);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_is_not_good_is_refused() {
    let (_, _, binding) = bound(reader::<Pool>(Format::Auto), snapshot(5, &[("p/max", "x")])).await;
    fails(binding, "`x` is no u32");
    let (_, _, binding) = bound(reader::<Pool>(Format::Auto), snapshot(5, &[])).await;
    fails(binding, "there is no key below `p/`");
    let (_feed, updates) = mpsc::channel(1);
    let source = Fed { updates, asked: Arc::default() };
    let limit = Duration::from_secs(3);
    fails(
        start(source, None, reader::<Pool>(Format::Auto), limit, SystemEnv::shared()).await,
        "no answer within 3s",
    );
}

#[tokio::test(start_paused = true)]
async fn while_nobody_answers_it_begins_with_what_a_cache_has() {
    let last_good = |max: &'static str| -> Option<super::follow::LastGood> {
        let kvs = vec![kv("p/max", max, 4)];
        Some(Box::pin(async move { Some((Revision(5), kvs)) }))
    };
    let (feed, updates) = mpsc::channel(4);
    let source = Fed { updates, asked: Arc::default() };
    let limit = Duration::from_secs(10);
    let read = reader::<Pool>(Format::Auto);
    let mut binding = start(source, last_good("1"), read, limit, SystemEnv::shared()).await.expect("offline");
    assert_eq!((binding.load().max, binding.revision(), binding.status().is_stale), (1, Revision(5), true));
    // The same keys are no change, but current again.
    feed.send(Ok(snapshot(7, &[("p/max", "1")]))).await.expect("room");
    binding.wait_for(Revision(7)).await.expect("good");
    assert!(!binding.status().is_stale && binding.status().loads == 1);
    feed.send(Ok(changes(8, &[("p/max", Some("2"))]))).await.expect("room");
    assert_eq!(binding.changed().await.expect("good").max, 2);

    // A cluster that answers in time is asked first.
    let (feed, updates) = mpsc::channel(4);
    feed.send(Ok(snapshot(9, &[("p/max", "3")]))).await.expect("room");
    let source = Fed { updates, asked: Arc::default() };
    let read = reader::<Pool>(Format::Auto);
    let binding = start(source, last_good("1"), read, limit, SystemEnv::shared()).await.expect("online");
    assert_eq!((binding.load().max, binding.status().is_stale), (3, false));
}

#[tokio::test(start_paused = true)]
async fn the_default_stands_in_for_no_key_at_all() {
    let mut reader = reader::<Pool>(Format::Auto);
    reader.default = Some(Pool::default);
    let (feed, _, binding) = bound(reader, snapshot(5, &[])).await;
    let mut binding = binding.expect("the default");
    assert_eq!(binding.load().max, 0);
    feed.send(Ok(changes(6, &[("p/max", Some("4"))]))).await.expect("room");
    assert_eq!(binding.changed().await.expect("good").max, 4);
    feed.send(Ok(changes(7, &[("p/max", None)]))).await.expect("room");
    assert_eq!(binding.changed().await.expect("the default").max, 0);
}

#[tokio::test(start_paused = true)]
async fn dropping_the_last_clone_ends_it() {
    let (feed, _, binding) = bound(reader::<Pool>(Format::Auto), snapshot(5, &[("p/max", "1")])).await;
    let binding = binding.expect("good keys");
    let clone = binding.clone();
    drop(binding);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!feed.is_closed());
    drop(clone);
    feed.closed().await;
}

#[derive(Debug, Deserialize)]
#[expect(dead_code, reason = "only read")]
struct Everything {
    a: u8,
    b: Option<bool>,
    c: Vec<f32>,
    d: HashMap<String, Everything>,
    e: Option<Mode>,
    f: (i8, String),
    g: (),
    #[serde(flatten)]
    rest: HashMap<String, serde_json::Value>,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any keys and values are a value or an error with words, never a panic.
    #[test]
    fn no_input_panics(
        kvs in proptest::collection::btree_map(
            prop_oneof!["p/[a-g0-2/.]{0,8}(.toml|.json|.yaml)?", "p/\\PC{0,8}"],
            prop_oneof![
                proptest::collection::vec(any::<u8>(), 0..12),
                "[\\[\\]{}\"':,=#&*!|>\\-\na-c0-9. ]{0,24}".prop_map(String::into_bytes),
                "(null|true|1|-1|1e400|\"a\"|\\[1\\]|\\{\"a\":1\\}|a=1|a: 1)".prop_map(String::into_bytes),
            ],
            0..6,
        ),
        format in prop_oneof![
            4 => Just(Format::Auto), 1 => Just(Format::Plain), 1 => Just(Format::Toml),
            1 => Just(Format::Json), 1 => Just(Format::Yaml)
        ],
    ) {
        let kvs: BTreeMap<Bytes, Bytes> =
            kvs.into_iter().map(|(key, value)| (key.into(), value.into())).collect();
        fn judge<T: DeserializeOwned>(format: Format, kvs: &BTreeMap<Bytes, Bytes>) -> Result<(), TestCaseError> {
            match reader::<T>(format).read(kvs) {
                Err(BindError::Panicked { reason }) => Err(TestCaseError::fail(reason)),
                Err(error) => { prop_assert!(!error.to_string().is_empty()); Ok(()) }
                Ok(_) => Ok(()),
            }
        }
        judge::<Everything>(format, &kvs)?;
        judge::<HashMap<String, Everything>>(format, &kvs)?;
        judge::<HashMap<String, serde_json::Value>>(format, &kvs)?;
        judge::<Vec<Option<u16>>>(format, &kvs)?;
        judge::<HashMap<String, Mode>>(format, &kvs)?;
        judge::<HashMap<bool, String>>(format, &kvs)?;
        judge::<serde_json::Value>(format, &kvs)?;
    }
}
