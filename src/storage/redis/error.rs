//! Redis errors as storage errors.

use redis::{ErrorKind, RedisError, ServerErrorKind, Value};

use crate::error::{BoxError, StorageError, StorageErrorKind};

/// Why a command brought no value.
pub(super) enum Failure {
    /// The script is not in the server's cache.
    NoScript,
    Storage(StorageError),
}

impl From<RedisError> for Failure {
    fn from(error: RedisError) -> Self {
        match error.kind() {
            ErrorKind::Server(ServerErrorKind::NoScript) => Self::NoScript,
            _ => Self::Storage(storage_error(error)),
        }
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

impl From<Failure> for StorageError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::NoScript => unexpected(),
            Failure::Storage(error) => error,
        }
    }
}

/// What a command brought.
pub(super) fn value(value: Value) -> Result<Value, Failure> {
    match value {
        Value::ServerError(error) => Err(RedisError::from(error).into()),
        value => Ok(value),
    }
}

/// A storage error of the same meaning.
pub(super) fn storage_error(error: RedisError) -> StorageError {
    StorageError::with_source(kind(&error), cause(error))
}

/// The same for an error in making a connection, where a time-out leaves nothing open.
pub(super) fn connect_error(error: RedisError) -> StorageError {
    #[cfg(feature = "tls")]
    if let Some(error) = super::tls::tls_error(&error) {
        return error;
    }
    match kind(&error) {
        StorageErrorKind::Timeout => {
            StorageError::with_source(StorageErrorKind::Unavailable, cause(error))
        }
        kind => StorageError::with_source(kind, cause(error)),
    }
}

/// What may be told of an error: not what a server repeats of the command that it was sent, which
/// may be a password or a token, nor whom it takes us for.
fn cause(error: RedisError) -> BoxError {
    let Some(told) = error.detail().and_then(without_what_is_ours) else {
        return error.into();
    };
    match error.code() {
        Some(code) => format!("{code}: {told}").into(),
        None => told.into(),
    }
}

/// `None`: all of it may be told.
fn without_what_is_ours(detail: &str) -> Option<String> {
    // User locks has no permissions to run the 'get' command
    if let Some(rest) = detail.strip_prefix("User ")
        && let Some(at) = rest.find(" has no permissions")
    {
        return Some(["this user", &rest[at..]].concat());
    }
    // unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'user' 'password'
    let mut quotes = detail.match_indices(['\'', '`', '"']);
    let (_, (end, quote)) = (quotes.next()?, quotes.next()?);
    quotes.next()?;
    Some(detail[..end + quote.len()].to_owned())
}

fn kind(error: &RedisError) -> StorageErrorKind {
    if error.is_timeout() {
        return StorageErrorKind::Timeout;
    }
    match error.kind() {
        ErrorKind::Io => StorageErrorKind::Unavailable,
        ErrorKind::AuthenticationFailed | ErrorKind::Server(ServerErrorKind::NoPerm) => {
            StorageErrorKind::Unauthorized
        }
        ErrorKind::Server(
            ServerErrorKind::BusyLoading
            | ServerErrorKind::TryAgain
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::MasterDown
            | ServerErrorKind::ReadOnly,
        ) => StorageErrorKind::Unavailable,
        _ => match code(error) {
            Some("NOAUTH" | "WRONGPASS" | "NOPERM") => StorageErrorKind::Unauthorized,
            Some("WRONGTYPE") => StorageErrorKind::WrongType,
            // How Redis before 7 reports it from inside a script.
            Some("ERR") if says(error, "WRONGTYPE") => StorageErrorKind::WrongType,
            // How all of them report what the user may not do inside a script.
            Some("ERR")
                if says(error, "user executing the script can't")
                    || says(error, "ACL failure in script") =>
            {
                StorageErrorKind::Unauthorized
            }
            // A busy script, a full memory, a failed snapshot, missing replicas, a server that
            // became one: all of them may heal.
            Some("BUSY" | "OOM" | "MISCONF" | "NOREPLICAS" | "READONLY" | "UNBLOCKED") => {
                StorageErrorKind::Unavailable
            }
            _ if error.is_unrecoverable_error() => StorageErrorKind::Unavailable,
            _ => StorageErrorKind::Rejected,
        },
    }
}

