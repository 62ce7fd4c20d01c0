//! Clients that mean no good: too many, with strange keys, or slow.

use axum::{Router, body::Body, extract::Request, routing::post};
use http::StatusCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};
use tower::ServiceExt;
use tower_distributed_lock::{
    DistributedLockLayer, LockFactory, LockKey, LockOptions,
    error::InvalidKey,
    storage::{MemoryStorage, RedisStorage},
};

use crate::{
    kit::{LIMIT, RedisServer, eventually, is_queued, ms, no_key_is_left, patient, within},
    run,
    world::{Meter, World, options, paused, settle, warm_up},
};

fn path(request: &Request) -> Result<LockKey, InvalidKey> {
    LockKey::new(&request.uri().path()[1..])
}

pub fn requests_beyond_the_limits_are_refused_and_cost_nothing_that_stays() {
    const PER_KEY: usize = 100;
    const IN_ALL: usize = 1_000;
    paused(async {
        let world = World::with(|builder| builder.max_waiters_per_key(PER_KEY).max_waiters(IN_ALL));
        let layer = DistributedLockLayer::new(world.factory.clone(), path).options(options());
        let app: Router = Router::new().route("/{key}", post(async || ()).layer(layer));
        let request = |key: usize| {
            let request = Request::post(format!("/{key}"))
                .body(Body::empty())
                .unwrap();
            app.clone().oneshot(request)
        };
        warm_up(10_000).await;
        let refused = async |key: usize| {
            let answer = request(key).await.unwrap();
            assert_eq!(answer.status(), StatusCode::TOO_MANY_REQUESTS);
            // Where all keys together have too many waiters, nobody knows when there is room.
            assert_eq!(answer.headers().contains_key("retry-after"), key == 0);
        };

        let mut rests = Vec::new();
        for _ in 0..3 {
            let before = Meter::start();
            let mut guards = Vec::new();
            for key in 0..20 {
                guards.push(world.lock(&key.to_string()).lock(options()).await.unwrap());
            }
            let mut waiting = JoinSet::new();
            // One key has too many, and then all have.
            for _ in 0..PER_KEY {
                waiting.spawn(request(0));
            }
            settle().await;
            let at_limit = Meter::start();
            for _ in 0..1_000 {
                refused(0).await;
            }
            assert_eq!(at_limit.cost(1).bytes, 0, "a refused request leaves bytes");
            for number in 0..IN_ALL - PER_KEY {
                waiting.spawn(request(1 + number % 19));
            }
            settle().await;
            assert_eq!(world.factory.waiters(), IN_ALL);
            let at_limit = Meter::start();
            // Also at keys that nobody has.
            for key in 1..2_000 {
                refused(key).await;
            }
            // But for room in the table.
            let bytes = at_limit.cost(1).bytes;
            assert!(bytes < 4_096, "refused requests leave {bytes} bytes");
            assert_eq!(
                (world.factory.keys(), world.factory.waiters()),
                (20, IN_ALL)
            );

            // Every other client leaves; the rest is served.
            let mut clients = Vec::new();
            waiting.detach_all();
            drop(waiting);
            for key in 0..20 {
                clients.push(tokio::spawn(request(key)));
            }
            settle().await;
            clients.iter().for_each(|client| client.abort());
            drop(guards);
            eventually("all are served", LIMIT, async || {
                sleep(ms(1)).await;
                world.factory.keys() == 0
            })
            .await;
            drop(clients);
            settle().await;
            world.assert_empty();
            rests.push(before.cost(1).bytes);
        }
        assert!(
            rests[1..].iter().all(|rest| *rest < 4_096),
            "{rests:?} bytes stay"
        );
    });
}

/// What is no key, and what looks like something else in Redis, in a URL or in a log.
fn keys() -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let long = |len| vec![b'k'; len];
    let refused = vec![vec![], long(1_025), long(65_536), vec![0xff; 1 << 20]];
    let texts = [
        "k",
        "K",
        " k",
        "k ",
        "k\0",
        "\0",
        "k\n",
        "k\r\nDEL distributed-locks:k",
        "{k}",
        "{",
        "}{",
        "{}",
        "k:queue",
        "{distributed-locks:k}:queue",
        "k}:queue",
        "distributed-locks:k",
        "{distributed-locks:k}:fence",
        "inbox:0",
        "distributed-locks:inbox:0",
        "é",
        "e\u{301}",
        "\u{202e}k",
        "\u{feff}k",
        "😀",
        "%6B",
        "k%00",
        "../k",
        "k/",
        "//k",
        "*",
        "k!",
        "'\"\\",
    ];
    let mut taken: Vec<Vec<u8>> = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    taken.extend([long(1_024), vec![0xff], vec![0xc3, 0x28], vec![0; 1_024]]);
    (refused, taken)
}

