"""Write what transformers computes for the rotary scalings that Cairn reads.

    pip download --no-deps transformers==5.23.0; pip install numpy
    python make_goldens.py transformers-5.23.0-py3-none-any.whl > goldens.json

The functions of `modeling_rope_utils.py` run unchanged; only the array library under them is numpy's f32 instead of
PyTorch's, so a power or a reciprocal may be one unit in the last place away from PyTorch's.
"""

import json
import math
import re
import sys
import zipfile
from types import SimpleNamespace
from typing import Optional

import numpy as np


class Array(np.ndarray):
    """A numpy array with the few methods of a tensor that the functions use."""

    def to(self, device=None, dtype=None):
        return self.astype(dtype or self.dtype)

    def float(self):
        return self.astype(np.float32)


def arange(*args, dtype=np.int64):
    return np.arange(*args, dtype=dtype).view(Array)


torch = SimpleNamespace(
    arange=arange, where=lambda c, a, b: np.where(c, a, b).view(Array), clamp=np.clip, float=np.float32,
    float32=np.float32, int64=np.int64, Tensor=Array, device=object,
)

CASES = [
    {"head_dim": 64, "max_position_embeddings": 4096, "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"head_dim": 16, "max_position_embeddings": 256, "rope_type": "linear", "rope_theta": 1e6, "factor": 2.5},
    {"head_dim": 128, "max_position_embeddings": 131072, "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
     "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    {"head_dim": 64, "max_position_embeddings": 131072, "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0,
     "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    {"head_dim": 128, "max_position_embeddings": 131072, "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
     "original_max_position_embeddings": 32768},
    {"head_dim": 64, "max_position_embeddings": 163840, "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0,
     "original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
     "mscale_all_dim": 0.707},
    {"head_dim": 32, "max_position_embeddings": 1024, "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0,
     "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False,
     "attention_factor": 1.25},
    {"head_dim": 16, "max_position_embeddings": 512, "rope_type": "yarn", "rope_theta": 10000.0, "factor": None,
     "original_max_position_embeddings": 64},
]


def main():
    source = zipfile.ZipFile(sys.argv[1]).read("transformers/modeling_rope_utils.py").decode()
    functions = {"math": math, "torch": torch, "Optional": Optional}
    for name in ["linear_scaling_rope", "yarn", "llama3"]:
        body = re.search(rf"^def _compute_{name}_parameters\(.*?(?=^(def|class|#|[A-Z]))", source, re.S | re.M).group(0)
        exec(body, functions)
    out = []
    for case in CASES:
        rope = {key: value for key, value in case.items() if key not in ("head_dim", "max_position_embeddings")}
        config = SimpleNamespace(
            head_dim=case["head_dim"], hidden_size=0, num_attention_heads=1, rope_parameters=rope,
            max_position_embeddings=case["max_position_embeddings"], standardize_rope_params=lambda: None,
        )
        name = {"linear": "linear_scaling_rope"}.get(case["rope_type"], case["rope_type"])
        inv_freq, scaling = functions[f"_compute_{name}_parameters"](config)
        assert inv_freq.dtype == np.float32, inv_freq.dtype
        out.append({**case, "inv_freq": [float(x) for x in inv_freq], "attention_scaling": scaling})
    lines = ",\n".join(json.dumps(case) for case in out)
    print(f"[\n{lines}\n]")


main()
