// Runs a kernel on the CPU, thread by thread, each with a program counter of its own.
//
// What it checks on the way: every access to global memory, which is that of the host, lies within an allocation that
// is registered, and is aligned for its width; no byte is read that nobody wrote, in global or in shared memory;
// results are written once, and not read afterwards: they may lie in the memory of an operand; shared memory is not
// raced for between two barriers; operations of a warp meet all threads of their mask at the same instruction; no
// thread leaves while others wait at a barrier; a launch ends.
//
// What it varies: the order of blocks and threads, how many blocks are under way, after how many instructions another
// thread has its turn, whether stores of a thread reach others before a fence, how far ex2 and rcp are off.
#pragma once

#include <cinttypes>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>

#include "program.h"

namespace ptx {

enum class Access {
  Read,           // an operand
  Once,           // a result: each byte is written once in a launch, and not read afterwards
  BetweenBlocks,  // a workspace, to which Options::weak applies
};

struct Allocation {
  std::string name;
  uintptr_t begin = 0;
  size_t bytes = 0;
  Access access = Access::Read;
  std::vector<uint8_t> written;  // of each byte: before the launch (bit 0), in it (bit 1)
};

struct Options {
  enum Order { Forward, Reverse, Random };
  Order order = Forward;
  int resident = 1;      // blocks under way
  int quantum = 0;       // instructions until another thread has its turn, at most; 0: until it must wait
  uint64_t seed = 1;     // of all that is random
  bool weak = false;     // stores between blocks stay in the thread, after a barrier in the block, until a fence
  bool inexact = false;  // ex2 and rcp err as far as they may
};

template <class To, class From>
To cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
inline float as_f32(uint64_t bits) { return cast<float>(uint32_t(bits)); }
inline double as_f64(uint64_t bits) { return cast<double>(bits); }
inline uint64_t bits_of(float value) { return cast<uint32_t>(value); }
inline uint64_t bits_of(double value) { return cast<uint64_t>(value); }
inline uint64_t mask_of(int bytes) { return ~0ull >> (64 - 8 * bytes); }
inline int64_t sign_extended(uint64_t bits, int bytes) { return int64_t(bits << (64 - 8 * bytes)) >> (64 - 8 * bytes); }

inline float f16_to_f32(uint16_t bits) { return float(cast<_Float16>(bits)); }
inline uint16_t f32_to_f16(float value) {
  if (value != value) return 0x7fff;
  return cast<uint16_t>(_Float16(value));
}
inline uint16_t f32_to_bf16(float value) {
  if (value != value) return 0x7fff;
  const uint32_t bits = cast<uint32_t>(value);
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

class Machine {
 public:
  Options options;
  uint64_t instructions = 0;

  // Lets kernels access `bytes` bytes at `data`, of which the first `initialised` have a value.
  void add(const char* name, const void* data, size_t bytes, Access access, size_t initialised) {
    std::vector<uint8_t> written(bytes, 0);
    std::fill_n(written.begin(), initialised, uint8_t(1));
    allocations_.push_back({name, uintptr_t(data), bytes, access, std::move(written)});
  }
  void clear() { allocations_.clear(); }

  void launch(Function& function, unsigned grid, unsigned block, const std::vector<uint8_t>& params) {
    f_ = &function;
    params_ = &params;
    grid_ = grid;
    threads_ = block;
    random_.seed(options.seed);
    for (Allocation& each : allocations_) {
      for (uint8_t& byte : each.written) byte &= 1;
    }
    std::vector<unsigned> order(grid);
    for (unsigned n = 0; n < grid; ++n) order[n] = options.order == Options::Reverse ? grid - 1 - n : n;
    if (options.order == Options::Random) std::shuffle(order.begin(), order.end(), random_);
    const uint64_t stop = instructions + kMostInstructions;
    std::vector<std::unique_ptr<Block>> live;
    size_t started = 0;
    while (started < order.size() || !live.empty()) {
      while (int(live.size()) < std::max(1, options.resident) && started < order.size())
        live.push_back(begin(order[started++]));
      const size_t chosen = live.size() == 1 ? 0 : random_() % live.size();
      Block& current = *live[chosen];
      advance(current);
      if (instructions > stop) fail("%s does not end", f_->name.c_str());
      if (current.done == threads_) {
        flush(current.pending);
        flush(current.late);
        pool_.push_back(std::move(live[chosen]));
        live.erase(live.begin() + long(chosen));
      }
    }
  }

 private:
  static constexpr uint64_t kMostInstructions = 2'000'000'000;  // of a launch

  enum class State : uint8_t { Ready, Barrier, Warp, Done };
  struct Store {
    uint64_t address;
    uint8_t bytes;
    uint64_t value;
  };
  struct Thread {
    int pc = 0;
    State state = State::Ready;
    int barriers = 0;
    bool counted = false;   // an atomic
    bool acquired = false;  // a fence after it: sees what others stored before they counted
    std::vector<Store> pending;
  };
  struct SharedByte {
    bool written = false;
    int writer = -1, write_epoch = -1, reader = -1, read_epoch = -1;
    bool many_readers = false;
  };
  struct Block {
    unsigned index = 0;
    const Function* function = nullptr;
    std::vector<Thread> threads;
    std::vector<uint64_t> registers;
    std::vector<uint8_t> shared;
    std::vector<SharedByte> shadow;
    std::vector<Store> pending;
    std::vector<Store> late;  // not fenced before the count: who has seen the count need not see them
    std::vector<unsigned> ready;
    unsigned done = 0;
    unsigned waiting = 0;
    bool acquired = false;  // by a thread before a barrier
  };

  std::unique_ptr<Block> begin(unsigned index) {
    std::unique_ptr<Block> block;
    if (!pool_.empty()) {
      block = std::move(pool_.back());
      pool_.pop_back();
    } else {
      block = std::make_unique<Block>();
    }
    Block& b = *block;
    const size_t slots = f_->reg_bytes.size();
    b.index = index;
    b.function = f_;
    b.threads.assign(threads_, {});
    if (b.registers.size() < slots * threads_) b.registers.resize(slots * threads_);
    b.shared.assign(size_t(f_->shared_bytes), 0xa5);
    b.shadow.assign(size_t(f_->shared_bytes), {});
    b.pending.clear();
    b.ready.resize(threads_);
    b.done = b.waiting = 0;
    b.acquired = false;
    // What was never written is a number that makes wrong results.
    std::vector<uint64_t> first(slots);
    for (size_t n = 0; n < slots; ++n) first[n] = 0x7ff4dead7fa4deadull & mask_of(f_->reg_bytes[n]);
    for (unsigned t = 0; t < threads_; ++t) {
      const uint32_t lane = t % 32, bit = 1u << lane;
      const uint64_t special[NumSpecial] = {t,
                                            0,
                                            0,
                                            threads_,
                                            1,
                                            1,
                                            index,
                                            0,
                                            0,
                                            grid_,
                                            1,
                                            1,
                                            lane,
                                            bit,
                                            bit - 1,
                                            bit | (bit - 1),
                                            ~(bit | (bit - 1)),
                                            ~(bit - 1)};
      std::copy(special, special + NumSpecial, first.begin());
      std::copy(first.begin(), first.end(), b.registers.begin() + int64_t(slots * t));
      b.ready[t] = options.order == Options::Reverse ? t : threads_ - 1 - t;  // taken from the back
    }
    if (options.order == Options::Random) std::shuffle(b.ready.begin(), b.ready.end(), random_);
    return block;
  }

  // Lets one thread of the block run for its turn.
  void advance(Block& b) {
    if (b.ready.empty()) {
      std::string where;
      for (unsigned t = 0; t < threads_; ++t) {
        if (b.threads[t].state == State::Done) continue;
        where = " thread " + std::to_string(t) + " at line " + std::to_string(f_->code[b.threads[t].pc].line);
      }
      fail("block %u: deadlock, %u of %u threads have left,%s waits", b.index, b.done, threads_, where.c_str());
    }
    size_t chosen = b.ready.size() - 1;
    if (options.quantum) chosen = random_() % b.ready.size();
    const unsigned t = b.ready[chosen];
    b.ready.erase(b.ready.begin() + long(chosen));
    const uint64_t turn = options.quantum ? 1 + random_() % uint64_t(options.quantum) : ~0ull;
    run(b, t, turn);
    if (b.threads[t].state == State::Ready) b.ready.push_back(t);
  }

  static void flush_to(std::vector<Store>& from, std::vector<Store>& to) {
    to.insert(to.end(), from.begin(), from.end());
    from.clear();
  }
  void flush(std::vector<Store>& pending) {
    for (const Store& store : pending) std::memcpy(reinterpret_cast<void*>(store.address), &store.value, store.bytes);
    pending.clear();
  }

  std::string place(const Block& b, unsigned t, const Inst& inst) const {
    return "block " + std::to_string(b.index) + ", thread " + std::to_string(t) + ", line " +
           std::to_string(inst.line) + " of " + f_->name;
  }

  Allocation& check(const Block& b, unsigned t, const Inst& inst, uint64_t address, size_t bytes, bool writes) {
    if (address % bytes)
      fail("misaligned access of %zu bytes at %#" PRIx64 ": %s", bytes, address, place(b, t, inst).c_str());
    for (size_t n = 0; n < allocations_.size(); ++n) {
      Allocation& each = allocations_[(last_ + n) % allocations_.size()];
      if (address < each.begin || address + bytes > each.begin + each.bytes) continue;
      last_ = (last_ + n) % allocations_.size();
      uint8_t* const written = each.written.data() + (address - each.begin);
      if (!writes) {
        for (size_t k = 0; k < bytes; ++k) {
          const size_t byte = address - each.begin + k;
          if (!written[k])
            fail("read of %s[%zu], which nobody wrote: %s", each.name.c_str(), byte, place(b, t, inst).c_str());
          if (each.access == Access::Once && (written[k] & 2))
            fail("read of %s[%zu], which is overwritten: %s", each.name.c_str(), byte, place(b, t, inst).c_str());
        }
        return each;
      }
      if (each.access == Access::Read) fail("write to %s: %s", each.name.c_str(), place(b, t, inst).c_str());
      for (size_t k = 0; k < bytes; ++k) {
        if (each.access == Access::Once && (written[k] & 2))
          fail(
              "second write to %s[%zu]: %s", each.name.c_str(), size_t(address - each.begin + k),
              place(b, t, inst).c_str());
        written[k] |= 3;
      }
      return each;
    }
    std::string near;
    for (const Allocation& each : allocations_) {
      const int64_t before = int64_t(address - each.begin);
      if (before > -4096 && before < int64_t(each.bytes) + 4096)
        near += " (" + std::to_string(before) + " into " + each.name + " of " + std::to_string(each.bytes) + " bytes)";
    }
    fail(
        "%s of %zu bytes out of bounds at %#" PRIx64 "%s: %s", writes ? "write" : "read", bytes, address, near.c_str(),
        place(b, t, inst).c_str());
  }

  void shared_access(Block& b, unsigned t, const Inst& inst, uint64_t address, size_t bytes, bool writes) {
    if (address % bytes) fail("misaligned shared access: %s", place(b, t, inst).c_str());
    if (address + bytes > b.shared.size()) fail("shared access out of bounds: %s", place(b, t, inst).c_str());
    const int epoch = b.threads[t].barriers, me = int(t);
    for (size_t k = 0; k < bytes; ++k) {
      SharedByte& s = b.shadow[address + k];
      if (!writes && !s.written)
        fail("read of shared byte %zu, which nobody wrote: %s", size_t(address + k), place(b, t, inst).c_str());
      if (s.write_epoch == epoch && s.writer != me)
        fail("race for shared byte %zu with thread %d: %s", size_t(address + k), s.writer, place(b, t, inst).c_str());
      if (writes && s.read_epoch == epoch && (s.reader != me || s.many_readers)) {
        fail(
            "race for shared byte %zu: read by thread %d since the barrier, written: %s", size_t(address + k), s.reader,
            place(b, t, inst).c_str());
      }
      if (writes) {
        s.written = true;
        s.writer = me;
        s.write_epoch = epoch;
      } else {
        s.many_readers = s.read_epoch == epoch && (s.many_readers || s.reader != me);
        s.reader = me;
        s.read_epoch = epoch;
      }
    }
  }

  uint64_t
  load_global(const Block& b, unsigned t, const Inst& inst, const Allocation& from, uint64_t address, size_t bytes) {
    uint64_t value = 0;
    std::memcpy(&value, reinterpret_cast<const void*>(address), bytes);
    if (from.access != Access::BetweenBlocks) return value;
    if (!b.acquired && !b.threads[t].acquired)
      fail("read of %s without a fence after the count: %s", from.name.c_str(), place(b, t, inst).c_str());
    uint8_t* const into = reinterpret_cast<uint8_t*>(&value);
    for (const std::vector<Store>* pending : {&b.late, &b.pending, &b.threads[t].pending}) {
      for (const Store& store : *pending) {
        for (size_t k = 0; k < store.bytes; ++k) {
          const uint64_t byte = store.address + k;
          if (byte >= address && byte < address + bytes) into[byte - address] = uint8_t(store.value >> (8 * k));
        }
      }
    }
    return value;
  }

  // 2^x and 1/x as a special-function unit may give them.
  float unit(float exact, int most) {
    if (!options.inexact || exact == 0.0f || !std::isfinite(exact)) return exact;
    const int off = int(random_() % uint64_t(2 * most + 1)) - most;
    const float wrong = cast<float>(uint32_t(int64_t(cast<uint32_t>(exact)) + off));
    return std::fpclassify(wrong) == FP_SUBNORMAL ? 0.0f : wrong;
  }

  template <class T>
  static bool compare(Cmp cmp, T a, T b) {
    const bool unordered = a != a || b != b;
    switch (cmp) {
      case Cmp::Eq: return a == b;
      case Cmp::Ne: return a != b && !unordered;
      case Cmp::Lt: return a < b;
      case Cmp::Le: return a <= b;
      case Cmp::Gt: return a > b;
      case Cmp::Ge: return a >= b;
      case Cmp::Equ: return unordered || a == b;
      case Cmp::Neu: return unordered || a != b;
      case Cmp::Ltu: return unordered || a < b;
      case Cmp::Leu: return unordered || a <= b;
      case Cmp::Gtu: return unordered || a > b;
      case Cmp::Geu: return unordered || a >= b;
      case Cmp::Num: return !unordered;
      default: return unordered;
    }
  }

  template <class F>
  static F arithmetic(Op op, F a, F b, F c) {
    switch (op) {
      case Op::Add: return a + b;
      case Op::Sub: return a - b;
      case Op::Mul: return a * b;
      case Op::Div: return a / b;
      case Op::Fma:
      case Op::Mad: return std::fma(a, b, c);
      case Op::Min: return std::fmin(a, b);
      case Op::Max: return std::fmax(a, b);
      case Op::Copysign: return std::copysign(b, a);
      default: fail("arithmetic");
    }
  }

  static uint64_t converted(const Inst& inst, uint64_t bits) {
    const Type to = inst.type, from = inst.from;
    if (from.is_float()) {
      double value = 0.0;
      if (from.kind == Kind::BFloat)
        value = as_f32(uint64_t(uint32_t(bits & 0xffff) << 16));
      else if (from.bytes == 2)
        value = f16_to_f32(uint16_t(bits));
      else
        value = from.bytes == 4 ? double(as_f32(bits)) : as_f64(bits);
      if (to.is_float()) {
        if (inst.rounding != Rounding::Nearest && to.bytes < from.bytes) fail("line %d: rounding", inst.line);
        if (to.kind == Kind::BFloat || to.bytes == 2) {
          if (from.bytes != 4) fail("line %d: double to half", inst.line);
          return to.kind == Kind::BFloat ? f32_to_bf16(float(value)) : f32_to_f16(float(value));
        }
        return to.bytes == 4 ? bits_of(float(value)) : bits_of(value);
      }
      const double whole = inst.rounding == Rounding::Zero   ? std::trunc(value)
                           : inst.rounding == Rounding::Down ? std::floor(value)
                           : inst.rounding == Rounding::Up   ? std::ceil(value)
                                                             : std::nearbyint(value);
      // What does not fit becomes the nearest that does.
      const bool is_signed = to.kind == Kind::Signed;
      const double bound = std::ldexp(1.0, 8 * to.bytes - is_signed);
      const uint64_t most = mask_of(to.bytes) >> is_signed;
      if (value != value) return 0;
      if (whole >= bound) return most;
      if (whole < (is_signed ? -bound : 0.0)) return is_signed ? ~most : 0;
      return is_signed ? uint64_t(int64_t(whole)) : uint64_t(whole);
    }
    const bool is_signed = from.kind == Kind::Signed;
    const int64_t whole = is_signed ? sign_extended(bits, from.bytes) : int64_t(bits & mask_of(from.bytes));
    if (!to.is_float()) {
      const uint64_t kept = uint64_t(whole);
      return to.kind == Kind::Signed ? uint64_t(sign_extended(kept, to.bytes)) : kept & mask_of(to.bytes);
    }
    if (inst.rounding != Rounding::Nearest) fail("line %d: rounding", inst.line);
    if (to.bytes == 4) return bits_of(is_signed ? float(whole) : float(uint64_t(whole)));
    if (to.bytes == 8) return bits_of(is_signed ? double(whole) : double(uint64_t(whole)));
    fail("line %d: integer to half", inst.line);
  }

  // All threads of the mask are at the same shuffle, vote or warp barrier: do it. False: some are not there yet.
  bool meet(Block& b, unsigned t, const Inst& inst) {
    const size_t slots = f_->reg_bytes.size();
    const unsigned warp = t / 32 * 32;
    const auto value = [&](unsigned thread, int32_t from) {
      return from >= 0 ? b.registers[slots * thread + size_t(from)] : f_->constants[size_t(~from)];
    };
    const int32_t mask_arg = inst.op == Op::Shfl ? inst.s[3] : inst.op == Op::Vote ? inst.s[1] : inst.s[0];
    const uint32_t mask = uint32_t(value(t, mask_arg));
    if (!(mask >> (t % 32) & 1)) fail("thread is not in its own mask: %s", place(b, t, inst).c_str());
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      if (warp + lane >= threads_) fail("mask names a thread that is not: %s", place(b, t, inst).c_str());
      Thread& other = b.threads[warp + lane];
      if (other.state == State::Done) fail("mask names lane %u, which has left: %s", lane, place(b, t, inst).c_str());
      if (other.state != State::Warp || other.pc != b.threads[t].pc) return false;
      if (uint32_t(value(warp + lane, mask_arg)) != mask) fail("masks differ: %s", place(b, t, inst).c_str());
    }
    uint64_t results[32] = {};
    bool in_range[32] = {};
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      const unsigned thread = warp + lane;
      if (inst.op == Op::Shfl) {
        const unsigned by = unsigned(value(thread, inst.s[1])) & 31, c = unsigned(value(thread, inst.s[2]));
        const unsigned segment = c >> 8 & 31, clamp = c & 31;
        const unsigned most = (lane & segment) | (clamp & ~segment), least = lane & segment;
        int from = 0;
        switch (inst.how) {
          case 'u':
            from = int(lane) - int(by);
            in_range[lane] = from >= int(most);
            break;
          case 'd':
            from = int(lane + by);
            in_range[lane] = from <= int(most);
            break;
          case 'x':
            from = int(lane ^ by);
            in_range[lane] = from <= int(most);
            break;
          default:
            from = int(least | (by & ~segment));
            in_range[lane] = from <= int(most);
            break;
        }
        if (!in_range[lane]) from = int(lane);
        if (!(mask >> from & 1))
          fail("shuffle reads lane %d, which is not in the mask: %s", from, place(b, thread, inst).c_str());
        results[lane] = value(warp + unsigned(from), inst.s[0]) & 0xffffffffu;
      } else if (inst.op == Op::Vote) {
        if (inst.how != 'b') fail("line %d: vote", inst.line);
        for (unsigned other = 0; other < 32; ++other) {
          if (mask >> other & 1) results[lane] |= (value(warp + other, inst.s[0]) & 1) << other;
        }
      }
    }
    for (unsigned lane = 0; lane < 32; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Thread& thread = b.threads[warp + lane];
      uint64_t* const r = b.registers.data() + slots * (warp + lane);
      if (inst.op != Op::BarWarp) r[inst.d[0]] = results[lane];
      if (inst.op == Op::Shfl && inst.count == 2) r[inst.d[1]] = in_range[lane];
      thread.state = State::Ready;
      ++thread.pc;
      if (warp + lane != t) b.ready.push_back(warp + lane);
    }
    return true;
  }

