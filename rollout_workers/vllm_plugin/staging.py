"""A second set of weights, built beside the ones that are sampling.

    live model --> shadow: the same modules, tensors of its own --> vLLM's loaders fill it --> vLLM packs it for its kernels

A shadow is loaded exactly as vLLM loads a checkpoint at start, so whatever a loader or a kernel's packing does, it does here; what is
observed on the way is which published tensors each parameter was made of. Only when all of it has been checked does the live model take
the shadow's values: parameters are copied into the tensors that views, ties and caches already refer to, packed weights change hands.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

Loader = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a loader was given for a parameter: a published tensor or a part of it."""

    published: str
    data: Tensor


@dataclass(slots=True)
class Part:
    """One module and its shadow."""

    name: str  # "policy model.layers.0.mixer", for people
    live: nn.Module
    shadow: nn.Module
    attributes: dict[str, Any]
    """Of the live module, when the shadow was made."""
    pieces: dict[str, dict[tuple[int, int], Piece]] = field(default_factory=dict)
    """{parameter: what it was loaded from}."""

    def tensors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, live, shadow's) of every parameter and buffer."""
        for kind in ("_parameters", "_buffers"):
            ours = getattr(self.shadow, kind)
            for name, live in getattr(self.live, kind).items():
                if live is not None:
                    yield name, live, ours[name]

    def processed(self) -> dict[str, Any]:
        """What loading and packing left on the shadow beside its tensors: packed weights, in whatever form."""
        return {
            name: value
            for name, value in self.shadow.__dict__.items()
            if name not in ("_parameters", "_buffers", "_modules") and self.attributes.get(name) is not value
        }

    def put(self, name: str, tensor: Tensor) -> None:
        """Make `tensor` the shadow's parameter or buffer."""
        held = self.shadow._parameters if name in self.shadow._parameters else self.shadow._buffers
        held[name] = tensor  # type: ignore[assignment]


class Shadow:
    """The shadow of several models that may share modules, as a draft shares the policy's embedding."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        self.parts: list[Part] = []
        self._modules: dict[int, nn.Module] = {}
        self._tensors: dict[int, Tensor] = {}
        self.models = {role: self._shadow(model, role) for role, model in models.items()}

    def load(self, published: Mapping[str, Tensor]) -> set[str]:
        """Every model takes the names that it knows; returns those that somebody took."""
        names = Names(published)
        for part in self.parts:
            for name, _, tensor in part.tensors():
                loader = getattr(tensor, "weight_loader", default_weight_loader)
                if tensor is not getattr(part.live, name):
                    tensor.weight_loader = partial(observed, loader, part, name, names)  # type: ignore[attr-defined]
        for model in self.models.values():
            model.load_weights(iter(published.items()))  # type: ignore[operator]
        for part in self.parts:
            for name, live, tensor in list(part.tensors()):
                if tensor is not live and name not in part.pieces:  # nobody publishes it: it stays as it is
                    part.put(name, live)
            if "conv_weights" in part.shadow._buffers and (conv := part.shadow._modules.get("conv1d")) is not None:
                # Mamba's view of its convolution's weight, which vLLM makes once; kernels may pack the weight itself.
                part.put("conv_weights", conv.weight.detach().clone().view(part.shadow._buffers["conv_weights"].shape))  # type: ignore[union-attr, operator, arg-type]
        return {piece.published for part in self.parts for pieces in part.pieces.values() for piece in pieces.values()}

    def free(self, replaced: list[Any]) -> None:
        """Let go of all memory, and of what `take` has replaced. Modules know their tensors, and these the modules that load them: nothing
        goes by itself."""
        replaced.clear()
        for part in self.parts:
            for held in (part.pieces, part.attributes, part.shadow.__dict__):
                held.clear()

    def _shadow(self, live: nn.Module, name: str) -> nn.Module:
        """`live` without its tensors: attributes are shared, children and tensors are its own."""
        if (known := self._modules.get(id(live))) is not None:
            return known
        shadow: nn.Module = object.__new__(type(live))
        self._modules[id(live)] = shadow
        shadow.__dict__.update(live.__dict__)
        join = "." if " " in name else " "
        shadow.__dict__["_modules"] = {
            child: None if module is None else self._shadow(module, f"{name}{join}{child}") for child, module in live._modules.items()
        }
        parameters, buffers = get_layerwise_info(live).restore_metadata
        for kind, templates in (("_parameters", parameters), ("_buffers", buffers)):
            held = getattr(live, kind)
            shadow.__dict__[kind] = {
                key: None if tensor is None else self._fresh(tensor, templates.get(key), shadow) for key, tensor in held.items()
            }
        self.parts.append(Part(name, live, shadow, dict(live.__dict__)))
        return shadow

    def _fresh(self, live: Tensor, template: Tensor | None, shadow: nn.Module) -> Tensor:
        """Room for a new value of `live`, in the shape in which checkpoints have it. Views of parameters are not loaded, and stay."""
        if id(live) not in self._tensors:
            if template is not None:
                new = restore_layer_refs(materialize_meta_tensor(template), shadow)  # not the template's: vLLM's own, and it would keep us
            elif isinstance(live, nn.Parameter):
                new = torch.empty_like(live)
                new.__class__, new.__dict__ = live.__class__, live.__dict__.copy()
            else:
                new = live
            self._tensors[id(live)] = new
        return self._tensors[id(live)]


class Names:
    """From the address of a tensor's data to the published tensor that it lies in."""

    def __init__(self, published: Mapping[str, Tensor]) -> None:
        self._spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in published.items() if t.numel())

    def of(self, tensor: Tensor) -> str:
        """ "" if it lies in none."""
        at = bisect_right(self._spans, (tensor.data_ptr(), float("inf"), "")) - 1
        return self._spans[at][2] if at >= 0 and tensor.data_ptr() < self._spans[at][1] else ""


def observed(loader: Loader, part: Part, name: str, names: Names, param: Tensor, weight: Tensor, *args: Any, **more: Any) -> Any:
    """Call a parameter's loader, and keep what it was given."""
    part.pieces.setdefault(name, {})[weight.data_ptr(), weight.numel()] = Piece(names.of(weight), weight)
    return loader(param, weight, *args, **more)


def take(part: Part, taken: set[int]) -> list[Any]:
    """The live module takes its shadow's values, except for tensors that are in `taken` already: tied ones are copied once.

    Returns what the module held on to before, so that the caller can free it when nobody waits.
    """
    before: list[Any] = []
    processed = part.processed()
    for _, live, new in part.tensors():
        if new is live or id(live) in taken or not live.numel():
            continue
        taken.add(id(live))
        if "cpu_linear" in processed:  # the kernel has its packed copy: the weight itself may change places
            before.append(live.data)
            live.data = new.data
        else:
            live.data.copy_(new.data)
    before += [part.live.__dict__.get(name) for name in processed]
    part.live.__dict__.update(processed)
    return before
