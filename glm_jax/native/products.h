// A linear layer, whole or cut along its input into partial products.
// Knows no layer of the model.

#ifndef GLM_JAX_PRODUCTS_H_
#define GLM_JAX_PRODUCTS_H_

#include "numbers.h"

// Rows as they meet weights, widened or in pairs: [groups, rows, whole vectors].
typedef struct {
  char* values;
  int64_t num_rows, groups, width, row_bytes;
  int is_paired;
} Rows;

INLINE const char* row_of(const Rows* rows, int64_t group, int64_t row) {
  return rows->values + (group * rows->num_rows + row) * rows->row_bytes;
}

// Bytes of a row, or of a group of one, with zeros up to a whole vector.
INLINE int64_t row_bytes_of(int64_t width, int is_paired) {
  return is_paired ? (width * 2 + 63) / 64 * 64 : padded(width) * 4;
}

static int ready_rows(const Array* x, int64_t groups, XLA_FFI_DataType weights, Rows* rows) {
  int64_t columns = x->dims[x->rank - 1], size = item_bytes(x->dtype);
  rows->num_rows = extent(x, 0, (int)x->rank - 1);
  rows->groups = groups;
  rows->width = columns / groups;
  rows->is_paired = pairs(x->dtype, weights);
  rows->row_bytes = row_bytes_of(rows->width, rows->is_paired);
  size_t bytes = (size_t)(groups * rows->num_rows * rows->row_bytes);
  rows->values = aligned_alloc(64, bytes ? bytes : 64);
  if (!rows->values) return 0;
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t row = 0; row < rows->num_rows; ++row) {
      const char* from = (const char*)x->data + (row * columns + group * rows->width) * size;
      char* to = (char*)row_of(rows, group, row);
      if (rows->is_paired) {
        memcpy(to, from, (size_t)rows->width * 2);
        memset(to + rows->width * 2, 0, (size_t)(rows->row_bytes - rows->width * 2));
      } else {
        decode(x->dtype, from, rows->width, (float*)to);
      }
    }
  }
  return 1;
}

// Rows of a weight for each task: few enough that all threads have work, by the four.
static int64_t rows_per_task(int64_t rows) {
  int64_t most = 64;
  while (most > 8 && rows / most < 16) most /= 2;
  return most;
}

typedef struct {
  Rows x;
  const float *x_scale, *scale;  // NULL: none
  const char *weight, *bias;
  XLA_FFI_DataType weight_dtype, bias_dtype;
  const Array* out;  // [rows, outputs], or float32 [groups, rows, outputs]
  int64_t outputs, per_task;
} Product;

// A block of four rows and four outputs, scaled, biased, rounded and written.
INLINE void finish(const Product* p, Floats value, int64_t group, int64_t row, int64_t n,
                   int64_t rows, int64_t count, const float* bias) {
  const int64_t groups = p->x.groups, size = item_bytes(p->out->dtype);
  if (p->x_scale) value = value * across(p->x_scale + row * groups + group, groups, rows);
  if (p->scale) value = value * along(p->scale + n, count);
  if (p->bias) value = value + along(bias, ROWS);
  value = rounded_to(p->out->dtype, value);
  char* to = (char*)p->out->data + ((group * p->x.num_rows + row) * p->outputs + n) * size;
  if (size == 4) {
    float all[LANES];
    store(all, value);
    for (int64_t i = 0; i < rows; ++i) memcpy(to + i * p->outputs * 4, all + ROWS * i, (size_t)count * 4);
    return;
  }
  const Halves halves = __builtin_convertvector((UInts)value >> 16, Halves);
  uint16_t all[LANES];
  memcpy(all, &halves, sizeof all);
  for (int64_t i = 0; i < rows; ++i) memcpy(to + i * p->outputs * 2, all + ROWS * i, (size_t)count * 2);
}

static int product_task(void* job, int64_t index) {
  const Product* p = job;
  const int64_t size = item_bytes(p->weight_dtype), width = p->x.width, groups = p->x.groups;
  const int64_t end = index * p->per_task + p->per_task;
  for (int64_t n = index * p->per_task; n < end && n < p->outputs; n += ROWS) {
    const int64_t count = p->outputs - n < ROWS ? p->outputs - n : ROWS;
    float bias[LANES] = {0};
    if (p->bias) decode(p->bias_dtype, p->bias + n * item_bytes(p->bias_dtype), count, bias);
    for (int64_t group = 0; group < groups; ++group) {
      const char* from = p->weight + (n * groups + group) * width * size;
      const Four four = {from, groups * width * size, count, width, p->weight_dtype, p->x.is_paired};
      for (int64_t row = 0; row < p->x.num_rows; row += ROWS) {
        const int64_t left = p->x.num_rows - row, several = left < ROWS ? left : ROWS;
        const char* rows[ROWS];
        for (int i = 0; i < several; ++i) rows[i] = row_of(&p->x, group, row + i);
        finish(p, dots((int)several, rows, &four), group, row, n, several, count, bias);
      }
    }
  }
  return 1;
}

// Arguments: x [T, K]; its scales [T, R] or [0]; values [L, N, K]; their scales [L, N] or [0];
// bias [L, N] or [0]; layer. Result: [T, N], or float32 [R, T, N].
XLA_FFI_Error* glm_product(XLA_FFI_CallFrame* call) {
  if (told_version(call)) return NULL;
  const Array *x = arg(call, 0), *values = arg(call, 2), *bias = arg(call, 4);
  const int64_t layer = *(const int32_t*)arg(call, 5)->data;
  const int64_t width = values->dims[values->rank - 1];
  const int64_t outputs = extent(values, 1, (int)values->rank - 1);
  Product p = {
      .x_scale = arg(call, 1)->dims[0] ? arg(call, 1)->data : NULL,
      .scale = arg(call, 3)->dims[0] ? (float*)arg(call, 3)->data + layer * outputs : NULL,
      .weight = (char*)values->data + layer * outputs * width * item_bytes(values->dtype),
      .weight_dtype = values->dtype,
      .bias = bias->dims[0] ? (char*)bias->data + layer * outputs * item_bytes(bias->dtype) : NULL,
      .bias_dtype = bias->dtype,
      .out = result(call, 0),
      .outputs = outputs,
      .per_task = rows_per_task(outputs),
  };
  int is_well = ready_rows(x, integer(call, "groups"), values->dtype, &p.x) &&
                run_tasks(call, (outputs + p.per_task - 1) / p.per_task, product_task, &p);
  free(p.x.values);
  return is_well ? NULL : failed(call, "no memory for the rows of a product");
}

#endif  // GLM_JAX_PRODUCTS_H_
