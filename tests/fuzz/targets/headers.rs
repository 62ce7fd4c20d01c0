//! Headers that say how long a client waits, and what it wants to lock.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tower_distributed_lock::fuzzing::headers(data));
