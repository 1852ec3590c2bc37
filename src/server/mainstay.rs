//! What etcd's API has no word for: sessions for request ids, the times of
//! history, and letting a new node in.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::context::{Caller, Rpc, Shared};
use super::error::ServeError;
use super::kv::{read_here, read_view};
use crate::mvcc::{self, View};
use crate::node::control::JoinRequest;
use crate::node::{MemberView, NodeError};
use crate::storage::layout::{self, Family, SessionRecord};
use crate::storage::{Read, codec};
use crate::types::{MemberKind, Operation, Outcome, Space};
use crate::wire::mainstay_v1 as pb;
use crate::wire::mainstay_v1::admin_server::Admin;
use crate::wire::mainstay_v1::history_server::History;
use crate::wire::mainstay_v1::sessions_server::Sessions;

/// How long a session lives when the client leaves it to us, in seconds.
const SESSION_TTL_S: u64 = 600;
/// The shortest and the longest life of a session, in seconds.
const SESSION_TTL_S_BOUNDS: (u64, u64) = (10, 24 * 3600);

/// The Sessions service.
pub(crate) struct SessionsService {
    shared: Arc<Shared>,
}

impl SessionsService {
    pub(crate) fn new(shared: Arc<Shared>) -> SessionsService {
        SessionsService { shared }
    }
}

#[tonic::async_trait]
impl Sessions for SessionsService {
    async fn open(&self, request: Request<pb::OpenRequest>) -> Result<Response<pb::OpenResponse>, Status> {
        let caller = Caller { request: None, ..self.shared.caller(&request, Rpc::Member)? };
        let ttl_s = match request.get_ref().ttl_s {
            0 => SESSION_TTL_S,
            asked => asked.clamp(SESSION_TTL_S_BOUNDS.0, SESSION_TTL_S_BOUNDS.1),
        };
        let reply = self.shared.propose(Operation::SessionOpen { ttl_s }, &caller).await?;
        match reply.outcome.map_err(ServeError::from)? {
            Outcome::Session { id } => Ok(Response::new(pb::OpenResponse { session: id, ttl_s })),
            other => {
                let text = format!("opening a session was answered with {other:?}");
                Err(ServeError::from(NodeError::Internal(text)).into())
            }
        }
    }

    async fn renew(&self, request: Request<pb::RenewRequest>) -> Result<Response<pb::RenewResponse>, Status> {
        let caller = Caller { request: None, ..self.shared.caller(&request, Rpc::Member)? };
        let session = request.get_ref().session;
        let reply = self.shared.propose(Operation::SessionRenew { session }, &caller).await?;
        reply.outcome.map_err(ServeError::from)?;
        let read = move |view: &View| {
            let bytes = view.data.get(Family::Session, &layout::session(session))?;
            let record: Option<SessionRecord> =
                bytes.map(|bytes| codec::decode("session", &bytes)).transpose()?;
            Ok(record.map_or(0, |record| record.ttl_s))
        };
        let (_, ttl_s) = read_here(&self.shared, read)?;
        Ok(Response::new(pb::RenewResponse { ttl_s }))
    }
}

/// The History service.
pub(crate) struct HistoryService {
    shared: Arc<Shared>,
}

impl HistoryService {
    pub(crate) fn new(shared: Arc<Shared>) -> HistoryService {
        HistoryService { shared }
    }
}

#[tonic::async_trait]
impl History for HistoryService {
    async fn revision_at(
        &self,
        request: Request<pb::RevisionAtRequest>,
    ) -> Result<Response<pb::RevisionAtResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let time_ms = request.get_ref().time_ms;
        self.shared.barrier(&caller).await?;
        let read = move |view: &View| mvcc::revision_at(&view.data, view.marks(Space::User), time_ms);
        let (_, found) = read_view(&self.shared, read).await?;
        Ok(Response::new(pb::RevisionAtResponse { revision: found.revision.0, compacted: found.compacted }))
    }
}

/// The Admin service.
pub(crate) struct AdminService {
    shared: Arc<Shared>,
}

impl AdminService {
    pub(crate) fn new(shared: Arc<Shared>) -> AdminService {
        AdminService { shared }
    }
}

fn join_member(view: &MemberView) -> pb::JoinMember {
    let kind = match view.member.kind {
        MemberKind::Voter => pb::MemberKind::Voter,
        MemberKind::Learner => pb::MemberKind::Learner,
        MemberKind::Observer => pb::MemberKind::Observer,
    };
    pb::JoinMember {
        id: view.member.id,
        name: view.member.name.clone(),
        peer_urls: view.member.peer_urls.clone(),
        client_urls: view.member.client_urls.clone(),
        kind: kind.into(),
        disk: view.member.disk,
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn join(&self, request: Request<pb::JoinRequest>) -> Result<Response<pb::JoinResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let request = request.into_inner();
        let invalid = |text: &str| ServeError::from(NodeError::Invalid(format!("mainstay: join: {text}")));
        let kind = match pb::MemberKind::try_from(request.kind) {
            Ok(pb::MemberKind::Voter) => MemberKind::Voter,
            Ok(pb::MemberKind::Learner) => MemberKind::Learner,
            Ok(pb::MemberKind::Observer) => MemberKind::Observer,
            Err(_) => return Err(invalid("the kind is unknown").into()),
        };
        if request.disk == 0 {
            return Err(invalid("disk must not be 0").into());
        }
        if request.name.is_empty() || request.peer_urls.is_empty() {
            return Err(invalid("name and peer_urls must not be empty").into());
        }
        let join = JoinRequest {
            disk_id: request.disk,
            name: request.name,
            peer_urls: request.peer_urls,
            client_urls: request.client_urls,
            kind,
            claim: false,
        };
        let joined = caller
            .within(async {
                let refused = |refused: crate::node::control::JoinRefused| ServeError::JoinRefused {
                    reason: refused.reason,
                    may_retry: refused.may_retry,
                };
                self.shared.node.answer_join(join).await.map_err(refused)
            })
            .await?;
        let members = self.shared.node.members(false).await.map_err(ServeError::from)?;
        Ok(Response::new(pb::JoinResponse {
            cluster_id: joined.cluster_id,
            node_id: joined.member.id,
            members: members.iter().map(join_member).collect(),
        }))
    }
}
