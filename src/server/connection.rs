//! One client connection: how its bytes are written, and where its calls run.
//!
//! A connection is one task. What one turn of it makes ready to be sent is
//! written with one system call, however many frames it is. Calls that do little
//! at a time, such as reads of a few keys, writes and watches, run on that task
//! too: a change that concerns a thousand watches of one connection wakes one task
//! and is one write. All other calls are tasks of their own, so that a heavy one
//! holds up nobody.
//!
//! Bytes on their way are bounded: when the peer does not read, writing waits,
//! and HTTP/2 with it.

use std::io::{self, IoSlice};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, Stream as _};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::disk;

/// Bytes gathered before they are written without waiting for more.
const GATHERED_MAX: usize = 32 << 10;

/// A socket whose writes are gathered while it is held. Clones share it.
pub(super) struct Gathered<S>(Arc<Mutex<Writes<S>>>);

struct Writes<S> {
    socket: S,
    /// Not written yet, from `sent` on.
    bytes: Vec<u8>,
    sent: usize,
    /// Whether flushing waits for [`Gathered::release`].
    held: bool,
}

impl<S> Clone for Gathered<S> {
    fn clone(&self) -> Self {
        Gathered(self.0.clone())
    }
}

impl<S: AsyncWrite + Unpin> Gathered<S> {
    pub(super) fn new(socket: S) -> Gathered<S> {
        Gathered(Arc::new(Mutex::new(Writes { socket, bytes: Vec::new(), sent: 0, held: false })))
    }

    /// From now on flushing writes nothing.
    pub(super) fn hold(&self) {
        self.0.lock().held = true;
    }

    /// Writes what was gathered, and holds no more. When the socket takes not all
    /// of it, `context` is woken to go on.
    ///
    /// # Errors
    /// The socket's.
    pub(super) fn release(&self, context: &mut Context<'_>) -> io::Result<()> {
        let mut writes = self.0.lock();
        writes.held = false;
        match writes.drain(context) {
            Poll::Ready(written) => written,
            Poll::Pending => Ok(()),
        }
    }
}

impl<S: AsyncWrite + Unpin> Writes<S> {
    fn drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            let rest = &self.bytes[self.sent..];
            match ready!(Pin::new(&mut self.socket).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.sent += count,
            }
        }
        // Nothing is kept: most connections are silent most of the time.
        (self.bytes, self.sent) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gathered<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0.lock().socket).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gathered<S> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(data)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut writes = self.0.lock();
        if writes.bytes.len() >= GATHERED_MAX {
            ready!(writes.drain(context))?;
        }
        let mut taken = 0;
        for slice in slices {
            let room = GATHERED_MAX - writes.bytes.len();
            let part = &slice[..slice.len().min(room)];
            writes.bytes.extend_from_slice(part);
            taken += part.len();
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut writes = self.0.lock();
        match writes.held {
            true => Poll::Ready(Ok(())),
            false => writes.drain(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut writes = self.0.lock();
        ready!(writes.drain(context))?;
        Pin::new(&mut writes.socket).poll_shutdown(context)
    }
}

/// Where the calls of one connection run. The HTTP library hands each call over
/// right after the service was called; clones share what is handed over.
#[derive(Clone, Default)]
pub(super) struct Calls(Arc<Mutex<HandedOver>>);

#[derive(Default)]
struct HandedOver {
    /// The call handed over next stays on the connection's task.
    stays: bool,
    calls: Vec<BoxFuture<'static, ()>>,
}

impl Calls {
    /// The call being made stays on the connection's task.
    pub(super) fn keep_next(&self) {
        self.0.lock().stays = true;
    }
}

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Calls {
    fn execute(&self, call: F) {
        let mut handed = self.0.lock();
        if std::mem::take(&mut handed.stays) {
            handed.calls.push(Box::pin(call));
            return;
        }
        drop(handed);
        tokio::spawn(call);
    }
}

/// The connection's task: what it reads and writes, and the calls that stay.
pub(super) struct Turns<S> {
    wire: Gathered<S>,
    calls: Calls,
    running: FuturesUnordered<BoxFuture<'static, ()>>,
}

impl<S: AsyncWrite + Unpin> Turns<S> {
    pub(super) fn new(wire: Gathered<S>, calls: Calls) -> Turns<S> {
        Turns { wire, calls, running: FuturesUnordered::new() }
    }

    /// One turn: `http` reads, the calls run, `http` gathers what they said, and
    /// then all of it is written. Ready when the connection has ended.
    pub(super) fn turn<E: From<io::Error>>(
        &mut self,
        mut http: Pin<&mut impl Future<Output = Result<(), E>>>,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), E>> {
        self.wire.hold();
        disk::turn_begins();
        let ended = loop {
            self.run_calls(context);
            let ended = http.as_mut().poll(context);
            if ended.is_ready() || !self.take_calls() {
                break ended;
            }
        };
        self.wire.release(context)?;
        ended
    }

    /// Lets every call that was woken go on.
    fn run_calls(&mut self, context: &mut Context<'_>) {
        // The budget is that of a task with one socket, and these are many calls: with
        // it used up, each would be asked in vain.
        let mut running = tokio::task::coop::unconstrained(std::future::poll_fn(|context| {
            while let Poll::Ready(Some(())) = Pin::new(&mut self.running).poll_next(context) {}
            Poll::<()>::Pending
        }));
        let _ = running.poll_unpin(context);
    }

    fn take_calls(&mut self) -> bool {
        let handed = std::mem::take(&mut self.calls.0.lock().calls);
        let any = !handed.is_empty();
        for call in handed {
            // A panic ends the call, not the others of its connection.
            self.running.push(AssertUnwindSafe(call).catch_unwind().map(drop).boxed());
        }
        any
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
