//! Values on the command line that several commands take, found wrong while it is parsed.

use std::str::FromStr;

/// A whole number above 0.
pub fn at_least_one<T: FromStr + PartialOrd + From<u8>>(text: &str) -> Result<T, String> {
    text.parse()
        .ok()
        .filter(|number| *number >= T::from(1))
        .ok_or_else(|| "expected a whole number of at least 1".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_begin_at_one() {
        assert_eq!((at_least_one::<usize>("1"), at_least_one::<i64>("64")), (Ok(1), Ok(64)));
        assert!(
            ["", "0", "-1", "1.5", "x", "99999999999999999999"].iter().all(|text| at_least_one::<i64>(text).is_err())
        );
    }
}
