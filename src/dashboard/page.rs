//! The page, and the headers that keep it and everything else to themselves.

use std::sync::Arc;

use axum::{
    extract::State,
    http::{
        HeaderName, HeaderValue, StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
        },
    },
    response::{IntoResponse, Response},
};

use super::{Shared, api};

/// Everything but the nonce, which is new in each answer.
pub(super) struct Page(String);

impl Page {
    pub(super) fn new(allow_release: bool) -> Self {
        let release = if allow_release { "on" } else { "off" };
        let page = include_str!("page.html")
            .replace("{{release}}", release)
            .replace("{{style}}", include_str!("page.css"))
            .replace("{{script}}", include_str!("page.js"));
        Self(page)
    }
}

pub(super) async fn page(State(shared): State<Arc<Shared>>) -> Response {
    let mut nonce = [0; 16];
    if getrandom::fill(&mut nonce).is_err() {
        let why = "the operating system gives no random numbers";
        return api::error(StatusCode::INTERNAL_SERVER_ERROR, why);
    }
    let nonce = format!("{:032x}", u128::from_ne_bytes(nonce));
    // Only what is in the document itself may run, and no text may become markup.
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    );
    let headers = [
        (CONTENT_TYPE, "text/html; charset=utf-8".to_owned()),
        (CONTENT_SECURITY_POLICY, policy),
    ];
    (headers, shared.page.0.replace("{{nonce}}", &nonce)).into_response()
}

/// The headers of all answers.
pub(super) async fn secure(mut response: Response) -> Response {
    const ALL: [(HeaderName, &str); 6] = [
        (CACHE_CONTROL, "no-store"),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (X_FRAME_OPTIONS, "DENY"),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        (
            CONTENT_SECURITY_POLICY,
            "default-src 'none'; frame-ancestors 'none'",
        ),
    ];
    for (name, value) in ALL {
        response
            .headers_mut()
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_loads_nothing() {
        for allow_release in [false, true] {
            let Page(page) = Page::new(allow_release);
            assert_eq!(page.matches("{{").count(), 2, "the two nonces are left");
            assert_eq!(page.matches("{{nonce}}").count(), 2);
            assert_eq!(page.matches("</script>").count(), 1);
            assert_eq!(page.matches("</style>").count(), 1);
            for foreign in ["src=", "url(", "@import", "//cdn", "https:"] {
                assert!(!page.contains(foreign), "{foreign}");
            }
            for markup in [
                "innerHTML",
                "outerHTML",
                "insertAdjacent",
                "document.write",
                "style=",
            ] {
                assert!(!page.contains(markup), "{markup}");
            }
        }
    }
}
