//! The grammar of calls: the form that the template writes them in, around arguments that follow the functions'
//! schemas.

use cairn_data::chat::{CallForm, FormPart};
use cairn_data::tokenizer::Tokenizer;
use serde_json::Value;

use crate::grammar::spaced;
use crate::outline::{CALL_ID_CHARS, Marker, Symbol, special, symbols};

/// Bytes in front of a marker in the token that it begins in, at most.
const LEAD_MAX: usize = 24;

/// A function that may be called.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Callable<'a> {
    pub(crate) name: &'a str,
    /// The schema of its arguments, which is that of an object.
    pub(crate) parameters: &'a Value,
}

/// Where the grammar begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// With the answer, which has to call.
    Answer,
    /// With the token in which the marker begins, which has come.
    Marker,
}

/// What answers may call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CallGrammar<'a> {
    pub(crate) form: &'a CallForm,
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) callables: &'a [Callable<'a>],
    /// Whether there may be several calls.
    pub(crate) is_parallel: bool,
    pub(crate) start: Start,
}

impl CallGrammar<'_> {
    /// The grammar in Lark's notation; else the place of a function whose schema is none, and why.
    pub(crate) fn lark(&self) -> Result<String, (usize, String)> {
        let Self { form, callables, .. } = self;
        let begin = match self.start {
            Start::Answer => self.atoms(&form.begin),
            Start::Marker => self.atoms_behind_marker(),
        };
        let mut lark = format!("start: {begin} calls {}\n", self.atoms(&form.end));
        match form.between.as_ref().filter(|_| self.is_parallel) {
            Some(between) => {
                lark += &format!("calls: call ({} call)*\n", self.atoms(between));
            }
            None => lark += "calls: call\n",
        }
        let names: Vec<String> = (0..callables.len()).map(|at| format!("call_{at}")).collect();
        lark += &format!("call: {}\n", names.join(" | "));
        for (at, Callable { name, parameters }) in callables.iter().enumerate() {
            let mut around = vec![FormPart::Text((*name).to_owned())];
            around.extend(form.middle.iter().cloned());
            let schema = spaced(parameters, form.has_spaces).map_err(|reason| (at, reason))?;
            lark += &format!("call_{at}: {} %json {schema}\n", self.atoms(&around));
        }
        Ok(lark)
    }

    /// A marker that is a text may begin within a token, and end within one.
    fn atoms_behind_marker(&self) -> String {
        let Marker { text, .. } = Marker::of(self.form, self.tokenizer);
        let specials = self.tokenizer.specials();
        let is_special =
            symbols(&text, Some(specials)).first().is_some_and(|s| char::from_u32(*s).is_none());
        let mut begin = self.form.begin.clone();
        if let Some(FormPart::Text(first)) = begin.first_mut() {
            *first = first.trim_start().to_owned();
        }
        let Some(first) = text.chars().next().filter(|_| !is_special) else {
            return self.atoms(&begin);
        };
        // One word of the grammar, since what is in front of the marker has no end of its own.
        let lead = format!("[^{}]{{0,{LEAD_MAX}}}", escaped(&first.to_string()));
        if let Some(FormPart::Text(first)) = begin.first_mut() {
            *first = first[text.len()..].to_owned();
        }
        format!("/{lead}{}/ {}", escaped(&text), self.atoms(&begin))
    }

    fn atoms(&self, parts: &[FormPart]) -> String {
        let mut atoms = Vec::new();
        let mut text = String::new();
        let end_text = |text: &mut String, atoms: &mut Vec<String>| {
            if !text.is_empty() {
                atoms.push(Value::from(std::mem::take(text)).to_string());
            }
        };
        for part in parts {
            let FormPart::Text(words) = part else {
                end_text(&mut text, &mut atoms);
                atoms.push(format!("/[a-zA-Z0-9]{{{CALL_ID_CHARS}}}/"));
                continue;
            };
            for symbol in symbols(words, Some(self.tokenizer.specials())) {
                match char::from_u32(symbol) {
                    Some(c) => text.push(c),
                    None => {
                        end_text(&mut text, &mut atoms);
                        atoms.push(format!("<[{}]>", id(symbol)));
                    }
                }
            }
        }
        end_text(&mut text, &mut atoms);
        atoms.join(" ")
    }
}

/// The id of a special token.
fn id(symbol: Symbol) -> u32 {
    symbol - special(0)
}

/// A text within a regular expression of Lark's notation.
fn escaped(text: &str) -> String {
    let mut found = String::with_capacity(2 * text.len());
    for c in text.chars() {
        match c {
            '\n' => found += "\\n",
            _ if r"\.+*?()|[]{}^$#&-~/".contains(c) => {
                found.push('\\');
                found.push(c);
            }
            _ => found.push(c),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use cairn_data::chat::ChatTemplate;
    use serde_json::json;

    use super::*;

    fn grammar(name: &str, start: Start) -> String {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
        let tokenizer =
            Tokenizer::load(&goldens.join("tokenizers/byte_level/tokenizer.json")).unwrap();
        let path = goldens.join("chat").join(name);
        let source = std::fs::read_to_string(&path).unwrap();
        let form = ChatTemplate::parse(&source, &path).unwrap().call_form(&BTreeMap::new());
        let form = form.unwrap();
        let parameters = json!({ "type": "object" });
        let callables = [Callable { name: "rain", parameters: &parameters }];
        let (tokenizer, callables) = (&tokenizer, &callables);
        let is_parallel = true;
        CallGrammar { form: &form, tokenizer, callables, is_parallel, start }.lark().unwrap()
    }

    #[test]
    fn grammars_are_the_templates_form() {
        let lark = grammar("calls_hermes.jinja", Start::Answer);
        let expected = [
            r#"start: "<tool_call>\n{\"name\": \"" calls "}\n</tool_call>""#,
            r#"calls: call ("}\n</tool_call>\n<tool_call>\n{\"name\": \"" call)*"#,
            "call: call_0",
        ];
        assert_eq!(lark.lines().take(3).collect::<Vec<_>>(), expected);
        assert!(lark.contains(r#"call_0: "rain\", \"arguments\": " %json {"#), "{lark}");
        let lark = grammar("calls_hermes.jinja", Start::Marker);
        let first = r#"start: /[^<]{0,24}<tool_call>/ "\n{\"name\": \"" calls "}\n</tool_call>""#;
        assert_eq!(lark.lines().next(), Some(first));
        let lark = grammar("llama3.jinja", Start::Answer);
        assert!(lark.starts_with(r#"start: "{\"name\": \"" calls "}""#), "{lark}");
        assert!(lark.contains("calls: call\n"), "one call at a time: {lark}");
        let lark = grammar("calls_tekken.jinja", Start::Answer);
        assert!(lark.contains("/[a-zA-Z0-9]{9}/ \"[ARGS]\" %json"), "{lark}");
    }
}
