//! Bad input and bad surroundings: for each the documented answer, no panic,
//! and nothing acknowledged lost.

use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::GetOptions;
use rand::RngExt;
use rustix::process::Signal;
use tokio::io::AsyncWriteExt;
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Cluster, Spec, fresh_root, on_cluster, on_own_cluster, on_prepared};
use crate::target::{is_etcd, not_in_etcd, skip};
use crate::{http, raw};

const METHODS: [&str; 12] = [
    "/etcdserverpb.KV/Range",
    "/etcdserverpb.KV/Put",
    "/etcdserverpb.KV/DeleteRange",
    "/etcdserverpb.KV/Txn",
    "/etcdserverpb.KV/Compact",
    "/etcdserverpb.Lease/LeaseGrant",
    "/etcdserverpb.Lease/LeaseRevoke",
    "/etcdserverpb.Cluster/MemberAdd",
    "/etcdserverpb.Maintenance/Alarm",
    "/etcdserverpb.Maintenance/HashKV",
    "/v3lockpb.Lock/Lock",
    "/v3electionpb.Election/Campaign",
];

const PEER_METHODS: [&str; 6] = [
    "/mainstay.peer.v1.Raft/Append",
    "/mainstay.peer.v1.Raft/Vote",
    "/mainstay.peer.v1.Raft/PreVote",
    "/mainstay.peer.v1.Raft/Snapshot",
    "/mainstay.peer.v1.Control/Forward",
    "/mainstay.peer.v1.Control/ReadIndex",
];

fn no_panic(c: &Cluster) {
    for node in &c.nodes {
        let log = node.log_text();
        assert!(!log.contains("panicked"), "{} panicked", node.name);
    }
}

#[test]
fn bytes_that_are_no_message_are_refused_and_harm_nothing() {
    on_cluster(async |c| {
        let pids: Vec<_> = c.nodes.iter().map(|node| node.pid()).collect();
        let channel = raw::channel(&c.nodes[0].url()).await;
        // A length that runs beyond the end; a field of the wrong kind; a varint without an end.
        let bad: [&[u8]; 3] = [
            &[0x0a, 0x7f, 1],
            &[0x0d, 1],
            &[0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
        ];
        for method in METHODS {
            for body in bad {
                let status = raw::unary_bytes(&channel, method, body).await.unwrap_err();
                let fits = matches!(status.code(), Code::Internal | Code::InvalidArgument);
                assert!(fits, "{method} {body:?}: {status:?}");
            }
        }
        if !is_etcd() {
            let peers = raw::channel(&c.nodes[0].peer_url()).await;
            for method in PEER_METHODS {
                for body in bad.into_iter().chain([&[][..]]) {
                    assert!(raw::unary_bytes(&peers, method, body).await.is_err(), "{method}");
                }
            }
        }
        // Not even HTTP, on both ports.
        let noise: Vec<u8> = (0..4096).map(|_| rand::rng().random()).collect();
        for port in [c.nodes[0].client_port, c.nodes[0].peer_port] {
            for _ in 0..5 {
                let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                let _ = stream.write_all(&noise).await;
            }
        }
        c.wait_ready().await;
        assert_eq!(pids, c.nodes.iter().map(|node| node.pid()).collect::<Vec<_>>());
        no_panic(c);
    });
}

#[test]
fn random_fields_never_bring_a_node_down() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let seed = seed("trouble::random_fields_never_bring_a_node_down");
        let mut random: rand::rngs::StdRng = rand::SeedableRng::seed_from_u64(seed);
        let channel = raw::channel(&c.nodes[0].url()).await;
        for _ in 0..600 {
            let method = METHODS[random.random_range(0..METHODS.len())];
            if method.starts_with("/v3") || method.contains("MemberAdd") || method.contains("Alarm") {
                continue;
            }
            let mut body = Vec::new();
            for _ in 0..random.random_range(0..6) {
                let field = random.random_range(1..14u8);
                if random.random() {
                    body.push(field << 3);
                    let mut number: u64 = random.random::<u64>() >> random.random_range(0..64);
                    while number >= 0x80 {
                        body.push(number as u8 | 0x80);
                        number >>= 7;
                    }
                    body.push(number as u8);
                } else {
                    let len = random.random_range(0..20u8);
                    body.extend([field << 3 | 2, len]);
                    body.extend((0..len).map(|_| random.random::<u8>()));
                }
            }
            let call = raw::unary_bytes(&channel, method, &body);
            match tokio::time::timeout(Duration::from_secs(10), call).await {
                Ok(Err(status)) => {
                    assert_ne!(status.code(), Code::Unavailable, "{method} {body:?}: {status:?}")
                }
                Ok(Ok(_)) => {}
                Err(_) => panic!("{method} {body:?} hangs"),
            }
        }
        assert!(c.nodes[0].process.as_mut().unwrap().is_running());
        c.kill_all();
        c.start_all();
        c.wait_ready().await;
        no_panic(c);
    });
}

