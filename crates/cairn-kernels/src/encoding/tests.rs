//! Round trips, error bounds and layout conversion of every encoding.

use super::*;

fn values(n: usize, k: usize) -> Vec<f32> {
    (0..n * k).map(|i| ((i * 7919 % 1013) as f32 - 500.0) * 0.013).collect()
}

fn stored(form: (Encoding, Layout), (n, k): (usize, usize), values_nk: &[f32]) -> Vec<f32> {
    // f32 storage keeps the bytes aligned.
    let bytes = Weight::stored_bytes(form.0, form.1, n, k);
    let mut storage = vec![0.0_f32; bytes.div_ceil(4)];
    let all = crate::memory::bytes_of_mut(&mut storage);
    encode(form, (n, k), values_nk, &mut all[..bytes]);
    storage
}

fn weight<'a>(
    (encoding, layout): (Encoding, Layout),
    (n, k): (usize, usize),
    storage: &'a [f32],
) -> Weight<'a> {
    let bytes = Weight::stored_bytes(encoding, layout, n, k);
    Weight { encoding, layout, n, k, bytes: &crate::memory::bytes_of(storage)[..bytes] }
}

#[test]
fn decoding_gives_what_was_encoded() {
    for (n, k) in [(1, 1), (16, 32), (17, 33), (5, 100), (0, 4), (4, 0)] {
        let values_nk = values(n, k);
        for encoding in Encoding::ALL {
            let mut by_layout = Vec::new();
            for &layout in encoding.layouts() {
                let storage = stored((encoding, layout), (n, k), &values_nk);
                let mut decoded = vec![0.0; n * k];
                weight((encoding, layout), (n, k), &storage).decode(&mut decoded);
                for (&value, &found) in values_nk.iter().zip(&decoded) {
                    let bound = match encoding {
                        Encoding::F32 => 0.0,
                        Encoding::Bf16 | Encoding::Bf16z => value.abs() / 256.0,
                        Encoding::F16 => value.abs() / 2048.0,
                        // Shares of the largest value there is.
                        Encoding::Q8 => 6.7 / 253.0,
                        Encoding::Q4 => 6.7 * 0.29,
                        Encoding::Nf4 => 6.7 * 0.153,
                        Encoding::Fp8 => value.abs() / 16.0 + 6.7 / 448.0 / 1024.0,
                        Encoding::Fp4 => 6.7 / 4.0,
                    };
                    assert!((value - found).abs() <= bound, "{encoding} {value} {found}");
                }
                by_layout.push(decoded);
            }
            let same = by_layout.iter().all(|decoded| *decoded == by_layout[0]);
            assert!(same, "layouts hold the same values");
        }
    }
}

#[test]
fn layouts_convert_without_loss() {
    for (n, k) in [(1, 1), (16, 32), (19, 70)] {
        let values_nk = values(n, k);
        for encoding in [Encoding::F32, Encoding::Bf16, Encoding::F16] {
            for (from, to) in [(Layout::RowMajor, Layout::Panel), (Layout::Panel, Layout::RowMajor)]
            {
                let source = stored((encoding, from), (n, k), &values_nk);
                let expected = stored((encoding, to), (n, k), &values_nk);
                let bytes = Weight::stored_bytes(encoding, to, n, k);
                let mut converted = vec![1_u8; bytes];
                convert_layout(weight((encoding, from), (n, k), &source), to, &mut converted);
                assert_eq!(converted, crate::memory::bytes_of(&expected)[..bytes]);
            }
        }
    }
}

