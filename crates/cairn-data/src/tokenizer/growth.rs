//! How much more text a `tokenizer.json` can make of a text, bounded before anything of it runs.
//!
//! A file is a program in small: its normalizer is a chain of replacements, and a chain of thirty that
//! double makes a gigabyte of a character; a post-processor may repeat the text; a decoder replaces
//! again. Every step has a bound on the bytes it makes of one byte, whatever the text, and the bounds
//! of a chain multiply.
//!
//! **Limits:** a chain whose product is above [`NORMALIZER_MAX`], [`PRE_TOKENIZER_MAX`],
//! [`REPEATS_MAX`] or [`DECODER_MAX`] is refused when the file is read, and so is one of more than
//! [`VALUES_MAX`] values, before it is parsed. Below that, a text of `n` bytes
//! is encoded only if the normalizer makes at most `16 · n + 16 MiB` of it: where the product leaves
//! that open it is measured, piece by piece, before the text is encoded.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::{
    DecoderWrapper, NormalizedString, Normalizer, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper,
};

use crate::json::count_values;

/// Bytes that a normalizer may make of one byte. ALBERT's, the longest chain known, may make 1,200.
const NORMALIZER_MAX: f64 = 4096.0;

/// Bytes that splitting into words may make of one byte.
const PRE_TOKENIZER_MAX: f64 = 64.0;

/// Times that a post-processor may repeat the text.
const REPEATS_MAX: f64 = 4.0;

/// Bytes, with one for each token, that a post-processor may put around a text.
const AROUND_MAX: f64 = 65536.0;

/// Bytes that a decoder may make of one byte.
const DECODER_MAX: f64 = 64.0;

/// JSON values in a file, about: each takes some 150 bytes while it is read. Gemma's file, the largest known,
/// has 2.1 million.
const VALUES_MAX: usize = 1 << 23;

/// Longest token, in bytes. The longest known ones are runs of a few hundred spaces.
pub(super) const TOKEN_BYTES_MAX: usize = 1 << 14;

/// Longest token that stands for what no token spells, which may be every character.
const UNKNOWN_MAX: f64 = 64.0;

/// Bytes of a normalized text for each byte of the text.
const GROWN_MAX: usize = 16;

/// Bytes of a normalized text besides.
const GROWN_BESIDES: usize = 16 << 20;

/// Bytes that are measured at a time, at most; with [`NORMALIZER_MAX`], a piece grows to 4 MiB.
const PIECE_BYTES: usize = 1 << 10;

/// Steps of one part. The longest known chains have a dozen.
const STEPS_MAX: f64 = 64.0;

/// A run of steps that only change how characters are written never grows by more: a compatibility
/// decomposition makes 11 bytes of one (U+FDFA, 33 of 3), lower case at most 3 of 2.
const UNICODE_RUN: f64 = 17.0;

/// Why a file is refused.
#[derive(Debug, PartialEq)]
pub(super) struct Excess {
    /// What there is too much of.
    pub(super) what: &'static str,
    /// How much there is, or may be.
    pub(super) actual: f64,
    /// The limit.
    pub(super) limit: f64,
}

/// The parts of a file that make text of text, as it states them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chains<'a> {
    pub(super) normalizer: &'a Value,
    pub(super) pre_tokenizer: &'a Value,
    pub(super) post_processor: &'a Value,
    pub(super) decoder: &'a Value,
    /// The token for what no token spells.
    pub(super) unknown: Option<&'a str>,
}

/// What the normalizer may make of one byte of a text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Growth(f64);

impl Growth {
    /// Reads the bound from a file's parts.
    ///
    /// They are read as the `tokenizers` crate reads them and written again, so that every part is
    /// named as in its newest files, whatever the file calls it.
    pub(super) fn of(chains: Chains<'_>) -> Result<Result<Self, Excess>, serde_json::Error> {
        let normalizer = as_read::<NormalizerWrapper>(chains.normalizer)?;
        let pre_tokenizer = as_read::<PreTokenizerWrapper>(chains.pre_tokenizer)?;
        let post_processor = as_read::<PostProcessorWrapper>(chains.post_processor)?;
        let decoder = as_read::<DecoderWrapper>(chains.decoder)?;
        let growth = normalizer_growth(&normalizer);
        let (repeats, around) = post_processor_growth(&post_processor);
        let words = pre_tokenizer_growth(&pre_tokenizer);
        let num_steps = |chain: &Value, field: &str| {
            #[expect(clippy::cast_precision_loss, reason = "a file is below 2^52 bytes")]
            return steps(chain, field).len() as f64;
        };
        let limits = [
            ("bytes that its normalizer may make of one", growth, NORMALIZER_MAX),
            ("bytes that its pre_tokenizer may make of one", words, PRE_TOKENIZER_MAX),
            ("copies of the text that its post_processor may make", repeats, REPEATS_MAX),
            ("bytes that its post_processor may put around a text", around, AROUND_MAX),
            ("bytes that its decoder may make of one", decoder_growth(&decoder), DECODER_MAX),
            ("bytes of its unknown token", bytes(chains.unknown.unwrap_or("")), UNKNOWN_MAX),
            ("steps of its normalizer", num_steps(&normalizer, "normalizers"), STEPS_MAX),
            ("steps of its pre_tokenizer", num_steps(&pre_tokenizer, "pretokenizers"), STEPS_MAX),
            ("steps of its post_processor", num_steps(&post_processor, "processors"), STEPS_MAX),
            ("steps of its decoder", num_steps(&decoder, "decoders"), STEPS_MAX),
        ];
        let excess = limits.into_iter().find(|(_, actual, limit)| actual > limit);
        Ok(match excess {
            Some((what, actual, limit)) => Err(Excess { what, actual, limit }),
            None => Ok(Self(growth)),
        })
    }

