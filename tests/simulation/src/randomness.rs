//! Random numbers that are the same each time.
//!
//! Two kinds are used by what runs in the simulation: `fastrand`, which is given a seed, and the
//! system's, by which the maps of the standard library choose the order of their keys. Those are
//! replaced here: each simulation runs on a thread of its own, and gets the same numbers there.

use std::{
    cell::Cell,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

thread_local! {
    static NUMBERS: Cell<Option<u64>> = const { Cell::new(None) };
}

/// For threads that simulate nothing.
static OTHERS: AtomicU64 = AtomicU64::new(1);

/// From now on the random numbers of this thread follow from `seed`.
pub fn seed(seed: u64) {
    NUMBERS.set(Some(seed));
    fastrand::seed(seed);
}

/// Whatever random numbers `work` takes, those after it are the same.
pub fn apart<T>(work: impl FnOnce() -> T) -> T {
    let before = (NUMBERS.get(), fastrand::get_seed());
    let done = work();
    NUMBERS.set(before.0);
    fastrand::seed(before.1);
    done
}

fn next() -> u64 {
    let number = match NUMBERS.get() {
        Some(number) => {
            NUMBERS.set(Some(number.wrapping_add(1)));
            number
        }
        None => OTHERS.fetch_add(1, Relaxed),
    };
    // SplitMix64.
    let mut z = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Stands in the place of the C library's function, which the standard library calls.
///
/// # Safety
///
/// As of that function: `bytes` points to `length` bytes that may be written.
#[expect(
    unsafe_code,
    reason = "the C library's function cannot be replaced by less"
)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(bytes: *mut u8, length: usize, _: u32) -> isize {
    for index in 0..length {
        // SAFETY: the caller promises that `length` bytes may be written.
        unsafe { bytes.add(index).write(next() as u8) };
    }
    length as isize
}
