//! What `Debug` shows of what has a token in it: nothing of that.

use std::{
    fmt::Debug,
    sync::{Arc, Mutex},
};

use tower_distributed_lock::{
    error::StorageError,
    storage::{
        AcquireReply, AcquireRequest, Inbox, LockName, LockOwner, LockRecord, LockStorage, Message,
        OwnerToken, RaiseReply, RaiseRequest, ReleaseReply, ReleaseRequest, RenewReply,
        RenewRequest, Survey, SurveyRequest,
    },
};

use super::{
    kit::{LIMIT, LONG, RedisServer, asking, is_queued, patient, within},
    *,
};

/// Writes down all that goes through it, as `Debug` has it.
#[derive(Clone)]
struct Spy {
    storage: Arc<RedisStorage>,
    seen: Arc<Mutex<String>>,
}

impl Spy {
    fn see<T: Debug>(&self, what: T) -> T {
        let text = format!("{what:?} {what:#?}\n");
        self.seen.lock().unwrap().push_str(&text);
        what
    }
}

impl LockStorage for Spy {
    async fn acquire(&self, request: &AcquireRequest) -> Result<AcquireReply, StorageError> {
        self.see(self.storage.acquire(self.see(request)).await)
    }
    async fn renew(&self, requests: &[RenewRequest]) -> Vec<Result<RenewReply, StorageError>> {
        self.see(self.storage.renew(self.see(requests)).await)
    }
    async fn release(&self, request: &ReleaseRequest) -> Result<ReleaseReply, StorageError> {
        self.see(self.storage.release(self.see(request)).await)
    }
    async fn listen(&self, inbox: Inbox) {
        self.storage.listen(self.see(inbox)).await;
    }
    async fn raise(&self, request: &RaiseRequest) -> Result<RaiseReply, StorageError> {
        self.see(self.storage.raise(self.see(request)).await)
    }
    async fn survey(&self, request: &SurveyRequest) -> Result<Survey, StorageError> {
        self.see(self.storage.survey(self.see(request)).await)
    }
    async fn look(&self, name: &LockName) -> Result<Option<LockRecord>, StorageError> {
        self.see(self.storage.look(self.see(name)).await)
    }
    async fn force_release(&self, seen: &LockRecord) -> Result<ReleaseReply, StorageError> {
        self.see(self.storage.force_release(self.see(seen)).await)
    }
    async fn tell(&self, prefix: &str, inbox: u128, text: &str) -> Result<bool, StorageError> {
        self.storage.tell(prefix, inbox, text).await
    }
}

/// Neither as it is in Redis nor as a number.
#[track_caller]
fn assert_no_inbox(text: &str, inbox: &str) {
    let number = u128::from_str_radix(inbox, 16).unwrap();
    for shown in [inbox.to_owned(), number.to_string(), format!("{number:X}")] {
        assert!(!text.contains(&shown), "{shown} is in {text}");
    }
}

#[tokio::test]
async fn nothing_that_is_passed_to_a_storage_shows_its_tokens() {
    let server = RedisServer::start().await;
    let spy = Spy {
        storage: Arc::new(url(&server).connect().await.unwrap()),
        seen: Arc::default(),
    };
    let (here, there) = (LockFactory::new(spy.clone()), factory(url(&server)));
    let short = asking(ms(300), LIMIT, ms(50));
    let guard = here.create_lock("k").unwrap().lock(short).await.unwrap();
    let value: String = server.run("GET distributed-locks:k").await;
    let waiting = tokio::spawn(there.create_lock("k").unwrap().lock(patient()));
    is_queued(&server, "k", 1).await;
    let queue: String = server.run("GET {distributed-locks:k}:queue").await;
    let looked = within(LIMIT, "the look", here.inspector().locks(10)).await;
    spy.see(looked.unwrap());
    // Renewed, given to the other and taken back from it by force.
    tokio::time::sleep(ms(150)).await;
    drop(guard);
    let given = within(LIMIT, "the lock", waiting).await.unwrap().unwrap();
    let mine = tokio::spawn(
        here.create_lock("k")
            .unwrap()
            .lock(asking(LONG, LIMIT, ms(50))),
    );
    is_queued(&server, "k", 1).await;
    let key = tower_distributed_lock::LockKey::new("k").unwrap();
    let taken = here.inspector().force_release(&key, "a test").await;
    spy.see(taken.unwrap().unwrap());
    drop(within(LIMIT, "the lock", mine).await.unwrap().unwrap());
    spy.see((&given, &here, &there, here.inspector()));

    let seen = spy.seen.lock().unwrap();
    for word in [
        "Granted",
        "Held",
        "RenewRequest",
        "LockRecord",
        "Inbox",
        "Survey",
    ] {
        assert!(seen.contains(word), "{word} is not in {seen}");
    }
    for text in [value, queue] {
        assert_no_inbox(&seen, &text[..32]);
    }
}

#[test]
fn nothing_that_a_storage_tells_shows_a_token() {
    let inbox = 0xABCD_EF01_2345_6789_ABCD_EF01_2345_6789_u128;
    let token = OwnerToken::from_text(&format!("{inbox:032x}:7")).unwrap();
    let owners = [
        LockOwner::from(token),
        LockOwner::from_value(b"abcdef0123456789abcdef"),
    ];
    let text = format!("{inbox:032x}");
    let shown = format!("{token:?} {owners:?} {:?}", Message::Told(text.clone()));
    assert_no_inbox(&shown, &text);
    assert!(!shown.contains("abcdef0123456789"), "{shown}");
}
