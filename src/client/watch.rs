//! Watches that outlive their connections.
//!
//! Invariant: what has been handed out is everything of the watched keys below
//! `next`, and nothing from it on, so that resuming at `next` neither loses nor
//! repeats an event. Fragments are never asked for, so that a response does not
//! end inside a revision.
//!
//! Two things tell that a watch must go elsewhere, besides an error: its member
//! has lost the leader (the stream asks to be ended then), or nothing at all
//! came for [`QUIET`] and the answer to a progress request did not come either.
//! That goes through the server's own watching, so it notices more than the
//! connection's keep-alive does: a process that is stopped or stuck, a network
//! that swallows, a proxy that answers for a dead server.

use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{Stream, stream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Streaming};

use super::routing::{CallKind, Route};
use super::{Client, ClientError};
use crate::resilience::{Backoff, BackoffOptions};
use crate::types::{Event, KeyRange, Revision};
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::watch_client::WatchClient;
use crate::wire::etcdserverpb::watch_create_request::FilterType;
use crate::wire::etcdserverpb::watch_request::RequestUnion;
use crate::wire::{convert, event_from_wire, metadata as names};

/// A stream on which nothing came for so long is asked whether it lives.
const QUIET: Duration = Duration::from_secs(5);
/// How long the answer to that may take.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// How long one endpoint may take to accept a watch.
const OPEN_MAX: Duration = Duration::from_secs(5);
/// Waits before reconnecting, drawn evenly from zero to the ceiling: a thousand
/// watches that lost the same member do not come back in one instant.
const RECONNECT: BackoffOptions =
    BackoffOptions::exponential(Duration::from_millis(100), Duration::from_secs(2));
/// How far apart two answers to progress requests have to be, with no event between
/// them, to be believed of an etcd that may answer too early: its loop that brings
/// watches up to date runs every 100 ms.
const SETTLED: Duration = Duration::from_millis(300);
/// The watch id of an answer that is about the whole stream.
const WHOLE_STREAM: i64 = -1;

/// What to watch, and how.
#[derive(Clone, Debug)]
pub struct WatchOptions {
    /// The keys.
    pub range: KeyRange,
    /// The first revision to hear of; 0 is the next one.
    pub start: Revision,
    /// Tell with each event how the key was before.
    pub prev_kv: bool,
    /// Hand out a batch without events now and then while there are none.
    pub progress_notify: bool,
    /// Leave keys that are set out.
    pub no_put: bool,
    /// Leave keys that are removed out.
    pub no_delete: bool,
}

impl WatchOptions {
    /// Watches a range from now on.
    pub fn new(range: KeyRange) -> WatchOptions {
        WatchOptions {
            range,
            start: Revision(0),
            prev_kv: false,
            progress_notify: false,
            no_put: false,
            no_delete: false,
        }
    }
}

/// What a watch brings: whole revisions.
#[derive(Clone, Debug)]
pub struct WatchBatch {
    /// Everything up to this revision has been handed out.
    pub revision: Revision,
    /// The events, in the order of history; none in a progress notice.
    pub events: Vec<Event>,
}

/// A watch.
///
/// ```no_run
/// # use mainstay::client::{Client, ClientError, WatchOptions};
/// # use mainstay::types::KeyRange;
/// # async fn example(client: Client) -> Result<(), ClientError> {
/// let mut watch = client.watch(WatchOptions::new(KeyRange::prefix("config/".into()))).await?;
/// loop {
///     for event in watch.next().await?.events {
///         println!("{:?} {:?}", event.kind, event.kv.key);
///     }
/// }
/// # }
/// ```
pub struct Watch {
    client: Client,
    options: WatchOptions,
    /// The first revision not handed out yet; 0 before the watch was created.
    next: Revision,
    link: LinkState,
    backoff: Backoff,
    /// Endpoints that failed since something last came.
    tried: Vec<String>,
    resumes: u64,
}

