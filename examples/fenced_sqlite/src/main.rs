//! A store that refuses writes which come too late.
//!
//! A lock that runs out by itself leaves a gap that no client can close: a process may stand still
//! between its last look at the lock and its write, for longer than the lock lasts. Its write then
//! comes while another has the lock. Only the store can refuse it, by the fencing token: each
//! holder's is greater than those of all holders before.
//!
//! 1. A, a process of its own, gets the lock, reads the balance, and stands still.
//! 2. When A's lock has run out, B gets it, with a greater token. It reads and writes.
//! 3. A goes on, and writes what it made of the balance that it read: after B's write, or between
//!    B's read and B's write.
//!
//! ```text
//! cargo run --manifest-path examples/fenced_sqlite/Cargo.toml -- --redis redis://127.0.0.1:6379
//! ```
//!
//! A and B are two processes, so their locks have to be in a Redis server. Exits with 1 if a late
//! write was taken, or if without the conditions in `account.rs` nothing was lost. For Unix.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "printing is what it is for"
)]

mod account;

use std::{
    env, fs,
    process::{self, ExitCode},
    sync::{Arc, Mutex},
    time::Duration,
};

use rusqlite::Connection;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpid, kill_process, waitid};
use tokio::process::{Child, Command};
use tower_distributed_lock::{
    LockFactory, LockOptions, Unlocked, error::BoxError, storage::RedisStorage,
};

use account::{Account, FENCED, UNFENCED};

const START: i64 = 100;
const A_ADDS: i64 = 10;
const B_ADDS: i64 = 20;

/// What both holders do: read the balance under the lock, do something that takes a while, and
/// write the balance back. Answers whether it was written.
///
/// Looking at `is_held` before the write would not help: A may stand still right after it looked.
async fn add(
    locks: &LockFactory,
    account: &Account,
    amount: i64,
    something: impl Future<Output = Result<(), BoxError>>,
) -> Result<bool, BoxError> {
    // A short ttl, so that nobody who tries this waits long. A service takes the default.
    let options = LockOptions::builder()
        .ttl(Duration::from_millis(500))
        .interval(Duration::from_millis(100))
        .retries(200)
        .build()?;
    let lock = locks.create_lock(format!("accounts/{}", account.id))?;
    let guard = lock.lock(options).await?;
    let token = guard.fencing_token().ok_or("a lock without a token")?;
    // It is below 2^53, so it fits.
    let token = i64::try_from(token)?;

    let Some(balance) = account.read(token).await? else {
        return Ok(false);
    };
    something.await?;
    let written = account.write(token, balance + amount).await?;

    // Only here A hears that it has lost the lock.
    let _: Unlocked = guard.unlock().await?;
    Ok(written)
}

fn open(file: &str, id: i64, fenced: bool) -> Result<Account, BoxError> {
    Ok(Account {
        id,
        sql: if fenced { FENCED } else { UNFENCED },
        connection: Arc::new(Mutex::new(Connection::open(file)?)),
    })
}

/// The process of A ends with this status when its write was refused.
const REFUSED: u8 = 3;

async fn holder_a(url: &str, account: &Account) -> Result<ExitCode, BoxError> {
    let locks = LockFactory::new(RedisStorage::connect(url).await?);
    // A stops itself, so that it is always at this point. SIGSTOP stops all threads of a process:
    // nothing in it sees the time go by, or renews the lock. The same happens to a process whose
    // virtual machine is moved, or whose memory is swapped out.
    let stop = async { Ok(kill_process(getpid(), Signal::STOP)?) };
    let written = add(&locks, account, A_ADDS, stop).await?;
    Ok(ExitCode::from(if written { 0 } else { REFUSED }))
}

