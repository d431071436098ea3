#include <torch/library.h>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace densenet_efficient {
namespace {

// Gives back to the system what was freed. Of itself the GNU C library keeps blocks of up to 32 MiB for as long as
// anything that lies behind them lives.
void return_freed_memory() {
#if defined(__GLIBC__)
  malloc_trim(0);
#endif
}

}  // namespace

TORCH_LIBRARY_IMPL(densenet_efficient, CompositeExplicitAutograd, library) {
  library.impl("return_freed_memory", &return_freed_memory);
}

}  // namespace densenet_efficient
