"""Models by reference: weights in DVC, once; versions, aliases and their record in MLflow."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import dummy
import pytest

from tasks import tags
from tasks.config import link
from tasks.locks import hold
from tasks.stages import DvcRepo
from tasks.storage import record
from tasks.workspace import project, record_ref, snapshot, worktree

MODEL = """
stages:
  copy:
    cmd: cp -r source model
    deps: [source]
    outs: [model]
artifacts:
  tiny: {path: model, type: model}
"""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, str, str]:
    """A project whose one stage makes a real, tiny Llama; its folder, its record and the record's ref."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama") / "project"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(16)} | {"<unk>": 16}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder / "source")
    shared = dummy.FILES[".dvc/config"].replace("../.longlora/remote", str(folder.parent / "remote"))
    for name, text in {
        **dummy.FILES,
        ".dvc/config": shared,
        "dvc.yaml": MODEL,
        "params.yaml": "{}\n",
        ".gitignore": "/model/\n/.longlora/\n",
    }.items():
        dummy.write(folder / name, text)
    dummy.git(folder, "init", "--quiet", "--initial-branch", "main")
    dummy.commit(folder)
    where = project(folder)
    state = snapshot(where)
    work = worktree(where, state)
    link(work, to=where.tree, cache_home=where.root)
    dvc = DvcRepo(work, environment={})
    dvc.run_stage("copy", on_line=print, on_tick=lambda: None)
    dvc.close()
    dvc.push()
    return folder, record(where, state, work), record_ref(state.key)


