//! Every implementation of the lanes against the portable one, bit for bit.

use super::*;
use crate::isa::{Isa, Simd};

type Lanes = [f32; LANES];

/// Values where implementations could differ: signs of zero, ties, extremes, subnormals.
fn samples() -> Vec<Lanes> {
    let special = [
        0.0,
        -0.0,
        1.0,
        -1.5,
        2.5,
        -2.5,
        0.499_999_97,
        1e-40,
        -1e-40,
        3.4e38,
        -3.4e38,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        8_388_609.0,
        -0.75,
    ];
    let mut state = 1_u32;
    let mut random = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from_bits((state >> 2) & 0x3fff_ffff | state & 0x8000_0000)
    };
    let mut rows = vec![special];
    for shift in 1..LANES {
        let mut row = special;
        row.rotate_left(shift);
        rows.push(row);
    }
    rows.extend((0..64).map(|_| std::array::from_fn(|_| random())));
    rows
}

/// Bits, with every NaN made the same: payloads are not part of the contract.
fn bits(value: f32) -> u32 {
    if value.is_nan() { f32::NAN.to_bits() } else { value.to_bits() }
}

kernel! {
    fn floats<V>(a: &Lanes, b: &Lanes, c: &Lanes) -> Vec<u32> {
        let (a, b, c) = (V::load(a), V::load(b), V::load(c));
        let small = a.max(V::splat(-7.0)).min(V::splat(7.0));
        let mut out = Vec::new();
        let results = [
            a + b, a - b, a * b, a / b, -a, a.mul_add(b, c), a.min(b), a.max(b), a.sqrt(),
            a.abs(), V::select(a.lt(b), a, c), V::select(a.eq(b), a, c),
            V::select(a.lt(b).not(), a, c), V::select(a.lt(b).and(b.lt(c)), a, c),
            V::select(V::Mask::first(5), a, b), V::load_partial(&a.to_array()[..11], 3.0),
        ];
        for result in results {
            out.extend(result.to_array().map(bits));
        }
        for row in V::transpose([a, b, c, a + b, a - b, small, a, b, c, c, b, a, a * c, a, b, c]) {
            out.extend(row.to_array().map(bits));
        }
        out.extend([bits(small.sum()), bits(small.max_lane())]);
        let mut words = [0; LANES];
        a.to_bf16(&mut words);
        out.extend(words.map(u32::from));
        out.extend(V::from_bf16(&words).to_array().map(bits));
        out.extend(V::from_f16(&words).to_array().map(bits));
        let mut tail = [9.0; 7];
        a.store_partial(&mut tail[2..]);
        out.extend(tail.map(bits));
        out
    }
}

kernel! {
    fn ints<V>(a: &[i32; LANES], b: &[i32; LANES]) -> Vec<u32> {
        let (a, b) = (V::Int::load(a), V::Int::load(b));
        let results = [
            (a + b).as_float(), (a - b).as_float(), a.and(b).as_float(), a.or(b).as_float(),
            a.xor(b).as_float(), a.shl(5).as_float(), a.shr(23).as_float(),
            a.mul_low(b).as_float(), a.and(V::Int::splat(77)).as_float(), a.to_float(),
            V::select(a.gt(b), V::splat(1.0), V::zero()),
        ];
        results.into_iter().flat_map(|lanes| lanes.to_array().map(f32::to_bits)).collect()
    }
}

#[test]
fn float_operations_agree() {
    let rows = samples();
    for isa in Isa::supported() {
        for window in rows.windows(3) {
            let expected = floats(Simd::new(Isa::Scalar), &window[0], &window[1], &window[2]);
            let found = floats(Simd::new(isa), &window[0], &window[1], &window[2]);
            let first = found.iter().zip(&expected).position(|(a, b)| a != b);
            assert_eq!(first, None, "{isa} {window:?}");
        }
    }
}

