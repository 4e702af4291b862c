//! What rounding a class of weights costs: bytes, divergence and perplexity, measured on text.
//!
//! The model runs in f32 with one class of weights at a time replaced by what an encoding makes of
//! them, everything else as it is. The divergence is KL(as it is ‖ rounded) of the next token, mean
//! over all positions, in nats; sums are in f64.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use cairn_kernels::encoding::encode;
use cairn_kernels::memory::bytes_of_mut;
use cairn_kernels::{Cpu, Encoding, Layout, SeqSlot, Weight};
use cairn_model::{BuildOptions, Head, TensorSource, build_program, load_weights};
use cairn_program::{
    Class, Feed, KvPlacement, MemoryPlan, ProgramId, Run, Session, SessionProgram, Sizes,
};
use cairn_spec::ModelSpec;
use serde::Serialize;

use crate::error::ConvertError;

const PROGRAM: ProgramId = ProgramId(0);
/// The class of all matrices.
const ALL: &str = "all";
/// Colors of the plot's bars, one for each encoding.
const COLORS: [&str; 8] =
    ["#3465a4", "#73a946", "#c4552d", "#75507b", "#c4a000", "#06989a", "#888a85", "#a40000"];
/// Where the bars begin, in pixels, and the longest.
const BARS_LEFT: f64 = 150.0;
const BARS_WIDTH: f64 = 420.0;

/// A model, and the text that it is measured on.
#[expect(missing_debug_implementations, reason = "sources of tensors need not have one")]
pub struct SensitivityJob<'a> {
    /// What the model computes.
    pub spec: &'a ModelSpec,
    /// Its tensors.
    pub source: &'a dyn TensorSource,
    /// Token ids: pieces of text, all of one length.
    pub rows: &'a [Vec<u32>],
    /// What is tried.
    pub encodings: &'a [Encoding],
}

/// What was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Sensitivity {
    /// Tokens of text.
    pub tokens: usize,
    /// Tokens that were predicted.
    pub targets: usize,
    /// Mean negative log-probability of a target, in nats, with the weights as they are.
    pub loss: f64,
    /// `e^loss`.
    pub perplexity: f64,
    /// Classes of weights, in the order of the program; all of them last.
    pub classes: Vec<ClassCost>,
}

/// What rounding one class costs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClassCost {
    /// The module, without its layer; `all` for all of them.
    pub class: String,
    /// Matrices.
    pub matrices: usize,
    /// Their elements.
    pub elements: usize,
    /// What each encoding makes of them.
    pub rounded: Vec<Cost>,
}

/// What one encoding costs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// Its name.
    pub encoding: &'static str,
    /// Bytes of the class's matrices, in panels.
    pub bytes: usize,
    /// KL(as it is ‖ rounded), in nats a token.
    pub kl: f64,
    /// How much perplexity changes; negative where it falls.
    pub perplexity_change: f64,
}

/// A weight matrix of the program.
pub(crate) struct Matrix {
    pub(crate) name: String,
    columns: usize,
}

/// Measures. `progress` is told measurements done and in all, and ends them by returning `false`.
///
/// # Errors
///
/// [`ConvertError`] if the model has no program or its tensors do not fit;
/// [`ConvertError::Stopped`] if `progress` says so.
///
/// # Panics
///
/// Panics if the rows are of several lengths, or have less than two tokens.
pub fn sensitivity(
    job: &SensitivityJob<'_>,
    cpu: Cpu,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Sensitivity, ConvertError> {
    let mut probe = Probe::new(job, cpu)?;
    let classes = probe.class_costs(true, progress)?;
    let (loss, length) = (probe.loss, job.rows[0].len());
    let targets = job.rows.len() * (length - 1);
    let tokens = job.rows.len() * length;
    Ok(Sensitivity { tokens, targets, loss, perplexity: loss.exp(), classes })
}

/// A model in f32 and what it says of the text as it is.
pub(crate) struct Probe<'a> {
    session: Session,
    job: &'a SensitivityJob<'a>,
    base: Vec<f32>,
    loss: f64,
}

impl<'a> Probe<'a> {
    pub(crate) fn new(job: &'a SensitivityJob<'a>, cpu: Cpu) -> Result<Self, ConvertError> {
        let length = job.rows.first().map_or(0, Vec::len);
        assert!(length > 1 && job.rows.iter().all(|row| row.len() == length), "rows of one length");
        let program = build_program(job.spec, &BuildOptions::new(Head::Logits))?;
        let sizes = Sizes::dense(length, 1);
        let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
        let mut session = Session::new(MemoryPlan::new(vec![program], None)?, cpu)?;
        load_weights(&mut session, job.spec, job.source)?;
        let mut base = Vec::new();
        let loss = run(&mut session, job, &mut |_, logits| base.extend_from_slice(logits))?;
        Ok(Self { session, job, base, loss })
    }

