//! How much a JSON text says, before it is parsed: a value may take two bytes of text and a hundred of memory.

/// Values and keys of a JSON text, at most: what stands outside of strings and begins or separates one.
/// One pass, without memory; texts that are no JSON are counted as if they were.
///
/// ```
/// use cairn_data::json::count_values;
/// assert_eq!(count_values(br#"{"a": [1, 2], "b": ",,,"}"#), 6);
/// ```
pub fn count_values(json: &[u8]) -> usize {
    let (mut values, mut in_text, mut is_escaped) = (0, false, false);
    for byte in json {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if in_text => is_escaped = true,
            b'"' => in_text = !in_text,
            b',' | b':' | b'[' | b'{' if !in_text => values += 1,
            _ => {}
        }
    }
    values
}
