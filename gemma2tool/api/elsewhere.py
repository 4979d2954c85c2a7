"""What a conversion starts without, and the modules that define it: loaded when it is first used."""

from __future__ import annotations

ELSEWHERE = {
    "AdapterRequest": "pipeline.adapters", "AdapterResult": "pipeline.adapters",
    "convert_adapter": "api.adapters", "is_adapter_conversion": "api.adapters",
    "BudgetChoice": "pipeline.budget.choice", "BudgetOutcome": "pipeline.budget.choice",
    "CandidateResult": "pipeline.candidates", "Cause": "verify.diagnosis.cause",
    "CheckFinding": "pipeline.checks.finding", "CheckRequest": "pipeline.checks.run",
    "CheckResult": "pipeline.checks.finding", "Diagnosis": "pipeline.doctor", "Difference": "verify.difference",
    "Estimate": "pipeline.quality.result", "Fact": "pipeline.doctor", "Failure": "verify.result",
    "Finding": "verify.finding", "FormatEntry": "formats.catalog", "GateResult": "verify.finding",
    "Generation": "pipeline.generation", "GenerationOptions": "pipeline.generation", "Hashes": "model.digest",
    "HessiansOptions": "pipeline.hessians.run", "HessiansResult": "pipeline.hessians.run",
    "ImatrixOptions": "pipeline.importance", "ImatrixResult": "pipeline.importance",
    "Inspection": "pipeline.inspection", "Leftover": "pipeline.leftovers", "Needs": "pipeline.needs.needs",
    "QualityFiles": "pipeline.quality.files",
    "QualityPoint": "pipeline.quality.result", "QualityRequest": "pipeline.quality.request",
    "QualityResult": "pipeline.quality.result", "ScanFinding": "api.trust", "ScanResult": "api.trust",
    "SensitivityOptions": "pipeline.sensitivity.collect", "SensitivityResult": "pipeline.sensitivity.run",
    "SensitivityTable": "pipeline.sensitivity.table", "Verification": "verify.result", "doctor": "pipeline.doctor",
    "RecipeRun": "pipeline.recipe.run", "scan": "api.trust", "SignResult": "api.trust", "sign": "api.trust",
    "MergeResult": "pipeline.sharding.merge", "Shard": "pipeline.sharding.shard",
    "parse_shard": "pipeline.sharding.shard",
    "rank_of_torchrun": "pipeline.ranks.together", "shard_from_environment": "pipeline.sharding.shard",
    "CardOptions": "publish.request", "PublishRequest": "publish.request",
    "ReleasePlan": "publish.estimate", "ReleaseRequest": "publish.request",
    "ReleaseResult": "publish.request", "candidates": "api.verifying", "diff": "api.verifying",
    "verify": "api.verifying", "verify_request": "api.verifying", "verify_several": "api.verifying",
}  # fmt: skip
