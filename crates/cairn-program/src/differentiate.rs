//! Differentiation: a forward program becomes forward, loss and backward in one list.
//!
//! Reverse mode over the instruction list. A value needs a gradient when a trainable weight lies
//! upstream of it, so freezing a prefix removes its backward pass altogether, and freezing a suffix
//! leaves only the input gradients that flow through it. Where a value is used several times its
//! gradients add up in reverse program order; so do the uses of a tied weight.

use std::collections::{BTreeSet, HashMap};

use crate::dim::{Dim, Shape};
use crate::op::{HeadAttrs, Op};
use crate::program::{Builder, Instr, Program};
use crate::value::{Class, ValueId, ValueType};
use crate::verify::VerifyError;

/// Prefix of a gradient's name: `grad.` and the name of the weight.
pub const GRADIENT_PREFIX: &str = "grad.";

/// The input that weighs a load-balancing loss beside the cross entropy: this run's share of the step.
pub const BALANCE_WEIGHT: &str = "balance_weight";

/// Where the backward pass starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Each `token_logprob` of the program becomes `cross_entropy` with the per-token weights of
    /// the input `loss_weights`: loss and gradient in one pass. A `balance_loss` is added, times the
    /// input [`BALANCE_WEIGHT`].
    CrossEntropy,
    /// The caller's loss: for each named value the gradient is read from the input `d.<name>`.
    Seeds(Vec<String>),
}

/// Why a program cannot be differentiated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DifferentiateError {
    /// A name in the trainable set is no weight of the program.
    #[error("{name} is not a weight of this program")]
    UnknownWeight {
        /// The name.
        name: String,
    },
    /// A trainable weight is stored in an encoding that cannot be updated.
    #[error("{name} is stored as {encoding} and cannot be trained; only f32 and bf16 weights can")]
    NotTrainable {
        /// The weight.
        name: String,
        /// Its encoding.
        encoding: String,
    },
    /// A seed names no value of the program.
    #[error("{name} is not a value of this program, so the loss cannot start there")]
    UnknownSeed {
        /// The name.
        name: String,
    },
    /// No path leads from a trainable weight to the loss.
    #[error("the loss depends on no trainable weight")]
    NothingToTrain,
    /// The operation has no adjoint.
    #[error("{op} has no adjoint")]
    NoAdjoint {
        /// Its name.
        op: &'static str,
    },
    /// A product is computed in an arithmetic that has no gradients.
    #[error("{value} is computed in {compute}; only f32 products can be trained")]
    Compute {
        /// What the product yields.
        value: String,
        /// Its arithmetic.
        compute: cairn_kernels::Compute,
    },
    /// The derived program does not verify: a bug in the derivation.
    #[error("the derived program does not verify")]
    Verify(#[from] VerifyError),
}

/// Derives the training program of `forward` with respect to the weights in `trainable`.
///
/// Gradients are values of class [`Class::Gradient`] named `grad.<weight>`.
///
/// # Errors
///
/// See [`DifferentiateError`].
pub fn differentiate(
    forward: &Program,
    trainable: &BTreeSet<String>,
    loss: &Loss,
) -> Result<Program, DifferentiateError> {
    if let Some(instr) = forward.instrs.iter().find(|instr| !instr.compute.is_f32()) {
        let names: Vec<&str> = instr.writes().map(|id| &*forward.value(id).name).collect();
        let (value, compute) = (names.join(", "), instr.compute);
        return Err(DifferentiateError::Compute { value, compute });
    }
    let mut tape = Tape::new(forward, trainable)?;
    tape.replay_forward(forward, loss)?;
    let forward_len = tape.builder.program.instrs.len();
    tape.seed(loss)?;
    for index in (0..forward_len).rev() {
        let instr = tape.builder.program.instrs[index].clone();
        tape.builder.set_block(instr.block);
        tape.adjoint(&instr)?;
    }
    tape.builder.set_block(None);
    if tape.builder.program.of_class(Class::Gradient).next().is_none() {
        return Err(DifferentiateError::NothingToTrain);
    }
    mark_first_writes(&mut tape.builder.program);
    Ok(tape.builder.finish_training(forward_len)?)
}

