//! The questions of discovery and health checks, as a seam: on the network, or
//! answered by a test.

use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tonic::Code;

use super::endpoint::{Endpoint, EndpointHealth};
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::cluster_client::ClusterClient;
use crate::wire::etcdserverpb::maintenance_client::MaintenanceClient;
use crate::wire::health::{self, ServingStatus};

/// Who answers at an address, and what it knows of the leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub cluster: u64,
    pub member: u64,
    /// 0 when it knows none.
    pub leader: u64,
    /// The later term is right about the leader.
    pub term: u64,
}

/// A member as the cluster lists it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    pub id: u64,
    pub name: String,
    pub client_urls: Vec<String>,
    pub is_learner: bool,
}

/// Asks endpoints. No answer is an answer too; who asks sets the limit of time.
pub trait Ask: Send + Sync + 'static {
    /// Who answers there.
    fn identity(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, Option<Identity>>;
    /// The members as that endpoint knows them, which may be behind.
    fn members(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, Option<Vec<Listed>>>;
    /// How it is.
    fn health(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, EndpointHealth>;
    /// Whether it takes everything although it is a learner, as Mainstay's do.
    /// etcd's take serializable reads only.
    fn serves_as_learner(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, bool>;
}

/// Asks over the endpoints' own channels.
pub struct Network;

/// A service that etcd does not have.
const MAINSTAY_SERVICE: &str = "mainstay.v1.Sessions";

impl Ask for Network {
    fn identity(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, Option<Identity>> {
        async move {
            let answer = MaintenanceClient::new(endpoint.channel()).status(pb::StatusRequest {}).await;
            let status = answer.ok()?.into_inner();
            let header = status.header?;
            Some(Identity {
                cluster: header.cluster_id,
                member: header.member_id,
                leader: status.leader,
                term: status.raft_term,
            })
        }
        .boxed()
    }

    fn members(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, Option<Vec<Listed>>> {
        async move {
            let request = pb::MemberListRequest { linearizable: false };
            let answer = ClusterClient::new(endpoint.channel()).member_list(request).await;
            let members = answer.ok()?.into_inner().members;
            let listed = |member: pb::Member| Listed {
                id: member.id,
                name: member.name,
                client_urls: member.client_ur_ls,
                is_learner: member.is_learner,
            };
            Some(members.into_iter().map(listed).collect())
        }
        .boxed()
    }

    fn health(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, EndpointHealth> {
        async move {
            match health::check(endpoint.channel(), "").await {
                Ok(ServingStatus::NotServing) => EndpointHealth::NotServing,
                Ok(_) => EndpointHealth::Serving,
                Err(status) => match status.code() {
                    Code::Unavailable | Code::Unknown | Code::Internal => EndpointHealth::Unreachable,
                    Code::DeadlineExceeded | Code::Cancelled => EndpointHealth::Unreachable,
                    // It tells nobody, or not this client; but it answers.
                    _ => EndpointHealth::Serving,
                },
            }
        }
        .boxed()
    }

    fn serves_as_learner(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, bool> {
        async move { health::check(endpoint.channel(), MAINSTAY_SERVICE).await.is_ok() }.boxed()
    }
}
