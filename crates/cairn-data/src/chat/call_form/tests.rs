//! Forms of calls as the templates of models write them.

use std::path::Path;

use super::*;

fn template(name: &str) -> ChatTemplate {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/chat");
    let path = folder.join(format!("{name}.jinja"));
    ChatTemplate::parse(&std::fs::read_to_string(&path).unwrap(), &path).unwrap()
}

/// Begin, middle, between and end, ids written as `#`.
fn form(name: &str) -> Option<[String; 4]> {
    let specials = BTreeMap::from([
        ("bos_token".to_owned(), "<s>".to_owned()),
        ("eos_token".to_owned(), "</s>".to_owned()),
    ]);
    let form = template(name).call_form(&specials)?;
    let text = |parts: &[FormPart]| -> String {
        let text = |part: &FormPart| match part {
            FormPart::Text(text) => text.clone(),
            FormPart::CallId => "#".to_owned(),
        };
        parts.iter().map(text).collect()
    };
    let between = form.between.as_deref().map_or_else(|| "never".to_owned(), text);
    Some([text(&form.begin), text(&form.middle), between, text(&form.end)])
}

#[test]
fn forms_are_read_off_templates() {
    for (name, expected) in [
        (
            "calls_hermes",
            [
                "<tool_call>\n{\"name\": \"",
                "\", \"arguments\": ",
                "}\n</tool_call>\n<tool_call>\n{\"name\": \"",
                "}\n</tool_call>",
            ],
        ),
        (
            "calls_mistral",
            [
                "[TOOL_CALLS] [{\"name\": \"",
                "\", \"arguments\": ",
                ", \"id\": \"#\"}, {\"name\": \"",
                ", \"id\": \"#\"}]",
            ],
        ),
        ("calls_tekken", ["[TOOL_CALLS]", "[CALL_ID]#[ARGS]", "[TOOL_CALLS]", ""]),
        ("llama3", ["{\"name\": \"", "\", \"parameters\": ", "never", "}"]),
        (
            "calls_deepseek",
            [
                "<\u{ff5c}calls_begin\u{ff5c}><\u{ff5c}call_begin\u{ff5c}>function<\u{ff5c}sep\u{ff5c}>",
                "\n```json\n",
                "\n```<\u{ff5c}call_end\u{ff5c}>\n<\u{ff5c}call_begin\u{ff5c}>function<\u{ff5c}sep\u{ff5c}>",
                "\n```<\u{ff5c}call_end\u{ff5c}><\u{ff5c}calls_end\u{ff5c}>",
            ],
        ),
    ] {
        assert_eq!(form(name), Some(expected.map(ToOwned::to_owned)), "{name}");
    }
    let deepseek = template("calls_deepseek").call_form(&BTreeMap::new()).unwrap();
    assert_eq!((deepseek.arguments, deepseek.wants_null_content), (ArgumentsAs::Text, true));
    assert!(!deepseek.has_spaces, "as the text was given");
    for name in ["chatml", "gemma", "mistral"] {
        assert_eq!(form(name), None, "{name}");
    }
}

#[test]
fn arguments_that_are_no_json_have_no_form() {
    for call in [
        "<{{ c.function.name }}>{% for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}{% endfor %}",
        "{{ c.function.name }}({{ c.function.arguments }})",
        "{{ c.function.arguments | tojson }}",
    ] {
        let source = format!(
            "{{% for m in messages %}}{{{{ m.content }}}}{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}\
             {{% endfor %}}"
        );
        let template = ChatTemplate::parse(&source, Path::new("t")).unwrap();
        let form = template.call_form(&BTreeMap::new());
        // Python's own spelling of a map is no JSON.
        assert_eq!(form, None, "{call}");
    }
}

#[test]
fn a_form_has_whole_tags_and_the_same_between_all_calls() {
    let form = |call: &str, end: &str| {
        let source = format!(
            "{{% for m in messages %}}<|turn|>{{% if m.tool_calls %}}<|act|>{{% for c in m.tool_calls %}}{call}\
             {{% endfor %}}<|end_act|>{{% else %}}<|answer|>{{{{ m.content }}}}{end}{{% endif %}}{{% endfor %}}"
        );
        let template = ChatTemplate::parse(&source, Path::new("t")).unwrap();
        template.call_form(&BTreeMap::new()).unwrap()
    };
    let text = |text: &str| vec![FormPart::Text(text.to_owned())];
    let call = "{{ c.function.name }}:{{ c.function.arguments | tojson }};";
    let found = form(call, "<|end_act|>");
    assert_eq!((found.begin, found.end), (text("<|act|>"), text(";")));
    let found = form(call, "<|end_answer|>");
    assert_eq!((found.begin, found.end), (text("<|act|>"), text(";<|end_act|>")));
    assert_eq!(found.between, Some(text(";")));
    let numbered = form(&format!("{{{{ loop.index }}}}={call}"), "<|end_act|>");
    assert_eq!((numbered.begin, numbered.between), (text("<|act|>1="), None));
}

#[test]
fn a_call_that_begins_with_its_id_has_no_form() {
    let learn = |call: &str| {
        let source = format!(
            "{{% for m in messages %}}<{{{{ m.role }}}}>{{% for c in m.tool_calls or [] %}}{call}{{% endfor %}}\
             {{{{ m.content }}}}\n{{% endfor %}}"
        );
        let template = ChatTemplate::parse(&source, Path::new("t")).unwrap();
        template.call_form(&BTreeMap::new())
    };
    let call = "{{ c.id }}:{{ c.function.name }}:{{ c.function.arguments | tojson }};";
    assert_eq!(learn(call), None);
    assert_eq!(learn(&format!(" {call}")), None);
    let begin = [FormPart::Text("!".to_owned()), FormPart::CallId, FormPart::Text(":".to_owned())];
    assert_eq!(learn(&format!("!{call}")).unwrap().begin, begin);
}
