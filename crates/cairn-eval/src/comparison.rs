//! The model beside general compressors, on the same documents.
//!
//! Everything is a code length for the same bytes. The model reads each document as its own context;
//! compressors get each document alone, which is the fair comparison, and all documents as one file,
//! where they may use one document to shorten the next and the model may not. Ends of documents cost
//! the model bits and add no bytes.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use crate::compress::Compressor;
use crate::documents::DocumentScorer;
use crate::error::EvalError;
use crate::scorer::TokenScorer;
use crate::windows::Windows;

/// Version of [`Comparison`] as a record.
pub const COMPARISON_SCHEMA: &str = "comparison/1";

/// A document as tokens and as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Its tokens, the end of the document last.
    pub tokens: Vec<u32>,
    /// What they stand for, without the end.
    pub text: Vec<u8>,
}

/// What a code makes of the documents.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CodeLength {
    /// Bytes of the code; the model's bits are rounded up once.
    pub bytes: u64,
    /// Bits of the code for a byte of text.
    pub bits_per_byte: f64,
}

impl CodeLength {
    fn new(bytes: u64, text_bytes: u64) -> Self {
        Self { bytes, bits_per_byte: 8.0 * bytes as f64 / text_bytes as f64 }
    }
}

/// What the model makes of the documents.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelFigures {
    /// Tokens it chooses among.
    pub vocab_size: usize,
    /// How long documents were cut.
    pub windows: Windows,
    /// Mean negative log-probability of a target, in nats.
    pub loss: f64,
    /// `e^loss`.
    pub perplexity: f64,
    /// Bits of the first tokens, log₂ of the vocabulary each; part of `code`.
    pub first_token_bits: f64,
    /// The whole code.
    pub code: CodeLength,
}

/// What one compressor makes of the documents.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CompressorFigures {
    /// Which.
    pub compressor: Compressor,
    /// Each document a file of its own, as the model sees them.
    pub per_document: CodeLength,
    /// All documents one file.
    pub concatenated: CodeLength,
}

/// The model beside compressors: a record of one measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// [`COMPARISON_SCHEMA`].
    pub schema: String,
    /// Documents measured.
    pub num_documents: u64,
    /// Bytes of their text.
    pub text_bytes: u64,
    /// Their tokens, ends of documents included.
    pub num_tokens: u64,
    /// Tokens the model predicted: all but each document's first.
    pub num_targets: u64,
    /// Documents that were not measured, for the limit on bytes.
    pub num_documents_left_out: u64,
    /// Bytes of their text.
    pub text_bytes_left_out: u64,
    /// The model.
    pub model: ModelFigures,
    /// The compressors.
    pub compressors: Vec<CompressorFigures>,
}

/// What is going on, for a progress line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is measured.
    pub stage: Stage,
    /// Documents measured.
    pub documents: u64,
    /// Documents to measure.
    pub documents_total: u64,
}

/// A part of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Compressors, one document at a time.
    Compress,
    /// Compressors, all documents together.
    CompressTogether,
    /// The model.
    Score,
}

/// Hears how far it is; `Break` stops the measurement.
pub type ProgressFn<'a> = dyn FnMut(Progress) -> ControlFlow<()> + 'a;

/// Documents that are measured, held in memory, and how many are not.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// The documents.
    pub documents: Vec<Document>,
    /// Documents left out.
    pub num_left_out: u64,
    /// Bytes of their text.
    pub text_bytes_left_out: u64,
}

impl Sample {
    /// Bytes of the documents' text.
    pub fn text_bytes(&self) -> u64 {
        self.documents.iter().map(|document| document.text.len() as u64).sum()
    }
}

/// Measures the model and all compressors on the same documents.
///
/// # Errors
///
/// [`EvalError::NoDocuments`] without any text, [`EvalError::Compressor`], [`EvalError::Stopped`] if
/// `progress` breaks, and the errors of [`DocumentScorer::push`].
pub fn compare(
    scorer: &mut impl TokenScorer,
    windows: Windows,
    sample: &Sample,
    progress: &mut ProgressFn<'_>,
) -> Result<Comparison, EvalError> {
    let text_bytes = sample.text_bytes();
    if text_bytes == 0 {
        return Err(EvalError::NoDocuments);
    }
    let compressors = measure_compressors(sample, text_bytes, progress)?;
    let (model, num_targets) = measure_model(scorer, windows, sample, progress)?;
    Ok(Comparison {
        schema: COMPARISON_SCHEMA.to_owned(),
        num_documents: sample.documents.len() as u64,
        text_bytes,
        num_tokens: sample.documents.iter().map(|document| document.tokens.len() as u64).sum(),
        num_targets,
        num_documents_left_out: sample.num_left_out,
        text_bytes_left_out: sample.text_bytes_left_out,
        model,
        compressors,
    })
}

