#include <ucontext.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"

namespace cuda_shim {
namespace {

constexpr size_t kStackSize = size_t{1} << 16;

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackSize);
  bool has_ended;
};

ucontext_t scheduler;
std::vector<Fiber> fibers;
const std::function<void()>* body_of_all;
size_t running;

void run_one() {
  (*body_of_all)();
  fibers[running].has_ended = true;
}

void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.data();
  fiber.context.uc_stack.ss_size = fiber.stack.size();
  fiber.context.uc_link = &scheduler;
  makecontext(&fiber.context, &run_one, 0);
  fiber.has_ended = false;
}

}  // namespace

void run_block(int threads, const std::function<void()>& body) {
  static std::minstd_rand generator(1);
  fibers.resize(threads);
  for (Fiber& fiber : fibers) start(fiber);
  body_of_all = &body;
  std::vector<size_t> order(threads);
  std::iota(order.begin(), order.end(), 0);
  for (long ended = 0; ended < threads;) {
    std::shuffle(order.begin(), order.end(), generator);
    for (const size_t thread : order) {
      running = thread;
      threadIdx = {static_cast<unsigned>(thread)};
      swapcontext(&scheduler, &fibers[thread].context);
    }
    ended = std::count_if(fibers.begin(), fibers.end(), [](const Fiber& fiber) { return fiber.has_ended; });
    if (ended != 0 && ended != threads) throw std::logic_error("a barrier is not reached by all threads of a block");
  }
}

void wait_for_block() {
  const size_t thread = running;
  swapcontext(&fibers[thread].context, &scheduler);
}

}  // namespace cuda_shim
