//! The chunked output head: log-probabilities of given tokens, and cross entropy with its gradients.
//!
//! Dimensions: `o` output rows, `d` model width, `v` vocabulary, `r` rank of an adapter.
//!
//! Logits exist for at most [`HEAD_CHUNK`] rows at a time, in memory the caller gives
//! ([`head_scratch_len`]). Per row: logits are the head's product and bias, soft-capped if asked; where the
//! head has a low-rank adapter, each logit's chain goes on over the adapter's own inputs, before the cap;
//! m their maximum, `lse = m + ln Σ e^(logit − m)` with a 16-lane sum; the log-probability is
//! `logit[target] − lse`; probabilities are `e^(logit − lse)`. Gradients of the rows go through the head's
//! two gradient products in the same order of sums as any other matrix product's, so the chunking
//! is invisible.

use std::ops::Range;

pub(crate) mod bench;

use crate::compute::Compute;
use crate::cpu::Cpu;
use crate::disjoint::{RowParts, RowSlice, parallel_rows, rows_per_task, serial_rows};
use crate::encoding::Weight;
use crate::isa::Simd;
use crate::lanes::{at, sweep, vectors};
use crate::math::Real;
use crate::matmul::{BiasGrad, Matmul, MatmulDw, MatmulDx};
use crate::matmul::{bias_grad, matmul, matmul_dw, matmul_dx};
use crate::matmul::{
    bias_grad_reference, matmul_dw_reference, matmul_dx_reference, matmul_reference,
};
use crate::simd::{F32x16, kernel};
use crate::{HEAD_CHUNK, TOKEN_BLOCK, lanes, math};

/// The output head: a weight and the bound on what comes out.
#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    /// `v` outputs of `d` inputs; often the embedding.
    pub weight: Weight<'a>,
    /// Where each token's chain starts, `[v]`; 0 if absent.
    pub bias_v: Option<&'a [f32]>,
    /// Bounds logits to ±cap by `cap · tanh(logit / cap)`.
    pub softcap: Option<f32>,
    /// The arithmetic of the logits' product. Gradients belong to f32.
    pub compute: Compute,
    /// What an adapter adds to it.
    pub low_rank: Option<LowRank<'a>>,
}

/// The second product of a low-rank adapter of the head, whose chains go on from the head's.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// What the first product made of the hidden states, `[o, r]`.
    pub low_or: &'a [f32],
    /// `v` outputs of `r` inputs.
    pub weight: Weight<'a>,
}

/// Log-probabilities of one token per row.
#[derive(Debug)]
pub struct TokenLogprob<'a> {
    /// Final hidden states, `[o, d]`.
    pub x_od: &'a [f32],
    /// The head.
    pub head: Head<'a>,
    /// The token asked for in each row, `[o]`, below v.
    pub targets_o: &'a [u32],
    /// At least [`head_scratch_len`] floats; overwritten.
    pub scratch: &'a mut [f32],
    /// Log-probabilities, `[o]`, overwritten.
    pub logprob_o: &'a mut [f32],
    /// Log-sum-exp of the logits, `[o]`, overwritten.
    pub lse_o: &'a mut [f32],
    /// Entropy of the distribution in nats, `[o]`, overwritten.
    pub entropy_o: Option<&'a mut [f32]>,
}

/// The gradients of [`TokenLogprob`], recomputing the logits.
#[derive(Debug)]
pub struct TokenLogprobGrad<'a> {
    /// Final hidden states, `[o, d]`.
    pub x_od: &'a [f32],
    /// The head.
    pub head: Head<'a>,
    /// The token asked for in each row, `[o]`; not read where all gradients of a row are 0.
    pub targets_o: &'a [u32],
    /// Gradient of the log-probabilities, `[o]`.
    pub dlogprob_o: &'a [f32],
    /// Gradient of the log-sum-exps, `[o]`.
    pub dlse_o: Option<&'a [f32]>,
    /// Gradient of the entropies, `[o]`.
    pub dentropy_o: Option<&'a [f32]>,
    /// At least [`head_scratch_len`] floats; overwritten.
    pub scratch: &'a mut [f32],
    /// Where the gradients go.
    pub grads: HeadGrads<'a>,
}

