//! A disk that fills up: writes are refused with etcd's alarm, reads go on,
//! and when there is space again, so do writes, by themselves.
//!
//! Each node gets a small file system of its own, which takes root.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use etcd_client::GetOptions;
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Spec, on_prepared};
use crate::http;
use crate::target::{not_in_etcd, skip};

const FULL: &str = "etcdserver: mvcc: database space exceeded";

/// A tmpfs of its own; unmounted when dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    pub fn mount(at: &Path, mib: usize) -> Option<SmallDisk> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={mib}m");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).status();
        if !status.is_ok_and(|status| status.success()) {
            skip("a small file system cannot be mounted here (root is needed)");
            return None;
        }
        Some(SmallDisk(at.to_owned()))
    }

    fn free(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.0).unwrap();
        stat.f_bavail * stat.f_frsize
    }

    /// Leaves only this many bytes free.
    pub fn fill_to(&self, left: u64) {
        let size = self.free().saturating_sub(left);
        let status = Command::new("fallocate").args(["-l", &size.to_string()]).arg(self.filler()).status();
        assert!(status.unwrap().success());
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    pub fn empty(&self) {
        std::fs::remove_file(self.filler()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn spec(nodes: usize) -> Spec {
    Spec::nodes(nodes).flag("disk-reserve-bytes", "64MiB").flag("write-buffer-bytes", "4MiB")
}

#[test]
fn below_the_reserve_writes_are_refused_and_come_back_by_themselves() {
    if not_in_etcd("a reserve of disk space") {
        return;
    }
    on_prepared(spec(3), async |c| {
        let Some(disk) = SmallDisk::mount(&c.root.join("disk"), 400) else { return };
        c.nodes[1].data_dir = disk.0.join("n2");
        c.start_all();
        c.wait_ready().await;
        let mut client = c.client(0).await;
        client.put("k", "v", None).await.unwrap();
        disk.fill_to(32 << 20);
        let refusal =
            eventually("the alarm refuses writes on every node", Duration::from_secs(40), async || {
                client.put("k", "w", None).await.err()
            })
            .await;
        refused::<()>(Err(refusal), Code::ResourceExhausted, FULL);
        assert!(get_one(&mut c.client(1).await, "k").await.is_some(), "reads go on");
        let status = client.status().await.unwrap();
        assert!(status.errors().iter().any(|error| error.contains("NOSPACE")), "{:?}", status.errors());
        disk.empty();
        eventually("writes come back", Duration::from_secs(60), async || {
            client.put("k", "x", None).await.ok()
        })
        .await;
        assert_eq!(value(&mut c.client(1).await, "k").await.unwrap(), "x");
        c.kill_all();
        drop(disk);
    });
}

#[test]
fn a_disk_without_a_byte_left_loses_nothing_and_can_be_read() {
    if not_in_etcd("a ballast file") {
        return;
    }
    on_prepared(spec(1), async |c| {
        let Some(disk) = SmallDisk::mount(&c.root.join("disk"), 400) else { return };
        c.nodes[0].data_dir = disk.0.join("n1");
        c.start_all();
        c.wait_ready().await;
        let mut acknowledged = Vec::new();
        let mut client = c.client(0).await;
        for i in 0..100 {
            client.put(format!("k{i:04}"), vec![b'v'; 1000], None).await.unwrap();
            acknowledged.push(i);
        }
        disk.fill_to(0);
        // Whatever the node still takes, it must keep; at the end it refuses, or stops.
        for i in 100..2000 {
            match client.put(format!("k{i:04}"), vec![b'v'; 100_000], None).await {
                Ok(_) => acknowledged.push(i),
                Err(_) => break,
            }
        }
        assert!(acknowledged.len() < 1900, "the disk was never full");
        let ended = c.nodes[0].process.as_mut().unwrap().wait(Duration::from_secs(3)).await;
        eprintln!("REPORT full disk: {} acknowledged, the node {ended:?}", acknowledged.len());
        c.kill_all();
        c.start_all();
        let mut client = c.client(0).await;
        let options = || Some(GetOptions::new().with_prefix().with_keys_only().with_serializable());
        let got =
            eventually("it starts on the full disk and can be read", Duration::from_secs(40), async || {
                http::get(c.nodes[0].client_port, "/livez").await.ok()?;
                client.get("k", options()).await.ok()
            })
            .await;
        let there: std::collections::HashSet<String> = keys(&got).into_iter().collect();
        let missing = acknowledged.iter().find(|i| !there.contains(&format!("k{i:04}")));
        assert_eq!(missing, None, "an acknowledged write is gone");
        disk.empty();
        if c.nodes[0].process.as_mut().unwrap().try_wait().is_some() {
            c.nodes[0].start();
        }
        eventually("writes come back", Duration::from_secs(60), async || {
            client.put("k", "x", None).await.ok()
        })
        .await;
        assert!(!c.nodes[0].log_text().contains("panicked"));
        c.kill_all();
        drop(disk);
    });
}
