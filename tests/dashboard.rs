//! The dashboard's router behind real connections. `examples/dashboard` has the tests of its page in
//! a browser.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

mod kit;

use std::net::SocketAddr;

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request},
    middleware::{self, Next},
    response::Response,
};
use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tower_distributed_lock::{
    LockFactory, LockGuard,
    dashboard::Dashboard,
    error::LossReason,
    storage::{MemoryStorage, RedisStorage},
};

use kit::{LIMIT, RedisServer, eventually, patient, within};

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        assert_eq!(self.headers["content-type"], "application/json");
        serde_json::from_str(&self.text).expect(&self.text)
    }

    /// The sentence of a refusal.
    fn error(&self) -> String {
        self.json()["error"].as_str().expect(&self.text).to_owned()
    }
}

/// A server, and a way to ask it.
struct Site {
    address: SocketAddr,
}

impl Site {
    async fn new(app: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self { address }
    }

    async fn of(locks: &LockFactory) -> Self {
        Self::new(Dashboard::new(locks.inspector()).allow_release().router()).await
    }

    async fn send(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let client = Client::builder(TokioExecutor::new()).build_http();
        let mut request = hyper::Request::builder()
            .method(method)
            .uri(format!("http://{}{path}", self.address));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        let response = client.request(request).await.unwrap();
        let (head, body) = response.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer {
            status: head.status,
            headers: head.headers,
            text: String::from_utf8(body.to_vec()).unwrap(),
        }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &[], "").await
    }

    async fn locks(&self) -> Value {
        let answer = self.get("/locks.json").await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        answer.json()
    }

    async fn release(&self, body: &Value) -> Answer {
        self.send("POST", "/release", JSON, body.to_string()).await
    }
}

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

fn replica(storage: &MemoryStorage, label: &str) -> LockFactory {
    let builder = LockFactory::builder(storage.clone());
    builder.label(label).build().unwrap()
}

async fn hold(locks: &LockFactory, key: &str) -> LockGuard {
    let lock = locks.create_lock(key).unwrap();
    lock.lock(patient()).await.unwrap()
}

