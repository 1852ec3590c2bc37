//! skeleton
#[derive(Clone, Debug, clap::Args)]
pub struct ServeCommand { #[arg(long, hide = true)] parent_pid: Option<u32> }
/// x
pub const EXIT_FINAL: u8 = 7;
pub fn serve(_c: ServeCommand) -> u8 { todo!() }
