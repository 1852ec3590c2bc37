//! skeleton
#[derive(Clone, Debug, clap::Args)]
pub struct RecoverCommand { #[arg(long)] x: bool }
pub async fn recover(_c: &super::Context, _r: RecoverCommand) -> Result<(), super::CliError> { todo!() }
