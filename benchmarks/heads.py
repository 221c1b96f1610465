"""Dense against mixture-of-experts heads, trained alike: acceptance length of trees by variant, policy and rollout.

    .venv/bin/python benchmarks/heads.py --work build/heads --output docs/results/heads.csv

One target, one set of its own answers, equal steps, parameters within 3%, equal node budgets. Every head is trained by
the code of ``jakiro-vllm train``; trees are verified by vLLM with held-out prompts, greedy and at temperature 1, with
the same seeds for all heads, so that differences are paired by prompt. Finished heads and measurements are kept in
--work: run the same command again after an interruption. Rows of other seeds that --output holds already are kept, so
seeds may be run one by one. Beside the CSV there is a table (.md) and a plot (.png).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.draft.registry import EMBEDDED_TARGET
from jakiro_vllm.integration.acceptance import Acceptance, AcceptanceMeter, Tally
from jakiro_vllm.training.data import load_saved_prompts
from jakiro_vllm.training.export import is_exported
from jakiro_vllm.training.pair import HEAD, PairRecipe, make_answers
from jakiro_vllm.training.settings import TrainSettings

#: Node budget, depth and width of the trees that are verified. A dense head takes as many forwards for the second as
#: jakiro for the first.
TREES = {"depth 6": TreeConfig(16, 6, 4), "depth 5": TreeConfig(16, 5, 4)}
TEMPERATURES = (0.0, 1.0)


@dataclass(frozen=True)
class Contestant:
    """One kind of head.

    Attributes:
        name: of the row.
        variant: which MLP.
        width: intermediate size of an expert, relative to jakiro's: parameters are equal then.
        policy: of the candidates.
        loss: changes to the loss.
    """

    name: str
    variant: str
    width: float
    policy: str
    loss: dict[str, float]


#: The contrastive output as the reference trains it: its gradient everywhere, its sign free to flip.
REFERENCE = {"right_trunk": 1.0, "right_order": 0.0}
CONTESTANTS = (
    Contestant("dense", "dense", 2.0, "mixture", {}),
    Contestant("jakiro, mixture", "jakiro", 1.0, "mixture", {}),
    Contestant("jakiro, decoupled", "jakiro", 1.0, "decoupled", {"experts": 1.0}),
    Contestant("jakiro_star, decoupled", "jakiro_star", 1.5, "decoupled", {}),
    Contestant("jakiro, mixture, reference loss", "jakiro", 1.0, "mixture", REFERENCE),
)
ROLLOUTS = {"without": [{"share": 1.0, "steps": 1}], "with": [{"share": 0.6, "steps": 1}, {"share": 0.4, "steps": 2}]}


@dataclass(frozen=True)
class Run:
    """One head to be trained."""

    contestant: Contestant
    rollout: str
    seed: int

    @property
    def folder(self) -> str:
        """Its folder's name."""
        return f"{self.contestant.name.replace(', ', '-')}-{self.rollout}-{self.seed}"


def settings_of(run: Run, work: Path, recipe: PairRecipe, width: int, epochs: float) -> TrainSettings:
    """The settings of a head's training."""
    values = recipe.settings(work).model_dump()
    values["output"] = work / "heads" / run.folder
    values["head"] |= {
        "variant": run.contestant.variant,
        "intermediate_size": round(width * run.contestant.width),
    }
    optimizer = values["optimizer"]
    optimizer |= {"epochs": epochs, "seed": run.seed, "rollout": ROLLOUTS[run.rollout]}
    optimizer["loss"] |= run.contestant.loss
    return TrainSettings.model_validate(values)


