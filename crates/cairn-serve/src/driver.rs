//! The thread that owns the engine. The sequences of a request come to it together through a bounded queue, and
//! their tokens go back through one channel; what nobody listens to any more is cancelled.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel,
};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use cairn_engine::{
    Engine, EngineError, Event, Finish, Model, PositionLogprobs, PrefixOutcome, Request, RequestId,
};
use tokio::sync::{Mutex, MutexGuard, mpsc, oneshot};

use crate::error::ApiError;
use crate::keys::Holder;
use crate::metrics::Metrics;

/// Requests on their way to the engine, which takes all of them between two steps.
const QUEUE_LENGTH: usize = 1024;
/// Between two looks, while nothing runs, whether somebody wants a mapped file back.
const IDLE_LOOK: Duration = Duration::from_secs(1);

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

/// What becomes of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Update {
    /// It does not wait any more; so much of its prompt was there.
    Admitted(PrefixOutcome),
    /// How likely the next tokens of its prompt were, from the second on.
    Prompt(Vec<PositionLogprobs>),
    /// Its next token, and how likely that was where this was asked for.
    Token(u32, Option<PositionLogprobs>),
    /// It is done.
    Finished(Finish),
    /// No token can be chosen.
    Failed(ApiError),
}

/// The updates of a request's sequences, by their places in it. Letting go of them cancels what runs still.
#[derive(Debug)]
pub(crate) struct Updates {
    updates: mpsc::UnboundedReceiver<(usize, Update)>,
    /// Whether anybody waits for a sequence.
    wanted: Arc<[AtomicBool]>,
}

impl Updates {
    /// The next one, if it is there already.
    pub(crate) fn ready(&mut self) -> Option<(usize, Update)> {
        self.updates.try_recv().ok()
    }

    /// The next one; `None` if the engine is gone.
    pub(crate) async fn next(&mut self) -> Option<(usize, Update)> {
        self.updates.recv().await
    }

    /// Sequences of the request.
    pub(crate) fn num_choices(&self) -> usize {
        self.wanted.len()
    }

    /// Wants no more of a sequence.
    pub(crate) fn let_go(&self, choice: usize) {
        // Read between two steps; which of them does not matter.
        self.wanted[choice].store(false, Ordering::Relaxed);
    }
}

/// How sequences come to the engine.
#[derive(Clone, Debug)]
pub(crate) enum Coming {
    /// As those of a request.
    Anew {
        /// When it came.
        begin: Instant,
        /// Whose key pays for it, if it is taken.
        holder: Holder,
        /// So many tokens.
        num_tokens: usize,
    },
    /// As a further step of a request that was taken: neither refused because others wait, nor paid, nor counted.
    Further,
}

struct Add {
    requests: Vec<Request>,
    coming: Coming,
    updates: mpsc::UnboundedSender<(usize, Update)>,
    wanted: Arc<[AtomicBool]>,
    answer: oneshot::Sender<Result<(), ApiError>>,
}

/// The way to the engine. The thread ends when the last of these is gone and what was asked is done.
#[derive(Clone, Debug)]
pub(crate) struct Driver {
    queue: SyncSender<Add>,
    /// Sequences that may wait.
    max_num_waiting: usize,
}

/// What engines of one process share: the right to compute, which they have in turns, a step each. So the
/// processor's threads are never asked for more than once.
#[derive(Clone, Debug, Default)]
pub(crate) struct Turns(Arc<Mutex<()>>);

impl Turns {
    /// Waits for a turn, which lasts until this is dropped.
    pub(crate) fn take(&self) -> MutexGuard<'_, ()> {
        self.0.blocking_lock()
    }
}

/// The engine's thread.
#[derive(Debug)]
pub(crate) struct DriverThread {
    thread: JoinHandle<Result<(), DriverError>>,
    /// Completed when the thread ends, however it does.
    ended: oneshot::Receiver<()>,
}

