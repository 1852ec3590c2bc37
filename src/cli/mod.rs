//! The command line: parse, run, exit code.
//!
//! One file for each group of verbs. They speak to a cluster only through
//! `api`, print only through `output`, and end only by returning a
//! [`CliError`], which `error` turns into an exit code. Nothing here knows how a
//! node works inside.

mod api;
mod args;
mod bench;
mod dev;
mod diagnosis;
mod doctor;
mod endpoint;
mod error;
mod explain;
mod export;
mod grammar;
mod http;
mod import;
mod kv;
mod lease;
mod lock;
mod member;
mod migrate;
mod output;
mod progress;
mod recover;
mod serve;
mod signals;
mod snapshot;
mod supervise;
mod tree;
mod txn;
mod watch;

use std::ffi::OsString;

use clap::{CommandFactory, Parser, Subcommand};
use tokio::sync::OnceCell;

pub use error::{CONFLICT, CliError, ERROR, NOT_FOUND, OK, UNAVAILABLE, USAGE};
pub use export::exported_line;
pub use import::parse_exported_line;

use self::api::Api;
use self::args::GlobalArgs;
use self::output::{Output, say};
use crate::env::{EnvRef, SystemEnv};

/// A replicated configuration store: etcd's guarantees and etcd's clients, one binary.
#[derive(Debug, Parser)]
#[command(name = "mainstay", version, about, after_help = error::HELP, propagate_version = true)]
#[command(subcommand_required = true, arg_required_else_help = true, max_term_width = 110)]
struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Read keys
    Get(kv::GetCommand),
    /// Set a key
    Put(kv::PutCommand),
    /// Remove keys
    Del(kv::DelCommand),
    /// Compare and change several keys in one step, read from standard input
    Txn(txn::TxnCommand),
    /// Print changes as they happen
    Watch(watch::WatchCommand),
    /// Forget old revisions
    #[command(visible_alias = "compaction")]
    Compact(kv::CompactCommand),
    /// Import text files, JSON lines or the content of an etcd
    Import(import::ImportCommand),
    /// Export keys as JSON lines or files
    Export(export::ExportCommand),
    /// Keys that vanish when nobody cares for them
    #[command(subcommand)]
    Lease(lease::LeaseCommand),
    /// Run a command while holding a lock
    Lock(lock::LockCommand),
    /// Take part in an election, or watch one
    Elect(lock::ElectCommand),
    /// The members of the cluster
    #[command(subcommand)]
    Member(member::MemberCommand),
    /// Ask endpoints one by one
    #[command(subcommand)]
    Endpoint(endpoint::EndpointCommand),
    /// Where all members stand
    Status,
    /// Save the store as a file, look into one, make a new cluster of one
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Hand the leadership to another member
    MoveLeader(member::MoveLeaderCommand),
    /// Go on with this node alone after the quorum is lost for ever
    Recover(recover::RecoverCommand),
    /// Say in words what is wrong with the cluster, and what to do
    Doctor,
    /// Put load on a store and measure it: this one, or any that speaks etcd's API
    Bench(bench::BenchCommand),
    /// Run a cluster on this machine, for trying things out
    Dev(dev::DevCommand),
    /// Run a node
    Serve(Box<serve::ServeCommand>),
    /// Print completions for a shell
    Completion {
        /// The shell.
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
}

/// What every command gets.
struct Context {
    global: GlobalArgs,
    out: Output,
    env: EnvRef,
    api: OnceCell<Api>,
}

impl Context {
    /// The cluster at `--endpoints`; connected when it is first asked something.
    async fn api(&self) -> Result<Api, CliError> {
        let api = self.api.get_or_try_init(|| self.api_at(&self.global.endpoints)).await?;
        Ok(api.clone())
    }

    /// The cluster, or one member of it, at other endpoints.
    async fn api_at(&self, endpoints: &[String]) -> Result<Api, CliError> {
        Api::connect(endpoints, &self.global)
    }
}