#[test]
fn a_port_in_use_is_named_and_the_node_ends() {
    on_prepared(Spec::nodes(1), async |c| {
        let port = c.nodes[0].client_port;
        let _taken = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
        c.nodes[0].start();
        let status = c.nodes[0].wait_exit(Duration::from_secs(20)).await;
        assert!(!status.success());
        let log = c.nodes[0].log_text();
        assert!(log.contains(&port.to_string()) && log.to_lowercase().contains("in use"), "{log}");
    });
}

#[test]
fn settings_that_contradict_are_refused_before_anything_is_written() {
    let cases: [(&str, &[&str], &str); 4] = [
        ("duplicate names", &["--initial-cluster=n1=http://127.0.0.1:1,n1=http://127.0.0.1:2"], "n1"),
        ("itself missing", &["--initial-cluster=other=http://127.0.0.1:1"], "n1"),
        ("an unknown flag", &["--no-such-flag=1"], "no-such-flag"),
        ("a bad number", &["--snapshot-count=many"], "snapshot-count"),
    ];
    for (what, flags, named) in cases {
        on_prepared(Spec::nodes(1), async |c| {
            c.nodes[0].flags.retain(|flag| !flag.starts_with("--initial-cluster="));
            c.nodes[0].flags.extend(flags.iter().map(|flag| flag.to_string()));
            c.nodes[0].start();
            let status = c.nodes[0].wait_exit(Duration::from_secs(20)).await;
            assert!(!status.success(), "{what}");
            assert!(c.nodes[0].log_text().contains(named), "{what}: {}", c.nodes[0].log_text());
            assert!(is_etcd() || !c.nodes[0].data_dir.join("IDENTITY").exists(), "{what}");
        });
    }
}

#[test]
fn a_node_of_another_cluster_is_kept_out() {
    on_own_cluster(Spec::nodes(3), async |c| {
        c.client(0).await.put("k", "ours", None).await.unwrap();
        c.nodes[2].kill();
        // The same addresses, another token, an empty disk: another cluster by intent.
        let real = (c.nodes[2].data_dir.clone(), c.nodes[2].flags.clone());
        c.nodes[2].data_dir = c.root.join("impostor");
        for flag in &mut c.nodes[2].flags {
            if flag.starts_with("--initial-cluster-token=") {
                *flag = "--initial-cluster-token=another".into();
            }
        }
        c.nodes[2].start();
        for _ in 0..20 {
            c.client(0).await.put("k", "still ours", None).await.unwrap();
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let local = GetOptions::new().with_serializable();
        let call = async { c.client(2).await.get("k", Some(local)).await };
        if let Ok(Ok(got)) = tokio::time::timeout(Duration::from_secs(2), call).await {
            assert_eq!(got.count(), 0, "it has our data");
        }
        assert_eq!(c.client(0).await.member_list().await.unwrap().members().len(), 3);
        c.nodes[2].kill();
        (c.nodes[2].data_dir, c.nodes[2].flags) = real;
        c.nodes[2].start();
        c.wait_ready().await;
        assert_eq!(value(&mut c.client(2).await, "k").await.unwrap(), "still ours");
    });
}

#[test]
fn a_disk_of_another_cluster_is_refused() {
    if not_in_etcd("the identity marker") {
        return;
    }
    on_own_cluster(Spec::nodes(1), async |c| {
        c.client(0).await.put("k", "v", None).await.unwrap();
        c.kill_all();
        for flag in &mut c.nodes[0].flags {
            if flag.starts_with("--initial-cluster-token=") {
                *flag = "--initial-cluster-token=another".into();
            }
        }
        // A started member's bootstrap flags are ignored, as in etcd: its disk says who it is.
        c.nodes[0].start();
        c.wait_ready().await;
        assert_eq!(value(&mut c.client(0).await, "k").await.unwrap(), "v");
        c.kill_all();
        let marker = c.nodes[0].data_dir.join("IDENTITY");
        let whole = std::fs::read(&marker).unwrap();
        for broken in [&b""[..], b"garbage\n", &whole[..whole.len() / 2]] {
            std::fs::write(&marker, broken).unwrap();
            c.nodes[0].start();
            let status = c.nodes[0].wait_exit(Duration::from_secs(20)).await;
            assert!(!status.success());
            assert!(c.nodes[0].log_text().contains("IDENTITY"), "it names the file");
        }
        std::fs::write(&marker, &whole).unwrap();
        c.nodes[0].start();
        c.wait_ready().await;
        assert_eq!(value(&mut c.client(0).await, "k").await.unwrap(), "v");
        no_panic(c);
    });
}

#[test]
fn two_processes_never_share_a_data_directory() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let i = c.extra_node("n1");
        c.nodes[i].data_dir = c.nodes[0].data_dir.clone();
        c.nodes[i].flags = c.nodes[0].flags.clone();
        let (old, new) = (c.nodes[0].peer_url(), c.nodes[i].peer_url());
        for flag in &mut c.nodes[i].flags {
            *flag = flag.replace(&old, &new);
        }
        c.nodes[i].start();
        if is_etcd() {
            // etcd waits for the lock for ever.
            assert!(c.nodes[i].process.as_mut().unwrap().wait(Duration::from_secs(3)).await.is_none());
        } else {
            let status = c.nodes[i].wait_exit(Duration::from_secs(20)).await;
            assert!(!status.success());
        }
        c.nodes[i].kill();
        c.client(0).await.put("k", "v", None).await.unwrap();
    });
}