/// The first instruction that writes a gradient overwrites it in a step's first micro-batch.
fn mark_first_writes(program: &mut Program) {
    let mut seen = BTreeSet::new();
    for index in 0..program.instrs.len() {
        let gradients: Vec<ValueId> = program.instrs[index]
            .writes()
            .filter(|&id| program.value(id).class == Class::Gradient)
            .collect();
        let new = gradients.iter().filter(|&&id| seen.insert(id)).count();
        // An operation with two gradient operands (weight and bias of a norm) owns both alone.
        assert!(new == 0 || new == gradients.len(), "gradients of one operation part ways");
        program.instrs[index].first_write = new != 0;
    }
}

struct Tape<'a> {
    builder: Builder,
    trainable: &'a BTreeSet<String>,
    /// Values with a trainable weight upstream.
    needs: BTreeSet<ValueId>,
    /// The gradient of a value, as far as it has been summed.
    gradient: HashMap<ValueId, ValueId>,
}

impl<'a> Tape<'a> {
    fn new(forward: &Program, trainable: &'a BTreeSet<String>) -> Result<Self, DifferentiateError> {
        let mut needs = BTreeSet::new();
        for name in trainable {
            let id = forward
                .find(name)
                .filter(|&id| forward.value(id).class == Class::Weight)
                .ok_or_else(|| DifferentiateError::UnknownWeight { name: name.clone() })?;
            let value_type = forward.value(id).value_type;
            match value_type.encoding() {
                Some(cairn_kernels::Encoding::F32 | cairn_kernels::Encoding::Bf16) => {}
                encoding => {
                    return Err(DifferentiateError::NotTrainable {
                        name: name.clone(),
                        encoding: encoding.map_or(value_type.to_string(), |e| e.to_string()),
                    });
                }
            }
            needs.insert(id);
        }
        // Ids stay valid: the derived program only appends values.
        let mut program = forward.clone();
        program.instrs.clear();
        program.outputs.clear();
        Ok(Self { builder: program.builder(), trainable, needs, gradient: HashMap::new() })
    }

    /// Copies the forward pass, turning the head into the loss, and finds what needs a gradient.
    fn replay_forward(&mut self, forward: &Program, loss: &Loss) -> Result<(), DifferentiateError> {
        for instr in &forward.instrs {
            let needed = instr.reads().any(|id| self.needs.contains(&id));
            if let (Loss::CrossEntropy, Op::TokenLogprob(attrs)) = (loss, &instr.op) {
                self.cross_entropy(instr, *attrs, needed)?;
                continue;
            }
            if needed {
                // Chosen numbers have no gradient.
                let real = |id: &ValueId| forward.value(*id).value_type != ValueType::U32;
                self.needs.extend(instr.writes().filter(real));
            }
            self.builder.program.instrs.push(instr.clone());
        }
        for &id in &forward.outputs {
            self.builder.output(id);
        }
        Ok(())
    }

    fn cross_entropy(
        &mut self,
        instr: &Instr,
        attrs: HeadAttrs,
        needed: bool,
    ) -> Result<(), DifferentiateError> {
        let [Some(x), Some(w), Some(targets), ref rest @ ..] = instr.inputs[..] else {
            unreachable!("a verified token_logprob has three operands")
        };
        let slot = |slot: usize| rest.get(slot).copied().flatten();
        let [bias, low, b] = [0, 1, 2].map(slot);
        let lead = self.builder.program.value(targets).shape.0[0];
        let weights = match self.builder.find("loss_weights") {
            Some(id) => id,
            None => self.builder.input("loss_weights", ValueType::F32, &[lead]),
        };
        let dw = self.accumulator(w);
        let [dbias, db] = [bias, b].map(|id| id.and_then(|id| self.accumulator(id)));
        let wanted = |id: &ValueId| needed && self.needs.contains(id);
        let [dx, dlow] = [Some(x), low].map(|id| id.filter(wanted));
        let names = [dx, dlow].map(|id| id.map(|id| self.gradient_name(id)));
        let [dx_name, dlow_name] = names.each_ref().map(Option::as_deref);
        // The declared log-probability keeps its id, so the program's outputs stay valid.
        let [x, w, targets, weights] = [x, w, targets, weights].map(Some);
        let slots = vec![x, w, targets, weights, dw, bias, dbias, low, b, db];
        let names = [None, dx_name, None, None, dlow_name];
        self.builder.set_block(instr.block);
        let results = self.builder.push_slots(Op::CrossEntropy(attrs), slots, &names)?;
        let index = self.builder.program.instrs.len() - 1;
        self.builder.program.instrs[index].outputs[0] = instr.outputs[0];
        for (of, gradient) in [(dx, results[1]), (dlow, results[4])] {
            if let (Some(of), Some(gradient)) = (of, gradient) {
                self.contribute(of, gradient)?;
            }
        }
        Ok(())
    }

