"""One conversion or quantization from the request to the result: open, merge adapters, plan, run, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma2tool.errors import UsageError
from gemma2tool.formats import registry
from gemma2tool.formats.options import Adapter, WriteOptions
from gemma2tool.formats.other_files import MODEL_SUFFIXES
from gemma2tool.model.checkpoint import Checkpoint
from gemma2tool.model.devices import use_device
from gemma2tool.model.lazy import SharedRows
from gemma2tool.model.progress import Progress, expecting
from gemma2tool.pipeline.destinations import Destination, destinations, folder_of_several, input_files
from gemma2tool.pipeline.held_out import warn_of_chosen_text
from gemma2tool.pipeline.inputs import read_prompts
from gemma2tool.pipeline.leftovers import refuse_other_leftovers
from gemma2tool.pipeline.modelfile import check_modelfile, modelfile, write_modelfile
from gemma2tool.pipeline.needs.conversion import Verified, conversion_needs
from gemma2tool.pipeline.needs.needs import Needs
from gemma2tool.pipeline.opening import from_source, open_source
from gemma2tool.pipeline.plan import Plan, PlanSummary, make_plan
from gemma2tool.pipeline.ranks.together import joined
from gemma2tool.pipeline.remarks import plan_remarks
from gemma2tool.pipeline.requests import DEFAULT_MEMORY, Checks, ConversionRequest, OutputRequest, RunOptions
from gemma2tool.pipeline.run import ConversionResult, run
from gemma2tool.pipeline.scan.gate import refuse_dangerous
from gemma2tool.pipeline.verification import ResolvedChecks
from gemma2tool.receipt.document import receipt_path
from gemma2tool.sources.locate import locate
from gemma2tool.storage.watching import Watch, watching

if TYPE_CHECKING:
    from gemma2tool.pipeline.budget.plan import PlannedBudget
    from gemma2tool.verify.reports.markup import Markup

logger = logging.getLogger("gemma2tool")


@dataclass(frozen=True)
class Conversion:
    """A request whose source is open and whose outputs are planned."""

    request: ConversionRequest
    source: Checkpoint
    outputs: Sequence[Destination]
    plans: Sequence[Plan]
    budget: PlannedBudget | None = None

    def needs(self, checks: ResolvedChecks | None) -> Needs:
        """What carrying it out takes."""
        verified = None
        if checks is not None:
            verified = Verified(readers=checks.readers and self.request.run.readers, sample=checks.asked.sample)
            if checks.ids is not None:
                verified = replace(verified, shape=(checks.ids.shape[0], checks.ids.shape[1]))
        threads, destination = self.request.run.threads, self.plans[0].destination
        return conversion_needs(self.source, self.plans, destination, verified, threads=threads)

    def checks(self) -> ResolvedChecks | None:
        """How its outputs are verified; None: not at all."""
        return None if self.request.checks is None else _resolved(self.request.checks, self.source)

    def carry_out(self, progress: Progress | None = None) -> tuple[ConversionResult, ...]:
        """Write, verify and put in place every output; write the reports. Of several processes together, the first one
        does, and the others help it to calibrate.
        """
        if not self.request.run.together:
            return self._carried_out(progress)
        with joined() as ranks:
            sessions = [plan.session for plan in self.plans if plan.session is not None]
            for number, session in enumerate(sessions):
                session.share_with(ranks, number)
            if ranks.index == 0:
                return self._carried_out(progress, ranks.stop)
            ranks.follow(sessions)
            return ()

    def _carried_out(
        self, progress: Progress | None, written: Callable[[], None] = lambda: None
    ) -> tuple[ConversionResult, ...]:
        """``written``: called when everything is written and not yet verified."""
        request = self.request
        for plan in self.plans:
            if plan.cost is not None:
                logger.info("%s", plan.cost.sentence())
        checks = self.checks()
        needs = self.needs(checks)
        needs.check(request.run.device)
        needs.announce()
        with folder_of_several(self.outputs):
            results = run(self.plans, checks, request.run, expecting(progress, needs.bars), written)
        if request.run.modelfile:
            self._write_modelfiles(results)
        if self.budget is not None and checks is not None and results[0].written:
            results = (self._beside_prediction(self.budget, results[0]),)
        verifications = [result.verification for result in results if result.verification is not None]
        request.reports.write(verifications, self._sections(results))
        if len(results) == 1 and results[0].written:
            request.reports.write_bom(results[0].receipt, self.source, self.source.path)
        return results

    def _sections(self, results: Sequence[ConversionResult]) -> Sequence[Markup]:
        """What the page shows besides the verifications: a budget."""
        outcome = results[0].budget
        if self.budget is None or outcome is None or self.request.reports.html is None:
            return ()
        from gemma2tool.pipeline.budget.figures import budget_sections

        return budget_sections(self.budget, outcome)

    def _write_modelfiles(self, results: Sequence[ConversionResult]) -> None:
        for result in results:
            if result.written:
                text, remark = modelfile(self.source, result.destination.name)
                path = write_modelfile(text, result.destination, force=self.request.run.force)
                logger.info("%s: for 'ollama create NAME -f %s'", path, path.name)
                if remark is not None:
                    logger.warning("%s: %s", path, remark)

    def _beside_prediction(self, budget: PlannedBudget, result: ConversionResult) -> ConversionResult:
        with registry.open_checkpoint(result.destination) as candidate:
            outcome = budget.outcome(self.source, candidate, threads=self.request.run.threads)
        if not outcome.holds:
            logger.warning("the prediction does not hold: %s", outcome.sentence())
        return replace(result, budget=outcome)


@contextmanager
def open_conversion(request: ConversionRequest, progress: Progress | None = None) -> Iterator[Conversion]:
    """Check the request, open its source and plan its outputs; nothing is written yet. Warnings go to the log.

    Raises ``UsageError`` for a request that cannot be carried out, ``InputRefused`` for a source that cannot be read.
    """
    request, outputs = check_request(request)
    with ExitStack() as stack:
        stack.enter_context(use_device(request.run.device))
        source = _opened(request, stack, progress)
        if request.options.adapters:
            source, adapters = with_adapters(source, request.options.adapters, stack)
            request = replace(request, options=replace(request.options, adapters=adapters))
        refuse_dangerous(source, allow_unsafe_template=request.run.allow_unsafe_template)
        read = source if len(outputs) == 1 else shared(source)
        plans, budget = _plans(read, outputs, request), None
        for plan in plans if request.run.modelfile else ():
            check_modelfile(plan.destination, plan.output, force=request.run.force)
        written = (path for plan in plans for path in _written(plan))
        request.reports.check((*source.files, *input_files(request)), written)
        if request.budget.is_asked:  # its table may take hours: what can be refused is refused by now
            from gemma2tool.pipeline.budget.plan import budget_table, plan_budget

            options = replace(outputs[0].options, adapters=request.options.adapters)
            threads = request.run.threads
            name = outputs[0].format
            table = budget_table(source, request.budget, options, format_name=name, threads=threads, progress=progress)
            budget = plan_budget(source, table, request.budget, options, name)
            outputs = [outputs[0].with_options(budget.options)]
            plans = [replace(plan, budget=budget.choice) for plan in _plans(read, outputs, request)]
        for remark in plan_remarks(plans):
            logger.warning("%s", remark)
        if request.checks is not None:
            for output in outputs:
                warn_of_chosen_text(request.checks.files, output.options)
        yield Conversion(request, source, outputs, plans, budget)


def check_request(request: ConversionRequest) -> tuple[ConversionRequest, list[Destination]]:
    """The request as it is carried out, and its outputs; raises ``UsageError`` for what can be refused before a source
    is opened.
    """
    _check_bom(request)
    request = _split_into_folders(_with_placeholder(request))
    outputs = destinations(request)
    request.budget.check(outputs[0].options, outputs[0].format)
    return request, outputs


def convert(request: ConversionRequest, progress: Progress | None = None) -> tuple[ConversionResult, ...]:
    """Carry out a request; a result for each output, in the order of its types."""
    with open_conversion(request, progress) as conversion:
        return conversion.carry_out(progress)


def summarize(request: ConversionRequest) -> tuple[PlanSummary, ...]:
    """What a request would write; nothing is written, and no source is downloaded."""
    with open_conversion(replace(request, run=replace(request.run, keep_download=None))) as conversion:
        refuse_other_leftovers(conversion.plans, request.run)
        needs = conversion.needs(conversion.checks())
        return tuple(replace(plan.summary(), needs=needs) for plan in conversion.plans)


def save(
    checkpoint: Checkpoint,
    destination: Path,
    options: WriteOptions | None = None,
    *,
    to: str | None = None,
    force: bool = False,
    threads: int = 2,
    memory: int = DEFAULT_MEMORY,
) -> ConversionResult:
    """Write an open checkpoint, without verification, by the same plan and run as a conversion."""
    options = replace(options or WriteOptions(), name=destination.name)
    how = RunOptions(force=force, receipt=False, threads=threads, memory=memory)
    refuse_dangerous(checkpoint, allow_unsafe_template=how.allow_unsafe_template)
    plan = make_plan(checkpoint, destination, to=to, options=options, threads=threads)
    return run([plan], None, how)[0]


def _opened(request: ConversionRequest, stack: ExitStack, progress: Progress | None) -> Checkpoint:
    if isinstance(request.source, Checkpoint):
        return request.source
    place = request.destination.absolute().parent
    keep = request.run.keep_download
    return stack.enter_context(open_source(request.source, request.config, place=place, keep=keep, progress=progress))


def _plans(source: Checkpoint, outputs: Sequence[Destination], request: ConversionRequest) -> list[Plan]:
    plans = []
    for output in outputs:
        options = replace(output.options, adapters=request.options.adapters)
        plan = make_plan(source, output.path, to=output.format, options=options, threads=request.run.threads)
        plans.append(replace(plan, source=_unshared(plan.source), recipe=output.part.recipe))
    return plans


def with_adapters(
    source: Checkpoint, adapters: Sequence[Adapter], stack: ExitStack
) -> tuple[Checkpoint, tuple[Adapter, ...]]:
    """The source with adapters merged, and these with their local paths, until ``stack`` is closed."""
    from gemma2tool.formats.adapters.merging import merge
    from gemma2tool.formats.adapters.naming import READ

    local = []
    for adapter in adapters:
        located = locate(adapter.path, suffixes=MODEL_SUFFIXES, beside=READ)
        stack.callback(located.close)
        with from_source(located), watching(source.watch or Watch()):
            source = merge(source, located.path, adapter.scale)
        local.append(replace(adapter, path=located.path))
    return source, tuple(local)


def _with_placeholder(request: ConversionRequest) -> ConversionRequest:
    """A request with a budget has no types of its own: it is checked as one for any type of its format."""
    if not request.budget.is_asked:
        return request
    target = request.budget.targets[0]
    if any(part.types for part in request.parts):
        raise UsageError("budget.options", f"--type and {target} both decide", hint="leave out --type")
    if len(request.parts) > 1:
        raise UsageError("budget.options", f"{target} applies to one output, but {len(request.parts)} are requested")
    return _with_parts(request, [replace(part, types=(request.budget.placeholder(part.to),)) for part in request.parts])


def _check_bom(request: ConversionRequest) -> None:
    """A bill of materials is made from the receipt, of one output."""
    if request.reports.bom is None:
        return
    if request.checks is None or not request.run.receipt:
        raise UsageError("option.ignored", "--bom is made from the receipt, but none is written", hint="write one")
    if len(request.parts) > 1 or len(request.parts[0].types) > 1:
        hint = "write each with 'gemma2tool verify OUTPUT --bom FILE'"
        raise UsageError("option.ignored", "--bom covers one output, but several are written", hint=hint)


def _split_into_folders(request: ConversionRequest) -> ConversionRequest:
    """A split GGUF is a folder of files, named after the requested file."""
    return _with_parts(request, [_split_into_folder(part) for part in request.parts])


def _split_into_folder(part: OutputRequest) -> OutputRequest:
    if part.destination.suffix.lower() != ".gguf" or not part.options.split.is_asked:
        return part
    folder = part.destination.with_suffix("")
    logger.info("%s: a folder for the files of the split", folder)
    return replace(part, destination=folder, to="gguf")


def _with_parts(request: ConversionRequest, parts: Sequence[OutputRequest]) -> ConversionRequest:
    """The request for other outputs."""
    if request.outputs:
        return replace(request, outputs=tuple(parts))
    [part] = parts
    return replace(request, destination=part.destination, types=part.types, to=part.to, options=part.options)


def shared(source: Checkpoint) -> Checkpoint:
    """``source`` with tensors that several outputs read in one pass."""
    return replace(source, tensors={name: SharedRows(tensor) for name, tensor in source.tensors.items()}, closers=[])


def _unshared(checkpoint: Checkpoint) -> Checkpoint:
    tensors = checkpoint.tensors.items()
    return replace(
        checkpoint,
        tensors={name: tensor.source if isinstance(tensor, SharedRows) else tensor for name, tensor in tensors},
    )


def _resolved(checks: Checks, source: Checkpoint) -> ResolvedChecks:
    return ResolvedChecks(read_prompts(checks.tokens, checks.text, source), checks.gates, asked=checks)


def _written(plan: Plan) -> list[Path]:
    """The output, the files that a folder will have, and the receipt."""
    inside = () if plan.output.single_file else (*(file.name for file in plan.output.files), *plan.output.assets)
    return [plan.destination, receipt_path(plan.destination), *(plan.destination / name for name in inside)]
