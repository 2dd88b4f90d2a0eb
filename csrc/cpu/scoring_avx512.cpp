#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))
#define LCR_BYTES 64
#include "scoring_kernels.h"

namespace lcr_fast {

constexpr ScoringKernels kScoringAvx512 = kScoringTable;

}  // namespace lcr_fast
#endif
