"""What a rank does in test_learner. Runs in processes of its own, which `learner_ranks.run_ranks` starts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from transformers import LlamaConfig, LlamaForCausalLM

from learner import checkpoint, replay
from learner.export import BadCheckpoint, export
from learner.guard import ENOUGH
from learner.learner import Learner, StalenessError
from learner.make import make_learner
from learner.model import PolicyModel
from learner.optimizer import connect
from rl_core.advantages import group_advantages
from rl_core.config import EnvironmentConfig, ImportanceConfig, LearnerConfig, LoraConfig, ModelConfig, RunConfig
from rl_core.journal import GroupJournal
from rl_core.ledger import Ledger, group_id
from rl_core.trajectories import trajectories
from rl_core.types import Group, StepStats, VersionSpan
from tests.integration.learner_ranks import completion, group, random_groups, rollout

VOCAB = 32
TEMPERATURES = {"math": 1.0, "tools": 0.7}


def small_config(**changes: Any) -> LearnerConfig:
    """Wide importance bounds, so that random behaviour logprobs are not masked unless a test wants it."""
    if isinstance(changes.get("importance"), dict):
        changes["importance"] = ImportanceConfig(**changes["importance"])
    if isinstance(changes.get("lora"), dict):
        changes["lora"] = LoraConfig(**changes["lora"])
    return replace(LearnerConfig(warmup_steps=1, learning_rate=1e-2, importance=ImportanceConfig(low=0.0, high=1e9)), **changes)


def small_model(folder: Path, dtype: torch.dtype = torch.float32) -> PolicyModel:
    return PolicyModel.from_pretrained(folder / "model", dtype=dtype)


def make(folder: Path, *, dtype: torch.dtype = torch.float32, max_staleness: int = 1, **changes: Any) -> Learner:
    config = small_config(**changes)
    return Learner(
        small_model(folder, dtype),
        config,
        temperatures=TEMPERATURES,
        max_staleness=max_staleness,
        reference=blurred(small_model(folder, dtype)) if config.kl_weight else None,
    )


def blurred(model: PolicyModel) -> PolicyModel:
    """A policy near `model`, the same on every rank."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=rng)
    return model


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    """Weights after gathering; empty on other ranks than 0."""
    blob = learner.weights()
    return {} if blob is None else safetensors.torch.load(blob.tobytes())


def steps(rank: int, folder: Path, *, count: int, dtype: str = "float32", **changes: Any) -> Any:
    """Train `count` steps on fixed groups. Metrics of each step."""
    learner = make(folder, dtype=getattr(torch, dtype), **changes)
    metrics = []
    for step in range(count):
        learner.accumulate(random_groups(4, vocab=VOCAB, seed=step, version=step))
        metrics.append(dict(learner.apply().metrics))
    return metrics


def groups_to_compare() -> list[Group]:
    """Ragged groups, and one with a prompt long enough to be shared between its rows. The first rollout is a version old."""
    first, *others = random_groups(6, vocab=VOCAB, seed=0, long_prompt=300)
    stale, *fresh = first.rollouts
    (turn,) = stale.completions
    turn = replace(turn, spans=(VersionSpan(start=0, stop=1, version=-1), VersionSpan(start=1, stop=len(turn.token_ids), version=0)))
    return [replace(first, rollouts=(replace(stale, completions=(turn,)), *fresh)), *others]


def gradients(rank: int, folder: Path, *, name: str, dtype: str = "float32", **changes: Any) -> Any:
    """Store the gradients of one batch, as every rank sees them after averaging, in `<name>-<rank>.safetensors`."""
    learner = make(folder, dtype=getattr(torch, dtype), **changes)
    metrics = learner.accumulate(groups_to_compare())
    found = {name: safe_get_full_grad(p) for name, p in learner.model.named_parameters() if p.requires_grad}
    safetensors.torch.save_file({name: g.contiguous() for name, g in found.items() if g is not None}, folder / f"{name}-{rank}.safetensors")
    return metrics


