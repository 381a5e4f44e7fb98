"""The base, and how it is sharded."""

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
    """The frozen pretrained model."""

    model: PathText = Field(min_length=1, description="folder or hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    quantization: Literal["int8", "none"] = Field("int8", description="how weights are stored")
    embeddings: Literal["keep", "int8"] = Field(
        "keep", description="how word embeddings are stored; keep: in the checkpoint's type"
    )
    head: Literal["keep", "int8"] = Field(
        "keep", description="the same for the head; where it is the embedding table, both are one"
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
        description="compute type; auto: bfloat16 on GPUs that have it, float32 elsewhere",
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_float16(cls, value: Any) -> Any:
        if value in ("float16", "fp16", "half"):
            raise ValueError(
                f"{value!r} has too small a range for gradients through a frozen base; use auto, "
                "which takes bfloat16 where the GPU has it, or float32"
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
    """How the base is sharded and recomputed."""

    deepspeed: PathText = Field("ds_configs/zero3.json", description="DeepSpeed policy (JSON)")
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="recompute activations in backward; auto: where they would not fit otherwise",
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="of the packed rows; flex: one FlexAttention kernel, on a GPU only; sdpa: rows "
        "of similar length side by side; auto: sdpa, as flex has not been measured to be faster",
    )
    shard_group: Literal["auto", "world", "node"] | int = Field(
        "world",
        description="ranks that hold one copy of the base together: all, those of a node, a "
        "number, or auto: as few as base_memory allows",
    )
    base_memory: str = Field(
        "auto",
        description="memory of a rank for the base, as 24GB: its shard, the layers at work, and "
        "gathered layers that stay until the step ends; auto: half of what is free",
    )
    timeout_seconds: PositiveInt = Field(1800, description="longest wait for another rank")
    silence_seconds: PositiveInt = Field(
        60, description="a rank that does not respond for so long aborts the run"
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
