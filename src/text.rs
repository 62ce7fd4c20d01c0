//! Text that is copied rather than allocated, as most keys and names are short.

use std::{
    cmp::Ordering,
    hash::{Hash, Hasher},
    ops::Deref,
    sync::Arc,
};

use arrayvec::ArrayString;

/// The longest text that takes no allocation, in bytes: `distributed-locks:orders/` and a UUID.
const SHORT: usize = 64;

type Short = ArrayString<SHORT>;

/// Some text. Clones of a long one share it.
#[derive(Clone)]
#[allow(
    clippy::large_enum_variant,
    reason = "that is what it is for: an allocation costs more than the copy"
)]
pub(crate) enum Text {
    Short(Short),
    Long(Arc<str>),
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        match self {
            Self::Short(text) => text,
            Self::Long(text) => text,
        }
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        match Short::from(text) {
            Ok(short) => Self::Short(short),
            Err(_) => Self::Long(text.into()),
        }
    }
}

impl PartialEq for Text {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Text {}

impl Hash for Text {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (**self).hash(state);
    }
}

impl PartialOrd for Text {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Text {
    fn cmp(&self, other: &Self) -> Ordering {
        (**self).cmp(&**other)
    }
}

/// Text that is being put together.
pub(crate) enum Draft {
    Short(Short),
    Long(String),
}

impl Draft {
    pub(crate) fn new() -> Self {
        Self::Short(Short::new())
    }

    pub(crate) fn push_str(&mut self, more: &str) {
        match self {
            Self::Short(text) => {
                if text.try_push_str(more).is_err() {
                    let mut long = String::with_capacity(2 * SHORT + more.len());
                    long.push_str(text);
                    long.push_str(more);
                    *self = Self::Long(long);
                }
            }
            Self::Long(text) => text.push_str(more),
        }
    }

    pub(crate) fn push(&mut self, more: char) {
        self.push_str(more.encode_utf8(&mut [0; 4]));
    }

    pub(crate) fn finish(self) -> Text {
        match self {
            Self::Short(text) => Text::Short(text),
            Self::Long(text) => Text::Long(text.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::hash::BuildHasher;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn text_of_any_length_is_what_it_was_put_together_of(
            parts in prop::collection::vec("[aé]{0,40}", 0..6),
        ) {
            let whole = parts.concat();
            let mut draft = Draft::new();
            parts.iter().for_each(|part| draft.push_str(part));
            let pushed = draft.finish();
            let mut draft = Draft::new();
            whole.chars().for_each(|each| draft.push(each));
            for text in [pushed, draft.finish(), Text::from(&*whole)] {
                prop_assert_eq!(&*text, &*whole);
                prop_assert_eq!(matches!(text, Text::Short(_)), whole.len() <= SHORT);
            }
        }

        #[test]
        fn texts_compare_as_what_they_say(a in "[ab]{62,66}", b in "[ab]{62,66}") {
            let (left, right) = (Text::from(&*a), Text::from(&*b));
            prop_assert_eq!(left.cmp(&right), a.cmp(&b));
            prop_assert_eq!(left == right, a == b);
            let hasher = std::hash::RandomState::new();
            prop_assert_eq!(hasher.hash_one(&left), hasher.hash_one(&a));
        }
    }
}
