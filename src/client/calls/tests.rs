//! Calls against answers that the tests make up, in paused time.

use std::collections::VecDeque;

use parking_lot::Mutex;

use super::*;
use crate::client::policy::HedgeDelay;
use crate::resilience::BackoffOptions;
use crate::wire::etcdserverpb::{PutResponse, RangeResponse, ResponseHeader};

const MS: Duration = Duration::from_millis(1);

fn policy() -> PolicyOptions {
    PolicyOptions { backoff: BackoffOptions::exponential(MS, MS), ..PolicyOptions::plain() }
}

fn calls_with(endpoints: &[&str], policy: PolicyOptions) -> Calls {
    let endpoints: Vec<String> = endpoints.iter().map(|address| (*address).to_owned()).collect();
    Calls::new(&endpoints, ClientOptions { policy, ..ClientOptions::default() }).expect("addresses")
}

fn calls(endpoints: &[&str]) -> Calls {
    calls_with(endpoints, policy())
}

/// One answer of the made-up server: after a time, a status or a value.
type Reply = (Duration, Result<RangeResponse, Status>);

/// Answers attempts one after the other, the last answer for ever, and keeps
/// what was sent with them.
struct Server {
    replies: Mutex<VecDeque<Reply>>,
    seen: Mutex<Vec<MetadataMap>>,
}

impl Server {
    fn new(replies: impl IntoIterator<Item = Reply>) -> Server {
        Server { replies: Mutex::new(replies.into_iter().collect()), seen: Mutex::default() }
    }

    fn always(status: Status) -> Server {
        Server::new([(Duration::ZERO, Err(status))])
    }

    async fn ask(&self, calls: &Calls, call: Call) -> Result<RangeResponse, ClientError> {
        calls
            .call(call, (), |_, request| {
                self.seen.lock().push(request.metadata().clone());
                let mut replies = self.replies.lock();
                let reply = if replies.len() > 1 { replies.pop_front() } else { replies.front().cloned() };
                async move {
                    let (after, reply) = reply.expect("there is an answer");
                    tokio::time::sleep(after).await;
                    reply.map(Response::new)
                }
            })
            .await
    }

    fn asked(&self) -> usize {
        self.seen.lock().len()
    }
}

fn of_cluster(cluster_id: u64) -> RangeResponse {
    let header = Some(ResponseHeader { cluster_id, revision: 5, ..ResponseHeader::default() });
    RangeResponse { header, ..RangeResponse::default() }
}

fn ok() -> Reply {
    (Duration::ZERO, Ok(of_cluster(1)))
}

fn late(ms: u32) -> Reply {
    (MS * ms, Ok(of_cluster(1)))
}

fn fails(status: Status) -> Reply {
    (Duration::ZERO, Err(status))
}

fn doubt() -> Status {
    Status::unavailable("etcdserver: leader changed")
}

fn no_leader() -> Status {
    Status::unavailable("etcdserver: no leader")
}

fn session_gone() -> Status {
    Status::failed_precondition("mainstay: session 7 is unknown or has expired; open a new one")
}

fn unconnected() -> Status {
    Status::from_error(Box::new(tonic::ConnectError("refused".into())))
}

/// Calls whose writes carry ids of session 7.
async fn with_session(endpoints: &[&str]) -> Calls {
    let policy = PolicyOptions { request_ids: RequestIds::Auto, attempts_max: 5, ..policy() };
    let calls = calls_with(endpoints, policy);
    let session = OpenSession::new(7, Duration::from_secs(600), calls.env().monotonic());
    let opened = calls.shared.ids.begin(|| async { Ok::<_, Unopened<()>>(session) }).await;
    assert!(opened.is_ok_and(|id| id.is_some()));
    calls
}

fn sequences(server: &Server) -> Vec<String> {
    let sequence = |seen: &MetadataMap| seen.get(names::SEQUENCE).map(|value| format!("{value:?}"));
    server.seen.lock().iter().filter_map(sequence).collect()
}

