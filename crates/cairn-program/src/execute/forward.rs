//! The forward instructions and their kernels.

use cairn_kernels::{self as kernels, Act, Keys, RopePairing, Span};

use super::{Step, TOGETHER_MAX};
use crate::op::{AttentionAttrs, DropoutAttrs, HeadAttrs, NormAttrs, RopeAttrs};

/// `Some` if a result or operand is present.
fn present<T: ?Sized>(exists: bool, value: &mut T) -> Option<&mut T> {
    exists.then_some(value)
}

impl Step<'_> {
    pub(super) fn embed(&mut self) {
        let width = self.prepared.program.value(self.instr.outputs[0].expect("has a result"));
        let weight = self.weight(1, width.shape.row_elements());
        let ([ids, table], [y]) =
            self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        let args = kernels::Embed { ids_t: ids.u32s(), weight: weight.of(table), y_td: y.f32s() };
        kernels::embed(self.cpu, args);
    }

    pub(super) fn position_embed(&mut self) {
        let weight = self.weight(2, self.width(0));
        let reads = [self.input(0), self.input(1), self.input(2)];
        let ([x, positions, table], [y]) = self.memory.split(reads, [self.output(0)]);
        kernels::position_embed(
            self.cpu,
            kernels::PositionEmbed {
                positions_t: positions.u32s(),
                x_td: x.f32s(),
                weight: weight.of(table),
                y_td: y.f32s(),
            },
        );
    }

    pub(super) fn gather_rows(&mut self) {
        let d = self.width(0);
        let ([x, rows], [y]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        let args = kernels::GatherRows { x_td: x.f32s(), rows_o: rows.u32s(), d, y_od: y.f32s() };
        kernels::gather_rows(self.cpu, args);
    }

    pub(super) fn matmul(&mut self) {
        if !self.has_input(3) {
            return self.matmuls::<1>();
        }
        self.copy_in_place(3, 0);
        let (t, compute) = (self.rows(0), self.instr.compute);
        let weight = self.weight(1, self.width(0));
        let ([x, w], [y]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::matmul(
            self.cpu,
            kernels::Matmul {
                x_tk: x.f32s(),
                weight: weight.of(w),
                bias_n: None,
                y_tn: y.f32s(),
                t,
                accumulate: true,
                compute,
            },
        );
    }

    /// This instruction and those after it: products of the same inputs.
    pub(super) fn matmuls<const N: usize>(&mut self) {
        let (t, compute) = (self.rows(0), self.instr.compute);
        let x = self.input(0);
        let shapes: [_; N] = std::array::from_fn(|i| {
            self.instr = &self.prepared.program.instrs[self.index + i];
            let weight = self.weight(1, self.width(0));
            (weight, self.has_input(2), [self.input(1), self.input(2)], self.output(0))
        });
        let mut reads = [Span::default(); 2 * TOGETHER_MAX];
        for (reads, (_, _, operands, _)) in reads.chunks_exact_mut(2).zip(&shapes) {
            reads.copy_from_slice(operands);
        }
        let [w0, b0, w1, b1, w2, b2] = reads;
        let results = shapes.map(|(_, _, _, result)| result);
        let ([x, operands @ ..], ys) = self.memory.split([x, w0, b0, w1, b1, w2, b2], results);
        let mut ys = ys.into_iter();
        let products = std::array::from_fn::<_, N, _>(|i| {
            let (weight, biased, ..) = shapes[i];
            kernels::Matmul {
                x_tk: x.f32s(),
                weight: weight.of(operands[2 * i]),
                bias_n: biased.then(|| operands[2 * i + 1].f32s()),
                y_tn: ys.next().expect("a result each").f32s(),
                t,
                accumulate: false,
                compute,
            }
        });
        kernels::matmul_each(self.cpu, products);
    }

    pub(super) fn head_matmul(&mut self) {
        let (t, heads) = (self.rows(0), self.axis(1, 0));
        let (outputs, inputs) = (self.axis(1, 1), self.axis(1, 2));
        let ([x, w], [y]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::head_matmul(
            self.cpu,
            kernels::HeadMatmul {
                x_thi: x.f32s(),
                w_hoi: w.f32s(),
                y_tho: y.f32s(),
                t,
                heads,
                outputs,
                inputs,
            },
        );
    }

    pub(super) fn rms_norm(&mut self, attrs: NormAttrs) {
        let ([x, w], [y]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::rms_norm(
            self.cpu,
            kernels::RmsNorm {
                x_nd: x.f32s(),
                weight_d: w.f32s(),
                eps: attrs.eps,
                plus_one: attrs.plus_one,
                y_nd: y.f32s(),
            },
        );
    }

    pub(super) fn layer_norm(&mut self, attrs: NormAttrs) {
        let biased = self.has_input(2);
        let reads = [self.input(0), self.input(1), self.input(2)];
        let ([x, w, b], [y]) = self.memory.split(reads, [self.output(0)]);
        kernels::layer_norm(
            self.cpu,
            kernels::LayerNorm {
                x_nd: x.f32s(),
                weight_d: w.f32s(),
                bias_d: biased.then(|| b.f32s()),
                eps: attrs.eps,
                y_nd: y.f32s(),
            },
        );
    }

    pub(super) fn rope(&mut self, attrs: &RopeAttrs, inverse: bool) {
        self.copy_in_place(0, 0);
        let (heads, head_dim) = (self.axis(0, 1), self.axis(0, 2));
        let ([positions], [y]) = self.memory.split([self.input(1)], [self.output(0)]);
        kernels::rope(
            self.cpu,
            kernels::Rope {
                x_thk: y.f32s(),
                positions_t: positions.u32s(),
                inv_freq: &attrs.inv_freq,
                attention_scaling: attrs.attention_scaling,
                heads,
                head_dim,
                pairing: if attrs.interleaved {
                    RopePairing::Interleaved
                } else {
                    RopePairing::Half
                },
                inverse,
            },
        );
    }

    pub(super) fn kv_write(&mut self, site: u32) {
        // In a training plan the cached values are the operands themselves.
        let Some(&(cache, pages)) = self.prepared.caches.get(&site) else { return };
        let batch = self.batch();
        let ([k, v], [pages]) = self.memory.split([self.input(0), self.input(1)], [pages]);
        kernels::kv_write(
            self.cpu,
            kernels::KvWrite { k_tgk: k.f32s(), v_tgv: v.f32s(), pages: pages.u8s(), cache, batch },
        );
    }

    pub(super) fn attention(&mut self, attrs: &AttentionAttrs) {
        let (spec, batch) = (self.attention_spec(attrs, 0), self.batch());
        let keys = self.instr.inputs[1].expect("verified: keys are present");
        let cached = self.prepared.cache_of[keys.index()].map(|site| self.prepared.caches[&site]);
        let dropout = attrs.dropout.map(|dropout| self.dropout_mask(dropout));
        let wants_lse = self.instr.outputs.get(1).copied().flatten().is_some();
        let (source, values) = match cached {
            Some((_, pages)) => (pages, Span::default()),
            None => (self.input(1), self.input(2)),
        };
        let ([q, source, values], [out, lse]) =
            self.memory.split([self.input(0), source, values], [self.output(0), self.output(1)]);
        let keys = match cached {
            Some((cache, _)) => Keys::Paged { pages: source.u8s(), cache },
            None => Keys::Dense { k_tgk: source.f32s(), v_tgv: values.f32s() },
        };
        kernels::attention(
            self.cpu,
            kernels::Attention {
                q_thk: q.f32s(),
                keys,
                out_thv: out.f32s(),
                lse_th: present(wants_lse, lse.f32s()),
                batch,
                spec,
                dropout,
            },
        );
    }

    pub(super) fn glu(&mut self, act: Act) {
        let ([gate, up], [y]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        let args = kernels::Glu { gate_nf: gate.f32s(), up_nf: up.f32s(), act, y_nf: y.f32s() };
        kernels::glu(self.cpu, args);
    }

    pub(super) fn activation(&mut self, act: Act) {
        let ([x], [y]) = self.memory.split([self.input(0)], [self.output(0)]);
        let args = kernels::Activation { x: x.f32s(), act, y: y.f32s() };
        kernels::activation(self.cpu, args);
    }

    pub(super) fn add(&mut self) {
        if self.input(0) == self.output(0) {
            let ([x], [y]) = self.memory.split([self.input(1)], [self.output(0)]);
            kernels::add_assign(self.cpu, kernels::AddAssign { x: x.f32s(), y: y.f32s() });
            return;
        }
        let ([a, b], [y]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        kernels::add(self.cpu, kernels::Add { a: a.f32s(), b: b.f32s(), y: y.f32s() });
    }

    pub(super) fn scale(&mut self, factor: f32) {
        self.copy_in_place(0, 0);
        let y = self.memory.write(self.output(0));
        kernels::scale_assign(self.cpu, kernels::ScaleAssign { factor, y: y.f32s() });
    }

    pub(super) fn softcap(&mut self, cap: f32) {
        let ([x], [y]) = self.memory.split([self.input(0)], [self.output(0)]);
        kernels::softcap(self.cpu, kernels::Softcap { x: x.f32s(), cap, y: y.f32s() });
    }

    /// What fixes a dropout's mask in this run.
    pub(super) fn dropout_mask(&self, attrs: DropoutAttrs) -> kernels::DropoutMask {
        kernels::DropoutMask {
            p: attrs.p,
            seed: self.run.seed,
            step: self.run.step,
            site: attrs.site,
            first_token: self.run.first_token,
        }
    }

    pub(super) fn dropout(&mut self, attrs: DropoutAttrs) {
        self.copy_in_place(0, 0);
        let (d, mask) = (self.width(0), self.dropout_mask(attrs));
        let y = self.memory.write(self.output(0));
        kernels::dropout_assign(self.cpu, kernels::DropoutAssign { y_td: y.f32s(), d, mask });
    }

    pub(super) fn concat(&mut self) {
        let (d, e) = (self.axis(0, 2), self.axis(1, 2));
        let ([a, b], [y]) = self.memory.split([self.input(0), self.input(1)], [self.output(0)]);
        let args = kernels::Concat { a_nd: a.f32s(), b_ne: b.f32s(), d, e, y: y.f32s() };
        kernels::concat(self.cpu, args);
    }

    pub(super) fn split(&mut self) {
        let crate::op::Op::Split(first, second) = &self.instr.op else {
            unreachable!("dispatched on split")
        };
        let (d, e) = (first.size.unwrap_or(0), second.size.unwrap_or(0));
        let ([x], [a, b]) = self.memory.split([self.input(0)], [self.output(0), self.output(1)]);
        let args = kernels::Split { x: x.f32s(), d, e, a_nd: a.f32s(), b_ne: b.f32s() };
        kernels::split(self.cpu, args);
    }

    pub(super) fn token_logprob(&mut self, attrs: HeadAttrs) {
        let biased = self.has_input(3);
        let (weight, adapter) = (self.weight(1, self.width(0)), self.adapter_of_head(4));
        let scratch = self.prepared.scratch(self.index);
        let reads = [0, 1, 2, 3, 4, 5].map(|slot| self.input(slot));
        let writes = [scratch, self.output(0), self.output(1)];
        let ([x, w, targets, bias, low, b], [scratch, logprob, lse]) =
            self.memory.split(reads, writes);
        kernels::token_logprob(
            self.cpu,
            kernels::TokenLogprob {
                x_od: x.f32s(),
                head: kernels::Head {
                    weight: weight.of(w),
                    bias_v: biased.then(|| bias.f32s()),
                    softcap: attrs.softcap,
                    compute: self.instr.compute,
                    low_rank: adapter.map(|shape| shape.low_rank(low, b)),
                },
                targets_o: targets.u32s(),
                scratch: scratch.f32s(),
                logprob_o: logprob.f32s(),
                lse_o: lse.f32s(),
                entropy_o: None,
            },
        );
    }
}
