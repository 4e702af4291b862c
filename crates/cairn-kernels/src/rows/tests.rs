//! Kernels against references; joining and splitting are inverses, picking and adding adjoints.

use proptest::prelude::*;

use super::*;
use crate::testing::{Numbers, check_bits, functional};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn kernels_equal_references(
        n in 0..40_usize, d in 1..40_usize, e in 1..40_usize, wide: bool, seed: u64,
    ) {
        let d = if wide { d * 100 } else { d };
        let mut numbers = Numbers::new(seed);
        let (a, b) = (numbers.floats(n * d, 1.0), numbers.floats(n * e, 1.0));
        let rows = numbers.indices(2 * n, n.max(1));
        let added = numbers.floats(2 * n * d, 1.0);
        check_bits("rows", |cpu| {
            let mut joined = vec![0.0; n * (d + e)];
            let (mut left, mut right) = (vec![0.0; n * d], vec![0.0; n * e]);
            let (mut picked, mut sums, mut more) = (added.clone(), a.clone(), a.clone());
            let rows_o = &rows[..];
            let join = Concat { a_nd: &a, b_ne: &b, d, e, y: &mut joined };
            let pick = GatherRows { x_td: &a, rows_o, d, y_od: &mut picked };
            let add = |x_td, accumulate| ScatterRows { y_od: &added, rows_o, d, x_td, accumulate };
            match cpu {
                Some(cpu) => {
                    concat(cpu, join);
                    let parts = Split { x: &joined, d, e, a_nd: &mut left, b_ne: &mut right };
                    split(cpu, parts);
                    gather_rows(cpu, pick);
                    scatter_rows(cpu, add(&mut sums, false));
                    scatter_rows(cpu, add(&mut more, true));
                }
                None => {
                    concat_reference(join);
                    let parts = Split { x: &joined, d, e, a_nd: &mut left, b_ne: &mut right };
                    split_reference(parts);
                    gather_rows_reference(pick);
                    scatter_rows_reference(add(&mut sums, false));
                    scatter_rows_reference(add(&mut more, true));
                }
            }
            assert_eq!((&left, &right), (&a, &b), "split undoes concat");
            vec![joined, left, right, picked, sums, more]
        });
    }
}

#[test]
fn scatter_is_the_adjoint_of_gather() {
    let mut numbers = Numbers::new(9);
    let (t, o, d) = (10, 25, 6);
    let (x_td, dy_od) = (numbers.floats(t * d, 1.0), numbers.floats(o * d, 1.0));
    let rows_o = &numbers.indices(o, t)[..];
    let (mut y_od, mut dx_td) = (vec![0.0; o * d], vec![0.0; t * d]);
    gather_rows_reference(GatherRows { x_td: &x_td, rows_o, d, y_od: &mut y_od });
    let x = &mut dx_td[..];
    scatter_rows_reference(ScatterRows { y_od: &dy_od, rows_o, d, x_td: x, accumulate: false });
    let (a, b) = (functional(&y_od, &dy_od), functional(&x_td, &dx_td));
    assert!((a - b).abs() < 1e-5, "{a} {b}");
}