    /// Checks that a text does not grow beyond the limit; returns what it grows to at least if it does.
    pub(super) fn check(
        self,
        text: &str,
        normalizer: Option<&NormalizerWrapper>,
    ) -> Result<(), usize> {
        let Some(normalizer) = normalizer else { return Ok(()) };
        let limit = text.len().saturating_mul(GROWN_MAX).saturating_add(GROWN_BESIDES);
        #[expect(clippy::cast_precision_loss, reason = "texts are below 2^52 bytes")]
        if self.0 * text.len() as f64 <= limit as f64 {
            return Ok(());
        }
        let (mut grown, mut rest) = (0_usize, text);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(rest.floor_char_boundary(PIECE_BYTES));
            let mut normalized = NormalizedString::from(piece);
            // What it refuses here it refuses again, with its reason.
            if normalizer.normalize(&mut normalized).is_err() {
                return Ok(());
            }
            grown = grown.saturating_add(normalized.get().len());
            if grown > limit {
                return Err(grown);
            }
            rest = after;
        }
        Ok(())
    }
}

/// Checks that a file does not say more things than can be held, before it is parsed.
pub(super) fn check_values(json: &[u8]) -> Result<(), Excess> {
    // A value takes two bytes at least, with what separates it from the next.
    if json.len() / 2 <= VALUES_MAX {
        return Ok(());
    }
    let values = count_values(json);
    if values <= VALUES_MAX {
        return Ok(());
    }
    #[expect(clippy::cast_precision_loss, reason = "a file is below 2^52 bytes")]
    Err(Excess { what: "values in it", actual: values as f64, limit: VALUES_MAX as f64 })
}

/// A part as its newest form has it; null where there is none.
fn as_read<'a, T: Deserialize<'a> + Serialize>(
    part: &'a Value,
) -> Result<Value, serde_json::Error> {
    if part.is_null() {
        return Ok(Value::Null);
    }
    serde_json::to_value(T::deserialize(part)?)
}

fn kind(step: &Value) -> &str {
    step.get("type").and_then(Value::as_str).unwrap_or_default()
}

fn text<'a>(step: &'a Value, field: &str) -> &'a str {
    step.get(field).and_then(Value::as_str).unwrap_or_default()
}

/// The steps of a chain, one after the other, however they are nested.
fn steps<'a>(chain: &'a Value, field: &str) -> Vec<&'a Value> {
    match chain.get(field).and_then(Value::as_array) {
        Some(inner) => inner.iter().flat_map(|step| steps(step, field)).collect(),
        None if chain.is_null() => Vec::new(),
        None => vec![chain],
    }
}

#[expect(clippy::cast_precision_loss, reason = "lengths are below 2^52")]
fn bytes(text: &str) -> f64 {
    text.len() as f64
}

fn normalizer_growth(normalizer: &Value) -> f64 {
    let (mut growth, mut run) = (1.0, 1.0_f64);
    for step in steps(normalizer, "normalizers") {
        let factor = match kind(step) {
            "Replace" => replace_growth(step),
            // Before every piece of text between two added tokens.
            "Prepend" => 1.0 + bytes(text(step, "prepend")),
            "ByteLevel" => 2.0,
            "Precompiled" => longest_run(text(step, "precompiled_charsmap")),
            // Decomposes, and puts two spaces around each Chinese character, every time.
            "BertNormalizer" => UNICODE_RUN,
            written => {
                run = (run * rewriting_growth(written)).min(UNICODE_RUN);
                continue;
            }
        };
        growth *= run * factor;
        run = 1.0;
    }
    growth * run
}

/// A step that only changes how characters are written.
fn rewriting_growth(kind: &str) -> f64 {
    match kind {
        "Strip" | "StripAccents" | "Nmt" => 1.0,
        "Lowercase" => 2.0,
        "NFC" => 3.0,
        "NFD" => 4.0,
        _ => UNICODE_RUN,
    }
}

