//! Who holds what, and who waits, over one server.

use std::{collections::BTreeSet, time::Instant};

use tower_distributed_lock::{
    LockFactory, LockKey,
    error::{InvalidSettings, StorageErrorKind},
    storage::{MemoryStorage, Message, RedisStorage},
};

use super::{
    all_answered, factory, hold,
    kit::{LIMIT, LONG, Proxy, RedisServer, eventually, is_queued, ms},
    label, labels, listens, served, shown, wait_for,
};

#[tokio::test]
async fn a_look_shows_who_holds_and_who_waits_in_their_order() {
    let server = RedisServer::start().await;
    let [one, two, three, looking] = [
        factory(server.url(), "shop-1").await,
        factory(server.url(), "shop-2").await,
        factory(server.url(), "shop-3").await,
        factory(server.url(), "on call").await,
    ];
    let started = Instant::now();
    let guard = hold(&one, "orders/42").await;
    let mut waiting = vec![wait_for(&two, "orders/42")];
    is_queued(&server, "orders/42", 1).await;
    waiting.push(wait_for(&three, "orders/42"));
    is_queued(&server, "orders/42", 2).await;
    waiting.extend([(); 2].map(|()| wait_for(&three, "orders/42")));
    waiting.push(wait_for(&one, "orders/42"));
    tokio::time::sleep(ms(20)).await;

    for by in [&looking, &one, &two, &three] {
        let info = shown(by, "all of it", "orders/42", |info| {
            info.waiters.last().and_then(|last| last.callers) == Some(3) && info.waiters.len() == 3
        })
        .await;
        assert_eq!(info.key.as_str(), "orders/42");
        assert_eq!(label(&info.holder), "shop-1");
        assert_eq!(labels(&info), ["shop-1", "shop-2", "shop-3"]);
        let callers: Vec<_> = info.waiters.iter().map(|it| it.callers).collect();
        assert_eq!(callers, [Some(1), Some(1), Some(3)]);
        assert_eq!(info.fencing_token, guard.fencing_token());
        let held_for = info.held_for.unwrap();
        assert!(
            held_for >= ms(19) && held_for <= started.elapsed(),
            "{held_for:?}"
        );
        let ttl = info.ttl.unwrap();
        assert!(ttl <= LONG && ttl > LONG - LIMIT, "{ttl:?}");
        assert!(info.holder.answered);
        assert_eq!(info.holder.is_this, std::ptr::eq(by, &one));
        let this: Vec<_> = info.waiters.iter().map(|it| it.process.is_this).collect();
        let expected = [&one, &two, &three].map(|it| std::ptr::eq(by, it));
        assert_eq!(this, expected);
        let snapshot = all_answered(by, 10).await;
        assert!(!snapshot.more);
        let [listed] = &snapshot.locks[..] else {
            panic!("{snapshot:?}");
        };
        assert_eq!(listed.key, info.key);
        assert_eq!(listed.waiters.len(), info.waiters.len());
        assert_eq!(listed.fencing_token, info.fencing_token);
    }

    // By the next grant it is another's.
    drop(guard);
    let next = served(waiting.remove(0)).await;
    let info = shown(&looking, "the next", "orders/42", |info| {
        info.fencing_token.is_some()
    });
    let info = info.await;
    assert_eq!(label(&info.holder), "shop-2");
    assert_eq!(info.fencing_token, next.fencing_token());
    waiting.iter().for_each(|it| it.abort());
}

#[tokio::test]
async fn a_process_that_takes_no_locks_sees_those_of_others() {
    let server = RedisServer::start().await;
    let one = factory(server.url(), "shop-1").await;
    let _guard = hold(&one, "k").await;
    listens(&server, 1).await;
    let mut looking = factory(server.url(), "on call").await;
    // Each at its first look. On a busy machine, an answer may be late for once.
    eventually("it is answered", LIMIT, async || {
        looking = factory(server.url(), "on call").await;
        let snapshot = looking.inspector().locks(10).await.unwrap();
        label(&snapshot.locks[0].holder) == "shop-1"
    })
    .await;
    let nobodys = LockKey::new("free").unwrap();
    assert_eq!(looking.inspector().get(&nobodys).await.unwrap(), None);
}

