"""Which host an episode goes to: environments of somebody else have one to themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

from environments.registry import resolve
from rollout_workers.hosts import Hosts, HostSet


def test_an_episode_goes_to_its_environments_own_host_or_to_the_shared_one_whose_turn_it_is() -> None:
    hosts = HostSet(shared=("a", "b"), own={"plugin": "c"})
    assert hosts.all == ("a", "b", "c")
    sessions = Hosts(hosts, owner="w0.0")
    tasks = list(islice(resolve("math").tasks("train", 0), 4))
    assert [sessions.session("math", {}, task).host for task in tasks] == ["a", "b", "a", "b"]
    mine = [replace(task, env="plugin") for task in tasks]
    found = [sessions.session("plugin", {}, task) for task in mine]
    assert {s.host for s in found} == {"c"}
    assert len({s.id for s in found}) == 4
