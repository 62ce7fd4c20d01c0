//! A redis-server of the benchmark's own.

use std::{
    env, fs,
    io::{self, BufRead, BufReader, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::PathBuf,
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering::Relaxed},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use redis::{Connection, FromRedisValue};

use crate::Error;

/// How long the server may take to start.
const START: Duration = Duration::from_secs(10);

/// A redis-server on a free port of the loopback interface, which keeps nothing on disk. It and its
/// directory end with this value.
pub(crate) struct Server {
    process: Child,
    folder: PathBuf,
    port: u16,
    connection: Connection,
}

/// What servers have done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// CPU time, in seconds.
    pub(crate) cpu: f64,
    /// Commands, those that scripts called among them.
    pub(crate) commands: u64,
}

/// Counts the servers of this process.
static STARTED: AtomicU32 = AtomicU32::new(0);

impl Server {
    pub(crate) fn start() -> Result<Self, Error> {
        let number = STARTED.fetch_add(1, Relaxed);
        let folder = env::temp_dir().join(format!("lock-bench-{}-{number}", process::id()));
        fs::create_dir(&folder)?;
        // Somebody else may take the port in the moment between finding it and starting the server.
        for _ in 0..10 {
            let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
                .local_addr()?
                .port();
            let mut process = Command::new("redis-server")
                .args(["--bind", "127.0.0.1", "--port", &port.to_string()])
                .args(["--save", "", "--appendonly", "no"])
                // `scripts/bench` ends the server by this file if the benchmark itself is killed.
                .args(["--pidfile", "redis.pid"])
                .current_dir(&folder)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .map_err(|error| match error.kind() {
                    io::ErrorKind::NotFound => {
                        Error::from("redis-server is not on the PATH: scripts/test installs it")
                    }
                    _ => error.into(),
                })?;
            if let Some(connection) = accept(&mut process, port)? {
                return Ok(Self {
                    process,
                    folder,
                    port,
                    connection,
                });
            }
        }
        Err("no free port for redis-server in 10 tries".into())
    }

    /// Starts a replica of this server. Returns when it has all that the server has.
    pub(crate) fn add_replica(&mut self) -> Result<Self, Error> {
        // Else it would wait 5 s for other replicas.
        self.run::<()>(&["CONFIG", "SET", "repl-diskless-sync-delay", "0"])?;
        let mut replica = Self::start()?;
        replica.run::<()>(&["REPLICAOF", "127.0.0.1", &self.port.to_string()])?;
        let started = Instant::now();
        while started.elapsed() < START {
            let info: String = self.run(&["INFO", "replication"])?;
            if info.contains("state=online") {
                return Ok(replica);
            }
            thread::sleep(Duration::from_millis(5));
        }
        Err("the replica does not follow".into())
    }

    pub(crate) fn url(&self) -> String {
        url(self.port)
    }

    pub(crate) fn run<T: FromRedisValue>(&mut self, words: &[&str]) -> Result<T, Error> {
        Ok(command(words).query(&mut self.connection)?)
    }

    /// Forgets all keys and counts from nothing.
    pub(crate) fn reset(&mut self) -> Result<(), Error> {
        self.run::<()>(&["FLUSHALL"])?;
        self.run::<()>(&["CONFIG", "RESETSTAT"])
    }

    /// What the server has done until now. One command.
    pub(crate) fn usage(&mut self) -> Result<Usage, Error> {
        let info: String = self.run(&["INFO"])?;
        Ok(Usage {
            cpu: field(&info, "used_cpu_user")?.parse::<f64>()?
                + field(&info, "used_cpu_sys")?.parse::<f64>()?,
            commands: field(&info, "total_commands_processed")?.parse()?,
        })
    }

    pub(crate) fn version(&mut self) -> Result<String, Error> {
        let info: String = self.run(&["INFO", "server"])?;
        Ok(field(&info, "redis_version")?.to_owned())
    }

