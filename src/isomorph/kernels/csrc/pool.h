// A persistent pool: parallel(n, f) runs f(begin, end) over chunks of [0, n) on all threads.
//
// Workers spin for a moment after each job, as decoding sends the next one within microseconds, then sleep. Where
// libgomp is already loaded (torch brings it) its team is borrowed instead, so that two pools never fight for a core.
#pragma once

#include <cstdint>
#include <functional>

namespace isomorph {

int thread_count();
void set_thread_count(int threads);
bool borrow_openmp();  // true when a loaded libgomp was found and is used from now on
const char* pool_name();

// `grain` is the smallest chunk; chunks are handed out dynamically, the largest first.
void parallel(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

// Per-thread scratch memory, 64-byte aligned, contents undefined, valid until the same thread asks for the same slot.
void* scratch(int slot, size_t bytes);

}  // namespace isomorph
