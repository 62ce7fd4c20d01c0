//! The calls of many tasks, over one stream.
//!
//! A call is written where it is made, by the thread that makes it, or together with those of others by whoever comes
//! last. One task reads: it takes all replies that have come, and wakes whoever waits for them.
//!
//! - Where few calls are open, each is written by itself, and waits for nobody.
//! - Where more are, those that are made at the same time are written together.
//! - Where many are, and the server is near, they go in parts, a quarter of them each, or what there is when the part
//!   before was answered. All at once, the tasks would make their calls while the server waits, and wait while it works,
//!   in turns; in parts, both work at the same time.
//!
//! Replies come in the order of the calls, and that is the order in which the calls were made. The reading task runs on
//! the runtime on which the stream was opened. When that runtime ends, or the stream, calls fail.

use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use futures_util::task::AtomicWaker;
use redis::{Cmd, PushInfo, PushKind, RedisError, Value};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
    time::Instant,
};

use super::{frame, health::Health, stream::Ways};
use crate::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// With no more calls open than this, there is nobody to wait for.
const FEW: usize = 3;

/// With so many open, they go in parts.
const MANY: usize = 16;

/// In how many.
const PARTS: usize = 4;

/// With so many calls that are not written, nobody waits for more.
const LARGEST: usize = 32;

/// A server is near if a part is answered within this time. Calls to one that is farther away would gain nothing by
/// waiting for each other: it is not the work that takes the time. On a busy machine a part takes several times as long
/// to its own server and back as on an idle one.
const NEAR: Duration = Duration::from_millis(1);

/// How many times a thread writes what others have added meanwhile.
const ROUNDS: usize = 4;

/// How much is read at once.
const READ: usize = 16 * 1024;

/// Room for so many calls is kept.
const ROOM: usize = 1024;

/// A reply that is longer is none of those that are asked for here.
const LONGEST: usize = 8 << 20;

pub(super) type Answer = Result<Value, RedisError>;

/// What comes unasked.
pub(super) enum Unasked {
    Push(PushInfo),
    /// The stream is over: nothing comes any more.
    Over,
}

/// Told by the reading task, which nothing here may hold up.
pub(super) type Pushes = Box<dyn FnMut(Unasked) + Send>;

/// Where calls are made. The last one that is dropped ends the stream.
#[derive(Clone)]
pub(super) struct Pipe(Arc<InUse>);

struct InUse(Arc<Shared>);

impl Drop for InUse {
    fn drop(&mut self) {
        lock(&self.0.calls).is_left = true;
        self.0.reader.wake();
    }
}

struct Shared {
    calls: Mutex<Calls>,
    /// Locked by whoever writes, and never while `calls` is.
    out: Mutex<Out>,
    reader: AtomicWaker,
    health: Arc<Health>,
}

/// The calls that have no reply.
#[derive(Default)]
struct Calls {
    /// In their order, also those whose bytes are not written.
    callers: VecDeque<Caller>,
    /// What is to be written.
    bytes: Vec<u8>,
    /// Of how many calls.
    unwritten: usize,
    /// What was written together, and has replies to come.
    parts: VecDeque<Part>,
    /// How many calls were open at most, of late.
    crowd: usize,
    /// Whether the last part was answered soon.
    is_near: bool,
    /// Whether a thread is at `out`.
    is_writing: bool,
    /// Whether another wanted to be there meanwhile. The one that is does its work too.
    is_wanted: bool,
    /// Whether there is something to be written soon, by the reading task.
    is_due: bool,
    /// Whether nobody can make calls any more.
    is_left: bool,
    /// Whether there will be no replies any more.
    is_over: bool,
}

struct Caller {
    /// How many replies are to come.
    commands: usize,
    /// Those that have, if it is for several.
    replies: Vec<Value>,
    tell: oneshot::Sender<Answer>,
}

struct Part {
    calls: usize,
    written: Instant,
}

impl Calls {
    /// Another call is made.
    fn add<const N: usize>(&mut self, commands: &[Cmd; N], tell: oneshot::Sender<Answer>) {
        for command in commands {
            command.write_packed_command(&mut self.bytes);
        }
        self.callers.push_back(Caller {
            commands: N,
            replies: Vec::new(),
            tell,
        });
        self.unwritten += 1;
        self.crowd = self.crowd.max(self.callers.len());
    }

    /// How many calls are written without waiting for others.
    fn part(&self) -> usize {
        match self.crowd {
            MANY.. => (self.crowd / PARTS).min(LARGEST),
            _ => LARGEST,
        }
    }