    fn seed(&mut self, loss: &Loss) -> Result<(), DifferentiateError> {
        let Loss::Seeds(names) = loss else {
            self.seed_balance();
            return Ok(());
        };
        for name in names {
            let id = self
                .builder
                .find(name)
                .ok_or_else(|| DifferentiateError::UnknownSeed { name: name.clone() })?;
            if !self.needs.contains(&id) {
                return Err(DifferentiateError::NothingToTrain);
            }
            let Shape(dims) = self.builder.program.value(id).shape.clone();
            let seed = self.builder.input(&format!("d.{name}"), ValueType::F32, &dims);
            self.gradient.insert(id, seed);
        }
        Ok(())
    }

    /// The load-balancing loss, where there is one that depends on what is trained.
    fn seed_balance(&mut self) {
        let instrs = &self.builder.program.instrs;
        let balance = instrs.iter().find(|instr| matches!(instr.op, Op::BalanceLoss(_)));
        let loss = balance.and_then(|instr| instr.outputs[0]);
        if let Some(loss) = loss.filter(|loss| self.needs.contains(loss)) {
            let weight = self.builder.input(BALANCE_WEIGHT, ValueType::F32, &[]);
            self.gradient.insert(loss, weight);
        }
    }

    fn gradient_name(&self, of: ValueId) -> String {
        self.builder.fresh(&format!("d.{}", self.builder.program.value(of).name))
    }

    /// The accumulator of a weight's gradient, if the weight is trained.
    fn accumulator(&mut self, weight: ValueId) -> Option<ValueId> {
        let value = self.builder.program.value(weight);
        if value.class != Class::Weight || !self.trainable.contains(&value.name) {
            return None;
        }
        let (name, shape) = (format!("{GRADIENT_PREFIX}{}", value.name), value.shape.clone());
        Some(
            self.builder.find(&name).unwrap_or_else(|| {
                self.builder.declare(&name, Class::Gradient, ValueType::F32, shape)
            }),
        )
    }

    fn wants(&self, id: ValueId) -> bool {
        self.needs.contains(&id) && self.builder.program.value(id).class != Class::Weight
    }

    /// Adds `contribution` to the gradient of `id`.
    fn contribute(&mut self, id: ValueId, contribution: ValueId) -> Result<(), VerifyError> {
        let sum = match self.gradient.get(&id).copied() {
            None => contribution,
            Some(previous) => {
                let name = self.gradient_name(id);
                self.builder.push(&name, Op::Add, &[previous, contribution])?
            }
        };
        self.gradient.insert(id, sum);
        Ok(())
    }

    /// Emits an adjoint with one result per listed forward operand, and adds up those wanted.
    fn emit(
        &mut self,
        op: Op,
        inputs: Vec<Option<ValueId>>,
        of: &[Option<ValueId>],
    ) -> Result<(), VerifyError> {
        let names: Vec<Option<String>> =
            of.iter().map(|id| id.map(|id| self.gradient_name(id))).collect();
        let names: Vec<Option<&str>> = names.iter().map(Option::as_deref).collect();
        let results = self.builder.push_slots(op, inputs, &names)?;
        for (&id, result) in of.iter().zip(results) {
            if let (Some(id), Some(result)) = (id, result)
                && self.wants(id)
            {
                self.contribute(id, result)?;
            }
        }
        Ok(())
    }

