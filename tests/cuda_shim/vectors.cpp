// csrc/batch_norm.h on the compiler's own vectors, as the CPU kernels have them, against itself on numbers; test only.
#include <array>
#include <cmath>
#include <cstring>
#include <limits>

#include "batch_norm.h"

namespace {

using namespace densenet_efficient;

constexpr int kLanes = 8;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
constexpr Vector kOperands[] = {
    {1, -2, 0, kNaN, kInfinity, 3.5f, -0.25f, 1e3f},
    {-1, 2, 4, 1, 2, -kInfinity, 0.5f, 1},
    {0.5f, -0.5f, 0, 1, -1, 7, kNaN, -1e3f},
    {3, 1, 4, 1, 5, 9, 2, 6},
    {2, 7, 1, 8, 2, 8, 1, 8},
};

// Whether function(operands...) gives in every lane what it gives on the lanes alone.
template <typename Function>
bool agrees(Function function) {
  const auto [a, b, c, d, e] = std::to_array(kOperands);
  const Vector together = function(a, b, c, d, e);
  for (int lane = 0; lane < kLanes; lane++) {
    const float alone = function(a[lane], b[lane], c[lane], d[lane], e[lane]);
    if (!(together[lane] == alone || (std::isnan(together[lane]) && std::isnan(alone)))) return false;
  }
  return true;
}

}  // namespace

extern "C" bool vectors_agree_with_numbers() {
  return agrees([](auto a, auto b, auto c, auto, auto) { return affine(a, b, c); }) &&
         agrees([](auto a, auto, auto, auto, auto) { return relu(a); }) &&
         agrees([](auto a, auto b, auto, auto, auto) { return relu_mask(a, b); }) &&
         agrees([](auto a, auto b, auto c, auto d, auto e) { return projected(a, b, c, d, e); }) &&
         agrees([](auto a, auto b, auto c, auto d, auto) {
           add_deviations(a, b, c, d, 0.125f);
           return b;
         }) &&
         agrees([](auto a, auto b, auto c, auto d, auto) {
           merge_moments(a, b, 3.0f, c, d, 5.0f);
           return b;
         });
}
