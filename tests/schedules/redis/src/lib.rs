//! redis-rs as the lock's modules know it, but with a connection to a server that is a thread of the
//! model: it takes calls in the order in which they came into the channel, and says back the last word
//! of each command.

pub use redis_rs::*;

pub mod aio {
    use std::collections::VecDeque;

    use redis_rs::{Arg, Cmd, Pipeline, RedisError, RedisResult, Value};
    use shuttle::sync::{Arc, Mutex};
    use tokio::sync::oneshot;

    /// In the place of redis-rs's.
    #[derive(Clone, Default)]
    pub struct MultiplexedConnection {
        channel: Arc<Mutex<VecDeque<Call>>>,
    }

    /// What was sent at once, and is not answered.
    pub struct Call {
        pub words: Vec<String>,
        pub is_pipeline: bool,
        reply: oneshot::Sender<Vec<Value>>,
    }

    impl Call {
        pub fn answer(self) {
            let values = self.words.into_iter().map(Value::SimpleString);
            let _ = self.reply.send(values.collect());
        }
    }

    fn word(command: &Cmd) -> String {
        match command.args_iter().last() {
            Some(Arg::Simple(word)) => String::from_utf8_lossy(word).into_owned(),
            _ => String::new(),
        }
    }

    impl MultiplexedConnection {
        /// The server's end.
        pub fn next(&self) -> Option<Call> {
            self.channel.lock().unwrap().pop_front()
        }

        pub async fn send_packed_command(&mut self, command: &Cmd) -> RedisResult<Value> {
            let mut values = self.send(vec![word(command)], false).await?;
            Ok(values.remove(0))
        }

        pub async fn send_packed_commands(
            &mut self,
            commands: &Pipeline,
            _: usize,
            _: usize,
        ) -> RedisResult<Vec<Value>> {
            self.send(commands.cmd_iter().map(word).collect(), true)
                .await
        }

        async fn send(&self, words: Vec<String>, is_pipeline: bool) -> RedisResult<Vec<Value>> {
            let (reply, replied) = oneshot::channel();
            self.channel.lock().unwrap().push_back(Call {
                words,
                is_pipeline,
                reply,
            });
            let gone = |_| RedisError::from(std::io::Error::from(std::io::ErrorKind::BrokenPipe));
            replied.await.map_err(gone)
        }
    }
}