    /// Emits an adjoint that can add to what is already summed for `x`, so no `add` is needed.
    /// `sum_slot` is where the running sum goes.
    fn emit_fused(
        &mut self,
        op: Op,
        mut inputs: Vec<Option<ValueId>>,
        x: ValueId,
        sum_slot: usize,
    ) -> Result<(), VerifyError> {
        inputs[sum_slot] = self.gradient.get(&x).copied();
        let name = self.gradient_name(x);
        let results = self.builder.push_slots(op, inputs, &[Some(&name)])?;
        self.gradient.insert(x, results[0].expect("slot 0 was named"));
        Ok(())
    }

    /// Emits the adjoint of one forward instruction, pruned to what is needed.
    fn adjoint(&mut self, instr: &Instr) -> Result<(), DifferentiateError> {
        if matches!(instr.op, Op::CrossEntropy(_)) {
            return Ok(());
        }
        let dy: Vec<Option<ValueId>> = instr
            .outputs
            .iter()
            .map(|id| id.and_then(|id| self.gradient.get(&id).copied()))
            .collect();
        if dy.iter().all(Option::is_none) || !instr.reads().any(|id| self.needs.contains(&id)) {
            return Ok(());
        }
        let slot = |n: usize| instr.inputs.get(n).copied().flatten();
        match &instr.op {
            Op::Matmul | Op::HeadMatmul => self.product_adjoint(instr, dy[0])?,
            Op::HeadMatmulDx => self.transposed_product_adjoint(instr, dy[0])?,
            Op::RmsNorm(_) | Op::LayerNorm(_) => self.norm_adjoint(instr, dy[0])?,
            Op::Route(_) | Op::ExpertMatmul | Op::ExpertSum => self.experts_adjoint(instr, &dy)?,
            Op::ExpertLoad | Op::BalanceLoss(_) => self.balance_adjoint(instr, &dy)?,
            Op::Embed | Op::PositionEmbed => self.lookup_adjoint(instr, dy[0])?,
            Op::Add => {
                self.pass(slot(0), dy[0])?;
                self.pass(slot(1), dy[0])?;
            }
            Op::KvWrite { .. } => {
                self.pass(slot(0), dy[0])?;
                self.pass(slot(1), dy.get(1).copied().flatten())?;
            }
            Op::Scale(_) | Op::Dropout(_) => {
                self.emit(instr.op.clone(), vec![dy[0]], &[slot(0)])?;
            }
            Op::Rope(attrs) => {
                self.emit(Op::RopeGrad(attrs.clone()), vec![dy[0], slot(1)], &[slot(0)])?;
            }
            Op::Glu(act) => {
                let of = [slot(0), slot(1)];
                self.emit(Op::GluGrad(*act), vec![dy[0], slot(0), slot(1)], &of)?;
            }
            Op::Activation(act) => {
                self.emit(Op::ActivationGrad(*act), vec![dy[0], slot(0)], &[slot(0)])?;
            }
            Op::Softcap(cap) => {
                self.emit(Op::SoftcapGrad(*cap), vec![dy[0], instr.outputs[0]], &[slot(0)])?;
            }
            Op::GatherRows => {
                self.emit(Op::ScatterRows, vec![dy[0], slot(1)], &[slot(0)])?;
            }
            Op::Attention(attrs) => {
                let outputs = &instr.outputs;
                let inputs = vec![dy[0], slot(0), slot(1), slot(2), outputs[0], outputs[1]];
                let of = [slot(0), slot(1), slot(2)];
                self.emit(Op::AttentionGrad(attrs.clone()), inputs, &of)?;
            }
            Op::Concat(_) | Op::Split(..) => self.heads_adjoint(instr, &dy)?,
            Op::TokenLogprob(attrs) => {
                let [dw, dbias, db] =
                    [1, 3, 5].map(|n| slot(n).and_then(|id| self.accumulator(id)));
                let (head, lse) = ([slot(0), slot(1), slot(2)], instr.outputs[1]);
                let own = [dy[0], head[0], head[1], head[2], lse, dw, slot(3), dbias];
                let inputs = own.into_iter().chain([slot(4), slot(5), db]).collect();
                let of = [slot(0), None, None, slot(4)].map(|id| id.filter(|&id| self.wants(id)));
                self.emit(Op::TokenLogprobGrad(*attrs), inputs, &of)?;
            }
            op => return Err(DifferentiateError::NoAdjoint { op: op.name() }),
        }
        Ok(())
    }

