//! Low-rank adapters against PEFT: beside the projections, merged into them, and in training.

use std::collections::BTreeSet;

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_kernels::{Cpu, Layout};
use cairn_model::{
    AdapterMap, BuildOptions, Head, Merge, MergedSource, Role, TensorMap, TensorSlice,
    TensorSource, build_adapted_program, load_adapter, load_weights,
};
use cairn_program::{
    Feed, KvPlacement, MemoryPlan, ProgramId, Run, Session, SessionProgram, Sizes,
};
use cairn_spec::lora::{ModuleNames, NamePattern, Patterns};
use cairn_spec::model::{Family, Mlp};
use cairn_spec::{LoraSpec, ModelSpec, TargetModules};

use crate::goldens::{Tensors, assert_close, folder, folders, positions, slots, spec, tokens};

/// What PEFT made or loaded: experts, routers, `kv_b_proj` and heads among the projections, one of them tied.
/// Experts lie in tensors of their own, or stacked, as PEFT has them with transformers 5.
const CASES: [(&str, &str); 8] = [
    ("lora_llama", "llama"),
    ("lora_gpt2", "gpt2"),
    ("lora_mixtral", "mixtral"),
    ("lora_deepseek_v2", "deepseek_v2"),
    ("lora_qwen3", "qwen3"),
    ("lora_mixtral_stacked", "mixtral"),
    ("lora_qwen3_moe_stacked", "qwen3_moe"),
    ("lora_deepseek_v3_stacked", "deepseek_v3"),
];

struct Case {
    spec: ModelSpec,
    adapters: AdapterMap,
    base: WeightFolder,
    adapter: Box<dyn TensorSource>,
    shape: Vec<usize>,
    ids: Vec<u32>,
    logits: Vec<f32>,
}

impl Case {
    fn open((name, base): (&str, &str)) -> Self {
        let config = std::fs::read_to_string(folder(name).join("adapter_config.json")).unwrap();
        let lora = LoraSpec::from_peft_json(&config).unwrap();
        let golden = SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap();
        let (shape, ids) = tokens(&golden, "input_ids");
        let spec = spec(base);
        Self {
            adapters: AdapterMap::new(&spec, &lora).unwrap(),
            spec,
            base: WeightFolder::open(&folder(base)).unwrap(),
            adapter: Box::new(
                SafetensorsFile::open(&folder(name).join("adapter_model.safetensors")).unwrap(),
            ),
            shape,
            ids,
            logits: golden.tensor("logits").unwrap().to_f32().unwrap(),
        }
    }

    /// A golden folder with a made-up adapter on every projection of its model, the head among them.
    fn made_up(name: &str) -> Self {
        let golden = SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap();
        let (shape, ids) = tokens(&golden, "input_ids");
        let spec = spec(name);
        let adapters = AdapterMap::new(&spec, &everywhere(&spec)).unwrap();
        Self {
            adapter: Box::new(made_up(&adapters, 0.05)),
            adapters,
            spec,
            base: WeightFolder::open(&folder(name)).unwrap(),
            shape,
            ids,
            logits: golden.tensor("logits").unwrap().to_f32().unwrap(),
        }
    }

    /// Logits of the golden's ids, with the adapters as instructions beside the model.
    fn beside(&self) -> Vec<f32> {
        self.run((&self.spec, &self.base), &self.adapters, Layout::RowMajor)
    }

    /// Logits of the golden's ids without adapters.
    fn alone(&self, spec: &ModelSpec, source: &dyn TensorSource) -> Vec<f32> {
        self.run((spec, source), &AdapterMap::default(), Layout::RowMajor)
    }

    fn run(
        &self,
        (spec, source): (&ModelSpec, &dyn TensorSource),
        adapters: &AdapterMap,
        layout: Layout,
    ) -> Vec<f32> {
        let options = BuildOptions { layout, ..BuildOptions::new(Head::Logits) };
        let program = build_adapted_program(spec, &options, adapters).unwrap();
        let (rows, length) = (self.shape[0], self.shape[1]);
        let sizes = Sizes::dense(rows * length, rows);
        let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
        let plan = MemoryPlan::new(vec![program], None).unwrap();
        let mut session = Session::new(plan, Cpu::detect(2)).unwrap();
        load_weights(&mut session, spec, source).unwrap();
        if !adapters.is_empty() {
            load_adapter(&mut session, spec, adapters, &*self.adapter).unwrap();
        }
        let positions = positions(rows, length);
        let feeds = [Feed::u32("ids", &self.ids), Feed::u32("positions", &positions)];
        let sequences = slots(rows, length);
        session.run(ProgramId(0), &Run::forward(&feeds, &sequences)).unwrap();
        session.output(ProgramId(0), "logits").to_vec()
    }

