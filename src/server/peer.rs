//! The peers' side of Raft as a gRPC service: reads whom a call is for, turns
//! messages into openraft's and back, and leaves the rest to
//! [`Receiver`].

use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::raft::{
    self, BoxStream, PEER_MESSAGE_BYTES_MAX, PeerError, Receiver, Reception, envelope_of, status_of,
};
use crate::wire::peer_v1::raft_server::{self, RaftServer};
use crate::wire::peer_v1::{
    AppendRequest, AppendResponse, SnapshotChunk, SnapshotProgress, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse, snapshot_chunk, snapshot_progress,
};

/// How long a sender of a snapshot may be silent before it is given up.
const SNAPSHOT_IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Reports that wait for the sender; when it reads none, receiving waits too.
const PROGRESS_QUEUE: usize = 4;

/// The service for the peer listener.
pub fn service(receiver: Arc<Receiver>) -> RaftServer<RaftService> {
    RaftServer::new(RaftService { receiver })
        .max_decoding_message_size(PEER_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(PEER_MESSAGE_BYTES_MAX)
}

/// Raft's calls between members.
pub struct RaftService {
    receiver: Arc<Receiver>,
}

impl RaftService {
    /// The message, if the call is for this node.
    fn open<T>(&self, request: Request<T>) -> Result<T, Status> {
        let envelope = envelope_of(request.metadata())?;
        self.receiver.check(&envelope).map_err(|refusal| status_of(&PeerError::Refused(refusal)))?;
        Ok(request.into_inner())
    }
}

fn answer<T, U>(result: Result<T, PeerError>, encode: impl FnOnce(&T) -> U) -> Result<Response<U>, Status> {
    result.map(|value| Response::new(encode(&value))).map_err(|error| status_of(&error))
}

fn malformed(error: PeerError) -> Status {
    Status::invalid_argument(error.to_string())
}

#[tonic::async_trait]
impl raft_server::Raft for RaftService {
    type AppendStream = BoxStream<Result<AppendResponse, Status>>;
    type InstallSnapshotStream = ReceiverStream<Result<SnapshotProgress, Status>>;

    async fn append(
        &self,
        request: Request<Streaming<AppendRequest>>,
    ) -> Result<Response<Self::AppendStream>, Status> {
        let requests = self.open(request)?;
        let requests = requests.map(|request| match request {
            Ok(request) => raft::parse_append_request(request),
            Err(status) => Err(PeerError::Lost(status.message().to_owned())),
        });
        let answers = self.receiver.append(requests.boxed());
        let answers = answers.map(|result| {
            result.map(|result| raft::append_response(&result)).map_err(|error| status_of(&error))
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn heartbeat(&self, request: Request<AppendRequest>) -> Result<Response<AppendResponse>, Status> {
        let request = raft::parse_append_request(self.open(request)?).map_err(malformed)?;
        answer(self.receiver.heartbeat(request).await, raft::append_response)
    }

    async fn vote(&self, request: Request<VoteRequest>) -> Result<Response<VoteResponse>, Status> {
        let request = raft::parse_vote_request(self.open(request)?).map_err(malformed)?;
        answer(self.receiver.vote(request).await, raft::vote_response)
    }

    async fn pre_vote(&self, request: Request<VoteRequest>) -> Result<Response<VoteResponse>, Status> {
        let request = raft::parse_vote_request(self.open(request)?).map_err(malformed)?;
        answer(self.receiver.pre_vote(request).await, raft::vote_response)
    }

    async fn transfer_leader(
        &self,
        request: Request<TransferLeaderRequest>,
    ) -> Result<Response<TransferLeaderResponse>, Status> {
        let request = raft::parse_transfer_request(self.open(request)?).map_err(malformed)?;
        answer(self.receiver.transfer_leader(request).await, raft::transfer_response)
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<SnapshotChunk>>,
    ) -> Result<Response<Self::InstallSnapshotStream>, Status> {
        let mut chunks = self.open(request)?;
        let reception = begin(&self.receiver, &mut chunks).await.map_err(|error| status_of(&error))?;
        let (reports, stream) = mpsc::channel(PROGRESS_QUEUE);
        // Ends when the sender does, or when the reports have no reader; the
        // install itself is the receiver's task and outlives this one.
        let stopping = self.receiver.stopping().clone();
        let receive = async move {
            let outcome = tokio::select! {
                () = stopping.cancelled() => return,
                outcome = receive(reception, chunks, &reports) => outcome,
                () = reports.closed() => return,
            };
            let last = match outcome {
                Ok(vote) => Ok(progress(snapshot_progress::State::Done(raft::ballot(&vote)))),
                Err(error) => Err(status_of(&error)),
            };
            // Nobody to tell is nothing to do: the sender will find out.
            let _ = reports.send(last).await;
        };
        self.receiver.tasks().spawn(receive);
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

fn progress(state: snapshot_progress::State) -> SnapshotProgress {
    SnapshotProgress { state: Some(state) }
}

/// Reads the header and asks for permission.
async fn begin(receiver: &Receiver, chunks: &mut Streaming<SnapshotChunk>) -> Result<Reception, PeerError> {
    match next(chunks).await? {
        Some(snapshot_chunk::Part::Header(header)) => {
            let (leader, manifest) = raft::parse_snapshot_header(header)?;
            receiver.begin_snapshot(leader, manifest).await
        }
        _ => Err(PeerError::Failed("a snapshot begins with its header".to_owned())),
    }
}

async fn receive(
    mut reception: Reception,
    mut chunks: Streaming<SnapshotChunk>,
    reports: &mpsc::Sender<Result<SnapshotProgress, Status>>,
) -> Result<raft::Vote, PeerError> {
    let gone = || PeerError::Lost("the sender is gone".to_owned());
    while let Some(part) = next(&mut chunks).await? {
        let snapshot_chunk::Part::Content(content) = part else {
            return Err(PeerError::Failed("a second header in one snapshot".to_owned()));
        };
        let received = reception.write(content).await?;
        let report = progress(snapshot_progress::State::ReceivedBytes(received));
        reports.send(Ok(report)).await.map_err(|_| gone())?;
    }
    let installing = snapshot_progress::State::Installing(snapshot_progress::Installing {});
    reports.send(Ok(progress(installing))).await.map_err(|_| gone())?;
    reception.install().await
}

/// The next part, or a timeout when the sender is silent.
async fn next(
    chunks: &mut (impl Stream<Item = Result<SnapshotChunk, Status>> + Unpin),
) -> Result<Option<snapshot_chunk::Part>, PeerError> {
    match tokio::time::timeout(SNAPSHOT_IDLE_TIMEOUT, chunks.next()).await {
        Err(_) => Err(PeerError::Timeout(SNAPSHOT_IDLE_TIMEOUT)),
        Ok(None) => Ok(None),
        Ok(Some(Err(status))) => Err(PeerError::Lost(status.message().to_owned())),
        Ok(Some(Ok(SnapshotChunk { part: Some(part) }))) => Ok(Some(part)),
        Ok(Some(Ok(SnapshotChunk { part: None }))) => Err(PeerError::Failed("an empty chunk".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::net::TcpListener;

    use parking_lot::Mutex;
    use tokio::sync::oneshot;
    use tokio_stream::wrappers::TcpListenerStream;

    use super::*;
    use crate::raft::testing::{CLUSTER, Cluster, Links, eventually, options};
    use crate::raft::{
        Directory, Envelope, GrpcTransport, RaftOptions, Refusal, Transport, Vote, VoteRequest,
    };
    use crate::types::{Member, NodeId};

    /// Real listeners on loopback. They stay bound, so that a node comes back
    /// where it was.
    struct Loopback {
        listeners: HashMap<NodeId, TcpListener>,
        servers: Mutex<HashMap<NodeId, oneshot::Sender<()>>>,
    }

    impl Loopback {
        fn new() -> Loopback {
            let listeners = (1..=3).map(|id| (id, TcpListener::bind("127.0.0.1:0").unwrap()));
            Loopback { listeners: listeners.collect(), servers: Mutex::default() }
        }
    }

    impl Links for Loopback {
        fn transport(&self, directory: Arc<Directory>) -> Arc<dyn Transport> {
            Arc::new(GrpcTransport::new(directory, Duration::from_secs(1)))
        }

        fn urls(&self, id: NodeId) -> Vec<String> {
            vec![format!("http://{}", self.listeners[&id].local_addr().unwrap())]
        }

        fn up(&self, id: NodeId, receiver: Arc<Receiver>) {
            let listener = self.listeners[&id].try_clone().unwrap();
            listener.set_nonblocking(true).unwrap();
            let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
            let server = tonic::transport::Server::builder().add_service(service(receiver));
            let (stop, stopped) = oneshot::channel();
            let stopped = async move { drop(stopped.await) };
            tokio::spawn(
                async move { server.serve_with_incoming_shutdown(incoming, stopped).await.unwrap() },
            );
            self.servers.lock().insert(id, stop);
        }

        fn down(&self, id: NodeId) {
            // Also closes the connections, as the end of a process would.
            drop(self.servers.lock().remove(&id));
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn three_nodes_agree_over_grpc_and_send_a_snapshot() {
        let options = RaftOptions { snapshot_count: 50, log_entries_kept: 5, ..options() };
        let mut cluster = Cluster::start(Arc::new(Loopback::new()), options, Duration::ZERO).await;
        let leader = cluster.put("k000", "v").await;
        let away = (1..=3).find(|id| *id != leader).unwrap();
        cluster.applied(away, 2).await;
        cluster.stop(away).await;
        for number in 0..150 {
            cluster.put(&format!("k{number:03}"), "v").await;
        }
        eventually("the log is purged", || cluster.purged(20)).await;
        cluster.open(away).await;
        let leader = cluster.put("z", "last").await;
        cluster.applied(away, cluster.applied_index(leader)).await;
        assert_eq!(cluster.content(away), cluster.content(leader));
        assert!(cluster.nodes[&away].snapshots.newest().is_some());
        cluster.stop_all().await;
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn every_way_to_fail_is_told_apart() {
        let links = Arc::new(Loopback::new());
        let cluster = Cluster::start(links.clone(), options(), Duration::ZERO).await;
        cluster.put("k", "v").await;
        let directory = Arc::<Directory>::default();
        let transport = GrpcTransport::new(directory.clone(), Duration::from_secs(1));
        let ask = |to: Envelope| {
            let request = VoteRequest::new(Vote::new(0, 9), None);
            transport.pre_vote(to, request, Duration::from_secs(2))
        };
        let to = Envelope { cluster: CLUSTER, target: 2, target_disk: 0, sender: 9 };
        assert!(matches!(ask(to).await, Err(PeerError::NotSent(_))), "no URL is known");
        directory
            .update(2, &Member { peer_urls: vec!["http://127.0.0.1:1".to_owned()], ..Member::default() });
        assert!(matches!(ask(to).await, Err(PeerError::NotSent(_))), "nobody listens");
        // Another URL is used at once.
        directory.update(2, &Member { peer_urls: links.urls(2), ..Member::default() });
        assert!(!ask(to).await.unwrap().vote_granted);
        let refused = PeerError::Refused(Refusal::WrongCluster { actual: CLUSTER });
        assert_eq!(ask(Envelope { cluster: 1, ..to }).await.unwrap_err(), refused);
        let refused = PeerError::Refused(Refusal::WrongDisk { actual: 102 });
        assert_eq!(ask(Envelope { target_disk: 7, ..to }).await.unwrap_err(), refused);
        // One snapshot at a time.
        let receiver = cluster.nodes[&2].handle.receiver();
        let snapshot = cluster.nodes[&1].snapshots.build(&cluster.nodes[&1].handle.live().db()).unwrap();
        let manifest = snapshot.manifest().encode();
        let _held = receiver.begin_snapshot(Vote::new_committed(9, 1), manifest.into()).await.unwrap();
        let timeouts =
            raft::SnapshotTimeouts { idle: Duration::from_secs(2), install: Duration::from_secs(2) };
        let sent = transport.snapshot(to, Vote::new_committed(9, 1), snapshot, timeouts).await;
        assert!(matches!(sent, Err(PeerError::Busy(_))), "{sent:?}");
        // Calls of no service are failures, not crashes.
        let call = transport.call(to, "/no.such/Call", bytes::Bytes::new(), Duration::from_secs(2));
        assert!(matches!(call.await, Err(PeerError::Failed(_))));
        cluster.stop_all().await;
    }
}
