//! Mixtures of experts as programs: what is refused, what it costs, what freezing prunes, and that
//! encodings, layouts and neighbors in the batch change nothing.

use cairn_kernels::encoding::encode;
use cairn_kernels::{Encoding, Layout, Routing, Scoring, SeqSlot, Weight};
use cairn_program::{
    ArenaPlan, BalanceAttrs, Builder, Dim, DimName, Feed, KvPlacement, Loss, Op, Program,
    ProgramId, Run, Session, Sizes, ValueId, Workload, differentiate,
};

use crate::harness::{
    IDS, Noise, dim, fill_weights, hidden, run, session, trainable, with_vectors,
};

const ID: ProgramId = ProgramId(0);
const EXPERTS: usize = 4;
const INNER: usize = 16;
const ROUTING: Routing =
    Routing { top_k: 2, scoring: Scoring::Softmax, groups: None, normalize: Some(0.0), scale: 1.0 };

fn routed(b: &mut Builder, x: ValueId) -> (ValueId, ValueId) {
    let storage = (Encoding::F32, Layout::RowMajor);
    let router = b.matrix("router", &[dim(DimName::Experts, EXPERTS)], &[hidden()], storage);
    let logits = b.push("logits", Op::Matmul, &[x, router]).unwrap();
    let names = [Some("experts"), Some("weights")];
    let routed = b.push_slots(Op::Route(ROUTING), vec![Some(logits), None], &names).unwrap();
    (routed[0].unwrap(), routed[1].unwrap())
}

/// `Σ weight · down(up(x))` over each token's experts.
fn mixture(storage: (Encoding, Layout)) -> Program {
    let (mut b, x) = with_vectors();
    let (experts, weights) = routed(&mut b, x);
    let (e, f) = (dim(DimName::Experts, EXPERTS), dim(DimName::Intermediate, INNER));
    let up = b.matrix("up", &[e, f], &[hidden()], storage);
    let inner = b.push("inner", Op::ExpertMatmul, &[x, up, experts]).unwrap();
    let plain = (Encoding::F32, Layout::RowMajor);
    let down = b.matrix("down", &[e, hidden()], &[f], plain);
    let rows = b.push("rows", Op::ExpertMatmul, &[inner, down, experts]).unwrap();
    let y = b.push("y", Op::ExpertSum, &[rows, weights]).unwrap();
    b.output(y);
    b.finish().unwrap()
}

const PLAIN: (Encoding, Layout) = (Encoding::F32, Layout::RowMajor);

