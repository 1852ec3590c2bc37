//! openraft's messages as those of raft.proto, and back.
//!
//! What comes from the network is checked here for everything that openraft
//! takes for granted: entries follow each other without a hole, and nothing
//! that must be there is missing. A record's own checksum is checked with it.

use bytes::Bytes;
use openraft::raft::{StreamAppendError, TransferLeaderError};

use super::record;
use super::transport::{
    AppendRequest, AppendResult, PeerError, TransferLeaderRequest, TransferLeaderResult, VoteRequest,
    VoteResponse,
};
use super::types::{LogId, Vote};
use crate::storage::layout::LogPosition;
use crate::wire::peer_v1::{self as peer, append_response, transfer_leader_response};

/// A vote.
pub fn ballot(vote: &Vote) -> peer::Ballot {
    let leader = vote.leader_id();
    peer::Ballot { term: leader.term, node: leader.node_id, committed: vote.is_committed() }
}

/// A vote, which must be there.
///
/// # Errors
/// [`PeerError::Failed`] when it is not.
pub fn parse_ballot(ballot: Option<peer::Ballot>) -> Result<Vote, PeerError> {
    let ballot = ballot.ok_or_else(|| malformed("a vote is missing"))?;
    Ok(match ballot.committed {
        true => Vote::new_committed(ballot.term, ballot.node),
        false => Vote::new(ballot.term, ballot.node),
    })
}

fn log_id(id: &LogId) -> peer::LogId {
    let LogPosition { term, node, index } = id.into();
    peer::LogId { term, node, index }
}

fn parse_log_id(id: peer::LogId) -> LogId {
    LogPosition { term: id.term, node: id.node, index: id.index }.into()
}

/// Entries for the log, or a heartbeat without any.
pub fn append_request(request: &AppendRequest) -> peer::AppendRequest {
    peer::AppendRequest {
        ballot: Some(ballot(&request.vote)),
        previous: request.prev_log_id.as_ref().map(log_id),
        entries: request.entries.iter().map(record::encode_entry).collect(),
        leader_commit: request.leader_commit.as_ref().map(log_id),
    }
}

/// Entries for the log, checked.
///
/// # Errors
/// [`PeerError::Failed`] for damaged entries, or a hole between them.
pub fn parse_append_request(request: peer::AppendRequest) -> Result<AppendRequest, PeerError> {
    let prev_log_id = request.previous.map(parse_log_id);
    let first = match &prev_log_id {
        Some(id) => id.index.checked_add(1).ok_or_else(|| malformed("the log has ended"))?,
        None => 0,
    };
    let mut entries = Vec::with_capacity(request.entries.len());
    for (place, bytes) in request.entries.iter().enumerate() {
        let expected = first.checked_add(place as u64).ok_or_else(|| malformed("the log has ended"))?;
        let entry = record::decode_entry(bytes).map_err(|error| malformed(&error.to_string()))?;
        if entry.log_id.index != expected {
            let index = entry.log_id.index;
            return Err(malformed(&format!("entry {index} stands where {expected} belongs")));
        }
        entries.push(entry);
    }
    let vote = parse_ballot(request.ballot)?;
    Ok(AppendRequest { vote, prev_log_id, entries, leader_commit: request.leader_commit.map(parse_log_id) })
}

/// How far the log matches.
pub fn append_response(result: &AppendResult) -> peer::AppendResponse {
    use append_response::Result as Answer;
    let answer = match result {
        Ok(last) => Answer::Matching(peer::Matching { last: last.as_ref().map(log_id) }),
        Err(StreamAppendError::Conflict(id)) => Answer::Conflict(log_id(id)),
        Err(StreamAppendError::HigherVote(vote)) => Answer::HigherBallot(ballot(vote)),
    };
    peer::AppendResponse { result: Some(answer) }
}

/// How far the log of the other matches.
///
/// # Errors
/// [`PeerError::Failed`] for an answer without a result.
pub fn parse_append_response(response: peer::AppendResponse) -> Result<AppendResult, PeerError> {
    use append_response::Result as Answer;
    match response.result {
        Some(Answer::Matching(matching)) => Ok(Ok(matching.last.map(parse_log_id))),
        Some(Answer::Conflict(id)) => Ok(Err(StreamAppendError::Conflict(parse_log_id(id)))),
        Some(Answer::HigherBallot(vote)) => Ok(Err(StreamAppendError::HigherVote(parse_ballot(Some(vote))?))),
        None => Err(malformed("an answer without a result")),
    }
}

