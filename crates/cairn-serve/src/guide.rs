//! What an answer follows once it is made of parts: the model thinks as it likes, says what it likes unless it has
//! to follow a grammar, and from the marker of a call on it follows the functions' schemas.

use cairn_engine::Constraint;
use llguidance::toktrie::TokEnv;

use crate::grammar::Following;

/// Special tokens stand behind all bytes.
const SPECIAL: u32 = 256;
/// Spaces in front of a marker that has to come first, at most, in bytes.
const SPACES_MAX: usize = 64;

/// A marker as bytes, or as a special token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ByteMarker(Vec<u32>);

impl ByteMarker {
    /// The marker that these symbols of an outline are.
    pub(crate) fn new(symbols: &[crate::outline::Symbol]) -> Self {
        let mut found = Vec::with_capacity(symbols.len());
        for &symbol in symbols {
            match char::from_u32(symbol) {
                Some(c) => {
                    let mut bytes = [0; 4];
                    found.extend(c.encode_utf8(&mut bytes).bytes().map(u32::from));
                }
                None => found.push(SPECIAL + (symbol - crate::outline::special(0))),
            }
        }
        Self(found)
    }

    /// Its bytes, if it has no special tokens.
    fn bytes(&self) -> Option<Vec<u8>> {
        self.0.iter().map(|&symbol| u8::try_from(symbol).ok()).collect()
    }
}

/// How the beginning of an answer compares with a marker.
enum Beginning {
    Marker,
    Undecided,
    Other,
}

/// What follows what was thought.
#[derive(Clone, Debug)]
pub(crate) enum Goal {
    /// Anything.
    Free,
    /// A grammar.
    Follow(Following),
    /// Anything, but from the marker on the grammar, which begins with it.
    Call { marker: ByteMarker, is_anchored: bool, following: Following },
}

/// What stands around what is thought.
#[derive(Clone, Debug)]
pub(crate) struct Thoughts {
    pub(crate) open: ByteMarker,
    pub(crate) close: ByteMarker,
    /// Whether the prompt has begun them.
    pub(crate) is_open: bool,
    /// The tokens that spell `open`.
    pub(crate) open_ids: Vec<u32>,
    /// The tokens that end the answer.
    pub(crate) ends: Vec<u32>,
    /// Tokens after which `close` comes in any case, and the tokens that spell it.
    pub(crate) budget: Option<(usize, Vec<u32>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Nothing has come, and it may be thought.
    Begin,
    /// So many of the tokens that open what is thought have come, where a grammar follows.
    Opening {
        num_open: usize,
    },
    Thinking {
        num_tokens: usize,
        num_closing: usize,
    },
    /// The marker of a call may come.
    Saying,
    Following,
    /// Anything may come, to the end.
    Free,
}

/// An answer on its way through its parts.
#[derive(Clone, Debug)]
pub(crate) struct Guide {
    words: Words,
    thoughts: Option<Thoughts>,
    goal: Goal,
    stage: Stage,
    /// The grammar past the tokens that may open what is thought, while they may be what is said as well.
    instead: Option<Following>,
    /// The last tokens, as far as a marker may have begun in them.
    tokens: Vec<u32>,
}

/// The bytes of a model's tokens.
#[derive(Clone)]
struct Words(TokEnv);

impl std::fmt::Debug for Words {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Words")
    }
}

impl Words {
    /// The tokens' symbols, each with the place of its token.
    fn symbols(&self, tokens: &[u32]) -> Vec<(u32, usize)> {
        let trie = self.0.tok_trie();
        let mut symbols = Vec::with_capacity(4 * tokens.len());
        for (at, &token) in tokens.iter().enumerate() {
            if trie.vocab_size() <= token as usize {
                continue;
            }
            if trie.is_special_token(token) {
                symbols.push((SPECIAL.saturating_add(token), at));
            } else {
                symbols.extend(trie.token(token).iter().map(|&byte| (u32::from(byte), at)));
            }
        }
        symbols
    }
}

impl Guide {
    /// At the beginning of an answer.
    pub(crate) fn new(words: TokEnv, thoughts: Option<Thoughts>, goal: Goal) -> Self {
        let mut guide = Self {
            words: Words(words),
            thoughts,
            goal,
            stage: Stage::Begin,
            instead: None,
            tokens: Vec::new(),
        };
        match &guide.thoughts {
            Some(thoughts) if thoughts.is_open => guide.stage = thinking(),
            Some(_) => {}
            None => guide.stage = guide.after_thoughts(),
        }
        guide
    }

    fn after_thoughts(&self) -> Stage {
        match self.goal {
            Goal::Free => Stage::Free,
            Goal::Follow(_) => Stage::Following,
            Goal::Call { .. } => Stage::Saying,
        }
    }

