//! A browser of one's own: Chromium without a window, driven by chromedriver. Both end with this
//! value.

use std::{
    fs,
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{self, Child, ChildStdout, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
};

use fantoccini::{
    Client, ClientBuilder, Locator, elements::Element, wd::WebDriverCompatibleCommand,
};
use http::Method;
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use url::{ParseError, Url};

use super::kit::{LIMIT, eventually};

pub(crate) struct Browser {
    pub(crate) client: Client,
    _driver: Driver,
}

impl Browser {
    /// Starts one with an empty profile.
    pub(crate) async fn start() -> Self {
        let driver = Driver::start();
        let arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--lang=en-GB",
            "--window-size=1240,620",
            &format!(
                "--user-data-dir={}",
                driver.folder.join("profile").display()
            ),
        ];
        let capabilities = json!({
            "browserName": "chrome",
            "goog:loggingPrefs": { "browser": "ALL" },
            "goog:chromeOptions": { "args": arguments },
        });
        let Value::Object(capabilities) = capabilities else {
            unreachable!("it is made as one")
        };
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(capabilities)
            .connect(&format!("http://127.0.0.1:{}", driver.port))
            .await
            .expect("chromedriver starts Chromium");
        Self {
            client,
            _driver: driver,
        }
    }

    pub(crate) async fn open(&self, url: &str) {
        self.client.goto(url).await.expect("the page is opened");
    }

    /// The value of a JavaScript expression, in the page.
    pub(crate) async fn value(&self, expression: &str) -> Value {
        let script = format!("return {expression}");
        self.client.execute(&script, vec![]).await.expect(&script)
    }

    pub(crate) async fn text(&self, css: &str) -> String {
        let text = self.find(css).await.text().await;
        text.expect("an element has text")
    }

    pub(crate) async fn find(&self, css: &str) -> Element {
        self.client.find(Locator::Css(css)).await.expect(css)
    }

    pub(crate) async fn click(&self, css: &str) {
        self.find(css).await.click().await.expect(css);
    }

    pub(crate) async fn type_into(&self, css: &str, text: &str) {
        self.find(css).await.send_keys(text).await.expect(css);
    }

    /// Waits for the page to make this expression true.
    pub(crate) async fn until(&self, expression: &str) {
        eventually(expression, LIMIT, async || {
            self.value(expression).await == json!(true)
        })
        .await;
    }

    /// What the page, or the browser about it, has written to the console since the last call.
    pub(crate) async fn console(&self) -> Vec<String> {
        let log = Extra {
            method: Method::POST,
            path: "se/log",
            body: json!({ "type": "browser" }),
        };
        let log = self.client.issue_cmd(log).await.expect("a log");
        let entries = log.as_array().expect("a list of entries");
        entries.iter().map(Value::to_string).collect()
    }

    /// Has the page think that people want it dark, or light.
    pub(crate) async fn prefer(&self, scheme: &str) {
        let feature = json!({ "name": "prefers-color-scheme", "value": scheme });
        self.devtools(
            "Emulation.setEmulatedMedia",
            json!({ "features": [feature] }),
        )
        .await;
    }

    pub(crate) async fn devtools(&self, command: &str, parameters: Value) {
        let command = Extra {
            method: Method::POST,
            path: "goog/cdp/execute",
            body: json!({ "cmd": command, "params": parameters }),
        };
        self.client.issue_cmd(command).await.expect("it is done");
    }
}

/// A command of chromedriver's that is not in the standard.
#[derive(Debug)]
struct Extra {
    method: Method,
    path: &'static str,
    body: Value,
}

impl WebDriverCompatibleCommand for Extra {
    fn endpoint(&self, base: &Url, session: Option<&str>) -> Result<Url, ParseError> {
        base.join(&format!(
            "session/{}/{}",
            session.unwrap_or_default(),
            self.path
        ))
    }

    fn method_and_body(&self, _: &Url) -> (Method, Option<String>) {
        (self.method.clone(), Some(self.body.to_string()))
    }
}

struct Driver {
    process: Child,
    port: u16,
    folder: PathBuf,
    /// Open until the end, so that it can write.
    _output: BufReader<ChildStdout>,
}

/// Counts those of this process, so that no two have the same directory.
static STARTED: AtomicU16 = AtomicU16::new(0);

impl Driver {
    fn start() -> Self {
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("browser-{}-{number}", process::id()));
        fs::create_dir(&folder).expect("a directory for the browser can be made");
        let mut process = Command::new("chromedriver")
            // On a port that is free.
            .arg("--port=0")
            // A group of its own, which the browser will be in: they can be ended together.
            .process_group(0)
            // What it leaves behind is in the directory that goes with it.
            .env("TMPDIR", &folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| {
                panic!(
                    "chromedriver cannot be run ({error}): run scripts/test once, or install it, \
                     e.g. `apt-get install chromium chromium-driver`"
                )
            });
        let mut output = BufReader::new(process.stdout.take().expect("a pipe"));
        let port = loop {
            let mut line = String::new();
            let read = output.read_line(&mut line).expect("it writes text");
            assert!(read > 0, "chromedriver ended");
            if let Some((_, port)) = line.split_once("started successfully on port ") {
                break port.trim().trim_end_matches('.').parse().expect("a port");
            }
        };
        Self {
            process,
            port,
            folder,
            _output: output,
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // The group is there until the driver is waited for. No browser outlives its test.
        let _ = Command::new("sh")
            .args(["-c", &format!("kill -s KILL -- -{}", self.process.id())])
            .status();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
