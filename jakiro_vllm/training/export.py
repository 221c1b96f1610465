"""What a finished training leaves behind: the head in the published layout, its card and a plot of its accuracy."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from jakiro_vllm import __version__
from jakiro_vllm.draft.checkpoint import save_head
from jakiro_vllm.draft.head import DraftHead, Variant
from jakiro_vllm.training.extra import require
from jakiro_vllm.training.settings import TrainSettings

if TYPE_CHECKING:
    from jakiro_vllm.training.quality import Quality

#: Written last, so its presence means that the head is complete.
RECORD = "training.json"


def is_exported(output: Path) -> bool:
    """Whether a finished head is there."""
    return (output / RECORD).is_file()


def export(head: DraftHead, settings: TrainSettings, quality: Quality, facts: dict[str, Any], output: Path) -> None:
    """Writes weights and configuration, ``README.md``, ``accuracy.png`` and at last ``training.json``.

    Args:
        head: trained.
        settings: of the run.
        quality: on held-out prompts.
        facts: more figures of the run, such as ``{"documents": 2048}``, for the card and the record; ``vocab_size``
            also goes into the configuration, where vLLM's own EAGLE looks for it.
        output: folder of the head.
    """
    save_head(head, output, vocab_size=facts["vocab_size"])
    facts = facts | {"parameters": sum(p.numel() for p in head.parameters())}
    plot_accuracy(quality, output / "accuracy.png")
    write_atomically(output / "README.md", model_card(settings, quality, facts))
    record = {"version": __version__, **facts, "settings": _shown(settings), "held_out": asdict(quality)}
    write_atomically(output / RECORD, json.dumps(record, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that is either whole or not there."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def plot_accuracy(quality: Quality, path: Path) -> None:
    """Accuracy by depth as a picture."""
    require("matplotlib").use("agg")
    from matplotlib import pyplot

    depths = range(1, len(quality.top1) + 1)
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(depths, [100 * value for value in quality.top_k], "o-", label=f"among the {quality.width} best")
    axes.plot(depths, [100 * value for value in quality.top1], "s-", label="most probable")
    axes.set(
        xlabel="depth of the draft",
        ylabel="target's token, % of positions",
        ylim=(0, 100),
        xticks=list(depths),
        title=f"Held-out prompts; acceptance length {quality.acceptance_length:.2f} as a chain",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _shown(settings: TrainSettings) -> dict[str, Any]:
    """Settings as plain values, without the folder, which is nobody's business but the trainer's."""
    return settings.model_dump(mode="json", exclude={"output"})


def model_card(settings: TrainSettings, quality: Quality, facts: dict[str, Any]) -> str:
    """The head's ``README.md``: target, data, recipe and figures."""
    target = Path(settings.target).name if Path(settings.target).exists() else settings.target
    variant = settings.head.variant
    sources = ", ".join(
        f"`{Path(source).name if Path(source).exists() else source}`" for source in settings.data.sources
    )
    front = {"base_model": target, "library_name": "jakiro-vllm", "tags": ["speculative-decoding", variant.value]}
    rows = [
        f"| {depth} | {100 * first:.1f} | {100 * best:.1f} |"
        for depth, (first, best) in enumerate(zip(quality.top1, quality.top_k, strict=True), start=1)
    ]
    stock = (
        "\nvLLM alone drafts chains with it:\n\n```\nvllm serve TARGET "
        '--speculative-config \'{"method": "eagle", "model": "THIS_FOLDER", "num_speculative_tokens": 4}\'\n```\n'
        if variant is Variant.DENSE
        else ""
    )
    recipe = yaml.safe_dump(
        {key: _shown(settings)[key] for key in ("generation", "head", "optimizer")}, sort_keys=False
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False).strip()}
---

# A {variant.value} draft head for {target}

Made by `jakiro-vllm train`, version {__version__}. It drafts token trees that {target} verifies in vLLM; the output is
what {target} alone would write.

```
vllm serve TARGET --speculative-model THIS_FOLDER
```
{stock}
## Figures

On greedy answers of the target to {facts["held_out_documents"]} held-out prompts, as chains: acceptance length
{quality.acceptance_length:.3f}, bonus token included (true mean over the rounds of decoding). A tree that is
{quality.width} wide cannot exceed {quality.acceptance_length_top_k:.3f}.

| depth | most probable draft is the target's token, % | among the {quality.width} best, % |
|---|---|---|
{chr(10).join(rows)}

![accuracy by depth](accuracy.png)

## Data

{facts["documents"]:,} answers of the target itself, {facts["generated_tokens"]:,} generated tokens, to prompts from
{sources}.

## Recipe

{facts["steps"]:,} steps, {facts["parameters"]:,} parameters.

```yaml
{recipe.strip()}
```
"""
