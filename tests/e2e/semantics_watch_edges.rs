//! Watches at their edges: ids, cancelling, progress, compaction, fragments,
//! slow readers, a node without a leader.

use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use rustix::process::Signal;
use tonic::Code;

use crate::checks::*;
use crate::cluster::{Spec, on_cluster, on_own_cluster};
use crate::raw::{WatchCreate, WatchRequest};
use crate::semantics_watch::{Watch, key, prefix, told};
use crate::target::{etcd_before, is_etcd};

#[test]
fn automatic_ids_start_at_0_and_step_over_chosen_ones() {
    on_cluster(async |c| {
        let mut watch = Watch::open(c, 0, &[]).await;
        assert_eq!(watch.create(key("a")).await.watch_id, 0);
        assert_eq!(watch.create(WatchCreate { watch_id: 2, ..key("a") }).await.watch_id, 2);
        assert_eq!(watch.create(key("a")).await.watch_id, 1);
        assert_eq!(watch.create(key("a")).await.watch_id, 3);
        watch.cancel(0).await;
        let canceled = watch.next().await;
        assert_eq!((canceled.watch_id, canceled.canceled, canceled.cancel_reason.as_str()), (0, true, ""));
        assert_eq!(watch.create(key("a")).await.watch_id, 4);
    });
}

#[test]
fn an_id_in_use_is_refused_and_the_stream_goes_on() {
    on_cluster(async |c| {
        let p = unique("duplicate");
        let mut watch = Watch::open(c, 1, &[]).await;
        let seven = || WatchCreate { watch_id: 7, ..prefix(&p) };
        assert_eq!(watch.create(seven()).await.watch_id, 7);
        let answer = watch.create(seven()).await;
        assert_eq!((answer.watch_id, answer.created, answer.canceled), (-1, true, true));
        assert_eq!(answer.cancel_reason, "mvcc: duplicate watch ID provided on the WatchStream");
        c.client(0).await.put(format!("{p}k"), "v", None).await.unwrap();
        let message = watch.next().await;
        assert_eq!((message.watch_id, message.events.len()), (7, 1));
        // Cancelled, it may be used again.
        watch.cancel(7).await;
        assert!(watch.next().await.canceled);
        assert!(!watch.create(seven()).await.canceled);
    });
}

#[test]
fn an_empty_range_or_a_negative_start_is_answered_and_the_stream_goes_on() {
    on_cluster(async |c| {
        let p = unique("bad-create");
        let mut watch = Watch::open(c, 2, &[]).await;
        let backwards = WatchCreate { key: b"b".to_vec(), range_end: b"a".to_vec(), ..Default::default() };
        let answer = watch.create(backwards).await;
        assert_eq!((answer.watch_id, answer.canceled), (-1, true));
        assert_eq!(answer.cancel_reason, "mvcc: watcher range is empty");
        if !etcd_before((3, 6)) {
            let answer = watch.create(WatchCreate { start_revision: -1, ..prefix(&p) }).await;
            assert_eq!((answer.watch_id, answer.canceled, answer.compact_revision), (-1, true, 0));
            assert_eq!(answer.cancel_reason, "etcdserver: mvcc: required revision has been compacted");
        }
        watch.send(WatchRequest::default()).await;
        assert!(!watch.create(prefix(&p)).await.canceled);
        c.client(0).await.put(format!("{p}k"), "v", None).await.unwrap();
        assert_eq!(watch.events(1).await.len(), 1);
    });
}

#[test]
fn an_empty_key_watches_from_the_smallest_one() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut watch = Watch::open(c, 0, &[]).await;
        watch.create(WatchCreate { range_end: vec![0], ..Default::default() }).await;
        let mut w = c.client(0).await;
        w.put("a", "v", None).await.unwrap();
        w.put([0u8].to_vec(), "v", None).await.unwrap();
        assert_eq!(watch.events(2).await.len(), 2);
    });
}

#[test]
fn a_cancelled_watch_is_silent_and_an_unknown_cancel_is_not_answered() {
    on_cluster(async |c| {
        let p = unique("cancel");
        let mut w = c.client(0).await;
        let mut watch = Watch::open(c, 1, &[]).await;
        watch.create(prefix(&p)).await;
        watch.cancel(99).await;
        watch.cancel(0).await;
        let answer = watch.next().await;
        assert_eq!((answer.watch_id, answer.canceled, answer.compact_revision), (0, true, 0));
        w.put(format!("{p}k"), "v", None).await.unwrap();
        watch.silent(Duration::from_millis(300)).await;
    });
}

