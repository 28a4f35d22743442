// Vectors of the instruction set that this file is compiled for (GCC vector extensions), and the storage types' loads
// and stores through them. Included once per instruction set, inside that set's namespace and after all other headers.
#pragma once

namespace gsto::cpu::GSTO_ISA {

constexpr int kVectorBytes = GSTO_VECTOR_BYTES;

template <class T>
struct Vectors;
template <>
struct Vectors<float> {
  typedef float Value __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Vectors<double> {
  typedef double Value __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
};
typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
using Vec = typename Vectors<A>::Value;
template <class A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

// The type in which a storage type is computed.
template <class S>
struct AccumulateOf {
  using type = float;
};
template <>
struct AccumulateOf<double> {
  using type = double;
};
template <class S>
using Accumulate = typename AccumulateOf<S>::type;

template <class V, class T>
inline V load_raw(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}

template <class T, class V>
inline void store_raw(T* p, const V& v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// GCC 12 makes several instructions of these conversions where there is one: a norm's backward of 48 x 128 x 256 in
// bfloat16 0.29 -> 0.16 ms, half of it from this. (Without a mask GCC's header warns of itself.)
inline Bits widen(HalfBits h) {
#if defined(GSTO_X86_VARIANTS) && GSTO_VECTOR_BYTES == 64
  return bit_cast<Bits>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(h)));
#elif defined(GSTO_X86_VARIANTS) && GSTO_VECTOR_BYTES == 32
  return bit_cast<Bits>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(h)));
#else
  return __builtin_convertvector(h, Bits);
#endif
}

inline HalfBits narrow(Bits bits) {
#if defined(GSTO_X86_VARIANTS) && GSTO_VECTOR_BYTES == 64
  return bit_cast<HalfBits>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(bits)));
#else
  return __builtin_convertvector(bits, HalfBits);
#endif
}

inline Vec<float> decode_half(Bits h) {
  const Bits magnitude = h & 0x7fff;
  Bits bits = (magnitude << 13) + (112u << 23);
  bits = magnitude >= 0x7c00 ? bits + (112u << 23) : bits;  // infinities and NaNs
  const Bits subnormal = bit_cast<Bits>(__builtin_convertvector(magnitude, Vec<float>) * 0x1p-24f);
  bits = magnitude < 0x0400 ? subnormal : bits;
  return bit_cast<Vec<float>>(bits | (h & 0x8000) << 16);
}

// Rounds to nearest even, as the hardware does.
inline Bits encode_half(Vec<float> v) {
  const Bits bits = bit_cast<Bits>(v);
  const Bits magnitude = bits & 0x7fffffff;
  Bits h = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112u << 10);
  // Adding 0.5 leaves the multiple of 2^-24 in the low bits: subnormals are those multiples.
  const Bits subnormal = bit_cast<Bits>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  h = magnitude < 0x38800000u ? subnormal : h;
  h = magnitude >= 0x477ff000u ? Bits{} + 0x7c00 : h;
  h = magnitude > 0x7f800000u ? Bits{} + 0x7e00 : h;
  return h | ((bits >> 16) & 0x8000);
}

inline HalfBits round_bfloat16(Vec<float> v) {
  const Bits bits = bit_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return narrow((bits & 0x7fffffff) > 0x7f800000u ? Bits{} + 0x7fc0 : rounded);
}

inline HalfBits encode_bfloat16(Vec<float> v) {
#ifdef GSTO_BFLOAT16_INSTRUCTIONS
  constexpr int kSubnormal = 0x20;  // which the instruction turns into zeros
  if (_mm512_fpclass_ps_mask(v, kSubnormal) == 0) return bit_cast<HalfBits>(_mm512_cvtneps_pbh(v));
#endif
  return round_bfloat16(v);
}

// One vector of accumulate-type values from / to contiguous storage.
inline Vec<float> load(const float* p) { return load_raw<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }
inline Vec<float> load(const BFloat16* p) { return bit_cast<Vec<float>>(widen(load_raw<HalfBits>(p)) << 16); }
inline Vec<float> load(const Float16* p) { return decode_half(widen(load_raw<HalfBits>(p))); }

