//! Ending a text where one of several strings begins, while the text still grows.

/// A growing text that ends in front of the first stop string.
///
/// ```
/// use cairn_data::stop_strings::StopStrings;
/// let mut text = StopStrings::new(vec!["\n\n".to_owned()]);
/// assert_eq!(text.push("a\n"), "a");
/// assert_eq!(text.push("\nb"), "");
/// assert!(text.stopped());
/// ```
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    /// Text that may turn out to be the beginning of a stop string.
    held: String,
    /// The stop string that came.
    found: Option<usize>,
}

impl StopStrings {
    /// Empty strings never stop anything.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), found: None }
    }

    /// Whether a stop string has come.
    pub fn stopped(&self) -> bool {
        self.found.is_some()
    }

    /// The stop string that came; of several that begin together, the first that was given.
    pub fn found(&self) -> Option<&str> {
        self.found.map(|index| self.stops[index].as_str())
    }

    /// Takes a piece and returns what is certain to belong to the text.
    pub fn push(&mut self, piece: &str) -> String {
        if self.stopped() {
            return String::new();
        }
        self.held += piece;
        let stops = || self.stops.iter().enumerate().filter(|(_, stop)| !stop.is_empty());
        let begins = |(index, stop): (usize, &String)| Some((self.held.find(stop)?, index));
        if let Some((at, index)) = stops().filter_map(begins).min() {
            self.found = Some(index);
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        let keep = stops().map(|(_, stop)| overlap(&self.held, stop)).max().unwrap_or(0);
        let certain = self.held.len() - keep;
        let rest = self.held.split_off(certain);
        std::mem::replace(&mut self.held, rest)
    }

    /// Ends the text and returns what was held back.
    pub fn finish(self) -> String {
        if self.stopped() { String::new() } else { self.held }
    }
}

/// Bytes at the end of `text` that begin `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    let begins = |&length: &usize| {
        let start = text.len() - length;
        text.is_char_boundary(start) && stop.starts_with(&text[start..])
    };
    (1..=longest).rev().find(begins).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds a text one character at a time.
    fn check(stops: &[&str], text: &str, expected: &str) {
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        for width in 1..=3 {
            let mut stream = StopStrings::new(stops.clone());
            let characters: Vec<char> = text.chars().collect();
            let mut out = String::new();
            for piece in characters.chunks(width) {
                out += &stream.push(&piece.iter().collect::<String>());
            }
            out += &stream.finish();
            assert_eq!(out, expected, "pieces of {width}");
        }
    }

    #[test]
    fn the_text_ends_in_front_of_the_first_stop() {
        check(&["\n\n"], "a\nb\n\nc", "a\nb");
        check(&["xyz", "bc"], "abcxyz", "a");
        check(&["é!"], "caféé!s", "café");
    }

    #[test]
    fn what_only_began_to_be_a_stop_is_text() {
        check(&["stop"], "no sto", "no sto");
        check(&["aab"], "aaab", "a");
        check(&[""], "all", "all");
        check(&[], "all", "all");
    }
}
