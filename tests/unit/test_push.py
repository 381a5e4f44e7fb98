"""``promptshard push`` against a local stand-in for the hub's HTTP API."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftConfig
from safetensors.torch import load as load_tensors
from typer.testing import CliRunner, Result

from launch import messages
from launch.commands import app
from tests.unit.run_folder import finished_run
from trainer.prompts.peft_adapter import save_peft
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.errors import BadInput

TOKEN = "hf_secretsecretsecretsecret"
PROMPT_PH = torch.arange(4 * 8.0).view(4, 8)


class Hub(ThreadingHTTPServer):
    """Stores one repository, as the hub does: LFS for safetensors, else files in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.created: dict[str, Any] = {}
        self.branches: list[str] = []
        self.refusal: tuple[int, str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_PUT(self) -> None:
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        hub, body = self.server, self.body()
        hub.requests.append((self.path, self.headers.get("Authorization", "")))
        if hub.refusal is not None:
            status, text = hub.refusal
            return self.answer({"error": text}, status, {"X-Error-Message": text})
        if self.path == "/api/repos/create":
            if hub.created:
                return self.answer({"error": "exists", "url": f"{hub.url}/me/notes"}, 409)
            hub.created = json.loads(body)
            return self.answer({"url": f"{hub.url}/me/notes", "id": "1"})
        if self.path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if "/branch/" in self.path:
            hub.branches.append(self.path.rpartition("/")[2])
            return self.answer({})
        if "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/storage/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.objects[value["oid"]]
            commit = {"commitUrl": f"{hub.url}/me/notes/commit/{'a' * 40}", "commitOid": "a" * 40}
            return self.answer({**commit, "success": True})
        raise AssertionError(self.path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # LFS, which the stand-in has
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = finished_run(tmp_path / "run")
    adapter = folder / "prompts" / "triage"
    base = str(tmp_path / "base")
    save_peft(adapter, VirtualTokens(PROMPT_PH), base, num_layers=2, num_attention_heads=4)
    (adapter / "optimizer.bin").write_bytes(b"a pickle")
    return folder


def push(run: Path, *options: str, repo: str = "me/notes", prompt: str = "triage") -> Result:
    arguments = ["push", str(run), repo, "--prompt", prompt, *options]
    return CliRunner().invoke(app, arguments)


def problem(result: Result) -> str:
    assert isinstance(result.exception, BadInput), result.output
    assert TOKEN not in str(result.exception) + result.output
    return str(result.exception)


BASE = ("--base-model", "org/tiny")


def test_the_adapter_and_its_card_are_uploaded(hub: Hub, run: Path, tmp_path: Path) -> None:
    done = push(run, *BASE, "--private", "--yes")
    assert done.exit_code == 0, done.output
    assert f"{hub.url}/me/notes" in done.stdout
    assert "README.md (" in done.stderr
    assert "the base is not uploaded" in done.stderr
    assert TOKEN not in done.output
    assert hub.created.get("private") or hub.created.get("visibility") == "private"
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    tensors = load_tensors(hub.files["adapter_model.safetensors"])
    assert torch.equal(tensors["prompt_embeddings"], PROMPT_PH)
    received = tmp_path / "received"
    received.mkdir()
    for name, data in hub.files.items():
        (received / name).write_bytes(data)
    assert PeftConfig.from_pretrained(received).base_model_name_or_path == "org/tiny"
    card = ModelCard.load(received / "README.md")
    assert card.data.base_model == "org/tiny"
    assert "PeftModel.from_pretrained(base, 'me/notes')" in card.text
    assert str(tmp_path) not in card.content
    assert {token for _, token in hub.requests} == {f"Bearer {TOKEN}"}

    again = push(run, *BASE, "--yes", "--revision", "v2")  # the repository exists by now
    assert again.exit_code == 0, again.output
    assert hub.branches == ["v2"]
    assert hub.requests[-1][0].endswith("/commit/v2")


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "does not accept the token .*set HF_TOKEN, or run: hf auth login"),
        (403, "may not write to me/notes .*role write"),
        (404, "the hub has no me/notes"),
        (400, "rejects the upload, with status 400"),
    ],
)
def test_refusals_of_the_hub_are_explained(hub: Hub, run: Path, status: int, message: str) -> None:
    hub.refusal = status, f"no, {TOKEN}"
    text = problem(push(run, *BASE, "--yes"))
    assert re.search(message, text), text


def test_a_hub_that_fails_or_is_away_is_another_failure(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(messages, "failure", shown.append)
    hub.refusal = 501, "broken"
    assert push(run, *BASE, "--yes").exit_code == 1
    assert "status 501 (broken); push again later" in shown[-1]
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(run, *BASE, "--yes").exit_code == 1
    assert "cannot be reached" in shown[-1]


def test_bad_input_is_explained_before_anything_is_sent(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
        ({}, ("--yes",), "is a path of this machine"),
        ({"repo": "a b"}, BASE, "REPO: 'a b' is not a name of the hub"),
        ({"prompt": "triag"}, BASE, "did you mean 'triage'?"),
        ({}, BASE, "--yes: is needed"),
        ({}, ("--base-model", "/models/x", "--yes"), "--base-model: '/models/x' is not a name"),
    ]
    for given, options, message in cases:
        assert message in problem(push(run, *options, **given))
    (run / "prompts" / "triage" / "adapter_model.safetensors").write_bytes(b"\x80\x04 a pickle")
    assert "not a valid safetensors file" in problem(push(run, *BASE, "--yes"))
    (run / "prompts" / "triage" / "adapter_model.safetensors").unlink()
    assert "finish the run first" in problem(push(run, *BASE, "--yes"))
    assert hub.requests == []


def test_without_a_token_the_remedy_is_named(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "hf auth login" in problem(push(run, *BASE, "--yes"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in problem(push(run, *BASE, "--yes"))
