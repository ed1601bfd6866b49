"""Which model may be champion, and making it so.

The gate's verdict is a file of the run; what only the registry knows is added here: the model must be better than the present
champion (tasks/comparison.py).
"""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from tasks import hooks, registry, runs, storage
from tasks.approval import Approval
from tasks.comparison import Better, comparisons_of, measured_beside, shortfall
from tasks.errors import UserError
from tasks.locks import hold
from tasks.outputs import read
from tasks.overlay import sections_of
from tasks.tags import CANDIDATE, CHAMPION, DIRTY, HEAD, KEY, OVERRIDES, RECIPE, RECORD, STAGING, VERDICT
from tasks.workspace import Project, git, person

JUDGES = ("gate", "licence")  # the sections of params.yaml that say what is asked of a model


class RefusalError(UserError):
    """The candidate does not become champion; the message has a reason per line."""


@dataclass(frozen=True)
class Candidate:
    """A run's model, registered as candidate, and what there is to say about its promotion."""

    name: str
    version: str
    key: str
    run: str
    champion: str | None
    """The version that is champion now; the candidate's own if that is it."""
    against: list[str]
    """A reason per rule that it fails."""
    favour: str


def promote(client: MlflowClient, where: Project, run: Run, *, approval: Approval | None = None) -> str:
    """Register `run`'s model as candidate, and then as champion. Returns what was done.

    Args:
        approval: what a person said, if one was asked; the rules hold in any case.

    Raises:
        RefusalError: it stays candidate.
        ValueError: the run is not finished.
    """
    with hold(where, lock_name(runs.source_and_model(where, run)[1].name)):
        found = candidate(client, where, run)
        if found.champion == found.version:
            return already(found.name, found.version)
        against, why, who = found.against, found.favour, person(where)
        unstage(client, found.name, found.version)
        if approval:
            why, who = f"{why}; asked by {who}, approved: {approval.why}", approval.who
        made = None
        if approval and not approval.approve:
            against = [f"not approved by {approval.who}: {approval.why}", *against]
            registry.decline(client, found.name, who=approval.who, why=approval.why, run=found.run)
        elif not against:
            made = registry.move(client, found.name, found.version, how="promote", who=who, why=why, run=found.run)
    if made is None:
        refuse(found, against)
    said = f"{found.name} version {found.version} is champion: {why}"
    hooks.tell("promoted", said, model=found.name, key=found.key, **asdict(made))
    return said


def propose(client: MlflowClient, where: Project, run: Run) -> str:
    """Register `run`'s model as candidate. Returns what to ask a person who is to approve its promotion, and how to look at it, as
    Markdown.

    Raises:
        RefusalError: the rules are against it, so nobody need be asked.
        ValueError: the run is not finished.
    """
    with hold(where, lock_name(runs.source_and_model(where, run)[1].name)):
        found = candidate(client, where, run)
        if not found.against:
            client.set_registered_model_alias(found.name, STAGING, found.version)
    if found.against:
        refuse(found, found.against)
    instead = f"instead of version {found.champion}" if found.champion else "the first"
    both = f"`longlora compare {found.key} champion` shows both, " if found.champion else ""
    return (
        f"Shall {found.name} version {found.version}, of run {found.key}, be champion, {instead}? For it: {found.favour}.\n"
        f"{both}`longlora ask --model staging --document FILE` tries it."
    )


def candidate(client: MlflowClient, where: Project, run: Run) -> Candidate:
    """Register `run`'s model as candidate, if it is not champion already. Call it under the registry's lock."""
    source, model = runs.source_and_model(where, run)
    champion = registry.holder(client, model.name, CHAMPION)
    version = registry.register(client, model.name, source=source, run=run, desc=model.desc, labels=model.labels)
    against, favour, comparisons = [], [judged_by(where, run)], comparisons_of(model)
    if not champion or str(champion.version) != str(version.version):
        client.set_registered_model_alias(model.name, CANDIDATE, version.version)
        against = objections(client, where, run, champion, comparisons)
    if champion:
        theirs = f"version {champion.version}'s"
        favour += [f"{better.metric} is {better.needed(theirs)}" for better in comparisons]
    return Candidate(
        name=model.name,
        version=str(version.version),
        key=run.data.tags[KEY],
        run=run.info.run_id,
        champion=str(champion.version) if champion else None,
        against=against,
        favour=", and ".join(favour),
    )


