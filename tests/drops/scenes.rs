//! Who is dropped, and what stands in the way.

use std::{any::Any, convert::Infallible, time::Duration};

use axum::body::Body;
use bytes::Bytes;
use futures_util::future::LocalBoxFuture;
use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::{
    task::yield_now,
    time::{sleep, timeout},
};
use tower::{Layer, ServiceExt, service_fn};
use tower_distributed_lock::{
    DistributedLockLayer, LockFactory, LockKey,
    error::{InvalidKey, LockError},
};

use super::{
    ms,
    stage::{Act, Setup, Stage},
};

pub struct Scene {
    pub name: &'static str,
    pub setup: Setup,
    pub set: fn(Stage) -> LocalBoxFuture<'static, Act>,
}

const fn scene(name: &'static str, set: fn(Stage) -> LocalBoxFuture<'static, Act>) -> Scene {
    Scene {
        name,
        setup: Setup {
            linger: None,
            handoff: None,
        },
        set,
    }
}

/// One turn, and the lock is given up if another process wants it.
const fn one_turn(mut scene: Scene) -> Scene {
    scene.setup.handoff = Some((1, Duration::ZERO));
    scene
}

pub const LOCKS: [Scene; 12] = [
    scene("free", |stage| Box::pin(free(stage))),
    scene("try-free", |stage| Box::pin(try_free(stage))),
    scene("try-held", |stage| Box::pin(try_held(stage))),
    scene("held-there", |stage| Box::pin(held_there(stage))),
    scene("held-there-others-behind", |stage| {
        Box::pin(held_there_others_behind(stage))
    }),
    scene("behind-a-local", |stage| Box::pin(behind_a_local(stage))),
    scene("before-a-local", |stage| Box::pin(before_a_local(stage))),
    scene("held-here", |stage| Box::pin(held_here(stage))),
    one_turn(scene("rejoins-for-a-local", |stage| {
        Box::pin(rejoins_for_a_local(stage))
    })),
    one_turn(scene("rejoined-by-a-local", |stage| {
        Box::pin(rejoined_by_a_local(stage))
    })),
    scene("set-free", |stage| Box::pin(set_free(stage))),
    scene("set-held-there", |stage| Box::pin(set_held_there(stage))),
];

pub const LAYERS: [Scene; 6] = [
    scene("layer-free", |stage| Box::pin(layer_free(stage))),
    scene("layer-held-there", |stage| {
        Box::pin(layer_held_there(stage))
    }),
    scene("layer-awaits-release", |stage| {
        Box::pin(layer_awaits_release(stage))
    }),
    scene("layer-body", |stage| Box::pin(layer_body(stage))),
    scene("layer-two-keys", |stage| Box::pin(layer_two_keys(stage))),
    scene("layer-lets-pass", |stage| Box::pin(layer_lets_pass(stage))),
];

pub const DRAINS: [Scene; 2] = [
    Scene {
        setup: Setup {
            linger: Some(Duration::from_secs(3_600)),
            handoff: None,
        },
        ..scene("drain", |stage| Box::pin(drain(stage)))
    },
    scene("drain-deaf", |stage| Box::pin(drain_deaf(stage))),
];

/// What a caller brings is dropped with it.
fn any(value: impl Any) -> Box<dyn Any> {
    Box::new(value)
}

/// Takes a lock, works for long enough to have it renewed, gives it back.
async fn whole_turn(stage: Stage) -> Box<dyn Any> {
    let lock = stage.here.create_lock("k").unwrap();
    match lock.lock(stage.options).await {
        Ok(guard) => {
            sleep(stage.work).await;
            any(guard.unlock().await)
        }
        Err(error) => any(error),
    }
}

fn act(stage: &Stage, caller: impl AsyncFnOnce(Stage) -> Box<dyn Any> + 'static) -> Act {
    let stage = stage.clone();
    Act {
        caller: Box::pin(async move { caller(stage).await }),
        others: Vec::new(),
        keys: vec!["k"],
        drains: false,
    }
}

async fn free(stage: Stage) -> Act {
    act(&stage, whole_turn)
}

/// The guard is dropped with its caller, and not unlocked.
async fn try_free(stage: Stage) -> Act {
    act(&stage, async |stage| {
        let lock = stage.here.create_lock("k").unwrap();
        any(lock.try_lock(stage.options).await)
    })
}

async fn try_held(stage: Stage) -> Act {
    let mut act = act(&stage, async |stage| {
        let lock = stage.here.create_lock("k").unwrap();
        any(lock.try_lock(stage.options).await)
    });
    act.others.push(stage.hold_there("k").await);
    act
}

