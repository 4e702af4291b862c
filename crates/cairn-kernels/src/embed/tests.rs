//! Kernels against references, for every encoding and layout.

use proptest::prelude::*;

use super::*;
use crate::encoding::encode;
use crate::testing::{Numbers, aligned, check_bits};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn kernels_equal_references(t in 0..50_usize, v in 1..60_usize, d in 1..500_usize, seed: u64) {
        let mut numbers = Numbers::new(seed);
        let values = numbers.floats(v * d, 1.0);
        let (ids, x) = (numbers.indices(t, v), numbers.floats(t * d, 1.0));
        let total = numbers.floats(v * d, 1.0);
        for (encoding, layout) in Encoding::forms() {
            let mut bytes = Vec::new();
            let bytes = aligned(Weight::stored_bytes(encoding, layout, v, d), &mut bytes);
            encode((encoding, layout), (v, d), &values, bytes);
            let weight = Weight { encoding, layout, n: v, k: d, bytes };
            check_bits(&format!("{encoding} {layout:?}"), |cpu| {
                let (mut y, mut placed) = (vec![0.0; t * d], vec![0.0; t * d]);
                let (mut dw, mut more) = (total.clone(), total.clone());
                let pick = Embed { ids_t: &ids, weight, y_td: &mut y };
                let place =
                    PositionEmbed { positions_t: &ids, x_td: &x, weight, y_td: &mut placed };
                let grad = |dw_vd, accumulate| {
                    EmbedGrad { ids_t: &ids, dy_td: &x, d, dw_vd, accumulate }
                };
                match cpu {
                    Some(cpu) => {
                        embed(cpu, pick);
                        position_embed(cpu, place);
                        embed_grad(cpu, grad(&mut dw, false));
                        embed_grad(cpu, grad(&mut more, true));
                    }
                    None => {
                        embed_reference(pick);
                        position_embed_reference(place);
                        embed_grad_reference(grad(&mut dw, false));
                        embed_grad_reference(grad(&mut more, true));
                    }
                }
                vec![y, placed, dw, more]
            });
        }
    }
}
