"""Reading and writing heads in the published layout, and refusing what is not one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from published_heads import LAYER, published_head, write_head
from reference_head import ReferenceHead
from safetensors.torch import load_file, save_file
from torch import Tensor

from jakiro_vllm.draft.checkpoint import load_head, read_spec, save_head
from jakiro_vllm.draft.head import DraftHead, Variant
from jakiro_vllm.errors import HeadCheckpointError

MOE = LAYER + "mlp_moe."
ATTENTION = LAYER + "self_attn."

HEADS = [
    pytest.param("jakiro", {}, id="jakiro"),
    pytest.param("jakiro", {"num_experts": 4, "bias": False}, id="jakiro-4-experts-no-bias"),
    pytest.param("jakiro", {"kv_heads": 1, "head_dim": 8, "intermediate_size": 12}, id="jakiro-odd-sizes"),
    pytest.param("jakiro_star", {"intermediate_size": 20}, id="jakiro_star"),
    pytest.param("dense", {"bias": False}, id="dense"),
]
#: fp32 sums of a few dozen terms in another order.
FP32 = {"rtol": 1e-4, "atol": 1e-5}
FORMATS = ["safetensors", "bin"]

Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]


def refused(folder: Path) -> str:
    """The message of the refusal, which must be one line that names the folder."""
    messages = []
    for read in (load_head, read_spec):
        with pytest.raises(HeadCheckpointError) as error:
            read(folder)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "\n" not in messages[0]
    assert str(folder) in messages[0]
    return messages[0]


def feature_of(head: DraftHead) -> Tensor:
    """What the head says of a token that sees only itself."""
    head.prepare_positions(8)
    generator = torch.Generator().manual_seed(5)
    embed, feature = (torch.randn(1, head.spec.hidden_size, generator=generator) for _ in range(2))
    x = head.fuse(embed, feature)
    _, value = head.keys_values(x, torch.tensor([3]))
    group = head.spec.num_heads // head.spec.num_kv_heads
    return head.finish(x, torch.tensor([3]), lambda q: value.repeat_interleave(group, dim=1)).feature()[0]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(("variant", "options"), HEADS)
def test_loads_the_published_layout(variant: str, options: dict[str, Any], file_format: str, tmp_path: Path) -> None:
    config, tensors = published_head(variant, **options)
    head = load_head(write_head(tmp_path / "head", config, tensors, file_format))
    assert head.spec == read_spec(tmp_path / "head")
    assert not head.training
    assert not any(p.requires_grad for p in head.parameters())
    spec = head.spec
    assert spec.variant is Variant(variant)
    assert (spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (16, 4, options.get("kv_heads", 2))
    assert spec.head_dim == options.get("head_dim", 4)
    assert spec.num_experts == (1 if variant == "dense" else options.get("num_experts", 2))
    assert spec.fc_bias is options.get("bias", True)
    assert spec.intermediate_size == options.get("intermediate_size", 16 if variant == "jakiro" else 32)
    assert sum(p.numel() for p in head.parameters()) == sum(t.numel() for t in tensors.values())

    # Every matrix is where the formulas want it.
    reference = ReferenceHead(config, tensors)
    draws = torch.Generator().manual_seed(5)
    embed, feature = (torch.randn(16, generator=draws) for _ in range(2))
    x = reference.fuse(embed, feature)
    key, value = reference.key_value(x, 3)
    torch.testing.assert_close(feature_of(head).double(), reference.output(x, 3, [key], [value]).mixture, **FP32)


@pytest.mark.parametrize(("variant", "options"), HEADS)
def test_saved_heads_are_in_the_published_layout(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    config, tensors = published_head(variant, **options)
    head = load_head(write_head(tmp_path / "from", config, tensors, "bin"))
    save_head(head, tmp_path / "to", torch.float32)

    saved = load_file(tmp_path / "to" / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(saved[name], tensor), name
    written = json.loads((tmp_path / "to" / "config.json").read_text())
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "bias"):
        assert written[key] == config[key], key
    assert written["num_hidden_layers"] == 1
    assert written.get("num_local_experts") == config.get("num_local_experts")
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"config.json", "model.safetensors"}

    again = load_head(tmp_path / "to")
    assert again.spec == head.spec
    assert torch.equal(feature_of(again), feature_of(head))


@pytest.mark.parametrize(
    "rope",
    [
        pytest.param({"rope_theta": 500000.0}, id="theta"),
        pytest.param({"rope_theta": 2000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}, id="linear-legacy"),
        pytest.param({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, id="new"),
    ],
)
def test_the_rotary_embedding_survives_a_round_trip(rope: dict[str, Any], tmp_path: Path) -> None:
    head = load_head(write_head(tmp_path / "from", *published_head("jakiro", **rope), "safetensors"))
    plain = load_head(write_head(tmp_path / "plain", *published_head("jakiro"), "safetensors"))
    save_head(head, tmp_path / "to")
    again = load_head(tmp_path / "to")
    for each in (head, plain, again):
        each.prepare_positions(50)
    assert torch.equal(again.rotary_table, head.rotary_table)
    assert not torch.allclose(plain.rotary_table, head.rotary_table)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_loads_and_saves_in_the_wanted_dtype(dtype: torch.dtype, tiny_head_folder: Callable, tmp_path: Path) -> None:
    head = load_head(tiny_head_folder("jakiro"), dtype)
    assert {p.dtype for p in head.parameters()} == {dtype}
    save_head(head, tmp_path / "again", dtype)
    assert {t.dtype for t in load_file(tmp_path / "again" / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == str(dtype).split(".")[1]


def test_the_targets_embedding_and_lm_head_are_ignored(tmp_path: Path) -> None:
    config, tensors = published_head("jakiro")
    extra = {"embed_tokens.weight": torch.full((5, 16), float("nan")), "lm_head.weight": torch.zeros(5, 16)}
    head = load_head(write_head(tmp_path / "with", config, tensors | extra, "bin"))
    without = load_head(write_head(tmp_path / "without", config, tensors, "bin"))
    assert torch.equal(feature_of(head), feature_of(without))


def test_configs_may_leave_out_what_tensors_say(tmp_path: Path) -> None:
    config, tensors = published_head("jakiro")
    for key in ("num_local_experts", "num_experts_per_tok", "head_dim", "hidden_size", "bias", "num_hidden_layers"):
        del config[key]
    spec = read_spec(write_head(tmp_path / "head", config, tensors, "bin"))
    assert (spec.num_experts, spec.head_dim, spec.hidden_size, spec.fc_bias) == (2, 4, 16, True)


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    config, tensors = published_head("jakiro", seed=1)
    write_head(tmp_path / "head", config, tensors, "safetensors")
    write_head(tmp_path / "head", *published_head("dense", seed=2), "bin")
    (tmp_path / "head" / "config.json").write_text(json.dumps(config))
    assert read_spec(tmp_path / "head").variant is Variant.JAKIRO


def drop(name: str) -> Edit:
    return lambda config, tensors: tensors.pop(name)


def resize(name: str, *shape: int) -> Edit:
    return lambda config, tensors: tensors.update({name: torch.zeros(shape)})


def say(key: str, value: Any) -> Edit:
    return lambda config, tensors: config.update({key: value})


def poison(name: str, value: float) -> Edit:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[-1] = value

    return edit


def without_experts(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "experts" in n]:
        del tensors[name]


def one_expert(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "experts.1" in n]:
        del tensors[name]


def misnumbered_expert(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "experts.1" in n]:
        tensors[name.replace("experts.1", "experts.one")] = tensors.pop(name)


def no_mlp(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in [n for n in tensors if "mlp" in n]:
        del tensors[name]


#: What is wrong with the head, and the words that name both sides.
WRONG = [
    pytest.param("jakiro", drop("fc.weight"), ["'fc.weight' is missing"], id="no-fc"),
    pytest.param("jakiro", drop(ATTENTION + "o_proj.weight"), ["o_proj.weight' is missing"], id="no-o_proj"),
    pytest.param("jakiro", drop(ATTENTION + "k_proj.weight"), ["k_proj.weight' is missing"], id="no-k_proj"),
    pytest.param(
        "jakiro", drop(LAYER + "post_attention_layernorm.weight"), ["layernorm.weight' is missing"], id="no-norm"
    ),
    pytest.param(
        "jakiro", drop(MOE + "experts.1.down_proj.weight"), ["experts.1.down_proj.weight' is missing"], id="no-down"
    ),
    pytest.param("dense", drop(LAYER + "mlp.up_proj.weight"), ["mlp.up_proj.weight' is missing"], id="dense-no-up"),
    pytest.param("jakiro", drop(MOE + "gate.weight"), ["neither", "mlp_moe", "not a draft head"], id="no-gate"),
    pytest.param("jakiro", no_mlp, ["neither", "mlp_moe", "mlp'", "not a draft head"], id="no-mlp"),
    pytest.param("jakiro", without_experts, ["at least two experts", "got 0"], id="no-experts"),
    pytest.param("jakiro", one_expert, ["at least two experts", "got 1"], id="one-expert"),
    pytest.param("jakiro", misnumbered_expert, ["experts.1.", "is missing"], id="misnumbered-expert"),
    pytest.param("jakiro", resize("fc.weight", 16, 48), ["[H, 2H]", "[16, 48]", "EAGLE-3"], id="eagle3-fc"),
    pytest.param("jakiro", resize("fc.weight", 32), ["'fc.weight'", "2 dimensions", "[32]"], id="flat-fc"),
    pytest.param("jakiro", resize("fc.bias", 15), ["'fc.bias'", "[16]", "[15]"], id="short-bias"),
    pytest.param("jakiro", resize(MOE + "gate.weight", 2, 16), ["2 experts", "4 rows", "got 2"], id="jakiro-gate"),
    pytest.param("jakiro", resize(MOE + "gate.weight", 4, 8), ["gate.weight'", "[4, 16]", "[4, 8]"], id="narrow-gate"),
    pytest.param(
        "jakiro_star", resize(MOE + "gate.weight", 4, 16), ["jakiro_star", "2 rows", "got 4"], id="jakiro_star-gate"
    ),
    pytest.param(
        "jakiro",
        resize(MOE + "experts.1.up_proj.weight", 12, 16),
        ["experts.1.up_proj.weight'", "[16, 16]", "[12, 16]"],
        id="unequal-experts",
    ),
    pytest.param(
        "jakiro", resize(ATTENTION + "v_proj.weight", 4, 16), ["v_proj.weight'", "[8, 16]", "[4, 16]"], id="short-v"
    ),
    pytest.param("jakiro", resize("layers.1.fc.weight", 1, 1), ["unknown tensor", "layers.1.fc.weight"], id="extra"),
    pytest.param("jakiro", resize(LAYER + "mlp.gate_proj.weight", 16, 16), ["missing", "mlp.up_proj"], id="both-mlps"),
    pytest.param("jakiro", say("hidden_size", 32), ["hidden_size 32", "say 16"], id="config-hidden"),
    pytest.param("jakiro", say("num_local_experts", 4), ["num_local_experts 4", "say 2"], id="config-experts"),
    pytest.param(
        "jakiro", say("num_attention_heads", 8), ["q_proj", "16 rows", "8 heads of size 4"], id="config-heads"
    ),
    pytest.param("jakiro", say("num_key_value_heads", 4), ["k_proj", "8 rows", "4 heads of size 4"], id="config-kv"),
    pytest.param("jakiro", say("num_key_value_heads", None), ["k_proj", "8 rows", "4 heads"], id="config-kv-default"),
    pytest.param("jakiro", say("head_dim", 8), ["q_proj", "16 rows", "4 heads of size 8"], id="config-head_dim"),
    pytest.param("jakiro", say("num_hidden_layers", 32), ["one layer", "says 32", "whole model"], id="config-layers"),
    pytest.param("jakiro", say("num_attention_heads", None), ["num_attention_heads", "got None"], id="config-no-heads"),
    pytest.param("jakiro", say("num_attention_heads", "4"), ["num_attention_heads", "got '4'"], id="config-text-heads"),
    pytest.param("jakiro", poison("fc.weight", float("nan")), ["'fc.weight'", "not finite"], id="nan"),
    pytest.param(
        "jakiro_star",
        poison(MOE + "experts.1.proj.weight", float("inf")),
        ["experts.1.proj.weight'", "not finite"],
        id="inf",
    ),
]


@pytest.mark.parametrize(("variant", "edit", "words"), WRONG)
def test_contradictions_are_refused_naming_both_sides(
    variant: str, edit: Edit, words: list[str], tmp_path: Path
) -> None:
    config, tensors = published_head(variant)
    read_spec(write_head(tmp_path / "right", config, tensors, "bin"))  # only the edit is wrong
    edit(config, tensors)
    message = refused(write_head(tmp_path / "wrong", config, tensors, "bin"))
    for word in words:
        assert word in message


def test_folders_that_hold_no_head(tmp_path: Path, tiny_head_folder: Callable) -> None:
    assert "not a folder" in refused(tmp_path / "nowhere")
    folder = tiny_head_folder("jakiro")
    (folder / "config.json").rename(folder / "kept.json")
    assert "config.json is missing" in refused(folder)
    (folder / "kept.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    message = refused(folder)
    assert "model.safetensors" in message
    assert "pytorch_model.bin" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(b'{"hidden_size": ', "not valid JSON", id="cut"),
        pytest.param(b"\xff\xfe\x00", "not valid JSON", id="binary"),
        pytest.param(b"[1, 2]", "must hold an object, got list", id="list"),
        pytest.param(b'{"a":' * 100_000, "not valid JSON", id="deep"),
        pytest.param(b'{"a": ' + b"1" * 5000 + b"}", "not valid JSON", id="long-number"),
    ],
)
def test_damaged_configs(content: bytes, words: str, tiny_head_folder: Callable) -> None:
    folder = tiny_head_folder("jakiro")
    (folder / "config.json").write_bytes(content)
    assert words in refused(folder)


@pytest.mark.parametrize(
    "value", [True, -1, 4.0, 0.5, 10**30, "4", [4], {"rope_type": "linear"}, float("nan")], ids=str
)
@pytest.mark.parametrize(
    "key",
    [
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "hidden_size",
        "num_local_experts",
        "num_hidden_layers",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "max_position_embeddings",
    ],
)
def test_nonsense_in_a_config_is_refused_or_does_no_harm(key: str, value: Any, tmp_path: Path) -> None:
    config, tensors = published_head("jakiro")
    folder = write_head(tmp_path / "head", {**config, key: value}, tensors, "safetensors")
    try:
        head = load_head(folder)
    except HeadCheckpointError:
        refused(folder)
    else:
        assert feature_of(head).isfinite().all()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        pytest.param({"rope_type": "unheard-of"}, "unheard-of", id="unknown"),
        pytest.param({"rope_type": "linear"}, "factor", id="incomplete"),
        pytest.param({"rope_type": "linear", "factor": "a", "rope_theta": 1e4}, "str", id="text"),
        pytest.param({"rope_type": "default", "rope_theta": -1.0}, "finite", id="negative"),
        pytest.param({"rope_type": "default", "rope_theta": 0}, "finite", id="zero"),
    ],
)
def test_rotary_settings_that_cannot_be_used(parameters: dict[str, Any], words: str, tmp_path: Path) -> None:
    config, tensors = published_head("jakiro")
    del config["rope_theta"]
    folder = write_head(tmp_path / "head", {**config, "rope_parameters": parameters}, tensors, "safetensors")
    message = refused(folder)
    assert "rotary" in message
    assert words in message


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.99])
@pytest.mark.parametrize("file_format", FORMATS)
def test_truncated_weights(file_format: str, kept: float, tiny_head_folder: Callable) -> None:
    folder = tiny_head_folder("jakiro", file_format)
    path = next(path for path in folder.iterdir() if path.name != "config.json")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    assert "damaged" in refused(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_garbage_weights(name: str, tiny_head_folder: Callable, generator: torch.Generator) -> None:
    folder = tiny_head_folder("jakiro")
    (folder / "model.safetensors").unlink()
    for length in (1, 7, 40, 200, 1000):
        for _ in range(4):
            data = torch.randint(0, 256, (length,), dtype=torch.uint8, generator=generator).numpy().tobytes()
            (folder / name).write_bytes(data)
            assert "damaged" in refused(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "save",
    [
        pytest.param(torch.save, id="torch.save"),
        pytest.param(lambda thing, path: path.write_bytes(pickle.dumps(thing)), id="pickle"),
    ],
)
@pytest.mark.parametrize("thing", [[torch.zeros(2)], {"fc.weight": [1.0]}, "weights", torch.zeros(3)])
def test_pickles_of_something_else(thing: object, save: Callable, tiny_head_folder: Callable) -> None:
    folder = tiny_head_folder("jakiro")
    (folder / "model.safetensors").unlink()
    save(thing, folder / "pytorch_model.bin")
    assert "cannot be read" in refused(folder)


class Touch:
    """Creates a file when it is unpickled by an ordinary unpickler."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("container", ["torch.save", "pickle"])
def test_pickled_objects_are_never_executed(container: str, tmp_path: Path, tiny_head_folder: Callable) -> None:
    trap = tmp_path / "executed"
    folder = tiny_head_folder("jakiro")
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    _, tensors = published_head("jakiro")
    content = {**tensors, "trap": Touch(trap)}
    if container == "torch.save":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    message = refused(folder)
    assert "never loaded" in message
    assert "weights_only" not in message  # torch's advice would be to run it
    assert not trap.exists()
    if container == "torch.save":  # the trap works
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trap.exists()


def test_an_interrupted_save_leaves_the_old_weights(
    tiny_head_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = load_head(tiny_head_folder("jakiro"))
    save_head(head, tmp_path / "to", torch.float32)

    def fail(tensors: dict[str, Tensor], path: Path, **kwargs: Any) -> None:
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:100])
        raise OSError("disk full")

    monkeypatch.setattr("jakiro_vllm.draft.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_head(head, tmp_path / "to", torch.float32)
    assert torch.equal(feature_of(load_head(tmp_path / "to")), feature_of(head))
