"""Flags of the model, the trainer, the optimizer, evaluation and logs."""

from dataclasses import dataclass

from rwkv.flags import flag


@dataclass(frozen=True)
class ModelFlags:
    """Model"""

    load_model: str = flag(
        "", "an RWKV-6 or RWKV-7 .pth or .safetensors file; absent: train from scratch"
    )
    my_testing: str = flag(
        "", "version: x060 or x070; read from --load_model, needed from scratch (default x070)"
    )
    n_layer: int = flag(0, "blocks; read from --load_model", within="[0, inf)")
    n_embd: int = flag(0, "channels; read from --load_model", within="[0, inf)")
    dim_att: int = flag(0, "channels inside the time mix; default n_embd", within="[0, inf)")
    dim_ffn: int = flag(
        0, "width of the channel mix; default 4 (v7) or 3.5 (v6) times n_embd", within="[0, inf)"
    )
    vocab_size: int = flag(0, "tokens; read from --load_model", within="[0, 65536]")
    head_size_a: int = flag(
        0, "channels of a head; read from --load_model, default 64", within="[0, inf)"
    )
    kernel: str = flag(
        "auto",
        "wkv implementation; auto takes the best that can run",
        choices=("auto", "cuda", "triton", "fla", "torch", "reference"),
    )
    fla: bool = flag(False, "same as --kernel fla")

    @property
    def backend(self) -> str:
        """The wkv backend that the flags name."""
        return "fla" if self.fla else self.kernel


@dataclass(frozen=True)
class TrainerFlags:
    """Trainer"""

    proj_dir: str = flag("out", "folder for checkpoints, logs and pictures")
    accelerator: str = flag("auto", "cpu, gpu or auto", choices=("auto", "cpu", "gpu"))
    devices: int = flag(1, "GPUs (or CPU processes) a node", within="[1, inf)")
    num_nodes: int = flag(1, "nodes", within="[1, inf)")
    strategy: str = flag(
        "auto",
        "how to spread the work",
        choices=(
            "auto",
            "ddp",
            "deepspeed_stage_1",
            "deepspeed_stage_2",
            "deepspeed_stage_2_offload",
            "deepspeed_stage_3",
            "deepspeed_stage_3_offload",
        ),
    )
    precision: str = flag(
        "", "bf16 or fp32; default bf16 on a GPU, fp32 on a CPU", choices=("", "bf16", "fp32")
    )
    gpu_memory: float = flag(
        0.0, "GiB of each GPU that the run may take; 0: all there is", within="[0, inf)"
    )
    micro_bsz: int = flag(
        1, "rows of ctx_len tokens that one device takes at once", within="[1, inf)"
    )
    accumulate_grad_batches: int = flag(
        1, "micro-batches a device sums up before a step", within="[1, inf)"
    )
    grad_cp: bool | str = flag(
        True,
        "recompute each half of a block in the backward pass: less memory; selective: all but its "
        "products and wkv",
        also=("selective",),
    )
    grad_cp_memory: float = flag(
        0.0, "GiB of each GPU that --grad_cp selective may fill; 0: no limit", within="[0, inf)"
    )
    grad_cp_offload: bool = flag(
        False, "keep what --grad_cp keeps in host memory: less memory yet, of the GPU"
    )
    cuda_graphs: bool | str = flag(
        "auto",
        "launch a micro-batch's kernels all at once; auto: where that can be, in SFT on one GPU",
        also=("auto",),
    )
    epoch_steps: int = flag(
        0, "micro-batches of an epoch; 0: one pass over the data", within="[0, inf)"
    )
    epoch_count: int = flag(1, "epochs to train", within="[1, inf)")
    epoch_begin: int = flag(0, "number of the first epoch, for file names", within="[0, inf)")
    epoch_save: int = flag(1, "epochs between saved models", within="[1, inf)")
    resume: bool = flag(False, "continue the run in --proj_dir from its last resume point")
    resume_every: int = flag(
        0, "steps between resume points; 0: at each saved model", within="[0, inf)"
    )
    random_seed: int = flag(42, "of the data order, new weights and dropout", within="[0, inf)")
    dry_run: bool | str = flag(
        False,
        "print the plan and the predicted memory, and stop; verify: on a GPU, run two steps and "
        "print what was predicted beside what was measured",
        also=("verify",),
    )
    memory: str = flag(
        "", "with --dry_run: memory of a device, such as 24GB, for which to name what would fit"
    )


@dataclass(frozen=True)
class OptimizerFlags:
    """Optimizer"""

    optim: str = flag(
        "",
        "AdamW (default), AdamW8bit or Lion (bitsandbytes)",
        choices=("", "adamw", "AdamW8bit", "Adam8bit", "adam8bit", "lion"),
    )
    lr_init: float = flag(1e-4, "learning rate after the warm-up", within="[0, inf)")
    lr_final: float = flag(1e-5, "learning rate at the end", within="[0, inf)")
    lr_advanced: bool = flag(True, "take learning rates from the layer profile where it has them")
    lr_schedule: str = flag(
        "exponential",
        "from lr_init to lr_final",
        choices=("exponential", "cosine", "linear", "wsd", "constant"),
    )
    warmup_steps: int = flag(0, "steps from 0.2 lr_init up to lr_init", within="[0, inf)")
    beta1: float = flag(0.9, "Adam's decay of the mean", within="[0, 1)")
    beta2: float = flag(0.99, "Adam's decay of the square", within="[0, 1)")
    adam_eps: float = flag(1e-8, "Adam's epsilon", within="(0, inf)")
    weight_decay: float = flag(0.0, "decoupled weight decay of matrices", within="[0, inf)")
    gradient_clip_val: float = flag(
        1.0, "largest gradient norm; 0 for no clipping", within="[0, inf)"
    )


@dataclass(frozen=True)
class EvaluationFlags:
    """Evaluation and logs"""

    val_every: int = flag(0, "steps between evaluations; 0: at each saved model", within="[0, inf)")
    val_prompts: str = flag("", "a text file, one prompt a line: sampled at each evaluation")
    val_tokens: int = flag(60, "longest sample, in tokens", within="[1, inf)")
    log_every: int = flag(1, "steps between lines of train_log.jsonl", within="[1, inf)")
    tensorboard: bool = flag(False, "write TensorBoard files to --proj_dir")
    wandb: str = flag("", "name of a Weights & Biases project; empty for none")
