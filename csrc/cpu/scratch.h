// Memory of kernels: floats in whole cache lines, which hold anything until they are written.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace lcr_fast {

struct FreeAligned {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float[], FreeAligned>;

inline Floats new_floats(int64_t n) {
  constexpr size_t kLine = 64;
  const size_t bytes = (static_cast<size_t>(n) * sizeof(float) + kLine - 1) / kLine * kLine;
  void* p = std::aligned_alloc(kLine, std::max(bytes, kLine));
  if (p == nullptr) throw std::bad_alloc();
  return Floats(static_cast<float*>(p));
}

// Scratch of this thread, kept for its next task: fresh memory would fault in page by page.
inline float* thread_scratch(int64_t n) {
  thread_local Floats scratch;
  thread_local int64_t size = 0;
  if (size < n) {
    scratch = new_floats(n);
    size = n;
  }
  return scratch.get();
}

}  // namespace lcr_fast
