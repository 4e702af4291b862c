//! The tokenizer in the metadata of a GGUF file, rewritten as a `tokenizer.json`.
//!
//! - Model `gpt2`: byte-level BPE with the merges of the file; how text is cut into words is named
//!   by `tokenizer.ggml.pre`, and only names whose rule is known are read.
//! - Model `llama`: the BPE of `SentencePiece` with byte fallback. The file has scores instead of merges;
//!   a piece of a higher score is merged first, as transformers derives it
//!   (`convert_slow_tokenizer.generate_merges`).
//! - Model `bert`: `WordPiece` (`word_piece`).
//!
//! Other kinds are refused by name. `export` writes the first two.

mod export;
mod word_piece;

use std::collections::{HashMap, HashSet};

use cairn_artifacts::gguf::{GgufError, GgufFile, Value};
use serde_json::{Value as Json, json};

use super::{
    NamedTemplate, SpelledSpecials, Tokenizer, TokenizerConfig, TokenizerError, VOCAB_SIZE_MAX,
};

use word_piece::Normalizer;

pub use export::no_tokenizer;

/// The key of the chat template; others are called by this and their name.
const CHAT_TEMPLATE: &str = "tokenizer.chat_template";

/// Special tokens that have a key of their own, and what files beside a `tokenizer.json` call them.
const SPECIALS: [(&str, &str); 7] = [
    ("bos", "bos_token"),
    ("eos", "eos_token"),
    ("unknown", "unk_token"),
    ("seperator", "sep_token"),
    ("padding", "pad_token"),
    ("cls", "cls_token"),
    ("mask", "mask_token"),
];

/// Longest accepted token, in bytes: splits of it are looked up one by one.
const TOKEN_BYTES_MAX: usize = 1024;

/// What the file says a token is.
const UNKNOWN: f64 = 2.0;
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;
const BYTE: f64 = 6.0;

/// How GPT-4, LLaMA 3 and Qwen 2 cut text into words; they differ in how many digits stand
/// together.
const WORDS: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);

/// How DeepSeek LLM and V2 do: line ends, letters with a case (as its `tokenizer.json` lists them),
/// signs, spaces at the end, Chinese and Korean, and each digit alone.
const DEEPSEEK_LLM: [&str; 5] = [
    "[\r\n]",
    "\\s?[A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\
        \u{295}-\u{2AF}\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\
        \u{38C}\u{38E}-\u{3A1}\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\
        \u{10A0}-\u{10C5}\u{13A0}-\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\
        \u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\
        \u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\
        \u{1F7D}\u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\
        \u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\
        \u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\
        \u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\
        \u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\
        \u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}\u{A78B}-\u{A78E}\
        \u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\
        \u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}\u{10CC0}-\
        \u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}]+",
    "\\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+",
    r"\s+$",
    "[一-龥ࠀ-一가-\u{D7FF}]+",
];

/// How DeepSeek V3 does: digits first, then Chinese and Japanese, then the rest.
const DEEPSEEK_V3: [&str; 3] = [
    r"\p{N}{1,3}",
    "[一-龥\u{3040}-ゟ゠-ヿ]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
];

impl Tokenizer {
    /// Reads the tokenizer of a GGUF file; `None` if it has none.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Gguf`] for a kind that is not read or metadata that contradicts itself;
    /// otherwise as [`parse`](Self::parse).
    pub fn from_gguf(file: &GgufFile) -> Result<Option<Self>, TokenizerError> {
        let refused =
            |reason: String| TokenizerError::Gguf { path: file.path().to_owned(), reason };
        let Some(parts) = Parts::read(file).map_err(refused)? else { return Ok(None) };
        let json = parts.tokenizer_json().map_err(refused)?;
        Self::parse(json.to_string().into_bytes(), file.path()).map(Some)
    }
}

impl TokenizerConfig {
    /// What the metadata of a GGUF file says about special tokens and chat templates.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::Gguf`] for a value of another type, a special token that is not in the list
    /// of tokens, or a named template that is not there.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, TokenizerError> {
        read_config(file)
            .map_err(|reason| TokenizerError::Gguf { path: file.path().to_owned(), reason })
    }
}

