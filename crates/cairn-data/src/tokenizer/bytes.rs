//! The bytes behind each token of a byte-level vocabulary.
//!
//! GPT-2's byte-level alphabet spells the 256 bytes with 256 printable characters
//! (<https://github.com/openai/gpt-2/blob/master/src/encoder.py>, `bytes_to_unicode`). Where that is
//! the decoder, a text is the concatenation of its tokens' bytes, which makes decoding a copy and
//! streaming exact.

use std::collections::BTreeSet;
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
    /// Makes the table of `tokens`, sorted by id, if the tokenizer's decoder is the byte-level one.
    pub(super) fn of(
        tokenizer: &tokenizers::Tokenizer,
        tokens: &[(u32, String)],
        vocab_size: u32,
    ) -> Option<Self> {
        if !is_byte_level(tokenizer.get_decoder()?) {
            return None;
        }
        let byte_of_char = byte_of_char();
        let mut table =
            Self { bytes: Vec::new(), spans: vec![None; usize::try_from(vocab_size).ok()?] };
        for (id, token) in tokens {
            let start = u32::try_from(table.bytes.len()).ok()?;
            // A token with a character outside the alphabet (an added token) stands for itself.
            let byte = |c: char| byte_of_char.get(c as usize).copied().flatten();
            if token.chars().all(|c| byte(c).is_some()) {
                table.bytes.extend(token.chars().filter_map(byte));
            } else {
                table.bytes.extend(token.as_bytes());
            }
            let end = u32::try_from(table.bytes.len()).ok()?;
            table.spans[usize::try_from(*id).ok()?] = Some((start, end));
        }
        Some(table)
    }

    /// The bytes of one id.
    pub(super) fn of_id(&self, id: u32) -> Option<&[u8]> {
        let (start, end) = (*self.spans.get(usize::try_from(id).ok()?)?)?;
        self.bytes.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }
}

/// Whether a decoder is the byte-level one, alone or as the only step of a sequence.
fn is_byte_level(decoder: &DecoderWrapper) -> bool {
    match steps(decoder) {
        [DecoderWrapper::ByteLevel(_)] => true,
        [only @ DecoderWrapper::Sequence(_)] if !std::ptr::eq(only, decoder) => is_byte_level(only),
        _ => false,
    }
}

/// The steps of a decoder: those of a sequence, or itself.
pub(super) fn steps(decoder: &DecoderWrapper) -> &[DecoderWrapper] {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders(),
        single => std::slice::from_ref(single),
    }
}

/// Ids of the tokens that byte fallback reads as bytes, if that is a step of the decoder.
pub(super) fn byte_tokens(
    tokenizer: &tokenizers::Tokenizer,
    tokens: &[(u32, String)],
) -> BTreeSet<u32> {
    let falls_back = |step: &DecoderWrapper| matches!(step, DecoderWrapper::ByteFallback(_));
    if !tokenizer.get_decoder().is_some_and(|decoder| steps(decoder).iter().any(falls_back)) {
        return BTreeSet::new();
    }
    let is_byte = |token: &str| {
        let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        digits.is_some_and(|two| two.len() == 2 && u8::from_str_radix(two, 16).is_ok())
    };
    tokens.iter().filter(|(_, token)| is_byte(token)).map(|(id, _)| *id).collect()
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

/// The byte that a character spells: 256 of the characters below U+0144 spell one. A table, because a
/// model's hundred thousand tokens are looked up before it says its first word.
fn byte_of_char() -> [Option<u8>; 0x144] {
    let mut table = [None; 0x144];
    for byte in 0..=u8::MAX {
        table[char_of_byte(byte) as usize] = Some(byte);
    }
    table
}
