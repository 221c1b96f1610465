// Beam and re-rank on the CPU; see __init__.py.
//
// B sequences, K beam nodes, P nodes with candidates, W candidates per node, M candidates of all levels, N nodes of a
// tree. All tensors are contiguous.

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

// The `count` best of `total`, the best first: NaN before all numbers, and of equals the lower index.
void rank(const float* scores, int64_t total, int64_t count, std::vector<int64_t>& order) {
  order.resize(total);
  for (int64_t i = 0; i < total; ++i) order[i] = i;
  std::partial_sort(order.begin(), order.begin() + count, order.end(), [&](int64_t i, int64_t j) {
    const float a = scores[i], b = scores[j];
    if (a > b || a < b) return a > b;
    const bool first = a != a, second = b != b;
    return first != second ? first : i < j;
  });
}

struct ExpandCall {  // as in native.py
  const float* parent_scores;  // [B, K]
  const int64_t *parent_ids, *parent_words;  // [B, K]
  const int64_t* tokens;       // [B, P, W]
  const float* log_probs;      // [B, P, W]
  const int64_t* rows;         // [B, K] in [0, P), or null
  float* pool_scores;          // [B, M]
  int64_t *pool_tokens, *pool_parents;  // [B, M]
  float* next_scores;          // [B, count]
  int64_t *next_tokens, *next_ids, *next_origins, *next_choices, *next_words;  // [B, count]
  int64_t batch, parents, proposers, width, total, first_id, count, first_slot;
};

int expand(const ExpandCall& call) {
  if (call.rows)
    for (int64_t i = 0; i < call.batch * call.parents; ++i)
      if (call.rows[i] < 0 || call.rows[i] >= call.proposers) return 1;
  const int64_t width = call.width, size = call.parents * width;
  std::vector<int64_t> order;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t at = b * call.total + call.first_id;
    float* scores = call.pool_scores + at;
    for (int64_t k = 0; k < call.parents; ++k) {
      const int64_t parent = b * call.parents + k;
      const int64_t from = (b * call.proposers + (call.rows ? call.rows[parent] : k)) * width;
      for (int64_t w = 0; w < width; ++w) {
        scores[k * width + w] = call.parent_scores[parent] + call.log_probs[from + w];
        call.pool_tokens[at + k * width + w] = call.tokens[from + w];
        call.pool_parents[at + k * width + w] = call.parent_ids[parent];
      }
    }
    if (!call.count) continue;
    rank(scores, size, call.count, order);
    for (int64_t i = 0; i < call.count; ++i) {
      const int64_t to = b * call.count + i, best = order[i], origin = best / width;
      call.next_scores[to] = scores[best];
      call.next_tokens[to] = call.pool_tokens[at + best];
      call.next_ids[to] = best + call.first_id;
      call.next_origins[to] = origin;
      call.next_choices[to] = best % width;
      const uint64_t own = uint64_t(1) << (call.first_slot + i);
      call.next_words[to] = call.parent_words[b * call.parents + origin] | (int64_t)own;
    }
  }
  return 0;
}

constexpr int64_t MAX_NODES = 64;

struct RerankCall {  // as in native.py
  const float* scores;  // [B, M]
  const int64_t *tokens, *parent_ids, *roots;  // [B, M], [B, M], [B]
  int64_t *nodes, *parents, *depths, *words;   // [B, N]
  int64_t* num_nodes;   // [B]
  float* node_scores;   // [B, N]
  int64_t batch, total, width, rounds;
};

int rerank(const RerankCall& call) {
  for (int64_t i = 0; i < call.batch * call.total; ++i)
    if (call.parent_ids[i] >= call.total) return 1;
  std::vector<int64_t> order, position(call.total);
  for (int64_t b = 0; b < call.batch; ++b) {
    const float* scores = call.scores + b * call.total;
    const int64_t *tokens = call.tokens + b * call.total, *above = call.parent_ids + b * call.total;
    int64_t *nodes = call.nodes + b * call.width, *parents = call.parents + b * call.width;
    int64_t *depths = call.depths + b * call.width, *words = call.words + b * call.width;
    float* node_scores = call.node_scores + b * call.width;
    rank(scores, call.total, call.width - 1, order);
    std::fill(position.begin(), position.end(), 0);
    int64_t count = 1;
    for (int64_t n = 1; n < call.width; ++n) {
      if (scores[order[n - 1]] == -INFINITE) continue;
      position[order[n - 1]] = n;
      ++count;
    }
    nodes[0] = call.roots[b];
    parents[0] = -1;
    node_scores[0] = 0;
    int64_t jumps[MAX_NODES] = {0};  // the root's leads to itself
    for (int64_t n = 1; n < call.width; ++n) {
      const int64_t kept = order[n - 1];
      const bool padding = scores[kept] == -INFINITE;
      node_scores[n] = scores[kept];
      nodes[n] = padding ? -1 : tokens[kept];
      parents[n] = jumps[n] = padding || above[kept] < 0 ? 0 : position[above[kept]];
    }
    for (int64_t n = 0; n < call.width; ++n) {
      words[n] = (int64_t)(uint64_t(1) << n);
      depths[n] = n > 0;
    }
    // Each round doubles the part of the paths that is known, whatever the order of the nodes.
    for (int64_t round = 0; round < call.rounds; ++round) {
      int64_t old_words[MAX_NODES], old_depths[MAX_NODES], old_jumps[MAX_NODES];
      std::memcpy(old_words, words, call.width * sizeof *words);
      std::memcpy(old_depths, depths, call.width * sizeof *depths);
      std::memcpy(old_jumps, jumps, call.width * sizeof *jumps);
      for (int64_t n = 0; n < call.width; ++n) {
        words[n] |= old_words[old_jumps[n]];
        depths[n] += old_depths[old_jumps[n]];
        jumps[n] = old_jumps[old_jumps[n]];
      }
    }
    call.num_nodes[b] = count;
  }
  return 0;
}

}  // namespace

// 1 for a row outside [0, P).
extern "C" int grow_expand(const ExpandCall* call) { return expand(*call); }

// 1 for a parent outside the pool.
extern "C" int grow_rerank(const RerankCall* call) { return rerank(*call); }
