//! A look, again and again, at who is master and what Sentinel or the cluster says of it: when a
//! master was replaced, whoever did it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use redis::{AsyncConnectionConfig, FromRedisValue, RedisError, aio::MultiplexedConnection};
use tokio::time::sleep;

use super::{
    kit::{RedisServer, Sentinel, ms},
    record::now,
    world::World,
};

/// From the last moment at which all was as before to the first at which all agree again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replacement {
    pub from: u64,
    /// `None` if it was not over when it was looked at last.
    pub until: Option<u64>,
}

/// What the servers said at one time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Grows whenever another server becomes a master: what each Sentinel or node says.
    pub epochs: Vec<u64>,
    /// Which servers say that they are masters.
    pub masters: Vec<bool>,
}

impl View {
    /// Whether they agree: as many masters as there should be, one epoch.
    fn is_settled(&self, masters: usize) -> bool {
        self.epochs.windows(2).all(|epochs| epochs[0] == epochs[1])
            && self.masters.iter().filter(|it| **it).count() == masters
    }
}

/// The views of a run, told apart where they differ.
#[derive(Debug, Default)]
pub struct Views {
    /// The last one, and when it was asked for and was there.
    last: Option<(View, u64)>,
    first: Option<View>,
    pub replacements: Vec<Replacement>,
}

impl Views {
    /// A view that was asked for at `asked` and complete at `seen`.
    pub fn add(&mut self, view: View, asked: u64, seen: u64) {
        let first = self.first.get_or_insert_with(|| view.clone());
        let masters = first.masters.iter().filter(|it| **it).count();
        let settled = view.is_settled(masters);
        let changed = { self.last.as_ref() }.is_some_and(|(last, _)| *last != view);
        let before = self.last.as_ref().map_or(asked, |(_, asked)| *asked);
        match self.replacements.last_mut() {
            Some(open) if open.until.is_none() => open.until = settled.then_some(seen),
            _ if changed => self.replacements.push(Replacement {
                from: before,
                until: settled.then_some(seen),
            }),
            _ => {}
        }
        self.last = Some((view, asked));
    }
}

/// Goes on until it is dropped.
pub struct Watch {
    views: Arc<Mutex<Views>>,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Watch {
    /// Returns when it has looked for the first time. Of a world without replicas there is nothing
    /// to see.
    pub async fn over(world: &World) -> Self {
        let views = Arc::<Mutex<Views>>::default();
        if world.sentinel.is_none() && world.cluster.is_none() {
            return Self { views, task: None };
        }
        let ways = |servers: &[RedisServer]| servers.iter().map(Way::to).collect();
        let mut eyes = Eyes {
            sentinels: ways(world.sentinel.as_ref().map_or(&[], |it| &it.sentinels)),
            servers: ways(world.all()),
        };
        let look = async move |eyes: &mut Eyes, views: &Mutex<Views>| {
            let asked = now();
            if let Ok(view) = eyes.look().await {
                let mut views = views.lock().unwrap_or_else(PoisonError::into_inner);
                views.add(view, asked, now());
            }
        };
        look(&mut eyes, &views).await;
        let shared = Arc::clone(&views);
        let task = tokio::spawn(async move {
            loop {
                sleep(ms(20)).await;
                look(&mut eyes, &shared).await;
            }
        });
        let task = Some(task);
        Self { views, task }
    }

    pub fn replacements(&self) -> Vec<Replacement> {
        let views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        views.replacements.clone()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

struct Eyes {
    /// None in a cluster, whose nodes know it themselves.
    sentinels: Vec<Way>,
    servers: Vec<Way>,
}

impl Eyes {
    /// Fails where one does not answer: then nobody knows.
    async fn look(&mut self) -> Result<View, RedisError> {
        let mut view = View {
            epochs: Vec::new(),
            masters: Vec::new(),
        };
        for sentinel in &mut self.sentinels {
            let ask = ["SENTINEL", "MASTER", Sentinel::SERVICE];
            let fields: HashMap<String, String> = sentinel.ask(&ask).await?;
            view.epochs
                .push(fields["config-epoch"].parse().unwrap_or(0));
        }
        for server in &mut self.servers {
            let info: String = server.ask(&["INFO", "replication"]).await?;
            view.masters.push(info.contains("role:master"));
            if self.sentinels.is_empty() {
                let info: String = server.ask(&["CLUSTER", "INFO"]).await?;
                let mut fields = info.lines().filter_map(|line| line.split_once(':'));
                let epoch = fields.find(|(name, _)| *name == "cluster_current_epoch");
                let epoch = epoch.and_then(|(_, epoch)| epoch.trim().parse().ok());
                view.epochs.push(epoch.unwrap_or(0));
            }
        }
        Ok(view)
    }
}

/// A connection that is opened again when it has failed: a server closes all when it is demoted.
struct Way {
    url: String,
    connection: Option<MultiplexedConnection>,
}

impl Way {
    fn to(server: &RedisServer) -> Self {
        Self {
            url: server.url(),
            connection: None,
        }
    }

    async fn ask<T: FromRedisValue>(&mut self, words: &[&str]) -> Result<T, RedisError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let limit = Some(Duration::from_secs(1));
                let config = AsyncConnectionConfig::new()
                    .set_connection_timeout(limit)
                    .set_response_timeout(limit);
                let client = redis::Client::open(self.url.as_str())?;
                let opening = client.get_multiplexed_async_connection_with_config(&config);
                opening.await?
            }
        };
        let mut command = redis::Cmd::new();
        command.arg(words);
        let answer = command.query_async(&mut connection).await?;
        self.connection = Some(connection);
        Ok(answer)
    }
}
