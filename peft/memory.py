"""What a training step will occupy, part by part, from sizes alone.

Every part is a small function with its count in one place. Counts of activations are in numbers
that a token keeps for each of its channels; they were counted by following every allocation of a
model's forward and backward pass, and `python -m tests.bench_memory` sets them beside a GPU's
measurements. What torch rounds up and CUDA's own memory are OUTSIDE and SLACK.
"""

from dataclasses import dataclass, replace

import torch

from peft.pissa import is_randomized
from peft.plan import STORED, Plan, stored_bytes, trained_count, trained_sizes
from peft.registry import ADAPTERS, LOW_RANK
from peft.stores import STORES, store_class, stored_size
from rwkv.config import RWKVConfig
from rwkv.linear import SLICE as AT_ONCE
from rwkv.model import keeps_end
from rwkv.ops.kept import WKV_BYTES, WkvBytes
from rwkv.training.optimizer import SLICE
from rwkv.training.strategy import bucket_size, uses_ddp

GIB, MIB = 2**30, 2**20
OUTSIDE = int(0.6 * GIB)  # CUDA's context, kernels and libraries, which torch does not count
SLACK = 1.03  # what torch reserves over what it hands out, by the order of allocations

# Kept by a block's time mix for each token and channel, beside the inputs of its linear layers and
# the operator's own: with its small layers trained, and without. By version and whether the fused
# kernels run.
TIME_MIX = {
    (7, True): (18.0, 14.0),
    (7, False): (26.4, 19.6),
    (6, True): (9.3, 7.3),
    (6, False): (17.4, 15.4),
}
# The same of the channel mix, beside relu's result and the inputs.
CHANNEL_MIX = {(7, True): (1.0, 1.0), (7, False): (2.0, 1.0), (6, True): (3.0, 3.0)}
CHANNEL_MIX[6, False] = (4.0, 3.0)
# Tensors that a backward pass makes on its way, over those that it has freed by then: of the time
# mix's width at the gradient of wkv, of the channel mix's at that of relu.
PASSING = {(7, True): (5.0, 2.0), (6, True): (3.0, 2.0), (7, False): (10.0, 2.6)}
PASSING[6, False] = (10.0, 2.6)
FIRST_VALUES = {7: 2, 6: 0}  # vectors a token beside the stream: the first layer's values, gradient
HEAD_BYTES = {True: 2, False: 20}  # for each logit of a piece; fused kernels write in their place
HEAD_PIECES = {True: 4, False: 1}  # times MAX_LOGITS at once
# The same with a teacher beside: both models' logits and what is made of them in float32.
BESIDE_BYTES = {"forward": 30, "reverse": 30, "jsd": 46}
HIDDEN = 5  # first values, last stream, hidden states, those that are scored, and their gradient
WORKSPACES = 2 * 2**25  # cuBLAS's, one for the thread of each pass, as torch has it on an H100
ON_THEIR_WAY = 3  # inputs of halves that are being copied to host memory or back
MAX_LOGITS = 2**26  # of a piece, as in losses.logprobs
# By 2 x 2048 and 4 x 4096 tokens of a model of 256 channels under glibc 2.36: the process grows by
# 3.3 and 3.5 times of what is predicted and in use, with this setting by 1.0 and 0.9 times.
MALLOC = (
    "  beside it malloc may hold more than twice as much that it has had back; with "
    "MALLOC_MMAP_THRESHOLD_=65536 in the environment it does not, which takes time"
)
LOADING, OPTIMIZER, BUCKETS = "loading", "optimizer", "buckets of DeepSpeed"
# Bytes for each weight of a slice, in plain torch: while it is stored and while it is unpacked, and
# for DoRA's lengths and PiSSA's rest.
STORING = dict.fromkeys(STORES, 20) | {"int8": 5, "fp8": 5}
UNPACKING = {"int8": 5, "fp8": 5, "fp6": 11, "fp6_e2m3": 11, "fp5": 11}
SQUARING, SUBTRACTING = 5, 4
WIDE = 4  # a float32 copy, in these
LATER = (OPTIMIZER, BUCKETS)  # parts that are not there while the model is loaded
KEEPS_INPUT = ("full", "lora", "dora", "dora_column", "bone", "pissa")


