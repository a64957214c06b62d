// The work of a call, which its threads share.
//
// In a phase, threads take items from a counter, so a thread that the system interrupts takes fewer of them. The next
// phase begins when all items are done, not when all threads have come: a thread that comes late takes part in the
// phase that it finds. So a core that another process keeps busy costs its share of the work and no more. A thread
// that waits for an item of another one sleeps after a moment.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

// The threads for an amount of work: one for some tenths of a millisecond, since others may take longer to come.
inline int threads_for(int64_t steps, int threads) { return steps < 100'000 ? 1 : threads; }

class Phases {
 public:
  explicit Phases(int64_t count) : phases_(new Phase[count]) {}

  // Every thread calls this for every phase, in order: body(item) runs once for each item below `count`. Returns when
  // all items are done. What they wrote can then be read.
  template <class Body>
  void run(int64_t number, int64_t count, Body body) {
    Phase& phase = phases_[number];
    int64_t own = 0;
    for (int64_t item; (item = phase.next.fetch_add(1, std::memory_order_relaxed)) < count; ++own) body(item);
    if (own && phase.done.fetch_add(own, std::memory_order_acq_rel) + own == count) {
      { const std::lock_guard<std::mutex> lock(mutex_); }  // no thread is between its test and its sleep
      changed_.notify_all();
      return;
    }
    auto all_done = [&] { return phase.done.load(std::memory_order_acquire) == count; };
    for (int i = 0; i < kTests; ++i) {
      if (all_done()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, all_done);
  }

 private:
  static constexpr int kTests = 1000;  // some 20 microseconds, as long as sleeping and waking take

  struct alignas(64) Phase {
    std::atomic<int64_t> next{0}, done{0};
  };

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }

  std::unique_ptr<Phase[]> phases_;
  std::mutex mutex_;
  std::condition_variable changed_;
};
