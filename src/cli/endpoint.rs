//! `endpoint health | status | hashkv` for endpoints and `status` for members:
//! each asked by itself, all at the same time.

use std::time::Duration;

use clap::{Args, Subcommand};
use futures_util::future::join_all;
use serde_json::{Value, json};

use super::Context;
use super::api::{Api, HashKv, Status};
use super::error::CliError;
use super::output::{bytes_text, say};
use crate::types::Revision;

/// `mainstay endpoint`.
#[derive(Clone, Debug, Subcommand)]
pub enum EndpointCommand {
    /// Whether each endpoint can serve a linearizable read; exit code 6 if one cannot.
    Health(Which),
    /// Where each endpoint stands.
    Status(Which),
    /// The hash of each endpoint's content: equal at equal revisions.
    Hashkv {
        /// Which endpoints.
        #[command(flatten)]
        which: Which,
        /// The revision to hash; 0 is each endpoint's newest.
        #[arg(long, default_value_t = 0, value_name = "REVISION")]
        rev: i64,
    },
}

/// Which endpoints to ask.
#[derive(Clone, Debug, Default, Args)]
pub struct Which {
    /// All members of the cluster instead of --endpoints.
    #[arg(long)]
    pub cluster: bool,
}

/// Runs `endpoint`.
pub async fn endpoint(context: &Context, command: EndpointCommand) -> Result<(), CliError> {
    match command {
        EndpointCommand::Health(which) => health(context, which).await,
        EndpointCommand::Status(which) => status(context, which).await,
        EndpointCommand::Hashkv { which, rev } => hashkv(context, which, rev).await,
    }
}

async fn endpoints(context: &Context, which: &Which) -> Result<Vec<String>, CliError> {
    if !which.cluster {
        return Ok(context.global.endpoints.clone());
    }
    let members = context.api().await?.members(false).await?;
    let urls: Vec<String> = members.into_iter().flat_map(|member| member.client_urls).collect();
    if urls.is_empty() {
        return Err(CliError::Failed("no member has a client URL".to_owned()));
    }
    Ok(urls)
}

/// Asks each endpoint by itself; the answers are in the order of the endpoints.
async fn ask_each<T>(
    context: &Context,
    endpoints: Vec<String>,
    ask: impl AsyncFn(Api) -> Result<T, CliError>,
) -> Vec<(String, Result<T, CliError>)> {
    let asked = endpoints.into_iter().map(|endpoint| async {
        let result = async {
            let api = context.api_at(std::slice::from_ref(&endpoint)).await?;
            ask(api).await
        }
        .await;
        (endpoint, result)
    });
    join_all(asked).await
}

/// Says which endpoints did not answer, and fails if there were any.
fn report_failures<T>(answers: &[(String, Result<T, CliError>)]) -> Result<(), CliError> {
    let mut failed = 0;
    for (endpoint, answer) in answers {
        if let Err(error) = answer {
            say(format!("{endpoint}: {error}"));
            failed += 1;
        }
    }
    match failed {
        0 => Ok(()),
        n => Err(CliError::Unavailable(format!("{n} of {} endpoints failed", answers.len()))),
    }
}

async fn health(context: &Context, which: Which) -> Result<(), CliError> {
    let endpoints = endpoints(context, &which).await?;
    let env = &context.env;
    let answers = ask_each(context, endpoints, async |api| {
        let begun = env.monotonic();
        api.health().await?;
        Ok(env.monotonic().saturating_sub(begun))
    })
    .await;
    let out = &context.out;
    if out.is_json() {
        let list: Vec<Value> = answers
            .iter()
            .map(|(endpoint, answer)| match answer {
                Ok(took) => json!({ "endpoint": endpoint, "health": true, "took_ms": ms(*took) }),
                Err(error) => json!({ "endpoint": endpoint, "health": false, "error": error.to_string() }),
            })
            .collect();
        out.json(&Value::Array(list))?;
    } else if out.is_table() {
        let rows = answers.iter().map(|(endpoint, answer)| match answer {
            Ok(took) => {
                vec![endpoint.clone(), "true".to_owned(), format!("{:.1} ms", ms(*took)), String::new()]
            }
            Err(error) => vec![endpoint.clone(), "false".to_owned(), String::new(), error.to_string()],
        });
        out.rows(&["ENDPOINT", "HEALTH", "TOOK", "ERROR"], rows.collect())?;
    } else {
        for (endpoint, answer) in &answers {
            out.line(match answer {
                Ok(took) => {
                    format!(
                        "{endpoint} is healthy: successfully committed proposal: took = {:.3}ms",
                        ms(*took)
                    )
                }
                Err(error) => format!("{endpoint} is unhealthy: {error}"),
            })?;
        }
    }
    match answers.iter().filter(|(_, answer)| answer.is_err()).count() {
        0 => Ok(()),
        n => Err(CliError::Unavailable(format!("unhealthy: {n} of {} endpoints", answers.len()))),
    }
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1000.0
}

