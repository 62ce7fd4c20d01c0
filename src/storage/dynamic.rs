//! A storage whose type is forgotten, as the coordinator and the quorum keep it.

use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use crossbeam_utils::CachePadded;

use super::{
    AcquireReply, AcquireRequest, Inbox, LockRecord, LockStorage, RaiseReply, RaiseRequest,
    ReleaseReply, ReleaseRequest, RenewReply, RenewRequest, Survey, SurveyRequest,
};
use crate::{
    error::{StorageError, StorageErrorKind},
    key::LockName,
};

pub(crate) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;
type Reply<T> = Result<T, StorageError>;

/// A call of a storage: on its way, or carried out already.
pub(crate) enum Call<T> {
    /// Until its reply is taken.
    Done(Option<T>),
    Sent(BoxFuture<T>),
}

impl<T> Call<T> {
    pub(crate) fn done(reply: T) -> Self {
        Self::Done(Some(reply))
    }

    /// Whether it needs no runtime to be polled.
    pub(crate) fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }
}

// Nothing in it is pinned in place.
impl<T> Unpin for Call<T> {}

impl<T> Future for Call<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        match self.get_mut() {
            Self::Done(reply) => match reply.take() {
                Some(reply) => Poll::Ready(reply),
                None => panic!("polled after it was ready"),
            },
            Self::Sent(call) => call.as_mut().poll(cx),
        }
    }
}

/// Code of others, in the midst of what must come to its end.
fn carried_out<T>(call: impl FnOnce() -> Option<Reply<T>>) -> Option<Reply<T>> {
    let unavailable = |_| Some(Err(StorageError::new(StorageErrorKind::Unavailable)));
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(unavailable)
}

/// See [`LockStorage::acquire`]. Sent by its first poll, unless it could be carried out at once.
pub(crate) fn acquire(
    storage: &Arc<dyn DynStorage>,
    request: AcquireRequest,
) -> Call<Reply<AcquireReply>> {
    match carried_out(|| storage.acquire_at_once(&request)) {
        Some(reply) => Call::done(reply),
        None => Call::Sent(Arc::clone(storage).acquire(request)),
    }
}

/// See [`LockStorage::release`]. Sent by its first poll, unless it could be carried out at once.
pub(crate) fn release(
    storage: &Arc<dyn DynStorage>,
    request: ReleaseRequest,
) -> Call<Reply<ReleaseReply>> {
    match carried_out(|| storage.release_at_once(&request)) {
        Some(reply) => Call::done(reply),
        None => Call::Sent(Arc::clone(storage).release(request)),
    }
}

/// For all who use it. Padded, because each call changes the count of references next to it, which
/// those on other cores would otherwise have to get anew together with the storage.
pub(crate) fn shared(storage: impl LockStorage) -> Arc<dyn DynStorage> {
    Arc::new(CachePadded::new(storage))
}

/// A [`LockStorage`] without its type. Its futures own what they need, so that a call whose caller
/// has gone can be followed to its end by another task.
pub(crate) trait DynStorage: Send + Sync + 'static {
    fn acquire(self: Arc<Self>, request: AcquireRequest) -> BoxFuture<Reply<AcquireReply>>;
    fn renew(self: Arc<Self>, requests: Vec<RenewRequest>) -> BoxFuture<Vec<Reply<RenewReply>>>;
    fn release(self: Arc<Self>, request: ReleaseRequest) -> BoxFuture<Reply<ReleaseReply>>;
    fn acquire_at_once(&self, request: &AcquireRequest) -> Option<Reply<AcquireReply>>;
    fn release_at_once(&self, request: &ReleaseRequest) -> Option<Reply<ReleaseReply>>;
    fn listen(self: Arc<Self>, inbox: Inbox) -> BoxFuture<()>;
    fn raise(self: Arc<Self>, request: RaiseRequest) -> BoxFuture<Reply<RaiseReply>>;
    fn survey(self: Arc<Self>, request: SurveyRequest) -> BoxFuture<Reply<Survey>>;
    fn look(self: Arc<Self>, name: LockName) -> BoxFuture<Reply<Option<LockRecord>>>;
    fn force_release(self: Arc<Self>, seen: LockRecord) -> BoxFuture<Reply<ReleaseReply>>;
    fn tell(
        self: Arc<Self>,
        prefix: Arc<str>,
        inbox: u128,
        text: Arc<str>,
    ) -> BoxFuture<Reply<bool>>;
    fn is_divided(&self) -> bool;
    fn settled(self: Arc<Self>) -> BoxFuture<()>;
}

impl<S: LockStorage> DynStorage for CachePadded<S> {
    fn acquire(self: Arc<Self>, request: AcquireRequest) -> BoxFuture<Reply<AcquireReply>> {
        Box::pin(async move { LockStorage::acquire(&**self, &request).await })
    }

    fn renew(self: Arc<Self>, requests: Vec<RenewRequest>) -> BoxFuture<Vec<Reply<RenewReply>>> {
        Box::pin(async move { LockStorage::renew(&**self, &requests).await })
    }

    fn release(self: Arc<Self>, request: ReleaseRequest) -> BoxFuture<Reply<ReleaseReply>> {
        Box::pin(async move { LockStorage::release(&**self, &request).await })
    }

    fn acquire_at_once(&self, request: &AcquireRequest) -> Option<Reply<AcquireReply>> {
        LockStorage::acquire_at_once(&**self, request)
    }

    fn release_at_once(&self, request: &ReleaseRequest) -> Option<Reply<ReleaseReply>> {
        LockStorage::release_at_once(&**self, request)
    }

    fn listen(self: Arc<Self>, inbox: Inbox) -> BoxFuture<()> {
        Box::pin(async move { LockStorage::listen(&**self, inbox).await })
    }

    fn raise(self: Arc<Self>, request: RaiseRequest) -> BoxFuture<Reply<RaiseReply>> {
        Box::pin(async move { LockStorage::raise(&**self, &request).await })
    }

    fn survey(self: Arc<Self>, request: SurveyRequest) -> BoxFuture<Reply<Survey>> {
        Box::pin(async move { LockStorage::survey(&**self, &request).await })
    }

    fn look(self: Arc<Self>, name: LockName) -> BoxFuture<Reply<Option<LockRecord>>> {
        Box::pin(async move { LockStorage::look(&**self, &name).await })
    }

    fn force_release(self: Arc<Self>, seen: LockRecord) -> BoxFuture<Reply<ReleaseReply>> {
        Box::pin(async move { LockStorage::force_release(&**self, &seen).await })
    }

    fn tell(
        self: Arc<Self>,
        prefix: Arc<str>,
        inbox: u128,
        text: Arc<str>,
    ) -> BoxFuture<Reply<bool>> {
        Box::pin(async move { LockStorage::tell(&**self, &prefix, inbox, &text).await })
    }

    fn is_divided(&self) -> bool {
        LockStorage::is_divided(&**self)
    }

    fn settled(self: Arc<Self>) -> BoxFuture<()> {
        Box::pin(async move { LockStorage::settled(&**self).await })
    }
}
