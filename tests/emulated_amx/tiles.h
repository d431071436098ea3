// AMX's tiles in AVX-512: stand in for the compiler's intrinsics where this is included before a kernel's source.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated_amx {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

// The tiles of a thread. A program may use them between configuration and release only.
struct Tiles {
  bool configured = false;
  alignas(kRowBytes) char bytes[kTiles][kRows][kRowBytes];
};

inline thread_local Tiles tiles;

inline void check(bool condition, const char* message) {
  if (condition) return;
  std::fprintf(stderr, "emulated AMX: %s\n", message);
  std::abort();
}

inline void configure(const void* configuration) {
  const auto* bytes = static_cast<const uint8_t*>(configuration);
  check(bytes[0] == 1, "palette 1 expected");
  for (int tile = 0; tile < kTiles; tile++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * tile, sizeof(row_bytes));
    check(row_bytes == kRowBytes && bytes[48 + tile] == kRows, "whole tiles expected");
  }
  tiles.configured = true;
  std::memset(tiles.bytes, 0, sizeof(tiles.bytes));
}

inline void release() {
  tiles.configured = false;
  std::memset(tiles.bytes, 0xff, sizeof(tiles.bytes));  // NaN
}

inline char (&tile(int number)) [kRows][kRowBytes] {
  check(tiles.configured, "a tile is used that is not configured");
  return tiles.bytes[number];
}

inline void load(int number, const void* base, int64_t stride) {
  for (int row = 0; row < kRows; row++) {
    std::memcpy(tile(number)[row], static_cast<const char*>(base) + row * stride, kRowBytes);
  }
}

inline void store(int number, void* base, int64_t stride) {
  for (int row = 0; row < kRows; row++) {
    std::memcpy(static_cast<char*>(base) + row * stride, tile(number)[row], kRowBytes);
  }
}

inline void zero(int number) { std::memset(tile(number), 0, kRows * kRowBytes); }

// TDPBF16PS: pairs of bfloat16 in a row of A times pairs of columns of B.
inline void multiply(int sums, int a, int b) {
  for (int row = 0; row < kRows; row++) {
    __m512 sum = _mm512_load_ps(tile(sums)[row]);
    for (int pair = 0; pair < kRows; pair++) {
      int32_t left;
      std::memcpy(&left, tile(a)[row] + pair * sizeof(left), sizeof(left));
      const __m512i right = _mm512_load_si512(tile(b)[pair]);
      sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(left), (__m512bh)right);
    }
    _mm512_store_ps(tile(sums)[row], sum);
  }
}

}  // namespace emulated_amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_amx::configure
#define _tile_release emulated_amx::release
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_zero emulated_amx::zero
#define _tile_dpbf16ps emulated_amx::multiply
