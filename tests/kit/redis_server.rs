//! A redis-server process of one's own.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io,
    net::TcpListener,
    ops::Range,
    path::PathBuf,
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU16, Ordering},
    time::{Duration, Instant},
};

use redis::{AsyncConnectionConfig, FromRedisValue, RedisError};

use super::{Certificate, LIMIT, signal};

/// How a server is started. The default: no password, nothing is kept on disk.
#[derive(Clone, Debug, Default)]
pub struct ServerOptions {
    pub password: Option<&'static str>,
    /// Every write is on the disk before it is answered (`appendfsync always`), so that keys
    /// survive `kill` and `restart`.
    pub durable: bool,
    /// More of the server's own settings, as words on its command line: `--save`, `""`.
    pub settings: Vec<String>,
    /// The server is a Sentinel, with this configuration.
    pub sentinel: Option<String>,
    /// It speaks TLS too, on a second port.
    pub tls: Option<Tls>,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
}

/// The certificates of a server.
#[derive(Clone, Debug)]
pub struct Tls {
    /// Its own.
    pub certificate: Certificate,
    /// Whose certificates it asks its clients for, in PEM. `None`: they need none.
    pub clients: Option<String>,
}

/// A redis-server on a free port of the loopback interface, with a directory of its own. Both end
/// with this value.
pub struct RedisServer {
    port: u16,
    tls_port: u16,
    folder: PathBuf,
    options: ServerOptions,
    /// `None` while the server is down.
    process: Option<Child>,
    /// What keeps its ports for it.
    _reserved: Vec<Option<TcpListener>>,
}

/// Counts the servers of this process, so that no two of them try the same port or directory.
static STARTED: AtomicU16 = AtomicU16::new(0);

/// Ports below those that the kernel gives to outgoing connections: a port whose server is down for
/// a moment is not taken by one of them.
const PORTS: Range<u16> = 12_000..32_000;

/// The same for the nodes of a cluster, which listen on a second port too, 10,000 higher.
const PORTS_OF_NODES: Range<u16> = 12_000..22_000;

/// The program that is run: `redis-server`, or the one that this variable names, such as Valkey's.
fn program() -> OsString {
    env::var_os("REDIS_SERVER").unwrap_or_else(|| "redis-server".into())
}

/// Takes a port at another address of this machine than the servers', so that no other test takes it, also while its server
/// is down: the Sentinels of a test would make a server of another one their master's replica. An error: another test has it.
fn reserve(port: u16) -> io::Result<Option<TcpListener>> {
    match TcpListener::bind(("127.0.0.2", port)) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(error),
        // Not every system has a second address.
        bound => Ok(bound.ok()),
    }
}

impl RedisServer {
    pub async fn start() -> Self {
        Self::start_with(ServerOptions::default()).await
    }

    /// Returns when the server accepts commands.
    pub async fn start_with(options: ServerOptions) -> Self {
        // Another program may have the port: then redis-server ends at once, and the next port is
        // tried.
        for _ in 0..50 {
            let number = STARTED.fetch_add(1, Ordering::Relaxed);
            // Different for test binaries that run at the same time.
            let first = (process::id() % 400) as u16 * 50;
            let is_node = options.settings.iter().any(|it| it == "--cluster-enabled");
            let ports = if is_node { PORTS_OF_NODES } else { PORTS };
            let nth = |number| ports.start + (first + number) % (ports.end - ports.start);
            let port = nth(number);
            let tls_port = match options.tls {
                Some(_) => nth(STARTED.fetch_add(1, Ordering::Relaxed)),
                None => 0,
            };
            let bus_port = if is_node { port + 10_000 } else { 0 };
            let used = [port, tls_port, bus_port].into_iter().filter(|it| *it > 0);
            let Ok(reserved) = used.map(reserve).collect::<io::Result<Vec<_>>>() else {
                continue;
            };
            let folder = env::temp_dir().join(format!("redis-kit-{}-{number}", process::id()));
            fs::create_dir(&folder).expect("a directory for the server can be made");
            let mut server = Self {
                port,
                tls_port,
                folder,
                options: options.clone(),
                process: None,
                _reserved: reserved,
            };
            if server.spawn().await {
                return server;
            }
        }
        panic!("redis-server did not find a free port in 50 tries");
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port of a server that speaks TLS too.
    pub fn tls_port(&self) -> u16 {
        self.tls_port
    }

    /// The path of its socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("socket")
    }

