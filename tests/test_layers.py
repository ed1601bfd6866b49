"""The architecture's arrows, held: what may import what, and that the README's tree is the tree on the disk."""

import ast
import re
import subprocess
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


@pytest.mark.parametrize("package", ["longlora", "longlora/stages", "tasks", "flows"])
def test_package_inits_are_empty(package):
    assert (ROOT / package / "__init__.py").read_text() == ""


def test_readme_tree_names_every_module_and_only_what_exists():
    tree = (ROOT / "README.md").read_text().split("```tree\n")[1].split("```")[0]
    folder, named = "", set()
    for line in tree.splitlines():
        name, indent = re.match(r"\s*(\S+)", line).group(1), len(line) - len(line.lstrip())
        folder = "" if indent == 0 else folder
        if name.endswith("/") and indent == 0:
            folder = name
        assert (ROOT / folder / name if indent else ROOT / name).exists(), f"the README names {folder}{name}"
        named.add((folder + name) if indent else name)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    modules = {
        f for f in tracked if re.fullmatch(r"(longlora|tasks|flows)/\w+\.py", f) and not f.endswith("__init__.py")
    }
    assert modules <= named, f"the README leaves out {sorted(modules - named)}"


def test_no_pickle_no_remote_code():
    for file in [*(ROOT / "longlora").rglob("*.py"), *(ROOT / "tasks").rglob("*.py"), *(ROOT / "flows").rglob("*.py")]:
        text = file.read_text()
        assert not re.search(r"\bpickle\b\.|torch\.(save|load)\(|trust_remote_code=True", text), file
