"""What the tests of the report share: made-up runs, plain and odd, and readers of a page."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

from laconic.ledger import Layer, Measurement
from laconic.report import terminal
from laconic.report.tables import PARTS

STEPS = ("prune", "train", "quantize", "train")


def layer(name: str = "fc.weight", **changes: Any) -> Layer:
    counts = [round(1000 * math.exp(-(((index - 20) / 7) ** 2))) for index in range(41)]
    first = Layer(
        name=name,
        shape=(64, 100),
        parameters=6400,
        survivors=6400,
        nonzero=6400,
        bits=32.0,
        representation="float",
        code_bytes=0,
        index_bytes=0,
        table_bytes=0,
        dense_bytes=25_600,
        macs=6400,
        histogram={"low": -0.5, "high": 0.5, "counts": counts},
    )
    return dataclasses.replace(first, **changes)


def squeezed(name: str = "fc.weight") -> Layer:
    return layer(
        name,
        survivors=1600,
        nonzero=1600,
        bits=4.0,
        representation="kmeans 4 bit",
        code_bytes=800,
        index_bytes=500,
        table_bytes=64,
        dense_bytes=0,
    )


def measurement(step: str, layers: tuple[Layer, ...], **changes: Any) -> Measurement:
    parts = {part: sum(getattr(one, part, 0) for one in layers) for part in PARTS}
    parts["dense_bytes"] += 200
    parts["header_bytes"] = 1000
    found = Measurement(
        step=step,
        parameters=sum(one.parameters for one in layers) + 50,
        nonzero=sum(one.nonzero for one in layers) + 50,
        size_bytes=sum(parts.values()),
        nominal_bits=round(sum(one.survivors * one.bits for one in layers)) + 1600,
        macs=6400,
        bit_operations=6_400_000,
        latency_ms=0.25,
        peak_memory_bytes=40_000,
        metrics={"accuracy": 0.95, "loss": 0.2},
        seconds=12.0,
        layers=layers,
        **parts,
    )
    return dataclasses.replace(found, **changes)


def history(steps: int = 3, layers: int = 2, *, seed: int = 0) -> list[Measurement]:
    """Return a run of so many measurements; every second step leaves the size alone."""
    draw = random.Random(seed)
    names = [f"encoder.layer.{index}.attention.self.query.weight" for index in range(layers)]
    found = [measurement("original", tuple(layer(name) for name in names))]
    for step in range(1, steps):
        weights = tuple(squeezed(name) for name in names)
        smaller = tuple(
            dataclasses.replace(one, code_bytes=one.code_bytes // (1 + step // 2))
            for one in weights
        )
        scores = {"accuracy": draw.uniform(0.5, 0.95), "loss": 0.2 + step}
        name = STEPS[(step - 1) % len(STEPS)]
        found.append(measurement(name, smaller, metrics=scores))
    return found


FACTS: dict[str, Any] = {
    "recipe": "steps:\n- prune: {keep: 0.25}\n- train: {epochs: 3}\n",
    "seed": 12345,
    "model_hash": "8eba45",
    "task": {
        "name": "digits",
        "examples": {"train": 1365, "validate": 72, "test": 360},
        "metrics": ["accuracy"],
        "classes": ["zero", "one"],
        "image": None,
        "drawn": None,
    },
    "environment": {"torch": "2.13.0", "gpu": None, "precision": {"dtype": "float32"}},
    "notes": [],
}


ODD: dict[str, tuple[float, ...]] = {
    "one": (0.5,),
    "two": (0.5, 0.25),
    "equal": (2.0,) * 9,
    "zero": (0.0,) * 9,
    "ends at zero": (1.0, 0.5, 0.0),
    "below zero": (1.0, -1.0),
    "not finite": (math.inf, 1.0, math.nan, 0.5),
    "nothing finite": (math.nan,),
    "tiny": (1e-300, 1e-17, 1e-30),
    "huge and level": (-1e20,) * 3,
    "no loss": (),
}


def learned(parts: int = 27) -> Measurement:
    """Return the measurement of a step that trained so many parts, each with its curve."""
    curves = {
        f"encoder.layer.{part}.output.dense": tuple(
            (1 + part) * math.exp(-index / (5 + part)) for index in range(100)
        )
        for part in range(parts)
    }
    return measurement("reconstruct", (layer(),), curves=curves)


def _runs() -> dict[str, tuple[list[Measurement], dict[str, Any]]]:
    untasked = {"metrics": {}, "macs": None, "bit_operations": None}
    untasked |= {"latency_ms": None, "peak_memory_bytes": None}
    plain, long = history(), history(13, 5)
    huge = {"size_bytes": 3 * 10**12, "dense_bytes": 3 * 10**12, "parameters": 10**12}
    nothing = {"low": 0.0, "high": 0.0, "counts": [0] * 41}
    return {
        "two": (history(2), FACTS),
        "five": (history(5), FACTS),
        "twelve steps": (long, FACTS),
        "sixty layers": (history(3, 60), FACTS),
        "one measurement": (plain[:1], FACTS),
        "no task": ([dataclasses.replace(m, **untasked) for m in plain], {**FACTS, "task": None}),
        "no layers": ([dataclasses.replace(m, layers=()) for m in plain], FACTS),
        "no facts": (plain, {}),
        "same accuracy": ([dataclasses.replace(m, metrics={"accuracy": 0.9}) for m in long], FACTS),
        "same size": ([plain[0]] * 4, FACTS),
        "larger": ([plain[-1], plain[0]], FACTS),
        "huge": ([dataclasses.replace(plain[0], **huge), plain[-1]], FACTS),
        "only a loss": ([dataclasses.replace(m, metrics={"loss": 2.0}) for m in plain], FACTS),
        "no number": (
            [dataclasses.replace(m, metrics={"accuracy": math.nan}) for m in plain[:2]]
            + [dataclasses.replace(plain[-1], metrics={"accuracy": math.inf})],
            FACTS,
        ),
        "a metric appears": (
            [dataclasses.replace(plain[0], metrics={}), *plain[1:]],
            FACTS,
        ),
        "layers come and go": ([plain[0], measurement("factorize", (squeezed("new"),))], FACTS),
        "all zero": (
            [
                measurement(
                    "original", (layer(nonzero=0, parameters=0, dense_bytes=0, histogram=nothing),)
                )
            ],
            FACTS,
        ),
        "notes": (plain, {**FACTS, "notes": ["resumed with other threads"]}),
        "many curves": ([plain[0], learned(60)], FACTS),
        "odd curves": ([plain[0], dataclasses.replace(plain[1], curves=ODD)], FACTS),
    }


RUNS = _runs()
VOID = {"meta", "wbr", "link", "br", "img", "hr", "input", "col"}


class Reader(HTMLParser):
    """Follows the tags of a page and keeps its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append(data.strip())


def drawings(html: str) -> list[ElementTree.Element]:
    return [
        ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    ]


def named(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [one for one in root.iter() if name in (one.get("class") or "").split()]


def printed(history_: list[Measurement], facts: dict[str, Any], width: int) -> str:
    from rich.console import Console

    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(terminal(history_, facts))
    return capture.get()
