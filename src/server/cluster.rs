//! The members of the cluster: added, removed, moved, promoted and listed.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::context::{Rpc, Shared};
use super::error::ServeError;
use crate::node::MemberView;
use crate::types::MemberKind;
use crate::wire::etcdserverpb as pb;
use crate::wire::etcdserverpb::cluster_server::Cluster;
use crate::wire::metadata::MEMBER_KIND as KIND;

/// The Cluster service.
pub(crate) struct ClusterService {
    shared: Arc<Shared>,
}

impl ClusterService {
    pub(crate) fn new(shared: Arc<Shared>) -> ClusterService {
        ClusterService { shared }
    }
}

fn member(view: &MemberView) -> pb::Member {
    pb::Member {
        id: view.member.id,
        name: view.member.name.clone(),
        peer_ur_ls: view.member.peer_urls.clone(),
        client_ur_ls: view.member.client_urls.clone(),
        is_learner: !view.is_voter,
    }
}

fn members(views: &[MemberView]) -> Vec<pb::Member> {
    views.iter().map(member).collect()
}

/// What the request asks for, by its own field and by the metadata.
fn kind(request: &Request<pb::MemberAddRequest>) -> Result<MemberKind, ServeError> {
    let is_learner = request.get_ref().is_learner;
    let Some(value) = request.metadata().get(KIND) else {
        return Ok(if is_learner { MemberKind::Learner } else { MemberKind::Voter });
    };
    let kind = match value.as_bytes() {
        b"voter" => MemberKind::Voter,
        b"learner" => MemberKind::Learner,
        b"observer" => MemberKind::Observer,
        other => {
            let reason =
                format!("{:?} is unknown; use voter, learner or observer", String::from_utf8_lossy(other));
            return Err(ServeError::Metadata { name: KIND, reason });
        }
    };
    match is_learner && kind == MemberKind::Voter {
        true => Err(ServeError::MemberKindConflict { kind: kind.to_string() }),
        false => Ok(kind),
    }
}

/// Peer URLs as they will be dialled: `http://HOST:PORT`, sorted, each once.
/// etcd would take `https` and unix sockets; nothing here could dial them.
fn peer_urls(urls: Vec<String>) -> Result<Vec<String>, ServeError> {
    let well_formed = |url: &str| {
        let (host, port) = url.strip_prefix("http://")?.rsplit_once(':')?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        let host_ok = match bare {
            Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
            None => {
                let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
                !host.is_empty() && host.bytes().all(allowed)
            }
        };
        let port_ok = port.parse::<u16>().is_ok_and(|port| port != 0);
        (host_ok && port_ok).then(|| url.to_owned())
    };
    let checked: Option<Vec<String>> = urls.iter().map(|url| well_formed(url.trim())).collect();
    let mut checked = checked.filter(|urls| !urls.is_empty()).ok_or(ServeError::MemberBadUrls)?;
    checked.sort();
    checked.dedup();
    Ok(checked)
}

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn member_add(
        &self,
        request: Request<pb::MemberAddRequest>,
    ) -> Result<Response<pb::MemberAddResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let kind = kind(&request)?;
        let urls = peer_urls(request.into_inner().peer_ur_ls)?;
        let (added, views) = caller.within(self.shared.node.member_add(urls, kind)).await?;
        let is_voter = views.iter().any(|view| view.member.id == added.id && view.is_voter);
        // What was asked for: a member on its way to voting is shown as the
        // voter it is to be, because etcd's clients print this as what they added.
        let is_learner = !is_voter && kind != MemberKind::Voter;
        let added = pb::Member { is_learner, ..member(&MemberView { member: added, is_voter }) };
        Ok(Response::new(pb::MemberAddResponse {
            header: Some(self.shared.header_now()),
            member: Some(added),
            members: members(&views),
        }))
    }

    async fn member_remove(
        &self,
        request: Request<pb::MemberRemoveRequest>,
    ) -> Result<Response<pb::MemberRemoveResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let views = caller.within(self.shared.node.member_remove(request.get_ref().id)).await?;
        let header = Some(self.shared.header_now());
        Ok(Response::new(pb::MemberRemoveResponse { header, members: members(&views) }))
    }

    async fn member_update(
        &self,
        request: Request<pb::MemberUpdateRequest>,
    ) -> Result<Response<pb::MemberUpdateResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let pb::MemberUpdateRequest { id, peer_ur_ls } = request.into_inner();
        let urls = peer_urls(peer_ur_ls)?;
        let views = caller.within(self.shared.node.member_update(id, urls)).await?;
        let header = Some(self.shared.header_now());
        Ok(Response::new(pb::MemberUpdateResponse { header, members: members(&views) }))
    }

    async fn member_list(
        &self,
        request: Request<pb::MemberListRequest>,
    ) -> Result<Response<pb::MemberListResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let views = caller.within(self.shared.node.members(request.get_ref().linearizable)).await?;
        let header = Some(self.shared.header_now());
        Ok(Response::new(pb::MemberListResponse { header, members: members(&views) }))
    }

    async fn member_promote(
        &self,
        request: Request<pb::MemberPromoteRequest>,
    ) -> Result<Response<pb::MemberPromoteResponse>, Status> {
        let caller = self.shared.caller(&request, Rpc::Member)?;
        let views = caller.within(self.shared.node.member_promote(request.get_ref().id)).await?;
        let header = Some(self.shared.header_now());
        Ok(Response::new(pb::MemberPromoteResponse { header, members: members(&views) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_urls_are_dialable_or_refused() {
        let urls = |list: &[&str]| peer_urls(list.iter().map(|url| (*url).to_owned()).collect());
        let good =
            urls(&[" http://b:2380", "http://10.0.0.1:2380", "http://[::1]:1", "http://b:2380"]).unwrap();
        assert_eq!(good, ["http://10.0.0.1:2380", "http://[::1]:1", "http://b:2380"]);
        for bad in [
            &[][..],
            &["b:2380"],
            &["http://b"],
            &["http://b:0"],
            &["http://b:2380/"],
            &["http://:2380"],
            &["http://a b:1"],
            &["http://::1:2380"],
            &["https://b:2380"],
            &["unix:///s"],
            &["http://a:1", "x"],
        ] {
            assert!(matches!(urls(bad), Err(ServeError::MemberBadUrls)), "{bad:?}");
        }
    }

    #[test]
    fn the_kind_comes_from_the_field_or_the_metadata() {
        let with = |is_learner, metadata: Option<&str>| {
            let mut request = Request::new(pb::MemberAddRequest { peer_ur_ls: Vec::new(), is_learner });
            if let Some(value) = metadata {
                request.metadata_mut().insert(KIND, value.parse().unwrap());
            }
            kind(&request)
        };
        assert_eq!(with(false, None).unwrap(), MemberKind::Voter);
        assert_eq!(with(true, None).unwrap(), MemberKind::Learner);
        assert_eq!(with(true, Some("observer")).unwrap(), MemberKind::Observer);
        assert!(with(true, Some("voter")).unwrap_err().to_string().contains("contradict"));
        assert!(with(false, Some("boss")).unwrap_err().to_string().contains(KIND));
    }
}
