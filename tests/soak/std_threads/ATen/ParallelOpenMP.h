// In place of torch's header of this name: threads that ThreadSanitizer sees, which those of libgomp are not.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

#define INTRA_OP_PARALLEL

namespace at::internal {

template <typename F>
inline void invoke_parallel(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  int64_t count = at::get_num_threads();
  if (grain_size > 0) count = std::min(count, divup(end - begin, grain_size));
  const int64_t share = divup(end - begin, count);
  std::vector<std::exception_ptr> errors(count);
  std::vector<std::thread> threads;
  const auto run = [&](int64_t index) {
    const ThreadIdGuard guard(static_cast<int>(index));
    try {
      f(begin + index * share, std::min(end, begin + (index + 1) * share));
    } catch (...) {
      errors[index] = std::current_exception();
    }
  };
  for (int64_t index = 1; index < count && begin + index * share < end; index++) threads.emplace_back(run, index);
  run(0);  // as OpenMP's, in the calling thread: it may hold what others may not ask for, as Python's lock
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace at::internal
