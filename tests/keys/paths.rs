//! Keys from the path, through axum's own router, also from those who mean no good.

use axum::routing;
use proptest::prelude::*;

use super::*;

/// One handler, on a route with one parameter.
fn app() -> Router {
    let lock = layer(path_params("orders", ["id"]));
    Router::new().route("/orders/{id}/pay", routing::post(locked).route_layer(lock))
}

/// As a client may write it: some bytes percent-encoded, some as they are.
fn spelled(id: &[u8], encode: &[bool]) -> String {
    let mut spelled = String::new();
    for (at, &byte) in id.iter().enumerate() {
        let plain = byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:@".contains(&byte);
        if plain && !encode.get(at).is_some_and(|encode| *encode) {
            spelled.push(char::from(byte));
        } else {
            spelled += &format!("%{byte:02X}");
        }
    }
    spelled
}

/// Ids that somebody may send who wants to reach another key.
fn hostile() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(b"/".to_vec()),
        Just(b"..".to_vec()),
        Just(b"%2F".to_vec()),
        Just(b"%".to_vec()),
        Just(b"{".to_vec()),
        Just(b"}".to_vec()),
        Just(b":".to_vec()),
        Just(b"\0".to_vec()),
        Just(b"\r\n".to_vec()),
        Just(b"orders/42".to_vec()),
        Just("ö".as_bytes().to_vec()),
        Just(b"a".to_vec()),
        any::<u8>().prop_map(|byte| vec![byte]),
    ];
    prop::collection::vec(piece, 1..6).prop_map(|pieces| pieces.concat())
}

/// Undoes the encoding of a key.
fn decode(key: &str) -> Vec<u8> {
    let mut bytes = key.bytes();
    let mut decoded = Vec::new();
    while let Some(byte) = bytes.next() {
        decoded.push(if byte == b'%' {
            let hex = [bytes.next().unwrap(), bytes.next().unwrap()];
            u8::from_str_radix(str::from_utf8(&hex).unwrap(), 16).unwrap()
        } else {
            byte
        });
    }
    decoded
}

proptest! {
    #[test]
    fn whatever_is_sent_stays_in_its_own_part_of_the_key(
        id in hostile(),
        encode in prop::collection::vec(any::<bool>(), 0..40),
    ) {
        let path = format!("/orders/{}/pay", spelled(&id, &encode));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (status, text) = runtime.block_on(send(app(), post(&path)));
        if str::from_utf8(&id).is_err() {
            prop_assert_eq!(status, StatusCode::BAD_REQUEST, "{}", text);
        } else {
            prop_assert_eq!(status, StatusCode::OK, "{}", text);
            // One namespace, one separator, and the whole id behind it: another id is another key.
            let part = text.strip_prefix("orders/").unwrap();
            let inside = |byte: u8| byte.is_ascii_graphic() && !b"/{}".contains(&byte);
            prop_assert!(part.bytes().all(inside), "{}", part);
            prop_assert_eq!(decode(part), id);
        }
    }

    #[test]
    fn different_values_of_two_parameters_are_different_keys(
        (first, second, third) in ("[a/%]{1,3}", "[a/%]{1,3}", "[a/%]{1,3}"),
    ) {
        // The same text, parted in two ways.
        let a = (format!("{first}/{second}"), third.clone());
        let b = (first, format!("{second}/{third}"));
        let key = |(shop, id): &(String, String)| {
            let lock = layer(path_params("orders", ["shop", "id"]));
            let app = Router::new()
                .route("/{shop}/orders/{id}", routing::post(locked).route_layer(lock));
            let path = format!("/{}/orders/{}", spelled(shop.as_bytes(), &[]), spelled(id.as_bytes(), &[]));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(send(app, post(&path)))
        };
        let (left, right) = (key(&a), key(&b));
        prop_assert!(left.0.is_success() && right.0.is_success());
        prop_assert_ne!(left.1, right.1);
    }
}

#[tokio::test]
async fn spellings_of_one_text_are_one_key_and_of_one_number_are_not() {
    for (path, key) in [
        ("/orders/42/pay", "orders/42"),
        ("/orders/%34%32/pay", "orders/42"),
        ("/orders/042/pay", "orders/042"),
        ("/orders/../pay", "orders/.."),
        ("/orders/a%2Fb/pay", "orders/a%2Fb"),
        ("/orders/a%252Fb/pay", "orders/a%252Fb"),
        // axum matches that, too.
        ("/orders//pay", "orders/"),
    ] {
        assert_eq!(send(app(), post(path)).await, (StatusCode::OK, key.into()));
    }
}

