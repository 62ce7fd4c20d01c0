//! Calls of several threads that are sent together: `storage/redis/batch.rs`, with the stand-in for
//! redis-rs's connection (`redis/`).

use std::collections::{HashMap, VecDeque};

use redis::{Cmd, Value, aio::MultiplexedConnection};
use shuttle::{
    future::block_on,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    thread,
};

use self::batch::{Batches, Reply};
use crate::models::{driven, driver, join};

#[path = "../../../src/storage/redis/batch.rs"]
mod batch;
#[path = "../../../src/storage/redis/error.rs"]
mod error;
#[path = "../../../src/storage/redis/health.rs"]
mod health;

/// So many calls go by themselves.
const FEW: usize = 3;

/// A server that answers, in a thread of its own, and writes down what it hears.
struct Server {
    connection: MultiplexedConnection,
    has_ended: Arc<AtomicBool>,
    pipelines: Arc<AtomicUsize>,
    thread: thread::JoinHandle<Vec<String>>,
}

impl Server {
    fn start() -> Self {
        let connection = MultiplexedConnection::default();
        let has_ended = Arc::new(AtomicBool::new(false));
        let pipelines = Arc::new(AtomicUsize::new(0));
        let thread = thread::spawn({
            let (connection, has_ended) = (connection.clone(), Arc::clone(&has_ended));
            let pipelines = Arc::clone(&pipelines);
            move || {
                let mut heard = Vec::new();
                while !has_ended.load(SeqCst) {
                    let Some(call) = connection.next() else {
                        thread::yield_now();
                        continue;
                    };
                    heard.extend_from_slice(&call.words);
                    pipelines.fetch_add(call.is_pipeline.into(), SeqCst);
                    call.answer();
                }
                heard
            }
        });
        Self {
            connection,
            has_ended,
            pipelines,
            thread,
        }
    }

    fn batches(&self) -> Batches {
        Batches::new(self.connection.clone(), Arc::default())
    }

    /// What it has heard.
    fn end(self) -> Vec<String> {
        self.has_ended.store(true, SeqCst);
        self.thread.join().expect("no panic")
    }
}

fn echo(task: usize, number: usize) -> Cmd {
    let mut command = redis::cmd("ECHO");
    command.arg(format!("{task}:{number}"));
    command
}

async fn is_answered(task: usize, number: usize, reply: Reply) {
    let Ok(Value::SimpleString(word)) = reply.await else {
        panic!("no answer to {task}:{number}");
    };
    assert_eq!(word, format!("{task}:{number}"), "another's answer");
}

fn callers(
    batches: &Batches,
    tasks: usize,
    caller: impl Fn(usize, &Batches) + Copy + Send + 'static,
) {
    let threads = (0..tasks).map(|task| {
        let batches = batches.clone();
        thread::spawn(move || caller(task, &batches))
    });
    join(threads.collect());
}

/// No call is counted that is over: as few as may go by themselves do.
fn none_is_open(server: &Server, batches: &Batches) {
    // What was given up is handed out to nobody, a moment later.
    loop {
        let before = server.pipelines.load(SeqCst);
        let calls: Vec<_> = (0..FEW)
            .map(|call| batches.call([echo(99, call)]))
            .collect();
        for (number, reply) in calls.into_iter().enumerate() {
            block_on(is_answered(99, number, reply));
        }
        if server.pipelines.load(SeqCst) == before {
            return;
        }
        thread::yield_now();
    }
}

/// The words of each task arrived in their order.
fn in_order(heard: &[String]) {
    let mut last = HashMap::new();
    for (task, number) in heard.iter().filter_map(|word| word.split_once(':')) {
        let number: usize = number.parse().expect("a number");
        let before = last.insert(task, number).filter(|_| task != "99");
        assert!(before < Some(number), "{task}:{number} was overtaken");
    }
}

pub(crate) fn in_their_order() {
    driven(|| {
        let server = Server::start();
        let batches = server.batches();
        callers(&batches, 3, |task, batches| {
            for number in [0, 2] {
                // As a release, and what is asked for next.
                let release = batches.call([echo(task, number)]);
                let next = batches.call([echo(task, number + 1)]);
                block_on(is_answered(task, number + 1, next));
                block_on(is_answered(task, number, release));
            }
        });
        none_is_open(&server, &batches);
        in_order(&server.end());
    });
}

pub(crate) fn full_batches() {
    driven(|| {
        let server = Server::start();
        let batches = server.batches();
        callers(&batches, 3, |task, batches| {
            // When the first were answered, the server is known to be near: others wait for them.
            let mut calls: VecDeque<_> = (0..12)
                .map(|call| batches.call([echo(task, call)]))
                .collect();
            for number in 0..24 {
                let reply = calls.pop_front().expect("twelve are open");
                block_on(is_answered(task, number, reply));
                calls.push_back(batches.call([echo(task, number + 12)]));
            }
        });
        none_is_open(&server, &batches);
        in_order(&server.end());
    });
}

pub(crate) fn given_up() {
    driven(|| {
        let server = Server::start();
        let batches = server.batches();
        callers(&batches, 3, |task, batches| {
            let mut calls: Vec<_> = (0..3)
                .map(|call| batches.call([echo(task, call)]))
                .collect();
            // One by one, as the others go on.
            drop(calls.remove(task));
            drop(calls.remove(0));
            for reply in calls {
                assert!(block_on(reply).is_ok());
            }
        });
        none_is_open(&server, &batches);
        in_order(&server.end());
    });
}

pub(crate) fn the_runtime_ends() {
    let server = Server::start();
    let (runtime, batches) = {
        let runtime = driver();
        let entered = runtime.enter();
        let batches = server.batches();
        drop(entered);
        (runtime, batches)
    };
    let ends = thread::spawn(move || {
        for _ in 0..2 {
            runtime.block_on(tokio::task::yield_now());
            thread::yield_now();
        }
        drop(runtime);
    });
    callers(&batches, 2, |task, batches| {
        let calls: Vec<_> = (0..4)
            .map(|call| batches.call([echo(task, call)]))
            .collect();
        // Yes or no, but something.
        for reply in calls {
            let _ = block_on(reply);
        }
    });
    join(vec![ends]);
    server.end();
}
