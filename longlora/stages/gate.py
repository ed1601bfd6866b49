"""Judge the scores by the rules. A refusal is a result, not a failure of the stage: promotion reads it."""

import json
from pathlib import Path

from longlora.report.gate import Gate, judge, read
from longlora.section import run


def stage(scores: Path, verdict: Path, gate: Gate) -> None:
    result = judge(gate, scores=read(scores))
    verdict.parent.mkdir(parents=True, exist_ok=True)
    verdict.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n")
    for rule in result["rules"]:
        print(f"{'passed ' if rule['passed'] else 'REFUSED'}  {rule['name']}: {rule['reason']}")


if __name__ == "__main__":
    run(stage)
