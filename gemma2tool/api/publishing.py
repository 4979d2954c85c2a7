"""Releases and their upload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma2tool.pipeline.events import ProgressCallback, as_progress

if TYPE_CHECKING:
    from gemma2tool.publish.estimate import ReleasePlan
    from gemma2tool.publish.request import PublishRequest, ReleaseRequest, ReleaseResult


def release(request: ReleaseRequest, *, progress: ProgressCallback | None = None) -> ReleaseResult:
    """Write the missing files of a release: quantized files as publishers name them, verified and measured, with
    receipts, checksums and a model card (docs/publish.md). Nothing is uploaded.

    An output that fails its verification is listed in ``result.failed`` and is not written to the folder.
    """
    from gemma2tool.publish import release

    return release.release(request, as_progress(progress))


def plan_release(request: ReleaseRequest | PublishRequest) -> ReleasePlan:
    """Return what a release would write, read and need, without writing anything. For a ``PublishRequest``, the hub is
    asked which files it already has.
    """
    from gemma2tool.publish.estimate import estimate
    from gemma2tool.publish.release import planned_release
    from gemma2tool.publish.request import ReleaseRequest

    if isinstance(request, ReleaseRequest):
        with planned_release(request) as opened:
            return estimate(opened, opened.missing())
    from gemma2tool.publish.upload import plan_publish

    return plan_publish(request)


def publish(request: PublishRequest, *, progress: ProgressCallback | None = None) -> ReleaseResult:
    """Write the missing files of a release, and upload what is finished and verified to a repository on the hub."""
    from gemma2tool.publish import upload

    return upload.publish(request, as_progress(progress))
