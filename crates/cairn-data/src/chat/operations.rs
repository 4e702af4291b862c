//! Operators, filters and methods that pay for what they read and make.

use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::bounds::{Budget, ITEM, is_namespace};
use super::python;

pub(super) const ADD: &str = "+";
pub(super) const MULTIPLY: &str = "*";
pub(super) const CONCAT: &str = "~";
pub(super) const SLICE: &str = "[:]";
/// Pays for all of a value and passes it on.
pub(super) const PAY: &str = "$pay";
/// Pays for a text and passes any value on.
pub(super) const PAY_TEXT: &str = "$pay-text";
/// Pays for the items of a value and passes it on.
pub(super) const PAY_ITEMS: &str = "$pay-items";

/// Filters that look at one item or at none.
const SHALLOW: [&str; 8] =
    ["length", "count", "default", "d", "first", "last", "attr", "namespace"];

/// Filters that try each item with the other arguments.
const EACH: [&str; 5] = ["map", "select", "reject", "selectattr", "rejectattr"];

/// Filters that take any value as the text that Python prints for it.
const TEXTUAL: [&str; 5] = ["upper", "lower", "title", "capitalize", "trim"];

/// Methods that make a list of a text.
const SPLITTING: [&str; 3] = ["split", "rsplit", "splitlines"];

/// Digits in a row in a format: a width that large is a mistake or worse.
const FORMAT_DIGITS_MAX: usize = 3;

/// Adds the operators.
pub(super) fn add(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    let paid = Arc::clone(budget);
    environment.add_filter(ADD, move |a: &Value, b: &Value| sum(&paid, a, b));
    let paid = Arc::clone(budget);
    environment.add_filter(MULTIPLY, move |a: &Value, b: &Value| product(&paid, a, b));
    let paid = Arc::clone(budget);
    environment.add_filter(CONCAT, move |a: &Value, b: &Value| concat(&paid, &[a, b]));
    let paid = Arc::clone(budget);
    environment.add_filter(
        SLICE,
        move |value: &Value, start: &Value, stop: &Value, step: &Value| {
            slice(&paid, value, [start, stop, step])
        },
    );
    let paid = Arc::clone(budget);
    environment.add_filter(PAY, move |value: Value| paid.spend_on(&value).map(|()| value));
    let paid = Arc::clone(budget);
    environment.add_filter(PAY_TEXT, move |value: Value| {
        paid.spend(value.as_str().map_or(0, str::len)).map(|()| value)
    });
    let paid = Arc::clone(budget);
    environment.add_filter(PAY_ITEMS, move |value: Value| {
        paid.spend_items(value.as_str().map_or(0, str::len)).map(|()| value)
    });
    add_texts(environment, budget);
}

fn add_texts(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    let paid = Arc::clone(budget);
    environment.add_filter("tojson", move |value: &Value, options: Rest<ValueOrKwargs>| {
        paid.spend_on(value)?;
        let json = python::json(value, &options.into_values(), &paid)?;
        paid.spend(json.len())?;
        Ok::<_, Error>(Value::from(json))
    });
    let paid = Arc::clone(budget);
    environment.add_filter("string", move |value: &Value| concat(&paid, &[value]));
    // Nothing is escaped, so nothing needs to be marked.
    let paid = Arc::clone(budget);
    environment.add_filter("safe", move |value: &Value| concat(&paid, &[value]));
    let paid = Arc::clone(budget);
    environment.add_filter(
        "replace",
        move |text: &Value, from: &Value, to: &Value, count: Option<i64>| {
            replace(&paid, text, (from, to), count)
        },
    );
    let paid = Arc::clone(budget);
    environment.add_filter(
        "join",
        move |list: &Value, joiner: Option<&Value>, attribute: Option<&str>, options: Kwargs| {
            let by_name: Option<String> = options.get("attribute")?;
            let joined_by: Option<String> = options.get("d")?;
            options.assert_all_used()?;
            let attribute = attribute.map(ToOwned::to_owned).or(by_name);
            let joiner = joiner.map(python::text).or(joined_by).unwrap_or_default();
            join(&paid, list, &joiner, attribute.as_deref())
        },
    );
    let paid = Arc::clone(budget);
    environment.add_filter("indent", move |text: &Value, options: Rest<ValueOrKwargs>| {
        indent(&paid, text, &options.into_values())
    });
}

