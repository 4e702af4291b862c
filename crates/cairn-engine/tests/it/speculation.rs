//! Guessing ahead changes when tokens come, never which.

use std::ops::ControlFlow;

use cairn_engine::{
    DraftMethod, Engine, EngineError, EngineOptions, EnginePlan, Finish, MirostatParams,
    MirostatVersion, Request, SamplingFields, SamplingParams, SpeculativeOptions,
};
use cairn_kernels::{CacheType, Encoding};
use cairn_spec::Hint;
use proptest::prelude::*;

use crate::model::{
    CONTEXT, causal_folders, context, engine, engine_with, generate, golden_ids, greedy, run_all,
    spec,
};

const METHODS: [DraftMethod; 3] = [DraftMethod::Ngram, DraftMethod::Depth(1), DraftMethod::Model];

/// An engine that guesses at every step.
fn guessing(name: &str, method: DraftMethod, count: usize, options: EngineOptions) -> Engine {
    let speculative =
        Some(SpeculativeOptions { always: true, ..SpeculativeOptions::new(method, count) });
    let mut engine = engine_with(name, EngineOptions { speculative, ..options });
    if method == DraftMethod::Model {
        // Weights rounded to eight bits guess well, not perfectly.
        let draft = EngineOptions { encoding: Encoding::Q8, speculative: None, ..options };
        engine.attach_draft(engine_with(name, draft)).unwrap();
    }
    engine
}

fn accepted(engine: &Engine) -> u64 {
    engine.speculation().unwrap().num_accepted_tokens
}

#[test]
fn every_family_gives_the_same_tokens_with_guesses() {
    for name in causal_folders() {
        let room = context(&name);
        let prompt = &golden_ids(&name, "input_ids")[..8.min(room / 2)];
        let options = EngineOptions::new(1, room);
        let mut plain = engine_with(&name, options);
        let sampling = SamplingFields { seed: 3, temperature: 0.7, ..SamplingFields::default() };
        let sampled = Request {
            logprobs: Some(2),
            ..Request::new(prompt.to_vec(), SamplingParams::new(sampling).unwrap(), room / 3)
        };
        let steering = MirostatParams::new(MirostatVersion::V2);
        let steered =
            SamplingFields { seed: 3, mirostat: Some(steering), ..SamplingFields::default() };
        let steered =
            Request::new(prompt.to_vec(), SamplingParams::new(steered).unwrap(), room / 3);
        let requests = [greedy(prompt, room - prompt.len()), sampled, steered];
        for method in METHODS {
            if matches!(method, DraftMethod::Depth(_)) && spec(&name).num_hidden_layers < 2 {
                continue;
            }
            let mut guessing = guessing(&name, method, 4, options);
            for request in &requests {
                let outputs = [&mut plain, &mut guessing].map(|engine| {
                    engine.generate(request.clone(), &mut |_| ControlFlow::Continue(())).unwrap()
                });
                let [expected, found] =
                    outputs.map(|output| (output.tokens, output.logprobs, output.finish));
                assert_eq!(found, expected, "{name}, {method:?}");
            }
            assert_eq!(guessing.num_blocks_used(), 0, "{name}, {method:?}: a block leaked");
            let figures = guessing.speculation().unwrap();
            let by_position: u64 = figures.num_accepted_tokens_per_pos.iter().sum();
            assert_eq!(by_position, figures.num_accepted_tokens);
            assert!(figures.num_accepted_tokens <= figures.num_draft_tokens);
        }
    }
}

/// What a caller may ask for.
#[derive(Clone, Debug)]
struct Asked {
    prompt: usize,
    new: usize,
    fields: SamplingFields,
    stop: bool,
    breaks_at: usize,
}

fn asked() -> impl Strategy<Value = Asked> {
    let fields = (
        prop_oneof![Just(0.0_f32), 0.2..2.0_f32],
        proptest::option::of(1..60_usize),
        proptest::option::of(0.3..1.0_f32),
        prop_oneof![Just(1.0_f32), 0.8..1.5_f32],
        prop_oneof![Just(0.0_f32), -1.0..1.0_f32],
        proptest::option::of(2..4_usize),
        any::<u64>(),
    );
    let fields =
        fields.prop_map(|(temperature, top_k, top_p, repetition, penalty, ngram, seed)| {
            SamplingFields {
                temperature,
                top_k,
                top_p,
                repetition_penalty: repetition,
                presence_penalty: penalty,
                frequency_penalty: -penalty / 2.0,
                no_repeat_ngram_size: ngram,
                seed,
                ..SamplingFields::default()
            }
        });
    (1..50_usize, 1..40_usize, fields, any::<bool>(), 1..60_usize).prop_map(
        |(prompt, new, fields, stop, breaks_at)| Asked { prompt, new, fields, stop, breaks_at },
    )
}

impl Asked {
    fn request(&self, ids: &[u32]) -> Request {
        // A prompt that repeats itself, so that there is something to look up.
        let prompt = ids.iter().copied().take(11).cycle().take(self.prompt).collect();
        let sampling = SamplingParams::new(self.fields.clone()).unwrap();
        let mut request = Request::new(prompt, sampling, self.new);
        if self.stop {
            // Some of these come up soon.
            request.stop_tokens = (0..320).step_by(17).collect();
        }
        request
    }

