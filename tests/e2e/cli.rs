//! The tool: its verbs, its exit codes, what it prints for programs; the local
//! cluster; import and export; taking over an etcd.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};

use crate::checks::*;
use crate::cluster::{Cluster, Permit, Spec, block_on, connect, fresh_root, on_cluster, on_own_cluster};
use crate::target::{self, Target, mainstay_binary, not_in_etcd};

pub const OK: i32 = 0;
pub const USAGE: i32 = 2;
const NOT_FOUND: i32 = 3;
const CONFLICT: i32 = 4;
pub const UNAVAILABLE: i32 = 6;

/// The tool, asked about some nodes.
pub struct Tool {
    endpoints: String,
}

impl Tool {
    /// At one address.
    pub fn at(endpoint: &str) -> Tool {
        Tool { endpoints: endpoint.to_owned() }
    }

    /// At these nodes.
    pub fn of(c: &Cluster, nodes: &[usize]) -> Tool {
        Tool { endpoints: nodes.iter().map(|i| c.nodes[*i].url()).collect::<Vec<_>>().join(",") }
    }

    /// Its command line.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(mainstay_binary());
        command.arg("--endpoints").arg(&self.endpoints).args(args).stdin(Stdio::null());
        command
    }

    /// Runs it.
    pub fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().expect("the tool runs")
    }

    /// Runs it, asserts the exit code, gives what it printed on stdout.
    #[track_caller]
    pub fn code(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{args:?}\n{out}\n{err}");
        assert!(code == OK || !err.is_empty(), "{args:?} fails without a word");
        out
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        self.code(OK, args)
    }

    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = args.to_vec();
        all.extend(["-o", "json"]);
        let text = self.ok(&all);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{args:?}: {error}: {text}"))
    }

    #[track_caller]
    fn fed(&self, code: i32, args: &[&str], input: &[u8]) -> String {
        let mut command = self.command(args);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}\n{}", text(&output.stderr));
        text(&output.stdout)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn put_get_del_print_and_tell_by_their_exit_code() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_cluster(async |c| {
        let (one, two) = (Tool::of(c, &[0]), Tool::of(c, &[1, 2]));
        let p = unique("cli");
        let k = format!("{p}größe");
        one.ok(&["put", &k, "1\u{fc}"]);
        assert!(two.ok(&["get", &k]).contains("1\u{fc}"));
        let json = two.json(&["get", &k]);
        assert_eq!(
            (json["kvs"][0]["key"].as_str(), json["kvs"][0]["value"].as_str()),
            (Some(&k[..]), Some("1\u{fc}"))
        );
        assert_eq!(json["kvs"][0]["version"], 1);
        two.code(NOT_FOUND, &["get", &format!("{p}none")]);
        one.fed(OK, &["put", &format!("{p}piped")], b"from \x00 stdin");
        let raw = two.run(&["get", &format!("{p}piped"), "--print-value-only", "--raw"]);
        assert_eq!(raw.stdout, b"from \x00 stdin");
        one.code(CONFLICT, &["put", "--if-absent", &k, "2"]);
        let rev = json["kvs"][0]["mod_revision"].to_string();
        one.ok(&["put", "--if-rev", &rev, &k, "2"]);
        one.code(CONFLICT, &["put", "--if-rev", &rev, &k, "3"]);
        assert_eq!(two.json(&["get", "--prefix", &p])["count"], 2);
        assert_eq!(one.json(&["del", "--prefix", &p])["deleted"], 2);
        one.code(USAGE, &["get"]);
        one.code(USAGE, &["get", ""]);
        one.code(USAGE, &["frobnicate"]);
        one.code(USAGE, &["put", "--no-such-flag", "k", "v"]);
        assert!(one.ok(&["--help"]).to_lowercase().contains("exit codes"));
    });
}