/// Tells the caller how far it is, and stops if that is wanted.
fn report(
    progress: &mut ProgressFn<'_>,
    stage: Stage,
    documents: usize,
    sample: &Sample,
) -> Result<(), EvalError> {
    let documents_total = sample.documents.len() as u64;
    match progress(Progress { stage, documents: documents as u64, documents_total }) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(EvalError::Stopped),
    }
}

fn measure_compressors(
    sample: &Sample,
    text_bytes: u64,
    progress: &mut ProgressFn<'_>,
) -> Result<Vec<CompressorFigures>, EvalError> {
    let mut alone = [0_u64; Compressor::ALL.len()];
    for (number, document) in sample.documents.iter().enumerate() {
        let sizes = sizes(|| [document.text.as_slice()].into_iter())?;
        alone.iter_mut().zip(sizes).for_each(|(sum, size)| *sum += size);
        report(progress, Stage::Compress, number + 1, sample)?;
    }
    report(progress, Stage::CompressTogether, 0, sample)?;
    let together = sizes(|| sample.documents.iter().map(|document| document.text.as_slice()))?;
    let figures = Compressor::ALL.into_iter().zip(alone.into_iter().zip(together));
    Ok(figures
        .map(|(compressor, (alone, together))| CompressorFigures {
            compressor,
            per_document: CodeLength::new(alone, text_bytes),
            concatenated: CodeLength::new(together, text_bytes),
        })
        .collect())
}

/// Compressed bytes by every compressor, each on a thread of its own if there is enough to do.
fn sizes<'a, P>(parts: impl Fn() -> P) -> Result<[u64; Compressor::ALL.len()], EvalError>
where
    P: Iterator<Item = &'a [u8]> + Clone + Send,
{
    let size = |compressor: Compressor, parts: P| {
        compressor
            .compressed_bytes(parts)
            .map_err(|source| EvalError::Compressor { compressor, source })
    };
    /// Below this, a thread costs more than it saves.
    const BYTES_WORTH_A_THREAD: usize = 32 << 10;
    let mut sizes = [0; Compressor::ALL.len()];
    if parts().map(<[u8]>::len).sum::<usize>() < BYTES_WORTH_A_THREAD {
        for (found, compressor) in sizes.iter_mut().zip(Compressor::ALL) {
            *found = size(compressor, parts())?;
        }
        return Ok(sizes);
    }
    std::thread::scope(|scope| {
        let threads = Compressor::ALL.map(|compressor| {
            let parts = parts();
            scope.spawn(move || size(compressor, parts))
        });
        for (found, thread) in sizes.iter_mut().zip(threads) {
            *found = thread.join().expect("compressors return their errors")?;
        }
        Ok(sizes)
    })
}