/// Where the gradients of a head go.
#[derive(Debug)]
pub struct HeadGrads<'a> {
    /// Gradient of the hidden states, `[o, d]`, overwritten; `None` where nothing wants it.
    pub dx_od: Option<&'a mut [f32]>,
    /// Gradient of the head's weight, `[v, d]`; `None` where it is frozen.
    pub dw_vd: Option<&'a mut [f32]>,
    /// Gradient of the head's bias, `[v]`; `None` where there is none or it is frozen.
    pub db_v: Option<&'a mut [f32]>,
    /// The gradients of the head's adapter; `None` where there is none.
    pub low_rank: Option<LowRankGrads<'a>>,
    /// Whether the weights' and the bias's gradients are added to what is there.
    pub accumulate_dw: bool,
    /// Rows of `o` that come from one batch row.
    pub row_tokens: usize,
}

/// Where the gradients of a head's adapter go.
#[derive(Debug)]
pub struct LowRankGrads<'a> {
    /// Gradient of [`LowRank::low_or`], overwritten; `None` where nothing wants it.
    pub dlow_or: Option<&'a mut [f32]>,
    /// Gradient of [`LowRank::weight`], `[v, r]`; `None` where it is frozen.
    pub dw_vr: Option<&'a mut [f32]>,
}

/// Cross entropy with known weights per token: log-probabilities and gradients in one pass.
///
/// The loss is `−Σ weight · logprob`.
#[derive(Debug)]
pub struct CrossEntropy<'a> {
    /// Final hidden states, `[o, d]`.
    pub x_od: &'a [f32],
    /// The head.
    pub head: Head<'a>,
    /// The right token of each row, `[o]`; not read where the weight is 0.
    pub targets_o: &'a [u32],
    /// What each row's loss is multiplied by, `[o]`. Rows of weight 0 have log-probability 0 and
    /// contribute exact zeros to the gradients.
    pub weights_o: &'a [f32],
    /// At least [`head_scratch_len`] floats; overwritten.
    pub scratch: &'a mut [f32],
    /// Log-probabilities, `[o]`, overwritten.
    pub logprob_o: &'a mut [f32],
    /// Where the gradients go.
    pub grads: HeadGrads<'a>,
}

/// Floats of scratch that a head over `vocab` tokens needs for `rows` rows.
pub fn head_scratch_len(rows: usize, vocab: usize) -> usize {
    rows.min(HEAD_CHUNK) * vocab
}

/// Log-probabilities of one token per row.
pub fn token_logprob(cpu: &Cpu, args: TokenLogprob<'_>) {
    run_logprob(&Products { cpu: Some(cpu) }, args);
}

/// Log-sum-exp of one row of logits that exist already, as a sampler's do: the bits that
/// [`token_logprob`] computes for that row.
pub fn log_sum_exp(cpu: &Cpu, logits_v: &[f32]) -> f32 {
    fast_log_sum_exp(cpu.simd(), logits_v)
}

/// [`token_logprob`] in plain loops.
pub fn token_logprob_reference(args: TokenLogprob<'_>) {
    run_logprob(&Products { cpu: None }, args);
}

/// The gradients of [`token_logprob`].
pub fn token_logprob_grad(cpu: &Cpu, args: TokenLogprobGrad<'_>) {
    run_logprob_grad(&Products { cpu: Some(cpu) }, args);
}

/// [`token_logprob_grad`] in plain loops.
pub fn token_logprob_grad_reference(args: TokenLogprobGrad<'_>) {
    run_logprob_grad(&Products { cpu: None }, args);
}

/// Cross entropy: log-probabilities and gradients in one pass.
pub fn cross_entropy(cpu: &Cpu, args: CrossEntropy<'_>) {
    run_cross_entropy(&Products { cpu: Some(cpu) }, args);
}

/// [`cross_entropy`] in plain loops.
pub fn cross_entropy_reference(args: CrossEntropy<'_>) {
    run_cross_entropy(&Products { cpu: None }, args);
}

/// What one row of logits gives.
#[derive(Debug, Clone, Copy, Default)]
struct RowResult {
    logprob: f32,
    lse: f32,
    entropy: f32,
}

/// What one row of logits is turned into: nothing, or its gradient.
#[derive(Debug, Clone, Copy, Default)]
struct RowGrads {
    logprob: f32,
    lse: f32,
    entropy: f32,
}

