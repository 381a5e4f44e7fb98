"""``sweep:`` of a prompt: lists of settings, one prompt per combination. Imports no torch.

    sweep: {learning_rate: [0.003, 0.03], num_virtual_tokens: [5, 20, 50]}    # all 6
    sweep: {random: 4, learning_rate: [0.003, 0.03], seed: [0, 1, 2, 3, 4]}   # 4 of 10, drawn

Sweeps are expanded before the settings are checked, so all later code handles plain prompts only.
``YamlSource.moved`` maps each setting of an expanded prompt to its place in the run file.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from trainer.config.aliases import find_alias
from trainer.config.prompt import Prompt
from trainer.config.yaml_source import SettingPath, YamlSource, dotted
from trainer.runtime.errors import did_you_mean

#: Default of ``search.max_prompts``.
MAX_PROMPTS = 100
#: Maximum length of a prompt's name, and of the part of it that describes one text value.
MAX_NAME, MAX_WORD = 80, 24
#: Abbreviations of settings in names; empty: only the value is used. Others are not abbreviated.
SHORT = {
    "learning_rate": "lr",
    "relative_learning_rate": "rel_lr",
    "num_virtual_tokens": "len",
    "weight_decay": "wd",
    "warmup_ratio": "warmup",
    "max_grad_norm": "clip",
    "encoder_hidden_size": "hidden",
    "task": "",
    "method": "",
    "encoder": "",
    "init": "",
}
#: Keys of a sweep that are not settings.
HOW = {
    "grid": "the lists; {grid: {seed: [0, 1]}} is the same as {seed: [0, 1]}",
    "random": "make only this many of the combinations, drawn at random",
}
#: Settings of a prompt that have no list of values.
NOT_SWEPT = ("name", "sweep")


@dataclass
class Expansion:
    """A run file whose sweeps are expanded.

    Attributes:
        names: name of a prompt with a sweep -> names of the prompts that it expands to.
        problems: mistakes in sweeps. If there are any, ``source`` has each prompt once, without its
            sweep.
    """

    source: YamlSource
    names: dict[str, list[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def expand(source: YamlSource) -> Expansion:
    """Replace each prompt that has a sweep by one prompt per combination."""
    written = source.data.get("prompts")
    if not isinstance(written, list):
        return Expansion(source)
    sweeps = [_Sweep(i, item, source) for i, item in enumerate(written)]
    problems = [problem for sweep in sweeps for problem in sweep.problems]
    if not problems:
        problems = list(_too_many(sweeps, source))
    done = Expansion(source, problems=problems)
    prompts: list[Any] = []
    moved: dict[SettingPath, SettingPath] = {}
    for sweep in sweeps:
        made = [sweep.bare] if problems else list(sweep.prompts())
        for prompt in made:
            here, there = ("prompts", len(prompts)), ("prompts", sweep.index)
            moved[here] = there
            for key in sweep.lists:
                moved[(*here, key)] = (*there, *sweep.inside, key)
            prompts.append(prompt)
        if sweep.lists and not problems:
            done.names[str(sweep.bare["name"])] = [prompt["name"] for prompt in made]
            done.problems += sweep.long_names(made)
    done.source = replace(source, data=source.data | {"prompts": prompts}, moved=moved)
    return done


def _too_many(sweeps: Sequence[_Sweep], source: YamlSource) -> Iterator[str]:
    search, most = source.data.get("search"), MAX_PROMPTS
    given = search.get("max_prompts") if isinstance(search, dict) else None
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        most = given
    total = sum(sweep.count for sweep in sweeps)
    largest = max(sweeps, key=lambda sweep: sweep.count, default=None)
    if largest is not None and largest.lists and total > most:
        others = "" if total == largest.count else f", {total:,} with those of the other prompts"
        yield largest.problem(
            f"makes {largest.count:,} prompts{others}, but search.max_prompts is {most}; "
            "shorten its lists, draw some with random: N, or raise search.max_prompts"
        )


class _Sweep:
    """One prompt of the run file and its sweep.

    Attributes:
        bare: the prompt without its sweep.
        lists: values of each swept setting; empty if there is no sweep or it is invalid.
        inside: path of the lists within the prompt.
        count: number of prompts that the sweep makes.
    """

    def __init__(self, index: int, item: Any, source: YamlSource) -> None:
        self.index, self._source = index, source
        self.bare, self.count, self.problems = item, 1, list[str]()
        self.lists: dict[str, list[Any]] = {}
        self.inside: SettingPath = ("sweep",)
        self._seed = 0
        if not isinstance(item, dict) or item.get("sweep") is None:
            return
        self.bare = {key: value for key, value in item.items() if key != "sweep"}
        sweep = item["sweep"]
        if not isinstance(sweep, dict):
            self.problems.append(self.problem(f"{sweep!r} must be a mapping of settings to lists"))
        elif isinstance(item.get("name"), str):  # otherwise reported when the prompt is checked
            self._read(sweep)

    def _read(self, sweep: Mapping[str, Any]) -> None:
        lists = {key: value for key, value in sweep.items() if key not in HOW}
        if "grid" in sweep:
            if lists or not isinstance(sweep["grid"], dict):
                self.problems.append(
                    self.problem("grid: holds all settings with their lists; none stands beside it")
                )
                return
            lists, self.inside = dict(sweep["grid"]), ("sweep", "grid")
        if not lists:
            self.problems.append(self.problem("is empty; give lists of settings, or remove it"))
        self.problems += [
            problem_text for key in lists for problem_text in self._bad(key, lists[key])
        ]
        if self.problems:
            return
        combinations = math.prod(len(values) for values in lists.values())
        drawn = sweep.get("random")
        if drawn is not None:
            if not isinstance(drawn, int) or isinstance(drawn, bool) or drawn < 1:
                self.problems.append(
                    self.problem(f"{drawn!r} must be a positive integer", "random")
                )
                return
            if drawn > combinations:
                only = f"{drawn}, but there are only {combinations} combinations; "
                self.problems.append(self.problem(only + "remove it to take them all", "random"))
                return
        training = self._source.data.get("training")
        self._seed = training.get("seed", 0) if isinstance(training, dict) else 0
        self.lists, self.count = lists, combinations if drawn is None else drawn

    def _bad(self, key: str, values: Any) -> Iterator[str]:
        known = [name for name in Prompt.model_fields if name not in NOT_SWEPT]
        where = (*self.inside[1:], key)
        if key not in known:
            alias = find_alias(f"prompts.{key}")
            hint = did_you_mean(str(key), known)
            text = f"no setting to sweep{hint}; known: {', '.join(known)}"
            yield self.problem(alias.text if alias else text, *where)
        elif override := self._overridden(key):
            yield (
                f"{override}: prompts[{self.index}].{key}: has no effect, because the sweep has "
                f"values for it; override prompts[{self.index}].{dotted((*self.inside, key))} "
                "with a list"
            )
        elif not isinstance(values, list) or not values:
            yield self.problem(f"{values!r} must be a list of values, as [a, b]", *where)
        else:
            texts = [json.dumps(value, sort_keys=True, default=str) for value in values]
            if len(set(texts)) < len(texts):
                twice = next(text for text in texts if texts.count(text) > 1)
                yield self.problem(f"has {twice} more than once; remove one", *where)

    def _overridden(self, key: str) -> str | None:
        """Return the override that sets a single value of a swept setting."""
        path: SettingPath = ("prompts", self.index, key)
        given = [written for written in self._source.overrides if written[:3] == path]
        return self._source.where(given[-1]) if given else None

    def problem(self, text: str, *within: str | int) -> str:
        path: SettingPath = ("prompts", self.index, "sweep", *within)
        return f"{self._source.where(path)}: {dotted(path)}: {text}"

    def prompts(self) -> Iterator[Any]:
        """Yield one prompt per combination; the last list varies fastest, also with ``random``."""
        if not self.lists:
            yield self.bare
            return
        labels = {key: _labels(key, values) for key, values in self.lists.items()}
        sizes = [range(len(values)) for values in self.lists.values()]
        total = math.prod(len(size) for size in sizes)
        wanted: Sequence[int] = range(total)
        if self.count < total:
            # A text as seed gives the same draw on every machine and version.
            draw = random.Random(f"{self._seed} {self.bare['name']}")
            wanted = sorted(draw.sample(range(total), self.count))
        for places in _combinations(wanted, [len(size) for size in sizes]):
            chosen = dict(zip(self.lists, places, strict=True))
            words = [labels[key][i] for key, i in chosen.items() if len(self.lists[key]) > 1]
            name = "-".join([self.bare["name"], *words])
            settings = {key: self.lists[key][i] for key, i in chosen.items()}
            yield {**self.bare, **settings, "name": name}

    def long_names(self, made: Sequence[Mapping[str, Any]]) -> Iterator[str]:
        longest = max((str(prompt["name"]) for prompt in made), key=len)
        if len(longest) > MAX_NAME:
            yield self.problem(
                f"makes the name {longest!r}, of {len(longest)} characters; at most {MAX_NAME} "
                "fit: shorten the prompt's name, or sweep fewer settings at once"
            )


def _combinations(wanted: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """Convert the numbers of combinations to an index into each list; the last varies fastest."""
    for number in wanted:
        places = []
        for size in reversed(sizes):
            number, place = divmod(number, size)
            places.append(place)
        yield places[::-1]


def _labels(key: str, values: Sequence[Any]) -> list[str]:
    """Return a label for each value of a list: short, distinct; numbers sort by value."""
    short = SHORT.get(key, key)
    numbers = [_number(value) for value in values]
    shown = [text for text in numbers if text is not None]
    width = max((len(text.partition(".")[0]) for text in shown), default=0)
    labels = []
    for value, text in zip(values, numbers, strict=True):
        if text is not None:
            integer, point, rest = text.partition(".")
            labels.append(f"{short}{integer.zfill(width)}{point}{rest}")
        else:
            labels.append("_".join(part for part in (short, _word(value)) if part))
    if len(set(labels)) < len(labels):
        width = len(str(len(labels)))
        labels = [f"{short or key}{i:0{width}d}" for i in range(1, len(labels) + 1)]
    return labels


def _number(value: Any) -> str | None:
    """Format a number without exponent, so that names sort by value; None for other values.

    A number may be given as text.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    if not number.is_finite():
        return None
    text = format(number.normalize(), "f")
    return text if len(text) <= 12 else f"{float(value):g}"


def _word(value: Any) -> str:
    """Format a text, null, flag or mapping with the characters that names allow."""
    if isinstance(value, dict):
        value = " ".join(str(part) for pair in value.items() for part in pair if part is not True)
    text = {None: "none", True: "true", False: "false"}.get(value) if _plain(value) else None
    text = re.sub(r"[^A-Za-z0-9._]+", "-", str(value) if text is None else text)
    return text[:MAX_WORD].strip("-.") or "text"


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)
