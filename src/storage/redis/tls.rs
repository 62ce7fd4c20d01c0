//! TLS: whose certificates are trusted, which one is ours, and what its errors mean.
//!
//! The cryptography is what the process has chosen for rustls, or ring's if it has not.

use std::{error::Error as StdError, fmt, io, sync::Arc};

use redis::{ConnectionAddr, RedisError};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, InvalidMessage, RootCertStore,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};
use tokio_rustls::TlsConnector;

use super::{
    address::refused,
    stream::{Speak, Stream},
};
use crate::error::{StorageError, StorageErrorKind};

/// What the user wants beside the system's own certificates.
#[derive(Clone, Default)]
pub(super) struct Certificates {
    /// Who is trusted, instead of those whom the system trusts. PEM.
    pub(super) roots: Vec<u8>,
    /// Our certificate and its key. PEM.
    pub(super) client: Option<(Vec<u8>, Vec<u8>)>,
}

pub(super) const NO_HOST_NAME: &str =
    "the host of the Redis URL is not a name that a certificate can have";

impl Certificates {
    /// How to speak TLS with a server there. What cannot be used is refused here, not when the first connection is made.
    pub(super) fn read(&self, address: &ConnectionAddr) -> Result<Tls, StorageError> {
        if let ConnectionAddr::TcpTls { host, .. } = address
            && ServerName::try_from(host.as_str()).is_err()
        {
            return Err(refused(NO_HOST_NAME));
        }
        let unusable = |_| refused("the certificates cannot be used");
        // What the process has chosen for rustls, if it has.
        let provider = CryptoProvider::get_default().cloned();
        let provider = provider.unwrap_or_else(|| Arc::new(ring::default_provider()));
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(unusable)?
            .with_root_certificates(self.roots()?);
        let config = match &self.client {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => {
                let text = "the client's certificate or its key is not what PEM should be";
                let certificates = certificates(certificate).ok_or_else(|| refused(text))?;
                let key = PrivateKeyDer::from_pem_slice(key).map_err(|_| refused(text))?;
                config
                    .with_client_auth_cert(certificates, key)
                    .map_err(unusable)?
            }
        };
        Ok(Tls(Arc::new(config)))
    }

    fn roots(&self) -> Result<RootCertStore, StorageError> {
        let mut roots = RootCertStore::empty();
        if self.roots.is_empty() {
            let system = rustls_native_certs::load_native_certs();
            if system.certs.is_empty() && !system.errors.is_empty() {
                return Err(refused("the system's certificates cannot be read"));
            }
            // There may be some that rustls cannot use.
            roots.add_parsable_certificates(system.certs);
            return Ok(roots);
        }
        let none = "there is no PEM certificate to trust";
        for certificate in certificates(&self.roots).ok_or_else(|| refused(none))? {
            let unusable = |_| refused("the certificates cannot be used");
            roots.add(certificate).map_err(unusable)?;
        }
        Ok(roots)
    }

    /// There must be none for a server that is spoken to without TLS.
    pub(super) fn refuse(&self) -> Result<Option<Tls>, StorageError> {
        match self.roots.is_empty() && self.client.is_none() {
            true => Ok(None),
            false => Err(refused(
                "there are certificates, but the Redis URL does not ask for TLS: it should begin with rediss://",
            )),
        }
    }
}

/// What one speaks TLS with.
#[derive(Clone)]
pub(super) struct Tls(Arc<ClientConfig>);

impl Speak for Tls {
    /// Makes sure that it is the host that it should be.
    async fn speak(&self, host: &str, stream: impl Stream) -> io::Result<Box<dyn Stream>> {
        let host = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        let tls = TlsConnector::from(Arc::clone(&self.0));
        Ok(Box::new(tls.connect(host, stream).await?))
    }
}

/// `None`: there are none, or something is wrong with them.
fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    certificates
        .ok()
        .filter(|certificates| !certificates.is_empty())
}

/// What went wrong between us and the server, if it was TLS: none of it heals by asking again.
pub(super) fn tls_error(error: &RedisError) -> Option<StorageError> {
    let error = find(error)?;
    let kind = match error {
        // Bytes were damaged on their way, or the server ends.
        rustls::Error::DecryptError
        | rustls::Error::AlertReceived(
            AlertDescription::CloseNotify
            | AlertDescription::UserCanceled
            | AlertDescription::InternalError,
        ) => StorageErrorKind::Unavailable,
        _ => StorageErrorKind::Rejected,
    };
    Some(StorageError::with_source(kind, TlsError(error.clone())))
}

/// redis-rs and std each wrap it once.
fn find(error: &RedisError) -> Option<&rustls::Error> {
    let source = error.source()?;
    let error = match source.downcast_ref::<Arc<dyn StdError + Send + Sync>>() {
        Some(inner) => &**inner as &(dyn StdError + 'static),
        None => source,
    };
    if let Some(error) = error.downcast_ref() {
        return Some(error);
    }
    error.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref()
}

#[derive(Debug)]
struct TlsError(rustls::Error);

impl fmt::Display for TlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            rustls::Error::InvalidCertificate(reason) => {
                f.write_str("TLS: the server's certificate is not accepted: ")?;
                match reason {
                    CertificateError::UnknownIssuer => {
                        f.write_str("nobody who is trusted here has issued it")
                    }
                    reason => write!(f, "{reason}"),
                }
            }
            rustls::Error::AlertReceived(alert) => {
                write!(f, "TLS: the server does not accept us: {alert:?}")
            }
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
                f.write_str("TLS: the server does not speak it on this port")
            }
            error => write!(f, "TLS: {error}"),
        }
    }
}

impl StdError for TlsError {}
