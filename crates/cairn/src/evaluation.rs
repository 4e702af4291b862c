//! A model measured on held-out text beside general compressors: what `eval` and `quickstart` share.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Context as _;
use cairn_artifacts::bounded::read_text;
use cairn_artifacts::run::{RunFolder, RunRecord, RunStatus};
use cairn_data::corpus::{Corpus, Split};
use cairn_eval::{
    Comparison, EvalError, ModelScorer, ModelScorerOptions, ModelScorerPlan, Progress, Stage,
    Windows, compare, sample,
};
use cairn_kernels::Compute;
use cairn_spec::recipe::{Format, RECIPE_BYTES_MAX, RecipeFile};
use serde_json::{Value, json};

use crate::context::Context;
use crate::failure::UserError;
use crate::figures::{Bytes, Count};
use crate::model_folder::ModelFolder;
use crate::outside::{code_revision, timestamp};
use crate::progress_line::ProgressLine;
use crate::signals::StopFlag;
use crate::table::Table;
use crate::weight_type::WeightType;

/// Tokens scored at once.
const TOKENS_AT_ONCE: usize = 2048;

/// What is measured and how.
#[derive(Clone, Debug)]
pub(crate) struct Measurement {
    /// The side of the corpus.
    pub(crate) split: Split,
    /// Bytes of text at most, about.
    pub(crate) max_bytes: u64,
    /// Tokens of a window; the model's positions where absent.
    pub(crate) context: Option<usize>,
    /// Tokens from one window to the next; the window's length where absent.
    pub(crate) stride: Option<usize>,
    /// How the weights are held.
    pub(crate) dtype: WeightType,
    /// Arithmetic of the products by them.
    pub(crate) compute: Compute,
}

/// Measures `model` on one side of `corpus`.
pub(crate) fn measure(
    model: &ModelFolder,
    corpus: &Corpus,
    how: &Measurement,
    (context, stop): (&Context, &StopFlag),
) -> anyhow::Result<Comparison> {
    let tokenizer = corpus.load_tokenizer()?;
    let positions = model.spec.context_limit();
    let length = how.context.unwrap_or(positions);
    if !(1..=positions).contains(&length) {
        return Err(UserError::new(format!("--context is {length}"))
            .hint(format!("choose 1 to {positions}, the positions of the model"))
            .into());
    }
    let windows = Windows::new(length, how.stride.unwrap_or(length))?;
    let mut options = ModelScorerOptions::new(length, TOKENS_AT_ONCE);
    let storage = how.dtype.storage(model, how.compute, context)?;
    options.encoding = storage.encoding;
    options.compute = how.compute;
    let adapters = model.adapters();
    let plan = ModelScorerPlan::with_storage(&model.spec, options, &adapters, &storage.own)?;
    let mut scorer = ModelScorer::load_adapted(plan, context.cpu()?, model.tensors())
        .with_context(|| format!("cannot load {}", model.path.display()))?;
    model.tell_copies();
    let documents = sample(corpus, how.split, &tokenizer, how.max_bytes)?;
    let mut line = ProgressLine::new(context.terminal, "Evaluating");
    let compared = compare(&mut scorer, windows, &documents, &mut |progress| {
        let Progress { stage, documents, documents_total } = progress;
        line.update(documents as f64 / documents_total.max(1) as f64, || {
            let what = match stage {
                Stage::Compress => "compressing one by one",
                Stage::CompressTogether => "compressing all together",
                Stage::Score => "scoring",
            };
            format!("{what}: {documents} of {documents_total} documents")
        });
        if stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    line.finish();
    compared.map_err(|error| match error {
        EvalError::Stopped => UserError::interrupted("interrupted; nothing was measured").into(),
        other => other.into(),
    })
}

/// The comparison as a table, best last.
pub(crate) fn comparison_text(comparison: &Comparison) -> String {
    let model = &comparison.model;
    let mut facts = Table::new(&[]).with_text_columns(2);
    let bytes = Bytes(comparison.text_bytes as f64);
    let documents = format!("{} documents, {bytes}", comparison.num_documents);
    facts.row([&"text", &documents]);
    if comparison.num_documents_left_out > 0 {
        let left = Bytes(comparison.text_bytes_left_out as f64);
        facts.row([
            &"left out",
            &format!("{} documents, {left}", comparison.num_documents_left_out),
        ]);
    }
    facts.row([&"targets", &Count(comparison.num_targets as f64)]);
    facts.row([&"loss", &format!("{:.4} nats per token", model.loss)]);
    facts.row([&"perplexity", &format!("{:.2}", model.perplexity)]);
    let mut table = Table::new(&["bits per byte", "per document", "concatenated"]);
    for figures in &comparison.compressors {
        let shown = |bits: f64| format!("{bits:.3}");
        table.row([
            &figures.compressor,
            &shown(figures.per_document.bits_per_byte),
            &shown(figures.concatenated.bits_per_byte),
        ]);
    }
    // The model never sees more than the document it is in.
    table.row([&"this model", &format!("{:.3}", model.code.bits_per_byte), &"—"]);
    format!("{facts}\n\n{table}")
}

/// Writes the record of a measurement into the run that the model belongs to.
pub(crate) fn save_record(
    run: &RunFolder,
    corpus: &Corpus,
    comparison: &Comparison,
    settings: Value,
) -> anyhow::Result<()> {
    let mut record = RunRecord::new("eval", settings, code_revision());
    record.status = RunStatus::Finished;
    record.data_hash = Some(corpus.data_hash());
    record.finished = Some(timestamp());
    if let Value::Object(figures) = serde_json::to_value(comparison)? {
        record.figures = figures;
    }
    Ok(record.save(&run.root().join("eval.json"))?)
}

/// Settings of a measurement for its record.
pub(crate) fn settings(model: &Path, how: &Measurement) -> Value {
    json!({
        "model": model,
        "split": how.split,
        "max_bytes": how.max_bytes,
        "context": how.context,
        "stride": how.stride,
        "dtype": how.dtype,
        "compute": how.compute,
    })
}

/// The run that a model folder is a checkpoint or the averaged weights of, if it is either.
pub(crate) fn run_of(model: &Path) -> Option<RunFolder> {
    let folder = model.parent()?;
    let run = match folder.parent().map(RunFolder::new) {
        Some(run) if run.checkpoints().folder() == folder => run,
        _ => RunFolder::new(folder),
    };
    let is_part = run.checkpoints().folder() == folder || run.average() == model;
    (is_part && run.recipe().exists()).then_some(run)
}

/// The resolved recipe of a run.
pub(crate) fn recipe_of(run: &RunFolder) -> anyhow::Result<RecipeFile> {
    let path = run.recipe();
    let text = read_text(&path, RECIPE_BYTES_MAX as u64)?;
    RecipeFile::parse(&text, Format::Toml).with_context(|| path.display().to_string())
}

/// The corpus folder that a run learned from.
pub(crate) fn corpus_of(run: &RunFolder) -> anyhow::Result<String> {
    recipe_of(run)?.data.corpus.ok_or_else(|| {
        UserError::new(format!("{} names no corpus", run.recipe().display()))
            .hint("name one with --corpus DIR")
            .into()
    })
}
