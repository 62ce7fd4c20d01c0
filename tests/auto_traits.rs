//! Which of the traits that nobody writes down each public type has: `Send`, `Sync`, `Unpin`, `UnwindSafe` and
//! `RefUnwindSafe`, and `Clone`. A private field can take one away, and would break those who build on it. Most of this
//! is checked when it is compiled; a test looks that no public type is missing.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a test ends at its first surprise, and documents itself by its name"
)]

use std::{
    convert::Infallible,
    error::Error,
    fmt::Debug,
    fs,
    future::{Future, Ready},
    panic::{RefUnwindSafe, UnwindSafe},
    path::Path,
    time::Duration,
};

use http::{Request, Response};
use tower::util::ServiceFn;
use tower_distributed_lock::{
    Clock, DistributedLockLayer, HeldLock, Lock, LockFactory, LockFactoryBuilder, LockFuture,
    LockGuard, LockKey, LockOptions, LockOptionsBuilder, LockSet, LockSetFuture, LockSetGuard,
    Redlock, Unlocked,
    dashboard::Dashboard,
    error::{
        BoxError, ForceReleaseError, InvalidKey, InvalidOptions, InvalidSettings, LockError,
        LossReason, NotObtained, QuorumNotReached, StorageError, StorageErrorKind, TooManyWaiters,
        WaiterScope,
    },
    inspect::{ForceReleased, LockInfo, LockInspector, Process, Snapshot, Waiting},
    middleware::{
        DefaultOnAcquired, DefaultOnReject, DistributedLock, FencingHeader, HeldBody, Hold,
        HoldToBodyEnd, HoldToHead, MissingLock, NoHeldLock, OnAcquired, OnLoss, OnReject,
        OnStorageFailure, ProblemContext, ProblemDetails, Protocol, RejectWithError, Rejection,
        RequestKey, RequestLock, ServerTiming,
        future::ResponseFuture,
        key::{
            Extracted, Header, HeaderError, KeyFunction, KeyRejected, Metadata, PathParams,
            PathParamsError,
        },
    },
    storage::{
        AcquireReply, AcquireRequest, FencingBlock, Inbox, LockName, LockOwner, LockRecord,
        MemoryStorage, Message, OwnerToken, PushedGrant, RaiseReply, RaiseRequest, RedisStorage,
        RedlockBuilder, ReleaseReply, ReleaseRequest, RenewReply, RenewRequest, Requeue, Stamp,
        Survey, SurveyRequest, redis::RedisStorageBuilder,
    },
};

macro_rules! the_type {
    (+ $type:ty, $trait:path) => {
        const _: fn() = || {
            fn has<T: $trait>() {}
            has::<$type>();
        };
    };
    // Does not compile if it has the trait: then there are two `has` to choose from.
    (- $type:ty, $trait:path) => {
        const _: fn() = || {
            #[allow(dead_code, reason = "what matters is which of them there are")]
            trait Has<A> {
                fn has() {}
            }
            impl<T> Has<()> for T {}
            #[allow(dead_code, reason = "as above")]
            struct It;
            impl<T: $trait> Has<It> for T {}
            let _ = <$type as Has<_>>::has;
        };
    };
}

/// `+`: it has the trait, `-`: it does not, and is not meant to.
macro_rules! types {
    ($($send:tt $sync:tt $unpin:tt $unwind:tt $ref_unwind:tt $clone:tt $type:ty;)+) => {
        $(
            the_type!($send $type, Send);
            the_type!($sync $type, Sync);
            the_type!($unpin $type, Unpin);
            the_type!($unwind $type, UnwindSafe);
            the_type!($ref_unwind $type, RefUnwindSafe);
            the_type!($clone $type, Clone);
            the_type!(+ $type, Debug);
        )+
    };
}

type Req = http::Request<()>;
type Res = http::Response<()>;
type Inner = ServiceFn<fn(Req) -> Ready<Result<Res, Infallible>>>;
type Key = fn(&Req) -> LockKey;
type Extracts = fn(axum::extract::Path<u64>) -> LockKey;

