//! A server that answers as a test tells it to.

use std::{
    fmt::Display,
    io,
    net::{Ipv4Addr, SocketAddr},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Reads the commands of Redis clients and answers them by a function. Ends with the runtime it was
/// started on.
pub struct FakeServer {
    address: SocketAddr,
}

impl FakeServer {
    /// `answer` is given the number of the connection, from 0, and a command's words. It gives the
    /// answer as it goes over the wire but for the end of the line, such as `+OK`, or `None` for
    /// none, ever.
    pub async fn start<A: Display + 'static>(
        answer: impl Fn(usize, &[String]) -> Option<A> + Clone + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.expect("the server has a port of its own");
        let address = listener.local_addr().expect("it is bound");
        tokio::spawn(async move {
            let mut serving = JoinSet::new();
            for connection in 0.. {
                let Ok((client, _)) = listener.accept().await else {
                    return;
                };
                let answer = answer.clone();
                // A client that goes ends the conversation, not the test.
                serving.spawn(serve(client, move |words| answer(connection, words)));
            }
        });
        Self { address }
    }

    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    pub fn url_with_password(&self, password: &str) -> String {
        format!("redis://:{password}@{}", self.address)
    }
}

async fn serve<A: Display + 'static>(
    client: TcpStream,
    answer: impl Fn(&[String]) -> Option<A>,
) -> io::Result<()> {
    let mut client = BufReader::new(client);
    loop {
        let words = read_command(&mut client).await?;
        let answer = answer(&words).map(|answer| format!("{answer}\r\n"));
        if let Some(answer) = answer {
            client.write_all(answer.as_bytes()).await?;
        }
    }
}

/// `*2`, `$3`, `GET`, `$3`, `key`: an array of strings with their lengths.
async fn read_command(client: &mut BufReader<TcpStream>) -> io::Result<Vec<String>> {
    let mut words = Vec::new();
    for _ in 0..read_number(client).await? {
        let mut word = vec![0; read_number(client).await?];
        client.read_exact(&mut word).await?;
        client.read_exact(&mut [0; 2]).await?;
        words.push(String::from_utf8_lossy(&word).into_owned());
    }
    Ok(words)
}

/// The number in a line, after the letter that says what it counts.
async fn read_number(client: &mut BufReader<TcpStream>) -> io::Result<usize> {
    let mut line = String::new();
    client.read_line(&mut line).await?;
    let number = line.get(1..).and_then(|number| number.trim().parse().ok());
    number.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