    /// The port for those who speak TLS if it does, the only one otherwise.
    pub fn best_port(&self) -> u16 {
        match self.options.tls {
            Some(_) => self.tls_port,
            None => self.port,
        }
    }

    /// The URL of that port.
    pub fn best_url(&self) -> String {
        match self.options.tls {
            Some(_) => format!("rediss://127.0.0.1:{}", self.tls_port),
            None => self.url(),
        }
    }

    /// Shows this certificate to whoever connects from now on.
    pub async fn change_certificate(&self, certificate: &Certificate) {
        self.write("certificate", &certificate.pem);
        self.write("key", &certificate.key);
        // It reads both again.
        let () = self.run("CONFIG SET tls-cert-file certificate").await;
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.join(name), text).expect("the server's folder is ours");
    }

    /// The URL with the right password, if there is one.
    pub fn url(&self) -> String {
        match self.options.password {
            Some(password) => self.url_with_password(password),
            None => format!("redis://127.0.0.1:{}", self.port),
        }
    }

    pub fn url_with_password(&self, password: &str) -> String {
        format!("redis://:{password}@127.0.0.1:{}", self.port)
    }

    /// What it has written since it was started.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// Whether its process is there.
    pub fn is_up(&self) -> bool {
        self.process.is_some()
    }

    /// Ends the server as a power cut does (SIGKILL). What was not on the disk is lost.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("the server can be killed");
            process.wait().expect("the server has ended");
        }
    }

    /// Starts the server again, on the same port and with what it had on its disk. Returns when it
    /// accepts commands.
    pub async fn restart(&mut self) {
        self.kill();
        let started = Instant::now();
        while !self.spawn().await {
            assert!(started.elapsed() < LIMIT, "the server's port stays taken");
        }
    }

    /// Stops the server where it stands (SIGSTOP): its sockets stay open and nothing is answered.
    pub fn pause(&self) {
        signal("STOP", self.process());
    }

    /// Lets it go on. It carries out what it was sent meanwhile.
    pub fn resume(&self) {
        signal("CONT", self.process());
    }

    fn process(&self) -> &Child {
        self.process.as_ref().expect("the server runs")
    }

    /// Runs one command, words separated by spaces, on a connection of its own.
    pub async fn run<T: FromRedisValue>(&self, command: &str) -> T {
        let words: Vec<_> = command.split(' ').collect();
        self.run_words(&words).await
    }

    /// The same for words that may contain spaces.
    pub async fn run_words<T: FromRedisValue>(&self, words: &[&str]) -> T {
        match self.try_run_words(words).await {
            Ok(value) => value,
            Err(error) => panic!("`{words:?}` failed: {error}"),
        }
    }

    /// The same, with the error that the server answers.
    pub async fn try_run<T: FromRedisValue>(&self, command: &str) -> Result<T, RedisError> {
        let words: Vec<_> = command.split(' ').collect();
        self.try_run_words(&words).await
    }

    async fn try_run_words<T: FromRedisValue>(&self, words: &[&str]) -> Result<T, RedisError> {
        let client = redis::Client::open(self.url())?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(LIMIT))
            .set_response_timeout(Some(LIMIT));
        let mut connection = client
            .get_multiplexed_async_connection_with_config(&config)
            .await?;
        let mut command = redis::Cmd::new();
        command.arg(words);
        command.query_async(&mut connection).await
    }

    /// One field of `INFO`. None also if the server closes the connection, as it does when it is
    /// demoted.
    pub async fn info(&self, field: &str) -> Option<String> {
        let info: String = self.try_run("INFO all").await.ok()?;
        find_field(&info, field)
    }

    /// How often a command was carried out since `CONFIG RESETSTAT`, also inside scripts.
    pub async fn calls(&self, command: &str) -> u64 {
        self.all_calls()
            .await
            .into_iter()
            .find_map(|(name, calls)| (name == command).then_some(calls))
            .unwrap_or(0)
    }

    /// The same for all commands that were carried out, by name.
    pub async fn all_calls(&self) -> Vec<(String, u64)> {
        let info: String = self.run("INFO commandstats").await;
        let mut calls: Vec<_> = info
            .lines()
            .filter_map(|line| {
                let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
                let (calls, _) = rest.split_once(',')?;
                Some((name.to_owned(), calls.parse().ok()?))
            })
            .collect();
        calls.sort();
        calls
    }

    /// How many keys there are. Those that are past their time do not count, nor do fencing
    /// counters, which stay.
    pub async fn keys(&self) -> usize {
        // Not DBSIZE: it counts keys that have run out and that nobody has looked at since.
        let keys: Vec<String> = self.run("KEYS *").await;
        keys.iter().filter(|key| !key.ends_with("}:fence")).count()
    }

    /// Whether the server runs now. `false` if it could not have the port.
    async fn spawn(&mut self) -> bool {
        let log = self.folder.join("log");
        let mut command = Command::new(program());
        if let Some(configuration) = &self.options.sentinel {
            // It writes into it what it has learned, and reads that when it is started again.
            let file = self.folder.join("sentinel.conf");
            if !file.exists() {
                fs::write(&file, configuration).expect("the configuration can be written");
            }
            command.arg(file).arg("--sentinel");
        } else {
            command
                .args(["--save", ""])
                .args(["--appendfsync", "always"])
                .args([
                    "--appendonly",
                    if self.options.durable { "yes" } else { "no" },
                ]);
        }
        command
            .args(["--bind", "127.0.0.1"])
            .args(["--port", &self.port.to_string()])
            .envs(self.options.environment.iter().cloned())
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(File::create(&log).expect("the server's log can be made"))
            .stderr(Stdio::null());
        if let Some(password) = self.options.password {
            command.args(["--requirepass", password]);
        }
        command.args(&self.options.settings);
        // Relative to its folder: the whole path may be longer than a socket's may be.
        command.args(["--unixsocket", "socket"]);
        if let Some(tls) = &self.options.tls {
            self.write("certificate", &tls.certificate.pem);
            self.write("key", &tls.certificate.key);
            let clients = tls.clients.as_ref().unwrap_or(&tls.certificate.pem);
            self.write("clients", clients);
            let asks = if tls.clients.is_some() { "yes" } else { "no" };
            command
                .args(["--tls-port", &self.tls_port.to_string()])
                .args(["--tls-cert-file", "certificate", "--tls-key-file", "key"])
                .args(["--tls-ca-cert-file", "clients", "--tls-auth-clients", asks]);
        }
        let process = match command.spawn() {
            Ok(process) => process,
            Err(error) if error.kind() == io::ErrorKind::NotFound => panic!(
                "{} is not there: run scripts/test once, or install it, e.g. \
                 `apt-get install redis-server`",
                program().display()
            ),
            Err(error) => panic!("{} cannot be run: {error}", program().display()),
        };
        let id = process.id().to_string();
        self.process = Some(process);

        let started = Instant::now();
        loop {
            let process = self.process.as_mut().expect("just started");
            if let Some(status) = process.try_wait().expect("the server can be waited for") {
                self.process = None;
                let log = fs::read_to_string(&log).unwrap_or_default();
                assert!(
                    log.contains("Address already in use"),
                    "redis-server ended ({status}):\n{log}"
                );
                return false;
            }
            // A reply alone proves nothing: it may come from somebody else's server on this port.
            if let Ok(info) = self.try_run::<String>("INFO all").await
                && find_field(&info, "process_id").is_some_and(|server| server == id)
                && find_field(&info, "loading").is_none_or(|loading| loading == "0")
            {
                return true;
            }
            assert!(started.elapsed() < LIMIT, "redis-server does not accept");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn find_field(info: &str, field: &str) -> Option<String> {
    info.lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
}

impl Drop for RedisServer {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // The test has its result; a server that cannot be killed does not change it.
            let _ = process.kill();
            let _ = process.wait();
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}