impl DriverThread {
    /// Starts a thread.
    pub(crate) fn spawn(
        name: &str,
        run: impl FnOnce() -> Result<(), DriverError> + Send + 'static,
    ) -> Result<Self, DriverError> {
        let (alive, ended) = oneshot::channel();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _alive: oneshot::Sender<()> = alive;
            run()
        });
        Ok(Self { thread: thread.map_err(DriverError::Spawn)?, ended })
    }

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
    pub(crate) fn start<M: Model + Send + 'static>(
        engine: Engine<M>,
        (metrics, turns): (Arc<Metrics>, Turns),
    ) -> Result<(Self, DriverThread), DriverError> {
        let max_num_waiting = engine.options().max_num_waiting;
        let (queue, requests) = sync_channel(QUEUE_LENGTH);
        let thread = DriverThread::spawn("engine", move || {
            let load = (0, 0);
            Running { engine, requests, metrics, turns, live: HashMap::new(), load }.run()
        })?;
        Ok((Self { queue, max_num_waiting }, thread))
    }

    /// Refuses more sequences at a time than may ever wait.
    pub(crate) fn check_count(&self, count: usize) -> Result<(), ApiError> {
        match count <= self.max_num_waiting {
            true => Ok(()),
            false => Err(ApiError::too_many(count, self.max_num_waiting)),
        }
    }

    /// Hands the sequences of a request to the engine: all of them, or none.
    pub(crate) async fn add(
        &self,
        requests: Vec<Request>,
        coming: Coming,
    ) -> Result<Updates, ApiError> {
        if let Coming::Anew { .. } = &coming {
            self.check_count(requests.len())?;
        }
        let (sender, updates) = mpsc::unbounded_channel();
        let (answer, answered) = oneshot::channel();
        let wanted: Arc<[AtomicBool]> = requests.iter().map(|_| AtomicBool::new(true)).collect();
        let add = Add { requests, coming, updates: sender, wanted: Arc::clone(&wanted), answer };
        match self.queue.try_send(add) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(ApiError::busy(QUEUE_LENGTH)),
            Err(TrySendError::Disconnected(_)) => return Err(ApiError::engine_gone()),
        }
        match answered.await {
            Ok(Ok(())) => Ok(Updates { updates, wanted }),
            Ok(Err(refused)) => Err(refused),
            Err(_) => Err(ApiError::engine_gone()),
        }
    }
}

/// Where the updates of a sequence go.
struct Listener {
    updates: mpsc::UnboundedSender<(usize, Update)>,
    wanted: Arc<[AtomicBool]>,
    choice: usize,
    /// When the request came, and then when its last token did.
    since: Instant,
    has_begun: bool,
    /// Whether it is counted.
    is_counted: bool,
}

impl Listener {
    /// Whether it has had enough: its answer ended at a stop string.
    fn is_let_go(&self) -> bool {
        !self.wanted[self.choice].load(Ordering::Relaxed)
    }
}

/// What the thread has.
struct Running<M> {
    engine: Engine<M>,
    requests: Receiver<Add>,
    metrics: Arc<Metrics>,
    turns: Turns,
    live: HashMap<RequestId, Listener>,
    /// Sequences that ran and waited when this was last told.
    load: (usize, usize),
}

impl<M: Model> Running<M> {
    fn run(mut self) -> Result<(), DriverError> {
        let mut events = Vec::new();
        loop {
            if !self.take_requests()? {
                return Ok(());
            }
            self.cancel_abandoned();
            if self.engine.num_requests() != 0 {
                let turn = self.turns.take();
                let report = self.engine.step(&mut events)?;
                drop(turn);
                self.metrics.note_step(&report);
                self.note_load((report.num_running, report.num_waiting));
                let now = Instant::now();
                events.drain(..).for_each(|event| self.tell(event, now));
            } else {
                self.note_load((0, 0));
            }
        }
    }

    /// Tells what runs and waits here, beside what other engines have told.
    fn note_load(&mut self, load: (usize, usize)) {
        if self.load != load {
            self.metrics.note_load(std::mem::replace(&mut self.load, load), load);
        }
    }

    /// Takes what has come; waits for something if there is nothing to do. Whether it is not the end.
    fn take_requests(&mut self) -> Result<bool, EngineError> {
        while self.engine.num_requests() == 0 {
            match self.requests.recv_timeout(IDLE_LOOK) {
                Ok(add) => self.add(add),
                Err(RecvTimeoutError::Timeout) => self.engine.keep()?,
                Err(RecvTimeoutError::Disconnected) => return Ok(false),
            }
        }
        loop {
            match self.requests.try_recv() {
                Ok(add) => self.add(add),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Ok(true),
            }
        }
    }

