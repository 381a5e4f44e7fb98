"""Prompts: what is trained, and from where."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.config.encoders import (
    EncoderEntry,
    encoder_names,
    encoder_settings,
    encoders_with,
    find_encoder,
    methods_of,
)
from trainer.config.types import (
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    ShareBelowOne,
    is_true,
)
from trainer.runtime.errors import did_you_mean


class Init(Section):
    """Where the virtual tokens start, or, in p_tuning, the input of the encoder that makes them.

    In prefix_tuning: the keys and values that the base makes of the text, the labels or the drawn
    words. What is shorter than num_virtual_tokens is repeated, what is longer is cut. Exactly one
    of the fields is given.
    """

    auto: bool = Field(
        False,
        description="words behind which the rows of the first update fit best: the task's "
        "hand_written prompts, its choices, 16 drawings of frequent words, and 48 that a genetic "
        "search makes of the best of these; encoder lstm: drawn words",
    )
    text: str | None = Field(
        None, min_length=1, description="word embeddings of this text, repeated"
    )
    labels: bool = Field(
        False,
        description="embeddings of the task's choices as rows have them: the first tokens of all "
        "choices, then their second ones and so on, repeated",
    )
    vocab: bool = Field(
        False, description="embeddings of tokens drawn from the 5000 most frequent of the base"
    )
    random: bool = Field(
        False,
        description="normal noise with the root mean square of the embeddings, or keys and values",
    )
    zero: bool = Field(False, description="zeros, for prefix_tuning only")
    from_: PathText | None = Field(
        None,
        alias="from",
        min_length=1,
        description="a trained prompt, of any task and length: its adapter's folder, or the "
        "output_dir of a run of one prompt; p_tuning's encoder starts by making it",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """``init: vocab`` stands for ``{vocab: true}``, and so on."""
        short = ("auto", "vocab", "labels", "random", "zero")
        return {value: True} if value in short else value

    @model_validator(mode="after")
    def _one(self) -> Init:
        texts = [self.text is not None, self.from_ is not None]
        if sum([*texts, self.auto, self.labels, self.vocab, self.random, self.zero]) != 1:
            raise ValueError("give exactly one of auto, text, labels, vocab, random, zero, from")
        return self


#: Of Muon: short runs learn the faster, the less they hold on to.
DEFAULT_MOMENTUM = 0.5
#: Of AdamW. Less than torch's (0.9, 0.999): a prompt's gradients soon are far below its first.
DEFAULT_BETAS = (0.8, 0.99)
#: Where there is nothing to be relative to.
DEFAULT_RATE = 3.0e-3
#: Recipes of the literature: settings that hold where the run file does not say otherwise.
PRESETS: dict[str, dict[str, Any]] = {
    # Lester et al. 2021, arXiv 2104.08691, section 3; Adafactor clips updates by itself.
    "lester": {
        "optimizer": "adafactor",
        "learning_rate": 0.3,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 1.0e-5,
        "max_grad_norm": None,
    },
}


class Prompt(Section):
    """One named, trainable thing: virtual tokens and the encoder that makes them."""

    name: Name
    task: str
    method: Literal["prompt_tuning", "p_tuning", "prefix_tuning"] = Field(
        "prompt_tuning",
        description="prompt_tuning and p_tuning put virtual tokens in front of the text; "
        "prefix_tuning gives every layer keys and values instead",
    )
    encoder: str | None = Field(
        None,
        description="default: mlp for p_tuning, else embedding; residual: a bottleneck MLP beside "
        "trained virtual tokens; text: reads init.text and makes virtual tokens of it; low_rank: "
        "a prompt in common times a low-rank matrix of the task's own",
    )
    share: Name | None = Field(
        None,
        description="encoders text and low_rank: prompts that give the same name train one encoder "
        "together, with one optimizer; of low_rank the prompt in common, which starts as the init "
        "of the first of them says",
    )
    rank: PositiveInt = Field(1, description="encoder low_rank: of the task's own matrix")
    encoder_hidden_size: PositiveInt | None = Field(
        None,
        description="default: the base's hidden size; of residual, its bottleneck: a quarter of it",
    )
    residual_mlp: Literal["shared", "separate"] = Field(
        "shared", description="encoder residual: one MLP for all virtual tokens, or one for each"
    )
    num_virtual_tokens: PositiveInt = 20
    objective: Literal["labels", "distill"] = Field(
        "labels",
        description="distill: learn, in place of the labels, the next-token distributions that the "
        "base has behind the teacher; the rows need no labels",
    )
    teacher: str | None = Field(
        None,
        min_length=1,
        description="objective distill: a long prompt in words, of which the virtual tokens are to "
        "do the work; the base reads it in front of the row's input",
    )
    init: Init = Field(default_factory=lambda: Init(auto=True))
    preset: Literal["lester"] | None = Field(
        None,
        description="lester: Adafactor at 0.3, constant, weight decay 1e-5, no clipping; what the "
        "prompt sets itself holds",
    )
    optimizer: Literal["muon", "adamw", "adafactor", "sgd"] | None = Field(
        None,
        description="default: muon where the virtual tokens, or keys and values, are trained "
        "themselves (encoder embedding), else adamw; muon: momentum made orthogonal, at the rates "
        "of adamw; adafactor: without parameter scaling; states are fp32 in all",
    )
    momentum: ShareBelowOne | None = Field(
        None, description="of muon, default 0.5, and of sgd, default 0"
    )
    learning_rate: PositiveFloat | None = Field(
        None,
        description="default: relative_learning_rate or, where that has no meaning, 3e-3",
    )
    relative_learning_rate: PositiveFloat | None = Field(
        None,
        description="in place of learning_rate: the share of the root mean square of the prompt's "
        "start that one update moves it by, at most, so that one value serves bases of any scale; "
        "of an encoder, that one update of its last layer does; default: 0.1, of p_tuning's mlp "
        "0.05; encoders lstm, text and low_rank, and a start of zeros, have none",
    )
    betas: tuple[ShareBelowOne, ShareBelowOne] | None = Field(
        None,
        description="of adamw, default [0.8, 0.99]: how much of the mean gradient, and of the mean "
        "square, stays at an update",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "linear", description="of the learning rate, after warm-up"
    )
    weight_decay: NonNegativeFloat = 0.0
    weight_decay_to_init: bool = Field(
        False, description="weight decay pulls towards the start instead of zero"
    )
    warmup_ratio: Share = Field(0.03, description="share of the steps")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="null: no clipping")
    ema: ShareBelowOne | None = Field(
        None,
        description="decay of an exponential moving average of the prompt, as 0.99; the average is "
        "what is validated, kept as best and exported",
    )
    dropout: ShareBelowOne = Field(
        0.0, description="share of the prompt's elements set to zero in a training step"
    )
    noise: NonNegativeFloat = Field(
        0.0,
        description="normal noise added to the prompt in a training step, as a share of its root "
        "mean square; smooths the loss around it",
    )
    seed: NonNegativeInt | None = Field(
        None,
        description="of the start, of noise and dropout and, without data_seed, of the order of "
        "rows; default: training.seed",
    )
    data_seed: NonNegativeInt | None = Field(
        None,
        description="of the order of rows: prompts of one task with the same read the same rows in "
        "every step, so that a comparison of their other settings is not blurred by it; default: "
        "the prompt's seed",
    )
    steps: PositiveInt | None = Field(
        None,
        description="updates of this prompt and length of its schedule; default: training.steps",
    )
    sweep: None = Field(
        None,
        exclude=True,
        description="lists of these settings: one prompt for each of their combinations, or for "
        "random: N of them; expanded when the run file is read (trainer/config/sweep.py)",
    )

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, value: Any) -> Any:
        """A preset's settings, and a learning rate, where the prompt has none of its own."""
        if not isinstance(value, dict):
            return value
        preset = value.get("preset")
        filled = dict(PRESETS[preset]) if isinstance(preset, str) and preset in PRESETS else {}
        rates = ("learning_rate", "relative_learning_rate")
        if any(value.get(rate) is not None for rate in rates):
            filled.pop("learning_rate", None)
        elif "learning_rate" not in filled:
            entry, init = find_encoder(value.get("method"), value.get("encoder")), value.get("init")
            zero = init == "zero" or (isinstance(init, dict) and is_true(init.get("zero")))
            share = None if entry is None or zero else entry.relative_learning_rate
            if value.get("optimizer") != "sgd":  # which has no default: see _check_training
                filled |= {rates[0]: DEFAULT_RATE} if share is None else {rates[1]: share}
        filled |= cls._optimizer(filled | {k: v for k, v in value.items() if v is not None})
        left_open = {*rates, "optimizer", "momentum", "betas"}
        return filled | {k: v for k, v in value.items() if k not in left_open or v is not None}

    @staticmethod
    def _optimizer(value: dict[str, Any]) -> dict[str, Any]:
        """Which optimizer, and its own settings, where they are left open."""
        entry = find_encoder(value.get("method"), value.get("encoder"))
        trains_values = entry is not None and entry.trains_values
        own = "muon" if trains_values and value.get("betas") is None else "adamw"
        name = value.get("optimizer") or own
        if name == "muon":
            return {"optimizer": name, "momentum": DEFAULT_MOMENTUM}
        return {"optimizer": name} | ({"betas": DEFAULT_BETAS} if name == "adamw" else {})

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        entry = find_encoder(self.method, self.encoder)
        if entry is None:
            raise ValueError(self._encoder_problem())
        problems = list(entry.problems(self))
        for setting in sorted(encoder_settings() - entry.settings):
            if getattr(self, setting) != type(self).model_fields[setting].default:
                readers = " or ".join(encoders_with(setting))
                problems.append(
                    f"{setting}: encoder {entry.name} of {self.method} does not use it; remove it, "
                    f"or use encoder: {readers}"
                )
        if problems:
            raise ValueError("\n".join(problems))
        if self.init.zero and self.method != "prefix_tuning":
            raise ValueError(
                "init: zero leaves the base nothing to read; use text, vocab or random, or "
                "method: prefix_tuning"
            )
        return self

    @model_validator(mode="after")
    def _check_training(self) -> Prompt:
        if self.learning_rate is not None and self.relative_learning_rate is not None:
            raise ValueError("relative_learning_rate: learning_rate is given too; remove one")
        if self.relative_learning_rate is not None and (
            self.entry.relative_learning_rate is None or self.init.zero
        ):
            what = "a start of zeros" if self.init.zero else f"encoder {self.encoder_name}"
            raise ValueError(
                f"relative_learning_rate: {what} has no scale to be relative to; use learning_rate"
            )
        if self.optimizer == "sgd" and self.learning_rate is None:
            raise ValueError(
                "learning_rate: optimizer sgd has no default; give one"
                if self.relative_learning_rate is None
                else "relative_learning_rate: an update of sgd is as large as its gradient, not a "
                "share of the prompt; give learning_rate"
            )
        if (self.teacher is None) == (self.objective == "distill"):
            what = "objective: labels has none; remove it, or use objective: distill"
            raise ValueError(
                f"teacher: {'is missing; write what to distill' if self.teacher is None else what}"
            )
        if self.optimizer == "muon" and not self.entry.trains_values:
            raise ValueError(
                f"optimizer: muon trains the prompt itself, not encoder {self.encoder_name}; use "
                "adamw, or remove it (optimizer=null)"
            )
        if self.momentum and self.optimizer not in ("muon", "sgd"):
            others = "muon or sgd" if self.entry.trains_values else "sgd"
            raise ValueError(
                f"momentum: {self.optimizer} has none; use optimizer: {others}, or remove it "
                "(momentum=null)"
            )
        if self.betas is not None and self.optimizer != "adamw":
            raise ValueError(
                f"betas: {self.optimizer} has none; use optimizer: adamw, or remove them "
                "(betas=null)"
            )
        if self.weight_decay_to_init and not self.weight_decay:
            raise ValueError("weight_decay_to_init: weight_decay is 0; set it, or remove this")
        return self

    @property
    def rate_in_words(self) -> str:
        if self.relative_learning_rate is not None:
            return f"{self.relative_learning_rate:g} of the start's RMS"
        return f"{self.learning_rate:g}"

    def _encoder_problem(self) -> str:
        names = encoder_names()
        if self.encoder not in names:
            hint = did_you_mean(str(self.encoder), names)
            return f"encoder: {self.encoder!r} is not one of {', '.join(names)}{hint}"
        return (
            f"encoder: {self.method} has no {self.encoder} encoder; use method: "
            f"{' or '.join(methods_of(self.encoder))}, or encoder: "
            f"{' or '.join(encoder_names(self.method))}"
        )

    def differences(self, other: Prompt) -> list[str]:
        """Settings that two prompts of one share must have alike, but have not."""
        own = {"name", "task", "teacher"} | ({"init"} if self.encoder_name == "text" else set())
        ours, theirs = (prompt.model_dump(exclude=own) for prompt in (self, other))
        return [key for key in ours if ours[key] != theirs[key]]

    @property
    def entry(self) -> EncoderEntry:
        """The registry's entry of the prompt's encoder."""
        entry = find_encoder(self.method, self.encoder)
        assert entry is not None, "_check refuses this"
        return entry

    @property
    def encoder_name(self) -> str:
        return self.entry.name
