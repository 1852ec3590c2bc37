//! `bench`: load on any store that speaks etcd's API, and what it felt like.
//!
//! What the load is stands in `load`; here are its flags. It connects first and says so when it cannot,
//! shows how far it is, and ends with a summary also when it is interrupted.

mod show;

use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand};

use self::show::{Progress, Report};
use super::args::{Consistency, GlobalArgs, parse_consistency, parse_duration};
use super::error::{CliError, OK};
use super::output::{Output, say};
use super::signals::Signals;
use crate::load::{self, Audience, Failure, Keys, Outcome, Plan, Requests, Tally, Until, Verb, Work};
use crate::wire::channel::ChannelOptions;
use crate::wire::direct::Direct;

/// Keys that preparing writes in one transaction; etcd allows 128.
const KEYS_PER_TXN: u64 = 100;

/// What `bench --help` says at its end.
const HELP: &str = "The load writes real keys below --prefix and leaves them there.
Latencies at a --rate count from when an operation was due, so a store that stands still shows it.
Exit code 6 when not one operation succeeded.";

/// `mainstay bench`.
#[derive(Clone, Debug, Args)]
#[command(after_help = HELP)]
pub struct BenchCommand {
    #[command(subcommand)]
    verb: BenchVerb,
}

#[derive(Clone, Debug, Subcommand)]
enum BenchVerb {
    /// Set keys
    Put {
        #[command(flatten)]
        load: LoadArgs,
        #[command(flatten)]
        keys: KeyArgs,
    },
    /// Read keys, which are written first
    Range {
        #[command(flatten)]
        load: LoadArgs,
        #[command(flatten)]
        keys: KeyArgs,
        #[command(flatten)]
        reads: ReadArgs,
        /// Keys read at once
        #[arg(long, default_value_t = 1, value_name = "N", value_parser = at_least_one)]
        keys_per_read: u64,
    },
    /// If a key is there set and read it, else set it, in one transaction
    Txn {
        #[command(flatten)]
        load: LoadArgs,
        #[command(flatten)]
        keys: KeyArgs,
    },
    /// Read keys, which are written first, and set some
    Mixed {
        #[command(flatten)]
        load: LoadArgs,
        #[command(flatten)]
        keys: KeyArgs,
        #[command(flatten)]
        reads: ReadArgs,
        /// How many of a hundred operations are reads
        #[arg(long, default_value_t = 90, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
        reads_percent: u8,
    },
    /// Set keys that many watch; an operation is one event seen by one watcher, from the write on
    Watch {
        #[command(flatten)]
        load: LoadArgs,
        #[command(flatten)]
        keys: KeyArgs,
        /// Watchers of all the keys, each on a stream of its own
        #[arg(long, default_value_t = 100, value_name = "N", value_parser = at_least_one)]
        watchers: u64,
    },
    /// Keep leases alive, each on a stream of its own
    Lease {
        #[command(flatten)]
        load: LoadArgs,
        /// Leases, granted first
        #[arg(long, default_value_t = 1_000, value_name = "N", value_parser = at_least_one)]
        leases: u64,
        /// Their time to live, after which those that the load leaves behind are gone
        #[arg(long, default_value = "60s", value_name = "DURATION", value_parser = parse_duration)]
        ttl: Duration,
    },
}

fn at_least_one(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err("write a whole number from 1 on".to_owned()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if rate > 0.0 && f64::is_finite(rate) => Ok(rate),
        _ => Err("write operations per second, more than 0".to_owned()),
    }
}

/// Who calls, how often, how long.
#[derive(Clone, Debug, Args)]
struct LoadArgs {
    /// Clients that call at the same time
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = at_least_one)]
    clients: u64,
    /// Connections that the clients share, spread over the endpoints
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = at_least_one)]
    conns: u64,
    /// How long
    #[arg(long, default_value = "10s", value_name = "DURATION", value_parser = parse_duration, conflicts_with = "total")]
    seconds: Duration,
    /// How many operations, instead of how long
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    total: Option<u64>,
    /// Operations per second, over all clients; as many as they can when left out
    #[arg(long, value_name = "PER-SECOND", value_parser = rate)]
    rate: Option<f64>,
}

