// A small matrix product for operands that sit in cache: C (m, n) = A (m, k) B (k, n), or C += A B. T is float, double
// or Pair; then k counts pairs, and C is float. Included once per instruction set.
#pragma once

namespace gsto::cpu::GSTO_ISA {

// A has any strides. Rows of B and C are contiguous and n is a multiple of the vector length, so there are no partial
// vectors.
template <class T>
struct Gemm {
  using C = std::conditional_t<std::is_same_v<T, Pair>, float, T>;
  int64_t m, n, k;
  const T* a;
  int64_t a_row, a_col;
  const T* b;
  int64_t b_row;
  C* c;
  int64_t c_row;
  bool accumulate;
};

// 8 x 3 accumulators (AVX-512: 24 of 32 registers) or 4 x 3 (AVX2, SSE: 12 of 16) hide the latency of the multiply-add.
constexpr int kRowsPerBlock = kVectorBytes == 64 ? 8 : 4;
// Rows of B taken at once: 128 rows of 3 vectors are 24 KiB at most, and stay in L1 while the rows of A pass by.
constexpr int64_t kDepth = 128;

template <class T, int kRows, int kVectors>
inline void gemm_block(const Gemm<T>& g, int64_t i, int64_t j, int64_t k0, int64_t k1) {
  using C = typename Gemm<T>::C;
  constexpr int lanes = kLanes<C>;
  Vec<C> sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v)
      sum[r][v] = g.accumulate || k0 > 0 ? load(g.c + (i + r) * g.c_row + j + v * lanes) : Vec<C>{};
  // The next rows of A, which may be pixels in memory: the class map of 144 channels, float32, 2.6 -> 1.8 ms.
  if (j == 0 && g.a_col == 1) {
    for (int r = 0; r < kRows; ++r)
      for (int64_t k = k0; k < k1; k += 64 / static_cast<int64_t>(sizeof(T)))
        __builtin_prefetch(g.a + (i + kRows + r) * g.a_row + k);
  }
  for (int64_t k = k0; k < k1; ++k) {
    decltype(load(g.b)) b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = load(g.b + k * g.b_row + j + v * lanes);
    for (int r = 0; r < kRows; ++r) {
      T a;
      __builtin_memcpy(&a, g.a + (i + r) * g.a_row + k * g.a_col, sizeof(T));  // pairs may be anywhere in memory
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(sum[r][v], a, b[v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(g.c + (i + r) * g.c_row + j + v * lanes, sum[r][v]);
}

template <class T, int kVectors>
inline void gemm_columns(const Gemm<T>& g, int64_t j, int64_t k0, int64_t k1) {
  int64_t i = 0;
  for (; i + kRowsPerBlock <= g.m; i += kRowsPerBlock) gemm_block<T, kRowsPerBlock, kVectors>(g, i, j, k0, k1);
  for (; i + 2 <= g.m; i += 2) gemm_block<T, 2, kVectors>(g, i, j, k0, k1);
  for (; i < g.m; ++i) gemm_block<T, 1, kVectors>(g, i, j, k0, k1);
}

template <class T>
inline void gemm(const Gemm<T>& g) {
  constexpr int lanes = kLanes<typename Gemm<T>::C>;
  for (int64_t k0 = 0; k0 < g.k; k0 += kDepth) {
    const int64_t k1 = k0 + kDepth < g.k ? k0 + kDepth : g.k;
    for (int64_t j = 0; j < g.n;) {
      const int64_t vectors = (g.n - j) / lanes;
      if (vectors == 3 || vectors > 4) {
        gemm_columns<T, 3>(g, j, k0, k1);
        j += 3 * lanes;
      } else if (vectors >= 2) {  // four are twice two: one alone takes as long as two
        gemm_columns<T, 2>(g, j, k0, k1);
        j += 2 * lanes;
      } else {
        gemm_columns<T, 1>(g, j, k0, k1);
        j += lanes;
      }
    }
  }
}

}  // namespace gsto::cpu::GSTO_ISA