    fn merged<'a>(&'a self, base: &'a dyn TensorSource, merge: Merge) -> MergedSource<'a> {
        MergedSource::new(&self.spec, &self.adapters, (base, &*self.adapter), merge).unwrap()
    }
}

/// An adapter of rank 4 on every projection that a model's files name.
pub(crate) fn everywhere(spec: &ModelSpec) -> LoraSpec {
    let map = TensorMap::new(&spec.untied());
    let is_projection = |slice: &&TensorSlice| !matches!(slice.role, Role::Vector | Role::Table);
    let modules: BTreeSet<String> = map
        .slices
        .iter()
        .filter(is_projection)
        .map(|slice| slice.tensor.strip_suffix(".weight").unwrap().to_owned())
        .collect();
    LoraSpec::new(4, TargetModules::Named(modules.into_iter().collect()))
}

/// An adapter of stacked experts and their routers, gate and up of a rank of their own.
pub(crate) fn stacked() -> LoraSpec {
    let mut lora = LoraSpec::new(4, TargetModules::Named(Vec::new()));
    lora.target_parameters =
        ["experts.gate_up_proj", "down_proj", "gate.weight"].map(str::to_owned).to_vec();
    lora.rank_pattern.push(r".*\.gate_up_proj", 6).unwrap();
    lora
}

/// Numbers up to `largest` in every tensor of an adapter.
pub(crate) fn made_up(adapters: &AdapterMap, largest: f32) -> Tensors {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 24) as f32 * 2.0 - 1.0) * largest
    };
    let map = adapters.tensor_map();
    let made = map.tensors().into_iter().map(|(name, shape)| {
        let values = (0..shape.iter().product()).map(|_| next()).collect();
        (name.to_owned(), (shape.to_vec(), values))
    });
    Tensors(made.collect())
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |worst, (a, b)| worst.max((a - b).abs()))
}

/// Each element within 1e-5 · max(1, |reference|) of its reference.
fn assert_same(what: &str, found: &[f32], reference: &[f32]) {
    assert_eq!(found.len(), reference.len(), "{what}");
    for (index, (found, reference)) in found.iter().zip(reference).enumerate() {
        let off = (found - reference).abs();
        let bound = 1e-5 * reference.abs().max(1.0);
        assert!(off <= bound, "{what}, element {index}: {found} instead of {reference}");
    }
}

#[test]
fn beside_the_projections_they_compute_what_peft_does() {
    for case in CASES {
        let opened = Case::open(case);
        assert_close(case.0, &opened.beside(), &opened.logits);
        // The adapter matters: without it the logits are others.
        let alone = opened.alone(&opened.spec, &opened.base);
        assert!(worst(&alone, &opened.logits) > 0.1, "{}", case.0);
    }
}

/// Every family and every golden folder, its head among the projections.
#[test]
fn merged_equals_beside_on_every_projection_of_every_family() {
    let folders = folders();
    for family in Family::ALL {
        assert!(folders.iter().any(|name| spec(name).family == family), "{family}");
    }
    let opened = CASES.map(Case::open).into_iter();
    for (name, case) in CASES
        .into_iter()
        .map(|(name, _)| name.to_owned())
        .zip(opened)
        .chain(folders.iter().map(|name| (name.clone(), Case::made_up(name))))
    {
        let (merged, beside) = (case.merged(&case.base, Merge::Merge), case.beside());
        assert_same(&name, &case.alone(merged.spec(), &merged), &beside);
        // The adapters matter.
        let effect = worst(&beside, &case.alone(&case.spec, &case.base));
        assert!(effect > 1e-2, "{name}: {effect}");
        check_unmerged(&name, &case, &merged);
    }
}

/// What is merged comes out again: each weight within 2⁻²⁴ · (|merged| + |found|) of what it was, half
/// a unit in the last place for each of the two roundings.
fn check_unmerged(name: &str, case: &Case, merged: &MergedSource<'_>) {
    let spec = merged.spec();
    let back = (merged as &dyn TensorSource, &*case.adapter);
    let back = MergedSource::new(spec, &case.adapters, back, Merge::Unmerge).unwrap();
    let read = |source: &dyn TensorSource, name: &str| {
        let mut values = vec![0.0; source.shape(name).unwrap().iter().product()];
        source.read_f32(name, 0..values.len(), &mut values).unwrap();
        values
    };
    let mut changed = 0;
    for tensor in merged.names() {
        let origin = match merged.new_head() {
            Some((head, table)) if head == tensor => table,
            _ => &tensor,
        };
        let before = read(&case.base, origin);
        let (between, after) = (read(merged, &tensor), read(&back, &tensor));
        assert_eq!(merged.changes(&tensor), between != before, "{name} {tensor}");
        for ((before, between), after) in before.iter().zip(&between).zip(&after) {
            let bound = 0.5 * f32::EPSILON * (between.abs() + after.abs());
            let off = (after - before).abs();
            assert!(off <= bound, "{name} {tensor}: {after} after {between}, was {before}");
        }
        changed += usize::from(between != before);
    }
    let map = TensorMap::new(&case.spec.untied());
    let is_adapted = |slice: &&TensorSlice| case.adapters.get(&slice.weight).is_some();
    let adapted: BTreeSet<&str> =
        map.slices.iter().filter(is_adapted).map(|slice| slice.tensor.as_str()).collect();
    assert_eq!(changed, adapted.len(), "{name}");
}

