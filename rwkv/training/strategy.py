"""From --strategy, --devices and --precision to what Lightning's Trainer takes."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from rwkv.errors import InputError, RunError
from rwkv.model import Block
from rwkv.training.flags import TrainerFlags
from rwkv.training.optimizer import sum_of_squares

BUCKET = 200_000_000  # elements that ZeRO reduces or gathers at once, at most
LEAST_BUCKET = 2**24  # and at least: the size of a 14B model's states


def chosen_device(flags: TrainerFlags) -> str:
    """`cuda` or `cpu`, as --accelerator says and the machine has.

    Raises:
        RunError: a GPU is asked for and there is none, or fewer than --devices.
    """
    if flags.accelerator == "cpu":
        return "cpu"
    count = torch.cuda.device_count()
    if count == 0:
        if flags.accelerator == "gpu":
            raise RunError(
                "--accelerator gpu: torch finds no GPU here; use --accelerator cpu, "
                "or install torch's build for your GPU"
            )
        return "cpu"
    if flags.devices > count:
        raise RunError(f"--devices {flags.devices}: this machine has {count} GPU(s); lower it")
    return "cuda"


def chosen_dtype(flags: TrainerFlags, device: str) -> torch.dtype:
    """The dtype of the model's weights."""
    precision = flags.precision or ("bf16" if device == "cuda" else "fp32")
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def take_device(flags: TrainerFlags, device: str) -> None:
    """Make this process's own GPU the current one, and keep to --gpu_memory on it.

    Args:
        flags: of the trainer.
        device: `cuda` or `cpu`; on a CPU nothing happens.
    """
    if device != "cuda":
        return
    index = int(os.environ.get("LOCAL_RANK", "0"))
    torch.cuda.set_device(index)
    grow_segments()
    if flags.gpu_memory:
        whole = torch.cuda.get_device_properties(index).total_memory
        share = min(1.0, flags.gpu_memory * 2**30 / whole)
        torch.cuda.set_per_process_memory_fraction(share, index)


def grow_segments() -> None:
    """Let torch reserve GPU memory in segments that grow, so that little is lost between blocks.

    What the user's own PYTORCH_ALLOC_CONF says stays. The setter that torch 2.13 names instead of
    the deprecated one is not in every version before.
    """
    if any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        return
    known = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    (known or torch.cuda.memory._set_allocator_settings)("expandable_segments:True")


def uses_ddp(strategy: str, world: int) -> bool:
    """Whether --strategy is DDP on so many devices; `auto` is on several."""
    return strategy == "ddp" or (strategy == "auto" and world > 1)


def check_strategy(flags: TrainerFlags, *, on_gpu: bool) -> None:
    """Whether --strategy can run here; asked before a run's data is read.

    Args:
        flags: of the trainer.
        on_gpu: whether the run, or the one that a dry run plans for, has a GPU.

    Raises:
        InputError: DeepSpeed on a CPU.
        RunError: DeepSpeed is not installed.
    """
    if not flags.strategy.startswith("deepspeed"):
        return
    if not on_gpu:
        raise InputError(
            f"--strategy {flags.strategy}: DeepSpeed needs a GPU; use --strategy auto or ddp"
            f"{', or plan for one by --accelerator gpu' if flags.dry_run else ''}"
        )
    if find_spec("deepspeed") is None:
        raise RunError(f"--strategy {flags.strategy}: needs DeepSpeed; pip install deepspeed")


def make_strategy(flags: TrainerFlags, dtype: torch.dtype, trained: int) -> Any:
    """Lightning's strategy object or name.

    Our model already has the dtype it trains in, so Lightning runs at "32-true" throughout and
    casts nothing; DeepSpeed is told of bfloat16 in its own configuration and keeps float32
    masters.

    Args:
        flags: of the trainer.
        dtype: of the weights.
        trained: how many numbers train.

    Raises:
        RunError: DeepSpeed cannot be imported.
    """
    if uses_ddp(flags.strategy, flags.devices * flags.num_nodes):
        from rwkv.training.ddp import BucketedDDP

        return BucketedDDP()
    if not flags.strategy.startswith("deepspeed"):
        return flags.strategy
    try:
        import deepspeed  # noqa: F401
        from pytorch_lightning.strategies import DeepSpeedStrategy
    except ImportError as error:
        raise RunError(
            f"--strategy {flags.strategy}: cannot use DeepSpeed ({error}); pip install deepspeed"
        ) from None
    _name_plain_architecture()
    _scatter_after_recomputation()
    _measure_gradients_at_once()
    config = deepspeed_config(flags, dtype, trained)
    return DeepSpeedStrategy(config=config, exclude_frozen_parameters=True)


