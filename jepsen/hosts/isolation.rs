//! The namespaces a run lives in (network, mounts, processes), and how they end.
//!
//! Three processes of the same program stand in a line. The *outer* one was
//! started by the user, waits, and passes signals on. The *keeper* owns the
//! network and the mounts, and outlives the others by a moment: it sees when the
//! outer one is gone, however that happened, and removes what namespaces do not
//! (control groups, frozen filesystems). The one *inside* is process 1 of its
//! own process namespace and does the work; when it ends, the kernel ends every
//! node with it.
//!
//! Nothing here is left behind by `kill -9` of the outer process or of the one
//! inside. A `kill -9` of the keeper ends the run too, but may leave a control
//! group of that run.

use std::ffi::OsString;
use std::future::pending;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{cgroup, command};

/// Which of the three this process is.
const ROLE: &str = "MAINSTAY_JEPSEN_ROLE";
/// The name of the run, in names that the whole machine sees.
const RUN: &str = "MAINSTAY_JEPSEN_RUN";
/// Where everything of the run is that is a file: a tmpfs that only the run sees.
pub const ROOT: &str = "/run/mainstay";
/// A socket that tells the keeper whether the process inside lives.
const ALIVE: &str = "/run/mainstay/alive";
/// How long a run that was asked to stop may take before it is ended.
const STOP_TIME_MAX: Duration = Duration::from_secs(60);
/// How long the end of the last process and mount may take.
const SWEEP_TIME_MAX: Duration = Duration::from_secs(10);

/// What came of [`enter`].
pub enum Entered {
    /// This process is inside; it does the work.
    Inside(Inside),
    /// The work was done inside, and ended like this.
    Ended(ExitCode),
}

/// What a process inside knows of its run.
pub struct Inside {
    /// A name that no other run on this machine has.
    pub run: String,
    /// Cancelled when the user asked to stop. A run that has not ended a minute
    /// later, or is asked a second time, is ended from outside.
    pub stop: CancellationToken,
    /// Held until the end.
    _alive: UnixStream,
}

