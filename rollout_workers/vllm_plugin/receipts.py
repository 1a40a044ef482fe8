"""What an engine's model holds, checked against what was published.

    published tensor --(xxh3 of its bytes, rl_core/seal.py)--> incoming copy
    incoming copy    --(content: sum over its elements)------> parameter; a fused one holds what its parts held
    parameter        --(answer to a fixed input)-------------> the packed copy that a CPU kernel multiplies with
    everything else  --(content)-----------------------------> has not changed since the engine started

A content is a sum over elements, so that it does not matter how a loader lays parts out; that each part is in its place is what the
logprobs of the probe prove, against the learner's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from rollout_workers.vllm_plugin.staging import Part, Piece

CHUNK = 1 << 17
"""Elements that a content takes at a time: half a megabyte, which stays in the cache."""

WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

RULES: Mapping[str, Callable[[Tensor], Tensor]] = {"A": lambda a_log: -torch.exp(a_log.float())}
"""Parameters that are not what was published, but a function of it, elementwise: Mamba-2's decay rates."""

ONE_HOTS = 4
"""Columns of a packed weight that are compared bit by bit."""


class Mismatch(Exception):
    """A tensor is not what it should be. The message names it."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a packed weight must answer to the fixed input."""

    part: Part
    asked: Tensor  # [1 + ONE_HOTS, in]
    picked: Tensor  # [ONE_HOTS, out] its answers to all rows but the first, to the bit
    mixed: Tensor  # [out] and to the first
    bound: float  # but for so much rounding

    @torch.no_grad()
    def ask(self) -> None:
        """Raise Mismatch if the answer is wrong. Only in the thread that samples: vLLM's CPU kernels share one scratch memory, so that two
        of them at a time spoil each other's results without a word."""
        answer = self.part.shadow.__dict__["cpu_linear"](self.asked, self.part.shadow.weight, None)
        if not torch.equal(answer[1:], self.picked) or not float((answer[0] - self.mixed).abs().max()) <= self.bound:
            raise Mismatch(f"the packed copy of {self.part.name}.weight does not multiply as the weight that it was made of")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the live models must hold, and what is still to be asked of the packed weights that they are to be given."""

    contents: dict[str, int] = field(default_factory=dict)  # {"policy model.norm_f.weight": of the parameter or buffer}
    questions: list[Question] = field(default_factory=list)


@torch.no_grad()
def content(tensor: Tensor) -> int:
    """A 64-bit sum over the elements' bit patterns, each stirred first. Zeros, as in padding, count nothing."""
    if not tensor.numel():
        return 0
    flat = tensor.detach().contiguous().view(-1)
    words, total = flat.view(WORD[flat.element_size()]), 0
    for start in range(0, len(words), CHUNK):
        word = words[start : start + CHUNK].to(torch.int32)
        stirred = word * 0x2C1B3C6D  # one-to-one, and 0 stays 0
        stirred ^= stirred >> 15
        total += int(stirred.sum(dtype=torch.int64))
    return total


@torch.no_grad()
def process(parts: Sequence[Part], constants: Mapping[str, int]) -> Manifest:
    """Check loaded shadows against what was published, let vLLM pack them, and note what the live modules must hold from then on."""
    manifest = Manifest()
    for part in parts:
        for name, pieces in part.pieces.items():
            label = f"{part.name}.{name}"
            manifest.contents[label] = loaded(label, name, getattr(part.shadow, name), list(pieces.values()))
    for part in parts:
        weight, method = part.shadow._parameters.get("weight"), getattr(part.shadow, "quant_method", None)
        if part.pieces and method is not None and hasattr(method, "process_weights_after_loading"):
            method.process_weights_after_loading(part.shadow)
        if weight is not None and weight.dim() == 2 and "cpu_linear" in part.processed():
            manifest.questions.append(question(part, weight))
    homes = {live.untyped_storage().data_ptr(): new for part in parts for _, live, new in part.tensors() if new is not live}
    for part in parts:
        for name, live, new in part.tensors():
            if new is not live:
                manifest.contents.setdefault(f"{part.name}.{name}", content(new))
                continue
            label, home = f"{part.name}.{name}", homes.get(live.untyped_storage().data_ptr()) if live.numel() else None
            if home is not None and home.numel() == live.numel():  # a view of a parameter that is new
                manifest.contents[label] = content(home)
            elif (held := content(live)) == constants[label]:
                manifest.contents[label] = held
            else:
                raise Mismatch(f"{label} holds {held:#x}; nobody publishes it, and when the engine started it held {constants[label]:#x}")
    return manifest


def loaded(label: str, name: str, param: Tensor, pieces: Sequence[Piece]) -> int:
    """The content of `param`. Raises Mismatch unless it holds what the pieces hold."""
    if strange := [p for p in pieces if not p.published]:
        raise Mismatch(f"{label} was loaded from {len(strange)} tensors that nobody published: no rule says what it should be")
    rule = RULES.get(name, lambda piece: piece)
    wanted, found = sum(content(rule(p.data).to(param.dtype)) for p in pieces), content(param)
    if wanted != found:
        raise Mismatch(f"{label} holds {found:#x}, but {', '.join(p.published for p in pieces)} make {wanted:#x}")
    return found


def question(part: Part, weight: Tensor) -> Question:
    asked = rows(weight.shape[1], weight.dtype)
    bound = 16 * torch.finfo(weight.dtype).eps * float(asked[0].float().norm()) * float(weight.float().norm(dim=1).max())
    return Question(part, asked, weight[:, asked[1:].argmax(1)].t(), F.linear(asked[:1], weight)[0], bound)


@lru_cache(256)
def rows(width: int, dtype: torch.dtype) -> Tensor:
    """[1 + ONE_HOTS, width]: one row of noise, which every element has a part in, and some that pick a column each."""
    noise = torch.randn(1, width, generator=torch.Generator().manual_seed(width))
    hot = F.one_hot(torch.linspace(0, width - 1, ONE_HOTS).long(), width).float()
    return torch.cat([noise, hot]).to(dtype)


@torch.no_grad()
def verify(parts: Sequence[Part], manifest: Manifest) -> None:
    """Raise Mismatch unless the live modules hold what they must."""
    seen: set[int] = set()  # tied tensors are read once
    for part in parts:
        for name, live, new in part.tensors():
            label = f"{part.name}.{name}"
            if id(live) in seen:
                continue
            seen.add(id(live))
            if not (content(live) == manifest.contents[label] if new is live else same_bits(live, new)):
                raise Mismatch(f"{label} holds {content(live):#x}, but should hold {manifest.contents[label]:#x}")
        for name, value in part.processed().items():
            if part.live.__dict__.get(name) is not value:
                raise Mismatch(f"{part.name}.{name} is not the one that was made of the new weights")


def same_bits(one: Tensor, other: Tensor) -> bool:
    word = WORD[one.element_size()]
    return one.shape == other.shape and torch.equal(one.detach().view(word), other.detach().view(word))


def contents(parts: Sequence[Part]) -> dict[str, int]:
    """Of every live tensor."""
    return {f"{part.name}.{name}": content(live) for part in parts for name, live, _ in part.tensors()}
