//! The seams to other members, over the simulated network: Raft's calls, the
//! control calls, and what reaches a node by its address alone.
//!
//! What each call does at the other end is what the gRPC services do there:
//! the envelope is checked, then the node is asked.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::stream::{Stream, StreamExt as _};
use mainstay::node::carrier::{ASK_PATH, FORWARD_PATH, decode_ask, encode_answer, forward_end};
use mainstay::node::control::{
    ControlError, Dialer, JoinRefused, JoinReply, JoinRequest, ProbeReply, ProbeRequest,
};
use mainstay::raft::{
    AppendRequest, AppendResult, BoxStream, Envelope, PeerError, PeerFuture, Reception, SnapshotTimeouts,
    TransferLeaderRequest, TransferLeaderResult, Transport, Vote, VoteRequest, VoteResponse,
};
use mainstay::storage::snapshot::StoredSnapshot;
use mainstay::wire::peer_v1::{ControlAskRequest, ControlForwardBatch};
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::network::{Call, Direction, Duplex, KEEP_ALIVE_MS, Network, Peer, Way};

/// Where a place is reached.
pub fn url(place: usize) -> String {
    format!("http://n{}", place + 1)
}

fn place(url: &str) -> Option<usize> {
    url.strip_prefix("http://n")?.parse::<usize>().ok()?.checked_sub(1)
}

/// One node's end of the network.
#[derive(Clone)]
pub struct Link {
    pub network: Arc<Network>,
    pub from: usize,
}

/// The answers of a stream. Dropped, it gives the stream up at both ends.
struct Answers<A> {
    from: mpsc::Receiver<Result<A, PeerError>>,
    _alive: DropGuard,
}

impl<A> Stream for Answers<A> {
    type Item = Result<A, PeerError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.from.poll_recv(context)
    }
}

type Served<A> = BoxFuture<'static, Result<BoxStream<Result<A, PeerError>>, PeerError>>;

impl Link {
    fn way(&self, to: &Envelope) -> Option<Way> {
        Some(Way { from: self.from, to: self.network.place_of(to.target)? })
    }

    fn call<T, F, W>(&self, to: Envelope, repeatable: bool, serve: F) -> PeerFuture<T>
    where
        T: Send + 'static,
        F: Fn(Peer) -> W + Send + Sync + 'static,
        W: Future<Output = Result<T, PeerError>> + Send + 'static,
    {
        let (network, way) = (self.network.clone(), self.way(&to));
        async move {
            let way = way.ok_or_else(|| PeerError::NotSent("nobody was ever there".to_owned()))?;
            network.call(Call { way, envelope: Some(to), repeatable }, serve).await
        }
        .boxed()
    }

    /// Opens a stream: a call that sets up the other end, then messages both ways.
    fn stream<Q, A, F>(
        &self,
        to: Envelope,
        requests: BoxStream<Q>,
        serve: F,
    ) -> PeerFuture<BoxStream<Result<A, PeerError>>>
    where
        Q: Send + 'static,
        A: Send + 'static,
        F: Fn(Peer, BoxStream<Q>) -> Served<A> + Send + Sync + 'static,
    {
        let (network, way) = (self.network.clone(), self.way(&to));
        async move {
            let way = way.ok_or_else(|| PeerError::NotSent("nobody was ever there".to_owned()))?;
            let (there, arriving) = Direction::<Q>::new(way);
            let (back, answers) = Direction::new(Way { from: way.to, to: way.from });
            let duplex = Arc::new(Duplex { there, back });
            let arriving = Mutex::new(Some(arriving));
            let (other, net) = (duplex.clone(), network.clone());
            let open = move |peer: Peer| {
                let arriving = arriving.lock().unwrap_or_else(PoisonError::into_inner).take();
                let requests = arriving.map(|arriving| ReceiverStream::new(arriving).boxed());
                let (duplex, network) = (other.clone(), net.clone());
                let served = requests.map(|requests| serve(peer, requests));
                async move {
                    let served = served.ok_or_else(|| PeerError::Failed("opened twice".to_owned()))?;
                    let mut answers = served.await?;
                    tokio::spawn(async move {
                        while let Some(answer) = answers.next().await {
                            if duplex.back.is_over() {
                                return;
                            }
                            duplex.back.send(&network, Some(answer));
                        }
                        duplex.back.send(&network, None);
                    });
                    Ok(())
                }
            };
            // From here on, because the other end may open it and be gone before the answer is here.
            network.watch_over(way, &duplex);
            network.clone().call(Call { way, envelope: Some(to), repeatable: false }, open).await?;
            let alive = CancellationToken::new();
            tokio::spawn(pump(network, duplex, requests, alive.clone()));
            Ok(Answers { from: answers, _alive: alive.drop_guard() }.boxed())
        }
        .boxed()
    }
}