/// It stands first in the queue, and is given the lock by a message.
async fn held_there(stage: Stage) -> Act {
    let mut act = act(&stage, whole_turn);
    act.others.push(stage.hold_there("k").await);
    act
}

/// A third process stands behind it.
async fn held_there_others_behind(stage: Stage) -> Act {
    let mut act = act(&stage, whole_turn);
    let guard = stage.take(&stage.there, "k").await;
    let holder = stage.clone();
    act.others.push(tokio::spawn(async move {
        holder.waits("k", 2).await;
        drop(guard);
    }));
    act.others.push(tokio::spawn(async move {
        stage.waits("k", 1).await;
        let elsewhere = stage.elsewhere.clone();
        stage.turn(elsewhere, "k").await;
    }));
    act
}

/// A caller of its own process is first, and asks.
async fn behind_a_local(stage: Stage) -> Act {
    let mut act = act(&stage, whole_turn);
    act.others.push(stage.hold_there("k").await);
    let here = stage.here.clone();
    act.others.push(tokio::spawn(stage.clone().turn(here, "k")));
    yield_now().await;
    act
}

/// It is first, and asks for one of its own process that stands behind it.
async fn before_a_local(stage: Stage) -> Act {
    let mut act = act(&stage, whole_turn);
    act.others.push(stage.hold_there("k").await);
    act.others.push(tokio::spawn(async move {
        stage.waits_here(1).await;
        let here = stage.here.clone();
        stage.turn(here, "k").await;
    }));
    act
}

/// The lock is handed on in memory.
async fn held_here(stage: Stage) -> Act {
    let mut act = act(&stage, whole_turn);
    let guard = stage.take(&stage.here, "k").await;
    act.others.push(tokio::spawn(async move {
        stage.waits_here(1).await;
        let _ = guard.unlock().await;
    }));
    act
}

/// Another process waits, and one of its own behind it: its release gives the lock away and takes a
/// place in the queue for the latter.
async fn rejoins_for_a_local(stage: Stage) -> Act {
    let mut act = act(&stage, async |stage| {
        let guard = stage.take(&stage.here, "k").await;
        stage.waits("k", 1).await;
        stage.waits_here(1).await;
        any(guard.unlock().await)
    });
    let waits = async |stage: Stage, factory: LockFactory| {
        let begin = stage.dropped.clone();
        while stage.here.keys() == 0 && begin.borrow().is_none() {
            sleep(ms(1)).await;
        }
        stage.turn(factory, "k").await;
    };
    let (here, there) = (stage.here.clone(), stage.there.clone());
    act.others.push(tokio::spawn(waits(stage.clone(), there)));
    act.others.push(tokio::spawn(waits(stage, here)));
    act
}

/// The same, and it is the one for whom the place is taken.
async fn rejoined_by_a_local(stage: Stage) -> Act {
    let mut act = act(&stage, whole_turn);
    let guard = stage.take(&stage.here, "k").await;
    let there = stage.there.clone();
    act.others
        .push(tokio::spawn(stage.clone().turn(there, "k")));
    act.others.push(tokio::spawn(async move {
        stage.waits("k", 1).await;
        stage.waits_here(1).await;
        let _ = guard.unlock().await;
    }));
    act
}

async fn whole_turn_of_two(stage: Stage) -> Box<dyn Any> {
    let locks = stage.here.create_lock_set(["k", "a"]).unwrap();
    match locks.lock(stage.options).await {
        Ok(guard) => {
            sleep(stage.work).await;
            any(guard.unlock().await)
        }
        Err(error) => any(error),
    }
}

async fn set_free(stage: Stage) -> Act {
    let mut act = act(&stage, whole_turn_of_two);
    act.keys = vec!["a", "k"];
    act
}

/// It has the first, and waits for the second.
async fn set_held_there(stage: Stage) -> Act {
    let mut act = act(&stage, whole_turn_of_two);
    act.keys = vec!["a", "k"];
    act.others.push(stage.hold_there("k").await);
    let elsewhere = stage.elsewhere.clone();
    act.others.push(tokio::spawn(async move {
        stage.waits("k", 1).await;
        stage.turn(elsewhere, "a").await;
    }));
    act
}

type Req = Request<Body>;

fn key(_: &Req) -> Result<LockKey, InvalidKey> {
    LockKey::new("k")
}

fn keys(_: &Req) -> Result<Vec<LockKey>, InvalidKey> {
    Ok(vec![LockKey::new("k")?, LockKey::new("a")?])
}

