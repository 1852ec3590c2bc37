//! The watching client: one watch at a time, pinned to one node, every response
//! recorded as it came.
//!
//! When the connection breaks, falls silent, or was open long enough, it goes on
//! at another node from the revision after the last it has seen whole, under
//! the same number. It judges nothing and mends nothing: what comes twice, out
//! of order or not at all is left for the checkers to see.

use std::sync::Arc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use mainstay::wire::channel::{ChannelOptions, connect_now};
use mainstay::wire::etcdserverpb::watch_client::WatchClient;
use mainstay::wire::etcdserverpb::watch_create_request::FilterType;
use mainstay::wire::etcdserverpb::watch_request::RequestUnion;
use mainstay::wire::etcdserverpb::{WatchCreateRequest, WatchProgressRequest, WatchRequest, WatchResponse};
use mainstay::wire::metadata::REQUIRE_LEADER;

use crate::client::{event_of_wire, wire_end};
use crate::context::Context;
use crate::judge::history::{Revision, Span, WatchBody, WatchItem, WatchStream};

/// How long connecting to a node may take.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1500);
/// The least and the most time between two connections.
const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How often progress is asked for once there is an end to be reached.
const FINISH_PROGRESS: Duration = Duration::from_millis(250);
/// The largest response taken.
const RESPONSE_BYTES_MAX: usize = 64 << 20;

/// How a stream's `ended` begins when the watcher had seen all it was to see.
const REACHED: &str = "reached revision ";
/// How a stream's `ended` begins when the watcher was stopped before that.
const GAVE_UP: &str = "gave up before revision ";

/// What is watched.
#[derive(Clone, Debug)]
pub struct Wish {
    pub workload: &'static str,
    pub span: Span,
    /// 0: from the moment of creation.
    pub start_revision: Revision,
    pub prev_kv: bool,
    pub no_put: bool,
    pub no_delete: bool,
    pub fragment: bool,
    pub progress_notify: bool,
}

impl Wish {
    /// Every change of `span` from `start_revision` on.
    pub fn new(workload: &'static str, span: Span, start_revision: Revision) -> Wish {
        Wish {
            workload,
            span,
            start_revision,
            prev_kv: false,
            no_put: false,
            no_delete: false,
            fragment: false,
            progress_notify: false,
        }
    }
}

/// How the client behaves.
#[derive(Clone, Debug)]
pub struct Habits {
    /// After so long without any response the connection counts as dead.
    pub silence_max: Duration,
    /// How often it asks for progress by hand.
    pub progress_every: Option<Duration>,
    /// Moves on to another node after about this long.
    pub move_every: Option<Duration>,
    /// Stops reading for this long, after about one response in twenty.
    pub stall: Option<Duration>,
    /// How many unread bytes the server may send it.
    pub window_bytes: u32,
    /// Asks for its stream to be ended when the node has no leader.
    pub require_leader: bool,
}

impl Default for Habits {
    fn default() -> Habits {
        Habits {
            silence_max: Duration::from_secs(3),
            progress_every: Some(Duration::from_secs(1)),
            move_every: None,
            stall: None,
            window_bytes: 2 << 20,
            require_leader: false,
        }
    }
}

/// What a watcher is to reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Goal {
    /// It ends once everything up to here was seen; 0 while there is no end.
    revision: Revision,
    /// It ends at once.
    give_up: bool,
}

/// A watcher at work. Dropped, it ends by itself.
pub struct Watcher {
    /// Its number in the history.
    pub number: u64,
    goal: watch::Sender<Goal>,
    position: watch::Receiver<Option<Revision>>,
    task: JoinHandle<()>,
}

impl Watcher {
    /// Starts watching. The first node and every later choice are drawn from the run's seed.
    pub fn start(context: &Arc<Context>, wish: Wish, habits: Habits) -> Watcher {
        Watcher::start_as(context, context.process(), wish, habits)
    }