  void leave_barrier(Block& b, unsigned t) {
    if (b.waiting + b.done < threads_) return;
    if (b.done) fail("block %u: %u threads have left, %u wait at a barrier", b.index, b.done, b.waiting);
    b.waiting = 0;
    for (unsigned n = 0; n < threads_; ++n) {
      Thread& thread = b.threads[n];
      thread.state = State::Ready;
      ++thread.pc;
      ++thread.barriers;
      b.acquired = b.acquired || thread.acquired;
      flush_to(thread.pending, b.pending);
      if (n != t) b.ready.push_back(n);
    }
    if (options.order == Options::Forward) std::reverse(b.ready.begin(), b.ready.end());
    if (options.order == Options::Random) std::shuffle(b.ready.begin(), b.ready.end(), random_);
  }

  void run(Block& b, unsigned t, uint64_t turn) {
    Thread& thread = b.threads[t];
    uint64_t* const r = b.registers.data() + f_->reg_bytes.size() * t;
    const Inst* const code = f_->code.data();
    const uint8_t* const reg_bytes = f_->reg_bytes.data();
    uint8_t* const covered = f_->covered.data();
    const uint64_t* const constants = f_->constants.data();
    const auto value = [&](int32_t from) { return from >= 0 ? r[from] : constants[~from]; };
    const auto set = [&](int32_t reg, uint64_t bits)
                         __attribute__((always_inline)) { r[reg] = bits & mask_of(reg_bytes[reg]); };
    uint64_t executed = 0;
    int pc = thread.pc;
    for (; executed < turn; ++executed) {
      const Inst& inst = code[pc];
      if (inst.guard >= 0 && bool(r[inst.guard] & 1) == inst.negated) {
        ++pc;
        continue;
      }
      covered[pc] = 1;
      const Type type = inst.type;
      const int bytes = type.bytes;
      switch (inst.op) {
        case Op::Mov: set(inst.d[0], value(inst.s[0]) & mask_of(bytes)); break;
        case Op::Pack: {
          const int each = bytes / inst.count;
          uint64_t bits = 0;
          for (int n = 0; n < inst.count; ++n) bits |= (value(inst.s[n]) & mask_of(each)) << (8 * each * n);
          set(inst.d[0], bits);
          break;
        }
        case Op::Unpack: {
          const int each = bytes / inst.count;
          const uint64_t bits = value(inst.s[0]);
          for (int n = 0; n < inst.count; ++n) set(inst.d[n], bits >> (8 * each * n) & mask_of(each));
          break;
        }
        case Op::Ld: {
          const uint64_t address = value(inst.s[0]) + uint64_t(int64_t(inst.target));
          const size_t whole = size_t(bytes) * inst.count;
          const Allocation* from = nullptr;
          if (inst.space == Space::Global) {
            from = &check(b, t, inst, address, whole, false);
          } else if (inst.space == Space::Shared) {
            shared_access(b, t, inst, address, whole, false);
          } else if (address % whole || address + whole > params_->size()) {
            fail("parameter %" PRIu64 ": %s", address, place(b, t, inst).c_str());
          }
          for (int n = 0; n < inst.count; ++n) {
            uint64_t bits = 0;
            if (from) {
              bits = load_global(b, t, inst, *from, address + uint64_t(n * bytes), size_t(bytes));
            } else {
              const uint8_t* const memory = inst.space == Space::Shared ? b.shared.data() : params_->data();
              std::memcpy(&bits, memory + address + n * bytes, size_t(bytes));
            }
            if (type.kind == Kind::Signed) bits = uint64_t(sign_extended(bits, bytes));
            set(inst.d[n], bits);
          }
          break;
        }
        case Op::St: {
          const uint64_t address = value(inst.s[0]) + uint64_t(int64_t(inst.target));
          const size_t whole = size_t(bytes) * inst.count;
          bool later = false;
          if (inst.space == Space::Global) {
            later = check(b, t, inst, address, whole, true).access == Access::BetweenBlocks && options.weak;
          } else if (inst.space == Space::Shared) {
            shared_access(b, t, inst, address, whole, true);
          } else {
            fail("store to a parameter: %s", place(b, t, inst).c_str());
          }
          for (int n = 0; n < inst.count; ++n) {
            const uint64_t bits = value(inst.s[1 + n]);
            if (later) {
              thread.pending.push_back({address + uint64_t(n * bytes), uint8_t(bytes), bits});
            } else {
              uint8_t* const to =
                  inst.space == Space::Shared ? b.shared.data() + address : reinterpret_cast<uint8_t*>(address);
              std::memcpy(to + n * bytes, &bits, size_t(bytes));
            }
          }
          break;
        }
        case Op::Add:
        case Op::Sub:
        case Op::Mul:
        case Op::Div:
        case Op::Fma:
        case Op::Mad:
        case Op::Min:
        case Op::Max:
        case Op::Copysign:
        case Op::Rem: {
          const uint64_t a = value(inst.s[0]), c = value(inst.s[1]), e = value(inst.s[2]);
          if (type.kind == Kind::Float && bytes == 4) {
            if (inst.ftz || inst.rounding != Rounding::Nearest) fail("line %d: ftz or rounding", inst.line);
            set(inst.d[0], bits_of(arithmetic(inst.op, as_f32(a), as_f32(c), as_f32(e))));
          } else if (type.kind == Kind::Float && bytes == 8) {
            set(inst.d[0], bits_of(arithmetic(inst.op, as_f64(a), as_f64(c), as_f64(e))));
          } else if (type.is_float()) {
            fail("line %d: 16-bit arithmetic", inst.line);
          } else {
            const int64_t sa = sign_extended(a, bytes), sc = sign_extended(c, bytes);
            const uint64_t ua = a & mask_of(bytes), uc = c & mask_of(bytes);
            const bool is_signed = type.kind == Kind::Signed;
            if ((inst.op == Op::Div || inst.op == Op::Rem) && uc == 0)
              fail("division by zero: %s", place(b, t, inst).c_str());
            uint64_t bits = 0;
            switch (inst.op) {
              case Op::Add: bits = ua + uc; break;
              case Op::Sub: bits = ua - uc; break;
              case Op::Mul: bits = ua * uc; break;
              case Op::Mad: bits = ua * uc + e; break;
              case Op::Div: bits = is_signed ? uint64_t(sa / sc) : ua / uc; break;
              case Op::Rem: bits = is_signed ? uint64_t(sa % sc) : ua % uc; break;
              case Op::Min: bits = is_signed ? uint64_t(std::min(sa, sc)) : std::min(ua, uc); break;
              case Op::Max: bits = is_signed ? uint64_t(std::max(sa, sc)) : std::max(ua, uc); break;
              default: fail("line %d", inst.line);
            }
            set(inst.d[0], bits & mask_of(bytes));
          }
          break;
        }
        case Op::MulWide:
        case Op::MadWide: {
          const uint64_t a = value(inst.s[0]), c = value(inst.s[1]);
          uint64_t bits = type.kind == Kind::Signed ? uint64_t(sign_extended(a, bytes) * sign_extended(c, bytes))
                                                    : (a & mask_of(bytes)) * (c & mask_of(bytes));
          if (inst.op == Op::MadWide) bits += value(inst.s[2]);
          set(inst.d[0], bits & mask_of(2 * bytes));
          break;
        }
        case Op::MulHi: {
          const uint64_t a = value(inst.s[0]), c = value(inst.s[1]);
          const __int128 product = type.kind == Kind::Signed
                                       ? __int128(sign_extended(a, bytes)) * sign_extended(c, bytes)
                                       : __int128((unsigned __int128)(a & mask_of(bytes)) * (c & mask_of(bytes)));
          set(inst.d[0], uint64_t((unsigned __int128)product >> (8 * bytes)) & mask_of(bytes));
          break;
        }
        case Op::Neg: {
          const uint64_t a = value(inst.s[0]);
          set(inst.d[0], type.is_float() ? a ^ (1ull << (8 * bytes - 1)) : (0 - a) & mask_of(bytes));
          break;
        }
        case Op::Abs: {
          const uint64_t a = value(inst.s[0]);
          set(inst.d[0], type.is_float() ? a & (mask_of(bytes) >> 1)
                                         : uint64_t(std::llabs(sign_extended(a, bytes))) & mask_of(bytes));
          break;
        }
        case Op::And: set(inst.d[0], value(inst.s[0]) & value(inst.s[1])); break;
        case Op::Or: set(inst.d[0], value(inst.s[0]) | value(inst.s[1])); break;
        case Op::Xor: set(inst.d[0], value(inst.s[0]) ^ value(inst.s[1])); break;
        case Op::Not:
          set(inst.d[0], type.kind == Kind::Pred ? !(value(inst.s[0]) & 1) : ~value(inst.s[0]) & mask_of(bytes));
          break;
        case Op::Shl: {
          const uint32_t by = uint32_t(value(inst.s[1]));
          set(inst.d[0], by >= unsigned(8 * bytes) ? 0 : value(inst.s[0]) << by & mask_of(bytes));
          break;
        }
        case Op::Shr: {
          const uint32_t by = std::min<uint32_t>(uint32_t(value(inst.s[1])), 64);
          const uint64_t a = value(inst.s[0]);
          if (type.kind == Kind::Signed) {
            set(inst.d[0], uint64_t(sign_extended(a, bytes) >> std::min<uint32_t>(by, 63)) & mask_of(bytes));
          } else {
            set(inst.d[0], by > 63 ? 0 : (a & mask_of(bytes)) >> by);
          }
          break;
        }
        case Op::Setp: {
          const uint64_t a = value(inst.s[0]), c = value(inst.s[1]);
          bool result = false;
          if (type.kind == Kind::Float) {
            result = bytes == 4 ? compare(inst.cmp, as_f32(a), as_f32(c)) : compare(inst.cmp, as_f64(a), as_f64(c));
            if (bytes == 2) fail("line %d", inst.line);
          } else if (type.kind == Kind::Signed) {
            result = compare(inst.cmp, sign_extended(a, bytes), sign_extended(c, bytes));
          } else {
            result = compare(inst.cmp, a & mask_of(bytes), c & mask_of(bytes));
          }
          set(inst.d[0], result);
          break;
        }
        case Op::Selp: set(inst.d[0], value(value(inst.s[2]) & 1 ? inst.s[0] : inst.s[1]) & mask_of(bytes)); break;
        case Op::Cvt: set(inst.d[0], converted(inst, value(inst.s[0]))); break;
        case Op::Bra: pc = inst.target; continue;
        case Op::Ret:
          flush_to(thread.pending, b.pending);
          thread.state = State::Done;
          thread.pc = pc;
          ++b.done;
          instructions += executed + 1;
          if (b.waiting) fail("block %u: thread %u leaves while %u wait at a barrier", b.index, t, b.waiting);
          return;
        case Op::Bar:
          if (value(inst.s[0]) != 0) fail("line %d: named barrier", inst.line);
          thread.pc = pc;
          thread.state = State::Barrier;
          ++b.waiting;
          leave_barrier(b, t);
          instructions += executed + 1;
          return;
        case Op::BarWarp:
        case Op::Shfl:
        case Op::Vote:
          thread.pc = pc;
          thread.state = State::Warp;
          if (!meet(b, t, inst)) {
            instructions += executed + 1;
            return;
          }
          pc = thread.pc;
          continue;
        case Op::Fence:
          if (inst.how == 'g') {
            flush(b.pending);
            flush(thread.pending);
            thread.acquired = thread.counted;
          }
          break;
        case Op::Atom: {
          const uint64_t address = value(inst.s[0]) + uint64_t(int64_t(inst.target));
          if (inst.space != Space::Global || bytes != 4) fail("line %d: atom", inst.line);
          check(b, t, inst, address, size_t(bytes), false);
          check(b, t, inst, address, size_t(bytes), true);
          uint32_t& cell = *reinterpret_cast<uint32_t*>(address);
          const uint32_t old = cell, operand = uint32_t(value(inst.s[1]));
          thread.counted = true;
          flush_to(b.pending, b.late);
          flush_to(thread.pending, b.late);
          switch (inst.how) {
            case 'i': cell = old >= operand ? 0 : old + 1; break;
            case 'a': cell = old + operand; break;
            case 'e': cell = operand; break;
            case 'c': cell = old == operand ? uint32_t(value(inst.s[2])) : old; break;
            default: fail("line %d: atom", inst.line);
          }
          set(inst.d[0], old);
          break;
        }
        case Op::Prmt: {
          const uint64_t both = (value(inst.s[0]) & 0xffffffffu) | value(inst.s[1]) << 32;
          const uint32_t how = uint32_t(value(inst.s[2]));
          uint32_t bits = 0;
          for (int n = 0; n < 4; ++n) {
            const uint32_t nibble = how >> (4 * n) & 15;
            uint32_t byte = uint32_t(both >> (8 * (nibble & 7))) & 0xff;
            if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
            bits |= byte << (8 * n);
          }
          set(inst.d[0], bits);
          break;
        }
        case Op::Bfi: {
          const uint32_t at = uint32_t(value(inst.s[2])) & 0xff, length = uint32_t(value(inst.s[3])) & 0xff;
          uint64_t field = length >= 64 ? ~0ull : (1ull << length) - 1;
          field = at >= 64 ? 0 : field << at;
          field &= mask_of(bytes);
          set(inst.d[0], (value(inst.s[1]) & ~field) | (at >= 64 ? 0 : value(inst.s[0]) << at & field));
          break;
        }
        case Op::Bfe: {
          const uint64_t a = value(inst.s[0]);
          const int at = int(value(inst.s[1]) & 0xff), length = int(value(inst.s[2]) & 0xff), last = 8 * bytes - 1;
          const bool fill = type.kind == Kind::Signed && length > 0 && (a >> std::min(at + length - 1, last) & 1);
          uint64_t bits = 0;
          for (int n = 0; n <= last; ++n) {
            bits |= uint64_t(n < length && at + n <= last ? a >> (at + n) & 1 : fill) << n;
          }
          set(inst.d[0], bits);
          break;
        }
        case Op::Clz: {
          const uint64_t a = value(inst.s[0]) & mask_of(bytes);
          set(inst.d[0], a ? uint64_t(__builtin_clzll(a)) - uint64_t(64 - 8 * bytes) : uint64_t(8 * bytes));
          break;
        }
        case Op::Popc: set(inst.d[0], uint64_t(__builtin_popcountll(value(inst.s[0]) & mask_of(bytes)))); break;
        case Op::Brev: {
          const uint64_t a = value(inst.s[0]);
          uint64_t bits = 0;
          for (int n = 0; n < 8 * bytes; ++n) bits |= (a >> n & 1) << (8 * bytes - 1 - n);
          set(inst.d[0], bits);
          break;
        }
        case Op::Ex2: {
          if (!inst.ftz || bytes != 4) fail("line %d: ex2", inst.line);
          float x = as_f32(value(inst.s[0]));
          if (std::fpclassify(x) == FP_SUBNORMAL) x = std::copysign(0.0f, x);
          float exact = float(std::exp2(double(x)));
          if (std::fpclassify(exact) == FP_SUBNORMAL) exact = 0.0f;
          set(inst.d[0], bits_of(unit(exact, 2)));
          break;
        }
        case Op::Rcp: {
          if (!inst.ftz) {  // rcp.rn
            const uint64_t a = value(inst.s[0]);
            set(inst.d[0], bytes == 4 ? bits_of(1.0f / as_f32(a)) : bits_of(1.0 / as_f64(a)));
            break;
          }
          if (bytes != 4) fail("line %d: rcp", inst.line);
          float x = as_f32(value(inst.s[0]));
          if (std::fpclassify(x) == FP_SUBNORMAL) x = std::copysign(0.0f, x);
          set(inst.d[0], bits_of(unit(1.0f / x, 1)));
          break;
        }
        case Op::Assert: fail("assertion: %s", place(b, t, inst).c_str());
      }
      ++pc;
    }
    thread.pc = pc;
    instructions += executed;
  }

  std::vector<Allocation> allocations_;
  size_t last_ = 0;
  std::vector<std::unique_ptr<Block>> pool_;
  std::mt19937_64 random_;
  Function* f_ = nullptr;
  const std::vector<uint8_t>* params_ = nullptr;
  unsigned grid_ = 0;
  unsigned threads_ = 0;
};

}  // namespace ptx
