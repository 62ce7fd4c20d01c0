//! Keys of any bytes, as they are, in parts, and as they are stored; tokens.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tower_distributed_lock::fuzzing::keys(data));
