//! The run's control groups: one per host, with a limit on what its disk does.
//!
//! They are the one thing of a run that the whole machine sees. Both layouts
//! are known: version 1, with `blkio` mounted by itself, and version 2, where
//! one tree has every controller.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::command::{self, word};

const V1: &str = "/sys/fs/cgroup/blkio";
const V2: &str = "/sys/fs/cgroup";

/// Which layout this machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    V1,
    V2,
}

impl Layout {
    /// # Errors
    /// When neither can limit a disk here.
    pub fn detect() -> anyhow::Result<Layout> {
        if Path::new(V1).join("blkio.throttle.write_iops_device").exists() {
            return Ok(Layout::V1);
        }
        let controllers = fs::read_to_string(Path::new(V2).join("cgroup.controllers")).unwrap_or_default();
        if controllers.split_whitespace().any(|controller| controller == "io") {
            return Ok(Layout::V2);
        }
        bail!("no control group can limit a disk here: neither blkio (v1) nor io (v2)")
    }

    fn root(self) -> &'static Path {
        Path::new(match self {
            Layout::V1 => V1,
            Layout::V2 => V2,
        })
    }
}

/// One host's group.
#[derive(Clone, Debug)]
pub struct Group {
    layout: Layout,
    path: PathBuf,
}

impl Group {
    /// Makes the group of a host, if it is not there.
    ///
    /// # Errors
    /// When the machine cannot.
    pub fn make(run: &str, host: &str) -> anyhow::Result<Group> {
        let layout = Layout::detect()?;
        let of_run = layout.root().join(run);
        let path = of_run.join(host);
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        if layout == Layout::V2 {
            for parent in [layout.root(), &of_run] {
                write(&parent.join("cgroup.subtree_control"), "+io")?;
            }
        }
        Ok(Group { layout, path })
    }

    /// Moves a process, with all of its threads, into the group.
    ///
    /// # Errors
    /// When it is gone.
    pub fn take(&self, pid: u32) -> anyhow::Result<()> {
        write(&self.path.join("cgroup.procs"), &pid.to_string())
    }

    /// How long `count` synced writes by a process in the group take.
    ///
    /// # Errors
    /// When they fail or are not done in time.
    pub async fn time_synced_writes(&self, directory: &Path, count: u32) -> anyhow::Result<Duration> {
        let (procs, file) = (self.path.join("cgroup.procs"), directory.join(".synced-writes"));
        let script =
            r#"echo $$ >"$1" && exec dd if=/dev/zero of="$2" bs=4096 count="$3" oflag=dsync status=none"#;
        let began = tokio::time::Instant::now();
        let words = ["-c", script, "sh", word(&procs)?, word(&file)?, &count.to_string()];
        command::run("sh", &words).await?;
        let took = began.elapsed();
        fs::remove_file(file)?;
        Ok(took)
    }

    /// Limits writes to a device; `None` lifts the limit.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn limit_writes(&self, device: &str, per_second: Option<u32>) -> anyhow::Result<()> {
        match self.layout {
            Layout::V1 => write(
                &self.path.join("blkio.throttle.write_iops_device"),
                &format!("{device} {}", per_second.unwrap_or(0)),
            ),
            Layout::V2 => {
                let limit = per_second.map_or_else(|| "max".to_owned(), |limit| limit.to_string());
                write(&self.path.join("io.max"), &format!("{device} wiops={limit}"))
            }
        }
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("writing {text:?} to {}", path.display()))
}

/// Where groups of a run are, in whichever layout.
fn groups(run: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for root in [V1, V2] {
        let of_run = Path::new(root).join(run);
        if of_run.is_dir() {
            let entries = fs::read_dir(&of_run).into_iter().flatten().flatten().map(|entry| entry.path());
            found.extend(entries.filter(|path| path.is_dir()));
            // After those below it.
            found.push(of_run);
        }
    }
    found
}

/// Lifts every limit of a run, so that nothing waits for a disk any more.
pub fn lift(run: &str) {
    for group in groups(run) {
        let limits = group.join("blkio.throttle.write_iops_device");
        for limit in fs::read_to_string(&limits).unwrap_or_default().lines() {
            if let Some(device) = limit.split_whitespace().next() {
                let _ = fs::write(&limits, format!("{device} 0"));
            }
        }
        let limits = group.join("io.max");
        for limit in fs::read_to_string(&limits).unwrap_or_default().lines() {
            if let Some(device) = limit.split_whitespace().next() {
                let _ = fs::write(&limits, format!("{device} wiops=max"));
            }
        }
    }
}

/// Removes the groups of a run; false while a process is still in one.
pub fn remove(run: &str) -> bool {
    groups(run).iter().all(|group| fs::remove_dir(group).is_ok())
}
