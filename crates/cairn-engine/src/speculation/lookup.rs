//! Guesses by repetition: what followed when the last tokens occurred before.
//!
//! Of all earlier occurrences the one that agrees longest with the end of the text counts, up to
//! [`MATCH_MAX`] tokens; of equals, the latest. Source: Saxena 2023,
//! <https://github.com/apoorvumang/prompt-lookup-decoding>; vLLM calls it `ngram`.

/// Shortest agreement that is trusted.
const MATCH_MIN: usize = 2;
/// Agreement beyond which no longer one is looked for.
const MATCH_MAX: usize = 8;
/// How far back occurrences are looked for, in tokens.
const WINDOW: usize = 1 << 14;

/// Appends up to `count` guesses.
pub(super) fn extend(tokens: &mut Vec<u32>, count: usize) -> usize {
    let Some(from) = continuation(tokens) else { return 0 };
    for i in from..from + count {
        // Runs on into what was just guessed: a text that repeats itself goes on repeating.
        let token = tokens[i];
        tokens.push(token);
    }
    count
}

/// Where the best earlier occurrence goes on.
fn continuation(tokens: &[u32]) -> Option<usize> {
    let mut longest = MATCH_MIN - 1;
    let mut best = None;
    for end in (tokens.len().saturating_sub(WINDOW).max(1)..tokens.len()).rev() {
        let agreeing = tokens[..end].iter().rev().zip(tokens.iter().rev());
        let length = agreeing.take(MATCH_MAX).take_while(|(a, b)| a == b).count();
        if longest < length {
            (longest, best) = (length, Some(end));
            if length == MATCH_MAX {
                break;
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &[u32], count: usize, expected: &[u32]) {
        let mut tokens = text.to_vec();
        assert_eq!(extend(&mut tokens, count), expected.len(), "{text:?}");
        assert_eq!(tokens[text.len()..], *expected, "{text:?}");
    }

    #[test]
    fn what_followed_is_guessed() {
        check(&[1, 2, 3, 4, 5, 1, 2], 2, &[3, 4]);
        check(&[1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 1, &[4]); // the latest of equals
        check(&[7, 1, 2, 3, 5, 1, 2, 4, 7, 1, 2], 1, &[3]); // the longest first
    }

    #[test]
    fn a_period_goes_on() {
        check(&[5, 6, 5, 6], 5, &[5, 6, 5, 6, 5]);
        check(&[4, 4, 4], 3, &[4, 4, 4]);
    }

    #[test]
    fn without_repetition_nothing_is_guessed() {
        for text in [&[][..], &[1], &[1, 2], &[1, 2, 3, 4], &[2, 1, 3, 1]] {
            check(text, 4, &[]);
        }
    }
}
