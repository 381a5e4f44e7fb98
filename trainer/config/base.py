"""Settings of the base model and of the engine that shards it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.types import (
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    checked,
    parse_bytes,
)


class Base(Section):
    """The frozen pretrained base model."""

    model: PathText = Field(
        min_length=1,
        description="the pretrained model: a folder, a GGUF file, or an id on the Hugging Face hub"
        "\nAn id is such as meta-llama/Llama-3.2-3B. Folders must have weights in safetensors.",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub model\nnull: main"
    )
    chat_template: PathText | None = Field(
        None,
        description="Jinja file that replaces the tokenizer's own chat template\n"
        "null: the tokenizer's own",
    )
    quantization: Literal["int8", "none"] = Field(
        "int8",
        description="storage of the weights of linear layers\n"
        "int8: one byte per weight, and one fp32 scale per row\n"
        "none: in the compute type, dtype",
    )
    embeddings: Literal["keep", "int8"] = Field(
        "keep",
        description="storage of the token embeddings\n"
        "keep: as in the checkpoint\n"
        "int8: one byte per weight, and one fp32 scale per row",
    )
    head: Literal["keep", "int8"] = Field(
        "keep",
        description="storage of the LM head\n"
        "Must equal embeddings if the model ties the two.\n"
        "keep: as in the checkpoint\n"
        "int8: one byte per weight, and one fp32 scale per row",
    )
    matmul: Literal["auto", "int8", "int8x2", "int8_outliers", "bitsandbytes", "dequantize"] = (
        Field(
            "auto",
            description="how int8 weights are multiplied\n"
            "auto: the fastest in training (by timing on a GPU, by hidden size and CPU otherwise)\n"
            "int8: activations are quantized too, in training to 8 bits, in scoring and generation "
            "to 16 (two int8 terms)\n"
            "int8x2: activations are quantized to 16 bits in training, too\n"
            "int8_outliers: all activations but the largest are quantized to 8 bits\n"
            "bitsandbytes: LLM.int8() by bitsandbytes' kernels (extra promptshard[bitsandbytes])\n"
            "dequantize: exact to the stored weights",
        )
    )
    outlier_threshold: PositiveFloat = Field(
        6.0,
        description="activations of larger magnitude are not quantized\n"
        "For matmul int8_outliers and bitsandbytes; the latter does not quantize their features "
        "either.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="compute type\n"
        "auto: bfloat16 on GPUs that support it, else float32\n"
        "float32: 32 bits\n"
        "bfloat16: 16 bits with the range of float32",
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: Any) -> Any:
        if value in ("float16", "fp16", "half"):
            raise ValueError(
                f"{value!r} has too small a range for gradients through a frozen base; use auto "
                "(bfloat16 if the GPU supports it) or float32"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Base:
        problems = []
        if self.outlier_threshold != 6.0 and self.matmul not in ("int8_outliers", "bitsandbytes"):
            problems.append(
                f"outlier_threshold: has no effect on matmul {self.matmul}; use matmul: "
                "int8_outliers or bitsandbytes, or remove it"
            )
        return checked(self, problems)


class Profile(Section):
    """Steps that torch.profiler records."""

    first: PositiveInt = Field(5, description="first recorded step")
    steps: PositiveInt = Field(3, description="number of recorded steps")


class EngineConfig(Section):
    """Sharding, recomputation and attention of the base model."""

    deepspeed: PathText = Field(
        "ds_configs/zero3.json",
        description="DeepSpeed policy, a JSON file\n"
        "ds_configs/zero3_offload_cpu.json keeps the shards in CPU memory.",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="recompute activations in backward, to save memory\n"
        "auto: only if they do not fit otherwise\n"
        "true: always\n"
        "false: never",
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="attention of packed rows\n"
        "auto: sdpa, because flex has not been measured to be faster\n"
        "sdpa: rows of similar length in one call\n"
        "flex: one FlexAttention kernel, GPU only",
    )
    shard_group: Literal["auto", "world", "node"] | Annotated[int, Field(gt=0)] = Field(
        "world",
        description="ranks that together hold one copy of the base model\n"
        "auto: as few as base_memory allows\n"
        "world: all ranks\n"
        "node: the ranks of one node\n"
        "A number: that many ranks.",
    )
    base_memory: str = Field(
        "auto",
        json_schema_extra={"format": "size", "pattern": r"^(auto|\d+(\.\d+)? ?[KMGT]B)$"},
        description="memory per rank for the base model, such as 24GB\n"
        "Used for the rank's shard, the gathered layers in use, and gathered layers that are kept "
        "until the step ends.\n"
        "auto: half of the free memory",
    )
    timeout_seconds: PositiveInt = Field(1800, description="timeout of collectives, in seconds")
    silence_seconds: PositiveInt = Field(
        60, description="abort the run if a rank does not respond for this many seconds"
    )
    profile: Profile | None = Field(
        None,
        description="record a few steps with torch.profiler\n"
        "Writes a chrome trace and a table of the top operators of every rank to output_dir/logs.\n"
        "null: off",
    )

    @field_validator("shard_group", mode="before")
    @classmethod
    def _check_group(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value not in ("auto", "world", "node") and not number:
            raise ValueError(f"{value!r} is not one of auto, world, node or a number of ranks")
        return value

    @field_validator("base_memory", mode="before")
    @classmethod
    def _check_memory(cls, value: Any) -> Any:
        if value != "auto":
            parse_bytes(value)
        return value