def judged_by(where: Project, run: Run) -> str:
    """That the verdict passed, whether by rules that are not those of params.yaml, and how many were not asked, which an approver
    and the history must know."""
    tags = run.data.tags
    left = len(verdict_of(where, run).get("not_asked", []))
    # who set them: for the words alone
    set_here = re.search("gate|licence", tags.get(OVERRIDES, "")) or tags.get(DIRTY) == "true"
    whose = (
        "were set for this run"
        if set_here or not tags.get(RECIPE)
        else f"recipe {tags[RECIPE]} has instead of the gate's"
    )
    own = ", ".join(own_rules(where, run))
    return (
        "the verdict passed"
        + (f" by rules that {whose} ({own})" if own else "")
        + (f", {left} of the gate's rules not asked (its page says which, and why)" if left else "")
    )


def own_rules(where: Project, run: Run) -> list[str]:
    """The keys by which `run` was judged otherwise than by the params.yaml of the commit that was checked out: by a recipe, by
    words of the command, or by a change that was not committed. Lists of rules count only if they lack one; what is not asked, the
    verdict says.

    Raises:
        ValueError: this clone lacks one of the commits.
    """
    head = run.data.tags[HEAD]
    storage.must_be_here(where, head, of=f"run {run.data.tags[KEY]}")
    before, now = (git("show", f"{commit}:params.yaml", cwd=where.root) for commit in (head, run.data.tags[RECORD]))
    if before == now:
        return []
    theirs, ours = ({section: sections_of(text).get(section) or {} for section in JUDGES} for text in (before, now))
    return [
        f"{section}.{key}"
        for section, judges in theirs.items()
        for key in {**judges, **ours[section]}
        if key != "not_asked" and differs(judges.get(key), ours[section].get(key), rules=section == "gate")
    ]


def differs(before: Any, now: Any, *, rules: bool) -> bool:
    """Whether they are not the same; of lists of `rules`, whether one is gone."""
    if rules and isinstance(before, list) and isinstance(now, list):
        return any(rule not in now for rule in before)
    return before != now


def withdraw(client: MlflowClient, where: Project, run: Run) -> None:
    """Undo `propose`: nobody is asked about `run`'s model any longer. It stays candidate, and of this the history says nothing."""
    source, model = runs.source_and_model(where, run)
    with hold(where, lock_name(model.name)):
        for version in registry.of_source(client, model.name, source):
            unstage(client, model.name, str(version.version))


def unstage(client: MlflowClient, name: str, version: str) -> None:
    """Take the alias staging from it: it waits for nobody any longer."""
    waits = registry.holder(client, name, STAGING)
    if waits and str(waits.version) == version:
        client.delete_registered_model_alias(name, STAGING)


def refuse(found: Candidate, against: list[str]) -> NoReturn:
    stays = f"champion stays version {found.champion}" if found.champion else "there is no champion"
    reasons = "".join(f"\n  {line}" for line in against)
    said = f"{found.name} version {found.version} stays candidate, {stays}:{reasons}"
    hooks.tell("refused", said, model=found.name, version=found.version, key=found.key)
    raise RefusalError(said)


def nothing_to_do(client: MlflowClient, where: Project, run: Run) -> str:
    """What to say if `run`'s model is the champion already, else ''."""
    source, model = runs.source_and_model(where, run)
    champion = registry.holder(client, model.name, CHAMPION)
    return (
        already(model.name, str(champion.version))
        if champion and registry.is_same(str(champion.source), source)
        else ""
    )


def already(name: str, version: str) -> str:
    return f"{name} version {version} is the champion already"


