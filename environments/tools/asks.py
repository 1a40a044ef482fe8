"""What may be asked at the desk: a seeded shop, an ask about it, how to serve it, and what this leads to.

Each kind is one function `(rng, world) -> Ask`. Ids are drawn at random from four-digit numbers and values from three-digit ones:
whoever does not look them up cannot know them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

NAMES = ("Ana", "Bob", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivan", "Jo", "Kim", "Leo", "Mia", "Nils", "Olga", "Pia")
CITIES = ("Rome", "Oslo", "Bern", "Lima", "Kyiv", "Cairo", "Delhi", "Tokyo")
ITEMS = ("lamp", "cup", "pen", "desk", "book", "ball", "ring", "hat", "vase", "rope", "soap", "tent")
NUM_CUSTOMERS, NUM_ITEMS, MAX_ORDERS = 6, 6, 3

Call = dict[str, Any]
World = dict[str, list[list[Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One thing to do or to find out. Calls are {"thought", "name", "arguments"}; everything is JSON."""

    text: str
    plan: list[Call]
    """How somebody who knows no id serves it: each call needs only the ask and the results of the calls before."""
    goal: list[Call] = field(default_factory=list)
    """The calls among them that change the shop, in order. Empty for a question."""
    answer: str | None = None
    """What a question's answer must be; None when the state decides alone."""
    found: str = ""
    """What the last look-up shows of a question's answer; the last thought of an oracle that shows its working."""


def call(thought: str, tool: str, /, **arguments: Any) -> Call:
    return {"thought": thought, "name": tool, "arguments": arguments}


def make_world(rng: random.Random) -> World:
    """A shop in which every name is unique, every customer has an open order or more, and no two things share an id."""
    ids = iter(rng.sample(range(1000, 10_000), NUM_CUSTOMERS + NUM_ITEMS + NUM_CUSTOMERS * MAX_ORDERS))
    points = rng.sample(range(100, 1000), NUM_CUSTOMERS)  # distinct, so that a neighbour's value is a wrong answer
    stock = rng.sample(range(100, 1000), NUM_ITEMS)
    names, items = rng.sample(NAMES, NUM_CUSTOMERS), rng.sample(ITEMS, NUM_ITEMS)
    world: World = {
        "customers": [[next(ids), name, rng.choice(CITIES), p] for name, p in zip(names, points, strict=True)],
        "items": [[next(ids), item, s, rng.randint(1, 99)] for item, s in zip(items, stock, strict=True)],
        "orders": [],
    }
    for customer, *_ in world["customers"]:
        for item in rng.sample(items, rng.randint(1, MAX_ORDERS)):
            world["orders"].append([next(ids), customer, item, "open"])
    return world


def ask_stock(rng: random.Random, world: World) -> Ask:
    _, item, stock, _ = rng.choice(world["items"])
    text = rng.choice((f"What is the stock of {item}?", f"Tell me the stock of {item}."))
    return Ask(text=text, plan=[call(f"item {item}", "item", name=item)], answer=str(stock), found=f"stock {stock}")


def ask_points(rng: random.Random, world: World) -> Ask:
    customer, name, _, points = rng.choice(world["customers"])
    text = rng.choice((f"What are the points of {name}?", f"Tell me the points of {name}."))
    look = call(f"customer {customer}", "profile", customer=customer)
    return Ask(text=text, plan=[_find(name), look], answer=str(points), found=f"points {points}")


def ask_order(rng: random.Random, world: World) -> Ask:
    customer, name, order, item = _pick_order(rng, world)
    text = rng.choice((f"What is the {item} order of {name}?", f"Tell me the {item} order of {name}."))
    return Ask(text=text, plan=[_find(name), _look(customer)], answer=str(order), found=f"the {item} {order}")


def ask_move(rng: random.Random, world: World) -> Ask:
    customer, name, city, _ = rng.choice(world["customers"])
    new = rng.choice([c for c in CITIES if c != city])
    act = call(f"customer {customer}", "move", customer=customer, city=new)
    return Ask(text=rng.choice((f"Move {name} to {new}.", f"Change the city of {name} to {new}.")), plan=[_find(name), act], goal=[act])


def ask_restock(rng: random.Random, world: World) -> Ask:
    ident, item, stock, _ = rng.choice(world["items"])
    new = rng.choice([n for n in range(100, 1000) if n != stock])
    act = call(f"item {ident}", "restock", item=ident, stock=new)
    text = rng.choice((f"Set the stock of {item} to {new}.", f"Change the stock of {item} to {new}."))
    return Ask(text=text, plan=[call(f"item {item}", "item", name=item), act], goal=[act])


def ask_refund(rng: random.Random, world: World) -> Ask:
    return _ask_settle(rng, world, "refund")


def ask_cancel(rng: random.Random, world: World) -> Ask:
    return _ask_settle(rng, world, "cancel")


def _ask_settle(rng: random.Random, world: World, verb: str) -> Ask:
    customer, name, order, item = _pick_order(rng, world)
    act = call(f"the {item} {order}", verb, order=order)
    text = rng.choice((f"{verb.capitalize()} the {item} of {name}.", f"{verb.capitalize()} the {item} order of {name}."))
    return Ask(text=text, plan=[_find(name), _look(customer), act], goal=[act])


def _find(name: str) -> Call:
    return call(f"find {name}", "find", name=name)


def _look(customer: int) -> Call:
    return call(f"customer {customer}", "orders", customer=customer)


def _pick_order(rng: random.Random, world: World) -> tuple[int, str, int, str]:
    order, customer, item, _ = rng.choice(world["orders"])
    name = next(row[1] for row in world["customers"] if row[0] == customer)
    return customer, name, order, item


KINDS: Mapping[str, Callable[[random.Random, World], Ask]] = {
    "stock": ask_stock,  # item -> answer
    "points": ask_points,  # find -> profile -> answer
    "order": ask_order,  # find -> orders -> answer
    "move": ask_move,  # find -> move
    "restock": ask_restock,  # item -> restock
    "refund": ask_refund,  # find -> orders -> refund
    "cancel": ask_cancel,  # find -> orders -> cancel
}
"""Kinds of ask; the kind is the task's difficulty bucket."""