@pytest.fixture
def client(mlflow_uri, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    return MlflowClient(mlflow_uri)


@pytest.fixture
def run(client, tmp_path):
    experiment = client.create_experiment(tmp_path.name)
    return client.create_run(experiment, tags={"longlora.key": "k"})


def source(recorded, name: str, path: str = "model") -> str:
    from tasks.registry import source_of

    folder, commit, ref = recorded
    return source_of(name, path=path, rev=commit, repo=str(folder), ref=ref)


LOADER = """
import json, sys
import mlflow, torch
uri, inputs = f"models:/{sys.argv[1]}@champion", torch.tensor([[1, 2, 3]])
for model in (
    mlflow.transformers.load_model(uri, return_type="components")["model"],
    mlflow.transformers.load_model(uri).model,
    mlflow.pyfunc.load_model(uri).get_raw_model().model,
):
    print("logits", json.dumps(model(inputs).logits[0, -1].tolist()))
"""


@pytest.mark.slow
def test_the_champion_loads_from_another_folder_with_plain_mlflow(recorded, client, run, tmp_path, mlflow_uri):
    import torch
    from transformers import AutoModelForCausalLM

    from tasks import registry

    name = tmp_path.name
    version = registry.register(client, name, source=source(recorded, name), run=run, desc="d", labels=["l"])
    client.set_registered_model_alias(name, tags.CHAMPION, version.version)
    env = {**dummy.clean_environment(), "MLFLOW_TRACKING_URI": mlflow_uri}
    done = subprocess.run([sys.executable, "-c", LOADER, name], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(recorded[0] / "source")(torch.tensor([[1, 2, 3]])).logits[0, -1]
    loaded = [json.loads(line.removeprefix("logits")) for line in done.stdout.splitlines() if line.startswith("logits")]
    assert len(loaded) == 3
    assert all(torch.equal(torch.tensor(logits), expected) for logits in loaded)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_files_come_from_the_recorded_commit_also_from_a_bare_git_address(recorded, tmp_path, elsewhere, mlflow_uri):
    from mlflow.artifacts import download_artifacts

    folder, commit, ref = recorded
    uri = source(recorded, "x")
    if elsewhere:  # a ref that is no branch: `git clone` alone would not bring it
        dummy.git(tmp_path, "init", "--quiet", "--bare", "bare.git")
        dummy.git(folder, "push", "--quiet", str(tmp_path / "bare.git"), f"{ref}:{ref}")
        uri = uri.replace(str(folder), f"file://{tmp_path}/bare.git")
    got = Path(download_artifacts(artifact_uri=uri, dst_path=str(tmp_path)))
    for file in (folder / "source").iterdir():
        assert (got / file.name).read_bytes() == file.read_bytes()
    assert (got / "components" / "tokenizer" / "tokenizer.json").exists()
    assert not list((got / "components").rglob("*.safetensors"))
    assert commit in (got / "MLmodel").read_text()


def test_a_source_lists_what_it_gives_and_takes_nothing(recorded, tmp_path):
    import mlflow  # noqa: F401  first, as tasks/artifacts.py says
    from mlflow.exceptions import MlflowException

    from tasks.artifacts import DvcArtifactRepository

    repository = DvcArtifactRepository(source(recorded, "x"))
    top, inner = repository.list_artifacts(), repository.list_artifacts("components/tokenizer/")
    assert [(file.path, file.is_dir) for file in top][:2] == [("components", True), ("MLmodel", False)]
    assert {file.path for file in inner} > {"components/tokenizer/tokenizer.json", "components/tokenizer/config.json"}
    (made_up,) = (file for file in top if file.path == "MLmodel")
    assert made_up.file_size == Path(repository.download_artifacts("MLmodel", str(tmp_path))).stat().st_size
    for refused in (repository.log_artifact, repository.log_artifacts):
        with pytest.raises(MlflowException, match="read only"):
            refused(str(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("dvc://x/nowhere?rev={rev}&repo={repo}", "is not in"),
        ("dvc://x/model?repo={repo}", "is not of the form"),
        ("dvc://x/model?rev={rev}", "is not of the form"),
        ("dvc://x/model/nothing.json?rev={rev}&repo={repo}", "is not in"),
    ],
)
def test_a_wrong_source_is_one_line(recorded, wrong, said, tmp_path):
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException, match=said):
        download_artifacts(artifact_uri=wrong.format(rev=recorded[1], repo=recorded[0]), dst_path=str(tmp_path))


def test_registering_twice_makes_one_version(recorded, client, run, tmp_path):
    from tasks import registry

    first = registry.register(client, tmp_path.name, source=source(recorded, "a"), run=run, desc="d", labels=["l"])
    again = registry.register(client, tmp_path.name, source=source(recorded, "a"), run=run, desc="d", labels=["l"])
    other = registry.register(
        client, tmp_path.name, source=source(recorded, "a", "source"), run=run, desc="d", labels=["l"]
    )
    assert first.version == again.version != other.version
    assert first.run_id == run.info.run_id
    assert client.get_registered_model(tmp_path.name).description == "d"


def test_a_version_says_what_its_run_found_in_as_many_characters_as_any_database_takes(client, run, tmp_path):
    from tasks import registry

    def described(text: str) -> str:
        client.set_tag(run.info.run_id, "mlflow.note.content", text)
        name, known = f"{tmp_path.name}-{len(text)}", client.get_run(run.info.run_id)
        return registry.register(client, name, source=f"dvc://{name}/m", run=known, desc="d", labels=[]).description

    assert described("**passed**\n\n| a | b |") == "**passed**\n\n| a | b |"
    assert described("") == run.info.run_name
    long = described("0123456789\n" * 600)
    assert 4980 < len(long) <= 5000 and long.endswith("\n0123456789")


def versions(client, name: str, number: int) -> list[str]:
    client.create_registered_model(name)
    return [str(client.create_model_version(name, f"dvc://{name}/m?rev={i}&repo=r").version) for i in range(number)]


def test_the_commits_of_versions_are_those_of_this_project_on_a_server_that_others_share(client, tmp_path, folder):
    from tasks import registry
    from tasks.storage import ours

    name = tmp_path.name
    dummy.git(folder, "remote", "add", "lab", "ssh://git@lab.example.org/x.git")
    head, elsewhere = dummy.git(folder, "rev-parse", "HEAD"), "/somebody/elses/clone"
    for rev, repo in (("a", folder), ("b", "ssh://git@lab.example.org/x.git"), ("c", elsewhere), (head, elsewhere)):
        address = registry.source_of(name, path="m", rev=rev, repo=str(repo), ref="r")
        if rev == "a":
            client.create_registered_model(name)
        client.create_model_version(name, address)
    assert ours(project(folder), registry.commits(client)) == {"a", "b", head}


def test_the_model_s_name_is_that_of_the_checkout_as_it_is_as_a_run_s_is(folder):
    from tasks.runs import model_at

    dummy.git(folder, "worktree", "add", "--quiet", "--detach", "../linked")
    linked = folder.parent / "linked"
    (linked / "dvc.yaml").write_text((linked / "dvc.yaml").read_text().replace("\n  dummy:\n", "\n  renamed:\n"))
    for tree, name in ((folder, "dummy"), (linked, "renamed")):
        where = project(tree)
        assert (model_at(where).name, model_at(where, "HEAD").name) == (name, "dummy")


def test_every_move_is_recorded_and_rollback_walks_back(client, tmp_path):
    from tasks import registry

    one, two, three = versions(client, tmp_path.name, 3)
    for to in (one, two, three):
        registry.move(client, tmp_path.name, to, how="promote", who="a", why="b", run="r")
    back = []
    while (before := registry.predecessor(registry.moves(client, tmp_path.name))) is not None:
        registry.move(client, tmp_path.name, before, how="rollback", who="c", why="d", run="r")
        back.append(before)
    assert back == [two, one]
    assert registry.holder(client, tmp_path.name, tags.CHAMPION).version in (one, int(one))
    record = registry.moves(client, tmp_path.name)
    assert [(m.how, m.origin, m.to) for m in record] == [
        ("promote", None, one),
        ("promote", one, two),
        ("promote", two, three),
        ("rollback", three, two),
        ("rollback", two, one),
    ]
    assert (record[0].who, record[0].why, record[0].run) == ("a", "b", "r")
    registry.move(client, tmp_path.name, three, how="promote", who="a", why="b", run="r")
    assert registry.predecessor(registry.moves(client, tmp_path.name)) == one


def test_an_alias_moved_by_somebody_else_is_found_and_said(client, tmp_path):
    from tasks import registry

    one, two, three = versions(client, tmp_path.name, 3)
    registry.move(client, tmp_path.name, one, how="promote", who="a", why="b", run="r")
    client.set_registered_model_alias(tmp_path.name, tags.CHAMPION, two)
    registry.move(client, tmp_path.name, three, how="promote", who="a", why="b", run="r")
    assert [(m.how, m.origin, m.to) for m in registry.moves(client, tmp_path.name)] == [
        ("promote", None, one),
        ("found", one, two),
        ("promote", two, three),
    ]


@pytest.mark.parametrize("value", ["by hand", '{"how": "promote"}', "[]"])
def test_a_tag_that_is_no_record_is_named_and_nothing_moves(client, tmp_path, value):
    from tasks import registry

    name = tmp_path.name
    one, two = versions(client, name, 2)
    registry.move(client, name, one, how="promote", who="a", why="b", run="r")
    client.set_registered_model_tag(name, f"{registry.MOVE}000009", value)
    with pytest.raises(ValueError, match=f"^{name} has the tag longlora.move.000009, .*no record of a move"):
        registry.move(client, name, two, how="promote", who="a", why="b", run="r")
    held = registry.holder(client, name, tags.CHAMPION)
    assert held and str(held.version) == one


def test_moves_of_two_clones_at_once_are_both_kept_and_the_one_that_did_not_hold_is_said(client, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    from tasks import registry

    name = tmp_path.name
    one, two, three = versions(client, name, 3)
    registry.move(client, name, three, how="promote", who="c", why="", run="r")
    set_alias = MlflowClient.set_registered_model_alias

    def another_clone_is_quicker(self: MlflowClient, *about: str) -> None:
        monkeypatch.setattr(MlflowClient, "set_registered_model_alias", set_alias)
        present = registry.present
        monkeypatch.setattr(registry, "present", lambda *_: (1, three))  # it looked before our record was written
        registry.move(client, name, two, how="promote", who="b", why="", run="r")
        monkeypatch.setattr(registry, "present", present)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", another_clone_is_quicker)  # ours is lost
    with pytest.raises(ValueError, match=f"version {one} was made champion, and it is version {two} now"):
        registry.move(client, name, one, how="promote", who="a", why="", run="r")
    assert [(m.who, m.origin, m.to) for m in registry.moves(client, name)] == [
        ("c", None, three),
        ("a", three, one),
        ("b", three, two),
    ]


def test_records_of_before_keep_their_places(client, tmp_path):
    from dataclasses import asdict

    from tasks import registry

    one, two, three = versions(client, tmp_path.name, 3)
    for number, to in enumerate((one, two)):
        made = registry.Move("promote", None, to, registry.stamp(), "a", "", "r")
        client.set_registered_model_tag(tmp_path.name, f"longlora.move.{number:06d}", json.dumps(asdict(made)))
    client.set_registered_model_alias(tmp_path.name, tags.CHAMPION, two)
    registry.move(client, tmp_path.name, three, how="promote", who="a", why="b", run="r")
    assert [m.to for m in registry.moves(client, tmp_path.name)] == [one, two, three]


def test_twenty_at_once_leave_one_champion_and_an_unbroken_record(client, tmp_path, folder):
    from tasks import registry

    name, where = tmp_path.name, project(folder)
    numbers = versions(client, name, 20)

    def promote(to: str) -> None:
        with hold(where, f"registry-{name}"):
            registry.move(client, name, to, how="promote", who="a", why="b", run="r")

    threads = [threading.Thread(target=promote, args=(to,)) for to in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = registry.moves(client, name)
    assert sorted(str(m.to) for m in record) == sorted(numbers)
    assert [m.origin for m in record] == [None, *(m.to for m in record[:-1])]
    assert str(registry.holder(client, name, tags.CHAMPION).version) == record[-1].to


def test_a_model_whose_data_is_gone_is_said_in_one_line(recorded, client, run, tmp_path, monkeypatch):
    from flows.cli.ask import model_folder
    from tasks import registry

    folder, commit, ref = recorded
    dummy.git(tmp_path, "clone", "--quiet", str(folder), "clone")  # without a cache
    dummy.git(tmp_path / "clone", "fetch", "--quiet", "origin", f"{ref}:{ref}")
    address = source((tmp_path / "clone", commit, ref), "tiny")
    version = registry.register(client, "tiny", source=address, run=run, desc="d", labels=[])
    client.set_registered_model_alias("tiny", tags.CANDIDATE, version.version)
    monkeypatch.chdir(tmp_path / "clone")
    remote = (folder.parent / "remote").rename(folder.parent / "gone")
    try:
        with pytest.raises(
            ValueError, match="^candidate: its data is neither in the cache nor on the DVC remote"
        ) as caught:
            model_folder("candidate")
    finally:
        remote.rename(folder.parent / "remote")
    assert "\n" not in str(caught.value)


def test_a_model_whose_weights_were_changed_in_the_cache_is_neither_asked_nor_loaded(recorded, mlflow_uri, tmp_path):
    """`longlora ask` and MLflow bring it by the same way."""
    from flows.cli.ask import fetched
    from tasks.runs import data_of

    folder, *_ = recorded
    size = (folder / "source/model.safetensors").stat().st_size
    (cached,) = (file for file in (folder / ".dvc/cache/files").rglob("*") if file.stat().st_size == size)
    whole, mode = cached.read_bytes(), cached.stat().st_mode
    cached.chmod(0o644)
    cached.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with (
            pytest.raises(
                ValueError, match=r"^champion: .*model\.safetensors is damaged: its hash is \w+, and must be \w+"
            ),
            data_of("champion"),
        ):
            fetched(source(recorded, "x"), home=tmp_path / "asked")
        assert not list((tmp_path / "asked").iterdir())
    finally:
        cached.write_bytes(whole)
        cached.chmod(mode)


def test_the_model_to_ask_is_brought_from_its_record_once(recorded, client, monkeypatch):
    from flows.cli.ask import model_folder
    from tasks import registry, tracking

    folder, commit, ref = recorded
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="tiny has no champion yet"):
        model_folder("champion")
    experiment = tracking.experiment_id(client, project(folder), "tiny")
    key = ref.rpartition("/")[2]
    finished = client.create_run(experiment, tags={"longlora.key": key, "longlora.record": commit, "longlora.ref": ref})
    client.set_terminated(finished.info.run_id, "FINISHED")
    version = registry.register(client, "tiny", source=source(recorded, "tiny"), run=finished, desc="d", labels=[])
    client.set_registered_model_alias("tiny", tags.CHAMPION, version.version)
    asked = model_folder("champion")
    for file in (folder / "source").iterdir():
        assert (asked / file.name).read_bytes() == file.read_bytes()
    fetched = asked.joinpath("model.safetensors").stat().st_ctime_ns
    assert model_folder(key[:8]) == asked
    assert asked.joinpath("model.safetensors").stat().st_ctime_ns == fetched
    client.set_registered_model_alias("tiny", tags.STAGING, version.version)
    assert model_folder("staging") == asked
    with pytest.raises(ValueError, match="nosuchrun"):
        model_folder("nosuchrun")


def test_processes_that_bring_the_same_model_do_not_disturb_each_other_and_leave_nothing_half(tmp_path, monkeypatch):
    import mlflow.artifacts

    from flows.cli.ask import fetched

    uri, home = "dvc://tiny/model?rev=0123&repo=r", tmp_path / "asked"
    begun: list[Path] = []

    def download(artifact_uri: str, dst_path: str) -> None:
        begun.append(Path(dst_path))
        dummy.write(Path(dst_path) / "config.json", "{}")
        if len(begun) == 1:  # meanwhile another process brings it too, to its end
            fetched(uri, home=home)
        dummy.write(Path(dst_path) / "model.safetensors", "weights")

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", download)
    asked = fetched(uri, home=home)
    assert len(set(begun)) == 2
    assert sorted(file.name for file in asked.iterdir()) == ["config.json", "model.safetensors"]

    def fail(artifact_uri: str, dst_path: str) -> None:
        dummy.write(Path(dst_path) / "config.json", "{}")
        raise ConnectionError

    monkeypatch.setattr(mlflow.artifacts, "download_artifacts", fail)
    with pytest.raises(ConnectionError):
        fetched(uri.replace("0123", "4567"), home=home)
    assert list(home.iterdir()) == [asked]
