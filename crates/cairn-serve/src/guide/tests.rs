//! Answers that are led through their parts, over the bytes of a tiny vocabulary.

use std::sync::Arc;

use llguidance::toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie, TokenizerEnv};

use super::*;

/// Tokens 0 to 255 are bytes, 256 is special, the others are words.
const OPEN: u32 = 257;
const END: u32 = 256;
const BEYOND: u32 = 259;
const NUM_TOKENS: u32 = 260;

fn words() -> TokEnv {
    let mut words: Vec<Vec<u8>> = (0..=255_u8).map(|byte| vec![byte]).collect();
    words.push([&[TokTrie::SPECIAL_TOKEN_MARKER][..], b"end"].concat());
    words.extend([b"<think>".to_vec(), b" <".to_vec(), b"k>\n\n".to_vec()]);
    let trie = TokTrie::from(&TokRxInfo::new(NUM_TOKENS, END), &words);
    Arc::new(ApproximateTokEnv::new(trie)) as Arc<dyn TokenizerEnv + Sync>
}

fn marker(text: &str) -> ByteMarker {
    ByteMarker::new(&crate::outline::symbols(text, None))
}

fn thoughts(is_open: bool, budget: Option<usize>) -> Thoughts {
    let close: Vec<u32> = b"</think>".iter().map(|&byte| byte.into()).collect();
    Thoughts {
        open: marker("<think>"),
        close: marker("</think>"),
        is_open,
        open_ids: vec![OPEN],
        ends: vec![END],
        budget: budget.map(|budget| (budget, close)),
    }
}

fn follow(lark: &str) -> Following {
    Following::of_lark(lark, &words())
}

fn say(guide: &mut Guide, text: &str) {
    text.bytes().for_each(|byte| guide.accept(byte.into()).unwrap());
}

/// The tokens that may come, if not all may.
fn allowed(guide: &mut Guide) -> Option<Vec<u32>> {
    let mut mask = vec![0; NUM_TOKENS.div_ceil(32) as usize];
    guide.allow(&mut mask).unwrap();
    let is_set = |token: &u32| mask[*token as usize / 32] >> (token % 32) & 1 == 1;
    let tokens: Vec<u32> = (0..NUM_TOKENS).filter(is_set).collect();
    (tokens.len() < NUM_TOKENS as usize).then_some(tokens)
}

#[test]
fn a_call_follows_its_grammar_from_its_marker_on() {
    let goal = |is_anchored| {
        let lark =
            if is_anchored { "start: \"{f(\" \"x)\"" } else { "start: /[^<]{0,24}<call>/ \"x)\"" };
        let marker = marker(if is_anchored { "{f(" } else { "<call>" });
        Goal::Call { marker, is_anchored, following: follow(lark) }
    };
    let mut guide = Guide::new(words(), None, goal(false));
    say(&mut guide, "well <cal");
    assert_eq!(allowed(&mut guide), None);
    say(&mut guide, "l>");
    assert_eq!(allowed(&mut guide), Some(vec![u32::from(b'x')]));
    say(&mut guide, "x)");
    assert!(guide.is_complete());
    // A token may begin in front of the marker.
    let mut guide = Guide::new(words(), None, goal(false));
    guide.accept(258).unwrap();
    say(&mut guide, "call>");
    assert_eq!(allowed(&mut guide), Some(vec![u32::from(b'x')]));
    // From the beginning on, or never.
    let mut guide = Guide::new(words(), None, goal(true));
    say(&mut guide, "\n{f(");
    assert_eq!(allowed(&mut guide), Some(vec![u32::from(b'x')]));
    let mut guide = Guide::new(words(), None, goal(true));
    say(&mut guide, "a {f(");
    assert_eq!(allowed(&mut guide), None);
}

