// Attention over pages: heads are normed and rotated, keys and values stored, and queries attend.
// Knows no projection.

#ifndef GLM_JAX_ATTENTION_H_
#define GLM_JAX_ATTENTION_H_

#include "numbers.h"

typedef struct {
  const Array *heads, *turns, *positions, *table, *out, *keys, *values;
  XLA_FFI_DataType dtype, kept;  // of activations, of the cache
  float *q_norm, *k_norm;        // of this layer, widened; NULL: none
  int64_t layer, rows, tokens, kv_heads, groups, size, stride, page_size, pages, num_pages, half;
  float eps;
} Attention;

INLINE int32_t position_of(const Attention* a, int64_t row, int64_t token) {
  return ((const int32_t*)a->positions->data)[row * a->tokens + token];
}

// Where a page of this layer and kv head begins, in numbers; -1 where there is no such page.
INLINE int64_t page_at(const Attention* a, int64_t row, int64_t index, int64_t head) {
  if (index >= a->pages) return -1;
  const int64_t page = ((const int32_t*)a->table->data)[row * a->pages + index];
  if (page < 0 || page >= a->num_pages) return -1;
  return ((a->layer * a->num_pages + page) * a->kv_heads + head) * a->page_size * a->size;
}

// A head's root-mean-square norm, rounded before its weight and after it.
INLINE void norm_head(const Attention* a, const float* weight, float* head) {
  Floats squares = {0};
  for (int64_t i = 0; i < a->stride; i += LANES) {
    Floats x = load(head + i);
    squares = squares + x * x;
  }
  const float factor = 1.0f / sqrtf(sum(squares) / (float)a->size + a->eps);
  for (int64_t i = 0; i < a->stride; i += LANES) {
    Floats x = rounded_to(a->dtype, load(head + i) * factor);
    store(head + i, rounded_to(a->dtype, x * load(weight + i)));
  }
}

// Turns the pairs (i, i + half) of a head; cosines, then sines, are those of its position.
INLINE void rotate_head(const Attention* a, const float* turns, float* head) {
  const int64_t half = a->half;
  for (int64_t i = 0; i < half; ++i) {
    const float x = head[i], y = head[i + half], cosine = turns[i], sine = turns[half + i];
    const float xc = rounded_one(a->dtype, x * cosine), ys = rounded_one(a->dtype, y * sine);
    const float yc = rounded_one(a->dtype, y * cosine), xs = rounded_one(a->dtype, x * sine);
    head[i] = rounded_one(a->dtype, xc - ys);
    head[i + half] = rounded_one(a->dtype, yc + xs);
  }
}

INLINE void keep(const Attention* a, const Array* pages, int64_t at, float* head) {
  if (a->kept == XLA_FFI_DataType_F8E4M3FN) {
    for (int64_t i = 0; i < a->stride; i += LANES) store(head + i, to_fp8(clamped(load(head + i))));
  }
  encode(a->kept, head, a->size, (char*)pages->data + at * item_bytes(a->kept));
}

INLINE void make_head(const Attention* a, const char* from, const float* norm, const float* turns,
                      float* head) {
  decode(a->dtype, from, a->size, head);
  if (norm) norm_head(a, norm, head);
  rotate_head(a, turns, head);
}

// One row and kv head: its queries made ready, its keys and values stored.
static int write_task(void* job, int64_t index) {
  const Attention* a = job;
  const int64_t row = index / a->kv_heads, head = index % a->kv_heads, bytes = item_bytes(a->dtype);
  float* own = own_memory((size_t)(2 * a->stride + 2 * a->half + 2 * LANES));
  if (!own) return 0;
  float *one = own, *value = own + a->stride, *turns = value + a->stride;
  for (int64_t token = 0; token < a->tokens; ++token) {
    const int64_t place = row * a->tokens + token, at = place * a->kv_heads + head;
    const char* from = (const char*)a->heads->data + at * (a->groups + 2) * a->size * bytes;
    char* to = (char*)a->out->data + at * a->groups * a->size * bytes;
    decode(XLA_FFI_DataType_F32, (const char*)a->turns->data + place * 2 * a->half * 4, 2 * a->half,
           turns);
    for (int64_t i = 0; i < 2 * a->half; ++i) turns[i] = rounded_one(a->dtype, turns[i]);
    for (int64_t group = 0; group < a->groups; ++group) {
      make_head(a, from + group * a->size * bytes, a->q_norm, turns, one);
      encode(a->dtype, one, a->size, to + group * a->size * bytes);
    }
    const int32_t position = position_of(a, row, token);
    const int64_t page = position < 0 ? -1 : page_at(a, row, position / a->page_size, head);
    if (page < 0) continue;
    const int64_t kept_at = page + position % a->page_size * a->size;
    make_head(a, from + a->groups * a->size * bytes, a->k_norm, turns, one);
    decode(a->dtype, from + (a->groups + 1) * a->size * bytes, a->size, value);
    keep(a, a->keys, kept_at, one);
    keep(a, a->values, kept_at, value);
  }
  return 1;
}

