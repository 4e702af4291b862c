//! A side of a corpus as documents to compare on.
//!
//! Comparing holds the documents in memory, so their bytes are limited. If a side has more, every
//! k-th document is taken, k chosen so that about the limit remains: no group is favored, the choice
//! is the same every time, and what is left out is counted in the record.

use cairn_data::corpus::{Corpus, Split};
use cairn_data::tokenizer::Tokenizer;

use crate::comparison::{Document, Sample};
use crate::error::EvalError;

/// Bytes of text that are compared by default.
pub const COMPARED_BYTES_MAX: u64 = 16 << 20;

/// Takes documents of a side, about `max_bytes` of text; `tokenizer` is the corpus's own.
///
/// # Errors
///
/// [`EvalError::Corpus`] if a shard was altered, [`EvalError::Text`] if tokens do not give the
/// document's bytes back, [`EvalError::NoDocuments`] if the side is empty.
pub fn sample(
    corpus: &Corpus,
    split: Split,
    tokenizer: &Tokenizer,
    max_bytes: u64,
) -> Result<Sample, EvalError> {
    let documents = corpus.documents(split);
    let sizes = (0..documents.len()).map(|number| u64::from(documents.document(number).text_bytes));
    let text_bytes: u64 = sizes.sum();
    let every = usize::try_from(text_bytes.div_ceil(max_bytes.max(1)).max(1)).unwrap_or(usize::MAX);
    let mut sample = Sample::default();
    let mut taken_bytes = 0;
    for number in (0..documents.len()).step_by(every) {
        // One document more than fits at most.
        if max_bytes <= taken_bytes {
            break;
        }
        let record = documents.document(number);
        let mut tokens = Vec::new();
        let count = usize::try_from(record.num_tokens).expect("a u32 fits");
        documents.read_tokens(number, 0, count, &mut tokens)?;
        let text = text_of(tokenizer, &tokens)?;
        let (expected, found) = (u64::from(record.text_bytes), text.len() as u64);
        if expected != found {
            let path = record.path.to_owned();
            return Err(EvalError::Text { path, expected, found });
        }
        taken_bytes += found;
        sample.documents.push(Document { tokens, text });
    }
    if sample.documents.is_empty() {
        return Err(EvalError::NoDocuments);
    }
    sample.num_left_out = (documents.len() - sample.documents.len()) as u64;
    sample.text_bytes_left_out = text_bytes - taken_bytes;
    Ok(sample)
}

/// The bytes that a document's tokens stand for, its end left out.
fn text_of(tokenizer: &Tokenizer, tokens: &[u32]) -> Result<Vec<u8>, EvalError> {
    let body = tokens.split_last().map_or(tokens, |(_, body)| body);
    if tokenizer.is_byte_level() {
        let bytes = body.iter().filter_map(|&id| tokenizer.token_bytes(id));
        return Ok(bytes.flatten().copied().collect());
    }
    Ok(tokenizer.decode(body)?.into_bytes())
}
