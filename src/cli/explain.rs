//! `get --explain`: reads as a service does that links the SDK, and tells how the
//! read was routed and answered.
//!
//! The other verbs speak to the endpoints they are given. This one finds the
//! members, chooses among them and may keep a cache, because that is what it is
//! to explain.

use std::fmt::Write;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use super::Context;
use super::api::get_options;
use super::args::Consistency;
use super::error::CliError;
use super::kv::GetCommand;
use super::output::{bytes_text, say, say_rows};
use crate::client::{
    self, Attempt, CacheOptions, CallKind, CallTrace, Client, ClientError, EndpointHealth, EndpointStatus,
    Level, PolicyOptions, RoutingOptions, Strategy,
};
use crate::types::{KeyRange, KeyValue, RangeQuery, RangeReply, Revision};
use crate::wire::channel::ChannelOptions;

/// How long the members may take to tell who leads and how they are.
const SETTLE_LIMIT: Duration = Duration::from_secs(1);

/// A read, with everything that became of it.
pub struct Explained {
    /// The revision that it shows.
    pub revision: Revision,
    /// The keys.
    pub reply: RangeReply,
    consistency: Consistency,
    level: Level,
    age: Option<Duration>,
    is_stale: bool,
    cluster: Option<u64>,
    calls: Calls,
}

/// What the client did for it.
struct Calls {
    time: Duration,
    strategy: Strategy,
    attempts: Vec<Attempt>,
    endpoints: Vec<EndpointStatus>,
}

/// What was read, however it was.
struct Read {
    revision: Revision,
    reply: RangeReply,
    level: Level,
    age: Option<Duration>,
    is_stale: bool,
}

/// Reads; says what became of the attempts also if none was answered.
pub async fn read(
    context: &Context,
    command: &GetCommand,
    query: &RangeQuery,
) -> Result<Explained, CliError> {
    let trace = CallTrace::default();
    let client = connect(context, command, query, &trace).await?;
    settle(&client).await;
    let (before, began) = (trace.attempts().len(), Instant::now());
    let read = read_with(&client, query, command.consistency).await;
    let time = began.elapsed();
    if let Some(cache) = client.cache() {
        // What was read is to be there the next time.
        cache.close().await;
    }
    let kind = match command.consistency {
        Consistency::Eventual => CallKind::SerializableRead,
        Consistency::Strong | Consistency::Bounded(_) => CallKind::Read,
    };
    let mut attempts = trace.attempts().split_off(before.min(trace.attempts().len()));
    attempts.retain(|attempt| attempt.kind == kind && attempt.key.as_ref() == Some(query.range.start()));
    let (strategy, endpoints) = (RoutingOptions::default().strategy(kind).clone(), client.endpoints());
    let calls = Calls { time, strategy, attempts, endpoints };
    match read {
        Ok(Read { revision, reply, level, age, is_stale }) => {
            let cluster = client.cluster_id();
            let consistency = command.consistency;
            Ok(Explained { revision, reply, consistency, level, age, is_stale, cluster, calls })
        }
        Err(error) => {
            if command.explain {
                calls.say();
            }
            Err(error.into())
        }
    }
}

/// A client as a service has it, with the waiting times of the command line.
async fn connect(
    context: &Context,
    command: &GetCommand,
    query: &RangeQuery,
    trace: &CallTrace,
) -> Result<Client, CliError> {
    let global = &context.global;
    let policy = PolicyOptions { request_timeout: global.command_timeout, ..PolicyOptions::default() };
    let channel = ChannelOptions { connect_timeout: global.dial_timeout, ..ChannelOptions::default() };
    // Members are asked how they are as soon as they are found.
    let often = Some(Duration::from_millis(100));
    let routing = RoutingOptions { health_interval: often, ..RoutingOptions::default() };
    let builder = Client::builder(global.endpoints.iter().cloned())
        .routing(routing)
        .policy(policy)
        .channel(channel)
        .trace(trace.clone())
        .connect_timeout(global.command_timeout);
    let Some(dir) = &command.cache_dir else { return Ok(builder.connect().await?) };
    let is_one = matches!(query.range, KeyRange::Single(_));
    if !is_one || query.count_only || query.keys_only || query.revision.0 != 0 {
        return Err(CliError::Usage(
            "--cache-dir reads one key as it is; leave out all other options".to_owned(),
        ));
    }
    let cache = CacheOptions { dir: Some(dir.clone()), ..CacheOptions::default() };
    Ok(builder.cache(cache).connect().await?)
}

