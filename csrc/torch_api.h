// The LibTorch stable ABI, and what all operators need of it.
//
// The checks in torch's headers write to streams, see check.h. They are macros, so they are
// replaced here, before the headers that use them; every other file includes this one instead.
#pragma once
#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "check.h"

// Null before torch 2.13, which writes the reason to standard error instead.
extern "C" [[gnu::weak]] const char* torch_exception_get_what_without_backtrace();

namespace lcr_fast {

[[noreturn]] inline void torch_failed() {
  const auto reason = torch_exception_get_what_without_backtrace;
  fail("torch failed in a C++ operator: ", reason ? reason() : "see standard error");
}

}  // namespace lcr_fast

#undef STD_TORCH_CHECK
#define STD_TORCH_CHECK(condition, ...) \
  if (!(condition)) {                   \
    ::lcr_fast::fail(__VA_ARGS__);      \
  }

#undef TORCH_ERROR_CODE_CHECK
#define TORCH_ERROR_CODE_CHECK(call) \
  if ((call) != TORCH_SUCCESS) {     \
    ::lcr_fast::torch_failed();      \
  }

#undef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <initializer_list>
#include <new>
#include <vector>

#include "parallel.h"

namespace lcr_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  return {t.sizes().begin(), t.sizes().end()};
}

inline bool has_sizes(const Tensor& t, std::initializer_list<int64_t> sizes) {
  return std::equal(t.sizes().begin(), t.sizes().end(), sizes.begin(), sizes.end());
}

inline Tensor zeros_like(const Tensor& t) { return torch::stable::new_zeros(t, sizes_of(t)); }

// torch's threads as a Parallel. An exception would lose its message on its way through torch's C
// functions, so the first one waits here until all tasks are over.
inline void parallel(int64_t n_tasks, const Task& task) {
  std::atomic_flag failed;
  std::exception_ptr first;
  torch::stable::parallel_for(0, n_tasks, 1, [&](int64_t begin, int64_t end) {
    try {
      task(begin, end);
    } catch (...) {
      if (!failed.test_and_set()) first = std::current_exception();
    }
  });
  if (!first) return;
  try {
    std::rethrow_exception(first);
  } catch (const std::bad_alloc&) {
    fail("the memory does not suffice for the intermediate results");
  }
}

}  // namespace lcr_fast