async fn status(context: &Context, which: Which) -> Result<(), CliError> {
    let endpoints = endpoints(context, &which).await?;
    let answers = ask_each(context, endpoints, async |api| api.status().await).await;
    let out = &context.out;
    let known = || answers.iter().filter_map(|(endpoint, answer)| Some((endpoint, answer.as_ref().ok()?)));
    if out.is_json() {
        let list: Vec<Value> = known().map(|(endpoint, status)| status_json(endpoint, status)).collect();
        out.json(&Value::Array(list))?;
    } else {
        let rows = known().map(|(endpoint, status)| {
            vec![
                endpoint.clone(),
                format!("{:x}", status.member),
                status.version.clone(),
                bytes_text(status.db_bytes),
                (status.leader == status.member).to_string(),
                status.is_learner.to_string(),
                status.term.to_string(),
                status.raft_index.to_string(),
                status.applied_index.to_string(),
                status.errors.join("; "),
            ]
        });
        out.rows(
            &[
                "ENDPOINT",
                "ID",
                "VERSION",
                "DB SIZE",
                "IS LEADER",
                "IS LEARNER",
                "RAFT TERM",
                "RAFT INDEX",
                "RAFT APPLIED INDEX",
                "ERRORS",
            ],
            rows.collect(),
        )?;
    }
    report_failures(&answers)
}

fn status_json(endpoint: &str, status: &Status) -> Value {
    json!({
        "endpoint": endpoint,
        "member_id": format!("{:x}", status.member),
        "cluster_id": format!("{:x}", status.cluster),
        "version": status.version,
        "revision": status.revision.0,
        "db_size_bytes": status.db_bytes,
        "db_in_use_bytes": status.db_live_bytes,
        "db_quota_bytes": status.quota_bytes,
        "leader": format!("{:x}", status.leader),
        "is_leader": status.leader == status.member,
        "is_learner": status.is_learner,
        "raft_term": status.term,
        "raft_index": status.raft_index,
        "raft_applied_index": status.applied_index,
        "errors": status.errors,
    })
}

/// Runs `status`: every member, by name, whether it answers or not.
pub async fn members_status(context: &Context) -> Result<(), CliError> {
    let members = context.api().await?.members(false).await?;
    let asked = members.iter().map(|member| async {
        if member.client_urls.is_empty() {
            return Err(CliError::Unavailable("it has never started".to_owned()));
        }
        context.api_at(&member.client_urls).await?.status().await
    });
    let answers = join_all(asked).await;
    let out = &context.out;
    if out.is_json() {
        let list: Vec<Value> = members
            .iter()
            .zip(&answers)
            .map(|(member, answer)| {
                let mut value = match answer {
                    Ok(status) => status_json(&member.client_urls.join(","), status),
                    Err(error) => {
                        json!({ "member_id": format!("{:x}", member.id), "error": error.to_string() })
                    }
                };
                value["name"] = json!(member.name);
                value
            })
            .collect();
        out.json(&Value::Array(list))?;
    } else {
        let rows = members.iter().zip(&answers).map(|(member, answer)| {
            let mut row = vec![member.name.clone(), format!("{:x}", member.id), member.client_urls.join(",")];
            row.extend(match answer {
                Ok(status) => [
                    role(status).to_owned(),
                    status.revision.to_string(),
                    status.applied_index.to_string(),
                    bytes_text(status.db_bytes),
                    status.version.clone(),
                    status.errors.join("; "),
                ],
                Err(error) => {
                    let unknown = || "-".to_owned();
                    [unknown(), unknown(), unknown(), unknown(), unknown(), error.to_string()]
                }
            });
            row
        });
        let headers =
            ["NAME", "ID", "ENDPOINT", "ROLE", "REVISION", "APPLIED", "DB SIZE", "VERSION", "ERRORS"];
        out.rows(&headers, rows.collect())?;
    }
    match answers.iter().filter(|answer| answer.is_err()).count() {
        0 => Ok(()),
        n => Err(CliError::Unavailable(format!("{n} of {} members do not answer", members.len()))),
    }
}

fn role(status: &Status) -> &'static str {
    match (status.leader, status.is_learner) {
        (leader, _) if leader == status.member => "leader",
        (_, true) => "learner",
        (0, _) => "no leader",
        _ => "follower",
    }
}

async fn hashkv(context: &Context, which: Which, revision: i64) -> Result<(), CliError> {
    if revision < 0 {
        return Err(CliError::Usage("--rev counts from 1; 0 is the newest".to_owned()));
    }
    let endpoints = endpoints(context, &which).await?;
    let answers = ask_each(context, endpoints, async |api| api.hash_kv(Revision(revision)).await).await;
    let out = &context.out;
    let known: Vec<(&String, &HashKv)> =
        answers.iter().filter_map(|(endpoint, answer)| Some((endpoint, answer.as_ref().ok()?))).collect();
    if out.is_json() {
        let list: Vec<Value> = known
            .iter()
            .map(|(endpoint, hash)| {
                json!({
                    "endpoint": endpoint, "hash": hash.hash,
                    "hash_revision": hash.revision.0, "compact_revision": hash.compact_revision.0,
                })
            })
            .collect();
        out.json(&Value::Array(list))?;
    } else if out.is_table() {
        let rows = known.iter().map(|(endpoint, hash)| {
            vec![
                (*endpoint).clone(),
                hash.hash.to_string(),
                hash.revision.to_string(),
                hash.compact_revision.to_string(),
            ]
        });
        out.rows(&["ENDPOINT", "HASH", "HASH REVISION", "COMPACT REVISION"], rows.collect())?;
    } else {
        out.rows(
            &[],
            known.iter().map(|(endpoint, hash)| vec![(*endpoint).clone(), hash.hash.to_string()]).collect(),
        )?;
    }
    report_failures(&answers)
}