/// Kept in the watch, not in the future of [`Watch::next`], so that a caller
/// who drops that future over and over still gets connected.
enum LinkState {
    Down { until: Option<Instant> },
    Opening { route: Route, opening: BoxFuture<'static, Result<Opened, ClientError>> },
    Up(Box<Link>),
}

/// One connection of a watch. Dropping it ends the watch at the server.
struct Link {
    route: Route,
    /// Open for as long as the watch is wanted.
    requests: mpsc::Sender<pb::WatchRequest>,
    responses: Streaming<pb::WatchResponse>,
    /// When something last came.
    heard: Instant,
    /// When the stream was asked whether it lives, if the answer is not there.
    probed: Option<Instant>,
    progress: Progress,
    /// The member may have yet to reach the revision that the watch begins at,
    /// and answers for no progress until then.
    ahead: bool,
}

/// What answers to progress requests, which are about the whole stream, are worth.
///
/// Older versions of etcd may answer ahead of events that are under way. Where
/// the server does not say that it never does, an answer counts when another came
/// after a while, and no event between.
#[derive(Debug, Default)]
struct Progress {
    is_exact: bool,
    /// The caller asked and has no answer.
    asked: bool,
    promised: Option<(Revision, Instant)>,
    /// When to ask again on behalf of the caller.
    again: Option<Instant>,
}

impl Progress {
    fn event_came(&mut self, now: Instant) {
        self.promised = None;
        self.again = (self.asked && !self.is_exact).then_some(now + SETTLED);
    }

    /// Takes an answer in. Gives up to where everything was surely sent.
    fn answered(&mut self, at: Revision, now: Instant) -> Option<Revision> {
        if self.is_exact {
            return Some(at);
        }
        let sure = match self.promised {
            Some((before, then)) if now >= then + SETTLED => Some(before),
            Some(_) => return None,
            None => None,
        };
        self.promised = Some((at, now));
        self.again = (self.asked && sure.is_none()).then_some(now + SETTLED);
        sure
    }
}

/// The two sides of a stream, and the server's first words.
struct Opened {
    is_exact: bool,
    requests: mpsc::Sender<pb::WatchRequest>,
    responses: Streaming<pb::WatchResponse>,
    created: pb::WatchResponse,
}

impl Client {
    /// Starts a watch; returns when the server has it, so that no later change
    /// is missed.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::Compacted`] if the start is forgotten.
    pub async fn watch(&self, options: WatchOptions) -> Result<Watch, ClientError> {
        let mut watch = Watch::new(self.clone(), options);
        let limit = self.calls.options().request_timeout;
        match timeout(limit, watch.link()).await {
            Ok(linked) => linked.map(|()| watch),
            Err(_) => Err(ClientError::timeout(limit, false)),
        }
    }
}

impl Watch {
    /// A watch that connects when it is first asked for something.
    pub(super) fn new(client: Client, options: WatchOptions) -> Watch {
        let (next, link) = (options.start, LinkState::Down { until: None });
        Watch { client, options, next, link, backoff: Backoff::new(RECONNECT), tried: Vec::new(), resumes: 0 }
    }

    /// Asks the server to say soon how far what it has sent reaches; the answer
    /// is a batch without events. Nothing happens while there is no connection,
    /// or while such a request is on its way.
    ///
    /// From Mainstay the answer comes at once. From etcd it takes a moment longer,
    /// because old versions of it answer ahead of events that they have yet to send.
    pub fn request_progress(&mut self) {
        if let LinkState::Up(link) = &mut self.link {
            link.progress.asked |= link.request_progress();
        }
    }

    /// Waits for the next batch, over as many connections as it takes.
    /// Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`ClientError::Compacted`] and [`ClientError::WatchCanceled`] when the
    /// watch has ended, and refusals of the server.
    pub async fn next(&mut self) -> Result<WatchBatch, ClientError> {
        loop {
            self.link().await?;
            let LinkState::Up(link) = &mut self.link else { continue };
            match link.message().await {
                Ok(response) => {
                    self.backoff.reset();
                    self.tried.clear();
                    if let Some(batch) = self.take(response)? {
                        return Ok(batch);
                    }
                }
                Err(error) => self.unlink(error)?,
            }
        }
    }

