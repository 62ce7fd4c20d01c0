//! TLS: whose certificates are trusted, which one is ours, and what its errors mean.
//!
//! redis-rs makes the connection, by rustls. It takes the cryptography that the process has chosen
//! for rustls, and panics where there is no choice; so one is made here, if nobody has.

use std::{error::Error as StdError, fmt, io, sync::Arc};

use redis::{Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo, RedisError, TlsCertificates};
use rustls::{
    AlertDescription, CertificateError, InvalidMessage,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
};

use super::address::refused;
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
    /// Puts them into a server's address. What cannot be used is refused here, not when the first
    /// connection is made.
    pub(super) fn add_to(
        &self,
        info: ConnectionInfo,
        asks_for_tls: bool,
    ) -> Result<ConnectionInfo, StorageError> {
        if !asks_for_tls {
            if !self.roots.is_empty() || self.client.is_some() {
                return Err(refused(
                    "there are certificates, but the Redis URL does not ask for TLS: it should \
                     begin with rediss://",
                ));
            }
            return Ok(info);
        }
        if let ConnectionAddr::TcpTls { host, .. } = info.addr()
            && ServerName::try_from(host.as_str()).is_err()
        {
            return Err(refused(NO_HOST_NAME));
        }
        if CryptoProvider::get_default().is_none() {
            // Another thread may have been faster.
            let _ = ring::default_provider().install_default();
        }

        if !self.roots.is_empty() && !are_certificates(&self.roots) {
            return Err(refused("there is no PEM certificate to trust"));
        }
        if let Some((certificate, key)) = &self.client
            && !(are_certificates(certificate) && PrivateKeyDer::from_pem_slice(key).is_ok())
        {
            return Err(refused(
                "the client's certificate or its key is not what PEM should be",
            ));
        }
        let client_tls = self.client.as_ref().map(|(certificate, key)| {
            let (client_cert, client_key) = (certificate.clone(), key.clone());
            ClientTlsConfig {
                client_cert,
                client_key,
            }
        });
        let certificates = TlsCertificates {
            client_tls,
            root_cert: (!self.roots.is_empty()).then(|| self.roots.clone()),
        };
        let client = Client::build_with_tls(info, certificates)
            .map_err(|_| refused("the certificates cannot be used"))?;
        Ok(client.get_connection_info().clone())
    }
}

fn are_certificates(pem: &[u8]) -> bool {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    certificates.is_ok_and(|certificates| !certificates.is_empty())
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
