"""``promptshard plan``: sizes from headers, options per shard group, the command and its errors."""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer import Exit
from typer.testing import CliRunner

from launch import plan_command
from launch.commands import app
from launch.plan_command import plan_arguments
from tests.quantized_folders import FORMATS, quantize_folder
from trainer.commands import plan as command
from trainer.config import Base, load
from trainer.cost_model import hardware
from trainer.cost_model.base_headers import open_base_shape
from trainer.cost_model.hardware import (
    CONTEXT_BYTES,
    cpu_device,
    find_device,
    gpu_named,
    read_hardware,
)
from trainer.cost_model.run_needs import needs_of_row_tokens
from trainer.cost_model.run_plan import Option, RunPlan, compute_seconds, plan_run
from trainer.distributed.zero3_sharder import base_size, expected_base_bytes
from trainer.model import hub
from trainer.model.checkpoint_files import open_base
from trainer.model.cpu_rates import CpuRates, measure_cpu
from trainer.model.meta_model import build_meta_model
from trainer.reporting.planned import PlanComparison, as_summary
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.training.callbacks import StepReport

CPU = torch.device("cpu")
#: Families that differ in names, biases, fused or transposed matrices, experts and their routers.
PLANNED = (
    *("llama", "qwen2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt-projected", "falcon-grouped"),
    *("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4", "qwen2_vl", "granitemoeshared"),
    # Containers whose text config names no tied head, or another than the container.
    *("qwen2_5_vl", "glm4v", "qwen3_vl_moe"),
)


@pytest.mark.parametrize("case", PLANNED)
def test_sizes_from_headers_are_those_of_the_model(family: Callable[..., Path], case: str) -> None:
    check_sizes(Base(model=str(family(case))))


def check_sizes(settings: Base) -> None:
    """Compare sizes from headers with those of the model that a run builds."""
    shape, _, _ = open_base_shape(settings, itemsize=4)
    model = build_meta_model(open_base(settings), settings, torch.float32, CPU)
    built, from_headers = base_size(model, torch.float32), shape.size
    for name in ("total_bytes", "layer_bytes", "layer_elements", "looked_up_bytes"):
        assert getattr(from_headers, name) == pytest.approx(getattr(built, name), rel=0.01), name
    for ranks in (1, 2, 4):
        expected = expected_base_bytes(model, torch.float32, ranks)
        assert shape.resident_bytes(ranks) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("quantization", ["int8", "none"])
@pytest.mark.parametrize("form", ["fp8 per tensor, compressed", "packed int8 per group"])
def test_sizes_of_quantized_weights_are_those_of_the_model(
    family: Callable[..., Path], tmp_path: Path, form: str, quantization: str
) -> None:
    quantize_folder(family("llama"), FORMATS[form], tmp_path / "base", tmp_path / "plain")
    check_sizes(Base(model=str(tmp_path / "base"), quantization=quantization))


def write_base(folder: Path, layers: int, hidden: int, mlp: int, vocab: int) -> Path:
    """Write the config and the headers of a Llama; its weights are a hole in a file."""
    folder.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": [vocab, hidden], "lm_head": [vocab, hidden]}
    for i in range(layers):
        inner = {"q": hidden, "k": 1024, "v": 1024, "o": hidden}
        shapes |= {f"model.layers.{i}.self_attn.{k}_proj": [n, hidden] for k, n in inner.items()}
        shapes |= {f"model.layers.{i}.mlp.{k}_proj": [mlp, hidden] for k in ("gate", "up")}
        shapes |= {f"model.layers.{i}.mlp.down_proj": [hidden, mlp]}
        shapes |= {f"model.layers.{i}.{n}_layernorm": [hidden] for n in ("input", "post")}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    return write_base(root / "base", 32, 4096, 14_336, 128_256)


@pytest.fixture(scope="module")
def run_file(llama_8b: Path) -> Path:
    rows = llama_8b.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"a": f"w{i}", "b": "x"}) + "\n" for i in range(100)))
    path = llama_8b.parent / "run.yaml"
    run = {
        "output_dir": str(llama_8b.parent / "out"),
        "base": {"model": str(llama_8b)},
        "tasks": [{"name": "t", "train": str(rows), "input": "{a}", "target": "{b}"}],
        "prompts": [{"name": "p", "task": "t", "init": "random"}],
        "training": {"steps": 1000, "tokens_per_step": 65_536},
    }
    path.write_text(json.dumps(run))
    return path


