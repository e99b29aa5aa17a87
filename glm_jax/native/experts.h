// A layer's experts for the tokens that chose them, and its shared expert: a dense MLP is one alone.
// Knows no router.

#ifndef GLM_JAX_EXPERTS_H_
#define GLM_JAX_EXPERTS_H_

#include "products.h"

// One expert of a layer, or the shared one: its weights, and what of its scratch rows is whose.
typedef struct {
  const char *gate_up, *down;
  const float *gate_up_scale, *down_scale;  // NULL: none
  int64_t width, groups;                    // of the hidden rows; groups are quantized apart
  int64_t first, count;                     // its pairs of a token and this expert
  int64_t group;                            // which partial sum it adds to; -1: group g to sum g
} Expert;

typedef struct {
  Rows x;
  const float* x_scale;
  XLA_FFI_DataType dtype, weight_dtype;  // of activations, of values
  Expert* experts;                       // those with tokens, the shared one last
  int64_t num_experts, num_shared, num_sums, per_task, tasks_per_expert;
  int32_t* token;     // of each pair
  float* weight;      // of each pair
  char* hidden;       // of each pair, hidden_bytes apart: its groups, each a row as x has them
  float* scale;       // of each pair's groups
  int64_t hidden_bytes, max_groups;
  float* out;  // [sums, tokens, columns]
  int64_t columns;
} Mlp;

INLINE char* hidden_of(const Mlp* m, const Expert* e, int64_t pair, int64_t group) {
  return m->hidden + (e->first + pair) * m->hidden_bytes +
         group * row_bytes_of(e->width / e->groups, m->x.is_paired);
}

INLINE const float* scale_or_null(const float* scale, int64_t at) { return scale ? scale + at : NULL; }

// silu(gate) * up for four columns of the width, of up to four pairs.
INLINE void gate_up_block(const Mlp* m, const Expert* e, int64_t f, int64_t pair, const Four* gates,
                          const Four* ups) {
  const int64_t left = e->count - pair, several = left < ROWS ? left : ROWS;
  const char* rows[ROWS];
  float x_scale[ROWS] = {1, 1, 1, 1};
  for (int i = 0; i < several; ++i) {
    const int32_t token = m->token[e->first + pair + i];
    rows[i] = row_of(&m->x, 0, token);
    if (m->x_scale) x_scale[i] = m->x_scale[token];
  }
  Floats gate = dots((int)several, rows, gates), up = dots((int)several, rows, ups);
  if (m->x_scale) {
    const Floats scale = across(x_scale, 1, ROWS);
    gate = gate * scale;
    up = up * scale;
  }
  if (e->gate_up_scale) {
    gate = gate * along(e->gate_up_scale + f, gates->count);
    up = up * along(e->gate_up_scale + e->width + f, gates->count);
  }
  gate = rounded_to(m->dtype, gate);
  up = rounded_to(m->dtype, up);
  const Floats silu = rounded_to(m->dtype, gate / (1.0f + exponential(-gate)));
  float product[LANES];
  store(product, rounded_to(m->dtype, silu * up));
  const int64_t group_width = e->width / e->groups;
  for (int i = 0; i < several; ++i) {
    for (int64_t j = 0; j < gates->count; ++j) {
      int64_t group = e->groups == 1 ? 0 : (f + j) / group_width;
      const int64_t size = m->x.is_paired ? 2 : 4;
      char* to = hidden_of(m, e, pair + i, group) + (f + j - group * group_width) * size;
      memcpy(to, (const char*)(product + i * ROWS + j) + 4 - size, (size_t)size);
    }
  }
}

static int gate_up_task(void* job, int64_t index) {
  const Mlp* m = job;
  const Expert* e = m->experts + index / m->tasks_per_expert;
  const int64_t begin = index % m->tasks_per_expert * m->per_task;
  const int64_t row_bytes = m->x.width * item_bytes(m->weight_dtype);
  for (int64_t f = begin; f < begin + m->per_task && f < e->width; f += ROWS) {
    const int64_t count = e->width - f < ROWS ? e->width - f : ROWS;
    const char* gate = e->gate_up + f * row_bytes;
    const Four gates = {gate, row_bytes, count, m->x.width, m->weight_dtype, m->x.is_paired};
    Four ups = gates;
    ups.values += e->width * row_bytes;
    for (int64_t pair = 0; pair < e->count; pair += ROWS) gate_up_block(m, e, f, pair, &gates, &ups);
  }
  return 1;
}