fn read_config(file: &GgufFile) -> Result<TokenizerConfig, String> {
    let mut config = TokenizerConfig {
        add_bos_token: flag(file, "add_bos_token")?,
        add_eos_token: flag(file, "add_eos_token")?,
        ..TokenizerConfig::default()
    };
    let tokens = texts(file, "tokens")?.unwrap_or_default();
    for (key, name) in SPECIALS {
        let (key, found) = value(file, &format!("{key}_token_id"));
        let id = match found {
            None => continue,
            Some(Value::Unsigned(id, _)) => usize::try_from(*id).unwrap_or(usize::MAX),
            Some(other) => return Err(wrong(&key, other, "a token id")),
        };
        // A file without a tokenizer still says what ends a text.
        if tokens.is_empty() {
            continue;
        }
        let token = tokens.get(id).ok_or_else(|| {
            format!("{key} is {id}, but tokenizer.ggml.tokens has {}", tokens.len())
        })?;
        config.special_tokens.insert(name.to_owned(), (*token).to_owned());
    }
    let template = |key: String, name: &str| match file.value(&key) {
        None => Ok(None),
        Some(Value::Text(source)) => Ok(Some(NamedTemplate {
            name: name.to_owned(),
            path: file.path().to_owned(),
            source: source.clone().into_string(),
        })),
        Some(other) => Err(wrong(&key, other, "a text")),
    };
    config.chat_templates.extend(template(CHAT_TEMPLATE.to_owned(), "default")?);
    let names = match file.value("tokenizer.chat_templates") {
        None => Vec::new(),
        Some(Value::List(list)) => file
            .texts("tokenizer.chat_templates", list)
            .map_err(|error: GgufError| error.to_string())?,
        Some(other) => return Err(wrong("tokenizer.chat_templates", other, "a list")),
    };
    for name in names.into_iter().filter(|name| *name != "default") {
        let key = format!("{CHAT_TEMPLATE}.{name}");
        let found = template(key.clone(), name)?;
        config.chat_templates.push(found.ok_or_else(|| format!("{key} is missing"))?);
    }
    Ok(config)
}

/// What the metadata says about the tokenizer.
struct Parts<'a> {
    model: &'a str,
    pre: Option<&'a str>,
    tokens: Vec<&'a str>,
    kinds: Vec<f64>,
    scores: Vec<f64>,
    merges: Vec<&'a str>,
    has_space_prefix: bool,
    /// Where the file says it.
    unknown: Option<usize>,
    normalizer: Normalizer,
    /// Tokens that a model's text begins and ends with.
    around: [Option<usize>; 2],
}

impl<'a> Parts<'a> {
    fn read(file: &'a GgufFile) -> Result<Option<Self>, String> {
        let Some(tokens) = texts(file, "tokens")? else { return Ok(None) };
        if tokens.len() as u64 > u64::from(VOCAB_SIZE_MAX) {
            return Err(format!(
                "it has {} tokens, at most {VOCAB_SIZE_MAX} are read",
                tokens.len()
            ));
        }
        let model = text(file, "model")?.ok_or("tokenizer.ggml.model is missing")?;
        let pre = text(file, "pre")?;
        // As llama.cpp has it where the file does not say.
        let begins = model == "llama" || pre == Some("llama-bpe");
        let around = match model {
            "bert" => [
                token_around(file, "bos", &["cls", "bos"], (&tokens, "[CLS]"))?,
                token_around(file, "sep", &["seperator", "eos"], (&tokens, "[SEP]"))?,
            ],
            _ => [around(file, "bos", begins, 1)?, around(file, "eos", false, 2)?],
        };
        let parts = Self {
            model,
            pre,
            around,
            unknown: token_id(file, "unknown")?,
            normalizer: Normalizer {
                lowercase: flag(file, "normalizer.lowercase")?,
                strip_accents: flag(file, "normalizer.strip_accents")?,
            },
            kinds: numbers(file, "token_type")?.unwrap_or_else(|| vec![1.0; tokens.len()]),
            scores: numbers(file, "scores")?.unwrap_or_default(),
            merges: texts(file, "merges")?.unwrap_or_default(),
            has_space_prefix: flag(file, "add_space_prefix")?.unwrap_or(true),
            tokens,
        };
        parts.check().map(|()| Some(parts))
    }

