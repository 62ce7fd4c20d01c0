//! Who waits for a lock at the server, and what others were given meanwhile.

use std::time::Duration;

use super::store::Store;
use crate::history::History;

#[derive(Default)]
pub struct Order {
    /// Who has the lock, or had it last.
    owner: Option<Token>,
    /// When it runs out or ran out, unless it was given back.
    expires: Option<u64>,
    /// By the server's clock, in microseconds.
    owned_since: u64,
    waiting: Vec<Waiting>,
}

/// Without the mark that somebody waits.
type Token = Vec<u8>;

struct Waiting {
    token: Token,
    since: u64,
    /// The processes that were given the lock since.
    passed: Vec<Vec<u8>>,
}

fn process(token: &[u8]) -> &[u8] {
    token.get(..32).unwrap_or(token)
}

impl Order {
    /// A command about a lock was carried out, a plain one or a script.
    pub fn look(&mut self, name: &[u8], store: &Store, is_plain: bool, history: &History) {
        let queue = store.get(&[b"{", name, b"}:queue"].concat());
        let (owner, now) = (store.get(name), store.now);
        let lines = queue
            .map_or(&b""[..], Vec::as_slice)
            .split(|it| *it == b'\n');
        let tokens = lines.filter_map(|line| line.split(|it| *it == b' ').next());
        // Who only wants to hear that the lock is free has a line without a token.
        let tokens: Vec<_> = tokens.filter(|token| token.contains(&b':')).collect();
        let owner = owner.map(|owner| owner.strip_suffix(b"!").unwrap_or(owner).to_vec());
        let ran_out = self.expires.is_some_and(|expires| now >= expires);
        if owner.is_some() {
            self.expires = store.expires(name);
        } else if !ran_out {
            self.expires = None;
        }
        let given = owner.filter(|owner| self.owner.as_ref() != Some(owner));
        if given.is_some() {
            // Also from the one who has it now.
            self.was_kept(now, history);
        }
        self.waiting
            .retain(|it| tokens.contains(&it.token.as_slice()));
        if let Some(owner) = given {
            // In the moment in which a holder's time runs out, whoever asks may be first (`docs/guide/guarantees.md`).
            let may_pass = is_plain && ran_out;
            self.given(owner, may_pass, now, history);
        }
        for token in tokens {
            if self.waiting.iter().all(|it| it.token != token) {
                self.waiting.push(Waiting {
                    token: token.to_vec(),
                    since: now,
                    passed: Vec::new(),
                });
            }
        }
    }

    /// The lock goes from its owner to another: for how long did it keep it from those who waited?
    fn was_kept(&self, now: u64, history: &History) {
        let Some(owner) = &self.owner else { return };
        let others = self.waiting.iter();
        let others = others.filter(|it| process(&it.token) != process(owner));
        if let Some(since) = others.map(|it| it.since).min() {
            let kept = now - since.max(self.owned_since);
            history.kept(Duration::from_micros(kept));
        }
    }

    /// No process is given a lock twice while another waits for it.
    fn given(&mut self, token: Token, may_pass: bool, now: u64, history: &History) {
        let new = process(&token).to_vec();
        let others = self.waiting.iter_mut();
        let others = others.filter(|it| process(&it.token) != new);
        for place in others {
            if place.passed.contains(&new) && !may_pass {
                history.violated("a process was given a lock twice while another waited for it");
            }
            place.passed.push(new.clone());
        }
        self.owner = Some(token);
        self.owned_since = now;
    }
}
