"""One token after the other, for all rows of a batch: on a GPU a CUDA graph that is replayed.

A step picks each row's next token and reads it. Everything a step touches stays in place (states,
counts, hidden states), so that a graph of it can be captured once and replayed; the host looks at
what was written only every few steps.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv.model import RWKV
from rwkv.ops.decoding import Late, decoding_backend
from rwkv.sampling_flags import Sampling
from rwkv.scattered import is_scattered
from rwkv.state import LayerState, State, zero_state

BEFORE_CAPTURE = 2  # steps that compile kernels and fill caches, before a graph is captured
LATE_ROWS = 64  # from here on states are most of what a step moves
LANES = 3  # streams beside the first, for products that do not wait for each other


class Pace(NamedTuple):
    """How closely the host follows.

    steps: between two looks at what was written.
    ahead: looks that are still to come while the device goes on.
    patience: rows that are free before prompts take their place.
    """

    steps: int
    ahead: int
    patience: int


def pace_for(device: torch.device, rows: int) -> Pace:
    """On a CPU the host looks at every token; on a GPU it would hold the device up."""
    return Pace(1, 0, 1) if device.type == "cpu" else Pace(8, 1, max(1, rows // 4))


def read_one(
    model: RWKV,
    tokens: Tensor,
    state: State,
    lanes: Sequence["torch.cuda.Stream"] = (),
    late: Sequence[Late] = (),
) -> Tensor:
    """Read one token of each row, without gradients: what model(tokens [B, 1], state) does.

    Args:
        model: of either version.
        tokens: ids, [B].
        state: changed in place; every field contiguous and nobody else's.
        lanes: CUDA streams for products that do not wait for each other.
        late: a layer's changes that its state lacks, for each layer; none where states are whole.

    Returns:
        what the head reads, [B, C].
    """
    with torch.no_grad():
        if is_scattered(model):  # parameters are there only while their module runs
            hidden, after = model(tokens.unsqueeze(1), state)
            for layer, new in zip(state, after, strict=True):
                for field, value in zip(layer, new, strict=True):
                    field.copy_(value)
            return hidden[:, 0]
        ops = backend_of(model)
        block: Any
        x = model.blocks[0].get_submodule("ln0")(model.emb(tokens))
        added: Tensor | None = None
        v_first: Tensor | None = None
        read = _read7 if model.config.version == 7 else _read6
        for n, (block, layer) in enumerate(zip(model.blocks, state, strict=True)):
            changes = late[n] if late else None
            added, v_first = read(ops, block, x, added, v_first, layer, changes, lanes)
        return model.ln_out(x if added is None else x + added)


def backend_of(model: RWKV) -> Any:
    """The module of rwkv/ops that decodes with a model."""
    att: Any = model.blocks[0].get_submodule("att")
    weight = model.ln_out.weight
    return decoding_backend(att.backend, N=att.N, device=weight.device, dtype=weight.dtype)


def _read7(
    ops: Any,
    block: Any,
    x: Tensor,
    added: Tensor | None,
    v_first: Tensor | None,
    state: LayerState,
    late: Late | None,
    lanes: Sequence["torch.cuda.Stream"],
) -> tuple[Tensor, Tensor]:
    """A block of RWKV-7; `added` is what the block before has not added to the stream yet."""
    q, ffn = block.att, block.ffn
    mixes = [q.x_r, q.x_w, q.x_k, q.x_v, q.x_a, q.x_g]
    x_r, x_w, x_k, x_v, x_a, x_g = ops.mix_shift(x, added, block.ln1, state.att_shift, mixes)
    r, k, v, (decay, iclr, blend, gate) = together(
        lanes,
        lambda: q.receptance(x_r),
        lambda: q.key(x_k),
        lambda: q.value(x_v),
        lambda: ops.low_rank7(q, x_w, x_a, x_v, x_g),
    )
    y = ops.wkv7_step(q, r, k, v, decay, iclr, blend, gate, v_first, state.wkv, late)
    (x_k,) = ops.mix_shift(x, q.output(y), block.ln2, state.ffn_shift, [ffn.x_k])
    return ffn.value(ops.square_relu(ffn.key(x_k))), v if v_first is None else v_first


def _read6(
    ops: Any,
    block: Any,
    x: Tensor,
    added: Tensor | None,
    v_first: Tensor | None,
    state: LayerState,
    late: Late | None,
    lanes: Sequence["torch.cuda.Stream"],
) -> tuple[Tensor, None]:
    """A block of RWKV-6, as `_read7`."""
    q, ffn = block.att, block.ffn
    mixed, n, before = ops.mix_shift6(x, added, block.ln1, state.att_shift, q.time_maa_x)
    mixes = [q.time_maa_w, q.time_maa_k, q.time_maa_v, q.time_maa_r, q.time_maa_g]
    low = torch.tanh(mixed @ q.time_maa_w1).view(len(x), len(mixes), -1).transpose(0, 1)
    deltas = torch.bmm(low, q.time_maa_w2)
    x_w, x_k, x_v, x_r, x_g = ops.mix_apart(n, before, mixes, deltas)
    (r,), (k, decay), (v,), (gate,) = together(
        lanes,
        lambda: (q.receptance(x_r),),
        lambda: (q.key(x_k), torch.tanh(x_w @ q.time_decay_w1) @ q.time_decay_w2),
        lambda: (q.value(x_v),),
        lambda: (q.gate(x_g),),
    )
    y = ops.wkv6_step(q, r, k, v, decay, gate, state.wkv, late)
    mixes = [ffn.time_maa_k, ffn.time_maa_r]
    x_k, x_r = ops.mix_shift(x, q.output(y), block.ln2, state.ffn_shift, mixes)
    (value,), (share,) = together(
        lanes,
        lambda: (ffn.value(ops.square_relu(ffn.key(x_k))),),
        lambda: (torch.sigmoid(ffn.receptance(x_r)),),
    )
    return share * value, None


def together(
    lanes: Sequence["torch.cuda.Stream"], first: Callable[[], Any], *others: Callable[[], Any]
) -> list[Any]:
    """The results of jobs that do not wait for each other, each in a lane of its own if there are.

    Tensors of other lanes need no record_stream: a lane begins behind all that was queued before,
    and what follows waits for every lane.
    """
    if not lanes:
        return [first(), *(job() for job in others)]
    here = torch.cuda.current_stream()
    results = []
    for lane, job in zip(lanes, others, strict=False):
        lane.wait_stream(here)
        with torch.cuda.stream(lane):
            results.append(job())
    results.insert(0, first())
    for lane, _ in zip(lanes, others, strict=False):
        here.wait_stream(lane)
    return results


class Picker:
    """Picks the next token of each row of a batch whose rows come and go."""

    def __init__(
        self, model: RWKV, sampling: Sampling, seed: int, banned: Tensor | None, rows: int = 1
    ):
        self.model, self.sampling, self.seed, self.banned = model, sampling, seed, banned
        device = model.device
        self._rows = torch.zeros(rows, dtype=torch.long, device=device)
        self._steps = torch.zeros_like(self._rows)
        width = model.config.vocab_size if sampling.counts else 0
        self._counts = torch.zeros(rows, width, device=device)

    def put(self, places: Tensor, numbers: Sequence[int]) -> None:
        """Rows that have written nothing yet; their draws depend on their numbers."""
        self._rows[places] = torch.tensor(numbers, device=self._rows.device)
        self._steps[places] = 0
        self._counts[places] = 0

    def keep(self, places: Tensor) -> None:
        """Keep these of the rows, in this order."""
        self._rows, self._steps = self._rows[places], self._steps[places]
        self._counts = self._counts[places]

    def forget_counts(self) -> None:
        """Penalties start anew."""
        self._counts.zero_()

    def pick(self, hidden: Tensor) -> Tensor:
        """The rows' next tokens [B], from the hidden states [B, C] after their last."""
        drawn = self.sampling.temperature > 0
        ops = backend_of(self.model)
        tokens = ops.pick(
            self.model.logits(hidden),
            self.sampling,
            ops.uniform_numbers(self.seed, self._rows, self._steps) if drawn else self._steps,
            self._counts if self.sampling.counts else None,
            self.banned,
        )
        self._steps += 1
        return tokens


