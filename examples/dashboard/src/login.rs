//! Basic authentication: stands for the login that a service has.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::STANDARD};
use subtle::ConstantTimeEq;
use tower_distributed_lock::error::BoxError;
use tracing::{Instrument, info_span};

/// One password for all. The name with it is up to them: it is what the log says.
#[derive(Clone)]
pub(crate) struct Login {
    password: Arc<str>,
}

impl Login {
    pub(crate) fn new(password: String) -> Self {
        Self {
            password: password.into(),
        }
    }

    pub(crate) fn made_up() -> Result<(Self, String), BoxError> {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes)?;
        let password = format!("{:016x}", u64::from_ne_bytes(bytes));
        Ok((Self::new(password.clone()), password))
    }

    /// Who has sent this, if they know the password.
    fn name(&self, headers: &HeaderMap) -> Option<String> {
        let header = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
        let (scheme, encoded) = header.split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("basic") {
            return None;
        }
        let pair = String::from_utf8(STANDARD.decode(encoded).ok()?).ok()?;
        let (name, password) = pair.split_once(':')?;
        let same: bool = password.as_bytes().ct_eq(self.password.as_bytes()).into();
        same.then(|| name.to_owned())
    }
}

/// The middleware.
pub(crate) async fn demand(State(login): State<Login>, request: Request, next: Next) -> Response {
    match login.name(request.headers()) {
        // What happens in there is logged with the name: also who took which lock away.
        Some(name) => {
            next.run(request)
                .instrument(info_span!("admin", name))
                .await
        }
        None => {
            let challenge = [(header::WWW_AUTHENTICATE, "Basic realm=\"locks\"")];
            (StatusCode::UNAUTHORIZED, challenge).into_response()
        }
    }
}