#[test]
fn elements_of_two_bytes_are_stored_as_they_are() {
    for (n, k) in [(1, 1), (16, 32), (19, 70)] {
        // Whatever the bits: infinities and NaN among them.
        let bits: Vec<u16> = (0..=u16::MAX).step_by(97).cycle().take(n * k).collect();
        for encoding in [Encoding::Bf16, Encoding::F16] {
            for layout in Layout::ALL {
                let bytes = Weight::stored_bytes(encoding, layout, n, k);
                let mut storage = vec![1.0_f32; bytes.div_ceil(4)];
                let all = &mut crate::memory::bytes_of_mut(&mut storage)[..bytes];
                store_bits((encoding, layout), (n, k), &bits, all).unwrap();
                let stored = weight((encoding, layout), (n, k), &storage);
                for (index, &bits) in bits.iter().enumerate() {
                    assert_eq!(stored.u16s()[layout.index(index / k, index % k, k)], bits);
                }
            }
        }
    }
}

/// A weight may be written by pieces of whole panels: that is what makes loading parallel.
#[test]
fn panels_are_independent() {
    let (n, k) = (50, 70);
    let values_nk = values(n, k);
    for encoding in Encoding::ALL {
        let form = (encoding, Layout::Panel);
        let bytes_of = |rows| Weight::stored_bytes(encoding, Layout::Panel, rows, k);
        let whole = stored(form, (n, k), &values_nk);
        let mut pieces = vec![1.0_f32; whole.len()];
        let target = &mut crate::memory::bytes_of_mut(&mut pieces)[..bytes_of(n)];
        for (first, rows) in [(0, 16), (16, 32), (48, 2)] {
            let values = &values_nk[first * k..(first + rows) * k];
            let target = &mut target[bytes_of(first)..][..bytes_of(rows)];
            try_encode(form, (rows, k), values, target).unwrap();
        }
        assert!(crate::memory::bytes_of(&whole) == crate::memory::bytes_of(&pieces), "{encoding}");
    }
}

/// The encodings of codes that share scales.
const GROUPED: [Encoding; 5] =
    [Encoding::Q8, Encoding::Q4, Encoding::Nf4, Encoding::Fp8, Encoding::Fp4];

#[test]
fn what_is_too_large_becomes_infinite_and_nothing_else() {
    for encoding in [Encoding::Bf16, Encoding::F16] {
        let bound = encoding.overflow_bound().unwrap();
        let values = [bound.next_down(), bound, -bound.next_down(), -bound];
        let storage = stored((encoding, Layout::RowMajor), (1, 4), &values);
        let mut decoded = [0.0; 4];
        weight((encoding, Layout::RowMajor), (1, 4), &storage).decode(&mut decoded);
        assert!(decoded[0].is_finite() && decoded[2].is_finite(), "{encoding} {decoded:?}");
        assert_eq!((decoded[1], decoded[3]), (f32::INFINITY, f32::NEG_INFINITY), "{encoding}");
    }
}

#[test]
fn zero_groups_stay_zero() {
    for encoding in GROUPED {
        let form = (encoding, Layout::Panel);
        let storage = stored(form, (2, 40), &[0.0; 80]);
        let mut decoded = vec![1.0; 80];
        weight(form, (2, 40), &storage).decode(&mut decoded);
        assert_eq!(decoded, [0.0; 80], "{encoding}");
    }
}

#[test]
fn q8_is_stored_as_given() {
    let (n, k) = (18, 64);
    let values_nk: Vec<i8> = (i8::MIN..=i8::MAX).cycle().take(n * k).collect();
    let scales: Vec<f32> = (0..n * k / Q8_BLOCK).map(|i| 0.5 + i as f32).collect();
    let bytes = Weight::stored_bytes(Encoding::Q8, Layout::Panel, n, k);
    let mut storage = vec![1.0_f32; bytes.div_ceil(4)];
    let all = crate::memory::bytes_of_mut(&mut storage);
    assert!(store_q8((n, k), (&values_nk, &scales), &mut all[..bytes]));
    for refused in [0.1, f32::NAN, 1e9] {
        let others = [&[refused][..], &scales[1..]].concat();
        let all = crate::memory::bytes_of_mut(&mut storage);
        assert!(!store_q8((n, k), (&values_nk, &others), &mut all[..bytes]), "{refused}");
    }
    let weight = weight((Encoding::Q8, Layout::Panel), (n, k), &storage);
    for (index, (&value, block)) in values_nk.iter().zip((0..).map(|i| i / Q8_BLOCK)).enumerate() {
        let expected = f32::from(value) * scales[block];
        assert_eq!(weight.value(index / k, index % k).to_bits(), expected.to_bits());
    }
    let (mut found, mut found_scales) = (vec![0; n * k], vec![0.0; scales.len()]);
    load_q8(weight, &mut found, &mut found_scales);
    assert_eq!((found, found_scales), (values_nk, scales));
}