    fn lookup_adjoint(&mut self, instr: &Instr, dy: Option<ValueId>) -> Result<(), VerifyError> {
        // A position embedding has the vectors it adds to in front.
        let first = usize::from(instr.op == Op::PositionEmbed);
        let (rows, table) = (instr.inputs[first], instr.inputs[first + 1].expect("verified"));
        if let Some(dw) = self.accumulator(table) {
            self.builder.push_slots(Op::EmbedGrad, vec![dy, rows, Some(dw)], &[])?;
        }
        if first == 0 { Ok(()) } else { self.pass(instr.inputs[0], dy) }
    }

    /// The gradient passes through unchanged.
    fn pass(&mut self, id: Option<ValueId>, dy: Option<ValueId>) -> Result<(), VerifyError> {
        match (id, dy) {
            (Some(id), Some(dy)) if self.wants(id) => self.contribute(id, dy),
            _ => Ok(()),
        }
    }

    fn product_adjoint(&mut self, instr: &Instr, dy: Option<ValueId>) -> Result<(), VerifyError> {
        let (x, w) = (instr.inputs[0].expect("verified"), instr.inputs[1].expect("verified"));
        let per_head = instr.op == Op::HeadMatmul;
        if let Some(bias) = instr.inputs.get(2).copied().flatten()
            && let Some(db) = self.accumulator(bias)
        {
            self.builder.push_slots(Op::BiasGrad, vec![dy, Some(db)], &[])?;
        }
        if !per_head {
            self.pass(instr.inputs.get(3).copied().flatten(), dy)?;
        }
        if let Some(dw) = self.accumulator(w) {
            let op = if per_head { Op::HeadMatmulDw } else { Op::MatmulDw };
            self.builder.push_slots(op, vec![dy, Some(x), Some(dw)], &[])?;
        }
        match (self.wants(x), per_head) {
            (false, _) => Ok(()),
            (true, true) => self.emit(Op::HeadMatmulDx, vec![dy, Some(w)], &[Some(x)]),
            (true, false) => self.emit_fused(Op::MatmulDx, vec![dy, Some(w), None], x, 2),
        }
    }

    /// `head_matmul_dx` in a forward pass: each of its adjoints is one of `head_matmul`'s, with the
    /// operands in each other's places.
    fn transposed_product_adjoint(
        &mut self,
        instr: &Instr,
        dy: Option<ValueId>,
    ) -> Result<(), VerifyError> {
        let (x, w) = (instr.inputs[0].expect("verified"), instr.inputs[1].expect("verified"));
        if let Some(dw) = self.accumulator(w) {
            self.builder.push_slots(Op::HeadMatmulDw, vec![Some(x), dy, Some(dw)], &[])?;
        }
        if self.wants(x) {
            self.emit(Op::HeadMatmul, vec![dy, Some(w)], &[Some(x)])
        } else {
            Ok(())
        }
    }

    fn experts_adjoint(
        &mut self,
        instr: &Instr,
        dy: &[Option<ValueId>],
    ) -> Result<(), VerifyError> {
        let x = instr.inputs[0].expect("verified");
        let second = instr.inputs.get(1).copied().flatten();
        match instr.op {
            // Choosing has no gradient, the weights have one.
            Op::Route(routing) => {
                let inputs = vec![dy[1], Some(x), instr.outputs[0]];
                self.emit(Op::RouteGrad(routing), inputs, &[Some(x)])
            }
            Op::ExpertSum => {
                // The rows are read for the gradient of the weights alone.
                let weighs = second.filter(|&weights| self.wants(weights));
                let rows = if weighs.is_some() || second.is_none() { Some(x) } else { None };
                let inputs = vec![dy[0], rows, second];
                self.emit(Op::ExpertSumGrad, inputs, &[Some(x).filter(|&x| self.wants(x)), weighs])
            }
            _ => self.expert_product_adjoint(instr, dy[0]),
        }
    }