impl RowGrads {
    fn is_zero(&self) -> bool {
        self.logprob == 0.0 && self.lse == 0.0 && self.entropy == 0.0
    }
}

/// Caps a row of logits and reads it.
fn row_result(logits_v: &mut [f32], softcap: Option<f32>, target: u32) -> RowResult {
    if let Some(cap) = softcap {
        for x in logits_v.iter_mut() {
            *x = cap * math::tanh(*x * (1.0 / cap));
        }
    }
    let max = lanes::max(logits_v.iter().copied());
    let lse = max + math::ln(lanes::sum(logits_v.iter().map(|&x| math::exp(x - max))));
    let entropy = lanes::dot(logits_v.iter().map(|&x| (math::exp(x - lse), lse - x)));
    RowResult { logprob: logits_v[target as usize] - lse, lse, entropy }
}

/// Log-sum-exp of a row.
#[inline(always)]
fn row_lse<V: F32x16>(logits_v: &[f32]) -> f32 {
    let max = lanes::row_max::<V>(logits_v);
    let mut sum = V::zero();
    for i in vectors(logits_v.len()) {
        let x = lanes::at_or::<V>(logits_v, i, f32::NEG_INFINITY);
        sum = sum + math::exp(x - V::splat(max));
    }
    max + math::ln(sum.sum())
}

kernel! {
    fn fast_log_sum_exp<V>(logits_v: &[f32]) -> f32 {
        row_lse::<V>(logits_v)
    }
}

kernel! {
    /// [`row_result`] with vectors. The entropy is left out (0) unless it is wanted.
    fn fast_row_result<V>(
        logits_v: &mut [f32],
        softcap: Option<f32>,
        target: u32,
        with_entropy: bool,
    ) -> RowResult {
        if let Some(cap) = softcap {
            let (inverse, cap) = (V::splat(1.0 / cap), V::splat(cap));
            sweep!(logits_v, i => cap * math::tanh(at::<V>(logits_v, i) * inverse));
        }
        let lse = row_lse::<V>(logits_v);
        let mut entropy = V::zero();
        if with_entropy {
            for i in vectors(logits_v.len()) {
                let z = V::splat(lse) - lanes::at_or::<V>(logits_v, i, lse);
                entropy = math::exp(V::zero() - z).mul_add(z, entropy);
            }
        }
        RowResult { logprob: logits_v[target as usize] - lse, lse, entropy: entropy.sum() }
    }
}

/// How a row of capped logits turns into its gradient.
#[derive(Clone, Copy)]
struct RowSlope {
    softcap: Option<f32>,
    result: RowResult,
    grads: RowGrads,
}

impl RowSlope {
    /// The gradient of the logit `x`; `own` is the log-probability's where `x` is the target's.
    #[inline(always)]
    fn at<R: Real>(&self, x: R, own: f32) -> R {
        let z = x.minus(R::splat(self.result.lse));
        let base = R::splat(self.grads.lse - self.grads.logprob);
        let factor = R::splat(-self.grads.entropy).fma(z.plus(R::splat(self.result.entropy)), base);
        let gradient = math::exp(z).fma(factor, R::splat(own));
        match self.softcap {
            Some(cap) => {
                let t = x.times(R::splat(1.0 / cap));
                gradient.times(R::splat(0.0).minus(t).fma(t, R::splat(1.0)))
            }
            None => gradient,
        }
    }
}

/// Turns a row of capped logits into its gradient.
fn row_gradient(logits_v: &mut [f32], slope: RowSlope, target: u32) {
    for (column, x) in logits_v.iter_mut().enumerate() {
        *x = slope.at(*x, if column == target as usize { slope.grads.logprob } else { 0.0 });
    }
}

kernel! {
    /// [`row_gradient`] with vectors.
    fn fast_row_gradient<V>(logits_v: &mut [f32], slope: RowSlope, target: u32) {
        let at_target = slope.at(logits_v[target as usize], slope.grads.logprob);
        if slope.grads.entropy == 0.0 && slope.softcap.is_none() {
            // The common case without its constant zeros: −0 · (z + H) adds nothing to the base.
            let lse = V::splat(slope.result.lse);
            let base = V::splat(slope.grads.lse - slope.grads.logprob);
            sweep!(logits_v, i => {
                math::exp(at::<V>(logits_v, i) - lse).mul_add(base, V::zero())
            });
        } else {
            sweep!(logits_v, i => slope.at(at::<V>(logits_v, i), 0.0));
        }
        logits_v[target as usize] = at_target;
    }
}

