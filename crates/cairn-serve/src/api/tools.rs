//! Functions that an answer may call, as each API describes them.

use serde_json::{Map, Value, json};

use crate::calls::Callable;
use crate::error::ApiError;
use crate::fields::Fields;

/// Functions of a request, at most: `OpenAI`'s.
pub(super) const TOOLS_MAX: usize = 128;
/// Bytes of a function's name, at most: `OpenAI`'s.
const NAME_BYTES_MAX: usize = 64;

/// Whether and what an answer calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum ToolChoice {
    /// Nothing.
    #[default]
    None,
    /// What the model wants.
    Auto,
    /// Something.
    Required,
    /// This function.
    Named(String),
}

/// A function.
#[derive(Clone, Debug, PartialEq)]
struct Tool {
    name: String,
    description: Option<String>,
    parameters: Value,
    strict: Option<bool>,
}

/// The functions of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Tools {
    list: Vec<Tool>,
    pub(super) choice: ToolChoice,
    /// Whether an answer may call several times.
    pub(super) is_parallel: bool,
}

impl Tools {
    /// Takes the functions of a chat.
    pub(super) fn take_of_chat(fields: &mut Fields) -> Result<Self, ApiError> {
        let read = |path: &str, mut tool: Map<String, Value>| {
            check_kind(path, tool.remove("type"))?;
            let function = match tool.remove("function") {
                Some(Value::Object(function)) => function,
                _ => return Err(wrong(&format!("{path}.function"), "is no object")),
            };
            check_empty(path, &tool)?;
            function_of(&format!("{path}.function"), function, "parameters")
        };
        let list = take_list(fields, read)?;
        let choice: Option<Value> = fields.take("tool_choice")?;
        let choice = choice_of(choice, &list, |mut named| {
            check_kind("tool_choice", named.remove("type"))?;
            let function = named.remove("function").unwrap_or_default();
            check_empty("tool_choice", &named)?;
            match function {
                Value::Object(function) => only_name("tool_choice.function", function),
                _ => Err(wrong("tool_choice.function", "is no object")),
            }
        })?;
        let is_parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
        Ok(Self { list, choice, is_parallel })
    }

    /// Takes the functions of a response.
    pub(super) fn take_of_response(fields: &mut Fields) -> Result<Self, ApiError> {
        let read = |path: &str, mut tool: Map<String, Value>| {
            check_kind(path, tool.remove("type"))?;
            function_of(path, tool, "parameters")
        };
        let list = take_list(fields, read)?;
        let choice: Option<Value> = fields.take("tool_choice")?;
        let choice = choice_of(choice, &list, |mut named| {
            check_kind("tool_choice", named.remove("type"))?;
            only_name("tool_choice", named)
        })?;
        let is_parallel = fields.take("parallel_tool_calls")?.unwrap_or(true);
        Ok(Self { list, choice, is_parallel })
    }