// --- Queries -----------------------------------------------------------------------------------

// A query and what it has seen so far: the largest score, the sum of shares, the weighted values.
typedef struct {
  float *query, *scores, *out;
  float most, total;
  int64_t visible;  // keys of the page at hand
} Seen;

// Shares of a page's keys by their scores, and their values added up, key after key.
INLINE void take_page(const Attention* a, Seen* seen, const float* values) {
  const int64_t width = padded(a->page_size);
  const Floats none = (Floats){0} - INFINITY;
  Floats most = none;
  for (int64_t s = seen->visible; s < width; ++s) seen->scores[s] = -INFINITY;
  for (int64_t s = 0; s < width; s += LANES) {
    Floats x = load(seen->scores + s);
    most = choose(x > most, x, most);
  }
  const float top = largest(most) > seen->most ? largest(most) : seen->most;
  const float shift = isfinite(top) ? top : 0;
  const float fade = exponential((Floats){0} + (seen->most - shift))[0];
  Floats shares = {0};
  for (int64_t s = 0; s < width; s += LANES) {
    Floats share = exponential(load(seen->scores + s) - shift);
    store(seen->scores + s, share);
    shares = shares + share;
  }
  seen->most = top;
  seen->total = seen->total * fade + sum(shares);
  for (int64_t i = 0; i < a->stride; i += LANES) {
    Floats out = load(seen->out + i) * fade;
    for (int64_t s = 0; s < seen->visible; ++s) {
      out = out + load(values + s * a->stride + i) * seen->scores[s];
    }
    store(seen->out + i, out);
  }
}

// Scores of a page's keys, for up to four queries at a time.
INLINE void score_page(const Attention* a, Seen* const* seen, int several, const float* keys) {
  const float factor = 1.0f / sqrtf((float)a->size);
  int64_t visible = 0;
  const char* rows[ROWS];
  for (int i = 0; i < several; ++i) {
    rows[i] = (const char*)seen[i]->query;
    visible = seen[i]->visible > visible ? seen[i]->visible : visible;
  }
  for (int64_t s = 0; s < visible; s += ROWS) {
    const char* from = (const char*)(keys + s * a->stride);
    const Four four = {from, a->stride * 4, ROWS, a->stride, XLA_FFI_DataType_F32, 0};
    float all[LANES];
    store(all, dots(several, rows, &four) * factor);
    for (int i = 0; i < several; ++i) memcpy(seen[i]->scores + s, all + i * ROWS, ROWS * 4);
  }
}

INLINE void decode_page(const Attention* a, const Array* pages, int64_t at, int64_t count,
                        float* to) {
  const int64_t bytes = item_bytes(a->kept), whole = (count + ROWS - 1) / ROWS * ROWS;
  for (int64_t s = 0; s < count; ++s) {
    decode(a->kept, (const char*)pages->data + (at + s * a->size) * bytes, a->size,
           to + s * a->stride);
  }
  memset(to + count * a->stride, 0, (size_t)((whole - count) * a->stride) * 4);
}

// The place of a row's and kv head's query among all of them.
INLINE int64_t query_at(const Attention* a, int64_t row, int64_t head, int64_t number) {
  const int64_t token = row * a->tokens + number / a->groups;
  return (token * a->kv_heads + head) * a->groups + number % a->groups;
}

INLINE void answer(const Attention* a, const Seen* seen, int64_t at) {
  const float total = seen->total > 0 ? seen->total : 1.0f;
  for (int64_t i = 0; i < a->stride; i += LANES) {
    store(seen->out + i, rounded_to(a->dtype, load(seen->out + i) / total));
  }
  encode(a->dtype, seen->out, a->size, (char*)a->out->data + at * a->size * item_bytes(a->dtype));
}

