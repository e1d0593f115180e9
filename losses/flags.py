"""Flags of the objectives."""

from dataclasses import dataclass

from rwkv.flags import flag


@dataclass(frozen=True)
class SFTFlags:
    """Supervised fine-tuning"""

    sft: bool = flag(False, "train on texts, instructions or dialogues")
    smoothing: float = flag(0.0, "label smoothing, 0 to below 1; upstream's scripts use 0.001")
    l2wrap: float = flag(1e-4, "pull of each token's largest logit towards 0; 0 for none")


@dataclass(frozen=True)
class ChunkFlags:
    """Long texts"""

    infctx: bool = flag(False, "walk long texts in chunks with the state carried")
    chunk_ctx: int = flag(512, "tokens of a chunk under --infctx")
    chunk_grad: str = flag(
        "exact",
        "exact: the gradient of the whole text; truncated: cut where chunks meet",
        choices=("exact", "truncated"),
    )
    chunk_offload: bool = flag(False, "keep the states between chunks in host memory")
