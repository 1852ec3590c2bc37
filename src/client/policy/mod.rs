//! How a call is kept from failing, and from making things worse: one policy around typed calls.
