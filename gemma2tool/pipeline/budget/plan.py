"""From a budget to the options of an output: the table, the exact size of every option, the solution."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from gemma2tool.errors import UsageError
from gemma2tool.formats.options import WriteOptions
from gemma2tool.formats.options_budget import Budget
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.names import EMBEDDING
from gemma2tool.model.progress import Progress
from gemma2tool.model.tied_head import with_tied_head
from gemma2tool.pipeline.budget.choice import BudgetChoice, BudgetOutcome
from gemma2tool.pipeline.budget.solve import Group, Solution, near_optimum, solve
from gemma2tool.pipeline.budget.targets import Target, target_for
from gemma2tool.pipeline.sensitivity.candidates import check_types, fitting, fitting_head, usable
from gemma2tool.pipeline.sensitivity.predict import Predictor
from gemma2tool.pipeline.sensitivity.table import SensitivityTable

logger = logging.getLogger("gemma2tool")

MLX_TYPES = ("mlx-3", "mlx-4", "mlx-5", "mlx-6", "mlx-8")
"""The candidates of an MLX folder by default."""


@dataclass(frozen=True)
class PlannedBudget:
    """A solved budget: what it chose, the options that write it, the table that it is from, and the problem that was
    solved.
    """

    choice: BudgetChoice
    options: WriteOptions
    table: SensitivityTable
    problem: Problem = field(repr=False)

    def outcome(self, source: Checkpoint, candidate: Checkpoint, *, threads: int | None = None) -> BudgetOutcome:
        """The finished file beside its prediction."""
        from gemma2tool.pipeline.sensitivity.measured import window_divergence
        from gemma2tool.verify.compare.interval import bootstrap_interval

        parts = [window_divergence(source, candidate, np.array(ids), threads=threads) for ids in self.table.windows]
        kl = np.concatenate(parts)
        length = np.repeat([float(text.length) for text in self.table.texts], [len(part) for part in parts])
        mean = float((kl * length).sum() / length.sum())
        return BudgetOutcome(self.choice, mean, bootstrap_interval(kl, length))


def plan_budget(
    source: Checkpoint, table: SensitivityTable, budget: Budget, options: WriteOptions, format_name: str = "gguf"
) -> PlannedBudget:
    """Solve ``budget`` for the matrices of ``source`` in a format.

    Raises ``UsageError`` for candidates that the table or the format does not have, and for a target that no choice
    meets.
    """
    whole = with_tied_head(source)
    target = target_for(format_name, whole, options)
    problem = Problem(whole, table, budget, options, target)
    choice = problem.choose()
    options = target.options(choice.types)
    calibration = options.calibration
    if calibration.hessian == "model":
        logger.warning("the table predicts codes chosen with --hessian layer: model gives about a quarter less KL")
    elif calibration.is_asked and format_name == "gguf":
        options = replace(options, calibration=replace(calibration, hessian="layer"))
    return PlannedBudget(choice, options, table, problem)


def budget_table(
    source: Checkpoint,
    budget: Budget,
    options: WriteOptions,
    *,
    format_name: str = "gguf",
    threads: int,
    progress: Progress | None = None,
) -> SensitivityTable:
    """The table that a budget names, or one collected from the calibration text for a format.

    Raises ``InputRefused`` for a table of another model.
    """
    if budget.sensitivity is None:
        from gemma2tool.pipeline.sensitivity.collect import SensitivityOptions
        from gemma2tool.pipeline.sensitivity.run import collect_table

        calibration = options.calibration
        assert calibration.text is not None
        how = SensitivityOptions(
            types=budget.candidates or (MLX_TYPES if format_name == "mlx" else ()),
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
class Problem:
    """A budget with its numbers: the types that each matrix may have, what they take and what they cost."""

    source: Checkpoint
    table: SensitivityTable
    budget: Budget
    options: WriteOptions
    target: Target

    @cached_property
    def predictor(self) -> Predictor:
        return Predictor(self.table)

    @cached_property
    def candidates(self) -> tuple[str, ...]:
        """The types to choose from, smallest first."""
        rounding = self.options.rounding
        known = [type for type in usable(self.table.types, rounding) if self.target.takes(type)]
        types = check_types(self.budget.candidates or known, rounding)
        foreign = [type for type in types if not self.target.takes(type)]
        if foreign or not types:
            what = f"{foreign[0]} is not a type of this format" if foreign else "the table has no type of this format"
            raise UsageError("budget.candidates", what, hint="collect a table with --candidates of the format's types")
        self.target.check(types)
        return types

    @cached_property
    def allowed(self) -> Mapping[str, tuple[str, ...]]:
        """The types of each matrix, smallest first, and its float type if it may keep it."""
        result = {}
        for name in self._matrices():
            known = self.table.entries.get(name, {})
            columns, is_head = self.source.tensors[name].row_size, name == EMBEDDING
            fits = (
                fitting_head(self.candidates, columns, self.table.rounding)
                if is_head
                else fitting(self.candidates, columns)
            )
            missing = [type for type in fits if type not in known]
            if not fits:
                continue  # its rows divide into no block, or the format does not quantize it: it keeps a float type
            if missing:
                raise UsageError(
                    "budget.not-in-table",
                    f"the sensitivity table does not have {name} in {missing[0]}",
                    hint=f"collect it with --candidates {','.join(self.candidates)}"
                    + (f", or choose from {', '.join(known)}" if known else ""),
                )
            plain = self.target.unquantized(name)
            result[name] = fits if plain is None else (*fits, plain)
        return result

    def _matrices(self) -> list[str]:
        specs = self.source.specs.values()
        return [spec.name for spec in specs if spec.quantizable and spec.name in self.source.tensors]

    def _cost(self, name: str, type: str) -> float:
        return 0.0 if type == self.target.unquantized(name) else self.predictor.costs[name][type]

    @cached_property
    def units(self) -> list[tuple[str, ...]]:
        """The matrices that must have one type; their options are those of the first."""
        return self.target.units(list(self.allowed))

    @cached_property
    def _rest(self) -> tuple[int, int]:
        """Bytes of the output, and of its tensors' data, besides the matrices."""
        return self.target.rest(list(self.allowed), self.candidates)

    def _summed(self, values: Mapping[tuple[str, str], float]) -> list[list[float]]:
        """By unit and option."""
        return [[sum(values[name, type] for name in unit) for type in self.allowed[unit[0]]] for unit in self.units]

    @cached_property
    def sizes(self) -> Mapping[tuple[str, str], int]:
        """Bytes of each matrix in each type it may have."""
        pairs = [(name, type) for name, types in self.allowed.items() for type in types]
        return {pair: self.target.nbytes(*pair) for pair in pairs}

    @cached_property
    def _costs(self) -> list[list[float]]:
        return self._summed({pair: self._cost(*pair) for pair in self.sizes})

    @cached_property
    def _placed(self) -> list[list[float]]:
        return self._summed({pair: self.target.placed(size) for pair, size in self.sizes.items()})

    def curve(self, points: int) -> list[tuple[float, float]]:
        """(bytes of the output, predicted KL) of choices close to the best ones of ``points`` sizes, smallest first."""
        groups = _groups(self._costs, self._placed)
        least, most = (sum(pick(group.weight) for group in groups) for pick in (np.min, np.max))
        curve = {}
        for limit in np.linspace(least, most, points):
            chosen = list(zip(groups, near_optimum(groups, float(limit)), strict=True))
            nbytes = self._rest[0] + sum(float(group.weight[option]) for group, option in chosen)
            curve[nbytes] = self.predictor.total(sum(float(group.objective[option]) for group, option in chosen))
        return sorted(curve.items())

    def choose(self) -> BudgetChoice:
        costs, sizes, placed = self._costs, self.sizes, self._placed
        nbytes = self._summed(sizes)
        budget, parameters, limit = self.budget, self.source.parameters, self.budget.target_size
        if budget.target_kl is not None:
            self._check_kl(sum(map(min, costs)), budget.target_kl)
            solution = solve(_groups(placed, costs), self.predictor.sum_for(budget.target_kl))
            target = f"KL {budget.target_kl:g}"
        elif budget.target_bpw is not None:
            allowed = int(budget.target_bpw * parameters / 8) - self._rest[1]
            least = 8 * (sum(map(min, nbytes)) + self._rest[1]) / parameters
            self._check_size(sum(map(min, nbytes)) <= allowed, f"{least:.3f} bits per weight")
            solution, target = solve(_groups(costs, nbytes), allowed), f"{budget.target_bpw:g} bits per weight"
        else:
            assert limit is not None
            solution, target = self._of_size(costs, placed, limit), f"{limit:,} bytes"
        chosen = self._types(solution)
        data = sum(sizes[name, type] for name, type in chosen.items()) + self._rest[1]
        return BudgetChoice(
            target,
            chosen,
            self.target.options(chosen).type or "",
            self.target.file_bytes(chosen),
            limit,
            8 * data / parameters,
            self.predictor.total(sum(self._cost(name, type) for name, type in chosen.items())),
            solution.gap,
            solution.proven,
            self.table.rounding,
        )

    def _of_size(self, costs: Sequence[Sequence[float]], placed: Sequence[Sequence[float]], limit: int) -> Solution:
        """The best choice whose output takes at most ``limit`` bytes."""
        left = limit - self._rest[0]
        while True:  # each round leaves less, until a choice fits or none can
            least = sum(map(min, placed))
            self._check_size(least <= left, f"{int(least) + limit - left:,} bytes")
            solution = solve(_groups(costs, placed), left)
            over = self.target.file_bytes(self._types(solution)) - limit
            if over <= 0:
                return solution
            left -= over

    def _types(self, solution: Solution) -> dict[str, str]:
        chosen = {
            name: self.allowed[name][at] for unit, at in zip(self.units, solution.choices, strict=True) for name in unit
        }
        return {name: chosen[name] for name in self.allowed}

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