static int attend_task(void* job, int64_t index) {
  const Attention* a = job;
  const int64_t row = index / a->kv_heads, head = index % a->kv_heads;
  const int64_t count = a->tokens * a->groups, width = padded(a->page_size) + ROWS;
  const int64_t each = width + 2 * a->stride, bytes = item_bytes(a->dtype);
  float* own = own_memory((size_t)(2 * width * a->stride + count * each));
  Seen* seen = malloc((size_t)count * sizeof(Seen));
  if (!own || !seen) return free(seen), 0;
  float *keys = own, *values = own + width * a->stride, *rest = values + width * a->stride;
  int32_t last = -1;
  for (int64_t i = 0; i < count; ++i) {
    seen[i] = (Seen){.query = rest + i * each, .most = -INFINITY};
    seen[i].out = seen[i].query + a->stride;
    seen[i].scores = seen[i].out + a->stride;
    const int64_t at = query_at(a, row, head, i) * a->size * bytes;
    decode(a->dtype, (const char*)a->heads->data + at, a->size, seen[i].query);
    memset(seen[i].out, 0, (size_t)a->stride * 4);
    int32_t position = position_of(a, row, i / a->groups);
    last = position > last ? position : last;
  }
  for (int64_t page = 0; page * a->page_size <= last; ++page) {
    const int64_t begin = page * a->page_size, at = page_at(a, row, page, head);
    const int64_t held = last + 1 - begin < a->page_size ? last + 1 - begin : a->page_size;
    if (at < 0) continue;
    decode_page(a, a->keys, at, held, keys);
    decode_page(a, a->values, at, held, values);
    Seen* several[ROWS];
    int waiting = 0;
    for (int64_t i = 0; i < count; ++i) {
      int64_t visible = position_of(a, row, i / a->groups) + 1 - begin;
      seen[i].visible = visible < 0 ? 0 : visible < held ? visible : held;
      if (seen[i].visible) several[waiting++] = seen + i;
      if (!waiting || (waiting < ROWS && i + 1 < count)) continue;
      score_page(a, several, waiting, keys);
      for (int j = 0; j < waiting; ++j) take_page(a, several[j], values);
      waiting = 0;
    }
  }
  for (int64_t i = 0; i < count; ++i) answer(a, seen + i, query_at(a, row, head, i));
  free(seen);
  return 1;
}

static int widen_norm(const Array* norm, int64_t layer, int64_t size, float** to) {
  if (!norm->dims[0]) return 1;
  *to = aligned_alloc(64, (size_t)padded(size) * 4);
  if (*to) decode(norm->dtype, (char*)norm->data + layer * size * item_bytes(norm->dtype), size, *to);
  return *to != NULL;
}

static Attention attention_of(const Array* heads, const Array* keys, const Array* positions,
                              const Array* table, const Array* layer) {
  return (Attention){
      .heads = heads, .positions = positions, .table = table, .keys = keys,
      .dtype = heads->dtype, .kept = keys->dtype, .layer = *(const int32_t*)layer->data,
      .rows = heads->dims[0], .tokens = heads->dims[1], .kv_heads = heads->dims[2],
      .size = heads->dims[4], .stride = padded(heads->dims[4]), .page_size = keys->dims[3],
      .num_pages = keys->dims[1], .pages = table->dims[1],
  };
}

// Arguments: qkv [B, T, K, G + 2, H]; weights of the norms of queries and of keys, [L, H] or [0];
// float32 cosines and sines [B, T, 2, half]; positions [B, T]; table [B, P]; layer; the pages of keys
// and of values [L, pages, K, page_size, H]. Results: queries [B, T, K, G, H], and both pages in place.
XLA_FFI_Error* glm_write(XLA_FFI_CallFrame* call) {
  if (told_version(call)) return NULL;
  Attention a = attention_of(arg(call, 0), result(call, 1), arg(call, 4), arg(call, 5), arg(call, 6));
  a.values = result(call, 2);
  a.out = result(call, 0);
  a.turns = arg(call, 3);
  a.half = a.turns->dims[3];
  a.groups = a.heads->dims[3] - 2;
  a.eps = *(float*)attribute(call, "eps");
  int is_well = widen_norm(arg(call, 1), a.layer, a.size, &a.q_norm) &&
                widen_norm(arg(call, 2), a.layer, a.size, &a.k_norm) &&
                run_tasks(call, a.rows * a.kv_heads, write_task, &a);
  free(a.q_norm), free(a.k_norm);
  return is_well ? NULL : failed(call, "no memory for the heads of attention");
}

// Arguments: queries [B, T, K, G, H]; the pages of keys and of values; positions [B, T]; table [B, P];
// layer. Result: [B, T, K, G, H].
XLA_FFI_Error* glm_attend(XLA_FFI_CallFrame* call) {
  if (told_version(call)) return NULL;
  Attention a = attention_of(arg(call, 0), arg(call, 1), arg(call, 3), arg(call, 4), arg(call, 5));
  a.values = arg(call, 2);
  a.out = result(call, 0);
  a.groups = a.heads->dims[3];
  int is_well = run_tasks(call, a.rows * a.kv_heads, attend_task, &a);
  return is_well ? NULL : failed(call, "no memory for the queries of attention");
}

#endif  // GLM_JAX_ATTENTION_H_
