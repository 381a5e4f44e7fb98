"""A model folder's generation settings, read as transformers' ``generate`` reads them."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from trainer.errors import BadInput

FILE_NAME, MODEL_FILE_NAME = "generation_config.json", "config.json"


def read_generation_config(folder: Path) -> GenerationConfig:
    """Read ``generation_config.json``; without one, the settings that ``config.json`` holds.

    That is what ``from_pretrained`` does, but a damaged file is refused instead of ignored.

    Raises:
        BadInput: the file is damaged, or its ``eos_token_id`` is not a token id or a list of them.
    """
    given = (folder / FILE_NAME).is_file()
    path = folder / (FILE_NAME if given else MODEL_FILE_NAME)
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
            f"{path}: eos_token_id: {wrong[0]!r} is not a token id; give the id of the token that "
            "ends what is generated, or a list of ids"
        )
    return config
