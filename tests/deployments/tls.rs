//! Sentinel and Cluster where everybody speaks TLS, and shows a certificate.

use tower_distributed_lock::{
    LockFactory,
    error::{LockError, StorageErrorKind},
    storage::redis::RedisStorageBuilder,
};

use super::{
    LONG, cluster, factory,
    kit::{Authority, Certificate, Cluster, LIMIT, RedisServer, Sentinel, Tls, eventually, within},
    lock, no_key_is_left, options, sentinel, the_lock_goes_round, unlock,
};

const HERE: [&str; 1] = ["127.0.0.1"];

/// Whom all trust, and what we show them.
struct Trust {
    authority: Authority,
    ours: Certificate,
}

impl Trust {
    fn new() -> Self {
        let authority = Authority::new();
        let ours = authority.issue(&["us"]);
        Self { authority, ours }
    }

    fn servers(&self) -> Tls {
        Tls {
            certificate: self.authority.issue(&HERE),
            clients: Some(self.authority.pem().to_owned()),
        }
    }

    fn add_to(&self, storage: RedisStorageBuilder) -> RedisStorageBuilder {
        storage
            .connect_timeout(LIMIT)
            .root_certificate(self.authority.pem())
            .client_certificate(self.ours.pem.as_str(), self.ours.key.as_str())
    }
}

/// All connections to this server but the test's own are encrypted, and there are some of ours.
async fn all_is_encrypted(server: &RedisServer) {
    let clients: String = server.run("CLIENT LIST").await;
    let encrypted = format!(" laddr=127.0.0.1:{} ", server.tls_port());
    let (safe, plain): (Vec<_>, Vec<_>) =
        { clients.lines() }.partition(|client| client.contains(&encrypted));
    assert!(!safe.is_empty(), "{clients}");
    let own = |client: &&str| client.contains("cmd=client");
    // A replica is written to over a connection that it has made.
    let replication = |client: &&str| client.contains(" flags=M ");
    let mut plain = plain.iter().filter(|client| !replication(client));
    assert!(plain.all(own), "{clients}");
}

/// Nobody gets a lock, and whoever asks is told why at once.
async fn is_refused(storage: RedisStorageBuilder, why: &str) {
    let connecting = storage.clone().connect();
    let error = within(LIMIT, "a refusal", connecting).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
    assert!(error.to_string().contains(why), "{error}");
    let factory = factory(storage);
    let refused = factory.create_lock("k").unwrap().lock(options(LONG));
    match within(LIMIT / 2, "a refusal", refused).await {
        Err(LockError::Storage(error)) => {
            assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
        }
        other => panic!("{other:?}"),
    }
}

const NOT_TRUSTED: &str = "nobody who is trusted here has issued it";

#[tokio::test]
async fn sentinels_and_the_master_are_found_and_followed_over_tls_alone() {
    let trust = Trust::new();
    let mut redis = Sentinel::start_with_tls(trust.servers()).await;
    let factories = [(); 2].map(|()| factory(trust.add_to(sentinel(&redis))));
    let [first, second] = &factories;
    the_lock_goes_round([first, second], "k").await;
    for server in redis.sentinels.iter().chain(&redis.servers[..1]) {
        all_is_encrypted(server).await;
    }
    redis.servers[0].kill();
    redis.is_master(1).await;
    the_lock_goes_round([second, first], "k").await;
    all_is_encrypted(&redis.servers[1]).await;
    no_key_is_left(&redis.servers[1]).await;

    let unknown = sentinel(&redis).connect_timeout(LIMIT);
    is_refused(unknown.clone(), NOT_TRUSTED).await;
    let others = unknown.root_certificate(Authority::new().pem());
    is_refused(others, NOT_TRUSTED).await;
    let nobody = sentinel(&redis).root_certificate(trust.authority.pem());
    is_refused(nobody, "the server does not accept us").await;
}

#[tokio::test]
async fn a_master_whose_certificate_is_not_valid_is_not_used_whatever_sentinel_says() {
    let trust = Trust::new();
    let redis = Sentinel::start_with_tls(trust.servers()).await;
    for (certificate, why) in [
        (trust.authority.issue_expired(&HERE), "expired"),
        (Authority::new().issue(&HERE), NOT_TRUSTED),
        (
            trust.authority.issue(&["redis.example"]),
            "not valid for name",
        ),
    ] {
        redis.servers[0].change_certificate(&certificate).await;
        let () = redis.servers[0].run("CONFIG RESETSTAT").await;
        is_refused(trust.add_to(sentinel(&redis)), why).await;
        assert_eq!(redis.servers[0].calls("set").await, 0);
    }
}

#[tokio::test]
async fn a_cluster_is_reached_over_tls_alone_where_slots_move_and_masters_change() {
    let trust = Trust::new();
    let mut redis = Cluster::start_with_tls(trust.servers()).await;
    let unknown = cluster(&redis).connect_timeout(LIMIT);
    is_refused(unknown.clone(), NOT_TRUSTED).await;
    is_refused(
        unknown.root_certificate(Authority::new().pem()),
        NOT_TRUSTED,
    )
    .await;

    let connect = || -> LockFactory { factory(trust.add_to(cluster(&redis))) };
    let (first, second) = (connect(), connect());
    for master in 0..3 {
        let key = redis.key_at(master).await;
        the_lock_goes_round([&first, &second], &key).await;
        all_is_encrypted(&redis.nodes[master]).await;
    }
    // Told by the node that had it where it is now, which has to be over TLS too.
    let key = redis.key_at(0).await;
    let slot = redis.slot(&format!("distributed-locks:{key}")).await;
    let guard = lock(&first, &key).await;
    redis.move_slot(slot, 0, 2).await;
    unlock(guard).await;
    the_lock_goes_round([&second, &first], &key).await;
    // The next master is known by what the others tell of it.
    let key = redis.key_at(1).await;
    redis.nodes[1].kill();
    the_lock_goes_round([&first, &second], &key).await;
    all_is_encrypted(&redis.nodes[4]).await;
    eventually("no key is left", LIMIT, async || redis.keys().await == 0).await;
}
