//! Every parser of foreign bytes against broken input: a typed error or success, never a panic, and
//! never more memory than its bound.
//!
//! The same entry points have fuzz targets in `/fuzz`. Here valid input is changed at random, with
//! a taste for what parsers trip over: numbers at their extremes, bytes missing or doubled.

use std::fs;
use std::path::Path;

use cairn_artifacts::safetensors::{Header, INDEX_FILE, SafetensorsFile, WeightFolder};
use cairn_artifacts::{checkpoint, gguf, leanpack};
use cairn_data::chat::{ChatError, ChatInput, ChatTemplate};
use cairn_data::corpus;
use cairn_data::tokenizer::{BpeSettings, Tokenizer, TokenizerConfig, VOCAB_SIZE_MAX, train_bpe};
use cairn_model::{AdapterMap, Merge, MergedSource};
use cairn_spec::recipe::{Format, RECIPE_BYTES_MAX, RecipeFile};
use cairn_spec::{LoraSpec, ModelSpec};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, TestRunner};

use crate::allocations::peak_of;
use crate::{cairn, golden, succeed};

/// A parser, something it accepts, and how much memory it may take: so many bytes for each byte of
/// the input, and so many besides.
struct Parser {
    name: &'static str,
    valid: Vec<u8>,
    bound: (usize, usize),
    parse: Box<Parse>,
}

type Parse = dyn Fn(&[u8]) -> Result<(), String>;

impl Parser {
    fn new<E: std::fmt::Display>(
        name: &'static str,
        valid: Vec<u8>,
        bound: (usize, usize),
        parse: impl Fn(&[u8]) -> Result<(), E> + 'static,
    ) -> Self {
        let parse = move |bytes: &[u8]| parse(bytes).map_err(|error| error.to_string());
        Self { name, valid, bound, parse: Box::new(parse) }
    }

    /// A parser that reads the file `file` of a folder.
    fn of_file<E: std::fmt::Display>(
        name: &'static str,
        (file, valid): (&'static str, Vec<u8>),
        bound: (usize, usize),
        open: impl Fn(&Path) -> Result<(), E> + 'static,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::new(name, valid, bound, move |bytes| {
            fs::write(folder.path().join(file), bytes).unwrap();
            open(folder.path())
        })
    }

    /// Parses within the bound; an error must say something.
    fn check(&self, bytes: &[u8]) -> Result<(), String> {
        let (result, peak) = peak_of(|| (self.parse)(bytes));
        let bound = self.bound.0 * bytes.len() + self.bound.1;
        assert!(
            peak <= bound,
            "{} took {peak} bytes for {} bytes of input, more than {bound}: {result:?}\n{:?}",
            self.name,
            bytes.len(),
            String::from_utf8_lossy(bytes),
        );
        assert!(result.as_ref().err().is_none_or(|error| !error.is_empty()), "{}", self.name);
        result
    }

    /// Parses input that must be refused, and returns the error.
    fn refuse(&self, bytes: &[u8]) -> String {
        let what = String::from_utf8_lossy(bytes).into_owned();
        self.check(bytes).expect_err(&what)
    }
}