    /// As [`Watcher::start`], under a number that means something to the checkers.
    pub fn start_as(context: &Arc<Context>, number: u64, wish: Wish, habits: Habits) -> Watcher {
        let (goal, goal_seen) = watch::channel(Goal::default());
        let seen = (wish.start_revision > 0).then(|| wish.start_revision - 1);
        let (position, position_seen) = watch::channel(seen);
        let client = Client {
            context: context.clone(),
            number,
            wish,
            habits,
            rng: StdRng::seed_from_u64(context.seed ^ number.wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            node: None,
            position,
            goal: goal_seen,
        };
        Watcher { number, goal, position: position_seen, task: tokio::spawn(client.run()) }
    }

    /// Tells others the revision up to which everything was seen; `None` before the first answer to a watch
    /// from now on.
    pub fn follow(&self) -> watch::Receiver<Option<Revision>> {
        self.position.clone()
    }

    /// Lets it end by itself once it has seen everything up to `revision`.
    pub fn aim(&self, revision: Revision) {
        self.goal.send_modify(|goal| goal.revision = revision);
    }

    /// Aims it at `revision`, unless it was aimed before, and waits for its end, but no longer than
    /// `within`: then it is ended. Returns whether it got there.
    ///
    /// # Errors
    /// When its task failed, which is the harness's fault.
    pub async fn finish(self, revision: Revision, within: Duration) -> anyhow::Result<bool> {
        let Watcher { goal, mut task, .. } = self;
        goal.send_if_modified(|goal| {
            let aimless = goal.revision == 0;
            if aimless {
                goal.revision = revision;
            }
            aimless
        });
        if let Ok(ended) = tokio::time::timeout(within, &mut task).await {
            ended?;
            return Ok(true);
        }
        goal.send_modify(|goal| goal.give_up = true);
        task.await?;
        Ok(false)
    }
}

/// Why a connection is not used any longer.
enum Ended {
    /// The watcher has nothing left to do.
    Finished,
    /// It goes on at another node.
    Broken,
}

/// The watcher's own side.
struct Client {
    context: Arc<Context>,
    number: u64,
    wish: Wish,
    habits: Habits,
    rng: StdRng,
    /// The node it was at last.
    node: Option<usize>,
    /// Everything up to here was seen.
    position: watch::Sender<Option<Revision>>,
    goal: watch::Receiver<Goal>,
}

impl Client {
    async fn run(mut self) {
        let mut pause = PAUSE_MIN;
        while !self.done() {
            let node = self.next_node();
            let before = *self.position.borrow();
            if let Ended::Finished = self.watch_at(node).await {
                return;
            }
            // Whoever got somewhere need not wait; nodes that do not answer are not pestered.
            pause = if *self.position.borrow() == before { (pause * 2).min(PAUSE_MAX) } else { PAUSE_MIN };
            let _ = tokio::time::timeout(pause, self.goal.changed()).await;
        }
    }

    /// Whether nothing more is to be seen: the goal is reached, or the watch begins beyond it.
    fn done(&self) -> bool {
        let goal = *self.goal.borrow();
        let reached = self.position.borrow().is_some_and(|seen| seen >= goal.revision);
        let abandoned = self.goal.has_changed().is_err();
        abandoned
            || goal.give_up
            || (goal.revision > 0 && (reached || self.wish.start_revision > goal.revision))
    }

    /// Another node than the last one, mostly a member.
    fn next_node(&mut self) -> usize {
        let mut nodes = self.context.hosts.members();
        if nodes.is_empty() || self.rng.random_bool(0.05) {
            nodes = (0..self.context.hosts.hosts.len()).collect();
        }
        nodes.retain(|node| Some(*node) != self.node);
        let chosen = match nodes.len() {
            0 => self.node.unwrap_or(0),
            count => nodes[self.rng.random_range(0..count)],
        };
        self.node = Some(chosen);
        chosen
    }