def rollback(
    client: MlflowClient,
    where: Project,
    why: str,
    *,
    to: str | None = None,
    done: Callable[[str], None] = lambda said: None,
) -> str:
    """Point champion at the version before the present one, or at an earlier champion. Returns what was done.

    Args:
        to: the number of a version that was champion, or its run's key, or the key's beginning.
        done: called with the result before the hooks are: they take their time, and who interrupts them must know that the
            rollback is done, for a second one would move the alias again.

    Raises:
        ValueError: there was none before, it is the present one, or it was deleted; `to` is no earlier champion, or several.
    """
    name = runs.model_at(where).name
    with hold(where, lock_name(name)):
        # a move that was not ours is recorded first, for it counts
        _, now = registry.present(client, name, person(where))
        before = registry.predecessor(registry.moves(client, name)) if to is None else meant(client, name, to, now)
        if before is None:
            raise ValueError(
                f"{name} had no champion before the present one: see `longlora history`"
                if now
                else f"{name} has no champion yet: `longlora promote`"
            )
        if before == now:
            raise ValueError(
                f"{name} version {now} is champion, and by the record was so before too: a rollback needs another; "
                "see `longlora history`"
            )
        version = registry.numbered(client, name, before)
        run = version.run_id or ""
        made = registry.move(client, name, before, how="rollback", who=person(where), why=why, run=run)
    said = f"{name} version {before} is champion again"
    done(said)
    hooks.tell("rolled back", said, model=name, key=version.tags.get(KEY, ""), **asdict(made))
    return said


def meant(client: MlflowClient, name: str, to: str, now: str | None) -> str:
    """The earlier champion whose version number is `to`, or whose run's key begins so."""
    there = {str(each.version): each.tags.get(KEY, "") for each in registry.earlier(client, name, now)}
    found = [to] if to in there else [version for version, key in there.items() if to and key.startswith(to)]
    if len(found) != 1:
        known = ", ".join(f"version {version} ({key})" for version, key in there.items()) or "none"
        raise ValueError(
            f"--to {to}: {'several earlier champions have' if found else 'no earlier champion has'} this version or key; "
            f"there are {known}"
        )
    return found[0]


def objections(
    client: MlflowClient, where: Project, run: Run, champion: ModelVersion | None, comparisons: list[Better]
) -> list[str]:
    """Why `run`'s model may not become champion, one line per rule; nothing if it may."""
    verdict = verdict_of(where, run)
    found = [
        f"{rule.get('name', 'a rule')}: {rule.get('reason', '')}"
        for rule in verdict.get("rules", [])
        if not rule.get("passed")
    ]
    if verdict.get("passed") is not True and not found:
        found = ["the verdict is not 'passed: true'"]
    if not champion or not comparisons:
        return found
    made = registry.run_of(client, champion)
    if not made:
        return [*found, f"better: {registry.runless(champion)}"]
    ours, theirs, version = run.info.run_id, made.info.run_id, str(champion.version)
    for better in comparisons:
        there = measured_beside(client, where, run, champion, better)
        if not there and (moved := runs.moved(champion, made)):
            return [*found, f"better: {moved}"]
        found += shortfall(client, where, ours, theirs, version, better, there=there)
    return found


def verdict_of(where: Project, run: Run) -> dict[str, Any]:
    """The gate's verdict at the run's recorded commit: `verdict.json` among its metrics.

    Raises:
        ValueError: the run is not recorded, or has no verdict.
    """
    rev, path = run.data.tags.get(RECORD), run.data.tags.get(VERDICT)
    if not rev or not path:
        raise ValueError(f"run {run.info.run_name} has no recorded verdict: only a finished run can be promoted")
    verdict = json.loads(read(where.root, rev, path))
    if not isinstance(verdict, dict):
        raise ValueError(f"{path} of {run.info.run_name} must be {{passed: ..., rules: [...]}}")
    return verdict


def lock_name(name: str) -> str:
    return f"registry-{name}"