    /// The watch as a stream, which ends after its first error.
    pub fn into_stream(self) -> impl Stream<Item = Result<WatchBatch, ClientError>> {
        stream::try_unfold(self, |mut watch| async move {
            let batch = watch.next().await?;
            Ok(Some((batch, watch)))
        })
    }

    /// The first revision that has not been handed out yet: where a new watch
    /// would have to start.
    pub fn resume_revision(&self) -> Revision {
        self.next
    }

    /// How often the watch has lost its connection, or failed to get one, and
    /// begun again.
    pub fn resumes(&self) -> u64 {
        self.resumes
    }

    /// Takes a response in; a batch if it has something for the caller.
    fn take(&mut self, response: pb::WatchResponse) -> Result<Option<WatchBatch>, ClientError> {
        let at = Revision(response.header.map_or(0, |header| header.revision));
        if response.canceled {
            self.link = LinkState::Down { until: None };
            if response.compact_revision > 0 {
                return Err(ClientError::Compacted { compact_revision: response.compact_revision });
            }
            return Err(ClientError::WatchCanceled { reason: response.cancel_reason });
        }
        if response.created {
            return Ok(None);
        }
        let events: Option<Vec<Event>> = response.events.into_iter().map(event_from_wire).collect();
        let events = events.ok_or(ClientError::Protocol("an event of an unknown kind"))?;
        let Some(last) = events.last() else { return Ok(self.take_notice(at, response.watch_id)) };
        let revision = last.kv.mod_revision;
        self.next = self.next.max(revision.next());
        if let LinkState::Up(link) = &mut self.link {
            link.progress.event_came(Instant::now());
        }
        Ok(Some(WatchBatch { revision, events }))
    }

    /// Takes a promise in that everything up to `at` was sent.
    fn take_notice(&mut self, at: Revision, watch_id: i64) -> Option<WatchBatch> {
        let (wanted, sure) = match &mut self.link {
            LinkState::Up(link) if watch_id == WHOLE_STREAM => {
                let sure = link.progress.answered(at, Instant::now());
                (sure.is_some() && std::mem::take(&mut link.progress.asked), sure)
            }
            _ => (self.options.progress_notify, Some(at)),
        };
        self.next = self.next.max(sure?.next());
        // A member that is behind may answer with less than is known already.
        wanted.then(|| WatchBatch { revision: self.next.prev(), events: Vec::new() })
    }

    /// Makes sure that there is a connection with the watch on it.
    async fn link(&mut self) -> Result<(), ClientError> {
        loop {
            match &mut self.link {
                LinkState::Up(_) => return Ok(()),
                LinkState::Down { until } => {
                    if let Some(until) = until {
                        sleep_until(*until).await;
                    }
                    let calls = &self.client.calls;
                    let key = Some(&self.options.range.start()[..]);
                    let route = calls.route_past(CallKind::Stream, key, &self.tried);
                    let mut outgoing = calls.request(());
                    // A member that has lost the leader is not to keep the stream.
                    outgoing.metadata_mut().insert("hasleader", AsciiMetadataValue::from_static("true"));
                    let client = WatchClient::new(route.channel()).max_decoding_message_size(usize::MAX);
                    let opening = Box::pin(open(client, outgoing, self.create_request()));
                    self.link = LinkState::Opening { route, opening };
                }
                LinkState::Opening { opening, .. } => match opening.await {
                    Ok(opened) => {
                        if let Err(error) = self.opened(opened) {
                            self.unlink(error)?;
                        }
                    }
                    Err(error) => self.unlink(error)?,
                },
            }
        }
    }