/// A program without a head, or of the first blocks alone, needs only what it reads of an adapter.
#[test]
fn programs_without_a_head_or_last_blocks_leave_its_adapter_out() {
    for name in folders() {
        let case = Case::made_up(&name);
        for (head, num_blocks) in [(Head::Hidden, None), (Head::Logits, Some(1))] {
            let options = BuildOptions { num_blocks, ..BuildOptions::new(head) };
            let program = build_adapted_program(&case.spec, &options, &case.adapters).unwrap();
            let reads = |weight: &str| program.find(weight).is_some();
            assert!(reads(&case.adapters.get(&first_projection(&case)).unwrap().a), "{name}");
            let head_is_read = reads("lm_head.lora_B.weight");
            assert_eq!(head_is_read, head == Head::Logits, "{name}");
        }
    }
}

fn first_projection(case: &Case) -> String {
    let map = TensorMap::new(&case.spec);
    let first = map.slices.iter().find(|slice| slice.role == Role::Attention);
    first.unwrap().weight.clone()
}

/// Small ranks do not fill panels, and larger ones do.
#[test]
fn how_adapters_are_laid_out_changes_no_bit() {
    for name in ["llama", "mixtral", "deepseek_v3"] {
        for rank in [4, 16, 17] {
            let spec = spec(name);
            let lora = LoraSpec { r: rank, ..everywhere(&spec) };
            let adapters = AdapterMap::new(&spec, &lora).unwrap();
            let adapter = Box::new(made_up(&adapters, 0.05));
            let case = Case { adapter, adapters, ..Case::made_up(name) };
            let [rows, panels] = [Layout::RowMajor, Layout::Panel]
                .map(|layout| case.run((&case.spec, &case.base), &case.adapters, layout));
            assert_eq!(rows, panels, "{name}, rank {rank}");
        }
    }
}

/// An adapter of two experts is that of all, zeros in the others.
#[test]
fn experts_that_no_target_names_compute_as_before() {
    for (name, targets) in [
        ("mixtral", ["experts.1.w1", "experts.3.w2"]),
        ("qwen3_moe", ["experts.0.up_proj", "experts.2.down_proj"]),
    ] {
        let whole = Case::made_up(name);
        let targets: Vec<String> = targets.map(str::to_owned).to_vec();
        let lora = LoraSpec::new(4, TargetModules::Named(targets.clone()));
        let adapters = AdapterMap::new(&whole.spec, &lora).unwrap();
        let Tensors(all) = made_up(&whole.adapters, 0.05);
        let is_named = |tensor: &str| targets.iter().any(|name| tensor.contains(name));
        let zeros = all.clone().into_iter().map(|(tensor, (shape, values))| {
            let values = if is_named(&tensor) { values } else { vec![0.0; values.len()] };
            (tensor, (shape, values))
        });
        let zeros = Case { adapter: Box::new(Tensors(zeros.collect())), ..Case::made_up(name) };
        let some = all.into_iter().filter(|(tensor, _)| is_named(tensor)).collect();
        let some = Case { adapter: Box::new(Tensors(some)), adapters, ..whole };
        let (found, expected) = (some.beside(), zeros.beside());
        assert_eq!(found, expected, "{name}");
        assert!(worst(&found, &some.alone(&some.spec, &some.base)) > 1e-3, "{name}");
    }
}

