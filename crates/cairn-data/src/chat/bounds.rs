//! What a template may spend.
//!
//! The engine counts steps; what one step may cost is counted here, in units of work: about one for
//! each byte that an operation reads or writes, and [`ITEM`] for each item of a list. Values that
//! are made cost what they take, so the sum bounds memory as well as time. Lists and maps are
//! walked as if nothing in them were shared, which is what printing them would do.
//!
//! **Invariant:** a value that a template has is not nested deeper than [`DEPTH_MAX`], and no
//! namespace lies within a value: values have no cycles, and no walk of one can exhaust the stack.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Most steps of the engine for one conversation.
pub const CHAT_STEPS_MAX: u64 = 4_000_000;

/// Most units of work for one conversation: bytes that are read or made, 32 for an item of a list.
pub const CHAT_WORK_MAX: usize = 128 << 20;

/// Units for an item of a list or map, about its size in memory.
pub(super) const ITEM: usize = 32;

/// Deepest nesting of lists and maps; what JSON readers allow.
const DEPTH_MAX: usize = 128;

/// What is left of a rendering's work, and what the template said when it gave up.
#[derive(Debug)]
pub(super) struct Budget {
    left: AtomicUsize,
    raised: Mutex<Option<String>>,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self { left: AtomicUsize::new(CHAT_WORK_MAX), raised: Mutex::new(None) }
    }

    /// Pays for work, before it is done.
    pub(super) fn spend(&self, units: usize) -> Result<(), Error> {
        let pay = |left: usize| left.checked_sub(units);
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, pay) {
            Ok(_) => Ok(()),
            Err(_) => {
                Err(too_much(format!("more than {CHAT_WORK_MAX} bytes would be read or written")))
            }
        }
    }

    /// Pays for items of a list.
    pub(super) fn spend_items(&self, items: usize) -> Result<(), Error> {
        self.spend(items.saturating_mul(ITEM))
    }

    /// Pays for a walk over all of a value, and refuses what must not be walked.
    pub(super) fn spend_on(&self, value: &Value) -> Result<(), Error> {
        self.walk(value, 0)
    }

    fn walk(&self, value: &Value, depth: usize) -> Result<(), Error> {
        if DEPTH_MAX < depth {
            return Err(too_much(format!("a value is nested more than {DEPTH_MAX} deep")));
        }
        self.spend(ITEM + value.as_str().map_or(0, str::len))?;
        if value.as_str().is_some() {
            return Ok(());
        }
        let Some(object) = value.as_object() else { return Ok(()) };
        if 0 < depth && is_namespace(value) {
            let reason = "a namespace cannot be kept in another value";
            return Err(Error::new(ErrorKind::InvalidOperation, reason));
        }
        match value.kind() {
            ValueKind::Map => {
                for (key, item) in object.try_iter_pairs().into_iter().flatten() {
                    self.walk(&key, depth + 1)?;
                    self.walk(&item, depth + 1)?;
                }
            }
            ValueKind::Seq | ValueKind::Iterable => {
                for item in object.try_iter().into_iter().flatten() {
                    self.walk(&item, depth + 1)?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Notes what the template says.
    pub(super) fn raise(&self, message: &str) -> Error {
        let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        *raised = Some(message.to_owned());
        Error::new(ErrorKind::InvalidOperation, message.to_owned())
    }

    /// What the template said, if it gave up.
    pub(super) fn raised(&self) -> Option<String> {
        self.raised.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The error of a bound.
pub(super) fn too_much(reason: String) -> Error {
    Error::new(ErrorKind::OutOfFuel, reason)
}

/// Whether a value is the engine's namespace, the only one that can change.
pub(super) fn is_namespace(value: &Value) -> bool {
    value.as_object().is_some_and(|object| object.type_name().contains("namespace_object"))
}
