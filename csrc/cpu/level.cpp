#include <cstdlib>
#include <string_view>

#include "../check.h"
#include "../cpu_level.h"

namespace lcr_fast {
namespace {

CpuLevel best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuLevel::kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return CpuLevel::kAvx2;
  return __builtin_cpu_supports("avx512bf16") ? CpuLevel::kAvx512Bf16 : CpuLevel::kAvx512;
#else
  return CpuLevel::kBaseline;
#endif
}

CpuLevel level_named(std::string_view name) {
  if (name == "baseline") return CpuLevel::kBaseline;
  if (name == "avx2") return CpuLevel::kAvx2;
  if (name == "avx512") return CpuLevel::kAvx512;
  if (name == "avx512bf16") return CpuLevel::kAvx512Bf16;
  fail("LCR_FAST_CPU must be baseline, avx2, avx512 or avx512bf16");
}

CpuLevel choose_level() {
  const char* wanted = std::getenv("LCR_FAST_CPU");
  if (wanted == nullptr || *wanted == '\0') return best_level();
  const CpuLevel level = level_named(wanted);
  check(level <= best_level(), "LCR_FAST_CPU names instructions that this CPU does not have");
  return level;
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = choose_level();
  return level;
}

}  // namespace lcr_fast