#[tokio::test]
async fn a_process_that_does_not_answer_is_shown_so_in_time() {
    let server = RedisServer::start().await;
    let proxy = Proxy::to(&server);
    let deaf = factory(proxy.url(), "deaf").await;
    let well = factory(server.url(), "well").await;
    let _guards = (hold(&deaf, "a").await, hold(&well, "b").await);
    listens(&server, 2).await;
    // It is subscribed, but nothing arrives.
    proxy.swallow_next(usize::MAX);
    proxy.black_hole();

    let looking = factory(server.url(), "on call").await;
    shown(&looking, "the one that is well", "b", |info| {
        info.holder.answered
    })
    .await;
    let (mut snapshot, mut took) = (None, LIMIT);
    eventually("the other one answers", LIMIT, async || {
        let started = Instant::now();
        let looked = looking.inspector().locks(10).await.unwrap();
        took = started.elapsed();
        let answers = looked.locks.iter().any(|lock| lock.holder.answered);
        snapshot = Some(looked);
        answers
    })
    .await;
    let snapshot = snapshot.unwrap();
    assert!(took >= ms(200) && took < LIMIT / 4, "{took:?}");
    let [a, b] = &snapshot.locks[..] else {
        panic!("{snapshot:?}");
    };
    assert_eq!(
        (a.key.as_str(), a.holder.answered, label(&a.holder)),
        ("a", false, "")
    );
    assert_eq!((a.held_for, a.fencing_token), (None, None));
    assert!(a.ttl.is_some());
    assert_eq!(
        (b.key.as_str(), b.holder.answered, label(&b.holder)),
        ("b", true, "well")
    );
    assert!(b.held_for.is_some());
}

#[tokio::test]
async fn nobody_waits_for_an_answer_of_a_process_that_is_gone() {
    let server = RedisServer::start().await;
    // As a process leaves it that was killed.
    let token = format!("{:032x}:7", 0xABC);
    let () = server
        .run(&format!("SET distributed-locks:k {token} PX 300000"))
        .await;
    let looking = factory(server.url(), "on call").await;
    let inspector = looking.inspector();
    inspector.locks(1).await.unwrap();
    let mut fastest = LIMIT;
    for _ in 0..20 {
        let started = Instant::now();
        let snapshot = inspector.locks(1).await.unwrap();
        fastest = fastest.min(started.elapsed());
        assert!(!snapshot.locks[0].holder.answered);
    }
    assert!(fastest < ms(200), "{fastest:?}");
}

#[tokio::test]
async fn a_lock_of_another_client_is_listed_as_one() {
    let server = RedisServer::start().await;
    let one = factory(server.url(), "shop-1").await;
    let () = server.run("SET distributed-locks:a theirs PX 300000").await;
    let () = server.run("SET distributed-locks:b theirs!").await;
    let waiting = wait_for(&one, "a");
    is_queued(&server, "a", 1).await;
    let snapshot = one.inspector().locks(10).await.unwrap();
    let [a, b] = &snapshot.locks[..] else {
        panic!("{snapshot:?}");
    };
    for lock in [a, b] {
        assert!(!lock.holder.answered && !lock.holder.is_this);
        assert_eq!(lock.holder.label, None);
        assert_eq!((lock.held_for, lock.fencing_token), (None, None));
    }
    assert!(a.ttl.is_some_and(|ttl| ttl <= LONG));
    assert_eq!(b.ttl, None);
    assert_eq!(labels(a), ["shop-1"]);
    assert!(!format!("{snapshot:?}").contains("theirs"));
    waiting.abort();
}

#[tokio::test]
async fn a_look_has_a_limit_and_says_if_there_is_more() {
    let server = RedisServer::start().await;
    let one = factory(server.url(), "shop-1").await;
    let mut guards = Vec::new();
    for number in 0..30 {
        guards.push(hold(&one, &format!("k/{number:02}")).await);
    }
    listens(&server, 1).await;
    let looking = factory(server.url(), "on call").await;
    for (limit, more) in [
        (0, true),
        (1, true),
        (29, true),
        (30, false),
        (1_000, false),
    ] {
        let snapshot = all_answered(&looking, limit).await;
        assert_eq!(snapshot.locks.len(), limit.min(30));
        assert_eq!(snapshot.more, more, "{limit}");
        assert!(
            snapshot
                .locks
                .is_sorted_by(|one, other| one.key < other.key)
        );
        assert!(snapshot.locks.iter().all(|lock| lock.held_for.is_some()));
    }
    // Two at the same time disturb neither.
    let (first, second) = (looking.inspector(), one.inspector());
    let (first, second) = tokio::join!(first.locks(100), second.locks(100));
    assert_eq!(first.unwrap().locks.len() + second.unwrap().locks.len(), 60);
}

