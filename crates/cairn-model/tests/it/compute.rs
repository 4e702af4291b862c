//! What products in bf16 do to the logits of every family.

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_kernels::{Compute, Cpu, Encoding, Layout};
use cairn_model::{BuildOptions, Head, build_program, load_weights};
use cairn_program::{
    Feed, KvPlacement, MemoryPlan, ProgramId, Run, Session, SessionProgram, Sizes,
};

use crate::goldens::{folder, folders, positions, slots, spec, tokens};

/// How far logits may move from those of f32 products of the same weights, relative to the largest of
/// them: what `docs/numerics.md` states, about twice what the worst family shows.
const BOUND: f32 = 0.033;

fn logits(name: &str, compute: Compute) -> Vec<f32> {
    let spec = spec(name);
    let golden = SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap();
    let (shape, ids) = tokens(&golden, "input_ids");
    let (rows, length) = (shape[0], shape[1]);
    let options = BuildOptions {
        encoding: Encoding::Bf16,
        layout: Layout::Panel,
        compute,
        text_len: Some(length),
        ..BuildOptions::new(Head::Logits)
    };
    let program = build_program(&spec, &options).unwrap();
    let sizes = Sizes::dense(rows * length, rows);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::detect(2)).unwrap();
    load_weights(&mut session, &spec, &WeightFolder::open(&folder(name)).unwrap()).unwrap();
    let positions = positions(rows, length);
    let feeds = [Feed::u32("ids", &ids), Feed::u32("positions", &positions)];
    session.run(ProgramId(0), &Run::forward(&feeds, &slots(rows, length))).unwrap();
    session.output(ProgramId(0), "logits").to_vec()
}

#[test]
fn bf16_products_stay_near_f32() {
    let mut worst = (0.0_f32, String::new());
    for name in folders() {
        let [exact, found] = [Compute::F32, Compute::Bf16].map(|compute| logits(&name, compute));
        let largest = exact.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        let pairs = exact.iter().zip(&found);
        let off = pairs.fold(0.0_f32, |off, (a, b)| off.max((a - b).abs())) / largest;
        assert!(off > 0.0 && off <= BOUND, "{name}: off by {off} of the largest logit");
        if off > worst.0 {
            worst = (off, name);
        }
    }
    // A bound that nothing comes near says nothing.
    assert!(worst.0 > BOUND / 4.0, "the worst, {}, is off by {}", worst.1, worst.0);
}
