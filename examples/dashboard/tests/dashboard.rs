//! The page in a real browser: the service of this example, as a process of its own, with its locks
//! in a Redis server, and other processes' locks beside.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test ends where it fails"
)]

mod browser;
#[path = "../../../tests/kit/mod.rs"]
mod kit;

use std::{
    io::{BufRead, BufReader, Lines},
    net::SocketAddr,
    process::{Child, ChildStdout, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use axum::{Router, extract::Request, middleware};
use browser::Browser;
use kit::{LIMIT, LONG, RedisServer, eventually, patient, within};
use tokio::net::TcpListener;
use tower_distributed_lock::{
    LockFactory, LockGuard, LockOptions,
    dashboard::Dashboard,
    error::LossReason,
    storage::{MemoryStorage, RedisStorage},
};

/// A process of the example, `shop-1`.
struct Service {
    process: Child,
    log: Lines<BufReader<ChildStdout>>,
    address: String,
}

impl Service {
    fn start(redis: &RedisServer) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_dashboard"))
            .env("ADDRESS", "127.0.0.1:0")
            .env("REDIS_URL", redis.url())
            .env("LABEL", "shop-1")
            .env("PASSWORD", "s3cret")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stdout.take().unwrap()).lines();
        let address = log
            .find_map(|line| Some(line.unwrap().split_once("http://")?.1.to_owned()))
            .expect("it says where it listens");
        let address = address.split_once('/').unwrap().0.to_owned();
        Self {
            process,
            log,
            address,
        }
    }

    /// With the name and the password in it, as people write it.
    fn dashboard(&self) -> String {
        format!("http://ada:s3cret@{}/admin/locks", self.address)
    }

    /// The next line of its log that has this in it.
    fn logged(&mut self, what: &str) -> String {
        let mut lines = self.log.by_ref().map(Result::unwrap);
        lines.find(|line| line.contains(what)).expect(what)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Locks of another process.
async fn other(redis: &RedisServer, label: &str) -> LockFactory {
    let storage = RedisStorage::connect(redis.url()).await.unwrap();
    LockFactory::builder(storage).label(label).build().unwrap()
}

async fn hold(locks: &LockFactory, key: &str) -> LockGuard {
    let lock = locks.create_lock(key).unwrap();
    lock.lock(patient()).await.unwrap()
}

/// Callers that wait, and go on waiting until the test ends.
async fn wait_for(locks: &LockFactory, key: &str, callers: usize) {
    let before = locks.waiters();
    for _ in 0..callers {
        let lock = locks.create_lock(key).unwrap();
        let options = LockOptions::builder().ttl(LONG).retries(300);
        tokio::spawn(lock.lock(options.build().unwrap()));
    }
    eventually("they wait", LIMIT, async || {
        locks.waiters() == before + callers
    })
    .await;
}

/// The keys that it shows.
const KEYS: &str =
    "[...document.querySelectorAll('#locks tbody th')].map(head => head.textContent).join(' ')";

fn shows(keys: &str) -> String {
    format!("{KEYS} === '{keys}'")
}

fn problem(part: &str) -> String {
    format!("document.getElementById('problem').textContent.includes('{part}')")
}

/// The holder of the first lock has answered, as this one. Who does not do so in time is shown
/// without a label and a token until the next look.
fn is_held_by(label: &str) -> String {
    format!("document.querySelector('#locks tbody td bdi')?.textContent === '{label}'")
}

const IS_LIVE: &str = "document.getElementById('state').dataset.state === 'live'";

#[tokio::test(flavor = "multi_thread")]
async fn locks_appear_and_vanish_while_somebody_looks() {
    let redis = RedisServer::start().await;
    let service = Service::start(&redis);
    let billing = other(&redis, "billing-1").await;
    let browser = Browser::start().await;
    browser.open(&service.dashboard()).await;
    browser
        .until("document.getElementById('empty').innerText === 'No lock is held.'")
        .await;

    let order = hold(&billing, "orders/7").await;
    let report = hold(&billing, "reports/monthly").await;
    browser.until(&shows("orders/7 reports/monthly")).await;
    // All of it at once: with the next answer other times are there.
    let cells = "[...document.querySelector('#locks tbody tr').cells].map(cell => cell.innerText)";
    let token = order.fencing_token().unwrap();
    let row = format!("^orders/7,billing-1,[0-9.]+ m?s,4 min [0-9]+ s,{token},nobody,Release…$");
    browser
        .until(&format!("RegExp('{row}').test({cells})"))
        .await;

    browser.type_into("#filter", "REPORT").await;
    browser.until(&shows("reports/monthly")).await;
    assert_eq!(browser.text("#count").await, "1 of 2 locks, 0 callers wait");

    drop(report);
    browser.until(&shows("")).await;
    drop(order);
    browser
        .until("document.getElementById('empty').innerText === 'No lock is held.'")
        .await;
    assert_eq!(browser.console().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_is_shown_in_order() {
    let redis = RedisServer::start().await;
    let service = Service::start(&redis);
    let billing = other(&redis, "billing-1").await;
    let mail = other(&redis, "mail-1").await;
    let stock = other(&redis, "stock-1").await;
    let _held = hold(&billing, "orders/7").await;
    // The last of the alphabet comes first.
    wait_for(&stock, "orders/7", 3).await;
    kit::is_queued(&redis, "orders/7", 1).await;
    wait_for(&mail, "orders/7", 1).await;
    kit::is_queued(&redis, "orders/7", 2).await;
    wait_for(&billing, "orders/7", 2).await;

    let browser = Browser::start().await;
    browser.open(&service.dashboard()).await;
    let list = "[...document.querySelectorAll('#locks ol li')].map(item => item.innerText).join()";
    let expected = "billing-1 2 callers,stock-1 3 callers,mail-1 1 caller";
    browser.until(&format!("{list} === '{expected}'")).await;
    assert_eq!(browser.text("#count").await, "1 lock, 6 callers wait");
    assert_eq!(browser.console().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn markup_in_a_key_or_a_label_is_text() {
    const KEY: &str =
        "</script><img/src=x/onerror=document.title=1><script>document.title=2</script>";
    const LABEL: &str = "<img src=x onerror=document.title=3>";
    let redis = RedisServer::start().await;
    let service = Service::start(&redis);
    let hostile = other(&redis, LABEL).await;
    let _held = hold(&hostile, KEY).await;
    wait_for(&hostile, KEY, 1).await;

    let browser = Browser::start().await;
    browser.open(&service.dashboard()).await;
    browser.until(&shows(KEY)).await;
    browser.until(&is_held_by(LABEL)).await;
    browser.click("#locks button").await;
    assert_eq!(browser.text("#dialog-key").await, KEY);
    assert!(browser.text("#dialog-holder").await.contains(LABEL));
    assert_eq!(browser.value("document.images.length").await, 0);
    assert_eq!(browser.value("document.scripts.length").await, 1);
    assert_eq!(browser.client.title().await.unwrap(), "Distributed locks");
    // Nor was anything there that the policy had to stop.
    assert_eq!(browser.console().await, [""; 0]);

    // If there were: the policy stops a script that the page's own did not write.
    let inject = "document.body.append(Object.assign(document.createElement('script'), { text: 'document.title = 4' }))";
    let stopped = browser.client.execute(inject, vec![]).await;
    assert_eq!(
        browser.client.title().await.unwrap(),
        "Distributed locks",
        "{stopped:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_is_taken_away_by_a_click_a_reason_and_a_second_click() {
    let redis = RedisServer::start().await;
    let mut service = Service::start(&redis);
    let billing = other(&redis, "billing-1").await;
    let mail = other(&redis, "mail-1").await;
    let held = hold(&billing, "orders/50%").await;
    let next = tokio::spawn({
        let lock = mail.create_lock("orders/50%").unwrap();
        lock.lock(patient())
    });
    kit::is_queued(&redis, "orders/50%25", 1).await;

    let browser = Browser::start().await;
    browser.open(&service.dashboard()).await;
    browser.until(&shows("orders/50%25")).await;
    browser.until(&is_held_by("billing-1")).await;
    browser.click("#locks button").await;
    assert_eq!(browser.text("#dialog-key").await, "orders/50%25");

    // Without a reason nothing happens, and Escape leaves everything as it is.
    browser.click("#confirm").await;
    assert_eq!(
        browser
            .value("document.getElementById('dialog').open")
            .await,
        true
    );
    browser.type_into("#reason", "   \u{E007}").await;
    assert!(browser.text("#dialog-problem").await.contains("Say why"));
    browser.type_into("#reason", "\u{E00C}").await;
    browser
        .until("!document.getElementById('dialog').open")
        .await;
    assert!(held.is_held());
    // The focus is where it was.
    browser
        .until("document.activeElement.textContent === 'Release…'")
        .await;

    browser.click("#locks button").await;
    browser.type_into("#reason", "its worker hangs").await;
    browser.click("#confirm").await;
    let told = within(LIMIT, "the holder is told", held.lost()).await;
    assert_eq!(told, LossReason::ForceReleased);
    let next = within(LIMIT, "the next has it", next)
        .await
        .unwrap()
        .unwrap();
    assert!(next.fencing_token() > held.fencing_token());
    browser
        .until("!document.getElementById('dialog').open")
        .await;
    assert_eq!(
        browser.text("#news").await,
        "orders/50%25 was taken from billing-1."
    );
    let log = service.logged("its worker hangs");
    assert!(log.contains("ada") && log.contains("orders/50%25"), "{log}");
    assert_eq!(browser.console().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_that_went_to_another_holder_meanwhile_is_left_alone() {
    let redis = RedisServer::start().await;
    let service = Service::start(&redis);
    let billing = other(&redis, "billing-1").await;
    let held = hold(&billing, "orders/7").await;
    let browser = Browser::start().await;
    browser.open(&service.dashboard()).await;
    browser.until(&shows("orders/7")).await;
    browser.until(&is_held_by("billing-1")).await;
    browser.click("#locks button").await;

    drop(held);
    let next = hold(&billing, "orders/7").await;
    browser
        .type_into("#reason", "its worker hangs\u{E007}")
        .await;
    let said = "document.getElementById('dialog-problem').textContent.includes('another holder')";
    browser.until(said).await;
    assert!(next.is_held());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_answer_is_shown_as_such() {
    let redis = RedisServer::start().await;
    let mut service = Service::start(&redis);
    let billing = other(&redis, "billing-1").await;
    let _held = hold(&billing, "orders/7").await;
    let browser = Browser::start().await;
    browser.open(&service.dashboard()).await;
    browser.until(&shows("orders/7")).await;

    // It stands still: its sockets are open, and nothing comes.
    kit::signal("STOP", &service.process);
    browser
        .until(&problem("The server does not answer. The table shows"))
        .await;
    browser
        .until("document.body.classList.contains('stale')")
        .await;
    assert_eq!(browser.text("#state").await, "No news");
    kit::signal("CONT", &service.process);
    browser.until(IS_LIVE).await;
    browser
        .until("document.getElementById('problem').textContent === ''")
        .await;

    service.process.kill().unwrap();
    service.process.wait().unwrap();
    browser.until(&problem("The server does not answer.")).await;
    // What was last known is still there.
    browser.until(&shows("orders/7")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_away_is_said_and_forgotten_when_it_is_back() {
    let mut redis = RedisServer::start().await;
    let service = Service::start(&redis);
    let browser = Browser::start().await;
    browser.open(&service.dashboard()).await;
    browser.until(IS_LIVE).await;
    redis.kill();
    browser
        .until(&problem("The server answers 503: the lock storage"))
        .await;
    redis.restart().await;
    browser.until(IS_LIVE).await;
    browser
        .until("document.getElementById('problem').textContent === ''")
        .await;
}

async fn serve(app: Router) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, app).await });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn it_stands_still_while_it_is_paused_or_hidden() {
    let locks = LockFactory::new(MemoryStorage::new());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let dashboard: Router = Dashboard::new(locks.inspector()).allow_release().router();
    let counted = dashboard.layer(middleware::map_request(move |request: Request| {
        if request.uri().path().ends_with("/locks.json") {
            count.fetch_add(1, Ordering::Relaxed);
        }
        async { request }
    }));
    let url = format!("http://{}", serve(counted).await);
    let browser = Browser::start().await;
    browser.open(&url).await;
    browser.until(IS_LIVE).await;

    let is_paused = "document.getElementById('state').dataset.state === 'paused'";
    let mut held = Vec::new();
    for (number, way) in ["the button", "the window is put away"].iter().enumerate() {
        if number == 0 {
            browser.click("#pause").await;
        } else {
            browser.client.minimize_window().await.unwrap();
        }
        browser.until(is_paused).await;
        let before = asked.load(Ordering::Relaxed);
        held.push(hold(&locks, &number.to_string()).await);
        // Nothing tells that it does not ask: long enough for it to have asked twice.
        tokio::time::sleep(kit::ms(2500)).await;
        // One may have been on its way.
        assert!(asked.load(Ordering::Relaxed) <= before + 1, "{way}");

        if number == 0 {
            browser.click("#pause").await;
        } else {
            browser.client.maximize_window().await.unwrap();
        }
        let keys: Vec<_> = (0..=number).map(|it| it.to_string()).collect();
        browser.until(&shows(&keys.join(" "))).await;
        browser.until(IS_LIVE).await;
    }
    assert_eq!(browser.console().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn it_works_wherever_it_is_mounted() {
    let locks = LockFactory::new(MemoryStorage::new());
    let dashboard = || Dashboard::new(locks.inspector()).allow_release().router();
    let read_only: Router = Dashboard::new(locks.inspector()).router();
    let app = Router::new()
        .nest("/a", Router::new().nest("/b", dashboard()))
        .nest("/slash/", dashboard())
        .nest_service("/{tenant}/locks", dashboard())
        .nest_service("/read-only", read_only);
    let within_paths = serve(app).await;
    let at_the_root = serve(dashboard()).await;
    let browser = Browser::start().await;
    let at = |path| format!("http://{within_paths}{path}");
    for url in [
        format!("http://{at_the_root}"),
        at("/a/b"),
        at("/a/b?from=bookmarks#top"),
        at("/slash/"),
        at("/acme/locks"),
        at("/acme/locks/"),
    ] {
        let held = hold(&locks, &url).await;
        browser.open(&url).await;
        browser.until(&format!("{KEYS} !== ''")).await;
        browser.click("#locks button").await;
        browser.type_into("#reason", "a test\u{E007}").await;
        let lost = within(LIMIT, "the holder is told", held.lost()).await;
        assert_eq!(lost, LossReason::ForceReleased, "{url}");
        browser.until(&shows("")).await;
    }

    let _held = hold(&locks, "a").await;
    browser.open(&at("/read-only/")).await;
    browser.until(&shows("a")).await;
    assert_eq!(
        browser
            .value("document.querySelectorAll('#locks button').length")
            .await,
        0
    );
    assert_eq!(browser.console().await, [""; 0]);
}

/// One request of a customer.
fn pay(service: &Service, order: u32) -> std::thread::JoinHandle<()> {
    use std::io::{Read, Write};
    let mut socket = std::net::TcpStream::connect(&service.address).unwrap();
    let head = format!("POST /orders/{order}/pay HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n");
    socket.write_all(head.as_bytes()).unwrap();
    std::thread::spawn(move || {
        let _ = socket.read(&mut [0; 1000]);
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_picture_of_it() {
    let redis = RedisServer::start().await;
    let service = Service::start(&redis);
    let shop_2 = other(&redis, "shop-2").await;
    let shop_3 = other(&redis, "shop-3").await;
    let billing = other(&redis, "billing-1").await;
    let _a = hold(&billing, "invoices/2026-11").await;
    let _b = hold(&shop_2, "orders/1733").await;
    wait_for(&shop_3, "orders/1733", 1).await;
    kit::is_queued(&redis, "orders/1733", 1).await;
    let _c = hold(&shop_3, "tenants/acme/import").await;
    wait_for(&shop_3, "tenants/acme/import", 2).await;
    wait_for(&shop_2, "tenants/acme/import", 4).await;
    kit::is_queued(&redis, "tenants/acme/import", 1).await;
    wait_for(&billing, "tenants/acme/import", 1).await;
    kit::is_queued(&redis, "tenants/acme/import", 2).await;
    // Another client, without this crate.
    let () = redis
        .run("SET distributed-locks:reports/monthly 8d3f PX 1740000")
        .await;
    let browser = Browser::start().await;
    let customers = [1745, 1745, 1745].map(|order| pay(&service, order));
    browser.open(&service.dashboard()).await;
    let expected = "invoices/2026-11 orders/1733 orders/1745 reports/monthly tenants/acme/import";
    browser.until(&shows(expected)).await;

    browser.prefer("light").await;
    let picture = browser.client.screenshot().await.unwrap();
    assert!(picture.len() < 200_000, "{}", picture.len());
    // For the README.
    if std::env::var_os("SCREENSHOT").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/dashboard.png");
        std::fs::write(path, &picture).unwrap();
    }
    drop(service);
    for customer in customers {
        customer.join().unwrap();
    }
}
