//! `etcdctl`, unmodified, as Debian ships it.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};

use crate::checks::*;
use crate::cluster::{Cluster, Spec, on_cluster, on_own_cluster};
use crate::target::tool;

struct Ctl {
    endpoints: String,
}

impl Ctl {
    /// `etcdctl` for these nodes, if it is installed.
    fn of(c: &Cluster, nodes: &[usize]) -> Option<Ctl> {
        tool("etcdctl")?;
        let endpoints: Vec<_> =
            nodes.iter().map(|i| format!("127.0.0.1:{}", c.nodes[*i].client_port)).collect();
        Some(Ctl { endpoints: endpoints.join(",") })
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").arg("--endpoints").arg(&self.endpoints).args(args);
        command
    }

    fn output(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().expect("etcdctl runs")
    }

    /// Runs it, asserts success, gives what it printed.
    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        text
    }

    /// Runs it, asserts failure, gives what it printed on stderr.
    #[track_caller]
    fn fails(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(!output.status.success(), "{args:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> serde_json::Value {
        let mut all = args.to_vec();
        all.extend(["-w", "json"]);
        let text = self.ok(&all);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }

    /// Runs it with this text on its stdin.
    fn fed(&self, args: &[&str], input: &str) -> String {
        use std::io::Write;
        let mut command = self.command(args);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("etcdctl runs");
        child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success());
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn started(&self, args: &[&str]) -> tokio::process::Child {
        let mut command = tokio::process::Command::from(self.command(args));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("etcdctl runs")
    }
}

#[test]
fn put_get_del() {
    on_cluster(async |c| {
        let (Some(one), Some(two)) = (Ctl::of(c, &[0]), Ctl::of(c, &[1, 2])) else { return };
        let p = unique("ctl");
        let k = |name: &str| format!("{p}{name}");
        assert_eq!(one.ok(&["put", &k("a"), "1"]), "OK\n");
        assert_eq!(one.ok(&["put", &k("b"), "2"]), "OK\n");
        assert_eq!(two.ok(&["get", &k("a")]), format!("{}\n1\n", k("a")));
        assert_eq!(two.ok(&["get", "--prefix", &p, "--print-value-only"]), "1\n2\n");
        assert_eq!(
            two.ok(&["get", "--prefix", &p, "--keys-only", "--order=DESCEND"]),
            format!("{}\n\n{}\n\n", k("b"), k("a"))
        );
        assert_eq!(one.ok(&["put", "--prev-kv", &k("a"), "3"]), format!("OK\n{}\n1\n", k("a")));
        let json = two.json(&["get", &k("a")]);
        let rev = json["kvs"][0]["mod_revision"].as_i64().unwrap();
        assert_eq!(json["kvs"][0]["version"], 2);
        assert_eq!(two.ok(&["get", &k("a"), "--rev", &(rev - 1).to_string(), "--print-value-only"]), "1\n");
        assert_eq!(two.ok(&["get", "--consistency=s", &k("b"), "--print-value-only"]), "2\n");
        assert_eq!(one.ok(&["del", "--prefix", &p]), "2\n");
        assert_eq!(two.ok(&["get", "--prefix", &p]), "");
        assert!(
            one.fails(&["put", &k("l"), "v", "--lease", "1234abcd"]).contains("requested lease not found")
        );
        assert!(
            one.fails(&["get", &k("a"), "--rev", "99999999"])
                .contains("required revision is a future revision")
        );
    });
}

#[test]
fn txn() {
    on_cluster(async |c| {
        let Some(ctl) = Ctl::of(c, &[2]) else { return };
        let k = unique("ctl-txn") + "k";
        let script = format!("ver(\"{k}\") = \"0\"\n\nput {k} created\n\nget {k}\n\n");
        assert!(ctl.fed(&["txn"], &script).starts_with("SUCCESS"));
        let again = ctl.fed(&["txn"], &script);
        assert!(again.starts_with("FAILURE") && again.contains("created"), "{again}");
    });
}

