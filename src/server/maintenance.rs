//! What an operator asks of one member: alarms, status, hashes, a snapshot, a
//! rewrite of its files, another leader.

use std::sync::Arc;

use futures_util::Stream;
use tonic::{Request, Response, Status};

use super::context::{Caller, Guarded, Rpc, Shared};
use super::error::ServeError;
use super::kv::read_view;
use super::{API_VERSION, STORAGE_VERSION};
use crate::mvcc::{self, View};
use crate::node::NodeError;
use crate::storage::archive::Packing;
use crate::storage::snapshot::rest_after;
use crate::types::{Alarm, AlarmAction, AlarmKind, Operation, Outcome, Revision, Space};
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::alarm_request::AlarmAction as WireAction;
use crate::wire::etcdserverpb::downgrade_request::DowngradeAction;
use crate::wire::etcdserverpb::maintenance_server::Maintenance;

/// The Maintenance service.
pub(crate) struct MaintenanceService {
    shared: Arc<Shared>,
}

impl MaintenanceService {
    pub(crate) fn new(shared: Arc<Shared>) -> MaintenanceService {
        MaintenanceService { shared }
    }

    async fn change_alarm(
        &self,
        action: AlarmAction,
        alarm: Alarm,
        caller: &Caller,
    ) -> Result<(Revision, Vec<Alarm>), ServeError> {
        let reply = self.shared.propose(Operation::Alarm { action, alarm }, caller).await?;
        let changed = match reply.outcome? {
            Outcome::Alarms(changed) => changed,
            // A repetition of a request whose reply is no longer kept.
            _ => Vec::new(),
        };
        // etcd tells of an activated alarm also when it was raised before.
        let told = if action == AlarmAction::Activate { vec![alarm] } else { changed };
        Ok((reply.revision, told))
    }
}

/// The kind that a request names; `None` for all of them.
fn alarm_kind(value: i32) -> Result<Option<AlarmKind>, ServeError> {
    match pb::AlarmType::try_from(value) {
        Ok(pb::AlarmType::None) => Ok(None),
        Ok(pb::AlarmType::Nospace) => Ok(Some(AlarmKind::NoSpace)),
        Ok(pb::AlarmType::Corrupt) => Ok(Some(AlarmKind::Corrupt)),
        Err(_) => Err(NodeError::Invalid(format!("mainstay: alarm {value} is unknown")).into()),
    }
}