/// Calls a filter or function of the engine.
pub(super) fn call(
    budget: &Budget,
    state: &mut State<'_, '_>,
    (name, inner): (&str, &Value),
    arguments: &[Value],
) -> Result<Value, Error> {
    if !SHALLOW.contains(&name) {
        for argument in arguments {
            budget.spend_on(argument)?;
            // What walks a text makes a list of its characters.
            budget.spend_items(argument.as_str().map_or(0, str::len))?;
        }
    }
    if EACH.contains(&name)
        && let Some((list, rest)) = arguments.split_first()
    {
        let items = list.len().unwrap_or(1);
        let cost: usize = rest.iter().map(|value| ITEM + value.as_str().map_or(0, str::len)).sum();
        let nested = rest.iter().filter_map(Value::len).sum::<usize>();
        budget.spend(items.saturating_mul(cost.saturating_add(nested.saturating_mul(ITEM))))?;
    }
    if name == "namespace" {
        for argument in arguments {
            budget.spend_on(argument)?;
        }
    }
    let result = match arguments.split_first() {
        Some((first, rest)) if TEXTUAL.contains(&name) && first.as_str().is_none() => {
            let first = Value::from(python::text(first));
            inner.call(state, &[&[first], rest].concat())?
        }
        _ => inner.call(state, arguments)?,
    };
    settle(budget, result)
}

/// Calls one of Python's methods.
pub(super) fn call_method(
    budget: &Budget,
    state: &mut State<'_, '_>,
    (value, method): (&Value, &str),
    arguments: &[Value],
) -> Result<Value, Error> {
    match (value.as_str(), method) {
        (Some(_), "replace") => {
            let (from, to, count): (&Value, &Value, Option<i64>) = from_args(arguments)?;
            return replace(budget, value, (from, to), count);
        }
        (Some(joiner), "join") => {
            let (list,): (&Value,) = from_args(arguments)?;
            return join(budget, list, joiner, None);
        }
        (Some(text), "format") if has_wide_field(text) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "the format is too wide"));
        }
        (Some(text), "removeprefix" | "removesuffix") => {
            let (part,): (&str,) = from_args(arguments)?;
            budget.spend(text.len())?;
            let rest = match method {
                "removeprefix" => text.strip_prefix(part),
                _ => text.strip_suffix(part),
            };
            return Ok(Value::from(rest.unwrap_or(text)));
        }
        _ => {}
    }
    if method != "get" {
        budget.spend_on(value)?;
    }
    for argument in arguments {
        budget.spend_on(argument)?;
    }
    if SPLITTING.contains(&method) {
        budget.spend_items(value.as_str().map_or(0, str::len))?;
    }
    let result = pycompat::unknown_method_callback(state, value, method, arguments)?;
    settle(budget, result)
}

/// `default`, with its second argument by name as well.
pub(super) fn default(
    value: &Value,
    other: Option<Value>,
    boolean: Option<bool>,
    options: Kwargs,
) -> Result<Value, Error> {
    let by_name: Option<Value> = options.get("default_value")?;
    let also: Option<bool> = options.get("boolean")?;
    options.assert_all_used()?;
    let replaces = boolean.or(also).unwrap_or(false) && !value.is_true();
    Ok(if value.is_undefined() || replaces {
        other.or(by_name).unwrap_or_else(|| Value::from(""))
    } else {
        value.clone()
    })
}

/// Makes a list of what is only promised, and pays for what there is now.
fn settle(budget: &Budget, value: Value) -> Result<Value, Error> {
    if is_namespace(&value) {
        return Ok(value);
    }
    let value = match value.kind() {
        ValueKind::Iterable => Value::from(items(budget, &value)?),
        _ => value,
    };
    budget.spend_on(&value)?;
    Ok(value)
}

