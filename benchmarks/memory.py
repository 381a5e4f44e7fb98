"""Memory per GPU of well-known base models in int8, computed before loading. Needs no weights.

    python -m benchmarks.memory           # print the tables
    python -m benchmarks.memory --write   # write them into README.md and docs/big-models.md

Builds every model on ``meta``, as a run does, with the sizes of its published config.json.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from benchmarks.random_base import make_tokenizer
from trainer.config import Base
from trainer.distributed.placement import LIVE_LAYERS
from trainer.distributed.zero3_sharder import base_size, expected_base_bytes
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.families import layer_sizes
from trainer.model.meta_model import build_meta_model
from trainer.model.safetensors_reader import StoredTensor
from trainer.model.transformers_model import build_transformers_model
from trainer.model.weight_mapping import map_weights
from trainer.packing.activation_memory import LOGITS_BYTES, BatchMemory, row_sizes

ROOT = Path(__file__).resolve().parents[1]
DTYPE = torch.bfloat16
GPUS = (1, 2, 4, 8, 16, 32)
#: Packed batch for which activations are estimated, and the rows in it.
BATCH_TOKENS = 2048
ROW_TOKENS = 128
VIRTUAL_TOKENS = 20
#: Table between two markers of a document.
MARKED = re.compile(r"(<!-- (memory-\w+): [^\n]* -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "big-models.md")


def llama(layers: int, hidden: int, intermediate: int, heads: int) -> LlamaConfig:
    """Return the config of a Llama 3.1 with the given sizes."""
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )


def configs() -> dict[str, PretrainedConfig]:
    """Return configs with the sizes of the published ones, by name of the model."""
    return {
        "Llama-3.1-8B": llama(32, 4096, 14_336, 32),
        "Qwen3-32B": Qwen3Config(
            vocab_size=151_936,
            hidden_size=5120,
            intermediate_size=25_600,
            num_hidden_layers=64,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40_960,
            tie_word_embeddings=False,
        ),
        "Llama-3.1-70B": llama(80, 8192, 28_672, 64),
        "Llama-3.1-405B": llama(126, 16_384, 53_248, 128),
    }


@dataclass(frozen=True)
class ModelMemory:
    """Bytes of a base model in int8, with embeddings, head and norms in bfloat16.

    Attributes:
        checkpoint: of all weights in bfloat16.
        base: that stay on each GPU, by number of GPUs.
        gathered: of the layers gathered at a time, with more than one GPU.
        activations: of a packed batch, by ``gradient_checkpointing``.
    """

    checkpoint: int
    base: dict[int, int]
    gathered: int
    activations: dict[bool, int]


def measure(config: PretrainedConfig) -> ModelMemory:
    """Compute the memory of a model of this config."""
    weights = build_transformers_model(config, "model", dtype=DTYPE).state_dict()
    tensors = {
        name: StoredTensor(Path("model.safetensors"), "BF16", tuple(weight.shape), 0, weight.nbytes)
        for name, weight in weights.items()
    }
    files = BaseFiles(
        Path(),
        make_tokenizer(),
        config,
        GenerationConfig(eos_token_id=1),
        "model",
        tensors,
        map_weights(config, tensors, "model"),
    )
    model = build_meta_model(files, Base(model="model"), DTYPE, torch.device("cpu"))
    rows = row_sizes([ROW_TOKENS] * (BATCH_TOKENS // ROW_TOKENS), VIRTUAL_TOKENS)
    logits = min(LOGITS_BYTES, 4 * config.vocab_size * BATCH_TOKENS)
    batch = BatchMemory(layer_sizes(config), rows, DTYPE.itemsize, logits)
    return ModelMemory(
        sum(stored.num_bytes for stored in tensors.values()),
        {gpus: expected_base_bytes(model, DTYPE, gpus) for gpus in GPUS},
        LIVE_LAYERS * base_size(model, DTYPE).layer_bytes,
        {flag: batch.batch_bytes(BATCH_TOKENS, flag) for flag in (False, True)},
    )


def base_row(name: str, memory: ModelMemory) -> str:
    return _row(name, [*memory.base.values(), memory.gathered])


def batch_row(name: str, memory: ModelMemory) -> str:
    return _row(name, [memory.checkpoint, memory.base[1], *memory.activations.values()])


def tables() -> dict[str, str]:
    """Return the Markdown tables by the name of their marker."""
    memories = {name: measure(config) for name, config in configs().items()}
    numbers = " | ".join(f"{gpus} GPU" if gpus == 1 else f"{gpus} GPUs" for gpus in GPUS)
    base = [
        f"| base model, GB per GPU | {numbers} | gathered layers, up to |",
        f"|---|{'---|' * (len(GPUS) + 1)}",
        *(base_row(*item) for item in memories.items()),
    ]
    batch = [
        "| base model, GB | checkpoint in bfloat16 | in int8 | activations "
        "| with gradient checkpointing |",
        "|---|---|---|---|---|",
        *(batch_row(*item) for item in memories.items()),
    ]
    return {"memory-base": "\n".join(base), "memory-batch": "\n".join(batch)}


def _row(name: str, sizes: Iterable[int]) -> str:
    return f"| {name} | {' | '.join(f'{size / 1e9:.1f}' for size in sizes)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the tables into the documents")
    args = parser.parse_args()
    computed = tables()
    print("\n\n".join(computed.values()))
    if args.write:
        for path in DOCUMENTS:
            text = path.read_text(encoding="utf-8")
            written = MARKED.sub(lambda m: f"{m[1]}{computed[m[2]]}\n{m[3]}", text)
            path.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
