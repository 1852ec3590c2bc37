//! How deep a value that holds itself may go: a bound on the stack and on the
//! memory that reading one takes, whoever wrote it.

use std::cell::Cell;

use serde::de::{Deserialize, Deserializer, Error as _};

/// The most transactions inside one another. A request cannot hold more: its
/// messages may nest a hundred deep, and each transaction takes two.
pub const NESTING_MAX: u32 = 64;

thread_local! {
    static OPEN: Cell<u32> = const { Cell::new(0) };
}

/// One level, for as long as it is being read.
struct Level;

impl Level {
    fn enter() -> Option<Level> {
        let open = OPEN.get();
        (open < NESTING_MAX).then(|| {
            OPEN.set(open + 1);
            Level
        })
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        OPEN.set(OPEN.get() - 1);
    }
}

/// Reads a value inside one of its own kind; for `#[serde(deserialize_with)]`.
///
/// # Errors
/// Beyond [`NESTING_MAX`] levels.
pub(super) fn read<'de, T: Deserialize<'de>, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    match Level::enter() {
        Some(_level) => T::deserialize(from),
        None => Err(D::Error::custom(format_args!("transactions nest deeper than {NESTING_MAX} levels"))),
    }
}
