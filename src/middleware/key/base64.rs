//! Base64 as gRPC has it in binary metadata: the standard alphabet, with padding or without.

/// What `text` says, if it is base64. Bits that no byte uses have to be 0, so that bytes have one
/// spelling, apart from the padding.
pub(super) fn decode(text: &[u8]) -> Option<Vec<u8>> {
    let digits = match text {
        [digits @ .., b'=', b'='] if text.len().is_multiple_of(4) => digits,
        [digits @ .., b'='] if text.len().is_multiple_of(4) => digits,
        digits => digits,
    };
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for group in digits.chunks(4) {
        let mut bits = 0;
        for &digit in group {
            bits = bits << 6 | value(digit)?;
        }
        let decoded: [u8; 4] = (bits << (32 - 6 * group.len())).to_be_bytes();
        let (used, unused) = decoded.split_at(group.len() * 6 / 8);
        if used.is_empty() || unused.iter().any(|&byte| byte != 0) {
            return None;
        }
        bytes.extend_from_slice(used);
    }
    Some(bytes)
}

fn value(digit: u8) -> Option<u32> {
    Some(u32::from(match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Written in another way than what it tests.
    fn encode(bytes: &[u8]) -> String {
        const DIGITS: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let bit = |at: usize| {
            bytes
                .get(at / 8)
                .is_some_and(|byte| byte >> (7 - at % 8) & 1 == 1)
        };
        let digit = |at: usize| (at..at + 6).fold(0, |value, at| value * 2 + usize::from(bit(at)));
        let digits = (0..bytes.len() * 8).step_by(6);
        digits.map(|at| char::from(DIGITS[digit(at)])).collect()
    }

    #[test]
    fn the_vectors_of_rfc_4648_are_read() {
        let vectors = [
            "", "Zg==", "Zm8=", "Zm9v", "Zm9vYg==", "Zm9vYmE=", "Zm9vYmFy",
        ];
        for (len, text) in vectors.into_iter().enumerate() {
            assert_eq!(decode(text.as_bytes()).unwrap(), b"foobar"[..len]);
            assert_eq!(encode(&b"foobar"[..len]), text.trim_end_matches('='));
        }
    }

    #[test]
    fn what_is_no_base64_is_refused() {
        for bad in [
            "A",
            "Zm9vY",
            "Zg=",
            "Z===",
            "Zg===",
            "====",
            "Zg==Zg==",
            "Zm9v,Zm9v",
            "Zm9_",
            "Zh==",
            "Zm9=",
        ] {
            assert_eq!(decode(bad.as_bytes()), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn bytes_have_one_spelling_but_for_the_padding(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
            let text = encode(&bytes);
            let padding = "=".repeat((4 - text.len() % 4) % 4);
            prop_assert_eq!(decode(text.as_bytes()), Some(bytes.clone()));
            prop_assert_eq!(decode((text + &padding).as_bytes()), Some(bytes));
        }

        #[test]
        fn what_is_read_was_written_so(text in "[A-Za-z0-9+/]{0,12}={0,2}") {
            if let Some(bytes) = decode(text.as_bytes()) {
                prop_assert_eq!(encode(&bytes), text.trim_end_matches('='));
            }
        }
    }
}
