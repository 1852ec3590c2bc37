//! Where a process that runs inputs may write: in memory, where a machine has
//! such a place. Whoever started the work takes it away.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tempfile::TempDir;

static SCRATCH: OnceLock<PathBuf> = OnceLock::new();

/// A new directory, which goes when it is dropped.
pub fn new_dir() -> io::Result<TempDir> {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }
}

/// Says once where this process may write.
pub fn set_scratch(dir: &Path) {
    SCRATCH.set(dir.to_owned()).expect("said once, before the first input");
}

/// Where this process may write.
pub fn scratch() -> &'static Path {
    SCRATCH.get().expect("said before the first input")
}
