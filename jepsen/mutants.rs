//! The `mainstay-mutants` binary: the product, in which `mainstay serve` may
//! have one of the bugs of `mainstay::mutant`.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    ExitCode::from(mainstay::cli::run(std::env::args_os()))
}