#[tokio::test]
async fn many_locks_of_one_process_are_asked_for_in_few_questions() {
    const LOCKS: usize = 1_000;
    let server = RedisServer::start().await;
    let one = factory(server.url(), "shop-1").await;
    let long = "x".repeat(500);
    let mut guards = Vec::new();
    for number in 0..LOCKS {
        guards.push(hold(&one, &format!("{long}{number}")).await);
    }
    listens(&server, 1).await;
    let looking = factory(server.url(), "on call").await;
    all_answered(&looking, 1).await;
    let mut snapshot = None;
    eventually("all of it is answered in time", LIMIT, async || {
        let () = server.run("CONFIG RESETSTAT").await;
        let looked = looking.inspector().locks(LOCKS).await.unwrap();
        let all = looked.locks.iter().all(|lock| lock.held_for.is_some());
        snapshot = Some(looked);
        all
    })
    .await;
    let snapshot = snapshot.unwrap();
    assert_eq!(snapshot.locks.len(), LOCKS);
    let tokens: BTreeSet<_> = snapshot.locks.iter().map(|it| it.fencing_token).collect();
    let expected: BTreeSet<_> = guards.iter().map(|it| it.fencing_token()).collect();
    assert_eq!(tokens, expected);
    // 16 KiB hold about 32 keys of 500 bytes; each question has one answer.
    let published = server.calls("publish").await;
    assert!((2..=200).contains(&published), "{published}");
}

#[tokio::test]
async fn locks_of_other_prefixes_and_companions_are_not_listed() {
    let server = RedisServer::start().await;
    let with_prefix = async |prefix: &str| {
        let storage = RedisStorage::connect(server.url()).await.unwrap();
        let builder = LockFactory::builder(storage).key_prefix(prefix);
        builder.storage_timeout(LIMIT).build().unwrap()
    };
    let keys = [
        "*",
        "a*b",
        "[a]",
        "a?",
        r"a\b",
        "^$",
        "naïve {key}",
        "50%",
        "a b",
    ];
    let (dotted, other) = (with_prefix("a.b").await, with_prefix("axb").await);
    let mut guards = vec![hold(&other, "other").await, hold(&other, "*").await];
    for key in keys {
        guards.push(hold(&dotted, key).await);
        let waiting = wait_for(&with_prefix("a.b").await, key);
        tokio::time::sleep(ms(1)).await;
        drop(waiting);
    }
    // What no key of ours could be called, and what is no lock.
    for (verb, name) in [
        ("SET", "a.b:a{b}"),
        ("SET", "a.b:%41"),
        ("LPUSH", "a.b:list"),
    ] {
        let _: redis::Value = server.run(&format!("{verb} {name} x")).await;
    }
    let snapshot = dotted.inspector().locks(100).await.unwrap();
    let found: BTreeSet<_> = snapshot.locks.iter().map(|lock| lock.key.clone()).collect();
    let expected = keys.map(|key| LockKey::new(key).unwrap());
    assert_eq!(found, BTreeSet::from(expected));
    for lock in &snapshot.locks {
        let key = LockKey::from_encoded(&lock.key).unwrap();
        let found = dotted.inspector().get(&key).await.unwrap().unwrap();
        assert_eq!(found.key, lock.key);
    }
    let snapshot = other.inspector().locks(100).await.unwrap();
    assert_eq!(snapshot.locks.len(), 2);
}

#[tokio::test]
async fn nothing_that_is_shown_is_a_token_or_part_of_one() {
    let server = RedisServer::start().await;
    let (one, two) = (
        factory(server.url(), "shop-1").await,
        factory(server.url(), "shop-2").await,
    );
    let _guard = hold(&one, "k").await;
    let waiting = wait_for(&two, "k");
    is_queued(&server, "k", 1).await;
    let value: String = server.run("GET distributed-locks:k").await;
    let queue: String = server.run("GET {distributed-locks:k}:queue").await;
    let inspector = two.inspector();
    let shown = format!(
        "{inspector:#?} {:#?} {:#?} {one:#?} {:#?}",
        inspector.locks(10).await.unwrap(),
        inspector.get(&LockKey::new("k").unwrap()).await.unwrap(),
        inspector
            .force_release(&LockKey::new("k").unwrap(), "r")
            .await
            .unwrap(),
    );
    for secret in [&value[..32], &queue[..32]] {
        assert!(!shown.contains(secret), "{shown}");
        let number = u128::from_str_radix(secret, 16).unwrap();
        assert!(!shown.contains(&number.to_string()), "{shown}");
    }
    waiting.abort();
}

