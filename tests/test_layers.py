"""The architecture's arrows, held: what may import what, and that the trees of README and docs are the tree on the disk."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOREIGN = {"longlora": {"prefect", "mlflow", "dvc", "flows", "tasks"}, "tasks": {"longlora", "flows"}}
FILES = [(layer, file) for layer in FOREIGN for file in sorted((ROOT / layer).rglob("*.py"))]


def imported(file: Path) -> set[str]:
    """First names of everything `file` imports, at any depth of indentation."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(("layer", "file"), FILES, ids=[str(f.relative_to(ROOT)) for _, f in FILES])
def test_nothing_points_back_up(layer, file):
    assert not imported(file) & FOREIGN[layer]


ORDER = ["data", "attention", "parallel", "model", "training", "evaluation", "report", "asking", "planning", "stages"]


@pytest.mark.parametrize("package", ORDER)
def test_a_package_of_the_library_imports_only_what_stands_before_it(package):
    before = {*ORDER[: ORDER.index(package) + 1], "section"}
    for file in (ROOT / "longlora" / package).glob("*.py"):
        assert set(re.findall(r"^\s*from longlora\.(\w+)", file.read_text(), re.M)) <= before, file


def test_no_flow_imports_the_command_line():
    for file in (ROOT / "flows").glob("*.py"):
        assert "flows.cli" not in file.read_text(), file


def test_peft_is_imported_in_one_place_which_keeps_quiet():
    found = {str(file.relative_to(ROOT)) for layer, file in FILES if "peft" in imported(file)}
    assert found == {"longlora/model/quiet_peft.py"}


MEASURES = """
import importlib, sys
for measure, not_needed in [
    ("perplexity", {"peft", "datasets"}),
    *((other, {"peft"}) for other in ("passkey", "needle", "ruler", "longqa")),
]:
    importlib.import_module(f"longlora.stages.{measure}")
    if found := not_needed & sys.modules.keys():
        sys.exit(f"{measure} imports {found}")
"""


def test_a_measure_starts_without_what_only_training_and_documents_need():
    """Each of them is a second or more, for each model that is measured."""
    done = subprocess.run([sys.executable, "-c", MEASURES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_package_is_in_the_order():
    assert {folder.parent.name for folder in (ROOT / "longlora").glob("*/__init__.py")} == {*ORDER}


@pytest.mark.parametrize(
    "package", ["longlora", *(f"longlora/{name}" for name in ORDER), "tasks", "flows", "flows/cli"]
)
def test_package_inits_are_empty(package):
    assert (ROOT / package / "__init__.py").read_text() == ""


def listed(page: str) -> set[str]:
    """The paths of the tree that stands on a page; each is on the disk."""
    folders, paths = [], set()
    for line in (ROOT / page).read_text().split("```tree\n")[1].split("```")[0].splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 2
        path = "".join([*folders[:depth], name])
        assert (ROOT / path).exists(), f"{page} names {path}"
        folders = [*folders[:depth], name] if name.endswith("/") else folders
        paths.add(path)
    return paths


def test_the_trees_name_every_module_and_only_what_exists():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    modules = {f for f in tracked if re.match(r"(longlora/(?!stages)|tasks|flows).*\.py$", f) and "__init__" not in f}
    named = listed("docs/tree.md")
    assert modules <= named, f"docs/tree.md leaves out {sorted(modules - named)}"
    assert listed("README.md") <= named


def test_no_pickle_no_remote_code():
    for file in [*(ROOT / "longlora").rglob("*.py"), *(ROOT / "tasks").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        text = file.read_text()
        assert not re.search(r"\bpickle\b\.|torch\.(save|load)\(|trust_remote_code=True", text), file
