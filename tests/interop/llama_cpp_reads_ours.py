"""Compares what llama.cpp computes from a GGUF file of ours with what transformers computes from the folder.

    python tests/interop/llama_cpp_reads_ours.py tests/goldens/gguf/deepseek_v3 SCRATCH [n_group=1 …]

Writes the folder as a GGUF file in F32, as `make_gguf.py convert` does, and runs twenty tokens through both: logits, or
the hidden states of an encoder. Fields of `config.json` may be changed for both sides; DeepSeek V2 needs
`n_group=1 topk_group=1 topk_method=greedy`, because llama.cpp judges its groups as V3's. Wants llama-cpp-python (0.3.36 was
used; LLAMA_CPP_LIB_PATH names its library). Largest differences then: BERT 8e-4 of 3.6 (llama.cpp approximates GELU
by tanh), DeepSeek V2 2.6e-5 of 2.5, V3 1.2e-5 of 2.9. Not run in CI.
"""

import json
import pathlib
import shutil
import sys

import llama_cpp.llama_cpp as llama
import make_gguf
import numpy as np
import torch
import transformers

IDS = list(range(3, 23))


def add_word_piece(writer):
    """llama.cpp takes the size of an encoder's vocabulary from its tokenizer."""
    make_gguf.add_word_piece(writer, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] + [f"w{i}" for i in range(43)])


def run(path, width, is_encoder):
    model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
    assert model, f"llama.cpp does not load {path}"
    params = llama.llama_context_default_params()
    params.n_ctx, params.type_k, params.type_v, params.flash_attn_type = 64, 0, 0, 0
    params.embeddings = is_encoder
    if is_encoder:
        params.pooling_type = 0
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(IDS), 0, 1)
    batch.n_tokens = len(IDS)
    for i, token in enumerate(IDS):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama.llama_decode(context, batch) == 0
    row = llama.llama_get_embeddings_ith if is_encoder else llama.llama_get_logits_ith
    return np.stack([np.ctypeslib.as_array(row(context, i), shape=(width,)).copy() for i in range(len(IDS))])


def main():
    folder, scratch, *changes = sys.argv[1:]
    scratch = pathlib.Path(scratch) / pathlib.Path(folder).name
    shutil.copytree(folder, scratch, dirs_exist_ok=True)
    config = json.loads((scratch / "config.json").read_text())
    for change in changes:
        name, value = change.split("=")
        config[name] = int(value) if value.isdigit() else value
    (scratch / "config.json").write_text(json.dumps(config))
    is_encoder = config["model_type"] == "bert"
    file = scratch / "model.gguf"
    make_gguf.convert(scratch, file, make_gguf.T.F32, add_word_piece if is_encoder else None)
    kind = transformers.AutoModel if is_encoder else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(scratch, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        result = model(torch.tensor([IDS]))
    expected = (result.last_hidden_state if is_encoder else result.logits)[0].numpy()
    llama.llama_backend_init()
    found = run(file, expected.shape[1], is_encoder)
    print(config["model_type"], "off by at most", abs(found - expected).max(), "of", abs(expected).max())


if __name__ == "__main__":
    main()
