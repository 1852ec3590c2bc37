//! What this machine can do to a cluster, found out by doing it.
//!
//! Each ability is tried once, in small, before there are hosts: two namespaces
//! and a disk of its own, which are gone afterwards. A tool that is installed
//! proves nothing; that a packet was dropped does.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use tokio::io::AsyncReadExt as _;
use tokio::process::Command;

use crate::faults::clock;
use crate::faults::delay::{Holder, QUEUE, connect_time};
use crate::faults::network::{counter, inside, nft, remove_table};
use crate::hosts::cgroup::Group;
use crate::hosts::command::{self, line, word};
use crate::hosts::disk::Disk;
use crate::hosts::isolation::ROOT;

/// Something that a fault needs from the kernel, from its tools or from the harness's rights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ability {
    /// nft rules on a bridge.
    Nft,
    /// Packets handed to the harness by iptables.
    Nfqueue,
    /// A token bucket on a link.
    Tbf,
    /// `ss -K`: ending live connections of others.
    SocketKill,
    /// A C compiler, and a node that starts with the clock library loaded.
    ClockShim,
    /// cgroup limits on a block device.
    Throttle,
    /// Freezing a filesystem.
    Freeze,
    /// Shutting a filesystem down without flushing its journal.
    Shutdown,
    /// Making system calls of a running process fail.
    Strace,
}

impl Ability {
    /// Whether faults of the network need it.
    pub fn is_of_network(self) -> bool {
        matches!(self, Ability::Nft | Ability::Nfqueue | Ability::Tbf | Ability::SocketKill)
    }

    fn is_of_disk(self) -> bool {
        matches!(self, Ability::Throttle | Ability::Freeze | Ability::Shutdown)
    }
}

/// What came of looking for an ability: how it was seen, or why it is not there.
pub type Found = (Ability, anyhow::Result<String>);

/// How long one attempt may take.
const TIME_MAX: Duration = Duration::from_secs(15);

/// Tries each of these, for a run of this name with nodes of this program.
pub async fn all(abilities: &[Ability], run: &str, binary: &Path) -> Vec<Found> {
    let disk = Disk {
        image: Path::new(ROOT).join("probe.image"),
        mount: Path::new(ROOT).join("probe"),
        bytes: 32 << 20,
    };
    let network = match abilities.iter().any(|ability| ability.is_of_network()) {
        true => Link::make().await,
        false => Ok(()),
    };
    let mounted = match abilities.iter().any(|ability| ability.is_of_disk()) {
        true => disk.make().await,
        false => Ok(()),
    };
    let mut found = Vec::new();
    for ability in abilities {
        let ground = if ability.is_of_network() { &network } else { &mounted };
        let tried = match ground {
            Err(error) if ability.is_of_network() || ability.is_of_disk() => {
                Err(anyhow::anyhow!("{error:#}"))
            }
            _ => {
                let attempt = tokio::time::timeout(TIME_MAX, try_one(*ability, run, binary, &disk));
                attempt.await.unwrap_or_else(|_| Err(anyhow::anyhow!("it was not done after {TIME_MAX:?}")))
            }
        };
        found.push((*ability, tried));
    }
    if network.is_ok() {
        Link::remove().await;
    }
    if let Ok(mount) = word(&disk.mount) {
        let _ = command::run("umount", &[mount]).await;
        let _ = std::fs::remove_file(&disk.image);
    }
    found
}

async fn try_one(ability: Ability, run: &str, binary: &Path, disk: &Disk) -> anyhow::Result<String> {
    match ability {
        Ability::Nft => drops_packets().await,
        Ability::Nfqueue => delays_packets().await,
        Ability::Tbf => narrows_a_link().await,
        Ability::SocketKill => cuts_a_connection().await,
        Ability::ClockShim => moves_a_clock(binary).await,
        Ability::Throttle => slows_a_disk(run, disk).await,
        Ability::Freeze => freezes_a_disk(disk).await,
        Ability::Shutdown => disk.power_fail().await,
        Ability::Strace => fails_system_calls().await,
    }
}

