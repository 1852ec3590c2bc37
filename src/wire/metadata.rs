//! The names of the gRPC metadata that Mainstay adds to etcd's API. All values
//! are ASCII; numbers are decimal.

/// The session of the write's request id.
pub const SESSION: &str = "mainstay-session";
/// The write's number in its session, from 1.
pub const SEQUENCE: &str = "mainstay-sequence";
/// Every sequence up to this one has been answered and will not be repeated.
pub const ACKNOWLEDGED: &str = "mainstay-acknowledged";
/// Who asks, for history and audit.
pub const ACTOR: &str = "mainstay-actor";
/// On MemberAdd: the kind of the member, where etcd's fields have no word for it.
pub const MEMBER_KIND: &str = "mainstay-member-kind";
/// The value of [`MEMBER_KIND`] that asks for an observer.
pub const MEMBER_KIND_OBSERVER: &str = "observer";
/// etcd's: abort a stream while there is no leader. Its value is `true`.
pub const REQUIRE_LEADER: &str = "hasleader";
/// On the answer that opens a watch: an answer to a progress request comes after
/// all events up to its revision. etcd before 3.4.25 and 3.5.8 does not keep that.
pub const EXACT_PROGRESS: &str = "mainstay-exact-progress";
