//! What is in a leanpack: the model, where it comes from, and its weights.

use std::fmt::Write as _;
use std::path::Path;

use cairn_artifacts::leanpack::{Header, PackFile, Profile};
use cairn_model::{PackCheck, PackSource};

use super::{InspectArgs, draw};
use crate::command::pack::assignment_table;
use crate::context::Context;
use crate::coverage::Coverage;
use crate::failure::UserError;
use crate::figures::{Bytes, Count};
use crate::machine::huge_page_text;
use crate::pack_args::storage_of;
use crate::table::Table;

/// Prints what is in the pack.
pub(super) fn inspect(path: &Path, args: &InspectArgs, context: &Context) -> anyhow::Result<()> {
    if !args.told.is_empty() {
        return Err(UserError::new(format!("{} describes its model itself", path.display()))
            .hint("--set is for safetensors without a config.json")
            .into());
    }
    let pack = PackFile::open(path)?;
    let header = pack.header();
    if args.parts.program || args.picture.is_some() {
        return draw(&header.spec, args, context);
    }
    if args.json {
        return context.terminal.print(serde_json::to_string_pretty(header)?);
    }
    let source = PackSource::new(pack, PackCheck::default())?;
    let (pack, header) = (source.pack(), source.pack().header());
    let program = storage_of(&source).program(&header.spec, source.storage().1)?;
    let coverage = Coverage::of(&program, context.isa);
    let mut text = summary(pack, (&residence(pack), &coverage.text(context.isa)));
    let _ = write!(text, "\n\n{}", file_table(header));
    if let Some(assignment) = &header.assignment {
        let _ = write!(text, "\n\n{}", assignment_table(assignment));
    }
    if args.parts.tensors {
        let _ = write!(text, "\n\n{}", tensor_table(header));
    }
    context.terminal.print(text)
}

/// Whether the weights are read where they lie, or why not.
fn residence(pack: &PackFile) -> String {
    match pack.map_weights() {
        Ok(_) => "weights stay in the file, mapped; whoever wants to change it waits".to_owned(),
        Err(error) => format!("weights are copied ({error})"),
    }
}

fn summary(pack: &PackFile, (residence, coverage): (&str, &str)) -> String {
    let header = pack.header();
    let unknown = || "unknown".to_owned();
    let parameters = header.spec.parameter_count().total();
    let mut table = Table::new(&[]).with_text_columns(2);
    table.row([&"format", &header.schema]);
    table.row([&"family", &header.spec.family]);
    table.row([&"parameters", &format!("{} ({parameters})", Count(parameters as f64))]);
    table.row([&"weights", &weights(header)]);
    table.row([&"file", &Bytes(pack.preamble().file_bytes as f64)]);
    table.row([&"machine", &machine(&header.profile)]);
    table.row([&"policy", &header.policy]);
    if let Some(plan) = &header.plan {
        table.row([
            &"plan",
            &format!(
                "{} tokens of context, runs of up to {:?} tokens",
                plan.max_context, plan.token_buckets
            ),
        ]);
        let bytes = &plan.bytes;
        let [weights, cache, arena] =
            [bytes.weights, bytes.cache, bytes.arena].map(|bytes| Bytes(bytes as f64));
        let all = Bytes((bytes.weights + bytes.cache + bytes.arena) as f64);
        table.row([
            &"resident",
            &format!("{all}: weights {weights}, {} cache {cache}, arena {arena}", plan.cache_type),
        ]);
    }
    table.row([&"kernels", &coverage]);
    table.row([&"loading", &residence]);
    table.row([&"pages", &huge_page_text()]);
    let license = &header.license;
    let stated = license.id.clone().unwrap_or_else(unknown);
    table.row([
        &"license",
        &match license.files.as_slice() {
            [] => stated,
            files => format!("{stated} ({})", files.join(", ")),
        },
    ]);
    let lineage = header.lineage.as_ref();
    let trained = |lineage: &cairn_artifacts::leanpack::Lineage| {
        let hash = |hash: &Option<cairn_artifacts::Hash>| {
            hash.map_or_else(unknown, |hash| hash.to_string())
        };
        let (recipe, data) = (hash(&lineage.recipe_hash), hash(&lineage.data_hash));
        format!("step {}, recipe {recipe}, data {data}", lineage.step)
    };
    table.row([&"lineage", &lineage.map_or_else(unknown, trained)]);
    table.row([&"blake3", &pack.preamble().header_hash]);
    table.to_string()
}

fn weights(header: &Header) -> String {
    let mut forms: Vec<(String, Vec<&str>)> = Vec::new();
    for tensor in header.tensors.iter().filter(|tensor| tensor.dims.len() == 2) {
        let form = format!("{} {}", tensor.encoding, tensor.layout);
        match forms.iter_mut().find(|(known, _)| *known == form) {
            Some((_, names)) => names.push(&tensor.name),
            None => forms.push((form, vec![&tensor.name])),
        }
    }
    let is_mixed = forms.len() > 1;
    let forms = forms.into_iter().map(|(form, names)| match names[..] {
        [only] if is_mixed => format!("{form} ({only})"),
        _ if is_mixed => format!("{form} ({})", names.len()),
        _ => form,
    });
    let forms: Vec<String> = forms.collect();
    let rounded = header.tensors.iter().filter(|tensor| !tensor.exact).count();
    let exact = match rounded {
        0 => "every one as the source has it".to_owned(),
        rounded => format!("{rounded} rounded"),
    };
    let count = header.tensors.len();
    let bytes = Bytes(header.weight_bytes() as f64);
    format!("{bytes} in {count} tensors, matrices in {}; {exact}", forms.join(", "))
}

fn machine(profile: &Profile) -> String {
    let panels = format!("panels of {}", profile.panel_width);
    match (&profile.isa, &profile.cpu_model) {
        (Some(isa), Some(model)) => format!("{}: {isa}, {model}, {panels}", profile.kind),
        (Some(isa), None) => format!("{}: {isa}, {panels}", profile.kind),
        _ => format!("{}: {panels}", profile.kind),
    }
}

fn file_table(header: &Header) -> String {
    let mut table = Table::new(&["file", "bytes", "blake3 of its chunks' hashes"]);
    for file in &header.files {
        table.row([&file.name, &file.bytes, &file.hash]);
    }
    table.to_string()
}

fn tensor_table(header: &Header) -> String {
    let head = ["weight", "encoding", "layout", "shape", "bytes"];
    let mut table = Table::new(&head).with_text_columns(4);
    for tensor in &header.tensors {
        let shape = format!("{:?}", tensor.dims);
        table.row([&tensor.name, &tensor.encoding, &tensor.layout, &shape, &tensor.bytes]);
    }
    format!("{table}\n{} weights", header.tensors.len())
}