    fn add(&mut self, add: Add) {
        let Add { requests, coming, updates, wanted, answer } = add;
        let num_prompt_tokens: usize = requests.iter().map(|request| request.prompt.len()).sum();
        let ids = match self.queue(requests, &coming) {
            Ok(ids) => ids,
            Err(refused) => {
                // Who asked may have left.
                let _ = answer.send(Err(refused));
                return;
            }
        };
        let (since, is_counted) = match coming {
            Coming::Anew { begin, .. } => (begin, true),
            Coming::Further => (Instant::now(), false),
        };
        if is_counted {
            self.metrics.note_request(ids.len(), num_prompt_tokens);
        }
        for (choice, id) in ids.into_iter().enumerate() {
            let (updates, wanted) = (updates.clone(), Arc::clone(&wanted));
            // The first token of a further step comes after another one.
            let has_begun = !is_counted;
            let listener = Listener { updates, wanted, choice, since, has_begun, is_counted };
            self.live.insert(id, listener);
        }
        // Who asked may have left; then the sequences are cancelled before their first step.
        let _ = answer.send(Ok(()));
    }

    /// Has the engine take all of these, and the key pay for them; or none.
    fn queue(
        &mut self,
        requests: Vec<Request>,
        coming: &Coming,
    ) -> Result<Vec<RequestId>, ApiError> {
        let mut ids = Vec::with_capacity(requests.len());
        let take = || {
            for request in requests {
                let taken = match coming {
                    Coming::Anew { .. } => self.engine.add_request(request),
                    Coming::Further => self.engine.add_further(request),
                };
                ids.push(taken.map_err(|refused| ApiError::from_engine(&refused))?);
            }
            match coming {
                Coming::Anew { holder, num_tokens, .. } => holder.spend(*num_tokens),
                Coming::Further => Ok(()),
            }
        };
        let taken = take();
        if taken.is_err() {
            ids.drain(..).for_each(|id| _ = self.engine.cancel(id));
        }
        taken.map(|()| ids)
    }

    fn cancel_abandoned(&mut self) {
        let Self { engine, live, metrics, .. } = self;
        live.retain(|&id, listener| {
            // A stop string is an end like others, and all is over after the last of them.
            let (is_let_go, is_closed) = (listener.is_let_go(), listener.updates.is_closed());
            if !is_let_go && !is_closed {
                return true;
            }
            if listener.is_counted && is_let_go {
                metrics.note_finished();
            } else if listener.is_counted {
                metrics.note_cancelled();
            }
            engine.cancel(id);
            false
        });
    }

    fn tell(&mut self, event: Event, now: Instant) {
        let (id, update, is_last) = match event {
            Event::Admitted { request, prefix } => (request, Update::Admitted(prefix), false),
            Event::PromptLogprobs { request, logprobs } => {
                (request, Update::Prompt(logprobs), false)
            }
            Event::Token { request, token, logprobs } => {
                (request, Update::Token(token, logprobs), false)
            }
            Event::Finished { request, finish } => (request, Update::Finished(finish), true),
            Event::Failed { request, error } => {
                (request, Update::Failed(ApiError::from_choice(&error)), true)
            }
        };
        let Some(listener) = self.live.get_mut(&id) else { return };
        match &update {
            Update::Token(..) => {
                let after = now - std::mem::replace(&mut listener.since, now);
                self.metrics.note_token(after, listener.has_begun);
                listener.has_begun = true;
            }
            _ if !listener.is_counted => {}
            Update::Admitted(prefix) => self.metrics.note_prefix(*prefix),
            Update::Failed(_) => self.metrics.note_failed(),
            Update::Finished(_) => self.metrics.note_finished(),
            Update::Prompt(_) => {}
        }
        // Nobody may listen any more: noticed before the next step.
        let _ = listener.updates.send((listener.choice, update));
        if is_last {
            self.live.remove(&id);
        }
    }
}
