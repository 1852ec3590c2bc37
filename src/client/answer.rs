//! What every answer says about who gave it, whatever call it answers. The only
//! place that knows where each message keeps its header.

use crate::types::Revision;
use crate::wire::etcdserverpb as pb;
use crate::wire::{mainstay_v1, v3electionpb as election, v3lockpb as lock};

/// An answer to a call.
pub(super) trait Answer {
    /// Its header; `None` where the message has none, or not yet.
    fn header(&self) -> Option<&pb::ResponseHeader>;

    /// The store's revision when it was given; 0 when it does not say.
    fn revision(&self) -> Revision {
        Revision(self.header().map_or(0, |header| header.revision))
    }

    /// The cluster that gave it; 0 when it does not say.
    fn cluster_id(&self) -> u64 {
        self.header().map_or(0, |header| header.cluster_id)
    }
}

macro_rules! answers_with_header {
    ($($message:ty),* $(,)?) => {
        $(impl Answer for $message {
            fn header(&self) -> Option<&pb::ResponseHeader> {
                self.header.as_ref()
            }
        })*
    };
}

answers_with_header!(
    pb::RangeResponse,
    pb::PutResponse,
    pb::DeleteRangeResponse,
    pb::TxnResponse,
    pb::CompactionResponse,
    pb::WatchResponse,
    pb::LeaseGrantResponse,
    pb::LeaseRevokeResponse,
    pb::LeaseKeepAliveResponse,
    pb::LeaseTimeToLiveResponse,
    pb::LeaseLeasesResponse,
    pb::MemberAddResponse,
    pb::MemberRemoveResponse,
    pb::MemberUpdateResponse,
    pb::MemberListResponse,
    pb::MemberPromoteResponse,
    pb::DefragmentResponse,
    pb::MoveLeaderResponse,
    pb::AlarmResponse,
    pb::StatusResponse,
    pb::HashKvResponse,
    pb::SnapshotResponse,
    lock::LockResponse,
    lock::UnlockResponse,
    election::CampaignResponse,
    election::LeaderResponse,
    election::ProclaimResponse,
    election::ResignResponse,
);

impl Answer for pb::RangeStreamResponse {
    fn header(&self) -> Option<&pb::ResponseHeader> {
        self.range_response.as_ref().and_then(|response| response.header.as_ref())
    }
}

macro_rules! answers_without_header {
    ($($message:ty),* $(,)?) => {
        $(impl Answer for $message {
            fn header(&self) -> Option<&pb::ResponseHeader> {
                None
            }
        })*
    };
}

answers_without_header!(
    mainstay_v1::RevisionAtResponse,
    mainstay_v1::RenewResponse,
    mainstay_v1::JoinResponse
);

/// A stream that has been opened; its messages have the headers.
impl<T> Answer for tonic::Streaming<T> {
    fn header(&self) -> Option<&pb::ResponseHeader> {
        None
    }
}

#[cfg(test)]
impl Answer for () {
    fn header(&self) -> Option<&pb::ResponseHeader> {
        None
    }
}
