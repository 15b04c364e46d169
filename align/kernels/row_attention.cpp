// Causal attention of short rows, forwards and backwards, for CPUs with AVX-512. See row_attention.py.
//
// A unit of work is one row and one group of heads, which share keys and values: they are gathered into float32, and all
// products are of BLOCK rows at a time against vectors in registers, no further than causality reaches. What several
// rows begin with has its queries in the first of them; its keys' and values' gradients are summed row after row. So
// nothing depends on which thread does what.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.hpp"

#define UNROLL _Pragma("GCC unroll 16")

namespace {

using std::int64_t;

constexpr int BLOCK = 6;    // rows of a product
constexpr int VECTORS = 4;  // of 16 floats, beside one another: BLOCK · VECTORS sums are kept in registers

inline int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// C (rows, columns) = A B, or += it: A's entry (m, k) is a[m · a_row + k · a_step], B and C are row by row.
struct Product {
  const float* a;
  int64_t a_row, a_step;
  const float* b;
  int64_t b_row;
  float* c;
  int64_t c_row;
  bool adds;

  template <int M, int V>
  __attribute__((always_inline)) void tile(int64_t m, int64_t n, int64_t from, int64_t to) const {
    __m512 sums[M][V];
    UNROLL for (int i = 0; i < M; i++)
      UNROLL for (int v = 0; v < V; v++)
        sums[i][v] = adds ? load(c + (m + i) * c_row + n + 16 * v) : _mm512_setzero_ps();
    const float* left = a + m * a_row + from * a_step;
    const float* right = b + from * b_row + n;
    for (int64_t k = from; k < to; k++, left += a_step, right += b_row) {
      __m512 vectors[V];
      UNROLL for (int v = 0; v < V; v++) vectors[v] = load(right + 16 * v);
      UNROLL for (int i = 0; i < M; i++) {
        const __m512 one = _mm512_set1_ps(left[i * a_row]);
        UNROLL for (int v = 0; v < V; v++) sums[i][v] = _mm512_fmadd_ps(one, vectors[v], sums[i][v]);
      }
    }
    UNROLL for (int i = 0; i < M; i++)
      UNROLL for (int v = 0; v < V; v++) store(c + (m + i) * c_row + n + 16 * v, sums[i][v]);
  }

  template <int M>
  void columns(int64_t m, int64_t num_columns, int64_t from, int64_t to) const {
    int64_t n = 0;
    for (; n + 16 * VECTORS <= num_columns; n += 16 * VECTORS) tile<M, VECTORS>(m, n, from, to);
    if (num_columns - n == 48) tile<M, 3>(m, n, from, to);
    if (num_columns - n == 32) tile<M, 2>(m, n, from, to);
    if (num_columns - n == 16) tile<M, 1>(m, n, from, to);
  }