#[test]
fn integer_operations_agree() {
    let rows: Vec<[i32; LANES]> =
        samples().iter().map(|row| row.map(|x| x.to_bits().cast_signed())).collect();
    for isa in Isa::supported() {
        for pair in rows.windows(2) {
            let mut second = pair[1];
            second[3] = pair[0][3];
            let expected = ints(Simd::new(Isa::Scalar), &pair[0], &second);
            assert_eq!(ints(Simd::new(isa), &pair[0], &second), expected, "{isa}");
        }
    }
}

#[test]
fn bytes_widen() {
    kernel! {
        fn widen<V>(bytes: &[i8; LANES]) -> Lanes {
            V::from_i8(bytes).to_array()
        }
    }
    let bytes: [i8; LANES] = [-128, 127, 0, 1, -1, 5, 6, 7, 8, 9, 10, 11, -12, 13, 14, 15];
    for isa in Isa::supported() {
        let found = widen(Simd::new(isa), &bytes).map(f32::to_bits);
        assert_eq!(found, bytes.map(|byte| f32::from(byte).to_bits()), "{isa}");
    }
}

#[test]
fn tables_are_looked_up() {
    kernel! {
        fn look<V>(table: &Lanes, indices: &[i32; LANES]) -> Lanes {
            V::lookup(table, V::Int::load(indices)).to_array()
        }
    }
    let table: Lanes = std::array::from_fn(|j| 0.5 + j as f32);
    let indices = [0, 15, 7, 8, 1, 14, 2, 13, 3, 12, 4, 11, 5, 10, 6, 9];
    for isa in Isa::supported() {
        let found = look(Simd::new(isa), &table, &indices).map(f32::to_bits);
        assert_eq!(found, indices.map(|i| (0.5 + i as f32).to_bits()), "{isa}");
    }
}

#[test]
fn low_bytes_are_those_of_the_bits() {
    kernel! {
        fn low<V>(lanes: &Lanes) -> [u8; LANES] {
            V::load(lanes).low_bytes()
        }
    }
    let lanes: Lanes = std::array::from_fn(|j| 12_582_912.0 + 17.0 * j as f32 - 127.0);
    let expected = lanes.map(|lane| lane.to_bits().to_le_bytes()[0]);
    for simd in Isa::supported().into_iter().map(Simd::new) {
        assert_eq!(low(simd, &lanes), expected, "{}", simd.isa());
    }
}

#[test]
fn products_of_bytes_are_summed() {
    struct Dots<'a>(&'a [[u8; 64]; 2], bool);
    impl Kernel for Dots<'_> {
        type Output = [u32; LANES];
        #[inline(always)]
        fn run<V: F32x16>(self) -> [u32; LANES] {
            let Self([w, x], by_instruction) = self;
            let (w, x) = (V::Int::load_bytes(w), V::Int::load_bytes(x));
            let start = V::Int::splat(-7);
            let sums =
                if by_instruction { start.byte_dot(w, x) } else { start.byte_dot_in_words(w, x) };
            sums.as_float().to_array().map(f32::to_bits)
        }
    }
    struct Called<'a>(Dots<'a>);
    impl Kernel for Called<'_> {
        type Output = [u32; LANES];
        #[inline(always)]
        fn run<V: F32x16>(self) -> [u32; LANES] {
            // SAFETY: dispatched only where the token has the instruction.
            unsafe { V::call_byte_dot(self.0) }
        }
    }
    // Every byte against its extremes.
    for shift in 0..=255_u8 {
        let w: [u8; 64] = std::array::from_fn(|i| [255, 0, shift, 128][i % 4]);
        let x: [u8; 64] = std::array::from_fn(|i| {
            shift.wrapping_mul(3).wrapping_add(17 * u8::try_from(i / 4).unwrap())
        });
        let expected: [u32; LANES] = std::array::from_fn(|j| {
            let product = |i: usize| i32::from(w[i]) * i32::from(x[i].cast_signed());
            ((4 * j..4 * j + 4).map(product).sum::<i32>() - 7).cast_unsigned()
        });
        let bytes = [w, x];
        for simd in Isa::supported().into_iter().map(Simd::new) {
            assert_eq!(dispatch(simd, Dots(&bytes, false)), expected, "{}", simd.isa());
            if simd.has_byte_dot() {
                assert_eq!(dispatch(simd, Called(Dots(&bytes, true))), expected, "vpdpbusd");
            }
        }
    }
}

