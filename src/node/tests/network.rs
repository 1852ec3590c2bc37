//! A network that is a table of nodes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::stream::StreamExt as _;
use parking_lot::Mutex;
use prost::Message as _;

use super::super::carrier::{ASK_PATH, FORWARD_PATH, decode_ask, encode_answer, forward_end};
use super::super::control::{
    ControlError, Dialer, JoinRefused, JoinReply, JoinRequest, ProbeReply, ProbeRequest,
};
use super::super::*;
use crate::raft::{
    AppendRequest, AppendResult, BoxStream, Envelope, PeerError, PeerFuture, SnapshotTimeouts,
    TransferLeaderRequest, TransferLeaderResult, Transport, Vote, VoteRequest, VoteResponse,
};
use crate::storage::snapshot::StoredSnapshot;
use crate::wire::peer_v1::{ControlAskRequest, ControlForwardBatch};

/// Who is where.
#[derive(Default)]
pub struct Network {
    nodes: Mutex<HashMap<String, Node>>,
    /// Forwarding links that are opened while this is set never bring an answer.
    pub mute: AtomicBool,
}

impl Network {
    pub fn attach(&self, url: &str, node: &Node) {
        self.nodes.lock().insert(url.to_owned(), node.clone());
    }

    pub fn detach(&self, url: &str) {
        self.nodes.lock().remove(url);
    }

    fn at(&self, url: &str) -> Option<Node> {
        self.nodes.lock().get(url).cloned()
    }

    /// The node that is meant, if both it and the sender are attached.
    fn reach(&self, to: &Envelope) -> Result<Node, PeerError> {
        let nodes = self.nodes.lock();
        let is = |id| nodes.values().find(|node| node.id() == id);
        let (Some(node), Some(_)) = (is(to.target), is(to.sender)) else {
            return Err(PeerError::NotSent("nobody is there".to_owned()));
        };
        node.raft_receiver().check(to)?;
        Ok(node.clone())
    }
}

/// Raft's calls, and control's, in this process.
pub struct NetworkTransport(pub Arc<Network>);

fn lost() -> PeerError {
    PeerError::Lost("the link is cut".to_owned())
}

impl Transport for NetworkTransport {
    fn append(
        &self,
        to: Envelope,
        requests: BoxStream<AppendRequest>,
        _: Duration,
    ) -> PeerFuture<BoxStream<Result<AppendResult, PeerError>>> {
        let network = self.0.clone();
        async move {
            let node = network.reach(&to)?;
            let answers = node.raft_receiver().append(requests.map(Ok).boxed());
            Ok(answers.map(move |answer| network.reach(&to).map_err(|_| lost()).and(answer)).boxed())
        }
        .boxed()
    }

    fn heartbeat(&self, to: Envelope, request: AppendRequest, _: Duration) -> PeerFuture<AppendResult> {
        let node = self.0.reach(&to);
        async move { node?.raft_receiver().heartbeat(request).await }.boxed()
    }

    fn vote(&self, to: Envelope, request: VoteRequest, _: Duration) -> PeerFuture<VoteResponse> {
        let node = self.0.reach(&to);
        async move { node?.raft_receiver().vote(request).await }.boxed()
    }

    fn pre_vote(&self, to: Envelope, request: VoteRequest, _: Duration) -> PeerFuture<VoteResponse> {
        let node = self.0.reach(&to);
        async move { node?.raft_receiver().pre_vote(request).await }.boxed()
    }

    fn transfer_leader(
        &self,
        to: Envelope,
        request: TransferLeaderRequest,
        _: Duration,
    ) -> PeerFuture<TransferLeaderResult> {
        let node = self.0.reach(&to);
        async move { node?.raft_receiver().transfer_leader(request).await }.boxed()
    }

    fn snapshot(
        &self,
        to: Envelope,
        leader: Vote,
        snapshot: Arc<StoredSnapshot>,
        _: SnapshotTimeouts,
    ) -> PeerFuture<Vote> {
        let node = self.0.reach(&to);
        async move {
            let node = node?;
            let manifest = snapshot.manifest().encode().into();
            let mut reception = node.raft_receiver().begin_snapshot(leader, manifest).await?;
            let mut reader = snapshot.reader();
            while let Some(chunk) = reader.next().map_err(|error| PeerError::Disk(error.to_string()))? {
                reception.write(chunk).await?;
            }
            reception.install().await
        }
        .boxed()
    }

    fn call(&self, to: Envelope, path: &'static str, body: Bytes, _: Duration) -> PeerFuture<Bytes> {
        let network = self.0.clone();
        async move {
            assert_eq!(path, ASK_PATH);
            let node = network.reach(&to)?;
            node.check_sender(to.sender).map_err(PeerError::Failed)?;
            let request = ControlAskRequest::decode(body).expect("it was encoded here");
            let ask = decode_ask(&request).expect("it was encoded here");
            let answer = encode_answer(&node.answer_ask(ask).await);
            network.reach(&to).map_err(|_| lost())?;
            Ok(answer.encode_to_vec().into())
        }
        .boxed()
    }

    fn call_stream(
        &self,
        to: Envelope,
        path: &'static str,
        bodies: BoxStream<Bytes>,
        _: Duration,
    ) -> PeerFuture<BoxStream<Result<Bytes, PeerError>>> {
        let network = self.0.clone();
        async move {
            assert_eq!(path, FORWARD_PATH);
            if network.mute.load(Ordering::Relaxed) {
                return Ok(bodies.filter_map(|_| std::future::ready(None)).boxed());
            }
            let node = network.reach(&to)?;
            node.check_sender(to.sender).map_err(PeerError::Failed)?;
            let (end, results) = forward_end(bodies.map(ControlForwardBatch::decode).boxed());
            node.serve_forward(end).await.map_err(|_| lost())?;
            let answers = results.map(move |results| {
                network.reach(&to).map_err(|_| lost())?;
                Ok(Bytes::from(results.encode_to_vec()))
            });
            Ok(answers.boxed())
        }
        .boxed()
    }
}

/// Calls by an address alone.
pub struct Dial {
    pub network: Arc<Network>,
    /// The caller's own address.
    pub own: String,
}

impl Dial {
    fn at(&self, url: &str) -> Result<Node, ControlError> {
        let reason = "nobody is there".to_owned();
        self.network.at(url).ok_or(ControlError::Unreachable { to: url.to_owned(), reason })
    }
}

impl Dialer for Dial {
    fn probe<'a>(
        &'a self,
        url: &'a str,
        request: ProbeRequest,
        _: Duration,
    ) -> BoxFuture<'a, Result<ProbeReply, ControlError>> {
        async move {
            self.at(&self.own)?;
            Ok(self.at(url)?.answer_probe(&request))
        }
        .boxed()
    }

    fn join<'a>(
        &'a self,
        url: &'a str,
        request: JoinRequest,
        _: Duration,
    ) -> BoxFuture<'a, Result<Result<JoinReply, JoinRefused>, ControlError>> {
        async move { Ok(self.at(url)?.answer_join(request).await) }.boxed()
    }
}
