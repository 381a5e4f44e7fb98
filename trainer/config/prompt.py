"""Prompts: what is trained, and from where."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

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

#: The encoders of each method.
ENCODERS = {
    "prompt_tuning": ("embedding", "low_rank"),
    "p_tuning": ("mlp", "lstm", "residual", "text"),
    "prefix_tuning": ("embedding", "mlp"),
}
#: Those of which prompts with the same ``share`` have a part in common.
SHARED = ("low_rank", "text")


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


def _encoder(method: str | None, given: str | None) -> str:
    return given or ("mlp" if method == "p_tuning" else "embedding")


#: Encoders that start by making what ``init`` says: a learning rate can be relative to that.
RELATIVE = ("embedding", "mlp", "residual")
#: Share of the root mean square of its start that an update moves a prompt by; less where all three
#: layers of p_tuning's MLP move it.
DEFAULT_SHARE, DEFAULT_SHARE_OF_MLP = 0.1, 0.05
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
    encoder: Literal["embedding", "low_rank", "mlp", "lstm", "residual", "text"] | None = Field(
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
            encoder, init = _encoder(value.get("method"), value.get("encoder")), value.get("init")
            zero = init == "zero" or (isinstance(init, dict) and is_true(init.get("zero")))
            mlp = value.get("method") == "p_tuning" and encoder == "mlp"
            share = DEFAULT_SHARE_OF_MLP if mlp else DEFAULT_SHARE
            relative = encoder in RELATIVE and not zero
            if value.get("optimizer") != "sgd":  # which has no default: see _check_training
                filled |= {rates[1]: share} if relative else {rates[0]: DEFAULT_RATE}
        filled |= cls._optimizer(filled | {k: v for k, v in value.items() if v is not None})
        left_open = {*rates, "optimizer", "momentum", "betas"}
        return filled | {k: v for k, v in value.items() if k not in left_open or v is not None}

    @staticmethod
    def _optimizer(value: dict[str, Any]) -> dict[str, Any]:
        """Which optimizer, and its own settings, where they are left open."""
        embedding = _encoder(value.get("method"), value.get("encoder")) == "embedding"
        own = "muon" if embedding and value.get("betas") is None else "adamw"
        name = value.get("optimizer") or own
        if name == "muon":
            return {"optimizer": name, "momentum": DEFAULT_MOMENTUM}
        return {"optimizer": name} | ({"betas": DEFAULT_BETAS} if name == "adamw" else {})

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        if self.method == "p_tuning" and self.encoder == "embedding":
            raise ValueError(
                "encoder: p_tuning trains an encoder; use mlp, or method: prompt_tuning"
            )
        if self.encoder_name not in ENCODERS[self.method]:
            method = next(m for m, encoders in ENCODERS.items() if self.encoder_name in encoders)
            raise ValueError(
                f"encoder: {self.method} has no {self.encoder} encoder; use method: {method}"
            )
        if self.residual_mlp == "separate" and self.encoder_name != "residual":
            raise ValueError(
                f"residual_mlp: encoder {self.encoder_name} has none; remove it, or use "
                "method: p_tuning with encoder: residual"
            )
        self._check_share()
        if self.encoder_name in ("embedding", "low_rank") and self.encoder_hidden_size is not None:
            instead = "encoder: mlp" if self.method == "prefix_tuning" else "p_tuning"
            raise ValueError(
                f"encoder_hidden_size: {self.method} has no encoder; remove it, or use {instead}"
            )
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
            self.encoder_name not in RELATIVE or self.init.zero
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
        if self.optimizer == "muon" and self.encoder_name != "embedding":
            raise ValueError(
                f"optimizer: muon trains the prompt itself, not encoder {self.encoder_name}; use "
                "adamw, or remove it (optimizer=null)"
            )
        if self.momentum and self.optimizer not in ("muon", "sgd"):
            others = "muon or sgd" if self.encoder_name == "embedding" else "sgd"
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

    def _check_share(self) -> None:
        encoder = self.encoder_name
        if encoder == "text" and self.init.text is None:
            raise ValueError(
                "init: encoder text reads a text; use init: {text: ...}, or another encoder"
            )
        if encoder == "low_rank" and self.share is None:
            raise ValueError(
                "share: is missing; encoder low_rank learns a prompt in common with the others of "
                "the same name"
            )
        if self.share is not None and encoder not in SHARED:
            raise ValueError(
                f"share: encoder {encoder} is a prompt's own; remove it, or use encoder "
                f"{' or '.join(SHARED)}"
            )
        if self.rank != 1 and encoder != "low_rank":
            raise ValueError(f"rank: encoder {encoder} has none; remove it, or use low_rank")

    def differences(self, other: Prompt) -> list[str]:
        """Settings that two prompts of one share must have alike, but have not."""
        own = {"name", "task", "teacher"} | ({"init"} if self.encoder_name == "text" else set())
        ours, theirs = (prompt.model_dump(exclude=own) for prompt in (self, other))
        return [key for key in ours if ours[key] != theirs[key]]

    @property
    def encoder_name(self) -> str:
        return _encoder(self.method, self.encoder)
