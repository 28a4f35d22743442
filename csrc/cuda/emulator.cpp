// The scheduler behind cuda/emulator.h. One block at a time; within it every fiber runs until it waits for others.
#include "cuda/emulator.h"

#include <ucontext.h>

#include <deque>
#include <memory>
#include <string>
#include <vector>

dim3 threadIdx, blockIdx, gridDim;

namespace gsto::cuda::emulator {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuardBytes = 8192;   // on both sides of the shared memory
constexpr size_t kExchangeBytes = 32;  // per lane
constexpr char kGuard = '\x5a';

// Switches stacks. On x86-64 only the registers that a call preserves: ucontext makes a system call per switch, and a
// test makes millions of switches.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
asm(R"(
.text
.p2align 4
gsto_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void gsto_emulator_switch(Context* from, Context* to);

void switch_to(Context& from, Context& to) { gsto_emulator_switch(&from, &to); }

void prepare(Context& context, char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<void**>(stack + kStackBytes - 64);
  *--top = nullptr;  // the entry's return address: it never returns; keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}
#else
using Context = ucontext_t;

void switch_to(Context& from, Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, entry, 0);
}
#endif

struct Meeting {  // of the threads of a block or a warp
  int expected = 0, arrived = 0;
  int64_t generation = 0;

  void arrive() {
    if (++arrived == expected) {
      arrived = 0;
      ++generation;
    }
  }
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const Meeting* waits_for = nullptr;
  int64_t generation = 0;
  int64_t exchanges = 0;
  bool done = false;
  std::deque<std::vector<Copy>> copies;  // the last group is open

  bool ready() const { return !done && (waits_for == nullptr || waits_for->generation > generation); }
};

struct Warp {
  Meeting meeting;
  alignas(16) char values[2][32 * kExchangeBytes];
};

struct Block {
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting barrier;
  int barrier_line = 0;
  const char* barrier_file = nullptr;
  std::vector<char> memory;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  std::string error;
};

Block* block = nullptr;
int running = 0;
std::string error_message;

void wait_for(Meeting& meeting) {
  Fiber& fiber = block->fibers[running];
  fiber.waits_for = &meeting;
  fiber.generation = meeting.generation;
  meeting.arrive();
  while (!fiber.ready()) switch_to(fiber.context, block->scheduler);
  fiber.waits_for = nullptr;
}

void enter() {
  (*block->body)();
  block->fibers[running].done = true;
  switch_to(block->fibers[running].context, block->scheduler);
}

char* shared_begin() {
  const auto address = reinterpret_cast<uintptr_t>(block->memory.data()) + kGuardBytes;
  return reinterpret_cast<char*>((address + 15) / 16 * 16);
}

bool guards_intact() {
  const char* begin = shared_begin();
  for (const char* c = begin - kGuardBytes / 2; c < begin; ++c)
    if (*c != kGuard) return false;
  for (const char* c = begin + block->shared_bytes; c < begin + block->shared_bytes + kGuardBytes; ++c)
    if (*c != kGuard) return false;
  return true;
}

// Runs the block that blockIdx names; returns why it failed, or an empty string.
std::string run_block(bool descending) {
  const int threads = static_cast<int>(block->fibers.size());
  block->memory.assign(block->shared_bytes + 3 * kGuardBytes, kGuard);
  std::memset(shared_begin(), 0xff, block->shared_bytes);  // all ones is a NaN in every type
  block->error.clear();
  block->barrier = Meeting{threads, 0, 0};
  for (auto& warp : block->warps) warp.meeting = Meeting{32, 0, 0};
  for (auto& fiber : block->fibers) {
    prepare(fiber.context, fiber.stack.get(), enter);
    fiber.waits_for = nullptr;
    fiber.exchanges = 0;
    fiber.done = false;
    fiber.copies.assign(1, {});
  }
  for (int done = 0; done < threads;) {
    bool progress = false;
    done = 0;
    for (int i = 0; i < threads; ++i) {
      running = descending ? threads - 1 - i : i;
      Fiber& fiber = block->fibers[running];
      if (fiber.ready()) {
        threadIdx = dim3(static_cast<unsigned>(running), 0, 0);
        switch_to(block->scheduler, fiber.context);
        progress = true;
      }
      if (!block->error.empty()) return block->error;
      done += fiber.done;
    }
    if (!progress && done < threads)
      return "some threads wait at a barrier or a warp operation that others never reach";
  }
  return guards_intact() ? "" : "write outside the block's shared memory";
}

}  // namespace

char* shared_memory() { return shared_begin(); }

void sync_threads(int line, const char* file) {
  if (block->barrier.arrived == 0) {
    block->barrier_line = line;
    block->barrier_file = file;
  } else if (block->barrier_line != line || std::strcmp(block->barrier_file, file) != 0) {
    block->error = "threads meet at different barriers: " + std::string(file) + ":" + std::to_string(line) + " and " +
                   block->barrier_file + ":" + std::to_string(block->barrier_line);
  }
  wait_for(block->barrier);
}

const void* exchange(const void* value, size_t bytes) {
  // Two buffers in turn: a lane can write the one only after all lanes have read what was in it two exchanges ago.
  Warp& warp = block->warps[running / 32];
  char* values = warp.values[block->fibers[running].exchanges++ % 2];
  std::memcpy(values + static_cast<size_t>(running % 32) * bytes, value, bytes);
  wait_for(warp.meeting);
  return values;
}

void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    block->error = "access of " + std::to_string(bytes) + " bytes at an address that is no multiple of it";
}

void copy_async(void* to, const void* from, int bytes) {
  check_aligned(to, 16);
  check_aligned(from, 16);
  block->fibers[running].copies.back().push_back({to, from, bytes});
}

void commit_copies() { block->fibers[running].copies.emplace_back(); }

void wait_copies(int pending) {
  auto& copies = block->fibers[running].copies;
  while (static_cast<int>(copies.size()) - 1 > pending) {
    for (const Copy& copy : copies.front()) {
      std::memset(copy.to, 0, 16);
      std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    }
    copies.pop_front();
  }
}

cudaError_t launch(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& body) {
  error_message.clear();
  constexpr size_t kLimit = 163 << 10;  // of a block on sm_80, the least of the supported architectures
  if (shared_bytes > kLimit) {
    error_message = std::to_string(shared_bytes) + " bytes of shared memory, the limit is " + std::to_string(kLimit);
    return cudaErrorInvalidValue;
  }
  Block state;
  state.fibers = std::vector<Fiber>(static_cast<size_t>(threads));
  state.warps = std::vector<Warp>(static_cast<size_t>(threads / 32));
  state.shared_bytes = shared_bytes;
  state.body = &body;
  block = &state;
  gridDim = grid;
  unsigned count = 0;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        error_message = run_block(count++ % 2 == 1);
        if (!error_message.empty()) {
          error_message += " (block " + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
          return cudaErrorLaunchFailure;
        }
      }
    }
  }
  return cudaSuccess;
}

const char* last_error() { return error_message.c_str(); }

}  // namespace gsto::cuda::emulator
