//! Plans: lifetimes never overlap in memory, and bounds are kept.

use cairn_kernels::{Cpu, Isa};
use cairn_program::{
    ArenaPlan, Builder, Class, Dim, DimName, Feed, HeadAttrs, KvPlacement, Loss, MemoryPlan, Op,
    Program, ProgramId, Run, RunError, Session, SessionProgram, Sizes, ValueId, ValueType,
    Workload, differentiate,
};
use proptest::prelude::*;

use crate::harness::{IDS, POSITIONS, dim, hidden, sequences, trainable, with_vectors};

/// A random straight-line program of additions and scalings over the vectors.
fn random_program(choices: &[(usize, usize, bool)]) -> Program {
    let (mut b, x) = with_vectors();
    let mut values = vec![x];
    for (index, &(first, second, adds)) in choices.iter().enumerate() {
        let (first, second) = (values[first % values.len()], values[second % values.len()]);
        let name = format!("v{index}");
        let value = if adds {
            b.push(&name, Op::Add, &[first, second]).unwrap()
        } else {
            b.push(&name, Op::Scale(0.5 + index as f32), &[first]).unwrap()
        };
        values.push(value);
    }
    b.output(*values.last().unwrap());
    b.finish().unwrap()
}

/// Runs the program with every value in a vector of its own.
fn naive(program: &Program, table: &[f32]) -> Vec<f32> {
    let mut values: Vec<Vec<f32>> = vec![Vec::new(); program.values.len()];
    let index = |id: ValueId| program.ids().position(|other| other == id).unwrap();
    for instr in &program.instrs {
        let read = |slot: usize| &values[index(instr.inputs[slot].unwrap())];
        let result = match instr.op {
            Op::Embed => {
                IDS.iter().flat_map(|&id| table[id as usize * 12..][..12].to_vec()).collect()
            }
            Op::Add => read(0).iter().zip(read(1)).map(|(a, b)| a + b).collect(),
            Op::Scale(factor) => read(0).iter().map(|a| a * factor).collect(),
            _ => unreachable!(),
        };
        values[index(instr.outputs[0].unwrap())] = result;
    }
    values[index(program.outputs[0])].clone()
}

proptest! {
    #[test]
    fn shared_buffers_never_change_a_result(
        choices in prop::collection::vec((0_usize..40, 0_usize..40, any::<bool>()), 1..40),
    ) {
        let program = random_program(&choices);
        let expected_name = program.value(program.outputs[0]).name.clone();
        let mut session = crate::harness::session(program.clone(), KvPlacement::Arena);
        crate::harness::fill_weights(&mut session, 3);
        let table = session.stored_f32("table").unwrap().to_vec();
        crate::harness::run(&mut session, &[]);
        let expected = naive(&program, &table);
        prop_assert_eq!(session.output(ProgramId(0), &expected_name), &expected[..]);
        // And sharing does happen: a chain needs a bounded number of buffers.
        let plan = ArenaPlan::new(&program, Sizes::dense(7, 2), KvPlacement::Arena);
        let all: usize = program
            .of_class(Class::Temp)
            .map(|(_, value)| value.bytes(&Sizes::dense(7, 2)).next_multiple_of(64))
            .sum();
        prop_assert!(plan.bytes <= all + 256);
    }
}

#[test]
fn a_chain_needs_two_buffers() {
    let choices: Vec<(usize, usize, bool)> = (0..20).map(|index| (index, index, false)).collect();
    let program = random_program(&choices);
    let sizes = Sizes::dense(32, 4);
    let plan = ArenaPlan::new(&program, sizes, KvPlacement::Arena);
    let vectors = 32 * 12 * 4;
    assert!(plan.bytes <= 2 * vectors + 512, "{} bytes", plan.bytes);
}

fn small() -> Session {
    let (mut b, x) = with_vectors();
    let y = b.push("y", Op::Scale(2.0), &[x]).unwrap();
    b.output(y);
    let program = b.finish().unwrap();
    let program = SessionProgram { program, sizes: Sizes::dense(7, 2), kv: KvPlacement::Arena };
    Session::new(MemoryPlan::new(vec![program], None).unwrap(), Cpu::new(Isa::best(), 1)).unwrap()
}

