//! Watches that outlive their connections.
//!
//! Invariant: what has been handed out is everything of the watched keys below
//! `next`, and nothing from it on, so that resuming at `next` neither loses nor
//! repeats an event. (With fragments the last revision may be part way.)

use std::time::Duration;

use futures_util::{Stream, stream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::routing::{CallKind, Route};
use super::{Client, ClientError};
use crate::resilience::Backoff;
use crate::types::{Event, KeyRange, Revision};
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::watch_client::WatchClient;
use crate::wire::etcdserverpb::watch_create_request::FilterType;
use crate::wire::etcdserverpb::watch_request::RequestUnion;
use crate::wire::{convert, event_from_wire};

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
#[derive(Debug)]
pub struct Watch {
    client: Client,
    options: WatchOptions,
    /// The first revision not handed out yet; 0 before the watch was created.
    next: Revision,
    link: Option<Link>,
    backoff: Backoff,
}

/// One connection of a watch. Dropping it ends the watch at the server.
#[derive(Debug)]
struct Link {
    route: Route,
    /// Open for as long as the watch is wanted.
    requests: mpsc::Sender<pb::WatchRequest>,
    responses: Streaming<pb::WatchResponse>,
}

/// The two sides of a stream.
type Opened = (mpsc::Sender<pb::WatchRequest>, Streaming<pb::WatchResponse>);

impl Client {
    /// Starts a watch; returns when the server has it, so that no later change
    /// is missed.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::Compacted`] if the start is forgotten.
    pub async fn watch(&self, options: WatchOptions) -> Result<Watch, ClientError> {
        let next = options.start;
        let backoff = Backoff::new(self.calls.options().backoff);
        let mut watch = Watch { client: self.clone(), options, next, link: None, backoff };
        let limit = self.calls.options().request_timeout;
        match tokio::time::timeout(limit, watch.link()).await {
            Ok(linked) => linked.map(|()| watch),
            Err(_) => {
                Err(ClientError::Unknown { message: format!("no answer within {limit:?}"), write: false })
            }
        }
    }
}

impl Watch {
    /// Asks the server to say soon how far what it has sent reaches; the answer
    /// is a batch without events. Nothing happens while there is no connection,
    /// or while such a request is on its way.
    pub fn request_progress(&self) {
        if let Some(link) = &self.link {
            let request = RequestUnion::ProgressRequest(pb::WatchProgressRequest {});
            let _ = link.requests.try_send(pb::WatchRequest { request_union: Some(request) });
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
            let Some(link) = &mut self.link else { continue };
            match link.responses.message().await {
                Ok(Some(response)) => {
                    if let Some(batch) = self.take(response)? {
                        return Ok(batch);
                    }
                }
                Ok(None) => self.unlink(),
                Err(status) => {
                    let error = ClientError::from_status(status, false);
                    self.unlink();
                    if !error.may_retry() {
                        return Err(error);
                    }
                }
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

    /// Takes a response in; a batch if it has something for the caller.
    fn take(&mut self, response: pb::WatchResponse) -> Result<Option<WatchBatch>, ClientError> {
        let at = Revision(response.header.map_or(0, |header| header.revision));
        if response.canceled {
            self.link = None;
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
        let revision = match events.last() {
            Some(last) => last.kv.mod_revision,
            // A notice promises that everything up to it has been sent.
            None => at,
        };
        self.next = self.next.max(revision.next());
        Ok(Some(WatchBatch { revision, events }))
    }

    /// Makes sure that there is a connection with the watch on it.
    async fn link(&mut self) -> Result<(), ClientError> {
        while self.link.is_none() {
            if self.backoff.failures() > 0 {
                let random = self.client.calls.env().random_u64();
                tokio::time::sleep(self.backoff.next_wait(random).max(Duration::from_millis(1))).await;
            }
            let route = self.client.calls.route(CallKind::Stream, Some(self.options.range.start()));
            match self.open(&route).await {
                Ok((requests, responses)) => {
                    let link = Link { route, requests, responses };
                    self.link = Some(link);
                    self.backoff.reset();
                }
                Err(error) if error.may_retry() => {
                    route.failed();
                    self.backoff.next_wait(0);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn open(&mut self, route: &Route) -> Result<Opened, ClientError> {
        let failed = |status| ClientError::from_status(status, false);
        let lost = || ClientError::Unknown { message: "the stream ended".into(), write: false };
        // The request that creates the watch, and now and then one for progress.
        let (requests, outgoing) = mpsc::channel(2);
        requests.send(self.create_request()).await.map_err(|_| lost())?;
        let outgoing = self.client.calls.request(ReceiverStream::new(outgoing));
        let mut responses = WatchClient::new(route.channel())
            .max_decoding_message_size(usize::MAX)
            .watch(outgoing)
            .await
            .map_err(failed)?
            .into_inner();
        let created = responses.message().await.map_err(failed)?.ok_or_else(lost)?;
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
        Ok((requests, responses))
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
            progress_notify: self.options.progress_notify,
            filters,
            prev_kv: self.options.prev_kv,
            watch_id: 0,
            fragment: false,
        };
        pb::WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
    }

    /// Gives the connection up and goes on to another endpoint.
    fn unlink(&mut self) {
        if let Some(link) = self.link.take() {
            link.route.failed();
        }
        self.backoff.next_wait(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::mvccpb;

    fn watch(start: i64) -> Watch {
        let client = Client::connect(["a:1"]).expect("an address");
        let options =
            WatchOptions { start: Revision(start), ..WatchOptions::new(KeyRange::Single("k".into())) };
        let backoff = Backoff::new(client.calls.options().backoff);
        Watch { client, next: options.start, options, link: None, backoff }
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

    #[tokio::test]
    async fn the_end_says_why() {
        let gone = pb::WatchResponse { canceled: true, compact_revision: 8, ..response(9, &[]) };
        assert!(matches!(watch(2).take(gone), Err(ClientError::Compacted { compact_revision: 8 })));
        let other = pb::WatchResponse { canceled: true, cancel_reason: "no".into(), ..response(9, &[]) };
        assert!(matches!(watch(2).take(other), Err(ClientError::WatchCanceled { .. })));
    }
}