#[tokio::test(start_paused = true)]
async fn reads_are_repeated_up_to_the_most_attempts() {
    let server = Server::always(doubt());
    let error = server.ask(&calls(&["a:1", "b:1"]), Call::read(None)).await.expect_err("it always fails");
    assert_eq!((server.asked(), error.may_have_happened()), (5, false));
}

#[tokio::test(start_paused = true)]
async fn the_budget_stops_repeating() {
    let budget = crate::resilience::BudgetOptions { milli_tokens_max: 10_000, milli_tokens_per_success: 100 };
    let calls = calls_with(&["a:1"], PolicyOptions { budget, ..policy() });
    let server = Server::always(doubt());
    for _ in 0..3 {
        server.ask(&calls, Call::read(None)).await.expect_err("it always fails");
    }
    let before = server.asked();
    server.ask(&calls, Call::read(None)).await.expect_err("it always fails");
    assert_eq!(server.asked(), before + 1);
}

#[tokio::test(start_paused = true)]
async fn a_write_in_doubt_is_repeated_only_with_a_request_id() {
    let server = Server::always(doubt());
    let calls = calls(&["a:1", "b:1"]);
    let error = server.ask(&calls, Call::write(None)).await.expect_err("it always fails");
    assert_eq!((server.asked(), error.may_have_happened()), (1, true));
    let id = RequestId { session: 1, sequence: 1, acknowledged: 0 };
    server.ask(&calls.with_request_id(id), Call::write(None)).await.expect_err("it always fails");
    assert!(server.asked() > 2);
    let before = server.asked();
    server.ask(&calls, Call::change()).await.expect_err("it always fails");
    assert_eq!(server.asked(), before + 1);
}

#[tokio::test(start_paused = true)]
async fn all_attempts_of_a_write_carry_one_id_and_the_next_write_another() {
    let calls = with_session(&["a:1", "b:1"]).await;
    let server = Server::new([fails(doubt()), fails(unconnected()), fails(no_leader()), ok()]);
    server.ask(&calls, Call::write(None)).await.expect("the fourth attempt works");
    server.ask(&calls, Call::write(None)).await.expect("it works");
    server.ask(&calls, Call::change()).await.expect("it works");
    server.ask(&calls, Call::read(None)).await.expect("it works");
    let sequences = sequences(&server);
    assert_eq!(server.asked(), 7);
    assert_eq!(sequences, ["\"2\"", "\"2\"", "\"2\"", "\"2\"", "\"3\""]);
}