// Quantizes each group of a pair's hidden row by its own largest magnitude.
static int quantize_task(void* job, int64_t index) {
  const Mlp* m = job;
  const Expert* e = m->experts;
  while (index >= e->first + e->count) ++e;
  for (int64_t group = 0; group < e->groups; ++group) {
    float* row = (float*)hidden_of(m, e, index - e->first, group);
    const int64_t width = padded(e->width / e->groups);
    Floats most = {0};
    for (int64_t k = 0; k < width; k += LANES) {
      Floats size = (Floats)((Ints)load(row + k) & 0x7FFFFFFF);
      most = choose((size <= most) | (most != most), most, size);  // NaN stays
    }
    float top = largest(most);
    for (int i = 0; i < LANES; ++i) top = most[i] == most[i] ? top : most[i];
    float scale = top <= 448.0f * 1.17549435e-38f ? 1.0f : top / 448.0f;
    for (int64_t k = 0; k < width; k += LANES) {
      store(row + k, to_fp8(clamped(load(row + k) / scale)));
    }
    m->scale[index * m->max_groups + group] = scale;
  }
  return 1;
}

// Adds four columns of an expert's answers to its tokens' sums.
INLINE void down_block(const Mlp* m, const Expert* e, int64_t d, int64_t count) {
  const int64_t group_width = e->width / e->groups, size = item_bytes(m->weight_dtype);
  for (int64_t group = 0; group < e->groups; ++group) {
    const char* from = e->down + (d * e->width + group * group_width) * size;
    const Four four = {from, e->width * size, count, group_width, m->weight_dtype, m->x.is_paired};
    for (int64_t pair = 0; pair < e->count; pair += ROWS) {
      const int64_t left = e->count - pair, several = left < ROWS ? left : ROWS;
      const int64_t at = e->first + pair;
      const char* rows[ROWS];
      for (int i = 0; i < several; ++i) rows[i] = hidden_of(m, e, pair + i, group);
      Floats value = dots((int)several, rows, &four);
      if (m->scale) value = value * across(m->scale + at * m->max_groups + group, m->max_groups, several);
      if (e->down_scale) value = value * along(e->down_scale + d, count);
      if (e->group >= 0) value = rounded_to(m->dtype, value) * across(m->weight + at, 1, several);
      float all[LANES];
      store(all, value);
      for (int i = 0; i < several; ++i) {
        const int64_t to = e->group < 0 ? group : e->group;
        float* sums = m->out + (to * m->x.num_rows + m->token[at + i]) * m->columns + d;
        for (int64_t j = 0; j < count; ++j) sums[j] = sums[j] + all[i * ROWS + j];
      }
    }
  }
}

static int down_task(void* job, int64_t index) {
  const Mlp* m = job;
  const int64_t begin = index * m->per_task, rest = m->columns - begin;
  const int64_t width = rest < m->per_task ? rest : m->per_task;
  for (int64_t row = 0; row < m->num_sums * m->x.num_rows; ++row) {
    memset(m->out + row * m->columns + begin, 0, (size_t)width * 4);
  }
  // Experts one after the other, so that a token's sum has their order.
  for (int64_t i = 0; i < m->num_experts; ++i) {
    for (int64_t d = begin; d < begin + width; d += ROWS) {
      int64_t count = begin + width - d < ROWS ? begin + width - d : ROWS;
      down_block(m, m->experts + i, d, count);
    }
  }
  return 1;
}

// --- Who goes where ----------------------------------------------------------------------------

typedef struct {
  const Array *values, *scales;
} Weight;

INLINE const char* values_at(Weight weight, int64_t index, int64_t rows, int64_t columns) {
  return (const char*)weight.values->data + index * rows * columns * item_bytes(weight.values->dtype);
}

INLINE const float* scales_at(Weight weight, int64_t index, int64_t rows) {
  return weight.scales->dims[0] ? (const float*)weight.scales->data + index * rows : NULL;
}

// The local experts that some token chose, in their order, each with its pairs in the tokens' order.
static void gather_pairs(const XLA_FFI_CallFrame* call, Mlp* m, int64_t layer, int64_t* pairs) {
  const Array *chosen = arg(call, 2), *weights = arg(call, 3);
  const Weight gate_up = {arg(call, 6), arg(call, 7)}, down = {arg(call, 8), arg(call, 9)};
  const int64_t picks = chosen->dims[1], local = down.values->dims[1];
  const int64_t width = down.values->dims[3], per_sum = integer(call, "group_size");
  const int32_t first = *(const int32_t*)arg(call, 5)->data;
  const int32_t* experts = chosen->data;
  for (int64_t expert = 0; picks && expert < local; ++expert) {
    const int64_t begin = *pairs, index = layer * local + expert;
    for (int64_t pair = 0; pair < m->x.num_rows * picks; ++pair) {
      float weight = ((const float*)weights->data)[pair];
      if (experts[pair] - first != expert || !(weight > 0)) continue;
      m->token[*pairs] = (int32_t)(pair / picks);
      m->weight[(*pairs)++] = weight;
    }
    if (*pairs == begin) continue;
    m->experts[m->num_experts++] = (Expert){
        .gate_up = values_at(gate_up, index, 2 * width, m->x.width),
        .gate_up_scale = scales_at(gate_up, index, 2 * width),
        .down = values_at(down, index, m->columns, width),
        .down_scale = scales_at(down, index, m->columns),
        .width = width, .groups = 1, .first = begin, .count = *pairs - begin,
        .group = expert / per_sum,
    };
  }
}

