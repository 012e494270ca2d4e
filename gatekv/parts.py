"""Something that holds tensors, and other such things: copied, reordered, counted and saved by walking it once."""

from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import nn

Tensor = torch.Tensor


class Part:
    """What a cache is made of. Tensors, numbers and other parts are plain attributes; None: there is none yet.

    No tensor of a part is written in place while a copy may share it: a part that does write in place overrides `fork`.

    Attributes:
        saved: names of the attributes that a file holds: tensors, tuples of tensors, whole numbers, or parts. Those of
            the others that matter are derived from them, or are the model's.
        borrowed: names of the attributes that are the model's, which pickle leaves out; every call brings them.
    """

    saved: tuple[str, ...] = ()
    borrowed: tuple[str, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Every tensor held, derived ones too; a model's modules are not held."""
        return list(_tensors(vars(self)))

    def fork(self) -> Self:
        """An independent copy that shares tensors."""
        twin = object.__new__(type(self))
        vars(twin).update({name: _forked(value) for name, value in vars(self).items()})
        return twin

    def index_select(self, index: Tensor) -> None:
        """Keep, reorder or repeat sequences: index [new_batch]. Every tensor held begins with the batch."""
        for name, value in vars(self).items():
            vars(self)[name] = _selected(value, index)

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> tensor of what `saved` names; a part's own names stand behind its name and a dot."""
        out: dict[str, Tensor] = {}
        for name in self.saved:
            value = vars(self)[name]
            if isinstance(value, Part):
                out |= {f"{name}.{inner}": t for inner, t in value.state_dict().items()}
            elif isinstance(value, tuple):
                out |= {f"{name}.{i}": t for i, t in enumerate(value)}
            elif value is not None:
                out[name] = value if isinstance(value, Tensor) else torch.tensor(value)
        return out

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave; what it did not name is None.

        Raises:
            KeyError, ValueError: a tensor is missing, or shapes do not belong together.
        """
        for name in self.saved:
            value = vars(self)[name]
            if isinstance(value, Part):
                value.load_state_dict(below(tensors, name))
            elif isinstance(value, int):
                vars(self)[name] = type(value)(tensors[name])
            elif name in tensors:
                vars(self)[name] = tensors[name]
            else:
                inner = below(tensors, name)
                vars(self)[name] = tuple(inner[str(i)] for i in range(len(inner))) or None

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | dict.fromkeys(self.borrowed)


def frozen(tensor: Tensor) -> bool:
    """Whether a tensor was made in inference mode and cannot be written here, outside of it."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def below(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `name` and a dot, without these."""
    return {full.removeprefix(f"{name}."): t for full, t in tensors.items() if full.startswith(f"{name}.")}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Part):
        yield from value.tensors()
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, (tuple, list)):
        for inner in value:
            yield from _tensors(inner)


def _forked(value: Any) -> Any:
    if isinstance(value, Part):
        return value.fork()
    if isinstance(value, list):
        return [_forked(inner) for inner in value]
    if isinstance(value, dict):
        return {key: _forked(inner) for key, inner in value.items()}
    return value


def _selected(value: Any, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value.index_select(0, index)
    if isinstance(value, (tuple, list)):
        return type(value)(_selected(inner, index) for inner in value)
    if isinstance(value, dict):
        return {key: _selected(inner, index) for key, inner in value.items()}
    if isinstance(value, Part) and not isinstance(value, nn.Module):
        value.index_select(index)
    return value
