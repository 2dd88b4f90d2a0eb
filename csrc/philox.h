// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
#pragma once
#include <cstdint>

namespace lcr_fast {

// Counters side by side in, words out: counter[w][lane] is word w of one lane's counter. Always
// inlined, so that the rounds are vectorised by the instructions of the function around them.
template <int kLanes>
[[gnu::always_inline]] inline void philox(uint32_t (&counter)[4][kLanes], uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = uint64_t{0xD2511F53} * counter[0][i];
      const uint64_t p1 = uint64_t{0xCD9E8D57} * counter[2][i];
      counter[0][i] = static_cast<uint32_t>(p1 >> 32) ^ counter[1][i] ^ key0;
      counter[2][i] = static_cast<uint32_t>(p0 >> 32) ^ counter[3][i] ^ key1;
      counter[1][i] = static_cast<uint32_t>(p1);
      counter[3][i] = static_cast<uint32_t>(p0);
    }
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

}  // namespace lcr_fast
