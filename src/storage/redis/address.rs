//! Where a server is and how we get in: the URL, the credentials, the certificates.
//!
//! redis-rs reads URLs generously: what it does not know, it passes over. Here that is refused, as
//! a `?tls=true` or a `#` in a password that is passed over means less than what was meant: no
//! encryption, or half a password.

use redis::{ConnectionAddr, ConnectionInfo, IntoConnectionInfo};

use super::stream::Dial;
#[cfg(feature = "tls")]
use super::tls::{Certificates, Tls};
use crate::error::{StorageError, StorageErrorKind};

/// What the user says of a server. Has no `Debug`: it may hold a password.
#[derive(Clone, Default)]
pub(super) struct Address {
    pub(super) url: String,
    /// Instead of those in the URL.
    pub(super) username: Option<String>,
    pub(super) password: Option<String>,
    #[cfg(feature = "tls")]
    pub(super) certificates: Certificates,
    pub(super) dial: Option<Dial>,
}

const UNREADABLE: &str =
    "the Redis URL cannot be read; it should look like redis://host:6379 or unix:///path";
const UNENCODED: &str = "the Redis URL has a `#`: in a password it is written %23, \
     and certificates are always verified, so there is no #insecure";
const UNKNOWN_PARAMETER: &str = "the Redis URL has a parameter that means nothing here; \
     TLS is asked for by rediss://, and a `?` in a password is written %3F";
const NO_TLS: &str = "the Redis URL begins with rediss:// or valkeys://: \
     that needs the feature `tls` of tower-distributed-lock";
const NO_HOST: &str = "there is a connector, but the Redis URL names a socket and no host";
const NO_PASSWORD: &str = "there is a Redis user but no password; \
     for a user without one (`nopass`) any password will do";

/// All that is said of a URL that is refused.
#[cfg(any(test, tower_distributed_lock_fuzzing))]
pub(super) const REFUSALS: &[&str] = &[
    UNREADABLE,
    UNENCODED,
    UNKNOWN_PARAMETER,
    NO_TLS,
    NO_HOST,
    NO_PASSWORD,
    #[cfg(feature = "tls")]
    super::tls::NO_HOST_NAME,
];

impl Address {
    /// What redis-rs makes of it, and rustls.
    ///
    /// # Errors
    ///
    /// The texts are all fixed: a URL that cannot be read may hold a password, and so may
    /// redis-rs's own errors about it.
    pub(super) fn read(&self) -> Result<Endpoint, StorageError> {
        self.read_by(cfg!(feature = "tls"))
    }

    fn read_by(&self, can_tls: bool) -> Result<Endpoint, StorageError> {
        let url = redis::parse_redis_url(&self.url).ok_or_else(|| refused(UNREADABLE))?;
        let known: &[&str] = match url.scheme() {
            "redis" | "rediss" | "valkey" | "valkeys" => &["protocol"],
            _ => &["protocol", "db", "user", "pass"],
        };
        if url.query_pairs().any(|(name, _)| !known.contains(&&*name)) {
            return Err(refused(UNKNOWN_PARAMETER));
        }
        if url.fragment().is_some() {
            return Err(refused(UNENCODED));
        }
        let asks_for_tls = matches!(url.scheme(), "rediss" | "valkeys");
        if asks_for_tls && !can_tls {
            return Err(refused(NO_TLS));
        }
        let info = url
            .into_connection_info()
            .map_err(|_| refused(UNREADABLE))?;
        if self.dial.is_some() && matches!(info.addr(), ConnectionAddr::Unix(_)) {
            return Err(refused(NO_HOST));
        }

        let mut settings = info.redis_settings().clone();
        if let Some(username) = &self.username {
            settings = settings.set_username(username);
        }
        if let Some(password) = &self.password {
            settings = settings.set_password(password);
        }
        if settings.username().is_some() && settings.password().is_none() {
            // redis-rs would go on as the default user.
            return Err(refused(NO_PASSWORD));
        }
        // It would send what not every user may and no server needs: CLIENT SETINFO.
        let info = info.set_redis_settings(settings.set_skip_set_lib_name());

        Ok(Endpoint {
            #[cfg(feature = "tls")]
            tls: match asks_for_tls {
                true => Some(self.certificates.read(info.addr())?),
                false => self.certificates.refuse()?,
            },
            dial: self.dial.clone(),
            info,
        })
    }
}

/// A server, and how to connect to it. Has no `Debug`: it may hold a password.
#[derive(Clone)]
pub(super) struct Endpoint {
    pub(super) info: ConnectionInfo,
    /// `None`: unencrypted.
    #[cfg(feature = "tls")]
    pub(super) tls: Option<Tls>,
    /// `None`: TCP.
    pub(super) dial: Option<Dial>,
}

impl Endpoint {
    /// Whether what goes to this server is encrypted.
    pub(super) fn is_encrypted(&self) -> bool {
        matches!(self.info.addr(), ConnectionAddr::TcpTls { .. })
    }

