"""Settings of a prompt: method, encoder, optimizer and schedule."""

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
from trainer.config.init import Init
from trainer.config.prompt_defaults import with_defaults
from trainer.config.types import (
    Name,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
    ShareBelowOne,
)
from trainer.runtime.errors import did_you_mean


def _known_encoders(schema: dict[str, Any]) -> None:
    """List the registered encoders in the setting's JSON schema."""
    schema["anyOf"] = [{"enum": encoder_names(), "type": "string"}, {"type": "null"}]


#: Beginning of ``Prompt.placement`` for keys and values inside a dialogue.
AFTER = "after "


class Prompt(Section):
    """One trainable prompt: virtual tokens, or keys and values, and the encoder that makes them."""

    name: Name = Field(
        description="your name for the prompt: names its folder and its metrics\n"
        "With sweep, the names of its prompts begin with it."
    )
    task: str = Field(description="name of the task, from tasks, that the prompt is trained on")
    method: Literal["prompt_tuning", "p_tuning", "prefix_tuning"] = Field(
        "prompt_tuning",
        description="what is trained\n"
        "prompt_tuning: the embeddings of virtual tokens before the text\n"
        "p_tuning: an encoder that produces the virtual tokens\n"
        "prefix_tuning: keys and values for every layer, instead of virtual tokens",
    )
    encoder: str | None = Field(
        None,
        json_schema_extra=_known_encoders,
        description="the module that produces the prompt\n"
        "null: mlp for p_tuning, else embedding\n"
        "embedding: none; the values of the prompt are trained themselves\n"
        "low_rank: prompt_tuning; a prompt shared between tasks, times a low-rank matrix per task\n"
        "mlp: p_tuning and prefix_tuning; an MLP\n"
        "lstm: p_tuning; an LSTM and an MLP\n"
        "residual: p_tuning; trained virtual tokens plus the output of a bottleneck MLP\n"
        "text: p_tuning; reads init.text and produces virtual tokens",
    )
    share: Name | None = Field(
        None,
        description="train one module for all prompts with the same name here\n"
        "Encoders text and low_rank: the module is the whole text encoder, or the shared prompt of "
        "low_rank, which is initialized by the init of the first of them.\n"
        "null: every prompt has its own",
    )
    rank: PositiveInt = Field(1, description="encoder low_rank: rank of the matrix of each task")
    encoder_hidden_size: PositiveInt | None = Field(
        None,
        description="width of the hidden layers of the encoder\n"
        "null: the base's hidden size, or a quarter of it for encoder residual",
    )
    residual_mlp: Literal["shared", "separate"] = Field(
        "shared",
        description="encoder residual: which virtual tokens have an MLP in common\n"
        "shared: all of them\n"
        "separate: none; one MLP per virtual token",
    )
    num_virtual_tokens: PositiveInt = Field(20, description="length of the prompt, in tokens")
    position: Literal["auto", "front", "system", "user"] = Field(
        "auto",
        description="place of the virtual tokens\n"
        "auto: system in tasks with messages or chat, or user if the chat template has no turn of "
        "the system; front in other tasks, and for prefix_tuning with messages or distill\n"
        "front: before the whole text, as in PEFT\n"
        "system: at the beginning of the system's turn, which is added to dialogues without one\n"
        "user: at the beginning of the first turn of the user\n"
        "system and user need a task with messages or chat. In an input template, "
        "{virtual_tokens} marks any other place. In prefix_tuning, the keys and values of the text "
        "before the place are a fixed part of the prompt.",
    )
    objective: Literal["labels", "distill"] = Field(
        "labels",
        description="what the prompt learns\n"
        "labels: the target of each row, by cross-entropy\n"
        "distill: the next-token distributions that the base model has after the teacher; rows "
        "then need no labels",
    )
    teacher: str | None = Field(
        None,
        min_length=1,
        description="objective distill: a long prompt to compress into virtual tokens\n"
        "A text, which the base model reads before the input of each row.\n"
        "null: none, for objective labels",
    )
    init: Init = Field(
        default_factory=lambda: Init(auto=True),
        json_schema_extra={"default": "auto"},
        description="initial values of the prompt\n"
        "Those of the virtual tokens or, in p_tuning, of the encoder's input.",
    )
    preset: Literal["lester"] | None = Field(
        None,
        description="defaults from the literature, which other settings override\n"
        "null: promptshard's own defaults\n"
        "lester: Adafactor at 0.3, constant schedule, weight decay 1e-5, no clipping; another "
        "optimizer has its own default rate, and clipping",
    )
    optimizer: Literal["muon", "adamw", "adafactor", "sgd"] | None = Field(
        None,
        description="optimizer; all states are fp32\n"
        "null: muon if the values of the prompt are trained themselves (encoder embedding), else "
        "adamw\n"
        "muon: orthogonalized momentum, with learning rates like adamw's\n"
        "adamw: Adam with decoupled weight decay\n"
        "adafactor: without parameter scaling\n"
        "sgd: with momentum; learning_rate must be given",
    )
    momentum: ShareBelowOne | None = Field(
        None, description="momentum of muon or sgd\nnull: 0.5 for muon, 0 for sgd"
    )
    learning_rate: PositiveFloat | None = Field(
        None,
        description="learning rate after warm-up\n"
        "Depends on the scale of the base; usually relative_learning_rate is the better choice.\n"
        "null: relative_learning_rate or, where that does not apply, 3e-3",
    )
    relative_learning_rate: PositiveFloat | None = Field(
        None,
        description="largest change of the prompt per update, relative to its scale\n"
        "Instead of learning_rate: a share of the root mean square of the initial values, so that "
        "one value suits bases of any scale. With an encoder: the change of the output by one "
        "update of the encoder's last layer. In prefix_tuning: a share of the size of each layer's "
        "keys, or values, divided by the square root of the number of layers. Not available for "
        "encoders lstm, text and low_rank or init: zero.\n"
        "null: 0.1, or 0.2 for p_tuning's mlp",
    )
    betas: tuple[ShareBelowOne, ShareBelowOne] | None = Field(
        None,
        description="adamw: decay of the running means of the gradient and of its square\n"
        "null: [0.8, 0.99]",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "linear",
        description="course of the learning rate after warm-up\n"
        "cosine: falls to 0 along a cosine\n"
        "linear: falls to 0 in a line\n"
        "constant: stays",
    )
    weight_decay: NonNegativeFloat = Field(
        0.0, description="weight decay, decoupled from the gradient"
    )
    weight_decay_to_init: bool = Field(
        False, description="decay towards the initial values instead of zero"
    )
    warmup_ratio: Share = Field(0.03, description="share of the steps with a rising learning rate")
    max_grad_norm: PositiveFloat | None = Field(
        1.0,
        description="largest norm of the prompt's gradient; longer ones are clipped\n"
        "null: no clipping",
    )
    ema: ShareBelowOne | None = Field(
        None,
        description="decay of an exponential moving average of the prompt, such as 0.99\n"
        "The average is validated, kept as best and exported.\n"
        "null: no average",
    )
    dropout: ShareBelowOne = Field(
        0.0, description="share of the prompt's elements set to zero in a training step"
    )
    noise: NonNegativeFloat = Field(
        0.0,
        description="normal noise added to the prompt in a training step\n"
        "Its standard deviation, as a share of the prompt's root mean square; smooths the loss "
        "around it.",
    )
    seed: NonNegativeInt | None = Field(
        None,
        description="seed of initialization, noise, dropout and order of rows\n"
        "The order of rows has this seed only without data_seed.\n"
        "null: training.seed",
    )
    data_seed: NonNegativeInt | None = Field(
        None,
        description="seed of the order of rows\n"
        "Prompts of one task with the same data_seed and position read the same rows in every "
        "step, which makes their other settings easier to compare. Another position changes the "
        "tokens of a row, and so the number of rows in a step.\n"
        "null: the prompt's seed",
    )
    steps: PositiveInt | None = Field(
        None,
        description="number of updates of this prompt, and length of its schedule\n"
        "null: training.steps",
    )
    sweep: None = Field(
        None,
        exclude=True,
        description="lists of values of settings; makes one prompt per combination\n"
        "For example, {learning_rate: [0.01, 0.1], seed: [0, 1]} makes four prompts. All settings "
        "of a prompt but name can have a list.\n"
        "null: one prompt",
    )

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, value: Any) -> Any:
        return with_defaults(value) if isinstance(value, dict) else value

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
        inside = self.position not in ("auto", "front")
        if inside and entry.trains_prefix and self.objective == "distill":
            raise ValueError(
                f"position: {self.position} is not possible with {self.method} and objective: "
                "distill; use front, or method: prompt_tuning"
            )
        if self.init.zero and not entry.trains_prefix:
            raise ValueError(
                "init: zero works with method: prefix_tuning only; use text, vocab or random"
            )
        if self.init.search and not entry.searches_init:
            raise ValueError(
                f"init: search cannot choose tokens for encoder {entry.name}, whose first output "
                "differs from them; use vocab, or another encoder"
            )
        return self

    @model_validator(mode="after")
    def _check_training(self) -> Prompt:
        if self.learning_rate is not None and self.relative_learning_rate is not None:
            raise ValueError("relative_learning_rate: learning_rate is given too; remove one")
        if self.relative_learning_rate is not None and (
            self.entry.relative_learning_rate is None or self.init.zero
        ):
            what = "init: zero" if self.init.zero else f"encoder {self.encoder_name}"
            raise ValueError(
                f"relative_learning_rate: {what} has no scale to be relative to; use learning_rate"
            )
        if self.optimizer == "sgd" and self.learning_rate is None:
            raise ValueError(
                "learning_rate: optimizer sgd has no default; set one"
                if self.relative_learning_rate is None
                else "relative_learning_rate: an update of sgd scales with the gradient, not with "
                "the prompt; set learning_rate"
            )
        if (self.teacher is None) == (self.objective == "distill"):
            what = "objective: labels does not use it; remove it, or use objective: distill"
            raise ValueError(
                f"teacher: {'is missing; set the text' if self.teacher is None else what}"
            )
        if self.optimizer == "muon" and not self.entry.trains_values:
            raise ValueError(
                f"optimizer: muon cannot train encoder {self.encoder_name}; use "
                "adamw, or remove it (optimizer=null)"
            )
        if self.momentum and self.optimizer not in ("muon", "sgd"):
            others = "muon or sgd" if self.entry.trains_values else "sgd"
            raise ValueError(
                f"momentum: {self.optimizer} does not use it; use optimizer: {others}, or remove "
                "it (momentum=null)"
            )
        if self.betas is not None and self.optimizer != "adamw":
            raise ValueError(
                f"betas: {self.optimizer} does not use them; use optimizer: adamw, or remove them "
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
        """Return the settings that differ but must be equal in prompts of one share."""
        own = {"name", "task", "teacher", "position"}
        own |= {"init"} if self.encoder_name == "text" else set()
        ours, theirs = (prompt.model_dump(exclude=own) for prompt in (self, other))
        return [key for key in ours if ours[key] != theirs[key]]

    @property
    def entry(self) -> EncoderEntry:
        """Registry entry of the prompt's encoder."""
        entry = find_encoder(self.method, self.encoder)
        assert entry is not None, "_check refuses this"
        return entry

    @property
    def placement(self) -> str:
        """``position`` or, for keys and values inside a dialogue, ``after POSITION``.

        Rows of the latter begin at the position: the keys and values include the text before it.
        """
        inside = self.entry.trains_prefix and self.position not in ("auto", "front")
        return f"{AFTER}{self.position}" if inside else self.position

    @property
    def encoder_name(self) -> str:
        return self.entry.name
