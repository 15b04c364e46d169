// RMS norms and gated activations, forwards and backwards, each in one walk over memory. See pointwise.py.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "lanes.hpp"

namespace {

using std::int64_t;

constexpr int64_t CHUNK = 4096;  // entries, at least, that are worth a thread

// y (rows, width) = w x / rms(x); `inverse`: 1 / rms(x) of each row, for the way back.
template <class T>
void norm_forward(const T* x, const T* w, float epsilon, T* y, float* inverse, int64_t rows, int64_t width,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > CHUNK)
  for (int64_t row = 0; row < rows; row++) {
    const T* from = x + row * width;
    __m512 squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __m512 own = load(from + i, first(width - i));
      squares = _mm512_fmadd_ps(own, own, squares);
    }
    inverse[row] = 1.f / std::sqrt(_mm512_reduce_add_ps(squares) / width + epsilon);
    const __m512 factor = _mm512_set1_ps(inverse[row]);
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 mask = first(width - i);
      store(y + row * width + i, _mm512_mul_ps(load(w + i, mask), _mm512_mul_ps(load(from + i, mask), factor)), mask);
    }
  }
}

// With n = x / rms(x): dx = (g w − n mean(g w n)) / rms(x).
template <class T>
void norm_backward(const T* g, const T* x, const T* w, const float* inverse, T* dx, int64_t rows, int64_t width,
                   int threads) {
#pragma omp parallel for num_threads(threads) if (rows * width > CHUNK)
  for (int64_t row = 0; row < rows; row++) {
    const T *from = x + row * width, *gradient = g + row * width;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 mask = first(width - i);
      sum = _mm512_fmadd_ps(_mm512_mul_ps(load(gradient + i, mask), load(w + i, mask)), load(from + i, mask), sum);
    }
    const float one = inverse[row], mean = _mm512_reduce_add_ps(sum) / width;
    const __m512 factor = _mm512_set1_ps(one), along = _mm512_set1_ps(mean * one * one * one);
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 mask = first(width - i);
      const __m512 weighed = _mm512_mul_ps(_mm512_mul_ps(load(gradient + i, mask), load(w + i, mask)), factor);
      store(dx + row * width + i, _mm512_fnmadd_ps(load(from + i, mask), along, weighed), mask);
    }
  }
}

inline __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// y = silu(gate) up.
template <class T>
void gate_forward(const T* gate, const T* up, T* y, int64_t count, int threads) {
#pragma omp parallel for num_threads(threads) if (count > CHUNK)
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first(count - i);
    const __m512 own = load(gate + i, mask);
    store(y + i, _mm512_mul_ps(_mm512_mul_ps(own, sigmoid(own)), load(up + i, mask)), mask);
  }
}

// dup = g silu(gate); dgate = g up σ (1 + gate (1 − σ)), σ = sigmoid(gate).
template <class T>
void gate_backward(const T* g, const T* gate, const T* up, T* d_gate, T* d_up, int64_t count, int threads) {
  const __m512 one = _mm512_set1_ps(1.f);
#pragma omp parallel for num_threads(threads) if (count > CHUNK)
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first(count - i);
    const __m512 own = load(gate + i, mask), gradient = load(g + i, mask), share = sigmoid(own);
    const __m512 slope = _mm512_mul_ps(share, _mm512_fmadd_ps(own, _mm512_sub_ps(one, share), one));
    store(d_up + i, _mm512_mul_ps(gradient, _mm512_mul_ps(own, share)), mask);
    store(d_gate + i, _mm512_mul_ps(gradient, _mm512_mul_ps(load(up + i, mask), slope)), mask);
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                               \
  extern "C" void norm_forward_##NAME(const T* x, const T* w, float epsilon, T* y, float* inverse, int64_t rows,      \
                                      int64_t width, int threads) {                                                   \
    norm_forward<T>(x, w, epsilon, y, inverse, rows, width, threads);                                                 \
  }                                                                                                                   \
  extern "C" void norm_backward_##NAME(const T* g, const T* x, const T* w, const float* inverse, T* dx, int64_t rows, \
                                       int64_t width, int threads) {                                                  \
    norm_backward<T>(g, x, w, inverse, dx, rows, width, threads);                                                     \
  }                                                                                                                   \
  extern "C" void gate_forward_##NAME(const T* gate, const T* up, T* y, int64_t count, int threads) {                 \
    gate_forward<T>(gate, up, y, count, threads);                                                                     \
  }                                                                                                                   \
  extern "C" void gate_backward_##NAME(const T* g, const T* gate, const T* up, T* d_gate, T* d_up, int64_t count,     \
                                       int threads) {                                                                 \
    gate_backward<T>(g, gate, up, d_gate, d_up, count, threads);                                                      \
  }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
