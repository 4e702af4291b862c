//! What holds for every family: saving gives the file back, a batch computes what its rows compute
//! alone, narrower weights stay within their bound, and every weight learns.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use cairn_artifacts::safetensors::{self, SafetensorsFile, WeightFolder};
use cairn_kernels::{Cpu, Encoding, Isa};
use cairn_model::{BuildOptions, Head, LoadError, WeightReader, build_program, load_weights};
use cairn_model::{TensorMap, out_tensors};
use cairn_program::{
    Class, Feed, KvPlacement, Loss, MemoryPlan, Program, ProgramId, Run, Session, SessionProgram,
    Sizes, differentiate,
};
use cairn_spec::model::Mlp;
use cairn_spec::{Hint, ModelSpec};

use crate::goldens::{Tensors, folder, folders, positions, slots, spec, tokens};

const PROGRAM: ProgramId = ProgramId(0);

pub(crate) fn loaded(program: Program, spec: &ModelSpec, sizes: Sizes, source: &Path) -> Session {
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::new(Isa::best(), 2)).unwrap();
    load_weights(&mut session, spec, &WeightFolder::open(source).unwrap()).unwrap();
    session
}

/// Logits of rows of ids, laid end to end.
pub(crate) fn logits(
    spec: &ModelSpec,
    encoding: Encoding,
    source: &Path,
    rows: &[&[u32]],
) -> Vec<f32> {
    let length = rows[0].len();
    let options = BuildOptions { encoding, ..BuildOptions::new(Head::Logits) };
    let program = build_program(spec, &options).unwrap();
    let sizes = Sizes::dense(rows.len() * length, rows.len());
    let mut session = loaded(program, spec, sizes, source);
    let ids: Vec<u32> = rows.concat();
    let positions = positions(rows.len(), length);
    let feeds = [Feed::u32("ids", &ids), Feed::u32("positions", &positions)];
    session.run(PROGRAM, &Run::forward(&feeds, &slots(rows.len(), length))).unwrap();
    session.output(PROGRAM, "logits").to_vec()
}

/// The two rows of a golden folder.
pub(crate) fn golden_rows(name: &str) -> [Vec<u32>; 2] {
    let golden = SafetensorsFile::open(&folder(name).join("golden.safetensors")).unwrap();
    let (shape, ids) = tokens(&golden, "input_ids");
    let (first, second) = ids.split_at(shape[1]);
    [first.to_vec(), second[..shape[1]].to_vec()]
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_batch_computes_what_its_rows_compute_alone() {
    for (name, encoding) in folders()
        .into_iter()
        .flat_map(|name| Encoding::ALL.map(|encoding| (name.clone(), encoding)))
    {
        let (spec, [first, second]) = (spec(&name), golden_rows(&name));
        let run = |rows: &[&[u32]]| logits(&spec, encoding, &folder(&name), rows);
        let together = run(&[&first, &second]);
        let mut alone = run(&[&first]);
        alone.extend(run(&[&second]));
        assert!(bits(&together) == bits(&alone), "{name} {encoding}");
    }
}

/// Every tensor of a folder by name: shape and bits.
fn contents(source: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u32>)> {
    let folder = WeightFolder::open(source).unwrap();
    let read = |tensor: safetensors::TensorView<'_>| {
        let value = (tensor.shape.to_vec(), bits(&tensor.to_f32().unwrap()));
        (tensor.name.to_owned(), value)
    };
    folder.tensors().map(read).collect()
}

/// Saves the weights of a session, in shards of at most `shard_bytes_max`.
fn save(session: &Session, spec: &ModelSpec, target: &Path, shard_bytes_max: usize) {
    let tensors = out_tensors(session, spec, "");
    safetensors::write_sharded(tensors, shard_bytes_max, |name, contents| match contents {
        safetensors::Contents::Tensors(tensors) => {
            let mut file = File::create(target.join(name))?;
            safetensors::write(&mut file, tensors, &BTreeMap::new()).map(|_| ())
        }
        safetensors::Contents::Index(index) => std::fs::write(target.join(name), index.to_string()),
    })
    .unwrap();
}

