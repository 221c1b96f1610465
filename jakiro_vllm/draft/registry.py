"""Published heads, by the target they were trained for."""

from __future__ import annotations

from pathlib import Path

from jakiro_vllm.errors import HeadCheckpointError

#: Last part of the target's name, in lower case, and the head on the Hugging Face hub (arXiv 2502.06282).
PUBLISHED_HEADS = {
    "vicuna-7b-v1.3": "Hhaiduo/Jakiro-Vicuna-7B-v1.3",
    "vicuna-13b-v1.3": "Hhaiduo/Jakiro-Vicuna-13B-v1.3",
    "llama-2-7b-chat-hf": "Hhaiduo/Jakiro-LLaMA2-Chat-7B",
    "llama-2-13b-chat-hf": "Hhaiduo/Jakiro-LLaMA2-Chat-13B",
    "meta-llama-3-8b-instruct": "Hhaiduo/Jakiro-Llama3-instruct-8b",
}

#: The pair that ships with the package.
EMBEDDED_PAIR = Path(__file__).resolve().parent.parent / "embedded"
EMBEDDED_TARGET = EMBEDDED_PAIR / "target"
EMBEDDED_HEAD = EMBEDDED_PAIR / "head"


def published_head(target: str) -> str:
    """The head for ``--speculative-model jakiro``.

    Args:
        target: the target's name or folder.

    Raises:
        HeadCheckpointError: naming the known targets.
    """
    if Path(target).is_dir() and Path(target).resolve() == EMBEDDED_TARGET:
        return str(EMBEDDED_HEAD)
    name = target.rstrip("/").rsplit("/", 1)[-1].lower()
    if name not in PUBLISHED_HEADS:
        raise HeadCheckpointError(
            f"no published head is known for target {target!r}; known targets: {', '.join(PUBLISHED_HEADS)}, and "
            f"the embedded one; name a head's folder or hub name instead of 'jakiro', or train one"
        )
    return PUBLISHED_HEADS[name]


def locate_head(name: str, target: str, download_dir: str | None = None) -> Path:
    """Finds a head's folder, downloading it from the hub where needed.

    Args:
        name: a folder, a hub name ``owner/name``, or ``jakiro``.
        target: the target's name or folder, for ``jakiro``.
        download_dir: where hub files are kept; the hub's own cache by default.

    Raises:
        HeadCheckpointError: if there is no such head, or it cannot be downloaded.
    """
    if name == "jakiro":
        name = published_head(target)
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise HeadCheckpointError(
            f"head {name!r} is neither a folder nor a hub name (owner/name); published heads: "
            f"{', '.join(PUBLISHED_HEADS.values())}"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, cache_dir=download_dir, allow_patterns=["config.json", "*.safetensors", "*.bin"])
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HeadCheckpointError(
            f"head {name!r} is no local folder and could not be downloaded ({reason}); check the name and the "
            "network, or give a folder"
        ) from error
