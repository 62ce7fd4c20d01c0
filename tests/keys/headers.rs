//! Keys from headers and from gRPC metadata.

use http::HeaderValue;
use proptest::prelude::*;
use tower_distributed_lock::middleware::key::HeaderError;

use super::*;

const ACCOUNT: HeaderName = HeaderName::from_static("x-account");
const BINARY: HeaderName = HeaderName::from_static("account-bin");

fn request(name: &HeaderName, values: &[&[u8]]) -> http::Request<()> {
    let mut request = http::Request::new(());
    for value in values {
        let value = HeaderValue::from_bytes(value).unwrap();
        request.headers_mut().append(name.clone(), value);
    }
    request
}

fn key<F>(function: &F, name: &HeaderName, values: &[&[u8]]) -> Result<RequestKey, BoxError>
where
    F: KeyFunction<http::Request<()>>,
{
    function.request_key(&mut request(name, values))
}

fn account(account: &[u8]) -> RequestKey {
    RequestKey::one(LockKey::from_parts([b"accounts", account]).unwrap())
}

#[track_caller]
fn refused(result: Result<RequestKey, BoxError>, why: &HeaderError) {
    let error = result.unwrap_err();
    assert_eq!(error.downcast_ref(), Some(why), "{error}");
}

#[test]
fn a_header_is_a_key_if_it_is_there_once() {
    let header = header("accounts", ACCOUNT);
    for value in [
        &b"17"[..],
        b"a/b",
        b"%2F",
        b"..",
        b"{x}",
        b"\xff\xfe",
        b"a, b",
    ] {
        assert_eq!(key(&header, &ACCOUNT, &[value]).unwrap(), account(value));
    }
    refused(key(&header, &ACCOUNT, &[]), &HeaderError::Missing(ACCOUNT));
    refused(key(&header, &ACCOUNT, &[b""]), &HeaderError::Empty(ACCOUNT));
    refused(
        key(&header, &ACCOUNT, &[b"1", b"1"]),
        &HeaderError::Several(ACCOUNT),
    );
    let long = key(&header, &ACCOUNT, &[&[b'x'; 10_000]]).unwrap_err();
    assert_eq!(long.downcast_ref(), Some(&InvalidKey::TooLong));
}

#[test]
fn binary_metadata_counts_by_its_bytes() {
    let metadata = metadata("accounts", BINARY);
    for spelling in [&b"YS9i/w"[..], b"YS9i/w=="] {
        assert_eq!(
            key(&metadata, &BINARY, &[spelling]).unwrap(),
            account(b"a/b\xff")
        );
    }
    for bad in [
        &b"a"[..],
        b"YS9i_w",
        b"YS9i,YS9i",
        b"YS9i/x",
        b"YQ===",
        b"Y Q",
    ] {
        refused(
            key(&metadata, &BINARY, &[bad]),
            &HeaderError::NotBase64(BINARY),
        );
    }
    refused(key(&metadata, &BINARY, &[]), &HeaderError::Missing(BINARY));
    refused(
        key(&metadata, &BINARY, &[b"YQ", b"YQ"]),
        &HeaderError::Several(BINARY),
    );
}

#[test]
fn metadata_that_is_text_counts_as_it_is_written() {
    let metadata = metadata("accounts", ACCOUNT);
    assert_eq!(
        key(&metadata, &ACCOUNT, &[b"YQ=="]).unwrap(),
        account(b"YQ==")
    );
}

proptest! {
    /// What tonic's clients send, we read as its servers do.
    #[test]
    fn binary_metadata_is_what_tonic_means_by_it(bytes in prop::collection::vec(any::<u8>(), 1..30)) {
        let value = tonic::metadata::MetadataValue::from_bytes(&bytes);
        let key = key(&metadata("accounts", BINARY), &BINARY, &[value.as_encoded_bytes()]);
        prop_assert_eq!(key.unwrap(), account(&bytes));
    }

    #[test]
    fn what_we_read_tonic_reads_in_the_same_way(text in "[A-Za-z0-9+/]{1,9}={0,3}") {
        let value = HeaderValue::from_str(&text).unwrap();
        let mut headers = http::HeaderMap::new();
        headers.insert(BINARY, value);
        let theirs = tonic::metadata::MetadataMap::from_headers(headers);
        let theirs = theirs.get_bin(BINARY.as_str()).unwrap().to_bytes();
        let ours = key(&metadata("accounts", BINARY), &BINARY, &[text.as_bytes()]);
        if let Ok(ours) = ours {
            prop_assert_eq!(ours, account(&theirs.unwrap()));
        }
    }
}
