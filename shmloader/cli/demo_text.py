"""Texts for the demo: an instruction and its answer, from a small seeded grammar.

Nothing in them is from anywhere; sums and conversions are right, the rest is only plausible.
"""

from __future__ import annotations

import random
from collections.abc import Callable

MIN_CHARACTERS, MAX_CHARACTERS = 20, 1500

_TOWNS = ("Alder Bay", "Brookmere", "Carsholt", "Dunwick", "Eastlow", "Fenby", "Grünau", "Hollin", "Ízeda", "Kestrel")
_GOODS = ("apples", "bolts", "candles", "envelopes", "lanterns", "notebooks", "pears", "ropes", "tiles", "umbrellas")
_DISHES = {
    "lentil soup": ("lentils", "carrots", "an onion", "cumin", "vegetable stock"),
    "a potato salad": ("potatoes", "mustard", "chives", "vinegar", "a cucumber"),
    "flatbread": ("flour", "water", "olive oil", "salt", "sesame"),
    "a mushroom omelette": ("eggs", "mushrooms", "butter", "parsley", "black pepper"),
    "apple crumble": ("apples", "oats", "butter", "brown sugar", "cinnamon"),
    "crème caramel": ("milk", "eggs", "sugar", "vanilla", "a pinch of salt"),
}
_PLANTS = ("a fern", "basil", "a lemon tree", "lavender", "a tomato plant", "an orchid", "rosemary", "ivy")
_TOOLS = ("a sorted list", "a hash table", "a queue", "a binary heap", "a linked list", "a bitmap", "a trie")
_NEEDS = (
    "the smallest item is asked for again and again",
    "items arrive in order and leave in the same order",
    "every word that starts with a given prefix is wanted",
    "there are few distinct keys and many look-ups",
    "one bit per sample says whether it has been read",
    "items are inserted in the middle and hardly ever searched for",
)
_WEATHER = ("fog in the valleys", "light rain", "a dry wind from the east", "broken cloud", "sleet", "clear skies")
_OPENERS = (
    "In short,",
    "As a rule,",
    "Most of the time,",
    "For what it is worth,",
    "In practice,",
    "Strictly speaking,",
)
_CHECKS = (
    "check the result before you go on",
    "write down what changed",
    "take the smaller one if in doubt",
    "leave a little room for error",
    "ask somebody who has done it before",
    "do the slow part first",
)


def write_text(rng: random.Random) -> str:
    """One instruction with its answer, 20 to 1500 characters; many are short and a few are long."""
    question, answer = rng.choice(_TOPICS)(rng)
    sentences = [answer]
    wanted = min(MAX_CHARACTERS, int(rng.lognormvariate(5.6, 0.9)))
    length = len(question) + len(answer)
    while length < wanted:
        sentence = _remark(rng)
        length += len(sentence) + 1
        sentences.append(sentence)
    text = f"{question}\n\n{' '.join(sentences)}"
    return text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rsplit(" ", 1)[0]


def _sum(rng: random.Random) -> tuple[str, str]:
    first, second, goods = rng.randint(2, 999), rng.randint(2, 999), rng.choice(_GOODS)
    town = rng.choice(_TOWNS)
    return (
        f"A shop in {town} has {first} {goods} and buys {second} more. How many {goods} are there now?",
        f"{first} + {second} = {first + second}, so the shop has {first + second} {goods}.",
    )


def _conversion(rng: random.Random) -> tuple[str, str]:
    celsius = rng.randint(-30, 45)
    fahrenheit = celsius * 9 / 5 + 32
    return f"{celsius} °C in °F?", f"{celsius} * 9/5 + 32 = {fahrenheit:g} °F."


def _recipe(rng: random.Random) -> tuple[str, str]:
    dish, ingredients = rng.choice(sorted(_DISHES.items()))
    chosen = rng.sample(ingredients, rng.randint(2, len(ingredients)))
    minutes = rng.randrange(10, 65, 5)
    return (
        f"How do I make {dish} for {rng.randint(1, 8)}?",
        f"Prepare {', '.join(chosen[:-1])} and {chosen[-1]}; the whole takes about {minutes} minutes.",
    )


def _plant(rng: random.Random) -> tuple[str, str]:
    plant, days = rng.choice(_PLANTS), rng.randint(2, 14)
    light = rng.choice(("full sun", "half shade", "a bright window", "a cool room"))
    return (
        f"Give advice on keeping {plant} alive indoors.",
        f"Water it every {days} days, less in winter, and keep it in {light}.",
    )


def _structure(rng: random.Random) -> tuple[str, str]:
    tool, other = rng.sample(_TOOLS, 2)
    return (
        f"Would you use {tool} or {other} when {rng.choice(_NEEDS)}?",
        f"I would start with {tool}, measure, and change to {other} only if the figures ask for it.",
    )


def _forecast(rng: random.Random) -> tuple[str, str]:
    town, first, second = rng.choice(_TOWNS), *rng.sample(_WEATHER, 2)
    low = rng.randint(-5, 15)
    return (
        f"Summarise tomorrow's weather in {town}.",
        f"{first.capitalize()} in the morning, {second} later; {low} to {low + rng.randint(2, 12)} °C.",
    )


_TOPICS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    _sum,
    _conversion,
    _recipe,
    _plant,
    _structure,
    _forecast,
)


def _remark(rng: random.Random) -> str:
    """A sentence that lengthens any answer."""
    opener, check = rng.choice(_OPENERS), rng.choice(_CHECKS)
    kind = rng.randrange(4)
    if kind == 0:
        return f"{opener} {check}, and {rng.choice(_CHECKS)}."
    if kind == 1:
        return f"People in {rng.choice(_TOWNS)} say that {rng.randint(2, 30)} minutes of care save an hour: {check}."
    if kind == 2:
        return f"Step {rng.randint(1, 9)} is easily forgotten; {check}."
    pair = f"{rng.choice(_TOOLS)} and a box of {rng.choice(_GOODS)}"
    return f"{opener} {pair} have this in common: {check} when {rng.choice(_NEEDS)}."
