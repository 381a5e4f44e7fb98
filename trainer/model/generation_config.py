"""A model folder's generation config, read and applied as by transformers' ``generate``."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import GenerationConfig

from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

if TYPE_CHECKING:
    import torch
    from transformers import LogitsProcessorList, PreTrainedModel

FILE_NAME = "generation_config.json"


def read_generation_config(folder: Path) -> GenerationConfig:
    """Read ``generation_config.json``, else the generation settings in ``config.json``.

    Unlike ``from_pretrained``, refuse a damaged file instead of ignoring it.

    Raises:
        BadInput: the file is damaged, or its ``eos_token_id`` is not a token id or a list of them.
    """
    given = (folder / FILE_NAME).is_file()
    path = folder / (FILE_NAME if given else "config.json")
    read_json_object(path)
    try:
        config: GenerationConfig = GenerationConfig.from_pretrained(
            str(folder),
            config_file_name=path.name,
            local_files_only=True,
            **({} if given else {"_from_model_config": True}),
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(
            f"{path}: is not a valid generation config ({reason}); download the file again"
            + (", or remove it to use the settings of config.json" if given else "")
        ) from None
    ids = config.eos_token_id
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    wrong = [i for i in listed if not isinstance(i, int) or isinstance(i, bool) or i < 0]
    if wrong:
        raise BadInput(
            f"{path}: eos_token_id: {wrong[0]!r} is not a token id; set the id of the token that "
            "ends a generated text, or a list of ids"
        )
    return config


def end_ids(config: GenerationConfig) -> frozenset[int]:
    """Return the tokens at which generation stops."""
    listed = config.eos_token_id
    return frozenset(listed if isinstance(listed, list) else [] if listed is None else [listed])


def logits_processors(
    model: PreTrainedModel, token_ids: Sequence[int], max_new_tokens: int, device: torch.device
) -> LogitsProcessorList:
    """Return the logits processors of transformers' greedy ``generate`` for one row.

    Args:
        model: its ``generation_config`` sets the penalties.
        token_ids: input of the row, without virtual tokens, as in PEFT.
    """
    import torch

    config = copy.deepcopy(model.generation_config)
    num_tokens = len(token_ids)
    length = num_tokens + max_new_tokens
    config.update(do_sample=False, guidance_scale=None, max_length=length)
    if config.min_new_tokens is not None:
        config.min_length = num_tokens + config.min_new_tokens
    model._prepare_special_tokens(config, device=device)
    processors: LogitsProcessorList = model._get_logits_processor(
        config,
        input_ids_seq_length=num_tokens,
        encoder_input_ids=torch.tensor([list(token_ids)], device=device),
        device=device,
    )
    return processors


def check_logits_processors(model: PreTrainedModel, name: str) -> None:
    """Raise BadInput if a setting cannot be applied. ``model`` may be on ``meta``."""
    import torch

    if model.generation_config.guidance_scale not in (None, 1):
        raise BadInput(
            f"base.model: {name!r}: {FILE_NAME}: guidance_scale: "
            f"{model.generation_config.guidance_scale!r} needs a second forward pass without the "
            "input, which is not supported; remove it"
        )
    try:
        processors = logits_processors(model, [0], 1, torch.device("cpu"))
        processors(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, model.config.vocab_size))
    except (ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(
            f"base.model: {name!r}: {FILE_NAME} has a setting that cannot be applied to generated "
            f"text ({reason}); correct it or remove it"
        ) from None
