// Instructions on tiles that the lanes of a warp, or of four, hold together.
//
// Fragments are those of the PTX manual: of a 16 x 16 tile of halves lane l has rows l / 4 and
// l / 4 + 8, and columns 2 (l % 4) + {0, 1, 8, 9}. Sums are exact, and rounded once.
#pragma once

#include "arithmetic.h"
#include "memory.h"

namespace ptx {

constexpr int fragment_row(int l, int n) { return l / 4 + 8 * (n >> 1 & 1); }
constexpr int fragment_column(int l, int n) { return 8 * (n / 4) + 2 * (l % 4) + (n & 1); }

template <int N, bool kTransposed>
void load_matrix(Warp& w, const Instruction& i) {  // N registers, base, offset
  w.require_every_lane("ldmatrix");
  Machine& m = *w.machine;
  uint64_t base[kLanes], address[8];
  std::memcpy(base, w.lanes(i.operand[N]), sizeof base);
  for (int n = 0; n < N; ++n) {
    uint16_t tile[8][8];
    for (int row = 0; row < 8; ++row) {
      address[row] = uint32_t(base[8 * n + row] + i.operand[N + 1]);
      std::memcpy(tile[row], m.shared_at(uint32_t(address[row]), 16), 16);
      m.touch_shared(uint32_t(address[row]), 16, {w.index, 8 * n + row, false, false});
    }
    count_passes(w, address, 16, 8);
    uint64_t* d = w.lanes(i.operand[n]);
    PTX_EACH_LANE(l) {
      int row = l / 4, column = 2 * (l % 4);
      uint32_t low = kTransposed ? tile[column][row] : tile[row][column];
      uint32_t high = kTransposed ? tile[column + 1][row] : tile[row][column + 1];
      d[l] = high << 16 | low;
    }
  }
}

template <int N, bool kTransposed>
void store_matrix(Warp& w, const Instruction& i) {  // base, offset, N registers
  w.require_every_lane("stmatrix");
  Machine& m = *w.machine;
  uint64_t address[8];
  for (int n = 0; n < N; ++n) {
    uint16_t tile[8][8];
    const uint64_t* a = w.lanes(i.operand[2 + n]);
    PTX_EACH_LANE(l) {
      int row = l / 4, column = 2 * (l % 4);
      (kTransposed ? tile[column][row] : tile[row][column]) = uint16_t(a[l]);
      (kTransposed ? tile[column + 1][row] : tile[row][column + 1]) = uint16_t(a[l] >> 16);
    }
    for (int row = 0; row < 8; ++row) {
      address[row] = uint32_t(w.lanes(i.operand[0])[8 * n + row] + i.operand[1]);
      auto* values = reinterpret_cast<uint8_t*>(tile[row]);
      uint8_t* to = m.shared_at(uint32_t(address[row]), 16);
      m.touch_shared(uint32_t(address[row]), 16, {w.index, 8 * n + row, true, false}, values);
      std::memcpy(to, values, 16);
    }
    count_passes(w, address, 16, 8);
  }
}

// A's tile, of 16 rows and 32 bytes, from four registers.
template <class H>
void read_a(Warp& w, const int* operand, float a[16][16]) {
  for (int n = 0; n < 4; ++n) {
    const uint64_t* s = w.lanes(operand[n]);
    for (int l = 0; l < kLanes; ++l) {
      int row = l / 4 + 8 * (n & 1);
      if constexpr (sizeof(H) == 4) {
        a[row][l % 4 + 4 * (n >> 1)] = to_float(as<H>(s[l]));
      } else {
        for (int half = 0; half < 2; ++half) {
          a[row][2 * (l % 4) + 8 * (n >> 1) + half] = to_float(as<H>(s[l] >> (16 * half)));
        }
      }
    }
  }
}

template <class H>
void read_b(Warp& w, const int* operand, float b[16][8]) {
  for (int n = 0; n < 2; ++n) {
    const uint64_t* s = w.lanes(operand[n]);
    for (int l = 0; l < kLanes; ++l) {
      if constexpr (sizeof(H) == 4) {
        b[l % 4 + 4 * n][l / 4] = to_float(as<H>(s[l]));
      } else {
        for (int half = 0; half < 2; ++half) {
          b[2 * (l % 4) + 8 * n + half][l / 4] = to_float(as<H>(s[l] >> (16 * half)));
        }
      }
    }
  }
}

template <class H>
void multiply(Warp& w, const Instruction& i) {  // mma: d, 4 registers; a, 4; b, 2; c, 4
  constexpr int kDepth = 32 / sizeof(H);
  w.require_every_lane("mma");
  float a[16][16], b[16][8];
  read_a<H>(w, i.operand + 4, a);
  read_b<H>(w, i.operand + 8, b);
  for (int n = 0; n < 4; ++n) {
    uint64_t *d = w.lanes(i.operand[n]), *c = w.lanes(i.operand[10 + n]);
    for (int l = 0; l < kLanes; ++l) {
      double sum = as<float>(c[l]);
      for (int k = 0; k < kDepth; ++k) {
        sum += double(a[fragment_row(l, n)][k]) * b[k][fragment_column(l, n)];
      }
      d[l] = bits_of(float(sum));
    }
  }
}

// An operand of wgmma or tcgen05.mma in shared memory (PTX manual, "Shared memory matrix layout").
// Its rows are A's rows, or B's columns; `is_transposed`: it has them along the lines of memory,
// not k.
struct Descriptor {
  uint32_t start, leading, stride, swizzle;

