"""The `dvc` scheme for MLflow: a registered model whose weights are in DVC, and nowhere else.

A source reads `dvc://NAME/PATH?rev=COMMIT&repo=ADDRESS[&ref=REF]`, as tasks/registry.py writes it: the commit holds the
dvc.lock of the run that made the model.
MLflow finds this class by the installed entry point `mlflow.artifact_repository`; nothing else imports this module, because MLflow
must be imported first.

MLflow wants an MLmodel file beside the weights, and the tokenizer in a folder of its own. Both are made up on the way out: a folder
that transformers can read is shown as an MLflow model of the flavours `transformers` and `python_function`.
"""

import json
import platform
import subprocess
import tempfile
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from mlflow.entities import FileInfo
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository

from tasks.hashes import hash_of

MLMODEL = "MLmodel"
TOKENIZER = "components/tokenizer"  # where the transformers flavour looks for it
WEIGHTS = (".safetensors", ".safetensors.index.json")


class DvcArtifactRepository(ArtifactRepository):
    """Files of one DVC output at one commit; read only."""

    def __init__(self, artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        super().__init__(artifact_uri, tracking_uri, registry_uri)
        parts = urlsplit(artifact_uri)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        if parts.scheme != "dvc" or not {"rev", "repo"} <= query.keys():
            raise MlflowException(f"{artifact_uri} is not of the form dvc://NAME/PATH?rev=COMMIT&repo=ADDRESS")
        self.path, self.rev, self.repo, self.ref = unquote(parts.path), query["rev"], query["repo"], query.get("ref")

    @cached_property
    def files(self) -> Any:
        """The repository at the commit, as a file system."""
        # half a second, which help and listing of runs need not spend; public by this name alone
        from dvc.api import DVCFileSystem  # pyright: ignore[reportPrivateUsage]

        return DVCFileSystem(url=self.repo if Path(self.repo).is_dir() else self._fetched(), rev=self.rev)

    def _fetched(self) -> str:
        """A clone that has the commit: `git clone` leaves out refs that are neither branches nor tags."""
        self._clone = tempfile.TemporaryDirectory(prefix="longlora-record-")
        commands = (["init", "--quiet"], ["fetch", "--quiet", "--depth=1", "--", self.repo, self.ref or self.rev])
        for command in (*commands, ["checkout", "--quiet", self.rev]):
            done = subprocess.run(["git", *command], cwd=self._clone.name, capture_output=True, text=True)
            if done.returncode:
                raise MlflowException(f"git could not fetch {self.rev} from {self.repo}: {done.stderr.strip()}")
        return self._clone.name

    @cached_property
    def listing(self) -> dict[str, str]:
        """Every file on offer, by its path here: the path in the repository, or for an MLmodel that of its config.json."""
        root = f"/{self.path.strip('/')}"
        found = [str(file) for file in self.files.find(root)]
        if not found:
            raise MlflowException(f"{root} is not in {self.repo} at {self.rev}, or its data is not on the DVC remote")
        here = {file.removeprefix(root).lstrip("/") or Path(root).name: file for file in found}
        for folder in {name.rpartition("/")[0] for name in here if Path(name).name == "config.json"}:
            inside = {n: f for n, f in here.items() if n.rpartition("/")[0] == folder}
            if any(name.endswith(".safetensors") for name in inside):
                under = f"{folder}/" if folder else ""
                small = {Path(name).name: file for name, file in inside.items() if not name.endswith(WEIGHTS)}
                here |= {f"{under}{TOKENIZER}/{name}": file for name, file in small.items()}
                here[f"{under}{MLMODEL}"] = small["config.json"]
        return here

    def list_artifacts(self, path: str | None = None) -> list[FileInfo]:
        folder = f"{path.rstrip('/')}/" if path else ""
        below = [name.removeprefix(folder) for name in self.listing if name.startswith(folder)]
        folders = sorted({rest.split("/")[0] for rest in below if "/" in rest})
        return [FileInfo(folder + name, True, None) for name in folders] + [
            FileInfo(folder + name, False, self._size(folder + name)) for name in sorted(below) if "/" not in name
        ]

    def _size(self, name: str) -> int | None:
        """Bytes; DVC does not know them for the files of a folder before it has fetched it."""
        source = self.listing[name]
        return len(self._mlmodel(source)) if Path(name).name == MLMODEL else self.files.size(source)

    def _download_file(self, remote_file_path: str, local_path: str) -> None:
        if remote_file_path not in self.listing:
            raise MlflowException(f"{remote_file_path} is not in {self.artifact_uri}")
        source = self.listing[remote_file_path]
        if Path(remote_file_path).name == MLMODEL:
            Path(local_path).write_bytes(self._mlmodel(source))
        else:
            self.files.get_file(source, local_path)
            # DVC takes what is in its cache for whole; who loads a champion must get the weights that were judged
            recorded = (self.files.info(source).get("dvc_info") or {}).get("md5")
            if recorded and (found := hash_of(Path(local_path))) != recorded:
                Path(local_path).unlink()
                raise MlflowException(f"{remote_file_path} is damaged: its hash is {found}, and must be {recorded}")

    def _mlmodel(self, config_file: str) -> bytes:
        """What mlflow.transformers and mlflow.pyfunc need to know to load the folder with plain transformers."""
        config = json.loads(self.files.read_text(config_file))
        flavour = {
            "task": "text-generation",
            "instance_type": "TextGenerationPipeline",
            "pipeline_model_type": config["architectures"][0],
            "source_model_name": Path(config_file).parent.name,
            "model_binary": ".",
            "components": ["tokenizer"],
            "tokenizer_type": "AutoTokenizer",
            "torch_dtype": f"torch.{config.get('dtype') or config.get('torch_dtype') or 'float32'}",
            "transformers_version": version("transformers"),
            "code": None,
        }
        python = {"loader_module": "mlflow.transformers", "python_version": platform.python_version(), "code": None}
        model = {
            "flavors": {"transformers": flavour, "python_function": python},
            "mlflow_version": version("mlflow"),
            "model_uuid": self.rev,
            "utc_time_created": "1970-01-01 00:00:00.000000",
        }
        return yaml.safe_dump(model).encode()

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        raise MlflowException("a dvc:// source is read only: its commit says what it holds")

    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        raise MlflowException("a dvc:// source is read only: its commit says what it holds")