def plan_of(
    run_file: Path, gpu: str, nodes: Sequence[int], *overrides: str, network: str = "ndr"
) -> RunPlan:
    config = load(run_file, overrides)
    device = find_device(
        read_hardware(), gpu, gpus_per_node=nodes[0], network=network, dtype=config.base.dtype
    )
    base, text, stored = open_base_shape(config.base, device.itemsize)
    return plan_run(needs_of_row_tokens(config, 512, base, text, stored), device, nodes)


def test_a_base_that_fits_is_not_sharded(run_file: Path) -> None:
    plan = plan_of(run_file, "h100-80gb", [8, 8])
    assert [option.shard_group for option in plan.options] == [1, 2, 4, 8, 16]
    best = plan.options[plan.recommended]
    assert (best.shard_group, best.fits, best.limited_by) == (1, True, "compute")
    assert best.bytes.base_shard == pytest.approx(9.1e9, rel=0.01)  # 7 GB int8, 2.1 GB tables
    assert best.cost.gathered_bytes == 0
    # 41% of peak is published for LoRA on this model and GPU: 12,473 tokens per second.
    assert best.useful_tokens_per_second / 16 == pytest.approx(12_473, rel=0.15)


def test_int8_products_of_a_cpu_are_faster_where_a_run_uses_them(run_file: Path) -> None:
    def seconds(*overrides: str, **rates: Any) -> float:
        config = load(run_file, ["training.tokens_per_step=2048", *overrides])
        device = replace(cpu_device(2, CpuRates(1e11, None, 2e10, 1e10)), **rates)
        device = replace(device, memory_bytes=64_000_000_000)
        base, text, stored = open_base_shape(config.base, device.itemsize)
        needs = needs_of_row_tokens(config, 512, base, text, stored)
        return plan_run(needs, device, [2]).options[0].step_seconds

    fast = {"int8_flops": 4e11}
    exact, other = "base.matmul=dequantize", "base.quantization=none"
    assert seconds(**fast) < 0.5 * seconds()
    assert seconds(exact, **fast) == seconds(exact) == seconds()
    assert seconds(other, **fast) == seconds(other)
    assert seconds(loop_rate=1e10) > seconds()


def test_terms_of_int8_activations_cost_products(run_file: Path) -> None:
    def option(matmul: str) -> Option:
        config = load(run_file, [f"base.matmul={matmul}"])
        device = cpu_device(2, CpuRates(1e11, 4e11, 2e10, 1e10))
        base, text, stored = open_base_shape(config.base, device.itemsize)
        needs = needs_of_row_tokens(config, 512, base, text, stored)
        return plan_run(needs, device, [2]).options[-1]

    def scoring(option: Option) -> float:
        return option.seconds["baselines"] + option.seconds["validation"]

    one, two, outliers = map(option, ("int8", "int8x2", "int8_outliers"))
    product = one.cost.linear_flops / 2 / 4e11
    assert two.step_seconds - one.step_seconds == pytest.approx(product)
    assert outliers.step_seconds == one.step_seconds
    # Without gradients, int8 is int8x2; a term more than with int8_outliers.
    assert scoring(two) == pytest.approx(scoring(one))
    assert scoring(one) / scoring(outliers) == pytest.approx(1 + 2 * product / one.step_seconds)


def test_cpu_ranks_of_a_node_gather_large_bases_from_shared_memory(run_file: Path) -> None:
    def option(stored: float, nodes: list[int], **rates: Any) -> Option:
        config = load(run_file, ["engine.shard_group=world"])
        device = cpu_device(2, CpuRates(1e11, 4e11, 2e10, 1e10, 4e9))
        device = replace(device, memory_bytes=64_000_000_000, **rates)
        base, text, _ = open_base_shape(config.base, device.itemsize)
        needs = needs_of_row_tokens(config, 512, base, text, int(stored))
        return plan_run(needs, device, nodes).options[-1]

    shared, sent = option(16e9, [2]), option(16e9, [2], shared_rate=None)
    layers = shared.cost.gathered_bytes - shared.cost.exchanged_bytes
    assert layers > 0
    assert shared.step_seconds - sent.step_seconds == pytest.approx(
        2 * layers / 4e9 - layers / (1e10 / 4), rel=1e-6
    )
    for stored, nodes in ((0.9e9, [2]), (16e9, [1, 1])):  # by messages
        times = [option(stored, nodes, shared_rate=rate).step_seconds for rate in (4e9, None)]
        assert times[0] == times[1]


