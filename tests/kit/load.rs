//! Work that goes on while servers fail.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering::SeqCst},
};

use tokio::task::JoinSet;
use tower_distributed_lock::{LockFactory, LockOptions, error::LockError};

use super::{History, LIMIT, eventually, ms, within};

/// Four holders a key, two of each factory, take turns until they are told to stop. A storage that
/// is away is asked again; any other error is a failure of the test.
pub struct Load {
    history: Arc<History>,
    keys: Vec<String>,
    stop: Arc<AtomicBool>,
    workers: JoinSet<()>,
}

impl Load {
    pub fn start(factories: [LockFactory; 2], keys: &[&str], options: LockOptions) -> Self {
        let history = Arc::new(History::default());
        let stop = Arc::new(AtomicBool::new(false));
        let mut workers = JoinSet::new();
        for worker in 0..4 * keys.len() {
            let key = keys[worker / 4].to_owned();
            let lock = factories[worker % 2].create_lock(key.as_str());
            let lock = lock.expect("a valid key");
            let (history, stop) = (Arc::clone(&history), Arc::clone(&stop));
            workers.spawn(async move {
                while !stop.load(SeqCst) {
                    match lock.lock(options).await {
                        Ok(guard) => {
                            let work = tokio::time::sleep(ms(2));
                            let by = ["first", "second"][worker % 2];
                            history.stay((&key, by), guard, work).await;
                        }
                        Err(LockError::Storage(error)) => {
                            assert!(error.kind().is_transient(), "{error:?}");
                        }
                        Err(error) => panic!("{error:?}"),
                    }
                }
            });
        }
        Self {
            history,
            keys: keys.iter().map(|key| (*key).to_owned()).collect(),
            stop,
            workers,
        }
    }

    /// Each key is locked some times more.
    pub async fn goes_on(&self) {
        let before = self.history.len();
        eventually("work goes on", LIMIT, async || {
            let stays = self.history.stays();
            self.keys.iter().all(|key| {
                let after = stays
                    .iter()
                    .filter(|stay| stay.key == *key && stay.number >= before);
                after.count() > 10
            })
        })
        .await;
    }

    /// Nobody was in with another without a word. Answers how many lost their lock.
    #[allow(
        clippy::print_stdout,
        reason = "how many is of interest, and no failure"
    )]
    pub async fn ends(mut self) -> usize {
        self.stop.store(true, SeqCst);
        let ends = async {
            while let Some(worker) = self.workers.join_next().await {
                worker.expect("no worker failed");
            }
        };
        within(LIMIT, "the workers end", ends).await;
        let lost = self.history.check();
        println!("{} stays, {lost} of them lost", self.history.len());
        lost
    }
}
