//! etcd's Election service: the contender whose turn it is leads, and its key's
//! value is what it proclaims.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::context::{Caller, Guarded, OpenStream, Rpc, Shared};
use super::error::ServeError;
use super::queue::{self, Contender};
use crate::node::NodeError;
use crate::types::{CompareOp, EventKind, KeyRange, KeyValue, LeaseId, Revision, Space, Txn, TxnOp};
use crate::watch::{WatchMessageKind, WatchSpec};
use crate::wire;
use crate::wire::v3electionpb as pb;
use crate::wire::v3electionpb::election_server::Election;

/// Leaders that an observer has not taken yet; beyond it the source waits, and
/// then goes on from where it stood.
const OBSERVED_MAX: usize = 16;

/// The Election service.
pub(crate) struct ElectionService {
    shared: Arc<Shared>,
}

impl ElectionService {
    pub(crate) fn new(shared: Arc<Shared>) -> ElectionService {
        ElectionService { shared }
    }

    /// Changes the value of a key that is still the one created at `create`.
    async fn proclaim_value(
        &self,
        caller: &Caller,
        key: &Bytes,
        create: Revision,
        lease: LeaseId,
        value: Bytes,
    ) -> Result<Revision, ServeError> {
        let txn = Txn {
            compare: vec![queue::created(key, CompareOp::Equal, create)],
            success: vec![queue::put(key, value, lease)],
            failure: vec![],
        };
        match queue::transact(&self.shared, caller, txn).await? {
            (revision, reply) if reply.succeeded => Ok(revision),
            _ => Err(ServeError::ElectionNotLeader),
        }
    }
}

/// The key that Campaign gave, or etcd's error.
fn given(leader: Option<pb::LeaderKey>) -> Result<pb::LeaderKey, ServeError> {
    leader.ok_or(ServeError::MissingLeaderKey)
}

#[tonic::async_trait]
impl Election for ElectionService {
    async fn campaign(
        &self,
        request: Request<pb::CampaignRequest>,
    ) -> Result<Response<pb::CampaignResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let pb::CampaignRequest { name, lease, value } = request.into_inner();
        let _waiting = OpenStream::new("Campaign");
        let lease = queue::lease_or_new(&self.shared, &caller, lease).await?;
        let (contender, entered) =
            Contender::enter(&self.shared, &caller, &name, lease, value.clone()).await?;
        let mut revision = entered.revision;
        if entered.before.is_some_and(|before| before.value != value) {
            let proclaimed =
                self.proclaim_value(&caller, &contender.key, contender.create, lease, value).await;
            revision = proclaimed?;
        }
        if !entered.first {
            let turn = caller.within(contender.turn()).await?;
            revision = turn.ok_or(ServeError::ElectionSessionExpired)?;
        }
        let leader =
            pb::LeaderKey { name, key: contender.key.clone(), rev: contender.create.0, lease: lease.0 };
        contender.keep();
        let header = Some(self.shared.header(revision));
        Ok(Response::new(pb::CampaignResponse { header, leader: Some(leader) }))
    }

    async fn proclaim(
        &self,
        request: Request<pb::ProclaimRequest>,
    ) -> Result<Response<pb::ProclaimResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let pb::ProclaimRequest { leader, value } = request.into_inner();
        let pb::LeaderKey { key, rev, lease, .. } = given(leader)?;
        let revision = self.proclaim_value(&caller, &key, Revision(rev), LeaseId(lease), value).await?;
        Ok(Response::new(pb::ProclaimResponse { header: Some(self.shared.header(revision)) }))
    }

    async fn leader(
        &self,
        request: Request<pb::LeaderRequest>,
    ) -> Result<Response<pb::LeaderResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        self.shared.barrier(&caller).await?;
        let query = queue::first_in(&queue::prefix(&request.get_ref().name));
        let (revision, found) = queue::look(&self.shared, query).await?;
        let leader = found.kvs.into_iter().next().ok_or(ServeError::ElectionNoLeader)?;
        let kv = Some(wire::key_value(leader));
        Ok(Response::new(pb::LeaderResponse { header: Some(self.shared.header(revision)), kv }))
    }

    type ObserveStream = Guarded<pb::LeaderResponse>;

    async fn observe(
        &self,
        request: Request<pb::LeaderRequest>,
    ) -> Result<Response<Self::ObserveStream>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let (leaders, observed) = mpsc::channel(OBSERVED_MAX);
        let observer =
            Observer { shared: self.shared.clone(), prefix: queue::prefix(&request.get_ref().name), leaders };
        self.shared.tasks.spawn(observer.run());
        Ok(Response::new(self.shared.guarded(&caller, "Observe", ReceiverStream::new(observed))))
    }

    async fn resign(
        &self,
        request: Request<pb::ResignRequest>,
    ) -> Result<Response<pb::ResignResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let pb::LeaderKey { key, rev, .. } = given(request.into_inner().leader)?;
        // Not an error when somebody else leads by now: the caller does not.
        let txn = Txn {
            compare: vec![queue::created(&key, CompareOp::Equal, Revision(rev))],
            success: vec![TxnOp::DeleteRange(queue::delete(&key))],
            failure: vec![],
        };
        let (revision, _) = queue::transact(&self.shared, &caller, txn).await?;
        Ok(Response::new(pb::ResignResponse { header: Some(self.shared.header(revision)) }))
    }
}