inline void store(float* p, Vec<float> v) { store_raw(p, v); }
inline void store(double* p, Vec<double> v) { store_raw(p, v); }
inline void store(BFloat16* p, Vec<float> v) { store_raw(p, encode_bfloat16(v)); }
inline void store(Float16* p, Vec<float> v) { store_raw(p, narrow(encode_half(v))); }

// Stores past the caches; p is aligned to the vector's size in memory.
template <class V>
inline void store_past_raw(void* p, const V& v) {
#if defined(GSTO_X86_VARIANTS) && GSTO_VECTOR_BYTES == 64
  if constexpr (sizeof(V) == 64) {
    _mm512_stream_si512(static_cast<__m512i*>(p), bit_cast<__m512i>(v));
  } else {
    _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(v));
  }
#elif defined(GSTO_X86_VARIANTS) && GSTO_VECTOR_BYTES == 32
  if constexpr (sizeof(V) == 32) {
    _mm256_stream_si256(static_cast<__m256i*>(p), bit_cast<__m256i>(v));
  } else {
    _mm_stream_si128(static_cast<__m128i*>(p), bit_cast<__m128i>(v));
  }
#else
  store_raw(static_cast<char*>(p), v);
#endif
}

inline void store_past(float* p, Vec<float> v) { store_past_raw(p, v); }
inline void store_past(double* p, Vec<double> v) { store_past_raw(p, v); }
inline void store_past(BFloat16* p, Vec<float> v) { store_past_raw(p, encode_bfloat16(v)); }
inline void store_past(Float16* p, Vec<float> v) { store_past_raw(p, narrow(encode_half(v))); }

// What products multiply: the accumulate type, or with bfloat16 instructions pairs of bfloat16 that are neighbours in
// the dimension that is summed over; one lane multiplies and adds two of them.
struct Pair {
  uint32_t bits;
};
template <class S>
struct FactorOf {
  using type = Accumulate<S>;
};
#ifdef GSTO_BFLOAT16_INSTRUCTIONS
template <>
struct FactorOf<BFloat16> {
  using type = Pair;
};
#endif
template <class S>
using Factor = typename FactorOf<S>::type;
template <class S>
constexpr bool kPairs = std::is_same_v<Factor<S>, Pair>;

inline Vec<float> multiply_add(Vec<float> sum, float a, Vec<float> b) { return sum + a * b; }
inline Vec<double> multiply_add(Vec<double> sum, double a, Vec<double> b) { return sum + a * b; }
#ifdef GSTO_BFLOAT16_INSTRUCTIONS
inline Bits load(const Pair* p) { return load_raw<Bits>(p); }
inline void store(Pair* p, Bits v) { store_raw(p, v); }
inline Vec<float> multiply_add(Vec<float> sum, Bits a, Bits b) {
  return _mm512_dpbf16_ps(sum, bit_cast<__m512bh>(a), bit_cast<__m512bh>(b));
}
inline Vec<float> multiply_add(Vec<float> sum, Pair a, Bits b) { return multiply_add(sum, Bits{} + a.bits, b); }

// A left operand's values: subnormal ones count as zeros in a product.
inline void store_rounded(BFloat16* p, Vec<float> v) { store_raw(p, bit_cast<HalfBits>(_mm512_cvtneps_pbh(v))); }

// Lane i of low and high holds value i and value 16 + i of both runs, of n and m <= 32 values.
inline void pair_runs(const BFloat16* first, const BFloat16* second, int64_t n, int64_t m, Bits& low, Bits& high) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  const auto present = [](int64_t count) { return static_cast<__mmask32>((uint64_t{1} << count) - 1); };
  const Halves a = bit_cast<Halves>(_mm512_maskz_loadu_epi16(present(n), first));
  const Halves b = bit_cast<Halves>(_mm512_maskz_loadu_epi16(present(m), second));
  low = bit_cast<Bits>(__builtin_shuffle(a, b, Halves{0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47}));
  high =
      bit_cast<Bits>(__builtin_shuffle(a, b, Halves{16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                                    24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}));
}

