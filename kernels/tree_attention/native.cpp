// Tree attention on the CPU, straight from vLLM's pages; see __init__.py for the meaning, native.py for the build.
//
// J sequences, R rows and N nodes of a sequence, H query heads, G KV heads, D head size, B slots per page, and
// M = R * H / G query rows per KV head.
//
// A work item is one sequence, one KV head, a block of at most MAX_ROWS of its M rows and a range of the context.
// It walks the range in steps of at most STEP slots. In a step, each tile of at most TILE rows takes its scores,
// an online softmax and the weighted values, in registers but for the scores. Pages are read where they lie.
// Tree nodes are a step of their own, packed the same way first. Threads draw items from a counter; who finishes
// the last range of a block of rows merges all of them, in the context's order, so results do not depend on timing.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "vectors.h"

namespace {

// Rows whose sums fit in the vector registers, two vectors wide.
constexpr int TILE = LANES == 16 ? 12 : LANES == 8 ? 6 : 4;  // 24 of 32 registers, 12 or 8 of 16
constexpr int STEP = 128;       // slots
constexpr int UNIT = 16;        // pages and head sizes are multiples of it
constexpr int MAX_NODES = 64;   // bits of an ancestor word
constexpr int MAX_ROWS = 16 * TILE;
constexpr int64_t LEAST_RANGE = 256;  // slots; shorter ranges cost more in merging than they gain
constexpr int64_t ITEMS_PER_THREAD = 4;

// ---- what differs between layouts: where a key's and a value's numbers lie ----

// Keys [D, B], values [B, D].
template <typename T>
struct Rows {
  using Scalar = T;

  // Adds up D products: scores of a tile's rows with LANES * V slots from `slot`.
  template <int R, int V>
  static inline void dot(Floats (&sums)[R][V], const float* query, const T* keys, int64_t slot, int64_t block,
                         int64_t dim) {
    const T* key = keys + slot;
    for (int64_t d = 0; d < dim; ++d, key += block, query += TILE) {
      Floats k[V];
      for (int v = 0; v < V; ++v) k[v] = load(key + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] += query[r] * k[v];
    }
  }

  // Adds `count` slots' values from `slot`, LANES * V of their numbers from d, by the weights [R, STEP].
  template <int R, int V>
  static inline void weigh(Floats (&sums)[R][V], const float* weights, const T* values, int64_t slot, int64_t count,
                           int64_t d, int64_t, int64_t dim) {
    const T* value = values + slot * dim + d;
    for (int64_t s = 0; s < count; ++s, value += dim) {
      Floats x[V];
      for (int v = 0; v < V; ++v) x[v] = load(value + v * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] += weights[r * STEP + s] * x[v];
    }
  }
};

// bfloat16 in tiles of 16 pairs: keys [B/16, D/2, 16, 2], values [D/16, B/2, 16, 2].
struct Pairs {
  using Scalar = BF16;

  static inline Floats first(Words pair) { return (Floats)(pair << 16); }
  static inline Floats second(Words pair) { return (Floats)(pair & 0xffff0000u); }

  template <int R, int V>
  static inline void dot(Floats (&sums)[R][V], const float* query, const BF16* keys, int64_t slot, int64_t,
                         int64_t dim) {
    const BF16* key[V];
    for (int v = 0; v < V; ++v) {
      const int64_t at = slot + v * LANES;
      key[v] = keys + at / 16 * 16 * dim + at % 16 * 2;
    }
    for (int64_t d = 0; d < dim; d += 2, query += 2 * TILE) {
      Words k[V];
      for (int v = 0; v < V; ++v) k[v] = load_as<Words>(key[v] + d * 16);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] += query[r] * first(k[v]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] += query[TILE + r] * second(k[v]);
    }
  }

