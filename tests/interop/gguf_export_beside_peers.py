"""Files of `cairn export --gguf` beside the gguf package and llama.cpp.

    python tests/interop/gguf_export_beside_peers.py tensors FOLDER SCRATCH CAIRN [F32|BF16|Q8_0]
        every tensor has the bytes that the gguf package gives it (see make_gguf.py convert)
    python tests/interop/gguf_export_beside_peers.py text MODEL SCRATCH CAIRN LLAMA_SERVER
        llama.cpp cuts a text into the same tokens and continues it greedily by the same text

Made with gguf 0.19.0 and llama.cpp 0c1e570. Not run in CI.
"""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PORT = 18099
TEXT = "fn main() {\n    let größe = 1234; // 山\n}"
PROMPT = "fn main() {"


def export(cairn, model, out, dtype):
    command = [cairn, "export", "--gguf", model, "-o", str(out), "--dtype", dtype, "--quiet"]
    subprocess.run(command, check=True)


def tensors(folder, scratch, cairn, kind="F32"):
    import gguf
    import numpy as np

    from make_gguf import T, convert

    ours, theirs = Path(scratch, "ours.gguf"), Path(scratch, "theirs.gguf")
    export(cairn, folder, ours, kind.lower())
    convert(folder, theirs, T[kind])
    found, expected = ({t.name: t for t in gguf.GGUFReader(p).tensors} for p in (ours, theirs))
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in expected.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert np.array_equal(found[name].data, tensor.data), name
    print(f"{len(found)} tensors, bytes equal")


def post(path, **body):
    url = f"http://localhost:{PORT}/{path}"
    with urllib.request.urlopen(url, json.dumps(body).encode()) as answer:
        return json.load(answer)


def text(model, scratch, cairn, server):
    path = Path(scratch, "ours.gguf")
    export(cairn, model, path, "f32")
    ours = [cairn, "generate", "--quiet", "--json", "--model", model, "--temperature", "0"]
    def generated(*more):
        return json.loads(subprocess.run([*ours, *more], check=True, capture_output=True).stdout)

    expected = generated("--prompt", PROMPT, "--max-new-tokens", "24")
    process = subprocess.Popen([server, "-m", str(path), "--port", str(PORT)], stderr=subprocess.DEVNULL)
    try:
        for _ in range(60):
            try:
                post("tokenize", content=TEXT)
                break
            except OSError:
                time.sleep(1)
        ids = post("tokenize", content=TEXT)["tokens"]
        cut = generated("--prompt", TEXT, "--max-new-tokens", "1")
        count = cut["num_prompt_tokens"]
        assert cut["token_ids"][:count] == ids, (cut, ids)
        answer = post("completion", prompt=PROMPT, n_predict=24, temperature=0, cache_prompt=False)
        assert answer["content"] == expected["text"], (answer["content"], expected["text"])
    finally:
        process.terminate()
    print(f"{len(ids)} tokens and the text are equal")


if __name__ == "__main__":
    {"tensors": tensors, "text": text}[sys.argv[1]](*sys.argv[2:])
