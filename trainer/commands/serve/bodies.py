"""Bodies of requests: the part of OpenAI's API that is supported.

Fields without a counterpart here are refused if they would change the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from trainer.evaluation.token_sampling import Sampling

MAX_CHOICES = 128
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_TOP_LOGPROBS = 20
MAX_MESSAGES = 1024
SEEDS = 2**63

#: Fields that have no effect on the answer.
_IGNORED = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("parallel_tool_calls", "prompt_cache_retention"),
    }
)
#: Values with which unsupported fields, of OpenAI or of clients of vLLM, have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (),  # as many as n
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "ignore_eos": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1, 0),
    "use_beam_search": (False,),
}


def _without_surrogates(text: str) -> str:
    """Refuse text that tokenizers cannot read."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("has half of a surrogate pair; send valid Unicode")
    return text


def _texts(value: Any) -> Any:
    """Make one text a list of texts."""
    if not isinstance(value, str | list):
        raise ValueError("is neither a text nor a list of texts")
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """Make the text of a message a list of parts."""
    if not isinstance(value, str | list):
        raise ValueError("is neither a text nor a list of parts")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _empty(value: Any) -> Any:
    """Refuse a field that would change the answer."""
    if value:
        raise ValueError("is not supported; leave it out")
    return value


Text = Annotated[str, AfterValidator(_without_surrogates)]
StopString = Annotated[
    str,
    Field(min_length=1, max_length=MAX_STOP_LENGTH),
    AfterValidator(_without_surrogates),
]


class StreamOptions(BaseModel):
    """``stream_options``."""

    include_usage: bool = False


class Body(BaseModel):
    """Fields of both kinds of requests."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    stop: Annotated[list[StopString], Field(max_length=MAX_STOPS), BeforeValidator(_texts)] = []
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _remove_fields_without_effect(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if value is None:
                continue  # as if it were left out
            neutral = _NEUTRAL.get(name, ())
            if name == "best_of":
                neutral = (values.get("n") or 1,)
            if name in _IGNORED or (name in _NEUTRAL and value in neutral):
                continue
            if name in _NEUTRAL:
                raise ValueError(f"{name}: is not supported; leave it out")
            kept[name] = value
        return kept

    @property
    def top_logprobs_wanted(self) -> int | None:
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, number: int) -> Sampling:
        """Return the settings of one of ``n`` choices, which have different seeds."""
        seed = None if self.seed is None else (self.seed + number) % SEEDS
        return Sampling(self.temperature or 0.0, self.top_p or 1.0, seed, self.top_logprobs_wanted)


class CompletionBody(Body):
    """Body of ``/v1/completions``."""

    prompt: Annotated[
        list[Text], Field(min_length=1, max_length=MAX_CHOICES), BeforeValidator(_texts)
    ]
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def top_logprobs_wanted(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    """Part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(BaseModel):
    """One turn; a developer's turn is one of the system."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], Field(min_length=1), BeforeValidator(_parts)]
    tool_calls: Annotated[Any, AfterValidator(_empty)] = None
    function_call: Annotated[Any, AfterValidator(_empty)] = None

    def turn(self) -> dict[str, str]:
        """Return the turn as chat templates read it."""
        text = "".join(part.text for part in self.content)
        return {"role": self.role.replace("developer", "system"), "content": text}


class ChatBody(Body):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatBody:
        if self.messages[-1].role == "assistant":
            raise ValueError("messages: the last one is of the assistant; end with the user's")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def top_logprobs_wanted(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
