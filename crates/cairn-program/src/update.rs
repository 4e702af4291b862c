//! The update program: gradients to new weights, moments and averages.
//!
//! It shares weights, gradients and states by name with the training program of the same session.
//! Per weight `W`: state `adamw.m.W`, `adamw.v.W`; a bf16 weight also has its f32 `master.W`, which
//! the optimizer updates and rounds to the weight; with averaging, `ema.W`.

use crate::differentiate::GRADIENT_PREFIX;
use crate::dim::Shape;
use crate::op::{AdamWAttrs, Op};
use crate::program::{Builder, Program};
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

/// Builds the update program for the gradients of `training`.
///
/// Weight decay falls on weights of two or more dimensions; norms and biases are left alone.
/// Inputs: `lr` `[] f64`, `step` `[] u32` (counted from 1). Output: `grad_norm_squared` `[] f64`.
///
/// # Errors
///
/// [`VerifyError`] if the result does not verify, which a verified training program rules out.
pub fn update_program(training: &Program, options: &UpdateOptions) -> Result<Program, VerifyError> {
    let mut builder = Builder::new();
    let lr = builder.input("lr", ValueType::F64, &[]);
    let step = builder.input("step", ValueType::U32, &[]);
    let mut trained: Vec<(&str, Shape, ValueType)> = Vec::new();
    for (_, gradient) in training.of_class(Class::Gradient) {
        let name = gradient.name.strip_prefix(GRADIENT_PREFIX).expect("named by differentiate");
        let weight = training.value(training.find(name).expect("its gradient exists"));
        trained.push((name, weight.shape.clone(), weight.value_type));
    }
    // In name order, so that the norm does not depend on where a weight stands in the program.
    trained.sort_by(|a, b| a.0.cmp(b.0));
    let mut gradients = Vec::new();
    for (name, shape, _) in &trained {
        let name = format!("{GRADIENT_PREFIX}{name}");
        gradients.push(builder.declare(&name, Class::Gradient, ValueType::F32, shape.clone()));
    }
    let norm = builder.push("grad_norm_squared", Op::GlobalNorm, &gradients)?;
    builder.output(norm);
    let factor = match options.max_grad_norm {
        Some(max_norm) => Some(builder.push("clip", Op::Clip { max_norm }, &[norm])?),
        None => None,
    };
    for ((name, shape, value_type), gradient) in trained.into_iter().zip(gradients) {
        let weight = builder.declare(name, Class::Weight, value_type, shape.clone());
        let scalars = [factor, Some(lr), Some(step)];
        update_weight(&mut builder, options, weight, gradient, scalars)?;
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
    let mut adamw = options.adamw;
    if dims.len() < 2 {
        adamw.weight_decay = 0.0;
    }
    let mut state =
        |prefix: &str| builder.state(&format!("{prefix}.{name}"), ValueType::F32, &dims);
    let (m, v) = (state("adamw.m"), state("adamw.v"));
    let (master, copy) = if in_f32 { (weight, None) } else { (state("master"), Some(weight)) };
    let average = options.ema_decay.map(|decay| (decay, state("ema")));
    let mut inputs = vec![Some(master), Some(gradient), Some(m), Some(v)];
    inputs.extend(scalars);
    inputs.push(copy);
    builder.push_slots(Op::AdamW(adamw), inputs, &[])?;
    if let Some((decay, average)) = average {
        builder.push_slots(Op::Ema { decay }, vec![Some(master), Some(average)], &[])?;
    }
    Ok(())
}
