// Loads, stores and copies.
#pragma once

#include <vector>

#include "machine.h"

namespace ptx {

// Shared memory has 32 banks of 4 bytes; 128 bytes of distinct banks pass at a time.
inline void count_passes(Warp& w, const uint64_t* address, int size, int n_lanes = kLanes) {
  constexpr int kBanks = 32;
  int at_once = size <= 4 ? kLanes : 128 / size;
  for (int first = 0; first < n_lanes; first += at_once) {
    std::vector<uint32_t> words;
    for (int l = first; l < std::min(first + at_once, n_lanes); ++l) {
      if (!(w.mask >> l & 1)) continue;
      for (int word = 0; word < std::max(1, size / 4); ++word) {
        words.push_back(uint32_t(address[l]) / 4 + word);
      }
    }
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    std::array<int, kBanks> of_bank{};
    for (uint32_t word : words) ++of_bank[word % kBanks];
    w.machine->counts.bank_passes += *std::max_element(of_bank.begin(), of_bank.end());
    w.machine->counts.fewest_passes += (words.size() + kBanks - 1) / kBanks;
  }
}

template <class T, int N, bool kShared>
void load(Warp& w, const Instruction& i) {  // N registers, base, offset
  constexpr int kSize = sizeof(T) * N;
  Machine& m = *w.machine;
  uint64_t address[kLanes];
  const uint64_t* base = w.lanes(i.operand[N]);
  PTX_EACH_LANE(l) address[l] = base[l] + i.operand[N + 1];
  if constexpr (kShared) count_passes(w, address, kSize);
  PTX_EACH_LANE(l) {
    const uint8_t* from;
    Access access{w.index, l, false, false};
    if constexpr (kShared) {
      from = m.shared_at(uint32_t(address[l]), kSize);
      m.touch_shared(uint32_t(address[l]), kSize, access);
    } else {
      from = m.global_at(address[l], kSize);
      m.touch_global(address[l], kSize, access);
    }
    for (int n = 0; n < N; ++n) {
      T value;
      std::memcpy(&value, from + n * sizeof(T), sizeof(T));
      w.lanes(i.operand[n])[l] = bits_of(value);
    }
  }
}

template <class T, int N, bool kShared>
void store(Warp& w, const Instruction& i) {  // base, offset, N registers
  constexpr int kSize = sizeof(T) * N;
  Machine& m = *w.machine;
  uint64_t address[kLanes];
  const uint64_t* base = w.lanes(i.operand[0]);
  PTX_EACH_LANE(l) address[l] = base[l] + i.operand[1];
  if constexpr (kShared) count_passes(w, address, kSize);
  PTX_EACH_LANE(l) {
    uint8_t value[kSize];
    for (int n = 0; n < N; ++n) {
      std::memcpy(value + n * sizeof(T), &w.lanes(i.operand[2 + n])[l], sizeof(T));
    }
    uint8_t* to;
    Access access{w.index, l, true, false};
    if constexpr (kShared) {
      to = m.shared_at(uint32_t(address[l]), kSize);
      m.touch_shared(uint32_t(address[l]), kSize, access, value);
    } else {
      to = m.global_at(address[l], kSize);
      m.touch_global(address[l], kSize, access, value);
    }
    std::memcpy(to, value, kSize);
  }
}

template <class To, class T>
void load_argument(Warp& w, const Instruction& i) {  // a register, base, offset
  const auto& arguments = w.machine->arguments;
  uint64_t *d = w.lanes(i.operand[0]), *base = w.lanes(i.operand[1]);
  PTX_EACH_LANE(l) {
    uint64_t at = base[l] + i.operand[2];
    if (at + sizeof(T) > arguments.size()) throw Fault("an argument that the kernel does not have");
    T value;
    std::memcpy(&value, &arguments[at], sizeof(T));
    d[l] = bits_of(To(value));
  }
}

// A copy lands when it is waited for, as late as it may.
inline void copy_async(Warp& w, const Instruction& i) {  // base, offset; base, offset; sizes
  Machine& m = *w.machine;
  PTX_EACH_LANE(l) {
    uint32_t to = uint32_t(w.lanes(i.operand[0])[l] + i.operand[1]);
    uint64_t from = w.lanes(i.operand[2])[l] + i.operand[3];
    int size = int(w.lanes(i.operand[4])[l]);
    int n_read = i.n_operands > 5 ? int(w.lanes(i.operand[5])[l]) : size;
    m.shared_at(to, size);
    m.touch_shared(to, size, {w.index, l, true, true});
    if (n_read) {
      m.global_at(from, size);
      m.touch_global(from, n_read, {w.index, l, false, false});
    }
    w.copies.open.push_back({to, from, size, n_read});
  }
}

inline void commit_copies(Warp& w, const Instruction&) { w.copies.commit(); }

inline void wait_for_copies(Warp& w, const Instruction& i) {
  Machine& m = *w.machine;
  w.copies.wait(size_t(w.lanes(i.operand[0])[0]), [&](const Copy& c) {
    uint8_t* to = m.shared_at(c.to, c.size);
    std::memset(to, 0, c.size);
    std::memcpy(to, reinterpret_cast<const void*>(c.from), c.n_read);
    // Triton fences no copy before wgmma, nor does CUTLASS.
    m.touch_shared(c.to, c.size, {w.index, 0, true, true}, to);
  });
}

}  // namespace ptx