#[test]
fn a_data_directory_that_cannot_be_used_is_named() {
    on_prepared(Spec::nodes(1), async |c| {
        let file = c.root.join("a-file");
        std::fs::write(&file, "not a directory").unwrap();
        for dir in [file.clone(), file.join("below"), PathBuf::from("/proc/no-such-place")] {
            c.nodes[0].data_dir = dir.clone();
            c.nodes[0].start();
            let status = c.nodes[0].wait_exit(Duration::from_secs(20)).await;
            assert!(!status.success());
            let log = c.nodes[0].log_text();
            assert!(log.contains(dir.to_str().unwrap()), "{log}");
        }
    });
}

/// Every file below a directory with this ending, largest first.
fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => open.push(path),
                _ if path.to_string_lossy().ends_with(ending) => {
                    let size = entry.metadata().map_or(0, |meta| meta.len());
                    found.push((size, path));
                }
                _ => {}
            }
        }
    }
    found.sort();
    found.into_iter().rev().map(|(_, path)| path).collect()
}

fn log_files(c: &Cluster, node: usize) -> Vec<PathBuf> {
    let dir = &c.nodes[node].data_dir;
    if is_etcd() { files(dir, ".wal") } else { files(&dir.join("raft"), ".log") }
}

fn table_files(c: &Cluster, node: usize) -> Vec<PathBuf> {
    if is_etcd() {
        files(&c.nodes[node].data_dir, "snap/db")
    } else {
        files(&c.nodes[node].data_dir.join("state"), ".sst")
    }
}

/// Where the last frame of a segment of the log ends: each says its length, and zeros follow the last.
fn end_of_log(file: &Path) -> u64 {
    let content = std::fs::read(file).unwrap();
    let mut at = 32;
    while content[at..].iter().take(32).any(|byte| *byte != 0) {
        let length = u32::from_le_bytes(content[at + 8..at + 12].try_into().unwrap());
        at += (32 + length as usize).next_multiple_of(8);
    }
    at as u64
}

fn flip(file: &Path, at: u64) {
    let mut byte = [0];
    let mut open = std::fs::OpenOptions::new().read(true).write(true).open(file).unwrap();
    open.seek(SeekFrom::Start(at)).unwrap();
    std::io::Read::read_exact(&mut open, &mut byte).unwrap();
    open.seek(SeekFrom::Start(at)).unwrap();
    open.write_all(&[byte[0] ^ 0x40]).unwrap();
}

const KEYS: usize = 400;

/// Values that do not compress, so that a flipped byte hits one.
async fn fill(c: &Cluster) -> Vec<Vec<u8>> {
    let mut client = c.client(0).await;
    let mut values = Vec::new();
    for i in 0..KEYS {
        let value: Vec<u8> = (0..1000).map(|_| rand::rng().random()).collect();
        client.put(format!("t{i:04}"), value.clone(), None).await.unwrap();
        values.push(value);
    }
    values
}

