//! Properties of the learning rate over random schedules.

use super::*;
use proptest::prelude::*;

fn schedules() -> impl Strategy<Value = Schedule> {
    let kinds = [ScheduleKind::Constant, ScheduleKind::Cosine, ScheduleKind::Wsd];
    let numbers = (1e-5..1.0, 0_u64..50, 1_u64..500, 0_u64..500, 0.0..1.0);
    (prop::sample::select(kinds.to_vec()), numbers).prop_map(
        |(kind, (peak, warmup_steps, rest, decay_steps, final_fraction))| Schedule {
            kind,
            peak,
            warmup_steps,
            // As recipes resolve it.
            decay_steps: decay_steps.min(rest),
            total_steps: warmup_steps + rest,
            final_fraction,
        },
    )
}

proptest! {
    #[test]
    fn it_rises_to_the_peak_and_never_again(schedule in schedules()) {
        let rates: Vec<f64> = (0..schedule.total_steps).map(|step| schedule.at(step)).collect();
        let warm = usize::try_from(schedule.warmup_steps).unwrap();
        prop_assert!(rates[..warm].windows(2).all(|pair| pair[0] < pair[1]));
        prop_assert!(rates[warm..].windows(2).all(|pair| pair[0] >= pair[1]));
        prop_assert!(rates.iter().all(|&rate| rate >= 0.0 && rate <= schedule.peak));
        if warm != 0 {
            prop_assert_eq!(rates[warm - 1].to_bits(), schedule.peak.to_bits());
        }
    }

    #[test]
    fn it_ends_at_the_final_fraction(schedule in schedules()) {
        prop_assume!(schedule.decay_steps > 0 && schedule.kind != ScheduleKind::Constant);
        for step in [schedule.total_steps - 1, schedule.total_steps + 7] {
            let fraction = schedule.at(step) / schedule.peak;
            prop_assert!((fraction - schedule.final_fraction).abs() < 1e-9, "{step}: {fraction}");
        }
    }
}

#[test]
fn wsd_is_flat_between() {
    let schedule = Schedule {
        kind: ScheduleKind::Wsd,
        peak: 2.0,
        warmup_steps: 5,
        decay_steps: 10,
        total_steps: 50,
        final_fraction: 0.0,
    };
    assert!((4..40).all(|step| schedule.at(step).to_bits() == 2.0_f64.to_bits()));
    for (step, expected) in [(40, 1.8), (44, 1.0), (49, 0.0)] {
        assert!((schedule.at(step) - expected).abs() < 1e-12);
    }
}