/// Calls `f` with ranges of rows whose gradients may be folded one range after the other: whole
/// token blocks, at most [`HEAD_CHUNK`] rows, and the `row_tokens` that align blocks inside.
fn for_chunks(rows: usize, row_tokens: usize, mut f: impl FnMut(Range<usize>, usize)) {
    const { assert!(HEAD_CHUNK.is_multiple_of(TOKEN_BLOCK)) };
    assert!(row_tokens > 0 || rows == 0, "row_tokens of a head");
    let mut start = 0;
    while start < rows {
        let into_row = start % row_tokens;
        let (len, align) = if row_tokens >= HEAD_CHUNK {
            (HEAD_CHUNK.min(row_tokens - into_row), HEAD_CHUNK)
        } else {
            (HEAD_CHUNK / row_tokens * row_tokens, row_tokens)
        };
        let end = rows.min(start + len);
        f(start..end, align);
        start = end;
    }
}

/// The gradients of one weight and its inputs behind the logits' gradient of some rows.
struct Behind<'a> {
    x_ok: &'a [f32],
    weight: Weight<'a>,
    dx_ok: Option<&'a mut [f32]>,
    dw_vk: Option<&'a mut [f32]>,
    row_tokens: usize,
    accumulate: bool,
}

/// Some rows of a matrix of `width` columns.
fn rows_of<'a>(values: &'a [f32], rows: &Range<usize>, width: usize) -> &'a [f32] {
    &values[rows.start * width..rows.end * width]
}

/// As [`rows_of`], where there is a matrix.
fn rows_of_mut<'a>(
    values: Option<&'a mut [f32]>,
    rows: &Range<usize>,
    width: usize,
) -> Option<&'a mut [f32]> {
    values.map(|values| &mut values[rows.start * width..rows.end * width])
}

/// The products a head is made of: the kernels with a `Cpu`, their references without.
struct Products<'c> {
    cpu: Option<&'c Cpu>,
}

impl Products<'_> {
    /// Logits of some of the rows `x_od`, not yet capped.
    fn logits(&self, head: &Head<'_>, x_od: &[f32], rows: &Range<usize>, logits_ov: &mut [f32]) {
        let product = |args: Matmul<'_>| match self.cpu {
            Some(cpu) => matmul(cpu, args),
            None => matmul_reference(args),
        };
        product(Matmul {
            x_tk: rows_of(x_od, rows, head.weight.k),
            weight: head.weight,
            bias_n: head.bias_v,
            t: rows.len(),
            y_tn: logits_ov,
            accumulate: false,
            compute: head.compute,
        });
        let Some(LowRank { low_or, weight }) = head.low_rank else { return };
        product(Matmul {
            x_tk: rows_of(low_or, rows, weight.k),
            weight,
            bias_n: None,
            t: rows.len(),
            y_tn: logits_ov,
            accumulate: true,
            compute: Compute::F32,
        });
    }

    /// Calls `f` for all of `rows` rows, in parallel with the proof of vectors or in one piece.
    fn rows<R: RowParts>(
        &self,
        (rows, width): (usize, usize),
        outputs: R,
        f: impl Fn(Option<Simd>, Range<usize>, R::Part) + Sync,
    ) {
        match self.cpu {
            Some(cpu) => {
                let simd = Some(cpu.simd());
                parallel_rows(cpu, rows, rows_per_task(width), outputs, |rows, part, _| {
                    f(simd, rows, part);
                });
            }
            None => serial_rows(rows, outputs, |rows, part| f(None, rows, part)),
        }
    }

    /// The gradients behind the logits' gradient of some rows.
    fn backward(&self, dlogits_ov: &[f32], behind: Behind<'_>) {
        let Behind { x_ok, weight, dx_ok, dw_vk, row_tokens, accumulate } = behind;
        let Weight { n, k, .. } = weight;
        let t = x_ok.len() / k;
        if let Some(dx_tk) = dx_ok {
            let args = MatmulDx { dy_tn: dlogits_ov, weight, dx_tk, t, accumulate: false };
            match self.cpu {
                Some(cpu) => matmul_dx(cpu, args),
                None => matmul_dx_reference(args),
            }
        }
        let Some(dw_nk) = dw_vk else { return };
        let args =
            MatmulDw { dy_tn: dlogits_ov, x_tk: x_ok, dw_nk, n, k, t, row_tokens, accumulate };
        match self.cpu {
            Some(cpu) => matmul_dw(cpu, args),
            None => matmul_dw_reference(args),
        }
    }

    /// The gradient of a bias behind the logits' gradient of some rows.
    fn bias_grad(&self, args: BiasGrad<'_>) {
        match self.cpu {
            Some(cpu) => bias_grad(cpu, args),
            None => bias_grad_reference(args),
        }
    }
}