  // `count` of its rows from m on, at most BLOCK; sums over k in [from, to); num_columns a multiple of 16.
  void rows(int64_t m, int64_t count, int64_t num_columns, int64_t from, int64_t to) const {
    switch (count) {
      case 6: return columns<6>(m, num_columns, from, to);
      case 5: return columns<5>(m, num_columns, from, to);
      case 4: return columns<4>(m, num_columns, from, to);
      case 3: return columns<3>(m, num_columns, from, to);
      case 2: return columns<2>(m, num_columns, from, to);
      case 1: return columns<1>(m, num_columns, from, to);
    }
  }
};

// b (width, height) = a (height, width) transposed; both multiples of 16, row by row.
void transpose(const float* a, int64_t height, int64_t width, float* b) {
  for (int64_t i = 0; i < height; i += 16)
    for (int64_t j = 0; j < width; j += 16) {
      __m512 x[16], y[16];
      UNROLL for (int k = 0; k < 16; k++) x[k] = load(a + (i + k) * width + j);
      UNROLL for (int k = 0; k < 8; k++) {
        y[2 * k] = _mm512_unpacklo_ps(x[2 * k], x[2 * k + 1]);
        y[2 * k + 1] = _mm512_unpackhi_ps(x[2 * k], x[2 * k + 1]);
      }
      UNROLL for (int k = 0; k < 4; k++)
        UNROLL for (int h = 0; h < 2; h++) {
          const __m512d left = _mm512_castps_pd(y[4 * k + h]), right = _mm512_castps_pd(y[4 * k + h + 2]);
          x[4 * k + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(left, right));
          x[4 * k + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(left, right));
        }
      UNROLL for (int k = 0; k < 4; k++) {  // x[4 q + k]: columns k, k + 4, k + 8, k + 12 of rows 4 q to 4 q + 3
        const __m512 low0 = _mm512_shuffle_f32x4(x[k], x[4 + k], 0x88);
        const __m512 low1 = _mm512_shuffle_f32x4(x[8 + k], x[12 + k], 0x88);
        const __m512 high0 = _mm512_shuffle_f32x4(x[k], x[4 + k], 0xdd);
        const __m512 high1 = _mm512_shuffle_f32x4(x[8 + k], x[12 + k], 0xdd);
        y[k] = _mm512_shuffle_f32x4(low0, low1, 0x88);
        y[8 + k] = _mm512_shuffle_f32x4(low0, low1, 0xdd);
        y[4 + k] = _mm512_shuffle_f32x4(high0, high1, 0x88);
        y[12 + k] = _mm512_shuffle_f32x4(high0, high1, 0xdd);
      }
      UNROLL for (int k = 0; k < 16; k++) store(b + (j + k) * height + i, y[k]);
    }
}

// Where the tokens stand: of a batch (rows, length), or packed into one row of distinct tokens, where `token` has the
// number of each place, `lengths` the tokens of each row, and `shared` how many of them an earlier row has, too.
struct Rows {
  int64_t num_rows, length;
  const int64_t *token, *lengths, *shared, *first;  // first: the place in (rows, length) of each token
  int64_t end(int64_t row) const { return lengths ? lengths[row] : length; }
  int64_t begin(int64_t row) const { return shared ? shared[row] : 0; }
  int64_t at(int64_t row, int64_t place) const { return token ? token[row * length + place] : row * length + place; }
};

template <class T>
struct States {  // of queries, keys or values: by strides; each token's D entries stand together
  const T* data;
  const int64_t* strides;  // of rows, heads, tokens
  const T* at(const Rows& rows, int64_t row, int64_t head, int64_t place) const {
    const int64_t where = rows.token ? rows.at(row, place) * strides[2] : row * strides[0] + place * strides[2];
    return data + where + head * strides[1];
  }
};

template <class T>
struct Attention {
  Rows rows;
  int64_t num_heads, num_groups, size;  // size: D, a multiple of 16
  float scale;
  States<T> query, key, value;

  // Places [from, to) of a row into (to - from, D) float32, times `factor`.
  void gather(const States<T>& states, int64_t row, int64_t head, int64_t from, int64_t to, float factor,
              float* into) const {
    for (int64_t place = from; place < to; place++, into += size) {
      const T* at = states.at(rows, row, head, place);
      for (int64_t d = 0; d < size; d += 16) store(into + d, _mm512_mul_ps(load(at + d), _mm512_set1_ps(factor)));
    }
  }

  // The scores' row of a query that sees `seen` keys becomes its weights, not yet divided by their sum: 0 from `seen`
  // to `width`. Returns the log of the sum of exponentials.
  static float softmax(float* row, int64_t seen, int64_t width, float* total) {
    __m512 most = _mm512_set1_ps(-__builtin_inff());
    for (int64_t s = 0; s < seen; s += 16) most = _mm512_mask_max_ps(most, first(seen - s), most, load(row + s));
    const float largest = _mm512_reduce_max_ps(most);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t s = 0; s < width; s += 16) {
      const __mmask16 mask = s < seen ? first(seen - s) : __mmask16(0);
      const __m512 below = _mm512_sub_ps(load(row + s), _mm512_set1_ps(largest));
      const __m512 weight = _mm512_maskz_mov_ps(mask, exponential(below));
      store(row + s, weight);
      sum = _mm512_add_ps(sum, weight);
    }
    *total = _mm512_reduce_add_ps(sum);
    return largest + __builtin_logf(*total);
  }

  // out: (tokens, heads, D); logs: (tokens, heads).
  void forward_unit(int64_t row, int64_t group, float* scratch, T* out, float* logs) const {
    const int64_t begin = rows.begin(row), end = rows.end(row), width = padded(end);
    if (begin >= end) return;
    float *keys = scratch, *keys_t = keys + width * size, *values = keys_t + width * size;
    float *queries = values + width * size, *scores = queries + (end - begin) * size;
    float* block = scores + BLOCK * width;
    std::memset(keys + end * size, 0, (width - end) * size * sizeof(float));
    gather(key, row, group, 0, end, 1.f, keys);
    gather(value, row, group, 0, end, 1.f, values);
    transpose(keys, width, size, keys_t);
    const int64_t shared_by = num_heads / num_groups;
    for (int64_t head = group * shared_by; head < (group + 1) * shared_by; head++) {
      gather(query, row, head, begin, end, scale, queries);
      for (int64_t q = begin; q < end; q += BLOCK) {
        const int64_t count = std::min<int64_t>(BLOCK, end - q), reach = q + count;
        const Product scored{queries + (q - begin) * size, size, 1, keys_t, width, scores, width, false};
        scored.rows(0, count, padded(reach), 0, size);
        float totals[BLOCK], log_sums[BLOCK];
        for (int64_t i = 0; i < count; i++)
          log_sums[i] = softmax(scores + i * width, q + i + 1, padded(reach), totals + i);
        Product{scores, width, 1, values, size, block, size, false}.rows(0, count, size, 0, reach);
        for (int64_t i = 0; i < count; i++) {
          const int64_t token = rows.at(row, q + i) * num_heads + head;
          logs[token] = log_sums[i];
          const __m512 share = _mm512_set1_ps(1.f / totals[i]);
          for (int64_t d = 0; d < size; d += 16)
            store(out + token * size + d, _mm512_mul_ps(load(block + i * size + d), share));
        }
      }
    }
  }