async fn wait_for(locks: &LockFactory, key: &str) {
    let before = locks.waiters();
    tokio::spawn(locks.create_lock(key).unwrap().lock(patient()));
    eventually("it waits", LIMIT, async || locks.waiters() == before + 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_json_is_as_it_is_documented() {
    let storage = MemoryStorage::new();
    let [shop_1, shop_2] = ["shop-1", "shop-2"].map(|label| replica(&storage, label));
    let nameless = LockFactory::new(storage);
    let site = Site::of(&shop_1).await;
    assert_eq!(site.locks().await, json!({ "more": false, "locks": [] }));

    let held = hold(&shop_1, "orders/42").await;
    wait_for(&shop_2, "orders/42").await;
    wait_for(&shop_2, "orders/42").await;
    wait_for(&shop_1, "orders/42").await;
    let other = hold(&nameless, "a b").await;
    let shop_1 = json!({ "label": "shop-1", "this": true, "answered": true });
    let expected = json!({
        "more": false,
        "locks": [
            {
                "key": "a%20b",
                "holder": { "label": null, "this": false, "answered": true },
                "fencing_token": other.fencing_token(),
                "waiters": [],
            },
            {
                "key": "orders/42",
                "holder": shop_1,
                "fencing_token": held.fencing_token(),
                "waiters": [
                    { "label": "shop-1", "this": true, "answered": true, "callers": 1 },
                    { "label": "shop-2", "this": false, "answered": true, "callers": 2 },
                ],
            },
        ],
    });
    // An answer is shared for half a second, who waits may not be in the queue yet, and on a busy
    // machine a process may be asked in vain once.
    let mut found = json!(null);
    for _ in 0..20 {
        found = site.locks().await;
        for lock in found["locks"].as_array_mut().unwrap() {
            let lock = lock.as_object_mut().unwrap();
            let held = lock.remove("held_ms").expect("`held_ms`");
            assert!(held.is_null() || held.as_u64().unwrap() < 20_000, "{held}");
            let ttl = lock.remove("ttl_ms").expect("`ttl_ms`");
            assert!((1..=300_000).contains(&ttl.as_u64().unwrap()), "{ttl}");
        }
        if found == expected {
            break;
        }
        tokio::time::sleep(kit::ms(250)).await;
    }
    assert_eq!(found, expected);
}

#[tokio::test]
async fn that_there_are_more_locks_than_are_shown_is_said() {
    let locks = LockFactory::new(MemoryStorage::new());
    let _held = [hold(&locks, "a").await, hold(&locks, "b").await];
    for (limit, shown) in [(1, 1), (2, 2)] {
        let router = Dashboard::new(locks.inspector()).limit(limit).router();
        let found = Site::new(router).await.locks().await;
        assert_eq!(found["more"], limit == 1);
        assert_eq!(found["locks"].as_array().unwrap().len(), shown);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_takes_the_lock_from_its_holder_and_says_whether_there_was_one() {
    let locks = LockFactory::new(MemoryStorage::new());
    let site = Site::of(&locks).await;
    // Their text is not what it was made of: it must not be encoded again.
    for key in ["orders/42", "50%", "naïve {key}"] {
        let held = hold(&locks, key).await;
        let seen = site.locks().await["locks"][0].take();
        let wanted = json!({
            "key": seen["key"],
            "reason": "its worker hangs",
            "fencing_token": seen["fencing_token"],
        });
        let answer = site.release(&wanted).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        assert_eq!(answer.json(), json!({ "released": true }));
        let told = within(LIMIT, "its holder is told", held.lost()).await;
        assert_eq!(told, LossReason::ForceReleased);
        // At once, also for those who shared the last answer.
        assert_eq!(site.locks().await["locks"], json!([]));

        let answer = site.release(&wanted).await;
        assert_eq!(answer.json(), json!({ "released": false }));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_with_another_holder_than_was_meant_is_left_alone() {
    let locks = LockFactory::new(MemoryStorage::new());
    let site = Site::of(&locks).await;
    let seen = hold(&locks, "a").await.fencing_token();
    let held = hold(&locks, "a").await;
    let wanted = json!({ "key": "a", "reason": "it hangs", "fencing_token": seen });
    let answer = site.release(&wanted).await;
    assert_eq!(answer.status, StatusCode::CONFLICT);
    assert!(answer.error().contains("another holder"), "{}", answer.text);
    assert!(held.is_held());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_a_foreign_page_could_send_is_refused() {
    let locks = LockFactory::new(MemoryStorage::new());
    let site = Site::of(&locks).await;
    let held = hold(&locks, "a").await;
    let body = r#"{"key":"a","reason":"none of yours"}"#;
    for content_type in [
        None,
        Some("text/plain"),
        Some("application/x-www-form-urlencoded"),
        Some("multipart/form-data; boundary=application/json"),
        Some("text/plain; application/json"),
    ] {
        let headers: Vec<_> = content_type
            .map(|it| ("content-type", it))
            .into_iter()
            .collect();
        let answer = site.send("POST", "/release", &headers, body).await;
        assert_eq!(
            answer.status,
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "{content_type:?}"
        );
        assert!(answer.error().contains("application/json"));
    }
    for from in ["cross-site", "same-site"] {
        let headers = [JSON[0], ("sec-fetch-site", from)];
        let answer = site.send("POST", "/release", &headers, body).await;
        assert_eq!(answer.status, StatusCode::FORBIDDEN, "{from}");
        assert!(answer.error().contains("another site"));
    }
    // What a browser asks before it sends what a form cannot: this router does not say yes.
    let preflight = [
        ("origin", "http://elsewhere.example"),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "content-type"),
    ];
    let answer = site.send("OPTIONS", "/release", &preflight, "").await;
    assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(!answer.headers.contains_key("access-control-allow-origin"));
    assert!(held.is_held());

    let own = [
        ("content-type", "Application/JSON; charset=utf-8"),
        ("sec-fetch-site", "same-origin"),
    ];
    assert_eq!(
        site.send("POST", "/release", &own, body).await.status,
        StatusCode::OK
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_is_not_as_documented_is_refused_with_a_sentence() {
    let locks = LockFactory::new(MemoryStorage::new());
    let site = Site::of(&locks).await;
    let held = hold(&locks, "a").await;
    let long = "x".repeat(501);
    for (body, part) in [
        ("", "EOF"),
        ("key=a", "expected value"),
        (r#"{"reason":"r"}"#, "missing field `key`"),
        (r#"{"key":"a"}"#, "missing field `reason`"),
        (
            r#"{"key":"a","reason":"r","force":true}"#,
            "unknown field `force`",
        ),
        (r#"{"key":"a","reason":" "}"#, "1 to 500 characters"),
        (r#"{"key":"a","reason":"r\nWARN all is well"}"#, "one line"),
        (
            &format!(r#"{{"key":"a","reason":"{long}"}}"#),
            "1 to 500 characters",
        ),
        (r#"{"key":"","reason":"r"}"#, "must not be empty"),
        (
            r#"{"key":"a b","reason":"r"}"#,
            "no lock key is stored like that",
        ),
        (
            r#"{"key":"%61","reason":"r"}"#,
            "no lock key is stored like that",
        ),
    ] {
        let answer = site.send("POST", "/release", JSON, body.to_owned()).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{body}");
        assert!(answer.error().contains(part), "{body}: {}", answer.text);
    }
    assert!(held.is_held());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_body_is_refused_whatever_the_service_around_allows() {
    let locks = LockFactory::new(MemoryStorage::new());
    let router = Dashboard::new(locks.inspector()).allow_release().router();
    let site = Site::new(router.layer(DefaultBodyLimit::disable())).await;
    let body = json!({ "key": "a", "reason": "r", "more": "x".repeat(17_000) });
    let answer = site.release(&body).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert!(answer.error().contains("limit"), "{}", answer.text);

    // The longest that there can be is not.
    let key = "%00".repeat(1024);
    let reason = "\u{1D11E}".repeat(500);
    let answer = site.release(&json!({ "key": key, "reason": reason })).await;
    assert_eq!(answer.json(), json!({ "released": false }));
}

#[tokio::test]
async fn other_methods_and_paths_are_refused() {
    let locks = LockFactory::new(MemoryStorage::new());
    let app = Router::new().nest_service(
        "/locks",
        Dashboard::new(locks.inspector()).allow_release().router(),
    );
    let site = Site::new(app).await;
    for (method, path, status, allow) in [
        ("POST", "/locks", 405, "GET,HEAD"),
        ("POST", "/locks/", 405, "GET,HEAD"),
        ("DELETE", "/locks/locks.json", 405, "GET,HEAD"),
        ("GET", "/locks/release", 405, "POST"),
        ("HEAD", "/locks", 200, ""),
        ("HEAD", "/locks/", 200, ""),
        ("GET", "/locks/page.js", 404, ""),
    ] {
        let answer = site.send(method, path, JSON, "{}").await;
        assert_eq!(answer.status, status, "{method} {path}");
        let allowed = answer.headers.get("allow").map(|it| it.to_str().unwrap());
        assert_eq!(allowed.unwrap_or_default(), allow, "{method} {path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_releases_are_not_allowed_there_is_no_route_for_them() {
    let locks = LockFactory::new(MemoryStorage::new());
    let held = hold(&locks, "a").await;
    let router = Dashboard::new(locks.inspector()).router();
    let site = Site::new(router).await;
    for method in ["GET", "POST", "PUT", "OPTIONS"] {
        let body = r#"{"key":"a","reason":"r"}"#;
        let answer = site.send(method, "/release", JSON, body).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{method}");
    }
    assert!(held.is_held());
    assert_eq!(site.locks().await["locks"][0]["key"], "a");
    assert!(site.get("/").await.text.contains(r#"data-release="off""#));
    assert!(
        Site::of(&locks)
            .await
            .get("/")
            .await
            .text
            .contains(r#"data-release="on""#)
    );
}

#[tokio::test]
async fn it_is_served_wherever_it_is_mounted() {
    #[derive(Clone)]
    struct State;

    let locks = LockFactory::new(MemoryStorage::new());
    let dashboard = || Dashboard::new(locks.inspector()).allow_release().router();
    let nested = Router::new().nest("/b", dashboard());
    // A router with a state of its own takes it as well.
    let with_state = Router::new().nest(
        "/c",
        Dashboard::new(locks.inspector())
            .allow_release()
            .router::<State>(),
    );
    let app = Router::new()
        .nest("/a", nested)
        .merge(with_state.with_state(State))
        .nest("/slash/", dashboard())
        .nest_service("/service", dashboard())
        .nest_service("/{tenant}/locks", dashboard())
        .fallback(async || "the service's own");
    let site = Site::new(app).await;
    for page in [
        "/a/b",
        "/c",
        "/slash/",
        "/service",
        "/service/",
        "/acme/locks",
        "/acme/locks/",
    ] {
        let answer = site.get(page).await;
        assert_eq!(answer.status, StatusCode::OK, "{page}");
        assert_eq!(answer.headers["content-type"], "text/html; charset=utf-8");
        assert!(answer.text.starts_with("<!doctype html>"), "{page}");
        let beside = format!("{}/locks.json", page.trim_end_matches('/'));
        assert_eq!(site.get(&beside).await.json()["locks"], json!([]), "{page}");
    }
    assert_eq!(site.get("/elsewhere").await.text, "the service's own");
    assert_eq!(Site::of(&locks).await.get("/").await.status, StatusCode::OK);
}

#[tokio::test]
async fn no_answer_can_be_cached_framed_or_run() {
    let locks = LockFactory::new(MemoryStorage::new());
    let app = Router::new().nest_service(
        "/l",
        Dashboard::new(locks.inspector()).allow_release().router(),
    );
    let site = Site::new(app).await;
    for (method, path) in [
        ("GET", "/l"),
        ("GET", "/l/"),
        ("GET", "/l/locks.json"),
        ("POST", "/l/release"),
        ("PUT", "/l/release"),
        ("GET", "/l/nothing"),
    ] {
        let answer = site.send(method, path, &[], "").await;
        for (name, value) in [
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("x-frame-options", "DENY"),
            ("cross-origin-resource-policy", "same-origin"),
        ] {
            assert_eq!(answer.headers[name], value, "{method} {path}");
        }
        let policy = answer.headers["content-security-policy"].to_str().unwrap();
        assert!(
            policy.starts_with("default-src 'none'; "),
            "{method} {path}"
        );
        assert!(policy.contains("frame-ancestors 'none'"), "{method} {path}");
        assert!(!policy.contains("unsafe"), "{method} {path}");
    }
}

#[tokio::test]
async fn each_page_has_a_nonce_of_its_own() {
    let site = Site::of(&LockFactory::new(MemoryStorage::new())).await;
    let mut nonces = Vec::new();
    for _ in 0..2 {
        let answer = site.get("/").await;
        let policy = answer.headers["content-security-policy"].to_str().unwrap();
        let (_, rest) = policy.split_once("script-src 'nonce-").unwrap();
        let (nonce, _) = rest.split_once('\'').unwrap();
        assert_eq!(nonce.len(), 32);
        assert!(policy.contains(&format!("style-src 'nonce-{nonce}'")));
        let uses = answer.text.matches(&format!("nonce=\"{nonce}\"")).count();
        assert_eq!(uses, 2, "the style's and the script's");
        nonces.push(nonce.to_owned());
    }
    assert_ne!(nonces[0], nonces[1]);
}

async fn refuse_strangers(request: Request, next: Next) -> Result<Response, StatusCode> {
    if request.headers().contains_key("authorization") {
        Ok(next.run(request).await)
    } else {
        Err(StatusCode::UNAUTHORIZED)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_users_own_middleware_covers_it() {
    const ALL: [(&str, &str); 6] = [
        ("GET", "/l"),
        ("GET", "/l/"),
        ("GET", "/l/locks.json"),
        ("POST", "/l/release"),
        ("PUT", "/l/release"),
        ("GET", "/l/nothing"),
    ];
    let locks = LockFactory::new(MemoryStorage::new());
    let held = hold(&locks, "a").await;
    let body = r#"{"key":"a","reason":"r"}"#;
    let dashboard = || Dashboard::new(locks.inspector()).allow_release().router();

    let layered = dashboard().layer(middleware::from_fn(refuse_strangers));
    let site = Site::new(Router::new().nest_service("/l", layered)).await;
    for (method, path) in ALL {
        let answer = site.send(method, path, JSON, body).await;
        assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
    }

    // A route layer, on either router: all that shows or does something is behind it.
    let strict = || middleware::from_fn(refuse_strangers);
    let inside = Router::new().nest_service("/l", dashboard().route_layer(strict()));
    let outside = Router::new()
        .nest_service("/l", dashboard())
        .route_layer(strict());
    for app in [inside, outside] {
        let site = Site::new(app).await;
        for (method, path) in &ALL[..5] {
            let answer = site.send(method, path, JSON, body).await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{method} {path}");
        }
        assert!(held.is_held());
        let known = [JSON[0], ("authorization", "Basic YTpi")];
        assert_eq!(
            site.send("GET", "/l", &known, "").await.status,
            StatusCode::OK
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_redis_it_shows_and_releases_and_says_when_the_server_is_away() {
    let mut server = RedisServer::start().await;
    let locks = LockFactory::new(RedisStorage::connect(server.url()).await.unwrap());
    let site = Site::of(&locks).await;
    let () = server.run("SET distributed-locks:another-client x").await;
    let held = hold(&locks, "orders/42").await;
    let found = site.locks().await;
    let foreign = json!({
        "key": "another-client",
        "holder": { "label": null, "this": false, "answered": false },
        "ttl_ms": null,
        "held_ms": null,
        "fencing_token": null,
        "waiters": [],
    });
    assert_eq!(found["locks"][0], foreign);
    assert_eq!(found["locks"][1]["key"], "orders/42");
    assert_eq!(
        found["locks"][1]["fencing_token"],
        json!(held.fencing_token())
    );

    for key in ["another-client", "orders/42"] {
        let answer = site.release(&json!({ "key": key, "reason": "r" })).await;
        assert_eq!(answer.json(), json!({ "released": true }), "{key}");
    }
    within(LIMIT, "the holder is told", held.lost()).await;
    assert_eq!(server.keys().await, 0);

    server.kill();
    // The last answer is shared for a while.
    let mut answer = site.get("/locks.json").await;
    eventually("it is noticed", LIMIT, async || {
        answer = site.get("/locks.json").await;
        answer.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    assert!(
        answer.error().starts_with("the lock storage "),
        "{}",
        answer.text
    );
    let answer = site.release(&json!({ "key": "a", "reason": "r" })).await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(
        answer.error().starts_with("the lock storage "),
        "{}",
        answer.text
    );
    assert_eq!(answer.headers["cache-control"], "no-store");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_look_cost_the_storage_little_more_than_one() {
    let server = RedisServer::start().await;
    let locks = LockFactory::new(RedisStorage::connect(server.url()).await.unwrap());
    let site = Site::of(&locks).await;
    let _held = hold(&locks, "a").await;
    let looks = (0..100).map(|_| site.locks());
    for found in futures_util::future::join_all(looks).await {
        assert_eq!(found["locks"][0]["key"], "a");
    }
    let scans = server.calls("scan").await;
    assert!((1..=10).contains(&scans), "{scans}");
}
