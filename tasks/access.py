"""Who the servers let in: credentials, which are in the environment and nowhere else.

Prefect's server and its clients compare one string, `user:password`; each reads it from a variable of its own. MLflow's server runs
as its basic-auth app, which keeps users in a database and reads the password from the environment only when it creates the user.
So the database is created anew whenever the server starts: a changed password holds, and a removed user is gone.
"""

import base64
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

import httpx

from tasks.listening import Host
from tasks.web import request

SHORTEST = 12  # characters of a password: MLflow's rule, and ours for both servers
KNOWN = "password1234"  # the password that MLflow once shipped, and now refuses
SERVER_SIDE = "PREFECT_SERVER_API_AUTH_STRING"
ORIGINS = "PREFECT_SERVER_CORS_ALLOWED_ORIGINS"
PATIENCE = 30.0  # seconds for an answer: a server that starts on a busy machine takes connections before it can answer


@dataclass(frozen=True)
class Access:
    """How to be let in by one kind of server."""

    server: str
    variables: tuple[str, ...]
    """`user:password`, or user and password."""
    path: str
    """A path that needs credentials, which the health check does not."""
    others: tuple[str, ...]
    """Variables that let its clients in by other means."""
    ending: str = ""
    """What its address must end in."""

    def words(self) -> str:
        """`user:password`; '' if the environment has none."""
        values = [os.environ.get(name, "") for name in self.variables]
        return ":".join(values) if all(values) else ""

    def must_be_sound(self) -> str:
        """`words`, checked for a server of our own.

        Raises:
            ValueError: only one of two variables is set, the password is short or well known, or has characters that clients
                encode in different ways.
        """
        values = [os.environ.get(name, "") for name in self.variables]
        if not any(values):
            return ""
        user, _, password = values[0].partition(":") if len(values) == 1 else (values[0], "", values[1])
        form = "user:password" if len(values) == 1 else "a user's name without ':', and a password"
        named = self.named()
        if not user or not password or (len(values) == 2 and ":" in user):
            raise ValueError(f"{named}: must be {form}")
        if not all(value.isascii() and value.isprintable() for value in values):
            raise ValueError(f"{named}: must be printable ASCII, so that every client sends the same bytes")
        if len(password) < SHORTEST:
            raise ValueError(f"{named}: the password has {len(password)} characters, and must have {SHORTEST} or more")
        if password == KNOWN:
            raise ValueError(f"{named}: this password was MLflow's own, and everybody knows it")
        return self.words()

    def must_admit(self, url: str) -> None:
        """Check that the server at `url`, if it asks for credentials, takes ours. Without this, clients end in a traceback.

        Raises:
            ValueError: it does not, or only its page is there.
        """
        if any(os.environ.get(name) for name in self.others):
            return
        parts = urlsplit(url)
        words = self.words() or unquote(parts.netloc.rpartition("@")[0])
        where = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        status = answer(parts, self.path, words)
        if status == 404 and self.ending:
            raise ValueError(
                f"{self.server} does not answer at {where}{parts.path}: its address must end in {self.ending}"
            )
        if status == 401:
            said = "does not take the credentials in" if words else "asks for credentials: set"
            raise ValueError(f"{self.server} at {where} {said} {self.named()}")

    def must_guard(self, url: str) -> None:
        """Check that the server at `url` lets us in, and nobody without credentials.

        Raises:
            ValueError: it does not ask for them, or takes others.
        """
        parts = urlsplit(url)
        stranger, ours = answer(parts, self.path), answer(parts, self.path, self.words())
        if (stranger, ours) != (401, 200):
            raise ValueError(
                f"{self.server} does not keep others out: it answers {stranger} without credentials (401 is right) "
                f"and {ours} with those in {self.named()} (200 is right)"
            )

    def named(self) -> str:
        return " and ".join(self.variables)


PREFECT = Access(
    "Prefect",
    ("PREFECT_API_AUTH_STRING",),
    "/admin/version",
    ("PREFECT_API_KEY", "PREFECT_CLIENT_CUSTOM_HEADERS"),
    "/api",
)
MLFLOW = Access(
    "MLflow",
    ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "/version",
    ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4"),
)


def must_be_asked(host: str, servers: Iterable[Access]) -> None:
    """Check that `servers`, which other machines may reach at `host`, will ask for credentials.

    Raises:
        ValueError: there are none for one of them; names the variables to set.
    """
    missing = [
        f"{name}=user:password" if name in PREFECT.variables else name
        for each in servers
        if not each.words()
        for name in each.variables
        if not os.environ.get(name)
    ]
    if missing:
        raise ValueError(
            f"--host {host}: other machines may reach it, so credentials are needed: set {', '.join(missing)}"
        )


def prefect_server(host: Host, port: int) -> dict[str, str]:
    """What a Prefect server of ours is told, so that it asks for what its clients send, and only its own page's scripts may use it.

    By itself it lets every page that the user visits do so, and its worker runs any command that it is given.

    Raises:
        ValueError: unsound credentials, or the server's name for them has others.
    """
    words = PREFECT.must_be_sound()
    if os.environ.get(SERVER_SIDE, words) != words:
        raise ValueError(f"{SERVER_SIDE} is not {PREFECT.named()}: set the latter alone, the server is given the same")
    origins = ",".join(f"http://{name}:{port}" for name in [*host.names(), "localhost"])
    return {ORIGINS: os.environ.get(ORIGINS, origins), **({SERVER_SIDE: words} if words else {})}


def mlflow_server(folder: Path, port: int) -> dict[str, str]:
    """What an MLflow server of ours on `port` is told, its users' database made anew in `folder`; {} without credentials.

    Raises:
        ValueError: unsound credentials.
    """
    if not MLFLOW.must_be_sound():
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # whoever made it
    users, config = folder / f"mlflow-{port}.db", folder / f"mlflow-{port}.ini"
    settings = {
        "default_permission": "NO_PERMISSIONS",
        "database_uri": f"sqlite:///{users}".replace("%", "%%"),  # the ini's own sign
        "auth_cache_ttl_seconds": "60",  # to compare a password takes a tenth of a second, at each of a run's requests
    }
    text = "[mlflow]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())
    for path, content in ((users, ""), (config, text)):
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(content)
    user, password = (os.environ[name] for name in MLFLOW.variables)
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(config),
        "MLFLOW_AUTH_ADMIN_USERNAME": user,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true",
        "MLFLOW_FLASK_SERVER_SECRET_KEY": os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY") or secrets.token_hex(32),
    }


def answer(server: SplitResult, path: str, words: str = "") -> int | None:
    """The HTTP status of `path` below a server's address, asked with `words`; None if there is no answer.

    Raises:
        ValueError: nothing came for PATIENCE: the server hangs, and its clients would for a quarter of an hour.
    """
    url = server._replace(netloc=server.netloc.rpartition("@")[2], path=f"{server.path.rstrip('/')}{path}", query="")
    headers = {"Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"} if words else {}
    try:
        return request("GET", url.geturl(), headers=headers, trust_env=False, timeout=PATIENCE).status_code
    except httpx.TimeoutException:
        raise ValueError(
            f"{url.scheme}://{url.netloc} did not answer in {PATIENCE:g} s: see whether it hangs"
        ) from None
    except httpx.HTTPError:
        return None
