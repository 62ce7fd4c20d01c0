//! Calls of several threads over one stream: `storage/redis/pipe.rs`, with a server that is a thread of the model. It takes
//! commands in the order in which they were written, and says back the last word of each.

use std::{
    collections::{HashMap, VecDeque},
    io,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use redis::{Cmd, Value};
use shuttle::{
    future::block_on,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    thread,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use self::{
    pipe::{Pipe, Reply},
    stream::Ways,
};
use crate::models::{driven, driver, join};

#[path = "../../../src/storage/redis/error.rs"]
mod error;
#[path = "../../../src/storage/redis/frame.rs"]
mod frame;
#[path = "../../../src/storage/redis/health.rs"]
mod health;
#[path = "../../../src/storage/redis/pipe.rs"]
mod pipe;

mod stream {
    use tokio::io::{AsyncRead, AsyncWrite};

    /// As the crate has it.
    pub(super) struct Ways {
        pub(super) read: Box<dyn AsyncRead + Send + Unpin>,
        pub(super) write: Box<dyn AsyncWrite + Send + Unpin>,
    }
}

/// So many bytes lie in a socket at the most.
const ROOM: usize = 100;

/// One direction of a stream.
#[derive(Default)]
struct Socket {
    bytes: VecDeque<u8>,
    /// Whoever waits for bytes, or for room.
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Clone, Default)]
struct Direction(Arc<Mutex<Socket>>);

impl Direction {
    /// All that is there.
    fn take(&self) -> Vec<u8> {
        let mut socket = self.0.lock().expect("no panic");
        let (bytes, writer) = (socket.bytes.drain(..).collect(), socket.writer.take());
        drop(socket);
        writer.into_iter().for_each(Waker::wake);
        bytes
    }

    /// Without limit: the server's part.
    fn put(&self, bytes: &[u8]) {
        let mut socket = self.0.lock().expect("no panic");
        socket.bytes.extend(bytes);
        let reader = socket.reader.take();
        drop(socket);
        reader.into_iter().for_each(Waker::wake);
    }
}

impl AsyncRead for Direction {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut socket = self.0.lock().expect("no panic");
        if socket.bytes.is_empty() {
            socket.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let some = socket.bytes.len().min(buffer.remaining());
        let bytes: Vec<u8> = socket.bytes.drain(..some).collect();
        buffer.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Direction {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut socket = self.0.lock().expect("no panic");
        let some = bytes.len().min(ROOM - socket.bytes.len());
        if some == 0 {
            socket.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        socket.bytes.extend(&bytes[..some]);
        Poll::Ready(Ok(some))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A server that answers, in a thread of its own, and writes down what it hears.
struct Server {
    commands: Direction,
    replies: Direction,
    has_ended: Arc<AtomicBool>,
    thread: thread::JoinHandle<Vec<String>>,
}

impl Server {
    fn start() -> Self {
        let (commands, replies) = (Direction::default(), Direction::default());
        let has_ended = Arc::new(AtomicBool::new(false));
        let thread = thread::spawn({
            let (commands, replies) = (commands.clone(), replies.clone());
            let has_ended = Arc::clone(&has_ended);
            move || {
                let (mut heard, mut bytes) = (Vec::new(), Vec::new());
                while !has_ended.load(SeqCst) {
                    let come = commands.take();
                    if come.is_empty() {
                        thread::yield_now();
                        continue;
                    }
                    bytes.extend(come);
                    while let Ok(Some((Value::Array(words), length))) = frame::first(&bytes) {
                        bytes.drain(..length);
                        let Some(Value::BulkString(word)) = words.last() else {
                            panic!("a command has words");
                        };
                        let word = String::from_utf8_lossy(word).into_owned();
                        replies.put(format!("+{word}\r\n").as_bytes());
                        heard.push(word);
                    }
                }
                heard
            }
        });
        Self {
            commands,
            replies,
            has_ended,
            thread,
        }
    }

    fn pipe(&self) -> Pipe {
        let ways = Ways {
            read: Box::new(self.replies.clone()),
            write: Box::new(self.commands.clone()),
        };
        Pipe::new(ways, Arc::default(), None)
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

fn callers(pipe: &Pipe, tasks: usize, caller: impl Fn(usize, &Pipe) + Copy + Send + 'static) {
    let threads = (0..tasks).map(|task| {
        let pipe = pipe.clone();
        thread::spawn(move || caller(task, &pipe))
    });
    join(threads.collect());
}

/// Whoever comes next is answered: no call before is waited for in vain.
fn goes_on(pipe: &Pipe) {
    let calls: Vec<_> = (0..8).map(|call| pipe.call([echo(99, call)])).collect();
    for (number, reply) in calls.into_iter().enumerate() {
        block_on(is_answered(99, number, reply));
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
        let pipe = server.pipe();
        callers(&pipe, 3, |task, pipe| {
            for number in [0, 2] {
                // As a release, and what is asked for next.
                let release = pipe.call([echo(task, number)]);
                let next = pipe.call([echo(task, number + 1)]);
                block_on(is_answered(task, number + 1, next));
                block_on(is_answered(task, number, release));
            }
        });
        goes_on(&pipe);
        in_order(&server.end());
    });
}

pub(crate) fn full_parts() {
    driven(|| {
        let server = Server::start();
        let pipe = server.pipe();
        callers(&pipe, 3, |task, pipe| {
            // When the first were answered, the server is known to be near: others wait for them.
            let mut calls: VecDeque<_> =
                (0..12).map(|call| pipe.call([echo(task, call)])).collect();
            for number in 0..24 {
                let reply = calls.pop_front().expect("twelve are open");
                block_on(is_answered(task, number, reply));
                calls.push_back(pipe.call([echo(task, number + 12)]));
            }
        });
        goes_on(&pipe);
        in_order(&server.end());
    });
}

pub(crate) fn given_up() {
    driven(|| {
        let server = Server::start();
        let pipe = server.pipe();
        callers(&pipe, 3, |task, pipe| {
            let mut calls: Vec<_> = (0..3).map(|call| pipe.call([echo(task, call)])).collect();
            // One by one, as the others go on.
            drop(calls.remove(task));
            drop(calls.remove(0));
            for reply in calls {
                assert!(block_on(reply).is_ok());
            }
        });
        goes_on(&pipe);
        in_order(&server.end());
    });
}

pub(crate) fn the_runtime_ends() {
    let server = Server::start();
    let (runtime, pipe) = {
        let runtime = driver();
        let entered = runtime.enter();
        let pipe = server.pipe();
        drop(entered);
        (runtime, pipe)
    };
    let ends = thread::spawn(move || {
        for _ in 0..2 {
            runtime.block_on(tokio::task::yield_now());
            thread::yield_now();
        }
        drop(runtime);
    });
    callers(&pipe, 2, |task, pipe| {
        let calls: Vec<_> = (0..4).map(|call| pipe.call([echo(task, call)])).collect();
        // Yes or no, but something.
        for reply in calls {
            let _ = block_on(reply);
        }
    });
    join(vec![ends]);
    server.end();
}