/// Which keys and values.
#[derive(Clone, Debug, Args)]
struct KeyArgs {
    /// What the keys begin with
    #[arg(long, default_value = "bench/", value_name = "PREFIX")]
    prefix: String,
    /// Different keys
    #[arg(long, default_value_t = 10_000, value_name = "N", value_parser = at_least_one)]
    key_space: u64,
    /// Length of a key, the prefix included
    #[arg(long, default_value_t = 24, value_name = "BYTES")]
    key_size: usize,
    /// Length of a value
    #[arg(long, default_value_t = 256, value_name = "BYTES")]
    val_size: usize,
}

impl KeyArgs {
    fn keys(&self) -> Result<Keys, CliError> {
        Keys::new(&self.prefix, self.key_size, self.key_space)
            .map_err(|why| CliError::Usage(format!("--key-size: {why}")))
    }

    fn say_what_is_left(&self) {
        say(format!("the keys are left; `mainstay del --prefix {}` removes them", self.prefix));
    }
}

/// How to read.
#[derive(Clone, Debug, Args)]
struct ReadArgs {
    /// linearizable (l), or serializable (s): what any member knows by itself
    #[arg(long, default_value = "l", value_name = "CONSISTENCY", value_parser = parse_consistency)]
    consistency: Consistency,
    /// Do not write the keys first: an earlier run with the same keys has
    #[arg(long)]
    filled: bool,
}

impl ReadArgs {
    fn serializable(&self) -> Result<bool, CliError> {
        match self.consistency {
            Consistency::Strong => Ok(false),
            Consistency::Eventual => Ok(true),
            Consistency::Bounded(_) => Err(CliError::Usage(
                "--consistency: bounded is the cache's; a store reads linearizable (l) or serializable (s)"
                    .to_owned(),
            )),
        }
    }
}

/// Runs `bench` on every core, unlike the other verbs, and returns its exit code.
pub fn bench(global: GlobalArgs, command: BenchCommand) -> u8 {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|e| CliError::io("starting the runtime", e));
    let result = runtime.and_then(|runtime| {
        let result = runtime.block_on(Bench { out: Output::new(global.output), global }.run(command.verb));
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(()) => OK,
        Err(error) => {
            if !matches!(error, CliError::OutputClosed) {
                say(format!("error: {error}"));
            }
            error.exit_code()
        }
    }
}

struct Bench {
    global: GlobalArgs,
    out: Output,
}

impl Bench {
    async fn run(self, verb: BenchVerb) -> Result<(), CliError> {
        match verb {
            BenchVerb::Put { load, keys } => self.requests("put", load, keys, Verb::Put, true).await,
            BenchVerb::Txn { load, keys } => self.requests("txn", load, keys, Verb::Txn, true).await,
            BenchVerb::Range { load, keys, reads, keys_per_read } => {
                if keys_per_read > keys.key_space {
                    return Err(CliError::Usage("--keys-per-read is more than --key-space".to_owned()));
                }
                let verb = Verb::Range { keys: keys_per_read, serializable: reads.serializable()? };
                self.requests("range", load, keys, verb, reads.filled).await
            }
            BenchVerb::Mixed { load, keys, reads, reads_percent } => {
                let verb = Verb::Mixed { reads: reads_percent, serializable: reads.serializable()? };
                self.requests("mixed", load, keys, verb, reads.filled).await
            }
            BenchVerb::Watch { load, keys, watchers } => self.watch(load, keys, watchers).await,
            BenchVerb::Lease { load, leases, ttl } => self.lease(load, leases, ttl).await,
        }
    }

