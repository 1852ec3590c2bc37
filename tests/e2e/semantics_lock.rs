//! Lock and Election: keys under the name, in the order of creation, bound to leases.

use std::time::Duration;

use etcd_client::{
    CampaignResponse, Client, GetOptions, LeaderKey, LockOptions, ProclaimOptions, ResignOptions, SortOrder,
    SortTarget,
};
use tonic::Code;

use crate::checks::*;
use crate::cluster::{connect_patient, on_cluster};

async fn lease(client: &mut Client) -> i64 {
    client.lease_grant(600, None).await.unwrap().id()
}

fn key_of(campaign: &CampaignResponse) -> LeaderKey {
    campaign.leader().unwrap().clone()
}

/// etcd loses the code on its way through the lock service and keeps the message, which clients compare.
fn lease_not_found(status: tonic::Status) {
    assert!(matches!(status.code(), Code::NotFound | Code::Unknown), "{status:?}");
    assert_eq!(status.message(), "etcdserver: requested lease not found");
}

#[test]
fn a_lock_is_a_key_named_by_its_lease() {
    on_cluster(async |c| {
        let name = unique("lock-key") + "l";
        let mut client = c.client(0).await;
        let id = lease(&mut client).await;
        let lock = client.lock(name.as_str(), Some(LockOptions::new().with_lease(id))).await.unwrap();
        assert_eq!(lock.key(), format!("{name}/{id:x}").as_bytes());
        let kv = get_one(&mut c.client(1).await, std::str::from_utf8(lock.key()).unwrap()).await.unwrap();
        assert_eq!((kv.lease(), kv.value(), kv.version()), (id, &b""[..], 1));
        // The same lease holds it already.
        let again = client.lock(name.as_str(), Some(LockOptions::new().with_lease(id))).await.unwrap();
        assert_eq!(again.key(), lock.key());
        client.unlock(lock.key().to_vec()).await.unwrap();
        assert!(get_one(&mut client, std::str::from_utf8(lock.key()).unwrap()).await.is_none());
        client.lease_revoke(id).await.unwrap();
    });
}

#[test]
fn a_lock_without_a_lease_gets_one_of_its_own() {
    on_cluster(async |c| {
        let name = unique("lock-own") + "l";
        let mut client = c.client(1).await;
        let lock = client.lock(name.as_str(), None).await.unwrap();
        let kv = get_one(&mut client, std::str::from_utf8(lock.key()).unwrap()).await.unwrap();
        let told = client.lease_time_to_live(kv.lease(), None).await.unwrap();
        assert_eq!(told.granted_ttl(), 60);
        client.lease_revoke(kv.lease()).await.unwrap();
    });
}

#[test]
fn waiters_get_the_lock_in_the_order_they_came() {
    on_cluster(async |c| {
        let name = unique("lock-order") + "l";
        let mut held = Vec::new();
        let mut first = c.client(0).await;
        let id = lease(&mut first).await;
        let lock = first.lock(name.as_str(), Some(LockOptions::new().with_lease(id))).await.unwrap();
        held.push(id);
        let (done, mut order) = tokio::sync::mpsc::channel(8);
        for waiter in 0..4_usize {
            let mut client = connect_patient(&[c.nodes[waiter % 3].url()]).await;
            let id = lease(&mut client).await;
            held.push(id);
            let (name, done) = (name.clone(), done.clone());
            let asked = name.clone();
            tokio::spawn(async move {
                let lock = client.lock(name.as_str(), Some(LockOptions::new().with_lease(id))).await.unwrap();
                done.send(waiter).await.unwrap();
                client.unlock(lock.key().to_vec()).await.unwrap();
            });
            eventually("the waiter stands in the queue", SOON, async || {
                let queue =
                    first.get(format!("{asked}/"), Some(GetOptions::new().with_prefix())).await.unwrap();
                (queue.count() as usize == waiter + 2).then_some(())
            })
            .await;
        }
        assert!(order.try_recv().is_err(), "nobody has it while the first holds it");
        first.unlock(lock.key().to_vec()).await.unwrap();
        for waiter in 0..4 {
            assert_eq!(tokio::time::timeout(SOON, order.recv()).await.unwrap(), Some(waiter));
        }
        for id in held {
            first.lease_revoke(id).await.unwrap();
        }
    });
}

