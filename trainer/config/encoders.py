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


@dataclass(frozen=True)
class PromptWidths:
    """Sizes of a base that determine the number of parameters of an encoder.

    Attributes:
        hidden: of a virtual token.
        keys: of the keys of a layer for one token.
        layers: number of layers.
    """

    hidden: int
    keys: int
    layers: int

    @property
    def keys_and_values(self) -> int:
        """Of all layers, for one token."""
        return 2 * self.layers * self.keys


def _count_values(prompt: Any, widths: PromptWidths) -> int:
    width = widths.keys_and_values if prompt.entry.trains_prefix else widths.hidden
    return int(prompt.num_virtual_tokens) * width


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
            ``auto`` draws tokens, and ``search`` is refused.
        problems: yields the problems of a prompt with this encoder: ``SETTING: problem; remedy``.
        num_parameters: counts the parameters of a prompt's encoder; by default, those of its values
            alone. Of prompts with one ``share``, those of the first.
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
    num_parameters: Callable[[Any, PromptWidths], int] = _count_values

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


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _count_low_rank(prompt: Any, widths: PromptWidths) -> int:
    of_task = prompt.rank * (prompt.num_virtual_tokens + widths.hidden)
    return _count_values(prompt, widths) + int(of_task)


def _count_mlp(prompt: Any, widths: PromptWidths) -> int:
    hidden, inner = widths.hidden, prompt.encoder_hidden_size or widths.hidden
    layers = _linear(hidden, inner) + _linear(inner, inner) + _linear(inner, hidden)
    return _count_values(prompt, widths) + layers


def _count_lstm(prompt: Any, widths: PromptWidths) -> int:
    hidden, inner = widths.hidden, prompt.encoder_hidden_size or widths.hidden
    # Two layers of two directions; each has four gates with two biases.
    gates = 2 * 4 * inner * sum(n + inner + 2 for n in (hidden, 2 * inner))
    head = _linear(2 * inner, 2 * inner) + _linear(2 * inner, hidden)
    return int(_count_values(prompt, widths) + gates + head)


def _count_residual(prompt: Any, widths: PromptWidths) -> int:
    hidden, inner = widths.hidden, prompt.encoder_hidden_size or max(1, widths.hidden // 4)
    mlps = prompt.num_virtual_tokens if prompt.residual_mlp == "separate" else 1
    mlp = _linear(hidden, inner) + _linear(inner, hidden) + 2 * hidden
    return int(_count_values(prompt, widths) + mlps * mlp)


def _count_text(prompt: Any, widths: PromptWidths) -> int:
    hidden, inner = widths.hidden, prompt.encoder_hidden_size or widths.hidden
    layers = 2 * _linear(hidden, inner) + _linear(inner, hidden)
    return int(prompt.num_virtual_tokens * inner + layers)


def _count_prefix_mlp(prompt: Any, widths: PromptWidths) -> int:
    inner = prompt.encoder_hidden_size or widths.hidden
    layers = _linear(widths.keys, inner) + _linear(inner, widths.keys_and_values)
    return int(prompt.num_virtual_tokens * widths.keys + layers)


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
        num_parameters=_count_low_rank,
    ),
    EncoderEntry(
        method="p_tuning",
        name="mlp",
        build=f"{_ENCODERS}:build_mlp",
        settings=_SIZE,
        relative_learning_rate=0.2,
        num_parameters=_count_mlp,
    ),
    EncoderEntry(
        method="p_tuning",
        name="lstm",
        build=f"{_EXTENDED}.lstm:build",
        settings=_SIZE,
        searches_init=False,
        num_parameters=_count_lstm,
    ),
    EncoderEntry(
        method="p_tuning",
        name="residual",
        build=f"{_EXTENDED}.residual:build",
        settings=_SIZE | {"residual_mlp"},
        relative_learning_rate=0.1,
        num_parameters=_count_residual,
    ),
    EncoderEntry(
        method="p_tuning",
        name="text",
        build="trainer.prompts.text_encoder:build",
        settings=_SIZE | {"share"},
        problems=_text_problems,
        num_parameters=_count_text,
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
        num_parameters=_count_prefix_mlp,
    ),
):
    register_encoder(_entry)