#[test]
fn nobody_there_is_code_6_within_the_deadline() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    let nobody = Tool { endpoints: format!("http://127.0.0.1:{}", crate::process::free_port()) };
    let since = Instant::now();
    nobody.code(UNAVAILABLE, &["get", "k"]);
    nobody.code(UNAVAILABLE, &["put", "k", "v"]);
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
}

#[test]
fn txn_watch_and_compact() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_own_cluster(Spec::nodes(1), async |c| {
        let tool = Tool::of(c, &[0]);
        let script = b"version(\"a\") = \"0\"\n\nput a 1\nput b 2\n\nget a\n";
        tool.fed(OK, &["txn"], script);
        let again = tool.command(&["txn"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut again = again.unwrap();
        again.stdin.take().unwrap().write_all(script).unwrap();
        assert!([Some(OK), Some(CONFLICT)].contains(&again.wait_with_output().unwrap().status.code()));
        assert_eq!(tool.json(&["get", "b"])["kvs"][0]["mod_revision"], 2);
        let mut watch = tokio::process::Command::from(
            tool.command(&["watch", "--prefix", "w/", "--rev", "1", "-o", "json"]),
        );
        let mut child = watch.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        tool.ok(&["put", "w/k", "seen"]);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = eventually("the watch prints", SOON, async || {
            let line = tokio::time::timeout(Duration::from_secs(1), lines.next_line()).await.ok()?;
            line.unwrap().filter(|line| line.contains("w/k"))
        })
        .await;
        assert!(line.contains("seen"), "{line}");
        tool.ok(&["compact", "2"]);
        tool.code(CONFLICT, &["compact", "2"]);
        tool.code(CONFLICT, &["get", "a", "--rev", "1"]);
    });
}

#[test]
fn leases_locks_and_elections() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_cluster(async |c| {
        let tool = Tool::of(c, &[1]);
        let k = unique("cli-lease") + "k";
        let granted = tool.json(&["lease", "grant", "300"]);
        let id = granted["id"].as_str().unwrap().to_owned();
        assert_eq!(granted["ttl_s"], 300);
        tool.ok(&["put", &k, "v", "--lease", &id]);
        assert!(tool.ok(&["lease", "timetolive", &id, "--keys"]).contains(&k));
        assert!(tool.ok(&["lease", "list"]).contains(&id));
        tool.ok(&["lease", "keep-alive", "--once", &id]);
        tool.ok(&["lease", "revoke", &id]);
        tool.code(NOT_FOUND, &["lease", "revoke", &id]);
        tool.code(NOT_FOUND, &["get", &k]);
        let name = unique("cli-lock") + "l";
        let out = tool.ok(&["lock", &name, "--", "sh", "-c", "echo held $ETCD_LOCK_KEY"]);
        assert!(out.contains(&format!("held {name}/")), "{out}");
        let child = tool.run(&["lock", &name, "--", "sh", "-c", "exit 7"]);
        assert_eq!(child.status.code(), Some(7), "the command's own code");
    });
}

#[test]
fn members_endpoints_status_and_doctor() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let tool = Tool::of(c, &[0, 1, 2]);
        let members = tool.json(&["member", "list"]);
        assert_eq!(members["members"].as_array().unwrap().len(), 3);
        tool.ok(&["endpoint", "health"]);
        tool.ok(&["endpoint", "status"]);
        tool.ok(&["endpoint", "hashkv"]);
        eventually("status shows everyone, once they have made their addresses known", SOON, async || {
            let output = tool.run(&["status"]);
            let told = text(&output.stdout);
            let all = c.nodes.iter().all(|node| told.contains(&node.client_port.to_string()));
            (output.status.success() && all).then_some(())
        })
        .await;
        assert_eq!(tool.json(&["doctor"])["healthy"], true);
        let leader = c.leader().await;
        let target = (leader + 1) % 3;
        let id = format!("{:x}", c.member_id(target).await);
        tool.ok(&["move-leader", &id]);
        eventually("the leader has moved", SOON, async || (c.leader().await == target).then_some(())).await;
        tool.code(NOT_FOUND, &["move-leader", "99"]);
        tool.code(NOT_FOUND, &["member", "remove", "99"]);
        c.nodes[leader].kill();
        tool.code(UNAVAILABLE, &["endpoint", "health"]);
        let ill = tool.run(&["doctor"]);
        let said = text(&ill.stdout) + &text(&ill.stderr);
        assert!(!ill.status.success() && said.contains(&c.nodes[leader].name), "{said}");
    });
}

