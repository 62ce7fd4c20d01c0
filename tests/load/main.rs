//! Load and limits: what a waiter, a held lock and a key cost, that nothing of it stays, and that
//! nobody can make it more than the limits say.
//!
//! The allocator of this binary counts, so that "nothing stays" is a number of bytes. It counts for
//! the whole process: one test runs at a time.
//!
//! Called with the first argument `soak`, this is the program of `scripts/soak`; with `replica`, one
//! of the processes of that.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    unreachable_pub,
    reason = "a test ends where it fails, documents itself by its name, and has figures to show"
)]

mod day;
mod heap;
mod hostile;
mod keys;
#[path = "../kit/mod.rs"]
mod kit;
mod renewals;
mod replica;
mod soak;
mod waiters;
mod world;

use std::{env, future::Future, time::Duration};

use libtest_mimic::{Arguments, Trial};

macro_rules! trials {
    ($($file:ident: $($test:ident,)*;)*) => {
        vec![$($(Trial::test(stringify!($test), || { $file::$test(); Ok(()) }),)*)*]
    };
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["replica", url, name] => return replica::main(url, name),
        ["soak", ref arguments @ ..] => return soak::main(arguments),
        _ => {}
    }
    let trials = trials![
        waiters: a_waiter_costs_the_same_in_a_crowd_of_a_hundred_thousand,;
        keys: a_held_lock_costs_the_same_among_a_hundred_thousand, a_million_keys_leave_nothing,
            a_key_that_lingers_costs_the_same_among_a_hundred_thousand,;
        renewals: a_lock_whose_renewal_hangs_takes_no_other_with_it,
            locks_that_are_due_at_once_are_renewed_in_turn,;
        day: a_day_leaves_nothing,;
        hostile: requests_beyond_the_limits_are_refused_and_cost_nothing_that_stays,
            keys_of_every_kind_are_locks_of_their_own_or_refused,
            clients_that_are_slow_hold_no_lock_for_ever,;
        soak: nothing_grows_in_processes_that_go_on,;
    ];
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    libtest_mimic::run(&arguments, trials).exit();
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
