//! Routing in paused time, on clusters that exist only as answers.

use std::collections::BTreeMap;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use super::ask::{Identity, Listed};
use super::*;
use crate::env::SystemEnv;
use crate::resilience::BreakerOptions;

const CLUSTER: u64 = 77;
const SECOND: Duration = Duration::from_secs(1);

/// What answers where.
#[derive(Clone, Debug, Default)]
struct World {
    /// By address; nobody else answers.
    nodes: BTreeMap<String, Node>,
    members: Vec<Listed>,
    leader: u64,
    /// Questions for who answers, and for health.
    asked: u64,
    checked: u64,
}

#[derive(Clone, Debug)]
struct Node {
    cluster: u64,
    member: u64,
    health: EndpointHealth,
    serves_as_learner: bool,
}

#[derive(Clone, Default)]
struct FakeCluster(Arc<Mutex<World>>);

impl FakeCluster {
    /// Members 1 to `count`, each at `n<id>:1`, and the first leads.
    fn of(count: u64) -> FakeCluster {
        let cluster = FakeCluster::default();
        (1..=count).for_each(|id| cluster.join(id));
        cluster.0.lock().leader = 1;
        cluster
    }

    fn join(&self, id: u64) {
        let address = format!("n{id}:1");
        let member = Listed {
            id,
            name: format!("m{id}"),
            client_urls: vec![format!("http://{address}")],
            is_learner: false,
        };
        self.0.lock().members.push(member);
        self.serve(&address, CLUSTER, id);
    }

    fn serve(&self, address: &str, cluster: u64, member: u64) {
        let node = Node { cluster, member, health: EndpointHealth::Serving, serves_as_learner: false };
        self.0.lock().nodes.insert(address.to_owned(), node);
    }

    fn silence(&self, address: &str) {
        self.0.lock().nodes.remove(address);
    }

    fn node(&self, endpoint: &Endpoint) -> Option<Node> {
        let bare = endpoint.address().trim_start_matches("http://");
        self.0.lock().nodes.get(bare).cloned()
    }
}

