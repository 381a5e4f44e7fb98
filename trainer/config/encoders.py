"""Registry of prompt encoders: settings, defaults, checks and builder of each. Imports no torch.

A builder is a function ``(EncoderInputs) -> PromptEncoder`` (see ``trainer/prompts/encoders.py``),
or its import path, which is imported only when the encoder is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any


def _no_problems(prompt: Any) -> Iterator[str]:
    yield from ()


@dataclass(frozen=True, kw_only=True)
class EncoderEntry:
    """One encoder of one method. The first entry of a method is its default encoder.

    Attributes:
        build: the builder, or its import path ``MODULE:NAME``.
        settings: settings of a prompt that this encoder reads and not every encoder does.
        relative_learning_rate: default learning rate, as a share of the root mean square of the
            initial prompt per update. None: the default learning rate is absolute.
        trains_values: the parameters are the values of the prompt itself, as ``optimizer: muon``
            requires.
        trains_prefix: the prompt is keys and values of every layer instead of virtual tokens.
        searches_init: ``init: auto`` and ``search`` choose initial tokens by their loss; otherwise
            they draw tokens.
        problems: yields the problems of a prompt with this encoder: ``SETTING: problem; remedy``.
    """

    method: str
    name: str
    build: str | Callable[[Any], Any]
    settings: frozenset[str] = frozenset()
    relative_learning_rate: float | None = None
    trains_values: bool = False
    trains_prefix: bool = False
    searches_init: bool = True
    problems: Callable[[Any], Iterator[str]] = _no_problems

    def load_builder(self) -> Callable[[Any], Any]:
        if callable(self.build):
            return self.build
        module, _, name = self.build.partition(":")
        builder: Callable[[Any], Any] = getattr(import_module(module), name)
        return builder


_ENTRIES: dict[tuple[str, str], EncoderEntry] = {}


def register_encoder(entry: EncoderEntry) -> None:
    """Make an encoder available as ``method: METHOD`` with ``encoder: NAME``."""
    _ENTRIES[entry.method, entry.name] = entry


def find_encoder(method: Any, name: Any) -> EncoderEntry | None:
    """Return an entry, or None. Without a name: the method's default encoder."""
    entries = [entry for entry in _ENTRIES.values() if entry.method == (method or "prompt_tuning")]
    return next((entry for entry in entries if name in (None, entry.name)), None)


def encoder_names(method: str | None = None) -> list[str]:
    """Names of the encoders of a method; of all methods by default."""
    return list(dict.fromkeys(n for m, n in _ENTRIES if method in (None, m)))


def methods_of(name: str) -> list[str]:
    return [method for method, encoder in _ENTRIES if encoder == name]


def encoders_with(setting: str) -> list[str]:
    """Names of the encoders that read a setting."""
    return list(dict.fromkeys(e.name for e in _ENTRIES.values() if setting in e.settings))


def encoder_settings() -> set[str]:
    """Settings of a prompt that not every encoder reads."""
    return {setting for entry in _ENTRIES.values() for setting in entry.settings}


def _text_problems(prompt: Any) -> Iterator[str]:
    if prompt.init.text is None:
        yield "init: encoder text reads a text; use init: {text: ...}, or another encoder"


def _low_rank_problems(prompt: Any) -> Iterator[str]:
    if prompt.share is None:
        yield (
            "share: is missing; encoder low_rank trains a prompt that all prompts with the same "
            "share have in common"
        )


_ENCODERS = "trainer.prompts.encoders"
_EXTENDED = "trainer.prompts.extended"
_SIZE = frozenset({"encoder_hidden_size"})

for _entry in (
    EncoderEntry(
        method="prompt_tuning",
        name="embedding",
        build=f"{_ENCODERS}:build_embedding",
        relative_learning_rate=0.1,
        trains_values=True,
    ),
    EncoderEntry(
        method="prompt_tuning",
        name="low_rank",
        build=f"{_EXTENDED}.low_rank:build",
        settings=frozenset({"share", "rank"}),
        problems=_low_rank_problems,
    ),
    EncoderEntry(
        method="p_tuning",
        name="mlp",
        build=f"{_ENCODERS}:build_mlp",
        settings=_SIZE,
        relative_learning_rate=0.2,
    ),
    EncoderEntry(
        method="p_tuning",
        name="lstm",
        build=f"{_EXTENDED}.lstm:build",
        settings=_SIZE,
        searches_init=False,
    ),
    EncoderEntry(
        method="p_tuning",
        name="residual",
        build=f"{_EXTENDED}.residual:build",
        settings=_SIZE | {"residual_mlp"},
        relative_learning_rate=0.1,
    ),
    EncoderEntry(
        method="p_tuning",
        name="text",
        build="trainer.prompts.text_encoder:build",
        settings=_SIZE | {"share"},
        problems=_text_problems,
    ),
    EncoderEntry(
        method="prefix_tuning",
        name="embedding",
        build=f"{_ENCODERS}:build_embedding",
        trains_prefix=True,
        relative_learning_rate=0.1,  # of all layers together
        trains_values=True,
    ),
    EncoderEntry(
        method="prefix_tuning",
        name="mlp",
        build=f"{_EXTENDED}.prefix_mlp:build",
        trains_prefix=True,
        settings=_SIZE,
        relative_learning_rate=0.1,
    ),
):
    register_encoder(_entry)