fn wire_alarm(alarm: &Alarm) -> pb::AlarmMember {
    let kind = match alarm.kind {
        AlarmKind::NoSpace => pb::AlarmType::Nospace,
        AlarmKind::Corrupt => pb::AlarmType::Corrupt,
    };
    pb::AlarmMember { member_id: alarm.member, alarm: kind.into() }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl Maintenance for MaintenanceService {
    async fn alarm(&self, request: Request<pb::AlarmRequest>) -> Result<Response<pb::AlarmResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let pb::AlarmRequest { action, member_id, alarm } = request.into_inner();
        let kind = alarm_kind(alarm)?;
        let action = match WireAction::try_from(action) {
            Ok(WireAction::Get) => None,
            Ok(WireAction::Activate) => Some(AlarmAction::Activate),
            Ok(WireAction::Deactivate) => Some(AlarmAction::Deactivate),
            Err(_) => {
                let text = format!("mainstay: alarm action {action} is unknown");
                return Err(ServeError::from(NodeError::Invalid(text)).into());
            }
        };
        let (revision, alarms) = match (action, kind) {
            (None, kind) => {
                let view = self.shared.node.view();
                let asked = |alarm: &&Alarm| kind.is_none_or(|kind| alarm.kind == kind);
                (view.revision, view.alarms.iter().filter(asked).copied().collect())
            }
            // As in etcd, "none" is no alarm that could be changed.
            (Some(_), None) => (self.shared.node.view().revision, Vec::new()),
            (Some(action), Some(kind)) => {
                self.change_alarm(action, Alarm { member: member_id, kind }, &caller).await?
            }
        };
        let header = Some(self.shared.header(revision));
        Ok(Response::new(pb::AlarmResponse { header, alarms: alarms.iter().map(wire_alarm).collect() }))
    }

    async fn status(
        &self,
        request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        self.shared.caller(&request, Rpc::Everywhere)?;
        let status = self.shared.node.status();
        let view = self.shared.node.view();
        let mut errors = Vec::new();
        if status.leader == 0 {
            errors.push(NodeError::NoLeader.to_string());
        }
        errors.extend(view.alarms.iter().map(|alarm| {
            let name = if alarm.kind == AlarmKind::NoSpace { "NOSPACE" } else { "CORRUPT" };
            format!("memberID:{} alarm:{name} ", alarm.member)
        }));
        Ok(Response::new(pb::StatusResponse {
            header: Some(self.shared.header(view.revision)),
            version: API_VERSION.to_owned(),
            db_size: signed(status.db_size_bytes),
            leader: status.leader,
            raft_index: status.committed_index,
            raft_term: status.term,
            raft_applied_index: status.applied_index,
            errors,
            db_size_in_use: signed(status.db_live_bytes),
            is_learner: status.is_learner,
            storage_version: STORAGE_VERSION.to_owned(),
            db_size_quota: signed(status.quota_bytes),
            downgrade_info: Some(pb::DowngradeInfo { enabled: false, target_version: String::new() }),
        }))
    }

    async fn defragment(
        &self,
        request: Request<pb::DefragmentRequest>,
    ) -> Result<Response<pb::DefragmentResponse>, Status> {
        self.shared.caller(&request, Rpc::Member)?;
        self.shared.node.defragment().await.map_err(ServeError::from)?;
        Ok(Response::new(pb::DefragmentResponse { header: Some(self.shared.header_now()) }))
    }

    async fn hash(&self, request: Request<pb::HashRequest>) -> Result<Response<pb::HashResponse>, Status> {
        self.shared.caller(&request, Rpc::Member)?;
        let read = |view: &View| {
            let mut both = crc32c::crc32c(&[]);
            for space in [Space::User, Space::System] {
                let hash = mvcc::hash_kv(&view.data, view.marks(space), space, Revision(0))?;
                both = crc32c::crc32c_append(both, &hash.hash.to_be_bytes());
            }
            Ok(both)
        };
        let (revision, hash) = read_view(&self.shared, read).await?;
        Ok(Response::new(pb::HashResponse { header: Some(self.shared.header(revision)), hash }))
    }

    async fn hash_kv(
        &self,
        request: Request<pb::HashKvRequest>,
    ) -> Result<Response<pb::HashKvResponse>, Status> {
        self.shared.caller(&request, Rpc::Member)?;
        let asked = Revision(request.get_ref().revision.max(0));
        let read = move |view: &View| mvcc::hash_kv(&view.data, view.marks(Space::User), Space::User, asked);
        let (revision, hash) = read_view(&self.shared, read).await?;
        Ok(Response::new(pb::HashKvResponse {
            header: Some(self.shared.header(revision)),
            hash: hash.hash,
            // etcd's mark of a store that was never compacted.
            compact_revision: if hash.compacted.0 == 0 { -1 } else { hash.compacted.0 },
            hash_revision: hash.revision.0,
        }))
    }

    type SnapshotStream = Guarded<pb::SnapshotResponse>;

    async fn snapshot(
        &self,
        request: Request<pb::SnapshotRequest>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let caller = self.shared.caller(&request, Rpc::Everywhere)?;
        let file = self.shared.node.snapshot_file().await.map_err(ServeError::from)?;
        tracing::info!(bytes = file.size_bytes(), "sending a snapshot to a client");
        let pieces = snapshot_pieces(self.shared.clone(), file);
        Ok(Response::new(self.shared.guarded(&caller, "Snapshot", pieces)))
    }

    async fn move_leader(
        &self,
        request: Request<pb::MoveLeaderRequest>,
    ) -> Result<Response<pb::MoveLeaderResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        caller.within(self.shared.node.move_leader(request.get_ref().target_id)).await?;
        Ok(Response::new(pb::MoveLeaderResponse { header: Some(self.shared.header_now()) }))
    }

    async fn downgrade(
        &self,
        request: Request<pb::DowngradeRequest>,
    ) -> Result<Response<pb::DowngradeResponse>, Status> {
        self.shared.caller(&request, Rpc::Member)?;
        match DowngradeAction::try_from(request.get_ref().action) {
            Ok(DowngradeAction::Cancel) => Err(ServeError::NoInflightDowngrade.into()),
            _ => Err(ServeError::NotSupported { what: "downgrade" }.into()),
        }
    }
}

/// The file in pieces, read one at a time as the client takes them, with a rest after each
/// ([`rest_after`]). It ends with the hash that etcdctl looks for.
fn snapshot_pieces(
    shared: Arc<Shared>,
    file: Packing,
) -> impl Stream<Item = Result<pb::SnapshotResponse, ServeError>> + Send + 'static {
    let left = file.size_bytes();
    futures_util::stream::try_unfold((shared, file, left), |(shared, mut file, left)| async move {
        let begun = shared.env.monotonic();
        let read = move || file.next().map(|blob| (file, blob));
        let read = tokio::task::spawn_blocking(read).await.map_err(ServeError::of_join)?;
        let (file, blob) =
            read.map_err(|error| NodeError::Internal(format!("reading the snapshot: {error}")))?;
        let Some(blob) = blob else { return Ok(None) };
        tokio::time::sleep(rest_after(shared.env.monotonic().saturating_sub(begun))).await;
        let left = left - blob.len() as u64;
        let message = pb::SnapshotResponse {
            header: Some(shared.header_now()),
            remaining_bytes: left,
            blob,
            version: STORAGE_VERSION.to_owned(),
        };
        Ok(Some((message, (shared, file, left))))
    })
}
