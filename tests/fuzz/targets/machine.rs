//! A key's state machine, fed with whatever can happen, against the oracle of its tests.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| tower_distributed_lock::fuzzing::machine(data));
