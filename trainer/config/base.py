"""Settings of the base model and of the engine that shards it."""

from __future__ import annotations

from typing import Any, Literal

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

    model: PathText = Field(min_length=1, description="folder, or id on the Hugging Face hub")
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    quantization: Literal["int8", "none"] = Field(
        "int8", description="storage of the weights of linear layers"
    )
    embeddings: Literal["keep", "int8"] = Field(
        "keep", description="storage of the token embeddings; keep: as in the checkpoint"
    )
    head: Literal["keep", "int8"] = Field(
        "keep",
        description="storage of the LM head; must equal embeddings if the two are tied",
    )
    matmul: Literal["auto", "int8", "int8_outliers", "bitsandbytes", "dequantize"] = Field(
        "auto",
        description="int8: activations are quantized too; int8_outliers: all but the largest; "
        "bitsandbytes: LLM.int8() by bitsandbytes' kernels; dequantize: exact to the stored "
        "weights; auto: the fastest (by timing on a GPU, by hidden size and CPU otherwise)",
    )
    outlier_threshold: PositiveFloat = Field(
        6.0,
        description="matmul int8_outliers: activations beyond this are not quantized; "
        "bitsandbytes: nor are their features",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="compute type; auto: bfloat16 on GPUs that support it, else float32",
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

    deepspeed: PathText = Field("ds_configs/zero3.json", description="DeepSpeed policy (JSON)")
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="recompute activations in backward; auto: only if they do not fit otherwise",
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="attention of packed rows; sdpa: rows of similar length in one call; flex: "
        "one FlexAttention kernel, GPU only; auto: sdpa, because flex has not been measured to be "
        "faster",
    )
    shard_group: Literal["auto", "world", "node"] | int = Field(
        "world",
        description="ranks that together hold one copy of the base model: world (all), node (all "
        "of a node), a number, or auto (as few as base_memory allows)",
    )
    base_memory: str = Field(
        "auto",
        description="memory per rank for the base model, such as 24GB: its shard, the gathered "
        "layers in use, and gathered layers that are kept until the step ends; auto: half of the "
        "free memory",
    )
    timeout_seconds: PositiveInt = Field(1800, description="timeout of collectives, in seconds")
    silence_seconds: PositiveInt = Field(
        60, description="abort the run if a rank does not respond for this many seconds"
    )
    profile: Profile | None = Field(
        None,
        description="record a few steps with torch.profiler: a chrome trace and a table of the top "
        "operators of every rank in output_dir/logs; null: off",
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
