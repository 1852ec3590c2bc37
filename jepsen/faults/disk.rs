//! What happens to disks that live on: they are slow, hang, are full, or fail
//! to sync.
//!
//! Seen to have taken effect: the time that synced writes take, a write that
//! does not come back, a write refused for want of space and what the node said
//! about it, a system call that was answered with an error. A node may stop when
//! its disk fails, and must when a sync does; it must not go on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use rand::RngExt as _;
use rand::rngs::StdRng;
use tokio::process::{Child, Command};
use tokio::time::Instant;

use super::catalogue::{Entry, Lock, Needs};
use super::whom::Whom;
use super::{Deed, Fault, process, within};
use crate::context::Context;
use crate::hosts::cgroup::Group;
use crate::hosts::command::{self, aside};
use crate::hosts::{Host, Running};
use crate::probe::Ability;

const LOCKS: &[Lock] = &[Lock::Nodes];

const fn needs(abilities: &'static [Ability]) -> Needs {
    Needs { members: 3, spares: 0, abilities }
}

/// The faults of this file.
pub const FAULTS: &[Entry] = &[
    Entry {
        name: "disk-slow",
        needs: needs(&[Ability::Throttle]),
        locks: LOCKS,
        make: || Box::new(Slow::default()),
    },
    Entry {
        name: "disk-hung",
        needs: needs(&[Ability::Freeze]),
        locks: LOCKS,
        make: || Box::new(Hung::default()),
    },
    Entry { name: "disk-full", needs: needs(&[]), locks: LOCKS, make: || Box::new(Full::default()) },
    Entry {
        name: "fsync-fails",
        needs: needs(&[Ability::Strace]),
        locks: LOCKS,
        make: || Box::new(FsyncFails::default()),
    },
];

/// One member, with its name.
async fn one(context: &Context, rng: &mut StdRng) -> anyhow::Result<usize> {
    Ok(Whom::One.draw(context, rng).await?[0])
}

// ---- slow ----

/// Writes to the device are rationed.
#[derive(Default)]
struct Slow {
    limited: Option<(Group, String)>,
}

/// Synced writes that measure the ration.
const SLOW_WRITES: u32 = 5;

impl Fault for Slow {
    fn name(&self) -> &'static str {
        "disk-slow"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let host = &context.hosts.hosts[one(context, rng).await?];
            let per_second = [8, 20, 50][rng.random_range(0..3)];
            let (group, device) = (host.enter_group()?, host.disk().device()?);
            self.limited = Some((group.clone(), device.clone()));
            group.limit_writes(&device, Some(per_second))?;
            let took = group.time_synced_writes(&host.mount, SLOW_WRITES).await?;
            // The first may find the ration unused.
            let least = Duration::from_secs(u64::from(SLOW_WRITES - 2)) / per_second;
            ensure!(took >= least, "{SLOW_WRITES} synced writes on {} took only {took:?}", host.name);
            Ok(format!("{}: {SLOW_WRITES} synced writes took {took:?}", host.name))
        })
    }

    fn heal<'a>(&'a mut self, _: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            match self.limited.take() {
                Some((group, device)) => group.limit_writes(&device, None),
                None => Ok(()),
            }
        })
    }
}

// ---- hung ----

/// Every write waits until the end of the fault.
#[derive(Default)]
struct Hung {
    frozen: Option<PathBuf>,
    stuck: Option<Child>,
}

/// How long a write must not have come back to count as stuck.
const STUCK_TIME: Duration = Duration::from_millis(300);

impl Fault for Hung {
    fn name(&self) -> &'static str {
        "disk-hung"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let host = &context.hosts.hosts[one(context, rng).await?];
            self.frozen = Some(host.mount.clone());
            command::run("fsfreeze", &["-f".as_ref(), host.mount.as_os_str()]).await?;
            let mut touch = Command::new("touch");
            let stuck = self.stuck.insert(touch.arg(host.mount.join(".stuck")).stdin(Stdio::null()).spawn()?);
            if let Ok(ended) = tokio::time::timeout(STUCK_TIME, stuck.wait()).await {
                bail!("a write on {} came back: {}", host.name, ended?);
            }
            Ok(format!("{}: a write has not come back after {STUCK_TIME:?}", host.name))
        })
    }

    fn heal<'a>(&'a mut self, _: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            if let Some(mount) = self.frozen.take() {
                command::run("fsfreeze", &["-u".as_ref(), mount.as_os_str()]).await?;
            }
            if let Some(mut stuck) = self.stuck.take() {
                let ended = tokio::time::timeout(Duration::from_secs(10), stuck.wait()).await;
                ended.context("a write is stuck on a disk that hangs no more")??;
            }
            Ok(())
        })
    }
}

// ---- full ----

/// There is no space, or less than the node keeps in reserve.
#[derive(Default)]
struct Full {
    hit: Option<usize>,
}

/// Half of the reserve that the nodes are told to keep.
const LITTLE: u64 = 32 << 20;
/// How long a node may take to say that it is out of space, or that it is no longer.
const ALARM_TIME_MAX: Duration = Duration::from_secs(20);

