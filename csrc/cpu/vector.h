// Vectors of 64 bytes in the accumulation type, loaded from and stored to any storage type.
//
// They are the compiler's own vector types: one source serves every capability, and the compiler splits them where
// the registers are narrower. Conversions that the compiler would spell out badly use the capability's instructions.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

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

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(64)));
};
template <typename A>
using Vector = typename VectorOf<A>::type;

template <typename A>
constexpr int64_t kLanes = 64 / sizeof(A);

namespace detail {
typedef uint16_t Words __attribute__((vector_size(32)));
typedef uint32_t DoubleWords __attribute__((vector_size(64)));

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
  const auto* halves = reinterpret_cast<const __m128i*>(from);
  const __m256 parts[2] = {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  Vector<float> value;
  std::memcpy(&value, parts, sizeof(value));
  return value;
#else
  Vector<float> value;
  for (int64_t i = 0; i < kLanes<float>; i++) value[i] = static_cast<float>(from[i]);
  return value;
#endif
}

ALWAYS_INLINE void store(float* to, Vector<float> value) { std::memcpy(to, &value, sizeof(value)); }
ALWAYS_INLINE void store(double* to, Vector<double> value) { std::memcpy(to, &value, sizeof(value)); }

// The sixteen bfloat16 nearest to ``value``, ties to even; NaN stays NaN.
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
  __m256 parts[2];
  std::memcpy(parts, &value, sizeof(value));
  const __m128i halves[2] = {_mm256_cvtps_ph(parts[0], _MM_FROUND_TO_NEAREST_INT),
                             _mm256_cvtps_ph(parts[1], _MM_FROUND_TO_NEAREST_INT)};
  std::memcpy(to, halves, sizeof(halves));
#else
  for (int64_t i = 0; i < kLanes<float>; i++) to[i] = static_cast<Half>(value[i]);
#endif
}

// ---- the first ``count`` lanes; the rest is zero, and neither read nor written

#if defined(CPU_CAPABILITY_AVX512)
namespace detail {
// By masks: a memcpy whose size is known only at run time is a call.
template <typename T>
ALWAYS_INLINE auto load_lanes(const T* from, uint32_t mask) {
  if constexpr (sizeof(T) == 8) {
    return _mm512_maskz_loadu_epi64(static_cast<__mmask8>(mask), from);
  } else if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), from);
  } else {
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), from);
  }
}

template <typename T>
ALWAYS_INLINE void store_lanes(T* to, uint32_t mask, const T* lanes) {
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(mask), _mm512_loadu_si512(lanes));
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(mask), _mm512_loadu_si512(lanes));
  } else {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    _mm256_mask_storeu_epi16(to, static_cast<__mmask16>(mask), words);
  }
}
}  // namespace detail
#endif

template <typename A, typename T>
ALWAYS_INLINE Vector<A> load(const T* from, int64_t count) {
  if (count >= kLanes<A>) return load<A>(from);
  alignas(64) T padded[kLanes<A>] = {};
#if defined(CPU_CAPABILITY_AVX512)
  const auto lanes = detail::load_lanes(from, (1u << count) - 1);
  std::memcpy(padded, &lanes, sizeof(lanes));
#else
  std::memcpy(padded, from, count * sizeof(T));
#endif
  return load<A>(static_cast<const T*>(padded));
}

template <typename T, typename V>
ALWAYS_INLINE void store(T* to, V value, int64_t count) {
  constexpr int64_t lanes = sizeof(V) / sizeof(value[0]);
  if (count >= lanes) return store(to, value);
  alignas(64) T padded[lanes];
  store(static_cast<T*>(padded), value);
#if defined(CPU_CAPABILITY_AVX512)
  detail::store_lanes(to, (1u << count) - 1, padded);
#else
  std::memcpy(to, padded, count * sizeof(T));
#endif
}

// ---- arithmetic

// max(value, 0) that keeps NaN.
template <typename V>
ALWAYS_INLINE V relu(V value) {
  return value < 0 ? V{} : value;
}

// ``gradient`` where the ReLU's ``activation`` let it pass: not where activation <= 0, so NaN passes.
template <typename V>
ALWAYS_INLINE V relu_mask(V activation, V gradient) {
  return activation <= 0 ? V{} : gradient;
}

}  // namespace densenet_efficient::CPU_CAPABILITY
