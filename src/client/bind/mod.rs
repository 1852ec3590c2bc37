//! Typed settings that follow a prefix.