    fn check(&self) -> Result<(), String> {
        let lengths = [("token_type", self.kinds.len()), ("scores", self.scores.len())];
        for (key, len) in lengths {
            if len != self.tokens.len() && !(len == 0 && key == "scores") {
                let tokens = self.tokens.len();
                return Err(format!(
                    "there are {tokens} tokens, but {len} in tokenizer.ggml.{key}"
                ));
            }
        }
        let mut seen = HashSet::with_capacity(self.tokens.len());
        for token in &self.tokens {
            if token.len() > TOKEN_BYTES_MAX {
                let bytes = token.len();
                return Err(format!(
                    "a token has {bytes} bytes, at most {TOKEN_BYTES_MAX} are read"
                ));
            }
            if !seen.insert(*token) {
                return Err(format!("token {token:?} occurs twice"));
            }
        }
        Ok(())
    }

    fn tokenizer_json(&self) -> Result<Json, String> {
        let mut json = match self.model {
            "gpt2" => self.byte_level()?,
            "llama" => self.sentence_piece()?,
            "bert" => self.word_piece()?,
            other => return Err(format!("tokenizer.ggml.model is '{other}', which is not read")),
        };
        json["version"] = "1.0".into();
        json["added_tokens"] = self.added_tokens();
        json["post_processor"] = self.post_processor()?;
        Ok(json)
    }

