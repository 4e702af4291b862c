//! The models that are served, and the memory they may take. Models come and go while requests run: who has found
//! a model keeps it to the end of the answer, and its memory is free when its engine's thread has ended.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use cairn_spec::Hint;
use serde_json::Value;
use tokio::sync::{mpsc, watch};

use crate::driver::{DriverError, DriverThread, Turns};
use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::model::{LoadedModel, ServedModel};

/// Memory for models, which those that are loaded or being loaded share.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Bytes for all of them; as many as there are, where nothing is said.
    budget: Option<usize>,
    used: Arc<AtomicUsize>,
}

/// Memory that a model has, until this is dropped.
#[derive(Debug)]
pub struct Room {
    bytes: usize,
    used: Arc<AtomicUsize>,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

/// A model does not fit beside the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the model takes {bytes} bytes; of {budget} for all models {used} are taken")]
pub struct NoRoom {
    /// Bytes of the model.
    pub bytes: usize,
    /// Bytes that the others take.
    pub used: usize,
    /// Bytes for all.
    pub budget: usize,
}

impl Hint for NoRoom {
    fn hints(&self) -> Vec<String> {
        vec![
            "a smaller --max-num-seqs or --max-model-len takes less, as does --kv-cache-dtype q8"
                .to_owned(),
            "or raise --memory".to_owned(),
        ]
    }
}

impl Memory {
    /// Nothing is taken of `budget` bytes.
    pub fn new(budget: Option<usize>) -> Self {
        Self { budget, used: Arc::default() }
    }

    /// Takes so many bytes.
    ///
    /// # Errors
    ///
    /// [`NoRoom`] if they are not left.
    pub fn take(&self, bytes: usize) -> Result<Room, NoRoom> {
        let budget = self.budget.unwrap_or(usize::MAX);
        let more = |used: usize| used.checked_add(bytes).filter(|&used| used <= budget);
        match self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, more) {
            Ok(_) => Ok(Room { bytes, used: Arc::clone(&self.used) }),
            Err(used) => Err(NoRoom { bytes, used, budget }),
        }
    }
}

/// Models at a moment, the first of which answers requests that name none.
#[derive(Clone, Debug)]
pub(crate) struct Serving(Arc<[Served]>);

/// A model, and how its end is learned of.
#[derive(Clone, Debug)]
struct Served {
    model: Arc<ServedModel>,
    bytes: usize,
    /// Closed when its engine's thread has ended.
    ended: watch::Receiver<()>,
}

impl Served {
    fn entry(&self) -> Value {
        self.model.entry(self.bytes)
    }
}

impl Serving {
    /// The model of this name, or the first.
    pub(crate) fn find(&self, asked: Option<&str>) -> Result<Arc<ServedModel>, ApiError> {
        let found = match asked {
            Some(name) => self.0.iter().find(|served| served.model.parts.name == name),
            None => self.0.first(),
        };
        match (found, asked) {
            (Some(found), _) => Ok(Arc::clone(&found.model)),
            (None, Some(name)) => Err(ApiError::no_model(name, &self.names())),
            (None, None) => Err(ApiError::nothing_served()),
        }
    }

    /// The entries of `/v1/models`.
    pub(crate) fn entries(&self) -> Vec<Value> {
        self.0.iter().map(Served::entry).collect()
    }

    /// The entry of a model.
    pub(crate) fn entry(&self, name: &str) -> Result<Value, ApiError> {
        let found = self.0.iter().find(|served| served.model.parts.name == name);
        found.map(Served::entry).ok_or_else(|| ApiError::no_model(name, &self.names()))
    }

    /// Refuses a name that a model has.
    pub(crate) fn check_absent(&self, name: &str) -> Result<(), ApiError> {
        match self.names().contains(&name) {
            true => Err(ApiError::conflict("model_exists", format!("'{name}' is served already"))),
            false => Ok(()),
        }
    }

    fn names(&self) -> Vec<&str> {
        self.0.iter().map(|served| served.model.parts.name.as_str()).collect()
    }
}

/// The models that are served.
#[derive(Debug)]
pub(crate) struct Models {
    state: RwLock<Option<State>>,
    pub(crate) memory: Memory,
    metrics: Arc<Metrics>,
    turns: Turns,
}

