// Numbers: sixteen at a time, from the dtypes of weights, rounded to those of activations.
// Knows no layer. Sums have one order, whatever stands beside a row; that is what keeps its bits.

#ifndef GLM_JAX_NUMBERS_H_
#define GLM_JAX_NUMBERS_H_

#include <math.h>

#include "call.h"

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t UInts __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef float Floats4 __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

// AHEAD: bytes of a weight that are fetched before they are needed.
enum { LANES = 16, ROWS = 4, AHEAD = 4096 };

INLINE int64_t padded(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

INLINE Floats load(const float* from) {
  Floats x;
  memcpy(&x, from, sizeof x);
  return x;
}

INLINE void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }

// Lane by lane, where a comparison was true one number, elsewhere the other.
INLINE Floats choose(Ints is_first, Floats first, Floats other) {
  return (Floats)((is_first & (Ints)first) | (~is_first & (Ints)other));
}

// Between -448 and 448; NaN stays.
INLINE Floats clamped(Floats x) {
  const Floats bound = (Floats){0} + 448.0f;
  return choose(x > bound, bound, choose(x < -bound, -bound, x));
}

INLINE float sum(Floats x) {
  Floats8 a = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  Floats4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

INLINE float largest(Floats x) {
  float most = x[0];
  for (int i = 1; i < LANES; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

// e to the x, within two units in the last place; 0 below -87.
INLINE Floats exponential(Floats x) {
  const Floats zero = {0};
  x = choose(x > 88.0f, zero + 88.0f, x);
  Ints is_none = x < -87.0f;
  x = choose(is_none, zero - 87.0f, x);
  Floats turns = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
  Floats whole = turns - 12582912.0f;
  x = x - whole * 0.693359375f;
  x = x + whole * 2.12194440e-4f;
  Floats y = zero + 1.9875691500e-4f;
  y = y * x + 1.3981999507e-3f;
  y = y * x + 8.3334519073e-3f;
  y = y * x + 4.1665795894e-2f;
  y = y * x + 1.6666665459e-1f;
  y = y * x + 5.0000001201e-1f;
  y = y * (x * x) + x + 1.0f;
  Ints power = ((Ints)turns << 23) + (127 << 23);
  return choose(is_none, zero, y * (Floats)power);
}

// --- Rounding ----------------------------------------------------------------------------------

INLINE Floats to_bfloat16(Floats x) {
  Ints bits = (Ints)x;
  Ints rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000;
  return choose(x == x, (Floats)rounded, x);
}

// To the nearest e4m3 value of numbers within ±448.
INLINE Floats to_fp8(Floats x) {
  Ints bits = (Ints)x;
  Floats normal = (Floats)((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000);
  Floats small = (x + 24576.0f) - 24576.0f;  // 1.5 * 2^14: multiples of 2^-9
  Floats size = (Floats)(bits & 0x7FFFFFFF);
  Floats rounded = choose(size < 0.015625f, small, normal);
  return choose(x == x, rounded, x);
}

INLINE Floats rounded_to(XLA_FFI_DataType dtype, Floats x) {
  return dtype == XLA_FFI_DataType_BF16 ? to_bfloat16(x) : x;
}

INLINE float rounded_one(XLA_FFI_DataType dtype, float x) {
  if (dtype != XLA_FFI_DataType_BF16 || x != x) return x;
  int32_t bits;
  memcpy(&bits, &x, 4);
  bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000;
  memcpy(&x, &bits, 4);
  return x;
}

// --- Memory ------------------------------------------------------------------------------------

INLINE int64_t item_bytes(XLA_FFI_DataType dtype) {
  return dtype == XLA_FFI_DataType_F32 ? 4 : dtype == XLA_FFI_DataType_BF16 ? 2 : 1;
}

INLINE Floats from_fp8(Bytes x) {
#if defined(__AVX512F__)
  // As float16 the bits mean 2^-8 of it, and conversion is exact for the smallest ones too.
  __m256i wide = _mm256_cvtepu8_epi16((__m128i)x);
  __m256i half = _mm256_or_si256(
      _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8),
      _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7F)), 7));
  return (Floats)_mm512_cvtph_ps(half) * 256.0f;
#else
  Ints wide = __builtin_convertvector(x, Ints);
  Ints size = (wide & 0x7F) << 20, sign = (wide & 0x80) << 24;
  Floats small = (Floats)(size + (121 << 23)) - 0.015625f;
  Floats value = choose(size < (1 << 23), small, (Floats)(size + (120 << 23)));
  return (Floats)((Ints)value | sign);
#endif
}

