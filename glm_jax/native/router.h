// Which experts a token goes to: the router's product, its scores, and the best of them.
// Knows no expert.

#ifndef GLM_JAX_ROUTER_H_
#define GLM_JAX_ROUTER_H_

#include "products.h"

typedef struct {
  Rows x;
  const char* weight;  // of this layer
  const float* bias;
  XLA_FFI_DataType dtype;
  int64_t row_bytes, experts, picks, norms;
  float scaling;
  int32_t* chosen;
  float *weights, *scores;
} Router;

// Takes the best by score plus bias, the first of equals first, and weighs them by score alone.
INLINE void pick(const Router* r, int64_t row) {
  const float* scores = r->scores + row * r->experts;
  int32_t* chosen = r->chosen + row * r->picks;
  float* weights = r->weights + row * r->picks;
  float total = 0;
  for (int64_t i = 0; i < r->picks; ++i) {
    int32_t best = -1;
    for (int32_t expert = 0; expert < r->experts; ++expert) {
      int is_taken = 0;
      for (int64_t j = 0; j < i; ++j) is_taken |= chosen[j] == expert;
      if (is_taken) continue;
      if (best < 0 || scores[expert] + r->bias[expert] > scores[best] + r->bias[best]) best = expert;
    }
    chosen[i] = best;
    weights[i] = scores[best];
    total = total + weights[i];
  }
  for (int64_t i = 0; i < r->picks; ++i) {
    if (r->norms) weights[i] = weights[i] / (total + 1e-20f);
    weights[i] = weights[i] * r->scaling;
  }
}

static int route_task(void* job, int64_t index) {
  const Router* r = job;
  const int64_t first = index * ROWS, left = r->x.num_rows - first;
  const int several = (int)(left < ROWS ? left : ROWS);
  const char* rows[ROWS];
  for (int i = 0; i < several; ++i) rows[i] = row_of(&r->x, 0, first + i);
  for (int64_t expert = 0; expert < r->experts; expert += ROWS) {
    const int64_t rest = r->experts - expert, count = rest < ROWS ? rest : ROWS;
    const char* from = r->weight + expert * r->row_bytes;
    const Four four = {from, r->row_bytes, count, r->x.width, r->dtype, 0};
    float scores[LANES];
    store(scores, 1.0f / (1.0f + exponential(-dots(several, rows, &four))));
    for (int i = 0; i < several; ++i) {
      memcpy(r->scores + (first + i) * r->experts + expert, scores + i * ROWS, (size_t)count * 4);
    }
  }
  for (int i = 0; i < several; ++i) pick(r, first + i);
  return 1;
}

// Arguments: x [T, D]; weight [L, E, D]; bias [L, E]; layer. Results: chosen [T, k] by falling score
// plus bias; their weights [T, k]; all scores [T, E].
XLA_FFI_Error* glm_route(XLA_FFI_CallFrame* call) {
  if (told_version(call)) return NULL;
  const Array *weight = arg(call, 1), *chosen = result(call, 0);
  const int64_t layer = *(const int32_t*)arg(call, 3)->data;
  const int64_t experts = weight->dims[1];
  const int64_t row_bytes = weight->dims[2] * item_bytes(weight->dtype);
  Router r = {
      .weight = (const char*)weight->data + layer * experts * row_bytes, .dtype = weight->dtype,
      .bias = (const float*)arg(call, 2)->data + layer * experts, .row_bytes = row_bytes,
      .experts = experts, .picks = chosen->dims[1], .norms = integer(call, "norms"),
      .scaling = *(float*)attribute(call, "scaling"), .chosen = chosen->data,
      .weights = result(call, 1)->data, .scores = result(call, 2)->data,
  };
  int is_well = ready_rows(arg(call, 0), 1, XLA_FFI_DataType_F32, &r.x) &&
                run_tasks(call, (r.x.num_rows + ROWS - 1) / ROWS, route_task, &r);
  free(r.x.values);
  return is_well ? NULL : failed(call, "no memory for the router's rows");
}

#endif  // GLM_JAX_ROUTER_H_
