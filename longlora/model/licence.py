"""Whether the licences of base, texts and pairs allow commercial use: a fact each, for the gate and the model card.

Licences come as the words of whoever wrote params.yaml. Words that forbid come in too many forms to be listed, so what is
listed is the licences that allow it, and any other is refused until somebody has read it and says so (`licence.checked`). This
is a guard against an oversight (LongAlpaca's data, and much else that long contexts are trained on, is non-commercial), and no
lawyer.
"""

import re
from typing import Annotated, Any

from pydantic import Field, field_validator

from longlora.section import Section

HUB = {
    name
    for line in (
        "cc0-1.0 unlicense wtfpl cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0",
        "cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0",
        "apache-2.0 mit isc zlib bsl-1.0 ncsa postgresql afl-3.0 artistic-2.0 ms-pl bsd-2-clause bsd-3-clause",
        "mpl-2.0 epl-2.0 eupl-1.2 gpl-2.0 gpl-3.0 lgpl-2.1 lgpl-3.0 agpl-3.0",
        "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma",
        "openrail bigscience-openrail-m bigscience-bloom-rail-1.0 creativeml-openrail-m bigcode-openrail-m",
    )
    for name in line.split()
}
"""Licences that commercial use is allowed under (some to companies below a size or for uses that are not harmful), as the model hub
calls them, in lower case."""

ALLOWING = HUB | {
    name
    for line in (
        "public-domain pddl-1.0 0bsd cc-by-1.0 cc-by-sa-1.0 cc-by-sa-2.0 cc-by-sa-2.5 odc-by-1.0 odbl-1.0 mit-0",
        "gpl-2.0-only gpl-2.0-or-later gpl-3.0-only gpl-3.0-or-later",
        "lgpl-2.1-only lgpl-2.1-or-later lgpl-3.0-only lgpl-3.0-or-later",
        "agpl-3.0-only agpl-3.0-or-later gfdl-1.3-only gfdl-1.3-or-later",
    )
    for name in line.split()
}
"""And those that the hub does not know by their SPDX ids."""

FORBIDDING = {f"cc-by-nc-{terms}" for terms in ("2.0", "3.0", "4.0", "nd-3.0", "nd-4.0", "sa-2.0", "sa-3.0", "sa-4.0")}
"""Licences that forbid commercial use, as the model hub calls them: for the model card."""
NON_COMMERCIAL = re.compile(r"cc-by-nc(-sa|-nd)?-\d\.\d(-[a-z]+)?")
"""All of that kind, in any version and of any country: not to be checked away."""


class Licence(Section):
    checked: list[Annotated[str, Field(min_length=1)]]
    """Licences, word for word as they stand elsewhere in params.yaml, that you have read and that allow commercial use, beside
    those that are known to."""

    @field_validator("checked")
    @classmethod
    def may_allow(cls, checked: list[str]) -> list[str]:
        """The card of a model that was trained on such data would say nothing of it."""
        for stated in checked:
            if NON_COMMERCIAL.fullmatch(identifier(stated)):
                raise ValueError(
                    f"'{stated}' forbids commercial use; a permission of your own is another licence: name it in other words"
                )
        return checked


def measure(
    base: dict[str, Any], *, texts: dict[str, Any], pairs: list[dict[str, Any]], licence: Licence
) -> dict[str, Any]:
    """The facts about base, texts and all sources of `pairs`, from their provenance: 1 where commercial use is known to be
    allowed, else 0."""
    return {
        "licence": {"base": fact(base, licence), "texts": fact(texts, licence), "pairs": of_all(pairs, licence=licence)}
    }


def of_all(sources: list[dict[str, Any]], *, licence: Licence) -> dict[str, Any]:
    """One fact of several: it is as bad as the worst, whose reasons it has."""
    facts = [fact(each, licence) for each in sources]
    worst = min((each["value"] for each in facts), default=1)
    reasons = [each["reason"] for each in facts if each["value"] == worst]
    return {"value": worst, "reason": "; ".join(reasons) or "there are no pairs of another source than the texts"}


def fact(provenance: dict[str, Any], licence: Licence) -> dict[str, Any]:
    stated, name = str(provenance["license"]).strip(), provenance["name"]
    if allows(stated, licence):
        return {"value": 1, "reason": f"{name} is under '{stated}'"}
    under = f"is under '{stated}', which is" if stated else "has no licence stated, and is"
    return {
        "value": 0,
        "reason": f"{name} {under} not known to allow commercial use; if it does, name it in licence.checked",
    }


def allows(stated: str, licence: Licence) -> bool:
    """Whether it is a known one, or was checked."""
    return stated in licence.checked or identifier(stated) in ALLOWING


def identifier(stated: str) -> str:
    """As SPDX and the hub write it: `CC BY 4.0` is cc-by-4.0."""
    return re.sub(r"[\s_-]+", "-", stated.strip().lower())
