"""Which pieces make which batch: a pure function of the data, its cutting and a seed.

A pass visits every piece once. Its rows, in an order drawn from (seed, pass), are dealt to
optimizer steps of G = world * micro_bsz * accumulate rows; the last step of a pass may have
fewer. Which rows a step has depends on G only, so a run can go on with other numbers of ranks and
micro-batches, and no worker or sampler holds a position.
"""

from typing import Any, Protocol

import numpy as np

from data.packing import best_fit, in_order, one_each


class Cuttable(Protocol):
    """A store whose records can be cut into pieces.

    Pieces have `sizes` (the room each takes), `room` (of a row), `scored` and `batch`.
    """

    def pieces(self, ctx_len: int, overlong: str) -> Any: ...


class _Pass:
    """The rows of one pass: row r has the pieces items[bounds[r] : bounds[r + 1]]."""

    def __init__(
        self, items: np.ndarray, bounds: np.ndarray, row_order: np.ndarray, step_counts: np.ndarray
    ):
        self.items, self.bounds = items, bounds
        self.row_order, self.step_counts = row_order, step_counts

    def row(self, position: int) -> np.ndarray:
        row = self.row_order[position]
        return self.items[self.bounds[row] : self.bounds[row + 1]]


class BatchPlan:
    """The batches of a run, numbered from its start, without any state.

    pieces: what is trained; its `report` tells what was split, cut or left out.
    rows_per_step: G.
    rows_per_pass, steps_per_pass: equal for all passes.
    fill: share of the rows' room that holds tokens.
    most_texts: pieces in the row that holds most of them.
    """

    def __init__(
        self,
        store: Cuttable,
        *,
        ctx_len: int,
        micro_bsz: int = 1,
        accumulate: int = 1,
        world: int = 1,
        seed: int = 0,
        packing: bool = True,
        shuffle: bool = True,
        overlong: str = "auto",
    ):
        """Plan the batches.

        Args:
            store: the records.
            ctx_len: inputs a row has room for.
            micro_bsz: rows a rank computes at once.
            accumulate: micro-batches a rank computes before the optimizer steps.
            world: ranks.
            seed: not negative; with the number of the pass it decides the order.
            packing: fill rows with several pieces, each with a state of its own; False gives a
                row to each piece.
            shuffle: False keeps the records' order.
            overlong: what happens to longer records, see data.pieces.

        Raises:
            ValueError: a size is below 1 or the seed below 0.
            InputError: nothing is left to train.
        """
        sizes = {"micro_bsz": micro_bsz, "accumulate": accumulate, "world": world, "seed": seed + 1}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"plan: {name} is {value - (name == 'seed')}, which is too small")
        self.pieces = store.pieces(ctx_len, overlong)
        self.ctx_len, self.micro_bsz = ctx_len, micro_bsz
        self.accumulate, self.world = accumulate, world
        self.seed, self.packing, self.shuffle = seed, packing, shuffle
        if not packing:
            self._order, self._bounds = one_each(self.pieces.sizes)
        elif shuffle:
            self._order, self._bounds = best_fit(self.pieces.sizes, self.pieces.room)
        else:
            self._order, self._bounds = in_order(self.pieces.sizes, self.pieces.room)
        self.rows_per_step = world * micro_bsz * accumulate
        self.rows_per_pass = len(self._bounds) - 1
        self.steps_per_pass = -(-self.rows_per_pass // self.rows_per_step)
        self.fill = int(self.pieces.sizes.sum()) / (self.rows_per_pass * self.pieces.room)
        self.most_texts = int(np.diff(self._bounds).max())
        self._passes: dict[int, _Pass] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": {}}

    def locate(self, step: int) -> tuple[int, int]:
        """The pass of an optimizer step, and the step's number within it."""
        return divmod(step, self.steps_per_pass)

    def rows(self, step: int) -> list[np.ndarray]:
        """The rows of an optimizer step, each the numbers of its pieces."""
        made, positions = self._positions(step)
        return [made.row(position) for position in positions]

    def count(self, step: int) -> Any:
        """What the pieces count as scored, over all rows of an optimizer step.

        Returns:
            an int for records of tokens; a list where pieces count several things.
        """
        number, within = self.locate(step)
        return self._pass(number).step_counts[within].tolist()

    def micro_batch(self, number: int, rank: int) -> Any:
        """A rank's batch.

        Args:
            number: of the micro-batch, step * accumulate + j, from the start of the run.
            rank: in 0..world-1.

        Returns:
            what the store's pieces make of the rows, for records of tokens a TokenBatch. The rows
            of a step that has fewer than G are dealt as evenly as can be; a rank that gets none
            has a batch of one token that is not scored.
        """
        step, part = divmod(number, self.accumulate)
        made, positions = self._positions(step)
        each, more = divmod(len(positions), self.world * self.accumulate)
        slot = part * self.world + rank
        first = slot * each + min(slot, more)
        rows = [made.row(position) for position in positions[first : first + each + (slot < more)]]
        return self.pieces.batch(rows, self.count(step), packed=self.packing)

    def _positions(self, step: int) -> tuple[_Pass, range]:
        """The pass of a step, and where in the pass's order of rows the step's are."""
        number, within = self.locate(step)
        first = within * self.rows_per_step
        last = min(first + self.rows_per_step, self.rows_per_pass)
        return self._pass(number), range(first, last)

    def _pass(self, number: int) -> _Pass:
        if number not in self._passes:
            self._passes = dict(list(self._passes.items())[-1:])  # two at most
            self._passes[number] = self._make_pass(number)
        return self._passes[number]

    def _make_pass(self, number: int) -> _Pass:
        if self.shuffle:
            draw = np.random.default_rng([self.seed, number])
            items = draw.permutation(len(self._order))
            if self.packing:
                items = items[np.argsort(-self.pieces.sizes[items], kind="stable")]
            items = items[self._order]
            row_order = draw.permutation(self.rows_per_pass)
        else:
            items, row_order = self._order, np.arange(self.rows_per_pass)
        row_counts = np.add.reduceat(self.pieces.scored[items], self._bounds[:-1])[row_order]
        firsts = np.arange(0, self.rows_per_pass, self.rows_per_step)
        return _Pass(items, self._bounds, row_order, np.add.reduceat(row_counts, firsts))