/// Returns when A has read the balance and stands still.
async fn start_a(arguments: [&str; 4]) -> Result<(Child, Pid), BoxError> {
    let a = Command::new(env::current_exe()?)
        .arg("holder-a")
        .args(arguments)
        .kill_on_drop(true)
        .spawn()?;
    let pid = a.id().and_then(|id| Pid::from_raw(id.cast_signed()));
    let pid = pid.ok_or("A has no id")?;
    let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
    // Also something that blocks its thread.
    let status = tokio::task::spawn_blocking(move || waitid(WaitId::Pid(pid), options)).await??;
    match status {
        Some(status) if status.stopped() => Ok((a, pid)),
        _ => Err("A did not come to its write".into()),
    }
}

/// Lets A go on, to its end. Answers whether its write was taken.
async fn wake((a, pid): &mut (Child, Pid)) -> Result<bool, BoxError> {
    kill_process(*pid, Signal::CONT)?;
    match a.wait().await?.code() {
        Some(0) => Ok(true),
        Some(code) if code == i32::from(REFUSED) => Ok(false),
        _ => Err("A has failed".into()),
    }
}

/// One row of the table. Answers whether it is as promised.
async fn run(url: &str, file: &str, id: i64, fenced: bool, after: bool) -> Result<bool, BoxError> {
    let mut a = start_a([url, file, &id.to_string(), &fenced.to_string()]).await?;

    let locks = LockFactory::new(RedisStorage::connect(url).await?);
    let account = open(file, id, fenced)?;
    let (a_written, b_written);
    if after {
        b_written = add(&locks, &account, B_ADDS, async { Ok(()) }).await?;
        a_written = wake(&mut a).await?;
    } else {
        let mut written = false;
        let something = async {
            written = wake(&mut a).await?;
            Ok(())
        };
        b_written = add(&locks, &account, B_ADDS, something).await?;
        a_written = written;
    }

    let balance = account.read(i64::MAX).await?.ok_or("no account")?;
    let added = i64::from(a_written) * A_ADDS + i64::from(b_written) * B_ADDS;
    let lost = START + added - balance;
    let conditions = if fenced { "with" } else { "without" };
    let when = if after {
        "after B's write"
    } else {
        "before B's write"
    };
    let [a, b] = [a_written, b_written].map(|written| if written { "taken" } else { "refused" });
    println!("{conditions:<13}{when:<19}{a:<12}{b:<10}{balance:>8}{lost:>7}");
    Ok(b_written && a_written != fenced && (lost == 0) == fenced)
}

async fn table(url: &str, file: &str) -> Result<bool, BoxError> {
    let db = Connection::open(file)?;
    let columns = "id INTEGER PRIMARY KEY, balance INTEGER, fence INTEGER";
    db.execute(&format!("CREATE TABLE accounts ({columns})"), [])?;

    println!("The balance is {START}. A adds {A_ADDS}, late, and B adds {B_ADDS}.\n");
    println!("conditions   A writes           A's write   B's write  balance   lost");
    let mut right = true;
    for id in 0..4 {
        let (fenced, after) = (id >= 2, id % 2 == 0);
        db.execute("INSERT INTO accounts VALUES (?, ?, 0)", [id, START])?;
        right &= run(url, file, id, fenced, after).await?;
    }
    Ok(right)
}

#[tokio::main]
async fn main() -> Result<ExitCode, BoxError> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["holder-a", url, file, id, fenced] => {
            holder_a(url, &open(file, id.parse()?, fenced.parse()?)?).await
        }
        ["--redis", url] => {
            let folder = env::temp_dir().join(format!("fenced_sqlite-{}", process::id()));
            fs::create_dir(&folder)?;
            let file = folder.join("accounts.db");
            let right = table(url, file.to_str().ok_or("not a path for SQLite")?).await;
            fs::remove_dir_all(&folder)?;
            Ok(if right? {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            })
        }
        _ => {
            eprintln!("usage: fenced_sqlite --redis redis://host:port");
            eprintln!("The holders are two processes: they cannot share locks in memory.");
            Ok(ExitCode::from(2))
        }
    }
}
