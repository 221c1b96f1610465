"""From the user's words to an engine configuration, refusing early what cannot work."""

from __future__ import annotations

import functools
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jakiro_vllm.config import TreeConfig
from jakiro_vllm.decode.graphs import BATCH_SIZES
from jakiro_vllm.draft.checkpoint import read_spec
from jakiro_vllm.draft.fit import TargetSizes, check_fit
from jakiro_vllm.draft.registry import locate_head
from jakiro_vllm.draft.shard import check_shards
from jakiro_vllm.errors import JakiroConfigError, JakiroError
from jakiro_vllm.integration.contract import check_installed
from jakiro_vllm.integration.version import check_vllm_version

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig
    from vllm.engine.arg_utils import EngineArgs


PROPOSER = "jakiro_vllm.integration.proposer.JakiroProposer"
WORKERS = {
    "cpu": "jakiro_vllm.integration.cpu_worker.JakiroCPUWorker",
    "cuda": "jakiro_vllm.integration.gpu_worker.JakiroGPUWorker",
}
_FULL_PRECISION = ("auto", "float16", "bfloat16", "float32")
#: By worker; the CUDA kernel reads fp8 pages.
KV_CACHE_DTYPES: dict[str, tuple[str, ...]] = {
    WORKERS["cpu"]: _FULL_PRECISION,
    WORKERS["cuda"]: (*_FULL_PRECISION, "fp8", "fp8_e4m3"),
}
SCHEDULER = "jakiro_vllm.integration.scheduler.JakiroScheduler"
ADDITIONAL_CONFIG_KEY = "jakiro"
#: Rows up to which any number of trees has a graph of its own, as many as vLLM itself captures.
DENSE_ROWS = 512
#: Programs in which nobody catches an exception of ours.
COMMANDS = ("vllm", "api_server.py")
ALLOWED_KEYS = ("method", "model", "num_speculative_tokens", "tree")


def select_jakiro(args: EngineArgs, target: ModelConfig, parallel: ParallelConfig) -> None:
    """Selects trees for an engine; see ``_select``.

    On the command line a refusal ends the process with its one sentence instead of a traceback.
    """
    try:
        _select(args, target, parallel)
    except JakiroError:
        by_command = Path(sys.argv[0]).name in COMMANDS
        if by_command and getattr(sys.excepthook, "func", None) is not _print_refusal:
            sys.excepthook = functools.partial(_print_refusal, sys.excepthook)
        raise


