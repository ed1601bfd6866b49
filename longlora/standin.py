"""Stand-ins for foreign packages, where only the sections of the library's modules are wanted: importing torch and transformers
takes ten seconds of a processor, and a section needs pydantic alone.

Sphinx does the same for the same reason (`autodoc_mock_imports`): whatever is looked up in such a package, called, subclassed or
put into an annotation exists, and does nothing.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FunctionType, ModuleType
from typing import Any

OURS = "longlora"


class Nothing:
    """A class, function or value of a package that is not loaded."""

    def __getattr__(self, name: str) -> "Nothing":
        if name.startswith("__"):  # or whoever asks for a protocol is told that it is kept
            raise AttributeError(name)
        return Nothing()

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        """As a decorator, what is decorated."""
        return arguments[0] if arguments and isinstance(arguments[0], FunctionType | type) else self

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __getitem__(self, key: Any) -> "Nothing":
        return self

    def __or__(self, other: Any) -> "Nothing":
        return self

    __ror__ = __or__


class Absent(ModuleType):
    """A module that is not loaded."""

    def __getattr__(self, name: str) -> Nothing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class Finder(MetaPathFinder, Loader):
    def __init__(self, loaded: set[str]) -> None:
        self.loaded = {*loaded, *sys.stdlib_module_names, OURS}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if fullname.partition(".")[0] in self.loaded else ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Absent(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in() -> None:
    """Have this process load no foreign package that it has not loaded yet. For a process that does nothing else."""
    sys.meta_path.insert(0, Finder({name.partition(".")[0] for name in sys.modules}))