/// The server's code; for what a command inside a script brought, that command's, or `ERR`.
fn code(error: &RedisError) -> Option<&str> {
    code_in_script(error).or_else(|| {
        error
            .code()
            .map(|code| if is_place(code) { "ERR" } else { code })
    })
}

/// Redis before 7 puts the error of a command inside a script into one of the script: `ERR Error
/// running script (call to f_..): @user_script:7: @user_script: 7: -OOM command not allowed ..`, or
/// `@user_script: 7: -OOM ..` if the script itself answers it.
fn code_in_script(error: &RedisError) -> Option<&str> {
    let detail = error.detail()?;
    if !is_place(error.code()?) && !detail.starts_with("Error running script ") {
        return None;
    }
    let (_, inner) = detail.split_once(": -")?;
    inner.split_ascii_whitespace().next()
}

/// A line of a script, where a code should be.
fn is_place(code: &str) -> bool {
    code.starts_with("@user_script")
}

fn says(error: &RedisError, text: &str) -> bool {
    error.detail().is_some_and(|detail| detail.contains(text))
}

/// Whether the connection that brought this error should carry no further commands: it is broken,
/// or its server is no longer one that can be written to.
pub(super) fn ends_connection(error: &RedisError) -> bool {
    error.is_unrecoverable_error()
        || error.is_connection_dropped()
        || matches!(error.kind(), ErrorKind::Server(ServerErrorKind::ReadOnly))
        || code_in_script(error) == Some("READONLY")
}

/// A reply of a shape that the command does not have.
pub(super) fn unexpected() -> StorageError {
    // Not a kind that means "not done": nobody knows what was.
    StorageError::with_source(
        StorageErrorKind::Unavailable,
        "a reply that the command cannot give",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extension(line: &str) -> RedisError {
        match redis::parse_redis_value(line.as_bytes()) {
            Ok(Value::ServerError(error)) => error.into(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_redis_before_7_says_of_a_command_inside_a_script_is_understood() {
        for (inner, expected, ends) in [
            (
                "@user_script: 7: -NOREPLICAS Not enough good replicas to write.",
                StorageErrorKind::Unavailable,
                false,
            ),
            (
                "@user_script: 7: -OOM command not allowed when used memory > 'maxmemory'.",
                StorageErrorKind::Unavailable,
                false,
            ),
            (
                "@user_script: 7: -READONLY You can't write against a read only replica.",
                StorageErrorKind::Unavailable,
                true,
            ),
            (
                "@user_script: 7: The user executing the script can't run this command",
                StorageErrorKind::Unauthorized,
                false,
            ),
            (
                "WRONGTYPE Operation against a key holding the wrong kind of value",
                StorageErrorKind::WrongType,
                false,
            ),
            (
                "@user_script: 7: bad argument",
                StorageErrorKind::Rejected,
                false,
            ),
        ] {
            let detail = format!("Error running script (call to f_7): @user_script:7: {inner}");
            let kind = ErrorKind::Server(ServerErrorKind::ResponseError);
            let error = RedisError::from((kind, "An error was signalled", detail));
            assert_eq!(ends_connection(&error), ends, "{inner}");
            assert_eq!(storage_error(error).kind(), expected, "{inner}");

            // The same as the answer of the script.
            let Some(detail) = inner.strip_prefix("@user_script: ") else {
                continue;
            };
            let error = extension(&format!("-@user_script: {detail}\r\n"));
            assert_eq!(error.code(), Some("@user_script:"));
            assert_eq!(ends_connection(&error), ends, "{inner}");
            assert_eq!(storage_error(error).kind(), expected, "{inner}");
        }
    }
}