    /// Takes the functions of a message.
    pub(super) fn take_of_message(fields: &mut Fields) -> Result<Self, ApiError> {
        const CHOICE: &str = "tool_choice";
        let read = |path: &str, mut tool: Map<String, Value>| {
            match tool.remove("type") {
                None | Some(Value::Null) => {}
                Some(Value::String(kind)) if kind == "custom" => {}
                Some(kind) => {
                    return Err(wrong(
                        &format!("{path}.type"),
                        &format!("is {kind}, not supported here"),
                    ));
                }
            }
            // It says how long the words in front of it may be kept, and here they are kept while there is room.
            tool.remove("cache_control");
            function_of(path, tool, "input_schema")
        };
        let list = take_list(fields, read)?;
        let mut choice: Map<String, Value> = fields.take(CHOICE)?.unwrap_or_default();
        let says_nothing = choice.is_empty();
        let is_single = match choice.remove("disable_parallel_tool_use") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(is_single)) => is_single,
            Some(other) => {
                let what = format!("is {other}, neither true nor false");
                return Err(wrong("tool_choice.disable_parallel_tool_use", &what));
            }
        };
        let kind = choice.remove("type");
        let name = choice.remove("name");
        check_empty(CHOICE, &choice)?;
        let names = name.as_ref().is_some_and(|name| !name.is_null());
        let plain = match kind.as_ref().map(|kind| kind.as_str().unwrap_or_default()) {
            None if says_nothing => None,
            None => return Err(wrong("tool_choice.type", "is missing")),
            Some("auto" | "any" | "none") if names => {
                return Err(wrong("tool_choice.name", "is only for type = tool"));
            }
            Some("auto") => Some("auto".into()),
            Some("any") => Some("required".into()),
            Some("none") => Some("none".into()),
            Some("tool") => Some(json!({ "name": name })),
            _ => return Err(wrong("tool_choice.type", "is none of auto, any, tool, none")),
        };
        let choice = choice_of(plain, &list, |named| only_name(CHOICE, named))?;
        Ok(Self { list, choice, is_parallel: !is_single })
    }

    /// Whether an answer may call something.
    pub(super) fn may_call(&self) -> bool {
        self.choice != ToolChoice::None
    }

    /// The functions as templates read them; what may not be called the model is not told of.
    pub(super) fn of_template(&self) -> Option<Vec<Value>> {
        let described = |tool: &Tool| {
            let mut function = json!({ "name": tool.name });
            if let Some(description) = &tool.description {
                function["description"] = description.as_str().into();
            }
            function["parameters"] = tool.parameters.clone();
            json!({ "type": "function", "function": function })
        };
        self.may_call().then(|| self.list.iter().map(described).collect())
    }

    /// The functions that may be called, with their places in the request.
    pub(super) fn callables(&self) -> Vec<(usize, Callable<'_>)> {
        let may_be = |name: &str| match &self.choice {
            ToolChoice::None => false,
            ToolChoice::Auto | ToolChoice::Required => true,
            ToolChoice::Named(only) => name == only,
        };
        let list = self.list.iter().enumerate().filter(|(_, tool)| may_be(&tool.name));
        list.map(|(at, tool)| (at, Callable { name: &tool.name, parameters: &tool.parameters }))
            .collect()
    }

    /// What a response says of them.
    pub(super) fn of_response(&self) -> (Value, Value) {
        let choice = match &self.choice {
            ToolChoice::None => "none".into(),
            ToolChoice::Auto => "auto".into(),
            ToolChoice::Required => "required".into(),
            ToolChoice::Named(name) => json!({ "type": "function", "name": name }),
        };
        let described = |tool: &Tool| {
            json!({
                "type": "function", "name": tool.name, "description": tool.description,
                "parameters": tool.parameters, "strict": tool.strict.unwrap_or(true),
            })
        };
        (choice, self.list.iter().map(described).collect())
    }
}

fn wrong(path: &str, what: &str) -> ApiError {
    let field = path.split(['[', '.']).next().unwrap_or(path);
    ApiError::field(field, format!("{path} {what}"))
}

fn check_kind(path: &str, kind: Option<Value>) -> Result<(), ApiError> {
    match kind {
        Some(Value::String(kind)) if kind == "function" => Ok(()),
        kind => {
            let kind = kind.unwrap_or_default();
            Err(wrong(
                &format!("{path}.type"),
                &format!("is {kind}; only functions are called here"),
            ))
        }
    }
}

fn check_empty(path: &str, left: &Map<String, Value>) -> Result<(), ApiError> {
    match left.iter().find(|(_, value)| !value.is_null()) {
        Some((name, _)) => Err(wrong(&format!("{path}.{name}"), "is not supported here")),
        None => Ok(()),
    }
}

fn only_name(path: &str, mut named: Map<String, Value>) -> Result<String, ApiError> {
    let name = named.remove("name");
    check_empty(path, &named)?;
    match name {
        Some(Value::String(name)) => Ok(name),
        _ => Err(wrong(&format!("{path}.name"), "is no text")),
    }
}