#[test]
fn q4_is_stored_as_given() {
    let (n, k) = (18, 96);
    let values_nk: Vec<i8> = (-8..8).cycle().take(n * k).collect();
    // Half of the scales are negative, as `Q4_0` has them.
    let scales: Vec<f32> = (0..n * k / Q8_BLOCK).map(|i| 20.5 - i as f32).collect();
    let bytes = Weight::stored_bytes(Encoding::Q4, Layout::Panel, n, k);
    let mut storage = vec![1.0_f32; bytes.div_ceil(4)];
    let all = crate::memory::bytes_of_mut(&mut storage);
    assert!(store_q4((n, k), (&values_nk, &scales), &mut all[..bytes]));
    let weight = weight((Encoding::Q4, Layout::Panel), (n, k), &storage);
    for (index, (&value, block)) in values_nk.iter().zip((0..).map(|i| i / Q8_BLOCK)).enumerate() {
        let expected = f32::from(value) * scales[block];
        assert_eq!(weight.value(index / k, index % k).to_bits(), expected.to_bits());
    }
}

/// What is encoded once is a fixed point but for `q4`, whose scale is searched for again.
#[test]
fn encoding_again_changes_nothing() {
    let (n, k) = (20, 300);
    let mut numbers = crate::testing::Numbers::new(3);
    let values_nk: Vec<f32> = numbers.floats(n * k, 1.0).iter().map(|x| x * x * x).collect();
    for encoding in [Encoding::Q8, Encoding::Nf4, Encoding::Fp8, Encoding::Fp4] {
        let form = (encoding, Layout::Panel);
        let once = stored(form, (n, k), &values_nk);
        let mut decoded = vec![0.0; n * k];
        weight(form, (n, k), &once).decode(&mut decoded);
        let twice = stored(form, (n, k), &decoded);
        let mut again = vec![0.0; n * k];
        weight(form, (n, k), &twice).decode(&mut again);
        // Scales are quotients rounded once, so a value may differ by that.
        for (a, b) in decoded.iter().zip(&again) {
            assert!((a - b).abs() <= a.abs() * 2.0e-3, "{encoding} {a} {b}");
        }
    }
}

/// The errors that the module `grouped` states, on values of very different groups.
#[test]
fn errors_are_bounded_by_the_group() {
    let (n, k) = (33, 300);
    let mut numbers = crate::testing::Numbers::new(5);
    let mut values_nk = numbers.floats(n * k, 1.0);
    for (i, value) in values_nk.iter_mut().enumerate() {
        *value *= 2.0_f32.powi(i32::try_from(i / 32 % 40).unwrap() - 30);
    }
    let group_of = |encoding| match encoding {
        Encoding::Nf4 => 64,
        Encoding::Fp8 => 128,
        _ => 32,
    };
    for encoding in GROUPED {
        let form = (encoding, Layout::Panel);
        let storage = stored(form, (n, k), &values_nk);
        let mut decoded = vec![0.0; n * k];
        weight(form, (n, k), &storage).decode(&mut decoded);
        let mut worst = 0.0_f32;
        for (row, found) in values_nk.chunks(k).zip(decoded.chunks(k)) {
            for (row, found) in row.chunks(group_of(encoding)).zip(found.chunks(group_of(encoding)))
            {
                let largest = row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
                for (x, y) in row.iter().zip(found) {
                    let bound = match encoding {
                        Encoding::Q8 => largest / 253.0 + 2.0_f32.powi(-25),
                        Encoding::Q4 => 0.29 * largest + 2.0_f32.powi(-22),
                        Encoding::Nf4 => 0.1521 * largest,
                        Encoding::Fp8 => x.abs() / 16.0 + largest / 448.0 / 1000.0,
                        _ => largest / 4.0,
                    };
                    worst = worst.max((x - y).abs() / bound);
                }
            }
        }
        assert!((0.2..=1.0).contains(&worst), "{encoding}: {worst} of its bound");
    }
}

