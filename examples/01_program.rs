//! A program by hand: a lookup, a norm and a product, verified while they are put together, printed
//! and run.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::error::Error;

use cairn_kernels::{Cpu, Encoding, Layout, SeqSlot};
use cairn_program::{
    Builder, Dim, DimName, Feed, KvPlacement, MemoryPlan, NormAttrs, Op, Program, ProgramId, Run,
    Session, SessionProgram, Sizes, ValueType,
};

const VOCAB: usize = 8;
const HIDDEN: usize = 4;

fn program() -> Result<Program, Box<dyn Error>> {
    let (vocab, hidden) = (Dim::fixed(DimName::Vocab, VOCAB), Dim::fixed(DimName::Hidden, HIDDEN));
    let mut builder = Builder::new();
    let ids = builder.input("ids", ValueType::U32, &[Dim::TOKENS]);
    let table = builder.matrix("table", &[vocab], &[hidden], (Encoding::F32, Layout::RowMajor));
    let norm = builder.weight("norm", &[hidden]);
    let x = builder.push("x", Op::Embed, &[ids, table])?;
    let h = builder.push("h", Op::RmsNorm(NormAttrs { eps: 1e-5, plus_one: false }), &[x, norm])?;
    // The head is the table once more: a weight is tied by being used twice.
    let logits = builder.push("logits", Op::Matmul, &[h, table])?;
    // What does not fit is refused here, and the error says what was expected and what was found.
    if let Err(mistake) = builder.push("mistake", Op::Matmul, &[logits, table]) {
        println!("refused: {mistake}\n");
    }
    builder.output(logits);
    Ok(builder.finish()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let program = program()?;
    println!("{program}");

    // Every byte is known before any is taken.
    let sizes = Sizes::dense(3, 1);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None)?;
    println!("memory: {}\n", plan.bytes());

    let mut session = Session::new(plan, Cpu::detect(1))?;
    let table = session.stored_f32_mut("table").ok_or("declared above")?;
    table.iter_mut().enumerate().for_each(|(i, value)| *value = ((i * 7) % 5) as f32 - 2.0);
    session.stored_f32_mut("norm").ok_or("declared above")?.fill(1.0);
    let feeds = [Feed::u32("ids", &[5, 0, 2])];
    let sequence = [SeqSlot { start: 0, len: 3, cached: 0, blocks: &[] }];
    session.run(ProgramId(0), &Run::forward(&feeds, &sequence))?;
    for (token, logits) in session.output(ProgramId(0), "logits").chunks(VOCAB).enumerate() {
        println!("token {token}: {logits:.2?}");
    }
    Ok(())
}
