//! A Redis server in the simulated network.
//!
//! It speaks RESP3, and runs the scripts of the library in Lua 5.1, as Redis does. It knows the
//! commands that the library sends, and ends the simulation with a panic at any other. Clocks,
//! connections and crashes are those of its host.

mod order;
mod resp;
mod scripts;
mod store;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use tokio::{io::AsyncReadExt, time::Instant};

use self::{
    order::Order,
    resp::{Reply, take_command},
    scripts::Scripts,
    store::{Store, number},
};
use crate::{
    history::History,
    net::{HostId, Net, Stream, Writer},
};

/// When all servers were started first, in microseconds since 1970. Fencing tokens start at the clock.
const START: u64 = 1_700_000_000_000_000;

/// See the [module documentation](self).
#[derive(Clone)]
pub struct Server {
    net: Net,
    host: HostId,
    started: Instant,
    history: History,
    data: Arc<Mutex<Data>>,
    scripts: Arc<Mutex<Scripts>>,
}

/// All but the scripts.
struct Data {
    store: Store,
    channels: BTreeMap<Vec<u8>, Vec<Subscriber>>,
    connections: u64,
    /// How often it was started.
    run: u64,
    /// By the name of the lock. `None`: nobody looks.
    orders: Option<BTreeMap<Vec<u8>, Order>>,
    /// The processes whose tokens have come, in that order.
    processes: Vec<Vec<u8>>,
}

struct Subscriber {
    connection: u64,
    writer: Writer,
}

impl Server {
    /// Starts it on its host, whose runtime this is called on. `alone`: there is no other, so what
    /// it gives to whom is all that is given.
    pub fn start(net: Net, host: HostId, history: History, alone: bool) -> Self {
        let data = Arc::new(Mutex::new(Data {
            store: Store::default(),
            channels: BTreeMap::new(),
            connections: 0,
            run: 1,
            orders: alone.then(BTreeMap::new),
            processes: Vec::new(),
        }));
        let calls = Arc::clone(&data);
        let scripts = Scripts::new(move |words| calls.lock().unwrap().call(words));
        let server = Self {
            net,
            host,
            started: Instant::now(),
            history,
            data,
            scripts: Arc::new(Mutex::new(scripts)),
        };
        let this = server.clone();
        tokio::spawn(async move {
            loop {
                let stream = this.net.accept(this.host).await;
                let this = this.clone();
                tokio::spawn(async move { this.serve(stream).await });
            }
        });
        server
    }

    /// At this moment of its clock, and for as long as this is held.
    fn data(&self) -> MutexGuard<'_, Data> {
        let mut data = self.data.lock().unwrap();
        data.store.now = START + self.started.elapsed().as_micros() as u64;
        data
    }

    /// It is started again, with or without what was in its memory.
    pub fn restarted(&self, forgets: bool) {
        self.flush_scripts();
        let mut data = self.data();
        data.run += 1;
        data.channels.clear();
        if forgets {
            data.store.clear();
        }
    }

    pub fn flush_scripts(&self) {
        self.scripts.lock().unwrap().forget();
    }

    /// The keys of locks and of queues: all but the fencing counters, which have no expiry.
    pub fn left(&self) -> Vec<String> {
        let data = self.data();
        let keys = data.store.keys().filter(|key| !key.ends_with(b":fence"));
        keys.map(|key| String::from_utf8_lossy(key).into_owned())
            .collect()
    }

    async fn serve(&self, mut stream: Stream) {
        let writer = stream.writer();
        let connection = {
            let mut data = self.data();
            data.connections += 1;
            data.connections
        };
        let mut bytes = Vec::new();
        while stream.read_buf(&mut bytes).await.is_ok_and(|read| read > 0) {
            let mut replies = Vec::new();
            while let Some(words) = take_command(&mut bytes) {
                let reply = self.carry_out(&words, connection, &writer);
                reply.write(&mut replies);
            }
            if !replies.is_empty() && writer.send(&replies).is_err() {
                break;
            }
        }
        for subscribers in self.data().channels.values_mut() {
            subscribers.retain(|it| it.connection != connection);
        }
    }

    fn carry_out(&self, words: &[Vec<u8>], connection: u64, writer: &Writer) -> Reply {
        let verb = String::from_utf8_lossy(&words[0]).to_ascii_uppercase();
        match verb.as_str() {
            "HELLO" => {
                let fields = [("server", "redis"), ("version", "7.4.0")];
                let fields = fields.map(|(name, value)| (Reply::text(name), Reply::text(value)));
                return Reply::Map(fields.into());
            }
            "PING" => return Reply::Simple("PONG"),
            // Of its 40 digits, 32 are looked at.
            "INFO" => {
                let run = format!(
                    "run_id:{:016x}{:024x}\r\n",
                    self.data().run,
                    self.host << 32
                );
                return Reply::text(run);
            }
            "SUBSCRIBE" => {
                let writer = writer.clone();
                let mut data = self.data();
                let subscribers = data.channels.entry(words[1].clone()).or_default();
                subscribers.push(Subscriber { connection, writer });
                let words = [Reply::text("subscribe"), Reply::text(&words[1])];
                return Reply::Push([&words[..], &[Reply::Int(1)]].concat());
            }
            "SCAN" => {
                assert_eq!(words[2], b"MATCH");
                let data = self.data();
                let keys = data.store.keys().filter(|key| matches(&words[3], key));
                let keys = keys.map(Reply::text).collect();
                return Reply::Array(vec![Reply::text("0"), Reply::Array(keys)]);
            }
            _ => {}
        }
        let (reply, name) = match verb.as_str() {
            "EVAL" | "EVALSHA" => (self.eval(&verb, words), &words[3]),
            _ => (self.data().call(words), &words[1]),
        };
        let mut data = self.data();
        data.look_at(name, verb == "SET", &self.history);
        let told = data.tell(&words[1..], &reply);
        let host = self.host;
        self.history
            .log(format_args!("server {host} {verb} {told}"));
        reply
    }

    fn eval(&self, verb: &str, words: &[Vec<u8>]) -> Reply {
        // Its calls see the time at which it began.
        drop(self.data());
        let mut scripts = self.scripts.lock().unwrap();
        let sha = match verb {
            "EVAL" => scripts.learn(&words[1]),
            _ => String::from_utf8_lossy(&words[1]).into_owned(),
        };
        let (keys, arguments) = words[3..].split_at(number(&words[2]) as usize);
        let reply = scripts.run(&sha, keys, arguments);
        reply.unwrap_or_else(|| Reply::error("NOSCRIPT No matching script."))
    }
}