def train(settings: TrainSettings, work: Path) -> None:
    """Trains a head unless it is there; in a process of its own, which gives its memory back."""
    if is_exported(settings.output):
        return
    file = work / "settings.json"
    file.write_text(settings.model_dump_json())
    code = (
        "import logging, sys, pathlib\n"
        "from jakiro_vllm.training.phases import fit\n"
        "from jakiro_vllm.training.settings import TrainSettings\n"
        "logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')\n"
        "fit(TrainSettings.model_validate_json(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2]))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(file), str(work / "material")], check=True)


def measure(runs: list[Run], work: Path, max_tokens: int) -> None:
    """Writes the tallies of every head beside it, unless they are there; all in one engine."""
    keys = {_key(name, temperature) for name in TREES for temperature in TEMPERATURES}
    waiting = [run for run in runs if not keys <= set(tallies_of(run, work))]
    if not waiting:
        return
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(work / "target"),
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=16,
        kv_cache_memory_bytes=1 << 29,
        speculative_config={
            "method": "jakiro",
            "model": str(work / "heads" / waiting[0].folder),
            "num_speculative_tokens": max(tree.node_budget for tree in TREES.values()),
        },
    )
    meter = AcceptanceMeter(llm)
    prompts = [prompt.tolist() for prompt in load_saved_prompts(work / "material" / "prompts").held_out]
    for run in waiting:
        folder, found = work / "heads" / run.folder, tallies_of(run, work)
        for name, tree in TREES.items():
            if all(_key(name, temperature) in found for temperature in TEMPERATURES):
                continue
            drafter = meter.use(folder, replace(tree, policy=run.contestant.policy))
            for temperature in TEMPERATURES:
                params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=0)
                tallies = [asdict(tally) for tally in meter.measure(prompts, params).tallies]
                found[_key(name, temperature)] = {"forwards": drafter.num_forwards, "tallies": tallies}
        (folder / "tallies.json").write_text(json.dumps(found))
        print(f"measured {run.folder}", flush=True)


def _key(tree: str, temperature: float) -> str:
    return f"{tree}, {temperature}"


def tallies_of(run: Run, work: Path) -> dict[str, Any]:
    """What was measured of a head so far, by tree and temperature."""
    file = work / "heads" / run.folder / "tallies.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def acceptance(run: Run, work: Path, key: str) -> Acceptance:
    """A measurement of one head."""
    return Acceptance([Tally(**tally) for tally in tallies_of(run, work)[key]["tallies"]])


def rows_of(runs: list[Run], work: Path) -> list[dict[str, Any]]:
    """One row per head, tree and temperature."""
    rows = []
    for run in runs:
        record = json.loads((work / "heads" / run.folder / "training.json").read_text())
        measured = tallies_of(run, work)
        for name, tree in TREES.items():
            for temperature in TEMPERATURES:
                key = _key(name, temperature)
                found = acceptance(run, work, key)
                dense = acceptance(Run(CONTESTANTS[0], run.rollout, run.seed), work, key)
                low, high = found.interval()
                ratio = found.ratio_interval(dense)
                rates = found.depth_rates(tree.depth)
                rows.append(
                    {
                        "head": run.contestant.name,
                        "rollout": run.rollout,
                        "seed": run.seed,
                        "parameters": record["parameters"],
                        "steps": record["steps"],
                        "tokens": record["tokens"],
                        "tree": name,
                        "forwards": measured[key]["forwards"],
                        "temperature": temperature,
                        "acceptance_length": round(found.length, 4),
                        "low": round(low, 4),
                        "high": round(high, 4),
                        "to_dense": round(found.length / dense.length, 4),
                        "to_dense_low": round(ratio[0], 4),
                        "to_dense_high": round(ratio[1], 4),
                        **{f"depth_{d}": round(rate, 4) for d, rate in enumerate(rates, start=1)},
                    }
                )
    return rows


def kept_rows(path: Path, seeds: list[int]) -> list[dict[str, Any]]:
    """Rows of other seeds that were measured before."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["seed"]) not in seeds]
    return [{name: _number(value) for name, value in row.items()} for row in rows]


def _number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, in the order of the rows; an interval over seeds from their spread (Student's t)."""
    quantile = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[k]) for k in ("tree", "temperature", "rollout", "head")), []).append(row)
    found = []
    for (tree, temperature, rollout, head), members in groups.items():
        lengths = [row["acceptance_length"] for row in members]
        ratios = [row["to_dense"] for row in members]
        count = len(members)
        spread = quantile.get(count, 1.96) / count**0.5 if count > 1 else float("nan")
        found.append(
            {
                "tree": tree,
                "temperature": temperature,
                "rollout": rollout,
                "head": head,
                "forwards": members[0]["forwards"],
                "parameters": members[0]["parameters"],
                "seeds": count,
                "length": statistics.mean(lengths),
                "length_half": spread * statistics.stdev(lengths) if count > 1 else float("nan"),
                "ratio": statistics.mean(ratios),
                "ratio_half": spread * statistics.stdev(ratios) if count > 1 else float("nan"),
            }
        )
    return found