    /// How what has come compares with a marker that has to come first, behind spaces.
    fn beginning(&self, marker: &ByteMarker) -> Beginning {
        let symbols = self.words.symbols(&self.tokens);
        let is_space = |symbol: u32| u8::try_from(symbol).is_ok_and(|b| b.is_ascii_whitespace());
        let spaces = symbols.iter().take_while(|(symbol, _)| is_space(*symbol)).count();
        let rest: Vec<u32> = symbols[spaces..].iter().map(|(symbol, _)| *symbol).collect();
        if rest.starts_with(&marker.0) {
            Beginning::Marker
        } else if marker.0.starts_with(&rest) && spaces <= SPACES_MAX {
            Beginning::Undecided
        } else {
            Beginning::Other
        }
    }

    /// The place of the token in which a marker begins and that of the token behind it, and forgets tokens in
    /// which none can.
    fn find(&mut self, marker: &ByteMarker) -> Option<(usize, usize)> {
        let symbols = self.words.symbols(&self.tokens);
        let is_marker = |window: &[(u32, usize)]| {
            window.iter().zip(&marker.0).all(|((symbol, _), expected)| symbol == expected)
        };
        // An empty marker is nowhere.
        let found = symbols.windows(marker.0.len().max(1)).position(is_marker);
        if let Some(at) = found.filter(|_| !marker.0.is_empty()) {
            return Some((symbols[at].1, symbols[at + marker.0.len() - 1].1 + 1));
        }
        // Every token but an empty one has a symbol.
        let kept = self.tokens.len().min(marker.0.len());
        self.tokens.drain(..self.tokens.len() - kept);
        None
    }

    fn begin(&mut self, token: u32) -> Result<(), String> {
        if matches!(self.goal, Goal::Follow(_)) {
            return self.open(0, token);
        }
        let Some(thoughts) = self.thoughts.take() else { return Ok(()) };
        self.tokens.push(token);
        let beginning = self.beginning(&thoughts.open);
        self.thoughts = Some(thoughts);
        match beginning {
            Beginning::Undecided => Ok(()),
            Beginning::Marker => {
                self.tokens.clear();
                self.stage = thinking();
                Ok(())
            }
            Beginning::Other => {
                self.stage = self.after_thoughts();
                self.say()
            }
        }
    }

    /// Takes a token after `num_open` of those that open what is thought, where a grammar follows.
    fn open(&mut self, num_open: usize, token: u32) -> Result<(), String> {
        let (Some(thoughts), Goal::Follow(following)) = (&self.thoughts, &mut self.goal) else {
            return Ok(());
        };
        if thoughts.open_ids.get(num_open) != Some(&token) {
            if 0 < num_open {
                let said = self.instead.take();
                *following = said.ok_or("it neither opens its thoughts nor follows its grammar")?;
            }
            self.stage = Stage::Following;
            return following.accept(token);
        }
        if num_open + 1 == thoughts.open_ids.len() {
            self.instead = None;
            self.stage = thinking();
            return Ok(());
        }
        if num_open == 0 {
            self.instead = Some(following.clone());
        }
        if let Some(said) = &mut self.instead
            && !said.try_accept(&[token])?
        {
            self.instead = None;
        }
        self.stage = Stage::Opening { num_open: num_open + 1 };
        Ok(())
    }

    /// Allows what opens the thoughts, and what the grammar allows instead.
    fn allow_opening(&mut self, num_open: usize, allowed: &mut [u32]) -> Result<(), String> {
        let following = match (&mut self.instead, &mut self.goal) {
            (instead, Goal::Follow(following)) if num_open == 0 && instead.is_none() => {
                Some(following)
            }
            (instead, _) => instead.as_mut(),
        };
        match following {
            Some(following) => following.allow(allowed)?,
            None => allowed.fill(0),
        }
        let next = self.thoughts.as_ref().and_then(|thoughts| thoughts.open_ids.get(num_open));
        next.iter().for_each(|token| set(**token, allowed));
        Ok(())
    }

    /// Allows what may be thought after so many tokens, so many of them of the marker that ends it.
    fn allow_thinking(&self, num_tokens: usize, num_closing: usize, allowed: &mut [u32]) {
        let Some(thoughts) = &self.thoughts else { return };
        let spent = thoughts.budget.as_ref().filter(|(budget, _)| *budget <= num_tokens);
        if let Some(&token) = spent.and_then(|(_, close)| close.get(num_closing)) {
            return only(token, allowed);
        }
        allowed.fill(u32::MAX);
        if matches!(self.goal, Goal::Follow(_)) {
            // What has to come has not come.
            thoughts.ends.iter().for_each(|token| clear(*token, allowed));
            self.clear_beyond(&thoughts.close, allowed);
        }
    }

