//! A tokenizer → the metadata of a GGUF file.
//!
//! Written is what the reader beside this makes the same tokenizer of, and what llama.cpp reads:
//! byte-level BPE that cuts words as GPT-2, LLaMA 3 or Qwen 2 do, and the BPE of `SentencePiece`, whose
//! scores are the ranks of its merges. Anything else is refused by name.

use std::collections::{BTreeMap, HashMap};

use cairn_artifacts::gguf::OutValue;
use serde_json::Value as Json;

use super::{
    BYTE, CHAT_TEMPLATE, CONTROL, Normalizer, Parts, SPECIALS, SpelledSpecials, Tokenizer,
    TokenizerConfig, TokenizerError, UNKNOWN, USER_DEFINED, WORDS,
};

const NORMAL: f64 = 1.0;
/// A row of the embedding that no token has.
const UNUSED: f64 = 5.0;

/// A token, and what it is.
type Kinds = Vec<(String, f64)>;

impl Tokenizer {
    /// The metadata that says the same, for a model with an embedding of `rows` rows.
    ///
    /// # Errors
    ///
    /// [`TokenizerError::GgufExport`] naming what these files have no word for.
    pub fn gguf_metadata(
        &self,
        config: &TokenizerConfig,
        rows: usize,
    ) -> Result<Vec<(String, OutValue)>, TokenizerError> {
        let refused = |reason: String| TokenizerError::GgufExport { reason };
        let json: Json =
            serde_json::from_slice(&self.json).map_err(|error| refused(error.to_string()))?;
        let mut written = kind_metadata(&json, rows).map_err(refused)?;
        let mut put = |key: &str, value| written.push((format!("tokenizer.ggml.{key}"), value));
        let around = self.around_a_text()?;
        for ((key, name), id) in
            [("bos", "bos_token"), ("eos", "eos_token")].into_iter().zip(around)
        {
            put(&format!("add_{key}_token"), OutValue::Bool(id.is_some()));
            let stated = config.special(name).and_then(|token| self.token_id(token));
            let end = if key == "eos" { self.end_of_document } else { None };
            if let Some(id) = id.or(stated).or(end) {
                put(&format!("{key}_token_id"), OutValue::U32(id));
            }
        }
        for (key, name) in SPECIALS.into_iter().filter(|(key, _)| !["bos", "eos"].contains(key)) {
            let id = config.special(name).and_then(|token| self.token_id(token));
            if let Some(id) = id {
                put(&format!("{key}_token_id"), OutValue::U32(id));
            }
        }
        written.extend(templates(config));
        Ok(written)
    }

    /// The tokens that go around a text for a model: one before, one after, or none.
    fn around_a_text(&self) -> Result<[Option<u32>; 2], TokenizerError> {
        const TEXT: &str = "stones";
        let bare = self.encode(TEXT)?;
        let whole = self.encode_for_model(TEXT, SpelledSpecials::Text)?;
        let several = || TokenizerError::GgufExport {
            reason: "it puts more around a text than one token before and one after".to_owned(),
        };
        let start = whole.windows(bare.len().max(1)).position(|ids| *ids == bare);
        let start = start.ok_or_else(several)?;
        let (before, after) = (&whole[..start], &whole[start + bare.len()..]);
        if before.len() > 1 || after.len() > 1 {
            return Err(several());
        }
        Ok([before.first().copied(), after.first().copied()])
    }
}

/// Keys of a file whose model comes without a tokenizer: llama.cpp wants to be told.
pub fn no_tokenizer() -> Vec<(String, OutValue)> {
    vec![("tokenizer.ggml.model".to_owned(), OutValue::Text("none".to_owned()))]
}

fn templates(config: &TokenizerConfig) -> Vec<(String, OutValue)> {
    let mut written = Vec::new();
    let default = config.chat_template(None);
    if let Some(template) = default {
        written.push((CHAT_TEMPLATE.to_owned(), OutValue::Text(template.source.clone())));
    }
    let others = || {
        let templates = config.chat_templates.iter();
        templates.filter(|template| default.is_none_or(|default| default.name != template.name))
    };
    let names: Vec<String> = others().map(|template| template.name.clone()).collect();
    if !names.is_empty() {
        written.push(("tokenizer.chat_templates".to_owned(), OutValue::Texts(names)));
    }
    written.extend(others().map(|template| {
        let key = format!("{CHAT_TEMPLATE}.{}", template.name);
        (key, OutValue::Text(template.source.clone()))
    }));
    written
}

