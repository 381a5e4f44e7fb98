"""Which tensors of a checkpoint transformers reads into which parameters, and which it ties.

transformers' own class for the folder is built on ``meta``; its own rules rename the stored tensors
(``transformers.core_model_loading``) and name the tied weights (``all_tied_weights_keys``). A text
model in a multimodal container gets the names, and the flag, of the container.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from trainer.model.families import logit_scale_and_cap
from trainer.model.safetensors_reader import SafetensorsReader, StoredTensor, scales_name
from trainer.runtime.errors import BadInput

#: Elements of two tensors that are compared at a time.
COMPARED = 4 << 20
#: A model may have this many parameters for each stored tensor, and some more, before it is clear
#: that config.json does not belong to the weights.
PARAMETERS_PER_TENSOR, MORE_PARAMETERS = 4, 2_000


@dataclass(frozen=True)
class WeightMapping:
    """What transformers reads into each parameter of the text model.

    Attributes:
        tensors: by the parameter's name; the rows of its tensors, end to end, are the parameter's.
        tied: the head is the embedding table.
        duplicate: a stored tensor that equals the one that the tied parameter is read from.
        separate: config.json ties the head, but another head is stored, and read.
        warnings: what a person should know about the stored tensors.
    """

    tensors: dict[str, tuple[str, ...]]
    tied: bool
    duplicate: str | None = None
    separate: bool = False
    warnings: tuple[str, ...] = ()


def map_weights(
    config: PretrainedConfig, tensors: Mapping[str, StoredTensor], name: str
) -> WeightMapping:
    """Match the stored tensors with the parameters of the text model.

    Args:
        config: of the folder: a text model's, or a container's.
        tensors: of all weight files, by name.
        name: what the run file calls the model.

    Raises:
        BadInput: if config.json describes no model, or if a parameter has no tensor.
    """
    with _bounded(len(tensors), name):
        loader = build_transformers_model(config, name)
        inside = config.get_text_config() is not config
        text = build_transformers_model(config.get_text_config(), name) if inside else loader
    paths = _paths_in(loader, text, name) if inside else {"": ""}
    parameters = {
        parameter: _renamed(parameter, paths)
        for parameter, _ in text.named_parameters(remove_duplicate=False)
    }
    stored, unread = _stored_tensors(loader, tensors, set(parameters.values()))
    head, table = _ends(text)
    pair = {parameters[head], parameters[table]}
    tied = any({target, source} == pair for target, source in loader.all_tied_weights_keys.items())
    own, source = stored.get(parameters[head]), stored.get(parameters[table])
    duplicate, separate, warnings = None, False, _unread_warnings(loader, unread, name)
    if tied and own and source and own != source:
        duplicate = own[0]
        if not _equal(duplicate, source[0], tensors):
            tied, duplicate, separate = False, None, True
            warnings.append(
                f"base.model: config.json of {name!r} ties the head to the word embeddings, but "
                f"{own[0]!r} is stored and differs from {source[0]!r}: the head is kept apart, as "
                "transformers does"
            )
    if tied and (shared := source or own):
        stored |= dict.fromkeys(pair, shared)
    missing = [known for known in parameters.values() if known not in stored]
    if missing:
        raise BadInput(_incomplete(name, config, missing, unread, tensors, ends=pair))
    found = {parameter: stored[known] for parameter, known in parameters.items()}
    return WeightMapping(found, tied, duplicate, separate, tuple(warnings))


def build_transformers_model(
    config: PretrainedConfig, name: str, **options: Any
) -> PreTrainedModel:
    """Build transformers' own class for a config, on ``meta``.

    Args:
        options: of ``from_config``.

    Raises:
        BadInput: if transformers has none that writes text, or cannot build it.
    """
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    kind = next((kind for kind in kinds if type(config) in kind._model_mapping), None)
    if kind is None:
        raise BadInput(
            f"base.model: {name!r} is of type {config.model_type!r}, which writes no text; give a "
            "causal language model"
        )
    with torch.device("meta"), library_errors(f"base.model: config.json of {name!r}"):
        model: PreTrainedModel = kind.from_config(config, attn_implementation="eager", **options)
    return model


@contextmanager
def library_errors(subject: str) -> Iterator[None]:
    """Turn what a library raises on damaged or foreign files into BadInput.

    tokenizers' panics are no ``Exception``; a stop by the user passes.
    """
    try:
        yield
    except (BadInput, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        text = " ".join(str(error).split())
        if "custom code" in text:
            raise BadInput(
                f"{subject}: needs code of its own, which is never run; give a model that "
                "transformers knows"
            ) from None
        raise BadInput(
            f"{subject}: transformers cannot read it: {text[:300]} ({type(error).__name__}); copy "
            "or download it again, or give a model that this version of transformers knows"
        ) from None


@contextmanager
def _bounded(num_tensors: int, name: str) -> Iterator[None]:
    """Refuse a config that asks for far more parameters than there are tensors, while it builds."""
    most, count = PARAMETERS_PER_TENSOR * num_tensors + MORE_PARAMETERS, 0

    def register(module: nn.Module, key: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise BadInput(
                f"base.model: config.json of {name!r} asks for more than {most:,} parameters, but "
                f"its files hold {num_tensors:,} tensors; give the config.json of these weights"
            )

    hook = nn.modules.module.register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        hook.remove()


def _ends(text: PreTrainedModel) -> tuple[str, str]:
    """The names of the weights of head and word embeddings."""
    head, table = text.get_output_embeddings(), text.get_input_embeddings()
    paths = {module: path for path, module in text.named_modules()}
    return f"{paths[head]}.weight", f"{paths[table]}.weight"


def _paths_in(loader: PreTrainedModel, text: PreTrainedModel, name: str) -> dict[str, str]:
    """Where the modules of a text model are in its container, by their path in the text model."""
    modules = dict(loader.named_modules())
    for path, module in modules.items():
        if type(module) is type(text):
            return {"": path}
    inner = next((p for p, m in modules.items() if type(m) is type(text.base_model)), None)
    head = loader.get_output_embeddings()
    own_head = text.get_output_embeddings()
    if inner is not None and logit_scale_and_cap(text) != (1.0, None):
        raise BadInput(
            f"base.model: {name!r} is a {type(loader).__name__}, which puts a head of its own on "
            f"its text model, without what {type(text).__name__} does to its logits (logit_scale, "
            "logits_scaling, final_logit_softcapping); give a release of the text model alone"
        )
    if inner is None or head is None:
        raise BadInput(
            f"base.model: {name!r} is of type {loader.config.model_type!r}, which keeps its text "
            f"model in another form than {type(text).__name__}; give the text model alone"
        )
    return {
        text.base_model_prefix: inner,
        next(p for p, m in text.named_modules() if m is own_head): next(
            p for p, m in modules.items() if m is head
        ),
    }


def _renamed(parameter: str, paths: Mapping[str, str]) -> str:
    for path, other in paths.items():
        if path == "" or parameter.startswith(f"{path}."):
            return f"{other}.{parameter.removeprefix(path).lstrip('.')}".lstrip(".")
    return parameter


def _stored_tensors(
    loader: PreTrainedModel, tensors: Mapping[str, StoredTensor], wanted: Set[str]
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The tensors of each wanted parameter, and those that are of no parameter at all.

    Follows ``convert_and_load_state_dict_in_model``: of two tensors for one parameter the first in
    natural order is read.
    """
    transforms = get_model_conversion_mapping(loader)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = loader.state_dict(), loader.base_model_prefix
    stored: dict[str, tuple[str, ...]] = {}
    parts: dict[str, dict[str, list[str]]] = {}
    unread = []
    for tensor in sorted(tensors, key=dot_natural_key):
        key, pattern = rename_source_key(tensor, renamings, converters, prefix, state)
        if key not in state and tensor in state:
            key, pattern = rename_source_key(tensor, [], [], prefix, state)
        if key not in state:
            unread.append(tensor)
        elif pattern is None:
            stored.setdefault(key, (tensor,))
        else:
            parts.setdefault(key, {}).setdefault(pattern, []).append(tensor)
    for key in sorted(parts.keys() & wanted):
        lists = parts[key]
        if key in stored:
            (plain,), other = stored[key], next(iter(lists.values()))[0]
            raise BadInput(
                f"base.model: {key!r} is stored twice, as {plain!r} and expert by expert "
                f"({other!r}); keep one form"
            )
        converter = by_pattern[next(iter(lists))]
        stored[key] = _stacked(key, converter, lists, len(state[key]))
    return stored, unread


