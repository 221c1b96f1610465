// The most probable tokens of each row on the CPU; see __init__.py.
//
// T rows, V vocabulary, W tokens per row.

#include <algorithm>
#include <cmath>

#include <omp.h>

#include "vectors.h"

namespace {

struct Call {  // as in native.py
  const void* logits;
  int64_t* tokens;   // [T, W]
  float* log_probs;  // [T, W]
  int64_t row_stride, rows, vocabulary, width, threads, dtype;
};

constexpr int MAX_WIDTH = 64;
constexpr int64_t WORTH_THREADS = 1 << 17;  // logits; fewer take less time than waking a thread

// The best so far, the best first: NaN before all numbers, and of equals the lower token.
struct Best {
  float values[MAX_WIDTH];
  int64_t tokens[MAX_WIDTH];
  int64_t count = 0;

  // Tokens come in rising order, so one that equals another belongs behind it.
  void offer(float value, int64_t token, int64_t width) {
    int64_t at = count;
    while (at > 0 && (value > values[at - 1] || (value != value && values[at - 1] == values[at - 1]))) --at;
    if (at == width) return;
    count = std::min(count + 1, width);
    for (int64_t i = count - 1; i > at; --i) {
      values[i] = values[i - 1];
      tokens[i] = tokens[i - 1];
    }
    values[at] = value;
    tokens[at] = token;
  }
};

template <typename T>
Best select(const T* logits, int64_t vocabulary, int64_t width) {
  Best best;
  int64_t i = 0;
  for (; i < width; ++i) best.offer(scalar(logits + i), i, width);
  // Few vectors have a number above the least of the best, so most cost one comparison.
  for (; i + LANES <= vocabulary; i += LANES) {
    const Floats values = load(logits + i);
    if (everywhere(values <= broadcast(best.values[width - 1]))) continue;  // not so for a NaN on either side
    for (int lane = 0; lane < LANES; ++lane) best.offer(values[lane], i + lane, width);
  }
  for (; i < vocabulary; ++i) best.offer(scalar(logits + i), i, width);
  return best;
}

// log sum exp, `highest` being the maximum, or a NaN if there is one.
template <typename T>
float total(const T* logits, int64_t vocabulary, float highest) {
  if (highest != highest || std::abs(highest) == INFINITE) return highest;
  Floats sums{}, more{};
  int64_t i = 0;
  for (; i + 2 * LANES <= vocabulary; i += 2 * LANES) {
    sums += exponential(load(logits + i) - highest);
    more += exponential(load(logits + i + LANES) - highest);
  }
  float rest = 0;
  for (; i < vocabulary; ++i) rest += std::exp(scalar(logits + i) - highest);
  return highest + std::log(sum(sums + more) + rest);
}

template <typename T>
int top_tokens(const Call& call) {
#pragma omp parallel for num_threads(call.threads) schedule(static) \
    if (call.threads > 1 && call.rows > 1 && call.rows * call.vocabulary >= WORTH_THREADS)
  for (int64_t t = 0; t < call.rows; ++t) {
    const T* logits = static_cast<const T*>(call.logits) + t * call.row_stride;
    const Best best = select(logits, call.vocabulary, call.width);
    const float sum = total(logits, call.vocabulary, best.values[0]);
    for (int64_t w = 0; w < call.width; ++w) {
      call.tokens[t * call.width + w] = best.tokens[w];
      const float value = best.values[w];
      call.log_probs[t * call.width + w] = value == -INFINITE ? value : value - sum;
    }
  }
  return 0;
}

}  // namespace

extern "C" int top_tokens(const Call* call) {
  return with_dtype(call->dtype, [&](auto zero) { return top_tokens<decltype(zero)>(*call); });
}