    fn opened(&mut self, opened: Opened) -> Result<(), ClientError> {
        let Opened { is_exact, requests, responses, created } = opened;
        if let LinkState::Opening { route, .. } = &self.link {
            self.client.calls.check(&created, route)?;
        }
        let state = std::mem::replace(&mut self.link, LinkState::Down { until: None });
        let LinkState::Opening { route, .. } = state else { return Ok(()) };
        route.worked();
        let at = Revision(created.header.map_or(0, |header| header.revision));
        let is_created = created.created;
        // A watch that cannot be is answered as created and canceled at once.
        self.take(created)?;
        if !is_created {
            return Err(ClientError::Protocol("a watch that was not created"));
        }
        if self.next.0 == 0 {
            self.next = at.next();
        }
        let (heard, ahead) = (Instant::now(), self.next > at.next());
        let progress = Progress { is_exact, ..Progress::default() };
        let link = Link { route, requests, responses, heard, probed: None, progress, ahead };
        self.link = LinkState::Up(Box::new(link));
        Ok(())
    }

    fn create_request(&self) -> pb::WatchRequest {
        let (key, range_end) = convert::wire_range(self.options.range.clone());
        let mut filters: Vec<i32> = Vec::new();
        if self.options.no_put {
            filters.push(FilterType::Noput.into());
        }
        if self.options.no_delete {
            filters.push(FilterType::Nodelete.into());
        }
        let create = pb::WatchCreateRequest {
            key,
            range_end,
            start_revision: self.next.0,
            // Also where the caller does not want to hear of it: without it a watch
            // of quiet keys would resume at a revision that was long compacted.
            progress_notify: true,
            filters,
            prev_kv: self.options.prev_kv,
            watch_id: 0,
            fragment: false,
        };
        pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
    }

