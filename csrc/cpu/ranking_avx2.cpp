#if defined(__x86_64__)
#define LCR_TARGET __attribute__((target("avx2,fma")))
#define LCR_BYTES 32
#include "ranking_scan.h"

namespace lcr_fast {

constexpr RankingKernels kRankingAvx2 = {kCount<Float32>,  kCount<Float64>, kCount<Float16>,
                                         kCount<BFloat16>, dots<float>,     dots<double>};

}  // namespace lcr_fast
#endif
