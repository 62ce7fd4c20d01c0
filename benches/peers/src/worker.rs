//! The other processes: this program, started by itself with the argument `worker`.
//!
//! A worker is told by lines on its stdin what to do, and answers by lines on its stdout. It ends
//! when its stdin does, so none outlives the benchmark.

use std::io::{self, Write};

use crate::{
    Error, clock,
    load::{self, Check, Job, Window},
    peers::{
        Locks, Peer,
        by_hand::ByHand,
        distributed_lock::DistributedLock,
        ours::{Dispatched, Ours},
        ping::Ping,
        pubsub::Pubsub,
        redis_lock::RedisLock,
        rslock::Rslock,
        service::{self, Mutexes, Service},
    },
};

/// Threads of the runtime, the same in each process and for each peer.
pub(crate) const THREADS: usize = 2;

/// What a worker is there for.
pub(crate) enum Errand {
    /// Waits for `go`, then does the job and answers with its tally.
    Load(Job),
    /// Locks this key and releases it, one at a time, when it is told.
    Handoff(Peer, String),
}

impl Errand {
    /// The arguments of its process, after `worker` and the URL.
    pub(crate) fn to_arguments(&self) -> Vec<String> {
        match self {
            Self::Load(job) => [vec!["load".to_owned()], job.to_arguments()].concat(),
            Self::Handoff(peer, key) => {
                vec!["handoff".to_owned(), peer.name().to_owned(), key.clone()]
            }
        }
    }

    fn from_arguments(arguments: &[String]) -> Result<Self, Error> {
        match arguments {
            [kind, job @ ..] if kind == "load" => Ok(Self::Load(Job::from_arguments(job)?)),
            [kind, peer, key] if kind == "handoff" => {
                Ok(Self::Handoff(Peer::named(peer)?, key.clone()))
            }
            _ => Err(format!("a worker cannot do {arguments:?}").into()),
        }
    }

    fn peer(&self) -> Peer {
        match self {
            Self::Load(job) => job.peer,
            Self::Handoff(peer, _) => *peer,
        }
    }
}

/// A worker's life.
pub(crate) fn main(arguments: &[String]) -> Result<(), Error> {
    let [url, arguments @ ..] = arguments else {
        return Err("a worker without a server".into());
    };
    let errand = Errand::from_arguments(arguments)?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()?
        .block_on(async {
            match errand.peer() {
                Peer::Ours => carry_out(url, errand, Ours::connect(url).await?).await,
                Peer::OursUnfenced => carry_out(url, errand, Ours::unfenced(url).await?).await,
                Peer::OursReplicated => carry_out(url, errand, Ours::replicated(url).await?).await,
                Peer::OursDispatched => {
                    carry_out(url, errand, Dispatched(Ours::connect(url).await?)).await
                }
                Peer::ByHand => carry_out(url, errand, ByHand::connect(url).await?).await,
                Peer::RslockDefault => carry_out(url, errand, Rslock::as_it_comes(url)).await,
                Peer::RslockTuned => carry_out(url, errand, Rslock::tuned(url)).await,
                Peer::Ping => carry_out(url, errand, Ping::connect(url).await?).await,
                Peer::Pubsub => carry_out(url, errand, Pubsub::connect(url).await?).await,
                Peer::OursRedlock => carry_out(url, errand, Ours::redlock(url, true).await?).await,
                Peer::OursRedlockUnfenced => {
                    carry_out(url, errand, Ours::redlock(url, false).await?).await
                }
                Peer::RedisLock => carry_out(url, errand, RedisLock::connect(url).await?).await,
                Peer::DistributedLock => {
                    carry_out(url, errand, DistributedLock::connect(url).await?).await
                }
                Peer::AxumOurs => {
                    let service = Service::layered(Ours::connect(url).await?).await?;
                    carry_out(url, errand, service).await
                }
                Peer::AxumOursUnfenced => {
                    let service = Service::layered(Ours::unfenced(url).await?).await?;
                    carry_out(url, errand, service).await
                }
                Peer::AxumByHand => {
                    let service = Service::by_hand(ByHand::connect(url).await?).await?;
                    carry_out(url, errand, service).await
                }
                Peer::AxumRslock => {
                    let service = Service::by_hand(Rslock::as_it_comes(url)).await?;
                    carry_out(url, errand, service).await
                }
                Peer::AxumMutex => {
                    let service = Service::by_hand(Mutexes::default()).await?;
                    carry_out(url, errand, service).await
                }
                Peer::AxumNone => {
                    let service = Service::by_hand(service::None).await?;
                    carry_out(url, errand, service).await
                }
            }
        })
}

async fn carry_out<L: Locks>(url: &str, errand: Errand, locks: L) -> Result<(), Error> {
    match errand {
        Errand::Load(job) => {
            let check = match job.checked {
                true => Some(Check::connect(url.split(',').next().unwrap_or(url), &job.run).await?),
                false => None,
            };
            say("ready")?;
            let Some(line) = hear()? else { return Ok(()) };
            let words: Vec<&str> = line.split(' ').collect();
            let ["go", from, until] = words[..] else {
                return Err(format!("a worker was told {line:?}").into());
            };
            let window = Window {
                from: from.parse()?,
                until: until.parse()?,
            };
            let tally = load::run(locks, &job, window, check).await?;
            say(&format!("done {}", tally.to_line()))
        }
        Errand::Handoff(_, key) => pass_on(locks, key).await,
    }
}

/// One end of the `handoff` row.
async fn pass_on<L: Locks>(locks: L, key: String) -> Result<(), Error> {
    let mut held = None;
    say("ready")?;
    // Reading blocks this thread, which is none of the runtime's workers. All else happens on those,
    // where a service would do it.
    while let Some(line) = hear()? {
        match (line.as_str(), held.take()) {
            ("lock", None) => {
                say("asking")?;
                let (locks, key) = (locks.clone(), key.clone());
                let entry = async move {
                    let guard = locks.lock(&key).await?;
                    Ok::<_, Error>((guard, clock::now()))
                };
                let (guard, entered) = tokio::spawn(entry).await??;
                held = Some(guard);
                say(&format!("entered {entered}"))?;
            }
            ("release", Some(guard)) => {
                let locks = locks.clone();
                let exit = async move {
                    let released = clock::now();
                    locks.release(guard).await?;
                    Ok::<_, Error>(released)
                };
                let released = tokio::spawn(exit).await??;
                say(&format!("released {released}"))?;
            }
            ("end", None) => break,
            (other, _) => return Err(format!("a worker was told {other:?}").into()),
        }
    }
    locks.finish().await?;
    say("done")
}

fn say(line: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}

/// The next line; `None` if the benchmark has gone.
fn hear() -> Result<Option<String>, Error> {
    let mut line = String::new();
    let length = io::stdin().read_line(&mut line)?;
    Ok((length > 0).then(|| line.trim_end().to_owned()))
}
