//! Calls at a server that answers all of them, and writes down what it hears.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::{
    io::{
        AsyncBufReadExt, AsyncWriteExt, BufReader, DuplexStream, ReadHalf, WriteHalf, duplex, split,
    },
    sync::{
        Semaphore,
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    },
    task::JoinSet,
    time::timeout,
};

use super::*;
use crate::storage::redis::health::Unanswered;

const LIMIT: Duration = Duration::from_secs(20);

type Heard = Arc<Mutex<Vec<String>>>;

/// A way to a server, and the last words of the commands that it has heard.
async fn connect() -> (Batches, Heard) {
    let (batches, heard, answers) = connect_to_gated().await;
    answers.add_permits(Semaphore::MAX_PERMITS);
    (batches, heard)
}

/// The same, to a server that from now on gives as many answers as it may.
async fn connect_to_gated() -> (Batches, Heard, Arc<Semaphore>) {
    let answers = Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
    let (ours, theirs) = duplex(1 << 16);
    let heard = Heard::default();
    let (commands, replies) = split(theirs);
    let (asked, to_answer) = unbounded_channel();
    tokio::spawn(hear(commands, Arc::clone(&heard), asked));
    tokio::spawn(answer(replies, to_answer, Arc::clone(&answers)));
    let info = redis::RedisConnectionInfo::default();
    let config = redis::AsyncConnectionConfig::new().set_response_timeout(None);
    let connection = MultiplexedConnection::new_with_config(&info, ours, config);
    let (connection, driver) = connection.await.unwrap();
    tokio::spawn(driver);
    let batches = Batches::new(connection, Arc::default());
    batches.call([echo(0, 0)]).await.ok().unwrap();
    lock(&heard).clear();
    answers.forget_permits(Semaphore::MAX_PERMITS);
    (batches, heard, answers)
}

async fn hear(
    commands: ReadHalf<DuplexStream>,
    heard: Heard,
    asked: UnboundedSender<()>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(commands).lines();
    // `*2`, `$4`, `ECHO`, `$3`, `1:2`: an array of words with their lengths.
    while let Some(count) = lines.next_line().await? {
        let words: usize = count[1..].parse().unwrap();
        let mut last = None;
        for _ in 0..2 * words {
            last = lines.next_line().await?;
        }
        lock(&heard).extend(last);
        let _ = asked.send(());
    }
    Ok(())
}

async fn answer(
    mut replies: WriteHalf<DuplexStream>,
    mut asked: UnboundedReceiver<()>,
    answers: Arc<Semaphore>,
) -> std::io::Result<()> {
    while asked.recv().await.is_some() {
        answers.acquire().await.unwrap().forget();
        replies.write_all(b"+OK\r\n").await?;
    }
    Ok(())
}

fn echo(task: usize, number: usize) -> Cmd {
    let mut command = redis::cmd("ECHO");
    command.arg(format!("{task}:{number}"));
    command
}

fn open(batches: &Batches) -> usize {
    lock(&batches.0.unsent).open
}

#[tokio::test]
async fn few_calls_go_by_themselves_and_more_go_together() {
    let (batches, _) = connect().await;
    for _ in 0..2 {
        let calls: Vec<_> = (0..6).map(|call| batches.call([echo(0, call)])).collect();
        let alone = calls.iter().map(|call| matches!(call.0, Way::Alone { .. }));
        assert!(alone.eq([true, true, true, false, false, false]));
        assert!(join_all(calls).await.iter().all(Result::is_ok));
    }
}

#[tokio::test]
async fn a_call_that_is_over_is_not_counted_any_more() {
    let (batches, _) = connect().await;
    for calls in [1, FEW, FEW + 1, LARGEST, LARGEST + FEW, 100] {
        let some = || -> Vec<_> {
            (0..calls)
                .map(|call| batches.call([echo(0, call)]))
                .collect()
        };
        let answered = some();
        assert_eq!(open(&batches), calls);
        assert!(join_all(answered).await.iter().all(Result::is_ok));
        assert_eq!(open(&batches), 0, "answered: {calls}");
        drop(some());
        let none = async {
            while open(&batches) > 0 {
                yield_now().await;
            }
        };
        let none = timeout(LIMIT, none).await;
        assert!(none.is_ok(), "given up: {calls}");
    }
}

#[tokio::test]
async fn a_call_does_not_overtake_those_that_are_not_sent_yet() {
    let (batches, heard) = connect().await;
    let mut calls: Vec<_> = (0..4).map(|call| batches.call([echo(0, call)])).collect();
    // So few are open that it could go by itself. What is given up may be sent or not.
    calls.drain(..3);
    calls.push(batches.call([echo(0, 4)]));
    assert!(join_all(calls).await.iter().all(Result::is_ok));
    assert!(lock(&heard).ends_with(&["0:3".to_owned(), "0:4".to_owned()]));
}

#[tokio::test]
async fn each_reply_shows_that_the_connection_lives() {
    let (batches, _) = connect().await;
    for calls in [1, FEW + 1] {
        let slow = Unanswered::new(|| batches.0.health.given_up());
        // Longer than nothing at all may come back.
        std::thread::sleep(Duration::from_millis(300));
        let mut calls: Vec<_> = (0..calls)
            .map(|call| batches.call([echo(0, call)]))
            .collect();
        calls.pop().unwrap().await.ok().unwrap();
        drop(slow);
        assert!(!batches.0.health.is_dead());
    }
}