/// Two namespaces on a bridge.
struct Link;

const A: &str = "probe1";
const B: &str = "probe2";
const B_IP: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 2);
const HERE: Ipv4Addr = Ipv4Addr::new(10, 78, 0, 254);

impl Link {
    async fn make() -> anyhow::Result<()> {
        line("ip link add probe0 type bridge").await?;
        line(&format!("ip addr add {HERE}/24 dev probe0")).await?;
        line("ip link set probe0 up").await?;
        for (name, ip) in [(A, Ipv4Addr::new(10, 78, 0, 1)), (B, B_IP)] {
            line(&format!("ip netns add {name}")).await?;
            line(&format!("ip link add {name} type veth peer name eth0 netns {name}")).await?;
            line(&format!("ip link set {name} master probe0 up")).await?;
            line(&format!("ip -n {name} addr add {ip}/24 dev eth0")).await?;
            line(&format!("ip -n {name} link set eth0 up")).await?;
        }
        Ok(())
    }

    async fn remove() {
        for words in ["ip netns del probe1", "ip netns del probe2", "ip link del probe0"] {
            let _ = line(words).await;
        }
    }

    /// Sends datagrams of this many bytes from the first to the second.
    async fn send(count: usize, bytes: usize) -> anyhow::Result<()> {
        let script = format!(
            "p=$(printf '%0{bytes}d' 0); for i in {{1..{count}}}; do echo $p > /dev/udp/{B_IP}/9; done; true"
        );
        inside(A, &["bash", "-c", &script]).await.map(drop)
    }
}

async fn drops_packets() -> anyhow::Result<String> {
    const TABLE: &str = "probe";
    nft(&format!(
        "table bridge {TABLE} {{
             set cut {{ type ipv4_addr; counter; elements = {{ {B_IP} }}; }}
             counter dropped {{ }}
             chain forward {{ type filter hook forward priority 0; policy accept;
                 ip daddr @cut numgen random mod 100 < 50 counter name dropped drop; }}
         }}"
    ))
    .await?;
    let sent = Link::send(60, 1).await;
    let dropped = counter(TABLE, "dropped").await;
    remove_table(TABLE).await?;
    sent?;
    let dropped = dropped?;
    ensure!((5..=55).contains(&dropped), "half of 60 packets should have been dropped; {dropped} were");
    Ok(format!("{dropped} of 60 packets dropped"))
}

async fn delays_packets() -> anyhow::Result<String> {
    const DELAY: Duration = Duration::from_millis(30);
    let usual = connect_time(A, B_IP).await?;
    let holder = Holder::start(DELAY, DELAY, StdRng::seed_from_u64(0))?;
    let rule = format!("FORWARD -d {B_IP} -j NFQUEUE --queue-num {QUEUE} --queue-bypass");
    line(&format!("iptables -w -A {rule}")).await?;
    let slow = connect_time(A, B_IP).await;
    let held = holder.held.load(Ordering::Relaxed);
    line(&format!("iptables -w -D {rule}")).await?;
    tokio::task::spawn_blocking(move || holder.stop()).await??;
    let slow = slow?;
    ensure!(
        held > 0 && slow >= usual + DELAY,
        "to connect took {usual:?}, then {slow:?}; {held} packets held"
    );
    Ok(format!("to connect took {usual:?}, then {slow:?}"))
}

async fn narrows_a_link() -> anyhow::Result<String> {
    line("tc qdisc add dev probe2 root tbf rate 256kbit burst 16kb latency 400ms").await?;
    let sent = Link::send(60, 1000).await;
    let shown = line("tc -s -j qdisc show dev probe2").await;
    line("tc qdisc del dev probe2 root").await?;
    sent?;
    let shown: serde_json::Value = serde_json::from_str(&shown?)?;
    let waited = shown[0]["overlimits"].as_u64().unwrap_or(0);
    ensure!(waited > 0, "nothing had to wait: {shown}");
    Ok(format!("{waited} times a packet had to wait"))
}