fn text(value: &serde_json::Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

fn safetensors() -> Parser {
    let header = text(&serde_json::json!({
        "__metadata__": { "format": "pt" },
        "a": { "dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24] },
        "b": { "dtype": "BF16", "shape": [4], "data_offsets": [24, 32] },
    }));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend([0; 32]);
    Parser::new("safetensors", file, (64, 4096), |bytes| Header::parse(bytes).map(|_| ()))
}

fn shard_index() -> Parser {
    let index = text(&serde_json::json!({
        "metadata": { "total_size": 1 },
        "weight_map": { "a": "one.safetensors", "b": "two.safetensors" },
    }));
    Parser::of_file("index", (INDEX_FILE, index), (64, 1 << 16), |folder| {
        // The files it names are not there: what is read is the index.
        match WeightFolder::open(folder).map_err(|error| error.to_string()) {
            Err(error) if error.starts_with("cannot open") => Ok(()),
            other => other.map(|_| ()),
        }
    })
}

fn leanpack_header() -> Parser {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.leanpack");
    let mut command = cairn(["pack", "--quiet", "-o"]);
    succeed(command.arg(&path).arg(golden("llama")));
    let pack = leanpack::PackFile::open(&path).unwrap();
    let data_bytes = pack.preamble().file_bytes - pack.preamble().data_start;
    Parser::new("leanpack", pack.header().to_json(), (32, 1 << 16), move |bytes| {
        leanpack::Header::parse(bytes, data_bytes).map(|_| ())
    })
}

fn gguf_header() -> Parser {
    let file = fs::read(golden("gguf").join("llama.gguf")).unwrap();
    let bound = (gguf::ALLOCATED_PER_BYTE, gguf::ALLOCATED_BESIDES);
    Parser::new("gguf", file, bound, |bytes| gguf::Header::parse(bytes).map(|_| ()))
}

fn gguf_spec() -> Parser {
    let file = fs::read(golden("gguf").join("llama.gguf")).unwrap();
    let open = |folder: &Path| -> Result<(), anyhow::Error> {
        let file = gguf::GgufFile::open(&folder.join("model.gguf"))?;
        let _ = cairn_model::gguf::spec(&file)?;
        Ok(())
    };
    Parser::of_file("spec of a gguf", ("model.gguf", file), (8, 1 << 16), open)
}

/// Tensors of every type, decoded whole.
fn gguf_tensors() -> Parser {
    let file = fs::read(golden("gguf").join("blocks.gguf")).unwrap();
    let open = |folder: &Path| -> Result<(), anyhow::Error> {
        let file = gguf::GgufFile::open(&folder.join("model.gguf"))?;
        for tensor in file.tensors() {
            let count = tensor.elements().min(4096);
            let mut out = vec![0.0; count];
            let read = file.read_f32(&tensor.name, 0..count, &mut out);
            anyhow::ensure!(read.is_ok() == tensor.tensor_type.format().is_some());
            let beyond = tensor.elements()..tensor.elements() + 1;
            assert!(file.read_f32(&tensor.name, beyond, &mut [0.0]).is_err());
        }
        Ok(())
    };
    Parser::of_file("tensors of a gguf", ("model.gguf", file), (8, 1 << 16), open)
}

/// Special tokens and chat templates.
fn gguf_chat() -> Parser {
    let file = fs::read(golden("gguf").join("chat.gguf")).unwrap();
    let open = |folder: &Path| -> Result<(), anyhow::Error> {
        let file = gguf::GgufFile::open(&folder.join("model.gguf"))?;
        TokenizerConfig::from_gguf(&file)?;
        Ok(())
    };
    Parser::of_file("chat facts of a gguf", ("model.gguf", file), (16, 1 << 16), open)
}

fn chat_template() -> Parser {
    let source = fs::read(golden("chat").join("llama3.jinja")).unwrap();
    // A rendering has a thread and a budget of its own; what is counted here is what comes back.
    Parser::new("chat template", source, (64, 1 << 20), |bytes| {
        let source = String::from_utf8_lossy(bytes);
        let template = ChatTemplate::parse(&source, Path::new("template.jinja"))?;
        let messages = [serde_json::json!({ "role": "user", "content": "a stack of stones" })];
        let specials = [("bos_token".to_owned(), "<s>".to_owned())].into();
        let rendered = template.render(&ChatInput::new(&messages, &specials));
        // The engine itself never fails, whatever the template does.
        let failed = |error: &ChatError| error.to_string().contains("the template engine failed");
        assert!(!rendered.as_ref().is_err_and(failed), "{source}");
        rendered.map(|_| ())
    })
}

fn adapter_config() -> Parser {
    let file = fs::read(golden("lora_llama").join("adapter_config.json")).unwrap();
    Parser::new("adapter config", file.trim_ascii_end().to_vec(), (256, 1 << 16), |bytes| {
        LoraSpec::from_peft_json(&String::from_utf8_lossy(bytes)).map(|_| ())
    })
}

/// An adapter's tensors, merged into a model.
fn adapter_tensors() -> Parser {
    let file = fs::read(golden("lora_llama").join("adapter_model.safetensors")).unwrap();
    let lora = fs::read_to_string(golden("lora_llama").join("adapter_config.json")).unwrap();
    let lora = LoraSpec::from_peft_json(&lora).unwrap();
    let config = fs::read_to_string(golden("llama").join("config.json")).unwrap();
    let spec = ModelSpec::from_hf_json(&config).unwrap();
    let adapters = AdapterMap::new(&spec, &lora).unwrap();
    let base = WeightFolder::open(&golden("llama")).unwrap();
    let open = move |folder: &Path| -> Result<(), anyhow::Error> {
        let tensors = SafetensorsFile::open(&folder.join("adapter_model.safetensors"))?;
        MergedSource::new(&spec, &adapters, (&base, &tensors), Merge::Merge)?;
        Ok(())
    };
    let file = ("adapter_model.safetensors", file);
    Parser::of_file("adapter tensors", file, (64, 1 << 18), open)
}

fn gguf_tokenizer(kind: &str) -> Parser {
    let file = fs::read(golden("gguf").join(format!("tokenizer-{kind}.gguf"))).unwrap();
    let open = |folder: &Path| -> Result<(), anyhow::Error> {
        let file = gguf::GgufFile::open(&folder.join("model.gguf"))?;
        let _ = Tokenizer::from_gguf(&file)?;
        Ok(())
    };
    Parser::of_file("tokenizer of a gguf", ("model.gguf", file), TOKENIZER_BOUND, open)
}

fn config() -> Parser {
    let file = fs::read(golden("llama").join("config.json")).unwrap().trim_ascii_end().to_vec();
    Parser::new("config.json", file, (256, 1 << 16), |bytes| {
        ModelSpec::from_hf_json(&String::from_utf8_lossy(bytes)).map(|_| ())
    })
}

/// The `tokenizers` crate keeps several maps of the vocabulary; a byte-level one gets a table with
/// a place for every id up to the largest.
const TOKENIZER_BOUND: (usize, usize) = (1024, 32 * VOCAB_SIZE_MAX as usize + (4 << 20));

fn tokenizer() -> Parser {
    let settings = BpeSettings { vocab_size: 270, ..BpeSettings::default() };
    let texts = ["a cairn is a stack of stones"; 8].map(|text| Ok(text.to_owned()));
    let file = train_bpe(&settings, texts).unwrap().json().to_vec();
    Parser::new("tokenizer.json", file, TOKENIZER_BOUND, |bytes| {
        Tokenizer::parse(bytes.to_vec(), Path::new("tokenizer.json")).map(|_| ())
    })
}

fn recipe(format: Format, extension: &str) -> Parser {
    let toml = fs::read_to_string(golden("..").join("../recipes/tiny.toml")).unwrap();
    let value: toml::Value = toml.parse::<toml::Table>().unwrap().into();
    let valid = match extension {
        "toml" => toml,
        // JSON is YAML too.
        _ => serde_json::to_string(&value).unwrap(),
    };
    // A YAML alias takes two bytes and stands for up to a hundred values.
    let bound = (if extension == "yaml" { 16_384 } else { 1024 }, 1 << 20);
    Parser::new("recipe", valid.into_bytes(), bound, move |bytes| {
        RecipeFile::parse(&String::from_utf8_lossy(bytes), format).map(|_| ())
    })
}

fn manifest() -> Parser {
    let file = text(&serde_json::json!({
        "schema": checkpoint::SCHEMA, "step": 7, "validation_loss": 1.5,
        "recipe_hash": null, "data_hash": null, "state": { "loader": { "step": 7 } },
        "files": { "config.json": { "bytes": 3, "hash": "0".repeat(64) } },
    }));
    Parser::of_file("cairn.json", ("cairn.json", file), (256, 1 << 16), |folder| {
        checkpoint::read_manifest(folder).map(|_| ())
    })
}

fn corpus_manifest() -> Parser {
    let file = text(&serde_json::json!({
        "schema": "corpus/1", "tokenizer": { "vocab_size": 1 }, "groups": ["a"],
    }));
    Parser::of_file("corpus manifest", ("manifest.json", file), (256, 1 << 16), |folder| {
        corpus::Corpus::open(folder).map(|_| ())
    })
}

fn corpus_index() -> Parser {
    let mut file = b"CAIRNDOC".to_vec();
    file.extend([1_u32, 0].map(u32::to_le_bytes).concat());
    file.extend([2_u64, 3].map(u64::to_le_bytes).concat());
    for (token, path, count) in [(0_u64, 0_u64, 4_u32), (4, 1, 5)] {
        file.extend([token, path].map(u64::to_le_bytes).concat());
        file.extend([count, 9, 0, 0].map(u32::to_le_bytes).concat());
    }
    file.extend(b"abc");
    Parser::new("corpus index", file, (1, 4096), |bytes| {
        corpus::check_index(bytes, 1, 1).map(|documents| assert_eq!(documents, 2))
    })
}

fn parsers() -> Vec<Parser> {
    vec![
        safetensors(),
        shard_index(),
        leanpack_header(),
        gguf_header(),
        gguf_spec(),
        gguf_tensors(),
        gguf_chat(),
        chat_template(),
        adapter_config(),
        adapter_tensors(),
        gguf_tokenizer("llama"),
        gguf_tokenizer("gpt-2"),
        config(),
        tokenizer(),
        recipe(Format::Toml, "toml"),
        recipe(Format::Yaml, "yaml"),
        recipe(Format::Json, "json"),
        manifest(),
        corpus_manifest(),
        corpus_index(),
    ]
}

/// One change to valid input.
#[derive(Clone, Debug)]
enum Change {
    Byte(Index, u8),
    Remove(Index, usize),
    Double(Index, usize),
    Truncate(Index),
    /// Little-endian bytes of an extreme number, over what is there.
    Extreme(Index, u64, usize),
    /// A run of digits in a text becomes something else.
    Number(Index, &'static str),
}

const TEXTS: [&str; 16] = [
    "0",
    "-1",
    "1000000000",
    "18446744073709551615",
    "18446744073709551616",
    "1e400",
    "-1e400",
    "9007199254740993",
    "0.5",
    "NaN",
    "null",
    "true",
    "\"x\"",
    "[]",
    "{}",
    "[[[[[[[[[[[[[[[[0",
];

fn change() -> impl Strategy<Value = Change> {
    let extremes: Vec<u64> =
        vec![0, 1, 0x7f, 0xff, 1 << 31, u64::from(u32::MAX), 1 << 63, u64::MAX, u64::MAX - 31];
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        (any::<Index>(), 1_usize..40).prop_map(|(at, count)| Change::Remove(at, count)),
        (any::<Index>(), 1_usize..40).prop_map(|(at, count)| Change::Double(at, count)),
        any::<Index>().prop_map(Change::Truncate),
        (
            any::<Index>(),
            prop::sample::select(extremes),
            prop::sample::select(&[1_usize, 4, 8][..])
        )
            .prop_map(|(at, value, bytes)| Change::Extreme(at, value, bytes)),
        (any::<Index>(), prop::sample::select(&TEXTS[..]))
            .prop_map(|(at, text)| Change::Number(at, text)),
    ]
}

fn apply(change: &Change, input: &mut Vec<u8>) {
    if input.is_empty() {
        return;
    }
    let len = input.len();
    let range = |at: &Index, count: usize| at.index(len)..(at.index(len) + count).min(len);
    match change {
        Change::Byte(at, byte) => input[at.index(len)] = *byte,
        Change::Remove(at, count) => drop(input.drain(range(at, *count))),
        Change::Double(at, count) => {
            let part = input[range(at, *count)].to_vec();
            input.splice(at.index(len)..at.index(len), part);
        }
        Change::Truncate(at) => input.truncate(at.index(len)),
        Change::Extreme(at, value, bytes) => {
            let range = range(at, *bytes);
            let count = range.len();
            input[range].copy_from_slice(&value.to_le_bytes()[..count]);
        }
        Change::Number(at, text) => {
            let start = (at.index(len)..len).find(|&i| input[i].is_ascii_digit()).unwrap_or(0);
            let end = (start..len).find(|&i| !input[i].is_ascii_digit()).unwrap_or(len);
            input.splice(start..end, text.bytes());
        }
    }
}

#[test]
fn what_is_valid_is_accepted_within_the_bound() {
    for parser in parsers() {
        // What belongs to a corpus beside its manifest is missing here.
        let result = parser.check(&parser.valid);
        assert!(result.is_ok() || parser.name == "corpus manifest", "{}: {result:?}", parser.name);
    }
}

#[test]
fn input_cut_at_every_length_is_refused_or_read_within_the_bound() {
    for parser in parsers() {
        // Every length of what is short; of what is long, every length of both ends.
        let len = parser.valid.len();
        let lengths =
            (0..len).filter(|at| len <= 2048 || *at < 600 || len - at < 200 || at % 61 == 0);
        for length in lengths {
            let result = parser.check(&parser.valid[..length]);
            // Texts may end anywhere, and files in front of padding.
            let may_be_whole = ["recipe", "chat template"];
            assert!(
                result.is_err()
                    || may_be_whole.contains(&parser.name)
                    || parser.name.ends_with("gguf"),
                "{} accepts {length} of {len} bytes",
                parser.name
            );
        }
    }
}

#[test]
fn changed_input_is_refused_or_read_within_the_bound() {
    for parser in parsers() {
        let cases = if parser.valid.len() > 4096 { 150 } else { 400 };
        let config = Config { cases, failure_persistence: None, ..Config::default() };
        let changes = prop::collection::vec(change(), 1..5);
        let outcome = TestRunner::new(config).run(&changes, |changes| {
            let mut input = parser.valid.clone();
            for change in &changes {
                apply(change, &mut input);
            }
            let _ = parser.check(&input);
            Ok(())
        });
        assert!(outcome.is_ok(), "{}: {}", parser.name, outcome.unwrap_err());
    }
}

#[test]
fn text_nested_deep_is_refused() {
    for parser in parsers() {
        for open in ["[", "{\"a\":", "[[", "- ", "a:\n - "] {
            let _ = parser.check(open.repeat(20_000).as_bytes());
        }
    }
    // Nine lists, each ten times the one before.
    let mut laughs = "a0: &a0 [x]\n".to_owned();
    for level in 1..10 {
        let before = format!("*a{}, ", level - 1).repeat(10);
        laughs += &format!("a{level}: &a{level} [{before}]\n");
    }
    recipe(Format::Yaml, "yaml").refuse(laughs.as_bytes());
    let long = " ".repeat(RECIPE_BYTES_MAX + 1);
    assert!(
        recipe(Format::Yaml, "yaml").refuse(long.as_bytes()).contains("at most 65536 are read")
    );
}

#[test]
fn absurd_configurations_are_refused_by_field() {
    let parser = config();
    let valid = String::from_utf8(parser.valid.clone()).unwrap();
    let mut object: serde_json::Value = serde_json::from_str(&valid).unwrap();
    let refuse = |field: &str, value: serde_json::Value| {
        let mut changed = object.clone();
        changed[field] = value;
        parser.refuse(&text(&changed))
    };
    let layers = refuse("num_hidden_layers", 1_000_000_000.into());
    assert_eq!(layers, "'num_hidden_layers' must be between 1 and 4096, not 1000000000");
    let heads = refuse("num_attention_heads", 0.into());
    assert_eq!(heads, "'num_attention_heads' must be between 1 and 4096, not 0");
    assert!(refuse("model_type", "mamba".into()).contains("mamba"));
    for size in ["hidden_size", "vocab_size", "intermediate_size", "num_key_value_heads"] {
        for value in [0, u64::MAX, 1 << 40] {
            let error = refuse(size, value.into());
            assert!(error.contains(size), "{error}");
        }
    }
    // JSON has no NaN; what writers put instead is no number.
    assert!(refuse("rms_norm_eps", "NaN".into()).contains("rms_norm_eps"));
    assert!(refuse("rms_norm_eps", (-1).into()).contains("eps"));
    object["rope_parameters"] = serde_json::Value::Null;
    object["rope_theta"] = 0.into();
    assert!(parser.refuse(&text(&object)).contains("rope_theta"));
    for number in ["1e-05", "10000.0"] {
        let nan = valid.replace(number, "NaN");
        assert!(nan != valid, "{valid}");
        parser.refuse(nan.as_bytes());
    }
}

#[test]
fn an_index_that_leaves_its_folder_is_refused() {
    let parser = shard_index();
    for file in
        ["../one.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "a/../b", "./a"]
    {
        let index = serde_json::json!({ "weight_map": { "a": file } });
        let error = parser.refuse(&text(&index));
        assert!(error.contains("not a file of its own folder"), "{file}: {error}");
    }
}

#[test]
fn odd_tokenizers_are_refused_or_read() {
    let parser = tokenizer();
    let valid: serde_json::Value = serde_json::from_slice(&parser.valid).unwrap();
    let added = |content: &str, id: u64| {
        serde_json::json!({
            "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        })
    };
    for token in [added("", 270), added("x", u64::from(u32::MAX)), added("x", 1 << 40)] {
        let mut changed = valid.clone();
        changed["added_tokens"].as_array_mut().unwrap().push(token);
        let _ = parser.check(&text(&changed));
    }
    // Merges that go in a circle, and merges of tokens that are not there.
    for merges in [[["a", "b"], ["ab", "a"]], [["zz", "zz"], ["a", "a"]]] {
        let mut changed = valid.clone();
        changed["model"]["merges"] = serde_json::json!(merges);
        let _ = parser.check(&text(&changed));
    }
    let mut changed = valid;
    changed["model"]["vocab"]["far away"] = u32::MAX.into();
    assert!(parser.refuse(&text(&changed)).contains("4294967296 token ids"));
}
