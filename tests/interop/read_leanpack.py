"""Reads a leanpack by docs/leanpack.md alone and compares it with the model it was made from.

    cairn pack MODEL -o model.leanpack
    python tests/interop/read_leanpack.py model.leanpack MODEL

Needs numpy and nothing of Cairn. Every hash is computed here, BLAKE3 included; every weight whose
name is that of a source tensor is decoded and compared value by value. Exits 1 where anything
differs. (Families that fuse or transpose tensors store them under other names; `cairn unpack` knows
how to put those together, and this script compares what is left.)
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np

MIB = 1 << 20
IV = np.array(
    [0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19],
    dtype=np.uint32,
)
PERMUTATION = [2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8]
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8


def rotate(x, bits):
    return (x >> np.uint32(bits)) | (x << np.uint32(32 - bits))


def compress(cv, block, counter, length, flags):
    """`cv` [8, n], `block` [16, n] → new chaining values [8, n], n at a time."""
    n = cv.shape[1]
    state = np.empty((16, n), dtype=np.uint32)
    state[:8] = cv
    state[8:12] = IV[:4, None]
    state[12] = (counter & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    state[13] = (counter >> np.uint64(32)).astype(np.uint32)
    state[14] = length
    state[15] = flags
    s = [state[i].copy() for i in range(16)]
    words = [block[i] for i in range(16)]

    def mix(a, b, c, d, x, y):
        s[a] = s[a] + s[b] + x
        s[d] = rotate(s[d] ^ s[a], 16)
        s[c] = s[c] + s[d]
        s[b] = rotate(s[b] ^ s[c], 12)
        s[a] = s[a] + s[b] + y
        s[d] = rotate(s[d] ^ s[a], 8)
        s[c] = s[c] + s[d]
        s[b] = rotate(s[b] ^ s[c], 7)

    for round_ in range(7):
        mix(0, 4, 8, 12, words[0], words[1])
        mix(1, 5, 9, 13, words[2], words[3])
        mix(2, 6, 10, 14, words[4], words[5])
        mix(3, 7, 11, 15, words[6], words[7])
        mix(0, 5, 10, 15, words[8], words[9])
        mix(1, 6, 11, 12, words[10], words[11])
        mix(2, 7, 8, 13, words[12], words[13])
        mix(3, 4, 9, 14, words[14], words[15])
        if round_ < 6:
            words = [words[i] for i in PERMUTATION]
    return np.stack([s[i] ^ s[i + 8] for i in range(8)])


def chunk_values(data, first, only):
    """Chaining values of 1024-byte chunks that are all of one length (the last may be shorter)."""
    size = len(data) if len(data) < 1024 else 1024
    n = max(1, len(data) // 1024)
    blocks = max(1, -(-size // 64))
    padded = np.zeros((n, blocks * 64), dtype=np.uint8)
    padded[:, :size] = np.frombuffer(data, dtype=np.uint8).reshape(n, size)
    words = padded.view("<u4").reshape(n, blocks, 16)
    cv = np.repeat(IV[:, None], n, axis=1)
    counter = np.arange(first, first + n, dtype=np.uint64)
    for index in range(blocks):
        last = index == blocks - 1
        flags = (CHUNK_START if index == 0 else 0) | (CHUNK_END if last else 0)
        flags |= ROOT if last and only else 0
        length = size - 64 * index if last else 64
        cv = compress(cv, words[:, index, :].T, counter, length, flags)
    return cv


def blake3(data):
    whole = len(data) // 1024 * 1024
    only = len(data) <= 1024
    parts = []
    if whole:
        parts.append(chunk_values(data[:whole], 0, only))
    if len(data) > whole or not data:
        parts.append(chunk_values(data[whole:], whole // 1024, only))
    cv = np.concatenate(parts, axis=1)
    while cv.shape[1] > 1:
        pairs = cv.shape[1] // 2
        block = np.concatenate([cv[:, 0 : 2 * pairs : 2], cv[:, 1 : 2 * pairs : 2]])
        flags = PARENT | (ROOT if cv.shape[1] == 2 else 0)
        start = np.repeat(IV[:, None], pairs, axis=1)
        merged = compress(start, block, np.zeros(pairs, dtype=np.uint64), 64, flags)
        cv = np.concatenate([merged, cv[:, 2 * pairs :]], axis=1)
    return cv[:, 0].astype("<u4").tobytes()


def need(condition, message):
    if not condition:
        sys.exit(f"refused: {message}")


def up(value, multiple):
    return -(-value // multiple) * multiple


def ascending(pairs):
    keys = [key.encode() for key, _ in pairs]
    need(keys == sorted(set(keys)), f"keys out of order: {keys}")
    return dict(pairs)


def bf16z(panels, columns):
    """The values of panels of bf16z, [panels, 16, columns]."""
    count, blocks = len(panels), -(-columns // 8)
    capacity = blocks + 8
    table = panels[:, blocks * 192 :][:, :32].astype(np.uint16)
    positions = panels[:, blocks * 192 + 32 :][:, : 4 * capacity].copy().view("<u4")
    values = panels[:, blocks * 192 + 32 + 4 * capacity :][:, : 2 * capacity].copy().view("<u2")
    parts = panels[:, : blocks * 192].reshape(count, blocks, 192)
    bytes_ = parts[:, :, :128].reshape(count, blocks, 2, 64)
    codes = parts[:, :, 128:].reshape(count, blocks, 2, 32)
    codes = np.concatenate([codes & 15, codes >> 4], axis=3)
    place = np.array([[j // 4 * 16 + c // 2 * 8 + j % 4 * 2 + c % 2 for c in range(4)] for j in range(16)])
    bytes_, codes = bytes_[..., place].astype(np.uint16), codes[..., place]
    panel = np.arange(count)[:, None, None, None, None]
    high, low = table[panel, codes], table[panel, codes.astype(np.int64) + 16]
    bits = ((bytes_ & 0x80) | high) << 8 | (bytes_ & 0x7F) | low
    bits = bits.transpose(0, 3, 1, 2, 4).reshape(count, 16, blocks * 8)
    for p in range(count):
        known = positions[p] != 0xFFFFFFFF
        bits[p, positions[p][known] % 16, positions[p][known] // 16] = values[p][known]
    return (bits[:, :, :columns].astype(np.uint32) << 16).view(np.float32)


NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
GROUPED = {"q8": (8, 32, "<f2"), "q4": (4, 32, "<f2"), "nf4": (4, 64, "<f4"), "fp8": (8, 128, "<f4"), "fp4": (4, 32, "u1")}


def grouped(panels, encoding, columns):
    """The values of panels of codes that share scales, [panels, 16, columns]."""
    bits, group, scale = GROUPED[encoding]
    count, chunks = len(panels), -(-columns // 32)
    end = chunks * 64 * bits
    codes = panels[:, :end].reshape(count, chunks, bits, 16, 4)
    if bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=3)
        codes = codes.transpose(0, 4, 1, 2, 3, 5)
    else:
        codes = codes.transpose(0, 3, 1, 2, 4)
    codes = codes.reshape(count, 16, chunks * 32)[:, :, :columns].astype(np.int32)
    groups, width = -(-columns // group), np.dtype(scale).itemsize
    scales = panels[:, end : end + groups * 16 * width].copy().view(scale).reshape(count, groups, 16)
    scales = scales.astype(np.float32) if encoding != "fp4" else np.ldexp(np.float32(1), scales.astype(np.int32) - 127)
    if encoding in ("q8", "q4"):
        codes = (codes - (128 if bits == 8 else 8)).astype(np.float32)
    elif encoding == "fp8":
        exponent, mantissa = codes >> 3 & 15, codes & 7
        normal = np.ldexp(1 + mantissa / 8, exponent - 7)
        magnitude = np.where(exponent == 0, mantissa / 512, normal)
        codes = np.where(codes >> 7, -magnitude, magnitude).astype(np.float32)
    else:
        table = NF4 if encoding == "nf4" else E2M1 + [-value for value in E2M1]
        codes = np.array(table, np.float32)[codes]
    scales = np.repeat(scales.transpose(0, 2, 1), group, axis=2)[:, :, :columns]
    return (codes * scales.astype(np.float32)).astype(np.float32)


class Pack:
    def __init__(self, path):
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        start = bytes(self.data[:128])
        need(start[:8] == b"LEANPACK", "no leanpack")
        version, size = struct.unpack_from("<II", start, 8)
        need((version, size) == (1, 128), f"version {version}")
        need(blake3(start[:96]) == start[96:], "the preamble was altered")
        header_bytes, self.start, file_bytes = struct.unpack_from("<QQQ", start, 16)
        need(file_bytes == len(self.data), "the file has another length")
        need(self.start % (2 * MIB) == 0, "the data is not aligned")
        header = bytes(self.data[128 : 128 + header_bytes])
        need(blake3(header) == start[64:96], "the header was altered")
        need(not self.data[128 + header_bytes : self.start].any(), "padding after the header")
        self.header = json.loads(header, object_pairs_hook=ascending)
        need(self.header["schema"] == "leanpack/1", self.header["schema"])

    def blob(self, entry):
        begin = self.start + entry["offset"]
        return self.data[begin : begin + entry["bytes"]]

    def verify(self):
        """Every chunk, every tree, every byte of padding."""
        end, roots = 0, b""
        for entry in self.header["tensors"] + self.header["files"]:
            name = entry["name"]
            need(entry["offset"] == up(end, 64), f"{name} is elsewhere")
            begin = self.start + end
            need(not self.data[begin : self.start + entry["offset"]].any(), f"before {name}")
            bytes_ = self.blob(entry)
            hashes = [
                blake3(bytes(bytes_[at : at + MIB])) for at in range(0, len(bytes_), MIB)
            ]
            need([h.hex() for h in hashes] == entry["chunks"], f"{name} was altered")
            need(blake3(b"".join(hashes)).hex() == entry["hash"], f"the hash of {name}")
            roots += bytes.fromhex(entry["hash"])
            end = entry["offset"] + entry["bytes"]
        need(self.start + end == len(self.data), "bytes after the end")
        need(blake3(roots).hex() == self.header["root"], "the root")

    def values(self, entry):
        """A weight as float32 [rows, columns]."""
        dims = entry["dims"]
        rows, columns = (dims[0], 1) if len(dims) == 1 else dims
        panel = entry["layout"] == "panel"
        need(panel or entry["layout"] == "row_major", entry["layout"])
        stored = up(rows, 16) if panel else rows
        raw = self.blob(entry)

        def plain(flat, width):
            if panel:
                flat = flat.reshape(stored // 16, width, 16).transpose(0, 2, 1)
            return flat.reshape(stored, width)[:rows]

        encoding = entry["encoding"]
        if encoding == "f32":
            return plain(raw.view("<f4"), columns)
        if encoding == "bf16":
            return plain((raw.view("<u2").astype(np.uint32) << 16).view(np.float32), columns)
        if encoding == "f16":
            return plain(raw.view("<f2").astype(np.float32), columns)
        panels = raw.reshape(stored // 16, -1)
        if encoding == "bf16z":
            return bf16z(panels, columns).reshape(stored, columns)[:rows]
        return grouped(panels, encoding, columns).reshape(stored, columns)[:rows]


def safetensors(folder):
    """Name → float32 array of every tensor of a folder."""
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.name in ("optimizer.safetensors", "golden.safetensors"):
            continue
        data = np.memmap(path, dtype=np.uint8, mode="r")
        (length,) = struct.unpack("<Q", bytes(data[:8]))
        for name, entry in json.loads(bytes(data[8 : 8 + length])).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            raw = np.array(data[begin:end])
            if entry["dtype"] == "BF16":
                values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                values = raw.view({"F32": "<f4", "F16": "<f2"}[entry["dtype"]]).astype(np.float32)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def main():
    need(len(sys.argv) == 3, "usage: read_leanpack.py FILE.leanpack MODEL")
    assert blake3(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    pack = Pack(sys.argv[1])
    pack.verify()
    source = safetensors(sys.argv[2])
    compared, worst = 0, 0.0
    for entry in pack.header["tensors"]:
        tensor = source.get(entry["name"])
        if tensor is None or tensor.size != np.prod(entry["dims"]):
            continue
        found = pack.values(entry).reshape(tensor.shape)
        same = np.array_equal(found.view(np.uint32), tensor.view(np.uint32))
        need(same or not entry["exact"], f"{entry['name']} is said to be exact and differs")
        worst = max(worst, float(np.abs(found - tensor).max()))
        compared += 1
    need(compared, "no weight has the name of a source tensor")
    total = len(pack.header["tensors"])
    print(
        f"{sys.argv[1]}: every hash is right; {compared} of {total} weights compared, "
        f"largest difference {worst:g}"
    )


main()