    /// Tokens and ending, broken off by the caller as after a stop string.
    fn run(&self, engine: &mut Engine, ids: &[u32], reuse_prefix: bool) -> (Vec<u32>, Finish) {
        let mut seen = 0;
        let mut on_token = |_| {
            seen += 1;
            if seen == self.breaks_at { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let request = Request { reuse_prefix, ..self.request(ids) };
        let output = engine.generate(request, &mut on_token).unwrap();
        (output.tokens, output.finish)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// Requests one after the other, with and without what the one before left, and all together.
    #[test]
    fn whatever_is_asked_gives_the_same_tokens_with_guesses(
        all in proptest::collection::vec((asked(), any::<bool>()), 1..6),
        method in prop::sample::select(&METHODS[..]), count in 1..7_usize, chunk in 4..40_usize,
        cache_type in prop::sample::select(&[CacheType::F32, CacheType::Bf16, CacheType::Q8][..]),
    ) {
        let ids = golden_ids("llama", "input_ids");
        let options = EngineOptions {
            cache_type, max_num_batched_tokens: chunk, ..EngineOptions::new(3, CONTEXT)
        };
        let mut plain = engine_with("llama", options);
        let mut guessing = guessing("llama", method, count, options);
        for (asked, keeps) in &all {
            let expected = asked.run(&mut plain, &ids, *keeps);
            prop_assert_eq!(asked.run(&mut guessing, &ids, *keeps), expected);
        }
        let requests: Vec<Request> = all.iter().map(|(asked, _)| asked.request(&ids)).collect();
        prop_assert_eq!(run_all(&mut guessing, &requests), run_all(&mut plain, &requests));
        prop_assert_eq!(guessing.num_blocks_used(), 0);
    }
}

#[test]
fn a_draft_that_is_the_model_is_always_right() {
    let ids = golden_ids("llama", "greedy_ids");
    let sampling = SamplingFields { seed: 9, ..SamplingFields::default() };
    let sampled = Request::new(ids[..8].to_vec(), SamplingParams::new(sampling).unwrap(), 60);
    for request in [greedy(&ids[..8], 60), sampled] {
        let method = DraftMethod::Model;
        let speculative =
            Some(SpeculativeOptions { always: true, ..SpeculativeOptions::new(method, 4) });
        let options = EngineOptions::new(1, CONTEXT);
        let mut target = engine_with("llama", EngineOptions { speculative, ..options });
        target.attach_draft(engine("llama", 1)).unwrap();
        generate(&mut target, request);
        let figures = target.speculation().unwrap();
        assert_eq!(figures.acceptance(), Some(1.0));
        // The first token comes out of the prompt; then five a step.
        assert_eq!(figures.num_speculating_steps, 12);
    }
}

#[test]
fn a_text_that_repeats_itself_is_guessed() {
    // Greedy continuations of this model fall into a loop.
    let ids = golden_ids("llama", "greedy_ids");
    let mut target = guessing("llama", DraftMethod::Ngram, 4, EngineOptions::new(1, CONTEXT));
    let bias =
        SamplingFields { temperature: 0.0, logit_bias: vec![(7, 100.0)], ..Default::default() };
    generate(&mut target, Request::new(ids[..8].to_vec(), SamplingParams::new(bias).unwrap(), 60));
    assert!(accepted(&target) > 40, "{:?}", target.speculation());
}

#[test]
fn depths_and_counts_out_of_range_are_refused_by_name() {
    let refused = |method, count| {
        let speculative = Some(SpeculativeOptions::new(method, count));
        let options = EngineOptions { speculative, ..EngineOptions::new(1, CONTEXT) };
        match EnginePlan::new(&spec("llama"), options) {
            Err(EngineError::Limit { name, .. }) => name,
            Err(other) => panic!("{other}"),
            Ok(_) => "accepted",
        }
    };
    assert_eq!(refused(DraftMethod::Ngram, 4), "accepted");
    assert_eq!(refused(DraftMethod::Ngram, 0), "num_speculative_tokens");
    assert_eq!(refused(DraftMethod::Ngram, 33), "num_speculative_tokens");
    assert_eq!(refused(DraftMethod::Depth(0), 4), "depth");
    assert_eq!(refused(DraftMethod::Depth(2), 4), "accepted");
    assert_eq!(refused(DraftMethod::Depth(3), 4), "depth");
}

#[test]
fn drafts_of_other_tokens_are_refused() {
    let speculative = Some(SpeculativeOptions::new(DraftMethod::Model, 4));
    let options = EngineOptions { speculative, ..EngineOptions::new(1, CONTEXT) };
    let mut target = engine_with("llama", options);
    let other =
        causal_folders().into_iter().find(|name| spec(name).vocab_size != spec("llama").vocab_size);
    if let Some(other) = other {
        let error = target.attach_draft(engine(&other, 1)).unwrap_err();
        assert!(matches!(error, EngineError::DraftVocabulary { .. }), "{error}");
    }
    // Nor is one taken that does not hold two sequences at their longest.
    let num_blocks = CONTEXT.div_ceil(16);
    let small = EngineOptions { num_blocks, ..EngineOptions::new(2, CONTEXT) };
    let error = target.attach_draft(engine_with("llama", small)).unwrap_err();
    assert!(
        matches!(error, EngineError::Limit { name: "num_blocks", min, .. } if min == 2 * num_blocks),
        "{error}"
    );
    assert_eq!(error.hints(), [format!("num_blocks must be at least {}", 2 * num_blocks)]);
    // And an engine that guesses otherwise takes none.
    let error = engine("llama", 1).attach_draft(engine("llama", 1)).unwrap_err();
    assert!(matches!(error, EngineError::NoDraftPlanned), "{error}");
}