/// Takes the list of functions, each read by `read`.
fn take_list(
    fields: &mut Fields,
    read: impl Fn(&str, Map<String, Value>) -> Result<Tool, ApiError>,
) -> Result<Vec<Tool>, ApiError> {
    const NAME: &str = "tools";
    let found: Vec<Map<String, Value>> = fields.take(NAME)?.unwrap_or_default();
    if TOOLS_MAX < found.len() {
        let message = format!("tools has {} functions, at most {TOOLS_MAX}", found.len());
        return Err(ApiError::field(NAME, message));
    }
    let mut list: Vec<Tool> = Vec::with_capacity(found.len());
    for (at, tool) in found.into_iter().enumerate() {
        let path = format!("tools[{at}]");
        let tool = read(&path, tool)?;
        if let Some(first) = list.iter().position(|other| other.name == tool.name) {
            let what = format!("is named '{}' as tools[{first}] is", tool.name);
            return Err(wrong(&path, &what));
        }
        list.push(tool);
    }
    Ok(list)
}

/// Reads a function's name, description and the schema of its arguments.
fn function_of(
    path: &str,
    mut function: Map<String, Value>,
    schema: &str,
) -> Result<Tool, ApiError> {
    let name = match function.remove("name") {
        Some(Value::String(name)) => name,
        _ => return Err(wrong(&format!("{path}.name"), "is no text")),
    };
    let is_named = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || NAME_BYTES_MAX < name.len() || !name.chars().all(is_named) {
        let what = format!("is '{name}', not 1 to {NAME_BYTES_MAX} of a-z, A-Z, 0-9, _ and -");
        return Err(wrong(&format!("{path}.name"), &what));
    }
    let description = match function.remove("description") {
        None | Some(Value::Null) => None,
        Some(Value::String(description)) => Some(description),
        Some(_) => return Err(wrong(&format!("{path}.description"), "is no text")),
    };
    let strict = match function.remove("strict") {
        None | Some(Value::Null) => None,
        Some(Value::Bool(strict)) => Some(strict),
        Some(_) => return Err(wrong(&format!("{path}.strict"), "is neither true nor false")),
    };
    let parameters = match function.remove(schema) {
        None | Some(Value::Null) => {
            json!({ "type": "object", "properties": {}, "additionalProperties": false })
        }
        Some(Value::Object(mut parameters)) => {
            let kind = parameters.entry("type").or_insert_with(|| "object".into());
            if *kind != "object" {
                let what = format!("is {kind}; arguments are an object");
                return Err(wrong(&format!("{path}.{schema}.type"), &what));
            }
            parameters.into()
        }
        Some(_) => return Err(wrong(&format!("{path}.{schema}"), "is no schema")),
    };
    check_empty(path, &function)?;
    Ok(Tool { name, description, parameters, strict })
}

