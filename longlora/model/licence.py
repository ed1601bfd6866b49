"""Whether the licences of the base and of the texts allow commercial use: a fact each, for the gate and the model card.

Licences come as the words of whoever wrote params.yaml, so words are what is looked at. This is a guard against an oversight
(LongAlpaca's data, and much else that long contexts are trained on, is non-commercial), and no lawyer.
"""

import re
from typing import Any

FORBIDDEN = re.compile(
    r"\bnc\b|non-?\s?commercial|research[- ](only|use|purposes?)|academic (use|purposes?)|not for commercial",
    re.IGNORECASE,
)
"""Words of a licence that keeps commercial use out: the NC of Creative Commons, and what else is usual."""
SILENT = ("", "unknown", "other", "none", "null", "unlicensed", "proprietary", "n/a")
"""Words that name no licence."""


def measure(base: dict[str, Any], *, texts: dict[str, Any]) -> dict[str, Any]:
    """The facts about both, from their provenance: 1 where commercial use is not forbidden, 0 where it is or nothing is said."""
    return {"licence": {kind: fact(given) for kind, given in (("base", base), ("texts", texts))}}


def fact(provenance: dict[str, Any]) -> dict[str, Any]:
    licence = str(provenance.get("license", "")).strip()
    name = provenance.get("name", "?")
    if licence.lower() in SILENT:
        return {"value": 0, "reason": f"no licence is stated for {name}: say it in params.yaml"}
    if FORBIDDEN.search(licence):
        return {"value": 0, "reason": f"{name} is under '{licence}', which forbids commercial use"}
    return {"value": 1, "reason": f"{name} is under '{licence}'"}