/// Calls that have no answers, at a server that is near or far.
async fn under_way(is_near: bool) -> (Batches, Heard, Arc<Semaphore>, Vec<Reply>) {
    let (batches, heard, answers) = connect_to_gated().await;
    lock(&batches.0.unsent).crowd = MANY;
    let calls: Vec<_> = (0..8).map(|call| batches.call([echo(0, call)])).collect();
    is_heard(&heard, calls.len()).await;
    assert_eq!(lock(&batches.0.unsent).pipelines, 2, "four and one");
    lock(&batches.0.unsent).is_near = is_near;
    (batches, heard, answers, calls)
}

async fn is_heard(heard: &Heard, calls: usize) {
    let all = async {
        while lock(heard).len() < calls {
            yield_now().await;
        }
    };
    assert!(timeout(LIMIT, all).await.is_ok(), "{calls} calls");
}

#[tokio::test]
async fn where_many_are_open_calls_go_in_parts() {
    let (batches, heard, answers, mut calls) = under_way(true).await;
    let part = lock(&batches.0.unsent).part();
    calls.extend((8..8 + part - 1).map(|call| batches.call([echo(0, call)])));
    for _ in 0..100 {
        yield_now().await;
    }
    assert_eq!(lock(&heard).len(), 8, "the others wait");
    calls.push(batches.call([echo(0, 8 + part)]));
    is_heard(&heard, 8 + part).await;
    assert_eq!(lock(&batches.0.unsent).pipelines, 3);
    answers.add_permits(calls.len());
    assert!(join_all(calls).await.iter().all(Result::is_ok));
}

#[tokio::test]
async fn calls_that_wait_for_others_go_when_those_are_answered() {
    let (batches, heard, answers, mut calls) = under_way(true).await;
    calls.push(batches.call([echo(0, 8)]));
    answers.add_permits(7);
    assert!(join_all(calls.drain(..7)).await.iter().all(Result::is_ok));
    assert_eq!(lock(&heard).len(), 8, "a pipeline is still under way");
    answers.add_permits(1);
    is_heard(&heard, 9).await;
    answers.add_permits(1);
    assert!(join_all(calls).await.iter().all(Result::is_ok));
    assert_eq!(open(&batches), 0);
}

#[tokio::test]
async fn the_first_of_many_calls_does_not_wait_for_others() {
    let (batches, heard, _answers) = connect_to_gated().await;
    lock(&batches.0.unsent).crowd = MANY;
    lock(&batches.0.unsent).is_near = true;
    let calls: Vec<_> = (0..4).map(|call| batches.call([echo(0, call)])).collect();
    is_heard(&heard, calls.len()).await;
}

#[tokio::test]
async fn calls_to_a_server_that_is_far_do_not_wait_for_others() {
    let (batches, heard, answers, mut calls) = under_way(false).await;
    calls.push(batches.call([echo(0, 8)]));
    is_heard(&heard, 9).await;
    answers.add_permits(9);
    assert!(join_all(calls).await.iter().all(Result::is_ok));
}

#[tokio::test]
async fn a_server_is_as_near_as_its_last_replies_were_quick() {
    let (batches, _) = connect().await;
    for (after, is_near) in [(NEAR / 2, true), (NEAR, false), (NEAR / 2, true)] {
        lock(&batches.0.unsent).pipelines = 1;
        batches.0.answered(0, after);
        assert_eq!(lock(&batches.0.unsent).is_near, is_near);
    }
}

#[tokio::test]
async fn a_crowd_is_forgotten_when_it_has_gone() {
    let (batches, _) = connect().await;
    let many: Vec<_> = (0..64).map(|call| batches.call([echo(0, call)])).collect();
    assert!(join_all(many).await.iter().all(Result::is_ok));
    assert!(lock(&batches.0.unsent).crowd >= MANY);
    for call in 0..64 {
        batches.call([echo(0, call)]).await.ok().unwrap();
    }
    assert!(lock(&batches.0.unsent).crowd < MANY);
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

#[test]
fn calls_that_waited_for_others_when_the_runtime_ended_are_told_so() {
    let ends = runtime();
    let (batches, _, _, mut calls) = ends.block_on(under_way(true));
    calls.push(batches.call([echo(0, 8)]));
    drop(ends);
    let told = runtime().block_on(async { timeout(LIMIT, join_all(calls)).await });
    assert!(told.unwrap().iter().all(Result::is_err));
    assert!(batches.0.health.is_dead());
}

#[test]
fn calls_that_were_not_sent_when_their_runtime_ended_are_told_so() {
    let ends = runtime();
    let (batches, _) = ends.block_on(connect());
    // Nobody drives the runtime that is to send them.
    let calls: Vec<_> = (0..6).map(|call| batches.call([echo(0, call)])).collect();
    drop(ends);
    let told = runtime().block_on(async { timeout(LIMIT, join_all(calls)).await });
    assert!(told.unwrap().iter().all(Result::is_err));
    assert_eq!(open(&batches), 0);
    assert!(batches.0.health.is_dead());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_calls_of_a_task_arrive_in_their_order_whatever_others_do() {
    const CALLS: usize = 5_000;
    let (batches, heard) = connect().await;
    let mut tasks = JoinSet::new();
    for task in 0..8 {
        let batches = batches.clone();
        tasks.spawn(async move {
            for call in (0..CALLS).step_by(2) {
                // As a release, and what is asked for next.
                let release = batches.call([echo(task, call)]);
                let next = batches.call([echo(task, call + 1)]);
                next.await.ok().unwrap();
                release.await.ok().unwrap();
            }
        });
    }
    tasks.join_all().await;
    let mut next = [0; 8];
    for heard in lock(&heard).iter() {
        let (task, call) = heard.split_once(':').unwrap();
        let next = &mut next[task.parse::<usize>().unwrap()];
        assert_eq!(call.parse(), Ok(*next), "the next of task {task}");
        *next += 1;
    }
    assert_eq!(next, [CALLS; 8]);
}