#[test]
fn a_start_below_the_compaction_is_cancelled_with_its_revision() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let mut w = c.client(0).await;
        for i in 0..10 {
            w.put("k", i.to_string(), None).await.unwrap();
        }
        w.compact(6, None).await.unwrap();
        for node in 0..3 {
            revision(&mut c.client(node).await).await;
            let mut watch = Watch::open(c, node, &[]).await;
            assert!(watch.create(WatchCreate { start_revision: 3, ..key("k") }).await.created);
            let canceled = watch.next().await;
            assert_eq!((canceled.watch_id, canceled.canceled, canceled.compact_revision), (0, true, 6));
            assert_eq!(canceled.events.len(), 0);
            // At the compacted revision itself, the story is still whole.
            watch.create(WatchCreate { start_revision: 7, prev_kv: true, ..key("k") }).await;
            let events = watch.events(5).await;
            let revs: Vec<_> = events.iter().map(|e| told(e, "").1).collect();
            assert_eq!(revs, [7, 8, 9, 10, 11]);
            assert_eq!(events[0].prev_kv.as_ref().map(|kv| kv.mod_revision), Some(6));
        }
    });
}

#[test]
fn a_progress_request_is_answered_once_for_the_stream() {
    on_cluster(async |c| {
        let p = unique("progress");
        let mut w = c.client(0).await;
        let mut watch = Watch::open(c, 0, &[]).await;
        watch.create(prefix(&p)).await;
        watch.create(prefix(&p)).await;
        let rev = w.put(format!("{p}k"), "v", None).await.unwrap().header().unwrap().revision();
        assert_eq!(watch.events(2).await.len(), 2);
        if etcd_before((3, 5)) {
            return;
        }
        // Sent only when every watch of the stream is synced, so it may need asking again on old etcd.
        watch.progress().await;
        let notice = watch.next().await;
        assert_eq!(
            (notice.watch_id, notice.events.len(), notice.created, notice.canceled),
            (-1, 0, false, false)
        );
        assert!(notice.revision() >= rev);
        watch.silent(Duration::from_millis(300)).await;
    });
}

#[test]
fn progress_never_overtakes_events() {
    // etcd's issue 15220, fixed in 3.5.8.
    if is_etcd() {
        return;
    }
    on_cluster(async |c| {
        let p = unique("overtake");
        let mut watch = Watch::open(c, 1, &[]).await;
        watch.create(prefix(&p)).await;
        let (mut w, q) = (c.client(0).await, p.clone());
        let writer = tokio::spawn(async move {
            for i in 0..300 {
                w.put(format!("{q}k"), i.to_string(), None).await.unwrap();
            }
        });
        let (mut events, mut promised, mut notices) = (0, 0, 0);
        while events < 300 {
            if events % 10 == 0 {
                watch.progress().await;
            }
            let message = watch.next().await;
            for event in &message.events {
                assert!(told(event, &p).1 > promised, "promised {promised}, then {event:?}");
                events += 1;
            }
            if message.events.is_empty() {
                promised = promised.max(message.revision());
                notices += 1;
            }
        }
        writer.await.unwrap();
        assert!(notices > 0);
    });
}

#[test]
fn progress_notify_tells_an_idle_watcher_where_it_is() {
    if etcd_before((3, 5)) {
        return;
    }
    let name = if is_etcd() && etcd_before((3, 7)) {
        "experimental-watch-progress-notify-interval"
    } else {
        "watch-progress-notify-interval"
    };
    on_own_cluster(Spec::nodes(1).flag(name, "300ms"), async |c| {
        let mut w = c.client(0).await;
        let mut watch = Watch::open(c, 0, &[]).await;
        watch.create(WatchCreate { progress_notify: true, ..prefix("p/") }).await;
        watch.create(prefix("p/")).await;
        for i in 0..5 {
            w.put(format!("elsewhere{i}"), "v", None).await.unwrap();
        }
        let at = revision(&mut w).await;
        loop {
            let notice = watch.next().await;
            assert_eq!((notice.watch_id, notice.events.len()), (0, 0), "only who asked hears of it");
            if notice.revision() >= at {
                break;
            }
        }
    });
}

