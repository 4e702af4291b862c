//! Known answers of the compressors.

use super::*;

/// Bytes that no compressor can shorten, from a 64-bit mixer.
fn random(count: usize) -> Vec<u8> {
    let mut state = 9_u64;
    (0..count)
        .map(|_| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            mixed.to_be_bytes()[0] ^ mixed.to_be_bytes()[5]
        })
        .collect()
}

fn size(compressor: Compressor, text: &[u8]) -> u64 {
    compressor.compressed_bytes([text].into_iter()).unwrap()
}

#[test]
fn random_bytes_do_not_shrink() {
    let noise = random(100_000);
    for compressor in Compressor::ALL {
        let bytes = size(compressor, &noise);
        assert!((100_000..101_000).contains(&bytes), "{compressor}: {bytes}");
    }
}

#[test]
fn a_constant_shrinks_to_almost_nothing() {
    for compressor in Compressor::ALL {
        let bytes = size(compressor, &vec![b'a'; 1_000_000]);
        assert!(bytes < 1_100, "{compressor}: {bytes}");
    }
}

/// What `gzip -9`, `xz -9` and `zstd -19 --no-check` write for an empty input.
#[test]
fn an_empty_file_is_its_container() {
    assert_eq!(size(Compressor::Gzip9, b""), 20);
    assert_eq!(size(Compressor::Xz9, b""), 32);
    assert_eq!(size(Compressor::Zstd19, b""), 9);
}

#[test]
fn parts_are_one_file() {
    let noise = random(3_000);
    let text = [noise.clone(), noise.clone(), noise].concat();
    for compressor in Compressor::ALL {
        let whole = size(compressor, &text);
        assert!(whole < 4_000, "{compressor} finds the repetition: {whole}");
        for piece in [1, 1_000, 4_096] {
            let parts = compressor.compressed_bytes(text.chunks(piece)).unwrap();
            // How input is cut may move a block's border, nothing more.
            assert!(parts.abs_diff(whole) <= 16, "{compressor} by {piece}: {parts}, {whole}");
        }
    }
}
