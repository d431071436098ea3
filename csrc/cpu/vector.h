// Vectors in the accumulation type, as wide as the CPU's registers, loaded from and stored to any storage type.
//
// They are the compiler's own vector types: one source serves every capability. Wider ones than the registers it would
// take apart into single lanes wherever they are compared. Conversions that it would spell out badly use the
// capability's instructions.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "batch_norm.h"

#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

namespace densenet_efficient::CPU_CAPABILITY {

using c10::BFloat16;
using c10::Half;

// The type in which values of storage type T are computed with and summed.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

#if defined(CPU_CAPABILITY_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;

template <typename A>
constexpr int64_t kLanes = kVectorBytes / sizeof(A);

namespace detail {
typedef uint16_t Words __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t DoubleWords __attribute__((vector_size(kVectorBytes)));

template <typename To, typename From>
ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

ALWAYS_INLINE DoubleWords widen(Words words) {
#if defined(CPU_CAPABILITY_AVX512)
  return bit_cast<DoubleWords>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(words)));
#else
  return __builtin_convertvector(words, DoubleWords);
#endif
}
}  // namespace detail

template <typename A>
ALWAYS_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};  // without an operation, for all bits of value stay; an addition would turn -0 into 0
}

// ---- full vectors

template <typename A, typename T>
ALWAYS_INLINE Vector<A> load(const T* from) {
  static_assert(std::is_same_v<A, T>);
  Vector<A> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

template <>
ALWAYS_INLINE Vector<float> load<float, BFloat16>(const BFloat16* from) {
  detail::Words words;
  std::memcpy(&words, from, sizeof(words));
  return detail::bit_cast<Vector<float>>(detail::widen(words) << 16);
}

template <>
ALWAYS_INLINE Vector<float> load<float, Half>(const Half* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return detail::bit_cast<Vector<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(CPU_CAPABILITY_AVX2)
  return detail::bit_cast<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  Vector<float> value;
  for (int64_t i = 0; i < kLanes<float>; i++) value[i] = static_cast<float>(from[i]);
  return value;
#endif
}

ALWAYS_INLINE void store(float* to, Vector<float> value) { std::memcpy(to, &value, sizeof(value)); }
ALWAYS_INLINE void store(double* to, Vector<double> value) { std::memcpy(to, &value, sizeof(value)); }

// The bfloat16 nearest to ``value``, ties to even; NaN stays NaN.
ALWAYS_INLINE detail::Words to_bfloat16(Vector<float> value) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  return detail::bit_cast<detail::Words>(_mm512_cvtneps_pbh(detail::bit_cast<__m512>(value)));
#else
  const auto bits = detail::bit_cast<detail::DoubleWords>(value);
  const detail::DoubleWords rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const detail::DoubleWords quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(value == value ? rounded : quiet, detail::Words);
#endif
}

ALWAYS_INLINE void store(BFloat16* to, Vector<float> value) {
  const detail::Words words = to_bfloat16(value);
  std::memcpy(to, &words, sizeof(words));
}

ALWAYS_INLINE void store(Half* to, Vector<float> value) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i halves = _mm512_cvtps_ph(detail::bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &halves, sizeof(halves));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i halves = _mm256_cvtps_ph(detail::bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(to, &halves, sizeof(halves));
#else
  for (int64_t i = 0; i < kLanes<float>; i++) to[i] = static_cast<Half>(value[i]);
#endif
}

// As it is after it was stored.
template <typename T, typename V>
ALWAYS_INLINE V rounded(V value) {
  if constexpr (sizeof(T) == sizeof(value[0])) return value;
  alignas(kVectorBytes) T lanes[sizeof(V) / sizeof(value[0])];
  store(static_cast<T*>(lanes), value);
  return load<Accumulate<T>>(static_cast<const T*>(lanes));
}

// ---- the first ``count`` lanes; the rest is zero, and neither read nor written

namespace detail {
// By masks where the CPU has them: a memcpy whose size is known only at run time is a call.
#if defined(CPU_CAPABILITY_AVX512)
template <typename T>
ALWAYS_INLINE void load_lanes(const T* from, int64_t count, T* lanes) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_storeu_si512(lanes, _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_storeu_si512(lanes, _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from));
  } else {
    const __m256i words = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), words);
  }
}

template <typename T>
ALWAYS_INLINE void store_lanes(T* to, int64_t count, const T* lanes) {
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), _mm512_loadu_si512(lanes));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), _mm512_loadu_si512(lanes));
  } else {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), words);
  }
}
#else
#if defined(CPU_CAPABILITY_AVX2)
ALWAYS_INLINE __m256i first_lanes(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

template <typename T>
ALWAYS_INLINE void load_lanes(const T* from, int64_t count, T* lanes) {
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) return _mm256_storeu_ps(lanes, _mm256_maskload_ps(from, first_lanes(count)));
#endif
  constexpr int64_t size = kVectorBytes / sizeof(Accumulate<T>);
  for (int64_t i = 0; i < size; i++) lanes[i] = i < count ? from[i] : T(0);
}

template <typename T>
ALWAYS_INLINE void store_lanes(T* to, int64_t count, const T* lanes) {
#if defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) return _mm256_maskstore_ps(to, first_lanes(count), _mm256_loadu_ps(lanes));
#endif
  for (int64_t i = 0; i < count; i++) to[i] = lanes[i];
}
#endif
}  // namespace detail

template <typename A, typename T>
ALWAYS_INLINE Vector<A> load(const T* from, int64_t count) {
  if (count >= kLanes<A>) return load<A>(from);
  alignas(kVectorBytes) T lanes[kLanes<A>];
  detail::load_lanes(from, count, lanes);
  return load<A>(static_cast<const T*>(lanes));
}

template <typename T, typename V>
ALWAYS_INLINE void store(T* to, V value, int64_t count) {
  constexpr int64_t size = sizeof(V) / sizeof(value[0]);
  if (count >= size) return store(to, value);
  alignas(kVectorBytes) T lanes[size];
  store(static_cast<T*>(lanes), value);
  detail::store_lanes(to, count, lanes);
}

}  // namespace densenet_efficient::CPU_CAPABILITY