  // What a row's queries say of its own keys and values into d_keys and d_values (length, D) each, as float32.
  void backward_unit(int64_t row, int64_t group, float* scratch, const T* out, const float* logs, const T* d_out,
                     T* d_query, float* d_keys, float* d_values) const {
    const int64_t begin = rows.begin(row), end = rows.end(row), width = padded(end), num_queries = end - begin;
    std::memset(d_keys, 0, end * size * sizeof(float));
    std::memset(d_values, 0, end * size * sizeof(float));
    if (begin >= end) return;
    float *keys = scratch, *keys_t = keys + width * size, *values_t = keys_t + width * size;
    float *queries = values_t + width * size, *d_outs = queries + num_queries * size;
    float *weights = d_outs + num_queries * size, *d_scores = weights + num_queries * width;
    float* block = d_scores + num_queries * width;
    std::memset(keys + end * size, 0, (width - end) * size * sizeof(float));
    gather(value, row, group, 0, end, 1.f, keys);
    transpose(keys, width, size, values_t);
    gather(key, row, group, 0, end, 1.f, keys);
    transpose(keys, width, size, keys_t);
    const int64_t shared_by = num_heads / num_groups;
    for (int64_t head = group * shared_by; head < (group + 1) * shared_by; head++) {
      gather(query, row, head, begin, end, scale, queries);
      for (int64_t q = begin; q < end; q += BLOCK) {
        const int64_t count = std::min<int64_t>(BLOCK, end - q), reach = q + count, from = q - begin;
        float *own = weights + from * width, *d_own = d_scores + from * width, *d_outs_own = d_outs + from * size;
        float log_sums[BLOCK], deltas[BLOCK];
        for (int64_t i = 0; i < count; i++) {
          const int64_t token = rows.at(row, q + i) * num_heads + head;
          log_sums[i] = logs[token];
          __m512 delta = _mm512_setzero_ps();
          for (int64_t d = 0; d < size; d += 16) {
            const __m512 gradient = load(d_out + token * size + d);
            store(d_outs_own + i * size + d, gradient);
            delta = _mm512_fmadd_ps(gradient, load(out + token * size + d), delta);
          }
          deltas[i] = _mm512_reduce_add_ps(delta);
        }
        const Product scored{queries + from * size, size, 1, keys_t, width, own, width, false};
        const Product weighed{d_outs_own, size, 1, values_t, width, d_own, width, false};
        scored.rows(0, count, padded(reach), 0, size);
        weighed.rows(0, count, padded(reach), 0, size);
        for (int64_t i = 0; i < count; i++)
          for (int64_t s = 0; s < width; s += 16) {  // to the row's end, for the products below
            const __mmask16 mask = s <= q + i ? first(q + i + 1 - s) : __mmask16(0);
            float *score = own + i * width + s, *d_score = d_own + i * width + s;
            const __m512 below = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, score), _mm512_set1_ps(log_sums[i]));
            const __m512 weight = _mm512_maskz_mov_ps(mask, exponential(below));
            const __m512 d_weight = _mm512_maskz_loadu_ps(mask, d_score);
            store(score, weight);
            store(d_score, _mm512_mul_ps(weight, _mm512_maskz_sub_ps(mask, d_weight, _mm512_set1_ps(deltas[i]))));
          }
        Product{d_own, width, 1, keys, size, block, size, false}.rows(0, count, size, 0, reach);
        for (int64_t i = 0; i < count; i++) {
          T* at = d_query + (rows.at(row, q + i) * num_heads + head) * size;
          for (int64_t d = 0; d < size; d += 16)
            store(at + d, _mm512_mul_ps(load(block + i * size + d), _mm512_set1_ps(scale)));
        }
      }
      for (int64_t s = 0; s < end; s += BLOCK) {
        const int64_t count = std::min<int64_t>(BLOCK, end - s), from = std::max<int64_t>(0, s - begin);
        Product{weights, 1, width, d_outs, size, d_values, size, true}.rows(s, count, size, from, num_queries);
        Product{d_scores, 1, width, queries, size, d_keys, size, true}.rows(s, count, size, from, num_queries);
      }
    }
  }
};