    /// One watch on one connection, recorded when it is over.
    async fn watch_at(&mut self, node: usize) -> Ended {
        let (start, context) = (self.position.borrow().map_or(0, |seen| seen + 1), self.context.clone());
        let mut record = WatchStream {
            watcher: self.number,
            node,
            workload: self.wish.workload,
            span: self.wish.span.clone(),
            start_revision: start,
            prev_kv: self.wish.prev_kv,
            no_put: self.wish.no_put,
            no_delete: self.wish.no_delete,
            fragment: self.wish.fragment,
            opened_ns: context.now_ns(),
            items: Vec::new(),
            ended: String::new(),
        };
        let opened = tokio::select! {
            opened = self.open(node, start) => opened,
            () = given_up(self.goal.clone()) => return Ended::Finished,
        };
        let (requests, responses) = match opened {
            Ok(opened) => opened,
            // Nothing was promised yet: nothing to record.
            Err(_) => return Ended::Broken,
        };
        let (ended, why) = self.read(requests, responses, &mut record).await;
        record.ended = why;
        // Without any response nothing was promised: there is nothing to judge.
        if !record.items.is_empty() {
            context.record_watch(record);
        }
        ended
    }

    /// Connects and sends the request; returns once the server has begun to answer.
    async fn open(
        &self,
        node: usize,
        start: Revision,
    ) -> anyhow::Result<(mpsc::Sender<WatchRequest>, Streaming<WatchResponse>)> {
        let options = ChannelOptions {
            connect_timeout: CONNECT_TIMEOUT,
            stream_window_bytes: self.habits.window_bytes,
            connection_window_bytes: self.habits.window_bytes.max(1 << 16),
            ..ChannelOptions::default()
        };
        let channel = connect_now(&self.context.hosts.hosts[node].client_url(), &options).await?;
        let (requests, queue) = mpsc::channel(4);
        requests.try_send(self.create_request(start))?;
        let mut request = tonic::Request::new(ReceiverStream::new(queue));
        if self.habits.require_leader {
            request
                .metadata_mut()
                .insert(REQUIRE_LEADER, tonic::metadata::MetadataValue::from_static("true"));
        }
        let mut client = WatchClient::new(channel).max_decoding_message_size(RESPONSE_BYTES_MAX);
        let answered = tokio::time::timeout(self.habits.silence_max, client.watch(request)).await??;
        Ok((requests, answered.into_inner()))
    }

    fn create_request(&self, start_revision: Revision) -> WatchRequest {
        let wish = &self.wish;
        let mut filters = Vec::new();
        if wish.no_put {
            filters.push(FilterType::Noput as i32);
        }
        if wish.no_delete {
            filters.push(FilterType::Nodelete as i32);
        }
        let create = WatchCreateRequest {
            key: wish.span.key.clone().into_bytes().into(),
            range_end: wire_end(&wish.span),
            start_revision,
            progress_notify: wish.progress_notify,
            filters,
            prev_kv: wish.prev_kv,
            watch_id: 0,
            fragment: wish.fragment,
        };
        WatchRequest { request_union: Some(RequestUnion::CreateRequest(create)) }
    }