// Send, Sync, Unpin, UnwindSafe, RefUnwindSafe, Clone.
types! {
    // The lock.
    + + + + + + Clock;
    + + + - - + Lock;
    + + + - - + LockFactory;
    + + + + + + LockFactoryBuilder<MemoryStorage>;
    + - + - - - LockFuture;
    + + + - - - LockGuard;
    + + + + + + LockKey;
    + + + + + + LockOptions;
    + + + + + + LockOptionsBuilder;
    + + + - - + LockSet;
    + - + - - - LockSetFuture;
    + + + - - - LockSetGuard;
    + + + + + + Unlocked;

    // Errors.
    + + + - - + ForceReleaseError;
    + + + + + + InvalidKey;
    + + + + + + InvalidOptions;
    + + + + + + InvalidSettings;
    + + + - - + LockError;
    + + + + + + LossReason;
    + + + + + + NotObtained;
    + + + + + + QuorumNotReached;
    + + + - - + StorageError;
    + + + + + + StorageErrorKind;
    + + + + + + TooManyWaiters;
    + + + + + + WaiterScope;

    // The middleware.
    + + + + + + DefaultOnAcquired;
    + + + + + + DefaultOnReject;
    + + + - - + DistributedLock<Inner, Key, DefaultOnReject, DefaultOnAcquired>;
    + + + - - + DistributedLockLayer<Key>;
    + + + + + + Extracted<Extracts, (axum::extract::Path<u64>,)>;
    + + + + + + FencingHeader;
    + + + + + + Header;
    + + + + + + HeaderError;
    + + + - - - HeldBody<String>;
    + + + - - + HeldLock;
    + + + + + + HoldToBodyEnd;
    + + + + + + HoldToHead;
    + + + - - - KeyRejected;
    + + + + + + Metadata;
    + + + + + + MissingLock;
    + + + + + + NoHeldLock;
    + + + + + + OnLoss;
    + + + + + + OnStorageFailure;
    + + + + + + PathParams;
    + + + + + + PathParamsError;
    + + + + + + ProblemContext;
    + + + + + + ProblemDetails;
    + + + + + + Protocol;
    + + + + + + RejectWithError<fn(Rejection) -> BoxError>;
    + + + - - - Rejection;
    + + + + + + RequestKey;
    + + + - - - RequestLock;
    + - + - - - ResponseFuture<Inner, Req, Key, DefaultOnReject, DefaultOnAcquired>;
    + + + + + + ServerTiming<HoldToHead>;

    // Storages.
    + + + + + + AcquireReply;
    + + + + + + AcquireRequest;
    + + + + + + FencingBlock;
    + + + - - + Inbox;
    + + + + + + LockName;
    + + + + + + LockOwner;
    + + + + + + LockRecord;
    + + + + + + MemoryStorage;
    + + + + + + Message;
    + + + + + + OwnerToken;
    + + + + + + PushedGrant;
    + + + + + + RaiseReply;
    + + + + + + RaiseRequest;
    + + + - - - RedisStorage;
    + + + - - + RedisStorageBuilder;
    + + + - - + Redlock;
    + + + - - - RedlockBuilder;
    + + + + + + ReleaseReply;
    + + + + + + ReleaseRequest;
    + + + + + + RenewReply;
    + + + + + + RenewRequest;
    + + + + + + Requeue;
    + + + + + + Stamp;
    + + + + + + Survey;
    + + + + + + SurveyRequest;

    // Looking at locks.
    + + + - - + Dashboard;
    + + + + + + ForceReleased;
    + + + + + + LockInfo;
    + + + - - + LockInspector;
    + + + + + + Process;
    + + + + + + Snapshot;
    + + + + + + Waiting;
}

