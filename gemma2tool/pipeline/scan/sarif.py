"""A scan as SARIF 2.1.0, which code scanning reads (OASIS, sarif-schema-2.1.0.json)."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from gemma2tool.errors import escaped
from gemma2tool.pipeline.scan.catalog import CATALOG, ScanEntry
from gemma2tool.pipeline.scan.finding import ScanFinding, ScanResult
from gemma2tool.version import __version__

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_HOME = "https://github.com/gemma2tool/gemma2tool"
_LEVELS = {"danger": "error", "odd": "warning", "note": "note"}
_SCORES = {"danger": "9.0", "odd": "5.0", "note": "1.0"}
"""``security-severity``, by which GitHub ranks results."""


def sarif(result: ScanResult, base: str = "") -> str:
    """The document. ``base``: where the scanned folder is below the root of the workspace, for the places of files."""
    rules = list(CATALOG)
    content = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "gemma2tool",
                        "informationUri": _HOME,
                        "version": __version__,
                        "rules": [_rule(CATALOG[id]) for id in rules],
                    }
                },
                "originalUriBaseIds": {"SRCROOT": {"description": {"text": "The root of the workspace."}}},
                "columnKind": "unicodeCodePoints",
                "invocations": [
                    {
                        "executionSuccessful": True,
                        "toolExecutionNotifications": [
                            {"level": "note", "message": {"text": escaped(f"{name} was not looked at: {reason}")}}
                            for name, reason in result.skipped.items()
                        ],
                    }
                ],
                "results": [_result(finding, rules.index(finding.id), base) for finding in result.findings],
            }
        ],
    }
    return json.dumps(content, indent=2) + "\n"


def _rule(entry: ScanEntry) -> dict[str, Any]:
    return {
        "id": entry.id,
        "shortDescription": {"text": entry.meaning},
        "fullDescription": {"text": f"{entry.meaning}: {entry.gain}" if entry.gain else entry.meaning},
        "help": {"text": entry.remedy},
        "helpUri": f"{_HOME}/blob/main/docs/scan.md",
        "defaultConfiguration": {"level": _LEVELS[entry.severity]},
        "properties": {"security-severity": _SCORES[entry.severity], "tags": ["security"]},
    }


def _result(finding: ScanFinding, index: int, base: str) -> dict[str, Any]:
    gain = f". An attacker gains: {finding.gain}" if finding.gain else ""
    location: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": _uri(base, finding.file), "uriBaseId": "SRCROOT"},
            "region": {"startLine": finding.line or 1},
        }
    }
    if finding.where:
        location["logicalLocations"] = [{"fullyQualifiedName": escaped(finding.where)}]
    return {
        "ruleId": finding.id,
        "ruleIndex": index,
        "level": _LEVELS[finding.severity],
        "message": {"text": escaped(f"{finding.message}{gain}. {finding.remedy}")},
        "locations": [location],
        "partialFingerprints": {"gemma2tool/1": f"{finding.id}:{escaped(finding.file)}:{escaped(finding.where)}"},
    }


def _uri(base: str, file: str) -> str:
    """Percent-encoded as RFC 3986 says."""
    path = os.fsencode(f"{base}/{file}" if base else file)
    return re.sub(rb"[^A-Za-z0-9._~/-]", lambda match: b"%%%02X" % match[0][0], path).decode("ascii")