/// Sends what there is to send until either side has enough.
async fn pump<Q: Send + 'static, A: Send + 'static>(
    network: Arc<Network>,
    duplex: Arc<Duplex<Q, A>>,
    mut requests: BoxStream<Q>,
    alive: CancellationToken,
) {
    use crate::network::Breakable as _;
    loop {
        let request = tokio::select! {
            biased;
            () = alive.cancelled() => None,
            request = requests.next() => request,
        };
        let ended = request.is_none();
        if !ended && network.breaks() {
            return duplex.break_off();
        }
        if !duplex.there.is_over() {
            duplex.there.send(&network, request);
        }
        if ended {
            break;
        }
    }
    // The registry holds it weakly: it can break for as long as answers may come.
    alive.cancelled().await;
    duplex.there.send(&network, None);
}

impl Transport for Link {
    fn append(
        &self,
        to: Envelope,
        requests: BoxStream<AppendRequest>,
        _: Duration,
    ) -> PeerFuture<BoxStream<Result<AppendResult, PeerError>>> {
        // What was sent on a connection that broke may arrive late, beside what
        // is sent on the next one: now and then a request comes a second time.
        let late = self.clone();
        let requests = requests.inspect(move |request| late.echo(to, request)).boxed();
        self.stream(to, requests, |peer, requests| {
            let answers = peer.node.raft_receiver().append(requests.map(Ok).boxed());
            async move { Ok(answers) }.boxed()
        })
    }

    fn heartbeat(&self, to: Envelope, request: AppendRequest, _: Duration) -> PeerFuture<AppendResult> {
        self.call(to, true, move |peer| {
            let request = request.clone();
            async move { peer.node.raft_receiver().heartbeat(request).await }
        })
    }

    fn vote(&self, to: Envelope, request: VoteRequest, _: Duration) -> PeerFuture<VoteResponse> {
        let network = self.network.clone();
        self.call(to, true, move |peer| {
            let request = request.clone();
            let network = network.clone();
            async move {
                let candidate = *request.vote.leader_id();
                let response = peer.node.raft_receiver().vote(request).await?;
                if response.vote_granted {
                    network.voted(peer.node.id(), candidate.term, candidate.node_id);
                }
                Ok(response)
            }
        })
    }

    fn pre_vote(&self, to: Envelope, request: VoteRequest, _: Duration) -> PeerFuture<VoteResponse> {
        self.call(to, true, move |peer| {
            let request = request.clone();
            async move { peer.node.raft_receiver().pre_vote(request).await }
        })
    }

    fn transfer_leader(
        &self,
        to: Envelope,
        request: TransferLeaderRequest,
        _: Duration,
    ) -> PeerFuture<TransferLeaderResult> {
        self.call(to, true, move |peer| {
            let request = request.clone();
            async move { peer.node.raft_receiver().transfer_leader(request).await }
        })
    }

    fn snapshot(
        &self,
        to: Envelope,
        leader: Vote,
        snapshot: Arc<StoredSnapshot>,
        timeouts: SnapshotTimeouts,
    ) -> PeerFuture<Vote> {
        let this = self.clone();
        async move {
            let held: Held = Arc::default();
            let manifest = Bytes::from(snapshot.manifest().encode());
            let keep = held.clone();
            let begin = this.call(to, false, move |peer| {
                let (keep, manifest) = (keep.clone(), manifest.clone());
                async move {
                    let begun = peer.node.raft_receiver().begin_snapshot(leader, manifest).await?;
                    *lock(&keep) = Some(begun);
                    Ok(())
                }
            });
            within(timeouts.idle, begin).await?;
            for part in parts(&snapshot)? {
                if this.network.breaks() {
                    return Err(PeerError::Lost("the connection broke".to_owned()));
                }
                let keep = held.clone();
                let write = this.call(to, false, move |_| {
                    let (keep, part) = (keep.clone(), part.clone());
                    async move {
                        let mut reception = take(&keep)?;
                        for chunk in part {
                            reception.write(chunk).await?;
                        }
                        *lock(&keep) = Some(reception);
                        Ok(())
                    }
                });
                within(timeouts.idle, write).await?;
            }
            let install = this.call(to, false, move |_| {
                let reception = take(&held);
                async move { reception?.install().await }
            });
            // Installing takes no virtual time: an answer that does not come was lost with
            // its connection, which is found out sooner than the time to install runs out.
            let found_out = timeouts.install.min(Duration::from_millis(KEEP_ALIVE_MS));
            let installed = within(found_out, install).await;
            if installed.is_ok() {
                this.network.trace.count("snapshots installed");
            }
            installed
        }
        .boxed()
    }