impl Data {
    fn call(&mut self, words: &[Vec<u8>]) -> Reply {
        if let Some(reply) = self.store.call(words) {
            return reply;
        }
        let text = String::from_utf8_lossy(&words[0]);
        assert_eq!(text, "PUBLISH", "a command that is not known here");
        Reply::Int(self.publish(&words[1], &words[2]))
    }

    /// To how many.
    fn publish(&self, channel: &[u8], message: &[u8]) -> i64 {
        let push = [b"message", channel, message].map(Reply::text);
        let mut bytes = Vec::new();
        Reply::Push(push.into()).write(&mut bytes);
        let subscribers = self.channels.get(channel).into_iter().flatten();
        let told = subscribers.filter(|it| it.writer.send(&bytes).is_ok());
        told.count() as i64
    }

    /// Who has the lock now, and who waits for it?
    fn look_at(&mut self, name: &[u8], is_plain: bool, history: &History) {
        if let Some(orders) = &mut self.orders {
            let order = orders.entry(name.to_vec()).or_default();
            order.look(name, &self.store, is_plain, history);
        }
    }

    /// A command and its reply, for the log. Tokens, processes and scripts have short names.
    fn tell(&mut self, words: &[Vec<u8>], reply: &Reply) -> String {
        let words: Vec<_> = words
            .iter()
            .map(|word| match word.len() {
                // A script.
                40.. if !word.contains(&b':') || word.starts_with(b"--") => "..".to_owned(),
                _ => String::from_utf8_lossy(word).into_owned(),
            })
            .collect();
        let reply = match reply {
            Reply::Bulk(text) => String::from_utf8_lossy(text).into_owned(),
            reply => texts(reply),
        };
        self.shortened(&format!("{} -> {reply}", words.join(" ")))
    }

    /// Each process's number in place of its 32 hex digits.
    fn shortened(&mut self, text: &str) -> String {
        let mut short = String::new();
        let mut rest = text;
        while let Some(start) = rest.find(|c: char| c.is_ascii_hexdigit()) {
            let (before, from) = rest.split_at(start);
            let end = from.find(|c: char| !c.is_ascii_hexdigit());
            let (digits, after) = from.split_at(end.unwrap_or(from.len()));
            short += before;
            if digits.len() == 32 {
                let digits = digits.as_bytes();
                let known = self.processes.iter().position(|it| it == digits);
                let number = known.unwrap_or_else(|| {
                    self.processes.push(digits.to_vec());
                    self.processes.len() - 1
                });
                short += &format!("process {number}");
            } else {
                short += digits;
            }
            rest = after;
        }
        short + rest
    }
}

fn texts(reply: &Reply) -> String {
    match reply {
        Reply::Simple(text) => (*text).to_owned(),
        Reply::Error(text) => text.clone(),
        Reply::Int(number) => number.to_string(),
        Reply::Bulk(text) => String::from_utf8_lossy(text).into_owned(),
        Reply::Nil => "nil".to_owned(),
        Reply::Array(items) | Reply::Push(items) => {
            let items: Vec<_> = items.iter().map(texts).collect();
            format!("[{}]", items.join(" "))
        }
        Reply::Map(_) => "{..}".to_owned(),
    }
}

/// Whether a key is one of a pattern's, in which `*` stands for anything and `\` for nothing special.
fn matches(pattern: &[u8], key: &[u8]) -> bool {
    match pattern {
        [] => key.is_empty(),
        [b'*', rest @ ..] => (0..=key.len()).any(|at| matches(rest, &key[at..])),
        [b'\\', byte, rest @ ..] | [byte, rest @ ..] => {
            key.first() == Some(byte) && matches(rest, &key[1..])
        }
    }
}
