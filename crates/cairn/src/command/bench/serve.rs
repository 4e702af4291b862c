//! `cairn bench serve`: what servers do under load, beside each other.

use anyhow::Context as _;
use cairn_artifacts::bounded::{TEXT_BYTES_MAX, read_text};
use cairn_eval::median;
use clap::Args;
use clap::builder::RangedU64ValueParser;
use serde_json::{Value, json};

use super::Output;
use crate::context::Context;
use crate::failure::UserError;
use crate::load::{Answered, Arrivals, Load, Loaded, percentile, uniform};
use crate::progress_line::ProgressLine;
use crate::table::Table;

const EXAMPLES: &str = "\
Examples:
  cairn bench serve --url http://127.0.0.1:8000 --clients 1,4,16
  cairn bench serve --url http://127.0.0.1:8000 --against http://127.0.0.1:8080 --rounds 5
  cairn bench serve --url http://127.0.0.1:8000 --rate 2 --requests 100 --goodput-ttft 500";

/// Text that prompts are cut from, where no other is given.
const PROSE: &str = include_str!("../../../../../contracts/text/prose.txt");
/// Spread of the lengths of prompts: the logarithm's standard deviation.
const LENGTH_SIGMA: f64 = 0.5;

/// Measure a server under load: tokens a second, and how long clients wait
///
/// Any server that speaks the completions that `/v1/completions` is known for. Prompts are cut from a text
/// at random places, their lengths log-normal; answers are greedy and of equal length. With --against, two
/// servers are asked in turns.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ServeArgs {
    /// The server's address
    #[arg(long, value_name = "URL")]
    url: String,
    /// Another server to be asked in turns
    #[arg(long, value_name = "URL")]
    against: Option<String>,
    /// File with the key to send to both
    #[arg(long, value_name = "FILE")]
    api_key: Option<std::path::PathBuf>,
    /// Clients at once, each waiting for its answers; several numbers are measured one after the other
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16],
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1024))]
    clients: Vec<usize>,
    /// Requests a second at random times instead, whether or not others are answered
    #[arg(long, value_name = "X", conflicts_with = "clients")]
    rate: Option<f64>,
    /// Requests of each measurement [default: 4 a client, 64 at a rate]
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    /// Measurements of each
    #[arg(long, value_name = "N", default_value_t = 1,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=1000))]
    rounds: usize,
    /// Characters of a prompt, in the median
    #[arg(long, value_name = "N", default_value_t = 600)]
    prompt_chars: usize,
    /// Characters that all prompts begin with alike
    #[arg(long, value_name = "N", default_value_t = 0)]
    shared_chars: usize,
    /// New tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_tokens: usize,
    /// File to cut prompts from [default: an essay that comes with Cairn]
    #[arg(long, value_name = "FILE")]
    text: Option<std::path::PathBuf>,
    /// Milliseconds to the first token within which an answer counts as good
    #[arg(long, value_name = "MS")]
    goodput_ttft: Option<f64>,
    /// Milliseconds between tokens, in the mean, within which an answer counts as good
    #[arg(long, value_name = "MS")]
    goodput_itl: Option<f64>,
    /// Keys places, lengths and times
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    output: Output,
}

/// What one load on one server has given.
#[derive(Clone, Debug, serde::Serialize)]
struct Figures {
    answered: usize,
    failed: usize,
    /// Why the first that failed did.
    failure: Option<String>,
    prompt_tokens: usize,
    new_tokens: usize,
    seconds: f64,
    new_tokens_per_s: f64,
    /// Events that brought text, in a second: a token each, unless the server puts several into one.
    events_per_s: f64,
    /// Share of this machine's processors that asking and reading took.
    generator_share: Option<f64>,
    requests_per_s: f64,
    /// Answers a second that were good.
    goodput_per_s: f64,
    /// Seconds at 50, 90 and 99 of 100.
    ttft_s: [f64; 3],
    itl_s: [f64; 3],
    e2e_s: [f64; 3],
}

