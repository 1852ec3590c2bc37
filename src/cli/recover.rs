//! `recover`: the last resort after a lost quorum, guarded by a question.
//!
//! It runs on a stopped node's data directory and speaks to no network. What
//! the surviving node has is kept; what only the lost ones had is gone, and
//! nobody can tell what that was. That is why it asks.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Context;
use super::error::CliError;
use super::output::say;
use crate::node::{ForceNewCluster, NodeError, Recovered, force_new_cluster};
use crate::storage::StateOptions;

/// `mainstay recover`.
#[derive(Clone, Debug, Args)]
pub struct RecoverCommand {
    /// Make a new cluster of this node alone, out of what it has. Without it, nothing is done.
    #[arg(long, required = true)]
    force_new_cluster: bool,

    /// The node's data directory. The node must be stopped.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,

    /// The node's name in the new cluster [default: as in the old one]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Where the members of the new cluster will reach the node [default: as in the old one]
    #[arg(long, visible_alias = "peer-urls", value_delimiter = ',', value_name = "URL,...")]
    initial_advertise_peer_urls: Vec<String>,

    /// Where clients will reach the node [default: as in the old one]
    #[arg(long, value_delimiter = ',', value_name = "URL,...")]
    advertise_client_urls: Vec<String>,

    /// Do not ask; for scripts whose author has read the question.
    #[arg(long)]
    yes: bool,
}

/// Runs `recover`.
pub async fn recover(context: &Context, command: RecoverCommand) -> Result<(), CliError> {
    let directory = command.data_dir.display();
    say(format!(
        "This makes a new cluster of one member out of {directory}.\n\
         Writes that only the lost members had are gone for ever. Should they come back, they belong to the old \
         cluster: delete their data directories and add them anew.\n\
         The old directory is kept beside the new one."
    ));
    if !command.yes {
        confirm(&command.data_dir.display().to_string())?;
    }
    let request = ForceNewCluster {
        data_dir: command.data_dir.clone(),
        name: command.name,
        peer_urls: command.initial_advertise_peer_urls,
        client_urls: command.advertise_client_urls,
        state: StateOptions::default(),
    };
    let recovered = force_new_cluster(request, &context.env).await.map_err(node_error)?;
    report(context, &recovered, &command.data_dir.display().to_string())
}

/// Asks for the directory's name to be typed: a `y` is typed too easily.
fn confirm(directory: &str) -> Result<(), CliError> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return Err(CliError::Usage("there is nobody to ask; add --yes if this is what you want".to_owned()));
    }
    eprint_prompt(&format!("Type {directory} to go on: "));
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer).map_err(|e| CliError::io("reading the answer", e))?;
    if answer.trim() == directory {
        Ok(())
    } else {
        Err(CliError::Usage("not confirmed; nothing was changed".to_owned()))
    }
}

fn eprint_prompt(text: &str) {
    let mut stderr = std::io::stderr().lock();
    // A closed stderr leaves nobody to ask; the answer will not match then.
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Says what was made, of a recovery or a restore.
pub fn report(context: &Context, recovered: &Recovered, directory: &str) -> Result<(), CliError> {
    let backup = recovered.backup.as_ref().map(|path| path.display().to_string());
    let mut text = format!(
        "{directory} holds member {:x} of cluster {:x}, at revision {}",
        recovered.node_id, recovered.cluster_id, recovered.revision
    );
    if let Some(backup) = &backup {
        text.push_str(&format!("; the old directory is {backup}"));
    }
    context.out.either(
        || {
            json!({
                "data_dir": directory,
                "member_id": format!("{:x}", recovered.node_id),
                "cluster_id": format!("{:x}", recovered.cluster_id),
                "revision": recovered.revision.0,
                "backup": backup,
            })
        },
        text,
    )
}

/// An error of a node function that works on files, in the words of the command line.
pub fn node_error(error: NodeError) -> CliError {
    match error {
        NodeError::NotAdmitted(reason) => CliError::Conflict(reason),
        NodeError::Invalid(reason) => CliError::Usage(reason),
        other => CliError::Failed(other.to_string()),
    }
}