#[test]
fn a_snapshot_is_saved_told_and_restored_into_a_new_cluster() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let tool = Tool::of(c, &[0]);
        let mut client = c.client(0).await;
        for i in 0..100 {
            client.put(format!("s{i:03}"), i.to_string(), None).await.unwrap();
        }
        client.delete("s000", None).await.unwrap();
        let file = c.root.join("saved");
        let path = file.to_str().unwrap();
        tool.ok(&["snapshot", "save", path]);
        tool.code(CONFLICT, &["snapshot", "save", path]);
        let status = tool.json(&["snapshot", "status", path]);
        assert_eq!(status["revision"], 102, "{status}");
        // A damaged file is told from a whole one.
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        let damaged = c.root.join("damaged");
        std::fs::write(&damaged, &bytes).unwrap();
        assert!(!tool.run(&["snapshot", "status", damaged.to_str().unwrap()]).status.success());
        c.kill_all();
        let i = c.extra_node("restored");
        let node = &c.nodes[i];
        let (dir, peer) = (node.data_dir.to_str().unwrap().to_owned(), node.peer_url());
        let cluster = format!("restored={peer}");
        let restore = [
            "snapshot",
            "restore",
            path,
            "--data-dir",
            &dir,
            "--name",
            "restored",
            "--initial-cluster",
            &cluster,
            "--initial-advertise-peer-urls",
            &peer,
            "--initial-cluster-token",
            "restored",
        ];
        tool.ok(&restore);
        tool.code(CONFLICT, &restore);
        c.nodes[i].flags.push(format!("--initial-cluster={cluster}"));
        c.nodes[i].flags.push("--initial-cluster-token=restored".into());
        c.nodes[i].start();
        c.wait_node_ready(i).await;
        let mut client = c.client(i).await;
        let got = client.get("s", Some(etcd_client::GetOptions::new().with_prefix())).await.unwrap();
        assert_eq!((got.count(), got.kvs()[0].mod_revision()), (99, 3));
        assert!(got.header().unwrap().revision() >= 102);
        assert_eq!(client.member_list().await.unwrap().members().len(), 1);
        client.put("after", "v", None).await.unwrap();
    });
}

#[test]
fn what_is_imported_is_exported_again() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let tool = Tool::of(c, &[1]);
        let tree = c.root.join("tree");
        let files: [(&str, &[u8]); 4] = [
            ("a.conf", b"x = 1\n"),
            ("dir/b.conf", b""),
            ("dir/deep/c d", "gr\u{f6}\u{df}e".as_bytes()),
            ("z", b"end"),
        ];
        for (name, content) in files {
            let path = tree.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let imported = tool.json(&["import", tree.to_str().unwrap(), "--prefix", "t/"]);
        assert_eq!(imported["keys"], 4, "{imported}");
        assert_eq!(value(&mut c.client(2).await, "t/dir/deep/c d").await.unwrap(), "gr\u{f6}\u{df}e");
        let back = c.root.join("back");
        tool.ok(&["export", back.to_str().unwrap(), "--prefix", "t/", "--tree"]);
        for (name, content) in files {
            assert_eq!(std::fs::read(back.join(name)).unwrap(), content, "{name}");
        }
        // As lines too, bytes included, into a cluster that has lost them.
        c.client(0).await.put(b"t/bytes".to_vec(), vec![0, 255, 10, 13], None).await.unwrap();
        let lines = tool.ok(&["export", "--prefix", "t/"]);
        assert_eq!(lines.lines().count(), 5);
        tool.ok(&["del", "--prefix", "t/"]);
        tool.fed(OK, &["import", "-"], lines.as_bytes());
        assert_eq!(tool.ok(&["export", "--prefix", "t/"]).lines().count(), 5);
        let kv = get_one(&mut c.client(2).await, "t/bytes").await.unwrap();
        assert_eq!(kv.value(), [0, 255, 10, 13]);
        tool.code(NOT_FOUND, &["import", "/no/such/directory"]);
        tool.fed(USAGE, &["import", "-"], b"this is no line of JSON\n");
    });
}