/// Measures and prints.
pub(super) fn run(args: &ServeArgs, context: &Context) -> anyhow::Result<()> {
    let text = match &args.text {
        Some(path) => read_text(path, TEXT_BYTES_MAX)?,
        None => PROSE.to_owned(),
    };
    let key = args.api_key.as_ref().map(|path| read_text(path, 4096)).transpose()?;
    let key = key.map(|key| key.trim().to_owned());
    if args.rate.is_some_and(|rate| rate.is_nan() || rate <= 0.0) {
        return Err(UserError::new("--rate is not above 0").into());
    }
    let levels: Vec<Arrivals> = match args.rate {
        Some(rate) => vec![Arrivals::Open { rate, seed: args.seed }],
        None => args.clients.iter().map(|&clients| Arrivals::Closed { clients }).collect(),
    };
    let mut sides = Vec::new();
    for url in [Some(&args.url), args.against.as_ref()].into_iter().flatten() {
        let url = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        let model = model_of(&url, key.as_deref())?;
        sides.push((url, model));
    }
    let mut line = ProgressLine::new(context.terminal, "Asking");
    let total = args.rounds * levels.len() * sides.len();
    let mut measured = vec![vec![Vec::new(); sides.len()]; levels.len()];
    let mut done = 0;
    for round in 0..args.rounds {
        for (level, &arrivals) in levels.iter().enumerate() {
            for (side, (url, model)) in sides.iter().enumerate() {
                line.update(done as f64 / total as f64, || format!("{done} of {total}"));
                // Other prompts in each round, the same for both sides.
                let seed = args.seed + (round * levels.len() + level) as u64;
                let load = Load {
                    url: url.clone(),
                    key: key.clone(),
                    model: model.clone(),
                    prompts: prompts(args, arrivals, &text, seed)?,
                    max_tokens: args.max_tokens,
                    arrivals,
                };
                measured[level][side].push(figures(args, load.run())?);
                done += 1;
            }
        }
    }
    line.finish();
    let settings = json!({
        "sides": sides.iter().map(|(url, model)| json!({ "url": url, "model": model })).collect::<Value>(),
        "clients": args.rate.is_none().then_some(&args.clients),
        "rate": args.rate,
        "rounds": args.rounds,
        "prompt_chars": args.prompt_chars,
        "shared_chars": args.shared_chars,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
    });
    let text = text_of(&levels, &measured);
    let failures = measured.iter().flatten().flatten().filter_map(|found| found.failure.as_ref());
    if let Some(first) = failures.into_iter().next() {
        context.terminal.warn(format_args!("not all was answered: {first}"));
    }
    super::print(&args.output, ("serve", settings, json!({ "levels": measured })), text, context)
}

/// What a server calls its model.
fn model_of(url: &str, key: Option<&str>) -> anyhow::Result<String> {
    let mut request = ureq::get(&format!("{url}/v1/models"));
    if let Some(key) = key {
        request = request.header("authorization", &format!("Bearer {key}"));
    }
    let answer = request.call().map_err(|error| {
        UserError::new(format!("{url} does not say which model it serves: {error}"))
            .hint("start a server first: cairn serve --model MODEL")
    })?;
    let text = answer.into_body().read_to_string().context("cannot read the list of models")?;
    let models: Value = serde_json::from_str(&text).context("the list of models is no JSON")?;
    let name = models["data"][0]["id"].as_str();
    Ok(name.with_context(|| format!("{url} serves no model"))?.to_owned())
}

/// Pieces of the text from random places, all with the same beginning where that is wanted.
fn prompts(
    args: &ServeArgs,
    arrivals: Arrivals,
    text: &str,
    seed: u64,
) -> anyhow::Result<Vec<String>> {
    let count = args.requests.unwrap_or(match arrivals {
        Arrivals::Closed { clients } => 4 * clients,
        Arrivals::Open { .. } => 64,
    });
    let characters: Vec<char> = text.chars().collect();
    let longest = characters.len() / 2;
    if longest < args.prompt_chars.max(args.shared_chars) {
        let message = format!("the text has {} characters", characters.len());
        let hint = "give a longer --text, or shorter --prompt-chars and --shared-chars";
        return Err(UserError::new(message).hint(hint).into());
    }
    let shared: String = characters[..args.shared_chars].iter().collect();
    let prompt = |index: usize| {
        let random = |which: u64| uniform(seed, 4 * index as u64 + which);
        // Box and Muller's way to a normal number.
        let angle = std::f64::consts::TAU * random(1);
        let normal = (-2.0 * random(0).ln()).sqrt() * angle.cos();
        let length = args.prompt_chars as f64 * (LENGTH_SIGMA * normal).exp();
        let place = random(2) * (characters.len() - longest) as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "in range")]
        let (length, place) = (length.clamp(1.0, longest as f64) as usize, place as usize);
        let own: String = characters[place..place + length].iter().collect();
        format!("{shared}{own}")
    };
    Ok((0..count).map(prompt).collect())
}