#[test]
fn codes_are_the_ones_of_their_formats() {
    let decode = |encoding, values_nk: &[f32]| {
        let form = (encoding, Layout::Panel);
        let storage = stored(form, (1, values_nk.len()), values_nk);
        let mut decoded = vec![0.0; values_nk.len()];
        weight(form, (1, values_nk.len()), &storage).decode(&mut decoded);
        decoded
    };
    // All values of E4M3 with scale 1.
    let all: Vec<f32> = (0..127).map(grouped::e4m3).collect();
    assert_eq!((all[1], all[8], all[126]), (2.0_f32.powi(-9), 2.0_f32.powi(-6), 448.0));
    assert_eq!(decode(Encoding::Fp8, &all), all);
    assert_eq!(
        decode(Encoding::Fp8, &[448.0, 17.0, 19.0, -0.001, 2.0_f32.powi(-11)])[1..],
        [16.0, 20.0, -2.0_f32.powi(-9), 0.0]
    );
    // All values of MXFP4 with scale 1/2, ties to even.
    let all: Vec<f32> = E2M1.iter().map(|x| x / 2.0).collect();
    assert_eq!(decode(Encoding::Fp4, &all), all);
    let ties = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0];
    assert_eq!(decode(Encoding::Fp4, &ties), [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0]);
    let table: Vec<f32> = NF4.iter().map(|x| x * 3.0).collect();
    assert_eq!(decode(Encoding::Nf4, &table), table);
    // `Q4_0`'s own choice where it is exact.
    let whole: Vec<f32> = (-8_i8..8).map(f32::from).collect();
    assert_eq!(decode(Encoding::Q4, &whole), whole);
}

#[test]
fn what_codes_cannot_hold_is_refused() {
    for encoding in GROUPED {
        let (n, k) = (3, 40);
        let mut values_nk = values(n, k);
        values_nk[50] = f32::INFINITY;
        values_nk[51] = f32::NAN;
        let mut bytes = vec![0; Weight::stored_bytes(encoding, Layout::Panel, n, k)];
        let result = try_encode((encoding, Layout::Panel), (n, k), &values_nk, &mut bytes);
        assert_eq!(result, Err(EncodeError::NotFinite { found: 2, found_among: n * k }));
        if let Some(bound) = encoding.overflow_bound() {
            let finite = |x: f32| {
                let storage = stored((encoding, Layout::Panel), (1, 2), &[x, -x]);
                weight((encoding, Layout::Panel), (1, 2), &storage).value(0, 0).is_finite()
            };
            assert!(finite(bound.next_down()), "{encoding}");
        }
    }
}

/// bf16 bits of all kinds: mostly a few exponents, now and then any.
fn bf16_bits(len: usize, rare: usize) -> Vec<u16> {
    let mut numbers = crate::testing::Numbers::new(9);
    let mut bits = |any: bool| {
        let random = u16::try_from(numbers.bits() >> 48).unwrap();
        let exponent = u16::try_from(numbers.below(14)).unwrap() + 110;
        if any { random } else { (random & 0x807f) | exponent << 7 }
    };
    (0..len).map(|i| bits(i % rare == rare / 2)).collect()
}

