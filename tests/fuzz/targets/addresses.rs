//! URLs of servers, and users and passwords beside them.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tower_distributed_lock::fuzzing::addresses(data));
