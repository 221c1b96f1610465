"""Writes docs/compatibility.md: what works beside trees, and the test that says so.

    python packaging/compatibility.py

``SECTIONS`` is the table. A test checks that the document is current and that every test it names exists.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "compatibility.md"

#: What becomes of a request or a server, and what the document says of it.
STATES = {
    "trees": "requests draft and verify trees",
    "plain": "served without drafts, beside requests with trees",
    "refused": "refused at start-up in one sentence",
    "vLLM": "vLLM itself refuses it with any speculation",
    "open": "nothing forbids it; no test shows it yet",
}


@dataclass(frozen=True)
class Row:
    """One feature.

    Attributes:
        feature: its name, as a user would look for it.
        state: of ``STATES``.
        note: one sentence.
        tests: ``path::test`` below ``tests``; a test without parameters stands for all of them.
    """

    feature: str
    state: str
    note: str
    tests: tuple[str, ...] = ()


def _feature(*names: str, samplings: tuple[str, ...] = ("greedy", "seeded")) -> tuple[str, ...]:
    return tuple(f"integration/test_features.py::test_feature[{n}-{s}]" for n in names for s in samplings)


def _server(*names: str) -> tuple[str, ...]:
    return tuple(f"integration/test_server.py::{name}" for name in names)


def _front(name: str) -> tuple[str, ...]:
    return (f"integration/test_front_end.py::{name}",)


def _mode(name: str) -> tuple[str, ...]:
    return _front(f"test_modes_that_cannot_work_yet[{name}-]")


_SEEDED = ("seeded",)
_ORACLE = ("tree/test_oracle.py::test_a_step_is_distributed_as_the_target",)
_DRAWN = ("integration/test_distribution.py::test_a_million_walks",)

SECTIONS: dict[str, tuple[Row, ...]] = {
    "Sampling": (
        Row(
            "temperature",
            "trees",
            "The same tokens with a seed; the same distribution without.",
            (*_feature("temperature", samplings=_SEEDED), *_ORACLE),
        ),
        Row("top-k", "trees", "As above.", (*_feature("top_k", samplings=_SEEDED), *_DRAWN)),
        Row("top-p", "trees", "As above.", (*_feature("top_p", samplings=_SEEDED), *_DRAWN)),
        Row(
            "seeds",
            "trees",
            "A seed gives the same tokens with and without trees.",
            (*_feature("seed", samplings=_SEEDED), "integration/test_lossless.py::test_same_tokens_as_plain"),
        ),
        Row(
            "n",
            "trees",
            "Every sample drafts for itself.",
            (*_feature("n", samplings=_SEEDED), *_server("test_several_choices")),
        ),
        Row(
            "stop strings", "trees", "Tokens behind the stop are dropped.", _feature("stop_strings", "stop_string_kept")
        ),
        Row("stop tokens", "trees", "As above, and the end of text.", _feature("stop_token_ids", "end_of_text")),
        Row("ignore_eos", "trees", "The end of text is a token like any other.", _feature("ignore_eos")),
        Row(
            "min_tokens",
            "trees",
            "The ban of stop tokens ends at its position, inside a tree too.",
            _feature("min_tokens", "min_tokens_before_stop_string"),
        ),
        Row("max_tokens", "trees", "A request for one token drafts nothing.", _feature("max_tokens", "one_token")),
        Row(
            "repetition, presence and frequency penalties",
            "trees",
            "At each node they count the tokens on the way to it.",
            (
                *_feature("repetition_penalty", "presence_penalty", "frequency_penalty", "all_penalties"),
                "integration/test_distribution.py::test_the_runners_walk_is_exact",
            ),
        ),
        Row("bad_words", "trees", "They follow the path, too.", _feature("bad_words")),
        Row("allowed_token_ids", "trees", "As in plain vLLM.", _feature("allowed_token_ids")),
        Row(
            "min_p, logit_bias",
            "vLLM",
            "The request gets an error.",
            _server(*(f"test_what_vllm_refuses_with_any_speculation[{name}]" for name in ("min_p", "logit_bias"))),
        ),
        Row(
            "logprobs",
            "trees",
            "Of the emitted tokens; rounding differs by less than 0.001.",
            _feature("logprobs", "all_logprobs"),
        ),
        Row("prompt_logprobs", "trees", "As above.", _feature("prompt_logprobs")),
        Row(
            "thinking_token_budget",
            "plain",
            "The budget's state does not follow a path.",
            _feature("thinking_token_budget"),
        ),
        Row(
            "structured output",
            "trees",
            "Regex, choice, JSON, grammar and structural tag; the grammar's state follows each path.",
            (
                *_feature(
                    *(f"structured_{kind}" for kind in ("regex", "choice", "json", "json_object", "grammar", "tag"))
                ),
                "integration/test_structured_output.py::test_same_tokens_as_plain",
                "integration/test_structured_output.py::test_no_node_is_forbidden",
                "integration/test_structured_output.py::test_missing_masks_are_noticed",
            ),
        ),
    ),
    "Serving": (
        Row(
            "completions",
            "trees",
            "Streamed and whole answers agree.",
            _server(
                "test_streaming_and_whole_answers_agree", "test_concurrent_clients_get_the_answers_of_a_lone_client"
            ),
        ),
        Row("chat completions", "trees", "Streamed and whole.", _server("test_chat[greedy]", "test_chat[seeded]")),
        Row("responses", "trees", "Streamed and whole.", _server("test_responses")),
        Row(
            "tool calls, `auto`",
            "trees",
            "The answer is parsed as plain vLLM's is.",
            _server("test_tool_calls[auto]"),
        ),
        Row(
            "tool calls, `required` or a named tool",
            "trees",
            "They are structured output.",
            _server("test_tool_calls[required]", "test_tool_calls[named]"),
        ),
        Row("reasoning parsers", "trees", "They read the answer.", _server("test_reasoning")),
        Row("aborts", "trees", "A client that goes away frees its pages.", _server("test_client_that_disconnects")),
        Row(
            "metrics",
            "trees",
            "vLLM's counters of speculation, and two of our own.",
            _server("test_metrics"),
        ),
        Row("several API servers", "trees", "Counters are summed over them.", _server("test_several_api_servers")),
        Row(
            "sleep and wake",
            "trees",
            "The head is kept through a sleep of level 2; run without a GPU only.",
            (
                "integration/test_gpu_worker.py::test_the_head_survives_a_deep_sleep",
                "integration/test_gpu_worker.py::test_a_light_sleep_copies_nothing",
            ),
        ),
    ),
    "Scheduling and memory": (
        Row(
            "chunked prefill",
            "trees",
            "Prompts are processed in chunks beside trees.",
            (*_feature("chunked_prefill"), "integration/test_gpu_path.py::test_same_tokens[mixed]"),
        ),
        Row(
            "prefix caching",
            "trees",
            "Blocks that speculation wrote are found again.",
            (
                "integration/test_features.py::test_prefix_caching",
                "integration/test_lossless.py::test_second_round_hits_blocks_written_by_speculation",
            ),
        ),
        Row(
            "preemption and recompute",
            "trees",
            "Under a KV cache that is too small.",
            (
                "integration/test_features.py::test_preemption",
                "integration/test_features.py::test_trees_stood_beside_them",
            ),
        ),
        Row("maximum length", "trees", "Trees are cut at it.", _feature("maximum_length", "long_prompt")),
        Row(
            "CUDA graphs",
            "trees",
            "For the target and for the draft; replayed in Triton's interpreter only.",
            (
                "decode/test_graphs.py::test_replays_give_what_drafting_gives",
                *_front("test_graphs_reach_as_far_as_the_drafts"),
            ),
        ),
        Row(
            "fp8 KV cache",
            "trees",
            "On CUDA with one scale per tensor; refused on a CPU.",
            ("kernels/test_batch_attention.py::test_fp8_pages", *_mode("kv_cache_dtype")),
        ),
        Row(
            "KV connectors, KV offloading", "refused", "They would see unverified tokens.", _mode("kv_offloading_size")
        ),
    ),
    "Targets": (
        Row(
            "GQA, MHA",
            "trees",
            "Llama, Qwen2, Qwen3, Mistral, Gemma2 and Gemma3 with small random weights, and the embedded target.",
            (
                "integration/test_families.py::test_same_tokens_as_plain",
                "integration/test_families.py::test_a_wrong_mask_is_noticed",
                "integration/test_lossless.py::test_same_tokens_as_plain",
                "kernels/test_tree_attention.py::test_grouped_queries",
                "kernels/test_batch_attention.py::test_groups",
            ),
        ),
        Row(
            "sliding windows",
            "trees",
            "A window must exceed the trees' depth.",
            (
                "integration/test_families.py::test_same_tokens_as_plain",
                "kernels/test_tree_attention.py::test_sliding_window",
                "kernels/test_batch_attention.py::test_windows",
                "integration/test_layers.py::test_layers_that_trees_do_not_cover[cpu-narrow window]",
            ),
        ),
        Row(
            "soft-capped attention",
            "trees",
            "Gemma2, and in the kernels.",
            (
                "integration/test_families.py::test_same_tokens_as_plain",
                "kernels/test_tree_attention.py::test_softcap",
                "kernels/test_batch_attention.py::test_windows",
            ),
        ),
        Row(
            "tied embeddings",
            "trees",
            "The embedded target ties its own.",
            ("integration/test_lossless.py::test_same_tokens_as_plain",),
        ),
        Row(
            "quantised targets",
            "trees",
            "Int8 in fp32 token by token; int4 (AWQ, GPTQ, compressed-tensors) to near ties. Others not measured.",
            (
                "integration/test_quantised.py::test_int8_has_the_tokens_of_plain_decoding",
                "integration/test_quantised.py::test_greedy_texts_part_at_near_ties_only",
            ),
        ),
        Row(
            "attention sinks, ALiBi, shared KV pages",
            "refused",
            "Tree attention does not know them.",
            ("integration/test_layers.py::test_layers_that_trees_do_not_cover",),
        ),
        Row(
            "multi-head latent attention",
            "refused",
            "It has no tree attention.",
            _front("test_families_that_cannot_work_yet[MLA]"),
        ),
        Row(
            "recurrent state",
            "refused",
            "It cannot branch.",
            _front("test_families_that_cannot_work_yet[Mamba]"),
        ),
        Row(
            "multimodal targets",
            "refused",
            "Images, audio and video have positions of their own.",
            _front("test_multimodal_targets_are_refused"),
        ),
    ),
    "Parallelism and adapters": (
        Row(
            "LoRA",
            "trees",
            "On a CPU, several adapters and none in one batch; refused on CUDA.",
            (
                "integration/test_lora.py::test_same_tokens_as_plain",
                "integration/test_lora.py::test_a_wrong_mask_is_noticed",
            ),
        ),
        Row(
            "tensor parallelism (mp, ray)",
            "trees",
            "Two ranks on a CPU, compared with plain vLLM on two.",
            tuple(
                f"integration/test_tensor_parallel.py::{name}"
                for name in ("test_same_tokens_as_plain", "test_a_missing_mask_is_noticed", "test_ray_executor")
            ),
        ),
        Row("pipeline parallelism", "refused", "Not yet.", _mode("pipeline_parallel_size")),
    ),
}


def tests_named() -> set[str]:
    """Paths from the root with the tests that the table names."""
    return {f"tests/{test}" for rows in SECTIONS.values() for row in rows for test in row.tests}


def link(test: str) -> str:
    """A link from the document to a test's file, with the test's name as text."""
    path, _, name = test.partition("::")
    return f"[`{name}`](../tests/{path})"


def render() -> str:
    """The document."""
    lines = [
        "<!-- Made by packaging/compatibility.py. -->",
        "",
        "# What works beside trees",
        "",
        "Each row links to the tests that show it, against plain vLLM 0.32 on a CPU in fp32 unless it says otherwise.",
        "",
        *(f"- **{state}**: {meaning}." for state, meaning in STATES.items()),
    ]
    for section, rows in SECTIONS.items():
        lines += ["", f"## {section}", "", "| Feature | State | | Tests |", "|---|---|---|---|"]
        for row in rows:
            tests = "<br>".join(map(link, row.tests)) or "none"
            lines.append(f"| {row.feature} | **{row.state}** | {row.note} | {tests} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
