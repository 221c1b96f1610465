"""What a user can say, and what is refused before an engine starts."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.platforms
from safetensors.torch import load_file, save_file
from vllm.config import ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.worker.worker_base import WorkerBase

from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.errors import JakiroError
from jakiro_vllm.integration import front_end, version


@pytest.fixture(scope="module", autouse=True)
def _plugins() -> None:
    load_general_plugins()


def configure(target: str | Path = EMBEDDED_TARGET, **arguments: Any) -> Any:
    """The engine configuration for these arguments; no engine is started."""
    return EngineArgs(model=str(target), dtype="float32", max_model_len=256, **arguments).create_engine_config()


def head_with(folder: Path, tensors: dict[str, Any] | None = None, **config: Any) -> Path:
    """A copy of the embedded head with some tensors and settings replaced."""
    shutil.copytree(EMBEDDED_HEAD, folder)
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    if tensors is not None:
        save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    return folder


def target_with(folder: Path, **config: Any) -> Path:
    """A copy of the embedded target's configuration with some settings replaced."""
    shutil.copytree(EMBEDDED_TARGET, folder)
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_flag_selects_the_published_head() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", str(EMBEDDED_TARGET), "--speculative-model", "jakiro"])
    config = EngineArgs.from_cli_args(args).create_engine_config()
    assert config.additional_config["jakiro"]["head"] == str(EMBEDDED_HEAD)
    assert config.speculative_config.method == "custom_class"
    assert config.parallel_config.worker_cls == front_end.WORKERS["cpu"]


def test_flag_and_json_join() -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    tree = json.dumps({"num_speculative_tokens": 12, "tree": {"depth": 4, "top_k": 3}})
    args = parser.parse_args(
        ["--model", str(EMBEDDED_TARGET), "--speculative-model", str(EMBEDDED_HEAD), "--speculative-config", tree]
    )
    config = EngineArgs.from_cli_args(args).create_engine_config()
    assert config.speculative_config.num_speculative_tokens == 12
    assert config.additional_config["jakiro"]["tree"] == {
        "node_budget": 12,
        "depth": 4,
        "top_k": 3,
        "policy": "auto",
        "adaptive": True,
        "lookup": True,
    }


def test_other_methods_pass_untouched() -> None:
    config = configure(speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3})
    assert config.speculative_config.method == "ngram"
    assert config.parallel_config.worker_cls != front_end.WORKERS["cpu"]
    assert configure().speculative_config is None


def test_additional_config_of_the_user_is_kept() -> None:
    config = configure(
        additional_config={"mine": 1}, speculative_config={"method": "jakiro", "model": str(EMBEDDED_HEAD)}
    )
    assert config.additional_config["mine"] == 1


def test_the_same_arguments_configure_twice() -> None:
    args = EngineArgs(
        model=str(EMBEDDED_TARGET),
        dtype="float32",
        max_model_len=256,
        speculative_config={"method": "jakiro", "model": "jakiro"},
    )
    first, second = args.create_engine_config(), args.create_engine_config()
    assert second.parallel_config.worker_cls == first.parallel_config.worker_cls == front_end.WORKERS["cpu"]
    assert second.speculative_config.model == first.speculative_config.model == front_end.PROPOSER
    assert second.additional_config == first.additional_config


