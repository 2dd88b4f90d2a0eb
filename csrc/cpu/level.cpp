#include <cstdlib>
#include <cstring>

#include "../cpu_level.h"

namespace lcr_fast {
namespace {

int64_t choose_level() {
  int64_t best = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = 1;
  if (best == 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = 2;
  if (best == 2 && __builtin_cpu_supports("avx512bf16")) best = 3;
#endif
  const char* wanted = std::getenv("LCR_FAST_CPU");
  if (wanted == nullptr || *wanted == '\0') return best;
  const char* const names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  for (int64_t level = 0; level < 4; ++level)
    if (std::strcmp(wanted, names[level]) == 0) return level <= best ? level : -2;
  return -1;
}

}  // namespace

int64_t cpu_level() {
  static const int64_t level = choose_level();
  return level;
}

}  // namespace lcr_fast