@dataclass(frozen=True)
class Step:
    """What a step runs on, beside the model and its plan.

    rows, ctx_len: of a micro-batch on one device; ctx_len is the room of a row.
    dtype: of the model.
    chunk: tokens of a row that are walked at once; 0 for all.
    packed: the rows of a micro-batch lie end to end in one, which chunks cut.
    texts: the most that a row holds.
    given_states: texts begin with copies of states, into which gradients flow, in every layer: of
        what a prefix left, say.
    prefix: one trains, so that gradients reach all blocks.
    answers: the most that a prompt has, all read after all prompts; 0 where nothing is a prompt.
        With them `texts` counts prompts.
    prompts: the share of the tokens that are prompts'.
    host_states: the states between chunks lie in host memory.
    grad_cp: blocks are recomputed; "selective": but for their large products and wkv.
    kept_limit: bytes that "selective" may keep; 0 for no limit.
    host_blocks: and what they start from lies in host memory.
    accumulate: micro-batches a step.
    tuned_state: the initial states train.
    on_gpu: CUDA and torch's allocator of its memory take their part too.
    fused: a GPU's fused kernels run.
    kernel: the backend of wkv; those that WKV_BYTES does not have are taken for "cuda".
    beside: the divergence from a teacher that runs beside, a key of BESIDE_BYTES; "" for none.
    teacher: bytes of that teacher's weights.
    optim, strategy, world: --optim, --strategy, and the number of devices.
    """

    rows: int
    ctx_len: int
    dtype: torch.dtype = torch.bfloat16
    chunk: int = 0
    packed: bool = True
    texts: int = 1
    given_states: bool = False
    prefix: bool = False
    answers: int = 0
    prompts: float = 0.5
    host_states: bool = False
    grad_cp: bool | str = True
    kept_limit: int = 0
    host_blocks: bool = False
    accumulate: int = 1
    tuned_state: bool = False
    on_gpu: bool = True
    fused: bool = True
    kernel: str = "cuda"
    beside: str = ""
    teacher: int = 0
    optim: str = ""
    strategy: str = "auto"
    world: int = 1

    @property
    def tokens(self) -> int:
        """Read at once."""
        rows, length = self._walked
        return rows * min(length, self.chunk or length)

    @property
    def reads(self) -> tuple["Step", "Step"]:
        """The reading of the prompts, and that of the answers from the states they left."""
        tokens, texts = self.rows * self.ctx_len, self.rows * self.texts
        ahead = max(1, min(round(self.prompts * tokens), tokens - 1))
        prompts = replace(self, rows=1, ctx_len=ahead, packed=True, texts=texts, answers=0)
        answers = replace(
            prompts, ctx_len=tokens - ahead, texts=texts * self.answers, given_states=True
        )
        return prompts, answers

    @property
    def texts_at_once(self) -> int:
        """Texts, or parts of them, that are read at once, if they are about equally long."""
        most = self.rows * self.texts
        if self.packed and self.chunk:
            rows, length = self._walked
            most = min(most, -(-most * self.tokens // (rows * length)) + 1)
        return min(most, self.tokens)

    @property
    def borders(self) -> int:
        """States that chunks hand on."""
        rows, length = self._walked
        return rows * (-(-length // self.chunk) - 1) if self.chunk else 0

    @property
    def _walked(self) -> tuple[int, int]:
        """Rows and their length, as the model sees them."""
        return (1, self.rows * self.ctx_len) if self.packed else (self.rows, self.ctx_len)

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 without DeepSpeed."""
        return int(self.strategy.split("_")[2]) if self.strategy.startswith("deepspeed") else 0


@dataclass(frozen=True)
class Prediction:
    """Bytes on one device.

    rest: what lies there throughout a run, by part; LATER only after the model was loaded.
    moments: what comes on top at each of the moments that can be the peak, by part.
    host: in host memory, by part.
    on_gpu: whether the device is one.
    """

    rest: dict[str, int]
    moments: dict[str, dict[str, int]]
    host: dict[str, int]
    on_gpu: bool = True

    @property
    def moment(self) -> str:
        """When the peak is reached."""
        return max(self.moments, key=lambda name: sum(self.at(name).values()))

    @property
    def peak(self) -> int:
        """What torch will have handed out at once, at most."""
        return sum(self.parts.values())

    @property
    def reserved(self) -> int:
        """What torch will hold for it."""
        return int(self.peak * SLACK) if self.on_gpu else self.peak

    @property
    def needed(self) -> int:
        """What a device must have; on a CPU beside Python and its libraries."""
        return self.reserved + (OUTSIDE if self.on_gpu else 0)

    @property
    def parts(self) -> dict[str, int]:
        """What the peak is made of."""
        return self.at(self.moment)

    def at(self, moment: str) -> dict[str, int]:
        """All parts at one of the moments."""
        there = {n: s for n, s in self.rest.items() if moment != LOADING or n not in LATER}
        return there | self.moments[moment]

    @property
    def largest(self) -> str:
        """The largest of the parts."""
        parts = self.parts
        return max(parts, key=lambda name: parts[name])


def predict(config: RWKVConfig, plan: Plan, step: Step) -> Prediction:
    """The memory of training this model by this plan.

    A CPU's memory is the host's: nothing leaves it.
    """
    if not step.on_gpu:
        strategy = step.strategy.removesuffix("_offload")
        step = replace(step, host_blocks=False, host_states=False, strategy=strategy)
    rest = weights(plan, step)
    if step.teacher:
        rest["the teacher's weights"] = step.teacher
    host: dict[str, int] = {}
    kept_by_optimizer = optimizer(plan, step)
    (host if step.strategy.endswith("offload") else rest)[OPTIMIZER] = kept_by_optimizer
    if step.stage in (1, 2):
        buckets = 2 if step.world > 1 else 1  # one is filled while the other is reduced
        size = bucket_size(trained_count(plan)) * step.dtype.itemsize
        rest[BUCKETS] = buckets * size
    states = states_handed_on(config, step)
    if step.host_states:
        host["states between chunks"], states = states, 0
    if step.host_blocks:
        reads = step.reads if step.answers else (step,)
        host["between blocks"] = sum(kept_on_host(config, plan, read) for read in reads)
    carried = {"states between chunks": states} if states else {}
    workspaces = {"workspaces of cuBLAS": WORKSPACES} if step.on_gpu and step.fused else {}
    walked = of_answers(config, plan, step) if step.answers else of_reading(config, plan, step)
    optimizing = {"gradients": gradients(plan, step), "gradients in float32": widened(plan, step)}
    moments = {name: carried | parts | workspaces for name, parts in walked.items()}
    moments["optimizer step"] = optimizing | workspaces
    moments[LOADING] = {"a layer being stored": storing(plan, step)}
    return Prediction(rest, moments, host, step.on_gpu)


def of_reading(
    config: RWKVConfig, plan: Plan, step: Step, *, found_gradients: bool = False
) -> dict[str, dict[str, int]]:
    """What reading texts, and going back through them, takes at its peaks, by part.

    found_gradients: the parameters' gradients are there before.
    """
    gradient = gradients(plan, step)
    stream = {"between blocks": between_blocks(config, plan, step)}
    inputs = stream | {"states of texts": first_states(config, step)}
    in_block, of_all = gradients_of_states(config, step)
    # The last block's backward pass finds all inputs and states and no gradient, the first block's
    # the reverse; parameters' gradients of earlier micro-batches and of later chunks, and DDP's
    # buckets, are there all along.
    all_along = step.accumulate > 1 or step.borders or uses_ddp(step.strategy, step.world)
    earlier = {"gradients": gradient} if all_along or found_gradients else {}
    found = {"gradients": gradient} | ({"gradients of states": of_all} if of_all else {})
    if step.host_blocks:
        found |= stream
    walked = max(inputs | earlier, found, key=lambda parts: sum(parts.values()))
    vector = step.tokens * config.n_embd * step.dtype.itemsize
    block = {"first layer's values": FIRST_VALUES[config.version] * vector}
    block["blocks at work"] = blocks_at_work(config, plan, step)
    block["a block's gradients of states"] = in_block
    block["a weight unpacked"] = unpacked_weight(plan, step, of_head=False)
    end = {"hidden states": HIDDEN * vector, "logits": head(config, step)}
    if not found_gradients:
        end["the last block"] = kept_by_last_block(config, plan, step)
    if plan.trains("head"):
        size = torch.Size(plan.layers["head"].shape).numel()
        end["the head's gradient"] = size * (4 + step.dtype.itemsize)  # the sum, and a piece's
    end["a weight unpacked"] = unpacked_weight(plan, step, of_head=True)
    return {"backward pass": walked | block, "head": inputs | earlier | end}


def of_answers(config: RWKVConfig, plan: Plan, step: Step) -> dict[str, dict[str, int]]:
    """As `of_reading`, of prompts and then their answers.

    What is kept of the prompts waits until the answers' backward pass is done. Each answer has a
    copy of the states that its prompt left; in chunks their gradients add up from chunk to chunk.
    The reference model's log-probabilities are a number an answer, and its pass takes less.
    """
    prompts, answers = step.reads
    left, copied = (
        read.texts * config.n_layer * state_of_text(config, step) for read in step.reads
    )
    vector = prompts.tokens * config.n_embd * step.dtype.itemsize
    kept, copies, beside = {}, {"states of texts": copied}, {}
    if not prompts.borders:
        ends = 2 if FIRST_VALUES[config.version] else 1  # first values, the last stream
        of_prompts = between_blocks(config, plan, prompts) + ends * vector
        kept = {"between blocks of prompts": of_prompts}
    if answers.borders:  # `states_handed_on` has the copies
        copies, beside = {}, {"gradients of answers' states": copied}
    beside |= kept
    last = {name: beside | parts for name, parts in of_reading(config, plan, answers).items()}
    first = of_reading(config, plan, prompts, found_gradients=True)["backward pass"]
    first = first | {"gradients of prompts' states": left}
    return {
        "backward pass": max(first, last["backward pass"], key=lambda parts: sum(parts.values())),
        "head": last["head"],
        "answers begin": kept | {"states of prompts": left} | copies,
    }


def weights(plan: Plan, step: Step) -> dict[str, int]:
    """The base's weights by storage, and the adapters; ZeRO-3 scatters what is not packed."""
    stored = stored_bytes(plan, step.dtype)
    adapters = sum(
        torch.Size(shape).numel() * step.dtype.itemsize
        for name in plan.layers
        if plan.plans[name].mode in ADAPTERS
        for shape in trained_sizes(plan, name).values()
    )
    plain = str(step.dtype).removeprefix("torch.")
    stored[plain] = stored.get(plain, 0) - adapters
    named = {f"weights, {kind}": size for kind, size in stored.items() if size}
    if step.stage == 3:
        named[f"weights, {plain}"] //= step.world
    first = sum(
        mine.rank * sum(plan.layers[name].shape) * step.dtype.itemsize
        for name, mine in plan.plans.items()
        if mine.mode == "pissa"
    )
    sizes = {"adapters": adapters, "first directions of PiSSA": first}
    return named | {name: size for name, size in sizes.items() if size}


def gradients(plan: Plan, step: Step) -> int:
    """Of all that trains, in the model's dtype; ZeRO-2 and 3 scatter them."""
    size = trained_count(plan) * step.dtype.itemsize
    return size // step.world if step.stage >= 2 else size


def optimizer(plan: Plan, step: Step) -> int:
    """The optimizer's means and, for parameters of fewer bits, float32 copies."""
    numbers = trained_count(plan)
    kind = step.optim.lower()
    means = {"adamw8bit": 2.03, "adam8bit": 2.03, "lion": 4.0}.get(kind, 8.0)  # bytes each
    size = int(numbers * (means + (4 if step.dtype != torch.float32 else 0)))
    return size // step.world if step.stage else size


def widened(plan: Plan, step: Step) -> int:
    """Gradients in float32, which the optimizer's step makes for its float32 copies.

    Ours makes them for one slice at a time, and on a GPU AdamW's kernel reads them as they are.
    """
    if step.dtype == torch.float32 or step.strategy.endswith("offload"):
        return 0
    if step.on_gpu and step.fused and not step.stage and step.optim in ("", "adamw"):
        return 0
    size = 4 * trained_count(plan)
    if step.stage:
        return size // step.world
    largest = max(
        (torch.Size(s).numel() for name in plan.layers for s in trained_sizes(plan, name).values()),
        default=0,
    )
    return min(size, 4 * max(SLICE, largest))


def learning_blocks(config: RWKVConfig, plan: Plan, step: Step) -> int:
    """Blocks that a gradient reaches: from the first that something trains in, or before."""
    trained = [name for name in plan.layers if trained_sizes(plan, name)]
    if step.tuned_state or step.prefix or "emb" in trained:
        return config.n_layer
    numbers = [int(name.split(".")[1]) for name in trained if name.startswith("blocks.")]
    return config.n_layer - min(numbers) if numbers else 0


def trains_small(plan: Plan) -> bool:
    """Whether norms and small vectors of any block train."""
    return any(
        layer.kind == "small" and name.startswith("blocks.") and plan.trains(name)
        for name, layer in plan.layers.items()
    )


def kept_inputs(config: RWKVConfig, plan: Plan, part: str, *, already: tuple[str, ...] = ()) -> int:
    """Numbers a token that a block's linear layers keep, of the block that keeps most.

    Args:
        config, plan: of the model.
        part: att or ffn.
        already: layers whose input something else keeps.
    """
    most = 0
    for block in range(config.n_layer):
        total = 0
        for name, layer in plan.layers.items():
            if not name.startswith(f"blocks.{block}.{part}.") or layer.kind != "linear":
                continue
            mine = plan.plans[name]
            out_features, in_features = layer.shape
            if mine.mode in KEEPS_INPUT and name.rpartition(".")[2] not in already:
                total += in_features
            if mine.mode in ("dora", "dora_column"):
                total += out_features
            if mine.mode in ADAPTERS:
                total += mine.rank
        most = max(most, total)
    return most


def kept_by_time_mix(config: RWKVConfig, plan: Plan, step: Step, *, at_work: bool = False) -> int:
    """What one block's time mix keeps for its backward pass.

    at_work: and what wkv makes again when it comes to it.
    """
    small = trains_small(plan)
    counted = TIME_MIX[config.version, step.fused][0 if small else 1] * config.dim_att
    already = ("value",) if small and config.version == 7 else ()
    numbers = counted + kept_inputs(config, plan, "att", already=already)
    own = wkv_bytes(config, step)
    of_wkv = (own.at_work if at_work else own.kept) * config.dim_att
    return int(step.tokens * (numbers * step.dtype.itemsize + of_wkv))


def wkv_bytes(config: RWKVConfig, step: Step) -> WkvBytes:
    """What the step's wkv holds for its backward pass."""
    return _of_kernel(config, step).in_texts(step.texts_at_once, step.tokens)


def _of_kernel(config: RWKVConfig, step: Step) -> WkvBytes:
    return WKV_BYTES.get((config.version, step.kernel)) or WKV_BYTES[config.version, "cuda"]


def kept_by_channel_mix(config: RWKVConfig, plan: Plan, step: Step) -> int:
    """What one block's channel mix keeps for its backward pass.

    The fused relu and LoRA's keep their result, which is the input of the layer behind them.
    """
    small = trains_small(plan)
    counted = CHANNEL_MIX[config.version, step.fused][0 if small else 1] * config.n_embd
    keys = [plan.plans[f"blocks.{block}.ffn.key"].mode for block in range(config.n_layer)]
    by_result = step.fused or all(mode in ("lora", "pissa") for mode in keys)
    already = ("value",) if by_result else ()
    numbers = counted + config.dim_ffn + kept_inputs(config, plan, "ffn", already=already)
    return int(step.tokens * numbers * step.dtype.itemsize)


def kept_by_block(config: RWKVConfig, plan: Plan, step: Step) -> int:
    """What one block keeps for its backward pass."""
    return kept_by_time_mix(config, plan, step) + kept_by_channel_mix(config, plan, step)


def between_blocks(config: RWKVConfig, plan: Plan, step: Step) -> int:
    """What all blocks keep until the backward pass reaches them.

    Recomputed blocks keep the inputs of their two halves, under ZeRO-3 that of the whole; of those
    that lie in host memory a few are on their way. Beside them are `kept_for_second_run`.
    """
    vector = step.tokens * config.n_embd * step.dtype.itemsize
    blocks = learning_blocks(config, plan, step)
    if step.grad_cp:
        count = blocks * (1 if step.stage == 3 else 2)
        vectors = min(count, ON_THEIR_WAY) if step.host_blocks else count
        return vector * vectors + kept_of_halves(config, plan, step, ("att", "ffn"), blocks)
    return max(blocks - 1, 0) * kept_by_block(config, plan, step)


def kept_of_halves(
    config: RWKVConfig, plan: Plan, step: Step, parts: tuple[str, ...], blocks: int
) -> int:
    """What these halves of some blocks keep for their second run, within the limit."""
    selective = step.grad_cp == "selective"
    least = replace(step, grad_cp=True, host_blocks=False) if selective else step
    small, most = (
        blocks * sum(kept_for_second_run(config, plan, one, part) for part in parts)
        for one in (least, step)
    )
    return small + min(most - small, step.kept_limit or most)


def kept_for_second_run(config: RWKVConfig, plan: Plan, step: Step, part: str) -> int:
    """Bytes of results that a recomputed half keeps, of the block that keeps most.

    x A^T of LoRA and of the time mix's own low-rank products, but where blocks wait in host memory,
    which leaves that of the layer that closes the half; selective: and the outputs of all other
    layers, and of wkv its output and what its backward pass reads. Nothing under ZeRO-3.
    """
    if step.stage == 3:
        return 0
    closing = ("att.output", "ffn.value") if config.version == 7 else ("att.output",)
    selective, most = step.grad_cp == "selective", 0
    low_ranks = selective or not step.host_blocks
    small = low_rank_numbers(config) if part == "att" and low_ranks else 0
    for block in range(config.n_layer):
        numbers = small
        for name, layer in plan.layers.items():
            if not name.startswith(f"blocks.{block}.{part}.") or layer.kind != "linear":
                continue
            mine, closes = plan.plans[name], name.endswith(closing)
            if mine.mode in LOW_RANK and (closes or low_ranks):
                numbers += mine.rank
            if selective and not closes:
                numbers += layer.shape[0]
        most = max(most, numbers)
    wkv = 0.0
    if selective and part == "att":
        wkv = config.dim_att * (step.dtype.itemsize + wkv_bytes(config, step).kept)
    return int(step.tokens * (most * step.dtype.itemsize + wkv))


def low_rank_numbers(config: RWKVConfig) -> int:
    """What the first factors of a time mix's low-rank products give for a token."""
    ranks = config.ranks
    if config.version == 6:
        return ranks.decay + 5 * ranks.mix
    return ranks.decay + ranks.iclr + ranks.value + ranks.gate


def kept_by_last_block(config: RWKVConfig, plan: Plan, step: Step) -> int:
    """What the last recomputed block keeps over `between_blocks`, see `keeps_end`."""
    if not step.grad_cp or step.stage == 3 or not keeps_end(config, step.tokens):
        return 0
    every = replace(step, grad_cp="selective", kept_limit=0)
    of_time_mix, mine = (kept_for_second_run(config, plan, one, "att") for one in (every, step))
    vector = step.tokens * config.n_embd * step.dtype.itemsize
    of_channel_mix = kept_by_channel_mix(config, plan, step) - vector
    return of_time_mix - mine + of_channel_mix - kept_for_second_run(config, plan, step, "ffn")


def kept_on_host(config: RWKVConfig, plan: Plan, step: Step) -> int:
    """What recomputed blocks keep in pinned memory, which torch rounds up to powers of two."""
    vector = step.tokens * config.n_embd * step.dtype.itemsize
    halves = learning_blocks(config, plan, step) * (1 if step.stage == 3 else 2)
    return halves << (vector - 1).bit_length()


def blocks_at_work(config: RWKVConfig, plan: Plan, step: Step) -> int:
    """A block, or the larger half of it, with what it keeps and its backward pass makes.

    Of a recomputed half without what `between_blocks` has of this block: the channel mix has used
    up its own when the time mix is at work.
    """
    of_time, of_channels = PASSING[config.version, step.fused]
    own = _of_kernel(config, step)
    of_time += own.gradients * (own.rounding(step.texts_at_once, step.tokens) - 1)
    vector = step.tokens * step.dtype.itemsize
    passing = int(of_time * vector * config.dim_att), int(of_channels * vector * config.dim_ffn)
    of_time_mix = kept_by_time_mix(config, plan, step, at_work=True)
    halves = of_time_mix, kept_by_channel_mix(config, plan, step)
    if step.grad_cp and step.stage != 3:
        of_both, of_one = (
            kept_of_halves(config, plan, step, parts, 1) for parts in (("att", "ffn"), ("ffn",))
        )
        return max(halves[0] + passing[0] - of_both, halves[1] + passing[1] - of_one)
    return sum(halves) + max(passing)


def state_of_text(config: RWKVConfig, step: Step) -> int:
    """One text's state in one layer."""
    wkv = config.n_head * config.head_size**2 * 4
    shifts = 2 * config.n_embd * step.dtype.itemsize
    return wkv + shifts


def states_between_chunks(config: RWKVConfig, step: Step) -> int:
    """The states at the borders of chunks."""
    return step.borders * config.n_layer * state_of_text(config, step)


def states_handed_on(config: RWKVConfig, step: Step) -> int:
    """The states that chunks begin with: those at their borders, and of answers their own."""
    if not step.answers:
        return states_between_chunks(config, step)
    _, answers = step.reads
    own = answers.texts * config.n_layer * state_of_text(config, step) if answers.borders else 0
    return own + sum(states_between_chunks(config, read) for read in step.reads)


def first_states(config: RWKVConfig, step: Step) -> int:
    """What the texts that are read at once begin with.

    All layers share the zeros of new texts. Each has its own where states are given, and where it
    keeps one that is made for it: of a text that goes on in front of new ones, by recomputed blocks
    and by all kernels but plain torch, and of a tuned one, by those kernels.
    """
    by_kernel = not step.grad_cp and step.kernel != "torch"
    joined = bool(step.borders) and step.packed and step.texts_at_once > 1
    kept = (joined and (by_kernel or step.grad_cp)) or (step.tuned_state and by_kernel)
    layers = config.n_layer if kept or step.given_states else 1
    return layers * step.texts_at_once * state_of_text(config, step)


def gradients_of_states(config: RWKVConfig, step: Step) -> tuple[int, int]:
    """The gradients of the states that texts begin with: at a block's work, and of all layers.

    In a block there is one, over which that of the last states was written; both where they are
    wanted. They are wanted of what is tuned, given or handed on, and all layers' wait for the last
    of them.
    """
    one = step.texts_at_once * state_of_text(config, step)
    if not (step.tuned_state or step.given_states or step.borders):
        return one, 0
    return 2 * one, config.n_layer * one


def head(config: RWKVConfig, step: Step) -> int:
    """The logits of one piece with what their backward pass makes."""
    size = BESIDE_BYTES[step.beside] if step.beside else HEAD_BYTES[writes_over_logits(step)]
    return min(largest_piece(step), step.tokens * config.vocab_size) * size


def writes_over_logits(step: Step) -> bool:
    """Whether the gradient of logits takes their place, so that pieces are larger."""
    return step.fused and not step.beside and step.dtype.itemsize == 2


def largest_piece(step: Step) -> int:
    """Logits at once, at most."""
    return HEAD_PIECES[writes_over_logits(step)] * MAX_LOGITS


def unpacked_weight(plan: Plan, step: Step, *, of_head: bool) -> int:
    """The largest stored weight with what its product makes, where it takes more of two ways.

    It is made dense; or 8-bit codes are transposed, and the rows that they multiply rounded.

    of_head: the head's; else the largest of the blocks.
    """
    most = 0
    for name, layer in plan.layers.items():
        quant = plan.plans[name].quant
        looked_up = layer.kind == "embedding"
        if quant is None or quant == "none" or looked_up or (name == "head") != of_head:
            continue
        out_features, in_features = layer.shape
        size = out_features * in_features * step.dtype.itemsize
        size += unpacking(quant, step) * min(out_features * in_features, AT_ONCE)
        if quant in ("fp8", "int8"):
            rows = step.tokens
            if of_head:
                rows = min(rows, max(1, largest_piece(step) // out_features))
            size = max(size, out_features * in_features + rows * max(layer.shape))
        most = max(most, size)
    return most


def storing(plan: Plan, step: Step) -> int:
    """What the largest layer occupies at load beside what stays of it.

    Its weight, if it is stored, and what storing it or making its adapter takes.
    """
    names = (name for name, layer in plan.layers.items() if layer.kind in STORED)
    return max((being_made(plan, step, name) for name in names), default=0)


def being_made(plan: Plan, step: Step, name: str) -> int:
    """The same of one layer."""
    mine = plan.plans[name]
    quant = mine.quant or "none"
    out_features, in_features = plan.layers[name].shape
    numbers = out_features * in_features
    some = min(numbers, AT_ONCE)
    weight = numbers * step.dtype.itemsize
    dense = 0 if quant == "none" else weight
    moments = [dense]
    copy = 0 if step.dtype == torch.float32 else WIDE
    by_rows = quant in ("fp8", "int8")
    if quant != "none" and not (by_rows and step.fused):
        moments.append(dense + (STORING[quant] + by_rows * copy) * some)
    if mine.mode in ("dora", "dora_column"):
        whole = quant != "none" and in_features % store_class(quant).GROUP
        made = SQUARING + (copy if quant == "none" else WIDE + unpacking(quant, step))
        moments.append(made * (numbers if whole else some))
    if mine.mode == "pissa":
        both = mine.rank * (out_features + in_features)
        rest = weight + 4 * both + SUBTRACTING * some
        codes = 0 if quant == "none" else stored_size(quant, out_features, in_features)
        moments.append(dense - codes + max(rest, of_svd(plan, step, name)))
    return max(moments)


def of_svd(plan: Plan, step: Step, name: str) -> int:
    """What PiSSA's singular value decomposition of a layer takes, by torch 2.13 on a CPU."""
    rank, sides = plan.plans[name].rank, plan.layers[name].shape
    less, more = sorted(sides)
    if is_randomized(sides, rank, plan.flags.svd_niter):
        return 4 * min(less * more, AT_ONCE) + 9 * rank * (less + more)
    copies = 4 if step.dtype == torch.float32 else 8  # in float32, and as LAPACK overwrites it
    return copies * less * more + 4 * less * (less + more) + int(12.5 * less**2)


def unpacking(quant: str, step: Step) -> int:
    """Bytes for each weight of a slice beside a dense weight that is being made of codes."""
    return 0 if step.fused else UNPACKING.get(quant, 0)


def in_words(size: int) -> str:
    """Bytes in GiB, or below a tenth of that in MiB."""
    if size < GIB / 10:
        return f"{size / MIB:.1f} MiB"
    return f"{size / GIB:.1f} GiB"


def table(prediction: Prediction) -> list[str]:
    """The prediction in lines: parts of the peak, the other moments, the largest part.

    All in GiB, or in MiB if the peak is below a tenth of one.
    """
    unit, name_of_unit = (MIB, "MiB") if prediction.peak < GIB / 10 else (GIB, "GiB")
    parts = prediction.parts
    width = max(map(len, parts)) + 2
    lines = [f"predicted memory of a device, {name_of_unit}:"]
    lines += [f"  {name:<{width}}{size / unit:8.2f}" for name, size in parts.items()]
    lines.append(f"  {'peak':<{width}}{prediction.peak / unit:8.2f}  in the {prediction.moment}")
    others = [
        f"{name} {sum(prediction.at(name).values()) / unit:.2f}"
        for name in prediction.moments
        if name != prediction.moment
    ]
    lines.append(f"  other moments: {', '.join(others)}")
    if prediction.host:
        host = ", ".join(f"{name} {size / unit:.2f}" for name, size in prediction.host.items())
        lines.append(f"  in host memory: {host}")
    outside = "with what CUDA takes" if prediction.on_gpu else "beside Python and its libraries"
    lines.append(
        f"  a device needs {in_words(prediction.needed)} {outside}; the largest "
        f"part is {prediction.largest}, {parts[prediction.largest] / unit:.2f}"
    )
    if not prediction.on_gpu:
        lines.append(MALLOC)
    return lines
