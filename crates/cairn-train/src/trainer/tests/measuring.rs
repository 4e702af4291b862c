//! Measuring the machine while a run goes on: once, in the run's own memory, without a trace in it.

use std::cell::Cell;

use super::*;
use crate::host::{Host, Measured};

/// A host that leaves the memory it is lent full of what is no number.
#[derive(Default)]
struct Spoiling {
    fake: FakeHost,
    measurements: Cell<usize>,
}

impl Host for Spoiling {
    fn monotonic_s(&self) -> f64 {
        self.fake.monotonic_s()
    }

    fn unix_s(&self) -> f64 {
        self.fake.unix_s()
    }

    fn anonymous_bytes(&self) -> Option<u64> {
        None
    }

    fn stop_requested(&self) -> bool {
        false
    }

    fn measure(&self, _cpu: &mut Cpu, room: &mut [f32]) -> Option<Measured> {
        assert!(!room.is_empty());
        room.fill(f32::NAN);
        self.measurements.set(self.measurements.get() + 1);
        Some(Measured { peak_flops_per_s: 5e11, products: 3 })
    }
}

/// What was observed, by name.
#[derive(Default)]
struct Order(Vec<&'static str>);

impl Observer for Order {
    fn observe(&mut self, event: &Event<'_>) {
        self.0.extend(match event {
            Event::Started { .. } => Some("started"),
            Event::Step(metrics) if metrics.step <= 2 => Some("step"),
            Event::Measured { .. } => Some("measured"),
            _ => None,
        });
    }
}

#[test]
fn a_machine_is_measured_after_the_first_step_and_nothing_of_the_run_is_lost() {
    let fixture = Fixture::new();
    let wide = ["run.weights=bf16", "optimizer.ema_decay=0.9", "run.recompute=blocks"];
    for (name, overrides) in [("plain", &[][..]), ("wide", &wide)] {
        let (straight, _) = fixture.run(name, overrides, &FakeHost::new());
        let measured = format!("{name}-measured");
        let mut trainer = fixture.open(&measured, &recipe(overrides), Cpu::detect(1)).unwrap();
        let (host, mut order) = (Spoiling::default(), Order::default());
        trainer.run(&host, &mut order).unwrap();
        assert_eq!(host.measurements.get(), 1);
        assert_eq!(order.0, ["started", "step", "measured", "step"]);
        assert_eq!(trainer.state_hash(), straight.state_hash(), "{name}");
        assert_eq!(losses(&trainer), losses(&straight), "{name}");
        let record = RunRecord::load(&trainer.folder().record()).unwrap();
        assert_eq!(record.figures["peak_flops_per_s"], 5e11);
    }
}