/// The items of a list.
fn items(budget: &Budget, value: &Value) -> Result<Vec<Value>, Error> {
    let mut list = Vec::new();
    for item in value.try_iter()?.checked() {
        budget.spend_items(1)?;
        list.push(item?);
    }
    Ok(list)
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn sum(budget: &Budget, a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(a_text), Some(b_text)) = (a.as_str(), b.as_str()) {
        budget.spend(a_text.len() + b_text.len())?;
        return Ok(Value::from([a_text, b_text].concat()));
    }
    if is_list(a) && is_list(b) {
        let mut list = items(budget, a)?;
        list.extend(items(budget, b)?);
        return Ok(Value::from(list));
    }
    numbers("+", (a, b), i128::checked_add, |a, b| a + b)
}

fn product(budget: &Budget, a: &Value, b: &Value) -> Result<Value, Error> {
    let (repeated, times) = if a.as_str().is_some() || is_list(a) { (a, b) } else { (b, a) };
    if repeated.as_str().is_none() && !is_list(repeated) {
        return numbers("*", (a, b), i128::checked_mul, |a, b| a * b);
    }
    // Like Python, a negative number gives nothing.
    let times = times.as_i64().filter(|_| times.is_integer()).ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, "texts and lists are repeated by whole numbers")
    })?;
    let times = usize::try_from(times.max(0)).unwrap_or(usize::MAX);
    if let Some(text) = repeated.as_str() {
        budget.spend(text.len().saturating_mul(times))?;
        return Ok(Value::from(text.repeat(times)));
    }
    let list = items(budget, repeated)?;
    budget.spend_items(list.len().saturating_mul(times))?;
    let length = list.len().saturating_mul(times);
    Ok(Value::from(list.iter().cycle().take(length).cloned().collect::<Vec<Value>>()))
}

fn numbers(
    sign: &str,
    (a, b): (&Value, &Value),
    whole: fn(i128, i128) -> Option<i128>,
    real: fn(f64, f64) -> f64,
) -> Result<Value, Error> {
    let refused = || {
        let (a, b) = (a.kind(), b.kind());
        Error::new(ErrorKind::InvalidOperation, format!("{a} {sign} {b} has no meaning"))
    };
    let both_whole = a.is_integer() && b.is_integer();
    if both_whole && let (Ok(x), Ok(y)) = (i128::try_from(a.clone()), i128::try_from(b.clone())) {
        let result = whole(x, y).ok_or_else(refused)?;
        return Ok(i64::try_from(result).map_or_else(|_| Value::from(result), Value::from));
    }
    match (f64::try_from(a.clone()), f64::try_from(b.clone())) {
        (Ok(x), Ok(y)) if a.is_number() && b.is_number() => Ok(Value::from(real(x, y))),
        _ => Err(refused()),
    }
}

fn concat(budget: &Budget, parts: &[&Value]) -> Result<Value, Error> {
    let mut text = String::new();
    for part in parts {
        budget.spend_on(part)?;
        text += &python::text(part);
    }
    budget.spend(text.len())?;
    Ok(Value::from(text))
}

fn replace(
    budget: &Budget,
    text: &Value,
    (from, to): (&Value, &Value),
    count: Option<i64>,
) -> Result<Value, Error> {
    for value in [text, from, to] {
        budget.spend_on(value)?;
    }
    let (text, from, to) = (python::text(text), python::text(from), python::text(to));
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    let found = text.matches(from.as_str()).count().min(count);
    budget.spend(text.len().saturating_add(found.saturating_mul(to.len())))?;
    Ok(Value::from(text.replacen(&from, &to, count)))
}

fn join(
    budget: &Budget,
    list: &Value,
    joiner: &str,
    attribute: Option<&str>,
) -> Result<Value, Error> {
    budget.spend_on(list)?;
    budget.spend_items(list.as_str().map_or(0, str::len))?;
    let mut text = String::new();
    for (index, item) in list.try_iter()?.checked().enumerate() {
        let item = item?;
        let item = match attribute {
            Some(attribute) => item.get_attr(attribute)?,
            None => item,
        };
        let separator = if index == 0 { "" } else { joiner };
        let item = python::text(&item);
        budget.spend(separator.len() + item.len())?;
        text.push_str(separator);
        text.push_str(&item);
    }
    Ok(Value::from(text))
}

