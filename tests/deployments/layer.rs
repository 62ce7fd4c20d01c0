//! The same service, under the same layer, over each storage: nothing in it knows where the locks
//! are.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
};

use axum::{
    Router,
    extract::{Path, State},
    routing::post,
};
use http::{Request, StatusCode};
use http_body_util::Empty;
use hyper::body::Bytes;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use tokio::{net::TcpListener, task::JoinSet};
use tower_distributed_lock::{
    DistributedLockLayer, HeldLock, LockFactory, LockKey, LockOptions, Redlock,
    error::InvalidKey,
    storage::{
        LockStorage, MemoryStorage, RedisStorage,
        redis::bb8_redis::{RedisConnectionManager, bb8::Pool},
    },
};

use super::{
    LONG, TTL, cluster,
    kit::{
        Authority, Cluster, LIMIT, RedisServer, Sentinel, ServerOptions, Tls, eventually, ms,
        within,
    },
    options, sentinel, unlock,
};

/// What the requests change: they read the balance, and write it back. Whom a later holder has
/// overtaken is refused, as a database would do it.
#[derive(Default)]
struct Account {
    /// And the greatest fencing token.
    balance: Mutex<(usize, u64)>,
    deposits: AtomicUsize,
    inside: AtomicUsize,
    /// That two were in at the same time.
    crowded: AtomicBool,
}

impl Account {
    fn read(&self, token: u64) -> Option<usize> {
        let mut balance = self.balance.lock().unwrap();
        (token > balance.1).then(|| {
            balance.1 = token;
            balance.0
        })
    }

    fn write(&self, token: u64, new: usize) -> bool {
        let mut balance = self.balance.lock().unwrap();
        let is_right = token == balance.1;
        if is_right {
            balance.0 = new;
            self.deposits.fetch_add(1, SeqCst);
        }
        is_right
    }
}

/// Somebody is in, until this is dropped.
struct Inside<'a>(&'a Account);

impl<'a> Inside<'a> {
    fn enter(account: &'a Account) -> Self {
        if account.inside.fetch_add(1, SeqCst) > 0 {
            account.crowded.store(true, SeqCst);
        }
        Self(account)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, SeqCst);
    }
}

async fn deposit(
    State(account): State<Arc<Account>>,
    Path(_id): Path<String>,
    lock: HeldLock,
) -> StatusCode {
    let _inside = Inside::enter(&account);
    let token = lock.fencing_token().unwrap();
    let Some(balance) = account.read(token) else {
        return StatusCode::CONFLICT;
    };
    tokio::time::sleep(ms(2)).await;
    match account.write(token, balance + 1) {
        true => StatusCode::OK,
        false => StatusCode::CONFLICT,
    }
}

/// `/accounts/7/deposit` and `/accounts/7/try` lock account 7.
fn account_key<B>(request: &Request<B>) -> Result<LockKey, InvalidKey> {
    let id = request.uri().path().split('/').nth(2).unwrap_or_default();
    LockKey::from_parts(["accounts", id])
}

