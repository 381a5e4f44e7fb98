"""The card of a finished run's adapter, as the Hugging Face hub and a reader get it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

from tests.unit.run_folder import PROMPTS, finished_run
from trainer import config as run_files
from trainer.config import Base
from trainer.model.base_license import License, base_license
from trainer.prompts.peft_adapter import save_peft
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt, VirtualTokens
from trainer.reporting.markdown_text import markdown
from trainer.reporting.model_card import CARD, write_cards
from trainer.reporting.result_table import task_tables
from trainer.reporting.summary import load_summary

TINY = run_files.resolve_path("examples/tiny_base").resolve()
DIGEST = "ab" * 32
HOSTILE = "a | b <script>alert(1)</script> [x](http://e.vil) `c` \x1b[31m **d**\n# e"


def write(
    folder: Path,
    prompt: SoftPrompt,
    base: str = str(TINY),
    of_base: License | None = None,
    of_run: str | None = None,
    **settings: str,
) -> Path:
    """Write a finished run with one saved adapter of ``triage``, and its card."""
    finished_run(folder)
    adapter = folder / "prompts" / "triage"
    usage = save_peft(adapter, prompt, base, num_layers=2, num_attention_heads=4)
    config, summary = run_files.load_output(folder), load_summary(folder)
    assert summary is not None
    tables = task_tables(config, summary)
    used = config.base.model_copy(update=settings)
    config = config.model_copy(update={"license": of_run, "base": used})
    write_cards(folder, config, summary, tables, {"triage": usage}, DIGEST, of_base)
    return adapter / CARD


def test_the_card_has_data_scores_settings_and_use(tmp_path: Path) -> None:
    path = write(tmp_path / "run", VirtualTokens(torch.randn(20, 128)))
    card = ModelCard.load(path)
    assert card.data.library_name == "peft"
    assert card.data.base_model == str(TINY)
    assert card.data.license == "unknown"
    assert card.data.base_model_relation == "adapter"
    assert set(card.data.tags) == {"prompt-tuning", "promptshard"}
    accuracy = PROMPTS["triage"][5]
    results = {(r.dataset_split, r.metric_type): r for r in card.data.eval_results}
    assert results["validation", "accuracy"].metric_value == accuracy
    assert results["shifted_validation", "accuracy"].dataset_name == "triage"
    assert not any(kind.endswith("standard_error") for _, kind in results)
    text = card.text
    datasets = json.loads((tmp_path / "run" / "datasets.json").read_text())
    (train,) = (d for d in datasets if (d["task"], d["split"]) == ("triage", "train"))
    for shown in (train["digest"], DIGEST, "600 of `examples/data/triage.train.jsonl`"):
        assert shown in text
    lines = text.splitlines()
    (own,) = (line for line in lines if line.startswith("| **triage**"))
    assert "94.0%" in own
    (no_prompt,) = (line for line in lines if line.startswith("| no prompt"))
    assert "34.0%" in no_prompt
    assert len([line for line in lines if line.startswith("| “")]) == 3  # hand-written prompts
    assert f"promptshard export {tmp_path}/run triage-vllm --prompt triage --to vllm" in text
    assert f"vllm serve {TINY} --enable-prompt-embeds" in text
    assert f"promptshard generate {tmp_path}/run --prompt triage" in text


CARDS: list[tuple[str, License | None]] = [
    ("license: Apache-2.0", License("apache-2.0")),
    ("license: [mit]", License("mit")),
    (
        "license: other\nlicense_name: llama3.2\nlicense_link: https://example.org/LICENSE",
        License("other", "llama3.2", "https://example.org/LICENSE"),
    ),
    ("license: other\nlicense_name: own\nlicense_link: LICENSE", License("other", "own")),
    ("license: a <b>", None),
    ("license: [", None),
    ("library_name: peft", None),
]


@pytest.mark.parametrize(("front", "expected"), CARDS)
def test_the_license_of_a_folder_is_that_of_its_card(
    tmp_path: Path, front: str, expected: License | None
) -> None:
    base = Base(model=str(tmp_path))
    assert base_license(base, tmp_path) is None, "no card"
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A base\n")
    assert base_license(base, tmp_path) == expected


def test_a_file_of_the_license_on_the_hub_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE\n---\n")
    found = base_license(Base(model="org/base"), tmp_path)
    assert found == License("other", None, "https://huggingface.co/org/base/blob/main/LICENSE")


def test_the_license_is_that_of_the_run_file_or_of_the_base(tmp_path: Path) -> None:
    prompt, named = VirtualTokens(torch.randn(20, 128)), License("other", "own", "https://a.org/x")
    for of_run, of_base, words in (
        ("mit", named, "as the run file states"),
        (None, named, "`own`, the license that the base states"),
    ):
        card = ModelCard.load(write(tmp_path / "run", prompt, of_base=of_base, of_run=of_run))
        license = License(card.data.license, card.data.license_name, card.data.license_link)
        assert license == (named if of_run is None else License("mit"))
        assert words in card.text


def test_the_lines_for_peft_run(tmp_path: Path) -> None:
    prompt_PH = torch.randn(20, 128) * 0.02
    path = write(tmp_path / "run", VirtualTokens(prompt_PH))
    names: dict[str, Any] = {}
    exec(path.read_text().split("```python\n")[1].split("```")[0], names)
    ids = torch.tensor([[5, 6, 7]])
    model, base = names["model"].eval(), names["base"]
    with torch.no_grad():
        words = base.get_input_embeddings()(ids)
        joined = torch.cat([prompt_PH[None], words], 1)
        expected = base(inputs_embeds=joined).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-5)


def test_the_command_of_vllm_names_revision_and_chat_template(tmp_path: Path) -> None:
    prompt = VirtualTokens(torch.randn(20, 128))
    path = write(tmp_path / "run", prompt, "org/base", revision="v 2", chat_template="mine.jinja")
    (line,) = (text for text in path.read_text().splitlines() if text.startswith("vllm serve"))
    assert line == (
        "vllm serve org/base --enable-prompt-embeds --no-enable-prefix-caching --revision 'v 2' "
        "--chat-template triage-vllm/chat_template.jinja"
    )


def test_keys_and_values_are_not_for_vllm(tmp_path: Path) -> None:
    path = write(tmp_path / "run", PrefixKeyValues(torch.randn(20, 2, 2, 2, 8)))
    assert "not keys and values" in path.read_text()
    assert "vllm serve" not in path.read_text()
    assert "prefix-tuning" in metadata_load(path)["tags"]


def test_untrusted_text_is_shown_as_it_is(tmp_path: Path) -> None:
    shown = markdown(HOSTILE)
    assert "<" not in shown
    assert "\x1b" not in shown
    assert "\n" not in shown
    assert "a \\| b &lt;script&gt;" in shown
    path = write(tmp_path / "run", VirtualTokens(torch.randn(20, 128)), base=HOSTILE)
    card = ModelCard.load(path)
    assert card.data.base_model == HOSTILE.replace("\x1b", "\\x1b")
    assert "\x1b" not in path.read_text()
    table = [line for line in card.text.splitlines() if line.startswith("| base |")]
    assert len(table) == 1
    assert table[0].count("|") == 3
