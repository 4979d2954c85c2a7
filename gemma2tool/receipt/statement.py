"""A receipt as an in-toto statement, for programs that sign and check attestations.

Source: in-toto attestation framework, Statement v1. The subjects are the output's files, and the output itself by the
digest that does not depend on its format.
"""

from __future__ import annotations

import json
from typing import Any

from gemma2tool.receipt.document import Receipt

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://github.com/gemma2tool/gemma2tool/receipt/v1"


def statement(receipt: Receipt) -> dict[str, Any]:
    """The statement; its predicate is the receipt."""
    output = receipt.content["output"]
    subjects = [{"name": file.name, "digest": {"sha256": file.sha256}} for file in receipt.files]
    model = {"name": f"{output['name']} (values)", "digest": {receipt.hashes["algorithm"]: receipt.hashes["model"]}}
    return {
        "_type": STATEMENT_TYPE,
        "subject": [*subjects, model],
        "predicateType": PREDICATE_TYPE,
        "predicate": receipt.content,
    }


def encode_statement(receipt: Receipt) -> str:
    """The statement as the text of its file: ASCII, equal for equal receipts."""
    return json.dumps(statement(receipt), indent=1, allow_nan=False) + "\n"
