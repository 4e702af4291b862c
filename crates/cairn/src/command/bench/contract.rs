//! `cairn bench contract`: what a contract fixes, run here and by a peer in turn.

pub(super) mod peer;
mod report;
pub(super) mod side;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use cairn_artifacts::atomic;
use cairn_artifacts::bounded::read_text;
use cairn_eval::contract::{
    Agreement, Contract, Divergence, Even, Evenness, TurnBench, divergence_of, first_divergence,
};
use cairn_kernels::bandwidth::BandwidthMeter;
use cairn_kernels::{Compute, Encoding, Layout};
use cairn_model::head_weight;
use cairn_program::{Class, ValueType};
use clap::{Args, ValueEnum};
use serde_json::json;

use self::peer::Peer;
use self::report::Found;
use self::side::{OwnSide, Speeds};
use super::Output;
use crate::compute_dtype::ComputeDtype;
use crate::context::Context;
use crate::coverage::Coverage;
use crate::failure::UserError;
use crate::model_folder::ModelFolder;
use crate::pack_args::{PackArgs, storage_of};
use crate::progress_line::ProgressLine;
use crate::runs;
use crate::storage::Storage;
use crate::weight_type::WeightType;

/// Bytes of a contract or of its text, at most.
const TEXT_BYTES_MAX: u64 = 1 << 24;
/// Passes of the bandwidth measurement before each turn.
const BANDWIDTH_PASSES: usize = 2;

const EXAMPLES: &str = "\
Examples:
  cairn bench contract contracts/decode_64_256.toml --model models/qwen3
  cairn bench contract contracts/decode_64_256.toml --model models/qwen3 \\
      --against 'llama-server -m qwen3.gguf -t {threads} --port {port}' --report decode.html
  cairn bench contract contracts/prefill_1024_64.toml --model models/qwen3 \\
      --against http://127.0.0.1:8080 --peer-threads 2
  cairn bench contract contracts/decode_64_256_q4.toml --model qwen3.q4.leanpack \\
      --source models/qwen3 \\
      --against 'llama-server -m qwen3.Q4_0.gguf -t {threads} --port {port}'";

