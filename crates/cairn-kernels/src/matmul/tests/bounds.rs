//! Every product against f64, within the bound that its order of sums promises.
//!
//! A chain of m fused multiply-adds is off by at most γ(m) = m·u / (1 − m·u) times the sum of the
//! magnitudes, with u = 2⁻²⁴; so is a sum of m numbers (Higham 2002, section 3.1). Chains inside token
//! blocks that are then added up are shorter than one chain: their bound is smaller too.

use super::*;
use crate::TOKEN_BLOCK;
use crate::matmul::reference::token_blocks;
use crate::testing::every_cpu;

/// γ(m).
fn gamma(roundings: usize) -> f64 {
    let unit = roundings as f64 * 2.0_f64.powi(-24);
    unit / (1.0 - unit)
}

/// Compares `found` with f64: `terms(i)` are what element i adds up, its start among them, in at most
/// `roundings` steps.
#[track_caller]
fn check_bound<T>(found: &[f32], roundings: usize, terms: impl Fn(usize) -> T)
where
    T: Iterator<Item = f64>,
{
    for (i, &found) in found.iter().enumerate() {
        let (sum, magnitude) =
            terms(i).fold((0.0, 0.0), |(sum, all), term| (sum + term, all + term.abs()));
        let (error, bound) = ((f64::from(found) - sum).abs(), gamma(roundings) * magnitude);
        assert!(error <= bound, "element {i}: off by {error}, bound {bound}");
    }
}

fn product(a: f32, b: f32) -> f64 {
    f64::from(a) * f64::from(b)
}

/// Every way a weight is stored.
fn forms() -> impl Iterator<Item = (Encoding, Layout)> {
    Encoding::forms().into_iter()
}

/// Tokens, outputs, inputs: odd, prime, one, past a block.
const SIZES: [(usize, usize, usize); 4] = [(5, 33, 700), (7, 401, 17), (1, 19, 1), (67, 1, 129)];

#[test]
fn forward() {
    for (form, (t, n, k)) in forms().flat_map(|form| SIZES.map(|sizes| (form, sizes))) {
        let stored = Stored::new(form.0, form.1, n, k, 11);
        let weight = stored.weight();
        let (x_tk, bias, before) = (values(t * k, 12), values(n, 13), values(t * n, 14));
        for start in 0..3 {
            every_cpu(|cpu| {
                let mut y_tn = before.clone();
                let (accumulate, bias_n) = (start == 1, (start == 2).then_some(&bias[..]));
                let (x_tk, y_tn_mut, compute) = (&x_tk[..], &mut y_tn[..], Compute::F32);
                let args = Matmul { x_tk, weight, bias_n, y_tn: y_tn_mut, t, accumulate, compute };
                matmul(cpu, args);
                check_bound(&y_tn, k, |i| {
                    let (token, output) = (i / n, i % n);
                    let first = match start {
                        0 => 0.0,
                        1 => f64::from(before[i]),
                        _ => f64::from(bias[output]),
                    };
                    let term = move |input| (token * k + input, weight.value(output, input));
                    let x_tk = &x_tk;
                    let terms = (0..k).map(term).map(move |(x, w)| product(x_tk[x], w));
                    terms.chain([first])
                });
            });
        }
    }
}

#[test]
fn input_gradient() {
    for (form, (t, k, n)) in forms().flat_map(|form| SIZES.map(|sizes| (form, sizes))) {
        let stored = Stored::new(form.0, form.1, n, k, 21);
        let weight = stored.weight();
        let (dy_tn, before) = (values(t * n, 22), values(t * k, 23));
        for accumulate in [false, true] {
            every_cpu(|cpu| {
                let mut dx_tk = before.clone();
                let args = MatmulDx { dy_tn: &dy_tn, weight, dx_tk: &mut dx_tk, t, accumulate };
                matmul_dx(cpu, args);
                check_bound(&dx_tk, n, |i| {
                    let (token, input) = (i / k, i % k);
                    let dy_tn = &dy_tn;
                    let terms =
                        (0..n).map(move |o| product(dy_tn[token * n + o], weight.value(o, input)));
                    terms.chain([if accumulate { f64::from(before[i]) } else { 0.0 }])
                });
            });
        }
    }
}

/// The most roundings of an element of a weight gradient: a chain in a block, then the blocks.
fn block_roundings(t: usize, row_tokens: usize) -> usize {
    t.min(row_tokens).min(TOKEN_BLOCK) + token_blocks(t, row_tokens).count()
}

/// Tokens, outputs, inputs and tokens of a row: odd, one, more than a block and more than a row.
const ROWS: [(usize, usize, usize, usize); 5] =
    [(5, 33, 17, 5), (700, 19, 37, 300), (613, 1, 21, 700), (67, 23, 1, 7), (1, 3, 5, 1)];

#[test]
fn weight_gradient() {
    for (t, n, k, row_tokens) in ROWS {
        let (dy_tn, x_tk, before) = (values(t * n, 31), values(t * k, 32), values(n * k, 33));
        let (dy_tn, x_tk) = (&dy_tn[..], &x_tk[..]);
        for accumulate in [false, true] {
            every_cpu(|cpu| {
                let mut dw = before.clone();
                let dw_nk = &mut dw[..];
                matmul_dw(cpu, MatmulDw { dy_tn, x_tk, dw_nk, n, k, t, row_tokens, accumulate });
                check_bound(&dw, block_roundings(t, row_tokens), |i| {
                    let (output, input) = (i / k, i % k);
                    let terms = (0..t).map(move |token| {
                        product(dy_tn[token * n + output], x_tk[token * k + input])
                    });
                    terms.chain([if accumulate { f64::from(before[i]) } else { 0.0 }])
                });
                let (mut db, first) = (before[..n].to_vec(), &before[..n]);
                let args = BiasGrad { dy_tn, db_n: &mut db, t, row_tokens, accumulate };
                bias_grad(cpu, args);
                check_bound(&db, block_roundings(t, row_tokens), |output| {
                    let terms = (0..t).map(move |token| f64::from(dy_tn[token * n + output]));
                    terms.chain([if accumulate { f64::from(first[output]) } else { 0.0 }])
                });
            });
        }
    }
}