#[test]
fn operands_that_do_not_fit_are_refused_by_name() {
    let (mut b, x) = with_vectors();
    let wide = Routing { top_k: 5, ..ROUTING };
    let e = dim(DimName::Experts, EXPERTS);
    let router = b.matrix("router", &[e], &[hidden()], PLAIN);
    let logits = b.push("logits", Op::Matmul, &[x, router]).unwrap();
    let error = b.push("y", Op::Route(wide), &[logits]).unwrap_err().to_string();
    assert!(error.contains("(route), operand 0 (logits): expected experts among which"), "{error}");
    let error = b.push("y", Op::Route(ROUTING), &[x]).unwrap_err().to_string();
    assert!(error.contains("expected f32[t, e], found f32[t, d=12]"), "{error}");

    let (experts, weights) = {
        let names = [Some("experts"), Some("weights")];
        let slots = vec![Some(logits), None];
        let routed = b.push_slots(Op::Route(ROUTING), slots, &names).unwrap();
        (routed[0].unwrap(), routed[1].unwrap())
    };
    let f = dim(DimName::Intermediate, 5);
    let w = b.matrix("w", &[e, f], &[hidden()], PLAIN);
    let error = b.push("y", Op::ExpertMatmul, &[x, w, weights]).unwrap_err().to_string();
    assert!(
        error.contains("operand 2 (weights): expected u32[t, a], found f32[t, a=2]"),
        "{error}"
    );
    let error = b.push("y", Op::ExpertMatmul, &[x, router, experts]).unwrap_err().to_string();
    assert!(error.contains("operand 1 (router): expected a matrix [e, out.., [d=12]]"), "{error}");
    let panels = b.matrix("panels", &[e, f], &[hidden()], (Encoding::Bf16, Layout::Panel));
    let error = b.push("y", Op::ExpertMatmul, &[x, panels, experts]).unwrap_err().to_string();
    assert!(error.contains("a multiple of 16 outputs in panels, or row-major"), "{error}");
    let error = b.push("y", Op::ExpertSum, &[x, weights]).unwrap_err().to_string();
    assert!(error.contains("(expert_sum), operand 0 (x): expected f32[t, a, d..]"), "{error}");
    let error = b.push("y", Op::ExpertLoad, &[logits, weights]).unwrap_err().to_string();
    assert!(error.contains("(expert_load), operand 1 (weights): expected u32[t, a]"), "{error}");
    let sums = [b.weight("choices", &[e]), b.weight("mass", &[e])];
    let slots = vec![Some(logits), Some(experts), Some(sums[0]), None];
    let error = b.push_slots(Op::ExpertLoad, slots, &[Some("y")]).unwrap_err().to_string();
    assert!(error.contains("choices and mass of the layers before, or neither"), "{error}");
    let attrs = BalanceAttrs { top_k: 5, coefficient: 1.0 };
    let error = b.push("y", Op::BalanceLoss(attrs), &sums).unwrap_err().to_string();
    assert!(error.contains("f32[e], of which a token goes to 5"), "{error}");
}

#[test]
fn accounting_counts_routed_rows_and_reached_experts() {
    let program = mixture(PLAIN);
    let index = |name: &str| {
        let id = program.find(name).unwrap();
        program.instrs.iter().position(|instr| instr.outputs.contains(&Some(id))).unwrap()
    };
    let cost = |tokens: usize| {
        let workload = Workload { sizes: Sizes::dense(tokens, 1), pairs: 1 };
        program.account(&workload)[index("inner")]
    };
    assert_eq!(cost(10).flops, 2.0 * 20.0 * 12.0 * 16.0);
    let rows = |t: f64| 4.0 * (t * 12.0 + 2.0 * t + 2.0 * t * 16.0);
    // One token reaches two experts of four.
    assert_eq!(cost(1).bytes, rows(1.0) + 4.0 * 2.0 * 12.0 * 16.0);
    assert_eq!(cost(10).bytes, rows(10.0) + 4.0 * 4.0 * 12.0 * 16.0);
    let text = program.to_string();
    assert!(text.contains("inner : f32[t, a=2, f=16] = expert_matmul(x, up, experts)"), "{text}");
    assert!(text.contains("route(logits, _) top_k=2 Softmax normalize+0e0 scale=1"), "{text}");
}

#[test]
fn freezing_prunes_what_only_the_frozen_need() {
    let forward = mixture(PLAIN);
    let ops = |weights: &[&str]| -> Vec<&'static str> {
        let weights = weights.iter().map(|name| (*name).to_owned()).collect();
        let program = differentiate(&forward, &weights, &Loss::Seeds(vec!["y".into()])).unwrap();
        program.instrs[program.forward_len..].iter().map(|instr| instr.op.name()).collect()
    };
    assert_eq!(ops(&["down"]), ["expert_sum_grad", "expert_matmul_dw"]);
    let router_alone = ["expert_sum_grad", "route_grad", "matmul_dw"];
    assert_eq!(ops(&["router"]), router_alone);
    let up = ["expert_sum_grad", "expert_matmul_dx", "expert_matmul_dw"];
    assert_eq!(ops(&["up"]), up);
    // With a frozen router nothing keeps the routed results until the backward pass.
    let plan = |weights: &[&str]| {
        let weights = weights.iter().map(|name| (*name).to_owned()).collect();
        let program = differentiate(&forward, &weights, &Loss::Seeds(vec!["y".into()])).unwrap();
        ArenaPlan::new(&program, Sizes::dense(1000, 1), KvPlacement::Arena).bytes
    };
    assert!(plan(&["down"]) < plan(&["down", "router"]));
}

