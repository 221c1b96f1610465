// Prompt lookup; see __init__.py.
//
// R texts of up to L tokens, B of them meant, W tokens of each draft. All tensors but the texts are contiguous.

#include <cstdint>

namespace {

struct Call {  // as in native.py
  const int32_t* texts;                // [R, L]
  const int64_t *rows, *lengths;       // [B]
  int64_t *tokens, *repeated;          // [B, W], [B]
  int64_t row_stride, num_texts, most, batch, width, longest;
};

void look_up(const Call& call, int64_t b) {
  const int32_t* text = call.texts + call.rows[b] * call.row_stride;
  const int64_t end = call.lengths[b] - 1;  // the last token
  int64_t best = 0, place = -1;
  // No place before token ``best`` repeats more than ``best`` tokens.
  for (int64_t p = end - 1; p >= best && best < call.longest; --p) {
    // Most places fail at the token that would make their repeat longer than the best one.
    if (text[p - best] != text[end - best] || text[p] != text[end]) continue;
    int64_t count = 1;
    while (count < call.longest && count <= p && text[p - count] == text[end - count]) ++count;
    if (count > best) {
      best = count;
      place = p;
    }
  }
  int64_t* tokens = call.tokens + b * call.width;
  for (int64_t j = 0; j < call.width; ++j) {
    const int64_t source = place + 1 + j;
    tokens[j] = !best ? -1 : source <= end ? text[source] : tokens[source - end - 1];
  }
  call.repeated[b] = best;
}

}  // namespace

// 1 where a row or a length is not in the texts.
extern "C" int look_up(const Call* call) {
  for (int64_t b = 0; b < call->batch; ++b)
    if (call->rows[b] < 0 || call->rows[b] >= call->num_texts || call->lengths[b] < 1 || call->lengths[b] > call->most)
      return 1;
  for (int64_t b = 0; b < call->batch; ++b) look_up(*call, b);
  return 0;
}
