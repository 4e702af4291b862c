//! Pictures of small programs.

use super::*;
use crate::dim::{Dim, DimName};
use crate::op::{AttentionAttrs, DropoutAttrs};
use crate::program::Builder;
use crate::value::ValueType;

/// Blocks of a norm and a product with a residual around them; every other one scales twice.
fn program(blocks: u32, alternating: bool) -> Program {
    let d = Dim::fixed(DimName::Hidden, 8);
    let mut builder = Builder::new();
    let mut x = builder.input("x & <y>", ValueType::F32, &[Dim::TOKENS, d]);
    x = builder.push("start", Op::Scale(1.0), &[x]).unwrap();
    for block in 0..blocks {
        builder.set_block(Some(block));
        let name = |what: &str| format!("{block}.{what}");
        let weight = builder.weight(&format!("model.layers.{block}.w.weight"), &[d, d]);
        let mut y = builder.push(&name("a"), Op::Scale(2.0), &[x]).unwrap();
        if alternating && block % 2 == 1 {
            y = builder.push(&name("b"), Op::Scale(3.0), &[y]).unwrap();
        }
        y = builder.push(&name("c"), Op::Matmul, &[y, weight]).unwrap();
        y = builder.push(&name("e"), Op::Scale(3.0), &[y]).unwrap();
        x = builder.push(&name("out"), Op::Add, &[x, y]).unwrap();
    }
    builder.set_block(None);
    let last = builder.push("last", Op::Scale(0.5), &[x]).unwrap();
    builder.output(last);
    builder.finish().unwrap()
}

fn boxes(picture: &str) -> usize {
    picture.matches("<g class=\"box").count()
}

/// Every element that is opened is closed, in order.
fn assert_well_formed(xml: &str) {
    let mut open = Vec::new();
    for tag in xml.split('<').skip(1) {
        let (tag, _) = tag.split_once('>').expect("a tag ends");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "{xml}");
        } else if !tag.ends_with('/') {
            open.push(tag.split(' ').next().unwrap());
        }
    }
    assert!(open.is_empty(), "{open:?}");
}

#[test]
fn equal_blocks_are_drawn_once() {
    let picture = program(5, false).picture();
    assert_well_formed(&picture);
    assert_eq!(boxes(&picture), 1 + 4 + 1);
    assert!(picture.contains("blocks 0 to 4, 5 times"), "{picture}");
}

#[test]
fn blocks_that_take_turns_are_drawn_once_each() {
    let picture = program(7, true).picture();
    // Three pairs, and the seventh block alone.
    assert_eq!(boxes(&picture), 1 + 4 + 5 + 4 + 1);
    assert!(picture.contains("blocks 1, 3, … 5, 3 times"), "{picture}");
}

/// Each block's dropouts have sites of their own, which no reader of a picture wants to see.
#[test]
fn blocks_that_drop_at_their_own_sites_are_drawn_once() {
    let d = Dim::fixed(DimName::Hidden, 8);
    let key = Dim::fixed(DimName::HeadDim, 4);
    let mut builder = Builder::new();
    let x = builder.input("x", ValueType::F32, &[Dim::TOKENS, d]);
    let mut x = builder.push("start", Op::Scale(1.0), &[x]).unwrap();
    for block in 0..3 {
        builder.set_block(Some(block));
        let name = |what: &str| format!("{block}.{what}");
        let mut project = |what: &str, heads: DimName| {
            let weight =
                builder.weight(&name(&format!("{what}.w")), &[Dim::fixed(heads, 2), key, d]);
            builder.push(&name(what), Op::Matmul, &[x, weight]).unwrap()
        };
        let (q, k) = (project("q", DimName::Heads), project("k", DimName::KvHeads));
        let attrs = AttentionAttrs {
            mask: cairn_kernels::Mask::CAUSAL,
            scale: 0.5,
            softcap: None,
            values_in_keys: false,
            value_dim: 4,
            dropout: Some(DropoutAttrs { p: 0.1, site: 2 * block }),
        };
        let y = builder.push(&name("y"), Op::Attention(attrs), &[q, k, k]).unwrap();
        let out = builder.weight(&name("o.w"), &[d, Dim::fixed(DimName::Heads, 2), key]);
        let y = builder.push(&name("o"), Op::Matmul, &[y, out]).unwrap();
        let dropout = DropoutAttrs { p: 0.2, site: 2 * block + 1 };
        let y = builder.push(&name("dropped"), Op::Dropout(dropout), &[y]).unwrap();
        x = builder.push(&name("out"), Op::Add, &[x, y]).unwrap();
    }
    builder.output(x);
    let picture = builder.finish().unwrap().picture();
    assert!(picture.contains("blocks 0 to 2, 3 times"), "{picture}");
}

#[test]
fn names_cannot_leave_their_text() {
    let picture = program(1, false).picture();
    assert_well_formed(&picture);
    assert!(picture.contains("x &amp; &lt;y&gt;"));
}

#[test]
fn boxes_of_a_row_do_not_overlap() {
    let program = program(2, true);
    for section in sections(&program) {
        let layout = Layout::new(&program, &section.instrs);
        for (i, a) in layout.boxes.iter().enumerate() {
            for b in &layout.boxes[..i] {
                let apart = (a.x - b.x).abs() >= BOX_WIDTH || (a.y - b.y).abs() >= BOX_HEIGHT;
                assert!(apart, "{a:?} {b:?}");
            }
        }
    }
}
