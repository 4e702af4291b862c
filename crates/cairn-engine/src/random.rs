//! Counter-based randomness: the same draw for the same (seed, position), whatever ran before.
//!
//! Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3",
//! <https://doi.org/10.1145/2063384.2063405>): ten rounds of two 32-bit products scramble a counter
//! under a key. There is no state to carry, so a sequence draws the same numbers alone, in a batch,
//! after a restart, or when a draft is checked against it.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Scrambles a counter under a key.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [low0, high0] = halves(u64::from(MULTIPLIERS[0]) * u64::from(counter[0]));
        let [low1, high1] = halves(u64::from(MULTIPLIERS[1]) * u64::from(counter[2]));
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

#[expect(clippy::cast_possible_truncation, reason = "the two halves of the word")]
fn halves(word: u64) -> [u32; 2] {
    [word as u32, (word >> 32) as u32]
}

/// A uniform number in [0, 1) with 53 random bits, for the token at `position` of a sequence.
///
/// `stream` separates sequences that share a seed: the choices of one request.
pub(crate) fn uniform(seed: u64, position: u64, stream: u32) -> f64 {
    let [low, high] = halves(position);
    let [a, b, _, _] = philox([low, high, stream, 0], halves(seed));
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11;
    // 53 bits are exact in an f64.
    bits as f64 * (1.0 / (1_u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that come with Random123 (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_gives_the_published_answers() {
        let zeros = [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
        assert_eq!(philox([0; 4], [0; 2]), zeros);
        let ones = [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd];
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), ones);
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let pi = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(philox(counter, [0xa409_3822, 0x299f_31d0]), pi);
    }

    #[test]
    fn draws_are_uniform_and_differ_by_every_key() {
        let draws = (0..100).flat_map(|seed| (0..1_000).map(move |at| uniform(seed, at, 0)));
        let mean = draws.sum::<f64>() / 100_000.0;
        // Five standard deviations of the mean of 10^5 uniform numbers.
        assert!((mean - 0.5).abs() < 5.0 * 9.2e-4, "mean {mean}");
        let base = uniform(1, 2, 3);
        assert!((0.0..1.0).contains(&base));
        for other in [uniform(2, 2, 3), uniform(1, 3, 3), uniform(1, 2, 4)] {
            assert!(base.to_bits() != other.to_bits());
        }
        assert_eq!(base.to_bits(), uniform(1, 2, 3).to_bits());
    }
}