/// After damage, a node may refuse to start or to answer; what it answers must be right and whole.
/// Gives whether it served everything.
async fn served_or_refused(c: &mut Cluster, node: usize, values: &[Vec<u8>]) -> bool {
    c.nodes[node].start();
    let mut client = c.client(node).await;
    let options = || Some(GetOptions::new().with_prefix().with_serializable());
    let outcome = eventually("it serves, refuses or ends", Duration::from_secs(60), async || {
        if let Some(status) = c.nodes[node].process.as_mut().unwrap().try_wait() {
            assert!(!status.success(), "it ended as if all were well");
            return Some(false);
        }
        if http::get(c.nodes[node].client_port, "/health").await.is_ok_and(|(code, _)| code == 200)
            && let Ok(got) = client.get("t", options()).await
        {
            for (i, kv) in got.kvs().iter().enumerate() {
                assert_eq!(kv.key(), format!("t{i:04}").as_bytes(), "a key is missing");
                assert!(kv.value() == values[i], "a wrong value was served for t{i:04}");
            }
            assert_eq!(got.kvs().len(), values.len(), "acknowledged keys are missing");
            return Some(true);
        }
        let alive = tokio::net::TcpStream::connect(("127.0.0.1", c.nodes[node].client_port)).await.is_ok();
        match client.get("t", options()).await {
            Err(etcd_client::Error::GRpcStatus(status))
                if alive && matches!(status.code(), Code::DataLoss | Code::Internal) =>
            {
                Some(false)
            }
            _ => None,
        }
    })
    .await;
    no_panic_in_ours(c, node);
    outcome
}

fn no_panic_in_ours(c: &Cluster, node: usize) {
    if !is_etcd() {
        assert!(!c.nodes[node].log_text().contains("panicked"), "it stops by decision, not by panic");
    }
}

#[test]
fn a_torn_tail_of_the_log_is_dropped_and_nothing_acknowledged_with_it() {
    if not_in_etcd("its log files are preallocated, so nothing can be appended to their end") {
        return;
    }
    on_own_cluster(Spec::nodes(1), async |c| {
        let values = fill(c).await;
        // The first bytes of a record that was never synced, as a power failure leaves them.
        for tail in [&[0x5a, 0x17, 0x33][..], &[0x11; 40]] {
            c.kill_all();
            let newest = log_files(c, 0).into_iter().max().expect("there is a log");
            let end = end_of_log(&newest);
            let mut file = std::fs::OpenOptions::new().write(true).open(newest).unwrap();
            file.seek(SeekFrom::Start(end)).unwrap();
            file.write_all(tail).unwrap();
            let served = served_or_refused(c, 0, &values).await;
            assert!(served, "a torn tail is no reason to refuse");
        }
    });
}

#[test]
fn a_flipped_byte_in_the_log_never_loses_an_acknowledged_write_silently() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let values = fill(c).await;
        c.kill_all();
        let file = log_files(c, 0).into_iter().next().expect("there is a log");
        // In the middle of what was written, whatever is preallocated behind it.
        flip(&file, 200_000);
        let served = served_or_refused(c, 0, &values).await;
        eprintln!("REPORT flipped byte in the log: {}", if served { "served whole" } else { "refused" });
        c.kill_all();
        flip(&file, 200_000);
        if file.exists() {
            assert!(served_or_refused(c, 0, &values).await, "undamaged again, it serves everything");
        }
    });
}

#[test]
fn a_flipped_byte_in_a_table_is_never_served() {
    // etcd's file has no checksums per page; the flipped byte may well be served there.
    if not_in_etcd("checksums in its table") {
        return;
    }
    on_own_cluster(Spec::nodes(1).flag("snapshot-count", 100), async |c| {
        let values = fill(c).await;
        c.client(0).await.defragment().await.unwrap();
        c.nodes[0].signal(Signal::TERM);
        c.nodes[0].wait_exit(Duration::from_secs(20)).await;
        let file =
            table_files(c, 0).into_iter().next().expect("the state is in tables after a defragmentation");
        let size = std::fs::metadata(&file).unwrap().len();
        flip(&file, size / 2);
        let served = served_or_refused(c, 0, &values).await;
        eprintln!("REPORT flipped byte in a table: {}", if served { "served whole" } else { "refused" });
        c.kill_all();
        flip(&file, size / 2);
        assert!(served_or_refused(c, 0, &values).await, "undamaged again, it serves everything");
    });
}

#[test]
fn a_missing_table_is_noticed_and_the_other_nodes_go_on() {
    on_own_cluster(Spec::nodes(3).flag("snapshot-count", 100), async |c| {
        let values = fill(c).await;
        revision(&mut c.client(2).await).await;
        c.client(2).await.defragment().await.unwrap();
        c.nodes[2].signal(Signal::TERM);
        c.nodes[2].wait_exit(Duration::from_secs(20)).await;
        if is_etcd() {
            std::fs::remove_file(&table_files(c, 2)[0]).unwrap();
        } else {
            for file in table_files(c, 2) {
                std::fs::remove_file(file).unwrap();
            }
        }
        let served = served_or_refused(c, 2, &values).await;
        assert!(!served || is_etcd(), "without its tables it cannot have everything");
        c.client(0).await.put("k", "v", None).await.unwrap();
    });
}