    fn call(&self, to: Envelope, path: &'static str, body: Bytes, _: Duration) -> PeerFuture<Bytes> {
        assert_eq!(path, ASK_PATH, "the one control call there is");
        self.call(to, false, move |peer| {
            let body = body.clone();
            async move {
                peer.node.check_sender(to.sender).map_err(PeerError::Failed)?;
                let request = ControlAskRequest::decode(body).map_err(malformed)?;
                let ask = decode_ask(&request).map_err(malformed)?;
                let answer = encode_answer(&peer.node.answer_ask(ask).await);
                Ok(answer.encode_to_vec().into())
            }
        })
    }

    fn call_stream(
        &self,
        to: Envelope,
        path: &'static str,
        bodies: BoxStream<Bytes>,
        _: Duration,
    ) -> PeerFuture<BoxStream<Result<Bytes, PeerError>>> {
        assert_eq!(path, FORWARD_PATH, "the one control stream there is");
        self.stream(to, bodies, move |peer, bodies| {
            async move {
                peer.node.check_sender(to.sender).map_err(PeerError::Failed)?;
                let (end, results) = forward_end(bodies.map(ControlForwardBatch::decode).boxed());
                peer.node.serve_forward(end).await.map_err(malformed)?;
                Ok(results.map(|results| Ok(Bytes::from(results.encode_to_vec()))).boxed())
            }
            .boxed()
        })
    }
}

impl Link {
    /// Lets a copy of an append arrive later, as a message of its own.
    fn echo(&self, to: Envelope, request: &AppendRequest) {
        if !self.network.echoes() {
            return;
        }
        let (copy, handle) = (request.clone(), tokio::runtime::Handle::current());
        let late = self.call(to, false, move |peer| {
            let copy = copy.clone();
            async move { peer.node.raft_receiver().heartbeat(copy).await }
        });
        let wait = Duration::from_millis(self.network.echo_ms());
        handle.spawn(async move {
            tokio::time::sleep(wait).await;
            let _ = tokio::time::timeout(Duration::from_secs(5), late).await;
        });
    }
}

/// A snapshot's bytes in as many messages whatever it holds. How many files it has, and how large
/// they are, hangs on when RocksDB's own threads compacted, which no seed decides.
fn parts(snapshot: &Arc<StoredSnapshot>) -> Result<[Vec<Bytes>; 8], PeerError> {
    let mut parts: [Vec<Bytes>; 8] = Default::default();
    let mut chunks = Vec::new();
    let mut reader = snapshot.reader();
    while let Some(chunk) = reader.next().map_err(|error| PeerError::Disk(error.to_string()))? {
        chunks.push(chunk);
    }
    let each = chunks.len().div_ceil(parts.len()).max(1);
    for (part, chunks) in parts.iter_mut().zip(chunks.chunks(each)) {
        *part = chunks.to_vec();
    }
    Ok(parts)
}

/// A snapshot's reception, at the receiving node between two messages.
type Held = Arc<Mutex<Option<Reception>>>;

fn lock(held: &Held) -> std::sync::MutexGuard<'_, Option<Reception>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take(held: &Held) -> Result<Reception, PeerError> {
    lock(held).take().ok_or_else(|| PeerError::Failed("the snapshot failed before".to_owned()))
}

fn malformed(error: impl std::fmt::Display) -> PeerError {
    PeerError::Failed(error.to_string())
}

async fn within<T>(limit: Duration, call: PeerFuture<T>) -> Result<T, PeerError> {
    tokio::time::timeout(limit, call).await.unwrap_or(Err(PeerError::Timeout(limit)))
}

impl Link {
    async fn dial<T, F, W>(&self, url: &str, limit: Duration, serve: F) -> Result<T, ControlError>
    where
        T: Send + 'static,
        F: Fn(Peer) -> W + Send + Sync + 'static,
        W: Future<Output = Result<T, PeerError>> + Send + 'static,
    {
        let to = place(url).ok_or_else(|| ControlError::Unreachable {
            to: url.to_owned(),
            reason: "no such address".to_owned(),
        })?;
        let call = Call { way: Way { from: self.from, to }, envelope: None, repeatable: true };
        let answered = within(limit, self.network.clone().call(call, serve).boxed()).await;
        answered.map_err(|error| match error.may_have_happened() {
            true => ControlError::Lost { to: url.to_owned(), reason: error.to_string() },
            false => ControlError::Unreachable { to: url.to_owned(), reason: error.to_string() },
        })
    }
}

impl Dialer for Link {
    fn probe<'a>(
        &'a self,
        url: &'a str,
        request: ProbeRequest,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<ProbeReply, ControlError>> {
        self.dial(url, timeout, move |peer| {
            let reply = peer.node.answer_probe(&request);
            async move { Ok(reply) }
        })
        .boxed()
    }

    fn join<'a>(
        &'a self,
        url: &'a str,
        request: JoinRequest,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<Result<JoinReply, JoinRefused>, ControlError>> {
        self.dial(url, timeout, move |peer| {
            let request = request.clone();
            async move { Ok(peer.node.answer_join(request).await) }
        })
        .boxed()
    }
}
