"""The license of a base, from the model card in its folder or from its GGUF file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.repocard import metadata_load

from trainer.config import Base
from trainer.config.run import LICENSE_ID
from trainer.model.base_tokenizer import CARD, GGUF, local_path
from trainer.model.gguf_header import read_gguf_header
from trainer.runtime.errors import BadInput

_NAME = re.compile(r"[\w.+ -]{1,100}")
_PATH = re.compile(r"[\w./-]{1,100}")
_LINK = re.compile(r"https?://[\w.:/%?=&#~-]{1,300}")
#: A card is a text of some pages.
CARD_BYTES = 1 << 22


@dataclass(frozen=True)
class License:
    """Fields of a model card.

    Attributes:
        id: of the hub's list of licenses, such as ``apache-2.0``; ``other`` for all others.
        name, link: of a license ``other``.
    """

    id: str
    name: str | None = None
    link: str | None = None

    def fields(self) -> dict[str, Any]:
        """Return the arguments of ``ModelCardData``."""
        return {"license": self.id, "license_name": self.name, "license_link": self.link}


def base_license(settings: Base, folder: Path) -> License | None:
    """Return the license of a base; None if it is not stated, or cannot be read.

    Args:
        folder: with the files of the base, or its GGUF file.
    """
    if folder.suffix == GGUF:
        try:
            return _license(read_gguf_header(folder, settings.model).card)
        except BadInput:
            return None
    try:
        path = folder / CARD
        card = metadata_load(path) if path.stat().st_size <= CARD_BYTES else None
    except Exception:  # a missing file, or any error of the YAML of someone's card
        return None
    stated = _license(card if isinstance(card, dict) else {})
    link = None if stated is None else stated.link
    if stated is None or link is None or _LINK.fullmatch(link):
        return stated
    if local_path(settings) is not None:  # the card names a file of its folder
        return License(stated.id, stated.name)
    page = f"{constants.ENDPOINT}/{settings.model}/blob/{settings.revision or 'main'}/{link}"
    return License(stated.id, stated.name, page)


def _license(card: Mapping[str, Any]) -> License | None:
    """Return the license of a card, without values that are not plain text."""
    value = card.get("license")
    first = value[0] if isinstance(value, list) and len(value) == 1 else value
    kind = str(first).lower()
    if first is None or not LICENSE_ID.fullmatch(kind):
        return None
    name, link = (str(card.get(f"license_{key}") or "") for key in ("name", "link"))
    is_link = _LINK.fullmatch(link) or (_PATH.fullmatch(link) and ".." not in link)
    return License(kind, name if _NAME.fullmatch(name) else None, link if is_link else None)
