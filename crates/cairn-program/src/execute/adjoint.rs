//! The adjoint instructions and their kernels.

use cairn_kernels::{self as kernels, Act, BytesMut, Span};

use super::Step;
use crate::op::{AttentionAttrs, HeadAttrs, NormAttrs};

impl Step<'_> {
    pub(super) fn cross_entropy(&mut self, attrs: HeadAttrs) {
        let (weight, adapter) = (self.weight(1, self.width(0)), self.adapter_of_head(7));
        let (row_tokens, accumulate_dw) = (self.row_tokens(), self.adds());
        let biased = self.has_input(5);
        let trains = [1, 2, 3, 4, 5].map(|slot| self.has_output(slot));
        let scratch = self.prepared.scratch(self.index);
        let reads = [0, 1, 2, 3, 5, 7, 8].map(|slot| self.input(slot));
        let [logprob, dx, dw, dbias, dlow, db] = [0, 1, 2, 3, 4, 5].map(|slot| self.output(slot));
        let ([x, w, targets, weights, bias, low, b], [scratch, logprob, grads @ ..]) =
            self.memory.split(reads, [scratch, logprob, dx, dw, dbias, dlow, db]);
        kernels::cross_entropy(
            self.cpu,
            kernels::CrossEntropy {
                x_od: x.f32s(),
                head: kernels::Head {
                    weight: weight.of(w),
                    bias_v: biased.then(|| bias.f32s()),
                    softcap: attrs.softcap,
                    compute: kernels::Compute::F32,
                    low_rank: adapter.map(|shape| shape.low_rank(low, b)),
                },
                targets_o: targets.u32s(),
                weights_o: weights.f32s(),
                scratch: scratch.f32s(),
                logprob_o: logprob.f32s(),
                grads: head_grads(grads, trains, (accumulate_dw, row_tokens)),
            },
        );
    }

    pub(super) fn token_logprob_grad(&mut self, attrs: HeadAttrs) {
        let (weight, adapter) = (self.weight(2, self.width(1)), self.adapter_of_head(8));
        let (row_tokens, accumulate_dw) = (self.row_tokens(), self.adds());
        let biased = self.has_input(6);
        let trains = [0, 1, 2, 3, 4].map(|slot| self.has_output(slot));
        let scratch = self.prepared.scratch(self.index);
        let reads = [0, 1, 2, 3, 6, 8, 9].map(|slot| self.input(slot));
        let [dx, dw, dbias, dlow, db] = [0, 1, 2, 3, 4].map(|slot| self.output(slot));
        let ([dlogprob, x, w, targets, bias, low, b], [scratch, grads @ ..]) =
            self.memory.split(reads, [scratch, dx, dw, dbias, dlow, db]);
        kernels::token_logprob_grad(
            self.cpu,
            kernels::TokenLogprobGrad {
                x_od: x.f32s(),
                head: kernels::Head {
                    weight: weight.of(w),
                    bias_v: biased.then(|| bias.f32s()),
                    softcap: attrs.softcap,
                    compute: kernels::Compute::F32,
                    low_rank: adapter.map(|shape| shape.low_rank(low, b)),
                },
                targets_o: targets.u32s(),
                dlogprob_o: dlogprob.f32s(),
                dlse_o: None,
                dentropy_o: None,
                scratch: scratch.f32s(),
                grads: head_grads(grads, trains, (accumulate_dw, row_tokens)),
            },
        );
    }

    pub(super) fn embed_grad(&mut self) {
        let (d, accumulate) = (self.width(0), self.adds());
        let ([dy, ids], [dw]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::embed_grad(
            self.cpu,
            kernels::EmbedGrad {
                ids_t: ids.u32s(),
                dy_td: dy.f32s(),
                d,
                dw_vd: dw.f32s(),
                accumulate,
            },
        );
    }

    pub(super) fn matmul_dx(&mut self) {
        let (outputs, t) = (self.width(0), self.rows(0));
        let inputs = self.width(1) / outputs;
        let (weight, accumulate) = (self.weight(1, inputs), self.has_input(2));
        if accumulate {
            self.copy_in_place(2, 0);
        }
        let ([dy, w], [dx]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::matmul_dx(
            self.cpu,
            kernels::MatmulDx {
                dy_tn: dy.f32s(),
                weight: weight.of(w),
                dx_tk: dx.f32s(),
                t,
                accumulate,
            },
        );
    }

    pub(super) fn matmul_dw(&mut self) {
        let (n, k, t) = (self.width(0), self.width(1), self.rows(0));
        let (row_tokens, accumulate) = (self.row_tokens(), self.adds());
        let ([dy, x], [dw]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::matmul_dw(
            self.cpu,
            kernels::MatmulDw {
                dy_tn: dy.f32s(),
                x_tk: x.f32s(),
                dw_nk: dw.f32s(),
                n,
                k,
                t,
                row_tokens,
                accumulate,
            },
        );
    }

    pub(super) fn bias_grad(&mut self) {
        let t = self.rows(0);
        let (row_tokens, accumulate) = (self.row_tokens(), self.adds());
        let ([dy], [db]) = self.memory.split([self.input(0)], [self.output(0)]);
        let args =
            kernels::BiasGrad { dy_tn: dy.f32s(), db_n: db.f32s(), t, row_tokens, accumulate };
        kernels::bias_grad(self.cpu, args);
    }

    pub(super) fn head_matmul_dx(&mut self) {
        let (t, heads) = (self.rows(0), self.axis(1, 0));
        let (outputs, inputs) = (self.axis(1, 1), self.axis(1, 2));
        let ([dy, w], [dx]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::head_matmul_dx(
            self.cpu,
            kernels::HeadMatmulDx {
                dy_tho: dy.f32s(),
                w_hoi: w.f32s(),
                dx_thi: dx.f32s(),
                t,
                heads,
                outputs,
                inputs,
                accumulate: false,
            },
        );
    }

    pub(super) fn head_matmul_dw(&mut self) {
        let (t, heads) = (self.rows(0), self.axis(0, 1));
        let (outputs, inputs) = (self.axis(0, 2), self.axis(1, 2));
        let (row_tokens, accumulate) = (self.row_tokens(), self.adds());
        let ([dy, x], [dw]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::head_matmul_dw(
            self.cpu,
            kernels::HeadMatmulDw {
                dy_tho: dy.f32s(),
                x_thi: x.f32s(),
                dw_hoi: dw.f32s(),
                t,
                heads,
                outputs,
                inputs,
                row_tokens,
                accumulate,
            },
        );
    }

    /// Rows of a norm per token: 1 for the residual stream, the heads for a head norm.
    fn rows_per_token(&self) -> usize {
        self.width(0) / self.width(2)
    }

    pub(super) fn rms_norm_grad(&mut self, attrs: NormAttrs) {
        let (rows_per_token, row_tokens) = (self.rows_per_token(), self.row_tokens());
        let (accumulate_dx, trains) = (self.has_input(3), self.has_input(4));
        let accumulate_dw = self.adds();
        if accumulate_dx {
            self.copy_in_place(3, 0);
        }
        let reads = [self.input(0), self.input(1), self.input(2)];
        let ([dy, x, w], [dx, dw]) = self.memory.split(reads, [self.output(0), self.output(1)]);
        kernels::rms_norm_grad(
            self.cpu,
            kernels::RmsNormGrad {
                dy_nd: dy.f32s(),
                x_nd: x.f32s(),
                weight_d: w.f32s(),
                eps: attrs.eps,
                plus_one: attrs.plus_one,
                dx_nd: dx.f32s(),
                accumulate_dx,
                dw_d: trains.then(|| dw.f32s()),
                rows_per_token,
                row_tokens,
                accumulate_dw,
            },
        );
    }

    pub(super) fn layer_norm_grad(&mut self, attrs: NormAttrs) {
        let (rows_per_token, row_tokens) = (self.rows_per_token(), self.row_tokens());
        let (accumulate_dx, trains, biased) =
            (self.has_input(3), self.has_input(4), self.has_input(5));
        let accumulate_dw = self.adds();
        if accumulate_dx {
            self.copy_in_place(3, 0);
        }
        let reads = [self.input(0), self.input(1), self.input(2)];
        let writes = [self.output(0), self.output(1), self.output(2)];
        let ([dy, x, w], [dx, dw, db]) = self.memory.split(reads, writes);
        kernels::layer_norm_grad(
            self.cpu,
            kernels::LayerNormGrad {
                dy_nd: dy.f32s(),
                x_nd: x.f32s(),
                weight_d: w.f32s(),
                eps: attrs.eps,
                dx_nd: dx.f32s(),
                accumulate_dx,
                dw_d: trains.then(|| dw.f32s()),
                db_d: biased.then(|| db.f32s()),
                rows_per_token,
                row_tokens,
                accumulate_dw,
            },
        );
    }

    pub(super) fn attention_grad(&mut self, attrs: &AttentionAttrs) {
        let (spec, batch) = (self.attention_spec(attrs, 1), self.batch());
        let dropout = attrs.dropout.map(|dropout| self.dropout_mask(dropout));
        let reads: [Span; 6] = std::array::from_fn(|slot| self.input(slot));
        let writes: [Span; 3] = std::array::from_fn(|slot| self.output(slot));
        let ([dout, q, k, v, out, lse], [dq, dk, dv]) = self.memory.split(reads, writes);
        kernels::attention_grad(
            self.cpu,
            kernels::AttentionGrad {
                dout_thv: dout.f32s(),
                q_thk: q.f32s(),
                k_tgk: k.f32s(),
                v_tgv: v.f32s(),
                out_thv: out.f32s(),
                lse_th: lse.f32s(),
                dq_thk: dq.f32s(),
                dk_tgk: dk.f32s(),
                dv_tgv: dv.f32s(),
                batch,
                spec,
                dropout,
            },
        );
    }

    pub(super) fn glu_grad(&mut self, act: Act) {
        let reads = [self.input(0), self.input(1), self.input(2)];
        let ([dy, gate, up], [dgate, dup]) =
            self.memory.split(reads, [self.output(0), self.output(1)]);
        kernels::glu_grad(
            self.cpu,
            kernels::GluGrad {
                dy_nf: dy.f32s(),
                gate_nf: gate.f32s(),
                up_nf: up.f32s(),
                act,
                dgate_nf: dgate.f32s(),
                dup_nf: dup.f32s(),
            },
        );
    }

    pub(super) fn activation_grad(&mut self, act: Act) {
        let ([dy, x], [dx]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        let args = kernels::ActivationGrad { dy: dy.f32s(), x: x.f32s(), act, dx: dx.f32s() };
        kernels::activation_grad(self.cpu, args);
    }

    pub(super) fn softcap_grad(&mut self, cap: f32) {
        let ([dy, y], [dx]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        let args = kernels::SoftcapGrad { dy: dy.f32s(), y: y.f32s(), cap, dx: dx.f32s() };
        kernels::softcap_grad(self.cpu, args);
    }

    pub(super) fn scatter_rows(&mut self) {
        let d = self.width(0);
        let ([dy, rows], [dx]) =
            self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::scatter_rows(
            self.cpu,
            kernels::ScatterRows {
                y_od: dy.f32s(),
                rows_o: rows.u32s(),
                d,
                x_td: dx.f32s(),
                accumulate: false,
            },
        );
    }
}

/// Where the gradients of a head go, of those that are wanted: of its inputs, its weight, its bias, and of
/// an adapter's low rows and its matrix.
fn head_grads<'a>(
    grads: [BytesMut<'a>; 5],
    wanted: [bool; 5],
    (accumulate_dw, row_tokens): (bool, usize),
) -> kernels::HeadGrads<'a> {
    let mut grads = grads.into_iter().zip(wanted);
    let mut next = || {
        let (grad, is_wanted) = grads.next().expect("five of them");
        is_wanted.then(|| grad.f32s())
    };
    kernels::HeadGrads {
        dx_od: next(),
        dw_vd: next(),
        db_v: next(),
        low_rank: Some(kernels::LowRankGrads { dlow_or: next(), dw_vr: next() }),
        accumulate_dw,
        row_tokens,
    }
}