fn run_logprob(products: &Products<'_>, args: TokenLogprob<'_>) {
    let TokenLogprob { x_od, head, targets_o, scratch, logprob_o, lse_o, mut entropy_o } = args;
    let (d, v) = (head.weight.k, head.weight.n);
    let rows = targets_o.len();
    assert_eq!((x_od.len(), logprob_o.len(), lse_o.len()), (rows * d, rows, rows), "token_logprob");
    for start in (0..rows).step_by(HEAD_CHUNK) {
        let chunk = start..rows.min(start + HEAD_CHUNK);
        let logits_ov = &mut scratch[..chunk.len() * v];
        products.logits(&head, x_od, &chunk, logits_ov);
        let targets_o = &targets_o[chunk.clone()];
        let figures = [&mut logprob_o[chunk.clone()], &mut lse_o[chunk.clone()]];
        let entropy = entropy_o.as_deref_mut().map(|entropy_o| &mut entropy_o[chunk.clone()]);
        let outputs = (
            RowSlice::new(logits_ov, v),
            figures.map(|figure| RowSlice::new(figure, 1)),
            entropy.map(|entropy_o| RowSlice::new(entropy_o, 1)),
        );
        products.rows((chunk.len(), v), outputs, |simd, rows, (logits_ov, figures, entropy)| {
            let [logprob_o, lse_o] = figures;
            let mut entropy_o = entropy;
            for (i, logits_v) in logits_ov.chunks_exact_mut(v).enumerate() {
                let target = targets_o[rows.start + i];
                let wanted = entropy_o.is_some();
                let result = match simd {
                    Some(simd) => fast_row_result(simd, logits_v, head.softcap, target, wanted),
                    None => row_result(logits_v, head.softcap, target),
                };
                (logprob_o[i], lse_o[i]) = (result.logprob, result.lse);
                if let Some(entropy_o) = &mut entropy_o {
                    entropy_o[i] = result.entropy;
                }
            }
        });
    }
}

fn run_logprob_grad(products: &Products<'_>, args: TokenLogprobGrad<'_>) {
    let TokenLogprobGrad { x_od, head, targets_o, dlogprob_o, dlse_o, dentropy_o, .. } = args;
    let at = |grads: Option<&[f32]>, o: usize| grads.map_or(0.0, |grads| grads[o]);
    let row_grads = |o: usize| RowGrads {
        logprob: dlogprob_o[o],
        lse: at(dlse_o, o),
        entropy: at(dentropy_o, o),
    };
    let pass = HeadPass { products, x_od, head, targets_o };
    pass.run(args.scratch, args.grads, row_grads, None);
}

fn run_cross_entropy(products: &Products<'_>, args: CrossEntropy<'_>) {
    let CrossEntropy { x_od, head, targets_o, weights_o, scratch, logprob_o, grads } = args;
    assert_eq!(weights_o.len(), targets_o.len(), "cross_entropy: weights");
    let row_grads = |o: usize| RowGrads { logprob: -weights_o[o], ..RowGrads::default() };
    let pass = HeadPass { products, x_od, head, targets_o };
    pass.run(scratch, grads, row_grads, Some(logprob_o));
}

/// One pass over the rows of a head that ends in gradients.
struct HeadPass<'a> {
    products: &'a Products<'a>,
    x_od: &'a [f32],
    head: Head<'a>,
    targets_o: &'a [u32],
}

