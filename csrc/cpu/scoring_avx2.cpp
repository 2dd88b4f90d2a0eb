#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx2,fma")))
#define LCR_BYTES 32
#include "scoring_kernels.h"

namespace lcr_fast {

constexpr ScoringKernels kScoringAvx2 = kScoringTable;

}  // namespace lcr_fast
#endif
