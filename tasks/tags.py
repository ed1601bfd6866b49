"""The names of our tags in MLflow."""

KEY = "longlora.key"
HOME = "longlora.home"
"""The machine and folder where the run began."""
RECIPE = "longlora.recipe"
OVERRIDES = "longlora.overrides"
DIRTY = "longlora.dirty"
SNAPSHOT = "longlora.snapshot"
"""The commit that the run computed from."""
SWEEPS = "longlora.sweeps"
"""The sweeps that a run is part of, by name, a space between."""

RECORD = "longlora.record"
"""The commit of a finished run: its snapshot and the dvc.lock that it made."""
REF = "longlora.ref"
"""The ref that keeps that commit."""
GIT = "longlora.git"
"""The address of the git repository that it was pushed to, or ''."""
REMOTE = "longlora.remote"
"""The address of the DVC remote that has its data, or ''."""
VERDICT = "longlora.verdict"
"""The path of the gate's verdict, or ''."""

ALIASES = CHAMPION, STAGING, CANDIDATE = ("champion", "staging", "candidate")
"""The registry's names for versions, by which a run may be asked for; staging passed the rules, and waits for approval."""

DATA = "data."
"""Before the path of an output: its hash, as DVC gives it. MLflow's page compares tags, and not datasets."""
