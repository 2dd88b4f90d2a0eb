#include "../noise.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../philox.h"

namespace lcr_fast {
namespace {

constexpr int kLanes = 8;  // counters side by side, so that the compiler vectorises the rounds

// One function for several instruction sets, where the dynamic linker can choose.
#if defined(__x86_64__) && defined(__GLIBC__)
#define LCR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define LCR_CLONES
#endif

// The words of the counters (first, first + 1, ...; position, source, row).
LCR_CLONES void words_from(uint32_t first, uint32_t position, uint32_t source, uint32_t row,
                           uint64_t seed, uint32_t (&words)[4][kLanes]) {
  uint32_t counter[4][kLanes];
  for (uint32_t i = 0; i < kLanes; ++i) {
    counter[0][i] = first + i;
    counter[1][i] = position;
    counter[2][i] = source;
    counter[3][i] = row;
  }
  philox(counter, seed);
  std::memcpy(words, counter, sizeof words);
}

constexpr float kTwoPi = 6.28318530717958647692f;

// The top 23 bits, centred in their cell: in (0, 1) and exact in float32.
float uniform(uint32_t word) { return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f; }

void box_muller(uint32_t a, uint32_t b, float* out) {
  const float radius = std::sqrt(-2.0f * std::log(uniform(a)));
  const float angle = kTwoPi * uniform(b);
  out[0] = radius * std::cos(angle);
  out[1] = radius * std::sin(angle);
}

}  // namespace

void normal_noise_rows(uint64_t seed, int64_t row, int64_t trajectory, int64_t stream,
                       int64_t length, int64_t dim, float* out, int64_t out_row) {
  const auto source = static_cast<uint32_t>(2 * trajectory + stream);
  for (int64_t position = 0; position < length; ++position, out += out_row) {
    for (int64_t d = 0; d < dim; d += 4) {
      // One counter at a time: its rounds hide behind the logarithms of the one before.
      uint32_t words[4][1] = {{static_cast<uint32_t>(d / 4)},
                              {static_cast<uint32_t>(position)},
                              {source},
                              {static_cast<uint32_t>(row)}};
      philox(words, seed);
      float quad[4];
      box_muller(words[0][0], words[1][0], quad);
      box_muller(words[2][0], words[3][0], quad + 2);
      std::copy_n(quad, std::min<int64_t>(4, dim - d), out + d);
    }
  }
}

void normal_noise_cpu(const NoiseArgs& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block)
    normal_noise_rows(args.seed, args.rows[block / args.n_trajectories],
                      block % args.n_trajectories, args.stream, args.length, args.dim,
                      args.out + block * args.length * args.dim, args.dim);
}

void dropout_mask_rows(const DropoutKey& key, int64_t row, int64_t site, int64_t length,
                       int64_t dim, float* out, int64_t out_row) {
  constexpr int64_t kPerCall = 8 * kLanes;
  const float kept = keep_scale(key.threshold);
  uint32_t words[4][kLanes];
  float block[kPerCall];
  for (int64_t position = 0; position < length; ++position, out += out_row) {
    for (int64_t d = 0; d < dim; d += kPerCall) {
      words_from(static_cast<uint32_t>(d / 8), static_cast<uint32_t>(position), site_word(site),
                 static_cast<uint32_t>(row), key.seed, words);
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int w = 0; w < 4; ++w) {
          const uint32_t word = words[w][lane];
          block[8 * lane + 2 * w] = (word & 0xFFFF) >= key.threshold ? kept : 0.0f;
          block[8 * lane + 2 * w + 1] = (word >> 16) >= key.threshold ? kept : 0.0f;
        }
      }
      std::copy_n(block, std::min<int64_t>(kPerCall, dim - d), out + d);
    }
  }
}

void dropout_masks_cpu(const DropoutArgs& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    dropout_mask_rows(args.key, args.rows[b % args.n_rows], args.first_site + b / args.n_rows,
                      args.length, args.dim, args.out + b * args.length * args.dim, args.dim);
}

}  // namespace lcr_fast
