"""Which parameter is which: names that stay when DDP rebuilds its buckets, and from one run to the next."""

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

logger = logging.getLogger(__name__)

Shapes = dict[str, tuple[int, ...]]


def describe(named_parameters: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Place, shape and dtype of each parameter, in words: what ranks compare."""
    return {name: f"number {i}, {tuple(p.shape)} {p.dtype}" for i, (name, p) in enumerate(named_parameters)}


def averaged_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that ranks have in common, without what torch.compile adds to their names: those with a gradient,
    but of a DDP model those it was told to ignore are each rank's own."""
    model = getattr(model, "_orig_mod", model)
    ignored: set[str] = getattr(model, "parameters_to_ignore", set())
    module = model.module if isinstance(model, DistributedDataParallel) else model
    return [
        (name.replace("_orig_mod.", ""), p)
        for name, p in module.named_parameters()
        if p.requires_grad and not ignored & {name, f".{name}"}  # torch has a dot before those of the model itself
    ]


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

    def load(self, saved: Shapes, *, strict: bool = True) -> set[str]:
        """Expect the parameters of a saved state. Returns the names of those that are the same there.

        Raises: ValueError if those known already are others; not if `strict` is False, then it logs them.
        """
        if self.shapes and saved and self.shapes != saved:
            if strict:
                raise ValueError(
                    f"the state to load belongs to other parameters: {_difference(saved, self.shapes)}. With "
                    "strict=False those that are the same go on where they were, and the others begin anew."
                )
            lost = [name for name, shape in saved.items() if self.shapes.get(name) != shape]
            new = [name for name, shape in self.shapes.items() if saved.get(name) != shape]
            logger.warning("not in the model: %s; begin anew: %s", ", ".join(lost) or "none", ", ".join(new) or "none")
        self.shapes = self.shapes or saved
        return {name for name, shape in saved.items() if self.shapes.get(name) == shape}

    def parameters(self) -> list[tuple[str, Tensor]]:
        """The parameters known so far with their names, in the same order on all ranks."""
        return [(name, p) for p, name in self._names.items()]  # type: ignore[no-untyped-call]

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