  template <int R, int V>
  static inline void weigh(Floats (&sums)[R][V], const float* weights, const BF16* values, int64_t slot,
                           int64_t count, int64_t d, int64_t block, int64_t) {
    const BF16* value[V];
    for (int v = 0; v < V; ++v) {
      const int64_t at = d + v * LANES;
      value[v] = values + at / 16 * 16 * block + slot * 16 + at % 16 * 2;
    }
    for (int64_t s = 0; s < count; s += 2) {
      Words x[V];
      for (int v = 0; v < V; ++v) x[v] = load_as<Words>(value[v] + s * 16);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] += weights[r * STEP + s] * first(x[v]);
      if (s + 1 == count) break;  // the pair's second slot may hold anything
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] += weights[r * STEP + s + 1] * second(x[v]);
    }
  }
};

// ---- one step of one tile ----

// Part of a step: slots that lie in one page, `slot` the first, `at` its column among the scores.
template <typename T>
struct Piece {
  const T* keys;
  const T* values;
  int64_t slot, count, at;
};

template <typename T>
struct Step {
  Piece<T> pieces[STEP / UNIT + 2];
  int count = 0;
  int64_t slots = 0;
};

// The functions that hold registers are kept apart: inlined into each caller they would take long to compile.
#define APART __attribute__((noinline))

template <typename Layout, int R, int V>
APART void score(const float* query, const Piece<typename Layout::Scalar>& piece, int64_t s, int64_t block, int64_t dim,
           float* scores) {
  Floats sums[R][V] = {};
  Layout::template dot<R, V>(sums, query, piece.keys, piece.slot + s, block, dim);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(scores + r * STEP + piece.at + s + v * LANES, sums[r][v]);
}

