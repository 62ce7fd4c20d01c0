//! A network between simulated hosts: connections that carry bytes in order, late, or not at all.
//!
//! Time goes in milliseconds and only by [`Net::advance`]. A connection behaves as one of TCP does
//! for those who use it: what is sent arrives once and in order, or the connection breaks, and
//! nobody knows how much of it arrived. What is lost and sent again is late here.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    future::poll_fn,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

use fastrand::Rng;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub type HostId = usize;

/// See the [module documentation](self).
#[derive(Clone)]
pub struct Net(Arc<Mutex<State>>);

struct State {
    now: u64,
    sequence: u64,
    hosts: Vec<Host>,
    connections: Vec<Connection>,
    due: BTreeMap<(u64, u64), (usize, usize, Arrival)>,
    /// Nothing sent from the first to the second arrives before.
    held: HashMap<(HostId, HostId), u64>,
    weather: Weather,
    random: Rng,
}

/// How long messages take.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Milliseconds, at most, for a message that nothing happens to.
    pub latency: u64,
    /// How many of a hundred are lost and sent again.
    pub lost: u32,
}

struct Host {
    /// Another after each crash.
    life: u64,
    is_up: bool,
    arrived: VecDeque<usize>,
    waker: Option<Waker>,
}

struct Connection {
    ends: [End; 2],
    /// Nothing arrives any more, and nobody is told.
    is_dead: bool,
}

struct End {
    host: HostId,
    life: u64,
    phase: Phase,
    bytes: VecDeque<u8>,
    /// The other end has said all.
    is_over: bool,
    waker: Option<Waker>,
    /// When the last of what was sent to this end arrives.
    last: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Connecting,
    Open,
    Reset,
    Closed,
}

enum Arrival {
    Connect,
    Connected,
    Bytes(Vec<u8>),
    End,
    Reset,
}

