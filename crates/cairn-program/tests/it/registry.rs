//! Every instruction that runs a kernel is in the kernels' registry, so that it can be measured.

use cairn_kernels::registry::operators;

/// Instructions that are a few scalar operations of the executor itself.
const WITHOUT_KERNEL: [&str; 3] = ["balance_loss", "balance_loss_grad", "clip"];

/// The names in the source of the instruction set: a new instruction cannot be left out.
fn instructions() -> Vec<&'static str> {
    let source = include_str!("../../src/op.rs");
    let (_, body) = source.split_once("pub fn name(&self)").unwrap();
    let (body, _) = body.split_once("\n    }\n").unwrap();
    body.lines().filter_map(|line| line.split('"').nth(1)).collect()
}

#[test]
fn every_instruction_with_a_kernel_is_registered() {
    let instructions = instructions();
    assert!(instructions.len() >= 39 && instructions.contains(&"matmul"), "{instructions:?}");
    for name in instructions {
        let is_registered = operators().any(|operator| operator.name == name);
        assert_eq!(is_registered, !WITHOUT_KERNEL.contains(&name), "{name}");
    }
}