#[test]
fn sums_use_the_fixed_tree() {
    kernel! {
        fn sum<V>(lanes: &Lanes) -> f32 {
            V::load(lanes).sum()
        }
    }
    let lanes: Lanes = std::array::from_fn(|j| 1.0 / (j as f32 + 3.0));
    let mut tree = lanes.to_vec();
    while tree.len() > 1 {
        let half = tree.len() / 2;
        tree = (0..half).map(|j| tree[j] + tree[j + half]).collect();
    }
    for isa in Isa::supported() {
        assert_eq!(sum(Simd::new(isa), &lanes).to_bits(), tree[0].to_bits(), "{isa}");
    }
}

#[test]
fn bf16_rounds_to_nearest_even() {
    let check = |value: u32, expected: u16| {
        assert_eq!(bf16_from_f32(f32::from_bits(value)), expected, "{value:#x}");
    };
    check(0x3f80_8000, 0x3f80);
    check(0x3f80_8001, 0x3f81);
    check(0x3f81_8000, 0x3f82);
    check(0x7f7f_ffff, 0x7f80);
    check(0x7f80_0001, 0x7fc0);
    check(0x8000_0000, 0x8000);
}

#[expect(clippy::cast_possible_truncation, reason = "the numbers are f32")]
fn to_f32(value: f64) -> f32 {
    value as f32
}

#[test]
fn every_f16_widens_to_its_value_everywhere() {
    kernel! {
        fn widen<V>(words: &[u16; LANES]) -> Lanes {
            V::from_f16(words).to_array()
        }
    }
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for isa in Isa::supported() {
        for words in all.as_chunks::<LANES>().0 {
            for (&word, found) in words.iter().zip(widen(Simd::new(isa), words)) {
                let (exponent, mantissa) = (i32::from(word >> 10 & 0x1f), f64::from(word & 0x3ff));
                let magnitude = match exponent {
                    0 => mantissa * 2f64.powi(-24),
                    0x1f if mantissa > 0.0 => f64::NAN,
                    0x1f => f64::INFINITY,
                    _ => (1.0 + mantissa / 1024.0) * 2f64.powi(exponent - 15),
                };
                let expected = if word >> 15 == 1 { -magnitude } else { magnitude };
                assert_eq!(bits(found), bits(to_f32(expected)), "{isa} {word:#x}");
                // A number comes back as it was; what is no number stays none.
                let back = f16_from_f32(found);
                assert!(
                    back == word || found.is_nan() && back & 0x7c00 == 0x7c00 && back & 0x3ff > 0
                );
            }
        }
    }
}

/// Between every two neighboring f16, and beyond the last.
#[test]
fn f16_rounds_to_nearest_even() {
    for low in 0..0x7c00_u16 {
        let high = low + 1;
        let below = f64::from(f32_from_f16(low));
        // What 2¹⁶ would be if there were one more exponent.
        let above = if high == 0x7c00 { 65536.0 } else { f64::from(f32_from_f16(high)) };
        let middle = to_f32((below + above) / 2.0);
        let even = if low & 1 == 0 { low } else { high };
        for sign in [0, 0x8000] {
            let signed = |value: f32| if sign == 0 { value } else { -value };
            assert_eq!(f16_from_f32(signed(middle)), sign | even, "{middle}");
            assert_eq!(f16_from_f32(signed(middle.next_down())), sign | low, "{middle}");
            assert_eq!(f16_from_f32(signed(middle.next_up())), sign | high, "{middle}");
        }
    }
    for (value, expected) in [
        (1e-30, 0),
        (-1e-45, 0x8000),
        (f32::MAX, 0x7c00),
        (f32::NEG_INFINITY, 0xfc00),
        (f32::from_bits(0x7f80_0001), 0x7e00),
        (f32::from_bits(0xffc0_2000), 0xfe01),
    ] {
        assert_eq!(f16_from_f32(value), expected, "{value}");
    }
}