#[test]
fn the_content_of_an_etcd_moves_over() {
    if not_in_etcd("the mainstay tool") || target::tool("etcd").is_none() {
        return;
    }
    // Two clusters of one node each cost no more than one of three.
    let permit = Permit::uncounted();
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut etcd = Cluster::prepare(Spec { target: Target::etcd("etcd"), ..Spec::nodes(1) }, permit);
        etcd.start_all();
        etcd.wait_ready().await;
        let mut from = etcd.client(0).await;
        let lease = from.lease_grant(5000, None).await.unwrap().id();
        for i in 0..1500 {
            let options = (i % 100 == 0).then(|| etcd_client::PutOptions::new().with_lease(lease));
            from.put(format!("m/{i:05}"), vec![(i % 251) as u8; 200], options).await.unwrap();
        }
        let tool = Tool::of(c, &[0]);
        tool.ok(&["import", "--from-etcd", &etcd.nodes[0].url()]);
        let mut to = c.client(0).await;
        let options = || Some(etcd_client::GetOptions::new().with_prefix());
        let (a, b) = (from.get("m/", options()).await.unwrap(), to.get("m/", options()).await.unwrap());
        assert_eq!((a.count(), b.count()), (1500, 1500));
        for (a, b) in a.kvs().iter().zip(b.kvs()) {
            assert_eq!((a.key(), a.value(), a.lease()), (b.key(), b.value(), b.lease()));
        }
        let left = to.lease_time_to_live(lease, None).await.unwrap();
        assert!((4900..=5000).contains(&left.ttl()), "{}", left.ttl());
    });
}

/// Runs `dev`, writes a key, interrupts it. Gives how often that key had been written before.
async fn dev(root: &Path, args: &[&str]) -> i64 {
    let since = Instant::now();
    let mut command = tokio::process::Command::new(mainstay_binary());
    command.args(["dev", "-o", "json"]).args(args).current_dir(root);
    for knob in crate::process::test_knobs() {
        command.env_remove(knob);
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line =
        tokio::time::timeout(Duration::from_secs(60), lines.next_line()).await.unwrap().unwrap().unwrap();
    eprintln!("REPORT dev {args:?} is ready after {:?}", since.elapsed());
    let told: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let endpoints: Vec<String> =
        told["endpoints"].as_array().unwrap().iter().map(|e| e.as_str().unwrap().to_owned()).collect();
    let mut first = connect(&endpoints[..1]).await;
    let mut last = connect(&endpoints[endpoints.len() - 1..]).await;
    let before = get_one(&mut last, "dev").await.map_or(0, |kv| kv.version());
    first.put("dev", "v", None).await.unwrap();
    assert_eq!(get_one(&mut last, "dev").await.unwrap().version(), before + 1);
    let pid = Pid::from_raw(child.id().unwrap() as i32).unwrap();
    kill_process(pid, Signal::INT).unwrap();
    let status = tokio::time::timeout(Duration::from_secs(20), child.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    for endpoint in endpoints {
        let port: u16 = endpoint.rsplit(':').next().unwrap().parse().unwrap();
        assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err(), "{endpoint} still answers");
    }
    before
}

#[test]
fn dev_runs_three_nodes_or_one_and_stops_on_interrupt() {
    if not_in_etcd("dev") {
        return;
    }
    let _permit = Permit::take();
    let root = fresh_root();
    block_on(async {
        assert_eq!(dev(&root, &[]).await, 0);
        assert_eq!(dev(&root, &["--nodes", "1"]).await, 0);
        let kept = root.join("kept");
        for times in 0..2 {
            let before = dev(&root, &["--nodes", "3", "--data-dir", kept.to_str().unwrap()]).await;
            assert_eq!(before, times, "the data is kept");
        }
    });
    let _ = std::fs::remove_dir_all(root);
}

#[test]
fn completions_are_printed_for_every_shell() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    let tool = Tool { endpoints: "127.0.0.1:1".into() };
    for shell in ["bash", "zsh", "fish"] {
        assert!(tool.ok(&["completion", shell]).contains("mainstay"));
    }
}

