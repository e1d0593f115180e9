"""What HF peft makes of its own adapters, to hold peft/hf_folder.py to.

HF peft has the name of our folder, so run this from another one, with a Python that has it:

    cd /tmp && python REPOSITORY/tests/parity_hf_peft.py write   # tests/golden/hf_peft anew
    cd /tmp && python REPOSITORY/tests/parity_hf_peft.py read FOLDER WEIGHTS.safetensors

`write` trains nothing: adapters of random numbers over a stand-in for two of RWKV-7's layers, with
the base's weights and the merged ones beside them. `read` loads a folder of ours over such weights
and prints the largest difference between its merged weights and those named `merged.*`.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from peft import LoraConfig, MissConfig, PeftModel, get_peft_model

GOLDEN = Path(__file__).resolve().parent / "golden" / "hf_peft"
KEY, HEAD = "model.layers.0.attn.k_proj", "lm_head"
CONFIGS = {
    "lora": LoraConfig(
        r=2, lora_alpha=6, target_modules=["k_proj", HEAD], rank_pattern={HEAD: 4},
        alpha_pattern={HEAD: 2},
    ),
    "rslora": LoraConfig(r=4, lora_alpha=6, target_modules=["k_proj"], use_rslora=True),
    "dora": LoraConfig(r=2, lora_alpha=6, target_modules=["k_proj", HEAD], use_dora=True),
    "miss": MissConfig(r=2, target_modules=["k_proj", HEAD]),
}  # fmt: skip


class StandIn(nn.Module):
    """Two linear layers under the names that RWKV-7's HF models give them."""

    prepare_inputs_for_generation = None  # HF peft asks causal models for it

    def __init__(self) -> None:
        super().__init__()
        attn = nn.Module()
        attn.k_proj = nn.Linear(8, 12, bias=False)
        layer, self.model = nn.Module(), nn.Module()
        layer.attn = attn
        self.model.layers = nn.ModuleList([layer])
        self.lm_head = nn.Linear(12, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model.layers[0].attn.k_proj(x))


def write() -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        base = StandIn()
        before = {f"base.{n}": t.clone() for n, t in base.state_dict().items()}
        model = get_peft_model(base, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(GOLDEN / name)
        (GOLDEN / name / "README.md").unlink()
        merged = model.merge_and_unload().state_dict()
        after = {f"merged.{n}": t.contiguous() for n, t in merged.items()}
        save_file(before | after, GOLDEN / name / "weights.safetensors")


def read(folder: str, weights: str) -> None:
    tensors = load_file(weights)
    base = StandIn()
    base.load_state_dict(
        {n.removeprefix("base."): t for n, t in tensors.items() if n.startswith("base.")}
    )
    merged = PeftModel.from_pretrained(base, folder).merge_and_unload().state_dict()
    print(max((merged[n] - tensors[f"merged.{n}"]).abs().max().item() for n in merged))  # noqa: T201


if __name__ == "__main__":
    write() if sys.argv[1] == "write" else read(*sys.argv[2:])
