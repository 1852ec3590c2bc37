//! The judge's own tests, without the harness around them.
#![allow(dead_code, reason = "the harness uses what these tests do not")]

#[path = "mod.rs"]
mod judge;