#[test]
fn bf16z_loses_nothing() {
    let form = (Encoding::Bf16z, Layout::Panel);
    for (n, k) in [(1, 1), (16, 8), (33, 100), (160, 96), (16, 0), (0, 16)] {
        let all = bf16_bits(n * k, 700);
        let values_nk: Vec<f32> = all.iter().map(|&bits| f32_from_bf16(bits)).collect();
        let bytes = Weight::stored_bytes(form.0, form.1, n, k);
        let mut storage = vec![1.0_f32; bytes.div_ceil(4)];
        let target = &mut crate::memory::bytes_of_mut(&mut storage)[..bytes];
        store_bits(form, (n, k), &all, target).unwrap();
        let from_bits = weight(form, (n, k), &storage);
        for (index, bits) in all.iter().enumerate() {
            let found = from_bits.value(index / k, index % k);
            assert_eq!(found.to_bits(), u32::from(*bits) << 16, "element {index} of {n}×{k}");
        }
        let numbers = values_nk.iter().all(|value| !value.is_nan());
        let encoded = stored(form, (n, k), &values_nk);
        let same = crate::memory::bytes_of(&encoded) == crate::memory::bytes_of(&storage);
        assert!(same || !numbers, "values and bits give the same bytes");
    }
}

#[test]
fn bf16z_is_smaller_than_bf16_or_not_used() {
    for (n, k) in [(1024, 1024), (3072, 1024), (151_936, 1024), (768, 256)] {
        let bytes = |encoding| Weight::stored_bytes(encoding, Layout::Panel, n, k) as f64;
        let share = bytes(Encoding::Bf16z) / bytes(Encoding::Bf16);
        assert!(share < 0.79, "{n}×{k}: {share}");
    }
    for (n, k) in [(1, 1), (16, 8), (16, 16), (16, 24), (16, 64), (5, 100), (40, 0)] {
        let bytes = |encoding| Weight::stored_bytes(encoding, Layout::Panel, n, k);
        let encoding = Encoding::Bf16z.for_shape(n, k);
        assert!(bytes(encoding) <= bytes(Encoding::Bf16), "{n}×{k}");
    }
    assert_eq!(Encoding::Bf16z.for_shape(16, 8), Encoding::Bf16);
    assert_eq!(Encoding::Bf16z.for_shape(16, 64), Encoding::Bf16z);
    assert_eq!(Encoding::F32.for_shape(16, 8), Encoding::F32);
}

#[test]
fn too_many_exponents_are_refused() {
    let form = (Encoding::Bf16z, Layout::Panel);
    let (n, k) = (160, 96);
    let mut bytes = vec![0.0_f32; Weight::stored_bytes(form.0, form.1, n, k) / 4];
    let bytes = crate::memory::bytes_of_mut(&mut bytes);
    let result = store_bits(form, (n, k), &bf16_bits(n * k, 4), bytes);
    let is_refused = |result: Result<(), EncodeError>| {
        matches!(
            result,
            Err(EncodeError::TooManyExponents { found, capacity: 20 }) if found > 20
        )
    };
    assert!(is_refused(result));
    // Twenty exceptions fit; one more does not.
    let mut values_nk = vec![1.0_f32; n * k];
    let exponent = |i: usize| 2.0_f32.powi(-1 - i32::try_from(i).unwrap());
    for i in 0..14 {
        values_nk[8 * i] = exponent(i);
        values_nk[8 * i + 1] = exponent(i);
    }
    for i in 14..35 {
        assert_eq!(try_encode(form, (n, k), &values_nk, bytes), Ok(()), "{i}");
        values_nk[8 * i] = exponent(i);
    }
    assert!(is_refused(try_encode(form, (n, k), &values_nk, bytes)));
}

