//! What the table in `docs/guide/placement.md` says of each place for the layer, which requests take a lock there and
//! what their key can be made of.

use std::sync::Mutex;

use axum::{
    extract::{FromRequestParts, OriginalUri, RawPathParams},
    handler::Handler,
};
use futures_util::FutureExt;
use tower::{Layer, ServiceBuilder, util::option_layer};

use super::*;

const OK: StatusCode = StatusCode::OK;
const NONE: StatusCode = StatusCode::NOT_FOUND;
const METHOD: StatusCode = StatusCode::METHOD_NOT_ALLOWED;
const LOCKED: StatusCode = StatusCode::LOCKED;

/// Whether a key function found the path parameter, in those requests that it was asked about.
type Seen = Arc<Mutex<Vec<bool>>>;

/// What the layers of an app are made of.
#[derive(Clone)]
struct Means {
    locks: LockFactory,
    seen: Seen,
}

impl Means {
    fn layer(
        &self,
    ) -> DistributedLockLayer<impl Fn(&Request) -> Result<LockKey, InvalidKey> + Send + Sync + use<>>
    {
        let seen = Arc::clone(&self.seen);
        DistributedLockLayer::new(self.locks.clone(), move |request: &Request| {
            seen.lock().unwrap().push(has_id(request));
            path(request)
        })
        .options(at_once())
    }
}

/// Whether the router has matched a route with the parameter `id` already.
fn has_id(request: &Request) -> bool {
    let mut parts = http::Request::new(()).into_parts().0;
    parts.extensions = request.extensions().clone();
    let extract = RawPathParams::from_request_parts(&mut parts, &());
    let params = extract.now_or_never().unwrap();
    params.is_ok_and(|params| params.iter().any(|(name, _)| name == "id"))
}

/// Every path is held, so a request that takes a lock is answered with 423, and one that does not
/// with what the router has for it. Answers what comes of a POST, of another path (404), of another
/// method (405), and of a HEAD; and for each of them that was asked for its key whether that could be
/// made of path parameters.
async fn table_row<S>(app: impl Fn(Means) -> S) -> ([StatusCode; 4], Vec<bool>)
where
    S: Service<Request, Response = Response, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let mut rows = Vec::new();
    for version in VERSIONS {
        let locks = memory();
        let seen = Seen::default();
        let app = app(Means {
            locks: locks.clone(),
            seen: Arc::clone(&seen),
        });
        let client = Client::new(version, serve(app).await);
        let _held = [hold(&locks, "/a/1").await, hold(&locks, "/none").await];
        let mut statuses = Vec::new();
        for (method, path) in [
            ("POST", "/a/1"),
            ("POST", "/none"),
            ("PUT", "/a/1"),
            ("HEAD", "/a/1"),
        ] {
            statuses.push(client.send(method, path).await.status);
        }
        let seen = seen.lock().unwrap().clone();
        rows.push((statuses.try_into().unwrap(), seen));
    }
    assert_eq!(rows[0], rows[1], "HTTP/1 and HTTP/2");
    rows.swap_remove(0)
}

async fn handler() {}

#[tokio::test]
async fn a_route_layer_on_the_method_locks_that_method_alone() {
    let app = |means: Means| {
        let route = post(handler).route_layer(means.layer()).get(handler);
        Router::new().route("/a/{id}", route)
    };
    assert_eq!(
        table_row(app).await,
        ([LOCKED, NONE, METHOD, OK], vec![true])
    );
}

#[tokio::test]
async fn a_layer_on_the_handler_locks_that_method_alone() {
    let app = |means: Means| {
        let route = post(handler.layer(means.layer())).get(handler);
        Router::new().route("/a/{id}", route)
    };
    assert_eq!(
        table_row(app).await,
        ([LOCKED, NONE, METHOD, OK], vec![true])
    );
}

#[tokio::test]
async fn a_layer_on_the_method_router_runs_for_405_too() {
    let app = |means: Means| Router::new().route("/a/{id}", post(handler).layer(means.layer()));
    assert_eq!(
        table_row(app).await,
        ([LOCKED, NONE, LOCKED, LOCKED], vec![true; 3])
    );
    // A HEAD is just another method to a route without a GET, and one to a route whose GET comes
    // after the layer is not locked.
    let app = |means: Means| {
        let route = post(handler).layer(means.layer()).get(handler);
        Router::new().route("/a/{id}", route)
    };
    assert_eq!(
        table_row(app).await,
        ([LOCKED, NONE, LOCKED, OK], vec![true; 2])
    );
}

