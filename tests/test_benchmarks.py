"""Benchmarks: kernels at toy sizes without a GPU, the comparison of heads, and scaled pairs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import ROOT, script
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jakiro_vllm.draft.checkpoint import load_head
from jakiro_vllm.draft.head import DraftHead
from jakiro_vllm.draft.registry import EMBEDDED_HEAD, EMBEDDED_TARGET
from jakiro_vllm.integration.acceptance import Tally
from jakiro_vllm.training.frozen import head_spec
from jakiro_vllm.training.pair import PairRecipe
from jakiro_vllm.training.rollout import rollout

OPERATIONS = {
    "copy",
    "tree attention",
    "experts",
    "walk",
    "compaction",
    "beam",
    "re-rank",
    "top tokens",
    "verify step",
    "draft",
}


@pytest.mark.slow
def test_the_kernels_benchmark_measures_every_kernel(tmp_path: Path) -> None:
    output = tmp_path / "kernels.csv"
    command = [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--interpret", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with output.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["operation"] for row in rows} == OPERATIONS
    assert {row["gpu"] for row in rows} == {"none (interpreted)"}


@pytest.mark.parametrize("script", ["kernels.py", "gpu_smoke.py"])
def test_without_a_gpu_a_benchmark_says_so(script: str, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--output", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "no GPU answers" in done.stderr


@pytest.fixture(scope="module")
def heads() -> ModuleType:
    """The module of ``benchmarks/heads.py``."""
    return script("heads")


def test_contestants_have_as_many_parameters(heads: ModuleType, tmp_path: Path) -> None:
    target = AutoConfig.from_pretrained(EMBEDDED_TARGET)
    counts = []
    for contestant in heads.CONTESTANTS:
        run = heads.Run(contestant, "with", 0)
        settings = heads.settings_of(run, tmp_path, PairRecipe(), 256, 1.0)
        counts.append(sum(p.numel() for p in DraftHead(head_spec(target, settings.head)).parameters()))
    assert max(counts) < 1.03 * min(counts)


def test_the_comparison_of_heads_is_paired_and_averaged(heads: ModuleType, tmp_path: Path) -> None:
    runs = [heads.Run(c, rollout, seed) for seed in (0, 1) for rollout in heads.ROLLOUTS for c in heads.CONTESTANTS]
    for run in runs:
        better = run.contestant.name == "jakiro, mixture"
        tallies = []
        for prompt in range(6):
            tally = Tally()
            for _ in range(10):
                tally.add(2 + prompt % 3 + better)
            tallies.append(asdict(tally))
        folder = tmp_path / "heads" / run.folder
        folder.mkdir(parents=True)
        (folder / "training.json").write_text(json.dumps({"parameters": 7, "steps": 8, "tokens": 9}))
        found = {
            f"{tree}, {t}": {"forwards": 5, "tallies": tallies} for tree in heads.TREES for t in heads.TEMPERATURES
        }
        (folder / "tallies.json").write_text(json.dumps(found))
    means = heads.summary(heads.rows_of(runs, tmp_path))
    assert len(means) == len(heads.TREES) * len(heads.TEMPERATURES) * len(heads.ROLLOUTS) * len(heads.CONTESTANTS)
    for row in means:
        expected = 4 / 3 if row["head"] == "jakiro, mixture" else 1
        assert row["ratio"] == pytest.approx(expected, abs=1e-4)
        assert (row["seeds"], row["ratio_half"]) == (2, pytest.approx(0, abs=1e-9))
    heads.write_table(means, tmp_path / "t.md")
    assert "| jakiro, mixture | 5 | 7 | 4.000 ± 0.000 | 1.333 ± 0.000 |" in (tmp_path / "t.md").read_text()
    heads.plot(means, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((512, 7, 1024, 8, 4), id="wider and deeper"),
        pytest.param((384, 5, 768, 6, 2), id="more query heads per KV head"),
        pytest.param((256, 6, 768, 4, 2), id="deeper"),
    ],
)
@torch.no_grad()
def test_a_cost_scaled_pair_computes_the_same(sizes: tuple[int, ...], tmp_path: Path) -> None:
    cost_scaled = script("cost_scaled")
    shape = cost_scaled.Shape(*sizes)
    cost_scaled.scale_pair(EMBEDDED_TARGET, EMBEDDED_HEAD, tmp_path, shape)
    small, large = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (EMBEDDED_TARGET, tmp_path / "target")
    )
    assert large.config.num_hidden_layers == shape.layers
    assert len(AutoTokenizer.from_pretrained(tmp_path / "target")) == 4096
    prompt = torch.arange(40, 60).unsqueeze(0)
    tokens = small.generate(prompt, max_new_tokens=60, do_sample=False, pad_token_id=0)
    assert torch.equal(large.generate(prompt, max_new_tokens=60, do_sample=False, pad_token_id=0), tokens)
    ours, theirs = (model(tokens, output_hidden_states=True) for model in (small, large))
    torch.testing.assert_close(theirs.logits, ours.logits, rtol=1e-4, atol=1e-4)
    features = [found.hidden_states[-1] for found in (ours, theirs)]
    torch.testing.assert_close(features[1][..., :256], features[0], rtol=1e-4, atol=1e-4)
    assert not features[1][..., 256:].any()
    drafts = []
    for model, folder, feature in ((small, EMBEDDED_HEAD, features[0]), (large, tmp_path / "head", features[1])):
        head = load_head(folder, torch.float32)
        head.prepare_positions(tokens.shape[1])
        segments, positions = torch.ones_like(tokens), torch.arange(tokens.shape[1]).unsqueeze(0)
        outputs = rollout(head, model.get_input_embeddings()(tokens), feature, segments, positions, 3)
        drafts.append([(output.feature()[..., :256], output.contrast()[..., :256]) for output in outputs])
    for mine, scaled in zip(*drafts, strict=True):
        for a, b in zip(mine, scaled, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_heads_of_equal_parameters_stay_equal(tiny_head_folder: Callable[..., Path], tmp_path: Path) -> None:
    """And a dense head, for vLLM's own EAGLE, computes the same after scaling."""
    cost_scaled = script("cost_scaled")
    sizes = {"hidden_size": 256, "num_heads": 4, "kv_heads": 2, "head_dim": 64, "vocab_size": 4096}
    made = {
        "dense": tiny_head_folder("dense", intermediate_size=1536, **sizes),
        "jakiro": tiny_head_folder("jakiro", intermediate_size=768, **sizes),
        "four experts": tiny_head_folder("jakiro", intermediate_size=384, num_experts=4, **sizes),
        "jakiro_star": tiny_head_folder("jakiro_star", intermediate_size=1152, **sizes),
    }
    for shape in (cost_scaled.Shape(512, 5, 1024, 8, 4), cost_scaled.Shape(1024, 5, 1024, 16, 4)):
        counts = []
        for name, folder in made.items():
            cost_scaled.scale_head(folder, tmp_path / name, shape)
            counts.append(sum(p.numel() for p in load_head(tmp_path / name).parameters()))
        assert max(counts) < 1.03 * min(counts)
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["vocab_size"] == 4096
    embeds, features = torch.randn(2, 1, 20, 256)
    padded = [torch.nn.functional.pad(x, (0, 768)) for x in (embeds, features)]
    segments, positions = torch.ones(1, 20, dtype=torch.int64), torch.arange(20).unsqueeze(0)
    found = []
    for folder, (embed, feature) in ((made["dense"], (embeds, features)), (tmp_path / "dense", padded)):
        head = load_head(folder, torch.float32)
        head.prepare_positions(20)
        found.append([output.feature() for output in rollout(head, embed, feature, segments, positions, 3)])
    for mine, scaled in zip(*found, strict=True):
        torch.testing.assert_close(scaled[..., :256], mine, rtol=1e-3, atol=1e-3)
        assert not scaled[..., 256:].any()


def test_a_pair_does_not_shrink(tmp_path: Path) -> None:
    cost_scaled = script("cost_scaled")
    with pytest.raises(ValueError, match="hidden size cannot shrink from 256 to 128"):
        cost_scaled.scale_pair(EMBEDDED_TARGET, EMBEDDED_HEAD, tmp_path, cost_scaled.Shape(128, 5, 768, 4, 2))