/// A replica of the service.
async fn replica(locks: &LockFactory, account: &Arc<Account>) -> SocketAddr {
    let layer = DistributedLockLayer::new(locks.clone(), account_key);
    let waits = layer.clone().options(options(TTL));
    let tries = layer.options(LockOptions::builder().ttl(TTL).retries(0).build().unwrap());
    let app = Router::new()
        .route("/accounts/{id}/deposit", post(deposit).route_layer(waits))
        .route("/accounts/{id}/try", post(deposit).route_layer(tries))
        .with_state(Arc::clone(account));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

/// Two replicas, and what they change together.
struct Service {
    locks: [LockFactory; 2],
    replicas: [SocketAddr; 2],
    account: Arc<Account>,
}

impl Service {
    async fn start<S: LockStorage>(storages: [S; 2]) -> Self {
        let account = Arc::default();
        let locks = storages.map(LockFactory::new);
        let replicas = [
            replica(&locks[0], &account).await,
            replica(&locks[1], &account).await,
        ];
        Self {
            locks,
            replicas,
            account,
        }
    }

    async fn post(&self, replica: usize, what: &str) -> StatusCode {
        post_to(self.replicas[replica], what).await
    }

    /// Clients of both replicas send requests, one after the other each, until they are told to stop.
    fn clients(&self) -> Clients {
        let mut clients = Clients::default();
        for client in 0..8 {
            let address = self.replicas[client % 2];
            let (stop, done) = (Arc::clone(&clients.stop), Arc::clone(&clients.answers));
            clients.tasks.spawn(async move {
                while !stop.load(SeqCst) {
                    let status = post_to(address, "7/deposit").await;
                    done.lock().unwrap().push(status);
                }
            });
        }
        clients
    }

    /// Nothing of it is left.
    async fn ends(self) {
        for locks in self.locks {
            assert_eq!(locks.drain(LIMIT).await, 0);
        }
    }
}

async fn post_to(address: SocketAddr, what: &str) -> StatusCode {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let request = hyper::Request::post(format!("http://{address}/accounts/{what}"));
    let sent = client.request(request.body(Empty::new()).unwrap());
    within(2 * LIMIT, "an answer", sent).await.unwrap().status()
}

#[derive(Default)]
struct Clients {
    stop: Arc<AtomicBool>,
    answers: Arc<Mutex<Vec<StatusCode>>>,
    tasks: JoinSet<()>,
}

impl Clients {
    fn answered(&self, status: StatusCode) -> usize {
        let answers = self.answers.lock().unwrap();
        answers.iter().filter(|it| **it == status).count()
    }

    async fn go_on(&self) {
        let before = self.answered(StatusCode::OK);
        eventually("requests are answered", 2 * LIMIT, async || {
            self.answered(StatusCode::OK) > before + 20
        })
        .await;
    }

    async fn stop(&mut self) {
        self.stop.store(true, SeqCst);
        while let Some(client) = self.tasks.join_next().await {
            client.unwrap();
        }
    }
}

/// One request at a time, on two replicas; none of them is lost.
async fn serves_one_at_a_time<S: LockStorage>(storages: [S; 2]) {
    let service = Service::start(storages).await;
    let mut clients = service.clients();
    clients.go_on().await;
    clients.stop().await;
    let answers = clients.answers.lock().unwrap().clone();
    assert!(
        answers.iter().all(|status| *status == StatusCode::OK),
        "{answers:?}"
    );
    let balance = service.account.balance.lock().unwrap().0;
    assert_eq!(balance, answers.len());
    assert!(!service.account.crowded.load(SeqCst));

    // Who does not wait is told.
    let key = LockKey::from_parts(["accounts", "8"]).unwrap();
    let held = service.locks[0]
        .create_lock(key)
        .unwrap()
        .lock(options(LONG))
        .await;
    for replica in 0..2 {
        assert_eq!(service.post(replica, "8/try").await, StatusCode::LOCKED);
    }
    unlock(held.unwrap()).await;
    assert_eq!(service.post(1, "8/try").await, StatusCode::OK);
    service.ends().await;
}

/// The same while something happens to the servers: a request may be answered by 503 then, as its
/// lock could not be had or was lost, or be refused by the account; what was answered by 200 is in
/// there.
async fn serves_on(service: Service, happens: impl AsyncFnOnce()) -> Clients {
    let mut clients = service.clients();
    clients.go_on().await;
    happens().await;
    clients.go_on().await;
    clients.stop().await;
    let balance = service.account.balance.lock().unwrap().0;
    assert_eq!(balance, service.account.deposits.load(SeqCst));
    assert!(balance >= clients.answered(StatusCode::OK));
    for status in clients.answers.lock().unwrap().iter() {
        let expected = [
            StatusCode::OK,
            StatusCode::SERVICE_UNAVAILABLE,
            StatusCode::CONFLICT,
        ];
        assert!(expected.contains(status), "{status}");
    }
    service.ends().await;
    clients
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_layer_serves_over_memory_one_server_a_socket_tls_and_a_pool() {
    let memory = MemoryStorage::new();
    serves_one_at_a_time([memory.clone(), memory]).await;

    let authority = Authority::new();
    let server = RedisServer::start_with(ServerOptions {
        tls: Some(Tls {
            certificate: authority.issue(&["127.0.0.1"]),
            clients: None,
        }),
        ..ServerOptions::default()
    });
    let server = server.await;
    let mut urls = vec![
        server.url(),
        server.url().replace("redis://", "valkey://"),
        server.best_url(),
    ];
    if cfg!(unix) {
        urls.push(format!("unix://{}", server.socket().display()));
    }
    for url in urls {
        let storage = || {
            let storage = RedisStorage::builder(&url);
            if url.starts_with("rediss") {
                return storage.root_certificate(authority.pem()).connect_lazily();
            }
            storage.connect_lazily()
        };
        serves_one_at_a_time([storage().unwrap(), storage().unwrap()]).await;
        super::no_key_is_left(&server).await;
    }
    let pool = || {
        let manager = RedisConnectionManager::new(server.url()).unwrap();
        RedisStorage::from_pool(Pool::builder().build_unchecked(manager))
    };
    serves_one_at_a_time([pool(), pool()]).await;
    super::no_key_is_left(&server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_layer_serves_over_sentinel_and_over_a_failover() {
    let mut redis = Sentinel::start().await;
    let storages = || [(); 2].map(|()| sentinel(&redis).connect_lazily().unwrap());
    serves_one_at_a_time(storages()).await;
    super::no_key_is_left(&redis.servers[0]).await;
    let service = Service::start(storages()).await;
    serves_on(service, async || {
        redis.servers[0].kill();
        redis.is_master(1).await;
    })
    .await;
    super::no_key_is_left(&redis.servers[1]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_layer_serves_over_a_cluster_over_a_move_of_its_slot_and_over_a_failover() {
    let mut redis = Cluster::start().await;
    let storages = || [(); 2].map(|()| cluster(&redis).connect_lazily().unwrap());
    serves_one_at_a_time(storages()).await;
    let service = Service::start(storages()).await;
    let key = LockKey::from_parts(["accounts", "7"]).unwrap();
    let name = format!("distributed-locks:{}", key.as_str());
    let slot = redis.slot(&name).await;
    let from = redis.owner_says(0, slot).await;
    let to = (from + 1) % 3;
    // A request waits for a slot that moves, as it waits for a lock.
    let clients = serves_on(service, async || {
        redis.move_slot(slot, from, to).await;
    });
    assert_eq!(clients.await.answered(StatusCode::SERVICE_UNAVAILABLE), 0);

    let service = Service::start(storages()).await;
    serves_on(service, async || redis.nodes[to].kill()).await;
    eventually("no key is left", LIMIT, async || redis.keys().await == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_layer_serves_over_a_redlock_while_a_minority_fails() {
    let mut servers = Vec::new();
    for _ in 0..5 {
        servers.push(RedisServer::start().await);
    }
    let urls: Vec<_> = servers.iter().map(RedisServer::url).collect();
    let redlock = || async { Redlock::connect(urls.clone()).await.unwrap() };
    serves_one_at_a_time([redlock().await, redlock().await]).await;
    for server in &servers {
        super::no_key_is_left(server).await;
    }
    let service = Service::start([redlock().await, redlock().await]).await;
    let account = Arc::clone(&service.account);
    let clients = serves_on(service, async || {
        servers[0].kill();
        servers[1].pause();
    })
    .await;
    servers[1].resume();
    // Nobody has noticed.
    let answers = clients.answers.lock().unwrap().len();
    assert_eq!(clients.answered(StatusCode::OK), answers);
    assert!(!account.crowded.load(SeqCst));
    for server in &servers[1..] {
        super::no_key_is_left(server).await;
    }
}
