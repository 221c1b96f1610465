// What the compiled kernels share: vectors of floats, the three dtypes, and an exponential. No library but C++'s own.
//
// Every source has its own copy of it, so everything lies in an unnamed namespace.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr float LOWEST = std::numeric_limits<float>::lowest();
constexpr float INFINITE = std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct BF16 {
  uint16_t bits;
};
struct FP16 {
  uint16_t bits;
};

template <typename V, typename T>
inline V load_as(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }

inline Floats broadcast(float x) { return Floats{} + x; }

inline Floats load(const float* from) { return load_as<Floats>(from); }

inline Floats load(const BF16* from) {
  return (Floats)(__builtin_convertvector(load_as<Halves>(from), Words) << 16);
}

// Without the instruction: the exponent is moved by a product, which also takes care of numbers below the normal.
inline Floats load(const FP16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load_as<__m256i>(from));
#elif defined(__AVX2__) && defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(load_as<__m128i>(from));
#else
  const Words half = __builtin_convertvector(load_as<Halves>(from), Words);
  const Words magnitude = (half & 0x7fff) << 13, sign = (half & 0x8000) << 16;
  const Words finite = (Words)((Floats)magnitude * 0x1p112f);
  return (Floats)(((magnitude >= 0x0f800000) ? magnitude | 0x7f800000 : finite) | sign);
#endif
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float with_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void save(float* to, float x) { *to = x; }

// To nearest, ties to even; a NaN keeps its sign and gets a bit that the cut leaves.
inline void save(BF16* to, float x) {
  const uint32_t bits = bits_of(x);
  to->bits = x != x ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline void save(FP16* to, float x) {
#if defined(__F16C__)
  to->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, bits = bits_of(x) & 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000)
    half = 0x7e00;
  else if (bits >= 0x47800000)  // 2^16
    half = 0x7c00;
  else if (bits < 0x38800000)  // 2^-14: one unit in the last place of 0.5 is the smallest half
    half = bits_of(with_bits(bits) + 0.5f) - bits_of(0.5f);
  else
    half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  to->bits = half | sign;
#endif
}

inline float scalar(const float* from) { return *from; }

inline float scalar(const BF16* from) { return with_bits((uint32_t)from->bits << 16); }

inline float scalar(const FP16* from) {
#if defined(__F16C__)
  return _cvtsh_ss(from->bits);
#else
  FP16 several[LANES] = {*from};
  return load(several)[0];
#endif
}

// Vectors of half and a quarter of the lanes, in which sums over lanes are taken.
typedef float HalfFloats __attribute__((vector_size(LANES * 2)));
typedef float QuarterFloats __attribute__((vector_size(LANES)));

template <typename Narrow, typename Wide, typename Combine>
inline Narrow fold(Wide v, const Combine& combine) {
  Narrow low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  return combine(low, high);
}

template <typename Combine>
inline float across(Floats v, const Combine& combine) {
  const QuarterFloats few = fold<QuarterFloats>(fold<HalfFloats>(v, combine), combine);
  float result = few[0];
  for (int i = 1; i < LANES / 4; ++i) result = combine(result, (float)few[i]);
  return result;
}

inline float highest(Floats v) {
  return across(v, [](auto a, auto b) { return a > b ? a : b; });
}

inline float sum(Floats v) {
  return across(v, [](auto a, auto b) { return a + b; });
}

// Whether a comparison holds in every lane.
inline bool everywhere(Ints outcome) {
  int64_t pairs[LANES / 2], both = -1;
  std::memcpy(pairs, &outcome, sizeof pairs);
  for (int64_t pair : pairs) both &= pair;
  return both == -1;
}

// exp to about an ulp for x <= 0 or a little above; exactly 0 below the smallest normal number, NaN for NaN.
inline Floats exponential(Floats x) {
  const Floats log2e = broadcast(1.44269504088896341f), magic = broadcast(12582912.0f);  // 1.5 * 2^23 rounds
  const Floats safe = x < -87.3f ? broadcast(-87.3f) : x > 88.0f ? broadcast(88.0f) : x;
  const Floats shifted = safe * log2e + magic, n = shifted - magic;
  const Floats r = safe - n * 0.693359375f - n * -2.12194440e-4f;
  Floats p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Ints power = (Ints)shifted << 23;  // the low bits of shifted are n
  const Floats result = (Floats)((Ints)p + power);
  return x < -87.3f ? Floats{} : x != x ? x : result;
}

inline Floats tangent(Floats x) {
  const Floats bounded = x < -9.0f ? broadcast(-9.0f) : x > 9.0f ? broadcast(9.0f) : x;
  return 1.0f - 2.0f / (exponential(bounded * 2.0f) + 1.0f);
}

// Calls work(T()) with the type of a dtype, numbered as in __init__.py.
template <typename Work>
inline int with_dtype(int64_t dtype, const Work& work) {
  if (dtype == 0) return work(float());
  if (dtype == 1) return work(BF16());
  return work(FP16());
}

// The first `count` of a vector's numbers, count < LANES, and zeros; what lies behind them is not read.
template <typename T>
inline Floats load_part(const T* from, int64_t count) {
  T several[LANES] = {};
  std::memcpy(several, from, count * sizeof(T));
  return load(several);
}

template <typename T>
inline void save(T* to, Floats v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) save(to + i, (float)v[i]);
}

// All of a vector's, each rounded as above.
using All = std::integral_constant<int64_t, LANES>;

inline void save(float* to, Floats v, All) { store(to, v); }

inline void save(BF16* to, Floats v, All) {
  const Words bits = (Words)v;
  const Words rounded = (v != v) ? (bits >> 16) | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

#if defined(__AVX512F__)
inline void save(FP16* to, Floats v, All) {
  const __m256i halves = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &halves, sizeof halves);
}
#endif

// Calls work(first number, how many of a vector's) for `count` numbers, a vector at a time.
template <typename Work>
inline void in_lanes(int64_t count, const Work& work) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) work(i, All());
  if (i < count) work(i, count - i);
}

template <typename T>
inline Floats load(const T* from, int64_t count) {
  return load_part(from, count);
}

template <typename T>
inline Floats load(const T* from, All) {
  return load(from);
}

}  // namespace