fn figures(args: &ServeArgs, loaded: Loaded) -> anyhow::Result<Figures> {
    let Loaded { seconds, cpu_s, answered, failed } = loaded;
    if answered.is_empty() {
        let reason = failed.first().map_or("nothing was asked", String::as_str);
        return Err(UserError::new(format!("no request was answered: {reason}")).into());
    }
    let sorted = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        [0.5, 0.9, 0.99].map(|share| percentile(&values, share))
    };
    let num_new: usize = answered.iter().map(|answer| answer.num_new).sum();
    // Whatever events the tokens came in.
    let mean = |answer: &Answered| {
        (answer.total_s - answer.first_s) / answer.num_new.saturating_sub(1).max(1) as f64
    };
    let within = |limit: Option<f64>, s: f64| limit.is_none_or(|limit| s * 1e3 <= limit);
    let good = answered.iter().filter(|answer| {
        within(args.goodput_ttft, answer.first_s) && within(args.goodput_itl, mean(answer))
    });
    let good = good.count() as f64;
    Ok(Figures {
        answered: answered.len(),
        failed: failed.len(),
        failure: failed.into_iter().next(),
        prompt_tokens: answered.iter().map(|answer| answer.num_prompt).sum(),
        new_tokens: num_new,
        seconds,
        new_tokens_per_s: num_new as f64 / seconds,
        events_per_s: answered.iter().map(|answer| answer.num_events).sum::<usize>() as f64
            / seconds,
        generator_share: cpu_s.map(|cpu_s| cpu_s / (seconds * num_processors())),
        requests_per_s: answered.len() as f64 / seconds,
        goodput_per_s: good / seconds,
        ttft_s: sorted(answered.iter().map(|answer| answer.first_s).collect()),
        itl_s: sorted(answered.iter().flat_map(|answer| answer.between_s.clone()).collect()),
        e2e_s: sorted(answered.iter().map(|answer| answer.total_s).collect()),
    })
}

/// Processors of this machine.
fn num_processors() -> f64 {
    std::thread::available_parallelism().map_or(1, usize::from) as f64
}

fn text_of(levels: &[Arrivals], measured: &[Vec<Vec<Figures>>]) -> String {
    let head = [
        "load",
        "server",
        "answers",
        "failed",
        "tokens/s",
        "events/s",
        "asking takes",
        "of the other",
        "good/s",
        "TTFT ms 50 90 99 %",
        "ITL ms 50 90 99 %",
    ];
    let mut table = Table::new(&head).with_text_columns(2);
    for (arrivals, sides) in levels.iter().zip(measured) {
        let of = |side: usize, what: fn(&Figures) -> f64| {
            median(sides[side].iter().map(what)).unwrap_or(0.0)
        };
        for side in 0..sides.len() {
            let load = match arrivals {
                Arrivals::Closed { clients } => format!("{clients} clients"),
                Arrivals::Open { rate, .. } => format!("{rate}/s"),
            };
            let speed = of(side, |found| found.new_tokens_per_s);
            let other = (sides.len() == 2).then(|| of(1 - side, |found| found.new_tokens_per_s));
            let ms = |what: fn(&Figures) -> [f64; 3]| {
                let at = |index: usize| {
                    let values = sides[side].iter().map(|found| 1e3 * what(found)[index]);
                    format!("{:.0}", median(values).unwrap_or(0.0))
                };
                [at(0), at(1), at(2)].join(" ")
            };
            let count = |what: fn(&Figures) -> usize| sides[side].iter().map(what).sum::<usize>();
            table.row([
                &load,
                &["the first", "the second"][side],
                &count(|found| found.answered),
                &count(|found| found.failed),
                &format!("{speed:.1}"),
                &format!("{:.1}", of(side, |found| found.events_per_s)),
                &format!("{:.0} %", 100.0 * of(side, |found| found.generator_share.unwrap_or(0.0))),
                &other.map_or_else(String::new, |other| format!("{:.2}×", speed / other)),
                &format!("{:.2}", of(side, |found| found.goodput_per_s)),
                &ms(|found| found.ttft_s),
                &ms(|found| found.itl_s),
            ]);
        }
    }
    table.to_string()
}