#[test]
fn what_is_thought_follows_nothing() {
    let goal = || Goal::Follow(follow("start: \"yes\""));
    let mut guide = Guide::new(words(), Some(thoughts(false, None)), goal());
    assert_eq!(allowed(&mut guide), Some(vec![u32::from(b'y'), OPEN]), "either");
    guide.accept(OPEN).unwrap();
    say(&mut guide, "no </think");
    assert_eq!(allowed(&mut guide), Some(all_but(&[END])));
    say(&mut guide, ">");
    assert_eq!(allowed(&mut guide), Some(vec![u32::from(b'y')]));
    let mut guide = Guide::new(words(), Some(thoughts(false, None)), goal());
    say(&mut guide, "y");
    assert_eq!(allowed(&mut guide), Some(vec![u32::from(b'e')]));
    let mut guide = Guide::new(words(), Some(thoughts(true, None)), goal());
    assert_eq!(allowed(&mut guide), Some(all_but(&[END])), "it has begun");
}

fn all_but(tokens: &[u32]) -> Vec<u32> {
    (0..NUM_TOKENS).filter(|token| !tokens.contains(token)).collect()
}

#[test]
fn what_has_to_come_comes_behind_what_is_thought() {
    let follow = || Goal::Follow(follow("start: \"yes\""));
    let mut guide = Guide::new(words(), Some(thoughts(true, None)), follow());
    say(&mut guide, "ok </thi");
    assert_eq!(allowed(&mut guide), Some(all_but(&[END])));
    // The token that would end the marker has words behind it, which no grammar has seen.
    say(&mut guide, "n");
    assert_eq!(allowed(&mut guide), Some(all_but(&[END, BEYOND])));
    say(&mut guide, "o");
    assert_eq!(allowed(&mut guide), Some(all_but(&[END])));
    // Where nothing has to come it may end, and go on as it likes.
    for goal in [Goal::Free, auto(marker("<call>"))] {
        let mut guide = Guide::new(words(), Some(thoughts(true, None)), goal);
        say(&mut guide, "</thin");
        assert_eq!(allowed(&mut guide), None);
    }
}

fn auto(marker: ByteMarker) -> Goal {
    Goal::Call { marker, is_anchored: false, following: follow("start: /[^<]{0,24}<call>/ \"x)\"") }
}

#[test]
fn an_empty_marker_is_nowhere() {
    let mut guide = Guide::new(words(), None, auto(marker("")));
    say(&mut guide, "<call>x");
    assert_eq!(allowed(&mut guide), None);
}

#[test]
fn a_marker_of_several_tokens_may_open_what_is_thought() {
    let ids = |text: &str| text.bytes().map(u32::from).collect::<Vec<_>>();
    let guide = |lark: &str| {
        let thoughts = Thoughts { open_ids: ids("<think>"), ..thoughts(false, None) };
        Guide::new(words(), Some(thoughts), Goal::Follow(follow(lark)))
    };
    let mut yes = guide("start: \"yes\"");
    assert_eq!(allowed(&mut yes), Some(ids("<y")));
    say(&mut yes, "<");
    assert_eq!(allowed(&mut yes), Some(ids("t")), "it has begun to think");
    say(&mut yes, "think>no</think>");
    assert_eq!(allowed(&mut yes), Some(ids("y")));
    let mut yes = guide("start: \"yes\"");
    say(&mut yes, "y");
    assert_eq!(allowed(&mut yes), Some(ids("e")));
    // What is said may begin as the marker does.
    let tag = "start: \"<two>\"";
    let mut said = guide(tag);
    say(&mut said, "<t");
    assert_eq!(allowed(&mut said), Some(ids("hw")));
    say(&mut said, "w");
    assert_eq!(allowed(&mut said), Some(ids("o")));
    let mut thought = guide(tag);
    say(&mut thought, "<think>no</think>");
    assert_eq!(allowed(&mut thought), Some(ids("<")));
}

#[test]
fn what_is_thought_ends_with_its_budget() {
    for budget in [0, 3] {
        let mut guide = Guide::new(words(), Some(thoughts(true, Some(budget))), Goal::Free);
        for _ in 0..budget {
            assert_eq!(allowed(&mut guide), None);
            say(&mut guide, "a");
        }
        for byte in b"</think>" {
            assert_eq!(allowed(&mut guide), Some(vec![u32::from(*byte)]), "{budget}");
            guide.accept((*byte).into()).unwrap();
        }
        assert_eq!(allowed(&mut guide), None, "{budget}");
    }
}
