"""Benchmarks of whole engines: how rows become tables, and two of them from end to end."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from benchmark_scripts import ROOT, script

from jakiro_vllm.config import TreeConfig


@pytest.fixture(scope="module")
def sides() -> ModuleType:
    """The module of ``benchmarks/shared/sides.py``, under the name that the benchmarks import."""
    return script("shared/sides")


@pytest.fixture(scope="module")
def step_clock() -> ModuleType:
    """The module of ``benchmarks/shared/step_clock.py``, likewise."""
    return script("shared/step_clock")


def test_all_sides_are_served_alike(sides: ModuleType) -> None:
    """But for the speculation, whose settings are those of the comparison."""
    configs = sides.speculation("head", "dense")
    assert list(configs) == list(sides.LABELS)
    assert list(sides.speculation("head", None)) == [name for name in sides.LABELS if "eagle" not in name]
    args = argparse.Namespace(dtype="float32", kv_cache_bytes=1, serve_arguments=["enforce-eager"])
    arguments = {name: sides.server_arguments(config, args, 64, 128) for name, config in configs.items()}
    plain = arguments["plain"]
    assert "--enforce-eager" in plain
    assert int(plain[plain.index("--max-num-seqs") + 1]) == 64
    assert int(plain[plain.index("--max-num-batched-tokens") + 1]) >= 64 * (sides.NODES + 1)
    for name, given in arguments.items():
        if name != "plain":
            assert given[: len(plain)] == plain
            assert json.loads(given[-1]) == configs[name]
        if configs[name] and configs[name]["method"] == "jakiro":
            tree = configs[name]["tree"]
            TreeConfig.for_platform(tree | {"node_budget": configs[name]["num_speculative_tokens"]}, can_adapt=True)
            assert tree["adaptive"] is (name in ("head", "adaptive"))


def test_every_side_takes_every_turn(sides: ModuleType) -> None:
    orders = [sides.rotated("abc", turn) for turn in range(-1, 2)]
    assert orders == [["c", "a", "b"], ["a", "b", "c"], ["b", "c", "a"]]


def latency_rows(speed: dict[str, float]) -> list[dict[str, Any]]:
    """Answers of four prompts, whose own speeds are 10, 20, 40 and 80 tokens/s, times a side's."""
    return [
        {
            "temperature": temperature,
            "prompt": prompt,
            "side": side,
            "tokens": 60,
            "seconds": 60 / (10 * 2**prompt * factor),
            "verifications": 0 if side == "plain" else 20,
            "accepted": 0 if side == "plain" else 40,
            "as_plain": not (side == "ngram" and prompt == 3),
        }
        for temperature in (0.0, 1.0)
        for prompt in range(4)
        for side, factor in speed.items()
    ]