@pytest.mark.parametrize("other", [["--spec-model", "K"], ["--spec-method", "eagle"]], ids=lambda flags: flags[0])
def test_flags_that_exclude_each_other(other: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    with pytest.raises(SystemExit):
        parser.parse_args([*other, "--speculative-model", "H"])
    assert "exclude each other" in capsys.readouterr().err


def platform(**kinds: bool) -> Any:
    """A stand-in for vLLM's platform."""
    return SimpleNamespace(
        is_cpu=lambda: kinds.get("cpu", False),
        is_cuda=lambda: kinds.get("cuda", False),
        device_type="cuda",
        device_name="some device",
    )


def test_every_platform_gets_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(vllm.platforms, "_current_platform", platform(**{name: True}))
        assert front_end.choose_worker() == front_end.WORKERS[name]
    monkeypatch.setattr(vllm.platforms, "_current_platform", platform())
    with pytest.raises(JakiroError, match=r"CPU and CUDA platforms, got 'cuda' \(some device\)"):
        front_end.choose_worker()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_workers_are_where_their_names_say(name: str) -> None:
    module, _, attribute = front_end.WORKERS[name].rpartition(".")
    assert issubclass(getattr(importlib.import_module(module), attribute), WorkerBase)


def test_graphs_reach_as_far_as_the_drafts() -> None:
    """vLLM itself stops at 512 rows, and keeps only sizes of whole trees."""
    args = EngineArgs(model=str(EMBEDDED_TARGET))
    front_end.capture_trees(args, 17)
    assert args.cudagraph_capture_sizes == [17 * n for n in (*range(1, 31), 32, 48, 64)]
    args = EngineArgs(model=str(EMBEDDED_TARGET), max_num_seqs=40, max_num_batched_tokens=600)
    front_end.capture_trees(args, 17)
    assert args.cudagraph_capture_sizes == [17 * n for n in (*range(1, 31), 32)]
    args = EngineArgs(model=str(EMBEDDED_TARGET), max_num_seqs=3)
    front_end.capture_trees(args, 61)
    assert args.cudagraph_capture_sizes == [61, 122, 183]


@pytest.mark.parametrize(
    "chosen",
    [
        {"cudagraph_capture_sizes": [1, 2]},
        {"max_cudagraph_capture_size": 64},
        {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}},
        {"enforce_eager": True},
    ],
    ids=str,
)
def test_graph_sizes_of_the_user_are_kept(chosen: dict[str, Any]) -> None:
    args = EngineArgs(model=str(EMBEDDED_TARGET), **chosen)
    front_end.capture_trees(args, 17)
    assert args.cudagraph_capture_sizes == chosen.get("cudagraph_capture_sizes")


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "no head": ({"method": "jakiro"}, r"needs 'model'"),
    "unknown name": ({"method": "jakiro", "model": "jakiroo"}, r"'jakiroo' is neither a folder nor a hub name"),
    "missing folder": ({"method": "jakiro", "model": "/nowhere/head"}, r"neither a folder nor a hub name"),
    "too large": ({"method": "jakiro", "num_speculative_tokens": 64}, r"\[1, 63\], got 64"),
    "zero": ({"method": "jakiro", "num_speculative_tokens": 0}, r"\[1, 63\], got 0"),
    "too deep": ({"method": "jakiro", "tree": {"depth": 40}}, r"depth must be an integer in \[1, 16\], got 40"),
    "unknown tree key": ({"method": "jakiro", "tree": {"width": 3}}, r"unknown key.* width"),
    "unknown key": ({"method": "jakiro", "nodes": 3}, r"unknown key.* nodes"),
    "unknown policy": ({"method": "jakiro", "tree": {"policy": "best"}}, r"mixture, decoupled, got 'best'"),
    "adaptive is a number": ({"method": "jakiro", "tree": {"adaptive": 1}}, r"adaptive must be true or false, got 1"),
    "lookup is a word": ({"method": "jakiro", "tree": {"lookup": "yes"}}, r"lookup must be true or false, got 'yes'"),
    "lookup without adapting": (
        {"method": "jakiro", "tree": {"lookup": True, "adaptive": False}},
        r"tree\.lookup needs trees that adapt",
    ),
    "tree is a number": ({"method": "jakiro", "tree": 6}, r"must be an object"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_wrong_settings(name: str) -> None:
    settings, message = SETTINGS[name]
    with pytest.raises(JakiroError, match=message):
        configure(speculative_config={"model": str(EMBEDDED_HEAD)} | settings if name != "no head" else settings)


def test_unknown_target_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(JakiroError, match=r"no published head is known .* vicuna-7b-v1.3"):
        configure(target_with(tmp_path / "target"), speculative_config={"method": "jakiro", "model": "jakiro"})


def test_head_of_another_size(tmp_path: Path) -> None:
    target = target_with(tmp_path / "target", hidden_size=512, num_attention_heads=8)
    with pytest.raises(JakiroError, match=r"hidden size is 256, the target's is 512"):
        configure(target, speculative_config={"method": "jakiro", "model": str(EMBEDDED_HEAD)})


def test_head_of_other_kv_heads(tmp_path: Path) -> None:
    target = target_with(tmp_path / "target", num_key_value_heads=4)
    with pytest.raises(JakiroError, match=r"number of KV heads is 2, the target's is 4"):
        configure(target, speculative_config={"method": "jakiro", "model": str(EMBEDDED_HEAD)})


def test_damaged_head(tmp_path: Path) -> None:
    head = head_with(tmp_path / "head")
    weights = (head / "model.safetensors").read_bytes()
    (head / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(JakiroError, match=r"may be damaged"):
        configure(speculative_config={"method": "jakiro", "model": str(head)})


def test_head_with_values_that_are_not_finite(tmp_path: Path) -> None:
    broken = torch.full((256, 512), float("nan"))
    head = head_with(tmp_path / "head", {"fc.weight": broken})
    with pytest.raises(JakiroError, match=r"not finite"):
        configure(speculative_config={"method": "jakiro", "model": str(head)})


TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "MLA": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 64,
            "q_lora_rank": None,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "n_routed_experts": 2,
        },
        r"multi-head latent attention",
    ),
    "Mamba": (
        {
            "architectures": ["MambaForCausalLM"],
            "model_type": "mamba",
            "state_size": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 512,
            "conv_kernel": 4,
            "time_step_rank": 16,
        },
        r"recurrent state",
    ),
}