#[test]
fn what_one_process_says_to_another_is_not_shown() {
    let asker = format!("{:032x}", 7);
    let message = Message::Told(format!("? {asker} 0 k"));
    assert_eq!(format!("{message:?}"), "Told(38 bytes)");
}

#[tokio::test]
async fn nonsense_in_an_inbox_is_passed_over_and_never_answered_at_length() {
    let server = RedisServer::start().await;
    let one = factory(server.url(), "shop-1").await;
    let _guard = hold(&one, "k").await;
    listens(&server, 1).await;
    let value: String = server.run("GET distributed-locks:k").await;
    let inbox = format!("distributed-locks:inbox:{}", &value[..32]);
    let asker = format!("{:032x}", 7);
    let () = server.run("CONFIG RESETSTAT").await;
    let crowd = " k".repeat(1_000);
    let texts = [
        "t ?".to_owned(),
        "t".to_owned(),
        "t ! 0123456789abcdef =spy 1,2,3,4".to_owned(),
        format!("t ? {asker} 0123456789abcdef{crowd}"),
        format!("t ? {asker} 0123456789abcdef {}", "k".repeat(1 << 20)),
        format!("t ? {} 0123456789abcdef k", &value[..32]),
        "t x k 99999".to_owned(),
        "t x j 1".to_owned(),
    ];
    let told = texts.len() as u64;
    for text in &texts {
        let heard: u64 = server.run_words(&["PUBLISH", &inbox, text]).await;
        assert_eq!(heard, 1);
    }
    // The same question is answered once, and asked without end it is not answered without end.
    let question = format!("t ? {asker} 00000000000000aa k");
    for _ in 0..100 {
        let _: u64 = server.run_words(&["PUBLISH", &inbox, &question]).await;
    }
    let info = shown(&one, "it is still held", "k", |info| info.holder.answered).await;
    assert!(info.holder.is_this);
    // It reads them in turn, and what it answers comes after.
    let looking = factory(server.url(), "on call").await;
    shown(&looking, "it answers", "k", |info| info.holder.answered).await;
    let published = server.calls("publish").await - told - 100;
    // One answer to the question, and those to the looks.
    assert!(published < 40, "{published}");
}

#[tokio::test]
async fn a_user_that_may_not_scan_is_told_and_has_its_locks_all_the_same() {
    const DOCUMENTED: &str = include_str!("../../src/storage/redis/acl.txt");
    let server = RedisServer::start().await;
    let () = server.run(DOCUMENTED.trim()).await;
    let url = server.url().replace("//", "//locks:password@");
    let one = factory(&url, "shop-1").await;
    let _guard = hold(&one, "k").await;
    listens(&server, 1).await;
    let looking = factory(&url, "on call").await;
    let snapshot = all_answered(&looking, 10).await;
    assert_eq!(label(&snapshot.locks[0].holder), "shop-1");
    let key = LockKey::new("k").unwrap();
    assert!(
        looking
            .inspector()
            .force_release(&key, "why not")
            .await
            .unwrap()
            .is_some()
    );

    let () = server.run(&format!("{} -scan", DOCUMENTED.trim())).await;
    let error = looking.inspector().locks(10).await.unwrap_err();
    assert_eq!(error.kind(), StorageErrorKind::Unauthorized);
    assert!(error.to_string().contains("scan"), "{error}");
    let _guard = hold(&one, "l").await;
    let info = shown(&looking, "it", "l", |info| info.holder.answered).await;
    assert_eq!(label(&info.holder), "shop-1");
    let () = server.run("ACL LOG RESET").await;
}

#[tokio::test]
async fn labels_are_bounded_and_may_be_any_text() {
    let build = |label: &str| {
        LockFactory::builder(MemoryStorage::new())
            .label(label)
            .build()
    };
    for bad in ["", &"x".repeat(129)] {
        assert_eq!(build(bad).err(), Some(InvalidSettings::Label));
    }
    let server = RedisServer::start().await;
    let looking = factory(server.url(), "-").await;
    for text in ["-", "=", "a b\nc%41 {d},e", "größe", &"x".repeat(128)] {
        let one = factory(server.url(), text).await;
        let _guard = hold(&one, "k").await;
        let info = shown(&looking, "it", "k", |info| info.holder.answered).await;
        assert_eq!(label(&info.holder), text);
    }
    let nameless = RedisStorage::connect(server.url()).await.unwrap();
    let nameless = LockFactory::new(nameless);
    let _guard = hold(&nameless, "k").await;
    let info = shown(&looking, "it", "k", |info| info.holder.answered).await;
    assert_eq!(info.holder.label, None);
}