fn measure_model(
    scorer: &mut impl TokenScorer,
    windows: Windows,
    sample: &Sample,
    progress: &mut ProgressFn<'_>,
) -> Result<(ModelFigures, u64), EvalError> {
    let vocab_size = scorer.vocab_size();
    let (mut bits, mut nats, mut num_targets, mut scored) = (0.0, 0.0, 0, 0);
    let mut add = |score: crate::DocumentScore| {
        bits += score.bits(vocab_size);
        nats += score.nats;
        num_targets += score.num_targets;
        scored += 1;
        scored
    };
    let mut documents = DocumentScorer::new(scorer, windows)?;
    for document in &sample.documents {
        let mut done = 0;
        documents.push(&document.tokens, &mut |score| done = add(score))?;
        if done != 0 {
            report(progress, Stage::Score, done, sample)?;
        }
    }
    documents.finish(&mut |score| {
        add(score);
    })?;
    report(progress, Stage::Score, sample.documents.len(), sample)?;
    if num_targets == 0 {
        return Err(EvalError::NoDocuments);
    }
    let loss = nats / num_targets as f64;
    let text_bytes = sample.text_bytes() as f64;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "finite, counted")]
    let code = CodeLength { bytes: (bits / 8.0).ceil() as u64, bits_per_byte: bits / text_bytes };
    let first_token_bits = sample.documents.len() as f64 * (vocab_size as f64).log2();
    let perplexity = loss.exp();
    let figures = ModelFigures { vocab_size, windows, loss, perplexity, first_token_bits, code };
    Ok((figures, num_targets))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::documents::tests::{Formula, LIMITS};

    fn sample(texts: &[&str]) -> Sample {
        let document = |text: &&str| Document {
            tokens: text.bytes().map(u32::from).chain([0]).collect(),
            text: text.as_bytes().to_vec(),
        };
        let documents = texts.iter().map(document).collect();
        Sample { documents, num_left_out: 3, text_bytes_left_out: 77 }
    }

    fn measure(sample: &Sample) -> Comparison {
        let mut uniform = Formula::new(LIMITS, |_, _| -(256.0_f32.ln()));
        let windows = Windows::new(16, 4).unwrap();
        compare(&mut uniform, windows, sample, &mut |_| ControlFlow::Continue(())).unwrap()
    }

    #[test]
    fn a_uniform_byte_model_takes_eight_bits_and_the_ends() {
        let sample = sample(&["stones", "a longer text, cut into windows", ""]);
        let found = measure(&sample);
        let bytes = 6 + 31;
        assert_eq!((found.num_documents, found.text_bytes), (3, bytes));
        assert_eq!((found.num_tokens, found.num_targets), (bytes + 3, bytes));
        assert_eq!((found.num_documents_left_out, found.text_bytes_left_out), (3, 77));
        let expected = 8.0 * (bytes + 3) as f64 / bytes as f64;
        assert!((found.model.code.bits_per_byte - expected).abs() < 1e-5);
        assert!((found.model.perplexity - 256.0).abs() < 1e-2);
        assert!((found.model.first_token_bits - 24.0).abs() < 1e-12);
    }

    #[test]
    fn compressors_are_measured_alone_and_together() {
        let line = "the same line in every document, long enough to be worth remembering\n";
        let text = line.repeat(20);
        let sample = sample(&[text.as_str(); 30]);
        for figures in measure(&sample).compressors {
            let CompressorFigures { per_document, concatenated, compressor } = figures;
            assert!(concatenated.bytes * 5 < per_document.bytes, "{compressor}");
            let alone = compressor.compressed_bytes([text.as_bytes()].into_iter()).unwrap();
            assert_eq!(per_document.bytes, 30 * alone);
            let bits = 8.0 * alone as f64 / text.len() as f64;
            assert!((per_document.bits_per_byte - bits).abs() < 1e-12);
        }
    }

    #[test]
    fn figures_do_not_depend_on_threads_or_order() {
        let long = "many words ".repeat(8_000);
        let texts = ["short", &long, "another", ""];
        let forward = measure(&sample(&texts));
        let backward = measure(&sample(&[texts[3], texts[2], texts[1], texts[0]]));
        assert!((forward.model.loss - backward.model.loss).abs() < 1e-12);
        for (a, b) in forward.compressors.iter().zip(&backward.compressors) {
            assert_eq!(a.per_document, b.per_document);
        }
        assert_eq!(measure(&sample(&texts)), forward);
    }

    #[test]
    fn records_survive_json() {
        let found = measure(&sample(&["stones"]));
        let json = serde_json::to_string(&found).unwrap();
        assert!(json.contains(r#""compressor":"gzip -9""#), "{json}");
        assert_eq!(serde_json::from_str::<Comparison>(&json).unwrap(), found);
    }

    #[test]
    fn the_caller_can_stop_and_nothing_is_an_error() {
        let mut uniform = Formula::new(LIMITS, |_, _| -1.0);
        let windows = Windows::new(16, 16).unwrap();
        let texts = sample(&["a", "b"]);
        let stopped = compare(&mut uniform, windows, &texts, &mut |_| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(EvalError::Stopped)));
        let mut go_on = |_| ControlFlow::Continue(());
        let nothing = compare(&mut uniform, windows, &Sample::default(), &mut go_on);
        assert!(matches!(nothing, Err(EvalError::NoDocuments)));
    }
}
