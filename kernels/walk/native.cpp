// The verification walk on the CPU; see __init__.py.
//
// B sequences, N nodes, S steps, L rows of logits, V vocabulary. All tensors but the logits are contiguous.

#include <algorithm>

#include <omp.h>

#include "vectors.h"

namespace {

struct Call {  // as in native.py; samples or logits are null
  const int64_t *tokens, *parents, *num_nodes;  // [B, N], [B, N], [B]
  const int64_t* sampled;         // [B, N]
  const void* logits;             // [L, V]
  const int64_t* starts;          // [B] the root's row of logits
  int64_t *path, *emitted, *num_accepted;  // [B, S], [B, S], [B]
  int64_t batch, width, steps, row_stride, rows, vocabulary, threads, dtype;
};

constexpr int64_t WORTH_THREADS = 1 << 17;  // logits; fewer take less time than waking a thread

template <typename Token>
void walk(const Call& call, int64_t b, const Token& token_at) {
  const int64_t *tokens = call.tokens + b * call.width, *parents = call.parents + b * call.width;
  int64_t *path = call.path + b * call.steps, *emitted = call.emitted + b * call.steps;
  const int64_t nodes = std::min(call.num_nodes[b], call.width);
  int64_t node = 0, step = 0;
  for (bool walks = true; walks && step < call.steps; ++step) {
    const int64_t token = token_at(node), before = node;
    path[step] = node;
    emitted[step] = token;
    walks = false;
    if (token < 0) continue;  // placeholders match nothing
    for (int64_t n = 0; n < nodes && !walks; ++n) {
      walks = parents[n] == before && tokens[n] == token;
      if (walks) node = n;
    }
  }
  call.num_accepted[b] = step - 1;
  for (; step < call.steps; ++step) {
    path[step] = 0;
    emitted[step] = -1;
  }
}

// The first of the highest, a NaN being higher than all numbers.
template <typename T>
int64_t highest(const T* logits, int64_t count) {
  float best = scalar(logits);
  int64_t at = 0, i = 0;
  const auto offer = [&](int64_t j) {
    const float value = scalar(logits + j);
    if (value > best || (value != value && best == best)) {
      best = value;
      at = j;
    }
  };
  // Few vectors have a number above the best so far, so most cost one comparison.
  for (; i + LANES <= count; i += LANES)
    if (!everywhere(load(logits + i) <= broadcast(best)))
      for (int lane = 0; lane < LANES; ++lane) offer(i + lane);
  for (; i < count; ++i) offer(i);
  return at;
}

template <typename T>
int walk_logits(const Call& call) {
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t nodes = std::max<int64_t>(1, std::min(call.num_nodes[b], call.width));
    if (call.starts[b] < 0 || call.starts[b] > call.rows - nodes) return 1;
  }
#pragma omp parallel for num_threads(call.threads) schedule(dynamic) \
    if (call.threads > 1 && call.batch > 1 && call.batch * call.vocabulary >= WORTH_THREADS)
  for (int64_t b = 0; b < call.batch; ++b)
    walk(call, b, [&](int64_t node) {
      return highest(static_cast<const T*>(call.logits) + (call.starts[b] + node) * call.row_stride, call.vocabulary);
    });
  return 0;
}

}  // namespace

extern "C" int walk_samples(const Call* call) {
  for (int64_t b = 0; b < call->batch; ++b)
    walk(*call, b, [&](int64_t node) { return call->sampled[b * call->width + node]; });
  return 0;
}

// 1 where a tree's rows are not among the logits.
extern "C" int walk_greedy(const Call* call) {
  return with_dtype(call->dtype, [&](auto zero) { return walk_logits<decltype(zero)>(*call); });
}