/// Runs the command line `arguments` (the program's name first) and returns the exit code. Never panics for what a
/// user typed, and prints why it failed.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no errors and go to stdout; a closed pipe is nobody's problem.
            let _ = error.print();
            return if error.use_stderr() { USAGE } else { OK };
        }
    };
    let result = match cli.verb {
        // It builds its own runtime, as wide as the machine.
        Verb::Serve(command) => return serve::serve(*command),
        Verb::Bench(command) => return bench::bench(cli.global, command),
        Verb::Completion { shell } => completion(shell),
        verb => run_client(cli.global, verb),
    };
    match result {
        Ok(()) => OK,
        Err(error) => {
            match &error {
                CliError::OutputClosed | CliError::Child(_) => {}
                error => say(format!("error: {error}")),
            }
            error.exit_code()
        }
    }
}

fn run_client(global: GlobalArgs, verb: Verb) -> Result<(), CliError> {
    // One thread: the verbs wait more than they work, and a child's death signal hangs on the thread that started it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::io("starting the runtime", e))?;
    let result = runtime.block_on(async {
        let out = Output::new(global.output);
        let context = Context { global, out, env: SystemEnv::shared(), api: OnceCell::new() };
        dispatch(&context, verb).await
    });
    // A blocked read of a terminal's input must not hold up the end.
    runtime.shutdown_background();
    result
}

async fn dispatch(context: &Context, verb: Verb) -> Result<(), CliError> {
    match verb {
        Verb::Get(command) => kv::get(context, command).await,
        Verb::Put(command) => kv::put(context, command).await,
        Verb::Del(command) => kv::del(context, command).await,
        Verb::Txn(command) => txn::txn(context, command).await,
        Verb::Watch(command) => watch::watch(context, command).await,
        Verb::Compact(command) => kv::compact(context, command).await,
        Verb::Import(command) => import::import(context, command).await,
        Verb::Export(command) => export::export(context, command).await,
        Verb::Lease(command) => lease::lease(context, command).await,
        Verb::Lock(command) => lock::lock(context, command).await,
        Verb::Elect(command) => lock::elect(context, command).await,
        Verb::Member(command) => member::member(context, command).await,
        Verb::Endpoint(command) => endpoint::endpoint(context, command).await,
        Verb::Status => endpoint::members_status(context).await,
        Verb::Snapshot(command) => snapshot::snapshot(context, command).await,
        Verb::MoveLeader(command) => member::move_leader(context, command).await,
        Verb::Recover(command) => recover::recover(context, command).await,
        Verb::Doctor => doctor::doctor(context).await,
        Verb::Dev(command) => dev::dev(context, command).await,
        Verb::Serve(_) | Verb::Bench(_) | Verb::Completion { .. } => {
            unreachable!("handled before a runtime is there")
        }
    }
}

fn completion(shell: clap_complete::Shell) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "mainstay", &mut script);
    Output::new(output::Format::Simple).raw(&script)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn etcdctls_spellings_are_understood() {
        for line in [
            "get --prefix a --limit 3 --rev 7 --order DESCEND --sort-by MODIFY --consistency=s -w json",
            "get --from-key a --keys-only --print-value-only --hex",
            "--endpoints=127.0.0.1:1,http://127.0.0.1:2 put a b --lease=1f --prev-kv",
            "put a -- -b",
            "del --prefix a --prev-kv",
            "watch --prefix a --rev 3 --prev-kv -- echo hi",
            "compaction 7 --physical",
            "lease keep-alive --once 1f",
            "lease timetolive 1f --keys",
            "lock a -- true",
            "elect a b",
            "elect --listen a",
            "member add n --peer-urls=http://127.0.0.1:1 --learner",
            "endpoint health --cluster --write-out=table",
            "move-leader ff",
            "completion bash",
            "dev --nodes 1",
            "bench put --clients 10 --conns=2 --total 100 --rate 5.5 --key-size=16 --val-size 8 --key-space 10",
            "bench mixed --reads-percent 50 --consistency=s --seconds 2m",
        ] {
            let words = std::iter::once("mainstay").chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }

    #[test]
    fn mistakes_are_usage_errors() {
        for line in [
            "",
            "frobnicate",
            "get",
            "get a b --prefix",
            "dev --nodes 0",
            "lease grant x",
            "get a -o xml",
            "bench put --total 1 --seconds 1",
            "bench put --rate 0",
            "bench put --clients 0",
        ] {
            let words = std::iter::once("mainstay").chain(line.split_whitespace());
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
