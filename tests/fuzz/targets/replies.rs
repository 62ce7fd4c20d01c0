//! What a server answers, read as the reply to every command there is.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tower_distributed_lock::fuzzing::replies(data));