def test_a_cpu_converts_no_weights_for_int8_products(run_file: Path) -> None:
    def activations(**rates: Any) -> int:
        config = load(run_file)
        device = replace(cpu_device(2, CpuRates(1e11, 4e11, 2e10, 1e10)), **rates)
        base, text, stored = open_base_shape(config.base, device.itemsize)
        needs = needs_of_row_tokens(config, 512, base, text, stored)
        return plan_run(needs, device, [2]).options[-1].bytes.activations

    copies = 2 * 4 * 4096 * 14_336  # of the largest matrix, in fp32
    assert activations(int8_flops=None) - activations() == copies


def test_large_matrices_may_have_another_rate_on_a_cpu(run_file: Path) -> None:
    """All matrices of this base are large."""

    def seconds(large_flops: float | None) -> tuple[float, float]:
        config = load(run_file)
        device = replace(cpu_device(2, CpuRates(1e11, None, 2e10, 1e10)), large_flops=large_flops)
        base, text, stored = open_base_shape(config.base, device.itemsize)
        needs = needs_of_row_tokens(config, 512, base, text, stored)
        option = plan_run(needs, device, [2]).options[-1]
        exact = option.cost.flops - option.cost.attention_flops
        return compute_seconds(needs, device, option.cost, False), exact / 1e11

    (usual, products), (fast, _) = seconds(None), seconds(2e11)
    assert seconds(1e11)[0] == usual
    assert usual - fast == pytest.approx(products / 2, rel=0.02)


def test_rates_of_this_cpu_are_measured() -> None:
    rates = measure_cpu()
    assert rates.shared_rate is not None
    assert rates.large_flops is not None
    measured = rates.float_flops, rates.loop_rate, rates.copy_rate, rates.shared_rate
    assert min(*measured, rates.large_flops) > 0


def test_a_small_gpu_needs_a_larger_shard_group(run_file: Path) -> None:
    plan = plan_of(run_file, "t4", [4, 4], "base.quantization=none")
    assert not plan.options[0].fits
    assert plan.options[plan.recommended].shard_group == 4
    assert plan.options[plan.recommended].fits
    shards = [option.bytes.base_shard for option in plan.options]
    assert shards == sorted(shards, reverse=True)


def test_slow_networks_limit_groups_of_several_nodes(run_file: Path) -> None:
    settings = ("engine.base_memory=3GB", "training.tokens_per_step=2048")
    slow = plan_of(run_file, "a100-80gb", [2, 2], *settings, network="100gbe")
    fast = plan_of(run_file, "a100-80gb", [2, 2], *settings)
    assert slow.options[-1].limited_by == "inter-node fabric"
    assert slow.options[-1].hours > fast.options[-1].hours
    assert slow.options[0].hours == fast.options[0].hours


def test_a_bank_shares_the_gathers(run_file: Path) -> None:
    sweep = "prompts.p.sweep.seed=[0, 1, 2, 3]"
    one, four = (
        plan_of(run_file, "l4", [8], "engine.base_memory=2GB", "training.tokens_per_step=8192", *s)
        for s in ((), (sweep,))
    )
    per_prompt = [plan.options[-1].cost.gathered_bytes / k for plan, k in ((one, 1), (four, 4))]
    assert per_prompt[1] < per_prompt[0]


def test_encoders_take_memory_with_their_default_width(run_file: Path) -> None:
    """Values, gradients, two states of the optimizer and the best values, in fp32."""

    def prompt_bytes(*settings: str) -> int:
        return plan_of(run_file, "h100-80gb", [8], *settings).options[0].bytes.prompts

    assert prompt_bytes() == 20 * 20 * 4096
    large = ("prompts.p.method=prefix_tuning", "prompts.p.encoder=mlp")  # 272M parameters
    one, two = (plan_of(run_file, "l4", [8], *s).options[0].budget for s in ((), large))
    assert one.room - two.room == pytest.approx(0.8 * (prompt_bytes(*large) - prompt_bytes()))
    mlp = prompt_bytes("prompts.p.method=p_tuning")
    assert mlp == pytest.approx(20 * (3 * 4096**2 + 20 * 4096), rel=1e-3)
    assert mlp == prompt_bytes("prompts.p.method=p_tuning", "prompts.p.encoder_hidden_size=4096")
    reader = ("prompts.p.method=p_tuning", "prompts.p.encoder=text", "prompts.p.share=reader")
    one = prompt_bytes(*reader, "prompts.p.init={text: One}")
    assert one == prompt_bytes(*reader, "prompts.p.sweep.init=[{text: One}, {text: Two}]")


