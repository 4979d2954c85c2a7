"""From a budget to the options of an output: the table, the exact size of every option, the solution."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from gemma2tool.errors import UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.gguf.table import TABLE
from gemma2tool.formats.mapping.transforms import entries
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.options_budget import PLACEHOLDER, Budget
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.names import EMBEDDING
from gemma2tool.model.progress import Progress
from gemma2tool.model.tied_head import with_tied_head
from gemma2tool.pipeline.budget.choice import BudgetChoice, BudgetOutcome, file_type_of
from gemma2tool.pipeline.budget.solve import Group, solve
from gemma2tool.pipeline.sensitivity.candidates import check_types, fitting, fitting_head, usable
from gemma2tool.pipeline.sensitivity.predict import Predictor
from gemma2tool.pipeline.sensitivity.table import SensitivityTable
from gemma2tool.quantizers.gguf_types import row_bytes

logger = logging.getLogger("gemma2tool")

ALIGNMENT = 32
"""GGUF's, of every tensor."""


@dataclass(frozen=True)
class PlannedBudget:
    """A solved budget: what it chose, the options that write it, and the table that it is from."""

    choice: BudgetChoice
    options: WriteOptions
    table: SensitivityTable

    def outcome(self, source: Checkpoint, candidate: Checkpoint, *, threads: int | None = None) -> BudgetOutcome:
        """The finished file beside its prediction."""
        from gemma2tool.pipeline.sensitivity.measured import window_divergence
        from gemma2tool.verify.compare.interval import bootstrap_interval

        parts = [window_divergence(source, candidate, np.array(ids), threads=threads) for ids in self.table.windows]
        kl = np.concatenate(parts)
        length = np.repeat([float(text.length) for text in self.table.texts], [len(part) for part in parts])
        mean = float((kl * length).sum() / length.sum())
        return BudgetOutcome(self.choice, mean, bootstrap_interval(kl, length))


def plan_budget(source: Checkpoint, table: SensitivityTable, budget: Budget, options: WriteOptions) -> PlannedBudget:
    """Solve ``budget`` for the matrices of ``source``.

    Raises ``UsageError`` for candidates that the table does not have, and for a target that no choice meets.
    """
    problem = _Problem(with_tied_head(source), table, budget, options)
    choice = problem.choose()
    names = {entry.canonical[0]: entry.disk for entry in entries(TABLE, source.config)}
    patterns = tuple((f"^{re.escape(names[name])}$", type) for name, type in choice.types.items() if name != EMBEDDING)
    gguf = replace(options.gguf, tensor_types=patterns, token_embedding_type=choice.types[EMBEDDING])
    calibration = options.calibration
    if calibration.hessian == "model":
        logger.warning("the table predicts codes chosen with --hessian layer: model gives about a quarter less KL")
    elif calibration.is_asked:
        calibration = replace(calibration, hessian="layer")
    return PlannedBudget(choice, replace(options, type=choice.file_type, gguf=gguf, calibration=calibration), table)


def budget_table(
    source: Checkpoint, budget: Budget, options: WriteOptions, *, threads: int, progress: Progress | None = None
) -> SensitivityTable:
    """The table that a budget names, or one collected from the calibration text.

    Raises ``InputRefused`` for a table of another model.
    """
    if budget.sensitivity is None:
        from gemma2tool.pipeline.sensitivity.collect import SensitivityOptions
        from gemma2tool.pipeline.sensitivity.run import collect_table

        calibration = options.calibration
        assert calibration.text is not None
        how = SensitivityOptions(
            types=budget.candidates or (),
            samples=calibration.samples,
            length=calibration.length,
            hessian_block=calibration.hessian_block,
            threads=threads,
        )
        if calibration.damping is not None:
            how = replace(how, damping=calibration.damping)
        return collect_table(source, calibration.text, how, progress=progress)
    from gemma2tool.pipeline.sensitivity.run import read_table_of

    table = read_table_of(budget.sensitivity, source, threads)
    if table.rounding != options.rounding:
        logger.warning(
            "%s: is for codes chosen by %s, and these are chosen by %s: the predicted KL is not this file's",
            budget.sensitivity,
            table.rounding,
            options.rounding,
        )
    return table