#[tokio::test(start_paused = true)]
async fn a_write_that_was_surely_not_done_is_repeated() {
    let server = Server::always(no_leader());
    let error = server.ask(&calls(&["a:1"]), Call::change()).await.expect_err("it always fails");
    assert_eq!((server.asked(), error.may_have_happened()), (5, false));
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_final_and_keeps_the_endpoint() {
    let calls = calls(&["a:1", "b:1"]);
    let before = calls.route_past(CallKind::Read, None, &[]).address().to_owned();
    let server = Server::always(Status::invalid_argument("no"));
    server.ask(&calls, Call::read(None)).await.expect_err("it is refused");
    assert_eq!(server.asked(), 1);
    assert_eq!(calls.route_past(CallKind::Read, None, &[]).address(), before);
}

/// Whatever the later attempts meet: the first may have been carried out.
#[tokio::test(start_paused = true)]
async fn doubt_outlives_every_later_failure() {
    let laters = [
        no_leader(),
        unconnected(),
        Status::resource_exhausted("etcdserver: too many requests"),
        Status::invalid_argument("etcdserver: request is too large"),
        Status::permission_denied("etcdserver: permission denied"),
        Status::resource_exhausted(
            "mainstay: too many unacknowledged writes in the session; the limit is 1024",
        ),
        session_gone(),
    ];
    for later in laters {
        let calls = with_session(&["a:1", "b:1"]).await;
        let server = Server::new([fails(doubt()), fails(later.clone())]);
        let error = server.ask(&calls, Call::write(None)).await.expect_err("it fails");
        assert!(error.may_have_happened(), "{later:?} made it {error:?}");
        assert!(error.to_string().contains(later.message()), "{error}");
        assert!(sequences(&server).iter().all(|sequence| sequence == "\"2\""), "one id for {later:?}");
    }
}

/// The state machine looks for the request id before it looks at the write.
#[tokio::test(start_paused = true)]
async fn a_refusal_by_the_state_machine_settles_the_doubt() {
    let calls = with_session(&["a:1", "b:1"]).await;
    let gone = Status::not_found("etcdserver: requested lease not found");
    let server = Server::new([fails(doubt()), fails(gone)]);
    let error = server.ask(&calls, Call::write(None)).await.expect_err("it is refused");
    assert!(matches!(error, ClientError::Refused { code: Code::NotFound, .. }), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_session_that_is_gone_from_the_start_is_replaced() {
    // Nobody listens there, so that no new one comes about; but it is asked for.
    let calls = with_session(&["127.0.0.1:1"]).await;
    let server = Server::always(session_gone());
    let error = server.ask(&calls, Call::write(None)).await.expect_err("no new session");
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    assert_eq!((server.asked(), error.may_have_happened()), (1, false));
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_takes_a_write_without_an_id_all_its_time_and_leaves_it_in_doubt() {
    let calls = calls(&["a:1", "b:1"]);
    let server = Server::new([late(1_000_000)]);
    let error = server.ask(&calls, Call::write(None)).await.expect_err("nobody answers");
    assert!(error.may_have_happened() && error.class() == ErrorClass::Timeout, "{error:?}");
    assert_eq!((server.asked(), calls.env().monotonic()), (1, policy().request_timeout));
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_is_left_for_another_and_slow_ones_get_more_time() {
    let calls = calls(&["a:1", "b:1"]);
    let server = Server::new([late(1_000_000), late(4_000)]);
    server.ask(&calls, Call::read(None)).await.expect("the second attempt may take 6 s");
    let took = calls.env().monotonic();
    assert!(server.asked() == 2 && took >= MS * 7_000 && took < MS * 7_010, "{took:?}");
    // What each attempt may take has travelled with it.
    let limits: Vec<String> =
        server.seen.lock().iter().map(|seen| format!("{:?}", seen.get("grpc-timeout"))).collect();
    assert!(limits[0].contains("3000000u") && limits[1].contains("6000000u"), "{limits:?}");
}

#[tokio::test(start_paused = true)]
async fn all_attempts_together_stay_within_the_deadline() {
    let calls = calls(&["a:1", "b:1", "c:1"]);
    let server = Server::new([late(1_000_000)]);
    let error = server.ask(&calls, Call::read(None)).await.expect_err("nobody answers");
    let took = calls.env().monotonic();
    assert!(took <= policy().request_timeout && took > policy().request_timeout - MS * 10, "{took:?}");
    assert_eq!(error.class(), ErrorClass::Timeout);
}

#[tokio::test(start_paused = true)]
async fn when_nobody_can_be_reached_the_error_names_everybody() {
    let server = Server::always(unconnected());
    let calls = calls(&["a:1", "b:1", "c:1"]);
    let error = server.ask(&calls, Call::write(None)).await.expect_err("nobody is there");
    let ClientError::Unreachable { mut endpoints } = error else { panic!("{error:?}") };
    endpoints.sort();
    let addresses: Vec<&str> = endpoints.iter().map(|(address, _)| &address[..]).collect();
    assert_eq!(addresses, ["a:1", "b:1", "c:1"], "three of five attempts go to three endpoints");
    assert!(endpoints.iter().all(|(_, reason)| reason.contains("refused")), "{endpoints:?}");
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_another_cluster_is_never_used() {
    let calls = calls(&["a:1", "b:1"]);
    Server::new([ok()]).ask(&calls, Call::read(None)).await.expect("it pins the cluster");
    assert_eq!(calls.cluster_id(), 1);
    // A read goes on to an endpoint of the right one.
    let server = Server::new([(Duration::ZERO, Ok(of_cluster(2))), ok()]);
    let answer = server.ask(&calls, Call::read(None)).await.expect("the second is ours");
    assert_eq!((answer.cluster_id(), server.asked()), (1, 2));
    // A write may have been carried out there, and is not repeated.
    let server = Server::new([(Duration::ZERO, Ok(of_cluster(2))), ok()]);
    let error = server.ask(&calls, Call::change()).await.expect_err("it is another's");
    let ClientError::WrongCluster { expected: 1, actual: 2, address } = error else { panic!("{error:?}") };
    assert!(address == "a:1" || address == "b:1");
}

#[tokio::test(start_paused = true)]
async fn a_cluster_can_be_pinned_from_the_start() {
    let routing = RoutingOptions { cluster_id: Some(9), ..RoutingOptions::direct() };
    let options = ClientOptions { policy: policy(), routing, ..ClientOptions::default() };
    let calls = Calls::new(&["a:1".to_owned()], options).expect("an address");
    let error = Server::new([ok()]).ask(&calls, Call::change()).await.expect_err("it is another's");
    assert!(matches!(error, ClientError::WrongCluster { expected: 9, actual: 1, .. }), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn the_servers_word_on_waiting_is_kept() {
    let pushback = |value: &str| {
        let mut status = no_leader();
        status.metadata_mut().insert("grpc-retry-pushback-ms", value.parse().expect("ASCII"));
        status
    };
    let calls = calls(&["a:1"]);
    let server = Server::new([fails(pushback("700")), ok()]);
    server.ask(&calls, Call::read(None)).await.expect("the second attempt works");
    assert_eq!(calls.env().monotonic(), MS * 700);
    for never in ["-1", "soon"] {
        let server = Server::new([fails(pushback(never)), ok()]);
        server.ask(&calls, Call::read(None)).await.expect_err("it is not to try again");
        assert_eq!(server.asked(), 1);
    }
    let too_late = Server::new([fails(pushback("60000")), ok()]);
    too_late.ask(&calls, Call::read(None)).await.expect_err("that is after the deadline");
    assert_eq!(calls.env().monotonic(), MS * 700, "and waiting in vain helps nobody");
}

fn hedging(delay: HedgeDelay) -> Calls {
    calls_with(&["a:1", "b:1"], PolicyOptions { hedge: Some(delay), ..policy() })
}

#[tokio::test(start_paused = true)]
async fn a_slow_read_is_asked_of_a_second_endpoint_and_the_first_answer_wins() {
    let calls = hedging(HedgeDelay::Fixed(MS * 50));
    let server = Server::new([late(2_000), late(10)]);
    server.ask(&calls, Call::read(None)).await.expect("the second answers");
    assert_eq!((server.asked(), calls.env().monotonic()), (2, MS * 60));
    let server = Server::new([late(80), late(1_000)]);
    server.ask(&calls, Call::read(None)).await.expect("the first answers");
    assert_eq!((server.asked(), calls.env().monotonic()), (2, MS * 140));
    // One that fails leaves the other its time.
    let server = Server::new([late(80), (MS * 10, Err(doubt()))]);
    server.ask(&calls, Call::read(None)).await.expect("the first answers");
    assert_eq!((server.asked(), calls.env().monotonic()), (2, MS * 220));
}

#[tokio::test(start_paused = true)]
async fn writes_and_quick_reads_are_sent_once() {
    let calls = hedging(HedgeDelay::Fixed(MS * 50));
    let server = Server::new([late(1_000)]);
    server.ask(&calls, Call::write(None)).await.expect("it is late");
    assert_eq!(server.asked(), 1);
    let server = Server::new([late(49)]);
    server.ask(&calls, Call::read(None)).await.expect("it is quick");
    assert_eq!(server.asked(), 1);
}

#[tokio::test(start_paused = true)]
async fn hedges_wait_for_the_percentile_and_stop_with_the_budget() {
    let budget = crate::resilience::BudgetOptions { milli_tokens_max: 10_000, milli_tokens_per_success: 0 };
    let policy = PolicyOptions { hedge: Some(HedgeDelay::Percentile(95)), budget, ..policy() };
    let calls = calls_with(&["a:1", "b:1"], policy);
    let quick = Server::new([late(10)]);
    for _ in 0..100 {
        quick.ask(&calls, Call::read(None)).await.expect("it is quick");
    }
    let slow = Server::new([late(100)]);
    for _ in 0..3 {
        slow.ask(&calls, Call::read(None)).await.expect("it is slow");
    }
    assert_eq!(slow.asked(), 6, "each after 10 ms once more");
    for _ in 0..97 {
        quick.ask(&calls, Call::read(None)).await.expect("it is quick");
    }
    let before = slow.asked();
    for _ in 0..10 {
        slow.ask(&calls, Call::read(None)).await.expect("it is slow");
    }
    assert_eq!(slow.asked(), before + 10 + 2, "five hedges are half the budget");
}

#[tokio::test(start_paused = true)]
async fn a_full_gate_refuses_before_anything_is_sent() {
    let calls = calls_with(&["a:1"], PolicyOptions { in_flight_max: 1, queue_max: 0, ..policy() });
    let server = Server::new([late(100)]);
    let (one, other) =
        tokio::join!(server.ask(&calls, Call::write(None)), server.ask(&calls, Call::write(None)));
    one.expect("it is alone");
    let error = other.expect_err("there is no room");
    assert!(matches!(error, ClientError::Overloaded { .. }) && error.may_retry(), "{error:?}");
    assert!(!error.may_have_happened() && error.class() == ErrorClass::Overloaded && server.asked() == 1);
}

#[tokio::test(start_paused = true)]
async fn pushback_of_an_overloaded_server_makes_this_client_send_less() {
    let calls = calls(&["a:1"]);
    let server = Server::new([fails(Status::resource_exhausted("etcdserver: too many requests")), ok()]);
    server.ask(&calls, Call::write(None)).await.expect("the second attempt works");
    assert_eq!(calls.shared.gate.limit(), 716, "70 % of 1,024");
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_opened_within_a_limit_that_does_not_travel() {
    let calls = calls(&["a:1", "b:1"]);
    let server = Server::new([late(1_000_000), late(10)]);
    server.ask(&calls, Call::read(None).opening()).await.expect("the second attempt works");
    assert!(calls.env().monotonic() < MS * 3_020);
    assert!(server.seen.lock().iter().all(|seen| seen.get("grpc-timeout").is_none()));
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_others_has_no_limit() {
    let server = Server::new([late(1_000_000)]);
    server.ask(&calls(&["a:1"]), Call::change().waiting()).await.expect("it takes its time");
}

#[tokio::test]
async fn metadata_travels_with_each_request() {
    let id = RequestId { session: 7, sequence: 3, acknowledged: 2 };
    let calls = calls(&["a:1"]).with_metadata(names::ACTOR, "ops").expect("ASCII").with_request_id(id);
    let request = calls.request(());
    let value = |name| request.metadata().get(name).and_then(|value| value.to_str().ok().map(str::to_owned));
    assert_eq!(value(names::SESSION).as_deref(), Some("7"));
    assert_eq!(value(names::SEQUENCE).as_deref(), Some("3"));
    assert_eq!(value(names::ACKNOWLEDGED).as_deref(), Some("2"));
    assert_eq!(value(names::ACTOR).as_deref(), Some("ops"));
    assert!(calls.with_metadata(names::ACTOR, "a\nb").is_err());
}

#[tokio::test]
async fn a_client_needs_endpoints_and_sensible_options() {
    assert!(matches!(Calls::new(&[], ClientOptions::default()), Err(ClientError::NoEndpoints)));
    let policy = PolicyOptions { attempts_max: 0, ..PolicyOptions::default() };
    let options = ClientOptions { policy, ..ClientOptions::default() };
    let refused = Calls::new(&["a:1".to_owned()], options);
    assert!(matches!(refused, Err(ClientError::BadOption { option: "policy.attempts_max", .. })));
}

#[test]
fn answers_say_who_gave_them() {
    let header = Some(ResponseHeader { cluster_id: 3, revision: 8, ..ResponseHeader::default() });
    let put = PutResponse { header, ..PutResponse::default() };
    assert_eq!((put.cluster_id(), put.revision().0), (3, 8));
    assert_eq!(PutResponse::default().cluster_id(), 0);
}
