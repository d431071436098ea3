#include "cpu/capability.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>

#include "cpu/gemm.h"

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace densenet_efficient {
namespace {

constexpr const char* kVariable = "DENSENET_EFFICIENT_CPU_CAPABILITY";
constexpr std::array kNames{"default", "avx2", "avx512", "avx512_bf16", "amx"};

#define QUALIFIED_CAPABILITY(capability, ...) Capability::capability,
constexpr std::array kCompiled{FOR_EACH_CPU_CAPABILITY(QUALIFIED_CAPABILITY)};
#undef QUALIFIED_CAPABILITY

std::string name_of(Capability capability) { return kNames[static_cast<std::size_t>(capability)]; }

#if defined(__x86_64__)
// Linux saves the tiles of a process that has asked for them; Linux before 5.16 does not know the request.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

bool cpu_supports(Capability capability) {
#if defined(__x86_64__)
  // The compiler's run-time library also asks whether the operating system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  switch (capability) {
    case Capability::AVX2:
      return avx2;
    case Capability::AVX512:
      return avx512;
    case Capability::AVX512_BF16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case Capability::AMX:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
             __builtin_cpu_supports("amx-bf16") && may_use_tiles();
    case Capability::DEFAULT:
      return true;
  }
#endif
  return capability == Capability::DEFAULT;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

Capability requested_capability(const std::string& request) {
  const auto found = std::ranges::find_if(kCompiled, [&](Capability c) { return name_of(c) == request; });
  TORCH_CHECK_VALUE(found != kCompiled.end(), kVariable, "='", request,
                    "' is not a CPU capability of this build: set it to one of ", join(compiled_cpu_capabilities()),
                    ", or unset it");
  TORCH_CHECK(cpu_supports(*found), kVariable, "='", request,
              "' is not supported by this CPU: set it to one that is, or unset it");
  return *found;
}

Capability choose_capability() {
  if (const char* request = std::getenv(kVariable)) return requested_capability(request);
  return *std::find_if(kCompiled.rbegin(), kCompiled.rend(), cpu_supports);
}

}  // namespace

Capability cpu_capability() {
  static const Capability capability = choose_capability();
  return capability;
}

Capability kernel_capability(c10::ScalarType dtype) {
  const Capability best = cpu_capability();
  const bool multiplies_it =
      dtype == c10::kBFloat16 || (dtype == c10::kHalf && best == Capability::AMX && multiplies_half());
  return multiplies_it ? best : std::min(best, Capability::AVX512);
}

std::string cpu_capability_name() { return name_of(cpu_capability()); }

std::vector<std::string> compiled_cpu_capabilities() {
  std::vector<std::string> names;
  for (const Capability capability : kCompiled) names.push_back(name_of(capability));
  return names;
}

}  // namespace densenet_efficient
