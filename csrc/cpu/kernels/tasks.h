// Tasks that threads take as they become free: a core that is slow or late for a while does not hold up the others.
// Which thread runs a task never shows: results are laid out by task.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace densenet_efficient::CPU_CAPABILITY {

// One thread's share: short runs of neighbouring tasks, so that a task may prepare the next one's memory.
class TaskRun {
 public:
  TaskRun(std::atomic<int64_t>& taken, int64_t count, int64_t length) : taken_(taken), count_(count), length_(length) {}

  // Whether there is another task; sets ``task`` to it.
  bool next(int64_t& task) {
    if (task_ == end_) {
      task_ = taken_.fetch_add(length_, std::memory_order_relaxed);
      end_ = task_ + length_;
    }
    task = task_++;
    return task < count_;
  }

 private:
  std::atomic<int64_t>& taken_;
  int64_t count_, length_, task_ = 0, end_ = 0;
};

// Calls function(TaskRun&) on every thread; it takes tasks 0 to count - 1 until there are none.
template <typename Function>
void parallel_tasks(int64_t count, Function function) {
  constexpr int64_t runs_of_a_thread = 8;
  const int64_t threads = std::min<int64_t>(count, at::in_parallel_region() ? 1 : at::get_num_threads());
  if (threads == 0) return;
  std::atomic<int64_t> taken{0};
  const int64_t length = std::max<int64_t>(1, count / (threads * runs_of_a_thread));
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) {
      TaskRun run(taken, count, length);
      function(run);
    }
  });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