impl Net {
    pub fn new(hosts: usize, weather: Weather, seed: u64) -> Self {
        let host = || Host {
            life: 0,
            is_up: true,
            arrived: VecDeque::new(),
            waker: None,
        };
        Self(Arc::new(Mutex::new(State {
            now: 0,
            sequence: 0,
            hosts: (0..hosts).map(|_| host()).collect(),
            connections: Vec::new(),
            due: BTreeMap::new(),
            held: HashMap::new(),
            weather,
            random: Rng::with_seed(seed),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A random number below `limit`, of the network's own.
    pub fn random(&self, limit: u64) -> u64 {
        self.state().random.u64(..limit.max(1))
    }

    /// A millisecond later: what is due arrives.
    pub fn advance(&self) {
        let mut wakers = Vec::new();
        let mut state = self.state();
        state.now += 1;
        let now = state.now;
        while let Some(entry) = state.due.first_entry().filter(|entry| entry.key().0 <= now) {
            let (connection, end, arrival) = entry.remove();
            state.arrive(connection, end, arrival, &mut wakers);
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// From now on nothing that is sent there arrives before `until`.
    pub fn hold(&self, from: HostId, to: HostId, until: u64) {
        let mut state = self.state();
        let held = state.held.entry((from, to)).or_default();
        *held = until.max(*held);
    }

    /// The connections between two hosts break. What is on its way is lost, and each end learns of
    /// it at its own time.
    pub fn cut(&self, a: HostId, b: HostId) {
        let mut state = self.state();
        for index in state.between(a, b) {
            state.connections[index].is_dead = true;
            for end in [0, 1] {
                let at = state.now + state.random.u64(1..15);
                state.schedule(at, index, end, Arrival::Reset);
            }
        }
    }

    /// From now on nothing arrives over the connections between two hosts, and nobody is told.
    pub fn mute(&self, a: HostId, b: HostId) {
        let mut state = self.state();
        for index in state.between(a, b) {
            state.connections[index].is_dead = true;
        }
    }

    /// The host's process is gone, or those of its sockets are, and with it what it has not read.
    /// Whatever it sends from now on, as it is taken down, is sent by nobody. Peers that are not
    /// told learn of it when they send something.
    pub fn kill(&self, host: HostId, is_told: impl Fn(HostId) -> bool) {
        let mut state = self.state();
        state.hosts[host].life += 1;
        state.hosts[host].is_up = false;
        state.hosts[host].arrived.clear();
        let mut wakers = Vec::from_iter(state.hosts[host].waker.take());
        for index in 0..state.connections.len() {
            for end in [0, 1] {
                let this = &mut state.connections[index].ends[end];
                if this.host != host || matches!(this.phase, Phase::Reset | Phase::Closed) {
                    continue;
                }
                this.phase = Phase::Reset;
                wakers.extend(this.waker.take());
                if is_told(state.connections[index].ends[1 - end].host) {
                    state.send(index, 1 - end, Arrival::Reset);
                }
            }
        }
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// It takes connections again.
    pub fn revive(&self, host: HostId) {
        self.state().hosts[host].is_up = true;
    }

    /// The next connection that somebody makes to this host.
    pub async fn accept(&self, host: HostId) -> Stream {
        poll_fn(|cx| {
            let mut state = self.state();
            let this = &mut state.hosts[host];
            if let Some(connection) = this.arrived.pop_front() {
                let net = self.clone();
                return Poll::Ready(Stream {
                    net,
                    connection,
                    end: 1,
                });
            }
            this.waker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// # Errors
    ///
    /// If the host does not take it. Where nothing arrives, this never ends.
    pub async fn connect(&self, from: HostId, to: HostId) -> io::Result<Stream> {
        let stream = {
            let mut state = self.state();
            let end = |host: HostId| End {
                host,
                life: state.hosts[host].life,
                phase: Phase::Connecting,
                bytes: VecDeque::new(),
                is_over: false,
                waker: None,
                last: 0,
            };
            let ends = [end(from), end(to)];
            let connection = state.connections.len();
            state.connections.push(Connection {
                ends,
                is_dead: false,
            });
            state.send(connection, 1, Arrival::Connect);
            let net = self.clone();
            Stream {
                net,
                connection,
                end: 0,
            }
        };
        poll_fn(|cx| {
            let mut state = self.state();
            let end = &mut state.connections[stream.connection].ends[0];
            match end.phase {
                Phase::Connecting => {
                    end.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
                Phase::Open => Poll::Ready(Ok(())),
                _ => Poll::Ready(Err(io::Error::from(io::ErrorKind::ConnectionRefused))),
            }
        })
        .await?;
        Ok(stream)
    }
}

impl State {
    fn between(&self, a: HostId, b: HostId) -> Vec<usize> {
        let is_between = |connection: &Connection| {
            let hosts = [connection.ends[0].host, connection.ends[1].host];
            (hosts == [a, b] || hosts == [b, a]) && !connection.is_dead
        };
        let all = self.connections.iter().enumerate();
        all.filter(|(_, it)| is_between(it))
            .map(|(index, _)| index)
            .collect()
    }

    fn schedule(&mut self, at: u64, connection: usize, end: usize, arrival: Arrival) {
        self.sequence += 1;
        self.due
            .insert((at, self.sequence), (connection, end, arrival));
    }

    /// Sends something to this end.
    fn send(&mut self, connection: usize, end: usize, arrival: Arrival) {
        let this = &self.connections[connection];
        if this.is_dead {
            return;
        }
        let (from, to) = (this.ends[1 - end].host, this.ends[end].host);
        let mut at = self
            .now
            .max(self.held.get(&(from, to)).copied().unwrap_or(0));
        at += self.random.u64(1..=self.weather.latency);
        if self.random.u32(..100) < self.weather.lost {
            at += self.random.u64(5..30);
        }
        let last = &mut self.connections[connection].ends[end].last;
        at = at.max(*last);
        *last = at;
        self.schedule(at, connection, end, arrival);
    }

    fn arrive(&mut self, index: usize, end: usize, arrival: Arrival, wakers: &mut Vec<Waker>) {
        let connection = &mut self.connections[index];
        // That it broke is known from the end's own host.
        if connection.is_dead && !matches!(arrival, Arrival::Reset) {
            return;
        }
        let this = &mut connection.ends[end];
        if let Arrival::Connect = arrival {
            let host = &mut self.hosts[this.host];
            if !host.is_up {
                return self.send(index, 0, Arrival::Reset);
            }
            this.life = host.life;
            this.phase = Phase::Open;
            host.arrived.push_back(index);
            wakers.extend(host.waker.take());
            return self.send(index, 0, Arrival::Connected);
        }
        if matches!(this.phase, Phase::Reset | Phase::Closed) {
            if !matches!(arrival, Arrival::Reset) {
                self.send(index, 1 - end, Arrival::Reset);
            }
            return;
        }
        match arrival {
            Arrival::Connect => {}
            Arrival::Connected => this.phase = Phase::Open,
            Arrival::Bytes(bytes) => this.bytes.extend(bytes),
            Arrival::End => this.is_over = true,
            Arrival::Reset => {
                this.phase = Phase::Reset;
                this.bytes.clear();
            }
        }
        wakers.extend(this.waker.take());
    }

    fn is_alive(&self, end: &End) -> bool {
        end.phase == Phase::Open && end.life == self.hosts[end.host].life
    }
}

/// One end of a connection.
pub struct Stream {
    net: Net,
    connection: usize,
    end: usize,
}

impl Stream {
    /// The same end once more, to write to while the other is read from.
    pub fn writer(&self) -> Writer {
        Writer {
            net: self.net.clone(),
            connection: self.connection,
            end: self.end,
        }
    }

    fn poll_some(&self, cx: &Context<'_>, most: usize) -> Poll<io::Result<Vec<u8>>> {
        let mut state = self.net.state();
        let end = &mut state.connections[self.connection].ends[self.end];
        if end.phase != Phase::Open {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if !end.bytes.is_empty() {
            let count = most.min(end.bytes.len());
            return Poll::Ready(Ok(end.bytes.drain(..count).collect()));
        }
        if end.is_over {
            return Poll::Ready(Ok(Vec::new()));
        }
        end.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

/// Sends to the other end of a connection; see [`Stream::writer`].
#[derive(Clone)]
pub struct Writer {
    net: Net,
    connection: usize,
    end: usize,
}

impl Writer {
    /// # Errors
    ///
    /// If this end knows that the connection is broken.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        self.check()?;
        // What is written at once may come in two pieces.
        let at = match self.net.random(8) {
            0 => self.net.random(bytes.len() as u64) as usize,
            _ => 0,
        };
        for piece in [&bytes[..at], &bytes[at..]] {
            if !piece.is_empty() {
                self.send_arrival(Arrival::Bytes(piece.to_vec()))?;
            }
        }
        Ok(())
    }

    /// Whether this end knows of nothing that is wrong. Before any random number is drawn: those who end with their process
    /// come by in any order, and must not be seen.
    fn check(&self) -> io::Result<()> {
        let state = self.net.state();
        let end = &state.connections[self.connection].ends[self.end];
        match state.is_alive(end) {
            true => Ok(()),
            false => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn send_arrival(&self, arrival: Arrival) -> io::Result<()> {
        self.check()?;
        let mut state = self.net.state();
        state.send(self.connection, 1 - self.end, arrival);
        Ok(())
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let bytes = std::task::ready!(self.poll_some(cx, buffer.remaining()))?;
        buffer.put_slice(&bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.writer().check()?;
        // Now and then there is room for some of it only.
        let length = bytes.len() as u64;
        let taken = match self.net.random(8) {
            0 => 1 + self.net.random(length),
            _ => length,
        };
        let taken = taken.min(length) as usize;
        Poll::Ready(self.writer().send(&bytes[..taken]).map(|()| taken))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let _ = self.writer().send_arrival(Arrival::End);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _ = self.writer().send_arrival(Arrival::End);
        // Nothing is said any more by an end that was given up before it was connected, either.
        let mut state = self.net.state();
        let end = &mut state.connections[self.connection].ends[self.end];
        end.phase = Phase::Closed;
        end.bytes.clear();
    }
}
