// The rotary embedding on the CPU; see __init__.py.
//
// T rows, R of each sequence, H query heads, G KV heads, D head size, P positions.

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

struct Call {  // as in native.py; strides count elements, and the numbers of a row of `projected` lie side by side
  const void* projected;  // [T, (H + 2 G) D]
  const int64_t* positions;  // [T]
  const float* table;     // [P, D]
  void *query, *keys, *values;  // [T, H, D], [T / R, R, G, D], likewise
  int64_t row_stride, key_sequence, key_row, value_sequence, value_row;
  int64_t rows, rows_each, heads, kv_heads, dim, limit, dtype;
};

template <typename T>
void rotate(const T* from, const float* angles, int64_t heads, int64_t dim, T* to) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; ++h, from += dim, to += dim)
    in_lanes(half, [&](int64_t i, auto n) {
      const Floats a = load(from + i, n), b = load(from + half + i, n);
      const Floats cosine = load(angles + i, n), sine = load(angles + half + i, n);
      save(to + i, a * cosine - b * sine, n);
      save(to + half + i, b * cosine + a * sine, n);
    });
}

template <typename T>
int place(const Call& call) {
  const int64_t dim = call.dim, heads = call.heads, kv_heads = call.kv_heads;
  for (int64_t t = 0; t < call.rows; ++t)
    if (call.positions[t] < 0 || call.positions[t] >= call.limit) return 1;
  for (int64_t t = 0; t < call.rows; ++t) {
    const T* row = static_cast<const T*>(call.projected) + t * call.row_stride;
    const float* angles = call.table + call.positions[t] * dim;
    rotate(row, angles, heads, dim, static_cast<T*>(call.query) + t * heads * dim);
    if (!kv_heads) continue;
    const int64_t sequence = t / call.rows_each, own = t % call.rows_each;
    T* keys = static_cast<T*>(call.keys) + sequence * call.key_sequence + own * call.key_row;
    T* values = static_cast<T*>(call.values) + sequence * call.value_sequence + own * call.value_row;
    rotate(row + heads * dim, angles, kv_heads, dim, keys);
    std::memcpy(values, row + (heads + kv_heads) * dim, kv_heads * dim * sizeof(T));
  }
  return 0;
}

}  // namespace

// 1 for a position outside [0, P).
extern "C" int rotary_place(const Call* call) {
  return with_dtype(call->dtype, [&](auto zero) { return place<decltype(zero)>(*call); });
}
