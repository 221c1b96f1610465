// A draft head's forward on a few rows, but for its attention; see __init__.py.
//
// R rows, C hidden size. A product's weight [O, I] lies in panels of PANEL outputs: [O / PANEL, I, PANEL], so that a
// panel is read once, from front to back, for up to TILE rows whose sums stay in registers.

#include <algorithm>
#include <vector>

#include "vectors.h"

// The rooms of these have their calls' structures.
extern "C" int rotary_place(const void* call);
extern "C" int experts_route(const void* call);
extern "C" int experts_activate(const void* call);
extern "C" int experts_weigh(const void* call);

namespace {

constexpr int PANEL = 2 * LANES;
constexpr int TILE = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;  // 24 of 32 registers, 12 or 8 of 16
constexpr int64_t WORTH_THREADS = 1 << 17;  // numbers of a weight; fewer take less time than waking a thread

struct Product {  // as in native.py
  const void *packed, *bias;  // bias may be null
  int64_t inputs, outputs;
};

struct ProjectCall {  // as in native.py
  Product fuse, qkv;
  const void *embeds, *features;  // [R, C]
  void *x, *projected;            // [R, C], what `place` reads
  const void* place;              // rotary's call
  int64_t rows, hidden, threads, dtype;
};

struct CompleteCall {  // as in native.py
  Product output, up, down;
  const void *attended, *x;               // [R, H D], [R, C]
  void* residual;                         // [R, C]
  const void *route, *activate, *weigh;   // the experts' calls, the last null where there is one expert
  const void *normed, *hidden, *weighted; // what they write; weighted is [kinds * R, E I]
  void* outputs;                          // [kinds, R, C]
  int64_t rows, kinds, threads, dtype;
};

template <int R, typename T>
void sum_panel(const float* x, int64_t inputs, const T* panel, float* sums) {
  Floats low[R] = {}, high[R] = {};
  for (int64_t i = 0; i < inputs; ++i) {
    const Floats a = load(panel + i * PANEL), b = load(panel + i * PANEL + LANES);
    for (int r = 0; r < R; ++r) {
      const Floats factor = broadcast(x[r * inputs + i]);
      low[r] += factor * a;
      high[r] += factor * b;
    }
  }
  for (int r = 0; r < R; ++r) {
    store(sums + r * PANEL, low[r]);
    store(sums + r * PANEL + LANES, high[r]);
  }
}

// R is the number of rows, at most TILE.
template <int R, typename T>
void sum_rows(int64_t rows, const float* x, int64_t inputs, const T* panel, float* sums) {
  if constexpr (R > 1)
    if (rows < R) return sum_rows<R - 1, T>(rows, x, inputs, panel, sums);
  sum_panel<R, T>(x, inputs, panel, sums);
}

inline const float* as_floats(const float* x, int64_t, std::vector<float>&) { return x; }

template <typename T>
const float* as_floats(const T* x, int64_t count, std::vector<float>& kept) {
  if ((int64_t)kept.size() < count) kept.resize(count);
  in_lanes(count, [&](int64_t i, auto n) { save(kept.data() + i, load(x + i, n), n); });
  return kept.data();
}

// y = x @ weight.T + bias + added, rounded once; row m adds row m % added_rows.
template <typename T>
void multiply(const Product& product, const T* from, int64_t rows, const T* added, int64_t added_rows, T* y,
              int64_t threads) {
  thread_local std::vector<float> kept;
  const int64_t inputs = product.inputs, outputs = product.outputs, panels = (outputs + PANEL - 1) / PANEL;
  const int64_t tiles = (rows + TILE - 1) / TILE, each = (rows + tiles - 1) / std::max<int64_t>(1, tiles);
  const float* x = as_floats(from, rows * inputs, kept);
  const T *packed = static_cast<const T*>(product.packed), *bias = static_cast<const T*>(product.bias);
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && outputs * inputs >= WORTH_THREADS)
  for (int64_t p = 0; p < panels; ++p) {
    alignas(64) float sums[TILE * PANEL];
    const int64_t column = p * PANEL, count = std::min<int64_t>(PANEL, outputs - column);
    for (int64_t first = 0; first < rows; first += each) {
      const int64_t some = std::min(each, rows - first);
      sum_rows<TILE, T>(some, x + first * inputs, inputs, packed + p * inputs * PANEL, sums);
      for (int64_t r = 0; r < some; ++r)
        in_lanes(count, [&](int64_t i, auto n) {
          Floats value = load(sums + r * PANEL + i);
          if (bias) value += load(bias + column + i, n);
          if (added) value += load(added + (first + r) % added_rows * outputs + column + i, n);
          save(y + (first + r) * outputs + column + i, value, n);
        });
    }
  }
}

template <typename T>
int project(const ProjectCall& call) {
  thread_local std::vector<T> both;
  const int64_t rows = call.rows, hidden = call.hidden;
  if ((int64_t)both.size() < 2 * rows * hidden) both.resize(2 * rows * hidden);
  for (int64_t r = 0; r < rows; ++r) {
    std::copy_n(static_cast<const T*>(call.embeds) + r * hidden, hidden, both.data() + 2 * r * hidden);
    std::copy_n(static_cast<const T*>(call.features) + r * hidden, hidden, both.data() + (2 * r + 1) * hidden);
  }
  T* x = static_cast<T*>(call.x);
  multiply<T>(call.fuse, both.data(), rows, nullptr, 1, x, call.threads);
  multiply<T>(call.qkv, x, rows, nullptr, 1, static_cast<T*>(call.projected), call.threads);
  return rotary_place(call.place);
}

template <typename T>
int complete(const CompleteCall& call) {
  const int64_t rows = call.rows, threads = call.threads;
  T* residual = static_cast<T*>(call.residual);
  multiply<T>(call.output, static_cast<const T*>(call.attended), rows, static_cast<const T*>(call.x), rows, residual,
              threads);
  experts_route(call.route);
  multiply<T>(call.up, static_cast<const T*>(call.normed), rows, nullptr, 1,
              static_cast<T*>(const_cast<void*>(call.hidden)), threads);
  experts_activate(call.activate);
  if (call.weigh) experts_weigh(call.weigh);
  multiply<T>(call.down, static_cast<const T*>(call.weighted), call.kinds * rows, residual, rows,
              static_cast<T*>(call.outputs), threads);
  return 0;
}

}  // namespace

// Outputs of a panel.
extern "C" int forward_panel() { return PANEL; }

// 1 for a position outside the rotary table.
extern "C" int forward_project(const ProjectCall* call) {
  return with_dtype(call->dtype, [&](auto zero) { return project<decltype(zero)>(*call); });
}

extern "C" int forward_complete(const CompleteCall* call) {
  return with_dtype(call->dtype, [&](auto zero) { return complete<decltype(zero)>(*call); });
}