    fn balance_adjoint(
        &mut self,
        instr: &Instr,
        dy: &[Option<ValueId>],
    ) -> Result<(), VerifyError> {
        let slot = |n: usize| instr.inputs.get(n).copied().flatten();
        if let Op::BalanceLoss(attrs) = instr.op {
            let inputs = vec![dy[0], slot(0)];
            return self.emit(Op::BalanceLossGrad(attrs), inputs, &[slot(1)]);
        }
        // How often an expert is chosen has no gradient, its probability has one.
        let Some(dmass) = dy[1] else { return Ok(()) };
        if slot(0).is_some_and(|logits| self.wants(logits)) {
            self.emit(Op::ExpertLoadGrad, vec![Some(dmass), slot(0)], &[slot(0)])?;
        }
        self.pass(slot(3), Some(dmass))
    }

    fn expert_product_adjoint(
        &mut self,
        instr: &Instr,
        dy: Option<ValueId>,
    ) -> Result<(), VerifyError> {
        let [Some(x), Some(w), Some(experts)] = instr.inputs[..] else {
            unreachable!("a verified expert_matmul has three operands")
        };
        if let Some(dw) = self.accumulator(w) {
            let inputs = vec![dy, Some(x), Some(experts), Some(dw)];
            self.builder.push_slots(Op::ExpertMatmulDw, inputs, &[])?;
        }
        if !self.wants(x) {
            return Ok(());
        }
        let inputs = vec![dy, Some(w), Some(experts)];
        let axis = |id: ValueId| self.builder.program.value(id).shape.0.get(1).copied();
        if axis(x) == axis(experts) {
            return self.emit(Op::ExpertMatmulDx, inputs, &[Some(x)]);
        }
        // A token's row went to several experts.
        let name = self.builder.fresh(&format!("{}.routed", self.gradient_name(x)));
        let routed = self.builder.push_slots(Op::ExpertMatmulDx, inputs, &[Some(&name)])?;
        self.emit(Op::ExpertSum, vec![routed[0], None], &[Some(x)])
    }

    fn norm_adjoint(&mut self, instr: &Instr, dy: Option<ValueId>) -> Result<(), VerifyError> {
        let (x, w) = (instr.inputs[0].expect("verified"), instr.inputs[1].expect("verified"));
        let dw = self.accumulator(w);
        let mut inputs = vec![dy, Some(x), Some(w), None, dw];
        let op = match instr.op {
            Op::RmsNorm(attrs) => Op::RmsNormGrad(attrs),
            Op::LayerNorm(attrs) => {
                let bias = instr.inputs.get(2).copied().flatten();
                inputs.push(bias.and_then(|bias| self.accumulator(bias)));
                Op::LayerNormGrad(attrs)
            }
            _ => unreachable!("called for norms only"),
        };
        if self.wants(x) {
            self.emit_fused(op, inputs, x, 3)
        } else {
            let name = self.gradient_name(x);
            self.builder.push_slots(op, inputs, &[Some(&name)]).map(|_| ())
        }
    }

    fn heads_adjoint(&mut self, instr: &Instr, dy: &[Option<ValueId>]) -> Result<(), VerifyError> {
        let last = |tape: &Self, id: ValueId| -> Dim {
            *tape.builder.program.value(id).shape.0.last().expect("verified: [t, h, k]")
        };
        if let Op::Concat(_) = instr.op {
            let (a, b) = (instr.inputs[0].expect("verified"), instr.inputs[1].expect("verified"));
            let op = Op::Split(last(self, a), last(self, b));
            return self.emit(op, vec![dy[0]], &[Some(a), Some(b)]);
        }
        // Split: a half that the loss never sees has the gradient zero.
        let x = instr.inputs[0].expect("verified");
        let mut halves = [None; 2];
        for (slot, half) in halves.iter_mut().enumerate() {
            *half = match dy[slot] {
                Some(dy) => Some(dy),
                None => {
                    let output = instr.outputs[slot].expect("split names both halves");
                    let name = self.gradient_name(output);
                    Some(self.builder.push(&name, Op::Scale(0.0), &[output])?)
                }
            };
        }
        let name = last(self, x).name;
        self.emit(Op::Concat(name), halves.to_vec(), &[Some(x)])
    }
}
