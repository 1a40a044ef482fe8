"""What the documentation takes from the code while it is built, so that it cannot say something else than the code does.

A page of docs/ may hold these comments, each on a line of its own; MkDocs (`make docs`) calls the hooks at the end of this file:

    <!-- config -->                                  every key of the config, with type, default and meaning, from the dataclasses
    <!-- commands -->                                every command of `polyrl`, with its options, from the program itself
    <!-- code rl_core/loop.py train.generate -->     these lines of the file, with their numbers; no name: the docstring at its top
    <!-- table README.md | environment | -->         the table of that file whose first line starts so
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from rl_core.config import EnvironmentConfig, RewardConfig, RunConfig

ROOT = Path(__file__).parents[1]

MARK = re.compile(r"^<!-- (config|commands|code|table)(?: (.*?))? -->$", re.MULTILINE)

NESTED = {"environments": ("<name>", EnvironmentConfig), "rewards": ("<name>", RewardConfig)}
"""Fields that map a name to a dataclass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One dataclass of the config."""

    prefix: str  # "learner.importance."; "" at the top
    meaning: str
    rows: tuple[tuple[str, str, str, str], ...]  # (key without prefix, type, default, meaning)


def sections(cls: type = RunConfig, prefix: str = "") -> Iterator[Section]:
    """The config's dataclasses, outermost first."""
    hints, said = get_type_hints(cls), field_docstrings(cls)
    rows: list[tuple[str, str, str, str]] = []
    inner: list[tuple[type, str]] = []
    for field in fields(cls):
        kind = hints[field.name]
        if is_dataclass(kind):
            inner.append((kind, f"{prefix}{field.name}."))  # type: ignore[arg-type]
        elif field.name in NESTED:
            name, nested = NESTED[field.name]
            inner.append((nested, f"{prefix}{field.name}.{name}."))
        else:
            rows.append((field.name, getattr(kind, "__name__", str(kind)), default_of(field), said.get(field.name, "")))
    yield Section(prefix=prefix, meaning=inspect.cleandoc(cls.__doc__ or ""), rows=tuple(rows))
    for part, below in inner:
        yield from sections(part, below)


def field_docstrings(cls: type) -> dict[str, str]:
    """Field name -> the string that follows it in the source of its class, on one line."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            found[field.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return found


def default_of(field: Field[Any]) -> str:
    """As it is written in YAML."""
    value = field.default if field.default is not MISSING else field.default_factory()  # type: ignore[misc, operator]
    return {"None": "null", "True": "true", "False": "false", "''": '""'}.get(repr(value), str(value))


def config_tables() -> str:
    """The configuration reference."""
    parts = []
    for section in sections():
        name = section.prefix.rstrip(".") or "At the top"
        parts += [f"## {f'`{name}`' if section.prefix else name}", "", section.meaning, ""]
        if section.rows:
            parts += ["| key | type | default | meaning |", "|---|---|---|---|"]
            parts += [f"| `{key}` | {_cell(kind)} | `{default}` | {_cell(meaning)} |" for key, kind, default, meaning in section.rows]
            parts.append("")
    return "\n".join(parts)


def commands() -> dict[str, Any]:
    """Every command of the program that can be called, by its words: {"envs list": click.Command}."""
    import typer

    from infra.cli.main import app

    found: dict[str, Any] = {}

    def walk(command: Any, words: tuple[str, ...]) -> None:
        if inner := getattr(command, "commands", None):
            for name, child in inner.items():
                walk(child, (*words, name))
        else:
            found[" ".join(words)] = command

    walk(typer.main.get_command(app), ())
    return found


def command_pages() -> str:
    """The command reference: one heading per command, its help, its arguments and options."""
    parts = []
    for words, command in sorted(commands().items()):
        metavars = [p.metavar or str(p.name).upper() for p in command.params if p.param_type_name == "argument"]
        parts += [f"## `polyrl {words}`", "", f"    polyrl {' '.join([words, *metavars])}", "", inspect.cleandoc(command.help or ""), ""]
        options = [p for p in command.params if p.param_type_name == "option" and not getattr(p, "hidden", False)]
        if options:
            parts += ["| option | meaning |", "|---|---|"]
            parts += [f"| `{', '.join([*p.opts, *p.secondary_opts])}` | {_cell(getattr(p, 'help', '') or '')} |" for p in options]
            parts.append("")
    return "\n".join(parts)


@cache
def _tree(file: Path) -> tuple[list[str], ast.Module]:
    source = file.read_text(encoding="utf-8")
    return source.splitlines(), ast.parse(source)


def lines_of(file: Path, name: str = "") -> tuple[int, int]:
    """(first, last) line, from 1, of a function, class or constant by its dotted name; "" is the docstring at the top."""
    node: ast.AST = _tree(file)[1]
    if not name:
        node = node.body[0]  # type: ignore[attr-defined]
    for part in name.split(".") if name else ():
        node = next((child for child in _bodies(node) if part in _names(child)), None)  # type: ignore[assignment]
        if node is None:
            raise ValueError(f"{file} has no {name!r}; a page of docs/ names it")
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])  # type: ignore[attr-defined]
    last = node.end_lineno  # type: ignore[attr-defined]
    return first, last


def _bodies(node: ast.AST) -> Iterator[ast.AST]:
    """Statements below a node, those within `async with` and the like included, but not those of other functions."""
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, (ast.AsyncWith, ast.With, ast.If, ast.Try)):
            yield from _bodies(child)


def _names(node: ast.AST) -> set[str]:
    """What a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def code_block(words: str) -> str:
    """`rl_core/loop.py train.generate` -> a fenced block of these lines, their numbers as in the file."""
    path, _, name = words.partition(" ")
    first, last = lines_of(ROOT / path, name)
    text = textwrap.dedent("\n".join(_tree(ROOT / path)[0][first - 1 : last]))
    return f'```python title="{path}" linenums="{first}"\n{text}\n```'


def table_of(words: str) -> str:
    """`README.md | environment |` -> the table of that file whose first line starts with what follows the file's name."""
    path, _, start = words.partition(" ")
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith(start)), None)
    if begin is None:
        raise ValueError(f"{path} has no table that starts with {start!r}; a page of docs/ takes it from there")
    end = next((i for i in range(begin, len(lines)) if not lines[i].startswith("|")), len(lines))
    return "\n".join(lines[begin:end])


def filled(markdown: str) -> str:
    """A page with what its comments ask for."""
    makers: dict[str, Callable[[str], str]] = {
        "config": lambda _: config_tables(),
        "commands": lambda _: command_pages(),
        "code": code_block,
        "table": table_of,
    }
    return MARK.sub(lambda found: makers[found[1]](found[2] or ""), markdown)


def _cell(text: str) -> str:
    """Text within a table: no bars, no line ends, no brackets that Markdown takes for a link or HTML for a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("{", "&#123;")


# --- called by MkDocs ---------------------------------------------------------------------------------------------------

OUTSIDE = re.compile(r"""<(?:script|img|iframe|link(?![^>]*rel="canonical"))\b[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*>""")
"""What a browser would fetch from another host; links that a person may follow are none."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    return filled(markdown)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """The pages are read where there is no network, and tell nobody that they are read."""
    if found := OUTSIDE.search(output):
        raise ValueError(f"{page.file.src_uri} would load something from elsewhere: {found[0]}")
    return output
