// The verification walk on the CPU; see __init__.py.
//
// B sequences, N nodes, S steps. All tensors are contiguous.

#include <cstdint>

namespace {

struct Call {  // as in native.py
  const int64_t *tokens, *parents, *num_nodes, *sampled;  // [B, N], but [B] the number
  int64_t *path, *emitted, *num_accepted;                 // [B, S], but [B] the number
  int64_t batch, width, steps;
};

}  // namespace

extern "C" int walk_samples(const Call* given) {
  const Call& call = *given;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t *tokens = call.tokens + b * call.width, *parents = call.parents + b * call.width;
    int64_t *path = call.path + b * call.steps, *emitted = call.emitted + b * call.steps;
    const int64_t nodes = call.num_nodes[b] < call.width ? call.num_nodes[b] : call.width;
    int64_t node = 0, step = 0;
    for (bool walks = true; walks && step < call.steps; ++step) {
      const int64_t token = call.sampled[b * call.width + node], before = node;
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
  return 0;
}
