"""What is secret stays so: secrets are planted wherever a user may have them, a run is run, and everything it left is searched."""

from pathlib import Path

import dummy
import pytest
from test_pipeline import key_of

pytestmark = pytest.mark.slow
PLANTED = {
    "HF_TOKEN": "hf_PLANTEDtokenA",
    "AWS_SECRET_ACCESS_KEY": "PLANTEDkeyB",
    "MLFLOW_TRACKING_PASSWORD": "PLANTEDpasswordC",
    "PREFECT_API_KEY": "pnu_PLANTEDkeyD",
    "MY_OWN_SECRET": "PLANTEDownE",
    "LONGLORA_HOOK_URL": "http://ada:PLANTEDhookF@127.0.0.1:9/PLANTEDpathG?PLANTEDqueryH",
}


def leaks(folder: Path, *, allowed: set[Path]) -> list[str]:
    """Files that hold a planted secret, whatever their kind (databases and git's objects unpacked included)."""
    found = [str(f) for f in folder.rglob("*") if f.is_file() and f not in allowed and b"PLANTED" in f.read_bytes()]
    names = dummy.git(folder, "cat-file", "--batch-check=%(objectname)", "--batch-all-objects").splitlines()
    return found + [name for name in names if "PLANTED" in dummy.git(folder, "cat-file", "-p", name)]


@pytest.mark.parametrize("fails", [False, True])
def test_no_secret_is_in_logs_databases_artifacts_or_refs(folder, tmp_path, fails):
    remote = tmp_path / "remote"
    remote.mkdir()
    dummy.git(tmp_path, "init", "--quiet", "--bare", "runs.git")
    dummy.git(folder, "remote", "add", "runs", f"file://ada:PLANTEDgitI@{tmp_path}/runs.git")
    dummy.git(
        folder, "config", f"url.file://{tmp_path}/runs.git.insteadOf", f"file://ada:PLANTEDgitI@{tmp_path}/runs.git"
    )
    # a stage that has a look at its environment: what is the orchestrator's is not there
    code = (folder / "dummy" / "stage.py").read_text()
    look = 'print(*(k for k in os.environ if k.startswith(("MLFLOW_", "PREFECT_"))), "seen", flush=True)\n'
    dummy.write(folder / "dummy" / "stage.py", code.replace('print(f"{kind} starts", flush=True)\n', look))
    dummy.commit(folder)
    local = folder / ".dvc" / "config.local"
    dummy.write(
        local,
        f"['remote \"local\"']\n    url = {remote}\n['remote \"web\"']\n    url = https://ada:PLANTEDdvcJ@127.0.0.1/x\n",
    )

    settings = ["--set", "train.fail=true"] if fails else []
    done = dummy.longlora(folder, "run", *settings, env={**PLANTED, "LONGLORA_GIT_REMOTE": "runs"})
    assert done.returncode == (1 if fails else 0), done.stderr
    assert "fetch | seen" in done.stdout
    assert "PLANTED" not in done.stdout + done.stderr
    work = folder / ".longlora" / "worktrees" / key_of(folder, *settings[1:])
    known = {local, work / ".dvc" / "config.local", folder / ".git" / "config"}
    assert leaks(folder, allowed=known) == []
    assert (work / ".dvc" / "config.local").stat().st_mode & 0o077 == 0
    assert leaks(tmp_path / "runs.git", allowed=set()) == []
    assert not any(b"PLANTED" in file.read_bytes() for file in remote.rglob("*") if file.is_file())


def test_the_search_finds_what_is_there(folder):
    dummy.write(folder / "note", "PLANTED")
    dummy.commit(folder)
    assert len(leaks(folder, allowed=set())) == 2