// Floats that a thread's units need.
int64_t forward_floats(int64_t length, int64_t size) {
  return size * (4 * padded(length) + BLOCK) + BLOCK * padded(length);
}
int64_t backward_floats(int64_t length, int64_t size) {
  return size * (5 * padded(length) + BLOCK) + 2 * padded(length) * padded(length);
}

template <class T>
void forward(const Attention<T>& attention, int num_threads, float* scratch, T* out, float* logs) {
  const int64_t units = attention.rows.num_rows * attention.num_groups;
#pragma omp parallel num_threads(num_threads)
  {
    float* own = scratch + omp_get_thread_num() * forward_floats(attention.rows.length, attention.size);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; unit++)
      attention.forward_unit(unit / attention.num_groups, unit % attention.num_groups, own, out, logs);
  }
}

template <class T>
void backward(const Attention<T>& attention, int num_threads, float* scratch, const T* out, const float* logs,
              const T* d_out, T* d_query, T* d_key, T* d_value) {
  const Rows& rows = attention.rows;
  const int64_t groups = attention.num_groups, size = attention.size, length = rows.length;
  float* shares = scratch + num_threads * backward_floats(length, size);
  const auto share = [&](int64_t row, int64_t group, int64_t place, int which) {
    return shares + (((row * groups + group) * 2 + which) * length + place) * size;
  };
#pragma omp parallel num_threads(num_threads)
  {
    float* own = scratch + omp_get_thread_num() * backward_floats(length, size);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < rows.num_rows * groups; unit++) {
      const int64_t row = unit / groups, group = unit % groups;
      attention.backward_unit(row, group, own, out, logs, d_out, d_query, share(row, group, 0, 0),
                              share(row, group, 0, 1));
    }
#pragma omp for schedule(static)
    for (int64_t place = 0; place < length; place++) {  // what rows have in common, they have at the same place
      for (int64_t row = 0; row < rows.num_rows; row++) {
        if (place >= std::min(rows.begin(row), rows.end(row))) continue;
        const int64_t owner = rows.first[rows.at(row, place)] / length;
        for (int64_t group = 0; group < groups; group++)
          for (int which = 0; which < 2; which++) {
            const float* from = share(row, group, place, which);
            float* to = share(owner, group, place, which);
            for (int64_t d = 0; d < size; d += 16) store(to + d, _mm512_add_ps(load(to + d), load(from + d)));
          }
      }
      for (int64_t row = 0; row < rows.num_rows; row++) {
        if (place < rows.begin(row) || place >= rows.end(row)) continue;
        for (int64_t group = 0; group < groups; group++) {
          const int64_t at = (rows.at(row, place) * groups + group) * size;
          for (int64_t d = 0; d < size; d += 16) {
            store(d_key + at + d, load(share(row, group, place, 0) + d));
            store(d_value + at + d, load(share(row, group, place, 1) + d));
          }
        }
      }
    }
  }
}

}  // namespace

// sizes: rows, their length, heads, groups, D.
extern "C" int64_t forward_scratch(const int64_t* sizes, int num_threads) {
  return num_threads * forward_floats(sizes[1], sizes[4]);
}
extern "C" int64_t backward_scratch(const int64_t* sizes, int num_threads) {
  return num_threads * backward_floats(sizes[1], sizes[4]) + sizes[0] * sizes[3] * 2 * sizes[1] * sizes[4];
}

#define INPUTS(T)                                                                                                     \
  const T *query, const T *key, const T *value, const int64_t *query_strides, const int64_t *key_strides,             \
      const int64_t *value_strides, const int64_t *sizes, const int64_t *token, const int64_t *lengths,               \
      const int64_t *shared, const int64_t *first, float scale, int num_threads, float *scratch
#define ATTENTION(T)                                                                                                  \
  Attention<T> {                                                                                                      \
    {sizes[0], sizes[1], token, lengths, shared, first}, sizes[2], sizes[3], sizes[4], scale, {query, query_strides}, \
        {key, key_strides}, {value, value_strides}                                                                    \
  }
#define EXPORT(NAME, T)                                                                                               \
  extern "C" void forward_##NAME(INPUTS(T), T* out, float* logs) {                                                    \
    forward<T>(ATTENTION(T), num_threads, scratch, out, logs);                                                        \
  }                                                                                                                   \
  extern "C" void backward_##NAME(INPUTS(T), const T* out, const float* logs, const T* d_out, T* d_query, T* d_key,   \
                                  T* d_value) {                                                                       \
    backward<T>(ATTENTION(T), num_threads, scratch, out, logs, d_out, d_query, d_key, d_value);                       \
  }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