// Lane i holds the values of lane i of both, rounded.
inline Bits make_pairs(Vec<float> first, Vec<float> second) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  const Halves both = bit_cast<Halves>(_mm512_cvtne2ps_pbh(second, first));
  return bit_cast<Bits>(__builtin_shuffle(both, Halves{0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31}));
}
#endif

// The first n <= lanes values, where the instruction set has masks: a buffer costs a store and a load that waits for
// it.
#if GSTO_VECTOR_BYTES == 64
inline Vec<float> load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline Vec<double> load_first(const double* p, int64_t n) { return _mm512_maskz_loadu_pd((1u << n) - 1, p); }
inline void store_first(float* p, Vec<float> v, int64_t n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
inline void store_first(double* p, Vec<double> v, int64_t n) { _mm512_mask_storeu_pd(p, (1u << n) - 1, v); }
inline Vec<float> load_first(const BFloat16* p, int64_t n) {
  return bit_cast<Vec<float>>(widen(bit_cast<HalfBits>(_mm256_maskz_loadu_epi16((1u << n) - 1, p))) << 16);
}
inline Vec<float> load_first(const Float16* p, int64_t n) {
  return decode_half(widen(bit_cast<HalfBits>(_mm256_maskz_loadu_epi16((1u << n) - 1, p))));
}
inline void store_first(BFloat16* p, Vec<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, bit_cast<__m256i>(encode_bfloat16(v)));
}
inline void store_first(Float16* p, Vec<float> v, int64_t n) {
  _mm256_mask_storeu_epi16(p, (1u << n) - 1, bit_cast<__m256i>(narrow(encode_half(v))));
}
constexpr bool kMasks = true;
#else
constexpr bool kMasks = false;
#endif

// The first n <= lanes values (the other lanes are zero), stride elements apart.
template <class S>
inline Vec<Accumulate<S>> load_some(const S* p, int64_t n, int64_t stride = 1) {
  if constexpr (kMasks)
    if (stride == 1) return load_first(p, n);
  S buffer[kLanes<Accumulate<S>>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

template <class S>
inline void store_some(S* p, Vec<Accumulate<S>> v, int64_t n) {
  if constexpr (kMasks) return store_first(p, v, n);
  S buffer[kLanes<Accumulate<S>>];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

template <class A>
inline A sum_lanes(Vec<A> v) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

// Lanes a0 b0 a1 b1 ...: of the lower halves of a and b, or of the upper halves.
template <class A, int... I>
inline Vec<A> interleave(Vec<A> a, Vec<A> b, int half, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
#ifdef __clang__
  return half == 0 ? __builtin_shufflevector(a, b, (I / 2 + I % 2 * lanes)...)
                   : __builtin_shufflevector(a, b, (I / 2 + I % 2 * lanes + lanes / 2)...);
#else
  using Mask = typename Vectors<A>::Mask;
  return half == 0 ? __builtin_shuffle(a, b, Mask{(I / 2 + I % 2 * lanes)...})
                   : __builtin_shuffle(a, b, Mask{(I / 2 + I % 2 * lanes + lanes / 2)...});
#endif
}

// Transposes the square of lanes x lanes values: log2(lanes) perfect shuffles of its rows.
template <class A>
inline void transpose(Vec<A> (&rows)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
  constexpr auto lane_numbers = std::make_integer_sequence<int, lanes>();
  for (int step = 1; step < lanes; step *= 2) {
    Vec<A> next[lanes];
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave<A>(rows[i], rows[i + lanes / 2], 0, lane_numbers);
      next[2 * i + 1] = interleave<A>(rows[i], rows[i + lanes / 2], 1, lane_numbers);
    }
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

}  // namespace gsto::cpu::GSTO_ISA
