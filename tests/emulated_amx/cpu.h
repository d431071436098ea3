// A CPU with AMX, and a system that saves its tiles, for csrc/cpu/capability.cpp where this is included before it.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <string_view>

#define __builtin_cpu_supports(feature) \
  (std::string_view(feature).starts_with("amx") || __builtin_cpu_supports(feature))
#define syscall(...) 0  // the request for tiles
