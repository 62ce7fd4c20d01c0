//! Numbers as people read them.

use crate::results::{Goal, Series, Unit};

/// Digits that mean something: the next round would have others after them.
const DIGITS: usize = 3;

impl Unit {
    /// The value with its unit: `135,000/s`, `54.2 µs`, `0.882`.
    #[must_use]
    pub fn text(self, value: f64) -> String {
        match self {
            Self::PerSecond => format!("{}/s", number(value)),
            Self::Seconds if value < 999.5e-6 => format!("{} µs", number(value * 1e6)),
            Self::Seconds if value < 0.9995 => format!("{} ms", number(value * 1e3)),
            Self::Seconds => format!("{} s", number(value)),
            Self::Number => number(value),
        }
    }
}

impl Series {
    /// The median, and in parentheses the smallest and the largest.
    #[must_use]
    pub fn text(&self, unit: Unit) -> String {
        let [median, min, max] = [self.median, self.min, self.max].map(|value| unit.text(value));
        format!("{median} ({min} to {max})")
    }
}

impl Goal {
    /// In words.
    #[must_use]
    pub fn text(self) -> String {
        match self {
            Self::AtLeast(goal) => format!("at least {goal}"),
            Self::AtMost(goal) => format!("at most {goal}"),
        }
    }
}

/// To three digits, with commas between thousands.
pub(crate) fn number(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    // Rounded first: 999.7 has one digit more than it seems.
    let rounded: f64 = format!("{value:.*e}", DIGITS - 1).parse().unwrap_or(value);
    let before_point = rounded.abs().log10().floor() as i32 + 1;
    let decimals = (DIGITS as i32 - before_point).max(0) as usize;
    let text = format!("{rounded:.decimals$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut with_commas = String::new();
    for (position, digit) in whole.char_indices() {
        if position > 0 && digit.is_ascii_digit() && (whole.len() - position) % 3 == 0 {
            with_commas.push(',');
        }
        with_commas.push(digit);
    }
    with_commas + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_commas() {
        for (value, text) in [
            (1_654_321.0, "1,650,000"),
            (134_567.0, "135,000"),
            (999.7, "1,000"),
            (86.34, "86.3"),
            (1.294, "1.29"),
            (0.9996, "1.00"),
            (0.8816, "0.882"),
            (0.014_13, "0.0141"),
            (0.000_312_4, "0.000312"),
            (0.0, "0"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn times_have_the_unit_in_which_they_are_read_best() {
        for (seconds, text) in [
            (54.23e-6, "54.2 µs"),
            (999.4e-6, "999 µs"),
            (999.7e-6, "1.00 ms"),
            (0.271, "271 ms"),
            (0.9997, "1.00 s"),
            (12.0, "12.0 s"),
        ] {
            assert_eq!(Unit::Seconds.text(seconds), text);
        }
        assert_eq!(Unit::PerSecond.text(21_300.0), "21,300/s");
    }
}