/// Errors go through `?` into boxes, and to other tasks.
const _: fn() = || {
    fn is_error<T: Error + Send + Sync + 'static>() {}
    is_error::<ForceReleaseError>();
    is_error::<HeaderError>();
    is_error::<InvalidKey>();
    is_error::<InvalidOptions>();
    is_error::<InvalidSettings>();
    is_error::<KeyRejected>();
    is_error::<LockError>();
    is_error::<LossReason>();
    is_error::<MissingLock>();
    is_error::<NotObtained>();
    is_error::<PathParamsError>();
    is_error::<QuorumNotReached>();
    is_error::<Rejection>();
    is_error::<StorageError>();
    is_error::<TooManyWaiters>();
};

/// The futures of `async fn`s have no names. All of them can be spawned.
#[allow(dead_code, reason = "it has to compile")]
fn futures(
    guard: LockGuard,
    set: LockSetGuard,
    held: &'static HeldLock,
    factory: &'static LockFactory,
    inspector: &'static LockInspector,
    key: &'static LockKey,
) {
    fn is_send<T: Future + Send>(future: T) {
        drop(future);
    }
    let guards: &'static (LockGuard, LockSetGuard) = Box::leak(Box::new((guard, set)));
    is_send(guards.0.lost());
    is_send(guards.1.lost());
    is_send(held.lost());
    is_send(factory.drain(Duration::ZERO));
    is_send(inspector.locks(1));
    is_send(inspector.get(key));
    is_send(inspector.force_release(key, ""));
    is_send(inspector.force_release_if(key, 1, ""));
    is_send(RedisStorage::connect(""));
    is_send(RedisStorage::builder("").connect());
    is_send(Redlock::connect([""]));
    is_send(tower_distributed_lock::storage::conformance::check(
        MemoryStorage::new(),
    ));
}

#[allow(dead_code, reason = "it has to compile")]
fn unlocking(guard: LockGuard, set: LockSetGuard) -> [Box<dyn Send>; 2] {
    [Box::new(guard.unlock()), Box::new(set.unlock())]
}

/// Those that are for users to write can be put into a box.
#[allow(dead_code, reason = "it has to compile")]
struct Boxed<'a> {
    key: Box<dyn KeyFunction<Request<()>>>,
    reject: Box<dyn OnReject<Request<()>, Response<()>, BoxError, Context = Protocol>>,
    acquired: Box<dyn OnAcquired<Request<()>>>,
    hold: Box<dyn Hold<Response<()>>>,
    keys_of_a_set: Box<dyn Iterator<Item = LockKey> + Send + 'a>,
    locks_of_a_request: Box<dyn Iterator<Item = HeldLock> + Send + 'a>,
}

#[allow(dead_code, reason = "it has to compile")]
fn iterators<'a>(boxed: &mut Boxed<'a>, set: &'a LockSet, held: &'a HeldLock) {
    boxed.keys_of_a_set = Box::new(set.keys());
    boxed.locks_of_a_request = Box::new(held.each());
}

fn public_types(folder: &Path, types: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            public_types(&path, types);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let code = fs::read_to_string(path).unwrap();
            let declared = code.lines().filter_map(|line| {
                let line = line.trim_start();
                let rest = line
                    .strip_prefix("pub struct ")
                    .or(line.strip_prefix("pub enum "))?;
                rest.split(|it: char| !it.is_alphanumeric()).next()
            });
            types.extend(declared.map(str::to_owned));
        }
    }
}

/// What is not public outside of the crate is `pub(crate)` in it: the lint `unreachable_pub` sees to that.
#[test]
fn no_public_type_is_missing_here() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let here = fs::read_to_string(root.join("tests/auto_traits.rs")).unwrap();
    let listed = |name: &str| {
        let mut rows = here.lines().filter_map(|line| line.strip_suffix(';'));
        rows.any(|row| {
            let row = row.trim_start();
            let is_row = row.starts_with(['+', '-']);
            let of = row.trim_start_matches(['+', '-', ' ']);
            is_row && of.split(|it: char| !it.is_alphanumeric()).next() == Some(name)
        })
    };
    let mut types = Vec::new();
    public_types(&root.join("src"), &mut types);
    types.sort_unstable();
    assert!(types.len() > 80, "{types:?}");
    let missing: Vec<_> = types.iter().filter(|name| !listed(name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
