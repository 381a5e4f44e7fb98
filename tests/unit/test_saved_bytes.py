"""The memory model against what autograd is seen to save, for every family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.family_bases import CASES
from tests.random_base import make_tokenizer
from tests.whole_base import OneRank
from trainer.base.families import layer_sizes
from trainer.base.files import open_base
from trainer.base.head import LOGITS_BYTES
from trainer.base.loading import load_base
from trainer.base.model import PromptedBase
from trainer.base.saved import SavedBytes
from trainer.base.skeleton import build_skeleton
from trainer.config import Base
from trainer.memory import StreamMemory, row_sizes
from trainer.tasks.streams import Piece, Stream, build_stream
from trainer.tasks.tokens import Example

VIRTUAL = 16
ROWS = [40, 33, 31, 30, 24, 52, 28, 29]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    saved: dict[str, Path] = {}

    def get(case: str) -> Path:
        """Six layers, so that the ends are not the most of it."""
        if case not in saved:
            model_type, settings = CASES[case]
            settings = copy.deepcopy(settings)
            if not {"attention_types", "no_rope_layers"} & settings.keys():
                settings["num_hidden_layers"] = 6
                if "layer_types" in settings:
                    settings["layer_types"] *= 3
            path = tmp_path_factory.mktemp(case)
            config = AutoConfig.for_model(model_type, **settings)
            AutoModelForCausalLM.from_config(config).save_pretrained(path)
            make_tokenizer().save_pretrained(path)
            saved[case] = path
        return saved[case]

    return get


def load(folder: Path, checkpointing: bool, dtype: torch.dtype) -> PromptedBase:
    settings = Base(model=str(folder))
    files = open_base(settings)
    skeleton = build_skeleton(files, settings, dtype, CPU)
    base, _ = load_base(
        skeleton, files, dtype=dtype, device=CPU, shard=OneRank(), checkpointing=checkpointing
    )
    return base


def stream_of(lengths: list[int]) -> Stream:
    rows = [Example.with_target(tuple(range(3, 3 + n)), n - 4, i) for i, n in enumerate(lengths)]
    return build_stream([Piece(row, 0, i) for i, row in enumerate(rows)], [VIRTUAL])


def saved_bytes(base: PromptedBase, stream: Stream) -> int:
    leaf = torch.randn(VIRTUAL, base.hidden_size, requires_grad=True)
    saved = SavedBytes()
    with saved:
        base(stream, [leaf])
    return saved.total


FEW = ["llama", "gpt2", "gemma2", "qwen3_moe"]


@pytest.mark.parametrize(
    ("case", "checkpointing", "dtype"),
    [
        *((case, False, torch.float32) for case in CASES),
        *((case, True, torch.float32) for case in FEW),
        *((case, False, torch.bfloat16) for case in FEW),
    ],
)
def test_estimate_bounds_what_is_saved(
    folder: Callable[[str], Path], case: str, checkpointing: bool, dtype: torch.dtype
) -> None:
    base, stream = load(folder(case), checkpointing, dtype), stream_of(ROWS)
    memory = StreamMemory(
        layer_sizes(base.model.config),
        row_sizes(ROWS, VIRTUAL, base.packed),
        dtype.itemsize,
        LOGITS_BYTES,
    )
    found = saved_bytes(base, stream) / len(stream.token_ids_T)
    expected = memory.saved(checkpointing)
    assert found <= expected <= 1.5 * found, (found, expected)
