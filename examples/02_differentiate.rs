//! Backward is a program too: it is derived from the forward one, instruction by instruction, and a
//! finite difference agrees with it.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::BTreeSet;
use std::error::Error;

use cairn_kernels::{Cpu, Encoding, Layout, SeqSlot};
use cairn_program::{
    Builder, Dim, DimName, Feed, HeadAttrs, KvPlacement, Loss, MemoryPlan, Op, Program, ProgramId,
    Run, Session, SessionProgram, Sizes, ValueType, differentiate,
};

const IDS: [u32; 4] = [1, 4, 2, 0];
const TARGETS: [u32; 4] = [4, 2, 0, 3];

fn forward() -> Result<Program, Box<dyn Error>> {
    let (vocab, hidden) = (Dim::fixed(DimName::Vocab, 5), Dim::fixed(DimName::Hidden, 8));
    let storage = (Encoding::F32, Layout::RowMajor);
    let mut builder = Builder::new();
    let ids = builder.input("ids", ValueType::U32, &[Dim::TOKENS]);
    let targets = builder.input("targets", ValueType::U32, &[Dim::TOKENS]);
    let table = builder.matrix("table", &[vocab], &[hidden], storage);
    let head = builder.matrix("head", &[vocab], &[hidden], storage);
    let x = builder.push("x", Op::Embed, &[ids, table])?;
    let slots = vec![Some(x), Some(head), Some(targets)];
    let logprob = builder.push_slots(
        Op::TokenLogprob(HeadAttrs::default()),
        slots,
        &[Some("logprob"), Some("lse")],
    )?;
    builder.output(logprob[0].ok_or("named above")?);
    Ok(builder.finish()?)
}

/// The loss of the weights as they are; the gradients are in the session afterwards.
fn loss(session: &mut Session) -> Result<f64, Box<dyn Error>> {
    let weights = [1.0; IDS.len()];
    let feeds = [
        Feed::u32("ids", &IDS),
        Feed::u32("targets", &TARGETS),
        Feed::f32("loss_weights", &weights),
    ];
    let sequence = [SeqSlot { start: 0, len: IDS.len(), cached: 0, blocks: &[] }];
    session.run(ProgramId(0), &Run::forward(&feeds, &sequence))?;
    Ok(-session.output(ProgramId(0), "logprob").iter().map(|&x| f64::from(x)).sum::<f64>())
}

fn main() -> Result<(), Box<dyn Error>> {
    let trainable = BTreeSet::from(["table".to_owned(), "head".to_owned()]);
    let program = differentiate(&forward()?, &trainable, &Loss::CrossEntropy)?;
    println!("{program}");

    let sizes = Sizes::dense(IDS.len(), 1);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let mut session = Session::new(MemoryPlan::new(vec![program], None)?, Cpu::detect(1))?;
    for name in &trainable {
        let weights = session.stored_f32_mut(name).ok_or("declared above")?;
        weights.iter_mut().enumerate().for_each(|(i, w)| *w = ((i * 11) % 13) as f32 / 13.0 - 0.4);
    }
    loss(&mut session)?;
    let derived = session.stored_f32("grad.head").ok_or("head is trained")?[3];
    let step = 1e-2_f32;
    let mut losses = [0.0; 2];
    for (side, found) in [step, -step].into_iter().zip(&mut losses) {
        session.stored_f32_mut("head").ok_or("declared above")?[3] += side;
        *found = loss(&mut session)?;
        session.stored_f32_mut("head").ok_or("declared above")?[3] -= side;
    }
    let measured = (losses[0] - losses[1]) / (2.0 * f64::from(step));
    println!("gradient of head[0, 3]: derived {derived:.5}, finite difference {measured:.5}");
    assert!((f64::from(derived) - measured).abs() < 1e-3);
    Ok(())
}