def reference(rank: int, folder: Path) -> Any:
    """The same gradients in plain torch, float64, one turn at a time without padding; the formula written out once more."""
    model = small_model(folder, torch.float64)
    rollouts = [(r, a) for g in groups_to_compare() for r, a in zip(g.rollouts, group_advantages(g, "grpo"), strict=True)]
    tokens = sum(r.num_sampled for r, _ in rollouts)
    total = torch.zeros((), dtype=torch.float64)
    for sampled, advantage in rollouts:
        for turn in sampled.completions:
            ids = torch.from_numpy(np.concatenate([turn.prompt_ids, turn.token_ids]).astype(np.int64))[None]
            start, hidden = len(turn.prompt_ids), model(ids)
            temperature = TEMPERATURES[sampled.env]
            logprobs = (model.lm.get_output_embeddings()(hidden[0, start - 1 : -1]) / temperature).log_softmax(-1)
            own = logprobs.gather(-1, ids[0, start:, None])[:, 0]
            weight = (own.detach() - torch.from_numpy(turn.logprobs).double()).exp()
            total = total - (weight * float(advantage) * (own - own.detach()).exp()).sum() / tokens
            drafted = model.mtp_hidden(hidden.detach(), ids)[0, start - 2 : -1]
            head = model.lm.get_output_embeddings().weight.detach()
            cross_entropy = torch.nn.functional.cross_entropy(drafted @ head.T, ids[0, start:], reduction="sum")
            total = total + 0.3 * cross_entropy / tokens
    total.backward()
    routers = {id(p) for p in model.router_parameters()}
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None and id(p) not in routers}
    safetensors.torch.save_file(found, folder / "reference.safetensors")
    return float(total)


def make_tiny_llama(folder: Path) -> Path:
    """As anybody might bring one: no Mamba, no experts, no MTP, embedding and head tied. vLLM's smallest head on a CPU is 32."""
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=32, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


def llama(rank: int, folder: Path) -> Any:
    """One step of a Llama, its gradients against Transformers' own model and the formula in plain torch, one row at a time."""
    path = make_tiny_llama(folder / "llama")
    groups = random_groups(4, vocab=VOCAB, seed=3)
    learner = Learner(PolicyModel.from_pretrained(path), small_config(), temperatures=TEMPERATURES, max_staleness=0)
    before = weights(learner)
    learner.accumulate(groups)
    found = {name.removeprefix("lm."): safe_get_full_grad(p).cpu() for name, p in learner.model.named_parameters()}
    stats = learner.apply()
    learner.save(folder / "llama-run")

    plain = LlamaForCausalLM.from_pretrained(path).double()
    rows = [t for g in groups for t in trajectories(g, "grpo")]
    total, count = torch.zeros((), dtype=torch.float64), sum(int(r.loss_mask.sum()) for r in rows)
    for row in rows:
        ids = torch.from_numpy(row.token_ids.astype(np.int64))
        own = (plain(ids[None]).logits[0, :-1] / TEMPERATURES[row.env]).log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        weight = (own.detach() - torch.from_numpy(row.logprobs[1:]).double()).exp()
        total = total - (weight * row.advantage * (own - own.detach()).exp())[row.loss_mask[1:]].sum() / count
    total.backward()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    scale = max(float(g.abs().max()) for g in wanted.values())
    return {
        "names": sorted(found) == sorted(wanted),
        "error": max(float((found[name] - grad).abs().max()) for name, grad in wanted.items()) / scale,
        "loss": [stats.metrics["learner/loss"], float(total)],
        "changed": sum(not torch.equal(before[name], tensor) for name, tensor in weights(learner).items()) / len(before),
        "engine_names": sorted(before) == sorted(safetensors.torch.load_file(path / "model.safetensors")),
        "export": export(folder / "llama-run" / "step-000001" / "model", folder / "llama-export"),
    }


def exported(rank: int, folder: Path) -> Any:
    """A checkpoint of the hybrid, exported: what Transformers loads of it, and what is there for vLLM's draft."""
    learner = make(folder)
    learner.save(folder / "export-run")
    counts = export(folder / "export-run" / "step-000000" / "model", folder / "export")
    again = PolicyModel.from_pretrained(folder / "export").engine_state()
    same = all(torch.equal(tensor.cpu(), again[name]) for name, tensor in learner.model.engine_state().items())
    (folder / "export" / "model.safetensors").write_bytes(
        safetensors.torch.save({name: t.contiguous() for name, t in again.items() if name != "lm_head.weight"}, metadata={"format": "pt"})
    )
    try:
        export(folder / "export", folder / "broken")
    except BadCheckpoint as error:
        return counts | {"same": same, "broken": str(error)}
    return counts | {"same": same}


