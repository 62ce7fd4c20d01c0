//! What becomes of the figures of a run of `scripts/bench`: one JSON file with all of them, charts, and the part of
//! `benchmarks.md` that is made of them. The charts and that part come from the JSON file alone.

mod chart;
mod charts;
mod document;
mod files;
/// What was measured, as it is in the JSON file.
pub mod results;
mod rows;
mod text;
mod versions;

pub use files::{remake, write};
pub use results::Results;
pub use rows::{goal, what};
pub use versions::versions;

/// Whatever went wrong, in words for whoever runs the benchmark.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