def write_table(means: list[dict[str, Any]], path: Path) -> None:
    """A Markdown table of the means."""
    lines = [
        "| tree | temperature | rollout | head | draft forwards | parameters | acceptance length | to dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in means:
        length, ratio = (
            f"{row[name]:.3f} " + (f"± {row[f'{name}_half']:.3f}" if row["seeds"] > 1 else "(one seed)")
            for name in ("length", "ratio")
        )
        ratio = "1" if row["head"] == "dense" else ratio
        lines.append(
            f"| {row['tree']} | {row['temperature']} | {row['rollout']} | {row['head']} | {row['forwards']} | "
            f"{row['parameters']:,} | {length} | {ratio} |"
        )
    path.write_text("\n".join(lines) + "\n")


def plot(means: list[dict[str, Any]], path: Path) -> None:
    """Acceptance lengths as bars, a panel for each tree and temperature."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = sorted({(row["tree"], row["temperature"]) for row in means})
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 3.5 * len(panels)), layout="constrained", squeeze=False)
    names = [contestant.name for contestant in CONTESTANTS]
    for axis, (tree, temperature) in zip(axes.flat, panels, strict=True):
        for offset, rollout in enumerate(ROLLOUTS):
            chosen = {
                r["head"]: r
                for r in means
                if (r["tree"], r["temperature"], r["rollout"]) == (tree, temperature, rollout)
            }
            places = [i + 0.4 * offset - 0.2 for i, name in enumerate(names) if name in chosen]
            rows = [chosen[name] for name in names if name in chosen]
            errors = [0.0 if row["seeds"] < 2 else row["length_half"] for row in rows]
            axis.bar(places, [row["length"] for row in rows], 0.38, yerr=errors, capsize=3, label=f"{rollout} rollout")
        axis.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names])
        axis.set(title=f"{tree}, temperature {temperature}", ylabel="acceptance length", ylim=(1, None))
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].legend()
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> int:
    """Trains, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of intermediate results, some gigabytes")
    parser.add_argument("--output", type=Path, default=Path("heads.csv"))
    parser.add_argument("--target", type=Path, default=EMBEDDED_TARGET)
    parser.add_argument("--prompts", type=int, default=4096, help="that the target answers for training")
    parser.add_argument("--held-out", type=int, default=64, help="prompts that are measured on")
    parser.add_argument("--new-tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--max-tokens", type=int, default=128, help="of a measured completion")
    parser.add_argument("--epochs", type=float, default=0.4)
    parser.add_argument("--width", type=int, default=256, help="intermediate size of jakiro's experts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    names = [contestant.name for contestant in CONTESTANTS]
    parser.add_argument("--heads", choices=names, nargs="+", default=names, help="the first is always among them")
    args = parser.parse_args()
    contestants = [c for c in CONTESTANTS if c.name in args.heads or c is CONTESTANTS[0]]

    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "target").exists():
        shutil.copytree(args.target, args.work / "target")
    head = HEAD | {"generation": HEAD["generation"] | {"new_tokens": args.new_tokens}}
    recipe = PairRecipe(prompts=args.prompts, held_out_prompts=args.held_out, head=head)
    make_answers(args.work, recipe)
    # Seed by seed, so that an unfinished comparison is already one.
    runs = [Run(c, rollout, seed) for seed in args.seeds for rollout in ROLLOUTS for c in contestants]
    for run in runs:
        train(settings_of(run, args.work, recipe, args.width, args.epochs), args.work)
        print(f"trained {run.folder}", flush=True)
    measure(runs, args.work, args.max_tokens)
    rows = kept_rows(args.output, args.seeds) + rows_of(runs, args.work)
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    means = summary(rows)
    write_table(means, args.output.with_suffix(".md"))
    plot(means, args.output.with_suffix(".png"))
    print(args.output.with_suffix(".md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
