//! What happened under a lock, in the order in which the server saw it.
//!
//! The server keeps the diary, a list, so its order is the true one, whatever the clocks of the
//! processes say. Each entry also notes who had the lock in the server at that moment, and who stood
//! in its queue: a queue changes only by commands, so two such notes tell what happened in between.

use std::collections::{HashMap, HashSet};

use redis::aio::MultiplexedConnection;

use super::kit::{LIMIT, RedisServer, eventually};

/// Writes `<who> enters`, the holder's token and those of the queue. Answers how many lines there
/// are.
const ENTER: &str = "
    local owner = redis.call('GET', KEYS[2]) or 'nobody'
    local words = { ARGV[1], 'enters', (string.gsub(owner, '!$', '')) }
    for entry in string.gmatch(redis.call('GET', KEYS[3]) or '', '[^\\n]+') do
      words[#words + 1] = string.match(entry, '^%S+')
    end
    return redis.call('RPUSH', KEYS[1], table.concat(words, ' '))";

pub fn lock_name(key: &str) -> String {
    format!("distributed-locks:{key}")
}

pub fn queue_name(key: &str) -> String {
    format!("{{distributed-locks:{key}}}:queue")
}

/// A way to write in the diary, for whoever holds the lock `key`.
#[derive(Clone)]
pub struct Diary {
    redis: MultiplexedConnection,
    key: String,
}

impl Diary {
    pub async fn open(url: &str, key: &str) -> Self {
        let client = redis::Client::open(url).unwrap();
        let config = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(LIMIT))
            .set_response_timeout(Some(LIMIT));
        let connecting = client.get_multiplexed_async_connection_with_config(&config);
        Self {
            redis: connecting.await.unwrap(),
            key: key.to_owned(),
        }
    }

    /// For what else is done under the lock.
    pub fn connection(&mut self) -> &mut MultiplexedConnection {
        &mut self.redis
    }

    /// How many stays there have been, with this one.
    pub async fn enter(&mut self, who: &str) -> usize {
        let lines: usize = redis::cmd("EVAL")
            .arg((ENTER, 3, "diary"))
            .arg((lock_name(&self.key), queue_name(&self.key), who))
            .query_async(&mut self.redis)
            .await
            .unwrap();
        lines.div_ceil(2)
    }

    pub async fn leave(&mut self, who: &str) {
        redis::cmd("RPUSH")
            .arg(("diary", format!("{who} leaves")))
            .query_async(&mut self.redis)
            .await
            .unwrap()
    }
}

/// Reads the diary while it is written.
pub struct Reader<'a> {
    server: &'a RedisServer,
    line: usize,
}

impl<'a> Reader<'a> {
    pub fn of(server: &'a RedisServer) -> Self {
        Self { server, line: 0 }
    }

    /// The next line, such as `b enters`. Waits for it if need be, but no longer than what happens
    /// at once may take.
    pub async fn next(&mut self) -> String {
        let mut next = None;
        eventually("the next line of the diary", LIMIT, async || {
            next = self
                .server
                .run(&format!("LINDEX diary {}", self.line))
                .await;
            next.is_some()
        })
        .await;
        self.line += 1;
        let line: String = next.unwrap();
        let words: Vec<_> = line.split(' ').take(2).collect();
        words.join(" ")
    }
}

/// One stay under the lock.
#[derive(Debug)]
pub struct Stay {
    pub who: String,
    /// The token that had the lock in the server when it began, then those in the queue.
    pub line: Vec<String>,
}

/// The whole diary. Panics where two were in at the same time.
pub async fn read(server: &RedisServer) -> Vec<Stay> {
    let lines: Vec<String> = server.run("LRANGE diary 0 -1").await;
    let stays = lines.chunks(2).map(|stay| {
        let (who, line) = stay[0].split_once(" enters ").expect("nobody else is in");
        assert_eq!(
            stay.get(1),
            Some(&format!("{who} leaves")),
            "two holders at the same time"
        );
        Stay {
            who: who.to_owned(),
            line: line.split(' ').map(str::to_owned).collect(),
        }
    });
    stays.collect()
}

/// Whenever the lock changed hands, the first in the queue got it, and the others moved up: nobody
/// was passed by anybody who had come later.
pub fn assert_served_in_order(stays: &[Stay]) {
    for pair in stays.windows(2) {
        let (before, after) = (&pair[0], &pair[1]);
        let same_lease = before.line[0] == after.line[0];
        let expected = &before.line[usize::from(!same_lease)..];
        assert!(
            after.line.starts_with(expected),
            "somebody was passed: {before:?}, then {after:?}"
        );
    }
}

/// The most leases of others between two stays of a process.
pub fn longest_wait(stays: &[Stay]) -> usize {
    let (mut lease, mut leases, mut longest) = ("", 0_usize, 0);
    let mut last_of = HashMap::new();
    for stay in stays {
        leases += usize::from(stay.line[0] != lease);
        lease = &stay.line[0];
        if let Some(last) = last_of.insert(&stay.who, leases) {
            longest = longest.max((leases - last).saturating_sub(1));
        }
    }
    longest
}

/// No process stood in the queue twice, or stood there while it had the lock: with
/// [`assert_served_in_order`], nobody waits for longer than one lease of each of the others.
pub fn assert_one_place_each(stays: &[Stay]) {
    for stay in stays {
        // A token is the id of a process and a number.
        let processes = stay.line.iter().map(|token| token.split(':').next());
        let different: HashSet<_> = processes.collect();
        assert_eq!(different.len(), stay.line.len(), "{stay:?}");
    }
}
