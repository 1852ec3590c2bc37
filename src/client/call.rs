//! What a call is: of which kind, about which key, and what makes repeating it
//! safe. Each call site says so, and nobody guesses.

use bytes::Bytes;

use super::routing::CallKind;

/// What a call is, apart from its message.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub kind: CallKind,
    pub key: Option<Bytes>,
    pub repeat: Repeat,
    pub limit: Limit,
}

/// What makes repeating a call safe when nobody knows whether it was done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    /// It changes nothing, or nothing more the second time.
    Harmless,
    /// A request id, where there is one.
    Identified,
    /// Nothing.
    Unsafe,
}

/// How long a call may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    /// As long as requests may.
    Request,
    /// It opens a stream: each attempt has a limit, what comes after has none.
    Opening,
    /// It waits for something that others do.
    None,
}

impl Call {
    /// A linearizable read; `key` is what it is about, if that is one key or prefix.
    pub fn read(key: Option<Bytes>) -> Call {
        Call { kind: CallKind::Read, key, repeat: Repeat::Harmless, limit: Limit::Request }
    }

    /// A read that any member may answer from its own state.
    pub fn serializable(key: Option<Bytes>) -> Call {
        Call { kind: CallKind::SerializableRead, ..Call::read(key) }
    }

    /// Something that may change the store, and carries a request id if it can.
    pub fn write(key: Option<Bytes>) -> Call {
        Call { kind: CallKind::Write, key, repeat: Repeat::Identified, limit: Limit::Request }
    }

    /// Something that changes what no request id covers, as the membership.
    pub fn change() -> Call {
        Call { repeat: Repeat::Unsafe, ..Call::write(None) }
    }

    /// It is the same once or twice.
    pub fn harmless_twice(self) -> Call {
        Call { repeat: Repeat::Harmless, ..self }
    }

    /// Its answer is a stream.
    pub fn opening(self) -> Call {
        Call { limit: Limit::Opening, ..self }
    }

    /// It waits for something that others do.
    pub fn waiting(self) -> Call {
        Call { limit: Limit::None, ..self }
    }

    /// Whether doing it twice, or not knowing whether it was done, matters.
    pub fn writes(&self) -> bool {
        self.repeat != Repeat::Harmless
    }

    /// Whether it may be sent to two endpoints at once.
    pub fn is_plain_read(&self) -> bool {
        matches!(self.kind, CallKind::Read | CallKind::SerializableRead) && self.limit == Limit::Request
    }

    pub fn kind_name(&self) -> &'static str {
        match self.kind {
            CallKind::SerializableRead => "serializable_read",
            CallKind::Read => "read",
            CallKind::Write => "write",
            CallKind::Stream => "stream",
        }
    }
}
