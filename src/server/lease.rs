//! Leases: granted, revoked and listed through the node, renewed on streams.

use std::sync::Arc;

use futures_util::StreamExt;
use tonic::{Request, Response, Status, Streaming};

use super::context::{Caller, Guarded, Rpc, Shared};
use super::error::ServeError;
use crate::types::{LeaseId, Operation, Outcome, RequestId};
use crate::wire::etcdserverpb::lease_server::Lease;
use crate::wire::etcdserverpb::{
    LeaseGrantRequest, LeaseGrantResponse, LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseLeasesRequest,
    LeaseLeasesResponse, LeaseRevokeRequest, LeaseRevokeResponse, LeaseStatus, LeaseTimeToLiveRequest,
    LeaseTimeToLiveResponse,
};

/// Keep-alives of one stream that are confirmed at once; further ones wait in
/// the transport. They share quorum rounds, so this is many leases a round.
const KEEP_ALIVES_AT_ONCE: usize = 256;

/// The Lease service.
pub(crate) struct LeaseService {
    shared: Arc<Shared>,
}

impl LeaseService {
    pub(crate) fn new(shared: Arc<Shared>) -> LeaseService {
        LeaseService { shared }
    }

    /// The id of a lease whose client left the choice to us. A request that may
    /// be repeated must get the same id each time, on any node.
    fn choose_id(&self, request: Option<RequestId>) -> LeaseId {
        loop {
            let drawn = match request {
                Some(id) => mixed(id),
                None => self.shared.env.random_u64(),
            };
            // Positive, as etcd's are, and not the "no lease" of 0.
            let id = (drawn & (u64::MAX >> 1)) as i64;
            if id != 0 {
                return LeaseId(id);
            }
        }
    }

    async fn keep_alive(shared: Arc<Shared>, id: LeaseId) -> Result<LeaseKeepAliveResponse, ServeError> {
        // Made before the renewal, so that the revision is never newer than it:
        // a client must not see a lease alive at a revision that removed it.
        let header = Some(shared.header_now());
        let ttl = shared.node.lease_keep_alive(id).await?;
        Ok(LeaseKeepAliveResponse { header, id: id.0, ttl })
    }
}

/// A number that only this request has, not zero in its low 63 bits.
fn mixed(request: RequestId) -> u64 {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    hash.update(b"lease");
    hash.update(request.session.to_be_bytes());
    hash.update(request.sequence.to_be_bytes());
    let digest = hash.finalize();
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    u64::from_be_bytes(first) | 1
}

#[tonic::async_trait]
impl Lease for LeaseService {
    async fn lease_grant(
        &self,
        request: Request<LeaseGrantRequest>,
    ) -> Result<Response<LeaseGrantResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let request = request.into_inner();
        let id = match request.id {
            0 => self.choose_id(caller.request),
            chosen => LeaseId(chosen),
        };
        let operation = Operation::LeaseGrant { id, ttl_s: request.ttl };
        let reply = self.shared.propose(operation, &caller).await?;
        let (id, ttl) = match reply.outcome.map_err(ServeError::from)? {
            Outcome::LeaseGrant { id, ttl_s } => (id, ttl_s),
            _ => (id, request.ttl),
        };
        let header = Some(self.shared.header(reply.revision));
        Ok(Response::new(LeaseGrantResponse { header, id: id.0, ttl, error: String::new() }))
    }

    async fn lease_revoke(
        &self,
        request: Request<LeaseRevokeRequest>,
    ) -> Result<Response<LeaseRevokeResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let operation = Operation::LeaseRevoke { id: LeaseId(request.get_ref().id) };
        let reply = self.shared.propose(operation, &caller).await?;
        reply.outcome.map_err(ServeError::from)?;
        Ok(Response::new(LeaseRevokeResponse { header: Some(self.shared.header(reply.revision)) }))
    }

    type LeaseKeepAliveStream = Guarded<LeaseKeepAliveResponse>;

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<LeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let caller: Caller = self.shared.caller(&request, Rpc::Member)?;
        let shared = self.shared.clone();
        // A stream that the client broke off ends quietly: there is nobody to tell.
        let requests = request.into_inner().take_while(|message| std::future::ready(message.is_ok()));
        let answers = requests
            .filter_map(|message| std::future::ready(message.ok()))
            .map(move |message| Self::keep_alive(shared.clone(), LeaseId(message.id)))
            .buffered(KEEP_ALIVES_AT_ONCE);
        Ok(Response::new(self.shared.guarded(&caller, "LeaseKeepAlive", answers)))
    }

    async fn lease_time_to_live(
        &self,
        request: Request<LeaseTimeToLiveRequest>,
    ) -> Result<Response<LeaseTimeToLiveResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let LeaseTimeToLiveRequest { id, keys } = request.into_inner();
        let view = caller.within(self.shared.node.lease_time_to_live(LeaseId(id), keys)).await?;
        Ok(Response::new(LeaseTimeToLiveResponse {
            header: Some(self.shared.header_now()),
            id,
            ttl: view.ttl_s,
            granted_ttl: view.granted_ttl_s,
            keys: view.keys,
        }))
    }

    async fn lease_leases(
        &self,
        request: Request<LeaseLeasesRequest>,
    ) -> Result<Response<LeaseLeasesResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let ids = caller.within(self.shared.node.leases()).await?;
        let leases = ids.into_iter().map(|id| LeaseStatus { id: id.0 }).collect();
        Ok(Response::new(LeaseLeasesResponse { header: Some(self.shared.header_now()), leases }))
    }
}