def _print_refusal(previous: Any, kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if isinstance(error, JakiroError):
        print(f"jakiro-vllm: {error}", file=sys.stderr)
    else:
        previous(kind, error, trace)


def _select(args: EngineArgs, target: ModelConfig, parallel: ParallelConfig) -> None:
    """Rewrites the engine arguments so that vLLM drafts with a Jakiro head.

    Args:
        args: the user's arguments; ``speculative_config``, ``spec_*``, ``scheduler_cls`` and ``additional_config`` are
            replaced.
        target: of the target model.
        parallel: receives the worker class.

    Raises:
        JakiroConfigError: if a setting, the platform or the target is not supported.
        HeadCheckpointError: if the head is missing, damaged, or does not fit.
    """
    check_vllm_version()
    check_installed("front")
    given = _merge_flags(args)
    name = given.get("model")
    if not isinstance(name, str) or not name:
        raise JakiroConfigError(
            "method 'jakiro' needs 'model': a head's folder, a hub name, or 'jakiro' for the published head"
        )
    tree = given.get("tree") or {}
    if not isinstance(tree, dict):
        raise JakiroConfigError(f"'tree' must be an object such as {{'depth': 6, 'top_k': 4}}, got {tree!r}")
    if "node_budget" in tree:
        raise JakiroConfigError("give the node budget as 'num_speculative_tokens', not inside 'tree'")
    budget = given.get("num_speculative_tokens")
    worker = choose_worker()
    can_adapt = worker == WORKERS["cpu"]
    config = TreeConfig.for_platform(tree | ({} if budget is None else {"node_budget": budget}), can_adapt)
    if config.adaptive and not can_adapt:
        raise JakiroConfigError(
            "tree.adaptive works on vLLM's CPU platform only, so far; leave it out, and trees are as configured"
        )
    check_target(args, target, parallel, worker)
    folder = locate_head(name, target.model, args.download_dir)
    spec = read_spec(folder)
    check_fit(
        spec,
        str(folder),
        TargetSizes(
            name=target.model,
            hidden_size=target.get_hidden_size(),
            num_kv_heads=target.get_total_num_kv_heads(),
            head_dim=target.get_head_size(),
        ),
    )
    check_shards(spec, str(folder), parallel.tensor_parallel_size)
    if parallel.worker_cls not in ("auto", worker):
        raise JakiroConfigError(f"method 'jakiro' brings its own worker, got --worker-cls {parallel.worker_cls}")
    if args.scheduler_cls not in (None, SCHEDULER):
        raise JakiroConfigError(f"method 'jakiro' brings its own scheduler, got --scheduler-cls {args.scheduler_cls}")
    from jakiro_vllm.integration.metrics import export_depths

    export_depths(PROPOSER, config.levels)
    if worker == WORKERS["cuda"]:
        capture_trees(args, config.num_nodes)
    parallel.worker_cls = args.worker_cls = worker  # the arguments may be asked for a configuration again
    args.scheduler_cls = SCHEDULER
    args.spec_method = args.spec_model = args.spec_tokens = None
    args.speculative_config = {
        "method": "custom_class",
        "model": PROPOSER,
        "num_speculative_tokens": config.node_budget,
    }
    args.additional_config = dict(args.additional_config or {}) | {
        ADDITIONAL_CONFIG_KEY: {"head": str(folder), "tree": asdict(config)}
    }


def _merge_flags(args: EngineArgs) -> dict[str, Any]:
    """Joins ``--speculative-config`` with the single flags; giving one thing twice is an error."""
    given = {key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()}
    for flag, key, value in (
        ("--speculative-model", "method", args.spec_method),
        ("--speculative-model", "model", args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", args.spec_tokens),
    ):
        if value is None:
            continue
        if given.get(key, value) != value:
            raise JakiroConfigError(f"{flag} says {value!r}, --speculative-config says {key}={given[key]!r}")
        given[key] = value
    unknown = sorted(set(given) - set(ALLOWED_KEYS))
    if unknown:
        raise JakiroConfigError(
            f"unknown key(s) {', '.join(unknown)} for method 'jakiro'; allowed: {', '.join(ALLOWED_KEYS)}"
        )
    return given


def choose_worker() -> str:
    """The worker class of this platform.

    Raises:
        JakiroConfigError: if the platform has no tree backend.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return WORKERS["cpu"]
    if current_platform.is_cuda():
        return WORKERS["cuda"]
    raise JakiroConfigError(
        f"method 'jakiro' runs on vLLM's CPU and CUDA platforms, got {current_platform.device_type!r} "
        f"({current_platform.device_name}); serve without speculation"
    )


def capture_trees(args: EngineArgs, num_nodes: int) -> None:
    """Lets the target replay graphs for as many requests as the draft does, unless the user chose the sizes.

    vLLM's own list ends at 512 rows, which 31 requests with trees of 17 rows exceed. Sizes are whole trees, as vLLM
    would round them.

    Args:
        args: of the engine.
        num_nodes: rows of a tree.
    """
    places = (args, args.compilation_config)
    if args.enforce_eager or any(p.cudagraph_capture_sizes or p.max_cudagraph_capture_size for p in places):
        return
    requests = {*range(1, DENSE_ROWS // num_nodes + 1), *BATCH_SIZES}
    rows = {count * num_nodes for count in requests if count <= (args.max_num_seqs or max(BATCH_SIZES))}
    sizes = sorted(count for count in rows if count <= (args.max_num_batched_tokens or max(rows)))
    args.cudagraph_capture_sizes = sizes or None


def check_target(args: EngineArgs, target: ModelConfig, parallel: ParallelConfig, worker: str) -> None:
    """Refuses a target or a mode in which trees cannot work yet, with one sentence."""
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    name = f"target {target.model!r} ({target.architecture})"
    remedy = "serve it without speculation"
    kv_cache_dtype = resolve_kv_cache_dtype_string(args.kv_cache_dtype, target)
    refusals = [
        (target.runner_type != "generate", f"{name} does not generate text"),
        (target.use_mla, f"{name} uses multi-head latent attention, which has no tree attention yet"),
        (
            target.is_hybrid or target.is_attention_free or target.has_inner_state,
            f"{name} keeps recurrent state (Mamba, linear attention), which cannot branch",
        ),
        (target.is_encoder_decoder, f"{name} is an encoder-decoder model"),
        (target.is_multimodal_model or target.uses_mrope, f"{name} takes images, audio or video"),
        (target.enable_prompt_embeds, "prompt embeddings give a head no tokens to read"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not supported with trees yet"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism is not supported with trees yet",
        ),
        (parallel.use_ubatching, "dual batch overlap is not supported with trees yet"),
        (
            args.enable_lora and worker != WORKERS["cpu"],
            "LoRA adapters with trees run on vLLM's CPU platform only, so far",
        ),
        (
            args.kv_transfer_config is not None or args.kv_offloading_size is not None,
            "KV connectors would see unverified tokens",
        ),
        (
            kv_cache_dtype not in KV_CACHE_DTYPES[worker],
            f"KV cache dtype {kv_cache_dtype!r} is not supported with trees yet",
        ),
    ]
    for refused, sentence in refusals:
        if refused:
            raise JakiroConfigError(f"method 'jakiro' cannot be used: {sentence}; {remedy}")