impl Ask for FakeCluster {
    fn identity(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, Option<Identity>> {
        let leader = {
            let mut world = self.0.lock();
            world.asked += 1;
            world.leader
        };
        let node = self.node(&endpoint);
        async move { node.map(|node| Identity { cluster: node.cluster, member: node.member, leader, term: 1 }) }
            .boxed()
    }

    fn members(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, Option<Vec<Listed>>> {
        let members = self.node(&endpoint).map(|_| self.0.lock().members.clone());
        async move { members }.boxed()
    }

    fn health(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, EndpointHealth> {
        self.0.lock().checked += 1;
        let health = self.node(&endpoint).map_or(EndpointHealth::Unreachable, |node| node.health);
        async move { health }.boxed()
    }

    fn serves_as_learner(&self, endpoint: Arc<Endpoint>) -> BoxFuture<'static, bool> {
        let serves = self.node(&endpoint).is_some_and(|node| node.serves_as_learner);
        async move { serves }.boxed()
    }
}

fn options() -> RoutingOptions {
    let ejection = BreakerOptions { failures_max: 2, ..BreakerOptions::default() };
    RoutingOptions { ejection: Some(ejection), ..RoutingOptions::default() }
}

fn router_with(given: &[&str], options: RoutingOptions, cluster: &FakeCluster) -> Arc<Router> {
    let given: Vec<String> = given.iter().map(|address| (*address).to_owned()).collect();
    let router = Router::new(&given, options, &ChannelOptions::default(), &SystemEnv::shared());
    let mut router = router.expect("good options and addresses");
    router.ask = Arc::new(cluster.clone());
    Arc::new(router)
}

/// A router that has discovered the cluster, and goes on doing so.
async fn started(given: &[&str], options: RoutingOptions, cluster: &FakeCluster) -> Arc<Router> {
    let router = router_with(given, options, cluster);
    router.start();
    router.discovered().await;
    router
}

fn addresses(router: &Router) -> Vec<String> {
    let bare = |status: EndpointStatus| status.address.trim_start_matches("http://").to_owned();
    router.endpoints().into_iter().filter(|status| !status.is_spare).map(bare).collect()
}

/// Where `count` calls of a kind go, each about another key.
fn picked(router: &Arc<Router>, kind: CallKind, count: u32) -> BTreeMap<String, u32> {
    let mut picked = BTreeMap::new();
    for n in 0..count {
        let route = router.pick(kind, Some(&n.to_be_bytes()), &[]);
        *picked.entry(route.address().trim_start_matches("http://").to_owned()).or_insert(0) += 1;
        route.worked();
    }
    picked
}

fn only(picked: &BTreeMap<String, u32>) -> Vec<&str> {
    picked.keys().map(String::as_str).collect()
}

#[tokio::test(start_paused = true)]
async fn one_address_is_enough_to_find_all_members() {
    let cluster = FakeCluster::of(3);
    let router = started(&["n2:1"], options(), &cluster).await;
    assert_eq!(addresses(&router), ["n1:1", "n2:1", "n3:1"]);
    let reads = picked(&router, CallKind::SerializableRead, 3_000);
    assert!(reads.len() == 3 && reads.values().all(|count| *count > 800), "{reads:?}");
    assert_eq!(only(&picked(&router, CallKind::Write, 10)), ["n1:1"], "the leader");
    assert_eq!(only(&picked(&router, CallKind::Read, 10)), ["n1:1"]);
}

#[tokio::test(start_paused = true)]
async fn members_come_and_go() {
    let cluster = FakeCluster::of(2);
    let router = started(&["n1:1"], options(), &cluster).await;
    let stream = router.pick(CallKind::Stream, Some(b"k"), &[]);
    cluster.join(3);
    tokio::time::sleep(SECOND * 35).await;
    assert_eq!(addresses(&router), ["n1:1", "n2:1", "n3:1"]);
    cluster.0.lock().members.retain(|member| member.id != 2);
    tokio::time::sleep(SECOND * 35).await;
    assert_eq!(addresses(&router), ["n1:1", "n3:1"]);
    assert!(!only(&picked(&router, CallKind::Stream, 1_000)).contains(&"n2:1"));
    drop(stream);
}

#[tokio::test(start_paused = true)]
async fn the_same_endpoint_stays_the_same_over_rounds() {
    let cluster = FakeCluster::of(3);
    let router = started(&["n1:1"], options(), &cluster).await;
    let before = router.set.load_full();
    tokio::time::sleep(SECOND * 100).await;
    assert!(*router.rounds.borrow() >= 3);
    assert!(Arc::ptr_eq(&before, &router.set.load_full()));
}

#[tokio::test(start_paused = true)]
async fn addresses_that_only_members_can_reach_change_nothing() {
    // The members tell addresses of their own network; the client comes in through two others.
    let cluster = FakeCluster::of(3);
    (1..=3).for_each(|id| cluster.silence(&format!("n{id}:1")));
    cluster.serve("door1:1", CLUSTER, 1);
    cluster.serve("door2:1", CLUSTER, 2);
    let router = started(&["door1:1", "door2:1"], options(), &cluster).await;
    assert_eq!(addresses(&router), ["door1:1", "door2:1"]);
    assert_eq!(only(&picked(&router, CallKind::SerializableRead, 100)), ["door1:1", "door2:1"]);
    assert_eq!(only(&picked(&router, CallKind::Write, 10)), ["door1:1"], "the leader's door");
}

#[tokio::test(start_paused = true)]
async fn an_address_where_somebody_else_answers_is_not_a_members() {
    // A member tells `localhost`, where the client has another cluster.
    let cluster = FakeCluster::of(2);
    cluster.serve("n2:1", 99, 2);
    cluster.serve("door2:1", CLUSTER, 2);
    let router = started(&["n1:1", "door2:1"], options(), &cluster).await;
    assert_eq!(addresses(&router), ["n1:1", "door2:1"]);
}

#[tokio::test(start_paused = true)]
async fn a_given_address_that_is_no_members_is_a_spare() {
    let cluster = FakeCluster::of(3);
    cluster.serve("proxy:1", CLUSTER, 0);
    let router = started(&["proxy:1"], options(), &cluster).await;
    assert_eq!(addresses(&router), ["n1:1", "n2:1", "n3:1"]);
    assert!(!only(&picked(&router, CallKind::SerializableRead, 300)).contains(&"proxy:1"));
    (1..=3).for_each(|id| cluster.silence(&format!("n{id}:1")));
    tokio::time::sleep(SECOND * 6).await;
    assert_eq!(only(&picked(&router, CallKind::SerializableRead, 300)), ["proxy:1"]);
    assert_eq!(only(&picked(&router, CallKind::Write, 300)), ["proxy:1"]);
    (1..=3).for_each(|id| cluster.serve(&format!("n{id}:1"), CLUSTER, id));
    tokio::time::sleep(SECOND * 6).await;
    assert_eq!(picked(&router, CallKind::SerializableRead, 300).len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_given_address_takes_its_members_place_when_its_own_is_silent() {
    let cluster = FakeCluster::of(3);
    cluster.serve("door3:1", CLUSTER, 3);
    let router = started(&["door3:1"], options(), &cluster).await;
    assert_eq!(addresses(&router), ["n1:1", "n2:1", "n3:1"]);
    cluster.silence("n3:1");
    tokio::time::sleep(SECOND * 35).await;
    assert_eq!(addresses(&router), ["n1:1", "n2:1", "door3:1"]);
    assert_eq!(picked(&router, CallKind::SerializableRead, 300).len(), 3);
    cluster.serve("n3:1", CLUSTER, 3);
    tokio::time::sleep(SECOND * 35).await;
    assert_eq!(addresses(&router), ["n1:1", "n2:1", "n3:1"]);
}

#[tokio::test(start_paused = true)]
async fn another_cluster_is_never_used() {
    let cluster = FakeCluster::of(2);
    cluster.serve("other:1", 99, 1);
    let told = RoutingOptions { cluster_id: Some(CLUSTER), ..options() };
    let router = started(&["other:1", "n1:1"], told, &cluster).await;
    let health = router.endpoints().into_iter().find(|status| status.address == "other:1");
    assert_eq!(health.map(|status| status.health), Some(EndpointHealth::WrongCluster));
    for kind in CallKind::ALL {
        assert!(!only(&picked(&router, kind, 100)).contains(&"other:1"));
    }
    (1..=2).for_each(|id| cluster.silence(&format!("n{id}:1")));
    tokio::time::sleep(SECOND * 60).await;
    assert!(!only(&picked(&router, CallKind::Write, 100)).contains(&"other:1"), "not even then");
}

#[tokio::test(start_paused = true)]
async fn nothing_is_sent_when_all_are_of_another_cluster() {
    let cluster = FakeCluster::of(2);
    let told = RoutingOptions { cluster_id: Some(99), ..options() };
    let router = started(&["n1:1", "n2:1"], told, &cluster).await;
    let route = router.pick(CallKind::Write, None, &[]);
    let Some(ClientError::WrongCluster { expected: 99, actual: CLUSTER, .. }) = route.refusal() else {
        panic!("{:?}", route.refusal())
    };
    // The address is given to another machine, of the right cluster.
    cluster.serve("n1:1", 99, 1);
    tokio::time::sleep(SECOND * 35).await;
    assert_eq!(only(&picked(&router, CallKind::Write, 20)), ["n1:1"]);
    assert!(router.pick(CallKind::Write, None, &[]).refusal().is_none());
}

#[tokio::test(start_paused = true)]
async fn with_nobody_there_it_goes_on_asking_and_finds_them_later() {
    let cluster = FakeCluster::of(3);
    let nodes = std::mem::take(&mut cluster.0.lock().nodes);
    let router = started(&["n1:1", "n2:1"], options(), &cluster).await;
    assert_eq!(only(&picked(&router, CallKind::SerializableRead, 100)), ["n1:1", "n2:1"]);
    tokio::time::sleep(SECOND * 300).await;
    cluster.0.lock().nodes = nodes;
    tokio::time::sleep(SECOND * 35).await;
    assert_eq!(addresses(&router).len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_learner_of_etcd_gets_serializable_reads_only() {
    let cluster = FakeCluster::of(3);
    cluster.0.lock().members[2].is_learner = true;
    let router = started(&["n1:1"], options().with_strategy(Strategy::rendezvous()), &cluster).await;
    assert_eq!(picked(&router, CallKind::SerializableRead, 300).len(), 3);
    for kind in [CallKind::Read, CallKind::Write, CallKind::Stream] {
        assert_eq!(only(&picked(&router, kind, 300)), ["n1:1", "n2:1"], "{kind:?}");
    }
    cluster.0.lock().nodes.get_mut("n3:1").expect("it is there").serves_as_learner = true;
    tokio::time::sleep(SECOND * 35).await;
    assert_eq!(picked(&router, CallKind::Stream, 300).len(), 3, "an observer of Mainstay");
}

#[tokio::test(start_paused = true)]
async fn a_failing_endpoint_is_left_and_probed_by_one_call() {
    let cluster = FakeCluster::of(3);
    let quiet = RoutingOptions { health_interval: None, ..options() };
    let router = started(&["n1:1"], quiet, &cluster).await;
    let mut failures = 0;
    for n in 0..1_000u32 {
        let route = router.pick(CallKind::SerializableRead, Some(&n.to_be_bytes()), &[]);
        if route.address().contains("n3") {
            failures += 1;
            route.failed();
        } else {
            route.worked();
        }
    }
    assert_eq!(failures, 2, "the second failure opens the breaker");
    tokio::time::sleep(SECOND).await;
    let reads = picked(&router, CallKind::SerializableRead, 1);
    assert_eq!(only(&reads), ["n3:1"], "the first call after a while is the probe");
    assert_eq!(picked(&router, CallKind::SerializableRead, 300).len(), 3);
}

#[tokio::test(start_paused = true)]
async fn when_more_than_half_fail_nobody_is_left_out() {
    let cluster = FakeCluster::of(3);
    let router = started(&["n1:1"], options(), &cluster).await;
    cluster.0.lock().nodes.get_mut("n1:1").expect("it is there").health = EndpointHealth::NotServing;
    tokio::time::sleep(SECOND * 6).await;
    assert_eq!(only(&picked(&router, CallKind::SerializableRead, 300)), ["n2:1", "n3:1"]);
    cluster.silence("n2:1");
    tokio::time::sleep(SECOND * 6).await;
    assert_eq!(picked(&router, CallKind::SerializableRead, 300).len(), 3);
    assert!(router.endpoints().iter().all(|status| !status.is_ejected));
}

#[tokio::test(start_paused = true)]
async fn a_call_that_failed_goes_elsewhere() {
    let cluster = FakeCluster::of(3);
    let router = started(&["n1:1"], options(), &cluster).await;
    let mut tried = Vec::new();
    for _ in 0..3 {
        let route = router.pick(CallKind::Write, Some(b"k"), &tried);
        assert!(!tried.contains(&route.address().to_owned()));
        tried.push(route.address().to_owned());
    }
    assert!(tried[0].contains("n1"), "{tried:?}");
    router.pick(CallKind::Write, Some(b"k"), &tried);
}

#[tokio::test(start_paused = true)]
async fn a_new_leader_is_followed() {
    let cluster = FakeCluster::of(3);
    let router = started(&["n1:1"], options(), &cluster).await;
    // Moved: the old one still takes writes, so that no call fails.
    cluster.0.lock().leader = 2;
    tokio::time::sleep(SECOND * 8).await;
    assert_eq!(only(&picked(&router, CallKind::Write, 10)), ["n2:1"]);
    // Lost: said by a call.
    cluster.0.lock().leader = 3;
    router.pick(CallKind::Write, None, &[]).leader_lost();
    tokio::time::sleep(SECOND * 3 / 2).await;
    assert_eq!(only(&picked(&router, CallKind::Write, 10)), ["n3:1"]);
    // Died: its endpoint fails.
    cluster.0.lock().leader = 1;
    let route = router.pick(CallKind::Write, None, &[]);
    route.failed();
    assert!(router.endpoints().iter().all(|status| !status.is_leader));
    tokio::time::sleep(SECOND * 3 / 2).await;
    assert_eq!(only(&picked(&router, CallKind::Write, 10)), ["n1:1"]);
}

#[tokio::test(start_paused = true)]
async fn a_dead_leader_is_not_believed_in_because_the_others_do() {
    let cluster = FakeCluster::of(3);
    let router = started(&["n1:1"], options(), &cluster).await;
    assert_eq!(only(&picked(&router, CallKind::Write, 10)), ["n1:1"]);
    // Until they have elected another, the others go on naming it.
    cluster.silence("n1:1");
    router.pick(CallKind::Write, None, &[]).failed();
    tokio::time::sleep(SECOND * 3 / 2).await;
    assert!(router.endpoints().iter().all(|status| !status.is_leader));
}

#[tokio::test(start_paused = true)]
async fn failing_calls_do_not_ask_for_members_more_than_once_a_second() {
    let cluster = FakeCluster::of(3);
    let router = started(&["n1:1"], options(), &cluster).await;
    let before = *router.rounds.borrow();
    for _ in 0..1_000 {
        router.pick(CallKind::Read, None, &[]).failed();
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let rounds = *router.rounds.borrow() - before;
    assert!((8..=11).contains(&rounds), "{rounds} in ten seconds");
}

#[tokio::test(start_paused = true)]
async fn the_clients_zone_is_preferred_while_it_is_well() {
    let cluster = FakeCluster::of(4);
    let zones = [("m1", "a"), ("m2", "a"), ("n3:", "b"), ("n4:", "b")];
    let zones = zones.map(|(of, zone)| (of.to_owned(), zone.to_owned())).into();
    let router = started(&["n1:1"], RoutingOptions { zones, ..options() }.in_zone("b"), &cluster).await;
    assert_eq!(only(&picked(&router, CallKind::SerializableRead, 300)), ["n3:1", "n4:1"]);
    assert_eq!(only(&picked(&router, CallKind::Stream, 300)), ["n3:1", "n4:1"]);
    assert_eq!(only(&picked(&router, CallKind::Write, 300)), ["n1:1"], "the leader has no zone");
    cluster.silence("n3:1");
    tokio::time::sleep(SECOND * 6).await;
    assert_eq!(only(&picked(&router, CallKind::Stream, 300)), ["n4:1"]);
    cluster.silence("n4:1");
    tokio::time::sleep(SECOND * 6).await;
    assert_eq!(only(&picked(&router, CallKind::Stream, 300)), ["n1:1", "n2:1"]);
    let zone = router.endpoints().into_iter().map(|status| status.zone).collect::<Vec<_>>();
    assert_eq!(zone, ["a", "a", "b", "b"].map(|zone| Some(zone.to_owned())));
}

#[tokio::test(start_paused = true)]
async fn direct_asks_nobody_and_sticks() {
    let cluster = FakeCluster::of(3);
    let router = started(&["n1:1", "n2:1"], RoutingOptions::direct(), &cluster).await;
    tokio::time::sleep(SECOND * 100).await;
    let world = cluster.0.lock().clone();
    assert_eq!((world.asked, world.checked), (0, 0));
    let first = router.pick(CallKind::Read, None, &[]);
    for kind in CallKind::ALL {
        assert_eq!(only(&picked(&router, kind, 20)), [first.address()]);
    }
    first.failed();
    first.failed();
    let second = router.pick(CallKind::Write, None, &[]);
    assert_ne!(second.address(), first.address());
    assert!(router.endpoints().iter().all(|status| !status.is_ejected));
}

#[tokio::test(start_paused = true)]
async fn the_tasks_end_with_the_router() {
    let cluster = FakeCluster::of(3);
    let router = started(&["n1:1"], options(), &cluster).await;
    router.start();
    assert_eq!(router.tasks.lock().len(), 2, "starting twice is starting once");
    let tasks = router.tasks.lock().clone();
    drop(router);
    tokio::task::yield_now().await;
    assert!(tasks.iter().all(AbortHandle::is_finished));
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_is_counted() {
    let cluster = FakeCluster::of(1);
    let router = started(&["n1:1"], options(), &cluster).await;
    let (call, stream) = (router.pick(CallKind::Read, None, &[]), router.pick(CallKind::Stream, None, &[]));
    tokio::time::sleep(Duration::from_millis(50)).await;
    call.worked();
    stream.worked();
    let status = router.endpoints().remove(0);
    assert_eq!((status.in_flight, status.streams, status.picks), (1, 1, 2));
    assert_eq!(status.latency_ewma, Some(Duration::from_millis(50)));
    assert_eq!((status.member_id, status.is_leader, status.name.as_str()), (Some(1), true, "m1"));
    drop((call, stream));
    let status = router.endpoints().remove(0);
    assert_eq!((status.in_flight, status.streams), (0, 0));
}

#[tokio::test]
async fn an_address_given_twice_counts_once() {
    let cluster = FakeCluster::of(1);
    let router = router_with(&["n1:1", "http://N1:1/", "http://n1:1"], options(), &cluster);
    assert_eq!(router.endpoints().len(), 1);
}