def test_a_teacher_takes_a_forward_pass(run_file: Path) -> None:
    """Products and gathers of a third pass, beside those of forward and backward."""
    settings = ("engine.base_memory=2GB", "training.tokens_per_step=8192")
    distill = ("prompts.p.objective=distill", "prompts.p.teacher='Answer with one word.'")
    plain, taught = (
        plan_of(run_file, "l4", [8], *settings, *s).options[-1].cost for s in ((), distill)
    )
    assert taught.linear_flops == pytest.approx(1.5 * plain.linear_flops, rel=0.05)
    assert 1.3 < taught.gathered_bytes / plain.gathered_bytes < 1.6


def test_json_has_the_keys_of_the_design(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    arguments = plan_arguments(str(run_file), [], 16, 8, gpu="H100-80GB", row_tokens=512)
    assert command.main([*arguments, f"--json={out}"]) == 0
    # Without the base's folder, whose length is the user's.
    lines = capsys.readouterr().out.replace(f"{run_file.parent}/", "").splitlines()
    assert max(map(len, lines)) <= 80, lines
    plan = json.loads(out.read_text())
    option = plan["options"][plan["recommended"]]
    assert {
        *("shard_group", "fits", "bytes", "micro_batch_tokens", "gathered_bytes_per_step"),
        *("flops_per_step", "useful_tokens_per_second", "load_seconds", "hours", "gpu_hours"),
        "limited_by",
    } <= option.keys()
    parts = {"base_shard", "gathered", "activations", "head", "prompts", "other", "total"}
    assert option["bytes"].keys() == parts
    assert option["bytes"]["total"] == sum(option["bytes"][part] for part in parts - {"total"})
    assert option["gpu_hours"] == pytest.approx(16 * option["hours"])


def test_large_numbers_are_printed_without_exponents(
    tmp_path: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"base.model={write_base(tmp_path / 'base', 126, 16_384, 53_248, 128_256)}"
    arguments = plan_arguments(str(run_file), [base], 8, 8, gpu="h100-80gb", row_tokens=512)
    assert command.main(arguments) == 0
    text = capsys.readouterr().out
    assert ": 406 billion parameters, 410 GB" in text
    assert re.search(r" [1-9],\d{3} GB gathered per device", text)
    assert "e+" not in text


def test_rows_determine_the_plan_without_row_tokens(
    family: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"a": " ".join(["w5"] * n), "b": "w7"} for n in range(5, 45)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "output_dir": str(tmp_path / "out"),
        "base": {"model": str(family("llama"))},
        "tasks": [
            {"name": "t", "train": str(tmp_path / "rows.jsonl"), "input": "{a}", "target": "{b}"}
        ],
        "prompts": [{"name": "p", "task": "t"}],
        "training": {"steps": 10, "tokens_per_step": 200},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    out = tmp_path / "plan.json"
    arguments = plan_arguments(str(tmp_path / "run.yaml"), [], 2, None, cpu=True)
    assert command.main([*arguments, f"--json={out}"]) == 0
    option = json.loads(out.read_text())["options"][0]
    assert 0 < option["micro_batch_tokens"] < 200
    assert option["seconds"]["validation"] > 0


@pytest.mark.usefixtures("in_this_process")
def test_a_run_that_fits_with_no_shard_group_is_bad_input(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, settings = tmp_path / "plan.json", ["base.quantization=none"]
    arguments = plan_arguments(str(run_file), settings, 1, 1, gpu="t4", row_tokens=512)
    assert command.main([*arguments, f"--json={out}"]) == 2
    captured = capsys.readouterr()
    assert "  NO " in captured.out, "the table is printed"
    assert not any(option["fits"] for option in json.loads(out.read_text())["options"])
    needs = r"run\.yaml: does not fit: a rank needs at least [\d.]+ of 1[\d.]+ GB \(with engine"
    assert re.search(needs, captured.err)
    assert "use more devices, or devices with more memory" in captured.err
    with pytest.raises(Exit) as ended:
        plan_command.time_limit(arguments)
    assert ended.value.exit_code == 2


def problems_of(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert command.main(arguments) == 2
    return capsys.readouterr().err


def test_bad_hardware_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    def problems(**options: Any) -> str:
        with pytest.raises(BadInput) as error:
            plan_arguments("run.yaml", [], 8, None, **options)
        return str(error.value)

    unknown = problems(gpu="h100", network="ndrr")
    assert "--gpu: 'h100' is not known" in unknown
    assert "(did you mean h100-pcie or h100-80gb?)" in unknown
    assert "v100-32gb, t4, a10" in unknown
    assert "--network: 'ndrr' is not known (did you mean 'ndr'?)" in unknown
    assert "--gpu: name a GPU, give --gpu-memory" in problems(tflops=100.0)
    (tmp_path / "more.yaml").write_text("gpus: {mine: {memory_gb: -1}}")
    assert "gpus.mine.memory_gb" in problems(gpu="mine", hardware=str(tmp_path / "more.yaml"))


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(BadInput) as error:
        plan_arguments("run.yaml", [], 12, 8, bandwidth=-1.0, gpu_memory="big", cpu=True)
    text = str(error.value)
    with pytest.raises(BadInput, match=r"^--gpus-per-node: 0 must be above 0$"):
        plan_arguments("run.yaml", [], 8, 0, gpu="h200")
    for part in ("--bandwidth: -1.0", "8 does not divide --gpus 12", "'big'", "--cpu: describes"):
        assert part in text


def test_a_shard_group_that_does_not_divide_is_refused(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = plan_arguments(
        str(run_file), ["engine.shard_group=3"], 8, None, gpu="h200", row_tokens=64
    )
    assert "3 does not divide the 8 ranks" in problems_of(capsys, arguments)


def test_bases_without_sizes_or_of_other_kinds_are_refused(
    run_file: Path, tmp_path: Path, family: Callable[..., Path]
) -> None:
    folder = write_base(tmp_path / "base", 2, 1024, 512, 300)
    config = json.loads((folder / "config.json").read_text())

    def reason(**changes: Any) -> str:
        changed = {k: v for k, v in (config | changes).items() if v is not None}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(BadInput) as error:
            open_base_shape(Base(model=str(folder)), 2)
        return str(error.value)

    assert "has no hidden_size, num_hidden_layers" in reason(
        hidden_size=None, num_hidden_layers=None
    )
    assert "are stored in awq, not supported" in reason(quantization_config={"quant_method": "awq"})
    with pytest.raises(BadInput, match="does not know the sizes of family 'mamba2'"):
        open_base_shape(Base(model=str(family("mamba2"))), 2)
    (tmp_path / "base.gguf").touch()
    with pytest.raises(BadInput, match="is a GGUF file"):
        open_base_shape(Base(model=str(tmp_path / "base.gguf")), 2)


def test_what_the_base_does_not_support_is_refused(
    run_file: Path, family: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def problem(*overrides: str, row_tokens: int = 64) -> str:
        arguments = plan_arguments(
            str(run_file), overrides, 8, None, gpu="h200", row_tokens=row_tokens
        )
        return problems_of(capsys, arguments)

    latent = f"base.model={family('deepseek_v2')}"
    assert "prefix_tuning cannot train" in problem(latent, "prompts.p.method=prefix_tuning")
    tied = f"base.model={family('llama')}"
    assert "base.head: keep, but base.embeddings: int8" in problem(tied, "base.embeddings=int8")
    both = ("base.quantization=none", "base.head=int8")
    assert "base.quantization: none, but" in problem(*both)
    assert "use at most 8172" in problem("prompts.p.num_virtual_tokens=20", row_tokens=8173)


def test_offloaded_shards_are_refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = "engine.deepspeed=ds_configs/zero3_offload_cpu.json"
    arguments = plan_arguments(str(run_file), [policy], 8, None, gpu="h200", row_tokens=64)
    assert "which plan does not model" in problems_of(capsys, arguments)


def test_users_add_their_own_gpus(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(
        "gpus:\n  mine: {memory_gb: 50, bfloat16_tflops: 10, float32_tflops: 5, "
        "memory_gb_per_second: 100, link: pigeon}\n"
        "links:\n  pigeon: {gb_per_second: 2}\n"
    )
    device = find_device(
        read_hardware(tmp_path / "more.yaml"), "mine", gpus_per_node=4, network="100gbe"
    )
    assert device.memory_bytes == 50e9 - CONTEXT_BYTES
    assert (device.peak_flops, device.link_rate) == (10e12, 1.6e9)
    assert device.network_rate == pytest.approx(10e9)


def test_every_gpu_has_a_link_and_a_source() -> None:
    data = read_hardware()
    assert {"v100-32gb", "t4", "a10", "l4", "l40s", "a100-40gb", "a100-80gb"} <= data.gpus.keys()
    assert {"h100-pcie", "h100-80gb", "h200", "b200", "mi300x"} <= data.gpus.keys()
    assert {"hdr", "ndr", "efa", "100gbe"} <= data.networks.keys()
    assert all(gpu.link in data.links and gpu.source for gpu in data.gpus.values())
    assert hardware.DATA_FILE.suffix == ".yaml"  # a suffix that the wheel includes


@pytest.mark.parametrize(
    ("name", "gibibytes"),
    [("t4", 14.56), ("l4", 22.03), ("a100-40gb", 39.38), ("a100-80gb", 79.15), ("h200", 139.72)],
)
def test_memory_is_what_the_driver_reports(name: str, gibibytes: float) -> None:
    memory = read_hardware().gpus[name].memory_gb * 1e9
    assert memory == pytest.approx(gibibytes * 2**30, rel=0.005)


def test_a_hub_model_is_planned_from_its_headers(
    llama_8b: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, _, _ = open_base_shape(Base(model=str(llama_8b)), 2)
    asked = []

    def fetch(settings: Base, names: Sequence[str], **_: Any) -> Path:
        asked.extend(names)
        return llama_8b

    text = (llama_8b / "model.safetensors").open("rb").read(1 << 20)
    length = struct.unpack("<Q", text[:8])[0]
    header = json.loads(text[8 : 8 + length])
    remote = {
        name: (entry["dtype"], entry["shape"], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }
    monkeypatch.setattr(hub, "fetch", fetch)
    monkeypatch.setattr(hub, "read_headers", lambda settings: remote)
    shape, _, stored = open_base_shape(Base(model="org/name"), 2)
    assert asked == ["config.json"]
    assert shape == local
    assert stored == header["model.layers.31.post_layernorm.weight"]["data_offsets"][1]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the module of the plan in the tests' process, which has its libraries imported."""
    monkeypatch.setattr(
        plan_command, "run_alone", lambda module, words, imports: command.main(words)
    )


@pytest.mark.usefixtures("in_this_process")
def test_submit_asks_for_the_planned_time(run_file: Path) -> None:
    arguments = plan_arguments(str(run_file), [], 16, 8, gpu="h100-80gb", row_tokens=512)
    planned = plan_command.time_limit(arguments)
    option = plan_of(run_file, "h100-80gb", [8, 8]).options[-1]  # shard_group: world
    assert (planned.hours, planned.time) == (option.hours, option.limit)
    hours, minutes, _ = map(int, planned.time.split(":"))
    limit = 60 * hours + minutes
    assert 75 * planned.hours + 10 <= limit < 75 * planned.hours + 15
    assert limit % 5 == 0


@pytest.mark.usefixtures("in_this_process")
def test_submit_refuses_a_run_that_cannot_fit(run_file: Path) -> None:
    settings = ["base.quantization=none", "engine.shard_group=1"]
    arguments = plan_arguments(str(run_file), settings, 8, 4, gpu="t4", row_tokens=512)
    with pytest.raises(BadInput, match=r"does not fit: a rank needs .*; use engine\.shard_group=2"):
        plan_command.time_limit(arguments)


@pytest.mark.usefixtures("in_this_process")
def test_submit_plans_before_it_renders_the_script() -> None:
    words = ["submit", "examples/quickstart.yaml", "--nodes", "2", "--gpus-per-node", "4"]
    done = CliRunner().invoke(app, [*words, "--plan", "--gpu", "l4", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert re.search(r"#SBATCH --time=00:\d\d:00", done.output)
    refused = CliRunner().invoke(app, [*words, "--gpu", "l4", "--dry-run"])
    assert isinstance(refused.exception, BadInput)
    assert "add --plan" in str(refused.exception)


def test_the_log_compares_plan_and_measurement_once(run_file: Path) -> None:
    plan = plan_of(run_file, "h100-80gb", [8]).options[0]
    out = io.StringIO()
    compared = PlanComparison(plan, Console(out, out))
    for step in range(1, 30):
        compared.on_step_end(StepReport(step, 1.0, 5000.0, 7200.0, []))
    (line,) = out.getvalue().splitlines()
    assert re.search(r"planned [\d.]+ (h|min), at the measured rate 2\.\d h", line)
    assert "measured 5,000 in step 20" in line
    planned = as_summary(plan)
    assert planned.gathered_bytes_per_step == plan.cost.gathered_bytes


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Tesla T4", "t4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_run_finds_its_gpu_by_the_name_of_the_driver(reported: str, name: str | None) -> None:
    assert gpu_named(read_hardware(), reported) == name
