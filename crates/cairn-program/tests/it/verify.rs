//! What verification refuses, and how it says so.

use cairn_kernels::{Encoding, Layout, Mask};
use cairn_program::{AttentionAttrs, Dim, DimName, NormAttrs, Op, Shape, ValueType, VerifyError};

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
    let w = b.declare("w", cairn_program::Class::Weight, q8, shape);
    assert!(matches!(b.push("y", Op::Matmul, &[x, w]), Err(VerifyError::Operand { slot: 1, .. })));
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
    let y = b.push("y", Op::Dropout { p: 0.1, site: 0 }, &[x]).unwrap();
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
    program vis/2
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