#[tokio::test]
async fn a_route_layer_on_the_router_runs_for_all_methods_of_its_routes() {
    let app = |means: Means| {
        Router::new()
            .route("/a/{id}", post(handler).get(handler))
            .route_layer(means.layer())
    };
    assert_eq!(
        table_row(app).await,
        ([LOCKED, NONE, LOCKED, LOCKED], vec![true; 3])
    );
}

#[tokio::test]
async fn a_layer_on_the_router_runs_for_everything() {
    let app = |means: Means| {
        Router::new()
            .route("/a/{id}", post(handler).get(handler))
            .layer(means.layer())
    };
    assert_eq!(
        table_row(app).await,
        ([LOCKED; 4], vec![true, false, true, true])
    );
}

#[tokio::test]
async fn a_layer_around_the_router_runs_for_everything_and_knows_no_path_parameters() {
    let app = |means: Means| {
        let router = Router::new().route("/a/{id}", post(handler).get(handler));
        means.layer().layer(router)
    };
    assert_eq!(table_row(app).await, ([LOCKED; 4], vec![false; 4]));
}

#[tokio::test]
async fn it_can_be_optional_and_part_of_a_stack() {
    for on in [true, false] {
        let app = |means: Means| {
            let layer = option_layer(on.then(|| means.layer()));
            let stack = ServiceBuilder::new().layer(layer);
            Router::new().route("/a/{id}", post(handler)).layer(stack)
        };
        let (statuses, seen) = table_row(app).await;
        assert_eq!(statuses[0], if on { LOCKED } else { OK });
        assert_eq!(seen.first(), on.then_some(&true));
        // The same on one method.
        let app = |means: Means| {
            let layer = option_layer(on.then(|| means.layer()));
            Router::new().route("/a/{id}", post(handler).route_layer(layer))
        };
        assert_eq!(table_row(app).await.0[0], if on { LOCKED } else { OK });
    }
}

mod nest {
    use super::*;

    /// `/cats/7` and `/dogs/7`, whose keys are made by `key`; of what is held by another, `held`.
    async fn cats_and_dogs(
        key: impl Fn(&Request) -> Result<LockKey, InvalidKey> + Clone + Send + Sync + 'static,
        held: &str,
    ) -> [StatusCode; 2] {
        let mut rows = Vec::new();
        for version in VERSIONS {
            let locks = memory();
            let animals = || {
                let lock = DistributedLockLayer::new(locks.clone(), key.clone()).options(at_once());
                Router::new().route("/{id}", post(handler).route_layer(lock))
            };
            let app = Router::new()
                .nest("/cats", animals())
                .nest("/dogs", animals());
            let client = Client::new(version, serve(app).await);
            let _held = hold(&locks, held).await;
            rows.push([
                client.send("POST", "/cats/7").await.status,
                client.send("POST", "/dogs/7").await.status,
            ]);
        }
        assert_eq!(rows[0], rows[1], "HTTP/1 and HTTP/2");
        rows[0]
    }

    #[tokio::test]
    async fn two_nested_routers_share_keys_that_are_made_of_the_uri() {
        assert_eq!(cats_and_dogs(path, "/7").await, [LOCKED, LOCKED]);
    }

    #[tokio::test]
    async fn two_nested_routers_do_not_share_keys_that_are_made_of_the_original_uri() {
        let original = |request: &Request| {
            let uri = request.extensions().get::<OriginalUri>();
            LockKey::new(uri.map_or("", |uri| uri.path()))
        };
        assert_eq!(cats_and_dogs(original, "/dogs/7").await, [OK, LOCKED]);
    }

    #[tokio::test]
    async fn a_layer_outside_the_nested_routers_sees_the_whole_path() {
        for version in VERSIONS {
            let locks = memory();
            let lock = DistributedLockLayer::new(locks.clone(), path::<Body>).options(at_once());
            let animals = || Router::new().route("/{id}", post(handler));
            let app = Router::new()
                .nest("/cats", animals())
                .nest("/dogs", animals())
                .route_layer(lock);
            let client = Client::new(version, serve(app).await);
            let _held = hold(&locks, "/dogs/7").await;
            assert_eq!(client.send("POST", "/cats/7").await.status, OK);
            assert_eq!(client.send("POST", "/dogs/7").await.status, LOCKED);
        }
    }
}