def _stacked(
    key: str, converter: WeightConverter, lists: Mapping[str, list[str]], experts: int
) -> tuple[str, ...]:
    """The tensors of a stack of experts, in the order of its rows: of each expert all its parts."""
    for operation in converter.operations:
        merges = isinstance(operation, MergeModulelist) and operation.dim == 0
        joins = isinstance(operation, Concatenate) and operation.dim == 1
        if not (merges or joins):
            raise BadInput(
                f"base.model: the tensors of {key!r} are stored in a form that "
                f"{type(operation).__name__} converts, which is not supported; load the model with "
                "transformers and save it with save_pretrained(folder, save_original_format=False)"
            )
    columns = [lists.get(pattern, []) for pattern in converter.source_patterns]
    for pattern, column in zip(converter.source_patterns, columns, strict=True):
        numbers = [_number(tensor) for tensor in column]
        if numbers != list(range(experts)):
            lost = [str(number) for number in range(experts) if number not in numbers][:5]
            has = f"lack expert {', '.join(lost)}" if lost else f"are {len(column)}"
            raise BadInput(
                f"base.model: the stored tensors {pattern!r} of {key!r} {has}, but config.json "
                f"asks for {experts} experts; copy or download the model again"
            )
    return tuple(tensor for expert in zip(*columns, strict=True) for tensor in expert)


