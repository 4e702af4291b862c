//! What a prompt is worth to the model: the numbers that scoring it gives, however it is read.

use std::ops::ControlFlow;

use cairn_engine::{Engine, EngineOptions, Finish, Output, PrefixEnd, Request, RequestError};
use cairn_kernels::{Encoding, Layout};
use cairn_model::Head;

use crate::model::{
    CONTEXT, Uncached, bits, causal_folders, context, engine, engine_with, golden_ids, greedy,
};

fn output(engine: &mut Engine, request: Request) -> Output {
    engine.generate(request, &mut |_| ControlFlow::Continue(())).unwrap()
}

fn scored(prompt: &[u32], count: usize, max_new_tokens: usize) -> Request {
    Request { prompt_logprobs: Some(count), ..greedy(prompt, max_new_tokens) }
}

fn text(name: &str, length: usize) -> Vec<u32> {
    golden_ids(name, "input_ids").into_iter().cycle().take(length).collect()
}

fn chosen(output: &Output) -> Vec<f32> {
    output.prompt_logprobs.iter().flatten().map(|at| at.chosen).collect()
}

#[test]
fn they_are_what_scoring_gives_however_the_prompt_is_read() {
    for name in causal_folders() {
        let name = name.as_str();
        let room = context(name);
        let prompt = text(name, 50.min(room - 1));
        let storage = (Encoding::F32, Layout::RowMajor);
        let expected = Uncached::new(name, Head::TokenLogprob, storage).logprobs(&prompt);
        let mut first: Option<Output> = None;
        for (max_num_batched_tokens, max_num_prompt_logits) in [(512, 64), (20, 7), (512, 1)] {
            let options = EngineOptions {
                max_num_batched_tokens,
                max_num_prompt_logits,
                ..EngineOptions::new(1, room)
            };
            let mut engine = engine_with(name, options);
            // What lies in the cache is of no use to who asks about the prompt.
            let alone = output(&mut engine, greedy(&prompt, 1));
            let found = output(&mut engine, scored(&prompt, 2, 1));
            assert_eq!(found.prompt_logprobs.len(), prompt.len());
            assert_eq!(found.prompt_logprobs[0], None, "nothing is before the first");
            assert_eq!(bits(&chosen(&found)), bits(&expected), "{name}");
            assert_eq!(found.tokens, alone.tokens);
            assert_eq!(found.prefix.end, PrefixEnd::PromptLogprobs);
            // And others are served by what it has left.
            assert_eq!(output(&mut engine, greedy(&prompt, 1)).prefix.end, PrefixEnd::Whole);
            let first = first.get_or_insert_with(|| found.clone());
            assert_eq!(
                (&found.prompt_logprobs, &found.tokens),
                (&first.prompt_logprobs, &first.tokens)
            );
        }
    }
}

#[test]
fn ranks_and_alternatives_are_those_of_the_distribution() {
    let prompt = text("llama", 40);
    let mut engine = engine("llama", 1);
    let output = output(&mut engine, scored(&prompt, 3, 1));
    for at in 1..prompt.len() {
        let logprobs = engine.next_logprobs(&prompt[..at]).unwrap();
        let mut order: Vec<u32> = (0..).take(logprobs.len()).collect();
        order.sort_by(|&a, &b| logprobs[b as usize].total_cmp(&logprobs[a as usize]));
        let found = output.prompt_logprobs[at].as_ref().unwrap();
        let likeliest = order[..3].iter().map(|&token| (token, logprobs[token as usize]));
        assert_eq!(found.top, likeliest.collect::<Vec<_>>(), "position {at}");
        assert_eq!(order[found.rank - 1], prompt[at]);
        assert_eq!(found.chosen.to_bits(), logprobs[prompt[at] as usize].to_bits());
    }
}

#[test]
fn a_prompt_alone_can_be_asked_about() {
    let mut engine = engine("llama", 1);
    for length in [1, 2, 16, 17, CONTEXT] {
        let prompt = text("llama", length);
        let found = output(&mut engine, scored(&prompt, 0, 0));
        assert_eq!((found.tokens.len(), found.finish), (0, Finish::Length));
        assert_eq!(found.prompt_logprobs.len(), length);
        if length < CONTEXT {
            assert_eq!(chosen(&found), chosen(&output(&mut engine, scored(&prompt, 0, 1))));
        }
    }
    let refused = |engine: &mut Engine, request| engine.add_request(request).unwrap_err();
    assert_eq!(refused(&mut engine, greedy(&[1], 0)), RequestError::NothingAsked);
    let most = refused(&mut engine, scored(&[1], 129, 0));
    assert_eq!(most, RequestError::TooManyLogprobs { asked: 129 });
    assert_eq!((engine.num_blocks_used(), engine.num_requests()), (0, 0));
}
