//! The other processes, as the benchmark sees them.

use std::{
    env,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::Duration,
};

use crate::{Error, worker::Errand};

/// How long a worker may think about an answer that takes no work.
pub(crate) const PROMPT: Duration = Duration::from_secs(15);

/// One other process. It ends with this value.
pub(crate) struct Worker {
    process: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Worker {
    /// Starts as many workers as there are errands. Returns when all of them are connected.
    pub(crate) fn team(
        url: &str,
        errands: impl IntoIterator<Item = Errand>,
    ) -> Result<Vec<Self>, Error> {
        let team: Result<Vec<_>, _> = errands
            .into_iter()
            .map(|errand| Self::start(url, &errand))
            .collect();
        let team = team?;
        for worker in &team {
            worker.hear("ready", PROMPT)?;
        }
        Ok(team)
    }

    fn start(url: &str, errand: &Errand) -> Result<Self, Error> {
        let mut process = Command::new(env::current_exe()?)
            .args(["worker", url])
            .args(errand.to_arguments())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = process.stdin.take().ok_or("a worker without stdin")?;
        let stdout = process.stdout.take().ok_or("a worker without stdout")?;
        let (sender, lines) = channel();
        // Ends with the process.
        thread::spawn(move || {
            let mut lines = BufReader::new(stdout).lines().map_while(Result::ok);
            lines.try_for_each(|line| sender.send(line))
        });
        Ok(Self {
            process,
            stdin,
            lines,
        })
    }

    pub(crate) fn tell(&mut self, line: &str) -> Result<(), Error> {
        Ok(writeln!(self.stdin, "{line}")?)
    }

    /// The rest of the next line, which has to begin with this word.
    pub(crate) fn hear(&self, word: &str, within: Duration) -> Result<String, Error> {
        let line = self
            .lines
            .recv_timeout(within)
            .map_err(|error| match error {
                RecvTimeoutError::Timeout => {
                    format!("a worker has not said {word:?} for {within:?}")
                }
                RecvTimeoutError::Disconnected => "a worker has failed; see above".to_owned(),
            })?;
        match line.strip_prefix(word) {
            Some(rest) => Ok(rest.trim_start().to_owned()),
            None => Err(format!("a worker said {line:.40} instead of {word:?}").into()),
        }
    }

    /// Waits for the end of the process, which has said its last word.
    pub(crate) fn end(mut self) -> Result<(), Error> {
        let status = self.process.wait()?;
        match status.success() {
            true => Ok(()),
            false => Err(format!("a worker ended with {status}").into()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Harmless after `end`. Before it, the benchmark has failed, and this changes nothing.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