/// Experts one by one and stacked are the same adapter where these share what stacks share.
#[test]
fn stacks_compute_what_the_experts_in_them_do() {
    for name in ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"] {
        let spec = spec(name);
        let mut lora = stacked();
        lora.rank_pattern = Patterns::default();
        let adapters = AdapterMap::new(&spec, &lora).unwrap();
        let stacks = made_up(&adapters, 0.05);
        let Mlp::Moe(moe) = &spec.mlp else { panic!("{name}") };
        let (rank, count) = (4, moe.num_experts);
        // Each module's pair, taken out of the stacks as `get_delta_weight` of PEFT's `ParamWrapper` does.
        let projections = match name {
            "mixtral" => ["w1", "w3", "w2"],
            _ => ["gate_proj", "up_proj", "down_proj"],
        };
        let names = projections.map(str::to_owned).into_iter().chain(["gate".to_owned()]);
        let single = LoraSpec::new(rank, TargetModules::Named(names.collect()));
        let single = LoraSpec { exclude_modules: Some(not_of_experts()), ..single };
        let single = AdapterMap::new(&spec, &single).unwrap();
        let map = single.tensor_map();
        let pairs = map.tensors().into_iter().map(|(tensor, shape)| {
            let values = pair_of(&stacks, tensor, (shape, count), &projections);
            (tensor.to_owned(), (shape.to_vec(), values))
        });
        let case = |adapters: AdapterMap, tensors: Tensors| Case {
            adapters,
            adapter: Box::new(tensors),
            ..Case::made_up(name)
        };
        let pairs = case(single, Tensors(pairs.collect()));
        let stacks = case(adapters, stacks);
        assert_eq!(stacks.beside(), pairs.beside(), "{name}");
    }
}

/// What of a stacked adapter is a module's tensor of this name and shape.
fn pair_of(
    Tensors(stacks): &Tensors,
    tensor: &str,
    (shape, count): (&[usize], usize),
    projections: &[&str; 3],
) -> Vec<f32> {
    let Some((before, after)) = tensor.split_once(".experts.") else {
        return stacks[&tensor.replace("block_sparse_moe.gate", "mlp.gate")].1.clone();
    };
    let parts: Vec<&str> = after.split('.').collect();
    let &[expert, projection, which, _] = &parts[..] else { panic!("{tensor}") };
    let expert: usize = expert.parse().unwrap();
    let place = projections.iter().position(|name| *name == projection).unwrap();
    let before = before.replace("block_sparse_moe", "mlp");
    let wrapper = if place == 2 { "" } else { ".base_layer" };
    let (_, values) = &stacks[&format!("{before}.experts{wrapper}.{which}.weight")];
    let (rows, columns) = (shape[0], shape[1]);
    if which == "lora_A" {
        return values[expert * rows * columns..][..rows * columns].to_vec();
    }
    let first = if place == 1 { rows } else { 0 };
    let element = |i: usize| {
        let (row, column) = (first + i / columns, i % columns);
        values[row * columns * count + column * count + expert]
    };
    (0..rows * columns).map(element).collect()
}

/// Dense blocks and shared experts, whose projections are called as experts' are.
fn not_of_experts() -> ModuleNames {
    let pattern = r".*\.mlp\.(shared_experts\.)?(gate|up|down)_proj";
    ModuleNames::Matching(NamePattern::whole(pattern).unwrap())
}

/// Tensors that are not those of the description are refused with their names.
#[test]
fn stacks_that_do_not_fit_are_refused_by_name() {
    let spec = spec("mixtral");
    let adapters = AdapterMap::new(&spec, &stacked()).unwrap();
    let path = "base_model.model.model.layers.1.mlp.experts";
    let program =
        build_adapted_program(&spec, &BuildOptions::new(Head::Logits), &adapters).unwrap();
    let program = SessionProgram { program, sizes: Sizes::dense(4, 1), kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::detect(1)).unwrap();
    let mut refused = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = made_up(&adapters, 0.05);
        change(&mut tensors);
        load_adapter(&mut session, &spec, &adapters, &tensors).unwrap_err().to_string()
    };
    let error = refused(&|tensors| {
        // One expert fewer.
        tensors.0.insert(format!("{path}.lora_A.weight"), (vec![12, 160], vec![0.0; 12 * 160]));
    });
    assert!(
        error.contains(&format!("{path}.lora_A.weight is [12, 160], expected [16, 160]")),
        "{error}"
    );
    let error = refused(&|tensors| {
        tensors.0.remove(&format!("{path}.base_layer.lora_B.weight"));
    });
    assert!(
        error.contains(&format!("{path}.base_layer.lora_B.weight [320, 24] is missing")),
        "{error}"
    );
    // The pair of gate and up alone lies where that of down lies beside it.
    let error = refused(&|tensors| {
        for which in ["A", "B"] {
            let inner =
                tensors.0.remove(&format!("{path}.base_layer.lora_{which}.weight")).unwrap();
            tensors.0.insert(format!("{path}.lora_{which}.weight"), inner);
        }
    });
    assert!(error.contains("is missing") && error.contains("expected [16, 160]"), "{error}");
    let error = refused(&|tensors| {
        let name = "model.layers.1.block_sparse_moe.experts.0.w1.lora_A.weight";
        tensors.0.insert(format!("base_model.model.{name}"), (vec![4, 64], vec![0.0; 256]));
    });
    assert!(error.contains("experts.0.w1.lora_A.weight has no place in the model"), "{error}");
}