/// The source of one Observe stream: tells every leader, in order, though not
/// every value a leader proclaimed while the observer was away.
struct Observer {
    shared: Arc<Shared>,
    prefix: Bytes,
    leaders: mpsc::Sender<Result<pb::LeaderResponse, ServeError>>,
}

impl Observer {
    async fn run(self) {
        let leaders = self.leaders.clone();
        tokio::select! {
            result = self.observe() => {
                if let Err(error) = result {
                    // Nobody may be there to hear it.
                    let _ = leaders.send(Err(error)).await;
                }
            }
            () = leaders.closed() => {}
            () = self.shared.stopping.cancelled() => {}
        }
    }

    async fn observe(&self) -> Result<(), ServeError> {
        self.shared.node.read_barrier().await?;
        loop {
            let (revision, found) = queue::look(&self.shared, queue::first_in(&self.prefix)).await?;
            let (revision, leader) = match found.kvs.into_iter().next() {
                Some(leader) => (revision, leader),
                None => match self.first_put(revision.next()).await? {
                    Some(leader) => (leader.mod_revision, leader),
                    None => continue,
                },
            };
            let key = leader.key.clone();
            self.tell(revision, leader).await;
            self.follow(&key, revision.next()).await?;
        }
    }

    async fn tell(&self, revision: Revision, leader: KeyValue) {
        let header = Some(self.shared.header(revision));
        let response = pb::LeaderResponse { header, kv: Some(wire::key_value(leader)) };
        // A closed channel ends the task from outside.
        let _ = self.leaders.send(Ok(response)).await;
    }

    /// The first contender that enters the empty queue; `None` to look again.
    async fn first_put(&self, from: Revision) -> Result<Option<KeyValue>, ServeError> {
        let range = KeyRange::prefix(self.prefix.clone());
        let spec = WatchSpec { no_delete: true, ..WatchSpec::new(Space::User, range, from) };
        let mut stream = self.shared.node.hub().stream();
        stream.create(None, spec).map_err(|error| NodeError::Internal(error.to_string()))?;
        loop {
            match queue::message(&mut stream).await? {
                WatchMessageKind::Events { events, .. } => {
                    if let Some(event) = events.first() {
                        return Ok(Some(event.event().kv.clone()));
                    }
                }
                WatchMessageKind::Compacted { .. } | WatchMessageKind::Canceled => return Ok(None),
                WatchMessageKind::Created | WatchMessageKind::Progress | WatchMessageKind::Refused(_) => {}
            }
        }
    }

    /// Tells what the leader proclaims until its key is gone.
    async fn follow(&self, key: &Bytes, from: Revision) -> Result<(), ServeError> {
        let spec = WatchSpec::new(Space::User, KeyRange::Single(key.clone()), from);
        let mut stream = self.shared.node.hub().stream();
        stream.create(None, spec).map_err(|error| NodeError::Internal(error.to_string()))?;
        loop {
            match queue::message(&mut stream).await? {
                WatchMessageKind::Events { events, .. } => {
                    for event in events.iter().map(|watched| watched.event()) {
                        if event.kind == EventKind::Delete {
                            return Ok(());
                        }
                        self.tell(event.kv.mod_revision, event.kv.clone()).await;
                    }
                }
                WatchMessageKind::Compacted { .. } | WatchMessageKind::Canceled => return Ok(()),
                WatchMessageKind::Created | WatchMessageKind::Progress | WatchMessageKind::Refused(_) => {}
            }
        }
    }
}
