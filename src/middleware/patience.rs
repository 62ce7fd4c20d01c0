//! How long a client waits for its answer, if it says so.

use std::time::Duration;

use http::{HeaderMap, Request};

use crate::middleware::on_reject::Protocol;

/// How long a request may wait for its lock, by what its client says: the
/// [`grpc-timeout`](https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md) of a gRPC
/// request, less a margin. `None` if the client does not say, or in a way that cannot be read, and
/// for other protocols.
///
/// The margin is a tenth of the time-out, but 2 ms at least and 100 ms at most: it is there for the
/// answer's way back, so that the client hears that the resource is locked before it gives up. Zero
/// means that there is no time to wait at all: such a request is rejected without asking the
/// storage.
///
/// The hooks of a layer say it for HTTP requests unless both are replaced by some that do not:
/// [`OnReject::patience`](super::OnReject::patience) and
/// [`OnAcquired::patience`](super::OnAcquired::patience). A hook of your own returns it from there.
pub fn client_patience<B>(request: &Request<B>) -> Option<Duration> {
    // Few requests carry the header, so it is looked at first.
    let timeout = grpc_timeout(request.headers())?;
    (Protocol::of(request) == Protocol::Grpc).then(|| timeout.saturating_sub(margin(timeout)))
}

/// What is less, of what is known.
pub(super) fn shorter(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (known, None) | (None, known) => known,
    }
}

fn margin(timeout: Duration) -> Duration {
    (timeout / 10).clamp(Duration::from_millis(2), Duration::from_millis(100))
}

/// 1 to 8 digits and a unit. What does not look like that is ignored, as tonic does.
fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let (unit, digits) = headers.get("grpc-timeout")?.as_bytes().split_last()?;
    if !(1..=8).contains(&digits.len()) {
        return None;
    }
    let mut value = 0;
    for digit in digits {
        value = value * 10 + u64::from(char::from(*digit).to_digit(10)?);
    }
    Some(match unit {
        b'H' => Duration::from_secs(value * 60 * 60),
        b'M' => Duration::from_secs(value * 60),
        b'S' => Duration::from_secs(value),
        b'm' => Duration::from_millis(value),
        b'u' => Duration::from_micros(value),
        b'n' => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn patience(content_type: &str, timeout: &str) -> Option<Duration> {
        let request = Request::post("/")
            .header("content-type", content_type)
            .header("grpc-timeout", timeout);
        client_patience(&request.body(()).unwrap())
    }

    #[test]
    fn a_grpc_timeout_is_read_in_all_its_units() {
        let read = |timeout: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", timeout.parse().unwrap());
            grpc_timeout(&headers)
        };
        for (text, timeout) in [
            ("2H", Duration::from_secs(7_200)),
            ("3M", Duration::from_secs(180)),
            ("0S", Duration::ZERO),
            ("00000042S", Duration::from_secs(42)),
            ("250m", Duration::from_millis(250)),
            ("99999999u", Duration::from_micros(99_999_999)),
            ("1n", Duration::from_nanos(1)),
            ("99999999H", Duration::from_secs(99_999_999 * 3_600)),
        ] {
            assert_eq!(read(text), Some(timeout), "{text}");
        }
        for bad in [
            "",
            "S",
            "1",
            "42",
            "+1S",
            "-1S",
            "1.5S",
            "1s",
            "1h",
            "1 S",
            "123456789S",
            "1SS",
            " 1S",
        ] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
        let mut headers = HeaderMap::new();
        headers.insert(
            "grpc-timeout",
            http::HeaderValue::from_bytes(b"\xb2S").unwrap(),
        );
        assert_eq!(grpc_timeout(&headers), None);
    }

    proptest! {
        #[test]
        fn a_timeout_is_digits_and_a_unit_and_all_else_is_nothing(
            value in prop_oneof![
                "[0-9]{0,10}[HMSmunhs]?",
                "[+-]?[0-9]{1,8} ?[HMSmun]{1,2}",
                "[ -~]{0,12}",
            ],
        ) {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", value.parse().unwrap());
            let nanos = value.chars().last().and_then(|unit| {
                let units = [('H', 3_600_000_000_000_u128), ('M', 60_000_000_000), ('S', 1_000_000_000),
                    ('m', 1_000_000), ('u', 1_000), ('n', 1)];
                let (_, nanos) = units.into_iter().find(|(known, _)| *known == unit)?;
                let digits = value.strip_suffix(unit)?;
                let is_right = (1..=8).contains(&digits.len()) && digits.chars().all(|it| it.is_ascii_digit());
                is_right.then(|| digits.parse::<u128>().unwrap() * nanos)
            });
            prop_assert_eq!(grpc_timeout(&headers).map(|timeout| timeout.as_nanos()), nanos);
        }
    }

    #[test]
    fn the_client_gets_its_answer_before_it_gives_up() {
        let ms = Duration::from_millis;
        for (timeout, wait) in [
            ("0m", ms(0)),
            ("2m", ms(0)),
            ("3m", ms(1)),
            ("20m", ms(18)),
            ("500m", ms(450)),
            ("1S", ms(900)),
            ("1M", ms(59_900)),
        ] {
            assert_eq!(
                patience("application/grpc", timeout),
                Some(wait),
                "{timeout}"
            );
        }
    }

    #[test]
    fn only_grpc_requests_have_a_grpc_timeout() {
        assert_eq!(patience("application/json", "1S"), None);
        assert_eq!(patience("application/grpc+proto", "1x"), None);
    }
}
