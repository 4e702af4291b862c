//! Event files against bytes that TensorBoard's own writer makes.

use super::*;

#[test]
fn crc_matches_the_published_vector() {
    // RFC 3720, B.4: 32 bytes of zeros.
    assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
    let rotated = 0x8a91_36aa_u32.rotate_right(15);
    assert_eq!(masked_crc(&[0; 32]), rotated.wrapping_add(0xa282_ead8));
}

/// `Event(wall_time=2.5, step=300, summary=Summary(value=[Value(tag="loss", simple_value=1.5)]))`
/// as `tensorboard.compat.proto` serializes it.
const SCALAR_EVENT: &[u8] = &[
    0x09, 0, 0, 0, 0, 0, 0, 0x04, 0x40, 0x10, 0xac, 0x02, 0x2a, 0x0d, 0x0a, 0x0b, 0x0a, 0x04, b'l',
    b'o', b's', b's', 0x15, 0, 0, 0xc0, 0x3f,
];

#[test]
fn a_scalar_event_is_what_protobuf_writes() {
    assert_eq!(scalar_event(2.5, 300, &[("loss", 1.5)]), SCALAR_EVENT);
}

/// The payloads of an event file; panics if a checksum is wrong.
pub(crate) fn payloads(bytes: &[u8]) -> Vec<&[u8]> {
    let mut rest = bytes;
    let mut payloads = Vec::new();
    while !rest.is_empty() {
        let (length, after) = rest.split_at(8);
        let (crc, after) = after.split_at(4);
        assert_eq!(crc, masked_crc(length).to_le_bytes());
        let length = u64::from_le_bytes(length.try_into().unwrap());
        let (payload, after) = after.split_at(usize::try_from(length).unwrap());
        let (crc, after) = after.split_at(4);
        assert_eq!(crc, masked_crc(payload).to_le_bytes());
        payloads.push(payload);
        rest = after;
    }
    payloads
}

/// The step of an event: a varint after the wall time.
pub(crate) fn step_of(payload: &[u8]) -> u64 {
    assert_eq!(payload[9], 2 << 3);
    let digits = payload[10..].iter().enumerate();
    let mut step = 0;
    for (place, byte) in digits {
        step |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            break;
        }
    }
    step
}

#[test]
fn a_file_is_a_sequence_of_checked_records() {
    let folder = tempfile::tempdir().unwrap();
    let mut events = EventFile::create(folder.path(), 2.5, 300).unwrap();
    events.scalars(2.5, 300, &[("loss", 1.5)]).unwrap();
    drop(EventFile::create(folder.path(), 2.5, 301).unwrap());
    let mut names: Vec<_> =
        std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    assert_eq!(names.len(), 2, "a second file of the same second gets its own name");
    let bytes = std::fs::read(&names[0]).unwrap();
    let payloads = payloads(&bytes);
    assert!(payloads[0].ends_with(b"brain.Event:2"));
    assert!(payloads[1].ends_with(&[0x3a, 2, 8, 1]));
    assert_eq!(payloads[2], SCALAR_EVENT);
    assert_eq!(payloads.iter().map(|payload| step_of(payload)).collect::<Vec<_>>(), [0, 300, 300]);
}
