//! Where text comes from, as flags that several commands share.

use std::ops::ControlFlow;
use std::path::PathBuf;

use cairn_data::corpus::{
    CorpusError, FileKinds, Input, LicenseFilter, Progress, Scan, ScanSettings, Split, SplitBy,
    SplitSettings, Stage, scan,
};
use cairn_data::tokenizer::{BpeSettings, Tokenizer, train_bpe};
use cairn_spec::units::ByteSize;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use crate::context::Context;
use crate::failure::UserError;
use crate::figures::Bytes;
use crate::progress_line::ProgressLine;
use crate::signals::StopFlag;

/// Share of the groups that is held out.
const VALIDATION_FRACTION: f64 = 0.05;
/// Text that a tokenizer is trained on at most; more changes few merges.
const TOKENIZER_SAMPLE_BYTES: u64 = 16 << 20;

/// Where text comes from and which of it is taken.
#[derive(Clone, Debug, Default, PartialEq, Args, Serialize, Deserialize)]
#[command(next_help_heading = "Text")]
#[serde(deny_unknown_fields)]
pub(crate) struct TextArgs {
    /// Folder, text file or `.jsonl` file; may be repeated [default: Cargo's registry sources]
    #[arg(long, value_name = "PATH")]
    pub(crate) input: Vec<PathBuf>,
    /// Take files with these extensions only [default: all; for Cargo's registry `.rs` and prose]
    #[arg(long, value_name = "EXT", value_delimiter = ',')]
    pub(crate) extensions: Vec<String>,
    /// Take text under these licenses only: SPDX identifiers, or `unknown`
    #[arg(long, value_name = "ID", value_delimiter = ',')]
    pub(crate) license_allow: Vec<String>,
    /// Share of the groups that is held out for validation [default: 0.05]
    #[arg(long, value_name = "X")]
    pub(crate) validation_fraction: Option<f64>,
    /// What is held out as a whole
    #[arg(long, value_enum, default_value_t = SplitUnit::Group)]
    pub(crate) split_by: SplitUnit,
    /// Seed of the split
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) split_seed: u64,
    /// Text taken of one group at most, so that no package or folder dominates: `1MB`
    #[arg(long, value_name = "BYTES")]
    pub(crate) group_bytes_max: Option<ByteSize>,
}

/// What is kept on one side of the split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum SplitUnit {
    /// Packages, else top folders: near-copies stay together.
    #[default]
    Group,
    /// Single documents.
    Document,
}

impl TextArgs {
    fn settings(&self, context: &Context) -> anyhow::Result<ScanSettings> {
        let inputs = self.inputs(context)?;
        let is_registry = matches!(inputs.as_slice(), [Input::CargoRegistry(_)]);
        let mut settings = ScanSettings::new(inputs);
        settings.threads = context.threads;
        settings.kinds = match (self.extensions.is_empty(), is_registry) {
            (false, _) => FileKinds::Extensions(
                self.extensions.iter().map(|e| e.trim_start_matches('.').to_lowercase()).collect(),
            ),
            (true, true) => FileKinds::rust_sources(),
            (true, false) => FileKinds::Any,
        };
        if !self.license_allow.is_empty() {
            settings.license_allow = Some(LicenseFilter::parse(&self.license_allow)?);
        }
        settings.limits.group_bytes_max = self.group_bytes_max.map(|bytes| bytes.0);
        settings.split = SplitSettings {
            seed: self.split_seed,
            validation_fraction: self.validation_fraction.unwrap_or(VALIDATION_FRACTION),
            by: match self.split_by {
                SplitUnit::Group => SplitBy::Group,
                SplitUnit::Document => SplitBy::Document,
            },
        };
        Ok(settings)
    }

    /// Whether nothing was asked for.
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn inputs(&self, context: &Context) -> anyhow::Result<Vec<Input>> {
        if !self.input.is_empty() {
            return Ok(self.input.iter().cloned().map(Input::Path).collect());
        }
        let Some(sources) = context.environment.registry_sources() else {
            return Err(UserError::new("Cargo's registry folder holds no sources to learn from")
                .hint("name a folder, a text file or a .jsonl file with --input")
                .into());
        };
        let registry = sources.parent().map(PathBuf::from).unwrap_or_default();
        context.terminal.step(
            "Taking",
            format_args!(
                "text from the packages in {} (--input names another place)",
                sources.display()
            ),
        );
        Ok(vec![Input::CargoRegistry(registry)])
    }

    /// Reads all text once and decides what belongs to the corpus.
    pub(crate) fn scan(&self, context: &Context, stop: &StopFlag) -> anyhow::Result<Scan> {
        let settings = self.settings(context)?;
        let mut line = ProgressLine::new(context.terminal, "Reading");
        let found = scan(settings, &mut |progress| show(&mut line, progress, stop));
        line.finish();
        let found = found.map_err(interrupted)?;
        let [(train, train_bytes), (held_out, held_out_bytes)] =
            Split::ALL.map(|side| found.size(side));
        context.terminal.step(
            "Read",
            format_args!(
                "{train} documents to learn from ({}), {held_out} held out ({})",
                Bytes(train_bytes as f64),
                Bytes(held_out_bytes as f64)
            ),
        );
        Ok(found)
    }
}

/// Trains a tokenizer on the training side of a scan.
pub(crate) fn train_tokenizer(
    found: &Scan,
    vocab_size: u32,
    context: &Context,
) -> anyhow::Result<Tokenizer> {
    let settings = BpeSettings { vocab_size, ..BpeSettings::default() };
    let tokenizer = train_bpe(&settings, found.sample(TOKENIZER_SAMPLE_BYTES))?;
    let size = tokenizer.vocab_size();
    context.terminal.step("Trained", format_args!("a tokenizer of {size} tokens"));
    if size < vocab_size {
        context.terminal.warn(format_args!(
            "the text gives {size} tokens, fewer than the {vocab_size} asked for"
        ));
    }
    Ok(tokenizer)
}

/// Shows progress; breaks off once someone asked to stop.
pub(crate) fn show(
    line: &mut ProgressLine,
    progress: Progress,
    stop: &StopFlag,
) -> ControlFlow<()> {
    let done = progress.bytes_total.map(|total| progress.bytes as f64 / total.max(1) as f64);
    line.update(done, || {
        let bytes = Bytes(progress.bytes as f64);
        let what = match progress.stage {
            Stage::Scan => "read",
            Stage::Tokenize => "tokenized",
        };
        format!("{} documents, {bytes} {what}", progress.documents)
    });
    if stop.is_set() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

/// Says what an interruption left behind.
pub(crate) fn interrupted(error: CorpusError) -> anyhow::Error {
    match error {
        CorpusError::Interrupted => UserError::interrupted("interrupted; nothing was written")
            .hint("run it again to start over")
            .into(),
        other => other.into(),
    }
}
