//! What a template can call: Jinja2's filters, tests and functions as transformers offers them,
//! each paid for.

use std::sync::Arc;

use jiff::civil::DateTime;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Rest, ValueKind, ValueOrKwargs};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters, functions, tests};

use super::bounds::{Budget, CHAT_STEPS_MAX};
use super::{operations, python};

/// Calls that may nest; the stack of the thread is made for it.
const RECURSION_MAX: usize = 200;

/// Longest text of a time.
const TIME_FORMAT_MAX: usize = 256;

/// The whitespace rules of transformers.
pub(super) fn syntax() -> Result<SyntaxConfig, Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// Fills an empty environment.
pub(super) fn fill(environment: &mut Environment<'_>, now: Option<DateTime>, budget: &Arc<Budget>) {
    environment.set_fuel(Some(CHAT_STEPS_MAX));
    environment.set_recursion_limit(RECURSION_MAX);
    add_filters(environment, budget);
    add_tests(environment, budget);
    add_functions(environment, now, budget);
    operations::add(environment, budget);
    let paid = Arc::clone(budget);
    environment.set_unknown_method_callback(move |state, value, method, arguments| {
        operations::call_method(&paid, state, (value, method), arguments)
    });
    let paid = Arc::clone(budget);
    environment.set_formatter(move |output, _, value| match value.as_str() {
        Some(text) => {
            paid.spend(text.len())?;
            output.write_str(text).map_err(Error::from)
        }
        None => {
            paid.spend_on(value)?;
            let text = python::text(value);
            paid.spend(text.len())?;
            output.write_str(&text).map_err(Error::from)
        }
    });
}

fn add_filters(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    let named = [
        ("upper", Value::from_function(filters::upper)),
        ("lower", Value::from_function(filters::lower)),
        ("title", Value::from_function(filters::title)),
        ("capitalize", Value::from_function(filters::capitalize)),
        ("trim", Value::from_function(filters::trim)),
        ("length", Value::from_function(filters::length)),
        ("count", Value::from_function(filters::length)),
        ("default", Value::from_function(operations::default)),
        ("d", Value::from_function(operations::default)),
        ("dictsort", Value::from_function(filters::dictsort)),
        ("items", Value::from_function(filters::items)),
        ("reverse", Value::from_function(filters::reverse)),
        ("split", Value::from_function(filters::split)),
        ("first", Value::from_function(filters::first)),
        ("last", Value::from_function(filters::last)),
        ("min", Value::from_function(filters::min)),
        ("max", Value::from_function(filters::max)),
        ("sort", Value::from_function(filters::sort)),
        ("list", Value::from_function(filters::list)),
        ("unique", Value::from_function(filters::unique)),
        ("sum", Value::from_function(filters::sum)),
        ("abs", Value::from_function(filters::abs)),
        ("int", Value::from_function(filters::int)),
        ("float", Value::from_function(filters::float)),
        ("round", Value::from_function(filters::round)),
        ("attr", Value::from_function(filters::attr)),
        ("map", Value::from_function(filters::map)),
        ("select", Value::from_function(filters::select)),
        ("reject", Value::from_function(filters::reject)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
        ("groupby", Value::from_function(filters::groupby)),
    ];
    for (name, inner) in named {
        let paid = Arc::clone(budget);
        environment.add_filter(
            name,
            move |state: &mut State<'_, '_>, arguments: Rest<ValueOrKwargs>| {
                operations::call(&paid, state, (name, &inner), &arguments.into_values())
            },
        );
    }
}

fn add_tests(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    environment.add_test("defined", tests::is_defined);
    environment.add_test("undefined", tests::is_undefined);
    environment.add_test("none", tests::is_none);
    environment.add_test("boolean", tests::is_boolean);
    environment.add_test("true", tests::is_true);
    environment.add_test("false", tests::is_false);
    environment.add_test("odd", tests::is_odd);
    environment.add_test("even", tests::is_even);
    environment.add_test("divisibleby", tests::is_divisibleby);
    environment.add_test("number", tests::is_number);
    environment.add_test("integer", tests::is_integer);
    environment.add_test("float", tests::is_float);
    environment.add_test("string", tests::is_string);
    environment.add_test("mapping", tests::is_mapping);
    environment.add_test("sameas", tests::is_sameas);
    // In Python a text and a map can be counted and walked, too.
    let walks = |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String};
        matches!(value.kind(), String | Seq | Map | Iterable)
    };
    environment.add_test("sequence", move |value: &Value| walks(value));
    environment.add_test("iterable", move |value: &Value| walks(value) || value.is_undefined());
    let compared = [
        ("eq", Value::from_function(tests::is_eq)),
        ("equalto", Value::from_function(tests::is_eq)),
        ("==", Value::from_function(tests::is_eq)),
        ("ne", Value::from_function(tests::is_ne)),
        ("!=", Value::from_function(tests::is_ne)),
        ("lt", Value::from_function(tests::is_lt)),
        ("lessthan", Value::from_function(tests::is_lt)),
        ("le", Value::from_function(tests::is_le)),
        ("gt", Value::from_function(tests::is_gt)),
        ("greaterthan", Value::from_function(tests::is_gt)),
        ("ge", Value::from_function(tests::is_ge)),
        ("in", Value::from_function(tests::is_in)),
        ("lower", Value::from_function(tests::is_lower)),
        ("upper", Value::from_function(tests::is_upper)),
    ];
    for (name, inner) in compared {
        let paid = Arc::clone(budget);
        environment.add_test(name, move |state: &mut State<'_, '_>, arguments: Rest<Value>| {
            arguments.iter().try_for_each(|argument| paid.spend_on(argument))?;
            inner.call(state, &arguments)
        });
    }
}

fn add_functions(environment: &mut Environment<'_>, now: Option<DateTime>, budget: &Arc<Budget>) {
    let paid = Arc::clone(budget);
    environment.add_function("raise_exception", move |message: &Value| -> Result<Value, Error> {
        paid.spend_on(message)?;
        Err(paid.raise(&python::text(message)))
    });
    let named = [
        ("range", Value::from_function(functions::range)),
        ("dict", Value::from_function(functions::dict)),
        ("namespace", Value::from_function(functions::namespace)),
    ];
    for (name, inner) in named {
        let paid = Arc::clone(budget);
        environment.add_function(
            name,
            move |state: &mut State<'_, '_>, arguments: Rest<ValueOrKwargs>| {
                operations::call(&paid, state, (name, &inner), &arguments.into_values())
            },
        );
    }
    let Some(now) = now else { return };
    environment.add_function("strftime_now", move |format: &str| {
        if TIME_FORMAT_MAX < format.len() {
            return Err(Error::new(ErrorKind::InvalidOperation, "the time's format is too long"));
        }
        jiff::fmt::strtime::format(format, now)
            .map_err(|error| Error::new(ErrorKind::InvalidOperation, error.to_string()))
    });
}