    /// Gives the connection up, and goes on to another endpoint after a while;
    /// an error that trying again does not mend is given back.
    fn unlink(&mut self, error: ClientError) -> Result<(), ClientError> {
        let retry = error.may_retry();
        let wait = self.backoff.next_wait(self.client.calls.env().random_u64());
        let until = Some(Instant::now() + wait).filter(|_| retry);
        let route = match std::mem::replace(&mut self.link, LinkState::Down { until }) {
            LinkState::Opening { route, .. } => Some(route),
            LinkState::Up(link) => Some(link.route),
            LinkState::Down { .. } => None,
        };
        if let Some(route) = route.filter(|_| retry) {
            tracing::debug!(?route, %error, next = %self.next, ?wait, "a watch goes on elsewhere");
            self.resumes += 1;
            route.failed();
            if !self.tried.iter().any(|address| address == route.address()) {
                self.tried.push(route.address().to_owned());
            }
        }
        if retry { Ok(()) } else { Err(error) }
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("options", &self.options)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

impl Link {
    /// The next message. Dropping the future loses nothing.
    async fn message(&mut self) -> Result<pb::WatchResponse, ClientError> {
        let lost = |message: &str| ClientError::lost(message, false);
        loop {
            let quiet = self.probed.map_or(self.heard + QUIET, |probed| probed + ANSWER_MAX);
            let deadline = self.progress.again.map_or(quiet, |again| again.min(quiet));
            // What has come already is looked at first, however late that is.
            match timeout_at(deadline, self.responses.message()).await {
                Ok(Ok(Some(response))) => {
                    (self.heard, self.probed, self.ahead) = (Instant::now(), None, false);
                    return Ok(response);
                }
                Ok(Ok(None)) => return Err(lost("the server ended the stream")),
                Ok(Err(status)) => return Err(ClientError::from_status(status, false)),
                Err(_) if deadline < quiet => {
                    self.progress.again = None;
                    self.request_progress();
                }
                Err(_) if self.ahead => {
                    self.request_progress();
                    self.heard = Instant::now();
                }
                Err(_) if self.probed.is_some() => return Err(lost("the server has fallen silent")),
                Err(_) => {
                    self.request_progress();
                    self.probed = Some(Instant::now());
                }
            }
        }
    }

    /// Whether the request is on its way.
    fn request_progress(&self) -> bool {
        let request = RequestUnion::ProgressRequest(pb::WatchProgressRequest {});
        self.requests.try_send(pb::WatchRequest { request_union: Some(request) }).is_ok()
    }
}

async fn open(
    mut client: WatchClient<Channel>,
    request: Request<()>,
    create: pb::WatchRequest,
) -> Result<Opened, ClientError> {
    let failed = |status| ClientError::from_status(status, false);
    let lost = |message: &str| ClientError::lost(message, false);
    // The request that creates the watch, and now and then one for progress.
    let (requests, outgoing) = mpsc::channel(2);
    requests.send(create).await.map_err(|_| lost("the stream ended"))?;
    let request = request.map(|()| ReceiverStream::new(outgoing));
    let opening = async {
        let answer = client.watch(request).await.map_err(failed)?;
        let is_exact = answer.metadata().contains_key(names::EXACT_PROGRESS);
        let mut responses = answer.into_inner();
        let created = responses.message().await.map_err(failed)?.ok_or_else(|| lost("the stream ended"))?;
        Ok(Opened { is_exact, requests, responses, created })
    };
    timeout(OPEN_MAX, opening).await.unwrap_or_else(|_| Err(lost("the server does not answer")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::mvccpb;

    fn watch(start: i64) -> Watch {
        let client = Client::connect(["a:1"]).expect("an address");
        let options =
            WatchOptions { start: Revision(start), ..WatchOptions::new(KeyRange::Single("k".into())) };
        Watch::new(client, options)
    }

    fn response(at: i64, revisions: &[i64]) -> pb::WatchResponse {
        let event = |revision: &i64| mvccpb::Event {
            r#type: 0,
            kv: Some(mvccpb::KeyValue { key: "k".into(), mod_revision: *revision, ..Default::default() }),
            prev_kv: None,
        };
        pb::WatchResponse {
            header: Some(pb::ResponseHeader { revision: at, ..Default::default() }),
            events: revisions.iter().map(event).collect(),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn it_resumes_after_what_it_has_handed_out() {
        let mut watch = watch(5);
        let batch = watch.take(response(20, &[7, 9])).expect("events").expect("a batch");
        assert_eq!((batch.revision, batch.events.len()), (Revision(9), 2));
        let Some(RequestUnion::CreateRequest(again)) = watch.create_request().request_union else {
            panic!("not a creation")
        };
        assert_eq!(again.start_revision, 10, "not 21: the header is ahead of the events");
    }

    #[tokio::test]
    async fn a_notice_moves_the_start_but_never_back() {
        let mut watch = watch(5);
        watch.take(response(30, &[])).expect("a notice");
        assert_eq!(watch.resume_revision(), Revision(31));
        watch.take(response(12, &[])).expect("a notice");
        assert_eq!(watch.resume_revision(), Revision(31));
    }

    #[tokio::test(start_paused = true)]
    async fn an_early_answer_about_progress_is_not_believed() {
        let mut old = Progress { asked: true, ..Progress::default() };
        let start = Instant::now();
        assert_eq!(old.answered(Revision(9), start), None);
        assert_eq!(old.again, Some(start + SETTLED), "it asks again by itself");
        assert_eq!(old.answered(Revision(10), start + SETTLED / 2), None, "too soon to tell");
        old.event_came(start + SETTLED);
        assert_eq!(old.answered(Revision(10), start + SETTLED * 2), None, "the first was too early");
        assert_eq!(old.answered(Revision(12), start + SETTLED * 3), Some(Revision(10)));
        let mut exact = Progress { is_exact: true, ..Progress::default() };
        assert_eq!(exact.answered(Revision(9), start), Some(Revision(9)));
    }

    #[tokio::test]
    async fn the_end_says_why() {
        let gone = pb::WatchResponse { canceled: true, compact_revision: 8, ..response(9, &[]) };
        assert!(matches!(watch(2).take(gone), Err(ClientError::Compacted { compact_revision: 8 })));
        let other = pb::WatchResponse { canceled: true, cancel_reason: "no".into(), ..response(9, &[]) };
        assert!(matches!(watch(2).take(other), Err(ClientError::WatchCanceled { .. })));
    }
}