async fn read_with(
    client: &Client,
    query: &RangeQuery,
    consistency: Consistency,
) -> Result<Read, ClientError> {
    if let (Some(cache), KeyRange::Single(key)) = (client.cache(), &query.range) {
        let consistency = match consistency {
            Consistency::Strong => client::Consistency::Strong,
            Consistency::Bounded(bound) => client::Consistency::Bounded(bound),
            Consistency::Eventual => client::Consistency::Eventual,
        };
        let answer = cache.get(key, consistency).await?;
        let kvs: Vec<KeyValue> = answer.kv.into_iter().collect();
        let reply = RangeReply { count: kvs.len() as u64, more: false, kvs };
        let (level, age, is_stale) = (answer.level, answer.age, answer.stale);
        return Ok(Read { revision: answer.revision, reply, level, age, is_stale });
    }
    // Without a cache a bounded read asks the cluster, too.
    let began = Instant::now();
    let result = client.range(get_options(query, consistency == Consistency::Eventual)).await?;
    let age = (consistency != Consistency::Eventual).then(|| began.elapsed());
    Ok(Read { revision: result.revision, reply: result.reply, level: Level::Server, age, is_stale: false })
}

/// Waits until it is known who leads and how the members are, or for a while.
async fn settle(client: &Client) {
    let limit = Instant::now() + SETTLE_LIMIT;
    loop {
        let endpoints = client.endpoints();
        let is_told = endpoints.iter().all(|one| one.health != EndpointHealth::Unknown || one.is_spare);
        if (is_told && endpoints.iter().any(|one| one.is_leader)) || Instant::now() > limit {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Explained {
    /// For programs.
    pub fn json(&self) -> Value {
        json!({
            "consistency": consistency_text(self.consistency),
            "level": level_text(self.level),
            "age_ms": self.age.map(ms),
            "stale": self.is_stale,
            "cluster_id": self.cluster.map(|id| format!("{id:x}")),
            "bytes": self.bytes(),
            "time_ms": ms(self.calls.time),
            "strategy": strategy_text(&self.calls.strategy),
            "picked": self.calls.picked().map(|attempt| attempt.address.clone()),
            "why": self.calls.why(),
            "attempts": self.calls.attempts.iter().map(attempt_json).collect::<Vec<_>>(),
            "endpoints": self.calls.endpoints.iter().map(endpoint_json).collect::<Vec<_>>(),
        })
    }

    /// For people, on stderr.
    pub fn say(&self) {
        let mut text =
            format!("{} read, answered by {}", consistency_text(self.consistency), level_text(self.level));
        let _ = write!(text, " in {:.1} ms, ", ms(self.calls.time));
        match self.age {
            Some(age) => drop(write!(text, "at most {:.1} ms old", ms(age))),
            None => text.push_str("its age is not known"),
        }
        if self.is_stale {
            text.push_str(", stale: nobody keeps it current");
        }
        say(text);
        let cluster = self.cluster.map_or("unknown".to_owned(), |id| format!("{id:x}"));
        say(format!("cluster {cluster}, revision {}", self.revision));
        let keys = self.reply.kvs.len();
        say(format!("{keys} of {} keys, {}", self.reply.count, bytes_text(self.bytes())));
        if let [kv] = &self.reply.kvs[..] {
            let lease = if kv.lease.is_some() { kv.lease.to_string() } else { "none".to_owned() };
            let KeyValue { create_revision, mod_revision, version, .. } = kv;
            say(format!(
                "created at revision {create_revision}, set at {mod_revision}, version {version}, lease {lease}"
            ));
        }
        self.calls.say();
    }

    fn bytes(&self) -> u64 {
        self.reply.kvs.iter().map(|kv| (kv.key.len() + kv.value.len()) as u64).sum()
    }
}

impl Calls {
    /// The attempt that was answered.
    fn picked(&self) -> Option<&Attempt> {
        self.attempts.iter().rev().find(|attempt| attempt.error.is_none())
    }

    fn endpoint(&self, address: &str) -> Option<&EndpointStatus> {
        self.endpoints.iter().find(|endpoint| endpoint.address == address)
    }

    /// Why the endpoint was picked that answered.
    fn why(&self) -> Option<String> {
        let picked = self.picked()?;
        let leads = self.endpoint(&picked.address).is_some_and(|endpoint| endpoint.is_leader);
        let mut why = match (&self.strategy, self.attempts.len()) {
            (_, 2..) => format!("the next one after {} that failed", self.attempts.len() - 1),
            (Strategy::LeaderFirst(_), _) if leads => "it leads".to_owned(),
            (Strategy::LeaderFirst(inner), _) => format!("no leader could be used; {}", reason(inner)),
            (strategy, _) => reason(strategy).to_owned(),
        };
        let usable = self.endpoints.iter().filter(|endpoint| is_usable(endpoint)).count();
        let _ = write!(why, ", of {usable} that are well");
        Some(why)
    }

    fn say(&self) {
        if self.attempts.is_empty() {
            say("nothing was sent");
        } else {
            say(format!("routed by {}", strategy_text(&self.strategy)));
        }
        for (i, attempt) in self.attempts.iter().enumerate() {
            let outcome = match &attempt.error {
                Some(error) => format!("failed: {error}"),
                None => format!("answered; picked because: {}", self.why().unwrap_or_default()),
            };
            let name = self.endpoint(&attempt.address).map_or("", |endpoint| &endpoint.name);
            say(format!(
                "attempt {}: {} {name} after {:.1} ms {outcome}",
                i + 1,
                attempt.address,
                ms(attempt.time)
            ));
        }
        let headers =
            ["ENDPOINT", "NAME", "MEMBER", "HEALTH", "BREAKER", "LEADER", "ZONE", "LATENCY", "PICKS"];
        let row = |one: &EndpointStatus| {
            vec![
                one.address.clone(),
                one.name.clone(),
                one.member_id.map_or(String::new(), |id| format!("{id:x}")),
                health_text(one).to_owned(),
                format!("{:?}", one.breaker).to_lowercase(),
                if one.is_leader { "yes" } else { "" }.to_owned(),
                one.zone.clone().unwrap_or_default(),
                one.latency_ewma.map_or(String::new(), |latency| format!("{:.1} ms", ms(latency))),
                one.picks.to_string(),
            ]
        };
        say_rows(&headers, self.endpoints.iter().map(row).collect());
    }
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn is_usable(endpoint: &EndpointStatus) -> bool {
    let is_well = matches!(endpoint.health, EndpointHealth::Serving | EndpointHealth::Unknown);
    is_well && !endpoint.is_ejected && !endpoint.is_spare
}

fn reason(strategy: &Strategy) -> &'static str {
    match strategy {
        Strategy::Rendezvous { .. } | Strategy::Ring { .. } | Strategy::Maglev { .. } => {
            "it ranks first for the key"
        }
        Strategy::RoundRobin | Strategy::WeightedRoundRobin => "it was next in turn",
        Strategy::WeightedRandom => "it was drawn",
        Strategy::LeastInFlight => "it had the least to do",
        Strategy::PeakEwma => "it promised the earlier answer of two",
        Strategy::Sticky => "it is used until it fails",
        Strategy::ZoneLocal(inner) | Strategy::LeaderFirst(inner) => reason(inner),
    }
}

fn strategy_text(strategy: &Strategy) -> String {
    match strategy {
        Strategy::Rendezvous { load_bound } => format!("rendezvous hashing, load bound {load_bound}"),
        Strategy::Ring { load_bound, .. } => format!("a hash ring, load bound {load_bound}"),
        Strategy::Maglev { load_bound } => format!("maglev hashing, load bound {load_bound}"),
        Strategy::RoundRobin => "round robin".to_owned(),
        Strategy::WeightedRoundRobin => "weighted round robin".to_owned(),
        Strategy::WeightedRandom => "weighted random".to_owned(),
        Strategy::LeastInFlight => "least in flight".to_owned(),
        Strategy::PeakEwma => "peak EWMA of two choices".to_owned(),
        Strategy::Sticky => "one until it fails".to_owned(),
        Strategy::ZoneLocal(inner) => format!("zone first, then {}", strategy_text(inner)),
        Strategy::LeaderFirst(inner) => format!("leader first, then {}", strategy_text(inner)),
    }
}

fn consistency_text(consistency: Consistency) -> String {
    match consistency {
        Consistency::Strong => "strong".to_owned(),
        Consistency::Bounded(bound) => format!("bounded={bound:?}"),
        Consistency::Eventual => "eventual".to_owned(),
    }
}

fn level_text(level: Level) -> &'static str {
    match level {
        Level::L1 => "memory",
        Level::L2 => "compressed memory",
        Level::L3 => "disk",
        Level::Server => "server",
    }
}

fn health_text(endpoint: &EndpointStatus) -> &'static str {
    match endpoint.health {
        _ if endpoint.is_ejected => "ejected",
        EndpointHealth::Unknown => "unknown",
        EndpointHealth::Serving => "serving",
        EndpointHealth::NotServing => "not serving",
        EndpointHealth::Unreachable => "unreachable",
        EndpointHealth::WrongCluster => "wrong cluster",
    }
}

fn attempt_json(attempt: &Attempt) -> Value {
    json!({
        "address": attempt.address,
        "time_ms": ms(attempt.time),
        "error": attempt.error.as_ref().map(|error| error.to_string()),
        "class": attempt.error.as_ref().map(|error| error.class().name()),
    })
}

fn endpoint_json(endpoint: &EndpointStatus) -> Value {
    json!({
        "address": endpoint.address,
        "name": endpoint.name,
        "member_id": endpoint.member_id.map(|id| format!("{id:x}")),
        "health": health_text(endpoint),
        "breaker": format!("{:?}", endpoint.breaker).to_lowercase(),
        "is_leader": endpoint.is_leader,
        "is_spare": endpoint.is_spare,
        "zone": endpoint.zone,
        "latency_ms": endpoint.latency_ewma.map(ms),
        "in_flight": endpoint.in_flight,
        "picks": endpoint.picks,
    })
}
