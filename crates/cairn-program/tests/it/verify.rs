//! What verification refuses, and how it says so.

use cairn_kernels::{Encoding, Layout, Mask};
use cairn_program::{
    AdamWAttrs, AttentionAttrs, Builder, Class, Dim, DimName, DropoutAttrs, NormAttrs, Op, Shape,
    ValueType, VerifyError,
};

use crate::harness::{dim, hidden, with_vectors};

#[test]
fn a_transposed_weight_is_refused_by_name() {
    let (mut b, x) = with_vectors();
    let square = dim(DimName::Intermediate, 12);
    // Same sizes, other order: 12 × 12 hides the mistake from a check of sizes alone.
    let w = b.matrix("w", &[hidden()], &[square], (Encoding::F32, Layout::RowMajor));
    let error = b.push("y", Op::Matmul, &[x, w]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "instruction 1 (matmul), operand 1 (w): expected a matrix [out.., [d=12]], \
         found f32[d=12, f=12]"
    );
}

#[test]
fn a_wrong_size_type_or_rank_is_refused() {
    let (mut b, x) = with_vectors();
    let narrow = b.weight("narrow", &[dim(DimName::Hidden, 11)]);
    let attrs = NormAttrs { eps: 1e-5, plus_one: false };
    let error = b.push("y", Op::RmsNorm(attrs), &[x, narrow]).unwrap_err().to_string();
    assert!(error.contains("operand 1 (narrow): expected f32[d=12], found f32[d=11]"), "{error}");

    let ids = b.find("ids").unwrap();
    let error = b.push("y", Op::Add, &[x, ids]).unwrap_err().to_string();
    assert!(error.contains("expected f32[t, d=12], found u32[t]"), "{error}");

    let error = b.push("y", Op::Add, &[x]).unwrap_err().to_string();
    assert!(error.contains("operand 1 (absent): expected an operand"), "{error}");
}

#[test]
fn an_encoded_weight_must_fit_its_rows() {
    let (mut b, x) = with_vectors();
    let shape = Shape::new([dim(DimName::Intermediate, 4), hidden()]);
    // Groups of a quantized row would straddle rows of another length.
    let q8 = ValueType::Encoded { encoding: Encoding::Q8, layout: Layout::RowMajor, inputs: 6 };
    let w = b.declare("w", Class::Weight, q8, shape);
    assert!(matches!(b.push("y", Op::Matmul, &[x, w]), Err(VerifyError::Operand { slot: 1, .. })));
}

/// The same matrix in panels is another order of its bytes: kernels that read rows must not get it.
#[test]
fn a_wrong_layout_is_refused_by_name() {
    let panels = (Encoding::F32, Layout::Panel);
    let (mut b, x) = with_vectors();
    let heads = [dim(DimName::Heads, 3), dim(DimName::HeadDim, 4)];
    let w = b.matrix("q.w", &heads, &[hidden()], panels);
    let q = b.push("q", Op::Matmul, &[x, w]).unwrap();
    let w = b.matrix("absorb", &[heads[0], dim(DimName::Rank, 5)], &[heads[1]], panels);
    let error = b.push("y", Op::HeadMatmul, &[q, w]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "instruction 2 (head_matmul), operand 1 (absorb): expected f32, \
         found f32.panel[h=3, r=5, k=4]"
    );
    // Rows of an expert share a panel with none of another.
    let ranks = [Dim::TOKENS, dim(DimName::Chosen, 2)];
    let experts = b.input("experts", ValueType::U32, &ranks);
    let outputs = [dim(DimName::Experts, 4), dim(DimName::Intermediate, 24)];
    let w = b.matrix("up", &outputs, &[hidden()], panels);
    let error = b.push("y", Op::ExpertMatmul, &[x, w, experts]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "instruction 2 (expert_matmul), operand 1 (up): \
         expected a multiple of 16 outputs in panels, or row-major, found f32.panel[e=4, f=24, d=12]"
    );
}

