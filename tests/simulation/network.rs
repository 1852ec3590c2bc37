//! The network between nodes: every message is a packet with a time of its own,
//! which may be lost, late, repeated, or overtaken by another.
//!
//! A call is a packet there and one back, and any of them may be lost or come
//! twice where the protocol allows it (`Calls::repeatable`). A stream is what
//! TCP makes of it: in order and without loss for as long as it lives, held up
//! by a cut link until that heals or the stream is given up, and broken at any
//! moment. Nothing is decided here but by the run's chance.

use std::collections::{BTreeMap, BinaryHeap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use mainstay::node::Node;
use mainstay::raft::{Envelope, PeerError};
use mainstay::types::NodeId;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::chance::Chance;
use crate::trace::Trace;

/// Messages that may wait at one end of a stream; a stream that holds more breaks.
const PIPE_MESSAGES_MAX: usize = 8192;
/// How long a stream waits for a cut link before it is given up.
const RETRANSMIT_MS_MAX: u64 = 12_000;
const RETRANSMIT_MS: u64 = 120;
/// How long the end of a stream whose other end fell silent takes to find out:
/// the peers' keep-alive interval and timeout.
pub const KEEP_ALIVE_MS: u64 = 15_000;

/// How messages are treated, per thousand where it is a share.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    pub latency_ms_max: u64,
    pub late: u64,
    pub late_ms_max: u64,
    pub lost: u64,
    pub repeated: u64,
    pub broken: u64,
}

impl Weather {
    /// Quick, and nothing goes wrong.
    pub const FINE: Weather =
        Weather { latency_ms_max: 2, late: 0, late_ms_max: 0, lost: 0, repeated: 0, broken: 0 };
}

/// A node as calls find it.
#[derive(Clone)]
pub struct Peer {
    pub node: Node,
    pub handle: Handle,
}

type Action = Box<dyn FnOnce(&Arc<Network>, Fate) + Send>;

/// What becomes of a packet.
enum Fate {
    /// It has arrived where this node listens, or nobody.
    Arrived(Option<Peer>),
    /// It was sent again and again, and given up.
    GivenUp,
}

struct Packet {
    at_ms: u64,
    number: u64,
    from: usize,
    to: usize,
    /// For a stream's packet: when it was first sent. It waits for a cut link.
    first_ms: Option<u64>,
    action: Action,
}

