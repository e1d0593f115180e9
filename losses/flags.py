"""Flags of the objectives."""

from dataclasses import dataclass

from rwkv.flags import flag


@dataclass(frozen=True)
class SFTFlags:
    """Supervised fine-tuning"""

    sft: bool = flag(False, "train on texts, instructions or dialogues")
    smoothing: float = flag(
        0.0, "label smoothing, 0 to below 1; upstream's scripts use 0.001", within="[0, 1)"
    )
    l2wrap: float = flag(
        1e-4, "pull of each token's largest logit towards 0; 0 for none", within="[0, inf)"
    )


@dataclass(frozen=True)
class DistillationFlags:
    """Distillation; --smoothing and --l2wrap apply to its hard labels too"""

    distillation: bool = flag(
        False,
        "learn from a teacher: --train_data_file made by data.make_teacher, or RWKV-LM-RLHF's",
    )
    kd_loss: str = flag(
        "forward",
        "how far student and teacher are apart: KL forward or reverse, or jsd between them (over "
        "the file's tokens and one bucket for the rest, or the vocabulary with --teacher_model); "
        "over the file's tokens alone renormalized (RWKV-LM-RLHF's) or teacher_renormalized",
        choices=("forward", "reverse", "jsd", "renormalized", "teacher_renormalized"),
    )
    jsd_beta: float = flag(0.5, "weight of the teacher in jsd's mixture, 0 to 1", within="[0, 1]")
    temperature: float = flag(
        2.0, "what divides the logits of teacher and student", within="(0, inf)"
    )
    alpha: float = flag(
        0.5, "weight of the hard labels; the teacher has the rest, 1 - alpha", within="[0, 1]"
    )
    top_k: int = flag(
        100, "most teacher scores a token to use; the file may hold fewer", within="[1, inf)"
    )
    teacher_model: str = flag(
        "", "a model that runs beside the student; --train_data_file is then as for --sft"
    )

    @property
    def reads_scores(self) -> bool:
        """Whether the training data are a teacher's scores."""
        return self.distillation and not self.teacher_model


@dataclass(frozen=True)
class ChunkFlags:
    """Long texts"""

    infctx: bool = flag(False, "walk long texts in chunks with the state carried")
    chunk_ctx: int = flag(512, "tokens of a chunk under --infctx", within="[1, inf)")
    chunk_grad: str = flag(
        "exact",
        "exact: the gradient of the whole text; truncated: cut where chunks meet",
        choices=("exact", "truncated"),
    )
    chunk_offload: bool = flag(False, "keep the states between chunks in host memory")