#[test]
fn products_of_heads() {
    let heads = 3;
    for (t, outputs, inputs, row_tokens) in ROWS {
        let x_thi = &values(t * heads * inputs, 41)[..];
        let dy_tho = &values(t * heads * outputs, 42)[..];
        let w_hoi = &values(heads * outputs * inputs, 43)[..];
        every_cpu(|cpu| {
            let mut y = vec![0.0; dy_tho.len()];
            let y_tho = &mut y[..];
            head_matmul(cpu, HeadMatmul { x_thi, w_hoi, y_tho, t, heads, inputs, outputs });
            check_bound(&y, inputs, |i| {
                let (row, output) = (i / outputs, i % outputs);
                let w = (row % heads * outputs + output) * inputs;
                (0..inputs).map(move |input| product(x_thi[row * inputs + input], w_hoi[w + input]))
            });
            let mut dx = vec![0.0; x_thi.len()];
            let (dx_thi, accumulate) = (&mut dx[..], false);
            let args =
                HeadMatmulDx { dy_tho, w_hoi, dx_thi, t, heads, inputs, outputs, accumulate };
            head_matmul_dx(cpu, args);
            check_bound(&dx, outputs, |i| {
                let (row, input) = (i / inputs, i % inputs);
                let w = move |output| (row % heads * outputs + output) * inputs + input;
                (0..outputs).map(move |o| product(dy_tho[row * outputs + o], w_hoi[w(o)]))
            });
            let mut dw = vec![0.0; w_hoi.len()];
            let dw_hoi = &mut dw[..];
            let args = HeadMatmulDw {
                dy_tho,
                x_thi,
                dw_hoi,
                t,
                heads,
                inputs,
                outputs,
                row_tokens,
                accumulate,
            };
            head_matmul_dw(cpu, args);
            check_bound(&dw, block_roundings(t, row_tokens), |i| {
                let (head, output, input) =
                    (i / inputs / outputs, i / inputs % outputs, i % inputs);
                (0..t).map(move |token| {
                    let row = token * heads + head;
                    product(dy_tho[row * outputs + output], x_thi[row * inputs + input])
                })
            });
        });
    }
}

/// Rows routed to experts: token i goes to experts i and i + 1, in turn.
#[test]
fn products_of_experts() {
    let (num_experts, top_k) = (3, 2);
    for (form, (t, n, k, row_tokens)) in forms().flat_map(|form| ROWS.map(|rows| (form, rows))) {
        let n = if form.1 == Layout::Panel { n.next_multiple_of(16) } else { n };
        let stored = Stored::new(form.0, form.1, num_experts * n, k, 51);
        let weight = stored.weight();
        let (x, dy_tan) = (&values(t * k, 52)[..], &values(t * top_k * n, 53)[..]);
        let whose = |row: usize| (row / top_k + row % top_k) % num_experts;
        let rows = t * top_k;
        let experts: Vec<u32> = (0..rows).map(|row| u32::try_from(whose(row)).unwrap()).collect();
        let experts_ta = &experts[..];
        every_cpu(|cpu| {
            let scratch = &mut vec![7; expert_scratch_len(rows, num_experts)][..];
            let mut y = vec![0.0; rows * n];
            let y_tan = &mut y[..];
            let compute = Compute::F32;
            let args =
                ExpertMatmul { x, weight, experts_ta, top_k, num_experts, y_tan, scratch, compute };
            expert_matmul(cpu, args);
            check_bound(&y, k, |i| {
                let (row, output) = (i / n, whose(i / n) * n + i % n);
                (0..k).map(move |i| product(x[row / top_k * k + i], weight.value(output, i)))
            });
            let scratch = &mut vec![7; expert_scratch_len(rows, num_experts)][..];
            let mut dx = vec![0.0; rows * k];
            let dx_tak = &mut dx[..];
            expert_matmul_dx(
                cpu,
                ExpertMatmulDx { dy_tan, weight, experts_ta, num_experts, dx_tak, scratch },
            );
            check_bound(&dx, n, |i| {
                let (row, input) = (i / k, i % k);
                let first = whose(row) * n;
                (0..n).map(move |o| product(dy_tan[row * n + o], weight.value(first + o, input)))
            });
            let scratch = &mut vec![7; expert_scratch_len(rows, num_experts)][..];
            let mut dw = vec![0.0; num_experts * n * k];
            let (dw_enk, accumulate) = (&mut dw[..], false);
            expert_matmul_dw(
                cpu,
                ExpertMatmulDw {
                    dy_tan,
                    x,
                    experts_ta,
                    top_k,
                    num_experts,
                    dw_enk,
                    row_tokens,
                    accumulate,
                    scratch,
                },
            );
            // An expert has at most as many rows and blocks as there are tokens and theirs.
            check_bound(&dw, block_roundings(t, row_tokens), |i| {
                let (expert, output, input) = (i / k / n, i / k % n, i % k);
                let own = (0..rows).filter(move |&row| whose(row) == expert);
                own.map(move |row| product(dy_tan[row * n + output], x[row / top_k * k + input]))
            });
        });
    }
}
