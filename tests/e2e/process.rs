//! Child processes: started by one thread that outlives every test, so that
//! the kernel kills them when the test process ends, however it ends.
//!
//! Signals go by process id to children started here, and to nothing else.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// A running (or ended) server.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

type Job = (Command, SyncSender<io::Result<Child>>);

/// The parent-death signal follows the *thread* that started the child, so
/// all children are started by one thread that never ends.
fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<Mutex<SyncSender<Job>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = sync_channel::<Job>(1);
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, reply) in queue {
                    let _ = reply.send(command.spawn());
                }
            })
            .expect("a thread can be started");
        Mutex::new(jobs)
    });
    let (reply, answer) = sync_channel(1);
    spawner.lock().unwrap().send((command, reply)).expect("the spawner never ends");
    answer.recv().expect("the spawner answers every job")
}

/// The variables that steer these tests. A node would refuse them as unknown settings.
pub fn test_knobs() -> impl Iterator<Item = OsString> {
    std::env::vars_os()
        .map(|(name, _)| name)
        .filter(|name| name.to_string_lossy().starts_with("MAINSTAY_TEST_"))
}

impl Process {
    /// Starts `program` with `args`, both outputs appended to `log`.
    pub fn start(
        program: &Path,
        args: &[String],
        env: &[(String, String)],
        log: &Path,
    ) -> io::Result<Process> {
        let out: File = OpenOptions::new().create(true).append(true).open(log)?;
        let err = out.try_clone()?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(args);
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        for knob in test_knobs() {
            command.env_remove(knob);
        }
        command.envs(env.iter().map(|(key, value)| (key, value)));
        Ok(Process { child: spawn(command)? })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its end, if it has ended.
    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("our own child can be waited for")
    }

    /// Whether it runs (paused counts as running).
    pub fn is_running(&mut self) -> bool {
        self.try_wait().is_none()
    }

    /// Sends a signal, unless the process has ended already.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_running() {
            let pid = Pid::from_child(&self.child);
            kill_process(pid, signal).expect("our own child can be signalled");
        }
    }

    /// kill -9, and waits for the end.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.child.wait();
    }

    /// Waits for the end by itself; `None` when it still runs at the deadline.
    pub async fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait() {
                return Some(status);
            }
            if Instant::now() > deadline {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // A stopped process takes SIGKILL too.
        self.kill();
    }
}

/// A TCP port that nobody has now. Taken from below the range the kernel hands
/// out to outgoing connections, so that no client takes it before the server binds it.
pub fn free_port() -> u16 {
    static TAKEN: Mutex<Vec<u16>> = Mutex::new(Vec::new());
    let mut taken = TAKEN.lock().unwrap();
    for _ in 0..1000 {
        let port = rand::random_range(10_000..32_000);
        if !taken.contains(&port) && std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            taken.push(port);
            return port;
        }
    }
    panic!("no free port in 1000 tries");
}