/// The keys of model and vocabulary.
fn kind_metadata(json: &Json, rows: usize) -> Result<Vec<(String, OutValue)>, String> {
    let model = &json["model"];
    if model["type"].as_str().is_some_and(|kind| kind != "BPE") || !model["merges"].is_array() {
        return Err(format!("its model is {}, not BPE", model["type"]));
    }
    let merges = merges(model)?;
    let mut tokens = tokens(json, rows)?;
    let own = |key: &str, value| (format!("tokenizer.ggml.{key}"), value);
    let text = |text: &str| OutValue::Text(text.to_owned());
    let mut written = match pre_tokenizer(json) {
        Some(pre) => {
            let joined = merges.iter().map(|(left, right)| format!("{left} {right}")).collect();
            vec![
                own("model", text("gpt2")),
                own("pre", text(pre)),
                own("merges", OutValue::Texts(joined)),
            ]
        }
        None => {
            let has_space_prefix = sentence_piece(json)
                .ok_or("its rule for cutting text into words has no name in GGUF files")?;
            mark_pieces(model, &mut tokens);
            let scores = scores(&tokens, &merges, has_space_prefix)?;
            vec![
                own("model", text("llama")),
                own("pre", text("default")),
                own("scores", OutValue::F32s(scores)),
                own("add_space_prefix", OutValue::Bool(has_space_prefix)),
            ]
        }
    };
    #[expect(clippy::cast_possible_truncation, reason = "kinds are small whole numbers")]
    let kinds = tokens.iter().map(|(_, kind)| *kind as i32).collect();
    written.push(own("token_type", OutValue::I32s(kinds)));
    let spelled = tokens.into_iter().map(|(token, _)| token).collect();
    written.push(own("tokens", OutValue::Texts(spelled)));
    Ok(written)
}

fn merges(model: &Json) -> Result<Vec<(String, String)>, String> {
    let pieces = |merge: &Json| match merge {
        Json::String(text) => {
            text.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()))
        }
        Json::Array(pair) => match pair.as_slice() {
            [Json::String(left), Json::String(right)] => Some((left.clone(), right.clone())),
            _ => None,
        },
        _ => None,
    };
    let all = model["merges"].as_array().into_iter().flatten();
    let cut = all.map(|merge| pieces(merge).ok_or_else(|| format!("{merge} is no merge")));
    cut.collect()
}

/// Every row's token: those of the vocabulary, those added, and names for rows that have none.
fn tokens(json: &Json, rows: usize) -> Result<Kinds, String> {
    let mut by_id: BTreeMap<usize, (String, f64)> = BTreeMap::new();
    let index = |id: &Json| {
        let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
        id.filter(|&id| id < rows).ok_or_else(|| format!("a token has an id beyond {rows} rows"))
    };
    for (token, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        by_id.insert(index(id)?, (token.clone(), NORMAL));
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let is_special = added["special"].as_bool().unwrap_or(false);
        let kind = if is_special { CONTROL } else { USER_DEFINED };
        let content = added["content"].as_str().unwrap_or_default().to_owned();
        by_id.insert(index(&added["id"])?, (content, kind));
    }
    Ok((0..rows)
        .map(|id| by_id.remove(&id).unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED)))
        .collect())
}

/// The name of the rule by which text is cut into words before byte-level BPE.
fn pre_tokenizer(json: &Json) -> Option<&'static str> {
    let pre = &json["pre_tokenizer"];
    let is_byte_level = |step: &Json, cuts: bool| {
        step["type"] == "ByteLevel"
            && step["add_prefix_space"] == false
            && step["use_regex"].as_bool().unwrap_or(true) == cuts
    };
    let name = if is_byte_level(pre, true) {
        "gpt-2"
    } else {
        let [split, bytes] = pre["pretokenizers"].as_array()?.as_slice() else { return None };
        let cuts = |digits: &str| split["pattern"]["Regex"] == WORDS.replace("DIGITS", digits);
        let is_split =
            split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] == false;
        if !is_split || !is_byte_level(bytes, false) {
            return None;
        }
        match (cuts("{1,3}"), cuts("")) {
            (true, _) => "llama-bpe",
            (_, true) => "qwen2",
            _ => return None,
        }
    };
    let normalizer = &json["normalizer"];
    let is_plain = if name == "qwen2" { normalizer["type"] == "NFC" } else { normalizer.is_null() };
    let ignores = json["model"]["ignore_merges"].as_bool().unwrap_or(false);
    (is_plain && ignores == (name == "llama-bpe")).then_some(name)
}

/// Whether a `SentencePiece` tokenizer puts a space before a text; `None` for another tokenizer.
fn sentence_piece(json: &Json) -> Option<bool> {
    let replaces = |step: &Json| {
        step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == "▁"
    };
    let prepends = |step: &Json| step["type"] == "Prepend" && step["prepend"] == "▁";
    let is_fallback = json["model"]["byte_fallback"] == true && json["pre_tokenizer"].is_null();
    let normalizer = &json["normalizer"];
    let steps = normalizer["normalizers"].as_array().map(Vec::as_slice);
    match steps.unwrap_or(std::slice::from_ref(normalizer)) {
        [first, second] if is_fallback && prepends(first) && replaces(second) => Some(true),
        [only] if is_fallback && replaces(only) => Some(false),
        _ => None,
    }
}

/// Marks the unknown token and those that stand for a byte.
fn mark_pieces(model: &Json, tokens: &mut Kinds) {
    let unknown = model["unk_token"].as_str();
    for (token, kind) in tokens {
        let is_byte = token
            .strip_prefix("<0x")
            .and_then(|rest| rest.strip_suffix('>'))
            .is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok());
        if Some(token.as_str()) == unknown {
            *kind = UNKNOWN;
        } else if is_byte {
            *kind = BYTE;
        }
    }
}

