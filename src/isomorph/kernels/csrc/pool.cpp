#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#include <unistd.h>

#include <cstring>
#include <string>
#else
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace isomorph {
namespace {

inline void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t size;
  int64_t grain;
  int64_t threads;
  std::atomic<int64_t> next{0};

  // Chunks shrink as the work does: long streams first, and all threads done at the same time.
  void work() {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < size) {
      const int64_t end = std::min(size, begin + std::max(grain, (size - begin) / (4 * threads)));
      if (!next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      (*body)(begin, end);
      begin = next.load(std::memory_order_relaxed);
    }
  }
};

constexpr auto kSpin = std::chrono::microseconds(60);

class Pool {
 public:
  explicit Pool(int workers) : owner_(getpid()) {
    for (int i = 0; i < workers; ++i) threads_.emplace_back([this] { loop(); });
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  int workers() const { return int(threads_.size()); }
  bool inherited() const { return owner_ != getpid(); }  // threads do not survive fork

  void run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      pending_.store(workers(), std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load() > 0) wake_.notify_all();
    job.work();
    const auto deadline = std::chrono::steady_clock::now() + kSpin;
    for (int spins = 1; pending_.load() > 0; ++spins) {
      pause_briefly();
      if (spins % 64 == 0 && std::chrono::steady_clock::now() > deadline) {  // its core may be busy with other things
        std::unique_lock<std::mutex> lock(mutex_);
        waiting_.store(true);
        done_.wait(lock, [&] { return pending_.load() == 0; });
        waiting_.store(false);
      }
    }
  }

 private:
  void loop() {
    uint64_t seen = 0;
    for (;;) {
      auto deadline = std::chrono::steady_clock::now() + kSpin;
      for (int spins = 1; generation_.load(std::memory_order_acquire) == seen; ++spins) {
        pause_briefly();
        if (spins % 64 == 0 && std::chrono::steady_clock::now() > deadline) {
          std::unique_lock<std::mutex> lock(mutex_);
          sleeping_.fetch_add(1);
          wake_.wait(lock, [&] { return generation_.load() != seen; });
          sleeping_.fetch_sub(1);
        }
      }
      seen = generation_.load(std::memory_order_acquire);
      if (stop_) return;
      job_->work();
      if (pending_.fetch_sub(1) == 1 && waiting_.load()) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> stop_{false}, waiting_{false};
  Job* job_ = nullptr;
  pid_t owner_;
};

int default_threads() {
  if (const char* set = std::getenv("ISOMORPH_NUM_THREADS")) {
    int value = std::atoi(set);
    if (value > 0) return std::min(value, 1024);
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

std::mutex g_run;
int g_threads = default_threads();
Pool* g_pool = nullptr;  // leaked at exit: joining threads in static destructors may hang

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel g_gomp = nullptr;

Pool& pool(int workers) {
  if (g_pool && !g_pool->inherited() && g_pool->workers() != workers) {
    delete g_pool;
    g_pool = nullptr;
  }
  if (!g_pool || g_pool->inherited()) g_pool = new Pool(workers);
  return *g_pool;
}

}  // namespace

int thread_count() { return g_threads; }

void set_thread_count(int threads) {
  std::lock_guard<std::mutex> lock(g_run);
  g_threads = std::max(1, std::min(threads, 1024));
}

bool borrow_openmp() {
#if defined(__linux__)
  if (g_gomp) return true;
  std::string path;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* found) {
        const char* base = std::strrchr(info->dlpi_name, '/');
        if (base && std::strncmp(base, "/libgomp", 8) == 0) *static_cast<std::string*>(found) = info->dlpi_name;
        return 0;
      },
      &path);
  if (path.empty()) return false;
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) return false;
  std::lock_guard<std::mutex> lock(g_run);
  g_gomp = reinterpret_cast<GompParallel>(dlsym(library, "GOMP_parallel"));
#endif
  return g_gomp != nullptr;
}

const char* pool_name() { return g_gomp ? "libgomp" : "own"; }

void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(1, grain);
  std::unique_lock<std::mutex> lock(g_run, std::try_to_lock);
  // A second caller (or a single thread) works alone rather than waiting for the pool.
  if (!lock.owns_lock() || g_threads == 1 || n <= grain) {
    body(0, n);
    return;
  }
  Job job{&body, n, grain, g_threads};
  if (g_gomp) {
    g_gomp([](void* data) { static_cast<Job*>(data)->work(); }, &job, unsigned(g_threads), 0);
  } else {
    pool(g_threads - 1).run(job);
  }
}

void* scratch(int slot, size_t bytes) {
  struct Buffer {
    void* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  thread_local Buffer buffers[12];
  Buffer& buffer = buffers[slot];
  bytes = (bytes + 4095) / 4096 * 4096;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.data = std::aligned_alloc(64, bytes);
    buffer.size = buffer.data ? bytes : 0;
    if (!buffer.data) throw std::bad_alloc();
  }
  return buffer.data;
}

}  // namespace isomorph