#[test]
fn a_read_is_explained() {
    if not_in_etcd("the mainstay tool") {
        return;
    }
    on_own_cluster(Spec::nodes(3), async |c| {
        let p = unique("explain");
        let k = format!("{p}k");
        let all = Tool::of(c, &[0, 1, 2]);
        all.ok(&["put", &k, "value"]);
        // Given one member, it finds the others.
        let told = Tool::of(c, &[0]).json(&["get", &k, "--explain"]);
        assert_eq!(told["kvs"][0]["value"], "value");
        let explain = &told["explain"];
        assert_eq!((&explain["consistency"], &explain["level"]), (&"strong".into(), &"server".into()));
        assert_eq!(explain["bytes"], (k.len() + 5) as u64);
        let endpoints = explain["endpoints"].as_array().unwrap();
        let of = |address: &str| endpoints.iter().find(|one| one["address"] == *address);
        for node in &c.nodes {
            let url = node.url();
            let one = of(&url).or_else(|| of(url.trim_start_matches("http://"))).expect("every member");
            assert_eq!((&one["name"], &one["health"]), (&node.name[..].into(), &"serving".into()));
        }
        assert_eq!(endpoints.iter().filter(|one| one["is_leader"] == true).count(), 1);
        let attempts = explain["attempts"].as_array().unwrap();
        assert_eq!((attempts.len(), &attempts[0]["address"]), (1, &explain["picked"]));
        assert!(explain["why"].as_str().unwrap().contains("of 3 that are well"), "{explain}");

        // For people: the value alone on stdout, the rest on stderr.
        let output = all.run(&["get", &k, "--explain", "--consistency", "eventual"]);
        assert_eq!(text(&output.stdout), format!("{k}\nvalue\n"));
        let said = text(&output.stderr);
        for words in
            ["eventual read, answered by server", "routed by", "attempt 1: ", "version 1, lease none", "n3"]
        {
            assert!(said.contains(words), "{said} does not say {words:?}");
        }
        all.code(NOT_FOUND, &["get", &format!("{p}none"), "--explain"]);
        all.code(USAGE, &["get", &k, "--consistency", "bounded=often"]);
        all.code(USAGE, &["get", "--prefix", &p, "--cache-dir", "/tmp/x"]);

        // Through a cache: there the second time, and also when nobody answers.
        let dir = c.root.join("tool-cache").display().to_string();
        let cached = ["get", &k, "--explain", "--cache-dir", &dir, "--consistency", "eventual"];
        assert_eq!(all.json(&cached)["explain"]["level"], "server");
        let again = all.json(&cached);
        assert_eq!(
            (&again["explain"]["level"], &again["kvs"][0]["value"]),
            (&"disk".into(), &"value".into())
        );
        assert_eq!(again["explain"]["attempts"].as_array().unwrap().len(), 0);
        c.kill_all();
        let offline = all.json(&cached);
        assert_eq!(
            (&offline["explain"]["level"], &offline["kvs"][0]["value"]),
            (&"disk".into(), &"value".into())
        );
        all.code(UNAVAILABLE, &["get", &k, "--explain", "--command-timeout", "1s"]);
    });
}
