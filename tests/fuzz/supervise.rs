//! Runs each target in a process of its own, so that a death (a stack overflow,
//! an abort) and a standstill are seen and their input is kept.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::engine::{Current, name_of};
use crate::scratch::new_dir;
use crate::targets::Target;

/// The file of the input that is being run, in the worker's scratch directory.
pub const CURRENT: &str = "current";
/// A target that works for this long without beginning a new input is caught in
/// one. It is its own work that counts, because the machine may be busy.
pub const STANDSTILL: Duration = Duration::from_secs(20);
/// One that only waits, and does not work, is ended after this long.
const ASLEEP: Duration = Duration::from_secs(300);
/// Linux counts a process's work in hundredths of a second.
const TICK: Duration = Duration::from_millis(10);

/// What a worker's process came to.
pub struct Report {
    pub target: &'static Target,
    /// What it printed: one line of figures.
    pub figures: String,
    /// The file of the failing input, and what is wrong with it.
    pub failure: Option<(PathBuf, String)>,
}

/// Where inputs that are found and inputs that fail are written.
pub fn work_dir(target: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz").join(target)
}

/// A worker at work.
pub struct Worker {
    target: &'static Target,
    child: Child,
    current: Current,
    _scratch: tempfile::TempDir,
    standstill: Duration,
    begun: u64,
    /// The process's work when that was seen, in hundredths of a second.
    earlier_ticks: u64,
    seen: Instant,
}

impl Worker {
    /// Starts one. When it works for `standstill` without a new input, it is ended. What a
    /// panic prints goes nowhere when it is `quiet`.
    pub fn start(
        target: &'static Target,
        seed: u64,
        duration: Duration,
        standstill: Duration,
        quiet: bool,
    ) -> std::io::Result<Worker> {
        let scratch = new_dir()?;
        let current = Current::open(&scratch.path().join(CURRENT))?;
        let child = Command::new(std::env::current_exe()?)
            .args(["--worker", target.name, "--seed", &seed.to_string()])
            .args(["--seconds", &duration.as_secs_f64().to_string()])
            .arg("--scratch")
            .arg(scratch.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(if quiet { Stdio::null() } else { Stdio::inherit() })
            .spawn()?;
        Ok(Worker {
            target,
            child,
            current,
            _scratch: scratch,
            standstill,
            begun: 0,
            earlier_ticks: 0,
            seen: Instant::now(),
        })
    }

    /// The report, once it has ended one way or another.
    pub fn poll(&mut self) -> std::io::Result<Option<Report>> {
        if let Some(status) = self.child.try_wait()? {
            let mut figures = String::new();
            if let Some(out) = &mut self.child.stdout {
                out.read_to_string(&mut figures)?;
            }
            let mut lines = figures.lines();
            let line = lines.next().unwrap_or_default().to_owned();
            let failure = match (status.success(), lines.next()) {
                (true, _) => None,
                (false, Some(reason)) => Some(self.keep(reason)?),
                (false, None) => Some(self.keep(&format!("the process ended: {status}"))?),
            };
            return Ok(Some(Report { target: self.target, figures: line, failure }));
        }
        let begun = self.current.begun()?;
        if begun != self.begun {
            (self.begun, self.seen) = (begun, Instant::now());
            self.earlier_ticks += (self.worked()?.as_millis() / TICK.as_millis()) as u64;
        } else if self.worked()? > self.standstill || self.seen.elapsed() > ASLEEP {
            self.child.kill()?;
            self.child.wait()?;
            let failure = self.keep(&format!("it did not end within {:?}", self.standstill))?;
            return Ok(Some(Report { target: self.target, figures: String::new(), failure: Some(failure) }));
        }
        Ok(None)
    }

    /// How long the process has worked since it began its last input, as far as was seen.
    fn worked(&self) -> std::io::Result<Duration> {
        let figures = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // After the name, which may hold anything, in brackets: state, and ten more before the times.
        let after = figures.rsplit_once(") ").map_or("", |(_, after)| after);
        let ticks = after.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok());
        Ok(TICK * (ticks.sum::<u64>().saturating_sub(self.earlier_ticks)) as u32)
    }

    /// Keeps the input that was being run.
    fn keep(&self, reason: &str) -> std::io::Result<(PathBuf, String)> {
        let input = self.current.input()?;
        let dir = work_dir(self.target.name).join("failed");
        std::fs::create_dir_all(&dir)?;
        let path = dir.join(name_of(&input));
        std::fs::write(&path, input)?;
        Ok((path, reason.to_owned()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It has ended, unless this process is unwinding.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