/// The copy of a master that products read is written row by row.
#[test]
fn an_update_into_panels_is_refused() {
    let attempt = |layout| {
        let mut b = Builder::new();
        let dims = [dim(DimName::Intermediate, 5), hidden()];
        let master = b.declare("w.master", Class::State, ValueType::F32, Shape::new(dims));
        let gradient = b.declare("grad.w", Class::Gradient, ValueType::F32, Shape::new(dims));
        let [m, v] = ["m", "v"].map(|name| b.state(name, ValueType::F32, &dims));
        let lr = b.input("lr", ValueType::F64, &[]);
        let step = b.input("step", ValueType::U32, &[]);
        let copy = b.matrix("w", &dims[..1], &dims[1..], (Encoding::Bf16, layout));
        let attrs = AdamWAttrs { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        let inputs = [master, gradient, m, v].map(Some).into_iter().chain([None]);
        let inputs = inputs.chain([lr, step, copy].map(Some)).collect();
        b.push_slots(Op::AdamW(attrs), inputs, &[]).map(|_| ())
    };
    attempt(Layout::RowMajor).unwrap();
    assert_eq!(
        attempt(Layout::Panel).unwrap_err().to_string(),
        "instruction 0 (adamw), operand 7 (w): expected a row-major copy [f=5, d=12], \
         found bf16.panel[f=5, d=12]"
    );
}

/// A program that was stored, and altered: each thing that verification names is checked again.
#[test]
fn an_altered_program_is_refused_before_it_runs() {
    let (mut b, x) = with_vectors();
    let inner = dim(DimName::Intermediate, 5);
    let w = b.matrix("w", &[inner], &[hidden()], (Encoding::F32, Layout::RowMajor));
    let up = b.push("up", Op::Matmul, &[x, w]).unwrap();
    let norm = b.weight("norm", &[inner]);
    let attrs = NormAttrs { eps: 1e-5, plus_one: false };
    let y = b.push("y", Op::RmsNorm(attrs), &[up, norm]).unwrap();
    b.output(y);
    let program = b.finish().unwrap();
    let refused = |name: &str, alter: &dyn Fn(&mut cairn_program::Value)| {
        let mut altered = program.clone();
        alter(altered.values.iter_mut().find(|value| value.name == name).unwrap());
        altered.verify().unwrap_err().to_string()
    };
    let panels = ValueType::weight(Encoding::F32, Layout::Panel, 5);
    assert_eq!(
        refused("norm", &|value| value.value_type = panels),
        "instruction 2 (rms_norm), operand 1 (norm): expected f32, found f32.panel[f=5]"
    );
    assert_eq!(
        refused("w", &|value| value.value_type = ValueType::U32),
        "instruction 1 (matmul), operand 1 (w): expected a matrix [out.., [d=12]], found u32[f=5, d=12]"
    );
    assert_eq!(
        refused("w", &|value| value.shape.0.reverse()),
        "instruction 1 (matmul), operand 1 (w): expected a matrix [out.., [d=12]], found f32[d=12, f=5]"
    );
    assert_eq!(
        refused("norm", &|value| value.shape.0[0].size = Some(6)),
        "instruction 2 (rms_norm), operand 1 (norm): expected f32[f=5], found f32[f=6]"
    );
    assert_eq!(
        refused("up", &|value| value.shape.0[1].size = Some(6)),
        "instruction 1 (matmul), result 0 (up): the operation yields f32[t, f=5], declared is f32[t, f=6]"
    );
}

#[test]
fn heads_must_divide() {
    let (mut b, x) = with_vectors();
    let mut project = |name: &str, heads: usize, kind: DimName| {
        let dims = [dim(kind, heads), dim(DimName::HeadDim, 4)];
        let storage = (Encoding::F32, Layout::RowMajor);
        let w = b.matrix(&format!("{name}.w"), &dims, &[hidden()], storage);
        b.push(name, Op::Matmul, &[x, w]).unwrap()
    };
    let q = project("q", 4, DimName::Heads);
    let (k, v) = (project("k", 3, DimName::KvHeads), project("v", 3, DimName::KvHeads));
    let attrs = AttentionAttrs {
        mask: Mask::CAUSAL,
        scale: 0.5,
        softcap: None,
        values_in_keys: false,
        value_dim: 4,
        dropout: None,
    };
    let error = b.push("y", Op::Attention(attrs), &[q, k, v]).unwrap_err().to_string();
    assert!(error.contains("expected a number of heads that divides 4"), "{error}");
}

#[test]
fn a_value_cannot_be_read_before_it_is_written() {
    let (mut b, x) = with_vectors();
    let y = b.push("y", Op::Scale(2.0), &[x]).unwrap();
    let z = b.push("z", Op::Add, &[x, y]).unwrap();
    b.output(z);
    let mut program = b.finish().unwrap();
    program.instrs.swap(1, 2);
    let error = program.verify().unwrap_err();
    assert_eq!(error.to_string(), "instruction 1 (add) reads before it is written y");
    program.instrs.swap(1, 2);
    program.instrs.push(program.instrs[1].clone());
    assert_eq!(program.verify().unwrap_err().to_string(), "instruction 3 (scale) writes again y");
}

#[test]
fn a_program_survives_serialization() {
    let (mut b, x) = with_vectors();
    let y = b.push("y", Op::Dropout(DropoutAttrs { p: 0.1, site: 0 }), &[x]).unwrap();
    b.output(y);
    let program = b.finish().unwrap();
    let text = serde_json::to_string(&program).unwrap();
    let back: cairn_program::Program = serde_json::from_str(&text).unwrap();
    assert_eq!(program, back);
    back.verify().unwrap();
}

#[test]
fn program_text_reads_like_this() {
    let (mut b, x) = with_vectors();
    b.set_block(Some(0));
    let w = b.weight("norm.weight", &[hidden()]);
    let attrs = NormAttrs { eps: 1e-5, plus_one: false };
    let y = b.push("y", Op::RmsNorm(attrs), &[x, w]).unwrap();
    b.output(y);
    let text = b.finish().unwrap().to_string();
    insta::assert_snapshot!(text, @r"
    program vis/4
      input ids : u32[t]
      input positions : u32[t]
      weight table : f32[v=7, d=12]
      weight norm.weight : f32[d=12]
        0  x : f32[t, d=12] = embed(ids, table)
     block 0:
        1  y : f32[t, d=12] = rms_norm(x, norm.weight) eps=1e-5
    output y
    ");
    let _ = Dim::TOKENS;
}