impl PartialEq for Packet {
    fn eq(&self, other: &Packet) -> bool {
        self.number == other.number
    }
}
impl Eq for Packet {}
impl PartialOrd for Packet {
    fn partial_cmp(&self, other: &Packet) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Packet {
    // The heap gives the greatest first, so the earliest is the greatest.
    fn cmp(&self, other: &Packet) -> std::cmp::Ordering {
        (other.at_ms, other.number).cmp(&(self.at_ms, self.number))
    }
}

/// A stream that can be broken from outside.
pub trait Breakable: Send + Sync {
    /// Ends it at both ends.
    fn break_off(&self);
}

struct State {
    packets: BinaryHeap<Packet>,
    number: u64,
    chance: Chance,
    weather: Weather,
    /// Links that are cut, by direction.
    cut: Vec<(usize, usize)>,
    peers: BTreeMap<usize, Peer>,
    places: BTreeMap<NodeId, usize>,
    streams: Vec<(usize, usize, Weak<dyn Breakable>)>,
    /// Streams whose other end fell silent: when that is found out, and where it was.
    silent: Vec<(u64, usize, Weak<dyn Breakable>)>,
    /// The highest vote that each member gave: term and candidate.
    votes: BTreeMap<NodeId, (u64, NodeId)>,
}

/// The network.
pub struct Network {
    pub trace: Arc<Trace>,
    state: Mutex<State>,
}

/// Where a packet goes.
#[derive(Clone, Copy)]
pub struct Way {
    pub from: usize,
    pub to: usize,
}

impl Way {
    fn back(self) -> Way {
        Way { from: self.to, to: self.from }
    }
}

impl Network {
    /// A network that nobody is attached to.
    pub fn new(trace: Arc<Trace>, chance: Chance) -> Arc<Network> {
        let state = State {
            packets: BinaryHeap::new(),
            number: 0,
            chance,
            weather: Weather::FINE,
            cut: Vec::new(),
            peers: BTreeMap::new(),
            places: BTreeMap::new(),
            streams: Vec::new(),
            silent: Vec::new(),
            votes: BTreeMap::new(),
        };
        Arc::new(Network { trace, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A node can be reached from here on.
    pub fn attach(&self, place: usize, peer: Peer) {
        let refused = {
            let mut state = self.state();
            state.places.insert(peer.node.id(), place);
            state.peers.insert(place, peer);
            // A machine that is back knows nothing of its former connections, and says so.
            state.silent.extract_if(.., |(_, at, _)| *at == place).collect::<Vec<_>>()
        };
        refused.iter().filter_map(|stream| stream.2.upgrade()).for_each(|stream| stream.break_off());
    }

    /// A node is gone. Its streams break at the other end, too, or fall silent if they may.
    pub fn detach(&self, place: usize, may_be_silent: bool) -> Option<Peer> {
        let (gone, broken) = {
            let mut state = self.state();
            let gone = state.peers.remove(&place);
            let silent = may_be_silent && state.chance.permille(500);
            let touches = |(from, to, _): &mut (usize, usize, _)| *from == place || *to == place;
            let ended: Vec<_> = state.streams.extract_if(.., |stream| touches(stream)).collect();
            let found_out_ms = self.trace.now_ms() + KEEP_ALIVE_MS;
            if silent {
                state.silent.extend(ended.iter().map(|stream| (found_out_ms, place, stream.2.clone())));
            }
            let broken: Vec<_> = ended.iter().filter(|_| !silent).filter_map(|s| s.2.upgrade()).collect();
            (gone, broken)
        };
        broken.iter().for_each(|stream| stream.break_off());
        gone
    }

    /// Where a member is, if it was ever attached.
    pub fn place_of(&self, id: NodeId) -> Option<usize> {
        self.state().places.get(&id).copied()
    }

    /// A member gave its vote. Votes only rise (openraft orders them by term and
    /// candidate), whatever the member went through meanwhile.
    pub fn voted(&self, voter: NodeId, term: u64, candidate: NodeId) {
        let given = (term, candidate);
        let highest =
            *self.state().votes.entry(voter).and_modify(|vote| *vote = given.max(*vote)).or_insert(given);
        if highest > given {
            self.trace.violation(format_args!("{voter:x} voted for {given:x?} after {highest:x?}"));
        }
    }

    /// The votes that were given, as the highest of each member.
    pub fn votes(&self) -> BTreeMap<NodeId, (u64, NodeId)> {
        self.state().votes.clone()
    }

    /// Treats messages like this from here on.
    pub fn set_weather(&self, weather: Weather) {
        self.state().weather = weather;
    }

    /// Cuts links, by direction; those that were cut before are whole again.
    pub fn cut(&self, links: Vec<(usize, usize)>) {
        self.state().cut = links;
    }

    /// Breaks every stream on links that are cut, and a share of the others.
    pub fn break_streams(&self, permille: u64) {
        let broken: Vec<_> = {
            let mut state = self.state();
            let State { streams, chance, .. } = &mut *state;
            streams.retain(|stream| stream.2.strong_count() > 0);
            let broken = streams.iter().filter(|_| chance.permille(permille));
            broken.filter_map(|stream| stream.2.upgrade()).collect()
        };
        broken.iter().for_each(|stream| stream.break_off());
    }

    /// Hands out everything that is due.
    pub fn deliver(self: &Arc<Network>, now_ms: u64) {
        let found_out: Vec<_> = self.state().silent.extract_if(.., |(at_ms, ..)| *at_ms <= now_ms).collect();
        found_out.iter().filter_map(|stream| stream.2.upgrade()).for_each(|stream| stream.break_off());
        loop {
            let (packet, fate) = {
                let mut state = self.state();
                if state.packets.peek().is_none_or(|packet| packet.at_ms > now_ms) {
                    return;
                }
                let Some(mut packet) = state.packets.pop() else { return };
                if state.cut.contains(&(packet.from, packet.to)) {
                    match packet.first_ms {
                        // TCP sends it again; the order is kept at the other end.
                        Some(first) if now_ms < first + RETRANSMIT_MS_MAX => {
                            packet.at_ms = now_ms + RETRANSMIT_MS + state.chance.below(RETRANSMIT_MS);
                            state.packets.push(packet);
                            continue;
                        }
                        Some(_) => (packet, Fate::GivenUp),
                        None => continue,
                    }
                } else {
                    let peer = state.peers.get(&packet.to).cloned();
                    (packet, Fate::Arrived(peer))
                }
            };
            self.trace.fold(packet.number ^ (packet.from as u64) << 40 ^ (packet.to as u64) << 48);
            (packet.action)(self, fate);
        }
    }

    fn send(&self, way: Way, at_ms: u64, first_ms: Option<u64>, action: Action) {
        let mut state = self.state();
        state.number += 1;
        let number = state.number;
        state.packets.push(Packet { at_ms, number, from: way.from, to: way.to, first_ms, action });
    }

    fn latency(&self) -> u64 {
        let mut state = self.state();
        let weather = state.weather;
        let latency = state.chance.between(0, weather.latency_ms_max);
        match state.chance.permille(weather.late) {
            true => latency + state.chance.below(weather.late_ms_max + 1),
            false => latency,
        }
    }

    fn happens(&self, share: impl FnOnce(&Weather) -> u64) -> bool {
        let mut state = self.state();
        let share = share(&state.weather);
        state.chance.permille(share)
    }

    /// Sends something that may be lost. True when it was sent.
    fn send_loosely(&self, way: Way, action: Action) -> bool {
        if self.happens(|weather| weather.lost) {
            self.trace.count("messages lost");
            return false;
        }
        let at_ms = self.trace.now_ms() + self.latency();
        self.send(way, at_ms, None, action);
        true
    }
}

type Answer<T> = Result<T, PeerError>;
type Waiting<T> = Arc<Mutex<Option<tokio::sync::oneshot::Sender<Answer<T>>>>>;

fn answer<T>(waiting: &Waiting<T>, answer: Answer<T>) {
    let waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(waiting) = waiting {
        let _ = waiting.send(answer);
    }
}

/// One call.
pub struct Call {
    pub way: Way,
    /// What the other end checks first; `None` where only an address is known.
    pub envelope: Option<Envelope>,
    /// Whether it may arrive twice.
    pub repeatable: bool,
}

impl Network {
    /// Makes a call and waits for its answer, for ever if one of the two is lost.
    pub async fn call<T, F, W>(self: Arc<Network>, call: Call, serve: F) -> Answer<T>
    where
        T: Send + 'static,
        F: Fn(Peer) -> W + Send + Sync + 'static,
        W: Future<Output = Answer<T>> + Send + 'static,
    {
        let (tell, told) = tokio::sync::oneshot::channel();
        let waiting: Waiting<T> = Arc::new(Mutex::new(Some(tell)));
        let Call { way, envelope, repeatable } = call;
        let serve = Arc::new(serve);
        let times = if repeatable && self.happens(|weather| weather.repeated) { 2 } else { 1 };
        if times == 2 {
            self.trace.count("messages repeated");
        }
        for _ in 0..times {
            let (waiting, serve) = (waiting.clone(), serve.clone());
            let arrive: Action = Box::new(move |network, fate| {
                let Fate::Arrived(Some(peer)) = fate else {
                    let refused = PeerError::NotSent("nobody listens there".to_owned());
                    return network.reply(way, &waiting, Err(refused));
                };
                let network = network.clone();
                peer.handle.clone().spawn(async move {
                    let checked = match &envelope {
                        Some(envelope) => peer.node.raft_receiver().check(envelope),
                        None => Ok(()),
                    };
                    let result = match checked {
                        Ok(()) => serve(peer).await,
                        Err(refusal) => Err(refusal.into()),
                    };
                    network.reply(way, &waiting, result);
                });
            });
            self.send_loosely(way, arrive);
        }
        drop(waiting);
        match told.await {
            Ok(answer) => answer,
            // It is lost, and the caller's deadline is what ends the waiting.
            Err(_) => std::future::pending().await,
        }
    }

    fn reply<T: Send + 'static>(self: &Arc<Network>, way: Way, waiting: &Waiting<T>, result: Answer<T>) {
        let waiting = waiting.clone();
        self.send_loosely(way.back(), Box::new(move |_, _| answer(&waiting, result)));
    }
}

/// One direction of a stream, as its receiving end sees it.
struct Pipe<T> {
    to: Option<mpsc::Sender<T>>,
    /// Number of the next message to hand over; later ones wait in `early`.
    next: u64,
    early: BTreeMap<u64, Option<T>>,
}

/// One direction of a stream: numbers what it sends, hands over in that order.
pub struct Direction<T> {
    way: Way,
    sent: AtomicU64,
    last_ms: AtomicU64,
    pipe: Mutex<Pipe<T>>,
    /// The stream that it belongs to.
    whole: OnceLock<Weak<dyn Breakable>>,
}

impl<T: Send + 'static> Direction<T> {
    pub fn new(way: Way) -> (Arc<Direction<T>>, mpsc::Receiver<T>) {
        let (to, from) = mpsc::channel(PIPE_MESSAGES_MAX);
        let pipe = Mutex::new(Pipe { to: Some(to), next: 0, early: BTreeMap::new() });
        let (sent, last_ms) = (AtomicU64::new(0), AtomicU64::new(0));
        (Arc::new(Direction { way, sent, last_ms, pipe, whole: OnceLock::new() }), from)
    }

    fn pipe(&self) -> MutexGuard<'_, Pipe<T>> {
        self.pipe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a message, or with `None` the end.
    pub fn send(self: &Arc<Self>, network: &Arc<Network>, message: Option<T>) {
        let number = self.sent.fetch_add(1, Ordering::Relaxed);
        let now_ms = network.trace.now_ms();
        let at_ms = (now_ms + network.latency()).max(self.last_ms.load(Ordering::Relaxed));
        self.last_ms.store(at_ms, Ordering::Relaxed);
        let this = self.clone();
        let arrive: Action = Box::new(move |_, fate| match fate {
            Fate::Arrived(_) => this.arrive(number, message),
            Fate::GivenUp => {
                let whole = this.whole.get().and_then(Weak::upgrade);
                whole.iter().for_each(|stream| stream.break_off());
                this.end(None);
            }
        });
        network.send(self.way, at_ms, Some(now_ms), arrive);
    }

    fn arrive(&self, number: u64, message: Option<T>) {
        let mut pipe = self.pipe();
        pipe.early.insert(number, message);
        loop {
            let next = pipe.next;
            let Some(message) = pipe.early.remove(&next) else { return };
            pipe.next += 1;
            let sent = match (&pipe.to, message) {
                (Some(to), Some(message)) => to.try_send(message).is_ok(),
                _ => false,
            };
            if !sent {
                pipe.to = None;
            }
        }
    }

    /// Whether nobody takes anything any more.
    pub fn is_over(&self) -> bool {
        self.pipe().to.as_ref().is_none_or(mpsc::Sender::is_closed)
    }

    /// Ends it at once, after `last` if that is given.
    pub fn end(&self, last: Option<T>) {
        let to = self.pipe().to.take();
        if let (Some(to), Some(last)) = (to, last) {
            let _ = to.try_send(last);
        }
    }
}

/// Both directions of a stream.
pub struct Duplex<Q, A> {
    pub there: Arc<Direction<Q>>,
    pub back: Arc<Direction<Answer<A>>>,
}

impl<Q: Send + 'static, A: Send + 'static> Breakable for Duplex<Q, A> {
    fn break_off(&self) {
        self.there.end(None);
        self.back.end(Some(Err(PeerError::Lost("the connection broke".to_owned()))));
    }
}

impl Network {
    /// Registers a stream, so that it can break.
    pub fn watch_over<Q: Send + 'static, A: Send + 'static>(&self, way: Way, stream: &Arc<Duplex<Q, A>>) {
        let weak: Weak<dyn Breakable> = Arc::downgrade(&(stream.clone() as Arc<dyn Breakable>));
        // Set once: a stream is registered before it opens.
        let _ = (stream.there.whole.set(weak.clone()), stream.back.whole.set(weak.clone()));
        self.state().streams.push((way.from, way.to, weak));
    }

    /// Whether a message that is sent now takes its stream with it.
    pub fn breaks(&self) -> bool {
        let broken = self.happens(|weather| weather.broken);
        if broken {
            self.trace.count("streams broken");
        }
        broken
    }
}

impl Network {
    /// Whether an append comes a second time.
    pub fn echoes(&self) -> bool {
        let echoes = self.happens(|weather| weather.repeated);
        if echoes {
            self.trace.count("appends repeated");
        }
        echoes
    }

    /// How much later it does.
    pub fn echo_ms(&self) -> u64 {
        self.state().chance.between(1, 400)
    }
}
