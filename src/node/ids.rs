//! Who is who: ids derived from what does not change, so that a retry gets the
//! same id and a wiped disk never gets an old one.

use sha2::{Digest, Sha256};

use super::options::{InitialMember, sorted};
use crate::types::{ClusterId, DiskId, NodeId};

/// The id of a member that `--initial-cluster` names.
pub fn initial_node_id(token: &str, member: &InitialMember) -> NodeId {
    let mut parts: Vec<Vec<u8>> = vec![b"member".to_vec(), token.into(), member.name.clone().into()];
    parts.extend(sorted(&member.peer_urls).into_iter().map(String::into_bytes));
    hash(&parts)
}

/// The id of the cluster that `--initial-cluster` makes.
pub fn initial_cluster_id(token: &str, members: &[InitialMember]) -> ClusterId {
    let mut ids: Vec<NodeId> = members.iter().map(|member| initial_node_id(token, member)).collect();
    ids.sort_unstable();
    let mut parts: Vec<Vec<u8>> = vec![b"cluster".to_vec(), token.into()];
    parts.extend(ids.iter().map(|id| id.to_be_bytes().to_vec()));
    hash(&parts)
}

/// The id of a node that joins with a new disk.
pub fn joining_node_id(cluster: ClusterId, disk: DiskId) -> NodeId {
    hash(&[b"join".to_vec(), cluster.to_be_bytes().to_vec(), disk.to_be_bytes().to_vec()])
}

/// The id of the cluster that a lone survivor goes on as, so that members of
/// the old one cannot mix with it.
pub fn recovered_cluster_id(old: ClusterId, survivor: NodeId, nonce: u64) -> ClusterId {
    let parts = [old.to_be_bytes(), survivor.to_be_bytes(), nonce.to_be_bytes()].map(|part| part.to_vec());
    hash(&[vec![b"recover".to_vec()], parts.to_vec()].concat())
}

/// The first eight bytes of the SHA-256 over the parts, each after its length;
/// never 0, which means "none".
fn hash(parts: &[Vec<u8>]) -> u64 {
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_be_bytes());
        digest.update(part);
    }
    let digest = digest.finalize();
    let first: [u8; 8] = digest[..8].try_into().expect("SHA-256 has 32 bytes");
    u64::from_be_bytes(first).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, urls: &[&str]) -> InitialMember {
        InitialMember { name: name.to_owned(), peer_urls: urls.iter().map(|url| (*url).to_owned()).collect() }
    }

    #[test]
    fn ids_do_not_depend_on_the_order_things_are_written_in() {
        let (a, b) = (member("a", &["http://1", "http://2"]), member("b", &["http://3"]));
        let swapped = member("a", &["http://2", "http://1"]);
        assert_eq!(initial_node_id("t", &a), initial_node_id("t", &swapped));
        assert_eq!(
            initial_cluster_id("t", &[a.clone(), b.clone()]),
            initial_cluster_id("t", &[b.clone(), a.clone()])
        );
        assert_ne!(
            initial_cluster_id("t", &[a.clone(), b]),
            initial_cluster_id("t", std::slice::from_ref(&a))
        );
        assert_ne!(initial_node_id("t", &a), initial_node_id("u", &a));
        assert_ne!(joining_node_id(1, 2), joining_node_id(1, 3));
    }
}
