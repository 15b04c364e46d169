// y = x Wᵀ + b + s (x Aᵀ) Bᵀ of few rows x, for CPUs with AVX-512. See few_rows.py.
//
// The weight is read once, as it lies, by a tile of TILE of its rows at a time against BLOCK rows of x after BLOCK; from
// BLOCK rows on the next tile is fetched in the meantime. Each product of two rows is summed in 16 lanes, and the lanes
// by one tree, so what is said of a row of x depends neither on the rows beside it nor on the number of threads. Without
// a weight, the low-rank part is added to the y there is.

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "lanes.hpp"

#define UNROLL _Pragma("GCC unroll 16")

namespace {

using std::int64_t;

constexpr int TILE = 4;   // rows of the weight
constexpr int BLOCK = 4;  // rows of x; TILE · BLOCK sums of 16 lanes are one vector's worth

constexpr uint32_t ALL = uint32_t(-1);

// A mask of the first `count` lanes of `width`.
inline uint32_t first(int64_t count, int width) { return count < width ? (1u << count) - 1 : ALL; }

// How rows of a weight's and of an input's type are multiplied: WIDTH entries a step, those outside the mask as 0.
template <class Weight, class Input>
struct Step;

template <class Input>
struct Step<float, Input> {  // of bfloat16 inputs, too: A stays in float32
  static constexpr int WIDTH = 16;
  static __m512 weight(const float* at, uint32_t mask) { return load(at, __mmask16(mask)); }
  static __m512 input(const Input* at, uint32_t mask) { return load(at, __mmask16(mask)); }
  static __m512 add(__m512 sum, __m512 w, __m512 x) { return _mm512_fmadd_ps(w, x, sum); }
};

inline float load(float at) { return at; }
inline void store(float* at, float value) { *at = value; }
inline __m128 load_four(const float* at) { return _mm_loadu_ps(at); }
inline void store_four(float* at, __m128 values) { _mm_storeu_ps(at, values); }

#ifdef __AVX512BF16__
template <>
struct Step<bfloat16, bfloat16> {
  static constexpr int WIDTH = 32;
  static __m512i weight(const bfloat16* at, uint32_t mask) { return _mm512_maskz_loadu_epi16(mask, at); }
  static __m512i input(const bfloat16* at, uint32_t mask) { return _mm512_maskz_loadu_epi16(mask, at); }
  static __m512 add(__m512 sum, __m512i w, __m512i x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
};

inline float load(bfloat16 at) { return _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(uint32_t(at) << 16))); }
inline void store(bfloat16* at, float value) {
  __m256bh rounded = _mm512_cvtneps_pbh(_mm512_set1_ps(value));
  *at = bfloat16(_mm256_extract_epi16((__m256i)rounded, 0));
}
inline __m128 load_four(const bfloat16* at) {
  __m128i wide = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
  return _mm_castsi128_ps(_mm_slli_epi32(wide, 16));
}
inline void store_four(bfloat16* at, __m128 values) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(at), (__m128i)_mm_cvtneps_pbh(values));
}
#endif

// Lane k of the result: the sum of the lanes of v[k].
inline __m512 sum_lanes(const __m512* v) {
  __m512 pairs[8], quads[4], halves[2];
  for (int i = 0; i < 8; i++)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    __m512d left = _mm512_castps_pd(pairs[2 * i]), right = _mm512_castps_pd(pairs[2 * i + 1]);
    quads[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(left, right)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(left, right)));
  }
  for (int i = 0; i < 2; i++)
    halves[i] = _mm512_add_ps(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88),
                       _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
}

// The low-rank part of a product: x Aᵀ as `rows` of `stride` floats, 0 past the rank, and B.
struct LowRank {
  const float* rows;
  const float* b;
  int64_t rank, stride;
  float scale;
};

template <class Weight, class Input, class Output>
struct Product {
  const Input* x;
  const Weight* w;  // or null, and num_in 0: then y holds x Wᵀ and the bias
  const Output* bias;
  LowRank low;
  Output* y;
  int64_t num_rows, num_in, num_out, y_stride;