/// Run a contract here and by a peer, in turn, and compare
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ContractArgs {
    /// The contract: a `.toml` file
    #[arg(value_name = "CONTRACT")]
    contract: PathBuf,
    /// The model, where the contract names none [default: the last run]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Type of weight matrices in memory, where the contract fixes none
    #[arg(long, value_enum, value_name = "TYPE")]
    dtype: Option<WeightType>,
    /// Arithmetic of products by weight matrices, where the contract fixes none [default: f32]
    #[arg(long, value_enum, value_name = "TYPE")]
    compute_dtype: Option<ComputeDtype>,
    #[command(flatten)]
    pack: PackArgs,
    /// The peer: a command that starts a server of llama.cpp's kind, with {port} and {threads} where
    /// they belong, or the address of one that runs
    #[arg(long, value_name = "COMMAND|URL")]
    against: Option<String>,
    /// Threads of a peer that was started elsewhere
    #[arg(long, value_name = "N", requires = "against")]
    peer_threads: Option<usize>,
    /// The exact model, as stored: how far both sides' distributions are from its own
    #[arg(long, value_name = "DIR", requires = "against")]
    source: Option<PathBuf>,
    /// Another form of the same model, whose tokens have to be equal; may be repeated
    #[arg(long, value_name = "DIR")]
    also: Vec<PathBuf>,
    /// Write a page with the figures and curves to this file
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

/// Measures, compares and prints.
pub(super) fn run(args: &ContractArgs, context: &Context) -> anyhow::Result<()> {
    let text = read_text(&args.contract, TEXT_BYTES_MAX)?;
    let what = || args.contract.display().to_string();
    let contract = Contract::parse(&text).with_context(what)?;
    check_machine(&contract, context)?;
    let model = match (&args.model, &contract.model.path) {
        (Some(_), Some(own)) => {
            return Err(UserError::new(format!("the contract is about {}", own.display()))
                .hint("leave --model out, or write another contract")
                .into());
        }
        (Some(model), None) => runs::model_folder(Some(model))?,
        (None, own) => runs::model_folder(own.as_deref())?,
    };
    if contract.model.even == Even::Quality && args.against.is_some() && args.source.is_none() {
        let problem = "the contract compares how far both sides are from the exact model";
        return Err(UserError::new(problem).hint("say where that is: --source DIR").into());
    }
    let (dtype, compute) = (dtype(args, &contract)?, compute(args, &contract)?);
    let head = head_dtype(&contract, dtype)?;
    let length = contract.prompt.tokens + contract.output.tokens;
    let mut sides = Vec::new();
    for path in std::iter::once(&model).chain(&args.also) {
        let model = args.pack.open(path, context)?;
        let held = match head {
            Some(forms) => stored_so(&model, forms)?,
            None => dtype,
        };
        sides.push(OwnSide::load(model, (held, compute), length, context)?);
    }
    let exact = args.source.as_deref().map(|path| exact(path, (&sides[0], length), context));
    let mut exact = exact.transpose()?;
    let prompt = prompt(&contract, &args.contract, &sides[0])?;
    let bench = TurnBench { prompt, new_tokens: contract.output.tokens };
    let peer = args.against.as_deref().map(|peer| {
        Peer::start(peer, args.peer_threads, contract.machine.threads).context("there is no peer")
    });
    let mut peer = peer.transpose()?;
    let mut found = measure(&contract, &bench, &mut sides, peer.as_mut(), context)?;
    if let Some(peer) = &mut peer {
        compare(&contract, (&bench, &mut sides[0], exact.as_mut()), peer, &mut found)?;
    }
    print(args, (&contract, &text), &found, context)?;
    found.verdict()
}

/// Refuses a machine that the contract is not about.
fn check_machine(contract: &Contract, context: &Context) -> anyhow::Result<()> {
    let machine = &contract.machine;
    if context.threads != machine.threads {
        let (wanted, found) = (machine.threads, context.threads);
        return Err(UserError::new(format!(
            "the contract is about {wanted} threads, this run has {found}"
        ))
        .hint(format!("cairn --threads {wanted} bench contract …"))
        .into());
    }
    let isa = context.isa;
    match &machine.isa {
        Some(wanted) if wanted != isa.name() => {
            Err(UserError::new(format!("the contract is about {wanted}, this machine runs {isa}"))
                .into())
        }
        _ => Ok(()),
    }
}

/// The type of weights: the contract's, or what is asked for where it fixes none.
fn dtype(args: &ContractArgs, contract: &Contract) -> anyhow::Result<WeightType> {
    let fixed = (contract.model.dtype.as_deref(), "dtype");
    Ok(agreed(fixed, args.dtype, "--dtype")?.unwrap_or(WeightType::AUTO))
}

/// The encodings of matrices and head, where the contract fixes one for the head.
fn head_dtype(
    contract: &Contract,
    dtype: WeightType,
) -> anyhow::Result<Option<(Encoding, Encoding)>> {
    let fixed = (contract.model.head_dtype.as_deref(), "head_dtype");
    let Some(head) = agreed::<WeightType>(fixed, None, "")? else { return Ok(None) };
    match (dtype.0, head.0) {
        (Some(matrices), Some(head)) => Ok(Some((matrices, head))),
        _ => Err(UserError::new("model.head_dtype and model.dtype are types, both or none").into()),
    }
}

/// Checks that a pack holds matrices and head as they are asked for; it is run as it is stored then.
fn stored_so(
    model: &ModelFolder,
    (matrices, head): (Encoding, Encoding),
) -> anyhow::Result<WeightType> {
    let own = head_weight(&model.spec).map(|name| (name.to_owned(), head));
    let asked = Storage { encoding: matrices, own: own.into_iter().collect() };
    let forms = |storage: &Storage| -> anyhow::Result<Vec<ValueType>> {
        let program = storage.program(&model.spec, Layout::Panel)?;
        Ok(program.of_class(Class::Weight).map(|(_, weight)| weight.value_type).collect())
    };
    let is_so = match model.pack() {
        Some(pack) => forms(&storage_of(pack))? == forms(&asked)?,
        None => false,
    };
    if is_so {
        return Ok(WeightType::AUTO);
    }
    let path = model.path.display();
    Err(UserError::new(format!("{path} is no pack of {matrices} with a head of {head}"))
        .hint(format!(
            "make one: cairn pack MODEL --encoding {matrices} --head-encoding {head} \
             -o FILE.leanpack"
        ))
        .into())
}

/// The arithmetic: the contract's, or what is asked for where it fixes none.
fn compute(args: &ContractArgs, contract: &Contract) -> anyhow::Result<Compute> {
    let fixed = (contract.model.compute_dtype.as_deref(), "compute_dtype");
    let agreed = agreed(fixed, args.compute_dtype, "--compute-dtype")?;
    Ok(agreed.map_or(Compute::F32, ComputeDtype::compute))
}

/// What a contract fixes under a key of its model, or a flag asks for; both at once have to agree.
fn agreed<T: ValueEnum + PartialEq>(
    (fixed, key): (Option<&str>, &str),
    asked: Option<T>,
    flag: &str,
) -> anyhow::Result<Option<T>> {
    let fixed = fixed.map(|name| {
        T::from_str(name, false)
            .map_err(|_| UserError::new(format!("model.{key} is {name:?}, which is none")))
    });
    match (fixed.transpose()?, asked) {
        (Some(fixed), Some(asked)) if fixed != asked => {
            Err(UserError::new(format!("the contract fixes another model.{key}"))
                .hint(format!("leave {flag} out, or write another contract"))
                .into())
        }
        (fixed, asked) => Ok(fixed.or(asked)),
    }
}

/// The exact prompt, in the model's own tokens.
fn prompt(contract: &Contract, path: &Path, side: &OwnSide) -> anyhow::Result<Vec<u32>> {
    let text = read_text(&contract.text_path(path), TEXT_BYTES_MAX)?;
    let ids = side.model.text_tokenizer()?.encode(&text)?;
    Ok(contract.prompt_of(path, &ids)?)
}

/// Runs all sides in turn.
fn measure(
    contract: &Contract,
    bench: &TurnBench,
    sides: &mut [OwnSide],
    mut peer: Option<&mut Peer>,
    context: &Context,
) -> anyhow::Result<Found> {
    let repetitions = contract.measure.repetitions;
    let mut meter = BandwidthMeter::new(sides[0].engine.session().cpu())
        .context("no memory to measure the bandwidth with")?;
    let mut own: Vec<Speeds> = sides.iter().map(|side| Speeds::of(&side.name)).collect();
    let mut other = peer.as_ref().map(|peer| Speeds::of(&peer.name));
    let mut line = ProgressLine::new(context.terminal, "Measuring");
    // One turn of everybody that does not count: pages and caches are warm then.
    for turn in 0..=repetitions {
        let counts = turn != 0;
        let share = turn as f64 / (repetitions + 1) as f64;
        line.update(share, || format!("turn {turn} of {repetitions}: here"));
        for (side, speeds) in sides.iter_mut().zip(&mut own) {
            (0..BANDWIDTH_PASSES).for_each(|_| _ = meter.pass(side.engine.session().cpu()));
            let done = bench.run(&mut side.engine)?;
            speeds.push(done, bench.prompt.len(), counts);
        }
        if let (Some(peer), Some(speeds)) = (peer.as_deref_mut(), &mut other) {
            line.update(share, || format!("turn {turn} of {repetitions}: the peer"));
            let done = peer.turn(bench)?;
            speeds.push(done, bench.prompt.len(), counts);
        }
    }
    line.finish();
    for speeds in &own[1..] {
        if let Some(at) = first_divergence(own[0].tokens(), speeds.tokens()) {
            let names = (&own[0].name, &speeds.name);
            let message = format!("{} and {} part at new token {at}", names.0, names.1);
            return Err(UserError::new(message).hint("they are not the same model").into());
        }
    }
    let mut found = Found::new(contract, meter.bandwidth(), own);
    found.bytes_per_token = bench.bytes_per_token(&sides[0].engine);
    found.coverage = Coverage::measured(&mut sides[0].engine, context.isa)?;
    found.own_bytes = sides[0].engine.session().bytes().total() as u64;
    found.own_start_s = sides[0].start_seconds(&bench.prompt, context)?;
    found.peer = other;
    if let Some(peer) = peer {
        found.peer_bytes = peer.resident_bytes();
        found.peer_start_s = peer.start_s;
    }
    Ok(found)
}

/// The model that ours was before it was rounded.
fn exact(
    path: &Path,
    (side, length): (&OwnSide, usize),
    context: &Context,
) -> anyhow::Result<OwnSide> {
    let model = ModelFolder::open(&runs::model_folder(Some(path))?, context.terminal)?;
    let exact = OwnSide::load(model, (WeightType::AUTO, Compute::F32), length, context)?;
    exact.check_exact(side)?;
    Ok(exact)
}

/// What both sides said and whether they ran the same.
fn compare(
    contract: &Contract,
    (bench, side, exact): (&TurnBench, &mut OwnSide, Option<&mut OwnSide>),
    peer: &mut Peer,
    found: &mut Found,
) -> anyhow::Result<()> {
    let Some(theirs) = &found.peer else { return Ok(()) };
    let tokens = (found.own[0].tokens(), theirs.tokens());
    let ran = (side.ran(bench, tokens.0), peer.ran());
    found.agreement = agreement(contract, (bench, side, exact), peer, tokens)?;
    found.evenness = Evenness::of(contract, (&ran.0, &ran.1), &found.agreement);
    Ok(())
}

/// Where the tokens part, how close it was, and how far apart the distributions are.
fn agreement(
    contract: &Contract,
    (bench, side, mut exact): (&TurnBench, &mut OwnSide, Option<&mut OwnSide>),
    peer: &mut Peer,
    (ours, theirs): (&[u32], &[u32]),
) -> anyhow::Result<Agreement> {
    let before = |at: usize| [&bench.prompt, &ours[..at]].concat();
    let mut found = Agreement::default();
    if let Some(position) = first_divergence(ours, theirs)
        && let (Some(&own), Some(&other)) = (ours.get(position), theirs.get(position))
    {
        let logprobs = side.engine.next_logprobs(&before(position))?;
        let margin = f64::from(logprobs[own as usize]) - f64::from(logprobs[other as usize]);
        found.divergence = Some(Divergence { position, ours: own, theirs: other, margin });
    }
    let count = contract.measure.kl_positions.min(ours.len());
    for index in 0..count {
        let position = index * ours.len() / count;
        let text = before(position);
        let own = side.engine.next_logprobs(&text)?;
        let other = peer.next_logprobs(&text, own.len())?;
        found.kl_positions.push(position);
        found.kl.push(divergence_of(&own, &other));
        if let Some(exact) = &mut exact {
            let exact = exact.engine.next_logprobs(&text)?;
            let kl = found.source_kl.get_or_insert_default();
            kl.ours.push(divergence_of(&exact, &own));
            kl.theirs.push(divergence_of(&exact, &other));
        }
    }
    Ok(found)
}

/// Prints and writes what was found.
fn print(
    args: &ContractArgs,
    (contract, text): (&Contract, &str),
    found: &Found,
    context: &Context,
) -> anyhow::Result<()> {
    if let Some(path) = &args.report {
        atomic::write_bytes(path, found.html(contract, text).as_bytes())?;
        context.terminal.step("Report", path.display());
    }
    let settings = json!({
        "contract": contract,
        "against": args.against,
        "also": args.also,
        "source": args.source,
        "compute": compute(args, contract)?,
    });
    let figures = serde_json::to_value(found)?;
    super::print(&args.output, ("contract", settings, figures), found.text(contract), context)
}
