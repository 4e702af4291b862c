//! Templates against transformers, and templates that are made to harm.

use std::time::Instant;

use proptest::prelude::*;
use serde_json::{Value as Json, json};

use super::*;

fn render(source: &str, variables: &Json) -> Result<String, ChatError> {
    let template = ChatTemplate::parse(source, Path::new("test.jinja"))?;
    let messages: Vec<Json> = variables["messages"].as_array().cloned().unwrap_or_default();
    let tools: Option<Vec<Json>> = variables["tools"].as_array().cloned();
    let mut more = variables.as_object().cloned().unwrap_or_default();
    for known in ["messages", "tools", "add_generation_prompt", "specials"] {
        more.shift_remove(known);
    }
    let specials: BTreeMap<String, String> =
        serde_json::from_value(variables["specials"].clone()).unwrap_or_default();
    let now = jiff::civil::date(2025, 1, 2).at(3, 4, 5, 0);
    template.render(&ChatInput {
        add_generation_prompt: variables["add_generation_prompt"] == true,
        tools: tools.as_deref(),
        variables: Some(&more),
        now: Some(now),
        ..ChatInput::new(&messages, &specials)
    })
}

fn text(source: &str) -> String {
    render(source, &json!({})).unwrap()
}

#[test]
fn conversations_read_as_in_transformers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/chat");
    let mut compared = 0;
    for style in ["chatml", "llama3", "mistral", "gemma", "tools"] {
        let read = |ending: &str| std::fs::read_to_string(folder.join(format!("{style}.{ending}")));
        let template = read("jinja").unwrap();
        let golden: Json = serde_json::from_str(&read("json").unwrap()).unwrap();
        for (index, case) in golden["cases"].as_array().unwrap().iter().enumerate() {
            let mut input = case["input"].clone();
            input["specials"] = golden["special_tokens"].clone();
            let result = render(&template, &input);
            match (case["text"].as_str(), case["refused"].as_str()) {
                (Some(wanted), _) => {
                    assert_eq!(result.as_deref(), Ok(wanted), "{style} {index}");
                }
                (None, Some(words)) => {
                    let error = result.unwrap_err();
                    let ChatError::Raised { message, line: Some(_), .. } = error else {
                        panic!("{style} {index}: {error}");
                    };
                    assert_eq!(message, words, "{style} {index}");
                }
                (None, None) => {
                    let error = result.unwrap_err();
                    assert!(
                        matches!(error, ChatError::Template { line: Some(_), .. }),
                        "{style} {index}: {error}"
                    );
                }
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 40);
}

#[test]
fn values_print_as_in_python() {
    for (source, wanted) in [
        (
            "{{ [1, 1.0, 1e22, 1e-7, 123456789012345680.0, true, none, 'a\\'b', \"c\"] }}",
            "[1, 1.0, 1e+22, 1e-07, 1.2345678901234568e+17, True, None, \"a'b\", 'c']",
        ),
        ("{{ {'a': [1, {'b': 'é\\n'}]} }}", "{'a': [1, {'b': 'é\\n'}]}"),
        ("{{ (1,) }}{{ (1, 2) }}{{ nothing }}|{{ none ~ true ~ 1.5 }}", "(1,)(1, 2)|NoneTrue1.5"),
        (
            "{{ {'b': 1, 'a': [1.0, none, true, 'é\"\\n']} | tojson }}",
            "{\"b\": 1, \"a\": [1.0, null, true, \"é\\\"\\n\"]}",
        ),
        (
            "{{ {'b': [], 'a': {}} | tojson(indent=2, sort_keys=true) }}",
            "{\n  \"a\": {},\n  \"b\": []\n}",
        ),
        (
            "{{ ['é😀'] | tojson(ensure_ascii=true, separators=(',', ':')) }}",
            "[\"\\u00e9\\ud83d\\ude00\"]",
        ),
        (
            "{{ 'abcdef'[1:4] }}{{ 'abcdef'[::-2] }}{{ [1, 2, 3][-2:] }}{{ 'abc'[5:] }}",
            "bcdfdb[2, 3]",
        ),
        (
            "{{ 'ab' * 3 }}{{ [1] * 2 + [2] }}{{ 2 * 3 + 0.5 }}{{ 'x' * -1 }}{{ 7 // 2 }}{{ 7 / 2 }}",
            "ababab[1, 1, 2]6.533.5",
        ),
        (
            "{{ ' a b '.strip().split(' ') }}{{ 'a-b'.replace('-', '+') }}{{ 'abc'.startswith('ab') }}",
            "['a', 'b']a+bTrue",
        ),
        (
            "{{ ['a', 'b'] | join(', ') }}{{ '-'.join(['x', 1]) }}{{ 'l1\nl2\n\nl3' | indent(2, true) }}",
            "a, bx-1  l1\n  l2\n\n  l3",
        ),
        (
            "{{ 'x' | default('y') }}{{ nothing | default('z') }}{{ '' | default('w', true) }}",
            "xzw",
        ),
        (
            "{{ 1 in [1, 2] }}{{ 'b' in 'abc' }}{{ 'k' in {'k': 1} }}{{ 3 not in [1] }}",
            "TrueTrueTrueTrue",
        ),
        (
            "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}\
          {% if i == 4 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
            "5",
        ),
        ("{{ strftime_now('%d %b %Y, %H:%M') }}", "02 Jan 2025, 03:04"),
        ("a\n{% if true %}\n  b\n  {%- endif %}\n{# gone #}\nc\n", "a\n  bc"),
        ("{%- generation %} a {%- endgeneration -%}  b", " ab"),
        (
            "{% for i in [1, 2] %}{{ loop.index }}{{ loop.last }}{{ loop.nextitem | default('-') }}{% endfor %}",
            "1False22True-",
        ),
    ] {
        assert_eq!(text(source), wanted, "{source}");
    }
}

#[test]
fn times_are_those_of_the_calendar() {
    let time = utc(1_735_787_045).unwrap();
    assert_eq!(time, jiff::civil::date(2025, 1, 2).at(3, 4, 5, 0));
    assert_eq!(utc(u64::MAX), None);
}

#[test]
fn mistakes_name_their_line() {
    for (source, line, part) in [
        ("a\n{% if %}", 2, "unexpected"),
        ("a\n\n{{ 1 | nowhere }}", 3, "nowhere"),
        ("a\n{{ 1 + 'b' }}", 2, "number + string"),
        ("\n\n\n{{ x.y.z }}", 4, ""),
        ("{% for m in 3 %}{% endfor %}", 1, ""),
        ("{% include 'a' %}", 1, ""),
        ("\n{% block a %}x{% endblock %}", 2, ""),
        ("{% extends 'a' %}", 1, ""),
        ("{% import 'a' as b %}", 1, ""),
        ("{% set l = [1] %}\n{{ l.append(2) }}", 2, ""),
        ("{{ f(*l) }}", 0, "unpacked"),
    ] {
        let error = render(source, &json!({})).unwrap_err();
        let ChatError::Template { line: found, reason, .. } = &error else { panic!("{error:?}") };
        assert!(line == 0 || *found == Some(line), "{source}: {error}");
        assert!(reason.contains(part), "{source}: {error}");
    }
    let error = render("a\n{{ raise_exception('not so') }}", &json!({})).unwrap_err();
    assert_eq!(error.to_string(), "the chat template refuses the conversation: not so");
    assert!(matches!(error, ChatError::Raised { line: Some(2), .. }));
    let long = "x".repeat(TEMPLATE_BYTES_MAX + 1);
    assert!(matches!(ChatTemplate::parse(&long, Path::new("x")), Err(ChatError::TooLong { .. })));
}

/// Templates that would take all time or memory.
const BOMBS: [&str; 28] = [
    "{{ 'x' * 1000000000 }}",
    "{{ ('x' * 100000000) ~ ('x' * 100000000) }}",
    "{% set n = 1000000000 %}{{ 'x' * n }}",
    "{% set n = 1000000000 %}{{ ([1] * n) | length }}",
    "{% set n = 4000 %}{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}\
     {{ ns.x | length }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(90000) %}{% set ns.x = ns.x[0:] %}{% endfor %}\
     {{ ns.x * 9000000 }}",
    "{% set ns = namespace() %}{% set ns.x = [ns] %}{{ ns }}",
    "{% set ns = namespace() %}{% set ns.x = {'a': ns} %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
    "{% set x %}{% for i in range(100000) %}{{ 'abcdefghij' * 1000 }}{% endfor %}{% endset %}",
    "{% set n = 900000000 %}{{ 'a\nb' | indent(n) }}",
    "{{ '{:900000000}'.format(1) }}",
    "{% set s = 'a,' * 1000000 %}{% for i in range(1000) %}{% if s.split(',') %}{% endif %}{% endfor %}",
    "{% set s = 'a' * 10000000 %}{% for i in range(100000) %}{% if 'b' in s %}{% endif %}{% endfor %}",
    "{% set s = 'a' * 10000000 %}{% for i in range(100000) %}{% if s[-1] == 'b' %}{% endif %}{% endfor %}",
    "{% set s = 'a' * 10000000 %}{% for c in s %}{% endfor %}",
    "{% set l = range(100000) | list %}{% for i in range(100000) %}{% if l == l %}{% endif %}{% endfor %}",
    "{% set l = ['a'] * 100000 %}{% set s = 'b' * 1000000 %}{{ l | select('in', s) | list }}",
    "{% set s = '-'.join(['x' * 1000] * 1000) %}{{ s.join([s] * 1000) }}",
];

/// What the engine's own bounds say.
const BOUNDS: [&str; 4] = [
    "recursion limit",
    "too many elements",
    "a namespace cannot be kept",
    "the format is too wide",
];

#[test]
fn bombs_are_refused_in_bounded_time() {
    for source in BOMBS {
        let begin = Instant::now();
        let error = render(source, &json!({})).unwrap_err();
        let seconds = begin.elapsed().as_secs_f64();
        let is_bound = match &error {
            ChatError::TooMuch { .. } => true,
            ChatError::Template { reason, .. } => BOUNDS.iter().any(|bound| reason.contains(bound)),
            _ => false,
        };
        assert!(is_bound, "{source}: {error}");
        assert!(seconds < 20.0, "{source} took {seconds} s");
    }
}

#[test]
fn text_of_a_template_counts_too() {
    let raw = "x".repeat(100_000);
    let source =
        format!("{{% set x %}}{{% for i in range(100000) %}}{raw}{{% endfor %}}{{% endset %}}");
    let error = render(&source, &json!({})).unwrap_err();
    assert!(matches!(error, ChatError::TooMuch { line: Some(1), .. }), "{error}");
}

#[test]
fn long_conversations_are_within_the_bounds() {
    let style = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/chat/llama3.jinja");
    let template = std::fs::read_to_string(style).unwrap();
    let content = "A cairn is a stack of stones. ".repeat(30);
    let messages: Vec<Json> = (0..1000)
        .map(|at| json!({"role": if at % 2 == 0 { "user" } else { "assistant" }, "content": content}))
        .collect();
    let text = render(&template, &json!({"messages": messages})).unwrap();
    assert!(1000 * content.len() < text.len());
}

#[test]
fn tags_of_training_are_renamed_only() {
    let source = "{% generation %}a{%- endgeneration -%}{% generationx %}{{ generation }}";
    let renamed =
        replace_tag(&replace_tag(source, "generation", "with"), "endgeneration", "endwith");
    assert_eq!(renamed, "{% with %}a{%- endwith -%}{% generationx %}{{ generation }}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// A template with anything cut, doubled or changed is text or an error, never a panic.
    #[test]
    fn altered_templates_never_panic(
        style in 0..5usize,
        from: prop::sample::Index,
        length in 0..40usize,
        instead in "[ -~\n]{0,12}|\\{%-? *(for|if|set|endfor|endif|macro|with|break) [a-z]{0,3}|\\{\\{|%\\}|\\}\\}",
    ) {
        let name = ["chatml", "llama3", "mistral", "gemma", "tools"][style];
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/chat");
        let mut source = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
        let from = from.index(source.len());
        let to = (from + length).min(source.len());
        source.replace_range(from..to, &instead);
        let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]);
        if let Err(error) = render(&source, &json!({"messages": messages})) {
            prop_assert!(!error.to_string().contains("the template engine failed"), "{source}: {error}");
        }
    }
}