#[test]
fn saving_gives_the_file_back_and_any_sharding_the_same_logits() {
    for name in folders() {
        let (spec, rows) = (spec(&name), golden_rows(&name));
        let program = build_program(&spec, &BuildOptions::new(Head::Logits)).unwrap();
        let session = loaded(program, &spec, Sizes::dense(1, 1), &folder(&name));
        let expected = logits(&spec, Encoding::F32, &folder(&name), &[&rows[0]]);
        for shard_bytes_max in [usize::MAX, 40_000] {
            let target = tempfile::tempdir().unwrap();
            save(&session, &spec, target.path(), shard_bytes_max);
            assert!(contents(target.path()) == contents(&folder(&name)), "{name}");
            let again = logits(&spec, Encoding::F32, target.path(), &[&rows[0]]);
            assert!(bits(&again) == bits(&expected), "{name} in shards of {shard_bytes_max}");
        }
    }
}

/// Loss of the next token over one row, as a function of the weights in a session.
fn loss(session: &mut Session, ids: &[u32]) -> f64 {
    let targets: Vec<u32> = ids.iter().cycle().skip(1).take(ids.len()).copied().collect();
    let weights = vec![1.0 / ids.len() as f32; ids.len()];
    let positions = positions(1, ids.len());
    let feeds = [
        Feed::u32("ids", ids),
        Feed::u32("positions", &positions),
        Feed::u32("targets", &targets),
        Feed::f32("loss_weights", &weights),
    ];
    let sequences = slots(1, ids.len());
    let run = Run { row_tokens: ids.len(), ..Run::forward(&feeds, &sequences) };
    session.run(PROGRAM, &run).unwrap();
    let logprob = session.output(PROGRAM, "logprob");
    -logprob.iter().map(|&x| f64::from(x)).sum::<f64>() / ids.len() as f64
}

#[test]
fn every_weight_learns_and_its_gradient_is_a_slope() {
    for name in folders() {
        let (spec, [ids, _]) = (spec(&name), golden_rows(&name));
        if matches!(spec.mlp, Mlp::Moe(_)) {
            // Experts that no token goes to learn nothing; they have tests of their own.
            continue;
        }
        let forward = build_program(&spec, &BuildOptions::new(Head::TokenLogprob)).unwrap();
        let weights: Vec<String> =
            forward.of_class(Class::Weight).map(|(_, weight)| weight.name.clone()).collect();
        let trainable = weights.iter().cloned().collect();
        let training = differentiate(&forward, &trainable, &Loss::CrossEntropy).unwrap();
        let mut session = loaded(training, &spec, Sizes::dense(ids.len(), 1), &folder(&name));
        loss(&mut session, &ids);
        // Steps along the gradient of each weight, all of the same length.
        let mut slope = 0.0;
        let mut directions = Vec::new();
        for weight in &weights {
            let gradient = session.stored_f32(&format!("grad.{weight}")).unwrap();
            let square: f64 = gradient.iter().map(|&g| f64::from(g) * f64::from(g)).sum();
            let norm = square.sqrt();
            assert!(norm > 0.0 && norm.is_finite(), "{name}: {weight} has gradient {norm}");
            slope += norm;
            directions.push(gradient.iter().map(|&g| f64::from(g) / norm).collect::<Vec<f64>>());
        }
        let step = 2e-3 / (weights.len() as f64).sqrt();
        let losses = [step, -2.0 * step].map(|step| {
            for (weight, direction) in weights.iter().zip(&directions) {
                let values = session.stored_f32_mut(weight).unwrap();
                for (value, d) in values.iter_mut().zip(direction) {
                    #[expect(clippy::cast_possible_truncation, reason = "weights are f32")]
                    let moved = (f64::from(*value) + step * d) as f32;
                    *value = moved;
                }
            }
            loss(&mut session, &ids)
        });
        let difference = (losses[0] - losses[1]) / (2.0 * step);
        let error = (difference - slope).abs() / slope;
        assert!(error < 0.02, "{name}: slope {slope}, difference {difference}");
    }
}

pub(crate) fn source_of(name: &str) -> Tensors {
    let folder = WeightFolder::open(&folder(name)).unwrap();
    let read = |tensor: safetensors::TensorView<'_>| {
        (tensor.name.to_owned(), (tensor.shape.to_vec(), tensor.to_f32().unwrap()))
    };
    Tensors(folder.tensors().map(read).collect())
}