class Written(NamedTuple):
    """What a few steps wrote, perhaps still on its way: see `Decoder.run`."""

    tokens: Tensor
    arrived: "torch.cuda.Event | None"

    def rows(self) -> list[list[int]]:
        """The tokens of each row, in order; waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tokens.T.tolist()


class Decoder:
    """A batch of rows, each with its state, hidden state and what its picker knows.

    Where there are many, the last few changes of a state may be missing from it; see Late.

    Attributes:
        graph: the captured step; None before, on a CPU, and where it cannot be captured.
    """

    def __init__(self, model: RWKV, picker: Picker, rows: int):
        self.model, self.picker = model, picker
        self.hidden = model.ln_out.weight.new_zeros(rows, model.config.n_embd)
        self.state = owned(zero_state(model.config, rows, like=model.ln_out.weight))
        self.graph: torch.cuda.CUDAGraph | None = None
        device = self.hidden.device
        self._capturable = device.type == "cuda" and not is_scattered(model)
        self._lanes = [torch.cuda.Stream(device) for _ in range(LANES * self._capturable)]
        self._steps = 0
        self._tokens = torch.zeros(rows, dtype=torch.long, device=device)
        self._noted = torch.zeros((), dtype=torch.long, device=device)
        most = 0 if is_scattered(model) or rows < LATE_ROWS else backend_of(model).LATE
        self._late = [
            Late.of(model.config.version, most, layer.wkv, self.hidden, self._noted)
            for layer in self.state
            if most
        ]

    def put(
        self, places: Sequence[int], numbers: Sequence[int], hidden: Tensor, state: State
    ) -> None:
        """Let other texts go on in these rows: hidden [K, C], the states of K sequences."""
        index = torch.tensor(places, device=self.hidden.device)
        self.picker.put(index, numbers)
        self.hidden.index_copy_(0, index, hidden)
        for layer, new in zip(self.state, state, strict=True):
            for field, value in zip(layer, new, strict=True):
                field.index_copy_(0, index, value.to(field.dtype))
        for late in self._late:
            late.forget(index)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows alone, in this order; a graph is captured anew."""
        index = torch.tensor(places, device=self.hidden.device)
        self.graph, self._steps = None, 0
        self.hidden, self._tokens = self.hidden[index], self._tokens[index]
        for n, layer in enumerate(self.state):
            self.state[n] = layer.select(index)
        self._late = [late.select(index) for late in self._late]
        self.picker.keep(index)

    def run(self, steps: int) -> Written:
        """Write `steps` tokens in each row. On a GPU this returns before they are there."""
        log = torch.stack([self._next() for _ in range(steps)])
        if log.device.type == "cpu":
            return Written(log, None)
        tokens = torch.empty(log.shape, dtype=log.dtype, pin_memory=True)
        tokens.copy_(log, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Written(tokens, arrived)

    def _next(self) -> Tensor:
        if self._capturable and self.graph is None and self._steps >= BEFORE_CAPTURE:
            self._capture()
        self._steps += 1
        if self.graph is None:
            self._step()
        else:
            self.graph.replay()
        return self._tokens.clone()

    @torch.no_grad()
    def _step(self) -> None:
        self._tokens.copy_(self.picker.pick(self.hidden))
        self.hidden.copy_(read_one(self.model, self._tokens, self.state, self._lanes, self._late))
        if self._late:
            self._noted.add_(1).remainder_(len(self._late[0].inputs) + 1)

    def _capture(self) -> None:
        """Capture a step; where something in the model cannot be captured, go on without."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        here = torch.cuda.current_stream(self.hidden.device)
        try:
            # Threads that load data may allocate meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            self._capturable, self._lanes = False, []
            torch.cuda.set_stream(here)
            end_failed_capture(pool, self._tokens)
            reason = str(error).splitlines()[0]
            warnings.warn(f"decoding goes on without a CUDA graph: {reason}", stacklevel=2)
        else:
            self.graph = graph


def end_failed_capture(pool: Any, sample: Tensor) -> None:
    """Do what CUDAGraph.capture_end leaves undone when it raises (torch 2.11).

    The allocator would go on as if a capture were under way, and the default generator would take
    every later draw for one outside of its capture. A generator can be reached through a capture
    alone; this one allocates nothing.

    Args:
        pool: which memory the capture took; it must not have been another graph's.
        sample: any tensor of the device.
    """
    with suppress(RuntimeError):  # where what failed came before or after the allocator's part
        torch._C._cuda_endAllocateToPool(sample.device.index, pool)
        torch._C._cuda_releasePool(sample.device.index, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        sample.add_(0)


def owned(state: State) -> State:
    """A copy that `read_one` may change."""
    dense = torch.contiguous_format
    return [LayerState(*(f.detach().clone(memory_format=dense) for f in s)) for s in state]
