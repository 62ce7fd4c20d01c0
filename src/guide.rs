//! What to know beyond the first page, in reading order. There is nothing here but text.
//!
//! 1. [How it works](how_it_works)
//! 2. [What goes wrong](failures), what is seen of it, and what to do
//! 3. [Tuning](tuning)
//! 4. [Migration](migration) from `SET NX` by hand, the JavaScript package, and others
//! 5. [Comparison](comparison) with other libraries
//!
//! What the lock promises and what it does not, fencing tokens, storages, keys, placement in axum
//! and tonic, streams and shutdown are on the [first page](crate).

#[doc = include_str!("../docs/guide/how_it_works.md")]
pub mod how_it_works {}

#[doc = include_str!("../docs/guide/failures.md")]
pub mod failures {}

#[doc = include_str!("../docs/guide/tuning.md")]
pub mod tuning {}

#[doc = include_str!("../docs/guide/migration.md")]
pub mod migration {}

#[doc = include_str!("../docs/guide/comparison.md")]
pub mod comparison {}