#[test]
fn watch() {
    on_cluster(async |c| {
        let (Some(one), Some(two)) = (Ctl::of(c, &[0]), Ctl::of(c, &[1])) else { return };
        let p = unique("ctl-watch");
        let k = format!("{p}k");
        let rev = one.json(&["put", &k, "old"])["header"]["revision"].as_i64().unwrap();
        let mut watch = two.started(&["watch", "--prefix", &p, "--prev-kv", "--rev", &rev.to_string()]);
        let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
        one.ok(&["put", &k, "new"]);
        one.ok(&["del", &k]);
        // Each event: its kind, the previous key and value if any, the key and value.
        let expected = ["PUT", &k, "old", "PUT", &k, "old", &k, "new", "DELETE", &k, "new", &k];
        let mut got = Vec::new();
        while got.len() < expected.len() {
            let line = tokio::time::timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
            // Versions differ in printing an empty pair for what was not there.
            if !line.is_empty() {
                got.push(line);
            }
        }
        assert_eq!(got, expected);
    });
}

#[test]
fn lease() {
    on_cluster(async |c| {
        let Some(ctl) = Ctl::of(c, &[1]) else { return };
        let k = unique("ctl-lease") + "k";
        let granted = ctl.ok(&["lease", "grant", "300"]);
        let id = granted.split_whitespace().nth(1).unwrap().to_owned();
        assert_eq!(granted, format!("lease {id} granted with TTL(300s)\n"));
        ctl.ok(&["put", &k, "v", "--lease", &id]);
        let told = ctl.ok(&["lease", "timetolive", &id, "--keys"]);
        assert!(told.contains("granted with TTL(300s)") && told.contains(&k), "{told}");
        assert!(ctl.ok(&["lease", "list"]).contains(&id));
        let kept = ctl.ok(&["lease", "keep-alive", "--once", &id]);
        assert_eq!(kept, format!("lease {id} keepalived with TTL(300)\n"));
        assert_eq!(ctl.ok(&["lease", "revoke", &id]), format!("lease {id} revoked\n"));
        assert_eq!(ctl.ok(&["get", &k]), "");
        assert!(ctl.ok(&["lease", "timetolive", &id]).contains("already expired"));
        assert!(ctl.fails(&["lease", "revoke", &id]).contains("requested lease not found"));
    });
}

#[test]
fn lock_and_elect() {
    on_cluster(async |c| {
        let (Some(one), Some(two)) = (Ctl::of(c, &[0]), Ctl::of(c, &[1])) else { return };
        let name = unique("ctl-lock") + "l";
        let out = one.ok(&["lock", &name, "--", "sh", "-c", "echo held $ETCD_LOCK_KEY"]);
        assert!(out.contains(&format!("held {name}/")), "{out}");
        let name = unique("ctl-elect") + "e";
        let mut leader = one.started(&["elect", &name, "mine"]);
        let mut lines = BufReader::new(leader.stdout.take().unwrap()).lines();
        let key = tokio::time::timeout(SOON, lines.next_line()).await.unwrap().unwrap().unwrap();
        assert!(key.starts_with(&format!("{name}/")), "{key}");
        assert_eq!(lines.next_line().await.unwrap().unwrap(), "mine");
        let mut listener = two.started(&["elect", "--listen", &name]);
        let mut heard = BufReader::new(listener.stdout.take().unwrap()).lines();
        let line = tokio::time::timeout(SOON, heard.next_line()).await.unwrap().unwrap().unwrap();
        assert_eq!(line, key);
    });
}

#[test]
fn members_endpoints_and_alarms() {
    on_cluster(async |c| {
        let Some(ctl) = Ctl::of(c, &[0, 1, 2]) else { return };
        let list = ctl.ok(&["member", "list"]);
        assert_eq!(list.lines().count(), 3);
        assert!(list.lines().all(|line| line.contains(", started, ") && line.ends_with(", false")), "{list}");
        let status = ctl.json(&["endpoint", "status"]);
        let all = status.as_array().unwrap();
        assert_eq!(all.len(), 3);
        assert!(all.iter().all(|one| one["Status"]["leader"] == all[0]["Status"]["leader"]));
        let table = ctl.ok(&["endpoint", "status", "-w", "table"]);
        assert_eq!(table.matches(" true ").count(), 1, "one leader: {table}");
        let health = ctl.output(&["endpoint", "health"]);
        assert!(health.status.success());
        let said = [health.stdout, health.stderr].concat();
        assert_eq!(String::from_utf8_lossy(&said).matches("is healthy").count(), 3);
        let hashes = ctl.json(&["endpoint", "hashkv"]);
        assert_eq!(hashes.as_array().unwrap().len(), 3);
        assert_eq!(ctl.ok(&["alarm", "list"]), "");
        ctl.ok(&["alarm", "disarm"]);
        // Right after its start, etcd calls its cluster unhealthy for some seconds.
        let added = eventually("a member can be added", SOON, async || {
            let output =
                ctl.output(&["member", "add", "extra", "--learner", "--peer-urls=http://127.0.0.1:9"]);
            output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
        })
        .await;
        let id = added.split_whitespace().nth(1).unwrap().to_owned();
        assert!(added.contains("added to cluster"), "{added}");
        assert!(ctl.ok(&["member", "list"]).contains(&format!("{id}, unstarted")));
        assert!(ctl.fails(&["member", "promote", &id]).contains("in sync with leader"));
        ctl.ok(&["member", "update", &id, "--peer-urls=http://127.0.0.1:19"]);
        assert!(ctl.ok(&["member", "remove", &id]).contains("removed from cluster"));
    });
}

