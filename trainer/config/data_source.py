"""Settings of the sources of a task's rows."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from trainer.config.types import PathText, PositiveFloat, PositiveInt, Section, checked

#: Sources as written in a run file: a path, ``{path: ..., split: ...}``, or a list of paths.
WrittenSource = str | dict[str, str] | list[str]


class DataSource(Section):
    """Source of rows: files, a folder of ``Dataset.save_to_disk``, or a hub dataset."""

    path: PathText | None = Field(
        None,
        description="a file, a glob such as data/*.jsonl, or a folder of save_to_disk\n"
        "null: hub is given instead",
    )
    hub: str | None = Field(
        None,
        description="id of a dataset on the Hugging Face hub (extra promptshard[hub])\n"
        "null: path is given instead",
    )
    name: str | None = Field(
        None,
        description="configuration of a hub dataset, such as sst2 of nyu-mll/glue\n"
        "hf://nyu-mll/glue/sst2 is a short form.\n"
        "null: its only or default one",
    )
    split: str | None = Field(
        None,
        description="split of a hub dataset or saved folder\n"
        "null: the one named as the setting: train, validation or shifted_validation",
    )
    revision: str | None = Field(
        None, description="branch, tag or commit of a hub dataset\nnull: main"
    )
    weight: PositiveFloat | None = Field(
        None,
        description="share of an epoch's rows, relative to the other sources\n"
        "An epoch has as many rows as all sources together, so a large weight repeats a small "
        "source. For train only.\n"
        "null: every row once per epoch; if so, for all sources",
    )
    max_rows: PositiveInt | None = Field(
        None,
        description="maximum number of rows of this source\n"
        "Selected by a hash of their content.\n"
        "null: all rows",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """Read ``hf://ORG/NAME[/CONFIG]`` as ``{hub: ORG/NAME, name: CONFIG}``, others as paths."""
        if not isinstance(value, str):
            return value
        if not value.startswith("hf://"):
            return {"path": value}
        org, *names = value[5:].removeprefix("datasets/").rstrip("/").split("/", 2)
        hub = {"hub": "/".join([org, *names[:1]])}
        return hub | {"name": names[1]} if names[1:] else hub

    @model_validator(mode="after")
    def _check(self) -> DataSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        alone = [key for key in ("name", "revision") if getattr(self, key) and self.hub is None]
        return checked(self, [f"{key}: works with hub only; remove it" for key in alone])

    @property
    def label(self) -> str:
        """Name of the source in messages."""
        if self.path is not None:
            return self.path
        return f"hf://{self.hub}" + (f"/{self.name}" if self.name else "")


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, list) else [value]


Sources = Annotated[list[DataSource], BeforeValidator(_listed), Field(min_length=1)]