    /// Another server, to which one connects likewise.
    pub(super) fn at(&self, host: String, port: u16) -> Self {
        let address = match self.info.addr() {
            ConnectionAddr::TcpTls { insecure, .. } => ConnectionAddr::TcpTls {
                host,
                port,
                insecure: *insecure,
                tls_params: None,
            },
            _ => ConnectionAddr::Tcp(host, port),
        };
        let mut other = self.clone();
        other.info = other.info.set_addr(address);
        other
    }
}

pub(super) fn refused(text: &'static str) -> StorageError {
    StorageError::with_source(StorageErrorKind::Rejected, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Address {
        fn new(url: String) -> Self {
            Self {
                url,
                ..Self::default()
            }
        }
    }

    fn read(url: &str) -> Result<Endpoint, StorageError> {
        Address::new(url.to_owned()).read_by(cfg!(feature = "tls"))
    }

    #[track_caller]
    fn assert_refused(result: Result<Endpoint, StorageError>, why: &str) {
        let error = result.err().unwrap();
        assert_eq!(error.kind(), StorageErrorKind::Rejected);
        assert!(error.to_string().ends_with(why), "{error}");
        assert!(!format!("{error} {error:?}").contains("hunter2"));
    }

    #[test]
    fn a_socket_is_not_reached_by_a_connector() {
        let mut address = Address::new("unix:///socket".to_owned());
        assert!(address.read().is_ok());
        address.dial = Some(Dial::new(async |_, _| Ok(tokio::io::empty())));
        assert_refused(address.read(), NO_HOST);
    }

    #[test]
    fn a_url_is_read_to_the_letter() {
        for (url, address, user, password, database) in [
            ("redis://host", "host:6379", None, None, 0),
            ("valkey://host:7000/3", "host:7000", None, None, 3),
            (
                "redis://:p%23%3F%2F%40w@[::1]:7",
                "::1:7",
                None,
                Some("p#?/@w"),
                0,
            ),
            (
                "redis://me:pass@host/1?protocol=resp3",
                "host:6379",
                Some("me"),
                Some("pass"),
                1,
            ),
        ] {
            let endpoint = read(url).unwrap();
            assert!(!endpoint.is_encrypted(), "{url}");
            let info = endpoint.info;
            assert_eq!(info.addr().to_string(), address, "{url}");
            let settings = info.redis_settings();
            assert_eq!(settings.username(), user, "{url}");
            assert_eq!(settings.password(), password, "{url}");
            assert_eq!(settings.db(), database, "{url}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_socket_has_its_settings_in_the_query() {
        for scheme in ["unix", "redis+unix", "valkey+unix"] {
            let endpoint = read(&format!(
                "{scheme}:///run/redis.sock?db=2&user=me&pass=word"
            ));
            let info = endpoint.unwrap().info;
            assert_eq!(info.addr().to_string(), "/run/redis.sock");
            let settings = info.redis_settings();
            assert_eq!(
                (settings.username(), settings.password()),
                (Some("me"), Some("word"))
            );
            assert_eq!(settings.db(), 2);
        }
    }

    #[test]
    fn what_would_be_passed_over_is_refused() {
        assert_refused(read("redis://:hunter2#more@host"), UNREADABLE);
        for url in ["redis://host/#insecure", "redis://:hunter2@host#more"] {
            assert_refused(read(url), UNENCODED);
        }
        for url in [
            "redis://host?tls=true",
            "redis://host?pass=hunter2",
            "unix:///s?password=hunter2",
        ] {
            assert_refused(read(url), UNKNOWN_PARAMETER);
        }
        assert_refused(read("redis://hunter2@host"), NO_PASSWORD);
        assert_refused(read("unix:///socket?user=hunter2"), NO_PASSWORD);
    }

    #[test]
    fn a_user_and_a_password_beside_the_url_replace_those_in_it() {
        let mut address = Address::new("redis://old:hunter2@host".to_owned());
        address.username = Some("new".to_owned());
        address.password = Some("a#b".to_owned());
        let info = address.read().unwrap().info;
        let settings = info.redis_settings();
        assert_eq!(
            (settings.username(), settings.password()),
            (Some("new"), Some("a#b"))
        );
    }

    #[test]
    fn tls_without_the_feature_is_refused_and_named() {
        for scheme in ["rediss", "valkeys"] {
            let address = Address::new(format!("{scheme}://:hunter2@host"));
            assert_refused(address.read_by(false), NO_TLS);
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn tls_is_never_less_than_was_asked_for() {
        for scheme in ["rediss", "valkeys"] {
            assert!(read(&format!("{scheme}://host")).unwrap().is_encrypted());
            let insecure = read(&format!("{scheme}://host/#insecure"));
            assert_refused(insecure, UNENCODED);
        }
        for certificates in [
            Certificates {
                roots: b"hunter2".to_vec(),
                client: None,
            },
            Certificates {
                roots: Vec::new(),
                client: Some((b"hunter2".to_vec(), Vec::new())),
            },
        ] {
            for url in ["redis://host", "rediss://host", "unix:///socket"] {
                let mut address = Address::new(url.to_owned());
                address.certificates = certificates.clone();
                assert_eq!(
                    address.read().err().unwrap().kind(),
                    StorageErrorKind::Rejected
                );
            }
        }
    }
}
