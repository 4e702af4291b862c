"""How much of what q8 weights change is experts that were chosen otherwise.

    python tests/interop/route_flips.py tests/goldens

Rounds the matrices of goldens with experts as `--dtype q8` does (32 inputs share a scale, an f16; routers and the
parts of `kv_b_proj` stay f32), in transformers on the CPU, and says how far logits move relative to the
largest: as they are, with the tokens left out whose experts changed, and with every token sent to the experts that
f32 weights choose. Then the choices that changed. Made with transformers 5.23 and torch 2.15. Not run in CI.
"""

import copy
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file

BLOCK = 32


def rounded(weight):
    if weight.dim() == 3:
        return torch.stack([rounded(expert) for expert in weight])
    blocks = []
    for block in weight.split(BLOCK, dim=1):
        exact = block.abs().amax(1, keepdim=True) / 127
        scale = exact.half()
        # The least f16 that is not below.
        scale = (scale.view(torch.int16) + (scale.float() < exact)).to(torch.int16).view(torch.half).float()
        steps = torch.where(scale > 0, (block / scale).round().clamp(-127, 127), torch.zeros_like(block))
        blocks.append(steps * scale)
    return torch.cat(blocks, dim=1)


def in_q8(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2 and not name.endswith("mlp.gate.weight") and "kv_b_proj" not in name:
                weight.copy_(rounded(weight))
    return model


def routers(model):
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def scores_of(router, logits):
    return logits.sigmoid() if hasattr(router, "e_score_correction_bias") else logits.softmax(-1)


def run(model, ids, choices=None):
    """Logits, and the router's logits, weights and experts of each layer; with the experts of `choices` if given."""
    found, hooks = [], []

    def hook(router, _, result):
        found.append(result)
        if choices is None:
            return result
        experts = choices[len(found) - 1][2]
        weights = scores_of(router, result[0]).gather(1, experts)
        # Mixtral's router divides always.
        if getattr(router, "norm_topk_prob", "Mixtral" in type(router).__name__):
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return result[0], weights * getattr(router, "routed_scaling_factor", 1.0), experts

    for router in routers(model):
        hooks.append(router.register_forward_hook(hook))
    with torch.no_grad():
        logits = model(ids).logits
    for one in hooks:
        one.remove()
    return logits, found


for name in ("mixtral", "deepseek_v2", "deepseek_v3"):
    folder = pathlib.Path(sys.argv[1]) / name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = load_file(folder / "golden.safetensors")["input_ids"]
    exact, chosen = run(model, ids)
    narrow = in_q8(model)
    logits, others = run(narrow, ids)
    forced, _ = run(narrow, ids, chosen)
    largest = exact.abs().max()
    changed = torch.stack(
        [(a[2].sort(-1)[0] != b[2].sort(-1)[0]).any(-1) for a, b in zip(chosen, others)]).any(0)
    off = (logits - exact).abs().amax(-1).flatten() / largest
    print(name, "as it is", off.max().item(), "without the tokens whose experts changed", off[~changed].max().item(),
          "sent to the experts of f32", ((forced - exact).abs().max() / largest).item())
    for router, a, b in zip(routers(model), chosen, others):
        for token in (a[2].sort(-1)[0] != b[2].sort(-1)[0]).any(-1).nonzero().flatten().tolist():
            before, after = (scores_of(router, x[0][token]) for x in (a, b))
            bias = getattr(router, "e_score_correction_bias", 0.0)
            print("  token", token, a[2][token].tolist(), "->", b[2][token].tolist(), "scores for choosing",
                  [round(x, 4) for x in (before + bias).tolist()], "moved by at most",
                  round((after - before).abs().max().item(), 4))
