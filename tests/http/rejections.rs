//! What a client is told whose request is rejected, by problem details and by hooks of one's own.

use http::HeaderName;
use serde_json::{Value, json};
use tower_distributed_lock::middleware::{ProblemDetails, Rejection};

use super::*;

/// `POST /a`, whose handler never ends, under a layer that does not wait and answers so.
async fn app(locks: &LockFactory, problems: ProblemDetails) -> SocketAddr {
    let key = |request: &Request| {
        request
            .headers()
            .get("key")
            .map_or(path(request), |key| LockKey::new(key.as_bytes()))
    };
    let lock = DistributedLockLayer::new(locks.clone(), key)
        .options(at_once())
        .on_reject(problems);
    let hangs = async || std::future::pending::<()>().await;
    serve(Router::new().route("/a", post(hangs).route_layer(lock))).await
}

/// The body of an answer that consists of problem details.
fn problem(answer: &Answer) -> Value {
    assert_eq!(
        answer.header("content-type"),
        Some("application/problem+json")
    );
    let body: Value = serde_json::from_str(&answer.text).unwrap();
    assert_eq!(body["status"], answer.status.as_u16(), "{body}");
    body
}

#[tokio::test(flavor = "multi_thread")]
async fn problem_details_say_what_happened_and_when_to_come_again() {
    for version in VERSIONS {
        let locks = memory();
        let client = Client::new(version, app(&locks, ProblemDetails::new()).await);
        let _held = hold(&locks, "/a").await;
        let answer = client.send("POST", "/a").await;
        assert_eq!(answer.status, StatusCode::LOCKED);
        let mut body = problem(&answer);
        let after = body["retry_after_ms"].take().as_u64().unwrap();
        assert!((1..=10_000).contains(&after), "{after}");
        // The same in whole seconds, not sooner.
        let seconds = after.div_ceil(1_000).to_string();
        assert_eq!(answer.header("retry-after"), Some(&*seconds));
        let expected = json!({
            "type": "about:blank",
            "title": "Locked",
            "status": 423,
            "detail": "Another request holds the resource. This one was not carried out and can be repeated.",
            "reason": "not_obtained",
            "retry_after_ms": null,
        });
        assert_eq!(body, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_that_is_not_known_is_not_made_up() {
    for version in VERSIONS {
        let locks = memory();
        let client = Client::new(version, app(&locks, ProblemDetails::new()).await);
        let invalid = client.send_with("POST", "/a", &[("key", "")]).await;
        assert_eq!(invalid.status, StatusCode::BAD_REQUEST);
        assert_eq!(problem(&invalid)["reason"], "invalid_key");

        locks.drain(LIMIT).await;
        let draining = client.send("POST", "/a").await;
        assert_eq!(draining.status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(problem(&draining)["reason"], "draining");
        for answer in [invalid, draining] {
            assert_eq!(answer.header("retry-after"), None);
            assert_eq!(problem(&answer).get("retry_after_ms"), None);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_limit_of_all_waiters_says_nothing_of_when_to_come_again() {
    for version in VERSIONS {
        let locks = LockFactory::builder(MemoryStorage::new())
            .max_waiters(1)
            .build()
            .unwrap();
        let lock = DistributedLockLayer::new(locks.clone(), path)
            .options(kit::patient())
            .on_reject(ProblemDetails::new());
        let app = Router::new().route("/{key}", post(async || ()).route_layer(lock));
        let client = Client::new(version, serve(app).await);
        let held = hold(&locks, "/a").await;
        let other = client.clone();
        let waits = tokio::spawn(async move { other.send("POST", "/a").await });
        eventually("it waits", LIMIT, async || locks.waiters() == 1).await;
        // `/a` is held for 10 s more, but it is not that which is in the way.
        for path in ["/a", "/b"] {
            let answer = client.send("POST", path).await;
            assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(problem(&answer)["reason"], "too_many_waiters");
            assert_eq!(answer.header("retry-after"), None);
        }
        drop(held);
        assert_eq!(waits.await.unwrap().status, StatusCode::OK);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_lost_is_a_problem_whose_request_may_be_half_done() {
    for version in VERSIONS {
        let locks = memory();
        let client = Client::new(version, app(&locks, ProblemDetails::new()).await);
        let other = client.clone();
        let answer = tokio::spawn(async move { other.send("POST", "/a").await });
        eventually("it runs", LIMIT, async || {
            locks.keys() == 1 && locks.waiters() == 0
        })
        .await;
        locks.drain(Duration::ZERO).await;
        let answer = answer.await.unwrap();
        let body = problem(&answer);
        assert_eq!(
            (answer.status.as_u16(), &body["reason"]),
            (503, &json!("lock_lost"))
        );
        assert!(
            body["detail"]
                .as_str()
                .unwrap()
                .contains("look before you repeat it")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn problems_have_types_of_ones_own_and_a_request_its_instance() {
    let request_id = HeaderName::from_static("x-request-id");
    let problems = ProblemDetails::new()
        .type_base("https://example.com/\"quoted\\\u{1}/é/")
        .instance_header(request_id)
        .retry_after_at_most(ms(1_500));
    let locks = memory();
    let address = app(&locks, problems).await;
    let _held = hold(&locks, "/a").await;
    for version in VERSIONS {
        let client = Client::new(version, address);
        let with_id = async |id: &str| {
            let answer = client
                .send_with("POST", "/a", &[("x-request-id", id)])
                .await;
            assert_eq!(answer.header("retry-after"), Some("2"));
            let body = problem(&answer);
            assert_eq!(
                body["type"],
                "https://example.com/\"quoted\\\u{1}/é/not_obtained"
            );
            assert_eq!(body["title"], "The resource is locked");
            assert_eq!(body["retry_after_ms"], 1_500);
            body.get("instance").cloned()
        };
        let uuid = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        assert_eq!(with_id(uuid).await, Some(json!(uuid)));
        for made_up in ["", "\"}", "a b", "<script>", &"a".repeat(257)] {
            assert_eq!(with_id(made_up).await, None, "{made_up}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn problem_details_name_no_key_and_no_cause() {
    let locks = memory();
    let address = app(&locks, ProblemDetails::new().type_base("/problems/")).await;
    let _held = hold(&locks, "secret-key").await;
    for version in VERSIONS {
        let client = Client::new(version, address);
        for (key, cause) in [("secret-key", "secret"), ("", "empty")] {
            let answer = client.send_with("POST", "/a", &[("key", key)]).await;
            assert!(!answer.text.contains(cause), "{}", answer.text);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_request_gets_a_status_and_no_body_from_problem_details_too() {
    let locks = memory();
    let address = app(&locks, ProblemDetails::new()).await;
    let _held = hold(&locks, "/a").await;
    let client = Client::new(Version::HTTP_2, address);
    let grpc = [("content-type", "application/grpc")];
    let answer = client.send_with("POST", "/a", &grpc).await;
    assert_eq!((answer.status, &*answer.text), (StatusCode::OK, ""));
    assert_eq!(answer.header("content-type"), Some("application/grpc"));
    assert_eq!(answer.header("grpc-status"), Some("10"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hook_of_ones_own_makes_the_answer() {
    use axum::{Json, response::IntoResponse};
    for version in VERSIONS {
        let locks = memory();
        let lock = DistributedLockLayer::new(locks.clone(), path::<Body>)
            .options(at_once())
            .on_reject(|rejection: Rejection| {
                let body = Json([rejection.reason()]);
                (rejection.status(), rejection.headers(), body).into_response()
            });
        let app = Router::new().route("/a", post(async || ()).route_layer(lock));
        let client = Client::new(version, serve(app).await);
        let _held = hold(&locks, "/a").await;
        let answer = client.send("POST", "/a").await;
        assert_eq!(answer.status, StatusCode::LOCKED);
        assert_eq!(answer.text, r#"["not_obtained"]"#);
        assert_eq!(answer.header("retry-after"), Some("10"));
    }
}
