//! The gRPC face of `node::control`: the service on the peer listener, and the
//! way to nodes of which only an address is known.
//!
//! Decides nothing: reads whom a call is for, turns messages into the node's
//! values and back, and leaves the rest to [`Node`].

use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, StreamExt as _};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::node::Node;
use crate::node::carrier::{decode_ask, encode_answer, forward_end};
use crate::node::control::{
    ControlError, Dialer, JoinRefused, JoinReply, JoinRequest, ProbeReply, ProbeRequest,
};
use crate::raft::{PEER_MESSAGE_BYTES_MAX, PeerError, envelope_of, status_of};
use crate::types::{Member, MemberKind};
use crate::wire::channel::{self, ChannelOptions};
use crate::wire::etcdserverpb::MemberListRequest;
use crate::wire::etcdserverpb::cluster_client::ClusterClient;
use crate::wire::peer_v1::control_client::ControlClient;
use crate::wire::peer_v1::control_server::{self, ControlServer};
use crate::wire::peer_v1::{
    ControlAskRequest, ControlAskResponse, ControlForwardBatch, ControlForwardResults, ControlJoinRequest,
    ControlJoinResponse, ControlProbeRequest, ControlProbeResponse,
};

/// How long a connection may take to come about.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The service for the peer listener.
pub fn service(node: Node) -> ControlServer<ControlService> {
    ControlServer::new(ControlService { node })
        .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
}

/// What members ask of each other beside Raft.
pub struct ControlService {
    node: Node,
}

impl ControlService {
    /// The message, if the call is for this node and from a member.
    fn open<T>(&self, request: Request<T>) -> Result<T, Status> {
        let envelope = envelope_of(request.metadata())?;
        let checked = self.node.raft_receiver().check(&envelope);
        checked.map_err(|refusal| status_of(&PeerError::Refused(refusal)))?;
        self.node.check_sender(envelope.sender).map_err(Status::permission_denied)?;
        Ok(request.into_inner())
    }
}

#[tonic::async_trait]
impl control_server::Control for ControlService {
    type ForwardStream = BoxStream<'static, Result<ControlForwardResults, Status>>;

    async fn probe(
        &self,
        request: Request<ControlProbeRequest>,
    ) -> Result<Response<ControlProbeResponse>, Status> {
        let ControlProbeRequest { node_id, disk_id, peer_urls } = request.into_inner();
        let reply = self.node.answer_probe(&ProbeRequest { node_id, disk_id, peer_urls });
        Ok(Response::new(ControlProbeResponse {
            cluster_id: reply.cluster_id,
            node_id: reply.node_id,
            disk_id: reply.disk_id,
            name: reply.name,
            initialised: reply.initialised,
            version: reply.version,
            leader: reply.leader,
            membership_version: reply.membership_version,
            asker_known: reply.asker_known,
            asker_disk: reply.asker_disk,
            client_urls: reply.client_urls,
        }))
    }

    async fn join(
        &self,
        request: Request<ControlJoinRequest>,
    ) -> Result<Response<ControlJoinResponse>, Status> {
        let request = request.into_inner();
        let kind = kind_of(request.kind).ok_or_else(|| Status::invalid_argument("unknown kind of member"))?;
        let join = JoinRequest {
            disk_id: request.disk_id,
            name: request.name,
            peer_urls: request.peer_urls,
            client_urls: request.client_urls,
            kind,
            claim: request.claim,
        };
        Ok(Response::new(match self.node.answer_join(join).await {
            Ok(reply) => ControlJoinResponse {
                cluster_id: reply.cluster_id,
                node_id: reply.member.id,
                membership_index: reply.membership_index,
                kind: number_of(reply.member.kind),
                ..ControlJoinResponse::default()
            },
            Err(refused) => ControlJoinResponse {
                error: refused.reason,
                may_retry: refused.may_retry,
                ..ControlJoinResponse::default()
            },
        }))
    }

    async fn ask(&self, request: Request<ControlAskRequest>) -> Result<Response<ControlAskResponse>, Status> {
        let request = self.open(request)?;
        let ask = decode_ask(&request).map_err(|error| Status::invalid_argument(error.to_string()))?;
        Ok(Response::new(encode_answer(&self.node.answer_ask(ask).await)))
    }

    async fn forward(
        &self,
        request: Request<Streaming<ControlForwardBatch>>,
    ) -> Result<Response<Self::ForwardStream>, Status> {
        let batches = self.open(request)?;
        let (end, results) = forward_end(batches.boxed());
        self.node.serve_forward(end).await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(results.map(Ok).boxed()))
    }
}

fn kind_of(number: u32) -> Option<MemberKind> {
    match number {
        0 => Some(MemberKind::Voter),
        1 => Some(MemberKind::Learner),
        2 => Some(MemberKind::Observer),
        _ => None,
    }
}

fn number_of(kind: MemberKind) -> u32 {
    match kind {
        MemberKind::Voter => 0,
        MemberKind::Learner => 1,
        MemberKind::Observer => 2,
    }
}