/// Reads what is to be called; an object is read by `name`.
fn choice_of(
    choice: Option<Value>,
    list: &[Tool],
    name: impl Fn(Map<String, Value>) -> Result<String, ApiError>,
) -> Result<ToolChoice, ApiError> {
    const NAME: &str = "tool_choice";
    let choice = match choice {
        None if list.is_empty() => ToolChoice::None,
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "none" => ToolChoice::None,
            "auto" if list.is_empty() => ToolChoice::None,
            "auto" => ToolChoice::Auto,
            "required" => ToolChoice::Required,
            _ => return Err(wrong(NAME, &format!("is '{word}', none of none, auto, required"))),
        },
        Some(Value::Object(named)) => ToolChoice::Named(name(named)?),
        Some(other) => {
            return Err(wrong(NAME, &format!("is {other}, neither a word nor a function")));
        }
    };
    match &choice {
        ToolChoice::Required if list.is_empty() => {
            Err(wrong(NAME, "is 'required', and tools is empty"))
        }
        ToolChoice::Named(name) if !list.iter().any(|tool| tool.name == *name) => {
            Err(wrong(NAME, &format!("names '{name}', which is not among tools")))
        }
        _ => Ok(choice),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &Value) -> String {
        let mut fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        let error = Tools::take_of_chat(&mut fields).unwrap_err().body();
        let param = error["error"]["param"].as_str().unwrap().to_owned();
        assert!(["tools", "tool_choice"].contains(&param.as_str()), "{error}");
        error["error"]["message"].as_str().unwrap().to_owned()
    }

    fn tool(function: &Value) -> Value {
        json!({ "type": "function", "function": function })
    }

    #[test]
    fn what_is_no_function_is_refused_by_name() {
        let one = |function: Value| refused(&json!({ "tools": [tool(&function)] }));
        assert_eq!(one(json!({})), "tools[0].function.name is no text");
        assert!(one(json!({ "name": "a b" })).contains("is 'a b', not 1 to 64 of"));
        assert!(one(json!({ "name": "a".repeat(65) })).contains("not 1 to 64 of"));
        assert!(one(json!({ "name": "f", "parameters": 7 })).contains("parameters is no schema"));
        let list = json!({ "name": "f", "parameters": { "type": "array" } });
        assert!(one(list).contains("parameters.type is \"array\"; arguments are an object"));
        assert!(one(json!({ "name": "f", "strict": 1 })).contains("function.strict is neither"));
        assert!(one(json!({ "name": "f", "returns": 1 })).contains("function.returns is not"));
        let web = json!({ "tools": [{ "type": "web_search" }] });
        assert!(refused(&web).contains("tools[0].type is \"web_search\"; only functions"));
        let f = tool(&json!({ "name": "f" }));
        let twice = refused(&json!({ "tools": [f, f] }));
        assert_eq!(twice, "tools[1] is named 'f' as tools[0] is");
        let many: Vec<Value> =
            (0..10_000).map(|at| tool(&json!({ "name": format!("f{at}") }))).collect();
        assert_eq!(refused(&json!({ "tools": many })), "tools has 10000 functions, at most 128");
    }

    #[test]
    fn choices_are_of_what_there_is() {
        let f = tool(&json!({ "name": "f" }));
        let choice = |choice: Value| refused(&json!({ "tools": [f], "tool_choice": choice }));
        assert!(choice(tool(&json!({ "name": "g" }))).contains("names 'g', which is not"));
        assert!(choice("any".into()).contains("none of none, auto, required"));
        assert!(choice(json!({ "type": "allowed_tools" })).contains("only functions"));
        assert!(refused(&json!({ "tool_choice": "required" })).contains("tools is empty"));
        let taken = |body: &Value| {
            let mut fields = Fields::parse(body.to_string().as_bytes()).unwrap();
            Tools::take_of_chat(&mut fields).unwrap()
        };
        assert_eq!(taken(&json!({ "tools": [], "tool_choice": "auto" })).choice, ToolChoice::None);
        assert_eq!(taken(&json!({ "tools": [f] })).choice, ToolChoice::Auto);
        let named = taken(&json!({ "tools": [f], "tool_choice": f }));
        assert_eq!(named.choice, ToolChoice::Named("f".to_owned()));
        let none = taken(&json!({ "tools": [f], "tool_choice": "none" }));
        assert!(none.of_template().is_none() && none.callables().is_empty());
    }

    #[test]
    fn choices_of_messages_drop_nothing() {
        let taken = |choice: Value| {
            let body = json!({ "tools": [{ "name": "f" }], "tool_choice": choice });
            let mut fields = Fields::parse(body.to_string().as_bytes()).unwrap();
            Tools::take_of_message(&mut fields)
        };
        for (choice, expected) in [
            (json!({ "name": "f" }), "tool_choice.type is missing"),
            (json!({ "disable_parallel_tool_use": true }), "tool_choice.type is missing"),
            (json!({ "type": "auto", "name": "f" }), "tool_choice.name is only for type = tool"),
            (json!({ "type": "any", "name": "f" }), "tool_choice.name is only for type = tool"),
            (json!({ "type": "none", "name": "f" }), "tool_choice.name is only for type = tool"),
        ] {
            let error = taken(choice).unwrap_err().body();
            assert_eq!(error["error"]["message"], expected);
        }
        let choice = |choice: Value| taken(choice).unwrap().choice;
        assert_eq!(choice(json!({})), ToolChoice::Auto);
        assert_eq!(choice(json!({ "type": "any", "name": null })), ToolChoice::Required);
        let named = choice(json!({ "type": "tool", "name": "f" }));
        assert_eq!(named, ToolChoice::Named("f".to_owned()));
    }
}
