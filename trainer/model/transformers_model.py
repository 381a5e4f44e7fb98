"""Build models of transformers on ``meta``, and convert errors of transformers to BadInput."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from trainer.model.library_errors import library_errors
from trainer.runtime.errors import BadInput

#: Maximum number of parameters: a factor of the stored tensors, plus a constant. With more,
#: config.json does not belong to the weights.
PARAMETERS_PER_TENSOR, EXTRA_PARAMETERS = 4, 2_000


def build_transformers_model(
    config: PretrainedConfig, name: str, **options: Any
) -> PreTrainedModel:
    """Build the text generation model of a config on ``meta``; ``options`` are of ``from_config``.

    Raises:
        BadInput: if transformers has no such class for the config, or cannot build it.
    """
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModel)
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise BadInput(
            f"base.model: {name!r} is of type {config.model_type!r}, which does not generate text; "
            "use a causal language model"
        )
    subject = f"base.model: config.json of {name!r}"
    with torch.device("meta"), library_errors(subject), _without_timm(config):
        model: PreTrainedModel = kind.from_config(config, attn_implementation="eager", **options)
        return TextModelWithHead(model) if kind is AutoModel else model


@contextmanager
def _without_timm(config: PretrainedConfig) -> Iterator[None]:
    """Leave out vision towers of the package timm (Gemma 3n), which would have to be installed."""
    vision = type(getattr(config, "vision_config", None))
    tower: Any = AutoModel._model_mapping.get(vision, None)
    if getattr(tower, "__name__", "") != "TimmWrapperModel":
        yield
        return
    original = tower.__init__
    tower.__init__ = PreTrainedModel.__init__
    try:
        yield
    finally:
        tower.__init__ = original


class TextModelWithHead(PreTrainedModel, GenerationMixin):
    """The text model of a multimodal container, for types that transformers has only inside it."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True

    def __init__(self, text: PreTrainedModel) -> None:
        super().__init__(text.config)
        self.model = text
        size = text.config.vocab_size, text.config.hidden_size
        self.lm_head = nn.Linear(size[1], size[0], bias=False, dtype=text.dtype)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the config of the text model names its implementation

    def _init_weights(self, module: nn.Module) -> None:
        self.model._init_weights(module)

    def forward(self, *, logits_to_keep: int = 0, **inputs: Any) -> CausalLMOutputWithPast:
        """Compute the logits of the last ``logits_to_keep`` tokens; 0: of all."""
        output = self.model(**inputs)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits)


@contextmanager
def limit_parameters(num_tensors: int, name: str) -> Iterator[None]:
    """While models are built, refuse a config with far more parameters than stored tensors."""
    limit, count = PARAMETERS_PER_TENSOR * num_tensors + EXTRA_PARAMETERS, 0

    def register(module: nn.Module, key: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise BadInput(
                f"base.model: config.json of {name!r} requires more than {limit:,} parameters, "
                f"but its files hold {num_tensors:,} tensors; use the config.json that belongs to "
                "these weights"
            )

    hook = nn.modules.module.register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()