fn load(name: &str, source: &Tensors) -> Result<Session, LoadError> {
    let spec = spec(name);
    let program = build_program(&spec, &BuildOptions::new(Head::Logits)).unwrap();
    let sizes = Sizes::dense(1, 1);
    let program = SessionProgram { program, sizes, kv: KvPlacement::Arena };
    let plan = MemoryPlan::new(vec![program], None).unwrap();
    let mut session = Session::new(plan, Cpu::new(Isa::best(), 1)).unwrap();
    load_weights(&mut session, &spec, source).map(|()| session)
}

#[test]
fn missing_extra_and_misshaped_tensors_are_listed_by_name() {
    let mut source = source_of("phi3");
    let qkv = source.0.remove("model.layers.1.self_attn.qkv_proj.weight").unwrap();
    source.0.insert("model.layers.1.self_attn.q_proj.weight".to_owned(), qkv);
    source.0.get_mut("model.norm.weight").unwrap().0 = vec![16, 2];
    let Err(LoadError::Mismatch { problems }) = load("phi3", &source) else {
        panic!("the tensors do not fit")
    };
    assert_eq!(
        problems,
        [
            "model.layers.1.self_attn.qkv_proj.weight [64, 32] is missing",
            "model.norm.weight is [16, 2], expected [32]",
            "model.layers.1.self_attn.q_proj.weight is there instead",
        ]
    );
    let mut source = source_of("bert");
    source.0.insert("bert.encoder.layer.9.output.dense.bias".to_owned(), (vec![1], vec![0.0]));
    let Err(LoadError::Mismatch { problems }) = load("bert", &source) else {
        panic!("the tensors do not fit")
    };
    assert_eq!(problems, ["bert.encoder.layer.9.output.dense.bias has no place in the model"]);
}

#[test]
fn a_long_list_of_tensors_is_cut() {
    let empty = Tensors(BTreeMap::new());
    let Err(error) = load("llama", &empty) else { panic!("there is no tensor") };
    let text = error.to_string();
    assert_eq!(text.lines().count(), 12, "{text}");
    assert!(text.starts_with("the tensors do not fit the configuration:\n  model.embed_tokens"));
    assert!(text.ends_with("\n  and 20 more"), "{text}");
    let Err(LoadError::Mismatch { problems }) = load("llama", &empty) else { panic!("{text}") };
    assert_eq!(problems.len(), 30);
}