pub fn keys_of_every_kind_are_locks_of_their_own_or_refused() {
    run(async {
        let server = RedisServer::start().await;
        let factory = async || {
            let storage = RedisStorage::builder(server.url()).connect_timeout(LIMIT);
            let builder = LockFactory::builder(storage.connect().await.unwrap());
            builder.storage_timeout(LIMIT).build().unwrap()
        };
        let (here, there) = (factory().await, factory().await);
        let (refused, taken) = keys();
        for key in &refused {
            assert!(LockKey::new(key).is_err(), "{} bytes", key.len());
        }
        // All at once, with somebody who waits for each: had two one name, in the lock, its queue
        // or its messages, one of them would never be had.
        let mut guards = Vec::new();
        let mut waiting = JoinSet::new();
        for key in &taken {
            let key = LockKey::new(key).unwrap();
            let lock = here.create_lock(key.clone()).unwrap();
            let guard = within(LIMIT, "a lock", lock.try_lock(patient())).await;
            guards.push(guard.unwrap_or_else(|error| panic!("{key:?}: {error}")));
            waiting.spawn(there.create_lock(key).unwrap().lock(patient()));
        }
        for guard in &guards {
            is_queued(&server, guard.key().as_str(), 1).await;
        }
        assert_eq!(server.keys().await, 2 * taken.len());
        drop(guards);
        let served = within(LIMIT, "all are served", waiting.join_all()).await;
        assert!(served.iter().all(Result::is_ok));
        drop(served);
        no_key_is_left(&server).await;
    });
}

/// What comes back until the end of the connection.
async fn rest(socket: &mut TcpStream) -> String {
    let mut text = Vec::new();
    // A connection that is reset has said all that it had to say.
    let _ = within(LIMIT, "the end", socket.read_to_end(&mut text)).await;
    String::from_utf8_lossy(&text).into_owned()
}

pub fn clients_that_are_slow_hold_no_lock_for_ever() {
    run(async {
        let locks = LockFactory::new(MemoryStorage::new());
        let quick = LockOptions::builder()
            .ttl(ms(300))
            .max_hold(ms(600))
            .build();
        let layer = DistributedLockLayer::new(locks.clone(), path).options(quick.unwrap());
        // The handler reads the body, under the lock.
        let app = Router::new().route("/{key}", post(async |_: String| ()).layer(layer));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move { axum::serve(listener, app).await });

        // Heads that never end: nobody asks for a lock.
        let mut heads = Vec::new();
        for number in 0..100 {
            let mut socket = TcpStream::connect(address).await.unwrap();
            let head = format!("POST /k HTTP/1.1\r\nhost: x\r\nx-{number}: ");
            socket.write_all(head.as_bytes()).await.unwrap();
            heads.push(socket);
        }
        sleep(ms(50)).await;
        assert_eq!((locks.keys(), locks.waiters()), (0, 0));

        // Bodies that never end: the first has the lock, for as long as a holder may; the others
        // wait for it, each for as long as it may, and have it in turn or are refused.
        let head = "POST /k HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
        let mut bodies = JoinSet::new();
        for _ in 0..4 {
            let mut socket = TcpStream::connect(address).await.unwrap();
            socket.write_all(head.as_bytes()).await.unwrap();
            bodies.spawn(async move {
                let (mut reads, mut writes) = socket.split();
                let drips = async {
                    loop {
                        if writes.write_all(b"1\r\nx\r\n").await.is_err() {
                            return;
                        }
                        sleep(ms(20)).await;
                    }
                };
                let mut answer = [0; 12];
                tokio::select! {
                    _ = reads.read_exact(&mut answer) => String::from_utf8_lossy(&answer).into_owned(),
                    () = drips => rest(&mut socket).await,
                }
            });
        }
        let answers = within(LIMIT, "they are answered", bodies.join_all()).await;
        for answer in &answers {
            assert!(answer.starts_with("HTTP/1.1 503"), "{answer:?}");
        }
        eventually("the lock is free", LIMIT, async || locks.keys() == 0).await;

        // And the others are served.
        let mut socket = TcpStream::connect(address).await.unwrap();
        let head = "POST /k HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        socket.write_all(head.as_bytes()).await.unwrap();
        assert!(rest(&mut socket).await.starts_with("HTTP/1.1 200"));
        drop(heads);
        server.abort();
    });
}