    /// What each encoding costs each class, and `all` of them together where that is asked.
    pub(crate) fn class_costs(
        &mut self,
        all: bool,
        progress: &mut dyn FnMut(usize, usize) -> bool,
    ) -> Result<Vec<ClassCost>, ConvertError> {
        let (mut names, groups) = classes(self.job.spec)?;
        names.retain(|name| all || name != ALL);
        let encodings = self.job.encodings;
        let (mut costs, total) = (Vec::new(), names.len() * encodings.len());
        for class in names {
            let matrices = &groups[&class];
            let mut rounded = Vec::new();
            for &encoding in encodings {
                if !progress(costs.len() * encodings.len() + rounded.len(), total) {
                    return Err(ConvertError::Stopped);
                }
                let matrices: Vec<_> = matrices.iter().map(|matrix| (matrix, encoding)).collect();
                rounded.push(Cost { encoding: encoding.name(), ..self.cost(&matrices)? });
            }
            let values = |matrix: &Matrix| self.session.stored_f32(&matrix.name);
            let elements = |matrix: &Matrix| values(matrix).map_or(0, <[f32]>::len);
            let elements = matrices.iter().map(elements).sum();
            costs.push(ClassCost { class, matrices: matrices.len(), elements, rounded });
        }
        Ok(costs)
    }

    /// Rounds some matrices, measures, and puts them back.
    pub(crate) fn cost(&mut self, matrices: &[(&Matrix, Encoding)]) -> Result<Cost, ConvertError> {
        let Self { session, job, base, loss: base_loss } = self;
        let mut bytes = 0;
        let mut kept = Vec::with_capacity(matrices.len());
        for (Matrix { name, columns }, encoding) in matrices {
            let values = session.stored_f32_mut(name).expect("the program has it in f32");
            kept.push(values.to_vec());
            let rows = values.len() / columns;
            let encoding = encoding.for_shape(rows, *columns);
            bytes += Weight::stored_bytes(encoding, Layout::Panel, rows, *columns);
            round(encoding, (rows, *columns), values);
        }
        let vocab = job.spec.vocab_size;
        let length = job.rows[0].len();
        let mut divergence = 0.0;
        let loss = run(session, job, &mut |number, logits| {
            let before = &base[number * length * vocab..][..length * vocab];
            let pairs = before.chunks_exact(vocab).zip(logits.chunks_exact(vocab));
            divergence += pairs.map(|(p, q)| kl(p, q)).sum::<f64>();
        })?;
        for ((Matrix { name, .. }, _), kept) in matrices.iter().zip(kept) {
            session.stored_f32_mut(name).expect("as above").copy_from_slice(&kept);
        }
        #[expect(clippy::cast_precision_loss, reason = "counts of tokens")]
        let kl = divergence / (job.rows.len() * length) as f64;
        let perplexity_change = loss.exp() - base_loss.exp();
        Ok(Cost { encoding: "", bytes, kl, perplexity_change })
    }
}

/// The class of a weight: its module, without the layer.
pub(crate) fn class_of(weight: &str) -> &str {
    let stem = weight.trim_end_matches(".weight").trim_start_matches("model.");
    let module = stem.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
    module.map_or(stem, |(_, module)| module)
}

/// The matrices that an encoding is chosen for, by module; the modules in the program's order.
#[expect(clippy::type_complexity, reason = "an order and what it orders")]
pub(crate) fn classes(
    spec: &ModelSpec,
) -> Result<(Vec<String>, BTreeMap<String, Vec<Matrix>>), ConvertError> {
    let asked = Encoding::Bf16;
    let options = BuildOptions { encoding: asked, ..BuildOptions::new(Head::Logits) };
    let program = build_program(spec, &options)?;
    let (mut names, mut groups) = (Vec::new(), BTreeMap::<String, Vec<Matrix>>::new());
    for (_, weight) in program.of_class(Class::Weight) {
        if weight.value_type.encoding() != Some(asked) {
            continue;
        }
        let class = class_of(&weight.name).to_owned();
        let cairn_program::ValueType::Encoded { inputs: columns, .. } = weight.value_type else {
            continue;
        };
        if !names.contains(&class) {
            names.push(class.clone());
        }
        for class in [class, ALL.to_owned()] {
            let matrix = Matrix { name: weight.name.clone(), columns };
            groups.entry(class).or_default().push(matrix);
        }
    }
    names.push(ALL.to_owned());
    groups.entry(ALL.to_owned()).or_default();
    Ok((names, groups))
}

