"""Give a module another `forward` by changing its class, so that it copies, pickles and compiles as before.

`attach(module, Mixin)` sets `module.__class__` to a subclass of its class with `Mixin` in front. The subclass
has the name and module of the original, so `save_pretrained`, `isinstance` and registries by class name see
no difference. Nothing is stored on the instance.
"""

import functools
from types import MethodType
from typing import Any, SupportsIndex

from torch import nn

_OF_INSTANCES = ("__dict__", "__weakref__")  # descriptors that `type` makes for every class


class Attached(nn.Module):
    """Base of the mixins."""

    _plain: type
    """The class before `attach`."""
    _constants: tuple[tuple[str, Any], ...]
    """The class attributes given to `attach`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a plain module if called as a constructor: the mixin knows about the attached one only."""
        own: Any = cls
        return _without(own)(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        cls = type(self)
        reduced = super().__reduce_ex__(max(int(protocol), 2))
        if "_plain" not in vars(cls):  # a subclass that another library made, such as FSDP's
            return reduced
        # pickle finds a class by its name, and would find the plain class
        return _new, (cls._plain, cls.__bases__[0], cls._constants), *reduced[2:]


def attach(module: nn.Module, mixin: Any, **constants: Any) -> None:
    """Put `mixin`, with hashable class attributes, in front of the module's class; in place."""
    plain: Any = type(module)
    _set_class(module, _subclass(plain, mixin, tuple(constants.items())))


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    _set_class(module, plain_class(module))


def plain_class(module: nn.Module) -> Any:
    """Return the module's class without the mixins of `attach`."""
    cls: Any = type(module)
    return _without(cls)


def foreign_forward(module: nn.Module) -> Any:
    """Return a `forward` that was set on the instance and hides the class's own, or None.

    accelerate's hooks set one that calls the class's `forward`; they are no obstacle (`attach` renews them).
    """
    own = vars(module).get("forward")
    inner = vars(module).get("_old_forward", own)
    return None if own is None or _is_bound(inner, module) else own


def _set_class(module: nn.Module, cls: type) -> None:
    own, hooked = vars(module).get("forward"), vars(module).get("_old_forward")
    own_is_bound, hooked_is_bound = _is_bound(own, module), _is_bound(hooked, module)
    module.__class__ = cls
    if own_is_bound:
        del vars(module)["forward"]
    if hooked_is_bound:
        renewed = MethodType(cls.forward, module)  # type: ignore[attr-defined]
        vars(module)["_old_forward"] = renewed
        functools.update_wrapper(vars(module)["forward"], renewed)


def _is_bound(method: Any, module: nn.Module) -> bool:
    """Return whether this is the bound `forward` of the module's class."""
    return isinstance(method, MethodType) and method.__func__ is type(module).forward


@functools.cache
def _subclass(cls: type, mixin: type, constants: tuple[tuple[str, Any], ...]) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    made = {**names, **dict(constants), "_plain": cls, "_constants": constants}
    return type(cls.__name__, (mixin, cls), made)


@functools.cache
def _without(cls: Any) -> Any:
    """Return the class without mixins, also if another library has made a subclass since (FSDP's)."""
    if "_plain" in vars(cls):
        return cls._plain
    bases: tuple[type, ...] = tuple(
        _without(base) if issubclass(base, Attached) else base for base in cls.__bases__
    )
    if bases == cls.__bases__:
        return cls
    return type(cls.__name__, bases, {k: v for k, v in vars(cls).items() if k not in _OF_INSTANCES})


def _new(cls: type, mixin: type, constants: tuple[tuple[str, Any], ...]) -> Any:
    made = _subclass(cls, mixin, constants)
    return made.__new__(made)
