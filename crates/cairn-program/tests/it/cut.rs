//! Cutting a program: both parts, one after the other, are the whole.

use cairn_kernels::{Act, Encoding, Layout};
use cairn_program::{Class, DimName, Feed, KvPlacement, Op, Program, ProgramId, cut};

use crate::harness::{dim, fill_weights, hidden, run, session, with_vectors};

/// Three blocks of a product and an activation with a residual.
fn three_blocks() -> Program {
    let (mut b, mut x) = with_vectors();
    for block in 0..3 {
        b.set_block(Some(block));
        let inner = dim(DimName::Intermediate, 5);
        let storage = (Encoding::F32, Layout::RowMajor);
        let up = b.matrix(&format!("{block}.up"), &[inner], &[hidden()], storage);
        let down = b.matrix(&format!("{block}.down"), &[hidden()], &[inner], storage);
        let a = b.push(&format!("{block}.a"), Op::Matmul, &[x, up]).unwrap();
        let a = b.push(&format!("{block}.b"), Op::Activation(Act::Silu), &[a]).unwrap();
        let a = b.push(&format!("{block}.c"), Op::Matmul, &[a, down]).unwrap();
        x = b.push(&format!("{block}.y"), Op::Add, &[x, a]).unwrap();
    }
    b.set_block(None);
    b.output(x);
    b.finish().unwrap()
}

#[test]
fn both_parts_make_the_whole() {
    let mut whole = session(three_blocks(), KvPlacement::Arena);
    fill_weights(&mut whole, 5);
    run(&mut whole, &[]);
    let expected = whole.output(ProgramId(0), "2.y").to_vec();
    for block in 0..=3 {
        let (first, second) = cut(&three_blocks(), block).unwrap();
        let crossing = second
            .of_class(Class::Input)
            .map(|(_, input)| input.name.clone())
            .find(|name| name != "ids" && name != "positions");
        let mut sessions = [first, second].map(|part| session(part, KvPlacement::Arena));
        for part in &mut sessions {
            let names: Vec<String> = part.persistent().map(|(name, ..)| name.to_owned()).collect();
            for name in names {
                let source = whole.stored(&name).unwrap().to_vec();
                part.stored_mut(&name).unwrap().copy_from_slice(&source);
            }
        }
        let [first, second] = &mut sessions;
        run(first, &[]);
        let actual = match &crossing {
            Some(name) => {
                let handed = first.output(ProgramId(0), name).to_vec();
                run(second, &[Feed::f32(name, &handed)]);
                second.output(ProgramId(0), "2.y").to_vec()
            }
            // Everything lies before the last boundary.
            None => first.output(ProgramId(0), "2.y").to_vec(),
        };
        assert_eq!(actual, expected, "cut at block {block}");
    }
}