    /// What puts the tokens around a text that the file wants there.
    fn post_processor(&self) -> Result<Json, String> {
        let around = self.around.map(|id| {
            id.map(|id| {
                let token = self.tokens.get(id);
                token
                    .map(|token| (id, *token))
                    .ok_or_else(|| format!("there is no token {id} to put around a text"))
            })
            .transpose()
        });
        let [before, after] = around;
        let (before, after) = (before?, after?);
        if before.is_none() && after.is_none() {
            return Ok(Json::Null);
        }
        let special = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let text = |id: &str| json!({ "Sequence": { "id": id, "type_id": 0 } });
        let with = |texts: Vec<Json>| -> Vec<Json> {
            let begin = before.map(|(_, token)| special(token));
            let end = after.map(|(_, token)| special(token));
            begin.into_iter().chain(texts).chain(end).collect()
        };
        let tokens = before.into_iter().chain(after).map(|(id, token)| {
            (token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }))
        });
        Ok(json!({
            "type": "TemplateProcessing",
            "single": with(vec![text("A")]),
            "pair": with(vec![text("A"), text("B")]),
            "special_tokens": Json::Object(tokens.collect()),
        }))
    }

    /// Tokens that are found in text before it is cut into words.
    fn added_tokens(&self) -> Json {
        let is = |kind: f64, one: f64| kind.total_cmp(&one).is_eq();
        let tokens = self.tokens.iter().zip(&self.kinds).enumerate();
        let added = tokens.filter(|(_, (token, kind))| {
            !token.is_empty() && [UNKNOWN, CONTROL, USER_DEFINED].iter().any(|one| is(**kind, *one))
        });
        added
            .map(|(id, (token, kind))| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": !is(*kind, USER_DEFINED),
                })
            })
            .collect()
    }

    fn vocab(&self) -> Json {
        let ids = self.tokens.iter().enumerate();
        Json::Object(ids.map(|(id, token)| ((*token).to_owned(), id.into())).collect())
    }

    fn byte_level(&self) -> Result<Json, String> {
        let pre = self.pre.ok_or("tokenizer.ggml.pre is missing")?;
        let plain = |use_regex: bool| {
            json!({
                "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": use_regex,
            })
        };
        let split = |regex: &str| {
            json!({
                "type": "Split", "pattern": { "Regex": regex }, "behavior": "Isolated",
                "invert": false,
            })
        };
        let cuts = |regexes: &[&str]| {
            let mut steps: Vec<Json> = regexes.iter().map(|regex| split(regex)).collect();
            steps.push(plain(false));
            json!({ "type": "Sequence", "pretokenizers": steps })
        };
        let words = |digits: &str| cuts(&[&WORDS.replace("DIGITS", digits)]);
        let (normalizer, pre_tokenizer) = match pre {
            "gpt-2" => (Json::Null, plain(true)),
            "llama-bpe" => (Json::Null, words("{1,3}")),
            "qwen2" => (json!({ "type": "NFC" }), words("")),
            "deepseek-llm" => {
                let mut steps = cuts(&DEEPSEEK_LLM);
                let digits = json!({ "type": "Digits", "individual_digits": true });
                if let Some(steps) = steps["pretokenizers"].as_array_mut() {
                    steps.insert(DEEPSEEK_LLM.len(), digits);
                }
                (Json::Null, steps)
            }
            "deepseek-v3" => (Json::Null, cuts(&DEEPSEEK_V3)),
            other => return Err(format!("tokenizer.ggml.pre is '{other}', which is not read")),
        };
        let merges = self.merges.iter().map(|merge| {
            let parts = merge.split_once(' ');
            parts
                .map(|(left, right)| json!([left, right]))
                .ok_or_else(|| format!("{merge:?} in tokenizer.ggml.merges is not two pieces"))
        });
        Ok(json!({
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "decoder": plain(true),
            "model": {
                "type": "BPE", "unk_token": null, "fuse_unk": false, "byte_fallback": false,
                // Words that are tokens of LLaMA 3 are taken whole, whatever the merges say.
                "ignore_merges": pre == "llama-bpe",
                "vocab": self.vocab(),
                "merges": merges.collect::<Result<Vec<Json>, String>>()?,
            },
        }))
    }

    fn sentence_piece(&self) -> Result<Json, String> {
        if self.scores.is_empty() {
            return Err("tokenizer.ggml.scores is missing".to_owned());
        }
        if let Some(score) = self.scores.iter().find(|score| score.is_nan()) {
            return Err(format!("tokenizer.ggml.scores holds {score}"));
        }
        let unknown = self.kinds.iter().position(|kind| kind.total_cmp(&UNKNOWN).is_eq());
        let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
        let mut normalizers = vec![replace];
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if self.has_space_prefix {
            normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        Ok(json!({
            "normalizer": { "type": "Sequence", "normalizers": normalizers },
            "pre_tokenizer": null,
            "decoder": { "type": "Sequence", "decoders": decoders },
            "model": {
                "type": "BPE", "unk_token": unknown.map(|id| self.tokens[id]), "fuse_unk": true,
                "byte_fallback": self.kinds.iter().any(|kind| kind.total_cmp(&BYTE).is_eq()),
                "ignore_merges": false,
                "vocab": self.vocab(),
                "merges": self.merges_by_score(),
            },
        }))
    }

    /// Every way in which a piece is two pieces, those of the highest score first; among equals,
    /// those whose first part, then whose second part, is longer.
    fn merges_by_score(&self) -> Vec<[&'a str; 2]> {
        let plain =
            |kind: f64| ![UNKNOWN, CONTROL, BYTE].iter().any(|k| k.total_cmp(&kind).is_eq());
        let pieces = || self.tokens.iter().zip(&self.kinds).enumerate();
        let known: HashMap<&str, usize> = pieces()
            .filter(|(_, (_, kind))| plain(**kind))
            .map(|(id, (token, _))| (*token, id))
            .collect();
        let mut merges = Vec::new();
        for (id, (token, kind)) in pieces() {
            if !plain(*kind) {
                continue;
            }
            let cuts = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
            let mut local: Vec<(&str, &str)> = cuts
                .filter(|(left, right)| known.contains_key(left) && known.contains_key(right))
                .collect();
            local.sort_by_key(|(left, right)| (known[left], known[right]));
            merges.extend(local.into_iter().map(|pair| (self.scores[id], pair)));
        }
        let size = |text: &str| text.chars().count();
        merges.sort_by(|(a, one), (b, other)| {
            b.total_cmp(a)
                .then_with(|| size(other.0).cmp(&size(one.0)))
                .then_with(|| size(other.1).cmp(&size(one.1)))
        });
        merges.into_iter().map(|(_, (left, right))| [left, right]).collect()
    }
}

