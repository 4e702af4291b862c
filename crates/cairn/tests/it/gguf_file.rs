//! GGUF files made by hand: a small LLaMA with a tokenizer.

use std::path::Path;

use serde_json::Value;

/// A chat template that says who speaks.
pub(crate) const TEMPLATE: &str = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                                   {% if add_generation_prompt %}assistant:{% endif %}";

const WIDTH: u64 = 32;
const INNER: u64 = 64;

/// Types of values, by their numbers in the format.
const U32: u32 = 4;
const F32: u32 = 6;
const TEXT: u32 = 8;
const LIST: u32 = 9;

#[derive(Default)]
struct Writer {
    keys: Vec<Vec<u8>>,
    tensors: Vec<u8>,
    num_tensors: u64,
    data: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Writer {
    fn key(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.keys.push([&text(key), &kind.to_le_bytes()[..], value].concat());
    }

    fn number(&mut self, key: &str, value: u32) {
        self.key(key, U32, &value.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, TEXT, &text(value));
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        let mut list = [&TEXT.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        list.extend(values.iter().flat_map(|value| text(value)));
        self.key(key, LIST, &list);
    }

    /// A tensor of f32, its sizes from the innermost outward; vectors are ones.
    fn tensor(&mut self, name: &str, sizes: &[u64]) {
        self.num_tensors += 1;
        self.tensors.extend(text(name));
        self.tensors.extend(u32::try_from(sizes.len()).unwrap().to_le_bytes());
        self.tensors.extend(sizes.iter().flat_map(|size| size.to_le_bytes()));
        self.tensors.extend(0_u32.to_le_bytes());
        self.tensors.extend((self.data.len() as u64).to_le_bytes());
        let count: u64 = sizes.iter().product();
        let value = |at: u64| match sizes.len() {
            1 => 1.0_f32,
            _ => ((at * 7919 + 13 * self.num_tensors) % 101) as f32 / 400.0 - 0.125,
        };
        let bytes: Vec<u8> = (0..count).flat_map(|at| value(at).to_le_bytes()).collect();
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    fn bytes(self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend(self.num_tensors.to_le_bytes());
        file.extend((self.keys.len() as u64).to_le_bytes());
        file.extend(self.keys.concat());
        file.extend(self.tensors);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(self.data);
        file
    }
}

/// Tokens by id, and merges, of a byte-level `tokenizer.json`.
fn tokenizer_lists(path: &Path) -> (Vec<String>, Vec<String>) {
    let json: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut ids: Vec<(u64, String)> = json["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(token, id)| (id.as_u64().unwrap(), token.clone()))
        .collect();
    for added in json["added_tokens"].as_array().unwrap() {
        let id = added["id"].as_u64().unwrap();
        if ids.iter().all(|(known, _)| *known != id) {
            ids.push((id, added["content"].as_str().unwrap().to_owned()));
        }
    }
    ids.sort();
    let merges = json["model"]["merges"].as_array().unwrap().iter().map(|merge| match merge {
        Value::Array(parts) => {
            format!("{} {}", parts[0].as_str().unwrap(), parts[1].as_str().unwrap())
        }
        other => other.as_str().unwrap().to_owned(),
    });
    (ids.into_iter().map(|(_, token)| token).collect(), merges.collect())
}

/// Writes a LLaMA of one block whose tokenizer is that of a `tokenizer.json`.
pub(crate) fn write_llama(path: &Path, tokenizer: &Path, template: Option<&str>) {
    let (tokens, merges) = tokenizer_lists(tokenizer);
    let mut file = Writer::default();
    file.text("general.architecture", "llama");
    for (key, value) in [
        ("context_length", 128),
        ("embedding_length", 32),
        ("block_count", 1),
        ("feed_forward_length", 64),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("rope.dimension_count", 8),
    ] {
        file.number(&format!("llama.{key}"), value);
    }
    file.key("llama.attention.layer_norm_rms_epsilon", F32, &1e-5_f32.to_le_bytes());
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "gpt-2");
    file.texts("tokenizer.ggml.tokens", &tokens);
    file.texts("tokenizer.ggml.merges", &merges);
    if let Some(template) = template {
        file.text("tokenizer.chat_template", template);
    }
    let vocab = tokens.len() as u64;
    file.tensor("token_embd.weight", &[WIDTH, vocab]);
    file.tensor("output_norm.weight", &[WIDTH]);
    file.tensor("output.weight", &[WIDTH, vocab]);
    for (name, sizes) in [
        ("attn_norm", &[WIDTH][..]),
        ("ffn_norm", &[WIDTH]),
        ("attn_q", &[WIDTH, WIDTH]),
        ("attn_k", &[WIDTH, 16]),
        ("attn_v", &[WIDTH, 16]),
        ("attn_output", &[WIDTH, WIDTH]),
        ("ffn_gate", &[WIDTH, INNER]),
        ("ffn_up", &[WIDTH, INNER]),
        ("ffn_down", &[INNER, WIDTH]),
    ] {
        file.tensor(&format!("blk.0.{name}.weight"), sizes);
    }
    std::fs::write(path, file.bytes()).unwrap();
}