/// Scores that give the merges back: a piece has the rank of its first merge.
fn scores(
    tokens: &Kinds,
    merges: &[(String, String)],
    has_space_prefix: bool,
) -> Result<Vec<f32>, String> {
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, (left, right)) in merges.iter().enumerate() {
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    #[expect(clippy::cast_precision_loss, reason = "vocabularies are below 2^24")]
    let score = |token: &str| ranks.get(token).map_or(0.0, |&rank| -(rank as f32));
    let scores: Vec<f32> = tokens.iter().map(|(token, _)| score(token)).collect();
    let parts = Parts {
        model: "llama",
        pre: None,
        tokens: tokens.iter().map(|(token, _)| token.as_str()).collect(),
        kinds: tokens.iter().map(|(_, kind)| *kind).collect(),
        scores: scores.iter().map(|&score| score.into()).collect(),
        merges: Vec::new(),
        has_space_prefix,
        unknown: None,
        normalizer: Normalizer::default(),
        around: [None, None],
    };
    let again = parts.merges_by_score();
    let same = again.len() == merges.len()
        && again.iter().zip(merges).all(|(a, (left, right))| a[0] == left && a[1] == right);
    if same { Ok(scores) } else { Err("no scores give its merges back".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cairn_artifacts::gguf::{GgufFile, write};
    use std::path::Path;

    fn written(
        tokenizer: &Tokenizer,
        config: &TokenizerConfig,
        rows: usize,
    ) -> (Tokenizer, TokenizerConfig) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        let metadata = tokenizer.gguf_metadata(config, rows).unwrap();
        let mut bytes = Vec::new();
        write(&mut bytes, &metadata, &[], &mut |_, _| Ok(())).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let file = GgufFile::open(&path).unwrap();
        let config = TokenizerConfig::from_gguf(&file).unwrap();
        (Tokenizer::from_gguf(&file).unwrap().unwrap(), config)
    }

    const TEXTS: [&str; 4] =
        ["two stones, 1234 of them;\n\n  don't move", "Größe 山 ⛰ \u{1f4a0}", "", "<s> a </s> b"];

    #[test]
    fn what_was_read_is_written_and_reads_back() {
        for kind in ["llama", "gpt-2", "llama-bpe", "qwen2"] {
            let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/gguf");
            let file = GgufFile::open(&goldens.join(format!("tokenizer-{kind}.gguf"))).unwrap();
            let tokenizer = Tokenizer::from_gguf(&file).unwrap().unwrap();
            let config = TokenizerConfig::from_gguf(&file).unwrap();
            let rows = usize::try_from(tokenizer.vocab_size()).unwrap() + 3;
            let (again, config_again) = written(&tokenizer, &config, rows);
            for text in TEXTS {
                let expected = tokenizer.encode(text).unwrap();
                assert_eq!(again.encode(text).unwrap(), expected, "{kind} {text:?}");
                let spelled = |tokenizer: &Tokenizer| {
                    tokenizer.encode_for_model(text, SpelledSpecials::Tokens).unwrap()
                };
                assert_eq!(spelled(&again), spelled(&tokenizer), "{kind} {text:?}");
            }
            assert_eq!(
                again.token(u32::try_from(rows - 1).unwrap()).unwrap(),
                format!("[PAD{}]", rows - 1)
            );
            assert_eq!(config_again.chat_templates, config.chat_templates);
        }
    }

    #[test]
    fn a_trained_tokenizer_is_written() {
        use crate::tokenizer::{BpeSettings, train_bpe};
        let settings = BpeSettings { vocab_size: 300, ..BpeSettings::default() };
        let texts = ["a cairn is a stack of stones"; 8].map(|text| Ok(text.to_owned()));
        let tokenizer = train_bpe(&settings, texts).unwrap();
        let (again, config) = written(&tokenizer, &TokenizerConfig::default(), 300);
        for text in TEXTS {
            assert_eq!(again.encode(text).unwrap(), tokenizer.encode(text).unwrap(), "{text:?}");
        }
        let end = tokenizer.end_of_document().and_then(|id| tokenizer.token(id));
        assert_eq!(config.special("eos_token"), end.as_deref());
    }

    #[test]
    fn other_tokenizers_are_refused() {
        let refused = |json: Json| {
            let error = kind_metadata(&json, 4).unwrap_err();
            assert!(!error.is_empty());
            error
        };
        let unigram = serde_json::json!({ "model": { "type": "Unigram", "vocab": [] } });
        assert_eq!(refused(unigram), "its model is \"Unigram\", not BPE");
        let spaces = serde_json::json!({
            "model": { "type": "BPE", "vocab": { "a": 0 }, "merges": [] },
            "pre_tokenizer": { "type": "Whitespace" }, "normalizer": null,
        });
        assert_eq!(
            refused(spaces),
            "its rule for cutting text into words has no name in GGUF files"
        );
        let many = serde_json::json!({
            "model": { "type": "BPE", "vocab": { "a": 4 }, "merges": [] },
        });
        assert_eq!(refused(many), "a token has an id beyond 4 rows");
    }
}
