//! Dropout of attention probabilities as programs have it: keyed by where a token is, the same when
//! computed again, never beside a cache.

use cairn_kernels::{Encoding, Layout, Mask, SeqSlot};
use cairn_program::{
    AttentionAttrs, DimName, DropoutAttrs, Feed, KvPlacement, Loss, MemoryPlan, Op, Program,
    ProgramId, Recompute, Run, Session, SessionProgram, Sizes, Workload, differentiate, recompute,
};

use crate::harness::{
    IDS, Noise, POSITIONS, dim, fill_weights, hidden, sequences, session, trainable, with_vectors,
};

const ID: ProgramId = ProgramId(0);

/// Attention of the looked-up vectors, in a block.
pub(crate) fn attention(dropout: Option<DropoutAttrs>) -> Program {
    let (mut b, x) = with_vectors();
    b.set_block(Some(0));
    let mut project = |name: &str, heads: usize, kind: DimName| {
        let dims = [dim(kind, heads), dim(DimName::HeadDim, 6)];
        let storage = (Encoding::F32, Layout::RowMajor);
        let w = b.matrix(&format!("{name}.w"), &dims, &[hidden()], storage);
        b.push(name, Op::Matmul, &[x, w]).unwrap()
    };
    let q = project("q", 4, DimName::Heads);
    let (k, v) = (project("k", 2, DimName::KvHeads), project("v", 2, DimName::KvHeads));
    let names = [Some("keys"), Some("values")];
    let kv = b.push_slots(Op::KvWrite { site: 0 }, vec![Some(k), Some(v)], &names).unwrap();
    let attrs = AttentionAttrs {
        mask: Mask::CAUSAL,
        scale: 0.4,
        softcap: None,
        values_in_keys: false,
        value_dim: 6,
        dropout,
    };
    let inputs = vec![Some(q), kv[0], kv[1]];
    let names = [Some("y"), Some("lse")];
    let y = b.push_slots(Op::Attention(attrs), inputs, &names).unwrap()[0].unwrap();
    b.set_block(None);
    b.output(y);
    b.finish().unwrap()
}

const HALF: Option<DropoutAttrs> = Some(DropoutAttrs { p: 0.5, site: 3 });

/// What a run of `session` on tokens `rows` gives, keyed as the `step`'s tokens from `rows.start` on.
fn output(session: &mut Session, rows: std::ops::Range<usize>, step: u64) -> Vec<f32> {
    let feeds =
        [Feed::u32("ids", &IDS[rows.clone()]), Feed::u32("positions", &POSITIONS[rows.clone()])];
    let all = sequences();
    let own: Vec<SeqSlot<'_>> = all
        .iter()
        .filter(|slot| rows.contains(&slot.start))
        .map(|slot| SeqSlot { start: slot.start - rows.start, ..*slot })
        .collect();
    let run = Run { step, first_token: rows.start as u64, ..Run::forward(&feeds, &own) };
    session.run(ID, &run).unwrap();
    session.output(ID, "y").to_vec()
}

#[test]
fn a_token_s_mask_is_its_own_and_another_in_another_step() {
    let mut dropping = session(attention(HALF), KvPlacement::Arena);
    let mut plain = session(attention(None), KvPlacement::Arena);
    fill_weights(&mut dropping, 1);
    fill_weights(&mut plain, 1);
    let all = output(&mut dropping, 0..7, 5);
    assert_ne!(all, output(&mut plain, 0..7, 5));
    assert_ne!(all, output(&mut dropping, 0..7, 6));
    // The second document in a micro-batch of its own.
    assert_eq!(all[4 * 24..], output(&mut dropping, 4..7, 5));
    assert_eq!(all, output(&mut dropping, 0..7, 5));
}

#[test]
fn what_is_computed_again_drops_the_same() {
    let forward = attention(HALF);
    let weights = trainable(&forward);
    let training = differentiate(&forward, &weights, &Loss::Seeds(vec!["y".into()])).unwrap();
    let mut seed = vec![0.0; 7 * 24];
    Noise(3).fill(&mut seed);
    let gradients = |policy| {
        let mut program = recompute(&training, policy);
        program.outputs.clear();
        program.verify().unwrap();
        let clones = program.instrs.len() - training.instrs.len();
        let mut session = session(program, KvPlacement::Arena);
        fill_weights(&mut session, 1);
        let feeds =
            [Feed::u32("ids", &IDS), Feed::u32("positions", &POSITIONS), Feed::f32("d.y", &seed)];
        let sequences = sequences();
        let run = Run { step: 9, row_tokens: 4, ..Run::forward(&feeds, &sequences) };
        session.run(ID, &run).unwrap();
        let gradient =
            |name: &String| session.stored_f32(&format!("grad.{name}")).unwrap().to_vec();
        (clones, weights.iter().map(gradient).collect::<Vec<_>>())
    };
    let (none, kept) = gradients(Recompute::None);
    let (some, again) = gradients(Recompute::ALL_BLOCKS);
    assert!(none == 0 && some > 0, "{some} instructions are computed again");
    assert_eq!(kept, again);
}

#[test]
fn a_program_with_a_cache_does_not_drop() {
    let refused = |program: Program| {
        let cache =
            cairn_program::CacheOptions { dtype: cairn_kernels::CacheType::F32, num_blocks: 8 };
        let program = SessionProgram { program, sizes: Sizes::dense(8, 1), kv: KvPlacement::Paged };
        MemoryPlan::new(vec![program], Some(cache)).err().map(|error| error.to_string())
    };
    assert_eq!(
        refused(attention(HALF)).unwrap(),
        "instruction 5 (attention) drops at random, which a program with a cache must not"
    );
    assert_eq!(refused(attention(None)), None);
    let (mut b, x) = with_vectors();
    let y = b.push("y", Op::Dropout(DropoutAttrs { p: 0.1, site: 0 }), &[x]).unwrap();
    b.output(y);
    let error = refused(b.finish().unwrap()).unwrap();
    assert!(error.starts_with("instruction 1 (dropout) drops at random"), "{error}");
}

#[test]
fn a_probability_that_keeps_nothing_is_refused() {
    for p in [1.0, 1.5, -0.1, f32::NAN] {
        let attrs = DropoutAttrs { p, site: 0 };
        let mut program = attention(HALF);
        for instr in &mut program.instrs {
            if let Op::Attention(attention) = &mut instr.op {
                attention.dropout = Some(attrs);
            }
        }
        let expected = format!("expected dropout with a probability in [0, 1), found p={p}");
        let error = program.verify().unwrap_err().to_string();
        assert_eq!(error, format!("instruction 5 (attention), operand 0 (q): {expected}"));
        let (mut b, x) = with_vectors();
        let error = b.push("y", Op::Dropout(attrs), &[x]).unwrap_err().to_string();
        assert_eq!(error, format!("instruction 1 (dropout), operand 0 (x): {expected}"));
    }
}

#[test]
fn text_and_costs_show_it() {
    let (with, without) = (attention(HALF), attention(None));
    let line = |program: &Program| {
        let text = program.to_string();
        text.lines().find(|line| line.contains("attention(")).unwrap().to_owned()
    };
    assert_eq!(line(&with), format!("{} dropout=0.5 site=3", line(&without)));
    let read: Program = serde_json::from_str(&serde_json::to_string(&with).unwrap()).unwrap();
    assert_eq!(read, with);
    let workload = Workload::causal(1, 10);
    let flops = |program: &Program| program.total_cost(&workload).flops;
    assert!((flops(&with) - flops(&without) - 4.0 * 55.0).abs() < 1e-9);
}