/// A replacement for every occurrence; what matches nothing does so before, between and after all bytes.
fn replace_growth(step: &Value) -> f64 {
    let content = bytes(text(step, "content"));
    let pattern = |kind: &str| step.get("pattern").and_then(|pattern| pattern.get(kind)?.as_str());
    let shortest = match (pattern("String"), pattern("Regex")) {
        (Some(pattern), _) => pattern.len(),
        // What looks around is not understood here, and may match nothing.
        (None, regex) => regex
            .and_then(|regex| regex_syntax::parse(regex).ok())
            .and_then(|parsed| parsed.properties().minimum_len())
            .unwrap_or(0),
    };
    #[expect(clippy::cast_precision_loss, reason = "a file is below 2^52 bytes")]
    let shortest = shortest as f64;
    if shortest < 1.0 { 1.0 + 2.0 * content } else { (content / shortest).max(1.0) }
}

/// The longest text that a table of `SentencePiece` puts in the place of a character. The table is the
/// length of an index in four bytes, the index, and the texts, each with a zero at its end.
fn longest_run(base64: &str) -> f64 {
    let table = decoded(base64);
    let index = table.first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let begin = usize::try_from(index).map_or(usize::MAX, |index| index.saturating_add(4));
    let texts = table.get(begin..).unwrap_or_default().split(|byte| *byte == 0);
    #[expect(clippy::cast_precision_loss, reason = "a file is below 2^52 bytes")]
    let longest = texts.map(<[u8]>::len).max().unwrap_or(0) as f64;
    longest.max(1.0)
}

/// The bytes of a text in base 64, whatever is not of its alphabet left out.
fn decoded(base64: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(base64.len() / 4 * 3);
    let (mut bits, mut count) = (0_u32, 0_u32);
    for letter in base64.bytes() {
        let value = match letter {
            b'A'..=b'Z' => letter - b'A',
            b'a'..=b'z' => letter - b'a' + 26,
            b'0'..=b'9' => letter - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => continue,
        };
        (bits, count) = (bits << 6 | u32::from(value), count + 6);
        if count >= 8 {
            count -= 8;
            out.push((bits >> count).to_le_bytes()[0]);
        }
    }
    out
}

fn pre_tokenizer_growth(pre_tokenizer: &Value) -> f64 {
    let factor = |step: &Value| match kind(step) {
        // A byte becomes a character of two; a space may come before every piece.
        "ByteLevel" if step.get("add_prefix_space") == Some(&Value::Bool(false)) => 2.0,
        "ByteLevel" => 4.0,
        // A space becomes a character, and one may come before every piece.
        "Metaspace" => 8.0,
        _ => 1.0,
    };
    steps(pre_tokenizer, "pretokenizers").into_iter().map(factor).product()
}

/// How often the text is there after, and what is around it, a token counting its bytes and one.
fn post_processor_growth(post_processor: &Value) -> (f64, f64) {
    let (mut repeats, mut around) = (1.0, 0.0);
    for step in steps(post_processor, "processors") {
        // The two that are not templates put one token before the text and one after.
        let (times, more) =
            if kind(step) == "TemplateProcessing" { template_growth(step) } else { (1.0, 32.0) };
        (repeats, around) = (repeats * times, around * times + more);
    }
    (repeats, around)
}

fn template_growth(template: &Value) -> (f64, f64) {
    let list = |value: &Value, field: &str| -> Vec<Value> {
        value.get(field).and_then(Value::as_array).cloned().unwrap_or_default()
    };
    let weight = |id: &str| -> f64 {
        let token = template.get("special_tokens").and_then(|tokens| tokens.get(id));
        let Some(token) = token else { return 0.0 };
        let tokens = list(token, "tokens");
        let spelled: f64 = tokens.iter().map(|token| bytes(token.as_str().unwrap_or(""))).sum();
        #[expect(clippy::cast_precision_loss, reason = "a list is below 2^52")]
        let count = list(token, "ids").len() as f64;
        count + spelled
    };
    let (mut repeats, mut around) = (0.0_f64, 0.0_f64);
    for pieces in ["single", "pair"] {
        let (mut times, mut more) = (0.0, 0.0);
        for piece in list(template, pieces) {
            match piece.get("SpecialToken") {
                Some(token) => more += weight(text(token, "id")),
                None => times += 1.0,
            }
        }
        (repeats, around) = (repeats.max(times), around.max(more));
    }
    (repeats, around)
}

fn decoder_growth(decoder: &Value) -> f64 {
    let factor = |step: &Value| match kind(step) {
        "Replace" => replace_growth(step),
        // An empty suffix, prefix or delimiter is between any two bytes.
        "BPEDecoder" | "WordPiece" | "CTC" => 2.0,
        // A byte that is no UTF-8 becomes U+FFFD.
        "ByteLevel" | "ByteFallback" => 3.0,
        _ => 1.0,
    };
    steps(decoder, "decoders").into_iter().map(factor).product()
}

#[cfg(test)]
mod tests;
