//! A service with axum, and its clients: who has had a response has been under the lock, and is out
//! again. Service and clients share a process, as they share the machine anyway; the clients write
//! fixed bytes and look for the end of the head, so that they cost little.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError, Weak},
};

use axum::{
    Router,
    extract::{Path, Request, State},
    http::StatusCode,
    routing::post,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tower_distributed_lock::DistributedLockLayer;

use super::{Locks, ours::Ours};
use crate::Error;

/// The service as its clients see it, and the locks that it uses.
#[derive(Clone)]
pub(crate) struct Service<L> {
    address: SocketAddr,
    /// Kept open. There are as many as requests at the same time.
    idle: Arc<Mutex<Vec<TcpStream>>>,
    locks: L,
}

impl<L: Locks> Service<L> {
    /// Its handler takes the lock and releases it before it answers.
    pub(crate) async fn by_hand(locks: L) -> Result<Self, Error> {
        let handler = async |State(locks): State<L>, Path(key): Path<String>| {
            let entered = async {
                let guard = locks.lock(&key).await?;
                locks.release(guard).await
            };
            match entered.await {
                Ok(()) => StatusCode::OK,
                Err(_) => StatusCode::INTERNAL_SERVER_ERROR,
            }
        };
        let router = Router::new().route("/{*key}", post(handler));
        Self::start(router.with_state(locks.clone()), locks).await
    }

    async fn start(router: Router, locks: L) -> Result<Self, Error> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        // It ends with the process.
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self {
            address,
            idle: Arc::default(),
            locks,
        })
    }

    async fn connection(&self) -> Result<TcpStream, Error> {
        let idle = lock(&self.idle).pop();
        if let Some(connection) = idle {
            return Ok(connection);
        }
        let connection = TcpStream::connect(self.address).await?;
        connection.set_nodelay(true)?;
        Ok(connection)
    }
}

impl Service<Ours> {
    /// The layer is around its handler, which does nothing.
    pub(crate) async fn layered(ours: Ours) -> Result<Self, Error> {
        let key = |request: &Request| request.uri().path().trim_start_matches('/').to_owned();
        let layer = DistributedLockLayer::new(ours.factory.clone(), key).options(ours.options);
        let handler = post(async || StatusCode::OK).route_layer(layer);
        Self::start(Router::new().route("/{*key}", handler), ours).await
    }
}

impl<L: Locks> Locks for Service<L> {
    type Guard = ();

    async fn lock(&self, key: &str) -> Result<(), Error> {
        let mut connection = self.connection().await?;
        let request = format!("POST /{key} HTTP/1.1\r\nhost: bench\r\ncontent-length: 0\r\n\r\n");
        connection.write_all(request.as_bytes()).await?;
        let (mut response, mut length) = ([0; 512], 0);
        while !response[..length].ends_with(b"\r\n\r\n") {
            match connection.read(&mut response[length..]).await? {
                0 => return Err("the service closed a connection".into()),
                more => length += more,
            }
        }
        if !response.starts_with(b"HTTP/1.1 200 ") {
            let text = String::from_utf8_lossy(&response[..length]);
            return Err(format!("the service answered {text}").into());
        }
        lock(&self.idle).push(connection);
        Ok(())
    }

    async fn release(&self, (): ()) -> Result<(), Error> {
        Ok(())
    }

    async fn finish(&self) -> Result<(), Error> {
        self.locks.finish().await
    }
}

/// No lock at all.
#[derive(Clone)]
pub(crate) struct None;

impl Locks for None {
    type Guard = ();

    async fn lock(&self, _: &str) -> Result<(), Error> {
        Ok(())
    }

    async fn release(&self, (): ()) -> Result<(), Error> {
        Ok(())
    }
}

/// A lock for each key inside one process, as one writes it by hand.
#[derive(Clone, Default)]
pub(crate) struct Mutexes(Arc<Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>>);

/// Of a key that nobody wants any more nothing is left.
pub(crate) struct MutexGuard {
    key: String,
    _held: tokio::sync::OwnedMutexGuard<()>,
}

impl Locks for Mutexes {
    type Guard = MutexGuard;

    async fn lock(&self, key: &str) -> Result<MutexGuard, Error> {
        let mutex = {
            let mut mutexes = lock(&self.0);
            let known = mutexes.get(key).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let new = Arc::default();
                mutexes.insert(key.to_owned(), Arc::downgrade(&new));
                new
            })
        };
        Ok(MutexGuard {
            key: key.to_owned(),
            _held: mutex.lock_owned().await,
        })
    }

    async fn release(&self, guard: MutexGuard) -> Result<(), Error> {
        let MutexGuard { key, _held: held } = guard;
        drop(held);
        let mut mutexes = lock(&self.0);
        if mutexes
            .get(&key)
            .is_some_and(|mutex| mutex.strong_count() == 0)
        {
            mutexes.remove(&key);
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
