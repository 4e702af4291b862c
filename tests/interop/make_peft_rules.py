"""Makes tests/goldens/peft_rules.json: which modules PEFT takes for an `adapter_config.json`, with which rank and scale.

Needs torch and peft. Run from the repository's root:

    python tests/interop/make_peft_rules.py

Each case is a `LoraConfig` put on a model that has nothing but names (`get_peft_model`); what came of it is read from the
layers that PEFT made. `null` is a case that PEFT refuses, with its message.
"""

import json
import pathlib
import warnings

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

LINEAR = [
    *(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 11) for name in ("q_proj", "k_proj", "eq_proj")),
    "model.layers.1.mlp.experts.0.gate_proj",
    "model.layers.1.mlp.experts.11.gate_proj",
    "model.layers.1.mlp.gate",
    "transformer.h.0.attn.c_attn",
    "transformer.h.1.attn.c_attn",
    "cls.predictions.transform.dense",
    "lm_head",
]
# Stacked matrices of four experts, as transformers 5 holds them.
PARAMETERS = [f"model.layers.{layer}.stack.experts.{name}" for layer in (0, 1) for name in ("gate_up_proj", "down_proj")]

Q = dict(target_modules=["q_proj"])
CASES = [
    Q,
    dict(target_modules=["model.layers.1.self_attn.q_proj", "proj", "attn.k_proj", "self_attn.k_proj"]),
    dict(target_modules=["lm_head", "dense", "layers.0.self_attn.q_proj"]),
    dict(target_modules="q_proj"),
    dict(target_modules=r".*q_proj"),
    dict(target_modules=r"model\.layers\.\d+\.self_attn\.[qk]_proj|lm_head"),
    dict(target_modules=r"(?:.*?(?:self_attn|mlp).*?(?:k_proj|gate_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.gate)"),
    dict(target_modules=r".*\.(?!1)\d+\.self_attn\.q_proj"),
    dict(target_modules=r".*q_proj", layers_to_transform=[1]),
    dict(target_modules=r".*q_proj", layers_pattern="layers"),
    dict(Q, layers_to_transform=[]),
    dict(Q, layers_to_transform=1),
    dict(Q, layers_to_transform=[0, 11]),
    dict(target_modules=["q_proj", "c_attn", "gate_proj", "lm_head"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "model.layers.0.self_attn.k_proj", "lm_head"], layers_to_transform=[1]),
    dict(target_modules=["q_proj", "c_attn", "gate_proj"], layers_to_transform=[1], layers_pattern="layers"),
    dict(target_modules=["q_proj", "c_attn", "gate_proj"], layers_to_transform=[0], layers_pattern=["h", "layers"]),
    dict(target_modules=["q_proj", "c_attn", "gate_proj"], layers_to_transform=[11], layers_pattern=["experts"]),
    dict(target_modules=["q_proj", "c_attn", "lm_head"], layers_to_transform=[1], layers_pattern="h|layers"),
    dict(target_modules=["q_proj", "c_attn"], layers_to_transform=[0], layers_pattern=""),
    dict(target_modules=["q_proj"], layers_pattern="layers"),
    dict(target_modules=["q_proj", "k_proj"], exclude_modules=["layers.1.self_attn.q_proj", "k_proj"]),
    dict(target_modules=["q_proj", "k_proj"], exclude_modules=r".*\.1\..*"),
    dict(target_modules=["q_proj", "model.layers.1.self_attn.k_proj"], exclude_modules=["model.layers.1.self_attn.k_proj"]),
    dict(target_modules=["q_proj"], exclude_modules="q_proj"),
    dict(target_modules=["q_proj"], exclude_modules=[]),
    dict(target_modules=r".*_proj", exclude_modules=r".*(experts|eq_).*"),
    dict(target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}),
    dict(target_modules=["q_proj", "k_proj"], rank_pattern={"0.self_attn.q_proj": 2, "1.self_attn": 3}),
    dict(target_modules=["q_proj", "k_proj"], rank_pattern={r".*\.q_proj": 2, r"layers\.1\..*": 3}),
    dict(target_modules=["q_proj", "k_proj"], rank_pattern={r"layers\.1\..*": 3, r".*\.q_proj": 2}),
    dict(target_modules=["q_proj", "k_proj"], rank_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 3, "q.proj": 2}),
    dict(target_modules=["q_proj", "lm_head"], rank_pattern={"head": 2, "lm_head": 3, "q_proj|lm_head": 5}),
    dict(target_modules=["eq_proj", "q_proj"], alpha_pattern={"q_proj": 3, "model.layers.0.self_attn.q_proj": 5}),
    dict(Q, use_rslora=True),
    dict(Q, use_rslora=True, rank_pattern={"q_proj": 16}, alpha_pattern={r"layers\.[01]\.self_attn\.q_proj": 2.5}),
    dict(target_modules=[], target_parameters=["experts.gate_up_proj"]),
    dict(target_modules=["q_proj"], target_parameters=["gate_up_proj", "model.layers.1.stack.experts.down_proj"]),
    dict(target_modules=["q_proj"], target_parameters=["down_proj", "gate_up_proj"], layers_to_transform=[1]),
    dict(target_modules=["q_proj"], target_parameters=["down_proj"], exclude_modules=r".*\.1\..*"),
    dict(target_modules=["q_proj"], target_parameters=["down_proj", "gate_up_proj"],
         rank_pattern={r".*\.gate_up_proj": 16}, alpha_pattern={r".*\.gate_up_proj": 12, "1.stack.experts.down_proj": 2}),
    dict(target_modules=["q_proj"], target_parameters=["down_proj"], lora_dropout=0.1),
]


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 6, 5))
        self.down_proj = torch.nn.Parameter(torch.zeros(4, 5, 3))


def model() -> torch.nn.Module:
    root = torch.nn.Module()

    def add(name: str, module: torch.nn.Module) -> None:
        parent = root
        *path, last = name.split(".")
        for part in path:
            if part not in dict(parent.named_children()):
                parent.add_module(part, torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, module)

    for name in LINEAR:
        add(name, torch.nn.Linear(4, 4))
    for name in {name.rpartition(".")[0] for name in PARAMETERS}:
        add(name, Stack())
    return root


def answers(settings: dict) -> dict[str, list[float]]:
    tuned = get_peft_model(model(), LoraConfig(**{"r": 8, "lora_alpha": 6, **settings}))
    found = {}
    for name, module in tuned.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            found[f"{name}.{parameter}" if parameter else name] = [module.r["default"], module.scaling["default"]]
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    cases = []
    for settings in CASES:
        try:
            cases.append({"config": settings, "adapted": answers(settings)})
        except (ValueError, KeyError) as error:
            cases.append({"config": settings, "adapted": None, "why": str(error).splitlines()[0][:100]})
        print(json.dumps(cases[-1])[:200])
    table = {"modules": LINEAR, "parameters": PARAMETERS, "cases": cases}
    lines = [f'  "{key}": {json.dumps(value)}' for key, value in table.items() if key != "cases"]
    rows = ",\n".join(f"    {json.dumps(case)}" for case in cases)
    lines.append(f'  "cases": [\n{rows}\n  ]')
    path = pathlib.Path(__file__).resolve().parent.parent / "goldens" / "peft_rules.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
