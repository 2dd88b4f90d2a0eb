#include "../noise.h"

#include <algorithm>
#include <cmath>

#include "../philox.h"

namespace lcr_fast {
namespace {

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
      const Words words = philox({static_cast<uint32_t>(d / 4), static_cast<uint32_t>(position),
                                  source, static_cast<uint32_t>(row)},
                                 seed);
      float quad[4];
      box_muller(words[0], words[1], quad);
      box_muller(words[2], words[3], quad + 2);
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

namespace {

constexpr int kLanes = 8;  // counters side by side, so that the compiler vectorises the rounds

// Philox for the counters (first, first + 1, ..., position, site, row).
__attribute__((target_clones("avx512f", "avx2", "default"))) void philox_lanes(
    uint32_t first, uint32_t position, uint32_t site, uint32_t row, uint64_t seed,
    uint32_t (&words)[4][kLanes]) {
  uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    c0[i] = first + static_cast<uint32_t>(i);
    c1[i] = position;
    c2[i] = site;
    c3[i] = row;
  }
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = uint64_t{kPhiloxMultiplier0} * c0[i];
      const uint64_t p1 = uint64_t{kPhiloxMultiplier1} * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ key0;
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ key1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  std::copy_n(c0, kLanes, words[0]);
  std::copy_n(c1, kLanes, words[1]);
  std::copy_n(c2, kLanes, words[2]);
  std::copy_n(c3, kLanes, words[3]);
}

}  // namespace

void dropout_mask_rows(uint64_t seed, int64_t row, int64_t site, uint32_t threshold, int64_t length,
                       int64_t dim, float* out, int64_t out_row) {
  constexpr uint32_t kDropoutSites = uint32_t{1} << 31;
  constexpr int64_t kPerCall = 8 * kLanes;
  const float kept = 65536.0f / static_cast<float>(65536 - threshold);
  uint32_t words[4][kLanes];
  float block[kPerCall];
  for (int64_t position = 0; position < length; ++position, out += out_row) {
    for (int64_t d = 0; d < dim; d += kPerCall) {
      philox_lanes(static_cast<uint32_t>(d / 8), static_cast<uint32_t>(position),
                   kDropoutSites + static_cast<uint32_t>(site), static_cast<uint32_t>(row), seed,
                   words);
      for (int lane = 0; lane < kLanes; ++lane) {
        for (int w = 0; w < 4; ++w) {
          const uint32_t word = words[w][lane];
          block[8 * lane + 2 * w] = (word & 0xFFFF) >= threshold ? kept : 0.0f;
          block[8 * lane + 2 * w + 1] = (word >> 16) >= threshold ? kept : 0.0f;
        }
      }
      std::copy_n(block, std::min<int64_t>(kPerCall, dim - d), out + d);
    }
  }
}

void dropout_masks_cpu(const DropoutArgs& args, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b)
    dropout_mask_rows(args.seed, args.rows[b % args.n_rows], args.first_site + b / args.n_rows,
                      args.threshold, args.length, args.dim, args.out + b * args.length * args.dim,
                      args.dim);
}

}  // namespace lcr_fast
