//! etcd's Lock service: a turn in a queue, held for as long as its lease lives.

use std::sync::Arc;

use bytes::Bytes;
use tonic::{Request, Response, Status};

use super::context::{OpenStream, Rpc, Shared};
use super::error::ServeError;
use super::queue::{self, Contender};
use crate::types::Operation;
use crate::wire::InvalidRequest;
use crate::wire::v3lockpb::lock_server::Lock;
use crate::wire::v3lockpb::{LockRequest, LockResponse, UnlockRequest, UnlockResponse};

/// The Lock service.
pub(crate) struct LockService {
    shared: Arc<Shared>,
}

impl LockService {
    pub(crate) fn new(shared: Arc<Shared>) -> LockService {
        LockService { shared }
    }
}

#[tonic::async_trait]
impl Lock for LockService {
    async fn lock(&self, request: Request<LockRequest>) -> Result<Response<LockResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let LockRequest { name, lease } = request.into_inner();
        let _waiting = OpenStream::new("Lock");
        let lease = queue::lease_or_new(&self.shared, &caller, lease).await?;
        let (contender, entered) =
            Contender::enter(&self.shared, &caller, &name, lease, Bytes::new()).await?;
        let revision = match entered.first {
            true => entered.revision,
            false => {
                let turn = caller.within(contender.turn()).await?;
                turn.ok_or(ServeError::LockSessionExpired)?
            }
        };
        let key = contender.key.clone();
        contender.keep();
        Ok(Response::new(LockResponse { header: Some(self.shared.header(revision)), key }))
    }

    async fn unlock(&self, request: Request<UnlockRequest>) -> Result<Response<UnlockResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let key = request.into_inner().key;
        if key.is_empty() {
            return Err(ServeError::from(InvalidRequest::EmptyKey).into());
        }
        let reply = self.shared.propose(Operation::DeleteRange(queue::delete(&key)), &caller).await?;
        reply.outcome.map_err(ServeError::from)?;
        Ok(Response::new(UnlockResponse { header: Some(self.shared.header(reply.revision)) }))
    }
}