/// Jinja2's `indent`: lines after the first, but for blank ones, get spaces before them.
fn indent(budget: &Budget, text: &Value, arguments: &[Value]) -> Result<Value, Error> {
    type Arguments<'a> = (Option<Value>, Option<bool>, Option<bool>, Kwargs);
    let (width, first, blank, options): Arguments<'_> = from_args(arguments)?;
    let width = width.or(options.get("width")?);
    let first = first.or(options.get("first")?).unwrap_or(false);
    let blank = blank.or(options.get("blank")?).unwrap_or(false);
    options.assert_all_used()?;
    budget.spend_on(text)?;
    let text = python::text(text);
    let lines = text.split('\n').count();
    let spaces = match width.as_ref().map(|width| (width.as_str(), width.as_usize())) {
        None => " ".repeat(4),
        Some((Some(spaces), _)) => spaces.to_owned(),
        Some((None, Some(width))) => {
            budget.spend(width)?;
            " ".repeat(width)
        }
        Some((None, None)) => {
            return Err(Error::new(ErrorKind::InvalidOperation, "the width is no number"));
        }
    };
    budget.spend(text.len().saturating_add(lines.saturating_mul(spaces.len())))?;
    let mut indented = String::with_capacity(text.len());
    for (index, line) in text.split('\n').enumerate() {
        if index != 0 {
            indented.push('\n');
        }
        if (index != 0 || first) && (blank || !line.is_empty() || index == 0) {
            indented.push_str(&spaces);
        }
        indented.push_str(line);
    }
    Ok(Value::from(indented))
}

/// `value[start:stop:step]` with Python's meaning.
fn slice(budget: &Budget, value: &Value, bounds: [&Value; 3]) -> Result<Value, Error> {
    let [start, stop, step] = bounds.map(|bound| {
        if bound.is_none() || bound.is_undefined() {
            return Ok(None);
        }
        bound.as_i64().map(Some).ok_or_else(|| {
            Error::new(ErrorKind::InvalidOperation, "slices are bounded by whole numbers")
        })
    });
    let (start, stop, step) = (start?, stop?, step?.unwrap_or(1));
    if step == 0 {
        return Err(Error::new(ErrorKind::InvalidOperation, "a slice cannot have a step of 0"));
    }
    if let Some(text) = value.as_str() {
        budget.spend(text.len().saturating_mul(5))?;
        let characters: Vec<char> = text.chars().collect();
        let chosen = chosen(characters.len(), start, stop, step);
        return Ok(Value::from(chosen.map(|at| characters[at]).collect::<String>()));
    }
    if !is_list(value) {
        let what = format!("a value of type {} has no slices", value.kind());
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    let list = items(budget, value)?;
    let chosen = chosen(list.len(), start, stop, step);
    Ok(Value::from(chosen.map(|at| list[at].clone()).collect::<Vec<Value>>()))
}

/// Indices of a slice, in order.
fn chosen(
    length: usize,
    start: Option<i64>,
    stop: Option<i64>,
    step: i64,
) -> impl Iterator<Item = usize> {
    let length = i64::try_from(length).unwrap_or(i64::MAX);
    let from_end = |at: i64| if at < 0 { at.saturating_add(length) } else { at };
    let (low, high) = if 0 < step { (0, length) } else { (-1, length - 1) };
    let start = start.map_or(if 0 < step { low } else { high }, |at| from_end(at).clamp(low, high));
    let stop = stop.map_or(if 0 < step { high } else { low }, |at| from_end(at).clamp(low, high));
    let mut next = Some(start);
    std::iter::from_fn(move || {
        let at = next.filter(|at| if 0 < step { *at < stop } else { stop < *at })?;
        next = at.checked_add(step);
        usize::try_from(at).ok()
    })
}

/// Whether a format asks for a very wide field.
fn has_wide_field(format: &str) -> bool {
    let mut digits = 0;
    format.chars().any(|c| {
        digits = if c.is_ascii_digit() { digits + 1 } else { 0 };
        FORMAT_DIGITS_MAX < digits
    })
}
