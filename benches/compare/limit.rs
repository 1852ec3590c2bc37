//! A memory limit for one process, held by the kernel: a control group, in either of the two layouts.
//! It limits and tells what happened; it starts nothing.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A control group with a limit of memory, page cache included. Dropping it removes it, once the
/// processes in it have ended.
#[derive(Debug)]
pub struct MemoryLimit {
    group: PathBuf,
    layout: Layout,
}

/// The names that a layout has for the same things.
#[derive(Clone, Copy, Debug)]
struct Layout {
    root: &'static str,
    limit: &'static str,
    peak: &'static str,
    kills: &'static str,
}

const V1: Layout = Layout {
    root: "/sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    peak: "memory.max_usage_in_bytes",
    kills: "memory.oom_control",
};

const V2: Layout =
    Layout { root: "/sys/fs/cgroup", limit: "memory.max", peak: "memory.peak", kills: "memory.events" };

impl MemoryLimit {
    /// Makes a group with this limit.
    ///
    /// # Errors
    /// When this process may not: it needs root, and a kernel that limits memory.
    pub fn new(bytes: u64) -> Result<MemoryLimit> {
        let layout = if Path::new(V1.root).is_dir() { V1 } else { V2 };
        let group = Path::new(layout.root).join(format!("mainstay-compare-{}", std::process::id()));
        fs::create_dir_all(&group).with_context(|| format!("making {}", group.display()))?;
        let limit = MemoryLimit { group, layout };
        limit.write(layout.limit, &bytes.to_string())?;
        Ok(limit)
    }

    /// Takes a process in, with what it will use from here on.
    ///
    /// # Errors
    /// When it is gone.
    pub fn take(&self, pid: u32) -> Result<()> {
        self.write("cgroup.procs", &pid.to_string())
    }

    /// The most bytes that were in use at once.
    pub fn peak_bytes(&self) -> u64 {
        fs::read_to_string(self.group.join(self.layout.peak))
            .ok()
            .and_then(|t| t.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Processes that the kernel has ended for want of memory.
    pub fn kills(&self) -> u64 {
        let text = fs::read_to_string(self.group.join(self.layout.kills)).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.and_then(|count| count.trim().parse().ok()).unwrap_or(0)
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.group.join(file);
        fs::write(&path, text).with_context(|| format!("writing {text:?} to {}", path.display()))
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Memory of a process that has just ended is counted for a moment longer.
        let until = Instant::now() + Duration::from_secs(5);
        while fs::remove_dir(&self.group).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Takes every file below `dir` out of the page cache, so that whoever reads it next pays for it.
///
/// # Errors
/// When a file cannot be read or written back.
pub fn forget(dir: &Path) -> Result<()> {
    for_each_file(dir, &|file| {
        file.sync_all()?;
        rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(())
    })
}

/// Reads every file below `dir`, so that the page cache has it.
///
/// # Errors
/// When a file cannot be read.
pub fn warm(dir: &Path) -> Result<()> {
    for_each_file(dir, &|mut file| {
        std::io::copy(&mut file, &mut std::io::sink())?;
        Ok(())
    })
}

fn for_each_file(dir: &Path, act: &dyn Fn(&fs::File) -> Result<()>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("reading {}", dir.display()))? {
        let entry = entry?;
        match entry.file_type()? {
            kind if kind.is_dir() => for_each_file(&entry.path(), act)?,
            kind if kind.is_file() => match fs::File::open(entry.path()) {
                Ok(file) => act(&file)?,
                // A node that runs removes files as it likes.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("opening {}", entry.path().display()));
                }
            },
            other => bail!("{} is a {other:?}", entry.path().display()),
        }
    }
    Ok(())
}
