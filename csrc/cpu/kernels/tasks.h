// Tasks that threads take as they become free: a core that is slow or late for a while does not hold up the others.
// Which thread runs a task never shows: results are laid out by task.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace densenet_efficient::CPU_CAPABILITY {

// How far the tasks of one thread's share are taken, on a cache line of its own.
struct alignas(64) Share {
  std::atomic<int64_t> taken;
  int64_t end;
};

// What one thread takes: its own share from the front, then what the others have left of theirs. So a thread finds the
// same part of an image in its cache as in the operation before. Short runs of neighbouring tasks, so that a task may
// prepare the next one's memory.
class TaskRun {
 public:
  TaskRun(Share* shares, int64_t threads, int64_t thread, int64_t length)
      : shares_(shares), threads_(threads), length_(length), thread_(thread) {}

  // Whether there is another task; sets ``task`` to it.
  bool next(int64_t& task) {
    for (; task_ == end_ && visited_ < threads_; visited_++, thread_ = (thread_ + 1) % threads_) {
      Share& share = shares_[thread_];
      task_ = share.taken.fetch_add(length_, std::memory_order_relaxed);
      end_ = std::min(task_ + length_, share.end);
      if (task_ < end_) break;
      task_ = end_;
    }
    if (task_ == end_) return false;
    task = task_++;
    return true;
  }

 private:
  Share* shares_;
  int64_t threads_, length_, thread_, visited_ = 0, task_ = 0, end_ = 0;
};

// Calls function(TaskRun&) on every thread; it takes tasks 0 to count - 1 until there are none. One task too runs among
// several threads where there are: alone, torch's products would take these for themselves, and have other bits.
template <typename Function>
void parallel_tasks(int64_t count, Function function) {
  constexpr int64_t runs_of_a_thread = 8;
  if (count == 0) return;
  const int64_t most = std::max<int64_t>(count, 2);
  const int64_t threads = std::min<int64_t>(most, at::in_parallel_region() ? 1 : at::get_num_threads());
  std::vector<Share> shares(threads);
  for (int64_t thread = 0; thread < threads; thread++) {
    shares[thread].taken = count * thread / threads;
    shares[thread].end = count * (thread + 1) / threads;
  }
  const int64_t length = std::max<int64_t>(1, count / (threads * runs_of_a_thread));
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++) {
      TaskRun run(shares.data(), threads, thread, length);
      function(run);
    }
  });
}

}  // namespace densenet_efficient::CPU_CAPABILITY