  explicit Descriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) << 4),
        leading(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride(uint32_t(bits >> 32 & 0x3fff) << 4),
        swizzle(uint32_t(bits >> 62)) {
    if (bits >> 49 & 7) throw Fault("a descriptor with a base offset");
    if (swizzle == 0) throw Fault("a descriptor without a swizzle");
  }

  uint32_t address(int row, int k, int size, bool is_transposed) const {
    uint32_t line = 256u >> swizzle;  // 128, 64 or 32 bytes
    uint32_t a = start;
    if (is_transposed) {
      int across = int(line) / size;
      a += row % across * size + row / across * leading + k % 8 * line + k / 8 * stride;
    } else {
      a += row / 8 * stride + row % 8 * line + k * size;
    }
    uint32_t chunks = line / 16 - 1;  // which of a line's 16 bytes: by the line of the pattern
    return a ^ (a >> 3 & chunks << 4);
  }
};

// Reads of products last from the instruction to its wait.
template <class H>
float read_element(Warp& w, const Descriptor& d, int row, int k, bool is_transposed,
                   std::vector<Piece>& pieces) {
  constexpr int kSize = sizeof(H);
  Machine& m = *w.machine;
  uint32_t address = d.address(row, k, kSize, is_transposed);
  H value;
  std::memcpy(&value, m.shared_at(address, kSize), kSize);
  m.touch_shared(address, kSize, {w.index, 0, false, false});
  m.require_fence(address, w);
  pieces.push_back({address, kSize, uint32_t(bits_of(value))});
  return to_float(value);
}

inline void finish_reading(Machine& m, int warp, const Piece& piece) {
  m.touch_shared(piece.address, piece.size, {warp, 0, false, false});
  if (std::memcmp(m.shared_at(piece.address, piece.size), &piece.bits, piece.size)) {
    throw Fault("a product's operand changes before it is done");
  }
}

// wgmma: d, N / 2 registers; a, 4 or its descriptor; b's descriptor; whether d is added to;
// signs of a and b; of halves: whether they are transposed, a only in shared memory.
template <class H, int N, bool kAShared>
void multiply_group(Warp& w, const Instruction& i) {
  constexpr int kD = N / 2, kDepth = 32 / sizeof(H);
  constexpr bool kHalves = sizeof(H) == 2;
  w.require_every_lane("wgmma");
  const int* of_a = i.operand + kD;
  const int* of_b = of_a + (kAShared ? 1 : 4);
  auto flag = [&](int n) { return w.lanes(of_b[n])[0]; };
  if (flag(2) != 1 || flag(3) != 1) throw Fault("a negated operand of wgmma");
  bool a_transposed = kHalves && kAShared && flag(4);
  bool b_transposed = kHalves && flag(kAShared ? 5 : 4);

  float a[16][16];
  static float b[16][N];
  if constexpr (kAShared) {
    Descriptor descriptor(w.lanes(of_a[0])[0]);
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < kDepth; ++k) {
        a[row][k] = read_element<H>(w, descriptor, 16 * (w.index % 4) + row, k, a_transposed,
                                    w.products.open);
      }
    }
  } else {
    read_a<H>(w, of_a, a);
  }
  Descriptor descriptor(w.lanes(of_b[0])[0]);
  for (int column = 0; column < N; ++column) {
    for (int k = 0; k < kDepth; ++k) {
      b[k][column] = read_element<H>(w, descriptor, column, k, b_transposed, w.products.open);
    }
  }
  for (int n = 0; n < kD; ++n) {
    uint64_t* d = w.lanes(i.operand[n]);
    for (int l = 0; l < kLanes; ++l) {
      double sum = flag(1) ? as<float>(d[l]) : 0.0;
      for (int k = 0; k < kDepth; ++k) {
        sum += double(a[fragment_row(l, n)][k]) * b[k][fragment_column(l, n)];
      }
      d[l] = bits_of(float(sum));
    }
  }
}

inline void commit_products(Warp& w, const Instruction&) { w.products.commit(); }

inline void wait_for_products(Warp& w, const Instruction& i) {
  w.products.wait(size_t(w.lanes(i.operand[0])[0]),
                  [&](const Piece& piece) { finish_reading(*w.machine, w.index, piece); });
}

inline void fence_proxies(Warp& w, const Instruction&) {
  ++w.fences;
  w.fenced_when = w.machine->when;
}

}  // namespace ptx
