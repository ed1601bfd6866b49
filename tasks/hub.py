"""The Hugging Face hub: an exported model, uploaded to a repository there."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

# of the client that the hub's library uses, which has changed before
from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

from tasks.errors import one_line


def must_be_open(name: str) -> None:
    """Check that repository `name` can be uploaded to: asked before a model is exported, which takes minutes.

    Raises:
        ValueError: the hub is switched off, nobody is logged in, or the hub does not let us in.
    """
    if name.count("/") != 1 or not all(name.split("/")):
        raise ValueError(f"--hub {name}: must be OWNER/NAME, such as lab/longlora-16k")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"--hub {name}: HF_HUB_OFFLINE is set, so nothing can be uploaded: unset it")
    if not get_token():
        raise ValueError(f"--hub {name}: nobody is logged in to the hub: `hf auth login`, or set HF_TOKEN")
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        raise refused(name, error) from None


def upload(name: str, exported: Path) -> str:
    """Upload a file, or all of a folder, to repository `name`, made if there is none: private. Returns its address.

    Raises:
        ValueError: the hub did not take it.
    """
    api = HfApi()
    try:
        page = api.create_repo(name, private=True, exist_ok=True)
        if exported.is_dir():
            api.upload_folder(repo_id=name, folder_path=exported)
        else:
            api.upload_file(repo_id=name, path_or_fileobj=exported, path_in_repo=exported.name)
    except (OSError, HTTPError) as error:
        raise refused(name, error) from None
    return str(page)


def refused(name: str, error: Exception) -> ValueError:
    return ValueError(f"--hub {name}: {one_line(error)}")