    /// Whether to wait for the replies to those before.
    fn has_time(&self) -> bool {
        !self.parts.is_empty() && self.is_near && self.crowd >= MANY
    }

    /// A reply has come. Who is to be told, if it was the last that is to come.
    fn replied(&mut self, reply: Value) -> Option<(oneshot::Sender<Answer>, Value)> {
        let caller = self.callers.front_mut()?;
        if caller.commands > 1 {
            caller.replies.push(reply);
            if caller.replies.len() < caller.commands {
                return None;
            }
            let caller = self.callers.pop_front()?;
            self.closed();
            return Some((caller.tell, Value::Array(caller.replies)));
        }
        let caller = self.callers.pop_front()?;
        self.closed();
        Some((caller.tell, reply))
    }

    /// A call has its replies.
    fn closed(&mut self) {
        if let Some(part) = self.parts.front_mut() {
            part.calls -= 1;
            if part.calls == 0 {
                let after = part.written.elapsed();
                self.parts.pop_front();
                self.answered(after);
            }
        }
    }

    /// Replies have come.
    fn settle(&mut self) {
        self.crowd -= self.crowd.saturating_sub(self.callers.len()) / 16;
        if self.callers.is_empty() && self.callers.capacity() > ROOM {
            // A crowd has gone.
            self.callers.shrink_to(ROOM);
        }
    }

    /// Whoever waits to be written, and will not be.
    fn give_up(&mut self) -> VecDeque<Caller> {
        self.bytes.clear();
        let written = self.callers.len() - std::mem::take(&mut self.unwritten);
        self.callers.split_off(written)
    }

    /// A part was answered, after this time.
    fn answered(&mut self, after: Duration) {
        self.is_near = after < NEAR;
    }
}

/// Where bytes go.
struct Out {
    /// `None`: closed. What is written then is for nobody.
    write: Option<Box<dyn AsyncWrite + Send + Unpin>>,
    /// What the socket did not take, from the second on. The reading task waits for it to take more.
    left: (Vec<u8>, usize),
    /// Whether all that it took is on its way.
    is_flushed: bool,
    failed: Option<io::Error>,
}

impl Out {
    fn new(write: Box<dyn AsyncWrite + Send + Unpin>) -> Self {
        Self {
            write: Some(write),
            left: (Vec::new(), 0),
            is_flushed: true,
            failed: None,
        }
    }

    /// Writes from outside the reading task. Whether that has to go on, or to find out why it cannot.
    fn begin(&mut self, bytes: &[u8]) -> bool {
        let (left, _) = &mut self.left;
        if !left.is_empty() {
            // It waits already.
            left.extend_from_slice(bytes);
            return false;
        }
        let cx = &mut Context::from_waker(Waker::noop());
        let written = self.write(cx, bytes);
        if let Ok(written) = written {
            left_behind(&mut self.left, &bytes[written..]);
        }
        match written.and_then(|_| self.flush(cx)) {
            Ok(is_done) => !is_done,
            Err(error) => {
                self.fail(error);
                true
            }
        }
    }

    /// Writes what was left. Whether nothing is left any more.
    fn go_on(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let (left, at) = std::mem::take(&mut self.left);
        let written = self.write(cx, &left[at..])?;
        if at + written < left.len() {
            self.left = (left, at + written);
        }
        let is_done = self.flush(cx)?;
        match self.failed.take() {
            Some(error) => Err(error),
            None => Ok(is_done),
        }
    }

    /// Writes as much as there is room for, and says how much that was.
    fn write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> io::Result<usize> {
        let Some(write) = &mut self.write else {
            return Ok(bytes.len());
        };
        let mut written = 0;
        while written < bytes.len() {
            self.is_flushed = false;
            match Pin::new(&mut *write).poll_write(cx, &bytes[written..]) {
                Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(some) => written += some?,
                Poll::Pending => break,
            }
        }
        Ok(written)
    }

    /// Whether all that was written is on its way, and nothing is left.
    fn flush(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let Some(write) = &mut self.write else {
            return Ok(true);
        };
        if !self.left.0.is_empty() {
            return Ok(false);
        }
        if !self.is_flushed {
            match Pin::new(write).poll_flush(cx) {
                Poll::Ready(flushed) => flushed?,
                Poll::Pending => return Ok(false),
            }
            self.is_flushed = true;
        }
        Ok(true)
    }

