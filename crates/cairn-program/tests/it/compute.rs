//! The arithmetic of products as a part of the program: said, checked, kept, and refused where there are
//! no gradients.

use cairn_kernels::encoding::encode;
use cairn_kernels::matmul::matmul_reference;
use cairn_kernels::{Compute, Encoding, Layout, Matmul, Weight};
use cairn_program::{
    DifferentiateError, KvPlacement, Loss, Op, Program, ProgramId, VerifyError, differentiate,
};

use crate::harness::{IDS, Noise, WIDTH, fill_weights, hidden, run, session, with_vectors};

/// `y` by a bf16 weight, then `z` by an f32 one.
fn program(compute: Compute) -> Program {
    let (mut b, x) = with_vectors();
    b.set_compute(compute);
    let mut project = |name: &str, x, encoding| {
        let storage = (encoding, Layout::RowMajor);
        let w = b.matrix(&format!("{name}.w"), &[hidden()], &[hidden()], storage);
        b.push(name, Op::Matmul, &[x, w]).unwrap()
    };
    let y = project("y", x, Encoding::Bf16);
    let z = project("z", y, Encoding::F32);
    b.output(y);
    b.output(z);
    b.finish().unwrap()
}

#[test]
fn the_text_says_what_is_not_f32() {
    let text = program(Compute::Bf16).to_string();
    assert!(text.contains("= matmul(x, y.w) compute=bf16\n"), "{text}");
    assert!(text.contains("= matmul(y, z.w)\n"), "{text}");
    assert!(!program(Compute::F32).to_string().contains("compute"));
}

#[test]
fn it_survives_serialization() {
    let program = program(Compute::Bf16);
    let text = serde_json::to_string(&program).unwrap();
    assert_eq!(serde_json::from_str::<Program>(&text).unwrap(), program);
    let plain = serde_json::to_string(&self::program(Compute::F32)).unwrap();
    assert!(!plain.contains("compute"), "{plain}");
}

#[test]
fn other_weights_and_operations_are_refused() {
    for (index, op) in [(0, "embed"), (2, "matmul")] {
        let mut program = program(Compute::Bf16);
        program.instrs[index].compute = Compute::Bf16;
        let error = program.verify().unwrap_err();
        assert!(matches!(error, VerifyError::Compute { .. }), "{error}");
        let expected = format!("instruction {index} ({op}) has no product in bf16");
        assert_eq!(error.to_string(), expected);
    }
}

#[test]
fn products_without_gradients_are_not_trained() {
    let loss = Loss::Seeds(vec!["z".to_owned()]);
    let trainable = ["z.w".to_owned()].into();
    let error = differentiate(&program(Compute::Bf16), &trainable, &loss).unwrap_err();
    assert!(matches!(error, DifferentiateError::Compute { .. }), "{error}");
    assert_eq!(error.to_string(), "y is computed in bf16; only f32 products can be trained");
    differentiate(&program(Compute::F32), &trainable, &loss).unwrap();
}

#[test]
fn the_instruction_runs_in_its_arithmetic() {
    for compute in [Compute::F32, Compute::Bf16] {
        let mut session = session(program(compute), KvPlacement::Arena);
        fill_weights(&mut session, 3);
        let mut noise = Noise(4);
        let values: Vec<f32> = (0..WIDTH * WIDTH).map(|_| noise.next()).collect();
        let form = (Encoding::Bf16, Layout::RowMajor);
        encode(form, (WIDTH, WIDTH), &values, session.stored_mut("y.w").unwrap());
        run(&mut session, &[]);
        let table = session.stored_f32("table").unwrap();
        let rows = IDS.iter().map(|&id| &table[id as usize * WIDTH..][..WIDTH]);
        let x_tk: Vec<f32> = rows.flatten().copied().collect();
        let mut expected = vec![0.0; x_tk.len()];
        let bytes = session.stored("y.w").unwrap();
        let (encoding, layout) = form;
        let weight = Weight { encoding, layout, n: WIDTH, k: WIDTH, bytes };
        let (x_tk, y_tn, t) = (&x_tk[..], &mut expected[..], IDS.len());
        matmul_reference(Matmul {
            x_tk,
            weight,
            bias_n: None,
            y_tn,
            t,
            accumulate: false,
            compute,
        });
        assert_eq!(session.output(ProgramId(0), "y"), expected, "{compute}");
    }
}
