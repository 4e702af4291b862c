//! Low-rank adapters beside a model that generates: on every projection, the head among them.

use std::ops::ControlFlow;

use cairn_artifacts::safetensors::WeightFolder;
use cairn_engine::{Engine, EngineOptions, EnginePlan, Request, SamplingFields, SamplingParams};
use cairn_kernels::{CacheType, Cpu, Encoding, Layout};
use cairn_model::{AdapterMap, BuildOptions, Head, Role, TensorMap};
use cairn_spec::{LoraSpec, ModelSpec, TargetModules};

use crate::model::{Tensors, Uncached, bits, causal_folders, context, folder, golden_ids, spec};

/// An adapter of made-up numbers on every projection.
fn everywhere(spec: &ModelSpec) -> (AdapterMap, Tensors) {
    let slices = TensorMap::new(&spec.untied()).slices.into_iter();
    let modules = slices
        .filter(|slice| !matches!(slice.role, Role::Vector | Role::Table))
        .map(|slice| slice.tensor.strip_suffix(".weight").unwrap().to_owned());
    let lora = LoraSpec::new(3, TargetModules::Named(modules.collect()));
    let adapters = AdapterMap::new(spec, &lora).unwrap();
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 * 0.2 - 0.1
    };
    let map = adapters.tensor_map();
    let made = map.tensors().into_iter().map(|(name, shape)| {
        let values = (0..shape.iter().product()).map(|_| next()).collect();
        (name.to_owned(), (shape.to_vec(), values))
    });
    let tensors = Tensors(made.collect());
    (adapters, tensors)
}

/// Every token, sampled with a cache, has the log-probability that scoring gives it, to the bit: what the
/// server returns is what the trainer computes.
#[test]
fn cached_log_probabilities_beside_adapters_are_those_of_scoring() {
    for name in causal_folders() {
        let name = name.as_str();
        let (adapters, tensors) = everywhere(&spec(name));
        for encoding in [Encoding::F32, Encoding::Nf4] {
            let options = EngineOptions { encoding, ..EngineOptions::new(1, context(name)) };
            let plan = EnginePlan::with_adapters(&spec(name), options, &adapters).unwrap();
            let weights = WeightFolder::open(&folder(name)).unwrap();
            let source = (&weights as _, Some(&tensors as _));
            let mut engine = Engine::load_adapted(plan, Cpu::detect(2), source).unwrap();
            let room = context(name);
            let prompt = golden_ids(name, "input_ids")[..19.min(room / 2)].to_vec();
            let sampling = SamplingFields { seed: 11, ..SamplingFields::default() };
            let new = 30.min(room - prompt.len());
            let request = Request {
                logprobs: Some(2),
                ..Request::new(prompt.clone(), SamplingParams::new(sampling).unwrap(), new)
            };
            let output = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
            let chosen: Vec<f32> = output.logprobs.iter().map(|at| at.chosen).collect();
            let ids: Vec<u32> = prompt.iter().chain(&output.tokens).copied().collect();
            for layout in [Layout::Panel, Layout::RowMajor] {
                let build =
                    BuildOptions { encoding, layout, ..BuildOptions::new(Head::TokenLogprob) };
                let mut scorer = Uncached::beside(name, &build, (&adapters, &tensors));
                let scored = scorer.logprobs(&ids)[prompt.len() - 1..].to_vec();
                assert_eq!(bits(&chosen), bits(&scored), "{name} {encoding} {layout:?}");
            }
            let mut alone = Uncached::new(name, Head::TokenLogprob, (encoding, Layout::Panel));
            let alone = alone.logprobs(&ids)[prompt.len() - 1..].to_vec();
            assert_ne!(bits(&chosen), bits(&alone), "{name}: the adapters matter");
        }
    }
}

/// What a rounded cache changes of a log-probability at most: 1.7e-3 was found.
const ROUNDED_CACHE: f32 = 1e-2;

/// Beside the latent lies what the adapter of `kv_b_proj` made of it, rounded as the latent is: how a
/// prompt is cut does not matter then either, and results stay near those of a cache in `f32`.
#[test]
fn adapters_of_latent_attention_are_cached_in_every_type() {
    for name in ["deepseek_v2", "deepseek_v3"] {
        let (adapters, tensors) = everywhere(&spec(name));
        let prompt = golden_ids(name, "input_ids")[..20.min(context(name) - 8)].to_vec();
        let generated = |cache_type: CacheType, max_num_batched_tokens: usize| {
            let options = EngineOptions {
                cache_type,
                max_num_batched_tokens,
                ..EngineOptions::new(1, context(name))
            };
            let plan = EnginePlan::with_adapters(&spec(name), options, &adapters).unwrap();
            let weights = WeightFolder::open(&folder(name)).unwrap();
            let source = (&weights as _, Some(&tensors as _));
            let mut engine = Engine::load_adapted(plan, Cpu::detect(2), source).unwrap();
            let sampling = SamplingFields { temperature: 0.0, ..SamplingFields::default() };
            let request = Request {
                logprobs: Some(1),
                ..Request::new(prompt.clone(), SamplingParams::new(sampling).unwrap(), 8)
            };
            let output = engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap();
            output.logprobs.iter().map(|at| at.chosen).collect::<Vec<f32>>()
        };
        let exact = generated(CacheType::F32, 128);
        for cache_type in [CacheType::Bf16, CacheType::Q8] {
            let rounded = generated(cache_type, 128);
            for chunk in [1, 7, 16] {
                let cut = generated(cache_type, chunk);
                assert_eq!(bits(&cut), bits(&rounded), "{name} {cache_type:?} by {chunk}");
            }
            let off = (exact[0] - rounded[0]).abs();
            assert!(off <= ROUNDED_CACHE, "{name} {cache_type:?}: {off}");
            assert_ne!(bits(&exact), bits(&rounded), "{name} {cache_type:?}: it is rounded");
        }
    }
}