#[test]
fn a_flipped_byte_in_one_of_three_is_that_ones_trouble_only() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let values = fill(c).await;
        let victim = c.follower().await;
        c.nodes[victim].kill();
        let file = log_files(c, victim).into_iter().next().expect("there is a log");
        flip(&file, 100_000);
        served_or_refused(c, victim, &values).await;
        let healthy = (victim + 1) % 3;
        let got = c.client(healthy).await.get("t", Some(GetOptions::new().with_prefix())).await.unwrap();
        assert_eq!(got.count() as usize, KEYS);
        c.client(healthy).await.put("k", "v", None).await.unwrap();
    });
}

/// Moves the wall clock of a process by the seconds that stand in a shared file, and nothing else.
/// libfaketime cannot be used: it allocates while it starts, and jemalloc reads the clock while it does.
const CLOCK_SHIM: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static volatile long *shift;
static long seconds(void) {
  if (!shift) {
    const char *name = getenv("CLOCK_SHIFT_FILE");
    int fd = name ? open(name, O_RDONLY) : -1;
    if (fd < 0) return 0;
    void *at = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (at == MAP_FAILED) return 0;
    shift = at;
  }
  return *shift;
}
int clock_gettime(clockid_t id, struct timespec *t) {
  int result = syscall(SYS_clock_gettime, id, t);
  if (result == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) t->tv_sec += seconds();
  return result;
}
"#;

/// Compiles the shim; `None` where there is no C compiler.
fn clock_shim(dir: &Path) -> Option<PathBuf> {
    let (source, library) = (dir.join("clock.c"), dir.join("clock.so"));
    std::fs::write(&source, CLOCK_SHIM).unwrap();
    let status = std::process::Command::new("cc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&library)
        .arg(&source)
        .status();
    status.is_ok_and(|status| status.success()).then_some(library)
}

/// Written in place, because the processes have the file mapped.
fn shift_clock(file: &Path, seconds: i64) {
    let mut open = std::fs::OpenOptions::new().create(true).write(true).truncate(false).open(file).unwrap();
    open.write_all(&seconds.to_ne_bytes()).unwrap();
}

#[test]
fn a_jumping_clock_expires_nothing_and_stops_nothing() {
    if not_in_etcd("Go reads the clock without the C library, so it cannot be moved") {
        return;
    }
    let dir = fresh_root();
    let Some(library) = clock_shim(&dir) else {
        return skip("there is no C compiler to build the clock with");
    };
    let control = dir.join("shift");
    shift_clock(&control, 0);
    let spec = Spec::nodes(3).env("LD_PRELOAD", library.display()).env("CLOCK_SHIFT_FILE", control.display());
    on_own_cluster(spec, async |c| {
        let mut client = c.client(0).await;
        let lease = client.lease_grant(60, None).await.unwrap().id();
        let options = etcd_client::PutOptions::new().with_lease(lease);
        client.put("leased", "v", Some(options)).await.unwrap();
        let first = client.put("k", "0", None).await.unwrap().header().unwrap().revision();
        let term = client.status().await.unwrap().raft_term();
        for jump in [400_000, -400_000, 0] {
            shift_clock(&control, jump);
            for i in 0..20 {
                c.client(i % 3).await.put("k", format!("{jump}{i}"), None).await.unwrap();
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            let left = client.lease_time_to_live(lease, None).await.unwrap().ttl();
            assert!((30..=60).contains(&left), "{jump}: {left} s left of 60");
            assert!(get_one(&mut client, "leased").await.is_some(), "{jump}");
            // No history went with the jump either.
            client.get("k", Some(GetOptions::new().with_revision(first))).await.unwrap();
        }
        assert_eq!(client.status().await.unwrap().raft_term(), term, "no election because of it");
        // The clock did move: the log's own time stamps tell.
        let days =
            |log: &str| log.lines().filter_map(|line| line.get(..10).map(str::to_owned)).collect::<Vec<_>>();
        shift_clock(&control, 400_000);
        c.nodes[0].signal(Signal::TERM);
        c.nodes[0].wait_exit(Duration::from_secs(20)).await;
        let seen = days(&c.nodes[0].log_text());
        assert_ne!(seen.first(), seen.last(), "the shim has no effect");
    });
    let _ = std::fs::remove_dir_all(dir);
}
