"""Shards on disk, and the settings that a folder was begun with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jakiro_vllm.errors import JakiroConfigError, TrainingDataError
from jakiro_vllm.training.documents import Shard, join_shards, load_shard, pack_documents, save_shard
from jakiro_vllm.training.resume import begin, write_atomically


def arrays(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2**32, size=n, dtype=np.uint32) for n in lengths]


def test_documents_come_back_from_disk(tmp_path: Path) -> None:
    prompts, answers = arrays(3, 1, 5), [[1, 2], [], [2**32 - 1]]
    save_shard(pack_documents(prompts, answers), tmp_path / "new" / "a.npz")
    found = load_shard(tmp_path / "new" / "a.npz")
    assert [found.document(i).tolist() for i in range(3)] == [
        [*p.tolist(), *a] for p, a in zip(prompts, answers, strict=True)
    ]
    assert found.prompt_lengths.tolist() == [3, 1, 5]
    assert (len(found), found.num_generated) == (3, 3)


def test_joined_shards_are_one() -> None:
    shards = [pack_documents(arrays(2, 3), [[1], [2]]), pack_documents([]), pack_documents(arrays(4))]
    joined = join_shards(shards)
    each = [shard.document(i).tolist() for shard in shards for i in range(len(shard))]
    assert [joined.document(i).tolist() for i in range(len(joined))] == each
    assert len(join_shards([])) == 0


def test_damage_is_told(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    save_shard(pack_documents(arrays(3, 4)), file)
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"nothing of the kind"):
        file.write_bytes(content)
        with pytest.raises(TrainingDataError, match=r"a.npz cannot be read .*delete it and run again"):
            load_shard(file)
    with pytest.raises(TrainingDataError, match="cannot be read"):
        load_shard(tmp_path / "none.npz")
    np.savez(file, tokens=np.zeros(3))
    with pytest.raises(TrainingDataError, match="lacks offsets, prompt_lengths"):
        load_shard(file)
    np.savez(file, tokens=np.uint32(3), offsets=np.int64(0), prompt_lengths=np.int64(0))
    with pytest.raises(TrainingDataError, match="does not hold rows of integers"):
        load_shard(file)
    save_shard(Shard(np.zeros(4, np.uint32), np.asarray([0, 6, 4]), np.asarray([1, -2])), file)
    with pytest.raises(TrainingDataError, match="do not fit its offsets"):
        load_shard(file)
    save_shard(Shard(np.zeros(3, np.uint32), np.asarray([0, 2, 4]), np.asarray([1, 1])), file)
    with pytest.raises(TrainingDataError, match="3 tokens and 2 documents do not fit its offsets"):
        load_shard(file)


def test_no_flipped_byte_gets_through_as_something_else(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    prompts, answers = arrays(30), [[1] * 30]
    save_shard(pack_documents(prompts, answers), file)
    whole = file.read_bytes()
    refused = 0
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = load_shard(file)
        except TrainingDataError:
            refused += 1
        else:
            assert found.document(0).tolist() == [*prompts[0].tolist(), *answers[0]]
    assert refused > len(whole) / 2


def test_a_folder_remembers_what_it_was_begun_with(tmp_path: Path) -> None:
    settings = {"target": "t", "data": {"seed": 0, "sources": ["a"]}}
    begin(tmp_path, settings)
    begin(tmp_path, settings)
    for changed, message in (
        ({"target": "t", "data": {"seed": 1, "sources": ["a"]}}, r"begun with data.seed 0, now it is 1; choose"),
        ({"target": "t", "data": {"seed": 0, "sources": ["b"]}}, r"data.sources \['a'\], now it is \['b'\]"),
        ({"target": "t"}, r"data.seed 0, now it is None"),
    ):
        with pytest.raises(JakiroConfigError, match=message):
            begin(tmp_path, changed)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(JakiroConfigError, match=r"settings\.json is damaged"):
        begin(tmp_path, settings)


def test_a_failed_write_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    write_atomically(file, "old")

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