    /// Forbids the tokens that end a marker and go on behind it, since what they say would follow nothing. Those
    /// that have other words in front of the whole marker are none of any vocabulary.
    fn clear_beyond(&self, marker: &ByteMarker, allowed: &mut [u32]) {
        let Some(bytes) = marker.bytes() else { return };
        let found: Vec<u32> = self.words.symbols(&self.tokens).iter().map(|(s, _)| *s).collect();
        let trie = self.words.0.tok_trie();
        for begun in (0..bytes.len()).filter(|&begun| found.ends_with(&marker.0[..begun])) {
            let Some(node) = trie.child_at_bytes(trie.root(), &bytes[begun..]) else { continue };
            let mut beyond: Vec<_> = trie.node_children(node).collect();
            while let Some(node) = beyond.pop() {
                node.token_id().iter().for_each(|token| clear(*token, allowed));
                beyond.extend(trie.node_children(node));
            }
        }
    }

    fn think(&mut self, token: u32) {
        let Some(thoughts) = self.thoughts.take() else { return };
        self.tokens.push(token);
        if let Some((_, behind)) = self.find(&thoughts.close) {
            self.tokens.drain(..behind);
            self.stage = self.after_thoughts();
        } else if let Stage::Thinking { num_tokens, num_closing } = &mut self.stage {
            *num_tokens += 1;
            if let Some((budget, _)) = &thoughts.budget {
                *num_closing += usize::from(*budget < *num_tokens);
            }
        }
        self.thoughts = Some(thoughts);
    }

    /// Looks for a call in what was said.
    fn say(&mut self) -> Result<(), String> {
        let Goal::Call { marker, is_anchored, .. } = &self.goal else { return Ok(()) };
        let (marker, is_anchored) = (marker.clone(), *is_anchored);
        if is_anchored {
            match self.beginning(&marker) {
                Beginning::Undecided => return Ok(()),
                Beginning::Other => {
                    self.stage = Stage::Free;
                    return Ok(());
                }
                Beginning::Marker => {}
            }
        }
        let Some((from, behind)) = self.find(&marker) else { return Ok(()) };
        let Goal::Call { following, .. } = &mut self.goal else { return Ok(()) };
        if following.try_accept(&self.tokens[from..])? {
            self.stage = Stage::Following;
            self.tokens.clear();
        } else {
            // The marker is followed by what is no call.
            self.tokens.drain(..behind);
        }
        Ok(())
    }
}

fn thinking() -> Stage {
    Stage::Thinking { num_tokens: 0, num_closing: 0 }
}

/// Allows only this token.
fn only(token: u32, allowed: &mut [u32]) {
    allowed.fill(0);
    set(token, allowed);
}

fn clear(token: u32, allowed: &mut [u32]) {
    if let Some(word) = allowed.get_mut(token as usize / 32) {
        *word &= !(1 << (token % 32));
    }
}

fn set(token: u32, allowed: &mut [u32]) {
    if let Some(word) = allowed.get_mut(token as usize / 32) {
        *word |= 1 << (token % 32);
    }
}

impl Constraint for Guide {
    fn allow(&mut self, allowed: &mut [u32]) -> Result<(), String> {
        match (self.stage, &mut self.goal) {
            (Stage::Following, Goal::Follow(following) | Goal::Call { following, .. }) => {
                following.allow(allowed)
            }
            (Stage::Begin, Goal::Follow(_)) => self.allow_opening(0, allowed),
            (Stage::Opening { num_open }, _) => self.allow_opening(num_open, allowed),
            (Stage::Thinking { num_tokens, num_closing }, _) => {
                self.allow_thinking(num_tokens, num_closing, allowed);
                Ok(())
            }
            _ => {
                allowed.fill(u32::MAX);
                Ok(())
            }
        }
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        match (self.stage, &mut self.goal) {
            (Stage::Begin, _) => self.begin(token),
            (Stage::Opening { num_open }, _) => self.open(num_open, token),
            (Stage::Thinking { .. }, _) => {
                self.think(token);
                Ok(())
            }
            (Stage::Saying, _) => {
                self.tokens.push(token);
                self.say()
            }
            (Stage::Following, Goal::Follow(following) | Goal::Call { following, .. }) => {
                following.accept(token)
            }
            (Stage::Following | Stage::Free, _) => Ok(()),
        }
    }

    fn is_complete(&self) -> bool {
        match (self.stage, &self.goal) {
            (Stage::Following, Goal::Follow(following) | Goal::Call { following, .. }) => {
                following.is_complete()
            }
            _ => false,
        }
    }

    fn boxed_clone(&self) -> Box<dyn Constraint> {
        Box::new(self.clone())
    }
}

#[cfg(test)]
mod tests;