    /// How many commands failed since [`reset`](Self::reset).
    ///
    /// Not among them: scripts that were not in the server's cache yet (clients load them then), and
    /// the greetings of redis-rs, parts of which older servers do not know.
    pub(crate) fn failures(&mut self) -> Result<u64, Error> {
        let commands: String = self.run(&["INFO", "commandstats"])?;
        let failed: u64 = commands
            .lines()
            .filter_map(|line| line.strip_prefix("cmdstat_"))
            .filter(|line| !line.starts_with("client") && !line.starts_with("hello"))
            .map(|line| count(line, "rejected_calls=") + count(line, "failed_calls="))
            .sum();
        let errors: String = self.run(&["INFO", "errorstats"])?;
        let unknown_scripts: u64 = errors
            .lines()
            .filter_map(|line| line.strip_prefix("errorstat_NOSCRIPT:"))
            .map(|line| count(line, "count="))
            .sum();
        Ok(failed.saturating_sub(unknown_scripts))
    }

    /// Starts to count the commands that clients send.
    ///
    /// By MONITOR, because INFO cannot tell them apart: both `commandstats` and
    /// `total_commands_processed` also count what scripts call, and MONITOR marks that as such.
    pub(crate) fn count_commands(&mut self) -> Result<CommandCount, Error> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.write_all(b"MONITOR\r\n")?;
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        lines.read_line(&mut line)?;
        if line.trim_end() != "+OK" {
            return Err(format!("MONITOR was answered {line:?}").into());
        }
        Ok(CommandCount {
            counter: thread::spawn(move || count_lines(lines)),
        })
    }
}

/// Commands being counted.
pub(crate) struct CommandCount {
    counter: JoinHandle<io::Result<u64>>,
}

/// A command that only ends a count.
const END_OF_COUNT: &str = "lock-bench: end of count";

impl CommandCount {
    /// How many commands clients have sent since the start of the count.
    pub(crate) fn stop(self, server: &mut Server) -> Result<u64, Error> {
        server.run::<()>(&["ECHO", END_OF_COUNT])?;
        let count = self.counter.join().map_err(|_| "the counter panicked")?;
        Ok(count?)
    }
}

/// Lines are `+time [database address:port] "COMMAND" ..`, with `lua` for the address of a command
/// that a script called.
fn count_lines(mut lines: impl BufRead) -> io::Result<u64> {
    let mut count = 0;
    let mut line = Vec::new();
    loop {
        line.clear();
        if lines.read_until(b'\n', &mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = String::from_utf8_lossy(&line);
        if line.contains(END_OF_COUNT) {
            return Ok(count);
        }
        let source = line.split(['[', ']']).nth(1).unwrap_or_default();
        if !source.ends_with(" lua") {
            count += 1;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The figures are out; a server that cannot be killed does not change them.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn url(port: u16) -> String {
    format!("redis://127.0.0.1:{port}")
}

fn command(words: &[&str]) -> redis::Cmd {
    let mut command = redis::Cmd::new();
    for word in words {
        command.arg(word);
    }
    command
}

/// Waits until the server accepts commands. `None`: it could not have the port.
fn accept(process: &mut Child, port: u16) -> Result<Option<Connection>, Error> {
    let client = redis::Client::open(url(port))?;
    let started = Instant::now();
    while started.elapsed() < START {
        if process.try_wait()?.is_some() {
            return Ok(None);
        }
        if let Ok(mut connection) = client.get_connection() {
            let info: String = command(&["INFO", "server"]).query(&mut connection)?;
            // Another server on this port would answer as well.
            if field(&info, "process_id")?.parse() == Ok(process.id()) {
                return Ok(Some(connection));
            }
        }
        thread::sleep(Duration::from_millis(5));
    }
    process.kill()?;
    process.wait()?;
    Err("redis-server does not accept commands".into())
}

fn field<'a>(info: &'a str, name: &str) -> Result<&'a str, Error> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .ok_or_else(|| format!("INFO without {name}").into())
}

/// The number after `name` in a line of `INFO`; servers before 6.2 leave some out.
fn count(line: &str, name: &str) -> u64 {
    line.split(',')
        .find_map(|entry| entry.trim().strip_prefix(name)?.parse().ok())
        .unwrap_or(0)
}