/// The token that a text begins or ends with (`bos`, `eos`), if the file wants it there; `wanted` and
/// `SentencePiece`'s own id where it does not say.
fn around(
    file: &GgufFile,
    name: &str,
    wanted: bool,
    own_id: usize,
) -> Result<Option<usize>, String> {
    let stated = flag(file, &format!("add_{name}_token"))?;
    if !stated.unwrap_or(wanted) {
        return Ok(None);
    }
    let is_sentence_piece = text(file, "model")? == Some("llama");
    match token_id(file, name)? {
        Some(id) => Ok(Some(id)),
        None if is_sentence_piece => Ok(Some(own_id)),
        None if stated.is_some() => Err(format!("tokenizer.ggml.{name}_token_id is missing")),
        None => Ok(None),
    }
}

/// The token that a text of an encoder begins or ends with, unless `add_<what>_token` says that it does
/// not: the first of the keys that is there, otherwise the token of that name.
fn token_around(
    file: &GgufFile,
    what: &str,
    keys: &[&str],
    (tokens, name): (&[&str], &str),
) -> Result<Option<usize>, String> {
    if flag(file, &format!("add_{what}_token"))? == Some(false) {
        return Ok(None);
    }
    for key in keys {
        if let Some(id) = token_id(file, key)? {
            return Ok(Some(id));
        }
    }
    let named = tokens.iter().position(|token| *token == name);
    named.map(Some).ok_or_else(|| format!("tokenizer.ggml.{}_token_id is missing", keys[0]))
}

fn token_id(file: &GgufFile, name: &str) -> Result<Option<usize>, String> {
    match value(file, &format!("{name}_token_id")) {
        (_, None) => Ok(None),
        (_, Some(Value::Unsigned(id, _))) => Ok(Some(usize::try_from(*id).unwrap_or(usize::MAX))),
        (key, Some(other)) => Err(wrong(&key, other, "a token id")),
    }
}

fn value<'a>(file: &'a GgufFile, key: &str) -> (String, Option<&'a Value>) {
    let key = format!("tokenizer.ggml.{key}");
    let value = file.value(&key);
    (key, value)
}

fn wrong(key: &str, found: &Value, expected: &str) -> String {
    format!("{key} is {}, not {expected}", found.value_type())
}

fn text<'a>(file: &'a GgufFile, key: &str) -> Result<Option<&'a str>, String> {
    match value(file, key) {
        (_, None) => Ok(None),
        (_, Some(Value::Text(text))) => Ok(Some(text)),
        (key, Some(other)) => Err(wrong(&key, other, "a text")),
    }
}

fn flag(file: &GgufFile, key: &str) -> Result<Option<bool>, String> {
    match value(file, key) {
        (_, None) => Ok(None),
        (_, Some(Value::Bool(flag))) => Ok(Some(*flag)),
        (key, Some(other)) => Err(wrong(&key, other, "true or false")),
    }
}

fn texts<'a>(file: &'a GgufFile, key: &str) -> Result<Option<Vec<&'a str>>, String> {
    let read =
        |key: &str, list| file.texts(key, list).map_err(|error: GgufError| error.to_string());
    match value(file, key) {
        (_, None) => Ok(None),
        (key, Some(Value::List(list))) => read(&key, list).map(Some),
        (key, Some(other)) => Err(wrong(&key, other, "a list")),
    }
}

