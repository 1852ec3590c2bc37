//! Request ids for every write, without anybody asking: a session is opened with
//! the first write and used by all clones of the client.
//!
//! Invariant: a sequence is acknowledged only after the call that used it has
//! ended, so the server never forgets a write that may still be repeated; and a
//! write keeps its id over all its attempts, so it is applied once at most.
//!
//! Nothing runs in the background: each write renews the session at the server.
//! One that was not used for long is left to expire, and the next write opens
//! another.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::env::EnvRef;
use crate::types::RequestId;

/// Writes that may lie between the oldest unfinished one and the newest. The
/// server keeps 1,024 replies of a session; a slow write must not bring it there.
const SPAN_MAX: u64 = 1_000;

/// The sequences of one session.
///
/// Invariant: every sequence below `next` is in `open` or has been finished.
#[derive(Debug)]
pub(in crate::client) struct Sequences {
    next: u64,
    open: BTreeSet<u64>,
}

/// A session at the server.
#[derive(Debug)]
pub(in crate::client) struct OpenSession {
    pub id: u64,
    pub ttl: Duration,
    sequences: Mutex<Sequences>,
    /// The newest time at which the server surely still had it.
    alive_at: Mutex<Duration>,
}

/// The id of one write. The server keeps the write's reply until this is dropped
/// and a later write says so.
#[derive(Debug)]
pub(in crate::client) struct WriteId {
    pub id: RequestId,
    session: Arc<OpenSession>,
}

impl OpenSession {
    /// A session that was asked for at `asked_at`.
    pub fn new(id: u64, ttl: Duration, asked_at: Duration) -> Arc<OpenSession> {
        let sequences = Mutex::new(Sequences { next: 1, open: BTreeSet::new() });
        Arc::new(OpenSession { id, ttl, sequences, alive_at: Mutex::new(asked_at) })
    }

    /// Begins a write.
    pub fn begin(self: &Arc<OpenSession>) -> WriteId {
        let mut sequences = self.sequences.lock();
        let sequence = sequences.next;
        sequences.next += 1;
        sequences.open.insert(sequence);
        // Everything below the oldest unfinished write has been answered or given up.
        let acknowledged = sequences.open.first().copied().unwrap_or(sequence) - 1;
        WriteId { id: RequestId { session: self.id, sequence, acknowledged }, session: self.clone() }
    }

    /// Whether one more write would leave the oldest unfinished one too far behind.
    fn is_full(&self) -> bool {
        let sequences = self.sequences.lock();
        sequences.open.first().is_some_and(|oldest| sequences.next - oldest >= SPAN_MAX)
    }

    /// Whether the server may have let it expire, with a third of its time to spare.
    fn is_stale(&self, now: Duration) -> bool {
        now.saturating_sub(*self.alive_at.lock()) > self.ttl * 2 / 3
    }
}

impl WriteId {
    /// An attempt that began at `sent_at` was answered: the session lived then.
    pub fn was_alive(&self, sent_at: Duration) {
        let mut alive_at = self.session.alive_at.lock();
        *alive_at = sent_at.max(*alive_at);
    }
}

impl Drop for WriteId {
    fn drop(&mut self) {
        self.session.sequences.lock().open.remove(&self.id.sequence);
    }
}

/// Where the request ids of a client come from.
pub(in crate::client) struct Ids {
    source: Mutex<Source>,
    /// Held by whoever opens a session, so that one is opened and not one a caller.
    opening: Semaphore,
    env: EnvRef,
}

enum Source {
    /// There is no session yet, or no more.
    None,
    Open(Arc<OpenSession>),
    /// The server does not know them.
    Unsupported,
    /// The server has no room for more of them; asked again then.
    Refused {
        until: Duration,
    },
}

/// What a write is to do for its id.
enum Next {
    Use(WriteId),
    GoWithout,
    Open,
}

/// How opening a session went wrong, as far as ids are concerned.
pub(in crate::client) enum Unopened<E> {
    /// The server does not know sessions.
    Unsupported,
    /// It refuses to open one.
    Refused,
    /// Nobody answered.
    Failed(E),
}

/// How long writes go without ids after the server refused a session.
const REFUSED_FOR: Duration = Duration::from_secs(60);

impl Ids {
    pub fn new(env: &EnvRef) -> Ids {
        Ids { source: Mutex::new(Source::None), opening: Semaphore::new(1), env: env.clone() }
    }

    /// An id for a write; `None` where the server has none to give. `open` opens
    /// a session if there is none.
    ///
    /// # Errors
    /// That of `open`.
    pub async fn begin<E, F>(&self, open: impl FnOnce() -> F) -> Result<Option<WriteId>, E>
    where
        F: Future<Output = Result<Arc<OpenSession>, Unopened<E>>>,
    {
        match self.next() {
            Next::Use(id) => return Ok(Some(id)),
            Next::GoWithout => return Ok(None),
            Next::Open => {}
        }
        let _turn = self.opening.acquire().await;
        // Another write may have opened one meanwhile.
        match self.next() {
            Next::Use(id) => return Ok(Some(id)),
            Next::GoWithout => return Ok(None),
            Next::Open => {}
        }
        let (source, id) = match open().await {
            Ok(session) => {
                let id = session.begin();
                (Source::Open(session), Some(id))
            }
            Err(Unopened::Unsupported) => (Source::Unsupported, None),
            Err(Unopened::Refused) => (Source::Refused { until: self.env.monotonic() + REFUSED_FOR }, None),
            Err(Unopened::Failed(error)) => return Err(error),
        };
        *self.source.lock() = source;
        Ok(id)
    }