    /// Behind a part of a command nothing else may be written.
    fn fail(&mut self, error: io::Error) {
        self.close();
        self.failed = Some(error);
    }

    fn close(&mut self) {
        self.write = None;
        self.left = (Vec::new(), 0);
    }
}

fn left_behind((left, at): &mut (Vec<u8>, usize), rest: &[u8]) {
    left.extend_from_slice(rest);
    *at = 0;
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pipe {
    /// Must be called on a runtime, which reads the replies. `pushes`: who is told what comes unasked, if somebody
    /// subscribes.
    pub(super) fn new(ways: Ways, health: Arc<Health>, pushes: Option<Pushes>) -> Self {
        let shared = Arc::new(Shared {
            calls: Mutex::default(),
            out: Mutex::new(Out::new(ways.write)),
            reader: AtomicWaker::new(),
            health,
        });
        tokio::spawn(Reader {
            shared: Arc::clone(&shared),
            read: ways.read,
            bytes: vec![0; READ],
            come: 0,
            replies: Vec::new(),
            told: Vec::new(),
            pushes,
            is_due: false,
        });
        Self(Arc::new(InUse(shared)))
    }

    /// Sends commands, with nothing in between.
    ///
    /// The reply to a command may be a [`Value::ServerError`]. If there are several commands, it is
    /// an array of the replies to each.
    pub(super) fn call<const N: usize>(&self, commands: [Cmd; N]) -> Reply {
        const { assert!(N > 0, "what asks for nothing is not answered") };
        let shared = &self.0.0;
        let (tell, reply) = Reply::channel();
        let mut calls = lock(&shared.calls);
        if calls.is_over {
            return reply;
        }
        calls.add(&commands, tell);
        let (open, unwritten) = (calls.callers.len(), calls.unwritten);
        if open == 1 {
            shared.health.first_call();
        }
        if (open <= FEW && unwritten == 1) || unwritten >= calls.part() {
            shared.write(calls);
        } else if unwritten == 1 && !calls.has_time() {
            calls.is_due = true;
            drop(calls);
            shared.reader.wake();
        }
        reply
    }
}

impl Shared {
    /// Writes what there is, in the order in which calls were made.
    fn write<'a>(&'a self, mut calls: MutexGuard<'a, Calls>) {
        if self.health.is_dead() {
            // Others may have asked elsewhere by now for what these would undo.
            let unwritten = calls.give_up();
            drop(calls);
            // Outside the lock: they are told, and may come back here at once.
            drop(unwritten);
            return;
        }
        calls.is_wanted = true;
        if calls.is_writing {
            return;
        }
        calls.is_writing = true;
        let mut rounds = 0;
        while std::mem::take(&mut calls.is_wanted) && calls.unwritten > 0 {
            if rounds == ROUNDS {
                // This task has others to serve.
                calls.is_due = true;
                calls.is_writing = false;
                drop(calls);
                self.reader.wake();
                return;
            }
            rounds += 1;
            let bytes = std::mem::take(&mut calls.bytes);
            let part = Part {
                calls: std::mem::take(&mut calls.unwritten),
                written: Instant::now(),
            };
            calls.parts.push_back(part);
            drop(calls);
            if lock(&self.out).begin(&bytes) {
                self.reader.wake();
            }
            calls = lock(&self.calls);
            if calls.bytes.is_empty() && bytes.capacity() <= 4 * READ {
                calls.bytes = bytes;
                calls.bytes.clear();
            }
        }
        calls.is_writing = false;
    }

    /// There will be no more replies.
    fn end(&self, error: &RedisError) {
        self.health.kill();
        let mut calls = lock(&self.calls);
        let Calls { callers, .. } = std::mem::take(&mut *calls);
        calls.is_over = true;
        // Outside the lock: whoever is told may come back here at once.
        drop(calls);
        // Also for whoever was about to write.
        lock(&self.out).close();
        for caller in callers {
            let _ = caller.tell.send(Err(error.clone()));
        }
    }
}

/// The task that reads, and writes what others could not.
struct Reader {
    shared: Arc<Shared>,
    read: Box<dyn AsyncRead + Send + Unpin>,
    /// What has come, and is no whole reply: so many bytes at the beginning.
    bytes: Vec<u8>,
    come: usize,
    /// Those that have come and are not handed out. Empty but while it is polled.
    replies: Vec<Value>,
    told: Vec<(oneshot::Sender<Answer>, Value)>,
    pushes: Option<Pushes>,
    /// Whether it has let others run first, and now writes what there is.
    is_due: bool,
}