async fn handler(work: Duration) -> Result<Response<Body>, Infallible> {
    yield_now().await;
    sleep(work).await;
    let frames = futures_util::stream::unfold(0, async |frame| {
        sleep(ms(1)).await;
        let bytes = Ok::<_, Infallible>(Bytes::from_static(b"frame"));
        (frame < 2).then_some((bytes, frame + 1))
    });
    Ok(Response::new(Body::from_stream(frames)))
}

/// One request, and the whole of its response.
macro_rules! request {
    ($stage:expr, $layer:expr) => {{
        let work = $stage.work;
        let service = $layer
            .options($stage.options)
            .layer(service_fn(move |_: Req| handler(work)));
        let response = service.oneshot(Request::new(Body::empty())).await.unwrap();
        any(response.into_body().collect().await)
    }};
}

async fn layer_free(stage: Stage) -> Act {
    act(&stage, async |stage| {
        request!(stage, DistributedLockLayer::new(stage.here, key))
    })
}

async fn layer_held_there(stage: Stage) -> Act {
    let mut act = act(&stage, async |stage| {
        request!(stage, DistributedLockLayer::new(stage.here, key))
    });
    act.others.push(stage.hold_there("k").await);
    act
}

async fn layer_awaits_release(stage: Stage) -> Act {
    act(&stage, async |stage| {
        let layer = DistributedLockLayer::new(stage.here, key);
        request!(stage, layer.await_release(true))
    })
}

async fn layer_body(stage: Stage) -> Act {
    let mut act = act(&stage, async |stage| {
        let layer = DistributedLockLayer::new(stage.here, key);
        request!(stage, layer.hold_to_body_end())
    });
    act.others.push(stage.hold_there("k").await);
    act
}

async fn layer_two_keys(stage: Stage) -> Act {
    let mut act = act(&stage, async |stage| {
        let layer = DistributedLockLayer::new(stage.here, keys);
        request!(stage, layer.hold_to_body_end())
    });
    act.keys = vec!["a", "k"];
    act.others.push(stage.hold_there("k").await);
    act
}

/// Its work is brief, and somebody waits behind it in the same process: its response lets that one run
/// first.
async fn layer_lets_pass(stage: Stage) -> Act {
    let mut act = act(&stage, async |stage| {
        let handler = service_fn(async |_: Req| Ok::<_, Infallible>(Response::new(Body::empty())));
        let layer = DistributedLockLayer::new(stage.here, key).options(stage.options);
        any(layer
            .layer(handler)
            .oneshot(Request::new(Body::empty()))
            .await)
    });
    let guard = stage.take(&stage.here, "k").await;
    let behind = stage.clone();
    act.others.push(tokio::spawn(async move {
        behind.waits_here(1).await;
        let here = behind.here.clone();
        behind.turn(here, "k").await;
    }));
    act.others.push(tokio::spawn(async move {
        stage.waits_here(2).await;
        let _ = guard.unlock().await;
    }));
    act
}

/// One lock lingers, one is held by somebody who finishes, one is waited for.
async fn drain(stage: Stage) -> Act {
    drop(stage.take(&stage.here, "a").await);
    let guard = stage.take(&stage.here, "k").await;
    let holder = stage.clone();
    let mut others = vec![tokio::spawn(async move {
        holder.waits("k", 1).await;
        sleep(ms(20)).await;
        let _ = guard.unlock().await;
    })];
    let waiter = stage.here.create_lock("k").unwrap().lock(stage.options);
    let there = stage.there.clone();
    others.push(tokio::spawn(async move {
        match waiter.await {
            Ok(guard) => drop(guard),
            Err(error) => assert!(matches!(error, LockError::Draining), "{error:?}"),
        }
    }));
    others.push(tokio::spawn(stage.clone().turn(there, "k")));
    yield_now().await;
    Act {
        others,
        keys: vec!["k"],
        drains: true,
        ..act(&stage, async |stage| any(stage.here.drain(ms(100)).await))
    }
}

/// A holder that does not react until the drain is over.
async fn drain_deaf(stage: Stage) -> Act {
    let guard = stage.take(&stage.here, "k").await;
    let mut dropped = stage.dropped.clone();
    let holder = tokio::spawn(async move {
        let dropped = async { dropped.wait_for(Option::is_some).await.is_ok() };
        let _ = timeout(ms(200), dropped).await;
        drop(guard);
    });
    let there = stage.there.clone();
    let waiter = tokio::spawn(stage.clone().turn(there, "k"));
    yield_now().await;
    Act {
        others: vec![holder, waiter],
        drains: true,
        ..act(&stage, async |stage| any(stage.here.drain(ms(20)).await))
    }
}