impl Fault for Full {
    fn name(&self) -> &'static str {
        "disk-full"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let index = one(context, rng).await?;
            let host = &context.hosts.hosts[index];
            let leave = if rng.random_bool(0.5) { 0 } else { LITTLE };
            self.hit = Some(index);
            host.expect_exit(true);
            let pid = host.pid()?;
            let mount = host.mount.clone();
            aside("filling a disk", Duration::from_secs(10), move || fill(&mount, leave)).await?;
            let left = host.disk().free()? >> 10;
            let said = within(ALARM_TIME_MAX, || async {
                match host.running() {
                    Running::Yes { pid: now } if now == pid => {}
                    _ => return Ok("it stopped".to_owned()),
                }
                ensure!(alarmed(context, host).await, "it neither raised an alarm nor stopped");
                Ok("the alarm NOSPACE stands".to_owned())
            });
            let said = said.await.with_context(|| format!("{} has {left} KiB left", host.name))?;
            Ok(format!("{}: {left} KiB left, and {said}", host.name))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            let Some(index) = self.hit.take() else { return Ok(()) };
            let host = &context.hosts.hosts[index];
            for ballast in BALLAST {
                match fs::remove_file(host.mount.join(ballast)) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
                    _ => {}
                }
            }
            process::start(context, &[index]).await?;
            let cleared = within(ALARM_TIME_MAX, || async {
                let status = host.status().await?;
                ensure!(status.errors.is_empty(), "there is space again, and still: {:?}", status.errors);
                Ok(())
            });
            let cleared = cleared.await;
            // Only now: a node that meets an old lack of space a moment late may still stop.
            host.expect_exit(false);
            cleared.with_context(|| host.name.clone())
        })
    }
}

const BALLAST: [&str; 2] = [".ballast", ".ballast.rest"];

/// Takes all space but `leave` bytes.
fn fill(mount: &Path, leave: u64) -> anyhow::Result<()> {
    let free = || rustix::fs::statvfs(mount).map(|stat| stat.f_bavail * stat.f_frsize);
    let file = fs::File::create(mount.join(BALLAST[0]))?;
    // Less than all, since the file needs blocks for saying where its blocks are.
    let bytes = free()?.saturating_sub(leave + (1 << 20));
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes)?;
    if leave > 0 {
        return Ok(());
    }
    let mut rest = fs::File::create(mount.join(BALLAST[1]))?;
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match std::io::Write::write(&mut rest, &[0; 4096]) {
            Ok(count) if count > 0 => ensure!(Instant::now() < deadline, "a disk does not get full"),
            Ok(_) => bail!("a write of nothing"),
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether some node says that a member has no space.
async fn alarmed(context: &Context, host: &Host) -> bool {
    let about_it = |errors: &[String]| errors.iter().any(|error| error.contains("NOSPACE"));
    match host.status().await {
        Ok(status) => about_it(&status.errors),
        Err(_) => {
            let all = context.hosts.statuses().await;
            all.iter().any(|(_, status)| status.as_ref().is_ok_and(|status| about_it(&status.errors)))
        }
    }
}

// ---- syncs that fail ----

/// Every sync of the node is answered with an I/O error.
#[derive(Default)]
struct FsyncFails {
    hit: Option<usize>,
    tracer: Option<Child>,
}

/// How long a node under load may take to sync, and then to stop.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);
/// What the kernel's answer looks like in the trace.
const INJECTED: &str = "(INJECTED)";
/// `raft::EXIT_FATAL`: a node that cannot be sure of its state any more.
const EXIT_FATAL: &str = "exit status: 70";

impl Fault for FsyncFails {
    fn name(&self) -> &'static str {
        "fsync-fails"
    }

    fn inject<'a>(&'a mut self, context: &'a Arc<Context>, rng: &'a mut StdRng) -> Deed<'a, String> {
        Box::pin(async move {
            let index = one(context, rng).await?;
            let host = &context.hosts.hosts[index];
            self.hit = Some(index);
            host.expect_exit(true);
            let (pid, log_from) = (host.pid()?, host.log_bytes());
            let trace = host.mount.with_file_name("trace");
            self.tracer = Some(trace_syncs(pid, &trace)?);
            let ended = host.wait_end(STOP_TIME_MAX).await;
            let failed = fs::read_to_string(&trace)?.lines().filter(|line| line.contains(INJECTED)).count();
            ensure!(failed > 0, "{} made no sync within {STOP_TIME_MAX:?}", host.name);
            match ended {
                Ok(ended) if ended == EXIT_FATAL => {}
                Ok(ended) => context.hosts.complain(format!("{} met a failed sync and {ended}", host.name)),
                Err(_) => {
                    context.hosts.complain(format!("{} goes on after {failed} failed syncs", host.name))
                }
            }
            if !host.log_since(log_from).contains("ERROR") {
                context.hosts.complain(format!("{} met a failed sync and logged no error", host.name));
            }
            Ok(format!("{}: {failed} syncs failed, and it stopped", host.name))
        })
    }

    fn heal<'a>(&'a mut self, context: &'a Arc<Context>) -> Deed<'a, ()> {
        Box::pin(async move {
            let Some(index) = self.hit.take() else { return Ok(()) };
            let host = &context.hosts.hosts[index];
            // Dead before it is let go: a node that went on after a failed sync would be a danger to the others.
            host.kill().await?;
            host.expect_exit(false);
            if let Some(mut tracer) = self.tracer.take() {
                let _ = tracer.start_kill();
                tracer.wait().await?;
            }
            host.start().await
        })
    }
}

/// Attaches to all threads of a process, and has every sync fail.
fn trace_syncs(pid: u32, trace: &Path) -> anyhow::Result<Child> {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-p", &pid.to_string(), "-o"]).arg(trace);
    strace.args(["-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO"]);
    strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    strace.spawn().context("strace cannot be started")
}
