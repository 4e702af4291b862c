//! The update: gradients to new weights, moments and averages, in two programs.
//!
//! The first measures the norm of all gradients and changes nothing, so that whoever trains can look
//! at it before the second applies them. They share weights, gradients and states by name with the
//! training program of the same session.
//! Per weight `W`: state `adamw.m.W`, `adamw.v.W`; a bf16 weight also has its f32 `master.W`, which
//! the optimizer updates and rounds to the weight; with averaging, `ema.W`.

use std::collections::BTreeSet;

use crate::differentiate::GRADIENT_PREFIX;
use crate::dim::Shape;
use crate::op::{AdamWAttrs, Op};
use crate::program::{Builder, Instr, Program};
use crate::value::{Class, ValueId, ValueType};
use crate::verify::VerifyError;

/// Settings of the update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateOptions {
    /// Moments, eps, and the decay of weights that decay.
    pub adamw: AdamWAttrs,
    /// Limit of the global gradient norm; `None` measures it without clipping.
    pub max_grad_norm: Option<f32>,
    /// Share of the old average that stays at each step; `None` keeps no average.
    pub ema_decay: Option<f32>,
}

/// The sum of the squares of all gradients: output of [`norm_program`], input of [`update_program`].
pub const GRAD_NORM_SQUARED: &str = "grad_norm_squared";

/// Builds the program that measures the gradients of `training`: it has no input, writes no persistent
/// value, and its output is [`GRAD_NORM_SQUARED`] `[] f64`.
///
/// # Errors
///
/// [`VerifyError`] if the result does not verify, which a verified training program rules out.
pub fn norm_program(training: &Program) -> Result<Program, VerifyError> {
    let mut builder = Builder::new();
    let mut declared: Vec<(&str, Shape)> = training
        .of_class(Class::Gradient)
        .map(|(_, gradient)| (gradient.name.as_str(), gradient.shape.clone()))
        .collect();
    // In name order, so that the norm does not depend on where a weight stands in the program.
    declared.sort_by(|a, b| a.0.cmp(b.0));
    let gradients: Vec<ValueId> = declared
        .into_iter()
        .map(|(name, shape)| builder.declare(name, Class::Gradient, ValueType::F32, shape))
        .collect();
    let norm = builder.push(GRAD_NORM_SQUARED, Op::GlobalNorm, &gradients)?;
    builder.output(norm);
    builder.finish()
}

/// Builds the update program for the gradients of `training`.
///
/// Weight decay falls on matrices; norms and biases are left alone (a bias may have two axes here,
/// heads and head dim, so operations tell, not shapes).
/// Inputs: `lr` `[] f64`, `step` `[] u32` (counted from 1) and, if gradients are clipped,
/// [`GRAD_NORM_SQUARED`] `[] f64`, which [`norm_program`] computes.
///
/// # Errors
///
/// [`VerifyError`] if the result does not verify, which a verified training program rules out.
pub fn update_program(training: &Program, options: &UpdateOptions) -> Result<Program, VerifyError> {
    let mut builder = Builder::new();
    let lr = builder.input("lr", ValueType::F64, &[]);
    let step = builder.input("step", ValueType::U32, &[]);
    let factor = match options.max_grad_norm {
        Some(max_norm) => {
            let norm = builder.input(GRAD_NORM_SQUARED, ValueType::F64, &[]);
            Some(builder.push("clip", Op::Clip { max_norm }, &[norm])?)
        }
        None => None,
    };
    let matrices: BTreeSet<ValueId> = training.instrs.iter().flat_map(matrix_operands).collect();
    let mut trained: Vec<(&str, Shape, ValueType, bool)> = Vec::new();
    for (_, gradient) in training.of_class(Class::Gradient) {
        let name = gradient.name.strip_prefix(GRADIENT_PREFIX).expect("named by differentiate");
        let id = training.find(name).expect("its gradient exists");
        let weight = training.value(id);
        trained.push((name, weight.shape.clone(), weight.value_type, matrices.contains(&id)));
    }
    // In name order, as the norm is summed.
    trained.sort_by(|a, b| a.0.cmp(b.0));
    for (name, shape, value_type, is_matrix) in trained {
        let gradient_name = format!("{GRADIENT_PREFIX}{name}");
        let gradient =
            builder.declare(&gradient_name, Class::Gradient, ValueType::F32, shape.clone());
        let weight = builder.declare(name, Class::Weight, value_type, shape);
        let scalars = [factor, Some(lr), Some(step)];
        let mut options = *options;
        if !is_matrix {
            options.adamw.weight_decay = 0.0;
        }
        update_weight(&mut builder, &options, weight, gradient, scalars)?;
    }
    builder.finish()
}

fn update_weight(
    builder: &mut Builder,
    options: &UpdateOptions,
    weight: ValueId,
    gradient: ValueId,
    scalars: [Option<ValueId>; 3],
) -> Result<(), VerifyError> {
    let value = builder.program.value(weight);
    let (name, Shape(dims)) = (value.name.clone(), value.shape.clone());
    let in_f32 = value.value_type == ValueType::F32;
    let mut state =
        |prefix: &str| builder.state(&format!("{prefix}.{name}"), ValueType::F32, &dims);
    let (m, v) = (state("adamw.m"), state("adamw.v"));
    let (master, copy) = if in_f32 { (weight, None) } else { (state("master"), Some(weight)) };
    let average = options.ema_decay.map(|decay| (decay, state("ema")));
    let mut inputs = vec![Some(master), Some(gradient), Some(m), Some(v)];
    inputs.extend(scalars);
    inputs.push(copy);
    builder.push_slots(Op::AdamW(options.adamw), inputs, &[])?;
    if let Some((decay, average)) = average {
        builder.push_slots(Op::Ema { decay }, vec![Some(master), Some(average)], &[])?;
    }
    Ok(())
}

/// The weight matrices that an instruction multiplies by or looks up in.
fn matrix_operands(instr: &Instr) -> impl Iterator<Item = ValueId> {
    let slots: &[usize] = match instr.op {
        Op::Embed | Op::Matmul | Op::HeadMatmul | Op::HeadMatmulDx | Op::ExpertMatmul => &[1],
        // The head's, and that of its adapter.
        Op::TokenLogprob(_) => &[1, 5],
        Op::CrossEntropy(_) => &[1, 8],
        Op::PositionEmbed => &[2],
        _ => &[],
    };
    slots.iter().filter_map(|&slot| instr.inputs.get(slot).copied().flatten())
}
