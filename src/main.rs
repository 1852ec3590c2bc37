//! The `mainstay` binary: the allocator, the command line, the exit code.

use std::process::ExitCode;

// jemalloc returns memory to the system and fragments less under RocksDB than the system's own allocator; RocksDB is
// linked to the same one.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    ExitCode::from(mainstay::cli::run(std::env::args_os()))
}