#[tokio::test]
async fn what_is_too_long_is_refused() {
    let (status, text) = send(app(), post(&format!("/orders/{}/pay", "a".repeat(10_000)))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    assert!(text.contains(&InvalidKey::TooLong.to_string()), "{text}");
}

#[tokio::test]
async fn parameters_of_nested_routers_are_seen_and_one_that_is_there_twice_is_refused() {
    let lock = layer(path_params("orders", ["shop", "id"]));
    let orders = || {
        Router::new().route(
            "/orders/{id}",
            routing::post(locked).route_layer(lock.clone()),
        )
    };
    let nested = Router::new().nest("/shops/{shop}", orders());
    let request = || post("/shops/7/orders/42");
    assert_eq!(
        send(nested, request()).await,
        (StatusCode::OK, "orders/7/42".into())
    );

    let twice = Router::new().nest_service("/shops/{id}", orders());
    let (status, text) = send(twice, request()).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(text.contains("no path parameter `shop`"), "{text}");

    let lock = layer(path_params("orders", ["id"]));
    let orders = Router::new().route("/orders/{id}", routing::post(locked).route_layer(lock));
    let twice = Router::new().nest_service("/shops/{id}", orders);
    let (status, text) = send(twice, request()).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    assert!(text.contains("`id` more than once"), "{text}");
}

#[tokio::test]
async fn a_wildcard_is_one_part_and_no_names_are_one_lock_for_all() {
    let lock = layer(path_params("files", ["path"]));
    let app = Router::new().route("/files/{*path}", routing::post(locked).route_layer(lock));
    let answer = send(app, post("/files/a/b")).await;
    assert_eq!(answer, (StatusCode::OK, "files/a%2Fb".into()));

    let lock = layer(path_params("files", [""; 0]));
    let app = Router::new().route("/files", routing::post(locked).route_layer(lock));
    assert_eq!(
        send(app, post("/files")).await,
        (StatusCode::OK, "files".into())
    );
}

#[tokio::test]
async fn a_layer_that_sees_no_parameters_says_where_to_put_it() {
    let lock = layer(path_params("orders", ["id"]));
    let app = Router::new().route("/orders/{id}", routing::post(locked));
    let (status, text) = send(lock.layer(app), post("/orders/42")).await;
    assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR);
    for hint in ["`id`", "post(handler).route_layer(lock)"] {
        assert!(text.contains(hint), "{text}");
    }
    // As does one on a route that calls it otherwise.
    let app = Router::new().route("/orders/{order}", routing::post(locked).route_layer(lock));
    assert_eq!(send(app, post("/orders/42")).await, (status, text));
}

/// Each placement of `docs/guide/placement.md` that sees the parameters of a matched route.
#[tokio::test]
async fn parameters_are_seen_in_every_layer_inside_the_router() {
    use axum::handler::Handler;
    let lock = || layer(path_params("orders", ["id"]));
    let route = |handler| Router::new().route("/orders/{id}", handler);
    for app in [
        route(routing::post(locked).route_layer(lock())),
        route(routing::post(locked).layer(lock())),
        route(routing::post(locked.layer(lock()))),
        route(routing::post(locked)).route_layer(lock()),
        route(routing::post(locked)).layer(lock()),
    ] {
        let answer = send(app, post("/orders/42")).await;
        assert_eq!(answer, (StatusCode::OK, "orders/42".into()));
    }
}

/// As `docs/guide/placement.md` says of `Router::layer`.
#[tokio::test]
async fn around_all_routes_an_optional_path_leaves_other_routes_and_404_as_they_are() {
    use axum::extract::Path;

    fn order_key(Path(id): Path<u64>) -> Result<LockKey, InvalidKey> {
        LockKey::from_parts(["orders", &id.to_string()])
    }
    let app = || {
        Router::new()
            .route("/orders/{id}", routing::post(locked))
            .route("/health", routing::post(async || "ok"))
    };
    let of_text = app().layer(layer(path_params("orders", ["id"])));
    let of_ids = app().layer(layer(extracted(order_key)));
    for app in [of_text, of_ids] {
        assert_eq!(send(app.clone(), post("/orders/42")).await.1, "orders/42");
        for path in ["/health", "/nothing"] {
            let (status, _) = send(app.clone(), post(path)).await;
            assert_eq!(status, StatusCode::INTERNAL_SERVER_ERROR, "{path}");
        }
    }
    let optional = extracted(|id: Option<Path<u64>>| id.map(order_key));
    let app = app().layer(layer(optional));
    assert_eq!(send(app.clone(), post("/orders/42")).await.1, "orders/42");
    let (status, _) = send(app.clone(), post("/orders/x")).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let health = send(app.clone(), post("/health")).await;
    assert_eq!(health, (StatusCode::OK, "ok".into()));
    let (status, _) = send(app, post("/nothing")).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}
