#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>

#include <cstdint>
#endif

namespace fused_sce::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)
void prefer_large_pages(void* data, size_t bytes) {
  constexpr uintptr_t kLargePage = uintptr_t(2) << 20;
  // The whole large pages inside the memory: others may share the pages at its ends. Fewer than two are not worth the
  // call.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kLargePage - 1) & ~(kLargePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kLargePage - 1);
  if (end < begin + 2 * kLargePage) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}
#else
void prefer_large_pages(void*, size_t) {}
#endif

}  // namespace fused_sce::cpu
