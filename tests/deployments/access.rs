//! The users that the documentation shows for Sentinel. (That of a Cluster: `tests/cluster.rs`.)

use redis::Value;
use tower_distributed_lock::storage::RedisStorage;

use super::{
    factory,
    kit::{LIMIT, Sentinel, eventually},
    no_key_is_left, the_lock_goes_round,
};

const SERVERS: &str = include_str!("../../src/storage/redis/acl.txt");
const SENTINELS: &str = include_str!("../../src/storage/redis/acl_sentinel.txt");

#[tokio::test]
async fn the_documented_users_of_sentinel_may_do_all_that_is_needed() {
    let mut redis = Sentinel::start().await;
    for server in &redis.servers {
        let () = server.run(&format!("{} +role", SERVERS.trim())).await;
    }
    let watcher = SENTINELS.trim().replace(" locks ", " watcher ");
    for sentinel in &redis.sentinels {
        let () = sentinel.run(&watcher).await;
    }
    let urls = redis.urls();
    let urls = urls
        .iter()
        .map(|url| url.replace("//", "//watcher:password@"));
    let urls: Vec<_> = urls.collect();
    let connect = || {
        let storage = RedisStorage::sentinel(Sentinel::SERVICE, urls.clone());
        // It may not look how the server is set up, and that would be seen.
        factory(storage.username("locks").password("password").probe(false))
    };
    let (first, second) = (connect(), connect());
    the_lock_goes_round([&first, &second], "k").await;
    for sentinel in &redis.sentinels {
        eventually(
            "they hear of failovers, and see to it that they do",
            LIMIT,
            async || {
                let clients: String = sentinel.run("CLIENT LIST").await;
                let words = ["user=watcher ", " sub=1 ", " cmd=ping "];
                let ours = |client: &&str| words.iter().all(|word| client.contains(word));
                clients.lines().filter(ours).count() == 2
            },
        )
        .await;
    }
    redis.servers[0].kill();
    redis.is_master(1).await;
    the_lock_goes_round([&second, &first], "k").await;
    no_key_is_left(&redis.servers[1]).await;
    for server in redis.sentinels.iter().chain(&redis.servers[1..]) {
        let refused: Vec<Value> = server.run("ACL LOG").await;
        assert!(refused.is_empty(), "{refused:?}");
    }
}
