//! Servers that speak TLS, with certificates made for the test.

use std::process::Command;

use tower_distributed_lock::{LockFactory, error::StorageErrorKind, storage::RedisStorage};

use super::{
    builder, factory,
    kit::{Authority, Certificate, LIMIT, RedisServer, ServerOptions, Tls, eventually, within},
    no_key_is_left, patient, storage_error, texts, the_lock_goes_round,
};

const HERE: [&str; 2] = ["localhost", "127.0.0.1"];

pub async fn server(certificate: Certificate) -> RedisServer {
    let tls = Tls {
        certificate,
        clients: None,
    };
    RedisServer::start_with(ServerOptions {
        tls: Some(tls),
        ..ServerOptions::default()
    })
    .await
}

fn url(server: &RedisServer) -> String {
    format!("rediss://127.0.0.1:{}", server.tls_port())
}

#[tokio::test]
async fn a_lock_lives_its_whole_life_over_tls() {
    let authority = Authority::new();
    let server = server(authority.issue(&HERE)).await;
    let connect = async |url: String| factory(builder(url).root_certificate(authority.pem())).await;
    let first = connect(url(&server)).await;
    let second = connect(format!("valkeys://localhost:{}", server.tls_port())).await;
    the_lock_goes_round([&first, &second]).await;
    // Nothing goes without it: commands do not, nor do messages.
    let inboxes = "PUBSUB CHANNELS distributed-locks:inbox:*";
    eventually("both listen", LIMIT, async || {
        server.run::<Vec<String>>(inboxes).await.len() == 2
    })
    .await;
    let clients: String = server.run("CLIENT LIST").await;
    let encrypted = format!(" laddr=127.0.0.1:{} ", server.tls_port());
    let plain = clients
        .lines()
        .filter(|client| !client.contains(&encrypted));
    // The test itself.
    assert!(
        plain.eq(clients
            .lines()
            .filter(|client| client.contains("cmd=client"))),
        "{clients}"
    );
    assert_eq!(clients.lines().count(), 5, "{clients}");
}

#[tokio::test]
async fn several_authorities_may_be_trusted_at_once() {
    let (old, new) = (Authority::new(), Authority::new());
    let both = format!("{}{}", old.pem(), new.pem());
    for authority in [old, new] {
        let server = server(authority.issue(&HERE)).await;
        let storage = builder(url(&server)).root_certificate(both.as_str());
        storage.connect().await.unwrap();
    }
}

/// Refused when it connects, and when a lock is wanted, at once though the caller would wait; and
/// the server has heard nothing.
async fn assert_refused(server: &RedisServer, trusted: Option<&Authority>, why: &str) {
    let url = url(server).replace("//", "//:hunter2-secret@");
    let storage = || match trusted {
        Some(authority) => builder(&url).root_certificate(authority.pem()),
        None => builder(&url),
    };
    let error = storage().connect().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
    assert!(error.to_string().contains(why), "{error}");
    assert!(!texts(&error).contains("hunter2"));

    let factory = LockFactory::new(storage().connect_lazily().unwrap());
    let refused = factory.create_lock("k").unwrap().lock(patient());
    let error = storage_error(within(LIMIT / 2, "a refusal", refused).await);
    assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
    assert!(error.to_string().contains(why), "{error}");
    assert_eq!((factory.keys(), factory.waiters()), (0, 0));
    assert_eq!(server.calls("auth").await + server.calls("set").await, 0);
}

#[tokio::test]
async fn a_certificate_that_has_expired_is_refused() {
    let authority = Authority::new();
    let server = server(authority.issue_expired(&HERE)).await;
    assert_refused(&server, Some(&authority), "expired").await;
}

#[tokio::test]
async fn a_certificate_of_an_authority_that_is_not_trusted_is_refused() {
    let server = server(Authority::new().issue(&HERE)).await;
    let why = "nobody who is trusted here has issued it";
    assert_refused(&server, Some(&Authority::new()), why).await;
    // Nor does the system know it.
    assert_refused(&server, None, why).await;
}