    /// The server does not have this write's session any more.
    pub fn forget(&self, id: &WriteId) {
        let mut source = self.source.lock();
        if matches!(&*source, Source::Open(session) if session.id == id.session.id) {
            *source = Source::None;
        }
    }

    fn next(&self) -> Next {
        let now = self.env.monotonic();
        match &*self.source.lock() {
            Source::Open(session) if !session.is_full() && !session.is_stale(now) => {
                Next::Use(session.begin())
            }
            Source::Unsupported => Next::GoWithout,
            Source::Refused { until } if now < *until => Next::GoWithout,
            Source::None | Source::Open(_) | Source::Refused { .. } => Next::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    use crate::env::SystemEnv;

    const SECOND: Duration = Duration::from_secs(1);
    type Opened = Result<Arc<OpenSession>, Unopened<&'static str>>;

    struct Server {
        ids: Ids,
        env: EnvRef,
        opened: AtomicU64,
    }

    impl Server {
        fn new() -> Server {
            let env = SystemEnv::shared();
            Server { ids: Ids::new(&env), env, opened: AtomicU64::new(0) }
        }

        async fn begin(&self) -> WriteId {
            let open = || async {
                tokio::time::sleep(Duration::from_millis(5)).await;
                let id = self.opened.fetch_add(1, Ordering::Relaxed) + 1;
                Ok::<_, Unopened<()>>(OpenSession::new(id, SECOND * 60, self.env.monotonic()))
            };
            self.ids.begin(open).await.expect("it opens").expect("it knows sessions")
        }
    }

    #[test]
    fn only_what_is_finished_is_acknowledged() {
        let session = OpenSession::new(9, SECOND, Duration::ZERO);
        let first = session.begin();
        let second = session.begin();
        assert_eq!((first.id.sequence, first.id.acknowledged), (1, 0));
        assert_eq!((second.id.sequence, second.id.acknowledged), (2, 0));
        drop(second);
        assert_eq!(session.begin().id.acknowledged, 0, "the first write is still out");
        drop(first);
        assert_eq!(session.begin().id, RequestId { session: 9, sequence: 4, acknowledged: 3 });
    }

    #[tokio::test(start_paused = true)]
    async fn writes_at_once_open_one_session() {
        let server = Arc::new(Server::new());
        let writes: Vec<_> = (0..50)
            .map(|_| {
                let server = server.clone();
                tokio::spawn(async move { server.begin().await.id })
            })
            .collect();
        let mut sequences = BTreeSet::new();
        for write in writes {
            let id = write.await.expect("no panic");
            assert_eq!(id.session, 1);
            sequences.insert(id.sequence);
        }
        assert_eq!(sequences.len(), 50);
    }

    #[tokio::test(start_paused = true)]
    async fn use_keeps_a_session_and_silence_ends_it() {
        let server = Server::new();
        for _ in 0..10 {
            let sent_at = server.env.monotonic();
            let write = server.begin().await;
            assert_eq!(write.id.session, 1);
            write.was_alive(sent_at);
            tokio::time::sleep(SECOND * 30).await;
        }
        tokio::time::sleep(SECOND * 30).await;
        assert_eq!(server.begin().await.id.session, 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_write_that_stays_out_does_not_stop_the_others() {
        let server = Server::new();
        let stuck = server.begin().await;
        for _ in 0..2_500 {
            server.begin().await;
        }
        assert_eq!((stuck.id.session, server.begin().await.id.session), (1, 2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_that_is_gone_is_replaced_once() {
        let server = Server::new();
        let (one, other) = (server.begin().await, server.begin().await);
        server.ids.forget(&one);
        assert_eq!(server.begin().await.id.session, 2);
        server.ids.forget(&other);
        assert_eq!(server.begin().await.id.session, 2, "the late word is about the old one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_without_sessions_is_asked_once_and_a_full_one_again_later() {
        let env = SystemEnv::shared();
        let ids = Ids::new(&env);
        assert_eq!(ids.begin(|| async { Opened::Err(Unopened::Failed("away")) }).await.err(), Some("away"));
        let refused = ids.begin(|| async { Opened::Err(Unopened::Refused) }).await;
        assert!(refused.expect("it goes on").is_none());
        let asked = ids.begin(|| async { Opened::Err(Unopened::Failed("asked")) }).await;
        assert!(asked.expect("not asked").is_none());
        tokio::time::sleep(REFUSED_FOR).await;
        let unsupported = ids.begin(|| async { Opened::Err(Unopened::Unsupported) }).await;
        assert!(unsupported.expect("it goes on").is_none());
        tokio::time::sleep(REFUSED_FOR * 10).await;
        let asked = ids.begin(|| async { Opened::Err(Unopened::Failed("asked")) }).await;
        assert!(asked.expect("not asked").is_none());
    }
}
