//! Generation: requests that share the steps of an engine get the tokens they would get alone.
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::BTreeMap;
use std::error::Error;
use std::ops::ControlFlow;
use std::path::Path;

use cairn_artifacts::safetensors::WeightFolder;
use cairn_engine::{
    Engine, EngineOptions, EnginePlan, Event, Request, RequestId, SamplingFields, SamplingParams,
};
use cairn_kernels::Cpu;
use cairn_spec::ModelSpec;

fn requests() -> Result<Vec<Request>, Box<dyn Error>> {
    let warm = SamplingFields { temperature: 0.8, top_k: Some(40), seed: 7, ..Default::default() };
    Ok(vec![
        Request::new(vec![5, 6, 7], SamplingParams::greedy(), 12),
        Request::new(vec![300, 1, 4, 1, 5, 9, 2, 6], SamplingParams::new(warm)?, 16),
        Request::new(vec![42], SamplingParams::greedy(), 8),
    ])
}

fn engine(folder: &Path) -> Result<Engine, Box<dyn Error>> {
    let spec = ModelSpec::from_hf_json(&std::fs::read_to_string(folder.join("config.json"))?)?;
    // Room for three sequences of 64 tokens; what that takes is known before it is taken.
    let plan = EnginePlan::new(&spec, EngineOptions::new(3, 64))?;
    println!("memory: {}", plan.bytes());
    Ok(Engine::load(plan, Cpu::detect(1), &WeightFolder::open(folder)?)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/llama");
    let mut engine = engine(&folder)?;

    let mut alone = Vec::new();
    for request in requests()? {
        alone.push(engine.generate(request, &mut |_| ControlFlow::Continue(()))?.tokens);
    }

    let mut ids: Vec<RequestId> = Vec::new();
    for request in requests()? {
        ids.push(engine.add_request(request)?);
    }
    let mut together: BTreeMap<RequestId, Vec<u32>> = BTreeMap::new();
    let mut events = Vec::new();
    let mut steps = 0;
    while engine.num_requests() > 0 {
        engine.step(&mut events)?;
        steps += 1;
        for event in events.drain(..) {
            if let Event::Token { request, token, .. } = event {
                together.entry(request).or_default().push(token);
            }
        }
    }
    for (id, alone) in ids.iter().zip(&alone) {
        println!("{alone:?}");
        assert_eq!(together.get(id), Some(alone), "company changes nothing");
    }
    println!("{} tokens in {steps} steps", alone.iter().map(Vec::len).sum::<usize>());
    Ok(())
}