impl Reader {
    /// Takes in what has come.
    fn read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), RedisError>> {
        if self.come == self.bytes.len() {
            if self.come >= LONGEST {
                return Poll::Ready(Err(frame::malformed()));
            }
            self.bytes.resize(2 * self.come, 0);
        }
        let mut buffer = ReadBuf::new(&mut self.bytes[self.come..]);
        ready!(Pin::new(&mut self.read).poll_read(cx, &mut buffer))?;
        match buffer.filled().len() {
            0 => return Poll::Ready(Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
            come => self.come += come,
        }
        Poll::Ready(self.tell())
    }

    /// Gives the replies that have come to whom they belong.
    fn tell(&mut self) -> Result<(), RedisError> {
        let mut at = 0;
        let mut read = loop {
            match frame::first(&self.bytes[at..self.come]) {
                Ok(Some((reply, length))) => {
                    at += length;
                    match (reply, &mut self.pushes) {
                        (Value::Push { kind, data }, Some(pushes))
                            if kind != PushKind::Subscribe =>
                        {
                            pushes(Unasked::Push(PushInfo { kind, data }));
                        }
                        (Value::Push { .. }, None) => {}
                        // `SUBSCRIBE` is answered by a push.
                        (reply, _) => self.replies.push(reply),
                    }
                }
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        self.bytes.copy_within(at..self.come, 0);
        self.come -= at;
        if self.come == 0 && self.bytes.len() > READ {
            // Something unusual has come.
            self.bytes.truncate(READ);
            self.bytes.shrink_to_fit();
        }
        if !self.replies.is_empty() {
            self.shared.health.replied();
        }

        let mut calls = lock(&self.shared.calls);
        for reply in self.replies.drain(..) {
            if calls.unwritten >= calls.callers.len() {
                // Nobody has asked: whose the next one is, nobody would know.
                read = Err(frame::malformed());
                break;
            }
            self.told.extend(calls.replied(reply));
        }
        calls.settle();
        if read.is_ok() && calls.parts.is_empty() && calls.unwritten > 0 {
            self.shared.write(calls);
        } else {
            drop(calls);
        }
        for (tell, reply) in self.told.drain(..) {
            let answer = Ok(reply);
            self.shared.health.judge(&answer);
            // Whoever has stopped waiting needs no reply.
            let _ = tell.send(answer);
        }
        read
    }

    fn run(&mut self, cx: &mut Context<'_>) -> Poll<RedisError> {
        self.shared.reader.register(cx.waker());
        // Before a look at what could not be written: replies may have come before that.
        loop {
            match self.read(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Pending => break,
            }
        }
        let mut calls = lock(&self.shared.calls);
        let is_left = calls.is_left;
        let is_due = std::mem::replace(&mut self.is_due, std::mem::take(&mut calls.is_due));
        if is_due || is_left {
            self.shared.write(calls);
        } else {
            drop(calls);
        }
        match lock(&self.shared.out).go_on(cx) {
            Err(error) => return Poll::Ready(error.into()),
            // What was asked for is sent, though nobody hears of the replies.
            Ok(is_done) if is_left && (is_done || self.shared.health.is_dead()) => {
                return Poll::Ready(gone());
            }
            Ok(_) => {}
        }
        if self.is_due {
            // Where one task has something to send, others may be about to: they run first.
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }
}

impl Reader {
    fn end(&mut self, error: &RedisError) {
        self.shared.end(error);
        if let Some(mut pushes) = self.pushes.take() {
            pushes(Unasked::Over);
        }
    }
}

impl Future for Reader {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let error = ready!(self.run(cx));
        self.end(&error);
        Poll::Ready(())
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.end(&gone());
    }
}

/// The reply to a call. Dropped, the call may be carried out or not.
pub(super) struct Reply(oneshot::Receiver<Answer>);

impl Reply {
    /// A reply that somebody will give.
    pub(super) fn channel() -> (oneshot::Sender<Answer>, Self) {
        let (tell, told) = oneshot::channel();
        (tell, Self(told))
    }
}

impl Future for Reply {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answer> {
        Pin::new(&mut self.0)
            .poll(cx)
            .map(|answer| answer.unwrap_or_else(|_| Err(gone())))
    }
}

/// The stream is over, or the runtime that reads the replies.
fn gone() -> RedisError {
    io::Error::from(io::ErrorKind::BrokenPipe).into()
}

#[cfg(test)]
#[path = "pipe_tests.rs"]
mod tests;