@pytest.mark.parametrize("family", TARGETS)
def test_families_that_cannot_work_yet(tmp_path: Path, family: str) -> None:
    config, message = TARGETS[family]
    with pytest.raises(JakiroError, match=message):
        configure(
            target_with(tmp_path / "target", **config),
            speculative_config={"method": "jakiro", "model": str(EMBEDDED_HEAD)},
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"kv_cache_dtype": "fp8"}, "KV cache dtype 'fp8'"),
        ({"kv_offloading_size": 1.0}, "KV connectors"),
        ({"worker_cls": "some.other.Worker"}, "brings its own worker"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_modes_that_cannot_work_yet(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(JakiroError, match=message):
        configure(**arguments, speculative_config={"method": "jakiro", "model": str(EMBEDDED_HEAD)})


def test_multimodal_targets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM cannot inspect a real one here, where torchvision is left out; so the embedded target says it is one."""
    monkeypatch.setattr(ModelConfig, "is_multimodal_model", property(lambda self: True))
    with pytest.raises(JakiroError, match=r"takes images, audio or video; serve it without speculation"):
        configure(speculative_config={"method": "jakiro", "model": str(EMBEDDED_HEAD)})


def test_lora_is_for_the_cpu_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    speculative = {"method": "jakiro", "model": str(EMBEDDED_HEAD)}
    config = configure(speculative_config=speculative, enable_lora=True, max_num_seqs=8)
    assert config.additional_config["jakiro"]["head"] == str(EMBEDDED_HEAD)
    monkeypatch.setattr(front_end, "choose_worker", lambda: front_end.WORKERS["cuda"])
    with pytest.raises(JakiroError, match=r"LoRA adapters with trees run on vLLM's CPU platform only"):
        configure(speculative_config=speculative, enable_lora=True, max_num_seqs=8)


def test_tensor_parallelism_shares_out_the_heads() -> None:
    """The embedded pair has four attention heads; with four ranks, its two KV heads are held twice."""
    speculative = {"method": "jakiro", "model": str(EMBEDDED_HEAD)}
    for size in (2, 4):
        config = configure(tensor_parallel_size=size, speculative_config=speculative)
        assert config.parallel_config.worker_cls == front_end.WORKERS["cpu"]
    with pytest.raises(JakiroError, match=r"4 attention heads, which 3 .* use --tensor-parallel-size 2"):
        configure(tensor_parallel_size=3, speculative_config=speculative)


def test_unsupported_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = version.metadata.version
    monkeypatch.setattr(version.metadata, "version", lambda name: "0.99.0" if name.startswith("vllm") else real(name))
    with pytest.raises(JakiroError, match=r"supports vLLM .*0\.32.* but vllm 0\.99\.0 is installed"):
        version.check_vllm_version()