/// A request for a vote.
pub fn vote_request(request: &VoteRequest) -> peer::VoteRequest {
    peer::VoteRequest {
        ballot: Some(ballot(&request.vote)),
        last_log_id: request.last_log_id.as_ref().map(log_id),
        leadership_transfer: request.leadership_transfer,
    }
}

/// A request for a vote.
///
/// # Errors
/// [`PeerError::Failed`] when the vote is missing.
pub fn parse_vote_request(request: peer::VoteRequest) -> Result<VoteRequest, PeerError> {
    let vote = parse_ballot(request.ballot)?;
    let mut parsed = VoteRequest::new(vote, request.last_log_id.map(parse_log_id));
    parsed.leadership_transfer = request.leadership_transfer;
    Ok(parsed)
}

/// The answer to a request for a vote.
pub fn vote_response(response: &VoteResponse) -> peer::VoteResponse {
    peer::VoteResponse {
        ballot: Some(ballot(&response.vote)),
        granted: response.vote_granted,
        last_log_id: response.last_log_id.as_ref().map(log_id),
    }
}

/// The answer to a request for a vote.
///
/// # Errors
/// [`PeerError::Failed`] when the vote is missing.
pub fn parse_vote_response(response: peer::VoteResponse) -> Result<VoteResponse, PeerError> {
    let vote = parse_ballot(response.ballot)?;
    Ok(VoteResponse::new(vote, response.last_log_id.map(parse_log_id), response.granted))
}

/// A transfer of leadership.
pub fn transfer_request(request: &TransferLeaderRequest) -> peer::TransferLeaderRequest {
    peer::TransferLeaderRequest {
        from_leader: Some(ballot(request.from_leader())),
        to_node: *request.to_node_id(),
        last_log_id: request.last_log_id().map(log_id),
    }
}

/// A transfer of leadership.
///
/// # Errors
/// [`PeerError::Failed`] when the leader is missing.
pub fn parse_transfer_request(
    request: peer::TransferLeaderRequest,
) -> Result<TransferLeaderRequest, PeerError> {
    let from = parse_ballot(request.from_leader)?;
    Ok(TransferLeaderRequest::new(from, request.to_node, request.last_log_id.map(parse_log_id)))
}

/// Whether a transfer was taken up.
pub fn transfer_response(result: &TransferLeaderResult) -> peer::TransferLeaderResponse {
    use transfer_leader_response::{Accepted, BallotChanged, LogNotFlushed, Result as Answer};
    let answer = match result {
        Ok(()) => Answer::Accepted(Accepted {}),
        Err(TransferLeaderError::VoteChanged { expected, actual }) => {
            let (expected, actual) = (Some(ballot(expected)), Some(ballot(actual)));
            Answer::BallotChanged(BallotChanged { expected, actual })
        }
        Err(TransferLeaderError::LogNotFlushed { expected, actual }) => {
            Answer::LogNotFlushed(LogNotFlushed {
                expected: expected.as_ref().map(log_id),
                actual: actual.as_ref().map(log_id),
            })
        }
    };
    peer::TransferLeaderResponse { result: Some(answer) }
}

/// Whether a transfer was taken up.
///
/// # Errors
/// [`PeerError::Failed`] for an answer without a result.
pub fn parse_transfer_response(
    response: peer::TransferLeaderResponse,
) -> Result<TransferLeaderResult, PeerError> {
    use transfer_leader_response::Result as Answer;
    match response.result {
        Some(Answer::Accepted(_)) => Ok(Ok(())),
        Some(Answer::BallotChanged(changed)) => Ok(Err(TransferLeaderError::VoteChanged {
            expected: parse_ballot(changed.expected)?,
            actual: parse_ballot(changed.actual)?,
        })),
        Some(Answer::LogNotFlushed(missing)) => Ok(Err(TransferLeaderError::LogNotFlushed {
            expected: missing.expected.map(parse_log_id),
            actual: missing.actual.map(parse_log_id),
        })),
        None => Err(malformed("an answer without a result")),
    }
}

fn malformed(what: &str) -> PeerError {
    PeerError::Failed(format!("malformed message: {what}"))
}

/// A header's manifest and leader.
///
/// # Errors
/// [`PeerError::Failed`] when the leader is missing.
pub fn parse_snapshot_header(header: peer::SnapshotHeader) -> Result<(Vote, Bytes), PeerError> {
    Ok((parse_ballot(header.ballot)?, header.manifest))
}