#[derive(Debug)]
struct State {
    serving: Serving,
    /// Told what each engine has ended with.
    ends: mpsc::UnboundedSender<Result<(), DriverError>>,
}

/// What engines have ended with; closed when all have, once the server is to end.
pub(crate) type Ends = mpsc::UnboundedReceiver<Result<(), DriverError>>;

impl Models {
    /// None yet.
    pub(crate) fn new(memory: Memory, metrics: Arc<Metrics>) -> (Self, Ends) {
        let (ends, receiver) = mpsc::unbounded_channel();
        let state = State { serving: Serving(Arc::default()), ends };
        let models =
            Self { state: RwLock::new(Some(state)), memory, metrics, turns: Turns::default() };
        (models, receiver)
    }

    /// The models of this moment. Whoever has them is served to the end.
    pub(crate) fn serving(&self) -> Result<Serving, ApiError> {
        // Nothing panics with the lock held.
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.as_ref().map(|state| state.serving.clone()).ok_or_else(ApiError::draining)
    }

    /// Serves a model from now on, in the place of one of the same name, whose end is told of as by
    /// [`remove`](Self::remove).
    ///
    /// Has to be called where tasks can be spawned.
    pub(crate) fn add(
        &self,
        loaded: LoadedModel,
        now: u64,
    ) -> Result<Result<Option<watch::Receiver<()>>, ApiError>, DriverError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let Some(State { serving, ends }) = state.as_mut() else {
            return Ok(Err(ApiError::draining()));
        };
        let shared = (Arc::clone(&self.metrics), self.turns.clone());
        let (model, thread, room) = loaded.start(shared, now)?;
        let bytes = room.bytes;
        let ended = watch_over(thread, room, ends.clone());
        let served = Served { model: Arc::new(model), bytes, ended };
        let mut list = serving.0.to_vec();
        let name = &served.model.parts.name;
        let replaced = match list.iter_mut().find(|other| other.model.parts.name == *name) {
            Some(other) => Some(std::mem::replace(other, served).ended),
            None => {
                list.push(served);
                None
            }
        };
        *serving = Serving(list.into());
        Ok(Ok(replaced))
    }

    /// Serves a model no more. What is returned is closed when its engine has ended and its memory is free.
    pub(crate) fn remove(&self, name: &str) -> Result<watch::Receiver<()>, ApiError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let state = state.as_mut().ok_or_else(ApiError::draining)?;
        let mut list = state.serving.0.to_vec();
        let Some(index) = list.iter().position(|served| served.model.parts.name == name) else {
            return Err(ApiError::no_model(name, &state.serving.names()));
        };
        let removed = list.remove(index);
        state.serving = Serving(list.into());
        Ok(removed.ended)
    }

    /// Takes no more requests.
    pub(crate) fn drain(&self) {
        self.state.write().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// Waits for the end of an engine's thread and tells of it.
fn watch_over(
    mut thread: DriverThread,
    room: Room,
    ends: mpsc::UnboundedSender<Result<(), DriverError>>,
) -> watch::Receiver<()> {
    let (alive, ended) = watch::channel(());
    tokio::spawn(async move {
        thread.ended().await;
        // What it had is gone when it can be joined.
        let end = tokio::task::spawn_blocking(|| thread.join()).await;
        drop(room);
        drop(alive);
        // Nobody asks any more where the server has given up waiting.
        let _ = ends.send(end.unwrap_or(Err(DriverError::Panicked)));
    });
    ended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_taken_before_it_is_used_and_given_back() {
        let memory = Memory::new(Some(100));
        let first = memory.take(60).unwrap();
        assert_eq!(memory.take(41).unwrap_err(), NoRoom { bytes: 41, used: 60, budget: 100 });
        let second = memory.take(40).unwrap();
        assert_eq!(memory.used.load(Ordering::Acquire), 100);
        drop(first);
        assert!(memory.take(61).is_err() && memory.take(60).is_ok());
        drop(second);
        assert_eq!(memory.used.load(Ordering::Acquire), 0);
        assert!(memory.take(usize::MAX).is_err());
        assert!(Memory::new(None).take(usize::MAX).is_ok());
    }
}