def resume(rank: int, folder: Path, *, name: str, **changes: Any) -> Any:
    """Two steps, a checkpoint, a third step; then a new learner goes on from the checkpoint with the same third step."""
    learner = make(folder, **changes)
    for step in range(2):
        learner.accumulate(random_groups(2, vocab=VOCAB, seed=step, version=step))
        learner.apply()
    learner.save(folder / name)
    found = checkpoint.latest(folder / name)
    assert found is not None
    third = random_groups(2, vocab=VOCAB, seed=2, version=2)

    def one_more(learner: Learner) -> tuple[int, float, dict[str, torch.Tensor]]:
        learner.accumulate(third)
        stats = learner.apply()
        return stats.version, stats.metrics["learner/grad_norm"], weights(learner)

    expected = one_more(learner)
    second = make(folder, **changes)
    second.load(found)
    got = one_more(second)
    return {
        "versions": [expected[0], got[0]],
        "norms": [expected[1], got[1]],
        "equal": all(torch.equal(tensor, got[2][name]) for name, tensor in expected[2].items()),
        "folder": found.name,
        "files": sorted(p.name for p in found.iterdir()),
    }


def adapters(rank: int, folder: Path, *, lora: dict[str, Any]) -> Any:
    """A step of LoRA, and the gradients of a second one beside those of the model that the first one published."""
    learner = make(folder, lora=lora)
    start, original = weights(learner), small_model(folder).engine_state()
    learner.accumulate(random_groups(4, vocab=VOCAB, seed=0))
    learner.apply()
    published = weights(learner)
    model = learner.save(folder / "lora-run") / "model"
    whole = Learner(PolicyModel.from_pretrained(model), small_config(), temperatures=TEMPERATURES, max_staleness=0, version=1)
    batch = random_groups(4, vocab=VOCAB, seed=1, version=1)
    losses = [one.accumulate(batch)["learner/loss"] for one in (learner, whole)]

    def gradients_of(one: Learner) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        return {n: (p.detach(), safe_get_full_grad(p)) for n, p in one.model.named_parameters() if p.requires_grad}

    mine, theirs, errors = gradients_of(learner), gradients_of(whole), []
    scale = lora["alpha"] / lora["rank"]
    for layer in [name.partition(".lora_A.")[0] for name in mine if ".lora_A." in name]:
        (a, ga), (b, gb) = (mine[f"{layer}.lora_{part}.default.weight"] for part in "AB")
        g = theirs[f"{layer}.weight"][1]  # W' = W + s B A, so that dA = s B^T dW' and dB = s dW' A^T
        errors += [
            float((found - wanted).abs().max() / wanted.abs().max()) for found, wanted in ((ga, scale * b.T @ g), (gb, scale * g @ a.T))
        ]
    return {
        "starts_as": all(torch.equal(tensor, start[name]) for name, tensor in original.items()),
        "names": sorted(published) == sorted(original),
        "changed": sorted(name for name, tensor in published.items() if not torch.equal(tensor, start[name])),
        "same_model": all(torch.equal(tensor.cpu(), published[name]) for name, tensor in whole.model.engine_state().items()),
        "trained": sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in mine if not name.startswith("mtp.")}),
        "losses": losses,
        "errors": errors,
    }