def test_latency_is_paired_by_prompt(sides: ModuleType, tmp_path: Path) -> None:
    latency = script("latency")
    rows = latency_rows({"plain": 1.0, "ngram": 1.5, "eagle": 2.0, "tree": 3.0})
    found = latency.summarise(rows, "float32")
    assert [line["side"] for line in found] == 2 * ["plain", "ngram", "eagle", "tree"]
    tree, ngram = found[3], found[1]
    assert (tree["tokens_per_s_p25"], tree["tokens_per_s"], tree["tokens_per_s_p75"]) == (52.5, 90.0, 150.0)
    assert (tree["to_plain_p25"], tree["to_plain"], tree["to_plain_p75"]) == (3.0, 3.0, 3.0)
    assert tree["to_eagle"] == 1.5
    assert (tree["acceptance_length"], found[0]["acceptance_length"]) == (3.0, None)
    assert (tree["identical"], ngram["identical"], ngram["differing"]) == (True, False, 1)
    assert {line["identical"] for line in latency.summarise(rows, "bfloat16")} == {None}
    table = latency.table_of(found)
    ratios = " | ".join(f"{ratio:.2f} ({ratio:.2f} to {ratio:.2f})" for ratio in (3, 2, 1.5))  # plain, n-gram, EAGLE
    assert f"| 0.0 | ours, fixed tree | 90.0 (52.5 to 150.0) | {ratios} | 3.00 |" in table
    assert "1 of 4 texts differ" in table
    latency.plot(found, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_latency_without_rivals_has_no_ratios(sides: ModuleType, tmp_path: Path) -> None:
    latency = script("latency")
    rows = [row | {"as_plain": ""} for row in latency_rows({"tree": 1.0})]
    found = latency.summarise(rows, "float32")
    assert "to_plain" not in found[0]
    assert found[0]["identical"] is None
    assert "to plain" not in latency.table_of(found)


def test_serving_is_paired_by_round(sides: ModuleType, tmp_path: Path) -> None:
    serving = script("serving")
    speed = {"plain": (100, 100), "ngram": (80, 120), "tree": (200, 180)}
    rows = [
        {"side": side, "concurrency": concurrency, "round": number, "requests": 4}
        | dict.fromkeys(serving.FIGURES, 7.0)
        | {"output_throughput": concurrency * throughput}
        for concurrency in (1, 2)
        for side, throughputs in speed.items()
        for number, throughput in enumerate(throughputs)
    ]
    found = serving.summarise(rows)
    tree = found[-1]
    assert (tree["concurrency"], tree["side"], tree["rounds"]) == (2, "tree", 2)
    assert tree["output_throughput"] == 380
    assert tree["to_plain"] == pytest.approx(1.9)
    # The best of vLLM's own was plain in the first round, n-gram in the second.
    assert tree["to_best_stock"] == pytest.approx((2.0 + 1.5) / 2)
    assert found[0]["to_best_stock"] == pytest.approx((1.0 + 100 / 120) / 2, abs=1e-4)
    assert "| 2 | ours, fixed tree | 380.0 (370.0 to 390.0) | 1.90 (1.85 to 1.95) | 1.75 (1.62 to 1.88) |" in (
        serving.table_of(found)
    )
    serving.plot(found, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000


def test_the_client_of_serving_takes_its_arguments(tmp_path: Path) -> None:
    """Those of the installed ``vllm bench serve``."""
    from vllm.benchmarks import serve
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    serving = script("serving")
    parser = FlexibleArgumentParser()
    serve.add_cli_args(parser)
    given = parser.parse_args(serving.client_arguments(1, "t", tmp_path / "p.jsonl", 3, 2, 5, 0.0, 4))
    assert (given.num_prompts, given.max_concurrency, given.custom_output_len, given.ignore_eos) == (3, 2, 5, True)
    assert (given.temperature, given.extra_body) == (0.0, {"seed": 4})


def step(step_clock: ModuleType, microseconds: float, requests: int = 1, **attributes: Any) -> Any:
    """A step that spent a fifth of its time in the front end and the rest in the target."""
    found = step_clock.Step(requests=requests, decoding=True, tokens=3 * requests, rows=17, **attributes)
    found.seconds["target forward"] = 0.8e-6 * microseconds
    found.seconds["front end"] = 0.2e-6 * microseconds
    return found


def test_overhead_counts_the_steps_of_a_whole_batch(sides: ModuleType, step_clock: ModuleType, tmp_path: Path) -> None:
    overhead = script("overhead")
    good = [step(step_clock, time, 2) for time in (900, 900, 100, 300, 200)]  # the first two are warm-up
    other = [step(step_clock, 5000, 1), step(step_clock, 5000, 2)]
    other[1].decoding = False
    rows = [overhead.row_of("tree", 2, number, [*other, *good]) for number in range(3)]
    assert (rows[0]["steps"], rows[0]["step_us"], rows[0]["tokens_per_step"]) == (3, 200, 6)
    assert (rows[0]["target forward"], rows[0]["front end"], rows[0]["draft"]) == (160, 40, 0)
    found = overhead.summarise(rows)
    assert [(line["side"], line["rounds"], line["tokens_per_request"]) for line in found] == [("tree", 3, 3.0)]
    assert found[0]["token_us"] == pytest.approx(200 / 3, abs=1e-3)
    assert overhead.table_of(found).splitlines()[-1].startswith("| 2 | ours, fixed tree | 160 | 0 |")
    overhead.plot(found, tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no step of tree decoded for all 4 requests"):
        overhead.row_of("tree", 4, 0, good)


def test_time_belongs_to_the_innermost_part(step_clock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def passing(seconds: float, inner: Callable[[], Any] = lambda: None) -> Callable[[], Any]:
        def run() -> Any:
            now[0] += seconds
            inner()
            now[0] += seconds

        return run

    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: now[0])
    clock = object.__new__(step_clock.StepClock)
    clock._wait, clock._step, clock._running, clock._since, clock.steps = lambda: None, step_clock.Step(), [], 0.0, []
    owner = SimpleNamespace(compact=passing(1))
    owner.sample = passing(10, lambda: owner.compact())
    owner.step = passing(100, lambda: owner.sample())
    clock._time(owner, "step", "front end", clock._finish)
    clock._time(owner, "sample", "sampling")
    clock._time(owner, "compact", "compaction")
    for _ in range(2):
        owner.step()
        now[0] += 1000  # between steps
    taken = clock.take()
    assert [s.total for s in taken] == [222, 222]
    assert {part: s for part, s in taken[1].seconds.items() if s} == {
        "front end": 200,
        "sampling": 20,
        "compaction": 2,
    }


def test_scaling_varies_one_axis(sides: ModuleType, step_clock: ModuleType, tmp_path: Path) -> None:
    scaling = script("scaling")
    base = scaling.Point(nodes=16, depth=6, top_k=4)
    assert list(scaling.points(base, "batch", (4, 2))) == [1, 2, 4]
    assert scaling.points(base, "nodes", (3,))[3].tree == TreeConfig(3, 3, 4)
    # One level of four candidates, each of which has four: a budget of 63 is not reached.
    assert scaling.Point(nodes=63, depth=2, top_k=4).rows == 21
    assert scaling.Point(nodes=0).rows == 1
    steps = [step(step_clock, time) for time in (100, 300, 200)]
    steps.append(step(step_clock, 9000))
    steps[-1].rows = 4  # a tree that was cut
    rows = [
        row
        for number, factor in enumerate((1, 2, 3))
        for value, point in scaling.points(base, "batch", (1,)).items()
        for row in scaling.rows_of_steps("batch", value, point, number, steps)
        + [scaling.row_of("draft", "batch", v, point, number, 1e-6 * factor * v) for v in (1, 2)]
    ]
    assert [row["us"] for row in rows if row["what"] == "verify"] == [160, 160, 160]
    found = {(line["what"], line["value"]): line for line in scaling.summarise(rows, base)}
    assert (found["draft", 2]["us"], found["draft", 2]["to_base_p25"], found["draft", 2]["to_base_p75"]) == (4, 2, 2)
    table = scaling.table_of(list(found.values()), base)
    assert "| batch | draft | 1 (base) | 2 (2 to 2) | 1.00 (1.00 to 1.00) |" in table
    scaling.plot(list(found.values()), tmp_path / "t.png")
    assert (tmp_path / "t.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="had 21 rows"):
        scaling.rows_of_steps("nodes", 63, scaling.Point(nodes=63, depth=2), 0, steps)


def test_a_toy_draft_has_the_trees_it_is_asked_for(
    sides: ModuleType, step_clock: ModuleType, tiny_spec: Callable[..., Any]
) -> None:
    scaling = script("scaling")
    base = scaling.Point(nodes=12, depth=3, top_k=3, context=40, vocabulary=64)
    axes = {"nodes": (0, 2), "batch": (2,), "experts": (3,), "vocabulary": (96,)}
    rows = scaling.measure_draft(tiny_spec(), base, axes, "float32", 2)
    measured = [(row["axis"], row["value"]) for row in rows if row["round"] == 0]
    assert sorted(measured) == [
        *[("batch", 1), ("batch", 2), ("experts", 2), ("experts", 3)],
        *[("nodes", 2), ("nodes", 12), ("vocabulary", 64), ("vocabulary", 96)],
    ]
    with torch.inference_mode():
        assert scaling.Draft(tiny_spec(), base, torch.float32).run().shape == (1, 13)


def run_benchmark(name: str, output: Path, *arguments: str) -> list[dict[str, str]]:
    """Runs a benchmark of whole engines; its rows, once everything beside them is there."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *arguments, "--output", str(output)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    written = json.loads(output.with_suffix(".json").read_text())
    assert written["summary"]
    assert str(ROOT) not in output.with_suffix(".json").read_text(), "folders of the machine are nobody's business"
    for suffix in (".md", ".png"):
        assert output.with_suffix(suffix).stat().st_size > 100
    with output.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.vllm
@pytest.mark.slow
def test_overhead_end_to_end(tmp_path: Path) -> None:
    options = (
        "--enforce-eager --sides plain tree adaptive --batches 2 --rounds 1 --max-tokens 40 --kv-cache-bytes 67108864"
    )
    plain, trees, adaptive = run_benchmark("overhead", tmp_path / "t.csv", *options.split())
    for row in (plain, trees, adaptive):
        parts = sum(float(row[part]) for part in ("target forward", "sampling", "scheduler", "bookkeeping"))
        assert parts > 0
        assert parts + float(row["draft"]) < 1.5 * float(row["step_us"])
    assert float(plain["draft"]) == 0 < float(trees["draft"])
    assert float(trees["compaction"]) > 0
    assert float(adaptive["adapting"]) > 0 == float(trees["adapting"])
    assert float(plain["tokens_per_step"]) == 2 < float(trees["tokens_per_step"])


@pytest.mark.vllm
@pytest.mark.slow
def test_latency_end_to_end(tmp_path: Path) -> None:
    options = "--sides plain tree --prompts 2 --warm-up 1 --max-tokens 16 --kv-cache-bytes 67108864"
    rows = run_benchmark("latency", tmp_path / "t.csv", *options.split(), "--serve-arguments", "enforce-eager")
    assert len(rows) == 8
    for row in rows:
        assert (row["tokens"], row["as_plain"]) == ("16", "True")
        assert (int(row["verifications"]) > 0) == (row["side"] == "tree")
