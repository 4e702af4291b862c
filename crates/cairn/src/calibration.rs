//! Text that weights are measured on: pieces of one length, in a model's own tokens.

use std::path::{Path, PathBuf};

use cairn_artifacts::bounded::{TEXT_BYTES_MAX, read_text};
use cairn_data::corpus::{Corpus, Split};
use cairn_eval::sample;

use crate::evaluation::{corpus_of, run_of};
use crate::failure::UserError;
use crate::model_folder::ModelFolder;

/// Longest piece of text, in tokens.
const ROW_TOKENS_MAX: usize = 256;
/// Bytes of text for each token that is measured on: more than any tokenizer needs.
const BYTES_A_TOKEN: u64 = 16;

/// Held-out text of a corpus: of the one that is named, or of the model's run.
pub(crate) fn corpus_rows(
    model: &ModelFolder,
    named: Option<&Path>,
    tokens: usize,
) -> anyhow::Result<Vec<Vec<u32>>> {
    let folder = match (named, run_of(model.used())) {
        (Some(folder), _) => folder.to_owned(),
        (None, Some(run)) => PathBuf::from(corpus_of(&run)?),
        (None, None) => {
            let message = format!("{} is no run's, so it has no corpus", model.path.display());
            return Err(UserError::new(message).hint("name one with --corpus DIR").into());
        }
    };
    let corpus = Corpus::open(&folder)?;
    let tokenizer = corpus.load_tokenizer()?;
    tokenizer.check_model(model.spec.vocab_size)?;
    let text = BYTES_A_TOKEN * tokens as u64;
    let documents = sample(&corpus, Split::Validation, &tokenizer, text)?.documents;
    let ids = documents.into_iter().flat_map(|document| document.tokens).collect();
    rows(model, ids, (tokens, &folder))
}

/// The beginning of a text file.
pub(crate) fn file_rows(
    model: &ModelFolder,
    path: &Path,
    tokens: usize,
) -> anyhow::Result<Vec<Vec<u32>>> {
    let ids = model.text_tokenizer()?.encode(&read_text(path, TEXT_BYTES_MAX)?)?;
    rows(model, ids, (tokens, path))
}

fn rows(
    model: &ModelFolder,
    ids: Vec<u32>,
    (tokens, place): (usize, &Path),
) -> anyhow::Result<Vec<Vec<u32>>> {
    let length = ROW_TOKENS_MAX.min(model.spec.context_limit());
    let rows = ids.chunks_exact(length).take(tokens.div_ceil(length));
    let rows: Vec<Vec<u32>> = rows.map(<[u32]>::to_vec).collect();
    if rows.is_empty() {
        let message = format!("{} has less than {length} tokens to measure on", place.display());
        return Err(UserError::new(message).hint("name a longer text").into());
    }
    Ok(rows)
}
