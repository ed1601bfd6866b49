"""Judge the scores by the rules. A refusal is a result, not a failure of the stage: promotion reads it."""

from pathlib import Path

import yaml

from longlora.report.gate import Gate, judge
from longlora.report.scores import read
from longlora.report.written import refuse_others, written
from longlora.section import read_params, run, write_json


def stage(params: Path, scores: Path, verdict: Path, gate: Gate) -> None:
    # DVC takes no dvc.yaml as a dependency, so it is not among the paths.
    pipeline, sections = yaml.safe_load(params.with_name("dvc.yaml").read_text()), read_params(params)
    refuse_others(scores, files=written(pipeline, params=sections))
    result = judge(gate.under(sections["position"]["method"]), scores=read(scores))
    write_json(result, verdict)
    for rule in result["rules"]:
        print(f"{'passed   ' if rule['passed'] else 'REFUSED  '}  {rule['name']}: {rule['reason']}")
    for rule in result["not_asked"]:
        print(f"not asked  {rule['name']}: {rule['why']}")


if __name__ == "__main__":
    run(stage)
