//! Documents of a JSON Lines file: one object a line, with its text and what is known about it.
//!
//! **Invariant:** memory is bounded by the longest line that can hold a document of the allowed size;
//! a longer line is passed over without being held.

use std::io::{self, BufRead};

use serde::Deserialize;

use super::skip::SkipReason;

/// A byte of text takes at most six in JSON (`\u0000`).
const ESCAPE_BYTES: u64 = 6;

/// Room for the fields beside the text, in bytes.
const FIELDS_BYTES_MAX: u64 = 64 << 10;

/// One line's object. Other fields are other programs' business and are passed over.
#[derive(Debug, Deserialize)]
pub(super) struct Record {
    pub(super) text: Option<String>,
    pub(super) path: Option<String>,
    #[serde(alias = "licence")]
    pub(super) license: Option<String>,
    pub(super) group: Option<String>,
}

impl Record {
    /// Reads a line; the error is the reason to skip it and what the parser said.
    pub(super) fn parse(line: &[u8]) -> Result<Self, (SkipReason, Option<String>)> {
        let line = std::str::from_utf8(line).map_err(|_| (SkipReason::NotUtf8, None))?;
        let record: Self = serde_json::from_str(line)
            .map_err(|error| (SkipReason::InvalidJson, Some(error.to_string())))?;
        if record.text.is_none() { Err((SkipReason::NoText, None)) } else { Ok(record) }
    }
}

/// Where a line lies in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinePlace {
    /// Counted from 1.
    pub(super) number: u64,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// Calls `take` with every line that is not blank; `None` where a line is too long to hold.
pub(super) fn for_each_line(
    mut reader: impl BufRead,
    document_bytes_max: u64,
    mut take: impl FnMut(LinePlace, Option<&[u8]>),
) -> io::Result<()> {
    let line_bytes_max = document_bytes_max.saturating_mul(ESCAPE_BYTES) + FIELDS_BYTES_MAX;
    let (mut line, mut offset) = (Vec::new(), 0);
    for number in 1.. {
        let bytes = read_line(&mut reader, &mut line, line_bytes_max)?;
        if bytes == 0 {
            break;
        }
        let place = LinePlace { number, offset, bytes };
        if line_bytes_max < bytes {
            take(place, None);
        } else if !line.trim_ascii().is_empty() {
            take(place, Some(&line));
        }
        offset += bytes;
    }
    Ok(())
}

/// Reads to the next newline and returns how many bytes that were; `line` holds at most `max`.
fn read_line(reader: &mut impl BufRead, line: &mut Vec<u8>, max: u64) -> io::Result<u64> {
    line.clear();
    let mut total = 0;
    loop {
        let buffer = match reader.fill_buf() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            buffer => buffer?,
        };
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let taken = end.map_or(buffer.len(), |end| end + 1);
        total += u64::try_from(taken).expect("a length fits in 64 bits");
        if total <= max {
            line.extend_from_slice(&buffer[..taken]);
        } else {
            line.clear();
        }
        reader.consume(taken);
        if taken == 0 || end.is_some() {
            return Ok(total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str, document_bytes_max: u64) -> Vec<(LinePlace, Option<String>)> {
        let mut found = Vec::new();
        // A tiny buffer, so that lines span several reads.
        let reader = io::BufReader::with_capacity(7, text.as_bytes());
        for_each_line(reader, document_bytes_max, |place, line| {
            found.push((place, line.map(|line| String::from_utf8(line.to_vec()).unwrap())));
        })
        .unwrap();
        found
    }

    #[test]
    fn lines_have_places_and_blank_ones_are_passed_over() {
        let text = "{\"text\": 1}\n\n  \r\nlast line without end";
        let found = lines(text, 100);
        let places: Vec<_> = found.iter().map(|(place, _)| (place.number, place.offset)).collect();
        assert_eq!(places, [(1, 0), (4, 17)]);
        for (place, line) in found {
            let from = usize::try_from(place.offset).unwrap();
            let to = from + usize::try_from(place.bytes).unwrap();
            assert_eq!(Some(&text[from..to]), line.as_deref());
        }
    }

    #[test]
    fn long_line_is_passed_over() {
        let long = "x".repeat(usize::try_from(FIELDS_BYTES_MAX).unwrap() + 61);
        let found = lines(&format!("a\n{long}\nb\n"), 10);
        let texts: Vec<_> = found.iter().map(|(_, line)| line.as_deref()).collect();
        assert_eq!(texts, [Some("a\n"), None, Some("b\n")]);
    }

    #[test]
    fn records_say_what_is_wrong() {
        let reason = |line: &[u8]| Record::parse(line).unwrap_err().0;
        assert_eq!(reason(b"{\"text\": "), SkipReason::InvalidJson);
        assert_eq!(reason(b"{\"text\": 3}"), SkipReason::InvalidJson);
        assert_eq!(reason(b"{\"title\": \"t\"}"), SkipReason::NoText);
        assert_eq!(reason(b"{\"text\": \"\xFF\"}"), SkipReason::NotUtf8);
        let nested = format!("{{\"text\": \"t\", \"x\": {}", "[".repeat(100_000));
        assert_eq!(reason(nested.as_bytes()), SkipReason::InvalidJson);
        let record = Record::parse(br#"{"text": "t", "licence": "MIT", "score": 0.5}"#).unwrap();
        assert_eq!(record.license.as_deref(), Some("MIT"));
    }
}
