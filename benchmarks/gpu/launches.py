"""Wrap the launches of a jitted kernel, to count them, to time them, or to read their arguments."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

Around = Callable[[dict[str, Any]], AbstractContextManager[Any]]


class _Watched:
    def __init__(self, kernel: Any, around: Around) -> None:
        self.kernel, self.around = kernel, around

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernel, name)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            with self.around({**dict(zip(self.kernel.arg_names, arguments, strict=False)), **options}):
                self.kernel[grid](*arguments, **options)

        return launch


@contextmanager
def watching(module: ModuleType, name: str, around: Around) -> Iterator[None]:
    """Within this context, each launch of `module.name` runs within `around(its arguments by name)`."""
    kernel = getattr(module, name)
    setattr(module, name, _Watched(kernel, around))
    try:
        yield
    finally:
        setattr(module, name, kernel)


def kernels(module: ModuleType) -> list[str]:
    """Return the names of a module's kernels, without jitted functions that only kernels call."""
    return sorted(
        n for n, value in vars(module).items() if n.endswith("_kernel") and hasattr(value, "arg_names")
    )