#[tokio::test]
async fn a_certificate_for_another_host_is_refused() {
    let authority = Authority::new();
    let server = server(authority.issue(&["redis.example"])).await;
    assert_refused(&server, Some(&authority), "not valid for name").await;
}

#[tokio::test]
async fn a_server_that_wants_a_certificate_is_shown_ours() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let tls = Tls {
        certificate: theirs.issue(&HERE),
        clients: Some(ours.pem().to_owned()),
    };
    let options = ServerOptions {
        tls: Some(tls),
        ..ServerOptions::default()
    };
    let server = RedisServer::start_with(options).await;
    let storage = || builder(url(&server)).root_certificate(theirs.pem());
    let shown =
        |certificate: Certificate| storage().client_certificate(certificate.pem, certificate.key);
    let first = factory(shown(ours.issue(&["first"]))).await;
    let second = factory(shown(ours.issue(&["second"]))).await;
    the_lock_goes_round([&first, &second]).await;
    no_key_is_left(&server).await;

    for (storage, which) in [
        (storage(), "none"),
        (shown(theirs.issue(&["somebody"])), "somebody else's"),
    ] {
        let error = storage.connect().await.unwrap_err();
        assert_eq!(error.kind(), StorageErrorKind::Rejected, "{which}: {error}");
        let why = "the server does not accept us";
        assert!(error.to_string().contains(why), "{which}: {error}");
    }
    // Nor is a key accepted that is another's.
    let (one, other) = (ours.issue(&["one"]), ours.issue(&["other"]));
    let mixed = storage().client_certificate(one.pem, other.key);
    let error = mixed.connect().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Rejected, "{error}");
}

#[tokio::test]
async fn a_port_that_does_not_speak_tls_is_told_and_hears_no_password() {
    let server = RedisServer::start().await;
    let url = format!("rediss://:hunter2-secret@127.0.0.1:{}", server.port());
    // Whether Redis answers depends on chance: on whether there is an end of a line in what TLS
    // begins with.
    for _ in 0..8 {
        let storage = RedisStorage::builder(&url).connect_timeout(super::ms(200));
        let error = storage.connect().await.unwrap_err();
        let text = texts(&error);
        let why = match error.kind() {
            StorageErrorKind::Rejected => "the server does not speak it on this port",
            StorageErrorKind::Unavailable => "no connection in time",
            _ => "another kind",
        };
        assert!(text.contains(why), "{text}");
        assert!(!text.contains("hunter2"));
    }
    assert_eq!(server.calls("auth").await, 0);
}

#[tokio::test]
async fn a_port_that_speaks_only_tls_is_an_error_without_it() {
    let authority = Authority::new();
    let server = server(authority.issue(&HERE)).await;
    let url = format!("redis://127.0.0.1:{}", server.tls_port());
    let error = builder(url).connect().await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unavailable, "{error}");
}

/// Run as a process of its own by the test below: which certificates the system trusts, a process
/// learns from its environment.
#[tokio::test]
async fn whom_the_system_trusts_is_trusted_in_a_process_of_its_own() {
    if let Ok(url) = std::env::var("URL_FOR_THE_SYSTEMS_TRUST") {
        RedisStorage::connect(url).await.unwrap();
        std::fs::write(std::env::var("WRITTEN_IF_TRUSTED").unwrap(), "").unwrap();
    }
}

#[tokio::test]
async fn whom_the_system_trusts_is_trusted() {
    let authority = Authority::new();
    let server = server(authority.issue(&HERE)).await;
    let file = server.socket().with_file_name("trusted");
    std::fs::write(&file, authority.pem()).unwrap();
    let written = server.socket().with_file_name("connected");
    let output = Command::new(std::env::current_exe().unwrap())
        .arg("--exact")
        .arg("tls::whom_the_system_trusts_is_trusted_in_a_process_of_its_own")
        .env_remove("SSL_CERT_DIR")
        .env("SSL_CERT_FILE", file)
        .env("URL_FOR_THE_SYSTEMS_TRUST", url(&server))
        .env("WRITTEN_IF_TRUSTED", &written)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}");
    assert!(written.exists(), "{said}");
}
