//! Training: plans, steps, the loop, checkpoints and run folders.
//!
//! | file | noun |
//! |---|---|
//! | `schedule` | the learning rate as a function of the step |
//! | `programs` | forward and backward, scoring, update |
//! | `plan` | bytes, arithmetic and time of a run, before it starts |
//! | `pace` | how fast this machine trains, measured |
//! | `step_bench` | the same, instruction by instruction |
//! | `batch`, `masking`, `learner` | the steps that change a model |
//! | `validation`, `progress` | how well it does, and when to give up |
//! | `trainer` | the loop: opening, stepping, saving, concluding |
//! | `checkpoint`, `resume`, `initial` | its state in files, and back |
//! | `metrics`, `tensorboard`, `summary`, `report` | what people see of it |
//! | `host`, `observer` | what lies outside, and who listens |
//!
//! **Invariants:** nothing here prints, reads the clock or the environment, or installs a signal
//! handler. The state after a step depends on recipe and data alone.
#![forbid(unsafe_code)]

mod batch;
mod checkpoint;
mod error;
mod host;
mod initial;
mod learner;
mod masking;
mod metrics;
mod observer;
mod pace;
mod plan;
mod programs;
mod progress;
mod report;
mod resume;
mod schedule;
mod step_bench;
mod summary;
mod tensorboard;
mod trainer;
mod validation;

pub use batch::MicroBatch;
pub use checkpoint::{StateError, TrainState};
pub use error::{FailedBatch, TrainError};
pub use host::{FakeHost, Host, Measured};
pub use learner::{Learner, Place, Weights};
pub use masking::Masking;
pub use metrics::{Metric, read_metrics};
pub use observer::{Event, Observer, Silent, StepMetrics, ValidationMetrics, Warning};
pub use pace::{PaceError, measure_pace};
pub use plan::{Pace, Plan, PlanError, PlanRequest, PredictedBytes, Shape};
pub use programs::{ProgramOptions, Programs, ProgramsError};
pub use progress::{Best, EarlyStop, Progress};
pub use report::{Chart, Line, Report};
pub use resume::ResumeError;
pub use schedule::Schedule;
pub use step_bench::{StepFigures, StepPart, bench_steps};
pub use summary::Summary;
pub use tensorboard::EventFile;
pub use trainer::{Ending, Outcome, Setup, Trainer};
pub use validation::{Score, Validation, ValidationError};
