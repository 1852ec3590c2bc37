//! `doctor`: looks at every member from outside and says in words what is wrong
//! with the cluster and what to do. Changes nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;

use super::api::{MemberInfo, Status};
use super::diagnosis::{AlarmFacts, Facts, Hash, MemberFacts, Probe, Severity, diagnose};
use super::error::CliError;
use super::output::say;
use super::{Context, http};
use crate::telemetry;
use crate::types::Revision;

/// How long one member's HTTP side may take.
const HTTP_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs `doctor`. Ends with exit code 1 when there is a problem; warnings and notes end with 0.
pub async fn doctor(context: &Context) -> Result<(), CliError> {
    let facts = gather(context).await;
    let findings = diagnose(&facts);
    let out = &context.out;
    let problems = findings.iter().filter(|finding| finding.severity == Severity::Problem).count();
    if out.is_json() {
        let list: Vec<_> = findings
            .iter()
            .map(|f| json!({ "severity": f.severity.word(), "what": f.what, "advice": f.advice }))
            .collect();
        out.json(&json!({ "healthy": problems == 0, "members": facts.members.len(), "findings": list }))?;
    } else {
        for finding in &findings {
            out.line(format!("{}: {}\n    -> {}", finding.severity.word(), finding.what, finding.advice))?;
        }
        let answering = facts.members.iter().filter(|member| member.probe.is_ok()).count();
        let summary = format!("{answering} of {} members answer", facts.members.len());
        match (problems, findings.is_empty()) {
            (0, true) => out.line(format!("all is well: {summary}"))?,
            (0, false) => out.line(format!("it works: {summary}"))?,
            (_, _) => say(format!("{problems} problems: {summary}")),
        }
    }
    match (problems, facts.members.is_empty()) {
        (0, _) => Ok(()),
        (_, true) => Err(CliError::Unavailable("no endpoint answered".to_owned())),
        (n, false) => Err(CliError::Failed(format!("{n} problems were found"))),
    }
}

/// Asks everyone everything. Never fails: what cannot be learnt is part of the facts.
async fn gather(context: &Context) -> Facts {
    let mut facts = Facts::default();
    let mut members: Vec<MemberInfo> = Vec::new();
    for endpoint in &context.global.endpoints {
        match list_members(context, endpoint).await {
            Ok(list) if members.is_empty() => members = list,
            Ok(_) => {}
            Err(error) => facts.silent_endpoints.push((endpoint.clone(), error.to_string())),
        }
    }
    if members.is_empty() {
        return facts;
    }
    let probes = join_all(members.iter().map(|member| probe(context, member))).await;
    let revision = probes.iter().flatten().map(|(status, ..)| status.revision).min().unwrap_or(Revision(0));
    let hashed = join_all(probes.iter().map(|probe| hash(context, probe.as_ref().ok(), revision))).await;
    for ((member, probe), hash) in members.into_iter().zip(probes).zip(hashed) {
        facts.members.push(member_facts(member, probe, hash));
    }
    let urls: Vec<String> = facts
        .members
        .iter()
        .filter(|member| member.probe.is_ok())
        .flat_map(|member| member.client_urls.clone())
        .collect();
    if let Ok(api) = context.api_at(&urls).await {
        if let Ok(alarms) = api.alarms().await {
            let facts_of = |(member, kind): (u64, String)| AlarmFacts { member, kind };
            facts.alarms = alarms.into_iter().map(facts_of).collect::<BTreeSet<_>>().into_iter().collect();
        }
        facts.quorum_read = Some(api.health().await.map_err(|error| error.to_string()));
    }
    facts
}

async fn list_members(context: &Context, endpoint: &String) -> Result<Vec<MemberInfo>, CliError> {
    context.api_at(std::slice::from_ref(endpoint)).await?.members(false).await
}

type Probed = (Status, Option<i64>, Option<http::Response>, String);

/// What a member says on the first of its URLs that answers.
async fn probe(context: &Context, member: &MemberInfo) -> Result<Probed, String> {
    let mut last = "it has no client URL".to_owned();
    for url in &member.client_urls {
        let result = async {
            let status = context.api_at(std::slice::from_ref(url)).await?.status().await?;
            Ok::<Status, CliError>(status)
        };
        match result.await {
            Ok(status) if status.member != member.id => {
                last = format!("member {:x} answers there", status.member);
            }
            Ok(status) => {
                let page = http::get(url, "/metrics", HTTP_TIMEOUT).await;
                let now = context.env.wall_ms();
                // The header tells whole seconds: compare with the middle of the second.
                let date = page.as_ref().and_then(|page| page.date_ms);
                let ahead = date.map(|date| date as i64 + 500 - now as i64);
                return Ok((status, ahead, page, url.clone()));
            }
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

/// A member's hash at `revision`, which all of them should have.
async fn hash(context: &Context, probed: Option<&Probed>, revision: Revision) -> Option<Hash> {
    let (_, _, _, url) = probed?;
    let api = context.api_at(std::slice::from_ref(url)).await.ok()?;
    let hash = api.hash_kv(revision).await.ok()?;
    Some(Hash { revision: revision.0, compact_revision: hash.compact_revision.0, hash: hash.hash })
}

fn member_facts(member: MemberInfo, probed: Result<Probed, String>, hash: Option<Hash>) -> MemberFacts {
    let probe = probed.map(|(status, clock_ahead_ms, page, _)| {
        let free = page.as_ref().and_then(|page| http::metric(&page.body, telemetry::DISK_FREE_BYTES));
        Probe {
            leader: status.leader,
            raft_index: status.raft_index,
            applied_index: status.applied_index,
            db_live_bytes: status.db_live_bytes,
            quota_bytes: status.quota_bytes,
            version: status.version,
            // An alarm is reported as such, not once more for each member.
            errors: status.errors.into_iter().filter(|error| !error.contains("alarm")).collect(),
            hash,
            clock_ahead_ms,
            disk_free_bytes: free.map(|bytes| bytes as u64),
        }
    });
    MemberFacts {
        id: member.id,
        name: member.name,
        is_learner: member.is_learner,
        client_urls: member.client_urls,
        probe,
    }
}