static void add_shared(const XLA_FFI_CallFrame* call, Mlp* m, int64_t layer, int64_t* pairs) {
  const Weight gate_up = {arg(call, 10), arg(call, 11)}, down = {arg(call, 12), arg(call, 13)};
  const int64_t width = down.values->dims[2], begin = *pairs;
  for (int64_t row = 0; row < m->x.num_rows; ++row) {
    m->token[*pairs] = (int32_t)row;
    m->weight[(*pairs)++] = 1;
  }
  m->experts[m->num_experts++] = (Expert){
      .gate_up = values_at(gate_up, layer, 2 * width, m->x.width),
      .gate_up_scale = scales_at(gate_up, layer, 2 * width),
      .down = values_at(down, layer, m->columns, width),
      .down_scale = scales_at(down, layer, m->columns),
      .width = width, .groups = m->num_sums, .first = begin, .count = *pairs - begin, .group = -1,
  };
}

static int run_mlp(const XLA_FFI_CallFrame* call, Mlp* m, int64_t layer, int64_t num_pairs,
                   int64_t max_width) {
  const int is_fp8 = m->weight_dtype == XLA_FFI_DataType_F8E4M3FN;
  int64_t pairs = 0;
  m->hidden_bytes = row_bytes_of(max_width, 0) + m->num_sums * 64;
  m->max_groups = m->num_sums;
  m->token = malloc((size_t)num_pairs * 4);
  m->weight = malloc((size_t)num_pairs * 4);
  m->hidden = calloc((size_t)num_pairs, (size_t)m->hidden_bytes);
  m->scale = is_fp8 ? malloc((size_t)(num_pairs * m->max_groups) * 4) : NULL;
  if (!m->token || !m->weight || !m->hidden || (is_fp8 && !m->scale)) return 0;
  gather_pairs(call, m, layer, &pairs);
  add_shared(call, m, layer, &pairs);
  m->per_task = max_width < 256 ? 32 : 64;
  m->tasks_per_expert = (max_width + m->per_task - 1) / m->per_task;
  if (!run_tasks(call, m->num_experts * m->tasks_per_expert, gate_up_task, m)) return 0;
  if (is_fp8 && !run_tasks(call, pairs, quantize_task, m)) return 0;
  m->per_task = rows_per_task(m->columns);
  return run_tasks(call, (m->columns + m->per_task - 1) / m->per_task, down_task, m);
}

// Arguments: x [T, D]; its scales [T, 1] or [0]; chosen [T, k]; weights [T, k]; layer; first expert
// here; gate_up [L, E, 2, F, D] and its scales or [0]; down [L, E, D, F] and its scales or [0]; of the
// shared expert gate_up [L, 2, S, D] and down [L, D, S] in the same way. Result: float32 [R, T, D].
XLA_FFI_Error* glm_experts(XLA_FFI_CallFrame* call) {
  if (told_version(call)) return NULL;
  const Array *chosen = arg(call, 2), *out = result(call, 0);
  const int64_t layer = *(const int32_t*)arg(call, 4)->data, picks = chosen->dims[1];
  const int64_t width = picks ? arg(call, 8)->dims[3] : 0, shared_width = arg(call, 12)->dims[2];
  Mlp m = {
      .x_scale = arg(call, 1)->dims[0] ? arg(call, 1)->data : NULL,
      .dtype = (XLA_FFI_DataType)integer(call, "dtype"),
      .weight_dtype = arg(call, 12)->dtype,
      .num_sums = out->dims[0],
      .out = out->data,
      .columns = out->dims[2],
  };
  m.experts = malloc((size_t)((picks ? arg(call, 8)->dims[1] : 0) + 1) * sizeof(Expert));
  int is_well = m.experts && ready_rows(arg(call, 0), 1, m.weight_dtype, &m.x) &&
                run_mlp(call, &m, layer, m.x.num_rows * (picks + 1),
                        width > shared_width ? width : shared_width);
  free(m.experts), free(m.x.values), free(m.token), free(m.weight), free(m.hidden), free(m.scale);
  return is_well ? NULL : failed(call, "no memory for the hidden rows of the experts");
}

#endif  // GLM_JAX_EXPERTS_H_
