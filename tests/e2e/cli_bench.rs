//! `mainstay bench`: every kind of load does what it says to a real cluster, and says what came of it.

use std::process::Stdio;
use std::time::{Duration, Instant};

use etcd_client::GetOptions;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::checks::*;
use crate::cli::{OK, Tool, UNAVAILABLE, USAGE};
use crate::cluster::{Cluster, on_cluster};
use crate::target::not_in_etcd;

/// A short load of every kind, of this many operations.
const FEW: [&str; 6] = ["--total", "200", "--clients", "4", "--conns", "3"];

/// Runs a load and checks what every summary must have.
fn load(tool: &Tool, args: &[&str]) -> Value {
    let all: Vec<&str> = ["bench"].into_iter().chain(args.iter().copied()).collect();
    let summary = tool.json(&all);
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{args:?}: {summary}"));
    let latency = &summary["latency_ms"];
    assert_eq!((&summary["verb"], &summary["errors"]), (&Value::from(args[0]), &Value::from(0)), "{summary}");
    assert!(number(&summary["ops_per_s"]) > 0.0 && number(&latency["p50"]) > 0.0, "{summary}");
    assert!(number(&latency["min"]) <= number(&latency["p50"]), "{summary}");
    assert!(number(&latency["p50"]) <= number(&latency["p99"]), "{summary}");
    assert!(number(&latency["p99"]) <= number(&latency["max"]), "{summary}");
    let histogram = summary["histogram"].as_array().expect("a list");
    let counted: f64 = histogram.iter().map(|step| number(&step["count"])).sum();
    assert_eq!(counted, number(&summary["ops"]), "{summary}");
    summary
}

async fn count(c: &Cluster, prefix: &str) -> i64 {
    let options = GetOptions::new().with_prefix().with_count_only();
    c.client(0).await.get(prefix, Some(options)).await.unwrap().count()
}

#[test]
fn every_kind_of_request_is_made_as_often_as_asked() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_cluster(async |c| {
        let (tool, p) = (Tool::of(c, &[0, 1, 2]), unique("bench"));
        let keys = ["--prefix", &p, "--key-space", "20", "--key-size", "40", "--val-size", "32"];
        for (verb, more) in [
            ("put", &[][..]),
            ("txn", &[][..]),
            ("range", &["--filled"][..]),
            ("range", &["--keys-per-read", "10", "--consistency", "s"][..]),
            ("mixed", &["--reads-percent", "50"][..]),
        ] {
            let args: Vec<&str> = [verb].iter().chain(&FEW).chain(&keys).chain(more).copied().collect();
            let revision = revision(c).await;
            assert_eq!(load(&tool, &args)["ops"], 200, "{args:?}");
            let writes = self::revision(c).await - revision;
            let expected = match (verb, more) {
                ("put" | "txn", _) => 200..=200,
                ("range", ["--filled"]) => 0..=0,
                ("range", _) => 1..=1,
                // One transaction that fills, and half of the operations by chance.
                _ => 50..=150,
            };
            assert!(expected.contains(&writes), "{args:?} wrote {writes} times");
            assert_eq!(count(c, &p).await, 20, "{args:?}");
        }
        let mut client = c.client(1).await;
        let kv = client.get(p.as_str(), Some(GetOptions::new().with_prefix().with_limit(1))).await.unwrap();
        assert_eq!((kv.kvs()[0].key().len(), kv.kvs()[0].value().len()), (40, 32));
    });
}

async fn revision(c: &Cluster) -> i64 {
    let answer = c.client(0).await.get("bench: any", None).await.unwrap();
    answer.header().expect("every answer has one").revision()
}

#[test]
fn every_watcher_sees_every_write_and_leases_are_renewed() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_cluster(async |c| {
        let (tool, p) = (Tool::of(c, &[0, 1, 2]), unique("bench"));
        let args = ["watch", "--watchers", "7", "--key-size", "40", "--prefix", &p];
        let args: Vec<&str> = args.iter().chain(&FEW).copied().collect();
        assert_eq!(load(&tool, &args)["ops"], 7 * 200);
        let before = c.client(0).await.leases().await.unwrap().leases().len();
        let args: Vec<&str> =
            ["lease", "--leases", "20", "--ttl", "300s"].iter().chain(&FEW).copied().collect();
        assert_eq!(load(&tool, &args)["ops"], 200);
        let leases = c.client(0).await.leases().await.unwrap().leases().to_vec();
        assert_eq!(leases.len() - before, 20);
        for lease in leases {
            c.client(0).await.lease_revoke(lease.id()).await.unwrap();
        }
    });
}

#[test]
fn a_rate_is_kept_and_an_interrupt_ends_with_a_summary() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_cluster(async |c| {
        let (tool, p) = (Tool::of(c, &[0]), unique("bench"));
        let keys = ["--prefix", &p, "--key-size", "40"];
        let paced: Vec<&str> =
            ["put", "--rate", "100", "--seconds", "2s"].iter().chain(&keys).copied().collect();
        let summary = load(&tool, &paced);
        let begun = summary["ops"].as_u64().unwrap() + summary["not_begun"].as_u64().unwrap();
        assert!((199..=201).contains(&begun), "{summary}");
        let long = ["bench", "put", "--seconds", "10m"];
        let mut command = tool.command(&long.iter().chain(&keys).copied().collect::<Vec<_>>());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_keys(c, &p).await;
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(OK), "{text}");
        assert!(text.contains("per second") && text.contains("p99.9"), "{text}");
    });
}

/// Waits until the store's revision grows: the load runs.
async fn wait_for_keys(c: &Cluster, prefix: &str) {
    let (before, deadline) = (revision(c).await, Instant::now() + Duration::from_secs(30));
    while revision(c).await < before + 20 {
        assert!(Instant::now() < deadline, "no load on {prefix}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn what_cannot_be_is_refused_by_name_before_anything_is_done() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_cluster(async |c| {
        let tool = Tool::of(c, &[0]);
        let revision = revision(c).await;
        for (args, named) in [
            (&["put", "--clients", "0"][..], "--clients"),
            (&["put", "--rate", "0"], "--rate"),
            (&["put", "--total", "5", "--seconds", "5s"], "--total"),
            (&["put", "--key-size", "8", "--key-space", "1000000"], "--key-size"),
            (&["range", "--consistency", "bounded=5s"], "--consistency"),
            (&["range", "--keys-per-read", "11", "--key-space", "10"], "--keys-per-read"),
            (&["mixed", "--reads-percent", "101"], "--reads-percent"),
            (&["frobnicate"], "frobnicate"),
        ] {
            let output = tool.run(&["bench"].iter().chain(args).copied().collect::<Vec<_>>());
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(USAGE), "{args:?}: {error}");
            assert!(error.contains(named), "{args:?}: {error}");
        }
        // A read of what is not there is no operation that worked.
        let p = unique("bench");
        let nothing = ["bench", "range", "--filled", "--total", "5", "--key-size", "40", "--prefix", &p];
        let output = tool.run(&nothing);
        assert_eq!(output.status.code(), Some(UNAVAILABLE));
        assert!(String::from_utf8_lossy(&output.stderr).contains("a key was missing"));
        assert_eq!(self::revision(c).await, revision);
        let nobody = Tool::at("http://127.0.0.1:9");
        nobody.code(UNAVAILABLE, &["bench", "put", "--total", "5", "--dial-timeout", "1s"]);
    });
}
