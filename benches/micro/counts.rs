//! Instructions for one operation, counted by callgrind and compared with those of `counts.toml`.
//!
//! Only what the calling thread does inside [`counted`] counts: the database's own threads do not, nor does
//! preparing. Nothing counted asks a clock or draws a number, and the environment is emptied; so the figures
//! are the same from run to run to within about one per cent. Between machines they differ a little, because the
//! C library chooses its routines by the processor: hence the tolerance.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// A figure may differ from the one in the file by this many per cent, up or down. Down as well: a gain that
/// is not written down could be lost again without a word.
const TOLERANCE_PERCENT: f64 = 5.0;

/// Something that is counted.
pub struct Workload {
    /// Its name, here and in the file.
    pub name: &'static str,
    /// One of what the figure is for.
    pub operation: &'static str,
    /// Makes everything ready. What it returns is counted, and says how many operations it did.
    pub prepare: fn() -> Box<dyn FnMut() -> u64>,
}

/// Callgrind counts from here on until this returns, in this thread.
#[inline(never)]
fn counted(work: &mut dyn FnMut() -> u64) -> u64 {
    std::hint::black_box(work())
}

/// Does one workload, and prints how many operations it was.
pub fn count(workloads: &[Workload], name: Option<&str>) -> ExitCode {
    let Some(workload) = workloads.iter().find(|workload| Some(workload.name) == name) else {
        let names: Vec<_> = workloads.iter().map(|workload| workload.name).collect();
        eprintln!("--count wants one of {}", names.join(", "));
        return ExitCode::from(2);
    };
    println!("{}", counted(&mut (workload.prepare)()));
    ExitCode::SUCCESS
}

/// Counts every workload and compares, or writes the file anew.
pub fn compare(workloads: &[Workload], update: bool) -> ExitCode {
    if !cfg!(target_arch = "x86_64") {
        println!("the figures in counts.toml are for x86-64: nothing is compared here");
        return ExitCode::SUCCESS;
    }
    let mut measured = Vec::new();
    for workload in workloads {
        match instructions(workload) {
            Ok(figure) => measured.push((workload, figure)),
            Err(error) => {
                eprintln!("counting {} failed: {error}", workload.name);
                return ExitCode::FAILURE;
            }
        }
    }
    let known = match read() {
        Ok(known) => known,
        Err(error) if !update => {
            eprintln!("{}: {error}", file().display());
            return ExitCode::FAILURE;
        }
        Err(_) => toml::Table::new(),
    };
    let mut strayed = false;
    println!("instructions for one operation:");
    for (workload, figure) in &measured {
        let Workload { name, operation, .. } = workload;
        let known = known.get(*name).and_then(toml::Value::as_integer);
        let change = known.map(|known| (*figure as f64 / known as f64 - 1.0) * 100.0);
        let verdict = match change {
            None => "NEW".to_owned(),
            Some(change) if change > TOLERANCE_PERCENT => format!("WORSE by {change:.1} %"),
            Some(change) if change < -TOLERANCE_PERCENT => format!("BETTER by {:.1} %", -change),
            Some(change) => format!("{change:+.1} %"),
        };
        strayed |= change.is_none_or(|change| change.abs() > TOLERANCE_PERCENT);
        println!("  {name:<8} {figure:>9}  {verdict:<18} ({operation})");
    }
    if update {
        return match write(&measured) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{}: {error}", file().display());
                ExitCode::FAILURE
            }
        };
    }
    if strayed {
        eprintln!(
            "more than {TOLERANCE_PERCENT} % from benches/micro/counts.toml. If that is meant, write the"
        );
        eprintln!("new figures down with the change:  make bench-counts UPDATE=1");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Runs this program again, under callgrind.
fn instructions(workload: &Workload) -> Result<u64, String> {
    let dir = tempfile::tempdir().map_err(|error| error.to_string())?;
    let out = dir.path().join("callgrind.out");
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--toggle-collect=micro::counts::counted"]);
    valgrind.arg(format!("--callgrind-out-file={}", out.display())).arg(program);
    valgrind.args(["--count", workload.name]);
    // What stands in the environment moves the stack. The allocator would give memory back by the clock.
    valgrind.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default());
    valgrind.env("TMPDIR", dir.path()).env("MALLOC_CONF", "dirty_decay_ms:-1,muzzy_decay_ms:-1");
    let ran = valgrind.stdin(Stdio::null()).output();
    let ran = ran.map_err(|error| format!("valgrind: {error} (`make tools-bench` installs it)"))?;
    if !ran.status.success() {
        return Err(format!("{}\n{}", ran.status, String::from_utf8_lossy(&ran.stderr)));
    }
    let operations = String::from_utf8_lossy(&ran.stdout).trim().parse::<u64>();
    let operations =
        operations.map_err(|error| format!("it did not say how many operations it did: {error}"))?;
    let total = total(&out)?;
    if total < operations {
        return Err(format!("{total} instructions for {operations} operations: callgrind did not see them"));
    }
    Ok(total / operations)
}

/// All instructions that callgrind has counted.
fn total(out: &Path) -> Result<u64, String> {
    let text = std::fs::read_to_string(out).map_err(|error| error.to_string())?;
    let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
    total.and_then(|total| total.trim().parse().ok()).ok_or_else(|| "callgrind gave no total".to_owned())
}

fn file() -> PathBuf {
    PathBuf::from("benches/micro/counts.toml")
}

fn read() -> Result<toml::Table, String> {
    let text = std::fs::read_to_string(file()).map_err(|error| error.to_string())?;
    text.parse().map_err(|error: toml::de::Error| error.to_string())
}

fn write(measured: &[(&Workload, u64)]) -> std::io::Result<()> {
    let mut text = String::from(
        "# Instructions for one operation, as `make bench-counts` compares them.\n\
         # Written by `make bench-counts UPDATE=1`, with the change that moved them.\n",
    );
    for (Workload { name, operation, .. }, figure) in measured {
        text.push_str(&format!("\n# {operation}\n{name} = {figure}\n"));
    }
    std::fs::write(file(), text)
}