/// Runs all rows; returns the loss, and shows the logits of each row.
fn run(
    session: &mut Session,
    job: &SensitivityJob<'_>,
    seen: &mut dyn FnMut(usize, &[f32]),
) -> Result<f64, ConvertError> {
    let vocab = job.spec.vocab_size;
    let mut sum = 0.0;
    let mut targets = 0.0;
    for (number, ids) in job.rows.iter().enumerate() {
        let positions: Vec<u32> = (0_u32..).take(ids.len()).collect();
        let slots = [SeqSlot { start: 0, len: ids.len(), cached: 0, blocks: &[] }];
        let feeds = [Feed::u32("ids", ids), Feed::u32("positions", &positions)];
        session.run(PROGRAM, &Run::forward(&feeds, &slots))?;
        let logits = session.output(PROGRAM, "logits");
        seen(number, logits);
        for (row, &target) in logits.chunks_exact(vocab).zip(&ids[1..]) {
            sum += log_sum(row) - f64::from(row[target as usize]);
            targets += 1.0;
        }
    }
    Ok(sum / targets)
}

/// Replaces values by what an encoding makes of them.
fn round(encoding: Encoding, (n, k): (usize, usize), values: &mut [f32]) {
    // The same values, whatever room they take.
    let encoding = if encoding == Encoding::Bf16z { Encoding::Bf16 } else { encoding };
    // The layout that every encoding has.
    let form = (encoding, Layout::Panel);
    let size = Weight::stored_bytes(encoding, form.1, n, k);
    let mut stored = vec![0.0_f32; size.div_ceil(4)];
    let bytes = &mut bytes_of_mut(&mut stored)[..size];
    encode(form, (n, k), values, bytes);
    Weight { encoding, layout: form.1, n, k, bytes }.decode(values);
}

/// The logarithm of the sum of the exponentials.
fn log_sum(logits: &[f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let largest = f64::from(largest);
    let sum: f64 = logits.iter().map(|&x| (f64::from(x) - largest).exp()).sum();
    largest + sum.ln()
}

/// KL of two distributions that are given by logits.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let (all_p, all_q) = (log_sum(p), log_sum(q));
    let terms = p.iter().zip(q).map(|(&p, &q)| {
        let log_p = f64::from(p) - all_p;
        log_p.exp() * (log_p - (f64::from(q) - all_q))
    });
    let sum: f64 = terms.sum();
    // Rounding can leave it a little below zero where the two are the same. What is no number came of
    // weights that the encoding cannot hold.
    if sum.is_nan() { f64::INFINITY } else { sum.max(0.0) }
}

impl Sensitivity {
    /// The divergences as bars on a logarithmic scale, as SVG.
    pub fn svg(&self) -> String {
        let costs = || self.classes.iter().flat_map(|class| &class.rounded).map(|cost| cost.kl);
        let smallest = costs().filter(|&kl| kl > 0.0).fold(f64::INFINITY, f64::min);
        let largest = costs().fold(smallest, f64::max);
        let (low, high) = (smallest.log10().floor(), largest.log10().ceil());
        let width = |kl: f64| match kl > 0.0 && high > low {
            true => (kl.log10() - low) / (high - low) * BARS_WIDTH,
            false => 0.0,
        };
        let (mut bars, mut y) = (String::new(), 20.0);
        for class in &self.classes {
            let name = &class.class;
            let _ = writeln!(bars, r#"<text x="4" y="{:.0}">{name}</text>"#, y + 10.0);
            for (number, cost) in class.rounded.iter().enumerate() {
                let Cost { encoding, bytes, kl, perplexity_change } = cost;
                let (width, color) = (width(*kl), COLORS[number % COLORS.len()]);
                let _ = writeln!(
                    bars,
                    concat!(
                        r#"<rect x="{}" y="{:.0}" width="{:.1}" height="10" fill="{}"/>"#,
                        r#"<text x="{:.1}" y="{:.0}">{} {:.1e} · {:+.4} · {}</text>"#,
                    ),
                    BARS_LEFT,
                    y,
                    width,
                    color,
                    BARS_LEFT + width + 4.0,
                    y + 9.0,
                    encoding,
                    kl,
                    perplexity_change,
                    bytes,
                );
                y += 12.0;
            }
            y += 6.0;
        }
        format!(
            concat!(
                r#"<svg xmlns="http://www.w3.org/2000/svg" width="{:.0}" height="{:.0}""#,
                r##" font-family="sans-serif" font-size="10" fill="#555">"##,
                "\n",
                r#"<text x="4" y="12">KL(as stored ‖ rounded), nats a token,"#,
                " from 1e{:.0} to 1e{:.0} · change of perplexity · bytes</text>\n{}</svg>\n",
            ),
            BARS_LEFT + BARS_WIDTH + 230.0,
            y + 4.0,
            low,
            high,
            bars,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_do_not_diverge_and_shifted_ones_are_equal() {
        assert!(kl(&[1.0, 2.0, 3.0], &[11.0, 12.0, 13.0]) < 1e-12);
        let expected = 0.75 * (0.75_f64 / 0.5).ln() + 0.25 * (0.25_f64 / 0.5).ln();
        let found = kl(&[3.0_f32.ln(), 0.0], &[0.0, 0.0]);
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
}