  // T rows of w against X of x, from `out` and `row` on. FETCH lines from `next` on are fetched a step.
  template <int T, int X, int FETCH>
  __attribute__((always_inline)) void tile(int64_t row, int64_t out, const char* next) const {
    using S = Step<Weight, Input>;
    __m512 sums[TILE * BLOCK];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t r = 0; r < low.rank; r += 16) {
      const uint32_t mask = first(low.rank - r, 16);
      for (int t = 0; t < T; t++) {
        __m512 b = _mm512_maskz_loadu_ps(mask, low.b + (out + t) * low.rank + r);
        b = _mm512_mul_ps(b, _mm512_set1_ps(low.scale));
        for (int n = 0; n < X; n++)
          sums[n * T + t] = _mm512_fmadd_ps(b, _mm512_loadu_ps(low.rows + (row + n) * low.stride + r), sums[n * T + t]);
      }
    }
    const Weight* weights = w + out * num_in;
    const Input* inputs = x + row * num_in;
    const int64_t whole = num_in - num_in % S::WIDTH;
    {
      __m512 kept[X * T];  // in registers
      UNROLL for (int k = 0; k < X * T; k++) kept[k] = sums[k];
      for (int64_t i = 0; i < whole; i += S::WIDTH, next += FETCH * 64) {
        decltype(S::weight(w, 0)) weight[T];
        UNROLL for (int t = 0; t < T; t++) weight[t] = S::weight(weights + t * num_in + i, ALL);
        UNROLL for (int f = 0; f < FETCH; f++) _mm_prefetch(next + f * 64, _MM_HINT_T1);
        UNROLL for (int n = 0; n < X; n++) {
          const auto input = S::input(inputs + n * num_in + i, ALL);
          UNROLL for (int t = 0; t < T; t++) kept[n * T + t] = S::add(kept[n * T + t], weight[t], input);
        }
      }
      UNROLL for (int k = 0; k < X * T; k++) sums[k] = kept[k];
    }
    if (whole < num_in) {
      const uint32_t mask = first(num_in - whole, S::WIDTH);
      for (int n = 0; n < X; n++)
        for (int t = 0; t < T; t++)
          sums[n * T + t] = S::add(sums[n * T + t], S::weight(weights + t * num_in + whole, mask),
                                   S::input(inputs + n * num_in + whole, mask));
    }
    alignas(64) float said[16];
    _mm512_store_ps(said, sum_lanes(sums));
    for (int n = 0; n < X; n++) {
      Output* at = y + (row + n) * y_stride + out;
      const Output* before = w ? bias ? bias + out : nullptr : at;
      if constexpr (T == 4) {
        const __m128 sum = _mm_load_ps(said + n * T);
        store_four(at, before ? _mm_add_ps(sum, load_four(before)) : sum);
      } else {
        for (int t = 0; t < T; t++) store(at + t, said[n * T + t] + (before ? load(before[t]) : 0.f));
      }
    }
  }

  // All rows of x against T rows of w, which stay in the first cache as rows of x come by. The next rows of w are
  // fetched in the meantime, in equal parts by the first blocks.
  template <int T>
  void outputs(int64_t out) const {
    static_assert(Step<Weight, Input>::WIDTH * sizeof(Weight) == 64);  // a step reads a line of each row
    const int64_t lines = (num_in * int64_t(sizeof(Weight)) + 63) / 64;  // of a row
    const int64_t fetch = T < TILE ? 0 : num_rows < 2 * BLOCK ? 4 : num_rows < 4 * BLOCK ? 2 : 1;  // rows, by a block
    const char* next = reinterpret_cast<const char*>(w + (out + T) * num_in);
    const char* const end = next + TILE * lines * 64;
    int64_t row = 0;
    for (; row + BLOCK <= num_rows; row += BLOCK, next += fetch * lines * 64) {
      if (fetch == 0 || next >= end) tile<T, BLOCK, 0>(row, out, next);
      else if (fetch == 1) tile<T, BLOCK, 1>(row, out, next);
      else if (fetch == 2) tile<T, BLOCK, 2>(row, out, next);
      else tile<T, BLOCK, 4>(row, out, next);
    }
    if (num_rows - row == 3) tile<T, 3, 0>(row, out, next);
    if (num_rows - row == 2) tile<T, 2, 0>(row, out, next);
    if (num_rows - row == 1) tile<T, 1, 0>(row, out, next);
  }

  // This thread's share of the outputs.
  void share(int thread, int num_threads) const {
    const int64_t tiles = (num_out + TILE - 1) / TILE;
    int64_t out = std::min(num_out, tiles * thread / num_threads * TILE);
    const int64_t end = std::min(num_out, tiles * (thread + 1) / num_threads * TILE);
    for (; out + TILE <= end; out += TILE) outputs<TILE>(out);
    for (; out < end; out++) outputs<1>(out);
  }
};

template <class T>
void product(const T* x, const T* w, const T* bias, const float* a, const float* b, float scale, T* y, float* low,
             int64_t num_rows, int64_t num_in, int64_t num_out, int64_t rank, int64_t low_stride, int num_threads) {
  Product<float, T, float> down{x, a, nullptr, {}, low, num_rows, num_in, rank, low_stride};
  LowRank up{low, b, rank, low_stride, scale};
  Product<T, T, T> whole{x, w, bias, up, y, num_rows, w ? num_in : 0, num_out, num_out};
#pragma omp parallel num_threads(num_threads)
  {
    int thread = omp_get_thread_num(), threads = omp_get_num_threads();
    if (rank) {
      down.share(thread, threads);
#pragma omp barrier
    }
    whole.share(thread, threads);
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                              \
  extern "C" void NAME(const T* x, const T* w, const T* bias, const float* a, const float* b, float scale, T* y,     \
                       float* low, int64_t num_rows, int64_t num_in, int64_t num_out, int64_t rank,                  \
                       int64_t low_stride, int num_threads) {                                                        \
    product<T>(x, w, bias, a, b, scale, y, low, num_rows, num_in, num_out, rank, low_stride, num_threads);           \
  }

EXPORT(product_float32, float)
#ifdef __AVX512BF16__
EXPORT(product_bfloat16, bfloat16)
#endif
