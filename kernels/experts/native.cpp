// Routing and the experts' pointwise parts on the CPU; see __init__.py for the formulas.
//
// T rows, C hidden size, E experts, K experts per token, I expert intermediate size, A gates. All tensors are contiguous.

#include <cmath>
#include <vector>

#include "vectors.h"

namespace {

// ---- routing ----

struct RouteCall {  // as in native.py
  const void *residual, *norm, *gate;
  void* normed;         // [T, C]
  int64_t* experts;     // [T, K]
  float *weights, *contrast;  // [T, K]
  int64_t rows, hidden, num_experts, gates, dtype;
  float eps;
};

template <typename T>
float rounded(float x) {
  T kept;
  save(&kept, x);
  return scalar(&kept);
}

template <typename T>
float dot(const T* a, const T* b, int64_t count) {
  Floats sums{};
  in_lanes(count, [&](int64_t i, auto n) { sums += load(a + i, n) * load(b + i, n); });
  return sum(sums);
}

template <typename T>
void normalise(const T* from, const T* norm, T* to, int64_t count, float eps) {
  const float scale = 1 / std::sqrt(dot(from, from, count) / count + eps);
  in_lanes(count, [&](int64_t i, auto n) { save(to + i, load(from + i, n) * scale * load(norm + i, n), n); });
}

// As descending sorts have it: NaN first, and of equals the lower index.
inline bool precedes(float a, float b) { return a > b || (a != a && b == b); }

// softmax of two.
inline void share(float a, float b, float* shares) {
  const float high = a > b ? a : b, x = std::exp(a - high), y = std::exp(b - high);
  shares[0] = x / (x + y);
  shares[1] = y / (x + y);
}

template <typename T>
int route(const RouteCall& call) {
  const int64_t hidden = call.hidden, experts = call.num_experts, selected = experts < 2 ? 1 : 2;
  std::vector<float> logits(call.gates);
  for (int64_t t = 0; t < call.rows; ++t) {
    T* normed = static_cast<T*>(call.normed) + t * hidden;
    normalise(static_cast<const T*>(call.residual) + t * hidden, static_cast<const T*>(call.norm), normed, hidden,
              call.eps);
    int64_t* chosen = call.experts + t * selected;
    float* weights = call.weights + t * selected;
    for (int64_t a = 0; a < call.gates; ++a)  // rounded as a product in T is
      logits[a] = rounded<T>(dot(normed, static_cast<const T*>(call.gate) + a * hidden, hidden));
    if (selected == 1) {
      chosen[0] = 0;
      weights[0] = 1;
      continue;
    }
    int64_t first = 0, second = -1;
    for (int64_t e = 1; e < experts; ++e)
      if (precedes(logits[e], logits[first])) first = e;
    for (int64_t e = 0; e < experts; ++e)
      if (e != first && (second < 0 || precedes(logits[e], logits[second]))) second = e;
    chosen[0] = first;
    chosen[1] = second;
    share(logits[first], logits[second], weights);
    if (!call.contrast) continue;
    float c[2];
    share(logits[experts], logits[experts + 1], c);
    const float sign = c[0] > c[1] ? 1 : -1;
    const float parts[2] = {sign * c[0], -sign * c[1]};
    for (int k = 0; k < 2; ++k)  // of two experts, c_j belongs to expert j
      call.contrast[t * 2 + k] = parts[experts == 2 ? chosen[k] : k];
  }
  return 0;
}

// ---- pointwise parts ----

struct ActivateCall {  // as in native.py
  const void* hidden;  // [T, 2, E * I]
  void* activations;   // [T, E * I]
  int64_t rows, width, dtype;
};

template <typename T>
int activate(const ActivateCall& call) {
  for (int64_t t = 0; t < call.rows; ++t) {
    const T *gate = static_cast<const T*>(call.hidden) + t * 2 * call.width, *up = gate + call.width;
    T* to = static_cast<T*>(call.activations) + t * call.width;
    in_lanes(call.width, [&](int64_t i, auto n) {
      const Floats x = load(gate + i, n);
      save(to + i, x / (1.0f + exponential(-x)) * load(up + i, n), n);
    });
  }
  return 0;
}

struct WeighCall {  // as in native.py
  const void* activations;  // [T, E, I]
  const int64_t* experts;   // [T, K]
  const float *weights, *contrast;  // [T, K], the latter perhaps null
  void* weighted;  // [1 or 2, T, E * I]
  int64_t rows, num_experts, selected, width, dtype;
};

template <typename T>
int weigh(const WeighCall& call) {
  const int64_t row = call.num_experts * call.width;
  for (int64_t t = 0; t < call.rows * call.selected; ++t)
    if (call.experts[t] < 0 || call.experts[t] >= call.num_experts) return 1;
  for (int kind = 0; kind < (call.contrast ? 2 : 1); ++kind) {
    const float* weights = kind ? call.contrast : call.weights;
    for (int64_t t = 0; t < call.rows; ++t) {
      T* to = static_cast<T*>(call.weighted) + (kind * call.rows + t) * row;
      // What was not selected may hold anything, and 0 * NaN would not be 0.
      if (call.num_experts > call.selected) std::memset(to, 0, row * sizeof(T));
      for (int64_t k = 0; k < call.selected; ++k) {
        const int64_t at = call.experts[t * call.selected + k] * call.width;
        const T* from = static_cast<const T*>(call.activations) + t * row + at;
        const float weight = rounded<T>(weights[t * call.selected + k]);
        in_lanes(call.width, [&](int64_t i, auto n) { save(to + at + i, load(from + i, n) * weight, n); });
      }
    }
  }
  return 0;
}

}  // namespace

extern "C" int experts_route(const RouteCall* call) {
  return with_dtype(call->dtype, [&](auto zero) { return route<decltype(zero)>(*call); });
}

extern "C" int experts_activate(const ActivateCall* call) {
  return with_dtype(call->dtype, [&](auto zero) { return activate<decltype(zero)>(*call); });
}

// 1 for an expert that does not exist.
extern "C" int experts_weigh(const WeighCall* call) {
  return with_dtype(call->dtype, [&](auto zero) { return weigh<decltype(zero)>(*call); });
}
