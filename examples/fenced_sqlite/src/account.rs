//! A row that several processes write: the part to copy.

use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::{Connection, OptionalExtension};
use tower_distributed_lock::error::BoxError;

/// How a holder reads and writes. `?1` is the account, `?2` the holder's token, `?3` the balance.
pub(crate) struct Statements {
    read: &'static str,
    write: &'static str,
}

/// Each is one statement, so nothing comes between its condition and its effect.
///
/// A holder leaves its token when it reads: from then on no earlier holder can change what it read.
/// Left by the write alone, the token would be too late for a write of A's that comes between B's
/// read and B's write. It would be taken, and B, which has not seen it, would overwrite it.
pub(crate) const FENCED: Statements = Statements {
    read: "UPDATE accounts SET fence = ?2 WHERE id = ?1 AND fence <= ?2 RETURNING balance",
    write: "UPDATE accounts SET balance = ?3, fence = ?2 WHERE id = ?1 AND fence <= ?2",
};

/// The same without the conditions, to show that it is they who keep the balance right.
pub(crate) const UNFENCED: Statements = Statements {
    read: "UPDATE accounts SET fence = ?2 WHERE id = ?1 RETURNING balance",
    write: "UPDATE accounts SET balance = ?3, fence = ?2 WHERE id = ?1",
};

pub(crate) struct Account {
    pub(crate) id: i64,
    pub(crate) sql: Statements,
    /// A service would have a pool here.
    pub(crate) connection: Arc<Mutex<Connection>>,
}

impl Account {
    /// The balance, or `None` if a later holder has been here.
    pub(crate) async fn read(&self, token: i64) -> Result<Option<i64>, BoxError> {
        let (sql, id) = (self.sql.read, self.id);
        let read = move |db: &Connection| db.query_row(sql, [id, token], |row| row.get(0));
        self.run(move |db| read(db).optional()).await
    }

    /// Whether the balance was written. A later holder's row is not changed: that is the refusal.
    pub(crate) async fn write(&self, token: i64, balance: i64) -> Result<bool, BoxError> {
        let (sql, id) = (self.sql.write, self.id);
        let write = move |db: &Connection| db.execute(sql, [id, token, balance]);
        Ok(self.run(write).await? == 1)
    }

    /// rusqlite blocks its thread until the disk has answered. A thread of the runtime has other
    /// requests to serve meanwhile, and locks to renew, so it is done on another thread.
    ///
    /// What runs there runs to its end, also when the handler that waits for it is dropped because
    /// its lock is lost: one more late writer that only the store can refuse.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, BoxError> {
        let connection = Arc::clone(&self.connection);
        let work = move || work(&connection.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(tokio::task::spawn_blocking(work).await??)
    }
}