def replays(rank: int, folder: Path) -> Any:
    """A run of three steps as its folder remembers it, and each step replayed from there, once under other rules.

    Checkpoints: none before step 1 (the initial weights), one before step 2, none before step 3 (step 2 is done again).
    """
    run_dir, envs = folder / "run", {name: EnvironmentConfig(temperature=t) for name, t in TEMPERATURES.items()}
    config = RunConfig(model=ModelConfig(path=str(folder / "model")), environments=envs, learner=small_config())
    run_dir.mkdir()
    ledger, journal, learner = Ledger(run_dir / "ledger.sqlite"), GroupJournal(run_dir / "journal"), make_learner(config)
    recorded = []
    for step in range(1, 4):
        batch = []
        for each in random_groups(3, vocab=VOCAB, seed=step, version=step - 1):
            ticket = ledger.draw(each.task, ticket_count(ledger))
            batch.append(replace(each, id=group_id(ticket)))
            journal.append(batch[-1])
            ledger.ready(batch[-1].id)
        learner.accumulate(batch)
        recorded.append(dict(learner.apply().metrics))
        ledger.train([g.id for g in batch], step)
        if step == 1:
            learner.save(run_dir / "checkpoints")
    journal.close()

    def again(step: int, rules: RunConfig) -> list[tuple[str, float | None, float | None]]:
        source = replay.source_of(run_dir, step)
        batches = source.batches(run_dir, step)
        weights = replay.weights_before(config, source, batches, folder / f"before-{step}")
        return [
            (f.name, f.recorded, f.recomputed)
            for f in replay.compare(recorded[step - 1], replay.replay(rules, weights, step, batches[step]))
        ]

    masked = replace(config, learner=small_config(importance={"rule": "icepop"}))
    answers = {"same": [again(step, config) for step in (1, 2, 3)], "icepop": again(2, masked)}
    for path in (run_dir / "journal").iterdir():
        path.unlink()
    try:
        again(2, config)
    except replay.CannotReplay as refusal:
        answers["pruned"] = str(refusal)
    return answers


def ticket_count(ledger: Ledger) -> int:
    return sum(counts["position"] for counts in ledger.counts().values())


def bandit(rank: int, folder: Path, *, count: int) -> Any:
    """Sample three tokens from the model itself after a fixed prompt; the reward is the share of token 7. Rewards of each step."""
    learner = make(folder, learning_rate=2e-3, importance=ImportanceConfig())
    rng = torch.Generator().manual_seed(0)
    prompt, rewards, drops = [1, 2, 3], [], []
    for step in range(count):
        ids, logprobs = torch.tensor([prompt]).repeat(32, 1), torch.empty(32, 0)
        for _ in range(3):
            with torch.no_grad():
                distribution = learner.model.logits(learner.model(ids.to(learner.device))[:, -1]).log_softmax(-1).cpu()
            token = torch.multinomial(distribution.exp(), 1, generator=rng)
            ids, logprobs = torch.cat([ids, token], 1), torch.cat([logprobs, distribution.gather(1, token)], 1)
        rows = list(zip(ids[:, len(prompt) :].tolist(), logprobs.tolist(), strict=True))
        members = [
            rollout(completion(prompt, sampled, own, step), reward=sampled.count(7) / 3, key=str(member))
            for member, (sampled, own) in enumerate(rows)
        ]
        groups = [group(*members[i : i + 8]) for i in range(0, 32, 8)]
        rewards.append(float(np.mean([r.verdict.reward for g in groups for r in g.rollouts])))
        metrics = learner.accumulate(groups)
        drops.append(metrics["env/math/masked_share"])
        learner.apply()
    return {"rewards": rewards, "masked": drops, "mtp": metrics["learner/mtp_loss"]}


def refusals(rank: int, folder: Path) -> Any:
    """What the learner says to tokens that are too old or too new, and to calls in the wrong order."""
    learner = make(folder, max_staleness=1)
    learner.version = 5
    said = {}

    def attempt(name: str, groups: list[Group]) -> None:
        try:
            learner.accumulate(groups)
        except (StalenessError, ValueError) as error:
            said[name] = f"{type(error).__name__}: {error}"

    attempt("old", random_groups(2, vocab=VOCAB, seed=0, version=3))
    attempt("new", random_groups(2, vocab=VOCAB, seed=0, version=6))
    attempt("empty", [])
    metrics = learner.accumulate(random_groups(2, vocab=VOCAB, seed=0, version=4))
    for name, call in (("twice", lambda: learner.accumulate([])), ("save", lambda: learner.save(folder / "never"))):
        try:
            call()
        except RuntimeError as error:
            said[name] = str(error)
    return {"said": said, "staleness": metrics["learner/staleness_max"]}