INLINE Floats widened(XLA_FFI_DataType dtype, const char* from) {
  if (dtype == XLA_FFI_DataType_F32) return load((const float*)from);
  if (dtype == XLA_FFI_DataType_BF16) {
    Halves half;
    memcpy(&half, from, sizeof half);
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)half), 16);
#else
    return (Floats)(__builtin_convertvector(half, Ints) << 16);
#endif
  }
  Bytes bytes;
  memcpy(&bytes, from, sizeof bytes);
  return from_fp8(bytes);
}

INLINE void decode_as(XLA_FFI_DataType dtype, const char* from, int64_t count, float* to) {
  int64_t i = 0, size = item_bytes(dtype);
  for (; i + LANES <= count; i += LANES) store(to + i, widened(dtype, from + i * size));
  if (i < count) {
    char rest[4 * LANES] = {0};
    memcpy(rest, from + i * size, (size_t)((count - i) * size));
    store(to + i, widened(dtype, rest));
  }
}

// Widens `count` numbers, and writes zeros up to a whole number of lanes.
static void decode(XLA_FFI_DataType dtype, const char* from, int64_t count, float* to) {
  if (dtype == XLA_FFI_DataType_F32) return decode_as(XLA_FFI_DataType_F32, from, count, to);
  if (dtype == XLA_FFI_DataType_BF16) return decode_as(XLA_FFI_DataType_BF16, from, count, to);
  decode_as(XLA_FFI_DataType_F8E4M3FN, from, count, to);
}

// Writes numbers that the dtype holds exactly: rounded before, and for FP8 within ±448.
static void encode(XLA_FFI_DataType dtype, const float* from, int64_t count, char* to) {
  if (dtype == XLA_FFI_DataType_F32) {
    memcpy(to, from, (size_t)count * 4);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    memcpy(&bits, from + i, 4);
    if (dtype == XLA_FFI_DataType_BF16) {
      uint16_t half = (uint16_t)(bits >> 16);
      memcpy(to + 2 * i, &half, 2);
      continue;
    }
    uint32_t size = bits & 0x7FFFFFFF, sign = (bits >> 24) & 0x80;
    float value = fabsf(from[i]);
    uint32_t code = value != value       ? 0x7F
                    : value < 0.015625f ? (uint32_t)(value * 512.0f)
                                        : (size >> 20) - (120 << 3);
    to[i] = (char)(code | sign);
  }
}

// --- Products ----------------------------------------------------------------------------------

