//! The bytes behind each token of a byte-level vocabulary.
//!
//! GPT-2's byte-level alphabet spells the 256 bytes with 256 printable characters
//! (<https://github.com/openai/gpt-2/blob/master/src/encoder.py>, `bytes_to_unicode`). Where that is
//! the decoder, a text is the concatenation of its tokens' bytes, which makes decoding a copy and
//! streaming exact.

use std::collections::HashMap;
use std::sync::LazyLock;

use tokenizers::decoders::DecoderWrapper;

/// Bytes of every token id, end to end.
#[derive(Debug)]
pub(super) struct ByteTable {
    bytes: Vec<u8>,
    /// Start and end in `bytes`; `None` for an id that no token has.
    spans: Vec<Option<(u32, u32)>>,
}

impl ByteTable {
    /// Makes the table, if the tokenizer's decoder is the byte-level one.
    pub(super) fn of(
        tokenizer: &tokenizers::Tokenizer,
        vocab: &HashMap<String, u32>,
        vocab_size: u32,
    ) -> Option<Self> {
        let Some(DecoderWrapper::ByteLevel(_)) = tokenizer.get_decoder() else { return None };
        let byte_of_char = byte_of_char();
        let mut tokens: Vec<(u32, &str)> =
            vocab.iter().map(|(token, id)| (*id, token.as_str())).collect();
        // An id with two spellings decodes as the tokenizer spells it, whatever the map's order.
        tokens.sort_unstable();
        let mut table =
            Self { bytes: Vec::new(), spans: vec![None; usize::try_from(vocab_size).ok()?] };
        for (id, token) in tokens {
            let spelled = tokenizer.id_to_token(id);
            let token = spelled.as_deref().unwrap_or(token);
            let start = u32::try_from(table.bytes.len()).ok()?;
            // A token with a character outside the alphabet (an added token) stands for itself.
            match token.chars().map(|c| byte_of_char.get(&c).copied()).collect::<Option<Vec<u8>>>()
            {
                Some(spelled) => table.bytes.extend(spelled),
                None => table.bytes.extend(token.as_bytes()),
            }
            let end = u32::try_from(table.bytes.len()).ok()?;
            table.spans[usize::try_from(id).ok()?] = Some((start, end));
        }
        Some(table)
    }

    /// The bytes of one id.
    pub(super) fn of_id(&self, id: u32) -> Option<&[u8]> {
        let (start, end) = (*self.spans.get(usize::try_from(id).ok()?)?)?;
        self.bytes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }
}

/// The character that spells a byte in GPT-2's alphabet.
pub(super) fn char_of_byte(byte: u8) -> char {
    ALPHABET[usize::from(byte)]
}

static ALPHABET: LazyLock<[char; 256]> = LazyLock::new(|| {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    // The bytes that are not printable take the characters from U+0100 on, in order.
    let mut unprintable = '\u{100}'..;
    let mut alphabet = ['\0'; 256];
    for byte in 0..=u8::MAX {
        let next = if printable(byte) { Some(char::from(byte)) } else { unprintable.next() };
        alphabet[usize::from(byte)] = next.expect("there are 68 of them");
    }
    alphabet
});

fn byte_of_char() -> HashMap<char, u8> {
    (0..=u8::MAX).map(|byte| (char_of_byte(byte), byte)).collect()
}