def bad_steps(rank: int, folder: Path, *, dtype: str = "float32", **changes: Any) -> Any:
    """A gradient that is not finite on one rank, then one far too large, between good steps; beside a learner without either."""
    changes |= {"dtype": getattr(torch, dtype)}
    learner, undisturbed = make(folder, **changes), make(folder, **changes)
    place = folder / f"spike-{dtype}-{learner.config.zero_stage}-{learner.world_size}"
    good = [random_groups(2, vocab=VOCAB, seed=step, version=step) for step in range(ENOUGH + 1)]

    def take(learner: Learner, groups: list[Group]) -> StepStats:
        learner.accumulate(groups)
        return learner.apply()

    def disturbed(part: str, factor: float) -> StepStats:
        parameter = next(p for n, p in learner.model.named_parameters() if p.requires_grad and n.startswith(part))
        handle = parameter.register_hook(lambda gradient: gradient * factor if rank == learner.world_size - 1 else gradient)
        try:
            return take(learner, good[learner.version])
        finally:
            handle.remove()

    said, spikes = [], []
    for step, groups in enumerate(good):
        if step in (0, 2):
            said += [disturbed(part, float("nan")).skipped for part in ("lm", "mtp")]
        if step == ENOUGH:
            spikes.append(disturbed("lm", 1e6).skipped)
            found = learner.save(place)
            learner = make(folder, **changes)
            learner.load(found)
            spikes.append(disturbed("lm", 1e6).skipped)
        assert take(learner, groups).skipped == ""
        take(undisturbed, groups)
    mine, theirs = weights(learner), weights(undisturbed)
    return {
        "said": said, "spikes": spikes, "versions": [learner.version, undisturbed.version],
        "equal": all(torch.equal(mine[name], tensor) for name, tensor in theirs.items()),
    }  # fmt: skip


def nothing(rank: int, folder: Path) -> Any:
    """A step whose rollouts are all too stale for their tokens to train, and one after it."""
    learner = make(folder, train_staleness=0, max_staleness=1)
    learner.version = 1
    metrics = learner.accumulate(random_groups(2, vocab=VOCAB, seed=0, version=0))
    stats = learner.apply()
    learner.accumulate(random_groups(2, vocab=VOCAB, seed=0, version=2))
    return {"metrics": metrics, "norm": stats.metrics["learner/grad_norm"], "next": learner.apply().metrics}


def agreement(rank: int, folder: Path, **changes: Any) -> Any:
    """The agreement between the halves of a step, on completions whose logprobs are the model's own and on ones 0.5 nats off."""
    learner = make(folder, **changes)
    model = small_model(folder)
    rng = np.random.default_rng(0)
    right, wrong = [], []
    for length in (3, 17, 40):
        ids = rng.integers(0, VOCAB, length + 6)
        with torch.no_grad():
            logprobs = model.logits(model(torch.from_numpy(ids[None, :-1]))).log_softmax(-1)[0]
        own = logprobs[np.arange(length - 1, length + 5), ids[length:]].numpy()
        right.append(completion(ids[:length], ids[length:], own.tolist()))
        wrong.append(completion(ids[:length], ids[length:], (own + 0.5).tolist()))
    learner.accumulate(random_groups(2, vocab=VOCAB, seed=0))
    good, bad = learner.agreement(right), learner.agreement(wrong)
    norm = learner.apply().metrics["learner/grad_norm"]
    undisturbed = make(folder, **changes)
    undisturbed.accumulate(random_groups(2, vocab=VOCAB, seed=0))
    return {
        "good": [good.mean, good.max, good.num_tokens],
        "bad": bad.mean,
        "norms": [norm, undisturbed.apply().metrics["learner/grad_norm"]],
    }


if __name__ == "__main__":
    rank, num_ranks, port, folder, plan, out = sys.argv[1:]
    torch.set_num_threads(1)
    connect(rank=int(rank), world_size=int(num_ranks), address="127.0.0.1", port=int(port), timeout_s=60)
    answers = {name: globals()[scenario](int(rank), Path(folder), **settings) for name, scenario, settings in json.loads(plan)}
    Path(out).write_text(json.dumps(answers))
    dist.destroy_process_group()