def scatter(model: nn.Module, strategy: Any) -> None:
    """Give each rank its part of every parameter, one parameter after the other.

    A model that was built in the host's memory comes to the GPU in parts, and may be larger than
    one GPU. A block is gathered as a whole when it runs, so that its kernels may read parameters
    of several modules. All parameters get the dtype that DeepSpeed trains in, DoRA's magnitudes
    too, as its other stages give it to them by themselves.

    Args:
        model: on any device; buffers move to the rank's own.
        strategy: Lightning's DeepSpeedStrategy of stage 3, its processes connected.
    """
    import deepspeed

    dtype = torch.bfloat16 if strategy.config["bf16"]["enabled"] else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=strategy.config)
    for block in model.modules():
        if isinstance(block, Block):
            for parameter in block.parameters():
                deepspeed.zero.register_external_parameter(block, parameter)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(strategy.root_device)


def bucket_size(trained: int) -> int:
    """Elements of DeepSpeed's buckets, which it makes whole at the start: about what trains.

    trained: how many numbers, a tuned state left out.
    """
    return min(BUCKET, max(LEAST_BUCKET, trained))


def deepspeed_config(flags: TrainerFlags, dtype: torch.dtype, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a strategy name such as deepspeed_stage_2_offload.

    Args:
        flags: of the trainer.
        dtype: of the weights.
        trained: how many numbers train.
    """
    stage = int(flags.strategy.split("_")[2])
    offload = flags.strategy.endswith("offload")
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        # it ends every backward pass by waiting for the GPU, for nothing where one rank is alone
        "overlap_comm": stage == 3 or flags.devices * flags.num_nodes > 1,
        "reduce_bucket_size": bucket_size(trained),
        "allgather_bucket_size": bucket_size(trained),
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    bf16: dict[str, Any] = {"enabled": dtype == torch.bfloat16}
    if stage < 3 and not offload:
        # Some kernels for each gradient, and the host waits for them; a gradient that is not finite
        # ends the run by the next step's loss, as it does without DeepSpeed.
        bf16["check_grad_overflow"] = False
    return {
        "bf16": bf16,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": flags.micro_bsz,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a micro-batch
    }


def _name_plain_architecture() -> None:
    """Give DeepSpeed's compiler an architecture that it can parse.

    DeepSpeed 0.19 stops at names such as "9.0a" in TORCH_CUDA_ARCH_LIST.
    """
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if any(word.rstrip().endswith("a") for word in wanted.replace(";", " ").split()):
        major, minor = torch.cuda.get_device_capability()
        os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"


def _scatter_after_recomputation() -> None:
    """Let ZeRO-3 scatter a frozen parameter as soon as the module that recomputes with it has run.

    DeepSpeed 0.19 keeps it for the module whose backward pass is under way, which for long texts
    is the whole model: all of it would be on every GPU until the end of the backward pass. What
    the backward pass reads, rwkv.recompute keeps.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    coordinator.update_recompute_parameters = lambda module, parameter: None


def _measure_gradients_at_once() -> None:
    """Let ZeRO-1 and 2 measure and clip gradients in a few kernels, without waiting for the GPU.

    DeepSpeed 0.19 starts several kernels for each parameter, of which adapters have hundreds, and
    reads the norm back once for each group of parameters.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer as Zero

    if Zero.get_grad_norm_direct is not _gradient_norm:
        Zero._clip_offloaded = Zero.unscale_and_clip_grads
        Zero.get_grad_norm_direct, Zero.unscale_and_clip_grads = _gradient_norm, _clip


def _gradient_norm(zero: Any, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
    """The norm of a group of gradients over all ranks, a float32 scalar."""
    assert norm_type == 2
    some = [g for g in gradients if not getattr(g, "_zero_padding", False)]
    total = sum_of_squares(some) if some else torch.zeros((), device=zero.device)
    torch.distributed.all_reduce(total, group=zero.dp_process_group)
    return total.sqrt()


def _clip(zero: Any, gradients: list[Tensor], norm: Any) -> None:
    """Divide by the scale of the loss and, where the norm is above the limit, shorten to it."""
    if zero.cpu_offload:
        zero._clip_offloaded(gradients, norm)
        return
    scale = zero.loss_scale
    if zero.clip_grad > 0:
        excess = (norm / scale + 1e-6) / zero.clip_grad
        scale = excess.clamp(min=1.0) * scale
    elif scale == 1:
        return
    for gradient in gradients:
        gradient.div_(scale)