    async fn requests(
        &self,
        name: &'static str,
        load: LoadArgs,
        args: KeyArgs,
        verb: Verb,
        filled: bool,
    ) -> Result<(), CliError> {
        let (keys, value) = (args.keys()?, load::value(args.val_size));
        let connections = self.connect(&load).await?;
        if !filled {
            say(format!("writing {} keys", keys.count()));
            prepared(
                "writing the keys",
                load::fill(&connections, &keys, &value, 0..keys.count(), KEYS_PER_TXN).await,
            )?;
        }
        let workers = Requests::clients(&connections, load.clients as usize, verb, &keys, &value);
        self.drive(name, &load, workers).await?;
        args.say_what_is_left();
        Ok(())
    }

    async fn lease(&self, load: LoadArgs, leases: u64, ttl: Duration) -> Result<(), CliError> {
        let connections = self.connect(&load).await?;
        let ttl_s = ttl.as_secs().max(1) as i64;
        let workers = load::lease(&connections, load.clients as usize, leases as usize, ttl_s).await;
        self.drive("lease", &load, prepared("granting the leases", workers)?).await
    }

    async fn drive<W: Work>(
        &self,
        name: &'static str,
        load: &LoadArgs,
        workers: Vec<W>,
    ) -> Result<(), CliError> {
        let (tally, plan) = (Arc::new(Tally::default()), load.plan());
        let work = async { load::drive(workers, &plan, &tally).await.0 };
        let outcome = self.watched(&tally, &plan, 1, work).await?;
        Report { verb: name, load, outcome: &outcome }.print(&self.out)
    }

    async fn watch(&self, load: LoadArgs, args: KeyArgs, watchers: u64) -> Result<(), CliError> {
        let (keys, value) = (args.keys()?, load::value(args.val_size));
        let connections = self.connect(&load).await?;
        let tally = Arc::new(Tally::default());
        let audience = Audience::come(&connections, watchers as usize, &keys, &tally).await;
        let audience = prepared("opening the watches", audience)?;
        let plan = load.plan();
        let work = audience.watch(&connections, load.clients as usize, &value, &plan);
        let outcome = self.watched(&tally, &plan, watchers, work).await?;
        Report { verb: "watch", load: &load, outcome: &outcome }.print(&self.out)?;
        args.say_what_is_left();
        Ok(())
    }

    /// Waits for the load with its progress on the terminal. A signal ends it early; what was done until then counts.
    async fn watched(
        &self,
        tally: &Arc<Tally>,
        plan: &Plan,
        events_per_op: u64,
        work: impl Future<Output = Outcome>,
    ) -> Result<Outcome, CliError> {
        let mut signals = Signals::listen()?;
        let progress = Progress::start(tally.clone(), plan, events_per_op);
        let outcome = tokio::select! {
            outcome = work => outcome,
            _ = signals.next() => {
                say("interrupted");
                tally.take(progress.elapsed())
            }
        };
        progress.end();
        Ok(outcome)
    }

    async fn connect(&self, load: &LoadArgs) -> Result<Vec<Direct>, CliError> {
        let options =
            ChannelOptions { connect_timeout: self.global.dial_timeout, ..ChannelOptions::default() };
        let mut connections = Vec::new();
        for address in self.global.endpoints.iter().cycle().take(load.conns as usize) {
            let connection = Direct::connect(address, &options, self.global.command_timeout).await;
            connections
                .push(connection.map_err(|error| CliError::Unavailable(format!("{address}: {error}")))?);
        }
        Ok(connections)
    }
}

impl LoadArgs {
    fn plan(&self) -> Plan {
        let until = self.total.map_or(Until::Time(self.seconds), Until::Ops);
        Plan { rate: self.rate, until }
    }
}

fn prepared<T>(what: &str, result: Result<T, Failure>) -> Result<T, CliError> {
    result.map_err(|failure| CliError::Unavailable(format!("{what}: {failure}")))
}
