"""MLflow's model registry: versions by reference, aliases, and a record of every move.

An alias can be set by anyone, and the last writer wins; so a move is made under a lock, the alias is read inside it and once more
after, and what moved is kept as tags of the registered model: from, to, when, who, why, run. The lock is that of one clone. Others
may move the alias at the same moment: then each move is kept, for no two tags have one name, and one that did not hold is said.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from secrets import token_hex
from typing import Literal
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from tasks.tags import CHAMPION, KEY, RECIPE, RECORD

MOVE = "longlora.move."
LONGEST = 5000  # characters of a description


@dataclass(frozen=True)
class Move:
    """One move of the champion alias, or a person's word that it stays."""

    how: Literal["promote", "rollback", "found", "declined"]
    """`found`: the alias was not where the record left it; `declined`: asked for approval, a person said no or nobody answered."""
    origin: str | None
    """The version it was on."""
    to: str | None
    when: str
    who: str
    why: str
    run: str


def source_of(name: str, *, path: str, rev: str, repo: str, ref: str) -> str:
    """The address of `path` at commit `rev` (kept under `ref`) of the git repository `repo`."""
    return f"dvc://{name}/{quote(path)}?{urlencode({'rev': rev, 'repo': repo, 'ref': ref}, safe='/:@')}"


def is_same(one: str, other: str) -> bool:
    """Whether two sources are the same path at the same commit: the repository may have been moved, or got another address."""
    return one == other or (bool(rev_of(one)) and parts_of(one) == parts_of(other))


def parts_of(source: str) -> tuple[str, str, str]:
    """What a source says but for where the repository is: scheme, path, commit."""
    parts = urlsplit(source)
    return parts.scheme, parts.path, rev_of(source)


def path_of(source: str) -> str:
    """The path of the model in the repository, of a source of ours."""
    return unquote(urlsplit(source).path).lstrip("/")


def rev_of(source: str) -> str:
    """The commit that a source names; '' for one that is not ours."""
    return parse_qs(urlsplit(source).query).get("rev", [""])[0]


def placed(source: str, repo: str) -> str:
    """The same source, to be read from repository `repo`."""
    parts = urlsplit(source)
    query = {**dict(parse_qsl(parts.query)), "repo": repo}
    return urlunsplit(parts._replace(query=urlencode(query, safe="/:@")))


def register(client: MlflowClient, name: str, *, source: str, run: Run, desc: str, labels: list[str]) -> ModelVersion:
    """The version of model `name` with this source, made if there is none."""
    try:
        client.create_registered_model(name, tags={label: "" for label in labels}, description=desc)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    if known := of_source(client, name, source):
        return known[0]
    tags = {key: run.data.tags.get(key, "") for key in (KEY, RECIPE, RECORD)}
    made = client.create_model_version(name, source, run_id=run.info.run_id, tags=tags, description=described(run))
    first = of_source(client, name, source)[0]
    if first.version != made.version:  # MLflow's client asks again where an answer is lost
        client.delete_model_version(name, str(made.version))
    return first


def described(run: Run) -> str:
    """What a version's page says of it: the run's description, in whole lines, as many as databases take; else its name."""
    text = run.data.tags.get("mlflow.note.content") or str(run.info.run_name)
    return text if len(text) <= LONGEST else text[: LONGEST + 1].rpartition("\n")[0]


def of_source(client: MlflowClient, name: str, source: str) -> list[ModelVersion]:
    """The versions of model `name` with this source, wherever its repository was, the oldest first."""
    return [each for each in versions_of(client, name) if is_same(str(each.source), source)]


def versions_of(client: MlflowClient, name: str) -> list[ModelVersion]:
    """The versions of model `name`, the oldest first."""
    return sorted(client.search_model_versions(f"name = '{name}'"), key=lambda each: int(each.version))


def commits(client: MlflowClient) -> dict[str, set[str]]:
    """The commits that versions of any model point to, and in what repositories: others may share the server."""
    versions: list[ModelVersion] = []
    token: str | None = ""
    while token is not None:
        found = client.search_model_versions(max_results=1000, page_token=token or None)
        versions, token = versions + list(found), found.token or None
    pointed: dict[str, set[str]] = {}
    for query in (parse_qs(urlsplit(str(version.source)).query) for version in versions):
        for rev in query.get("rev", []):
            pointed.setdefault(rev, set()).update(query.get("repo", []))
    return pointed


