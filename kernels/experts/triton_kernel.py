"""Expert routing and the mixture of experts as Triton kernels.

T rows, C hidden size, E experts, K experts per token, I expert intermediate size, S splits of I.
Prefixes: ``b_`` blocks, ``p_`` pointers, ``o_`` offsets, ``m_`` masks.

Few rows against large matrices: the time is that of reading the weights once. So the weights are the left operand
of every product, whose 64 rows a warp group multiplies at once, and the rows are the narrow right operand. Products
accumulate in float32, per expert: weights are applied to sums, which serves both outputs with one product. The last
matrices are split along I where C alone gives too few programs; a second launch adds the splits in fixed order,
which makes results reproducible.

``reference.py`` is the oracle.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot import Variant
from ..dispatch import interpreted, tuned
from .reference import EXPERTS_PER_TOKEN, Routing

#: Programs wanted of a split product: two for each of the 132 multiprocessors of an H200.
WANTED_PROGRAMS = 256
#: Least share of I per split; shorter ones do not fill their pipelines.
SPLIT_WIDTH = 512
MAX_SPLITS = 8

INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _route(
    p_residual,
    p_norm,
    p_gate,
    p_normed,
    p_experts,
    p_weights,
    p_contrast,
    eps,
    C: tl.constexpr,
    E: tl.constexpr,
    GATES: tl.constexpr,
    CONTRAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row: RMSNorm, gate logits and the selection. GATES is 0 without a gate."""
    row = tl.program_id(0).to(tl.int64)
    o_block = tl.arange(0, BLOCK_C)
    b_squares = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + o_block
        b_x = tl.load(p_residual + row * C + o_c, mask=o_c < C, other=0.0).to(tl.float32)
        b_squares += b_x * b_x
    scale = tl.rsqrt(tl.sum(b_squares, axis=0) / C + eps)

    o_g = tl.arange(0, BLOCK_G)
    b_logits = tl.zeros([BLOCK_G], tl.float32)
    for start in range(0, C, BLOCK_C):
        o_c = start + o_block
        m_c = o_c < C
        b_x = tl.load(p_residual + row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_norm = tl.load(p_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
        # torch.nn.RMSNorm rounds once, after its weight; the gate reads the rounded value
        b_normed = (b_x * scale * b_norm).to(p_normed.dtype.element_ty)
        tl.store(p_normed + row * C + o_c, b_normed, mask=m_c)
        if GATES > 0:
            m_gate = (o_g[:, None] < GATES) & m_c[None, :]
            b_gate = tl.load(p_gate + o_g[:, None] * C + o_c[None, :], mask=m_gate, other=0.0)  # [BLOCK_G, BLOCK_C]
            b_logits += tl.sum(b_gate.to(tl.float32) * b_normed.to(tl.float32)[None, :], axis=1)

    if GATES == 0:
        tl.store(p_experts + row, tl.zeros([], tl.int64))
        tl.store(p_weights + row, tl.full([], 1.0, tl.float32))
    else:
        b_logits = b_logits.to(p_normed.dtype.element_ty).to(tl.float32)
        b_routed = tl.where(o_g < E, b_logits, float("-inf"))
        first_logit = tl.max(b_routed, axis=0)
        # a row of NaN, such as padding, must not name an expert that is not there
        first = tl.minimum(tl.argmax(b_routed, axis=0, tie_break_left=True), E - 1)
        if E == 1:
            tl.store(p_experts + row, first.to(tl.int64))
            tl.store(p_weights + row, tl.full([], 1.0, tl.float32))
        else:
            b_rest = tl.where(o_g == first, float("-inf"), b_routed)
            second = tl.minimum(tl.argmax(b_rest, axis=0, tie_break_left=True), E - 1)
            odds = tl.exp(tl.max(b_rest, axis=0) - first_logit)
            tl.store(p_experts + row * 2, first.to(tl.int64))
            tl.store(p_experts + row * 2 + 1, second.to(tl.int64))
            tl.store(p_weights + row * 2, 1.0 / (1.0 + odds))
            tl.store(p_weights + row * 2 + 1, odds / (1.0 + odds))
        if CONTRAST:
            logit_0 = tl.sum(tl.where(o_g == E, b_logits, 0.0), axis=0)
            logit_1 = tl.sum(tl.where(o_g == E + 1, b_logits, 0.0), axis=0)
            top = tl.maximum(logit_0, logit_1)
            weight_0 = tl.exp(logit_0 - top)
            weight_1 = tl.exp(logit_1 - top)
            total = weight_0 + weight_1
            sign = tl.where(weight_0 > weight_1, 1.0, -1.0)
            weight_0 = sign * weight_0 / total
            weight_1 = -sign * weight_1 / total
            # with two experts c_j belongs to expert j, with more to the j-th most probable one
            swapped = (E == 2) & (first == 1)
            tl.store(p_contrast + row * 2, tl.where(swapped, weight_1, weight_0))
            tl.store(p_contrast + row * 2 + 1, tl.where(swapped, weight_0, weight_1))


@triton.jit
def _selections(p_experts, o_m, m_m, K: tl.constexpr):
    """First and last selection of each row: ``([BLOCK_M], [BLOCK_M])``, -1 past the end; the same where K is 1."""
    b_first = tl.load(p_experts + o_m * K, mask=m_m, other=-1)
    b_last = tl.load(p_experts + o_m * K + (K - 1), mask=m_m, other=-1)
    return b_first, b_last


@triton.jit
def _dot(b_left, b_right, b_sum):
    """``b_sum + b_left @ b_right``, accumulated in float32."""
    if INTERPRETED:  # Triton's interpreter would multiply the bits of bfloat16; these products are exact
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows"])
def _activate(
    p_normed,
    p_up,
    p_experts,
    p_activations,
    num_rows,
    C: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    K: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``act(up_e @ normed^T)`` for one expert, a block of its rows and a block of tokens."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_i = tl.program_id(1) * (BLOCK_N // HALVES)
    expert = tl.program_id(2)
    m_m = o_m < num_rows
    if E > K:
        b_first, b_last = _selections(p_experts, o_m, m_m, K)
        m_m = (b_first == expert) | (b_last == expert)
        if tl.max(m_m.to(tl.int32), axis=0) == 0:
            return

    # gate and up projections alternate, so that one product yields both
    o_n = tl.arange(0, BLOCK_N)
    o_i = first_i + o_n // HALVES
    m_n = o_i < I
    o_row = (((o_n % HALVES) * E + expert) * I + o_i).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    p_weight = p_up + o_row[:, None] * C + o_k[None, :]  # [BLOCK_N, BLOCK_K]
    p_x = p_normed + o_m[None, :] * C + o_k[:, None]  # [BLOCK_K, BLOCK_M]
    b_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(0, C, BLOCK_K):
        m_k = o_k < C - start
        b_weight = tl.load(p_weight + start, mask=m_n[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_x + start, mask=m_k[:, None] & m_m[None, :], other=0.0)
        b_sum = _dot(b_weight, b_x, b_sum)

    if HALVES == 2:
        b_pairs = tl.permute(tl.reshape(b_sum, [BLOCK_N // 2, 2, BLOCK_M]), (0, 2, 1))
        b_gate, b_up = tl.split(b_pairs)  # [BLOCK_N / 2, BLOCK_M] each
        b_out = b_gate * tl.sigmoid(b_gate) * b_up
    else:
        b_out = 0.5 * b_sum * (1.0 + tl.erf(b_sum * 0.7071067811865476))
    o_out = first_i + tl.arange(0, BLOCK_N // HALVES)
    tl.store(
        p_activations + (o_m[None, :] * E + expert) * I + o_out[:, None],
        b_out.to(p_activations.dtype.element_ty),
        mask=(o_out[:, None] < I) & m_m[None, :],
    )


@triton.jit(do_not_specialize=["num_rows"])
def _multiply(
    p_activations,
    p_down,
    p_experts,
    p_partial,
    num_rows,
    C: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    E: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``down_e @ a_e^T`` of one expert over one split of I: ``partial [S, K, T, C]``, K by place in the selection."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    b_first, b_last = _selections(p_experts, o_m, o_m < num_rows, K)
    m_m = (b_first == expert) | (b_last == expert)
    if E > K:  # noqa: SIM102 (the outer condition is the compiler's)
        if tl.max(m_m.to(tl.int32), axis=0) == 0:
            return

    m_c = o_c < C
    o_k = tl.arange(0, BLOCK_K)
    p_weight = p_down + o_c.to(tl.int64)[:, None] * (E * I) + expert * I + o_k[None, :]  # [BLOCK_N, BLOCK_K]
    p_x = p_activations + (o_m[None, :] * E + expert) * I + o_k[:, None]  # [BLOCK_K, BLOCK_M]
    b_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    WIDTH: tl.constexpr = (I + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    for start in range(split * WIDTH, min((split + 1) * WIDTH, I), BLOCK_K):
        m_k = o_k < I - start
        b_weight = tl.load(p_weight + start, mask=m_c[:, None] & m_k[None, :], other=0.0)
        b_x = tl.load(p_x + start, mask=m_k[:, None] & m_m[None, :], other=0.0)
        b_sum = _dot(b_weight, b_x, b_sum)

    o_place = tl.where(b_first == expert, 0, K - 1)
    o_out = ((split * K + o_place) * num_rows + o_m) * C
    tl.store(p_partial + o_out[None, :] + o_c[:, None], b_sum, mask=m_c[:, None] & m_m[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _merge(
    p_partial,
    p_residual,
    p_weights,
    p_contrast,
    p_out,
    p_contrastive,
    num_rows,
    C: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    SEPARATE: tl.constexpr,
    CONTRAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row: adds splits, then weighs the experts (``out [T, C]``) or keeps them apart (``out [T, K, C]``)."""
    row = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    b_residual = tl.load(p_residual + row * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_mixture = b_residual
    b_contrastive = b_residual
    for k in tl.static_range(K):
        b_own = tl.zeros([BLOCK_C], tl.float32)
        for split in tl.static_range(SPLITS):
            p_own = p_partial + ((split * K + k) * num_rows + row) * C
            b_own += tl.load(p_own + o_c, mask=m_c, other=0.0)
        if SEPARATE:
            b_out = (b_residual + b_own).to(p_out.dtype.element_ty)
            tl.store(p_out + (row * K + k) * C + o_c, b_out, mask=m_c)
        else:
            b_mixture += tl.load(p_weights + row * K + k) * b_own
            if CONTRAST:
                b_contrastive += tl.load(p_contrast + row * K + k) * b_own
    if not SEPARATE:
        tl.store(p_out + row * C + o_c, b_mixture.to(p_out.dtype.element_ty), mask=m_c)
        if CONTRAST:
            b_out = b_contrastive.to(p_contrastive.dtype.element_ty)
            tl.store(p_contrastive + row * C + o_c, b_out, mask=m_c)


def _config(block_n: int, block_k: int, num_warps: int, num_stages: int) -> triton.Config:
    return triton.Config({"BLOCK_N": block_n, "BLOCK_K": block_k}, num_warps=num_warps, num_stages=num_stages)


#: About 64 KB of weights under way on each multiprocessor; the last also fits GPUs with 100 KB of shared memory.
#: Tuning passes over what does not fit.
CONFIGS = [_config(64, 128, 4, 4), _config(128, 64, 8, 5), _config(64, 64, 4, 5)]
#: float32 is multiplied without tensor cores, from registers.
FLOAT_CONFIG = _config(32, 32, 4, 2)
KEY = ("C", "I", "E", "BLOCK_M")
ROUTE_OPTIONS = {"num_warps": 8, "num_stages": 3}
MERGE_OPTIONS = {"num_warps": 4, "num_stages": 3}
MERGE_BLOCK = 1024

_activate_tuned = tuned(CONFIGS, KEY)(_activate)
_multiply_tuned = tuned(CONFIGS, KEY)(_multiply)


def route(
    residual: Tensor, norm_weight: Tensor, eps: float, gate: Tensor | None, num_experts: int, contrast: bool
) -> Routing:
    """Launches one program per row; see ``jakiro_vllm.kernels.experts.route``."""
    residual = residual.contiguous()
    rows, hidden = residual.shape
    selected = min(EXPERTS_PER_TOKEN, num_experts)
    routing = Routing(
        torch.empty_like(residual),
        torch.empty(rows, selected, dtype=torch.int64, device=residual.device),
        torch.empty(rows, selected, dtype=torch.float32, device=residual.device),
        torch.empty(rows, selected, dtype=torch.float32, device=residual.device) if contrast else None,
    )
    _route[(rows,)](
        residual,
        norm_weight,
        gate,
        routing.normed,
        routing.experts,
        routing.weights,
        routing.contrast,
        eps,
        C=hidden,
        E=num_experts,
        CONTRAST=contrast,
        **_route_blocks(hidden, 0 if gate is None else gate.shape[0]),
        **ROUTE_OPTIONS,
    )
    return routing


def activate(normed: Tensor, up: Tensor, routing: Routing, num_experts: int, halves: int) -> Tensor:
    """Launches a program per expert, block of its rows and block of tokens; ``halves`` is 2 for SwiGLU, 1 for GELU."""
    normed = normed.contiguous()
    rows, hidden = normed.shape
    width = up.shape[0] // (halves * num_experts)
    activations = normed.new_empty(rows, num_experts, width)
    block_m = _rows_per_block(rows, normed.dtype)

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(rows, block_m), triton.cdiv(width, meta["BLOCK_N"] // halves), num_experts

    _launch(
        _activate_tuned,
        _activate,
        grid,
        (normed, up, routing.experts.contiguous(), activations, rows),
        C=hidden,
        I=width,
        E=num_experts,
        K=routing.experts.shape[1],
        HALVES=halves,
        BLOCK_M=block_m,
    )
    return activations


def combine(
    activations: Tensor, down: Tensor, routing: Routing, residual: Tensor, contrast: bool
) -> tuple[Tensor, Tensor | None]:
    """Launches the product and its merge; see ``jakiro_vllm.kernels.experts.combine``."""
    residual = residual.contiguous()
    mixture = torch.empty_like(residual)
    contrastive = torch.empty_like(residual) if contrast else None
    _multiply_and_merge(activations, down, routing, residual, mixture, contrastive)
    return mixture, contrastive


def separate(activations: Tensor, down: Tensor, routing: Routing, residual: Tensor) -> Tensor:
    """Launches the product and its merge; see ``jakiro_vllm.kernels.experts.separate``."""
    rows, selected = routing.experts.shape
    features = residual.new_empty(rows, selected, residual.shape[1])
    _multiply_and_merge(activations, down, routing, residual.contiguous(), features, None)
    return features


def _multiply_and_merge(
    activations: Tensor, down: Tensor, routing: Routing, residual: Tensor, out: Tensor, contrastive: Tensor | None
) -> None:
    """Writes ``out``: the mixture ``[T, C]``, or the experts' own features ``[T, K, C]``."""
    activations = activations.contiguous()
    rows, num_experts, width = activations.shape
    hidden, selected = down.shape[0], routing.experts.shape[1]
    block_m = _rows_per_block(rows, activations.dtype)
    splits = _num_splits(rows, hidden, width, num_experts, block_m)
    partial = torch.empty(splits, selected, rows, hidden, dtype=torch.float32, device=down.device)

    def grid(meta: dict[str, Any]) -> tuple[int, int, int]:
        return triton.cdiv(rows, block_m), triton.cdiv(hidden, meta["BLOCK_N"]), num_experts * splits

    _launch(
        _multiply_tuned,
        _multiply,
        grid,
        (activations, down, routing.experts.contiguous(), partial, rows),
        C=hidden,
        I=width,
        E=num_experts,
        K=selected,
        SPLITS=splits,
        BLOCK_M=block_m,
    )
    _merge[(rows, triton.cdiv(hidden, MERGE_BLOCK))](
        partial,
        residual,
        routing.weights.contiguous(),
        None if contrastive is None or routing.contrast is None else routing.contrast.contiguous(),
        out,
        contrastive,
        rows,
        C=hidden,
        K=selected,
        SPLITS=splits,
        SEPARATE=out.ndim == 3,
        CONTRAST=contrastive is not None,
        BLOCK_C=MERGE_BLOCK,
        **MERGE_OPTIONS,
    )


def _launch(tuned_kernel: Any, kernel: Any, grid: Any, arguments: tuple[Any, ...], **constants: int) -> None:
    if arguments[0].dtype == torch.float32:
        kernel[grid](*arguments, **constants, **FLOAT_CONFIG.all_kwargs())
    else:
        tuned_kernel[grid](*arguments, **constants)


def _route_blocks(hidden: int, gates: int) -> dict[str, int]:
    """Blocks of ``_route``: a tile of the gate is at most 64 values per thread of 8 warps."""
    block_g = triton.next_power_of_2(max(gates, 1))
    block_c = min(triton.next_power_of_2(hidden), max(16384 // block_g, 128), 4096)
    return {"GATES": gates, "BLOCK_G": block_g, "BLOCK_C": block_c}


def _rows_per_block(rows: int, dtype: torch.dtype) -> int:
    """BLOCK_M: all rows where registers allow, so that the weights are read once."""
    most = 32 if dtype == torch.float32 else 128
    return min(max(triton.next_power_of_2(rows), 16), most)


def _num_splits(rows: int, hidden: int, width: int, num_experts: int, block_m: int) -> int:
    """S, a power of two: from shapes only, so that a captured launch stays right for other values."""
    active = min(num_experts, EXPERTS_PER_TOKEN * rows)
    programs = triton.cdiv(rows, block_m) * triton.cdiv(hidden, 64) * active
    wanted = min(WANTED_PROGRAMS // max(programs, 1), width // SPLIT_WIDTH, MAX_SPLITS)
    return 1 << (max(wanted, 1).bit_length() - 1)


def variants() -> list[Variant]:
    """What is compiled ahead of time: every configuration with the widest block, the narrowest, and float32."""
    found = []
    for dtype, gates, experts in (("bf16", 4, 2), ("fp16", 10, 8), ("bf16", 0, 1)):
        constants = {"C": 4096, "E": experts, "CONTRAST": gates > 0, **_route_blocks(4096, gates)}
        absent = () if gates else ("p_gate", "p_contrast")
        found.append(_variant(f"route {dtype} E{experts}", _route, dtype, constants, ROUTE_OPTIONS, absent))

    launches = [("bf16", "swiglu", 8, 128, config) for config in CONFIGS]
    launches += [("fp16", "gelu", 8, 128, CONFIGS[1]), ("bf16", "swiglu", 2, 16, CONFIGS[0])]
    launches += [("fp32", "swiglu", 2, 32, FLOAT_CONFIG)]
    for dtype, activation, experts, block_m, config in launches:
        sizes = {"C": 4096, "I": 4096, "E": experts, "K": 2, "BLOCK_M": block_m, **config.kwargs}
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        label = f"{dtype} E{experts} {block_m}x{config.kwargs['BLOCK_N']}x{config.kwargs['BLOCK_K']}"
        halves, splits = {"swiglu": 2, "gelu": 1}[activation], 2 if experts == 2 else 1
        found.append(_variant(f"activate {activation} {label}", _activate, dtype, {**sizes, "HALVES": halves}, options))
        found.append(_variant(f"multiply {label}", _multiply, dtype, {**sizes, "SPLITS": splits}, options))

    for name, apart in (("merge contrast", False), ("merge separate", True)):
        constants = {"C": 4096, "K": 2, "SPLITS": 2, "SEPARATE": apart, "CONTRAST": not apart, "BLOCK_C": MERGE_BLOCK}
        absent = ("p_contrast", "p_contrastive") if apart else ()
        found.append(_variant(f"{name} bf16", _merge, "bf16", constants, MERGE_OPTIONS, absent))
    return found


def _variant(
    name: str,
    function: Any,
    dtype: str,
    constants: dict[str, Any],
    options: dict[str, int],
    absent: tuple[str, ...] = (),
) -> Variant:
    """A variant whose pointers are aligned, and None where absent."""
    other_types = {"eps": "fp32", "num_rows": "i32", "p_experts": "*i64"}
    other_types |= dict.fromkeys(("p_weights", "p_contrast", "p_partial"), "*fp32")
    arguments = [x for x in function.arg_names if x not in constants and x not in absent]
    signature = {argument: other_types.get(argument, f"*{dtype}") for argument in arguments}
    pointers = tuple(argument for argument in arguments if argument.startswith("p_"))
    return Variant(name, function, signature, {**dict.fromkeys(absent), **constants}, options, pointers)