// Lane i: the sum of x[i]. Every sum has the same order, those of zeros beside it included.
INLINE Floats sums_of(const Floats* x) {
  Floats a[8], b[4], c[2];
  for (int i = 0; i < 8; ++i) {
    const Floats p = x[2 * i], q = x[2 * i + 1];
    a[i] = __builtin_shufflevector(p, q, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           __builtin_shufflevector(p, q, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const Floats p = a[2 * i], q = a[2 * i + 1];
    b[i] = __builtin_shufflevector(p, q, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(p, q, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const Floats p = b[2 * i], q = b[2 * i + 1];
    c[i] = __builtin_shufflevector(p, q, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(p, q, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  return __builtin_shufflevector(c[0], c[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
         __builtin_shufflevector(c[0], c[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}

// Four rows of a weight as they lie; fewer where `count` says so. More rows than four meet them again,
// widened again: that costs less than to keep them wide.
typedef struct {
  const char* values;
  int64_t row_bytes, count, width;
  XLA_FFI_DataType dtype;
  int is_paired;  // rows are bfloat16 too, see pairs()
} Four;

// Whether rows and weights meet as pairs of bfloat16, two products an instruction.
INLINE int pairs(XLA_FFI_DataType rows, XLA_FFI_DataType weights) {
#if defined(__AVX512BF16__)
  return rows == XLA_FFI_DataType_BF16 && weights == XLA_FFI_DataType_BF16;
#else
  (void)rows, (void)weights;
  return 0;
#endif
}

#if defined(__AVX512BF16__)
INLINE __m512bh two(const char* from) {
  __m512bh x;
  memcpy(&x, from, sizeof x);
  return x;
}

// dot_rows of pairs. Rows are whole vectors, with zeros at the end.
INLINE Floats dot_pairs(int num_rows, const char* const* rows, const Four* weights) {
  Floats sums[ROWS * ROWS] = {{0}};
  const Four w = *weights;
  int64_t at[ROWS];
  for (int j = 0; j < ROWS; ++j) at[j] = (j < w.count ? j : w.count - 1) * w.row_bytes;
  const int64_t whole = w.width / (2 * LANES) * 64, left = w.width * 2 - whole;
  for (int64_t k = 0; k < whole; k += 64) {
    __m512bh one[ROWS];
    for (int j = 0; j < ROWS; ++j) {
      __builtin_prefetch(w.values + at[j] + k + AHEAD);
      one[j] = two(w.values + at[j] + k);
    }
    for (int row = 0; row < num_rows; ++row) {
      const __m512bh x = two(rows[row] + k);
      for (int j = 0; j < ROWS; ++j) {
        sums[row * ROWS + j] = (Floats)_mm512_dpbf16_ps((__m512)sums[row * ROWS + j], x, one[j]);
      }
    }
  }
  for (int j = 0; left && j < ROWS; ++j) {
    char rest[64] = {0};
    memcpy(rest, w.values + at[j] + whole, (size_t)left);
    for (int row = 0; row < num_rows; ++row) {
      const __m512 sum = (__m512)sums[row * ROWS + j];
      sums[row * ROWS + j] = (Floats)_mm512_dpbf16_ps(sum, two(rows[row] + whole), two(rest));
    }
  }
  return sums_of(sums);
}
#endif

// Lane 4 * row + j: rows[row] . weights[j]; what is beyond num_rows or w->count is of no use.
INLINE Floats dot_rows(XLA_FFI_DataType dtype, int num_rows, const char* const* rows,
                       const Four* weights) {
  Floats sums[ROWS * ROWS] = {{0}};
  const Four w = *weights;
  // Rows that are not there are read as the last one that is.
  int64_t at[ROWS];
  for (int j = 0; j < ROWS; ++j) at[j] = (j < w.count ? j : w.count - 1) * w.row_bytes;
  const int64_t size = item_bytes(dtype), whole = w.width / LANES * LANES;
  for (int64_t k = 0; k < whole; k += LANES) {
    Floats one[ROWS];
    if (dtype != XLA_FFI_DataType_F32) {
      for (int j = 0; j < ROWS; ++j) __builtin_prefetch(w.values + at[j] + k * size + AHEAD);
    }
    for (int j = 0; j < ROWS; ++j) one[j] = widened(dtype, w.values + at[j] + k * size);
    for (int row = 0; row < num_rows; ++row) {
      const Floats x = load((const float*)rows[row] + k);
      for (int j = 0; j < ROWS; ++j) sums[row * ROWS + j] = sums[row * ROWS + j] + x * one[j];
    }
  }
  if (whole < w.width) {
    for (int j = 0; j < ROWS; ++j) {
      char rest[4 * LANES] = {0};
      memcpy(rest, w.values + at[j] + whole * size, (size_t)((w.width - whole) * size));
      const Floats last = widened(dtype, rest);
      for (int row = 0; row < num_rows; ++row) {
        sums[row * ROWS + j] = sums[row * ROWS + j] + load((const float*)rows[row] + whole) * last;
      }
    }
  }
  return sums_of(sums);
}

INLINE Floats dots_as(XLA_FFI_DataType dtype, int num_rows, const char* const* rows,
                      const Four* weights) {
  switch (num_rows) {
    case 1: return dot_rows(dtype, 1, rows, weights);
    case 2: return dot_rows(dtype, 2, rows, weights);
    case 3: return dot_rows(dtype, 3, rows, weights);
    default: return dot_rows(dtype, 4, rows, weights);
  }
}

static Floats dots(int num_rows, const char* const* rows, const Four* weights) {
#if defined(__AVX512BF16__)
  if (weights->is_paired) {
    switch (num_rows) {
      case 1: return dot_pairs(1, rows, weights);
      case 2: return dot_pairs(2, rows, weights);
      case 3: return dot_pairs(3, rows, weights);
      default: return dot_pairs(4, rows, weights);
    }
  }
#endif
  if (weights->dtype == XLA_FFI_DataType_F32) {
    return dots_as(XLA_FFI_DataType_F32, num_rows, rows, weights);
  }
  if (weights->dtype == XLA_FFI_DataType_BF16) {
    return dots_as(XLA_FFI_DataType_BF16, num_rows, rows, weights);
  }
  return dots_as(XLA_FFI_DataType_F8E4M3FN, num_rows, rows, weights);
}

// Four numbers four times, or each of four numbers four times; what is not there is 1.
INLINE Floats along(const float* from, int64_t count) {
  Floats x = {0};
  for (int i = 0; i < LANES; ++i) x[i] = i % ROWS < count ? from[i % ROWS] : 1.0f;
  return x;
}

INLINE Floats across(const float* from, int64_t stride, int64_t count) {
  Floats x = {0};
  for (int i = 0; i < LANES; ++i) x[i] = i / ROWS < count ? from[i / ROWS * stride] : 1.0f;
  return x;
}

#endif  // GLM_JAX_NUMBERS_H_
