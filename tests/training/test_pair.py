"""The embedded pair's own text, prompts and folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jakiro_vllm.training.corpus import cut_prompts, python_sources, training_texts
from jakiro_vllm.training.pair import PairRecipe, publish


def test_corpus_split_is_disjoint(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"m{i}.py").write_text(f"def f{i}():\n    {'pass; ' * 20}\n    return {i}\n\n\n" * 4)
    documents = python_sources(tmp_path)
    held_out = [d for d in documents if d.held_out]
    assert 0 < len(held_out) < len(documents)
    trained = "".join(training_texts(documents))
    for document in documents:
        assert (f"return {document.name[1:-3]}\n" in trained) is not document.held_out


def test_prompts_are_seeded_stretches_that_go_on() -> None:
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, 4096, size=n).astype(np.uint32) for n in (5, 60, 300)]
    prompts = cut_prompts(documents, 50, 8, 64)
    assert [p.tolist() for p in prompts] == [p.tolist() for p in cut_prompts(documents, 50, 8, 64)]
    assert [p.tolist() for p in prompts] != [p.tolist() for p in cut_prompts(documents, 50, 8, 64, seed=1)]
    for prompt in prompts:
        assert 8 <= len(prompt) <= 64
        assert any(prompt.tobytes() in d[:-1].tobytes() for d in documents)
    with pytest.raises(ValueError, match="no document has more than 8 tokens"):
        cut_prompts(documents[:1], 50, 8, 64)


def test_the_recipe_is_one_of_jakiro_vllm_train(tmp_path: Path) -> None:
    settings = PairRecipe().settings(tmp_path)
    assert settings.output == tmp_path / "head"
    assert settings.generation.part <= PairRecipe().prompts


def test_publish_replaces_both_folders(tmp_path: Path) -> None:
    for name in ("target", "head"):
        (tmp_path / "work" / name).mkdir(parents=True)
        (tmp_path / "work" / name / "config.json").write_text("{}")
        (tmp_path / "work" / name / "notes.partial").write_text("")
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "old.json").write_text("{}")
    record = {"steps": 3, "settings": {"target": str(tmp_path / "work" / "target")}}
    (tmp_path / "work" / "head" / "training.json").write_text(json.dumps(record))
    publish(tmp_path / "work", tmp_path / "out")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")) == [
        "head/config.json",
        "head/training.json",
        "target/config.json",
    ]
    published = json.loads((tmp_path / "out" / "head" / "training.json").read_text())
    assert published == {"steps": 3, "settings": {"target": "the embedded target"}}