#[test]
fn a_run_beyond_its_plan_or_inputs_is_refused() {
    let mut session = small();
    let id = ProgramId(0);
    let good = [Feed::u32("ids", &IDS), Feed::u32("positions", &POSITIONS)];
    let sequences = sequences();
    session.run(id, &Run::forward(&good, &sequences)).unwrap();

    let error = session.run(id, &Run::forward(&good[..1], &sequences)).unwrap_err();
    assert_eq!(error, RunError::Missing { name: "positions".into() });

    let mut ids = IDS;
    ids[3] = 7;
    let bad = [Feed::u32("ids", &ids), good[1]];
    let error = session.run(id, &Run::forward(&bad, &sequences)).unwrap_err();
    assert_eq!(error.to_string(), "input ids: 7 at position 3 is not below 7");

    let mut long = sequences;
    long[1].len = 4;
    let error = session.run(id, &Run::forward(&good, &long)).unwrap_err();
    assert_eq!(error.to_string(), "tokens: 8 exceeds the plan's bound of 7");

    let mut gap = sequences;
    gap[1].start = 5;
    let error = session.run(id, &Run::forward(&good, &gap)).unwrap_err();
    assert_eq!(error.to_string(), "sequence 1: starts at row 5, expected 4");
}

#[test]
fn programs_that_disagree_about_a_weight_are_refused() {
    let build = |width: usize| {
        let mut b = Builder::new();
        let ids = b.input("ids", ValueType::U32, &[Dim::TOKENS]);
        let table = b.weight("w", &[hidden(), dim(hidden().name, width)]);
        let x = b.push("x", Op::Embed, &[ids, table]).unwrap();
        b.output(x);
        let program = b.finish().unwrap();
        SessionProgram { program, sizes: Sizes::dense(4, 1), kv: KvPlacement::Arena }
    };
    let error = MemoryPlan::new(vec![build(3), build(5)], None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "w is f32[d=12, d=3] in one program and f32[d=12, d=5] in another"
    );
}

#[test]
fn accounting_counts_what_a_product_costs() {
    let (mut b, x) = with_vectors();
    let out = dim(DimName::Intermediate, 5);
    let w = b.weight("w", &[out, hidden()]);
    let y = b.push("y", Op::Matmul, &[x, w]).unwrap();
    b.output(y);
    let program = b.finish().unwrap();
    let workload = Workload { sizes: Sizes::dense(10, 1), pairs: 55 };
    let costs = program.account(&workload);
    assert_eq!(costs[1].flops, 2.0 * 10.0 * 12.0 * 5.0);
    assert_eq!(costs[1].bytes, 4.0 * (10.0 * 12.0 + 12.0 * 5.0 + 10.0 * 5.0));
}

/// Neither scores `[t, t]` nor logits `[t, v]` are ever planned for.
#[test]
fn memory_grows_with_the_tokens_alone() {
    let bytes = |program: &Program, tokens: usize| {
        ArenaPlan::new(program, Sizes::dense(tokens, 1), KvPlacement::Arena).bytes
    };
    let forward = crate::dropout::attention(None);
    let weights = trainable(&forward);
    let training = differentiate(&forward, &weights, &Loss::Seeds(vec!["y".into()])).unwrap();
    let scores = 4096 * 4096 * 4;
    let (half, whole) = (bytes(&training, 2048), bytes(&training, 4096));
    assert!(whole <= 2 * half && whole < scores / 8, "{half} and {whole} bytes");

    let vocab = 5000;
    let (mut b, x) = with_vectors();
    let w = b.weight("head", &[dim(DimName::Vocab, vocab), hidden()]);
    let targets = b.input("targets", ValueType::U32, &[Dim::TOKENS]);
    let op = Op::TokenLogprob(HeadAttrs::default());
    let inputs = vec![Some(x), Some(w), Some(targets)];
    let y = b.push_slots(op, inputs, &[Some("logprob"), Some("lse")]).unwrap()[0].unwrap();
    b.output(y);
    let forward = b.finish().unwrap();
    let weights = trainable(&forward);
    let training = differentiate(&forward, &weights, &Loss::CrossEntropy).unwrap();
    let more = bytes(&training, 8192) - bytes(&training, 4096);
    assert!(more < 4096 * vocab * 4 / 20, "{more} bytes more for 4096 tokens");
}
