//! Locks that are held to the end of the response body.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

mod frames;
#[path = "../kit/mod.rs"]
mod kit;
mod sockets;
mod told;