def _unread_warnings(loader: PreTrainedModel, unread: Sequence[str], name: str) -> list[str]:
    """Name stored tensors that belong to no parameter, but for those known to be of no use."""
    useless = [
        *(loader._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
        r"[._]SCB$",
        r"\.weight_format$",
    ]
    ignored = re.compile("|".join(f"({pattern})" for pattern in useless))
    others = [tensor for tensor in unread if not ignored.search(tensor)]
    if not others:
        return []
    more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
    return [
        f"base.model: {others[0]!r}{more} of {name!r} belong to no part of the model that "
        "config.json describes; they are not read, as in transformers"
    ]


def _number(tensor: str) -> int:
    """The last number in a tensor's name: which expert it belongs to."""
    return int(re.findall(r"\.(\d+)\.", tensor)[-1])


def _incomplete(
    name: str,
    config: PretrainedConfig,
    missing: Sequence[str],
    unread: Sequence[str],
    tensors: Mapping[str, StoredTensor],
    *,
    ends: Set[str],
) -> str:
    """Why parameters have no tensor, and what helps."""
    lacks = f"base.model: no weight file of {name!r} has the tensor {missing[0]!r}"
    wrapped = next((tensor for tensor in unread if tensor.endswith(f".{missing[0]}")), None)
    if wrapped:
        prefix = wrapped.removesuffix(missing[0])
        if any("lora_" in tensor or ".base_layer." in tensor for tensor in unread):
            return (
                f"{lacks}, but they have {wrapped!r}, as PEFT saves a model with its adapter; save "
                "the merged model: model.merge_and_unload().save_pretrained(folder)"
            )
        return (
            f"{lacks}, but they have {wrapped!r}: the prefix {prefix!r} of a wrapper (such as "
            "DistributedDataParallel or torch.compile) is in the names, and transformers does not "
            "read them either; save the model inside the wrapper (model.module.save_pretrained"
            "(folder)), or remove the prefix from the names in the files"
        )
    classes = [str(each) for each in getattr(config, "architectures", None) or []]
    other = [each for each in classes if not each.endswith(("ForCausalLM", "LMHeadModel"))]
    if len(missing) == 1 and missing[0] in ends:
        if other and config.get_text_config() is config:
            return (
                f"{lacks}: it is a {other[0]}, which has no head that writes tokens; give the "
                "causal language model that it was fine-tuned from"
            )
        return (
            f"{lacks}, and its config.json does not tie the head to the word embeddings; if the "
            "model was trained with both tied, set tie_word_embeddings to true there, otherwise "
            "save the model again with both"
        )
    if len(unread) > len(tensors) / 2:
        return (
            f"{lacks} (nor {len(missing) - 1:,} more of {type(config).__name__}); it has tensors "
            f"such as {unread[0]!r}: config.json and weights belong to different models, or "
            "transformers does not know these names; save the model with save_pretrained(folder)"
        )
    more = f" (nor {len(missing) - 1:,} more)" if len(missing) > 1 else ""
    return f"{lacks}{more}; the model is incomplete: copy or download it again"


def _equal(one: str, other: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether two tensors, and their row scales where they have some, hold the same values."""
    first, second = tensors[one], tensors[other]
    scales = [tensors.get(scales_name(name)) is not None for name in (one, other)]
    if first.shape != second.shape or first.dtype is None or second.dtype is None:
        return False
    if scales[0] != scales[1] or (scales[0] and first.type != second.type):
        return False
    common = torch.promote_types(first.dtype, second.dtype)
    size = torch.Size(first.shape).numel()
    with SafetensorsReader(tensors) as reader:
        for start in range(0, size, COMPARED):
            stop = min(start + COMPARED, size)
            a, b = (reader.read_flat(name, start, stop).to(common) for name in (one, other))
            if not torch.equal(a, b):
                return False
    return not scales[0] or _equal(scales_name(one), scales_name(other), tensors)
