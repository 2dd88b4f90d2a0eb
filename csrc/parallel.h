// How torch-free kernels split their work over threads.
#pragma once
#include <cstdint>
#include <functional>

namespace lcr_fast {

// `parallel(n_tasks, task)` calls task(begin, end) over all of 0..n_tasks-1, on any threads; the
// results do not depend on how it splits.
using Task = std::function<void(int64_t begin, int64_t end)>;
using Parallel = std::function<void(int64_t n_tasks, const Task& task)>;

}  // namespace lcr_fast