fn run_gradient(session: &mut Session) -> (Vec<f32>, Vec<f32>) {
    let mut seed = vec![0.0; 7 * 12];
    Noise(5).fill(&mut seed);
    run(session, &[Feed::f32("d.y", &seed)]);
    let gradient = session.stored_f32("grad.table").unwrap().to_vec();
    (session.output(ID, "y").to_vec(), gradient)
}

#[test]
fn encodings_and_layouts_are_their_decoded_values() {
    let make = |storage| {
        let weights = [String::from("table")].into();
        let loss = Loss::Seeds(vec!["y".into()]);
        let mut training = differentiate(&mixture(storage), &weights, &loss).unwrap();
        training.outputs = vec![training.find("y").unwrap()];
        let mut session = session(training, KvPlacement::Arena);
        fill_weights(&mut session, 4);
        session
    };
    for (encoding, layout) in Encoding::forms() {
        let (mut encoded, mut decoded) = (make((encoding, layout)), make(PLAIN));
        let (n, k) = (EXPERTS * INNER, 12);
        let encoding = encoding.for_shape(n, k);
        let mut values = vec![0.0; n * k];
        Noise(77).fill(&mut values);
        encode((encoding, layout), (n, k), &values, encoded.stored_mut("up").unwrap());
        let bytes = encoded.stored("up").unwrap();
        Weight { encoding, layout, n, k, bytes }.decode(&mut values);
        decoded.stored_f32_mut("up").unwrap().copy_from_slice(&values);
        let (found, expected) = (run_gradient(&mut encoded), run_gradient(&mut decoded));
        assert!(expected.1.iter().any(|&g| g != 0.0));
        assert_eq!(found, expected, "{encoding} {}", layout.name());
    }
}

#[test]
fn a_token_does_not_see_its_neighbors() {
    let mut session = session(mixture(PLAIN), KvPlacement::Arena);
    fill_weights(&mut session, 4);
    run(&mut session, &[]);
    let together = session.output(ID, "y").to_vec();
    for (token, id) in IDS.iter().enumerate() {
        let (ids, positions) = ([*id], [0]);
        let feeds = [Feed::u32("ids", &ids), Feed::u32("positions", &positions)];
        let slot = [SeqSlot { start: 0, len: 1, cached: 0, blocks: &[] }];
        session.run(ID, &Run::forward(&feeds, &slot)).unwrap();
        assert_eq!(session.output(ID, "y"), &together[token * 12..][..12], "token {token}");
    }
}

#[test]
fn chosen_experts_that_do_not_exist_are_refused() {
    let (mut b, x) = with_vectors();
    let chosen = [Dim::TOKENS, dim(DimName::Chosen, 1)];
    let experts = b.input("experts", cairn_program::ValueType::U32, &chosen);
    let w = b.weight("w", &[dim(DimName::Experts, 3), dim(DimName::Intermediate, 5), hidden()]);
    let y = b.push("y", Op::ExpertMatmul, &[x, w, experts]).unwrap();
    b.output(y);
    let program = b.finish().unwrap();
    assert_eq!(trainable(&program).len(), 2);
    let mut session = session(program, KvPlacement::Arena);
    let feeds = [
        Feed::u32("ids", &IDS[..2]),
        Feed::u32("positions", &[0, 1]),
        Feed::u32("experts", &[2, 3]),
    ];
    let slot = [SeqSlot { start: 0, len: 2, cached: 0, blocks: &[] }];
    let error = session.run(ID, &Run::forward(&feeds, &slot)).unwrap_err();
    assert_eq!(error.to_string(), "input experts: 3 at position 1 is not below 3");
}