async fn cuts_a_connection() -> anyhow::Result<String> {
    let listener = tokio::net::TcpListener::bind((HERE, 0)).await?;
    let port = listener.local_addr()?.port();
    let script = format!("exec 3<>/dev/tcp/{HERE}/{port}; sleep 10");
    let mut client = Command::new("nsenter");
    client.args([&format!("--net=/run/netns/{A}"), "bash", "-c", &script]);
    let mut client = client.stdin(Stdio::null()).kill_on_drop(true).spawn()?;
    let (mut stream, _) = listener.accept().await?;
    let script = "ss -K -H -t state established 2>/dev/null; true";
    let cut = inside(A, &["bash", "-c", script]).await?.lines().count();
    let read = tokio::time::timeout(Duration::from_secs(2), stream.read(&mut [0])).await;
    client.kill().await?;
    let read = read.context("the connection lives on")?;
    ensure!(cut == 1, "{cut} connections were cut");
    Ok(format!("the other end of a connection that was cut read {read:?}"))
}

async fn moves_a_clock(binary: &Path) -> anyhow::Result<String> {
    let told = clock::try_out(&Path::new(ROOT).join("probe-clock"), "date", &["+%s"]).await?;
    let now = std::time::UNIX_EPOCH.elapsed()?.as_secs();
    let ahead = told.trim().parse::<u64>()?.saturating_sub(now);
    ensure!((290..=310).contains(&ahead), "a clock that was set 300 s ahead is {ahead} s ahead");
    // Its allocator reads the clock before anything else runs.
    let node = word(binary)?;
    clock::try_out(&Path::new(ROOT).join("probe-clock"), node, &["--version"])
        .await
        .context("the node's program does not start with the library")?;
    Ok(format!("a clock is {ahead} s ahead, and the node's program starts with it"))
}

async fn slows_a_disk(run: &str, disk: &Disk) -> anyhow::Result<String> {
    let group = Group::make(run, "probe")?;
    let device = disk.device()?;
    group.limit_writes(&device, Some(20))?;
    let slow = group.time_synced_writes(&disk.mount, 5).await;
    group.limit_writes(&device, None)?;
    let slow = slow?;
    ensure!(slow >= Duration::from_millis(150), "5 synced writes at 20 a second took {slow:?}");
    Ok(format!("5 synced writes took {slow:?}"))
}

async fn freezes_a_disk(disk: &Disk) -> anyhow::Result<String> {
    let mount = word(&disk.mount)?;
    command::run("fsfreeze", &["-f", mount]).await?;
    let file: PathBuf = disk.mount.join("written");
    let write = tokio::task::spawn_blocking(move || std::fs::write(file, "x"));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let stuck = !write.is_finished();
    command::run("fsfreeze", &["-u", mount]).await?;
    write.await??;
    ensure!(stuck, "a write to a frozen filesystem came back");
    Ok("a write waited until the end".to_owned())
}

/// Attaches to a process that runs already, as the fault does.
async fn fails_system_calls() -> anyhow::Result<String> {
    let script = "while sleep 0.05; do sync . && continue; echo failed; exit; done";
    let mut victim = Command::new("bash");
    victim.args(["-c", script]).current_dir(ROOT).stdin(Stdio::null()).stdout(Stdio::piped());
    let victim = victim.stderr(Stdio::null()).kill_on_drop(true).spawn()?;
    let pid = victim.id().context("it just started")?.to_string();
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "-p",
        &pid,
        "-e",
        "trace=sync,fsync,syncfs",
        "-e",
        "inject=sync,fsync,syncfs:error=EIO",
    ]);
    let mut strace =
        strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true).spawn()?;
    let output = tokio::time::timeout(Duration::from_secs(5), victim.wait_with_output()).await;
    strace.kill().await?;
    let output = output.context("no call was made to fail")??;
    ensure!(output.stdout == b"failed\n", "the process ended with {}", output.status);
    Ok("a sync of a running process failed".to_owned())
}