fn numbers(file: &GgufFile, key: &str) -> Result<Option<Vec<f64>>, String> {
    match value(file, key) {
        (_, None) => Ok(None),
        (key, Some(Value::List(list))) => {
            file.numbers(&key, list).map(Some).map_err(|error| error.to_string())
        }
        (key, Some(other)) => Err(wrong(&key, other, "a list")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn golden(name: &str) -> PathBuf {
        let goldens = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/gguf");
        goldens.join(name)
    }

    #[test]
    fn ids_are_those_of_the_source() {
        for kind in ["llama", "gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "deepseek-v3", "bert"]
        {
            let name = format!("tokenizer-{kind}.gguf");
            let file = GgufFile::open(&golden(&name)).unwrap();
            let tokenizer = Tokenizer::from_gguf(&file).unwrap().unwrap();
            let expected = std::fs::read_to_string(golden(&format!("{name}.json"))).unwrap();
            let expected: Json = serde_json::from_str(&expected).unwrap();
            let texts = expected["texts"].as_array().unwrap();
            for (text, ids) in texts.iter().zip(expected["ids"].as_array().unwrap()) {
                let text = text.as_str().unwrap();
                let found = tokenizer.encode(text).unwrap();
                assert_eq!(&json!(found), ids, "{kind} {text:?}");
                // WordPiece forgets spaces, capitals and accents.
                if kind != "bert" {
                    assert_eq!(tokenizer.decode(&found).unwrap(), text, "{kind}");
                }
            }
        }
    }

    #[test]
    fn texts_for_a_model_begin_as_the_file_says() {
        use crate::tokenizer::SpelledSpecials::Text;
        let check = |name: &str, begins: bool| {
            let file = GgufFile::open(&golden(name)).unwrap();
            let tokenizer = Tokenizer::from_gguf(&file).unwrap().unwrap();
            let mut expected = tokenizer.encode("two stones").unwrap();
            if begins {
                expected.insert(0, 1);
            }
            assert_eq!(tokenizer.encode_for_model("two stones", Text).unwrap(), expected, "{name}");
        };
        check("chat.gguf", true);
        // SentencePiece's own rule, where the file does not say.
        check("tokenizer-llama.gguf", true);
        // LLaMA 3 wants it too, but that file does not say which token it is.
        check("tokenizer-llama-bpe.gguf", false);
        check("tokenizer-qwen2.gguf", false);
    }

    #[test]
    fn an_encoder_reads_texts_between_its_tokens() {
        use crate::tokenizer::SpelledSpecials::Text;
        let file = GgufFile::open(&golden("tokenizer-bert.gguf")).unwrap();
        let tokenizer = Tokenizer::from_gguf(&file).unwrap().unwrap();
        let plain = tokenizer.encode("Two STONES").unwrap();
        assert_eq!(plain, tokenizer.encode("two stönes").unwrap());
        let expected = [&[2], &plain[..], &[3]].concat();
        assert_eq!(tokenizer.encode_for_model("Two STONES", Text).unwrap(), expected);
        assert_eq!(tokenizer.decode(&plain).unwrap(), "two stones");
        let config = TokenizerConfig::from_gguf(&file).unwrap();
        assert_eq!(config.special("mask_token"), Some("[MASK]"));
        // A file that puts nothing in lower case says so.
        let lower = "normalizer.lowercase\u{7}\0\0\0\u{1}";
        let cased = "normalizer.lowercase\u{7}\0\0\0\0";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, replaced("tokenizer-bert.gguf", lower, cased)).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let cased = Tokenizer::from_gguf(&file).unwrap().unwrap();
        assert_ne!(cased.encode("Two STONES").unwrap(), plain);
        assert_eq!(cased.encode("two stones").unwrap(), plain);
    }

    #[test]
    fn damaged_pieces_are_refused() {
        let check = |from, to, expected: &str| assert_eq!(refused("bert", from, to), expected);
        check("[CLS]", "[PAD]", "token \"[PAD]\" occurs twice");
        check(
            "unknown_token_id\u{4}\0\0\0\u{1}\0",
            "unknown_token_id\u{4}\0\0\0\u{ff}\u{ff}",
            "tokenizer.ggml.unknown_token_id names no token",
        );
    }

    #[test]
    fn a_file_without_a_tokenizer_has_none() {
        let file = GgufFile::open(&golden("llama.gguf")).unwrap();
        assert!(Tokenizer::from_gguf(&file).unwrap().is_none());
    }

    #[test]
    fn chat_templates_and_special_tokens_are_those_of_the_file() {
        let file = GgufFile::open(&golden("chat.gguf")).unwrap();
        let config = TokenizerConfig::from_gguf(&file).unwrap();
        assert_eq!(config.special("bos_token"), Some("<s>"));
        assert_eq!(config.special("eos_token"), Some("</s>"));
        assert_eq!(config.special("unk_token"), Some("<unk>"));
        assert_eq!((config.add_bos_token, config.add_eos_token), (Some(true), Some(false)));
        assert!(config.chat_template(None).unwrap().source.starts_with("{{ bos_token }}"));
        assert_eq!(config.chat_template(Some("tool_use")).unwrap().source, "{{ tools }}");
        let tokenizer = Tokenizer::from_gguf(&file).unwrap().unwrap();
        config.check(&tokenizer, file.path()).unwrap();
        let none = GgufFile::open(&golden("llama.gguf")).unwrap();
        assert_eq!(TokenizerConfig::from_gguf(&none).unwrap(), TokenizerConfig::default());
    }

    #[test]
    fn wrong_facts_about_special_tokens_are_refused() {
        let refuse = |from: &str, to: &str, expected: &str| {
            let error =
                changed("chat.gguf", from, to, |file| TokenizerConfig::from_gguf(file).err());
            assert!(error.ends_with(expected), "{error}");
        };
        refuse(
            "tokenizer.chat_template.tool_use",
            "tokenizer.chat_template.tool_usf",
            "tokenizer.chat_template.tool_use is missing",
        );
        // The type of the key's value: 4 is u32, 7 a flag.
        refuse(
            "eos_token_id\u{4}\0\0\0\u{2}\0",
            "eos_token_id\u{4}\0\0\0\u{ff}\u{ff}",
            "tokenizer.ggml.eos_token_id is 65535, but tokenizer.ggml.tokens has 600",
        );
        refuse(
            "bos_token_id\u{4}",
            "bos_token_id\u{5}",
            "tokenizer.ggml.bos_token_id is i32, not a token id",
        );
    }

    /// The error after one text in the file was replaced by another of the same length.
    fn refused(kind: &str, from: &str, to: &str) -> String {
        let name = format!("tokenizer-{kind}.gguf");
        changed(&name, from, to, |file| Tokenizer::from_gguf(file).err())
    }

    /// The bytes of a file with one text in it replaced by another of the same length.
    fn replaced(name: &str, from: &str, to: &str) -> Vec<u8> {
        let latin = |text: &str| -> Vec<u8> {
            text.chars().map(|c| u8::try_from(u32::from(c)).unwrap()).collect()
        };
        let (from, to) = (latin(from), latin(to));
        assert_eq!(from.len(), to.len());
        let mut bytes = std::fs::read(golden(name)).unwrap();
        let at = bytes.windows(from.len()).position(|part| part == from).unwrap();
        bytes[at..at + from.len()].copy_from_slice(&to);
        bytes
    }

    fn changed(
        name: &str,
        from: &str,
        to: &str,
        read: impl Fn(&GgufFile) -> Option<TokenizerError>,
    ) -> String {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, replaced(name, from, to)).unwrap();
        let error = read(&GgufFile::open(&path).unwrap()).unwrap();
        assert!(matches!(error, TokenizerError::Gguf { .. }), "{error}");
        let text = error.to_string();
        text.split_once("is not read: ").unwrap().1.to_owned()
    }

    #[test]
    fn other_kinds_are_refused_by_name() {
        let check = |from, to, expected: &str| assert_eq!(refused("gpt-2", from, to), expected);
        check("gpt-2", "gpt-3", "tokenizer.ggml.pre is 'gpt-3', which is not read");
        check("gpt2", "bart", "tokenizer.ggml.model is 'bart', which is not read");
        check("tokenizer.ggml.pre", "tokenizer.ggml.prx", "tokenizer.ggml.pre is missing");
        check("tokenizer.ggml.model", "tokenizer.ggml.modem", "tokenizer.ggml.model is missing");
        assert_eq!(
            refused("llama", "tokenizer.ggml.scores", "tokenizer.ggml.scorex"),
            "tokenizer.ggml.scores is missing"
        );
        assert_eq!(refused("llama", "<0x01>", "<0x02>"), "token \"<0x02>\" occurs twice");
    }
}
