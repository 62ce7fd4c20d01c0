//! Calls at a server that answers all of them, and writes down what it hears.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::{
    io::{
        AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, ReadHalf, WriteHalf,
        duplex, split,
    },
    sync::{
        Semaphore,
        mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    },
    task::{JoinSet, yield_now},
    time::timeout,
};

use super::*;
use crate::storage::redis::health::Unanswered;

const LIMIT: Duration = Duration::from_secs(20);

type Heard = Arc<Mutex<Vec<String>>>;

/// A way to a server, and the last words of the commands that it has heard.
async fn connect() -> (Pipe, Heard) {
    let (pipe, heard, answers) = connect_to_gated().await;
    answers.add_permits(Semaphore::MAX_PERMITS);
    (pipe, heard)
}

/// A pipe, and the other end of its stream.
fn piped(room: usize) -> (Pipe, DuplexStream) {
    let (ours, theirs) = duplex(room);
    let (read, write) = split(ours);
    let ways = Ways {
        read: Box::new(read),
        write: Box::new(write),
    };
    (Pipe::new(ways, Arc::default(), None), theirs)
}

/// The same, to a server that from now on gives as many answers as it may.
async fn connect_to_gated() -> (Pipe, Heard, Arc<Semaphore>) {
    let answers = Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
    let (pipe, theirs) = piped(1 << 16);
    let heard = Heard::default();
    let (commands, replies) = split(theirs);
    let (asked, to_answer) = unbounded_channel();
    tokio::spawn(hear(commands, Arc::clone(&heard), asked));
    tokio::spawn(answer(replies, to_answer, Arc::clone(&answers)));
    pipe.call([echo(0, 0)]).await.ok().unwrap();
    lock(&heard).clear();
    answers.forget_permits(Semaphore::MAX_PERMITS);
    (pipe, heard, answers)
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

fn open(pipe: &Pipe) -> usize {
    lock(&pipe.0.0.calls).callers.len()
}

#[tokio::test]
async fn few_calls_go_by_themselves_and_more_go_together() {
    let (pipe, _) = connect().await;
    for _ in 0..2 {
        let calls: Vec<_> = (0..6).map(|call| pipe.call([echo(0, call)])).collect();
        {
            let calls = lock(&pipe.0.0.calls);
            let alone = calls.parts.iter().map(|part| part.calls);
            assert!(alone.eq([1, 1, 1]));
            assert_eq!(calls.unwritten, 3);
        }
        assert!(join_all(calls).await.iter().all(Result::is_ok));
    }
}

#[tokio::test]
async fn a_call_that_is_over_is_not_counted_any_more() {
    let (pipe, _) = connect().await;
    for calls in [1, FEW, FEW + 1, LARGEST, LARGEST + FEW, 100] {
        let some = || -> Vec<_> { (0..calls).map(|call| pipe.call([echo(0, call)])).collect() };
        let answered = some();
        assert_eq!(open(&pipe), calls);
        assert!(join_all(answered).await.iter().all(Result::is_ok));
        assert_eq!(open(&pipe), 0, "answered: {calls}");
        drop(some());
        let none = async {
            while open(&pipe) > 0 {
                yield_now().await;
            }
        };
        let none = timeout(LIMIT, none).await;
        assert!(none.is_ok(), "given up: {calls}");
    }
}

#[tokio::test]
async fn a_call_does_not_overtake_those_that_are_not_sent_yet() {
    let (pipe, heard) = connect().await;
    let mut calls: Vec<_> = (0..4).map(|call| pipe.call([echo(0, call)])).collect();
    // So few are open that it could go by itself. What is given up may be sent or not.
    calls.drain(..3);
    calls.push(pipe.call([echo(0, 4)]));
    assert!(join_all(calls).await.iter().all(Result::is_ok));
    assert!(lock(&heard).ends_with(&["0:3".to_owned(), "0:4".to_owned()]));
}

#[tokio::test]
async fn each_reply_shows_that_the_connection_lives() {
    let (pipe, _) = connect().await;
    for calls in [1, FEW + 1] {
        let slow = Unanswered::new(|| pipe.0.0.health.given_up());
        // Longer than nothing at all may come back.
        std::thread::sleep(Duration::from_millis(300));
        let mut calls: Vec<_> = (0..calls).map(|call| pipe.call([echo(0, call)])).collect();
        calls.pop().unwrap().await.ok().unwrap();
        drop(slow);
        assert!(!pipe.0.0.health.is_dead());
    }
}

/// Calls that have no answers, at a server that is near or far.
async fn under_way(is_near: bool) -> (Pipe, Heard, Arc<Semaphore>, Vec<Reply>) {
    let (pipe, heard, answers) = connect_to_gated().await;
    {
        let mut state = lock(&pipe.0.0.calls);
        state.crowd = MANY;
        state.is_near = false;
    }
    let calls: Vec<_> = (0..8).map(|call| pipe.call([echo(0, call)])).collect();
    is_heard(&heard, calls.len()).await;
    let mut state = lock(&pipe.0.0.calls);
    let parts = state.parts.iter().map(|part| part.calls);
    assert!(parts.eq([1, 1, 1, 4, 1]));
    state.is_near = is_near;
    drop(state);
    (pipe, heard, answers, calls)
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
    let (pipe, heard, answers, mut calls) = under_way(true).await;
    let part = lock(&pipe.0.0.calls).part();
    calls.extend((8..8 + part - 1).map(|call| pipe.call([echo(0, call)])));
    for _ in 0..100 {
        yield_now().await;
    }
    assert_eq!(lock(&heard).len(), 8, "the others wait");
    calls.push(pipe.call([echo(0, 8 + part)]));
    is_heard(&heard, 8 + part).await;
    assert_eq!(lock(&pipe.0.0.calls).parts.len(), 6);
    answers.add_permits(calls.len());
    assert!(join_all(calls).await.iter().all(Result::is_ok));
}

#[tokio::test]
async fn calls_that_wait_for_others_go_when_those_are_answered() {
    let (pipe, heard, answers, mut calls) = under_way(true).await;
    calls.push(pipe.call([echo(0, 8)]));
    answers.add_permits(7);
    assert!(join_all(calls.drain(..7)).await.iter().all(Result::is_ok));
    assert_eq!(lock(&heard).len(), 8, "a part is still under way");
    answers.add_permits(1);
    is_heard(&heard, 9).await;
    answers.add_permits(1);
    assert!(join_all(calls).await.iter().all(Result::is_ok));
    assert_eq!(open(&pipe), 0);
}

#[tokio::test]
async fn the_first_of_many_calls_does_not_wait_for_others() {
    let (pipe, heard, _answers) = connect_to_gated().await;
    lock(&pipe.0.0.calls).crowd = MANY;
    lock(&pipe.0.0.calls).is_near = true;
    let calls: Vec<_> = (0..FEW).map(|call| pipe.call([echo(0, call)])).collect();
    is_heard(&heard, calls.len()).await;
}

#[tokio::test]
async fn calls_to_a_server_that_is_far_do_not_wait_for_others() {
    let (pipe, heard, answers, mut calls) = under_way(false).await;
    calls.push(pipe.call([echo(0, 8)]));
    is_heard(&heard, 9).await;
    answers.add_permits(9);
    assert!(join_all(calls).await.iter().all(Result::is_ok));
}

#[test]
fn a_server_is_as_near_as_its_last_replies_were_quick() {
    let mut calls = Calls::default();
    for (after, is_near) in [(NEAR / 2, true), (NEAR, false), (NEAR / 2, true)] {
        calls.answered(after);
        assert_eq!(calls.is_near, is_near);
    }
}

#[tokio::test]
async fn a_crowd_is_forgotten_when_it_has_gone() {
    let (pipe, _) = connect().await;
    let many: Vec<_> = (0..64).map(|call| pipe.call([echo(0, call)])).collect();
    assert!(join_all(many).await.iter().all(Result::is_ok));
    assert!(lock(&pipe.0.0.calls).crowd >= MANY);
    for call in 0..64 {
        pipe.call([echo(0, call)]).await.ok().unwrap();
    }
    assert!(lock(&pipe.0.0.calls).crowd < MANY);
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
    let (pipe, _, _, mut calls) = ends.block_on(under_way(true));
    calls.push(pipe.call([echo(0, 8)]));
    drop(ends);
    let told = runtime().block_on(async { timeout(LIMIT, join_all(calls)).await });
    assert!(told.unwrap().iter().all(Result::is_err));
    assert!(pipe.0.0.health.is_dead());
}

#[test]
fn calls_that_were_not_sent_when_their_runtime_ended_are_told_so() {
    let ends = runtime();
    let (pipe, _) = ends.block_on(connect());
    // Nobody drives the runtime that is to send them.
    let calls: Vec<_> = (0..6).map(|call| pipe.call([echo(0, call)])).collect();
    drop(ends);
    let told = runtime().block_on(async { timeout(LIMIT, join_all(calls)).await });
    assert!(told.unwrap().iter().all(Result::is_err));
    assert_eq!(open(&pipe), 0);
    assert!(pipe.0.0.health.is_dead());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn the_calls_of_a_task_arrive_in_their_order_whatever_others_do() {
    const CALLS: usize = 5_000;
    let (pipe, heard) = connect().await;
    let mut tasks = JoinSet::new();
    for task in 0..8 {
        let pipe = pipe.clone();
        tasks.spawn(async move {
            for call in (0..CALLS).step_by(2) {
                // As a release, and what is asked for next.
                let release = pipe.call([echo(task, call)]);
                let next = pipe.call([echo(task, call + 1)]);
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

#[tokio::test]
async fn calls_that_the_socket_has_no_room_for_go_on_when_it_has() {
    let (pipe, theirs) = piped(7);
    let (commands, mut replies) = split(theirs);
    let mut calls = JoinSet::new();
    for call in 0..40 {
        calls.spawn(pipe.call([echo(0, call), echo(1, call)]));
    }
    let heard = Heard::default();
    let (asked, mut to_answer) = unbounded_channel();
    tokio::spawn(hear(commands, Arc::clone(&heard), asked));
    for _ in 0..80 {
        timeout(LIMIT, to_answer.recv()).await.unwrap();
    }
    let expected = (0..40).flat_map(|call| [format!("0:{call}"), format!("1:{call}")]);
    assert!(lock(&heard).iter().cloned().eq(expected));
    for _ in 0..80 {
        replies.write_all(b"$3\r\nyes\r\n").await.unwrap();
    }
    while let Some(reply) = timeout(LIMIT, calls.join_next()).await.unwrap() {
        let yes = Value::BulkString(b"yes".to_vec());
        assert_eq!(
            reply.unwrap().unwrap(),
            Value::Array(vec![yes.clone(), yes])
        );
    }
}

#[tokio::test]
async fn replies_are_read_however_they_are_cut_and_what_is_said_unasked_is_none() {
    let (pipe, mut theirs) = piped(1 << 16);
    let said =
        b">2\r\n+message\r\n:7\r\n:1\r\n*2\r\n$3\r\na\r\n\r\n_\r\n>1\r\n+x\r\n-ERR no\r\n+OK\r\n";
    for piece in 1..said.len() {
        let calls = [
            pipe.call([echo(0, 0)]),
            pipe.call([echo(0, 1)]),
            pipe.call([echo(0, 2), echo(0, 3)]),
        ];
        for part in said.chunks(piece) {
            theirs.write_all(part).await.unwrap();
            yield_now().await;
        }
        let replies = timeout(LIMIT, join_all(calls)).await.unwrap();
        let replies: Vec<_> = replies.into_iter().map(Result::unwrap).collect();
        let Value::Array(several) = &replies[2] else {
            panic!("{replies:?}");
        };
        assert_eq!(replies[0], Value::Int(1));
        let bulk = Value::BulkString(b"a\r\n".to_vec());
        assert_eq!(replies[1], Value::Array(vec![bulk, Value::Nil]));
        assert!(matches!(&several[..], [Value::ServerError(_), Value::Okay]));
    }
}

#[tokio::test]
async fn a_reply_may_be_longer_than_what_is_read_at_once() {
    let (pipe, mut theirs) = piped(1 << 12);
    let call = pipe.call([echo(0, 0)]);
    let text = "x".repeat(5 * READ);
    let said = format!("${}\r\n{text}\r\n", text.len());
    theirs.write_all(said.as_bytes()).await.unwrap();
    let reply = timeout(LIMIT, call).await.unwrap().unwrap();
    assert_eq!(reply, Value::BulkString(text.into_bytes()));
}

#[tokio::test]
async fn whoever_waits_is_told_when_the_stream_ends_or_makes_no_sense() {
    for last in [&b""[..], b":1\r\nhello\r\n", b":1\r\n$2\r\nabcd"] {
        let (pipe, mut theirs) = piped(1 << 12);
        let calls: Vec<_> = (0..9).map(|call| pipe.call([echo(0, call)])).collect();
        theirs.write_all(last).await.unwrap();
        if last.is_empty() {
            drop(theirs);
        }
        let told = timeout(LIMIT, join_all(calls)).await.unwrap();
        assert_eq!(told[0].is_ok(), !last.is_empty());
        assert!(told[1..].iter().all(Result::is_err));
        assert!(pipe.0.0.health.is_dead());
        // And whoever comes then.
        assert!(
            timeout(LIMIT, pipe.call([echo(0, 9)]))
                .await
                .unwrap()
                .is_err()
        );
    }
}

/// A socket that takes so many bytes, and then does what it is told.
struct Takes {
    bytes: Arc<Mutex<Vec<u8>>>,
    room: usize,
    then: Then,
}

#[derive(Clone, Copy, PartialEq)]
enum Then {
    Fails,
    FailsOnce,
    /// Flushes only when it was asked twice.
    FlushesLate,
}

impl AsyncWrite for Takes {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.room == 0 {
            if self.then == Then::FailsOnce {
                self.room = usize::MAX;
            }
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let some = bytes.len().min(self.room);
        self.room -= some;
        self.bytes.lock().unwrap().extend_from_slice(&bytes[..some]);
        Poll::Ready(Ok(some))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.then == Then::FlushesLate {
            self.then = Then::Fails;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.bytes.lock().unwrap().extend_from_slice(b"flushed");
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

fn taking(room: usize, then: Then) -> (Pipe, DuplexStream, Arc<Mutex<Vec<u8>>>) {
    let (read, theirs) = duplex(1 << 12);
    let bytes = Arc::default();
    let takes = Takes {
        bytes: Arc::clone(&bytes),
        room,
        then,
    };
    let ways = Ways {
        read: Box::new(read),
        write: Box::new(takes),
    };
    (Pipe::new(ways, Arc::default(), None), theirs, bytes)
}

#[tokio::test]
async fn whoever_waits_is_told_when_nothing_can_be_written() {
    let (pipe, _theirs, _) = taking(0, Then::Fails);
    let calls: Vec<_> = (0..9).map(|call| pipe.call([echo(0, call)])).collect();
    let told = timeout(LIMIT, join_all(calls)).await.unwrap();
    assert!(told.iter().all(Result::is_err));
    assert!(pipe.0.0.health.is_dead());
}

#[tokio::test]
async fn replies_that_came_before_nothing_could_be_written_count() {
    let mut command = Vec::new();
    echo(0, 0).write_packed_command(&mut command);
    let (pipe, mut theirs, _) = taking(command.len(), Then::Fails);
    let first = pipe.call([echo(0, 0)]);
    theirs.write_all(b":7\r\n").await.unwrap();
    let second = pipe.call([echo(0, 1)]);
    assert_eq!(timeout(LIMIT, first).await.unwrap().unwrap(), Value::Int(7));
    assert!(timeout(LIMIT, second).await.unwrap().is_err());
}

#[tokio::test]
async fn nothing_is_written_behind_a_part_of_a_command() {
    let (pipe, _theirs, bytes) = taking(5, Then::FailsOnce);
    let calls = [pipe.call([echo(0, 0)]), pipe.call([echo(0, 1)])];
    let told = timeout(LIMIT, join_all(calls)).await.unwrap();
    assert!(told.iter().all(Result::is_err));
    assert_eq!(bytes.lock().unwrap().len(), 5);
}

#[tokio::test]
async fn what_a_stream_has_taken_is_flushed() {
    let (pipe, _theirs, bytes) = taking(usize::MAX, Then::FlushesLate);
    let _call = pipe.call([echo(0, 0)]);
    let flushed = async {
        while !bytes.lock().unwrap().ends_with(b"flushed") {
            yield_now().await;
        }
    };
    assert!(timeout(LIMIT, flushed).await.is_ok());
}

#[tokio::test]
async fn a_reply_may_say_that_the_connection_is_of_no_more_use() {
    let (pipe, mut theirs) = piped(1 << 12);
    for (reply, is_last) in [
        (&b"-ERR no\r\n"[..], false),
        (b"-READONLY a replica\r\n", true),
    ] {
        let call = pipe.call([echo(0, 0)]);
        theirs.write_all(reply).await.unwrap();
        assert!(timeout(LIMIT, call).await.unwrap().is_ok());
        assert_eq!(pipe.0.0.health.is_dead(), is_last);
    }
}

#[tokio::test]
async fn a_reply_that_nobody_asked_for_ends_the_stream() {
    let (pipe, mut theirs) = piped(1 << 12);
    assert!(!pipe.0.0.health.is_dead());
    theirs.write_all(b":1\r\n").await.unwrap();
    let mut rest = Vec::new();
    assert!(timeout(LIMIT, theirs.read_to_end(&mut rest)).await.is_ok());
    assert!(
        timeout(LIMIT, pipe.call([echo(0, 0)]))
            .await
            .unwrap()
            .is_err()
    );
}

#[tokio::test]
async fn a_reply_is_not_for_a_call_that_is_not_written() {
    let (pipe, _, _, mut calls) = under_way(true).await;
    let unwritten = pipe.call([echo(0, 8)]);
    {
        let mut state = lock(&pipe.0.0.calls);
        state.callers.drain(..8);
        state.parts.clear();
    }
    let mut reader = reader(&pipe);
    reader.bytes[..5].copy_from_slice(b"+OK\r\n");
    reader.come = 5;
    assert!(reader.tell().is_err());
    drop(reader);
    assert!(timeout(LIMIT, unwritten).await.unwrap().is_err());
    calls.clear();
}

/// Another reading task for the same stream, that nobody polls.
fn reader(pipe: &Pipe) -> Reader {
    Reader {
        shared: Arc::clone(&pipe.0.0),
        read: Box::new(tokio::io::empty()),
        bytes: vec![0; READ],
        come: 0,
        replies: Vec::new(),
        told: Vec::new(),
        pushes: None,
        is_due: false,
    }
}

#[tokio::test]
async fn the_other_side_sees_the_end_though_calls_could_still_be_made() {
    let (pipe, mut theirs) = piped(1 << 12);
    theirs.write_all(b"what?\r\n").await.unwrap();
    let mut rest = Vec::new();
    let seen = timeout(LIMIT, theirs.read_to_end(&mut rest)).await.unwrap();
    assert!(seen.is_ok());
    drop(pipe);
}

#[tokio::test]
async fn what_waits_for_others_is_written_before_a_stream_is_left_unless_that_was_given_up() {
    for is_given_up in [false, true] {
        let (pipe, heard, answers, mut calls) = under_way(true).await;
        calls.push(pipe.call([echo(0, 8)]));
        let health = Arc::clone(&pipe.0.0.health);
        if is_given_up {
            health.kill();
        }
        drop(pipe);
        let told = timeout(LIMIT, join_all(calls)).await.unwrap();
        assert!(told.iter().all(Result::is_err));
        if !is_given_up {
            is_heard(&heard, 9).await;
        }
        for _ in 0..100 {
            yield_now().await;
        }
        assert_eq!(lock(&heard).len(), if is_given_up { 8 } else { 9 });
        drop(answers);
    }
}

#[tokio::test]
async fn the_stream_ends_with_the_last_who_can_make_calls() {
    let (pipe, mut theirs) = piped(1 << 12);
    let other = pipe.clone();
    let call = pipe.call([echo(0, 0)]);
    drop(pipe);
    yield_now().await;
    theirs.write_all(b":1\r\n").await.unwrap();
    assert_eq!(timeout(LIMIT, call).await.unwrap().unwrap(), Value::Int(1));
    let unanswered = other.call([echo(0, 1)]);
    drop(other);
    assert!(timeout(LIMIT, unanswered).await.unwrap().is_err());
    let mut rest = Vec::new();
    let ended = timeout(LIMIT, theirs.read_to_end(&mut rest)).await.unwrap();
    assert!(ended.is_ok());
}

#[tokio::test]
async fn whoever_subscribes_is_told_what_comes_unasked_and_that_nothing_comes_any_more() {
    let (ours, mut theirs) = duplex(1 << 12);
    let (read, write) = split(ours);
    let ways = Ways {
        read: Box::new(read),
        write: Box::new(write),
    };
    let (tell, mut told) = unbounded_channel();
    let pushes = Box::new(move |unasked| {
        let _ = tell.send(match unasked {
            Unasked::Push(push) => Some(push.data),
            Unasked::Over => None,
        });
    });
    let pipe = Pipe::new(ways, Arc::default(), Some(pushes));
    let subscribed = pipe.call([redis::cmd("SUBSCRIBE")]);
    let ping = pipe.call([redis::cmd("PING")]);
    let said = b">2\r\n+message\r\n:1\r\n>3\r\n+subscribe\r\n+inbox\r\n:1\r\n>2\r\n+message\r\n:2\r\n+PONG\r\n";
    theirs.write_all(said).await.unwrap();
    let reply = timeout(LIMIT, subscribed).await.unwrap().unwrap();
    assert!(matches!(
        reply,
        Value::Push {
            kind: PushKind::Subscribe,
            ..
        }
    ));
    let pong = Value::SimpleString("PONG".to_owned());
    assert_eq!(timeout(LIMIT, ping).await.unwrap().unwrap(), pong);
    drop(theirs);
    for expected in [Some(vec![Value::Int(1)]), Some(vec![Value::Int(2)]), None] {
        let unasked = timeout(LIMIT, told.recv()).await.unwrap();
        assert_eq!(unasked, Some(expected));
    }
    assert_eq!(timeout(LIMIT, told.recv()).await.unwrap(), None, "once");
}

/// A socket while whose writing others make calls, up to so many times.
struct Restless {
    pipe: Arc<Mutex<Option<Pipe>>>,
    writes: Arc<Mutex<usize>>,
}

impl Restless {
    const WRITES: usize = 5 * ROUNDS;
}

impl AsyncWrite for Restless {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, b: &[u8]) -> Poll<io::Result<usize>> {
        *lock(&self.writes) += 1;
        let pipe = lock(&self.pipe).clone();
        if let Some(pipe) = pipe.filter(|_| *lock(&self.writes) < Self::WRITES) {
            (0..LARGEST).for_each(|call| drop(pipe.call([echo(1, call)])));
        }
        Poll::Ready(Ok(b.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn who_makes_a_call_does_not_write_for_others_without_end() {
    let (read, _theirs) = duplex(1 << 12);
    let (pipe, writes) = (Arc::default(), Arc::default());
    let restless = Restless {
        pipe: Arc::clone(&pipe),
        writes: Arc::clone(&writes),
    };
    let ways = Ways {
        read: Box::new(read),
        write: Box::new(restless),
    };
    let made = Pipe::new(ways, Arc::default(), None);
    *lock(&pipe) = Some(made.clone());
    let _call = made.call([echo(0, 0)]);
    assert_eq!(*lock(&writes), ROUNDS);
    // The reading task goes on with it.
    let written = async {
        while *lock(&writes) < Restless::WRITES {
            yield_now().await;
        }
    };
    assert!(timeout(LIMIT, written).await.is_ok());
    *lock(&pipe) = None;
}