/// Sixteen rows at once give the bytes of one group after the other, whatever fills the last panel and the
/// last group.
#[test]
fn panels_of_codes_are_the_definitions() {
    let mut numbers = crate::testing::Numbers::new(11);
    for (n, k) in [(1, 1), (16, 32), (17, 33), (48, 96), (5, 100), (33, 47), (0, 4), (4, 0)] {
        let mut values_nk = numbers.floats(n * k, 1.0);
        for (i, value) in values_nk.iter_mut().enumerate() {
            // From below what f16 scales hold to beyond it; some halves of steps, zeros of both signs.
            match numbers.below(8) {
                0 => *value = 0.0_f32.copysign(*value),
                1 => *value = (*value * 16.0).round() / 2.0,
                2 => {}
                _ => *value *= 2.0_f32.powi(i32::try_from(i / 32 % 61).unwrap() - 36),
            }
        }
        for encoding in [Encoding::Q8, Encoding::Q4] {
            let size = Weight::stored_bytes(encoding, Layout::Panel, n, k);
            let mut expected = vec![0.0_f32; size.div_ceil(4)];
            let bytes = &mut crate::memory::bytes_of_mut(&mut expected)[..size];
            encoding.format().write(k, &values_nk, bytes);
            let bits = |words: &[f32]| words.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            for isa in Isa::supported() {
                let mut found = vec![0.0_f32; size.div_ceil(4)];
                let bytes = &mut crate::memory::bytes_of_mut(&mut found)[..size];
                code_panels::write(Simd::new(isa), encoding.format(), k, &values_nk, bytes);
                assert_eq!(bits(&expected), bits(&found), "{n}×{k} {encoding} {isa}");
            }
        }
    }
}

/// Where the codes of a panel and its list's positions and values begin, and where it ends.
fn list_parts(k: usize) -> [usize; 4] {
    let blocks = k.div_ceil(8);
    let capacity = blocks + 8;
    let positions = blocks * 192 + 32;
    [128, positions, positions + 4 * capacity, positions + 6 * capacity]
}

#[test]
fn a_list_that_is_damaged_is_found_and_every_other_change_is_one_value_to_all() {
    let (n, k) = (33, 100);
    let form = (Encoding::Bf16z, Layout::Panel);
    let size = Weight::stored_bytes(form.0, form.1, n, k);
    let mut storage = vec![0.0_f32; size.div_ceil(4)];
    let target = &mut crate::memory::bytes_of_mut(&mut storage)[..size];
    store_bits(form, (n, k), &bf16_bits(n * k, 150), target).unwrap();
    weight(form, (n, k), &storage).check_lists(0..3).unwrap();
    let [codes, positions, values, end] = list_parts(k);
    let panel_bytes = size / 3;
    let mut numbers = crate::testing::Numbers::new(13);
    for panel in 0..3 {
        let changed = |at: usize, bits: u8| {
            let mut changed = storage.clone();
            crate::memory::bytes_of_mut(&mut changed)[panel * panel_bytes + at] ^= bits;
            changed
        };
        let check = |storage: &[f32]| {
            let weight = weight(form, (n, k), storage);
            assert_eq!(weight.check_lists(0..panel), Ok(()), "other panels");
            weight.check_lists(panel..3)
        };
        for at in positions..values {
            let bits = u8::try_from(numbers.below(255) + 1).unwrap();
            let damaged = check(&changed(at, bits)).unwrap_err();
            assert_eq!(
                (damaged.first_row, damaged.last_row),
                (16 * panel, 32.min(16 * panel + 15))
            );
        }
        // Values that are not in the table are in the list, whatever they are.
        (values..end).for_each(|at| check(&changed(at, 0xff)).unwrap());
        // A code becomes that of an exception, or is none any more, or is neither.
        for at in (codes..codes + 64).chain([codes + 192 * (k / 8)]) {
            for bits in [0x0f, 0xf0, 0x01] {
                let changed = changed(at, bits);
                let byte = |words: &[f32]| crate::memory::bytes_of(words)[panel * panel_bytes + at];
                let full = |byte: u8| [byte & 15 == 15, byte >> 4 == 15];
                let same = full(byte(&storage)) == full(byte(&changed));
                assert_eq!(check(&changed).is_ok(), same, "byte {at} of panel {panel}");
            }
        }
    }
}