#[test]
fn compaction_defrag_and_move_leader() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let Some(all) = Ctl::of(c, &[0, 1, 2]) else { return };
        for i in 0..5 {
            all.ok(&["put", "k", &i.to_string()]);
        }
        assert_eq!(all.ok(&["compaction", "4"]), "compacted revision 4\n");
        assert!(all.fails(&["compaction", "4"]).contains("required revision has been compacted"));
        assert!(all.fails(&["get", "k", "--rev", "3"]).contains("required revision has been compacted"));
        assert_eq!(all.ok(&["compaction", "--physical", "6"]), "compacted revision 6\n");
        assert_eq!(all.ok(&["defrag"]).matches("Finished defragmenting").count(), 3);
        let leader = c.leader().await;
        let target = (leader + 2) % 3;
        let id = format!("{:x}", c.member_id(target).await);
        let moved = all.ok(&["move-leader", &id]);
        assert!(moved.starts_with("Leadership transferred from"), "{moved}");
        eventually("the leader has moved", SOON, async || (c.leader().await == target).then_some(())).await;
    });
}

/// Bytes that do not compress.
fn noise(len: usize) -> Vec<u8> {
    (0..len).map(|_| rand::random()).collect()
}

#[test]
fn snapshot_save_and_status() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let Some(ctl) = Ctl::of(c, &[0]) else { return };
        for i in 0..300 {
            c.client(0).await.put(format!("s{i}"), noise(500), None).await.unwrap();
        }
        let file = c.root.join("saved.db");
        let file = file.to_str().unwrap();
        let saved = ctl.output(&["snapshot", "save", file]);
        assert!(saved.status.success(), "{}", String::from_utf8_lossy(&saved.stderr));
        assert!(std::fs::metadata(file).unwrap().len() > 300 * 500);
        // The content is each server's own; `snapshot status` of etcdctl reads etcd's only.
        if crate::target::is_etcd() {
            let status = ctl.json(&["snapshot", "status", file]);
            assert_eq!(status["revision"], 301);
        } else {
            let output = Command::new(crate::target::mainstay_binary())
                .args(["snapshot", "status", file, "-o", "json"])
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(status["revision"], 301, "{status}");
        }
    });
}

#[test]
fn a_watch_survives_the_death_of_its_node() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let Some(all) = Ctl::of(c, &[0, 1, 2]) else { return };
        let mut watch = all.started(&["watch", "--prefix", "w/"]);
        let mut out = watch.stdout.take().unwrap();
        // Nothing tells that the watch stands, so write until it hears.
        let mut w = c.client(0).await;
        let mut heard = Vec::new();
        let mut buffer = [0; 4096];
        eventually("the watch hears", SOON, async || {
            w.put("w/first", "v", None).await.unwrap();
            match tokio::time::timeout(Duration::from_millis(200), out.read(&mut buffer)).await {
                Ok(Ok(n)) => {
                    heard.extend_from_slice(&buffer[..n]);
                    Some(())
                }
                _ => None,
            }
        })
        .await;
        for i in 0..3 {
            c.nodes[i].kill();
            c.nodes[i].start();
            c.wait_ready().await;
            c.client(i).await.put(format!("w/after{i}"), "v", None).await.unwrap();
            eventually("the watch goes on", Duration::from_secs(40), async || {
                if let Ok(Ok(n)) =
                    tokio::time::timeout(Duration::from_millis(200), out.read(&mut buffer)).await
                {
                    heard.extend_from_slice(&buffer[..n]);
                }
                String::from_utf8_lossy(&heard).contains(&format!("w/after{i}")).then_some(())
            })
            .await;
        }
    });
}
