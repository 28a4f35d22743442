#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace gsto::cpu {
namespace {

constexpr size_t kCapacity = size_t{256} << 10;

struct Stack {
  char* base = nullptr;
  size_t used = 0;
  ~Stack() { free(base); }
};

thread_local Stack stack;

void* from_heap(size_t bytes) {
  void* data = aligned_alloc(64, bytes);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

size_t rounded(size_t bytes) { return (bytes + 64) / 64 * 64; }

}  // namespace

void* take_scratch(size_t bytes) {
  bytes = rounded(bytes);
  if (bytes > kCapacity - stack.used) return from_heap(bytes);
  if (stack.base == nullptr) stack.base = static_cast<char*>(from_heap(kCapacity));
  void* data = stack.base + stack.used;
  stack.used += bytes;
  return data;
}

void give_scratch_back(void* data, size_t bytes) {
  const char* address = static_cast<char*>(data);
  if (stack.base != nullptr && address >= stack.base && address < stack.base + kCapacity)
    stack.used -= rounded(bytes);
  else
    free(data);
}

}  // namespace gsto::cpu
