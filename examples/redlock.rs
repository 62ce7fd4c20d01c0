//! A lock over several Redis servers: run this in some terminals, then stop and start a server.
//!
//! ```text
//! for port in 7001 7002 7003; do redis-server --port $port --save "" --daemonize yes; done
//! cargo run --example redlock -- redis://127.0.0.1:7001 redis://127.0.0.1:7002 redis://127.0.0.1:7003
//! ```

use std::{env, time::Duration};

use tower_distributed_lock::{LockFactory, LockOptions, Redlock, Unlocked, error::BoxError};

#[tokio::main]
#[expect(clippy::print_stdout, reason = "it is there to be watched")]
async fn main() -> Result<(), BoxError> {
    let storage = Redlock::connect(env::args().skip(1)).await?;
    println!(
        "{} of {} servers are needed",
        storage.quorum(),
        storage.nodes()
    );
    let lock = LockFactory::new(storage).create_lock("example")?;
    loop {
        match lock.lock(LockOptions::default()).await {
            Ok(guard) => {
                println!("in, with the fencing token {:?}", guard.fencing_token());
                tokio::time::sleep(Duration::from_secs(1)).await;
                match guard.unlock().await? {
                    Unlocked::Held => println!("out"),
                    Unlocked::Lost => println!("out, but the lock was lost before"),
                }
            }
            // Too many servers are down, say: the error has the numbers.
            Err(error) => println!("not in: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
