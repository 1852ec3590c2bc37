//! What the figures depend on besides the programs' work: the machine, and which programs they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use xxhash_rust::xxh3::xxh3_64;

/// Cores, memory, processor and kernel, in one line.
pub fn machine() -> String {
    let field = |file: &str, name: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or("");
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cores = std::thread::available_parallelism().map_or(0, |n| n.get());
    let kib: f64 = field("/proc/meminfo", "MemTotal").trim_end_matches(" kB").parse().unwrap_or(0.0);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let model = field("/proc/cpuinfo", "model name");
    format!("{cores} cores ({model}), {:.0} GiB, Linux {}", kib / f64::from(1 << 20), kernel.trim())
}

/// The first line of `--version`.
pub fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| format!("starting {}", program.display()))?;
    ensure!(output.status.success(), "{} --version fails", program.display());
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().next().unwrap_or_default().replace("etcd Version:", "etcd").trim().to_owned())
}

/// The version with a hash of the file: the same only for the same build.
pub fn version_and_hash(program: &Path) -> Result<String> {
    let bytes = fs::read(on_path(program)).with_context(|| format!("reading {}", program.display()))?;
    Ok(format!("{} ({:08x})", version(program)?, xxh3_64(&bytes) >> 32))
}

fn on_path(program: &Path) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file());
    found.unwrap_or_else(|| program.to_owned())
}