/// Reaches nodes over gRPC by an address alone, with a connection for each call:
/// these calls are rare, and the next one may go to another node.
#[derive(Clone, Copy, Debug, Default)]
pub struct GrpcDialer;

impl GrpcDialer {
    async fn connect(url: &str) -> Result<Channel, ControlError> {
        let options = ChannelOptions { connect_timeout: CONNECT_TIMEOUT, ..ChannelOptions::default() };
        let connected = channel::connect_now(url, &options).await;
        connected.map_err(|error| ControlError::Unreachable { to: url.to_owned(), reason: reason_of(&error) })
    }

    async fn probe(url: &str, request: ProbeRequest) -> Result<ProbeReply, ControlError> {
        let mut client = ControlClient::new(GrpcDialer::connect(url).await?);
        let ProbeRequest { node_id, disk_id, peer_urls } = request;
        let message = ControlProbeRequest { node_id, disk_id, peer_urls };
        let reply = client.probe(message).await.map_err(|status| lost(url, &status))?.into_inner();
        Ok(ProbeReply {
            cluster_id: reply.cluster_id,
            node_id: reply.node_id,
            disk_id: reply.disk_id,
            name: reply.name,
            initialised: reply.initialised,
            version: reply.version,
            leader: reply.leader,
            membership_version: reply.membership_version,
            asker_known: reply.asker_known,
            asker_disk: reply.asker_disk,
            client_urls: reply.client_urls,
        })
    }

    /// Asks at `url`; when that is a client listener, asks there for the peers.
    async fn join(url: &str, request: JoinRequest) -> Result<Result<JoinReply, JoinRefused>, ControlError> {
        let channel = GrpcDialer::connect(url).await?;
        let status = match GrpcDialer::join_peer(channel.clone(), &request).await {
            Ok(answer) => return Ok(answer),
            Err(status) if status.code() != Code::Unimplemented => return Err(lost(url, &status)),
            Err(status) => status,
        };
        let listed = ClusterClient::new(channel).member_list(MemberListRequest::default()).await;
        let Ok(listed) = listed else { return Err(lost(url, &status)) };
        let mut last = lost(url, &status);
        for peer in listed.into_inner().members.into_iter().flat_map(|member| member.peer_ur_ls) {
            let channel = match GrpcDialer::connect(&peer).await {
                Ok(channel) => channel,
                Err(error) => {
                    last = error;
                    continue;
                }
            };
            match GrpcDialer::join_peer(channel, &request).await {
                Ok(answer) => return Ok(answer),
                Err(status) => last = lost(&peer, &status),
            }
        }
        Err(last)
    }

    async fn join_peer(
        channel: Channel,
        request: &JoinRequest,
    ) -> Result<Result<JoinReply, JoinRefused>, Status> {
        let message = ControlJoinRequest {
            disk_id: request.disk_id,
            name: request.name.clone(),
            peer_urls: request.peer_urls.clone(),
            client_urls: request.client_urls.clone(),
            kind: number_of(request.kind),
            claim: request.claim,
        };
        let reply = ControlClient::new(channel).join(message).await?.into_inner();
        if !reply.error.is_empty() {
            return Ok(Err(JoinRefused { reason: reply.error, may_retry: reply.may_retry }));
        }
        let kind = kind_of(reply.kind).ok_or_else(|| Status::internal("unknown kind of member"))?;
        let member = Member {
            id: reply.node_id,
            name: request.name.clone(),
            peer_urls: request.peer_urls.clone(),
            client_urls: request.client_urls.clone(),
            kind,
            disk: request.disk_id,
        };
        let (cluster_id, membership_index) = (reply.cluster_id, reply.membership_index);
        Ok(Ok(JoinReply { cluster_id, member, membership_index }))
    }
}

fn lost(url: &str, status: &Status) -> ControlError {
    ControlError::Lost { to: url.to_owned(), reason: status.message().to_owned() }
}

/// The whole chain of an error, which tonic's own message leaves out.
fn reason_of(error: &dyn std::error::Error) -> String {
    let mut reason = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        reason = format!("{reason}: {error}");
        source = error.source();
    }
    reason
}

impl Dialer for GrpcDialer {
    fn probe<'a>(
        &'a self,
        url: &'a str,
        request: ProbeRequest,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<ProbeReply, ControlError>> {
        Box::pin(within(url, timeout, GrpcDialer::probe(url, request)))
    }

    fn join<'a>(
        &'a self,
        url: &'a str,
        request: JoinRequest,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<Result<JoinReply, JoinRefused>, ControlError>> {
        Box::pin(within(url, timeout, GrpcDialer::join(url, request)))
    }
}

async fn within<T>(
    url: &str,
    timeout: Duration,
    call: impl Future<Output = Result<T, ControlError>>,
) -> Result<T, ControlError> {
    tokio::time::timeout(timeout, call).await.unwrap_or_else(|_| {
        Err(ControlError::Lost { to: url.to_owned(), reason: format!("no answer within {timeout:?}") })
    })
}