@dataclass(frozen=True)
class _Problem:
    """A budget with its numbers."""

    source: Checkpoint
    table: SensitivityTable
    budget: Budget
    options: WriteOptions

    @cached_property
    def predictor(self) -> Predictor:
        return Predictor(self.table)

    @cached_property
    def allowed(self) -> Mapping[str, tuple[str, ...]]:
        """The candidates of each matrix, smallest first."""
        rounding = self.options.rounding
        wanted = check_types(self.budget.candidates or usable(self.table.types, rounding), rounding)
        result = {}
        for name in self._matrices():
            known = self.table.entries.get(name, {})
            columns, is_head = self.source.tensors[name].row_size, name == EMBEDDING
            fits = fitting_head(wanted, columns, self.table.rounding) if is_head else fitting(wanted, columns)
            missing = [type for type in fits if type not in known]
            if not fits:
                continue  # its rows divide into no block: it keeps a float type
            if missing:
                raise UsageError(
                    "budget.not-in-table",
                    f"the sensitivity table does not have {name} in {missing[0]}",
                    hint=f"collect it with --candidates {','.join(wanted)}"
                    + (f", or choose from {', '.join(known)}" if known else ""),
                )
            result[name] = fits
        return result

    def _matrices(self) -> list[str]:
        specs = self.source.specs.values()
        return [spec.name for spec in specs if spec.quantizable and spec.name in self.source.tensors]

    def _nbytes(self, name: str, type: str) -> int:
        tensor = self.source.tensors[name]
        return tensor.rows * row_bytes(type.upper(), tensor.row_size)

    @cached_property
    def _rest(self) -> tuple[int, int]:
        """Bytes of the file, and of its tensors' data, besides the matrices."""
        gguf = replace(self.options.gguf, pure=True, token_embedding_type=PLACEHOLDER)
        output = registry.by_name("gguf").layout(self.source, replace(self.options, type=PLACEHOLDER, gguf=gguf))
        file, data = output.nbytes, sum(place.nbytes for item in output.tensors for place in item.parts.values())
        placed = {item.canonical[0]: sum(p.nbytes for p in item.parts.values()) for item in output.tensors}
        own = [placed[name] for name in self.allowed]
        return file - sum(map(_padded, own)), data - sum(own)

    def choose(self) -> BudgetChoice:
        names, budget = list(self.allowed), self.budget
        costs = [[self.predictor.costs[name][type] for type in self.allowed[name]] for name in names]
        nbytes = [[self._nbytes(name, type) for type in self.allowed[name]] for name in names]
        padded = [[_padded(size) for size in sizes] for sizes in nbytes]
        parameters = self.source.parameters
        limit: int | None = None
        if budget.target_kl is not None:
            self._check_kl(sum(map(min, costs)), budget.target_kl)
            solution = solve(_groups(padded, costs), self.predictor.sum_for(budget.target_kl))
            target = f"KL {budget.target_kl:g}"
        elif budget.target_bpw is not None:
            allowed = int(budget.target_bpw * parameters / 8) - self._rest[1]
            least = 8 * (sum(map(min, nbytes)) + self._rest[1]) / parameters
            self._check_size(sum(map(min, nbytes)) <= allowed, f"{least:.3f} bits per weight")
            solution, target = solve(_groups(costs, nbytes), allowed), f"{budget.target_bpw:g} bits per weight"
        else:
            limit = budget.target_size
            assert limit is not None
            least_size = sum(map(min, padded)) + self._rest[0]
            self._check_size(least_size <= limit, f"{least_size:,} bytes")
            solution, target = solve(_groups(costs, padded), limit - self._rest[0]), f"{limit:,} bytes"
        chosen = {name: self.allowed[name][at] for name, at in zip(names, solution.choices, strict=True)}
        data = sum(self._nbytes(name, type) for name, type in chosen.items()) + self._rest[1]
        sizes = {name: self.source.tensors[name].size for name in names}
        return BudgetChoice(
            target,
            chosen,
            file_type_of(chosen, sizes),
            sum(_padded(self._nbytes(name, type)) for name, type in chosen.items()) + self._rest[0],
            limit,
            8 * data / parameters,
            self.predictor.total(sum(self.predictor.costs[name][type] for name, type in chosen.items())),
            solution.gap,
            solution.proven,
            self.table.rounding,
        )

    def _check_size(self, is_possible: bool, least: str) -> None:
        if not is_possible:
            types = ", ".join(dict.fromkeys(type for types in self.allowed.values() for type in types[:1]))
            raise UsageError(
                "budget.impossible",
                f"no choice is that small: the least possible is {least}, with every matrix in {types}",
                hint="allow more, or add smaller --candidates",
            )

    def _check_kl(self, least: float, target: float) -> None:
        if self.predictor.total(least) > target:
            raise UsageError(
                "budget.impossible",
                f"no choice has a KL of {target:g}: the least possible is {self.predictor.total(least):.3g}",
                hint="allow more, or add larger --candidates",
            )


def _groups(objective: Sequence[Sequence[float]], weight: Sequence[Sequence[float]]) -> list[Group]:
    return [Group.of(a, b) for a, b in zip(objective, weight, strict=True)]


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
