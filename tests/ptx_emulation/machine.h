// The state of an emulated program, and what is checked of its memory.
//
// A program runs warp by warp, each up to the next barrier. For every byte of shared and global
// memory that is touched a record says who touched it last, and between which barriers.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

constexpr int kLanes = 32;
constexpr uint32_t kEveryLane = ~0u;
constexpr uint32_t kSharedBase = 1024;  // aligned to the largest pattern of products' operands
constexpr int kTensorLanes = 128, kTensorColumns = 512;  // of tensor memory

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class T>
T as(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
uint64_t bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

struct Warp;
struct Instruction;
using Execute = void (*)(Warp&, const Instruction&);

struct Instruction {
  Execute execute;
  int guard;  // the register of its predicate, or -1
  bool negated;
  const int* operand;
  int n_operands;
};

// Who touched a byte last. `when` counts barriers, and never goes back within a launch.
struct Touched {
  static constexpr int kNobody = -1, kSeveral = -2;
  uint64_t write_instruction = 0;  // of all that were executed
  int write_program = kNobody, read_program = kNobody;
  uint32_t write_when = 0, read_when = 0;
  uint32_t write_fences = 0;  // of the writer so far
  int8_t write_warp = kNobody, read_warp = kNobody;
  uint8_t write_lane = 0;
  uint64_t value = 0;

  static constexpr uint64_t kUnknown = ~0ull;  // equals no value
};

class Span {  // an argument's memory
 public:
  uint64_t begin, end;

  Span(uint64_t begin, uint64_t end) : begin(begin), end(end), pages_((end - begin) / kPage + 1) {}

  Touched& touched(uint64_t address) {
    auto& page = pages_[(address - begin) / kPage];
    if (!page) page = std::make_unique<Touched[]>(kPage);
    return page[(address - begin) % kPage];
  }

 private:
  static constexpr uint64_t kPage = 4096;
  std::vector<std::unique_ptr<Touched[]>> pages_;  // made where they are touched
};

struct Access {
  int warp, lane;
  bool writes;
  bool needs_no_fence;  // before a product reads it
};

struct Copy {  // a cp.async
  uint32_t to;
  uint64_t from;
  int size, n_read;  // what is not read is 0
};

struct Piece {  // of shared memory, as a product read it
  uint32_t address;
  int size;
  uint32_t bits;
};

struct Cell {  // of tensor memory
  int index;
  uint32_t bits;
};

struct Product {  // a tcgen05.mma under way, with what it read when it was issued
  int warp, m, n;
  bool adds;
  std::vector<int> sums;      // [m, n] cells
  std::vector<float> a, b;    // [m, kDepth], [kDepth, n]
  std::vector<Piece> shared;  // that a and b came from
  std::vector<Cell> cells;    // that a came from

  static constexpr int kDepth = 16;
};

struct Arrivals {  // a barrier of products (mbarrier)
  uint32_t expected, arrived = 0, phase = 0;
  std::vector<uint64_t> commits;  // how many products had been issued at each
};

template <class Part>
struct Groups {  // of what is asynchronous: made, committed, and waited for in that order
  std::vector<Part> open;
  std::vector<std::vector<Part>> committed;

  void commit() {
    committed.push_back(std::move(open));
    open.clear();
  }

  template <class Finish>
  void wait(size_t keep, Finish finish) {
    while (committed.size() > keep) {
      for (const Part& part : committed.front()) finish(part);
      committed.erase(committed.begin());
    }
  }

  void clear() { open.clear(), committed.clear(); }
};

enum class Next { kGo, kWait, kBarrier, kDone };

struct Machine;

struct Warp {
  Machine* machine;
  int index;
  std::vector<uint64_t> registers;  // [n_registers, kLanes]

  int at = 0;
  uint32_t active = kEveryLane;                  // lanes that are at `at`
  std::vector<std::pair<int, uint32_t>> parted;  // where other lanes are
  uint32_t mask = 0;  // lanes that execute the instruction: active, and their predicate holds
  Next next = Next::kGo;

  uint32_t fences = 0, fenced_when = 0;  // between the proxies of shared memory
  Groups<Copy> copies;
  Groups<Piece> products;           // what wgmma reads
  std::vector<Cell> tensor_stores;  // until they are waited for
  bool loads_tensor = false;        // and has not waited for it
  int n_waits = 0;                  // for the same products

  uint64_t* lanes(int r) { return &registers[size_t(r) * kLanes]; }

  void start() {
    at = 0, active = kEveryLane, next = Next::kGo, fences = 0, fenced_when = 0;
    parted.clear(), copies.clear(), products.clear();
    tensor_stores.clear(), loads_tensor = false, n_waits = 0;
  }

  void require_every_lane(const char* what) const {
    if (mask != kEveryLane) throw Fault(std::string(what) + " of a part of a warp");
  }

  // Lanes that parted go on where the program has come least far, until they meet.
  void join() {
    if (active) parted.push_back({at, active});
    int first = parted[0].first;
    for (auto [where, who] : parted) first = std::min(first, where);
    at = first, active = 0;
    std::erase_if(parted, [&](const auto& part) {
      if (part.first == first) active |= part.second;
      return part.first == first;
    });
  }
};

// Each lane has cells of 4 bytes; a column is one cell of every lane.
struct TensorMemory {
  std::vector<uint32_t> cells;  // [kTensorLanes, kTensorColumns]
  std::vector<Touched> touched;
  std::vector<uint8_t> n_sums;    // products under way whose sum a cell is
  int first = 0, n_columns = 0;   // that are allocated
  std::vector<Product> products;  // under way, in the order in which they finish
  uint64_t n_issued = 0, n_finished = 0, n_commits = 0;

  void start() {
    std::fill(n_sums.begin(), n_sums.end(), uint8_t(0));
    n_columns = 0, n_issued = n_finished = n_commits = 0;
    products.clear();
  }
};

struct Counts {
  uint64_t instructions = 0, barriers = 0;      // of warps
  uint64_t bank_passes = 0, fewest_passes = 0;  // of shared memory; as many as its bytes need
};

struct Machine {
  std::vector<Instruction> program;
  std::vector<int> operands;
  std::vector<std::pair<int, uint64_t>> constants;  // registers that hold one
  int n_registers = 0;

  // a launch
  std::vector<uint8_t> arguments;  // as the entry lays them out
  std::array<uint32_t, 3> grid{}, program_id{};
  int program_number = 0;
  bool programs_may_overwrite = false;
  std::vector<Warp> warps;
  std::vector<Span> spans;
  std::vector<uint8_t> shared;
  std::vector<Touched> shared_touched;
  std::map<uint32_t, Arrivals> arrivals;  // by their address in shared memory
  TensorMemory tensor;
  uint32_t when = 0;
  int at = 0;
  Counts counts;

  void touch_shared(uint32_t address, int size, Access access, const uint8_t* values = nullptr) {
    for (const auto& [at, _] : arrivals) {
      if (address < at + kArrivalsSize && at < address + size) throw Fault("it touches a mbarrier");
    }
    touch_bytes(address, size, access, values);
  }

  void touch_arrivals(uint32_t address, Access access) {
    shared_at(address, kArrivalsSize);
    touch_bytes(address, kArrivalsSize, access, nullptr);
  }

  void touch_tensor(int cell, Access access, uint64_t value = 0) {
    Touched& t = tensor.touched[cell];
    bool is_anew = t.write_program != program_number;
    if (is_anew && !access.writes) throw Fault("it reads tensor memory that nobody wrote");
    if (is_anew) t = Touched{};
    touch(t, access, value);
  }

  // Index of a cell, whose address has the lane in the upper half.
  int cell_at(uint32_t address) const {
    int lane = int(address >> 16), column = int(address & 0xffff);
    if (lane >= kTensorLanes || column < tensor.first ||
        column >= tensor.first + tensor.n_columns) {
      throw Fault("lane " + std::to_string(lane) + ", column " +
                  std::to_string(column - tensor.first) + " of " +
                  std::to_string(tensor.n_columns) + " of tensor memory");
    }
    return lane * kTensorColumns + column;
  }

  void touch_bytes(uint32_t address, int size, Access access, const uint8_t* values) {
    Touched* t = &shared_touched[address - kSharedBase];
    for (int i = 0; i < size; ++i) {
      bool is_anew = t[i].write_program != program_number;
      if (is_anew && !access.writes) throw Fault("it reads shared memory that nobody wrote");
      if (is_anew) t[i] = Touched{};
      touch(t[i], access, values ? values[i] : 0);
    }
  }

  void touch_global(uint64_t address, int size, Access access, const uint8_t* values = nullptr) {
    Span& span = span_of(address, size);
    for (int i = 0; i < size; ++i) {
      Touched& t = span.touched(address + i);
      bool written = t.write_program != Touched::kNobody;
      bool read = t.read_program != Touched::kNobody;
      bool by_others = written && t.write_program != program_number;
      if (access.writes) {
        by_others =
            (by_others && !programs_may_overwrite) || (read && t.read_program != program_number);
      }
      if (by_others) throw Fault("a race of two programs for a byte of global memory");
      touch(t, access, values ? values[i] : 0);
    }
  }

  uint8_t* shared_at(uint32_t address, int size) {
    if (address < kSharedBase || address + size > kSharedBase + shared.size()) {
      throw Fault("byte " + std::to_string(int64_t(address) - kSharedBase) + " of " +
                  std::to_string(shared.size()) + " of shared memory");
    }
    if (address % size) throw Fault("a misaligned address of shared memory");
    return &shared[address - kSharedBase];
  }

  uint8_t* global_at(uint64_t address, int size) {
    if (address % size) throw Fault("a misaligned address of global memory");
    span_of(address, size);
    return reinterpret_cast<uint8_t*>(address);
  }

  // Products read shared memory by another proxy, to which a fence must have made it visible: the
  // writer's before a barrier, or the reader's after it.
  void require_fence(uint32_t address, const Warp& reader) {
    const Touched& t = shared_touched[address - kSharedBase];
    if (t.write_fences == kNeedsNone) return;
    bool by_writer = warps[t.write_warp].fences > t.write_fences;
    if (!by_writer && reader.fenced_when <= t.write_when) {
      throw Fault("a product reads what no fence.proxy.async made visible");
    }
  }

 private:
  static constexpr uint32_t kNeedsNone = ~0u;
  static constexpr int kArrivalsSize = 8;

  Span& span_of(uint64_t address, int size) {
    for (Span& span : spans) {
      if (address >= span.begin && address + size <= span.end) return span;
    }
    std::string near;
    for (const Span& span : spans) {
      if (address + 65536 > span.begin && address < span.end + 65536) {
        near += ", byte " + std::to_string(int64_t(address - span.begin)) + " of " +
                std::to_string(span.end - span.begin);
      }
    }
    throw Fault("global memory outside of every argument" + near);
  }

  void touch(Touched& t, const Access& access, uint64_t value) {
    bool written = t.write_program == program_number && t.write_when == when;
    bool read = t.read_program == program_number && t.read_when == when;
    auto race = [&](const char* what) {
      throw Fault(std::string("a race: ") + what + " (warp " + std::to_string(access.warp) + ")");
    };
    if (access.writes) {
      if (read && t.read_warp != access.warp) race("it writes what another warp reads");
      if (written && (t.value != value || value == Touched::kUnknown)) {
        if (t.write_warp != access.warp) race("two warps write different values");
        bool at_once = t.write_instruction == counts.instructions;
        if (at_once && t.write_lane != access.lane) race("two lanes write different values");
      }
      t.write_program = program_number, t.write_warp = int8_t(access.warp), t.write_when = when;
      t.write_fences = access.needs_no_fence ? kNeedsNone : warps[access.warp].fences;
      t.write_instruction = counts.instructions, t.write_lane = uint8_t(access.lane);
      t.value = value;
    } else {
      if (written && t.write_warp != access.warp) race("it reads what another warp writes");
      bool several = read && t.read_warp != access.warp;
      t.read_program = program_number, t.read_when = when;
      t.read_warp = int8_t(several ? Touched::kSeveral : access.warp);
    }
  }
};

#define PTX_EACH_LANE(l)                \
  for (int l = 0; l < ptx::kLanes; ++l) \
    if (w.mask >> l & 1)

}  // namespace ptx
