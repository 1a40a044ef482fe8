"""The seed model's tokenizer: a byte-level BPE in which every digit is a token of its own.

Single digits are what lets a small model add columns and copy numbers: "4821" is four tokens wherever it stands, never one
rare token. Everything else is ordinary byte-level BPE, so that any text can be encoded.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rl_core.chat import END, MARKERS, START

PAD = "<|pad|>"
SPECIAL_TOKENS = (PAD, START, END, *MARKERS)
VOCAB_SIZE = 768
MAX_LENGTH = 32_768

# Renders what rl_core.chat.ChatML renders: messages, and one signature line per tool at the end of the system message.
CHAT_TEMPLATE = (
    "{%- set types = {'integer': 'int', 'string': 'str', 'number': 'float', 'boolean': 'bool', 'array': 'list', 'object': 'dict'} -%}"
    "{%- set ns = namespace(tools='') -%}"
    "{%- if tools -%}"
    "{%- set ns.tools = 'Tools:' -%}"
    "{%- for item in tools -%}"
    "{%- set tool = item.function if item.function else item -%}"
    "{%- set p = tool.parameters or {} -%}"
    "{%- set ns.tools = ns.tools + '\\n' + tool.name + '(' -%}"
    "{%- for name, schema in (p.properties or {}).items() -%}"
    "{%- set ns.tools = ns.tools + (', ' if not loop.first else '') + name + ':' + types.get(schema.type, 'any')"
    " + ('' if name in (p.required or []) else '?') -%}"
    "{%- endfor -%}"
    "{%- set ns.tools = ns.tools + ')' -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- if ns.tools and messages[0].role != 'system' -%}{{ '<|im_start|>system\\n' + ns.tools + '<|im_end|>\\n' }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{%- if loop.first and ns.tools and message.role == 'system' -%}{{ '\\n' + ns.tools }}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def train_tokenizer(texts: Iterable[str], out: str | Path, *, vocab_size: int = VOCAB_SIZE) -> Path:
    """Learn merges from `texts` (special tokens already removed) and write a Hugging Face tokenizer folder. Deterministic."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, *MARKERS],
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(folder)
    return folder