impl HeadPass<'_> {
    fn run(
        &self,
        scratch: &mut [f32],
        grads: HeadGrads<'_>,
        row_grads: impl Fn(usize) -> RowGrads + Sync,
        mut logprob_o: Option<&mut [f32]>,
    ) {
        let HeadGrads { mut dx_od, mut dw_vd, mut db_v, low_rank, mut accumulate_dw, row_tokens } =
            grads;
        let (mut dlow_or, mut dw_vr) =
            low_rank.map_or((None, None), |grads| (grads.dlow_or, grads.dw_vr));
        let (d, v) = (self.head.weight.k, self.head.weight.n);
        let rows = self.targets_o.len();
        assert_eq!(self.x_od.len(), rows * d, "head: x");
        assert!(dx_od.as_ref().is_none_or(|dx_od| dx_od.len() == rows * d), "head: dx");
        if rows == 0 && !accumulate_dw {
            for sums in [&mut dw_vd, &mut db_v, &mut dw_vr].into_iter().flatten() {
                sums.fill(0.0);
            }
        }
        let (softcap, targets_o) = (self.head.softcap, self.targets_o);
        for_chunks(rows, row_tokens, |chunk, align| {
            let logits_ov = &mut scratch[..chunk.len() * v];
            self.products.logits(&self.head, self.x_od, &chunk, logits_ov);
            let logprob_o = logprob_o.as_deref_mut().map(|all| &mut all[chunk.clone()]);
            let outputs = (RowSlice::new(logits_ov, v), logprob_o.map(|all| RowSlice::new(all, 1)));
            self.products.rows((chunk.len(), v), outputs, |simd, rows, (logits_ov, logprobs)| {
                let mut logprobs = logprobs;
                for (i, logits_v) in logits_ov.chunks_exact_mut(v).enumerate() {
                    let o = chunk.start + rows.start + i;
                    let logprob = gradient_row(simd, logits_v, softcap, targets_o[o], row_grads(o));
                    if let Some(logprobs) = &mut logprobs {
                        logprobs[i] = logprob;
                    }
                }
            });
            let logits_ov = &scratch[..chunk.len() * v];
            let (row_tokens, accumulate) = (align, accumulate_dw);
            let behind = Behind {
                x_ok: rows_of(self.x_od, &chunk, d),
                weight: self.head.weight,
                dx_ok: rows_of_mut(dx_od.as_deref_mut(), &chunk, d),
                dw_vk: dw_vd.as_deref_mut(),
                row_tokens,
                accumulate,
            };
            self.products.backward(logits_ov, behind);
            if let Some(db_n) = db_v.as_deref_mut() {
                let (dy_tn, t) = (logits_ov, chunk.len());
                self.products.bias_grad(BiasGrad { dy_tn, db_n, t, row_tokens, accumulate });
            }
            if let Some(LowRank { low_or, weight }) = self.head.low_rank {
                let behind = Behind {
                    x_ok: rows_of(low_or, &chunk, weight.k),
                    weight,
                    dx_ok: rows_of_mut(dlow_or.as_deref_mut(), &chunk, weight.k),
                    dw_vk: dw_vr.as_deref_mut(),
                    row_tokens,
                    accumulate,
                };
                self.products.backward(logits_ov, behind);
            }
            accumulate_dw = true;
        });
    }
}

/// Turns one row of logits into its gradient and gives its log-probability, 0 for a row without
/// gradient.
fn gradient_row(
    simd: Option<Simd>,
    logits_v: &mut [f32],
    softcap: Option<f32>,
    target: u32,
    grads: RowGrads,
) -> f32 {
    if grads.is_zero() {
        logits_v.fill(0.0);
        return 0.0;
    }
    let result = match simd {
        Some(simd) => fast_row_result(simd, logits_v, softcap, target, grads.entropy != 0.0),
        None => row_result(logits_v, softcap, target),
    };
    let slope = RowSlope { softcap, result, grads };
    match simd {
        Some(simd) => fast_row_gradient(simd, logits_v, slope, target),
        None => row_gradient(logits_v, slope, target),
    }
    result.logprob
}

#[cfg(test)]
mod tests;
