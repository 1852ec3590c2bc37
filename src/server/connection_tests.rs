//! One turn of a connection, on a socket that takes what it is told to take.

use std::future::poll_fn;
use std::sync::atomic::{AtomicUsize, Ordering};

use hyper::rt::Executor as _;

use super::*;

/// Each write it was asked for, as far as it had room.
#[derive(Clone, Default)]
struct Socket {
    written: Arc<Mutex<Vec<Vec<u8>>>>,
    room: Arc<AtomicUsize>,
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let room = self.room.load(Ordering::SeqCst);
        let taken = &data[..data.len().min(room)];
        if taken.is_empty() {
            return Poll::Pending;
        }
        self.room.store(room - taken.len(), Ordering::SeqCst);
        self.written.lock().push(taken.to_vec());
        Poll::Ready(Ok(taken.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Gives the socket room, and lets the connection have one turn.
fn turn(
    turns: &mut Turns<Socket>,
    socket: &Socket,
    room: usize,
    http: impl FnMut(&mut Context<'_>) -> Poll<io::Result<()>>,
) {
    socket.room.store(room, Ordering::SeqCst);
    let mut http = Box::pin(poll_fn(http));
    let turned = poll_fn(|context| turns.turn(http.as_mut(), context)).now_or_never();
    assert!(turned.is_none_or(|ended| ended.is_ok()));
}

#[test]
fn what_a_turn_flushes_is_one_write_at_its_end() {
    let socket = Socket::default();
    let mut wire = Gathered::new(socket.clone());
    let mut turns = Turns::new(wire.clone(), Calls::default());
    turn(&mut turns, &socket, 1000, |context| {
        for part in [b"one ", b"turn"] {
            assert!(matches!(Pin::new(&mut wire).poll_write(context, part), Poll::Ready(Ok(4))));
            assert!(Pin::new(&mut wire).poll_flush(context).is_ready());
        }
        assert!(socket.written.lock().is_empty());
        Poll::Pending
    });
    assert_eq!(*socket.written.lock(), [b"one turn"]);
}

#[test]
fn a_socket_that_takes_nothing_bounds_what_is_gathered_and_loses_nothing() {
    let socket = Socket::default();
    let mut wire = Gathered::new(socket.clone());
    let mut turns = Turns::new(wire.clone(), Calls::default());
    let data: Vec<u8> = (0..100_000_u32).map(|place| (place % 251) as u8).collect();
    let mut given = 0;
    for round in 0.. {
        turn(&mut turns, &socket, if round % 2 == 0 { 0 } else { 10_000 }, |context| {
            while let Poll::Ready(taken) = Pin::new(&mut wire).poll_write(context, &data[given..]) {
                given += taken.unwrap();
                if given == data.len() {
                    break;
                }
            }
            Poll::Pending
        });
        let written = socket.written.lock().concat();
        assert!(given - written.len() <= GATHERED_MAX);
        if written.len() == data.len() {
            assert_eq!(written, data);
            return;
        }
    }
}

#[tokio::test]
async fn a_call_that_stays_runs_within_the_turn_and_its_panic_ends_it_alone() {
    let socket = Socket::default();
    let calls = Calls::default();
    let mut turns = Turns::new(Gathered::new(socket.clone()), calls.clone());
    let done = Arc::new(AtomicUsize::new(0));
    let count = |add| {
        let done = done.clone();
        async move {
            let _ = done.fetch_add(add, Ordering::SeqCst);
        }
    };
    let mut came = false;
    turn(&mut turns, &socket, 0, |_| {
        if !std::mem::replace(&mut came, true) {
            calls.keep_next();
            calls.execute(async { panic!("this call is broken") });
            calls.keep_next();
            calls.execute(count(1));
            calls.execute(count(10));
        }
        Poll::Pending
    });
    assert_eq!(done.load(Ordering::SeqCst), 1, "the one that stays, in the turn it came in");
    tokio::task::yield_now().await;
    assert_eq!(done.load(Ordering::SeqCst), 11, "the other is a task of its own");
}
