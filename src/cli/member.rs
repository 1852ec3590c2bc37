//! `member list | add | remove | update | promote`, and `move-leader`.

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::Context;
use super::api::MemberInfo;
use super::args::parse_member;
use super::error::CliError;
use super::output::say;
use crate::types::MemberKind;

/// What a new member is to become.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Votes once it has caught up.
    #[default]
    Voter,
    /// Receives everything, and votes only after `member promote`.
    Learner,
    /// Receives everything, serves reads and watches, never votes.
    Observer,
}

/// `mainstay member`.
#[derive(Clone, Debug, Subcommand)]
pub enum MemberCommand {
    /// The members.
    List {
        /// Ask only the member that answers: works without a leader, and may be stale.
        #[arg(long)]
        serializable: bool,
    },
    /// Make a member known before it is started (`mainstay serve --join` does both in one step).
    Add(AddCommand),
    /// Remove a member for good; its id is never used again.
    Remove {
        /// The member's id, as `member list` prints it.
        #[arg(value_name = "ID", value_parser = parse_member)]
        id: u64,
    },
    /// Change where the other members reach a member.
    Update {
        /// The member's id, as `member list` prints it.
        #[arg(value_name = "ID", value_parser = parse_member)]
        id: u64,
        /// The new URLs.
        #[arg(long, value_delimiter = ',', required = true, value_name = "URL,...")]
        peer_urls: Vec<String>,
    },
    /// Let a learner vote that has caught up.
    Promote {
        /// The member's id, as `member list` prints it.
        #[arg(value_name = "ID", value_parser = parse_member)]
        id: u64,
    },
}

/// `mainstay member add`.
#[derive(Clone, Debug, Args)]
pub struct AddCommand {
    /// The name it will be started with; only printed, for its settings.
    #[arg(value_name = "NAME")]
    name: String,
    /// Where the other members will reach it.
    #[arg(long, value_delimiter = ',', required = true, value_name = "URL,...")]
    peer_urls: Vec<String>,
    /// What it is to become.
    #[arg(long, value_enum, default_value_t = Kind::Voter)]
    kind: Kind,
    /// etcd's spelling of `--kind learner`.
    #[arg(long, conflicts_with = "kind")]
    learner: bool,
}

/// Runs `member`.
pub async fn member(context: &Context, command: MemberCommand) -> Result<(), CliError> {
    let out = &context.out;
    let api = context.api().await?;
    match command {
        MemberCommand::List { serializable } => show(context, &api.members(!serializable).await?),
        MemberCommand::Add(command) => add(context, command).await,
        MemberCommand::Remove { id } => {
            api.member_remove(id).await?;
            out.either(
                || json!({ "removed": format!("{id:x}") }),
                format!("Member {id:x} removed from cluster"),
            )
        }
        MemberCommand::Update { id, peer_urls } => {
            api.member_update(id, peer_urls).await?;
            out.either(
                || json!({ "updated": format!("{id:x}") }),
                format!("Member {id:x} updated in cluster"),
            )
        }
        MemberCommand::Promote { id } => {
            api.member_promote(id).await?;
            out.either(
                || json!({ "promoted": format!("{id:x}") }),
                format!("Member {id:x} promoted in cluster"),
            )
        }
    }
}

async fn add(context: &Context, command: AddCommand) -> Result<(), CliError> {
    let kind = match (command.learner, command.kind) {
        (true, _) | (false, Kind::Learner) => MemberKind::Learner,
        (false, Kind::Observer) => MemberKind::Observer,
        (false, Kind::Voter) => MemberKind::Voter,
    };
    let (added, members) = context.api().await?.member_add(command.peer_urls.clone(), kind).await?;
    let mut initial = Vec::new();
    for member in &members {
        let name = if member.id == added.id { &command.name } else { &member.name };
        initial.extend(member.peer_urls.iter().map(|url| format!("{name}={url}")));
    }
    let out = &context.out;
    if out.is_json() {
        return out.json(&json!({ "member": member_json(&added), "initial_cluster": initial.join(",") }));
    }
    out.line(format!("Member {:x} added to cluster as {kind}", added.id))?;
    say("start it with:");
    out.line(format!(
        "mainstay serve --name {} --listen-peer-urls {} --initial-advertise-peer-urls {} --initial-cluster {} \
         --initial-cluster-state existing",
        command.name,
        command.peer_urls.join(","),
        command.peer_urls.join(","),
        initial.join(",")
    ))
}

/// `mainstay move-leader`.
#[derive(Clone, Debug, Args)]
pub struct MoveLeaderCommand {
    /// The id of the member that is to lead, as `member list` prints it.
    #[arg(value_name = "ID", value_parser = parse_member)]
    target: u64,
}

/// Runs `move-leader`: finds the leader and asks it to hand over.
pub async fn move_leader(context: &Context, command: MoveLeaderCommand) -> Result<(), CliError> {
    let target = command.target;
    let api = context.api().await?;
    let members = api.members(false).await?;
    if !members.iter().any(|member| member.id == target) {
        return Err(CliError::NotFound(format!("{target:x} is no member; see `mainstay member list`")));
    }
    let status = api.status().await?;
    if status.leader == 0 {
        return Err(CliError::Unavailable("there is no leader to move; see `mainstay doctor`".to_owned()));
    }
    if status.leader == target {
        return context.out.either(
            || json!({ "leader": format!("{target:x}"), "moved": false }),
            format!("{target:x} leads already"),
        );
    }
    let leader = members.iter().find(|member| member.id == status.leader);
    let urls = leader.map(|member| member.client_urls.clone()).unwrap_or_default();
    if urls.is_empty() {
        return Err(CliError::Failed(format!("the leader {:x} has no client URL to ask", status.leader)));
    }
    context.api_at(&urls).await?.move_leader(target).await?;
    context.out.either(
        || json!({ "leader": format!("{target:x}"), "from": format!("{:x}", status.leader), "moved": true }),
        format!("Leadership transferred from {:x} to {target:x}", status.leader),
    )
}

/// Prints members as etcdctl does, with what kind each is.
fn show(context: &Context, members: &[MemberInfo]) -> Result<(), CliError> {
    let out = &context.out;
    if out.is_json() {
        let members: Vec<Value> = members.iter().map(member_json).collect();
        return out.json(&json!({ "members": members }));
    }
    let rows = members.iter().map(|member| {
        let status = if member.name.is_empty() { "unstarted" } else { "started" };
        vec![
            format!("{:x}", member.id),
            status.to_owned(),
            member.name.clone(),
            member.peer_urls.join(","),
            member.client_urls.join(","),
            member.is_learner.to_string(),
        ]
    });
    out.rows(&["ID", "STATUS", "NAME", "PEER ADDRS", "CLIENT ADDRS", "IS LEARNER"], rows.collect())
}

fn member_json(member: &MemberInfo) -> Value {
    json!({
        "id": format!("{:x}", member.id),
        "name": member.name,
        "peer_urls": member.peer_urls,
        "client_urls": member.client_urls,
        "is_learner": member.is_learner,
    })
}