#[test]
fn a_lock_ends_with_its_lease() {
    on_cluster(async |c| {
        let name = unique("lock-lease") + "l";
        let mut client = c.client(0).await;
        let (one, two) = (lease(&mut client).await, lease(&mut client).await);
        client.lock(name.as_str(), Some(LockOptions::new().with_lease(one))).await.unwrap();
        let mut waiter = connect_patient(&[c.nodes[2].url()]).await;
        let waiting = name.clone();
        let task =
            tokio::spawn(async move { waiter.lock(waiting, Some(LockOptions::new().with_lease(two))).await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!task.is_finished());
        client.lease_revoke(one).await.unwrap();
        let lock = tokio::time::timeout(SOON, task).await.unwrap().unwrap().unwrap();
        assert_eq!(lock.key(), format!("{name}/{two:x}").as_bytes());
        client.lease_revoke(two).await.unwrap();
    });
}

#[test]
fn a_lock_under_an_unknown_lease_is_refused() {
    on_cluster(async |c| {
        let result = c.client(1).await.lock("l", Some(LockOptions::new().with_lease(0x0bad_cafe))).await;
        lease_not_found(status_of(result));
    });
}

#[test]
fn an_election_is_won_proclaimed_observed_and_resigned() {
    on_cluster(async |c| {
        let name = unique("election") + "e";
        let mut client = c.client(0).await;
        let id = lease(&mut client).await;
        let none = c.client(1).await.leader(name.as_str()).await;
        assert_eq!(status_of(none).message(), "election: no leader");
        let won = client.campaign(name.as_str(), "first", id).await.unwrap();
        let leader = key_of(&won);
        assert_eq!(leader.name(), name.as_bytes());
        assert_eq!((leader.key(), leader.lease()), (format!("{name}/{id:x}").as_bytes(), id));
        let told = c.client(1).await.leader(name.as_str()).await.unwrap();
        assert_eq!(
            (told.kv().unwrap().value(), told.kv().unwrap().create_revision()),
            (&b"first"[..], leader.rev())
        );
        let mut observer = connect_patient(&[c.nodes[2].url()]).await.observe(name.as_str()).await.unwrap();
        let seen = tokio::time::timeout(SOON, observer.message()).await.unwrap().unwrap().unwrap();
        assert_eq!(seen.kv().unwrap().value(), b"first");
        let options = ProclaimOptions::new().with_leader(leader.clone());
        client.proclaim("second", Some(options)).await.unwrap();
        let seen = tokio::time::timeout(SOON, observer.message()).await.unwrap().unwrap().unwrap();
        assert_eq!(seen.kv().unwrap().value(), b"second");
        client.resign(Some(ResignOptions::new().with_leader(leader.clone()))).await.unwrap();
        assert_eq!(status_of(client.leader(name.as_str()).await).message(), "election: no leader");
        let late = client.proclaim("third", Some(ProclaimOptions::new().with_leader(leader))).await;
        assert_eq!(status_of(late).message(), "election: not leader");
        client.lease_revoke(id).await.unwrap();
    });
}

#[test]
fn the_next_candidate_leads_when_the_leader_resigns() {
    on_cluster(async |c| {
        let name = unique("succession") + "e";
        let mut first = c.client(0).await;
        let one = lease(&mut first).await;
        let two = lease(&mut first).await;
        let won = first.campaign(name.as_str(), "one", one).await.unwrap();
        let mut second = connect_patient(&[c.nodes[1].url()]).await;
        let asked = name.clone();
        let task = tokio::spawn(async move { second.campaign(asked, "two", two).await });
        let queue = GetOptions::new().with_prefix().with_sort(SortTarget::Create, SortOrder::Ascend);
        eventually("both stand in the queue", SOON, async || {
            let got = first.get(format!("{name}/"), Some(queue.clone())).await.unwrap();
            (got.count() == 2).then_some(())
        })
        .await;
        assert_eq!(first.leader(name.as_str()).await.unwrap().kv().unwrap().value(), b"one");
        first.resign(Some(ResignOptions::new().with_leader(key_of(&won)))).await.unwrap();
        let won = tokio::time::timeout(SOON, task).await.unwrap().unwrap().unwrap();
        assert_eq!(won.leader().unwrap().lease(), two);
        assert_eq!(first.leader(name.as_str()).await.unwrap().kv().unwrap().value(), b"two");
        first.lease_revoke(one).await.unwrap();
        first.lease_revoke(two).await.unwrap();
    });
}

#[test]
fn a_campaign_without_a_lease_gets_one_and_an_unknown_lease_is_refused() {
    on_cluster(async |c| {
        let name = unique("campaign-lease") + "e";
        let mut client = c.client(2).await;
        let won = client.campaign(name.as_str(), "v", 0).await.unwrap();
        let id = won.leader().unwrap().lease();
        assert_eq!(client.lease_time_to_live(id, None).await.unwrap().granted_ttl(), 60);
        client.lease_revoke(id).await.unwrap();
        let result = client.campaign(name.as_str(), "v", 0x0bad_cafe).await;
        lease_not_found(status_of(result));
    });
}
