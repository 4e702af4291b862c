//! The thread that owns the engine. Requests come to it through a bounded queue, and their tokens go back
//! through a channel each; a channel that nobody listens to any more cancels its request.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};
use std::thread::JoinHandle;

use cairn_engine::{Engine, EngineError, Event, Finish, Request, RequestError, RequestId};
use tokio::sync::{mpsc, oneshot};

use crate::error::ApiError;
use crate::metrics::Metrics;

/// Requests on their way to the engine, which takes all of them between two steps.
const QUEUE_LENGTH: usize = 1024;

/// Why the engine's thread ended before it was asked to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DriverError {
    /// The engine failed, which only a bug makes it do.
    #[error("the engine failed")]
    Engine(#[from] EngineError),
    /// Its thread panicked.
    #[error("the engine's thread panicked")]
    Panicked,
    /// There is no thread for it.
    #[error("cannot start the engine's thread")]
    Spawn(#[source] std::io::Error),
}

/// What becomes of a request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Update {
    /// Its next token.
    Token(u32),
    /// It is done.
    Finished(Finish),
    /// No token can be chosen.
    Failed(String),
}

/// The updates of one request. Letting go of them cancels it.
#[derive(Debug)]
pub(crate) struct Updates(mpsc::UnboundedReceiver<Update>);

impl Updates {
    /// The next one; `None` if the engine is gone.
    pub(crate) async fn next(&mut self) -> Option<Update> {
        self.0.recv().await
    }
}

struct Add {
    request: Request,
    updates: mpsc::UnboundedSender<Update>,
    answer: oneshot::Sender<Result<(), RequestError>>,
}

/// The way to the engine. The thread ends when the last of these is gone and what was asked is done.
#[derive(Clone, Debug)]
pub(crate) struct Driver {
    queue: SyncSender<Add>,
}

/// The engine's thread.
#[derive(Debug)]
pub(crate) struct DriverThread {
    thread: JoinHandle<Result<(), DriverError>>,
    /// Completed when the thread ends, however it does.
    ended: oneshot::Receiver<()>,
}

impl DriverThread {
    /// Waits until the thread has ended; may be waited for again if that is interrupted.
    pub(crate) async fn ended(&mut self) {
        // An error says that the sender is gone, which is the same.
        let _ = (&mut self.ended).await;
    }

    /// What it ended with.
    pub(crate) fn join(self) -> Result<(), DriverError> {
        self.thread.join().unwrap_or(Err(DriverError::Panicked))
    }
}

impl Driver {
    /// Starts the thread.
    pub(crate) fn start(
        engine: Engine,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, DriverThread), DriverError> {
        let (queue, requests) = sync_channel(QUEUE_LENGTH);
        let (alive, ended) = oneshot::channel();
        let thread = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let _alive: oneshot::Sender<()> = alive;
            Running { engine, requests, metrics, live: HashMap::new() }.run()
        });
        let thread = thread.map_err(DriverError::Spawn)?;
        Ok((Self { queue }, DriverThread { thread, ended }))
    }

    /// Hands a request to the engine.
    pub(crate) async fn add(&self, request: Request) -> Result<Updates, ApiError> {
        let (sender, updates) = mpsc::unbounded_channel();
        let (answer, answered) = oneshot::channel();
        match self.queue.try_send(Add { request, updates: sender, answer }) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(ApiError::busy(QUEUE_LENGTH)),
            Err(TrySendError::Disconnected(_)) => return Err(ApiError::engine_gone()),
        }
        match answered.await {
            Ok(Ok(())) => Ok(Updates(updates)),
            Ok(Err(refused)) => Err(ApiError::from_engine(&refused)),
            Err(_) => Err(ApiError::engine_gone()),
        }
    }
}

/// What the thread has.
struct Running {
    engine: Engine,
    requests: Receiver<Add>,
    metrics: Arc<Metrics>,
    live: HashMap<RequestId, mpsc::UnboundedSender<Update>>,
}

impl Running {
    fn run(mut self) -> Result<(), DriverError> {
        let mut events = Vec::new();
        loop {
            if self.take_requests().is_none() {
                return Ok(());
            }
            self.cancel_abandoned();
            if self.engine.num_requests() != 0 {
                let report = self.engine.step(&mut events)?;
                self.metrics.note_step(&report);
                events.drain(..).for_each(|event| self.tell(event));
            } else {
                self.metrics.note_idle();
            }
        }
    }

    /// Takes what has come; waits for something if there is nothing to do. `None` at the end.
    fn take_requests(&mut self) -> Option<()> {
        if self.engine.num_requests() == 0 {
            let add = self.requests.recv().ok()?;
            self.add(add);
        }
        loop {
            match self.requests.try_recv() {
                Ok(add) => self.add(add),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Some(()),
            }
        }
    }

    fn add(&mut self, add: Add) {
        let Add { request, updates, answer } = add;
        let num_prompt_tokens = request.prompt.len();
        let added = self.engine.add_request(request);
        if let Ok(id) = &added {
            self.live.insert(*id, updates);
            self.metrics.note_request(num_prompt_tokens);
        }
        // Who asked may have left; then the request is cancelled before its first step.
        let _ = answer.send(added.map(|_| ()));
    }

    fn cancel_abandoned(&mut self) {
        let Self { engine, live, metrics, .. } = self;
        live.retain(|&id, updates| {
            let is_listened_to = !updates.is_closed();
            if !is_listened_to {
                engine.cancel(id);
                metrics.note_cancelled();
            }
            is_listened_to
        });
    }

    fn tell(&mut self, event: Event) {
        let (id, update, is_last) = match event {
            Event::Token { request, token, .. } => (request, Update::Token(token), false),
            Event::Finished { request, finish } => (request, Update::Finished(finish), true),
            Event::Failed { request, error } => (request, Update::Failed(error.to_string()), true),
        };
        let Some(updates) = self.live.get(&id) else { return };
        // Nobody may listen any more: noticed before the next step.
        let _ = updates.send(update);
        if is_last {
            self.live.remove(&id);
            self.metrics.note_finished();
        }
    }
}
