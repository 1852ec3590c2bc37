//! The one way a node ends itself.
//!
//! A node that cannot be sure of its state must not go on: a failed write to
//! the disk, an entry that only this replica cannot apply, a panic inside Raft
//! (after which openraft still reports that it runs). All of them come here.
//! Simulations and tests replace the ending, and nothing else.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The process's exit code when it ended itself: a supervisor should restart
/// it, and a person should read why.
pub const EXIT_FATAL: i32 = 70;

/// Ends the node. Clones share it.
#[derive(Clone)]
pub struct Fatal {
    inner: Arc<Inner>,
}

struct Inner {
    raised: AtomicBool,
    end: Box<dyn Fn(&str) + Send + Sync>,
}

impl Fatal {
    /// Ends the process with [`EXIT_FATAL`], at once: what is not on disk is not
    /// to be trusted. Not even exit handlers run: those of the database destroy
    /// what its threads still use, and such a node ends by a signal instead.
    #[allow(unsafe_code, reason = "the standard library's way to exit runs exit handlers")]
    pub fn exit_process() -> Fatal {
        // SAFETY: `_exit` takes a number and does not return; it touches nothing of this process.
        Fatal::new(|_| unsafe { libc::_exit(EXIT_FATAL) })
    }

    /// Does `end` instead, once, with the reason.
    pub fn new(end: impl Fn(&str) + Send + Sync + 'static) -> Fatal {
        Fatal { inner: Arc::new(Inner { raised: AtomicBool::new(false), end: Box::new(end) }) }
    }

    /// Logs the reason and ends the node. Later calls only log. May return
    /// where the ending was replaced; the caller then stops what it was doing.
    pub fn raise(&self, reason: impl fmt::Display) {
        let reason = reason.to_string();
        tracing::error!(reason, "the node cannot go on safely and stops");
        if !self.inner.raised.swap(true, Ordering::AcqRel) {
            (self.inner.end)(&reason);
        }
    }

    /// Whether the node is to end.
    pub fn is_raised(&self) -> bool {
        self.inner.raised.load(Ordering::Acquire)
    }

    /// Makes every panic in the process end the node, after the message that
    /// a panic prints. To be called once, by the binary.
    pub fn on_panic(&self) {
        let fatal = self.clone();
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            before(panic);
            fatal.raise(format_args!("a thread panicked: {panic}"));
        }));
    }
}

impl fmt::Debug for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fatal").field("raised", &self.is_raised()).finish()
    }
}
