"""Which parameter is which: names that stay when DDP rebuilds its buckets, and from one run to the next."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Shapes = dict[str, tuple[int, ...]]


class ParameterNames:
    """Names and shapes of one model's parameters.

    They come from `assign`, or else the parameters are numbered in the order in which DDP first shows them; the names
    of a loaded state are given out in their order.
    """

    def __init__(self) -> None:
        self.shapes: Shapes = {}
        self._names = WeakIdKeyDictionary()  # parameter -> name
        self.complete = False
        """All parameters have been seen: one without a name belongs to another model."""

    def assign(self, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]) -> None:
        """Take the names of the parameters that have gradients, without what torch.compile adds to them.

        Raises: ValueError if a loaded state belongs to other names or shapes.
        """
        named = [(name.replace("_orig_mod.", ""), p) for name, p in named_parameters if p.requires_grad]
        shapes = {name: tuple(p.shape) for name, p in named}
        if self.shapes and self.shapes != shapes:
            raise ValueError(f"the loaded state belongs to other parameters: {_difference(self.shapes, shapes)}.")
        self.shapes = shapes
        for name, p in named:
            self._names[p] = name
        self.complete = True

    def load(self, saved: Shapes) -> None:
        """Expect the parameters of a saved state. Raises: ValueError if those known already are others."""
        if self.shapes and saved and self.shapes != saved:
            raise ValueError(f"the state to load belongs to other parameters: {_difference(saved, self.shapes)}.")
        self.shapes = self.shapes or saved

    def of(self, parameters: Sequence[Tensor]) -> tuple[str, ...]:
        """The names of a bucket's parameters; until all are known, those without one get the next.

        Raises: ValueError for a parameter of another model or of another shape than the loaded one.
        """
        if not self.complete:
            for p in parameters:
                if p not in self._names:
                    self._names[p] = self._next(tuple(p.shape))
        if unknown := [tuple(p.shape) for p in parameters if p not in self._names]:
            raise ValueError(
                f"this VsaState serves a model without parameters of shape {unknown[:3]}; make one VsaState for each "
                "DDP model, and a new one after parameters have changed or been frozen."
            )
        return tuple(self._names[p] for p in parameters)

    def _next(self, shape: tuple[int, ...]) -> str:
        count = len(self._names)
        names = list(self.shapes)
        if count == len(names):
            self.shapes[str(count)] = shape
            return str(count)
        if self.shapes[names[count]] != shape:
            raise ValueError(
                f"the loaded state belongs to other parameters: {names[count]} is {self.shapes[names[count]]} there, "
                f"and the model's parameter number {count} is {shape}."
            )
        return names[count]


def _difference(saved: Shapes, present: Shapes) -> str:
    """The first parameter in which two different models differ, in words."""
    name = next(name for name in [*saved, *present] if saved.get(name) != present.get(name))
    return f"{name} is {saved.get(name, 'absent')} there and {present.get(name, 'absent')} here"