#[test]
fn a_second_head_of_a_tied_model_must_be_the_embedding() {
    for (name, embedding, head) in [
        ("gpt2", "transformer.wte.weight", "lm_head.weight"),
        ("gpt_neox_serial", "gpt_neox.embed_in.weight", "embed_out.weight"),
        ("gemma2", "model.embed_tokens.weight", "lm_head.weight"),
        ("bert", "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ] {
        assert!(spec(name).tie_word_embeddings, "{name}");
        let mut source = source_of(name);
        let (shape, values) = source.0[embedding].clone();
        source.0.insert(head.to_owned(), (shape.clone(), values.clone()));
        load(name, &source).unwrap();

        let mut other = values.clone();
        other[37] = 0.25;
        source.0.insert(head.to_owned(), (shape, other));
        let Err(error) = load(name, &source) else { panic!("{name}: two heads") };
        let was = values[37];
        let expected = format!(
            "{head} must be the same as {embedding}, but its element 37 is 0.25 instead of {was}"
        );
        assert_eq!(error.to_string(), expected);
        let hints = error.hints();
        assert!(hints[0].ends_with("set tie_word_embeddings to false in config.json"));
        assert_eq!(hints[1], format!("if {embedding} is meant, remove {head} from the file"));
        assert_eq!(WeightReader::new(&spec(name), &source).err(), Some(error));

        source.0.insert(head.to_owned(), (vec![2, 2], vec![0.0; 4]));
        let Err(LoadError::Mismatch { problems }) = load(name, &source) else { panic!("{name}") };
        assert!(problems[0].starts_with(&format!("{head} is [2, 2], expected [")), "{problems:?}");

        // A head alone is not taken for the embedding.
        source.0.insert(head.to_owned(), source_of(name).0.remove(embedding).unwrap());
        source.0.remove(embedding);
        let Err(LoadError::Mismatch { problems }) = load(name, &source) else { panic!("{name}") };
        assert!(problems[0].starts_with(embedding) && problems[0].ends_with(" is missing"));
        assert_eq!(problems[1], format!("{head} is there instead"));
    }
}

#[test]
fn a_second_bias_of_a_head_must_be_the_first() {
    let mut source = source_of("bert");
    let (shape, mut values) = source.0["cls.predictions.bias"].clone();
    let copy = "cls.predictions.decoder.bias";
    source.0.insert(copy.to_owned(), (shape.clone(), values.clone()));
    load("bert", &source).unwrap();
    *values.last_mut().unwrap() += 1.0;
    source.0.insert(copy.to_owned(), (shape, values));
    let Err(error) = load("bert", &source) else { panic!("two biases") };
    assert!(matches!(&error, LoadError::Copy { copy: named, .. } if named == copy), "{error}");
}

#[test]
fn older_spellings_and_leftovers_load() {
    let mut source = source_of("bert");
    let names: Vec<String> = source.0.keys().cloned().collect();
    for name in names {
        let older = name.replace("LayerNorm.weight", "LayerNorm.gamma");
        let older = older.replace("LayerNorm.bias", "LayerNorm.beta").replace("bert.", "");
        let tensor = source.0.remove(&name).unwrap();
        source.0.insert(older, tensor);
    }
    let embedding = source.0["embeddings.word_embeddings.weight"].clone();
    source.0.insert("cls.predictions.decoder.weight".to_owned(), embedding);
    source.0.insert("pooler.dense.bias".to_owned(), (vec![1], vec![0.0]));
    let session = load("bert", &source).unwrap();
    let norm = session.stored_f32("model.layers.2.post_feedforward_layernorm.bias").unwrap();
    let golden = SafetensorsFile::open(&folder("bert").join("model.safetensors")).unwrap();
    let expected = golden.tensor("bert.encoder.layer.2.output.LayerNorm.bias").unwrap();
    assert_eq!(norm, expected.to_f32().unwrap());
}

#[test]
fn heads_are_those_of_the_configuration() {
    // What shapes alone suggest, 64 per head, is wrong for one of the two in each pair.
    for (config, heads, kv_heads, head_dim) in [
        (
            r#"{"model_type": "gpt2", "vocab_size": 64, "n_embd": 768, "n_layer": 1, "n_head": 12,
             "n_positions": 8}"#,
            12,
            12,
            64,
        ),
        (
            r#"{"model_type": "gpt2", "vocab_size": 64, "n_embd": 1600, "n_layer": 1, "n_head": 25,
             "n_positions": 8}"#,
            25,
            25,
            64,
        ),
        (
            r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 2048, "num_hidden_layers": 1,
             "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 64,
             "max_position_embeddings": 8}"#,
            32,
            4,
            64,
        ),
        (
            r#"{"model_type": "llama", "vocab_size": 64, "hidden_size": 2048, "num_hidden_layers": 1,
             "num_attention_heads": 16, "num_key_value_heads": 2, "intermediate_size": 64,
             "max_position_embeddings": 8}"#,
            16,
            2,
            128,
        ),
    ] {
        let spec = ModelSpec::from_hf_json(config).unwrap();
        let program = build_program(&spec, &BuildOptions::new(Head::Logits)).unwrap();
        let dims = |name: &str| -> Vec<usize> {
            let id = program.find(name).unwrap();
            program.value(id).shape.0.iter().filter_map(|dim| dim.size).collect()
        };
        assert_eq!(dims("0.attn.q"), [heads, head_dim]);
        assert_eq!(dims("0.attn.k"), [kv_heads, head_dim]);
    }
}

#[test]
fn a_body_alone_ends_in_hidden_states() {
    let text = std::fs::read_to_string(folder("bert").join("config.json")).unwrap();
    let spec = ModelSpec::from_hf_json(&text.replace("BertForMaskedLM", "BertModel")).unwrap();
    assert!(build_program(&spec, &BuildOptions::new(Head::Logits)).is_err());
    build_program(&spec, &BuildOptions::new(Head::Hidden)).unwrap();
    let map = TensorMap::new(&spec);
    assert!(map.tensors().iter().all(|(name, _)| !name.starts_with("cls.")));
}
