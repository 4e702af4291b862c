//! Golden models, engines over them, and a plain forward pass to compare with.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::path::PathBuf;

use cairn_artifacts::safetensors::{SafetensorsFile, WeightFolder};
use cairn_engine::{Engine, EngineOptions, EnginePlan, Event, Request, SamplingParams};
use cairn_kernels::{Compute, Cpu, Encoding, Layout, SeqSlot};
use cairn_model::{
    AdapterMap, BuildOptions, Head, TensorSource, build_adapted_program, load_adapter, load_weights,
};
use cairn_program::{
    Feed, KvPlacement, MemoryPlan, ProgramId, Run, Session, SessionProgram, Sizes,
};
use cairn_spec::ModelSpec;
use cairn_spec::model::MaskKind;

/// Longest context of the engines here; GPT-2's golden has 128 positions.
pub(crate) const CONTEXT: usize = 128;

/// The longest context that suits a model, up to [`CONTEXT`].
pub(crate) fn context(name: &str) -> usize {
    spec(name).context_limit().min(CONTEXT)
}

/// Every golden folder with a model that generates.
pub(crate) fn causal_folders() -> Vec<String> {
    let entries = std::fs::read_dir(folder(".")).unwrap().map(Result::unwrap);
    let folders = entries.filter(|entry| entry.path().join("config.json").exists());
    let mut names: Vec<String> =
        folders.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names.retain(|name| spec(name).attention.mask == MaskKind::Causal);
    names
}

pub(crate) fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens").join(name)
}

pub(crate) fn spec(name: &str) -> ModelSpec {
    let text = std::fs::read_to_string(folder(name).join("config.json")).unwrap();
    ModelSpec::from_hf_json(&text).unwrap()
}

pub(crate) fn golden_ids(name: &str, tensor: &str) -> Vec<u32> {
    let golden = SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap();
    let ids = golden.tensor(tensor).unwrap().to_i64().unwrap();
    ids.into_iter().map(|id| u32::try_from(id).unwrap()).collect()
}

pub(crate) fn engine_with(name: &str, options: EngineOptions) -> Engine {
    let plan = EnginePlan::new(&spec(name), options).unwrap();
    let weights = WeightFolder::open(&folder(name)).unwrap();
    Engine::load(plan, Cpu::detect(2), &weights).unwrap()
}

pub(crate) fn engine(name: &str, max_num_seqs: usize) -> Engine {
    engine_with(name, EngineOptions::new(max_num_seqs, context(name)))
}

pub(crate) fn greedy(prompt: &[u32], max_new_tokens: usize) -> Request {
    Request::new(prompt.to_vec(), SamplingParams::greedy(), max_new_tokens)
}

pub(crate) fn generate(engine: &mut Engine, request: Request) -> Vec<u32> {
    engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap().tokens
}

/// Runs until nothing is left and returns each request's tokens in order of arrival.
pub(crate) fn run_all(engine: &mut Engine, requests: &[Request]) -> Vec<Vec<u32>> {
    let ids: Vec<_> =
        requests.iter().map(|request| engine.add_request(request.clone()).unwrap()).collect();
    let mut tokens = vec![Vec::new(); requests.len()];
    let mut events = Vec::new();
    while engine.num_requests() != 0 {
        engine.step(&mut events).unwrap();
        for event in events.drain(..) {
            if let Event::Token { request, token, .. } = event {
                tokens[ids.iter().position(|&id| id == request).unwrap()].push(token);
            }
        }
    }
    tokens
}

/// The model without a cache: every token of a sequence in one run.
pub(crate) struct Uncached {
    session: Session,
    vocab_size: usize,
}

impl Uncached {
    pub(crate) fn new(name: &str, head: Head, storage: (Encoding, Layout)) -> Self {
        Self::in_arithmetic(name, head, storage, Compute::F32)
    }

    pub(crate) fn in_arithmetic(
        name: &str,
        head: Head,
        (encoding, layout): (Encoding, Layout),
        compute: Compute,
    ) -> Self {
        let options = BuildOptions { encoding, layout, compute, ..BuildOptions::new(head) };
        let none = Tensors(BTreeMap::new());
        Self::beside(name, &options, (&AdapterMap::default(), &none))
    }

    /// With an adapter beside the model.
    pub(crate) fn beside(
        name: &str,
        options: &BuildOptions,
        (adapters, adapter): (&AdapterMap, &Tensors),
    ) -> Self {
        let spec = spec(name);
        let program = build_adapted_program(&spec, options, adapters).unwrap();
        let sizes = Sizes::dense(CONTEXT, 1);
        let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
        let plan = MemoryPlan::new(vec![program], None).unwrap();
        let mut session = Session::new(plan, Cpu::detect(1)).unwrap();
        let weights = WeightFolder::open(&folder(name)).unwrap();
        load_weights(&mut session, &spec, &weights).unwrap();
        load_adapter(&mut session, &spec, adapters, adapter).unwrap();
        Self { session, vocab_size: spec.vocab_size }
    }

    fn run(&mut self, ids: &[u32], targets: &[u32], output: &str) -> Vec<f32> {
        let positions: Vec<u32> = (0..u32::try_from(ids.len()).unwrap()).collect();
        let feeds = [
            Feed::u32("ids", ids),
            Feed::u32("positions", &positions),
            Feed::u32("targets", targets),
        ];
        let slots = [SeqSlot { start: 0, len: ids.len(), cached: 0, blocks: &[] }];
        self.session.run(ProgramId(0), &Run::forward(&feeds, &slots)).unwrap();
        self.session.output(ProgramId(0), output).to_vec()
    }

    /// Logits after the last token.
    pub(crate) fn last_logits(&mut self, ids: &[u32]) -> Vec<f32> {
        let logits = self.run(ids, &[], "logits");
        logits[(ids.len() - 1) * self.vocab_size..].to_vec()
    }

    /// Log-probability of each token after the first.
    pub(crate) fn logprobs(&mut self, ids: &[u32]) -> Vec<f32> {
        self.run(&ids[..ids.len() - 1], &ids[1..], "logprob")
    }
}

/// Tensors in memory, by name.
pub(crate) struct Tensors(pub(crate) BTreeMap<String, (Vec<usize>, Vec<f32>)>);

impl TensorSource for Tensors {
    fn names(&self) -> Vec<String> {
        self.0.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|(shape, _)| shape.clone())
    }

    fn read_f32(&self, name: &str, elements: Range<usize>, out: &mut [f32]) -> Result<(), String> {
        out.copy_from_slice(&self.0[name].1[elements]);
        Ok(())
    }
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}
