//! The peers' side of Raft as a gRPC service: reads whom a call is for, turns
//! messages into openraft's and back, and leaves the rest to
//! [`Receiver`](crate::raft::Receiver).

use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::raft::{
    self, BoxStream, PEER_MESSAGE_BYTES_MAX, PeerError, Reception, Receiver, envelope_of, status_of,
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
        let receive = async move {
            let outcome = tokio::select! {
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