#[test]
fn fragments_split_a_revision_only_when_asked() {
    on_own_cluster(Spec::nodes(1), async |c| {
        let mut w = c.client(0).await;
        let mut watch = Watch::open(c, 0, &[]).await;
        // Ten puts of 140 kB fit one request; with what was there before they exceed one message,
        // which may be max-request-bytes and 512 KiB.
        let txn = |v: &str| {
            Txn::new().and_then(
                (0..10).map(|i| TxnOp::put(format!("f{i}"), v.repeat(140_000), None)).collect::<Vec<_>>(),
            )
        };
        w.txn(txn("a")).await.unwrap();
        let all = || WatchCreate {
            prev_kv: true,
            key: b"f".to_vec(),
            range_end: b"g".to_vec(),
            ..Default::default()
        };
        watch.create(WatchCreate { fragment: true, ..all() }).await;
        let rev = w.txn(txn("b")).await.unwrap().header().unwrap().revision();
        let mut messages = Vec::new();
        while messages.is_empty() || messages.last().is_some_and(|m: &crate::raw::WatchResponse| m.fragment) {
            messages.push(watch.next().await);
        }
        assert!(messages.len() > 1, "more than one fragment");
        assert!(messages.iter().rev().skip(1).all(|m| m.fragment));
        let events: Vec<_> = messages.iter().flat_map(|m| &m.events).collect();
        assert_eq!(events.len(), 10);
        assert!(events.iter().all(|e| told(e, "").1 == rev));
        let mut whole = Watch::open(c, 0, &[]).await;
        whole.create(WatchCreate { start_revision: rev, ..all() }).await;
        let message = whole.next().await;
        assert_eq!((message.events.len(), message.fragment), (10, false));
    });
}

#[test]
fn a_slow_reader_loses_nothing_and_slows_nobody() {
    on_cluster(async |c| {
        let p = unique("slow");
        let mut w = c.client(0).await;
        let mut slow = Watch::open(c, 1, &[]).await;
        slow.create(prefix(&p)).await;
        // 24 MB: more than any window or buffer on the way holds.
        let started = std::time::Instant::now();
        for i in 0..400 {
            w.put(format!("{p}k"), format!("{i:05}{}", "x".repeat(60_000)), None).await.unwrap();
        }
        assert!(started.elapsed() < Duration::from_secs(60), "writes were slowed: {:?}", started.elapsed());
        let mut seen = 0;
        while seen < 400 {
            for event in slow.next().await.events {
                let value = &event.kv.as_ref().unwrap().value[..5];
                assert_eq!(value, format!("{seen:05}").as_bytes());
                seen += 1;
            }
        }
        w.delete(format!("{p}k"), None).await.unwrap();
    });
}

#[test]
fn a_stream_that_requires_a_leader_ends_when_there_is_none() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let required = [("hasleader", "true".to_owned())];
        let mut strict = Watch::open(c, 0, &required).await;
        let mut lenient = Watch::open(c, 0, &[]).await;
        strict.create(key("k")).await;
        lenient.create(key("k")).await;
        c.nodes[1].kill();
        c.nodes[2].kill();
        let ended = strict.try_next().await.expect_err("no leader, no stream");
        assert_eq!((ended.code(), ended.message()), (Code::Unavailable, "etcdserver: no leader"));
        // A new one is refused at once; a lenient one lives and hears of the next write.
        let mut refused = Watch::open(c, 0, &required).await;
        refused.send(WatchRequest { create: Some(key("k")), ..Default::default() }).await;
        let ended = refused.try_next().await.expect_err("no leader, no stream");
        assert_eq!((ended.code(), ended.message()), (Code::Unavailable, "etcdserver: no leader"));
        c.start_all();
        c.wait_ready().await;
        c.client(1).await.put("k", "v", None).await.unwrap();
        assert_eq!(lenient.events(1).await.len(), 1);
    });
}

#[test]
fn a_watch_resumes_on_another_node_without_a_gap_or_a_repeat() {
    on_own_cluster(Spec::nodes(3), async |c| {
        let mut w = c.client(0).await;
        let (mut seen, mut next) = (Vec::new(), 2);
        for round in 0..4 {
            let node = 1 + round % 2;
            let mut watch = Watch::open(c, node, &[]).await;
            watch.create(WatchCreate { start_revision: next, ..prefix("r/") }).await;
            for i in 0..10 {
                w.put(format!("r/{i}"), round.to_string(), None).await.unwrap();
            }
            for event in watch.events(10).await {
                next = told(&event, "").1 + 1;
                seen.push(next - 1);
            }
            c.nodes[node].signal(Signal::KILL);
            c.nodes[node].kill();
            c.start_all();
            c.wait_ready().await;
        }
        assert_eq!(seen, (2..42).collect::<Vec<_>>());
    });
}