template <typename Layout, int R, int V>
APART void gather(const float* weights, const float* factors, const Step<typename Layout::Scalar>& step, int64_t d,
            int64_t block, int64_t dim, float* found) {
  Floats sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = load(found + r * dim + d + v * LANES) * factors[r];
  for (int i = 0; i < step.count; ++i) {
    const auto& piece = step.pieces[i];
    Layout::template weigh<R, V>(sums, weights + piece.at, piece.values, piece.slot, piece.count, d, block, dim);
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(found + r * dim + d + v * LANES, sums[r][v]);
}

// A tile's running softmax; R rows.
struct Tile {
  float* query;   // [D, TILE]
  float* found;   // [R, D]
  float* maxima;  // [R]
  float* totals;  // [R]
};

Ints lanes() {
  Ints order;
  for (int i = 0; i < LANES; ++i) order[i] = i;
  return order;
}

// Which of the LANES columns from s row r of a tile sees, all bits set or none: tree nodes by ancestor words, ...
struct SeenNodes {
  const uint64_t* words;
  const Ints bits = 1 << lanes();

  Ints operator()(int64_t r, int64_t s) const { return ((Ints{} + (int32_t)(words[r] >> s)) & bits) != 0; }
};

// ... and slots from the first in a row's window up to the end of the context; `begin` is that of column 0.
struct SeenSlots {
  const int32_t* oldest;
  int32_t begin, end;
  const Ints order = lanes();

  Ints operator()(int64_t r, int64_t s) const {
    const Ints slot = order + (int32_t)(begin + s);
    return (slot >= oldest[r]) & (slot < end);
  }
};

// Scores [R, STEP] become weights; factors [R] take what was found so far to the new maximum.
template <typename Seen>
APART void soften(int64_t rows, float* scores, const Tile& tile, int64_t slots, float softcap, float* factors,
                  const Seen& seen) {
  const int64_t end = (slots + LANES - 1) / LANES * LANES;
  for (int64_t r = 0; r < rows; ++r) {
    float* row = scores + r * STEP;
    Floats top = broadcast(-INFINITE);
    for (int64_t s = 0; s < end; s += LANES) {
      Floats x = load(row + s);
      if (softcap > 0) x = softcap * tangent(x / softcap);
      x = seen(r, s) ? x : broadcast(-INFINITE);
      store(row + s, x);
      top = x > top ? x : top;
    }
    const float before = tile.maxima[r], maximum = std::max(before, highest(top));
    // A row that has seen nothing yet: a finite pivot in place of -inf leaves its weights at exp(-inf) = 0.
    const float pivot = std::max(maximum, LOWEST);
    Floats total{};
    for (int64_t s = 0; s < end; s += LANES) {
      const Floats weight = exponential(load(row + s) - pivot);
      store(row + s, weight);
      total += weight;
    }
    factors[r] = exponential(broadcast(before - pivot))[0];
    tile.totals[r] = tile.totals[r] * factors[r] + sum(total);
    tile.maxima[r] = maximum;
  }
}

// Vectors at a time: as many as there are registers for, since few sums would wait for each other.
constexpr int widest(int rows) {
  int width = 2;
  while (width < 8 && 2 * width * rows <= 2 * TILE) width *= 2;
  return width;
}

// Calls work(V, first number) for all of `end` numbers, LANES * V at a time and fewer towards the end.
template <int V, typename Work>
inline void in_vectors(int64_t end, const Work& work, int64_t at = 0) {
  for (; at + V * LANES <= end; at += V * LANES) work(std::integral_constant<int, V>{}, at);
  if constexpr (V > 1) in_vectors<V / 2>(end, work, at);
}

template <typename Layout, int R, typename Seen>
void advance(int64_t rows, const Tile& tile, const Step<typename Layout::Scalar>& step, int64_t block, int64_t dim,
             float softcap, const Seen& seen) {
  alignas(64) float scores[R * STEP];
  float factors[R] = {};
  for (int i = 0; i < step.count; ++i) {
    const auto& piece = step.pieces[i];
    const int64_t end = (piece.count + LANES - 1) / LANES * LANES;  // within the page: UNIT divides both
    in_vectors<widest(R)>(end, [&](auto width, int64_t s) {
      score<Layout, R, width>(tile.query, piece, s, block, dim, scores);
    });
  }
  soften(rows, scores, tile, step.slots, softcap, factors, seen);
  in_vectors<widest(R)>(dim, [&](auto width, int64_t d) {
    gather<Layout, R, width>(scores, factors, step, d, block, dim, tile.found);
  });
}

// The number of rows is fixed where the registers are chosen, to the next in this list; surplus rows are computed
// from zeros and dropped. A function for every number would only take longer to compile.
template <typename Layout, typename Seen>
void advance(int64_t rows, const Tile& tile, const Step<typename Layout::Scalar>& step, int64_t block, int64_t dim,
             float softcap, const Seen& seen) {
  if (rows <= 1) return advance<Layout, 1>(rows, tile, step, block, dim, softcap, seen);
  if (rows <= 2) return advance<Layout, 2>(rows, tile, step, block, dim, softcap, seen);
  if (rows <= 4) return advance<Layout, 4>(rows, tile, step, block, dim, softcap, seen);
  if constexpr (TILE > 6)
    if (rows <= 6) return advance<Layout, 6>(rows, tile, step, block, dim, softcap, seen);
  if constexpr (TILE > 8)
    if (rows <= 8) return advance<Layout, 8>(rows, tile, step, block, dim, softcap, seen);
  advance<Layout, TILE>(rows, tile, step, block, dim, softcap, seen);
}

// ---- work ----

struct Call {  // as in native.py; strides count elements
  const void* query;
  int64_t query_row, query_head;
  const void* pages;
  int64_t page_stride, page_head;
  const void* keys;
  int64_t key_row, key_head;
  const void* values;
  int64_t value_row, value_head;
  void* out;
  int64_t out_row, out_head;
  const int32_t* tables;
  int64_t table_row;
  const int64_t *context_lens, *row_starts, *row_counts, *node_starts, *node_counts, *ancestors, *depths;
  int64_t jobs, heads, kv_heads, dim, block, window, threads, dtype, layout;
  float scale, softcap;
};

struct Item {
  int64_t job, head, first, count;  // rows among the sequence's M
  int64_t begin, end;               // slots
  int64_t part, parts, family;      // which range of how many; the ranges of a block of rows are one family
  int64_t result;                   // where its unfinished result lies, if parts > 1
};

std::vector<Item> divide(const Call& call, int64_t& families, int64_t& results) {
  const int64_t group = call.heads / call.kv_heads;
  int64_t work = 0;
  for (int64_t j = 0; j < call.jobs; ++j)
    work += call.row_counts[j] * group * call.kv_heads * (call.context_lens[j] + MAX_NODES);
  const int64_t fair = std::max<int64_t>(1, work / (call.threads * ITEMS_PER_THREAD));
  std::vector<Item> items;
  families = results = 0;
  for (int64_t j = 0; j < call.jobs; ++j) {
    const int64_t rows = call.row_counts[j] * group, context = call.context_lens[j];
    if (!rows) continue;
    int64_t begin = 0;
    if (call.window > 0) {
      const int64_t* depths = call.depths + call.row_starts[j];
      const int64_t position = context + *std::min_element(depths, depths + call.row_counts[j]);
      begin = std::min(std::max<int64_t>(0, position - call.window + 1), context) / UNIT * UNIT;
    }
    const int64_t blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    const int64_t per_block = ((rows + blocks - 1) / blocks + TILE - 1) / TILE * TILE;
    for (int64_t first = 0; first < rows; first += per_block) {
      const int64_t count = std::min(per_block, rows - first), slots = context - begin;
      int64_t parts = std::min(count * slots / fair, slots / LEAST_RANGE);
      parts = std::max<int64_t>(1, parts);
      const int64_t length = ((slots + parts - 1) / parts + STEP - 1) / STEP * STEP;
      parts = std::max<int64_t>(1, length ? (slots + length - 1) / length : 1);
      for (int64_t head = 0; head < call.kv_heads; ++head) {
        for (int64_t part = 0; part < parts; ++part) {
          const int64_t from = begin + part * length;
          items.push_back({j, head, first, count, from, std::min(from + length, context), part, parts, families,
                           results});
          if (parts > 1) results += count * (call.dim + 2);
        }
        ++families;
      }
    }
  }
  return items;
}

// What a thread keeps while it works on an item; everything is [padded M, ...].
struct Space {
  float *query, *found, *maxima, *totals, *keys, *values;

  static int64_t size(int64_t dim) { return 2 * MAX_ROWS * (dim + 1) + 2 * MAX_NODES * dim; }

  Space(float* at, int64_t dim) {
    query = at;
    found = query + MAX_ROWS * dim;
    keys = found + MAX_ROWS * dim;
    values = keys + MAX_NODES * dim;
    maxima = values + MAX_NODES * dim;
    totals = maxima + MAX_ROWS;
  }
};

// Memory that the calling thread keeps between calls: fresh pages from the system would cost more than a short call.
float* keep(int64_t floats) {
  struct Kept {
    void* at = nullptr;
    int64_t floats = 0;
    ~Kept() { std::free(at); }
  };
  thread_local Kept kept;
  if (kept.floats < floats) {
    std::free(kept.at);
    kept.floats = 0;
    const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
    kept.at = std::aligned_alloc(64, bytes);
    if (kept.at) kept.floats = floats;
  }
  return static_cast<float*>(kept.at);
}

template <typename Layout>
struct Worker {
  using T = typename Layout::Scalar;
  const Call& call;
  const int64_t group = call.heads / call.kv_heads;

  // Row m of a KV head is query head m % group of the sequence's row m / group.
  int64_t row_of(const Item& item, int64_t m) const { return call.row_starts[item.job] + (item.first + m) / group; }
  int64_t head_of(const Item& item, int64_t m) const { return item.head * group + (item.first + m) % group; }

  void take_queries(const Item& item, const Space& space) const {
    const T* query = static_cast<const T*>(call.query);
    const int64_t full = item.count / TILE * TILE;
    if (full < item.count) std::fill_n(space.query + full * call.dim, TILE * call.dim, 0.0f);
    for (int64_t m = 0; m < item.count; ++m) {
      const T* from = query + row_of(item, m) * call.query_row + head_of(item, m) * call.query_head;
      float* to = space.query + m / TILE * TILE * call.dim + m % TILE;
      for (int64_t d = 0; d < call.dim; ++d) to[d * TILE] = scalar(from + d) * call.scale;
    }
  }

  Tile tile_at(const Space& space, int64_t m) const {
    return {space.query + m * call.dim, space.found + m * call.dim, space.maxima + m, space.totals + m};
  }

  void see_nodes(const Item& item, const Space& space) const {
    const int64_t nodes = call.node_counts[item.job], start = call.node_starts[item.job], dim = call.dim;
    if (!nodes) return;
    uint64_t words[MAX_ROWS], named = 0;
    const uint64_t exist = nodes < MAX_NODES ? (uint64_t(1) << nodes) - 1 : ~uint64_t(0);
    for (int64_t m = 0; m < item.count; ++m) {
      words[m] = (uint64_t)call.ancestors[row_of(item, m)] & exist;
      named |= words[m];
    }
    // Nodes that no row names may hold anything: their weight is 0, but 0 * NaN would not be.
    const int64_t width = (nodes + UNIT - 1) / UNIT * UNIT;
    const T *all_keys = static_cast<const T*>(call.keys), *all_values = static_cast<const T*>(call.values);
    for (int64_t d = 0; d < dim; ++d) std::fill_n(space.keys + d * MAX_NODES, width, 0.0f);
    for (int64_t n = 0; n < nodes; ++n) {
      const bool used = named >> n & 1;
      const T* key = all_keys + (start + n) * call.key_row + item.head * call.key_head;
      const T* value = all_values + (start + n) * call.value_row + item.head * call.value_head;
      if (used)
        for (int64_t d = 0; d < dim; ++d) space.keys[d * MAX_NODES + n] = scalar(key + d);
      for (int64_t d = 0; d < dim; d += LANES)
        store(space.values + n * dim + d, used ? load(value + d) : Floats{});
    }
    Step<float> step;
    step.pieces[0] = {space.keys, space.values, 0, nodes, 0};
    step.count = 1;
    step.slots = nodes;
    for (int64_t m = 0; m < item.count; m += TILE)
      advance<Rows<float>>(std::min<int64_t>(TILE, item.count - m), tile_at(space, m), step, MAX_NODES, dim,
                           call.softcap, SeenNodes{words + m});
  }

  void see_context(const Item& item, const Space& space) const {
    const int32_t* table = call.tables + item.job * call.table_row;
    const T* pages = static_cast<const T*>(call.pages) + item.head * call.page_head;
    const int64_t block = call.block, dim = call.dim, context = call.context_lens[item.job];
    int32_t oldest[MAX_ROWS];  // first slot that a row sees
    for (int64_t m = 0; m < item.count; ++m)
      oldest[m] = call.window > 0
                      ? (int32_t)std::max<int64_t>(0, context + call.depths[row_of(item, m)] - call.window + 1)
                      : 0;
    for (int64_t begin = item.begin; begin < item.end;) {
      Step<T> step;
      int64_t slot = begin;
      while (slot < item.end && step.slots < STEP) {
        const T* page = pages + table[slot / block] * call.page_stride;
        const int64_t inside = slot % block;
        const int64_t count = std::min({block - inside, item.end - slot, STEP - step.slots});
        step.pieces[step.count++] = {page, page + block * dim, inside, count, step.slots};
        step.slots += count;
        slot += count;
      }
      for (int64_t m = 0; m < item.count; m += TILE)
        advance<Layout>(std::min<int64_t>(TILE, item.count - m), tile_at(space, m), step, block, dim, call.softcap,
                        SeenSlots{oldest + m, (int32_t)begin, (int32_t)slot});
      begin = slot;
    }
  }

  void write(const Item& item, int64_t m, const float* found, float total) const {
    T* to = static_cast<T*>(call.out) + row_of(item, m) * call.out_row + head_of(item, m) * call.out_head;
    for (int64_t d = 0; d < call.dim; ++d) save(to + d, found[d] / total);
  }

  void run(const Item& item, const Space& space, float* results) const {
    std::fill_n(space.found, (item.count + TILE - 1) / TILE * TILE * call.dim, 0.0f);
    std::fill_n(space.maxima, item.count, -INFINITE);
    std::fill_n(space.totals, item.count, 0.0f);
    take_queries(item, space);
    if (item.part == 0) see_nodes(item, space);
    see_context(item, space);
    if (item.parts == 1) {
      for (int64_t m = 0; m < item.count; ++m) write(item, m, space.found + m * call.dim, space.totals[m]);
      return;
    }
    float* result = results + item.result;
    std::memcpy(result, space.found, item.count * call.dim * sizeof(float));
    std::memcpy(result + item.count * call.dim, space.maxima, item.count * sizeof(float));
    std::memcpy(result + item.count * (call.dim + 1), space.totals, item.count * sizeof(float));
  }

  // `last` is the item of the family's last range; those of the others lie before it.
  void merge(const Item& last, const Space& space, const float* results) const {
    const int64_t dim = call.dim, count = last.count, size = count * (dim + 2);
    const float* first = results + last.result - (last.parts - 1) * size;
    for (int64_t m = 0; m < count; ++m) {
      float pivot = LOWEST, total = 0;
      for (int64_t p = 0; p < last.parts; ++p) pivot = std::max(pivot, first[p * size + count * dim + m]);
      std::fill_n(space.found, dim, 0.0f);
      for (int64_t p = 0; p < last.parts; ++p) {
        const float* part = first + p * size;
        const float factor = exponential(broadcast(part[count * dim + m] - pivot))[0];
        total += factor * part[count * (dim + 1) + m];
        for (int64_t d = 0; d < dim; ++d) space.found[d] += factor * part[m * dim + d];
      }
      write(last, m, space.found, total);
    }
  }
};

template <typename Layout>
int attend(const Call& call) {
  int64_t families, results;
  const std::vector<Item> items = divide(call, families, results);
  const int64_t number = (int64_t)items.size(), threads = call.threads;
  if (!number) return 0;
  const int64_t each = (Space::size(call.dim) + 15) / 16 * 16;
  float* memory = keep(threads * each + results);
  if (!memory) return 1;
  std::vector<std::atomic<int64_t>> missing(families);
  for (const Item& item : items) missing[item.family].store(item.parts, std::memory_order_relaxed);
  std::atomic<int64_t> next{0};
  const Worker<Layout> worker{call};
  // Always the same number of threads: OpenMP runtimes end those that a call has no use for, and vLLM has bound
  // each to its core.
#pragma omp parallel num_threads(threads) if (number > 1)
  {
    const Space space(memory + omp_get_thread_num() * each, call.dim);
    float* unfinished = memory + threads * each;
    for (int64_t i; (i = next.fetch_add(1)) < number;) {
      const Item& item = items[i];
      worker.run(item, space, unfinished);
      if (item.parts > 1 && missing[item.family].fetch_sub(1) == 1)
        worker.merge(items[i + item.parts - 1 - item.part], space, unfinished);
    }
  }
  return 0;
}

}  // namespace

// 0, or 1 where memory is short, 2 for a layout and dtype that do not exist together, 3 for too many nodes.
extern "C" int tree_attention(const Call* call) {
  for (int64_t j = 0; j < call->jobs; ++j)
    if (call->node_counts[j] > MAX_NODES) return 3;
  try {
    if (call->layout == 0 && call->dtype == 0) return attend<Rows<float>>(*call);
    if (call->layout == 0 && call->dtype == 1) return attend<Rows<BF16>>(*call);
    if (call->layout == 0 && call->dtype == 2) return attend<Rows<FP16>>(*call);
    if (call->layout == 1 && call->dtype == 1) return attend<Pairs>(*call);
    return 2;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
