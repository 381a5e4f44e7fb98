"""Map the stored tensors of a checkpoint to the parameters into which transformers loads them.

transformers' class for the folder is built on ``meta``. The rules of this class rename the stored
tensors (``transformers.core_model_loading``) and list the tied weights (``all_tied_weights_keys``).
For the text model of a multimodal container, the container's names and tying apply.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from trainer.model.families import logit_scale_and_cap
from trainer.model.safetensors_reader import SafetensorsReader, StoredTensor, scales_name
from trainer.model.transformers_model import build_transformers_model, limit_parameters
from trainer.runtime.errors import BadInput

#: Operation of transformers 5.0 and 5.1 that copies a tensor to an aligned address (gpt-oss).
COPY = "Force16BytesAlignment"
#: Names of the parts of a multimodal container that are not text.
_OTHER_PARTS = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal|embed_(vision|audio))")
#: Number of elements that are compared at a time.
COMPARED_ELEMENTS = 4 << 20


@dataclass(frozen=True)
class WeightMapping:
    """The stored tensors of each parameter and persistent buffer of the text model.

    Attributes:
        tensors: by parameter or buffer: the stored tensors whose concatenated rows form it.
        tied: the head uses the embedding table.
        duplicate: a stored head that equals the embedding table and is not read.
        separate: config.json ties the head, but a different head is stored and used.
        transposed: parameters whose tensors transformers transposes.
        warnings: about stored tensors that are not used as config.json suggests.
    """

    tensors: dict[str, tuple[str, ...]]
    tied: bool
    duplicate: str | None = None
    separate: bool = False
    transposed: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()


def map_weights(
    config: PretrainedConfig, tensors: Mapping[str, StoredTensor], name: str
) -> WeightMapping:
    """Match the stored tensors with the parameters of the text model.

    Args:
        config: config of the folder, of a text model or its multimodal container.

    Raises:
        BadInput: if config.json does not describe a model, or a parameter has no tensor.
    """
    with limit_parameters(len(tensors), name):
        loader = build_transformers_model(config, name)
        inside = config.get_text_config() is not config
        text = build_transformers_model(config.get_text_config(), name) if inside else loader
    paths = _paths_in(loader, text, name) if inside else {"": ""}
    parameters = {parameter: _renamed(parameter, paths) for parameter in text.state_dict()}
    stored, turned, unread = _stored_tensors(loader, tensors, set(parameters.values()))
    paths_of = {module: path for path, module in text.named_modules()}
    head, table = (
        f"{paths_of[layer]}.weight"
        for layer in (text.get_output_embeddings(), text.get_input_embeddings())
    )
    pair = {parameters[head], parameters[table]}
    tied = any(set(keys) == pair for keys in loader.all_tied_weights_keys.items())
    head_tensors, embedding = stored.get(parameters[head]), stored.get(parameters[table])
    others = [tensor for tensor in unread if not (inside and _OTHER_PARTS.search(tensor))]
    duplicate, separate, warnings = None, False, _unread_warnings(loader, others, name)
    if tied and head_tensors and embedding and head_tensors != embedding:
        duplicate = head_tensors[0]
        if not _equal(duplicate, embedding[0], tensors):
            tied, duplicate, separate = False, None, True
            warnings.append(
                f"base.model: config.json of {name!r} ties the head to the word embeddings, but "
                f"{head_tensors[0]!r} is stored and differs from {embedding[0]!r}: the head is "
                "loaded separately, as in transformers"
            )
    if tied and (shared := embedding or head_tensors):
        stored |= dict.fromkeys(pair, shared)
    missing = [key for key in parameters.values() if key not in stored]
    if missing:
        raise BadInput(_describe_missing(name, config, missing, unread, tensors, tied_pair=pair))
    mapping = {parameter: stored[key] for parameter, key in parameters.items()}
    transposed = frozenset(parameter for parameter, key in parameters.items() if key in turned)
    return WeightMapping(mapping, tied, duplicate, separate, transposed, tuple(warnings))


def _paths_in(loader: PreTrainedModel, text: PreTrainedModel, name: str) -> dict[str, str]:
    """Map paths of modules in the text model to their paths in its container."""
    modules = dict(loader.named_modules())
    for path, module in modules.items():
        if type(module) is type(text):
            return {"": path}
    inner = next((p for p, m in modules.items() if type(m) is type(text.base_model)), None)
    head = loader.get_output_embeddings()
    own_head = text.get_output_embeddings()
    scales = logit_scale_and_cap(text) != (1.0, None)
    if inner is not None and scales and not _scales_logits(loader):
        raise BadInput(
            f"base.model: {name!r} is a {type(loader).__name__}, whose own head "
            f"lacks the logit scaling of {type(text).__name__} (logit_scale, logits_scaling, "
            "final_logit_softcapping); use a release of the text model alone"
        )
    if inner is None or head is None:
        raise BadInput(
            f"base.model: {name!r} is of type {loader.config.model_type!r}, which stores its "
            f"text model differently from {type(text).__name__}; use the text model alone"
        )
    return {
        text.base_model_prefix: inner,
        next(p for p, m in text.named_modules() if m is own_head): next(
            p for p, m in modules.items() if m is head
        ),
    }


def _scales_logits(loader: PreTrainedModel) -> bool:
    """Whether a container applies the logit scaling of its text model (Gemma 4 does)."""
    source = inspect.getsource(type(loader).forward)
    return any(name in source for name in ("logit_scale", "logits_scaling", "softcapping"))


def _renamed(parameter: str, paths: Mapping[str, str]) -> str:
    for path, other in paths.items():
        if path == "" or parameter.startswith(f"{path}."):
            return f"{other}.{parameter.removeprefix(path).lstrip('.')}".lstrip(".")
    return parameter


def _stored_tensors(
    loader: PreTrainedModel, tensors: Mapping[str, StoredTensor], parameters: Set[str]
) -> tuple[dict[str, tuple[str, ...]], set[str], list[str]]:
    """Return the tensors of each parameter, those to transpose, and tensors without parameter.

    As in ``convert_and_load_state_dict_in_model``, the first of several tensors for one parameter
    in natural order is used.
    """
    transforms = get_model_conversion_mapping(loader)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = loader.state_dict(), loader.base_model_prefix
    stored: dict[str, tuple[str, ...]] = {}
    parts: dict[str, dict[str, list[str]]] = {}
    turned: set[str] = set()
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
    for key in sorted(parts.keys() & parameters):
        lists = parts[key]
        if key in stored:
            (plain,), other = stored[key], next(iter(lists.values()))[0]
            raise BadInput(
                f"base.model: {key!r} is stored twice, as {plain!r} and expert by expert "
                f"({other!r}); keep one form"
            )
        converter = by_pattern[next(iter(lists))]
        if [type(operation).__name__ for operation in converter.operations] == [COPY]:
            (stored[key],) = (tuple(column) for column in lists.values())
            continue
        if [type(operation) for operation in converter.operations] == [Transpose]:
            ((tensor, *_),) = lists.values()
            stored[key] = (tensor,)
            if not converter.operations[0].check_dims or tensors[tensor].shape != state[key].shape:
                turned.add(key)
            continue
        stored[key] = _stacked(key, converter, lists, len(state[key]))
    return stored, turned, unread


def _stacked(
    key: str, converter: WeightConverter, lists: Mapping[str, list[str]], experts: int
) -> tuple[str, ...]:
    """Return the tensors of a stack of experts in the order of its rows: expert by expert."""
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
        # The last number in a tensor's name is the index of its expert.
        numbers = [int(re.findall(r"\.(\d+)\.", tensor)[-1]) for tensor in column]
        if numbers != list(range(experts)):
            lost = [str(number) for number in range(experts) if number not in numbers][:5]
            problem = f"lack expert {', '.join(lost)}" if lost else f"are {len(column)}"
            raise BadInput(
                f"base.model: the stored tensors {pattern!r} of {key!r} {problem}, but config.json "
                f"requires {experts} experts; copy or download the model again"
            )
    return tuple(tensor for expert in zip(*columns, strict=True) for tensor in expert)


def _unread_warnings(loader: PreTrainedModel, unread: Sequence[str], name: str) -> list[str]:
    unused = [
        *(loader._keys_to_ignore_on_load_unexpected or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
        r"[._]SCB$",
        r"\.weight_format$",
    ]
    ignored = re.compile("|".join(f"({pattern})" for pattern in unused))
    others = [tensor for tensor in unread if not ignored.search(tensor)]
    if not others:
        return []
    more = f" and {len(others) - 1:,} more" if len(others) > 1 else ""
    return [
        f"base.model: {others[0]!r}{more} of {name!r} do not belong to the model that "
        "config.json describes; they are ignored, as in transformers"
    ]


def _describe_missing(
    name: str,
    config: PretrainedConfig,
    missing: Sequence[str],
    unread: Sequence[str],
    tensors: Mapping[str, StoredTensor],
    *,
    tied_pair: Set[str],
) -> str:
    problem = f"base.model: no weight file of {name!r} has the tensor {missing[0]!r}"
    wrapped = next((tensor for tensor in unread if tensor.endswith(f".{missing[0]}")), None)
    if wrapped:
        prefix = wrapped.removesuffix(missing[0])
        if any("lora_" in tensor or ".base_layer." in tensor for tensor in unread):
            return (
                f"{problem}, but they have {wrapped!r}, as PEFT saves a model with its adapter; "
                "save the merged model: model.merge_and_unload().save_pretrained(folder)"
            )
        return (
            f"{problem}, but they have {wrapped!r}: the prefix {prefix!r} of a wrapper (such as "
            "DistributedDataParallel or torch.compile) is in the names, which transformers does "
            "not load either; save the model inside the wrapper (model.module.save_pretrained"
            "(folder)), or remove the prefix from the names in the files"
        )
    classes = [str(each) for each in getattr(config, "architectures", None) or []]
    other = [each for each in classes if not each.endswith(("ForCausalLM", "LMHeadModel"))]
    if len(missing) == 1 and missing[0] in tied_pair:
        if other and config.get_text_config() is config:
            return (
                f"{problem}: it is a {other[0]}, which has no language model head; use "
                "the causal language model from which it was fine-tuned"
            )
        return (
            f"{problem}, and its config.json does not tie the head to the word embeddings; if the "
            "model was trained with both tied, set tie_word_embeddings to true there, otherwise "
            "save the model again with both"
        )
    if len(unread) > len(tensors) / 2:
        return (
            f"{problem} (nor {len(missing) - 1:,} more of {type(config).__name__}); it has tensors "
            f"such as {unread[0]!r}: config.json and weights belong to different models, or "
            "transformers does not know these names; save the model with save_pretrained(folder)"
        )
    more = f" (nor {len(missing) - 1:,} more)" if len(missing) > 1 else ""
    return f"{problem}{more}; the model is incomplete: copy or download it again"


def _equal(one: str, other: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether two tensors, and their row scales if present, have equal values."""
    first, second = tensors[one], tensors[other]
    scales = [tensors.get(scales_name(name)) is not None for name in (one, other)]
    if first.shape != second.shape or first.dtype is None or second.dtype is None:
        return False
    if scales[0] != scales[1] or (scales[0] and first.type != second.type):
        return False
    common = torch.promote_types(first.dtype, second.dtype)
    size = torch.Size(first.shape).numel()
    with SafetensorsReader(tensors) as reader:
        for start in range(0, size, COMPARED_ELEMENTS):
            stop = min(start + COMPARED_ELEMENTS, size)
            a, b = (reader.read_flat(name, start, stop).to(common) for name in (one, other))
            if not torch.equal(a, b):
                return False
    return not scales[0] or _equal(scales_name(one), scales_name(other), tensors)