    /// Reads until there is a reason to stop.
    async fn read(
        &mut self,
        requests: mpsc::Sender<WatchRequest>,
        mut responses: Streaming<WatchResponse>,
        record: &mut WatchStream,
    ) -> (Ended, String) {
        let opened = Instant::now();
        let move_at =
            self.habits.move_every.map(|every| opened + every.mul_f64(self.rng.random_range(0.5..1.5)));
        let (mut heard, mut asked) = (opened, opened);
        let mut goal = self.goal.clone();
        loop {
            if self.done() {
                return (Ended::Finished, self.farewell());
            }
            let ask_at = self.progress_every().map(|every| asked + every);
            tokio::select! {
                biased;
                _ = goal.changed() => {}
                () = at(move_at) => return (Ended::Broken, "moved to another node".to_owned()),
                () = tokio::time::sleep_until(heard + self.habits.silence_max) => {
                    return (Ended::Broken, format!("silent for {:?}", self.habits.silence_max));
                }
                response = responses.message() => {
                    match response {
                        Ok(Some(response)) => self.take(response, record),
                        Ok(None) => return (Ended::Broken, "ended by the server".to_owned()),
                        Err(status) => return (Ended::Broken, format!("failed: {status}")),
                    }
                    heard = Instant::now();
                    if matches!(record.items.last(), Some(WatchItem { body: WatchBody::Canceled { .. }, .. })) {
                        return (Ended::Broken, "canceled by the server".to_owned());
                    }
                    if self.stall().await {
                        heard = Instant::now();
                    }
                }
                () = at(ask_at) => {
                    asked = Instant::now();
                    // A full queue means that earlier questions are still on their way.
                    let _ = requests.try_send(WatchRequest {
                        request_union: Some(RequestUnion::ProgressRequest(WatchProgressRequest {})),
                    });
                }
            }
        }
    }

    fn progress_every(&self) -> Option<Duration> {
        match self.goal.borrow().revision {
            0 => self.habits.progress_every,
            _ => Some(FINISH_PROGRESS),
        }
    }

    /// Now and then, reads nothing for a while. Not any more once there is an end to be reached.
    async fn stall(&mut self) -> bool {
        match self.habits.stall {
            Some(time) if self.goal.borrow().revision == 0 && self.rng.random_bool(0.05) => {
                let _ = tokio::time::timeout(time, self.goal.changed()).await;
                true
            }
            _ => false,
        }
    }

    fn farewell(&self) -> String {
        let goal = *self.goal.borrow();
        let seen = self.position.borrow().unwrap_or(0);
        match goal.give_up {
            true => format!("{GAVE_UP}{}, at {seen}", goal.revision),
            false => format!("{REACHED}{}", goal.revision),
        }
    }

    /// Records a response, and notes how far everything has been seen.
    fn take(&mut self, response: WatchResponse, record: &mut WatchStream) {
        let revision = response.header.as_ref().map_or(0, |header| header.revision);
        let at_ns = self.context.now_ns();
        let body = body(response);
        let seen = match &body {
            // A watch from now on begins after the revision at which it was made.
            WatchBody::Created if record.start_revision == 0 => Some(revision),
            WatchBody::Created => None,
            // A revision is seen whole with the last of its fragments.
            WatchBody::Events { events, fragment } => {
                events.last().filter(|_| !fragment).map(|event| event.kv.mod_revision)
            }
            WatchBody::Progress => Some(revision),
            // Where the server says that it can be watched from.
            WatchBody::Canceled { compact_revision, .. } => compact_revision.checked_sub(1),
        };
        if let Some(seen) = seen {
            self.position.send_if_modified(|position| {
                let further = position.is_none_or(|position| position < seen) && seen >= 0;
                if further {
                    *position = Some(seen);
                }
                further
            });
        }
        record.items.push(WatchItem { at_ns, revision, body });
    }
}

/// Returns at `deadline`, never without one.
async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// Returns once the watcher shall end at once.
async fn given_up(mut goal: watch::Receiver<Goal>) {
    // An error says that whoever started the watcher is gone, and so is what it was for.
    let _ = goal.wait_for(|goal| goal.give_up).await;
}

fn body(response: WatchResponse) -> WatchBody {
    if response.canceled {
        let WatchResponse { compact_revision, cancel_reason: reason, .. } = response;
        return WatchBody::Canceled { compact_revision, reason };
    }
    if response.created {
        return WatchBody::Created;
    }
    if response.events.is_empty() && !response.fragment {
        return WatchBody::Progress;
    }
    let events = response.events.into_iter().map(event_of_wire).collect();
    WatchBody::Events { events, fragment: response.fragment }
}
