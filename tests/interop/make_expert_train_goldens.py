"""Writes what PyTorch computes in the first training steps of the models with experts.

    python tests/interop/make_expert_train_goldens.py tests/goldens

Reads each folder's model; causal LM, float32, CPU, eager attention, no dropout, no auxiliary loss. AdamW(lr 1e-3,
betas 0.9/0.95, eps 1e-8, weight decay 0.1 on parameters of two or more dimensions, 0 on the rest), gradient
clipped to a global norm of 1.0 before each step. `experts.safetensors`: tokens [6,4,17] int64 (inputs are
[..., :-1], targets [..., 1:], loss is the mean over all targets), losses [6] (before each step), grad_norms [6] (before
clipping), and of each parameter, under the name that transformers holds it by, three numbers of its gradient in
step 0 (`grad0.<name>`) and of its value after the last step (`final.<name>`): the norm, and the sums of its
elements times cos(i) and times sin(0.7 i), over i from 0.
`balance.safetensors` of Mixtral and Qwen3-MoE is the same with transformers' load-balancing loss added, times
`aux_loss_coef` [1], which is large enough to move every gradient.
Made with transformers 5.23 and torch 2.15.
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

STEPS, ROWS, LENGTH = 6, 4, 16


def sketch(values):
    flat = values.detach().double().flatten()
    i = torch.arange(flat.numel(), dtype=torch.float64)
    return torch.stack([flat.norm(), (flat * i.cos()).sum(), (flat * (0.7 * i).sin()).sum()]).float()


def train(folder, aux_loss_coef=0.0):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).train()
    named = dict(model.named_parameters())
    groups = [
        dict(params=[p for p in named.values() if p.dim() >= 2], weight_decay=0.1),
        dict(params=[p for p in named.values() if p.dim() < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    tokens = torch.randint(0, model.config.vocab_size, (STEPS, ROWS, LENGTH + 1))
    losses, norms, out = [], [], {"tokens": tokens}
    for step in range(STEPS):
        optimizer.zero_grad()
        result = model(tokens[step, :, :-1], **({"output_router_logits": True} if aux_loss_coef else {}))
        logits = result.logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[step, :, 1:].flatten())
        if aux_loss_coef:
            print("auxiliary loss", result.aux_loss.item())
            loss = loss + aux_loss_coef * result.aux_loss
        loss.backward()
        if step == 0:
            out |= {f"grad0.{name}": sketch(p.grad) for name, p in named.items()}
        losses.append(loss.detach())
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), 1.0))
        optimizer.step()
    out |= {f"final.{name}": sketch(p) for name, p in named.items()}
    out |= {"losses": torch.stack(losses), "grad_norms": torch.stack(norms)}
    if aux_loss_coef:
        out["aux_loss_coef"] = torch.tensor([aux_loss_coef])
    save_file(out, folder / ("balance.safetensors" if aux_loss_coef else "experts.safetensors"))
    print(folder.name, [round(float(loss), 4) for loss in losses], list(named)[:14])


def main():
    for name in ["mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"]:
        train(pathlib.Path(sys.argv[1]) / name)
    for name in ["mixtral", "qwen3_moe"]:
        train(pathlib.Path(sys.argv[1]) / name, aux_loss_coef=0.5)


if __name__ == "__main__":
    main()
