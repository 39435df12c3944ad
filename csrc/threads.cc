#include "fedcodec/threads.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#include "fedcodec/float_env.h"

namespace fedcodec {
namespace {

// A thread that the system holds up delays the others by one range.
constexpr uint64_t kRangesPerThread = 4;

// --- how many threads
// ----------------------------------------------------------------------------------------------

// 0 if it is not a number from 1 to kMostThreads; a list counts by its first number.
size_t to_count(const char* text, bool list) {
  char* end = nullptr;
  const unsigned long n = std::strtoul(text, &end, 10);
  const bool digits = *text >= '0' && *text <= '9' && (*end == '\0' || (list && *end == ','));
  return digits && n <= kMostThreads ? n : 0;
}

size_t usable_processors() {
#if defined(__linux__)
  cpu_set_t usable;
  if (sched_getaffinity(0, sizeof(usable), &usable) == 0)
    return static_cast<size_t>(CPU_COUNT(&usable));
#endif
  return std::thread::hardware_concurrency();
}

size_t default_count() {
  if (const char* ours = std::getenv("FEDCODEC_NUM_THREADS"); ours != nullptr && *ours != '\0') {
    if (const size_t n = to_count(ours, false)) return n;
    throw std::invalid_argument("FEDCODEC_NUM_THREADS must be a number from 1 to " +
                                std::to_string(kMostThreads) + ", not '" + ours + "'");
  }
  if (const char* everyones = std::getenv("OMP_NUM_THREADS")) {
    if (const size_t n = to_count(everyones, true)) return n;
  }
  return std::clamp<size_t>(usable_processors(), 1, kMostThreads);
}

std::atomic<size_t> count_set = 0;

// --- the pool
// ------------------------------------------------------------------------------------------------------

thread_local bool in_range = false;

class Job {
 public:
  Job(const Ranges& ranges, RangeBody body) : ranges_(ranges), body_(body) {}

  // Runs ranges until none is left.
  void run() {
    in_range = true;
    for (;;) {
      const uint64_t begin = next_.fetch_add(ranges_.length);
      if (begin >= ranges_.n) break;
      try {
        body_(begin, std::min(ranges_.n, begin + ranges_.length));
      } catch (...) {
        fail(begin);
      }
    }
    in_range = false;
  }

  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

  // The pool's, under its lock.
  size_t wanted = 0;  // threads that may still join
  size_t inside = 0;  // threads that have joined and not left
  std::condition_variable left;
  Job* next = nullptr;  // of those that threads may join

 private:
  // Ranges are dealt from the lowest on, so all below one that fails are dealt already.
  void fail(uint64_t begin) {
    const std::lock_guard lock(failing_);
    if (failure_ && begin > failed_) return;
    failed_ = begin;
    failure_ = std::current_exception();
    next_ = ranges_.n;
  }

  const Ranges& ranges_;
  const RangeBody body_;
  std::atomic<uint64_t> next_ = 0;
  std::mutex failing_;
  uint64_t failed_ = 0;
  std::exception_ptr failure_;
};

class Pool {
 public:
  // Runs the job on this thread and on as many others as are free, `count` in all at most.
  void run(Job& job, size_t count) {
    std::unique_lock lock(mutex_);
    ++active_;
    const size_t helpers = active_ < count ? count - active_ : 0;
    job.wanted = helpers;
    active_ += helpers;
    if (helpers > 0) job.next = std::exchange(jobs_, &job);
    while (threads_ < helpers && start_thread()) ++threads_;
    lock.unlock();
    for (size_t i = 0; i < helpers; ++i) wake_.notify_one();
    job.run();
    lock.lock();
    if (job.wanted > 0) close(job);
    job.left.wait(lock, [&] { return job.inside == 0; });
    active_ -= 1 + helpers;
  }

 private:
  // False if the system has no more threads to give: then fewer do the work.
  bool start_thread() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the application's threads'
    bool started = true;
    try {
      std::thread([this] { work(); }).detach();
    } catch (const std::exception&) {
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  void work() {
    const DefaultFloatEnv env;
    std::unique_lock lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return jobs_ != nullptr; });
      Job& job = *jobs_;
      ++job.inside;
      if (--job.wanted == 0) close(job);
      lock.unlock();
      job.run();
      lock.lock();
      if (--job.inside == 0) job.left.notify_one();
    }
  }

  void close(Job& job) {
    Job** at = &jobs_;
    while (*at != &job) at = &(*at)->next;
    *at = job.next;
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  Job* jobs_ = nullptr;  // that threads may join, the newest first
  size_t threads_ = 0;
  size_t active_ = 0;  // callers, and threads that they count on
};

// Never destroyed: threads sleep in it until the process ends. A forked process has none of them
// and begins anew. Null where there is no memory for one.
std::atomic<Pool*> pool = nullptr;

Pool* the_pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { pool = nullptr; });
  static_cast<void>(registered);
  if (Pool* const existing = pool) return existing;
  auto made = std::unique_ptr<Pool>(new (std::nothrow) Pool);
  Pool* other = nullptr;
  return pool.compare_exchange_strong(other, made.get()) ? made.release() : other;
}

}  // namespace

size_t thread_count() {
  if (const size_t n = count_set) return n;
  size_t none = 0;
  const size_t n = default_count();
  return count_set.compare_exchange_strong(none, n) ? n : none;
}

void set_thread_count(size_t n) { count_set = std::clamp<size_t>(n, 1, kMostThreads); }

Ranges cut_ranges(uint64_t n, uint64_t step, uint64_t least) {
  const size_t threads = n < 2 * least || in_range ? 1 : thread_count();
  if (threads == 1) return {n, std::max<uint64_t>(n, 1)};
  const uint64_t length = std::max(n / (kRangesPerThread * threads) + 1, least);
  Ranges ranges = {n, ((length - 1) / step + 1) * step};
  ranges.threads = static_cast<size_t>(std::min<uint64_t>(threads, ranges.count()));
  return ranges;
}

void run_ranges(const Ranges& ranges, RangeBody body) {
  if (ranges.count() == 1) return body(0, ranges.n);
  Job job(ranges, body);
  Pool* const threads = ranges.threads > 1 ? the_pool() : nullptr;
  threads != nullptr ? threads->run(job, ranges.threads) : job.run();
  job.rethrow();
}

}  // namespace fedcodec
