//! What an operator asks of the cluster, from outside and by the same API.
//!
//! Calls are repeated until a deadline, on every member in turn, as an operator
//! would: while other faults are on, any one call may fail.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, anyhow, bail};
use mainstay::wire::channel::{ChannelOptions, connect_now};
use mainstay::wire::etcdserverpb as pb;
use mainstay::wire::etcdserverpb::cluster_client::ClusterClient;
use mainstay::wire::etcdserverpb::maintenance_client::MaintenanceClient;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::within;
use crate::context::Context;
use crate::hosts::{Host, Running};

/// How long one call may take. A change of the membership waits for an election timeout or two.
const CALL_TIME_MAX: Duration = Duration::from_secs(4);
/// How long one page may take.
const PAGE_TIME_MAX: Duration = Duration::from_secs(2);

/// Opens a connection to a host's node.
///
/// # Errors
/// When nobody answers there.
pub async fn channel(host: &Host) -> anyhow::Result<Channel> {
    let options = ChannelOptions { connect_timeout: Duration::from_secs(1), ..ChannelOptions::default() };
    Ok(connect_now(&host.client_url(), &options).await?)
}

/// Makes a call to a host's node, with a deadline.
///
/// # Errors
/// When it fails or takes too long.
pub async fn call<T, F>(host: &Host, make: impl FnOnce(Channel) -> F) -> anyhow::Result<T>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let answered = tokio::time::timeout(CALL_TIME_MAX, async {
        let channel = channel(host).await?;
        anyhow::Ok(make(channel).await)
    });
    match answered.await {
        Ok(Ok(Ok(response))) => Ok(response.into_inner()),
        Ok(Ok(Err(status))) => Err(status).with_context(|| format!("{} refused", host.name)),
        Ok(Err(error)) => Err(error),
        Err(_) => bail!("{} did not answer within {CALL_TIME_MAX:?}", host.name),
    }
}

/// Makes a call to one member after the other, until one answers or the time is over.
///
/// # Errors
/// The last member's.
pub async fn anywhere<T, F>(
    context: &Context,
    time: Duration,
    make: impl Fn(Channel) -> F,
) -> anyhow::Result<T>
where
    F: Future<Output = Result<tonic::Response<T>, Status>>,
{
    let turn = AtomicUsize::new(0);
    within(time, || async {
        let mut running = context.hosts.members();
        running.retain(|index| context.hosts.hosts[*index].running() != Running::No);
        let next = turn.fetch_add(1, Ordering::Relaxed);
        let index = running.get(next % running.len().max(1)).context("no member runs")?;
        call(&context.hosts.hosts[*index], &make).await
    })
    .await
}

/// The members, as the cluster agrees on them.
///
/// # Errors
/// When nobody says.
pub async fn members(context: &Context, time: Duration) -> anyhow::Result<Vec<pb::Member>> {
    let list = |channel| async {
        let request = pb::MemberListRequest { linearizable: true };
        ClusterClient::new(channel).member_list(request).await
    };
    Ok(anywhere(context, time, list).await?.members)
}

/// The member that is a host's node, if it is one.
pub fn member_of<'a>(members: &'a [pb::Member], host: &Host) -> Option<&'a pb::Member> {
    let url = host.peer_url();
    members.iter().find(|member| member.peer_ur_ls.contains(&url))
}

/// Waits until a host's node is a started member that votes.
///
/// # Errors
/// When it does not become one.
pub async fn wait_voter(context: &Context, host: &Host, time: Duration) -> anyhow::Result<()> {
    within(time, || async {
        let members = members(context, CALL_TIME_MAX).await?;
        let member = member_of(&members, host).with_context(|| format!("{} is no member", host.name))?;
        if member.is_learner || member.name.is_empty() {
            bail!("{} does not vote yet", host.name);
        }
        host.read().await.map(drop)
    })
    .await
}

/// Removes a host's node from the cluster. It may be gone already.
///
/// # Errors
/// When the cluster does not do it in time.
pub async fn remove(context: &Context, host: &Host, time: Duration) -> anyhow::Result<()> {
    within(time, || async {
        let known = members(context, CALL_TIME_MAX).await?;
        let Some(member) = member_of(&known, host) else { return Ok(()) };
        let id = member.id;
        let remove = |channel| async move {
            ClusterClient::new(channel).member_remove(pb::MemberRemoveRequest { id }).await
        };
        match anywhere(context, CALL_TIME_MAX, remove).await {
            Ok(_) => Ok(()),
            Err(error) => match error.downcast_ref::<Status>() {
                // A call before, whose answer was lost, did it.
                Some(status) if status.code() == Code::NotFound => Ok(()),
                _ => Err(error),
            },
        }
    })
    .await
    .with_context(|| format!("removing {}", host.name))
}

/// Makes a learner a voter, once it has caught up.
///
/// # Errors
/// When it has not in time.
pub async fn promote(context: &Context, host: &Host, time: Duration) -> anyhow::Result<()> {
    within(time, || async {
        let known = members(context, CALL_TIME_MAX).await?;
        let member = member_of(&known, host).with_context(|| format!("{} is no member", host.name))?;
        if !member.is_learner {
            return Ok(());
        }
        let id = member.id;
        let promote = |channel| async move {
            ClusterClient::new(channel).member_promote(pb::MemberPromoteRequest { id }).await
        };
        anywhere(context, CALL_TIME_MAX, promote).await.map(drop)
    })
    .await
    .with_context(|| format!("promoting {}", host.name))
}

/// Hands the leadership from one host's node to another's.
///
/// # Errors
/// When the leader does not.
pub async fn move_leader(from: &Host, to: u64) -> anyhow::Result<()> {
    let request = pb::MoveLeaderRequest { target_id: to };
    call(from, |channel| async move { MaintenanceClient::new(channel).move_leader(request).await })
        .await
        .map(drop)
}

/// The value of a metric of a host's node; of one with labels, the sum.
///
/// # Errors
/// When the page cannot be read or has no such line.
pub async fn metric(host: &Host, name: &str) -> anyhow::Result<f64> {
    let page = tokio::time::timeout(PAGE_TIME_MAX, page(host, "/metrics"));
    let page =
        page.await.map_err(|_| anyhow!("{} shows no metrics within {PAGE_TIME_MAX:?}", host.name))??;
    let mut found = None;
    for line in page.lines() {
        let Some(rest) = line.strip_prefix(name) else { continue };
        if rest.starts_with([' ', '{'])
            && let Some(value) = rest.rsplit(' ').next()
        {
            found = Some(found.unwrap_or(0.0) + value.parse::<f64>()?);
        }
    }
    found.with_context(|| format!("{} does not show {name}", host.name))
}

async fn page(host: &Host, path: &str) -> anyhow::Result<String> {
    let mut stream = tokio::net::TcpStream::connect((host.ip, 2379)).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", host.name);
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer)
}