def keys(client: MlflowClient, name: str) -> dict[str, str]:
    """The keys of the runs that made versions of model `name`, by MLflow's ids."""
    found = versions_of(client, name)
    return {version.run_id: version.tags[KEY] for version in found if version.run_id and KEY in version.tags}


def holder(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version that `alias` points to."""
    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def run_of(client: MlflowClient, version: ModelVersion) -> Run | None:
    """The run that made `version`; None for a version made by hand, or if MLflow no longer has its run."""
    if not version.run_id:
        return None
    try:
        return client.get_run(version.run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def runless(version: ModelVersion) -> str:
    """What to say of a version without a run, and what to do."""
    return (
        f"{version.name} version {version.version} has no run in MLflow, so there are no scores of it: on MLflow's page "
        "(`longlora up`) take its alias away, or set it on a version that has one"
    )


def numbered(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """Version number `version`.

    Raises:
        ValueError: it was deleted.
    """
    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(
            f"{name} version {version} was deleted: `longlora history` has the others, `longlora rollback --to` takes an "
            "earlier champion, and MLflow's page (`longlora up`) sets the alias champion on any"
        ) from None


def moves(client: MlflowClient, name: str) -> list[Move]:
    """The record, oldest first.

    Raises:
        ValueError: a tag has the name of a record, and is none.
    """
    try:
        tags = client.get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise
    return [recorded(name, key, tags[key]) for key in sorted(tags) if key.startswith(MOVE)]


def recorded(name: str, key: str, value: str) -> Move:
    """The move that tag `key` of model `name` records."""
    try:
        return Move(**json.loads(value))
    except (ValueError, TypeError):
        raise ValueError(
            f"{name} has the tag {key}, whose value is no record of a move: on MLflow's page (`longlora up`) correct or delete it"
        ) from None


def move(
    client: MlflowClient, name: str, to: str, *, how: Literal["promote", "rollback"], who: str, why: str, run: str
) -> Move:
    """Point champion at version `to`, and record it. Call it under the registry's lock.

    The record is written first: should we die between the two, the next move finds the alias elsewhere, and says so.
    """
    number, now = present(client, name, who)
    made = Move(how, now, to, stamp(), who, why, run)
    write(client, name, number, made)
    client.set_registered_model_alias(name, CHAMPION, to)
    after = holder(client, name, CHAMPION)
    if not after or str(after.version) != to:
        stands = f"it is version {after.version}" if after else "there is none"
        raise ValueError(f"{name} version {to} was made champion, and {stands} now: somebody else moved it, too")
    return made


def decline(client: MlflowClient, name: str, *, who: str, why: str, run: str) -> Move:
    """Record that `run`'s model was kept from being champion. Call it under the registry's lock."""
    number, now = present(client, name, who)
    made = Move("declined", now, now, stamp(), who, why, run)
    write(client, name, number, made)
    return made


def present(client: MlflowClient, name: str, who: str) -> tuple[int, str | None]:
    """The number of the next record, and the version that is champion; if no record says so, one that does is made."""
    past, champion = moves(client, name), holder(client, name, CHAMPION)
    now = str(champion.version) if champion else None  # MLflow says a number or a text, by store
    last = past[-1].to if past else None
    if now == last:
        return len(past), now
    write(client, name, len(past), Move("found", last, now, stamp(), who, "not by us", ""))
    return len(past) + 1, now


def write(client: MlflowClient, name: str, number: int, made: Move) -> None:
    """Keep the record under a name that no other gets: its number, and for others of that number, by other clones, the moment."""
    moment = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{token_hex(4)}"
    client.set_registered_model_tag(name, f"{MOVE}{number:06d}-{moment}", json.dumps(asdict(made)))


def stamp() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def predecessor(past: list[Move]) -> str | None:
    """The version that was champion before the present one, promotions undone by a rollback left out."""
    line: list[str | None] = []
    for made in past:
        if made.how == "rollback" and made.to in line:
            del line[len(line) - line[::-1].index(made.to) :]  # back to where it was champion last
        elif made.how != "declined":
            line.append(made.to)
    return line[-2] if len(line) > 1 else None


def earlier(client: MlflowClient, name: str, now: str | None) -> list[ModelVersion]:
    """The versions that were champion at some time, but for version `now` and those that were deleted; the oldest first."""
    were = {made.to for made in moves(client, name) if made.how != "declined"} - {now}
    return [each for each in versions_of(client, name) if str(each.version) in were]
