//! The names of the keys that belong to a lock, as arguments of commands.

use std::io::Write;

use redis::{RedisWrite, ToRedisArgs};

use crate::key::LockName;

/// A name in pieces. They are put together in the command itself.
pub(super) struct Pieces<'a>(pub(super) [&'a str; 3]);

impl ToRedisArgs for Pieces<'_> {
    fn write_redis_args<W: ?Sized + RedisWrite>(&self, out: &mut W) {
        let mut out = out.writer_for_next_arg();
        for piece in self.0 {
            // It is memory that is written to.
            let _ = out.write_all(piece.as_bytes());
        }
    }
}

/// The lock's queue: [`LockName::companion`].
pub(super) fn queue(name: &LockName) -> Pieces<'_> {
    Pieces(["{", name.as_str(), "}:queue"])
}