/// Starts this program again inside namespaces of its own and waits for its
/// end there; returns at once in the process inside. To be called from the
/// main thread, before there are others.
///
/// # Errors
/// When namespaces cannot be made: not root, or a tool is missing.
pub fn enter() -> anyhow::Result<Entered> {
    let role = std::env::var(ROLE).unwrap_or_default();
    if role == "inside" {
        return Ok(Entered::Inside(inside()?));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let code = match role.as_str() {
        "keeper" => runtime.block_on(keeper()),
        _ => runtime.block_on(outer()),
    };
    runtime.shutdown_background();
    Ok(Entered::Ended(ExitCode::from(code?)))
}

/// Asks, of the signals that end a program, those that can be caught.
struct Asked([Signal; 3]);

impl Asked {
    fn listen() -> anyhow::Result<Asked> {
        let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
        let [interrupt, terminate, hangup] = kinds.map(signal);
        Ok(Asked([interrupt?, terminate?, hangup?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}

/// This program with these arguments, behind the words of `before`.
fn again(before: &[&str], role: &str, run: &str) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("this program has no path")?;
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let mut command = Command::new(before[0]);
    command.args(&before[1..]).arg(program).args(args).env(ROLE, role).env(RUN, run);
    // An error of the harness names its commands; backtraces are for panics.
    command.env("RUST_LIB_BACKTRACE", "0").stdin(Stdio::piped());
    Ok(command)
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX)
}

async fn outer() -> anyhow::Result<u8> {
    let mut asked = Asked::listen()?;
    let run = format!("mainstay-jepsen-{}-{:08x}", std::process::id(), rand::random::<u32>());
    let unshare = ["unshare", "--net", "--mount", "--propagation", "private", "--"];
    let mut command = again(&unshare, "keeper", &run)?;
    // In a process group of its own: what a terminal sends to this one's does not reach it.
    let mut keeper = command.process_group(0).spawn().context("unshare cannot be started")?;
    let mut line = keeper.stdin.take();
    loop {
        tokio::select! {
            status = keeper.wait() => return Ok(exit_code(status?)),
            () = asked.next() => {
                if let Some(line) = &mut line {
                    // A keeper that is gone is seen by the wait above.
                    let _ = line.write_all(b"s").await;
                }
            }
        }
    }
}

/// The line on which one process hears of the one outside it: a byte for each
/// request to stop, and its end when that process is gone.
fn line_from_outside() -> anyhow::Result<pipe::Receiver> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
    pipe::Receiver::from_owned_fd(stdin).context("the line from outside")
}

async fn keeper() -> anyhow::Result<u8> {
    let run = std::env::var(RUN).context("the run has no name")?;
    command::line("mount -t tmpfs -o mode=755 mainstay-jepsen /run").await?;
    tokio::fs::create_dir_all(ROOT).await?;
    command::line("ip link set lo up").await?;
    let alive = UnixListener::bind(ALIVE)?;
    let before =
        ["setpriv", "--pdeathsig", "KILL", "--", "unshare", "--pid", "--fork", "--kill-child=KILL", "--"];
    let mut inside = again(&before, "inside", &run)?.spawn().context("setpriv cannot be started")?;
    let status = tokio::select! {
        status = watch_over(&mut inside) => status,
        // The process inside is ending, and cannot while a process waits for a frozen disk.
        () = ended_inside(alive) => {
            release(&run).await;
            inside.wait().await.map_err(Into::into)
        }
    };
    let _ = inside.start_kill();
    sweep(&run).await;
    Ok(exit_code(status?))
}

/// Waits until nobody holds the other end of the line that the process inside opened: it closes its files
/// before it waits for the rest of its namespace to end.
async fn ended_inside(alive: UnixListener) {
    let Ok((mut line, _)) = alive.accept().await else { return pending().await };
    let _ = line.read(&mut [0]).await;
}

/// Waits for the end inside, and brings it about when the outer process is gone or it takes too long.
async fn watch_over(inside: &mut Child) -> anyhow::Result<ExitStatus> {
    let mut from_outside = line_from_outside()?;
    let mut to_inside = inside.stdin.take();
    let mut asked_at = None;
    loop {
        let mut byte = [0];
        let overdue = async {
            match asked_at {
                Some(at) => tokio::time::sleep_until(at + STOP_TIME_MAX).await,
                None => pending().await,
            }
        };
        let heard = tokio::select! {
            status = inside.wait() => return Ok(status?),
            () = overdue => 0,
            heard = from_outside.read(&mut byte) => heard.unwrap_or(0),
        };
        if heard == 0 || asked_at.is_some() {
            inside.start_kill()?;
            return Ok(inside.wait().await?);
        }
        asked_at = Some(tokio::time::Instant::now());
        if let Some(line) = &mut to_inside {
            let _ = line.write_all(&byte).await;
        }
    }
}

/// The disks of the run.
fn disks() -> Vec<PathBuf> {
    let hosts = std::fs::read_dir(ROOT).into_iter().flatten().flatten();
    hosts.map(|host| host.path().join("disk")).filter(|disk| is_mount(disk)).collect()
}

/// Ends whatever makes processes wait for a disk: they could not even be killed.
async fn release(run: &str) {
    cgroup::lift(run);
    for disk in disks() {
        // Fails for those that are not frozen. A frozen one would hold its processes, and stay for ever.
        let _ = command::run("fsfreeze", &["-u".as_ref(), disk.as_os_str()]).await;
    }
}

/// Removes what does not go with the namespaces, and waits until what does has
/// gone: a filesystem can be unmounted once no process has it open.
async fn sweep(run: &str) {
    release(run).await;
    let deadline = tokio::time::Instant::now() + SWEEP_TIME_MAX;
    loop {
        let left = disks();
        for disk in &left {
            let _ = command::run("umount", &["--no-mtab".as_ref(), disk.as_os_str()]).await;
        }
        if (cgroup::remove(run) && left.is_empty()) || tokio::time::Instant::now() > deadline {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether something is mounted at a directory: it is on another device than its parent.
fn is_mount(at: &Path) -> bool {
    let device = |path: &Path| rustix::fs::stat(path).map(|stat| stat.st_dev).ok();
    device(at).is_some() && device(at) != at.parent().and_then(device)
}

fn inside() -> anyhow::Result<Inside> {
    let run = std::env::var(RUN).context("the run has no name")?;
    let mounted = std::process::Command::new("mount").args(["-t", "proc", "proc", "/proc"]).status()?;
    anyhow::ensure!(mounted.success(), "/proc cannot be mounted: {mounted}");
    let stop = CancellationToken::new();
    let asked = stop.clone();
    std::thread::Builder::new().name("stop".into()).spawn(move || {
        let mut byte = [0];
        // The end of the line is the keeper's end, which ends this process too.
        if std::io::Read::read(&mut std::io::stdin(), &mut byte).is_ok_and(|count| count > 0) {
            asked.cancel();
        }
    })?;
    let alive = UnixStream::connect(ALIVE).context("the keeper does not listen")?;
    Ok(Inside { run, stop, _alive: alive })
}
